"""One tail per partition, many readers: how a process serves all who follow tasks.

Live entries are the tail's to offer (`tail.py`); readers that replay are served by a few tasks for all of them, and those
that stand at the same place together: however many clients come back at once, each page is read once. A `Pull` turns a
reader into pages to iterate, for who waits anyway.

The hub knows nothing of HTTP and of dialects.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import structlog

from app.connect import Door
from app.crowd import Crowd, Member
from app.errors import TaskcastError
from app.log import Log, Logged, Partitions
from app.seam import (
    MATCHING_MAX,
    PAGE_ENTRIES,
    STATE_BYTES_MAX,
    Answer,
    Item,
    ManyReader,
    Placed,
    Reader,
    Selection,
    Sink,
    State,
    Strand,
    TaskReader,
    Want,
    WantLog,
    WantPage,
    WantSnapshot,
    WantState,
)
from app.snapshots import IDENTITY, Filter, Snapshots
from app.tail import Tail
from app.task import Snapshot, Status

logger = structlog.get_logger()

REPLAYS = 4
"""Pages that are read for replaying readers at the same time."""
STATE_BATCH = 50
"""Snapshots that are read at once."""


class Replayed(Sink, Protocol):
    """A sink whose reader the hub serves with pages."""

    reader: Reader

    def page(self, items: Sequence[Item], shared: dict[object, bytes]) -> None:
        """What a page gave; asks for the next one when there is room. `shared` is common to all who get the same."""


class Pull:
    """A reader, to be iterated: pages of items, in order, without gap or duplicate, until it ended."""

    BACKLOG_BYTES = 1024 * 1024
    """Kept for a live reader. Beyond, they are dropped and read again from the store: no loss, no growth."""

    def __init__(self, hub: "Hub", reader: Reader, first: Sequence[Item]) -> None:
        self.reader = reader
        self._hub = hub
        self._backlog: deque[Item] = deque(first)
        self._bytes = 0
        self._mark = reader.mark()
        self._wake = asyncio.Event()
        self._failure: Exception | None = None

    @property
    def told(self) -> bool:
        """Whether everything that the reader gave was taken."""
        return not self._backlog

    def failed(self, error: Exception) -> None:
        self._failure = error
        self._wake.set()

    def take(self, one: Logged) -> None:
        if self._room(one.entry.size):
            self._backlog.append(one.entry)

    def give(self, items: Sequence[Item]) -> None:
        if self._room(sum(item.entry.size for item in items if isinstance(item, Placed))):
            self._backlog.extend(items)

    def _room(self, size: int) -> bool:
        self._wake.set()
        if self._bytes >= self.BACKLOG_BYTES:
            self._backlog.clear()
            self._bytes = 0
            self.reader.rewind(self._mark)
            return False
        self._bytes += size
        return True

    def behind(self) -> None:
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[list[Item]]:
        while True:
            if self._failure:
                raise self._failure
            if self._backlog:
                items = [*self._backlog]
                self._backlog.clear()
                self._bytes = 0
            elif want := self.reader.want():
                arrived = self.reader.arrived(await self._hub.fetch(want))
                # What another partition gave meanwhile comes first: the cursors of this page are behind it.
                items = [*self._backlog, *arrived]
                self._backlog.clear()
                self._bytes = 0
            elif self.reader.ended:
                return
            else:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._mark = self.reader.mark()
            if items:
                yield items


class Hub:
    def __init__(self, door: Door, partitions: Partitions, log: Log, snapshots: Snapshots) -> None:
        self._log, self._snapshots, self._partitions = log, snapshots, partitions
        self._tails = {tag: Tail(door, log, tag) for tag in partitions.tags}
        self._waiting: dict[Want, list[Replayed]] = {}
        self._replays: set[asyncio.Task[None]] = set()
        self._states = asyncio.Semaphore(2)
        """Each may hold STATE_BYTES_MAX."""
        self.subscribers = 0

    # Readers

    def one(self, org: str, task: str, after: str, *, snapshot: bool = False, strict: bool = False) -> TaskReader:
        """Everything of a task after a cursor: an id, `seq:N`, or empty for the start."""
        return TaskReader(org, task, after, snapshot=snapshot, strict=strict)

    def folded(self, org: str, task: str, since: int) -> TaskReader:
        """Everything of a task from the entry of that number on, each with the state after it."""
        return TaskReader(org, task, "", folded_from=since)

    def many(self, selection: Selection, after: str, *, strict: bool = False) -> ManyReader:
        return ManyReader(selection, self._partitions.tags, after, strict=strict)

    async def open(self, reader: Reader) -> list[Item]:
        """Registers a reader, and answers what it gives first; then `ask` for it, and at last `close` it.

        Raises NotFound, Gone, Invalid, Unavailable; the reader is closed then.
        """
        self.subscribers += 1
        try:
            for tail, member in self._places(reader):
                await tail.join(member)
            return await reader.begin(self.fetch)
        except BaseException:
            self.close(reader)
            raise

    def close(self, reader: Reader) -> None:
        """Once."""
        self.subscribers -= 1
        reader.ended = True
        for tail, member in self._places(reader):
            member.live = False
            tail.leave(member)

    def _places(self, reader: Reader) -> list[tuple[Tail, TaskReader | Strand]]:
        if isinstance(reader, TaskReader):
            return [(self._tails[self._partitions.tag(reader.org, reader.task)], reader)]
        return [(self._tails[strand.tag], strand) for strand in reader.strands]

    def gather(self, member: Member, reader: TaskReader) -> Crowd | None:
        """The crowd that it has joined, if there is one for it. Its reader is live, and has just taken an entry."""
        return self._tails[self._partitions.tag(reader.org, reader.task)].gather(member, reader)

    @asynccontextmanager
    async def follow(self, reader: Reader) -> AsyncIterator[Pull]:
        """Raises as `open`."""
        first = await self.open(reader)
        try:
            pull = Pull(self, reader, first)
            reader.sink = pull
            yield pull
        finally:
            self.close(reader)

    @asynccontextmanager
    async def watch(self, watcher: Callable[[Logged], None]) -> AsyncIterator[None]:
        """Offers each entry of every partition, live only: for a worker that follows its own tasks."""
        try:
            for tail in self._tails.values():
                await tail.watch(watcher)
            yield
        finally:
            for tail in self._tails.values():
                tail.unwatch(watcher)

    # Replay

    def ask(self, sink: Replayed) -> bool:
        """Its reader gets what it wants next, soon, and with it all who want the same. False: it wants nothing."""
        want = sink.reader.want()
        if want is None:
            return False
        self._waiting.setdefault(want, []).append(sink)
        if len(self._replays) < REPLAYS:
            self._replays.add(asyncio.create_task(self._replay(), name="replay"))
        return True

    async def _replay(self) -> None:
        this = asyncio.current_task()
        assert this
        try:
            await self._replay_waiting()
        finally:  # in the same tick as it looked for the last time, or who asks then would wait for nobody
            self._replays.discard(this)

    async def _replay_waiting(self) -> None:
        while self._waiting:
            want = next(iter(self._waiting))
            sinks = self._waiting.pop(want)
            answer: Answer = None
            failure: Exception | None = None
            try:
                answer = await self.fetch(want)
            except TaskcastError as error:
                failure = error
            except Exception as error:
                logger.exception("replay.failed")
                failure = error
            shared: dict[object, bytes] = {}
            for i, sink in enumerate(sinks):
                if i % 100 == 99:
                    await asyncio.sleep(0)
                if sink.reader.ended:  # it left
                    continue
                try:
                    if failure:
                        raise failure
                    sink.page(sink.reader.arrived(answer), shared)
                except TaskcastError as error:
                    sink.failed(error)
                except Exception as error:
                    logger.exception("replay.failed")
                    sink.failed(error)

    async def fetch(self, want: Want) -> Answer:
        """Raises Unavailable."""
        match want:
            case WantPage():
                return await self._log.read(want.org, want.task, want.after, limit=want.limit, check=want.check)
            case WantSnapshot():
                return await self._snapshots.snapshot(want.org, want.task, base=want.base)
            case WantLog():
                return await self._log.replay(want.tag, want.org, want.after, limit=PAGE_ENTRIES, check=want.check)
            case WantState():
                async with self._states:
                    return await self._state(want.selection)

    async def ends(self) -> list[tuple[str, int]]:
        """Each partition's last id and counter."""
        return await asyncio.gather(*(self._log.end(tag) for tag in self._tails))

    async def _state(self, selection: Selection) -> State:
        ends = await self.ends()
        ids, more = [*selection.tasks], False
        if not ids:
            sought = Filter(
                owners=selection.owners,
                session=selection.session,
                agent=selection.agent,
                statuses=selection.open_statuses,
            )
            listed = await self._snapshots.list(selection.org, sought, limit=MATCHING_MAX + 1, fields=IDENTITY)
            ids, more = [task.id for task in listed.tasks], listed.capped or len(listed.tasks) > MATCHING_MAX
        statuses: dict[str, Status] = {}
        found: list[Snapshot] = []
        size = 0
        for i in range(0, 0 if more else len(ids), STATE_BATCH):
            reading = (self._snapshots.snapshot(selection.org, id_) for id_ in ids[i : i + STATE_BATCH])
            batch = [snapshot for snapshot in await asyncio.gather(*reading) if snapshot]
            statuses |= {snapshot.fields["id"]: snapshot.status for snapshot in batch}
            size += sum(snapshot.size for snapshot in batch)
            found = [] if size > STATE_BYTES_MAX else [*found, *batch]
        return State(ends, statuses, found, more=more or size > STATE_BYTES_MAX)

    async def aclose(self) -> None:
        for replay in [*self._replays]:
            replay.cancel()
        await asyncio.gather(*self._replays, return_exceptions=True)
        for tail in self._tails.values():
            await tail.aclose()
