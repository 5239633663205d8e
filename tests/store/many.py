"""Ten thousand tasks, known without asking the store, and writers that do not let some of them rest."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress

from msgspec import Struct

from app import events
from app.errors import Conflict, NotFound
from app.events import Submission
from app.store import Store
from app.task import OPEN, STORED, Status

ORG = "o"
TASKS = 10_000
OWNERS, AGENTS, USERS, SESSIONS, PARENTS = ("", "u", "v"), 20, 40, 60, 300
WORDS = ("blue", "green", "")
STATUSES = (*STORED, *[Status.QUEUED] * 5, *[Status.COMPLETED] * 3)
"""Nobody can be paused without an attempt: these are held."""


class Made(Struct):
    """A task as the test knows it, without asking the store."""

    id: str
    owner: str
    agent: str
    user: str
    session: str
    parent: str
    trigger: str
    internal_status: str = ""
    status: Status = Status.QUEUED
    created_at: int = 0


async def make(store: Store, chance: random.Random, id_: str) -> Made:
    made = Made(
        id=id_,
        owner=chance.choice(OWNERS),
        agent=f"a{int(AGENTS * chance.random() ** 2)}",
        user=f"x{chance.randrange(USERS)}",
        session=f"s{chance.randrange(SESSIONS)}",
        parent=chance.choice(["", f"p{chance.randrange(PARENTS)}"]),
        trigger=chance.choice(["", f"a{chance.randrange(AGENTS)}"]),
    )
    told = {name: getattr(made, name) for name in ("id", "owner", "agent", "user", "session", "parent", "trigger")}
    submitted = await store.submit(Submission(org=ORG, query="?", submission=id_, **told))
    made.created_at = submitted.at
    return made


async def restate(store: Store, made: Made, status: Status, word: str) -> None:
    told = await store.append(ORG, made.id, events.Restated(to=status.value, internal_status=word))
    made.status, made.internal_status = told.status, word


async def populate(store: Store, chance: random.Random) -> list[Made]:
    at_once = asyncio.Semaphore(200)
    # Each its own: which of them is made first is no matter of chance's.
    chances = [random.Random(chance.random()) for _ in range(TASKS)]

    async def one(number: int) -> Made:
        chance = chances[number]
        async with at_once:
            made = await make(store, chance, f"{chance.choice('aZ_')}{number}")
            if (status := chance.choice(STATUSES)) is not Status.QUEUED:
                await restate(store, made, status, chance.choice(WORDS))
            return made

    return await asyncio.gather(*(one(number) for number in range(TASKS)))


def newest_first(made: Iterable[Made]) -> list[str]:
    return [one.id for one in sorted(made, key=lambda one: (one.created_at, one.id), reverse=True)]


def parted(tasks: list[Made]) -> tuple[dict[str, Made], dict[str, Made]]:
    """A fifth for writers, and those that nobody touches."""
    restless = {one.id: one for one in tasks if int(one.id[1:]) % 5 == 0}
    return restless, {one.id: one for one in tasks if one.id not in restless}


async def move(store: Store, chance: random.Random, restless: dict[str, Made]) -> bool:
    """Whether it could be moved: it may have ended, or another writer deleted it."""
    with suppress(Conflict, NotFound):
        one = chance.choice([*restless.values()])
        await restate(store, one, chance.choice([*OPEN, chance.choice(STORED)]), chance.choice(WORDS))
        return True
    return False


@asynccontextmanager
async def writing(store: Store, chance: random.Random, restless: dict[str, Made]) -> AsyncIterator[dict[str, int]]:
    """Two make, move and delete tasks meanwhile; what they have done so far."""
    done, reading = dict.fromkeys(("made", "moved", "deleted"), 0), True

    async def write(name: str) -> None:
        while reading:
            made = await make(store, chance, f"{name}{sum(done.values())}")
            restless[made.id] = made
            done["made"] += 1
            for _ in range(2):
                done["moved"] += await move(store, chance, restless)
            with suppress(NotFound):
                gone = chance.choice([*restless])
                restless.pop(gone, None)
                await store.delete(ORG, gone)
                done["deleted"] += 1

    async with asyncio.TaskGroup() as group:
        for name in ("n", "m"):
            group.create_task(write(name))
        try:
            yield done
        finally:
            reading = False
