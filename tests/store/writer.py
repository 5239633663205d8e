"""A writer for the kill test, run as a process: submits, claims, streams and finishes tasks until it is killed.

    python -m tests.store.writer FOLDER NAME

Each acknowledgement goes to `FOLDER/NAME.acks` by one unbuffered write, after the store answered: what stands there
was promised to somebody.
"""

import asyncio
import os
import random
import sys
from itertools import count
from pathlib import Path

import msgspec

from app import events
from app.errors import Conflict, NotFound, TaskcastError, TooLarge
from app.events import AnyEvent, Submission, TextDelta, Usage
from app.queues import Claimed
from app.settings import Settings
from app.store import Store, open_store
from app.task import text


class Ack(msgspec.Struct, frozen=True):
    task: str
    seq: int
    said: str
    """The event, encoded; of a submission its id."""


class Writer:
    def __init__(self, store: Store, name: str, acks: int) -> None:
        self.store, self.name, self.acks = store, name, acks

    def acknowledge(self, task: str, seq: int, said: str) -> None:
        os.write(self.acks, msgspec.json.encode(Ack(task, seq, said)) + b"\n")

    async def submit(self) -> None:
        for number in count():
            id_ = f"{self.name}-{number}"
            task = Submission(id=id_, org="o", owner="u", session="s", query="?", submission=id_)
            appended = await self.store.submit(task)
            self.acknowledge(id_, appended.seq, id_)
            await asyncio.sleep(random.random() * 0.02)

    async def work(self) -> None:
        while True:
            claimed = await self.store.claim(["default"], self.name, 3)
            if not claimed:
                await asyncio.sleep(0.01)
            await asyncio.gather(*(self.run(one) for one in claimed))

    async def run(self, one: Claimed) -> None:
        said: list[AnyEvent] = [TextDelta(text=f"{self.name} {n} ", agent=f"a{n % 3}") for n in range(20)]
        said.append(events.TextCompleted(text="x", agent="a1", usage=Usage(input_tokens=3, cost_nano=5)))
        said.append(events.Completed(result=text({"by": self.name}), result_type="json"))
        for n, event in enumerate(said, 1):
            try:
                appended = await self.store.append(one.org, one.task, event, fence=one.fence, n=n)
            except (Conflict, NotFound, TooLarge):
                return  # the lease was lost while a killed server came back
            if not appended.duplicate:
                self.acknowledge(one.task, appended.seq, events.encode(event).decode())


async def forever(coroutine_of: object) -> None:
    """A writer whose store is away for longer than a call goes on asking, like a real one, tries again."""
    assert callable(coroutine_of)
    while True:
        try:
            await coroutine_of()
        except TaskcastError:
            await asyncio.sleep(0.05)


async def main(folder: Path, name: str) -> None:
    acks = os.open(folder / f"{name}.acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    # Only this promises that what the store has answered for outlives the server, however slow the disk.
    settings = Settings(data=folder / "data", lease_seconds=1, events_per_mark=5000, fsync="always")
    async with open_store(settings) as store:
        writer = Writer(store, name, acks)

        async def tick() -> None:
            await store.queues.tick()
            await asyncio.sleep(0.2)

        await asyncio.gather(forever(writer.submit), forever(writer.work), forever(tick))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
