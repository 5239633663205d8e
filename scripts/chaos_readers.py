"""Those who watch the chaos from outside, over HTTP: readers of streams, and an owner who steers tasks.

A reader follows one task, or all of them, over as many connections as it takes, to any replica, and goes on with the
last id that it saw, as an EventSource does (HTML standard, §9.2): a frame counts when its blank line has come. It also
leaves by itself at random places.
"""

import asyncio
import random
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

import httpx
from chaos_clients import TIMEOUT_SECONDS, impatience
from httptools import HttpParserError, HttpResponseParser
from msgspec import Struct

from app.identity import DEVELOPMENT_KEY

SILENCE_SECONDS = 4.0
"""A replica that does not even ping, each second, has been stopped: the reader tries another."""
PAUSE_SECONDS = 0.1
"""Before it connects again; a real one waits for longer."""
ANSWERED = {200, 204}


class Frame(NamedTuple):
    event: str
    data: str
    id: str


class Reader:
    def __init__(self, path: str, ports: list[int], dice: random.Random, *, task: str = "") -> None:
        self.task, self.cursor = task, ""
        self.frames: list[Frame] = []
        self.connections, self.bytes = 0, 0
        self.wrong: list[str] = []
        """Answers that no reader may get."""
        self.leave = asyncio.Event()
        self._path, self._ports, self._dice = path, ports, dice
        self._text, self._fields = b"", dict[str, str]()
        self._parser = HttpResponseParser(self)
        self._whole = False

    @property
    def done(self) -> bool:
        return bool(self.frames) and self.frames[-1].event == "done"

    async def follow(self) -> None:
        """Until `done`, or until it is told to leave."""
        while not (self.done or self.leave.is_set()):
            with suppress(OSError, HttpParserError):  # TimeoutError is one
                await self._connect(self._dice.choice(self._ports))
            if self._whole and not self.done and self.frames:
                self.wrong.append(f"a clean end without `done`, behind {self.frames[-1]}")
            await asyncio.sleep(PAUSE_SECONDS)

    async def _connect(self, port: int) -> None:
        self.connections += 1
        self._parser, self._whole, self._text, self._fields = HttpResponseParser(self), False, b"", {}
        source, sink = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = [f"GET {self._path} HTTP/1.1", "Host: localhost", f"X-API-Key: {DEVELOPMENT_KEY}"]
            head += ["Accept: text/event-stream", *([f"Last-Event-ID: {self.cursor}"] if self.cursor else [])]
            sink.write("\r\n".join([*head, "", ""]).encode())
            left = self._dice.choice((self._dice.randrange(4000), 1_000_000))
            while left > 0 and not (self._whole or self.leave.is_set()):
                async with asyncio.timeout(SILENCE_SECONDS):
                    data = await source.read(min(left, 65536))
                if not data:
                    break
                self.bytes += len(data)
                left -= len(data)
                self._parser.feed_data(data)
        finally:
            sink.transport.abort()

    # What httptools calls.

    def on_headers_complete(self) -> None:
        if (status := self._parser.get_status_code()) not in ANSWERED:
            self.wrong.append(f"HTTP status {status}")

    def on_message_complete(self) -> None:
        self._whole = True

    def on_body(self, data: bytes) -> None:
        *found, self._text = (self._text + data).split(b"\n")
        for line in found:
            name, _, value = line.decode().partition(":")
            if name and name != "retry":
                self._fields[name] = value.removeprefix(" ")
            elif not line:
                self.cursor = self._fields.get("id", self.cursor)
                if "data" in self._fields:
                    self.frames.append(Frame(*(self._fields.get(field, "") for field in Frame._fields)))
                self._fields = {}


# The owner


class Control(Struct):
    """Something that was asked of a task, under a reason of its own, until somebody answered."""

    verb: str
    task: str
    reason: str
    accepted: bool = False
    answer: str = ""


class Owner:
    def __init__(self, ports: list[int], dice: random.Random) -> None:
        self.ports, self.dice = ports, dice
        self.controls: list[Control] = []
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._http = httpx.AsyncClient(headers={"X-API-Key": DEVELOPMENT_KEY}, timeout=TIMEOUT_SECONDS)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Until somebody answers, and not with 503."""
        while True:
            url = f"http://127.0.0.1:{self.dice.choice(self.ports)}/api/v1/tasks{path}"
            try:
                response = await self._http.request(method, url, timeout=impatience(self.dice), **options)
            except httpx.TransportError:
                self.answers["none"] += 1
            else:
                self.answers[str(response.status_code)] += 1
                if response.status_code < 500:
                    return response
                if response.status_code != 503:
                    self.wrong.append(f"{response.status_code} to {method} {path}: {response.text[:300]}")
            await asyncio.sleep(0.1)

    async def steer(self, verb: str, task: str) -> Control:
        one = Control(verb, task, f"{verb} {len(self.controls)}")
        self.controls.append(one)
        key = {"Idempotency-Key": one.reason}
        response = await self.ask("POST", f"/{task}/{verb}", json={"reason": one.reason}, headers=key)
        one.answer = f"{response.status_code} {response.text[:200]}"
        one.accepted = response.status_code == 202 and response.json().get("success") is True
        if response.status_code not in {202, 409}:
            self.wrong.append(f"{one.answer} to {verb} of {task}")
        return one

    async def pause_for_a_while(self, task: str) -> None:
        await self.steer("pause", task)
        await asyncio.sleep(self.dice.uniform(0.1, 2))
        await self.steer("resume", task)

    async def open_tasks(self) -> int:
        response = await self.ask("GET", "", params={"status": "QUEUED,RUNNING,PAUSED", "limit": 1})
        count: int = response.json()["total_count"]
        return count

    async def resume_all(self) -> None:
        """What was paused while nobody could resume it, for example because its handler waited for a decision."""
        response = await self.ask("GET", "", params={"status": "PAUSED", "limit": 100})
        for item in response.json()["tasks"]:
            await self.steer("resume", item["task_id"])
