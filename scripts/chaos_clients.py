"""The clients of `scripts/chaos`, as a process that may be killed like any other:

    python scripts/chaos_clients.py FOLDER SEED FIRST STEP COUNT SECONDS PORT…

It submits the tasks FIRST, FIRST + STEP … below COUNT, in about so many seconds, over HTTP or straight to the store,
each until it has heard an answer, which it then writes down. Meanwhile it is the human who decides what handlers ask,
and a zombie: a worker that claims a task, says a little, falls silent until it has lost the task, and then goes on
writing. Killed and started again, it goes on where its files say.
"""

import asyncio
import os
import random
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import msgspec
from chaos_handlers import HTTP, PLAIN, PROCESS, Voice
from msgspec import Struct

from app import events
from app.errors import Conflict, Invalid, NotFound, TaskcastError
from app.identity import DEVELOPMENT_KEY, DEVELOPMENT_ORG, DEVELOPMENT_USER
from app.queues import Claimed
from app.settings import Settings
from app.store import Store, open_store
from app.task import LEASED, Status

ORG = DEVELOPMENT_ORG
KINDS = {
    "stream": 30,
    "tool": 12,
    "plain": 14,
    "flaky": 10,
    "parent": 10,
    "approve": 8,
    "slow": 8,
    "review": 4,
    "fail": 5,
    "raise": 3,
    "process": 2,
    "http": 12,
    "http-flaky": 4,
    "http-fail": 2,
}
"""What tasks are like, and how many of a hundred or so are."""
QUEUES = {"plain": PLAIN, "process": PROCESS, "http": HTTP, "http-flaky": HTTP, "http-fail": HTTP}
"""Of those that are not for the usual one."""
FAILING = {"fail", "http-fail"}
GO = "go"
"""A file: the readers are there, the submissions may begin."""
IMPATIENT, TWINS = 0.25, 0.1
"""Of the requests: those whose answer nobody waits for, and those that are made twice at the same moment."""
TIMEOUT_SECONDS = 5.0
ZOMBIE = "zombie"
LATE = "said by a zombie"
ZOMBIE_PAUSE_SECONDS = 1.5
"""Between two tasks that it takes: each costs one of three attempts."""


class Plan(Struct, frozen=True, kw_only=True):
    """A task, as its number and the run's seed make it."""

    number: int
    kind: str
    native: bool
    """Straight to the store, which Shannon's API cannot name a queue of."""
    query: str
    context: dict[str, Any]
    delay_seconds: float
    timeout_seconds: float
    ttl_seconds: float
    """Both from the end of the delay."""
    priority: int
    max_attempts: int
    """0: as many as usual."""

    @property
    def name(self) -> str:
        return f"chaos-{self.number}"


def plan(seed: int, number: int) -> Plan:
    dice = random.Random(f"{seed}/{number}")
    kind = dice.choices([*KINDS], [*KINDS.values()])[0]
    native = kind in {*QUEUES, *FAILING} or dice.random() < 0.3
    slow = kind == "slow"
    return Plan(
        number=number,
        kind=kind,
        native=native,
        query=f"Task {number} of a run in chaos",
        context={
            "kind": kind,
            "steps": 14 if slow else dice.randint(3, 7),
            "pause_ms": 300 if slow else dice.randint(40, 350),
        },
        timeout_seconds=dice.uniform(1, 3) if dice.random() < 0.08 else 0,
        delay_seconds=dice.uniform(0.5, 3) if dice.random() < 0.12 else 0,
        ttl_seconds=dice.uniform(1, 2) if dice.random() < 0.06 else 0,
        priority=dice.choice((0, 0, 0, 1, 2)),
        max_attempts=dice.choice((0, 0, 0, 0, 0, 2, 5)),
    )


class Ack(Struct, frozen=True):
    """A line of a client's file: this task was accepted."""

    number: int
    task: str
    tries: int


class Fact(Struct, frozen=True):
    """A line of its other file: what it did besides or, as `run_at`, is about to ask for; and `finished` when all is
    submitted.
    """

    what: str
    task: str = ""
    name: str = ""


def lines(folder: Path, pattern: str, kind: type[Any]) -> list[Any]:
    """Of all such files; a kill may cut a line, which then promises nothing."""
    found = []
    for file in sorted(folder.glob(pattern)):
        for line in file.read_bytes().split(b"\n"):
            with suppress(msgspec.DecodeError):
                found.append(msgspec.json.decode(line, type=kind))
    return found


def impatience(dice: random.Random) -> float:
    """Seconds after which a client no longer waits for the answer to what it will then ask again."""
    return dice.uniform(0.001, 0.04) if dice.random() < IMPATIENT else TIMEOUT_SECONDS


class Client:
    def __init__(self, folder: Path, seed: int, numbers: range, seconds: float, ports: list[int]) -> None:
        self.seed, self.ports, self.go = seed, ports, folder / GO
        self.pause = seconds / len(numbers)
        name = f"client-{numbers.start}"
        self._acks = os.open(folder / f"{name}.acks", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._facts = os.open(folder / f"{name}.facts", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        for file in (self._acks, self._facts):
            os.write(file, b"\n")  # behind a line that a kill has cut
        acks: list[Ack] = lines(folder, f"{name}.acks", Ack)
        self.accepted = {ack.number: ack.task for ack in acks}
        self.numbers = [number for number in numbers if number not in self.accepted]
        facts: list[Fact] = lines(folder, f"{name}.facts", Fact)
        self.run_at = {fact.task: fact.name for fact in facts if fact.what == "run_at"}
        self.dice = random.Random(f"{seed}/{name}/{len(acks)}")

    def fact(self, what: str, task: str = "", name: str = "") -> None:
        os.write(self._facts, msgspec.json.encode(Fact(what, task, name)) + b"\n")

    # The producer

    async def produce(self, store: Store, http: httpx.AsyncClient) -> None:
        while not self.go.exists():
            await asyncio.sleep(0.05)
        for number in self.numbers:
            one, tries, id_ = plan(self.seed, number), 0, ""
            while not id_:
                tries += 1
                try:
                    id_ = await (self.submit_natively(store, one) if one.native else self.submit(http, one))
                except Invalid as error:  # it will not become better
                    self.fact("answer", name=f"{error} (to the submission of {one})")
                    break
                except (TaskcastError, httpx.TransportError):
                    pass
                if not id_:
                    await asyncio.sleep(0.05)
            if not id_:
                continue
            os.write(self._acks, msgspec.json.encode(Ack(number, id_, tries)) + b"\n")
            self.accepted[number] = id_
            await asyncio.sleep(self.pause * self.dice.uniform(0.2, 1.8))
        for number, id_ in self.accepted.items():
            if plan(self.seed, number).kind in FAILING:
                await self.once_more(store, id_)
        self.fact("finished")

    async def submit(self, http: httpx.AsyncClient, one: Plan) -> str:
        """The id; empty: no."""
        body = {"query": one.query, "context": one.context, "session_id": f"chaos-{one.number % 7}"}
        if one.delay_seconds:
            body["run_at"] = self.moment(one)
        for name in ("timeout_seconds", "ttl_seconds", "priority", "max_attempts"):
            if value := getattr(one, name):
                body[name] = value
        url = f"http://127.0.0.1:{self.dice.choice(self.ports)}/api/v1/tasks"
        headers = {"Idempotency-Key": f"{self.seed}-{one.name}"}
        twin = None
        if self.dice.random() < TWINS:
            twin = asyncio.create_task(http.post(url, json=body, headers=headers))
        try:
            response = await http.post(url, json=body, headers=headers, timeout=impatience(self.dice))
        finally:
            if twin:
                await asyncio.wait([twin])
                twin.exception()  # what it got, the other one gets as well, or asks for again
        if response.status_code == 200:
            id_: str = response.json()["task_id"]
            return id_
        if response.status_code != 503:
            self.fact("answer", name=f"{response.status_code} to a submission: {response.text[:300]}")
        return ""

    def moment(self, one: Plan) -> str:
        """The same each time that the task is submitted, also after a kill: else it would be another request."""
        if one.name not in self.run_at:
            self.run_at[one.name] = (datetime.now(UTC) + timedelta(seconds=one.delay_seconds)).isoformat()
            self.fact("run_at", one.name, self.run_at[one.name])
        return self.run_at[one.name]

    async def submit_natively(self, store: Store, one: Plan) -> str:
        task = events.Submission(
            id=one.name,
            org=ORG,
            owner=DEVELOPMENT_USER,
            session=f"chaos-{one.number % 7}",
            dialect="shannon",
            queue=QUEUES.get(one.kind, "default"),
            query=one.query,
            context=one.context,
            priority=one.priority,
            max_attempts=one.max_attempts,
            deadline_seconds=one.timeout_seconds and one.delay_seconds + one.timeout_seconds,
            delay_seconds=one.delay_seconds,
            ttl_seconds=one.ttl_seconds and one.delay_seconds + one.ttl_seconds,
            submission=one.name,
        )
        await store.submit(task)
        return one.name

    async def once_more(self, store: Store, id_: str) -> None:
        """A task that failed as it was told is tried again, which it does not survive either: a second end."""
        while True:
            with suppress(TaskcastError):
                task = await store.get(ORG, id_)
                if task and task.terminal:
                    if task.status is Status.FAILED:
                        name = f"retry:{id_}"
                        appended = await store.append(ORG, id_, events.Retried(), operation=name)
                        if not appended.duplicate:
                            self.fact("retried", id_)
                    return
            await asyncio.sleep(0.1)

    # The human

    async def decide(self, store: Store) -> None:
        for listed in (await store.list(ORG, [("waiting",)], limit=50)).tasks:
            task = await store.get(ORG, listed.id)
            if task is None or not task.waits or self.dice.random() < 0.3:  # not at once
                continue
            what, _, name = task.waits.partition(":")
            actor, approved = "user:human", self.dice.random() < 0.8
            event: events.AnyEvent
            if what == "approval":
                event = events.ApprovalDecided(actor=actor, approval=name, approved=approved)
            else:
                event = events.Reviewed(actor=actor, version=int(name), approved=True)
            with suppress(Conflict, NotFound):  # another human was quicker, or the task has ended
                await store.append(ORG, task.id, event, operation=f"decide:{os.getpid()}:{name}")
                self.fact("decided", task.id, name)

    # The zombie

    async def haunt(self, store: Store) -> None:
        await asyncio.sleep(ZOMBIE_PAUSE_SECONDS)
        for claimed in await store.claim(["default"], ZOMBIE, 1):
            voice = Voice(claimed.task, claimed.fence)
            try:
                await self._haunt(store, claimed, voice)
            finally:
                voice.close()

    async def _haunt(self, store: Store, one: Claimed, voice: Voice) -> None:
        n = 0
        for _ in range(self.dice.randint(1, 3)):
            event = events.Progressed(actor=f"worker:{ZOMBIE}", fraction=0.1, message=voice.word())
            with suppress(Conflict):  # cancelled, or paused, or gone already
                await store.append(one.org, one.task, event, fence=one.fence, n=n + 1)
                n += 1
                voice.said()
        while True:  # its lease ends, for nobody renews it
            task = await store.get(one.org, one.task)
            if task is None or task.fence != one.fence or task.status not in LEASED:
                break
            await asyncio.sleep(0.1)
        if self.dice.random() < 0.5:
            await asyncio.sleep(self.dice.random() * 2)  # perhaps the next attempt runs by then
        late: list[tuple[events.AnyEvent, int | None]] = [
            (events.TextDelta(text=voice.word()), n + 1),
            (events.Completed(result=LATE), n + 1),
            (events.Requeued(message=LATE), None),
        ]
        for event, number in late:
            what = events.tag(event)
            try:
                await store.append(one.org, one.task, event, fence=one.fence, n=number)
            except (Conflict, NotFound) as error:
                voice.note("refused", detail=f"{what}: {error.code}")
            else:
                voice.note("accepted", detail=what)
        renewed = await store.renew([one])
        voice.note("accepted" if renewed[one] else "refused", detail="a renewal")


async def for_ever(what: Callable[[], Awaitable[object]], pause: float) -> None:
    """A client whose store is away asks again."""
    while True:
        with suppress(TaskcastError):
            await what()
        await asyncio.sleep(pause)


async def main(folder: Path, seed: int, numbers: range, seconds: float, ports: list[int]) -> None:
    client = Client(folder, seed, numbers, seconds, ports)
    async with (
        open_store(Settings()) as store,
        httpx.AsyncClient(headers={"X-API-Key": DEVELOPMENT_KEY}, timeout=TIMEOUT_SECONDS) as http,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(client.produce(store, http))
        group.create_task(for_ever(lambda: client.decide(store), 0.2))
        group.create_task(for_ever(lambda: client.haunt(store), 0))


if __name__ == "__main__":
    first, step, count = (int(word) for word in sys.argv[3:6])
    share = range(first, count, step)
    asyncio.run(
        main(Path(sys.argv[1]), int(sys.argv[2]), share, float(sys.argv[6]), [int(port) for port in sys.argv[7:]])
    )
