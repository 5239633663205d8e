"""The worker over HTTP of `scripts/chaos`, as one in any language would be, and a process like any other of its victims:

    python scripts/chaos_http.py FOLDER PORT…

It knows `/worker/v1` and nothing else of Taskcast. It asks any API, gives up on a share of the answers, and repeats the
same call until it has one. Told to stop (SIGTERM), it gives back what it holds.
"""

import asyncio
import os
import random
import secrets
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
from chaos_clients import TIMEOUT_SECONDS, Fact, impatience
from chaos_handlers import FLAKY_ATTEMPTS, HTTP, Voice

from app.identity import DEVELOPMENT_KEY

Json = dict[str, Any]
FACTS = "http-worker.facts"
SLOTS = 3
WAIT_SECONDS_MAX = 2.0
LONGER, LONGER_SECONDS = 0.25, 5.0
"""Of the claims: those that ask for another lease than the run's."""
BEAT_SECONDS = 0.5
AGAIN = 0.1
"""Of the reports: those that are repeated although they were answered."""
RELEASE_SECONDS_MAX = 3.0
REST_SECONDS = 0.1


class Over(Exception):
    """This attempt is not this worker's any more."""


class Worker:
    def __init__(self, folder: Path, ports: list[int], http: httpx.AsyncClient) -> None:
        self.ports, self.http, self.dice = ports, http, random.Random()
        self.held: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._facts = os.open(folder / FACTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(self._facts, b"\n")  # behind a line that a kill has cut

    def fact(self, what: str, task: str = "", name: str = "") -> None:
        os.write(self._facts, msgspec.json.encode(Fact(what, task, name)) + b"\n")

    async def ask(self, path: str, body: Json | None = None) -> httpx.Response:
        """The same call, to any API, until one answers."""
        while True:
            url = f"http://127.0.0.1:{self.dice.choice(self.ports)}/worker/v1{path}"
            with suppress(httpx.TransportError):
                method, patience = "POST" if body else "GET", impatience(self.dice)
                response = await self.http.request(method, url, json=body, timeout=patience)
                if response.status_code < 500:
                    return response
                if response.status_code != 503:
                    self.wrong(response)
            self.fact("repeated", name=path)
            await asyncio.sleep(0.05)

    def wrong(self, response: httpx.Response) -> None:
        asked = f"{response.request.url.path} {response.request.content.decode()[:300]}"
        self.fact("answer", name=f"{response.status_code} to {asked}: {response.text[:300]}")

    # Claims

    async def slot(self) -> None:
        while True:
            claim: Json = {"worker": f"http-{os.getpid()}", "queues": [HTTP], "claim": secrets.token_hex(16)}
            claim |= {"slots": self.dice.randint(1, 2), "wait_seconds": self.dice.uniform(0, WAIT_SECONDS_MAX)}
            if self.dice.random() < LONGER:
                claim["lease_seconds"] = LONGER_SECONDS
            response = await self.ask("/claim", claim)
            if response.status_code != 200:
                self.wrong(response)
                continue
            working = []
            for task in response.json()["tasks"]:
                one = asyncio.create_task(self.attempt(task))
                self.held[task["id"], task["fence"]] = one
                working.append(one)
            if working:
                await asyncio.wait(working)
            for one in working:
                if not one.cancelled():
                    one.result()  # raises what nobody foresaw

    async def beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            if not (held := [*self.held]):
                continue
            body = {"tasks": [{"id": id_, "fence": fence} for id_, fence in held]}
            response = await self.ask("/heartbeat", body)
            if response.status_code != 200:
                self.wrong(response)
                continue
            for key, told in zip(held, response.json()["tasks"], strict=True):
                if told["cancelled"] and (one := self.held.get(key)):
                    self.fact("cancelled", key[0], told["status"])
                    one.cancel()

    # Attempts

    async def attempt(self, task: Json) -> None:
        key = task["id"], task["fence"]
        voice = Voice(*key)
        one = Attempt(self, task, voice)
        try:
            await one.work()
        except Over as error:
            self.fact("cancelled", key[0], str(error))
        finally:
            voice.close()
            del self.held[key]

    async def give_back(self, id_: str, fence: int) -> None:
        """Under the number that the store expects: a report may have been on its way."""
        look = await self.ask(f"/tasks/{id_}?fence={fence}")
        if look.status_code == 200 and not look.json()["cancelled"]:
            await self.ask(f"/tasks/{id_}/release", {"fence": fence, "n": look.json()["n"] + 1})

    async def run(self) -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        working = [asyncio.create_task(self.slot()) for _ in range(SLOTS)] + [asyncio.create_task(self.beat())]
        stopping = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait([*working, stopping], return_when=asyncio.FIRST_COMPLETED)
        held = {**self.held}
        for one in [*working, *held.values()]:
            one.cancel()
        await asyncio.gather(*working, *held.values(), return_exceptions=True)
        for one in done - {stopping}:
            one.result()
        with suppress(TimeoutError):  # its leases end anyway
            async with asyncio.timeout(RELEASE_SECONDS_MAX):
                await asyncio.gather(*(self.give_back(*key) for key in held))


class Attempt:
    def __init__(self, worker: Worker, task: Json, voice: Voice) -> None:
        self.worker, self.task, self.voice, self.n = worker, task, voice, 0

    async def work(self) -> None:
        context, dice, voice = self.task["context"], self.worker.dice, self.voice
        await self.say({"type": "progress", "fraction": 0, "message": voice.word()})
        for step in range(context["steps"]):
            await asyncio.sleep(context["pause_ms"] / 1000)
            said: list[Json] = [{"type": "delta", "text": voice.word()} for _ in range(dice.randint(1, 3))]
            if dice.random() < 0.3:
                tool = {"tool": "count", "call": f"call-{step}"}
                said.append({"type": "tool_called", **tool, "params": {"said": voice.word()}})
                said.append({"type": "tool_returned", **tool, "output": voice.word()})
            await self.say(*said)
        kind = context["kind"]
        if kind == "http-fail":
            await self.end("fail", error="as it was told")
        elif kind == "http-flaky" and self.task["attempt"] < FLAKY_ATTEMPTS:
            await self.end("fail", error="not yet", retry=True, delay_seconds=dice.choice((None, 0, 0.5)))
        else:
            await self.say({"type": "event", "name": "CHAOS_ENDING", "message": voice.word()})
            await self.end("finish", result=f"{self.task['query']} is done")

    async def say(self, *said: Json) -> None:
        """Returns when the store has all of it, and nobody wants the task to rest. Raises Over."""
        path = f"/tasks/{self.task['id']}/events"
        body = {"fence": self.task["fence"], "events": [{"n": self.n + i, **one} for i, one in enumerate(said, 1)]}
        response = await self.worker.ask(path, body)
        told = self.told(response)
        if response.status_code != 200 or told["accepted"] + told["duplicates"] != len(said):
            self.worker.wrong(response)
        self.n += len(said)
        self.voice.said()
        if self.worker.dice.random() < AGAIN:
            again = await self.worker.ask(path, body)
            if self.told(again)["accepted"]:
                self.worker.wrong(again)
        if told["paused"]:
            await self.rest()

    async def rest(self) -> None:
        body = {"fence": self.task["fence"], "events": [{"n": self.n + 1, "type": "paused", "checkpoint": "here"}]}
        response = await self.worker.ask(f"/tasks/{self.task['id']}/events", body)
        told = self.told(response)
        if response.status_code == 200:
            self.n += 1
        elif response.status_code != 409 or told["status"] != "running":  # else it was resumed meanwhile
            self.worker.wrong(response)
        while told["paused"]:
            await asyncio.sleep(REST_SECONDS)
            told = self.told(await self.worker.ask(f"/tasks/{self.task['id']}?fence={self.task['fence']}"))

    async def end(self, how: str, **said: Any) -> None:
        """A pause that somebody asked for meanwhile is over when the task is: the end is accepted."""
        body = {"fence": self.task["fence"], "n": self.n + 1, **said}
        response = await self.worker.ask(f"/tasks/{self.task['id']}/{how}", body)
        if response.status_code != 200:
            self.told(response)
            self.worker.wrong(response)

    @staticmethod
    def told(response: httpx.Response) -> Json:
        """Raises Over."""
        told: Json = response.json()
        if response.status_code == 404 or told.get("cancelled"):
            raise Over(f"{response.status_code} {told.get('status')} {told.get('fence', '')}")
        return told


async def main(folder: Path, ports: list[int]) -> None:
    headers = {"X-API-Key": DEVELOPMENT_KEY}
    async with httpx.AsyncClient(headers=headers, timeout=TIMEOUT_SECONDS) as http:
        await Worker(folder, ports, http).run()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), [int(port) for port in sys.argv[2:]]))
