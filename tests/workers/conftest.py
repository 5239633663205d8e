"""A bench for workers: tasks to put in, workers to start, stop or crash, and what became of the tasks."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from app import events
from app.events import AnyEvent, Entry, Submission
from app.store import Store
from app.task import TERMINAL, Status, Task
from tests.waiting import wait_until
from workers.handlers import Handler
from workers.runtime import run

ORG = "o"


class Working:
    """A worker that runs; leaving its context stops it in good order."""

    def __init__(self, running: "asyncio.Task[None]", stop: asyncio.Event) -> None:
        self._running = running
        self._stop = stop

    async def stop(self) -> None:
        self._stop.set()
        await self._running

    async def crash(self) -> None:
        """It ends without a word to the store."""
        self._running.cancel()
        await asyncio.wait([self._running])


class Bench:
    def __init__(self, store: Store) -> None:
        self.store = store
        self._count = 0

    async def submit(self, query: str = "why?", **more: Any) -> str:
        self._count += 1
        id_ = f"t{self._count}"
        await self.store.submit(Submission(id=id_, org=ORG, query=query, submission=id_, **more))
        return id_

    async def say(self, id_: str, event: AnyEvent) -> None:
        await self.store.append(ORG, id_, event)

    @asynccontextmanager
    async def work(self, *handlers: Handler, store: Store | None = None, **options: Any) -> AsyncIterator[Working]:
        stop = asyncio.Event()
        running = asyncio.create_task(run(store or self.store, handlers, stop=stop, **options))
        working = Working(running, stop)
        try:
            yield working
        finally:
            stop.set()
            await asyncio.wait([running])
        if not running.cancelled():
            running.result()

    async def task(self, id_: str) -> Task:
        task = await self.store.get(ORG, id_)
        assert task is not None
        return task

    async def status(self, id_: str) -> Status:
        return (await self.task(id_)).status

    async def until(self, id_: str, status: Status) -> Task:
        async def holds() -> bool:
            return await self.status(id_) is status

        await wait_until(holds, f"{id_} is {status}")
        return await self.task(id_)

    async def until_ended(self, *ids: str) -> Task:
        """The last of the tasks named, once all of them have ended."""

        async def holds() -> bool:
            return all([await self.status(id_) in TERMINAL for id_ in ids])

        await wait_until(holds, f"{', '.join(ids)} ended")
        return await self.task(ids[-1])

    async def until_said(self, id_: str, kind: type[events.Event]) -> None:
        async def holds() -> bool:
            return events.tag(kind) in await self.said(id_)

        await wait_until(holds, f"{id_} has an event {events.tag(kind)}")

    async def entries(self, id_: str) -> list[Entry]:
        entries: list[Entry] = []
        while True:
            page = await self.store.events(ORG, id_, entries[-1].id if entries else "")
            assert page is not None
            if not page.entries:
                return entries
            entries += page.entries

    async def said(self, id_: str) -> list[str]:
        """The task's events, by name."""
        return [events.tag(entry.event) for entry in await self.entries(id_)]

    async def prove(self) -> None:
        """The store agrees with its own log."""
        assert [difference async for difference in self.store.snapshots.verify()] == []


@pytest.fixture
def bench(store: Store) -> Bench:
    return Bench(store)


Logs = list[Any]


@pytest.fixture
def logs() -> Iterator[Logs]:
    """What is logged, as it is; shown when the test fails."""
    with capture_logs() as logs:
        yield logs
    sys.stdout.write("".join(f"{one}\n" for one in logs))
