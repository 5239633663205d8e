"""One tail per partition, many bounded subscriptions: how a process follows tasks live.

A subscription replays the task's stream, then goes live, and this hand-over is written once, here, in
`Subscription`. The rule:

* The subscription is registered, and the tail has a concrete position, before the first page of history is read.
* While it replays it buffers nothing; it only notes the highest seq that the tail offered.
* It goes live in the same loop tick in which a page comes back empty and nothing above its own seq was offered.
  No other code runs between that page's arrival and the switch, so nothing can fall between.
* Live, it takes only seq + 1. Anything above is a hole (the log was trimmed, failed over): back to replay.
  Anything at or below was seen.

So there is no gap and no duplicate, whatever was lost between store and process. The hub never reads after `$`:
each empty answer would move that place. It knows nothing of HTTP and of dialects.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import takewhile

import structlog
from msgspec import Struct

from app.connect import Door, in_our_words
from app.errors import NotFound, Unavailable
from app.events import Entry, Submitted
from app.log import Log, Logged, Partitions
from app.snapshots import Snapshots
from app.task import TERMINAL, Snapshot, Status

logger = structlog.get_logger()

RETRY_SECONDS = 0.2
"""Between attempts of a tail whose store is away."""


class Gap(Struct, frozen=True, kw_only=True):
    """What a cursor asked for cannot be given in full; the stream goes on after `snapshot`."""

    reason: str
    """`trimmed`: older than what is kept; `ahead`: later than the last entry; `unknown`: never given here."""
    earliest: int
    latest: int
    snapshot: Snapshot


class Ended(Struct, frozen=True, kw_only=True):
    """The last entry is terminal, and the reader has it. `last_id` is empty for a deleted task."""

    last_id: str
    seq: int


Item = Entry | Gap | Ended


class Tail:
    """Reads one partition's log while anybody listens, and offers each entry to whom it concerns."""

    def __init__(self, door: Door, log: Log, tag: str) -> None:
        self._door, self._log, self._tag = door, log, tag
        self._listeners: dict[tuple[str, str], set[Subscription]] = defaultdict(set)
        self._watchers: set[Callable[[Logged], None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._placed = asyncio.Event()

    async def join(self, subscription: "Subscription") -> None:
        """Registers, and returns once the tail has a position in the log."""
        self._listeners[subscription.org, subscription.task].add(subscription)
        await self._running()

    def leave(self, subscription: "Subscription") -> None:
        who = subscription.org, subscription.task
        if who in self._listeners:
            self._listeners[who].discard(subscription)
            if not self._listeners[who]:
                del self._listeners[who]
        self._rest()

    async def watch(self, watcher: Callable[[Logged], None]) -> None:
        """Offers every entry of the partition; a watcher reads the header and must not raise."""
        self._watchers.add(watcher)
        await self._running()

    def unwatch(self, watcher: Callable[[Logged], None]) -> None:
        self._watchers.discard(watcher)
        self._rest()

    async def _running(self) -> None:
        if self._task is None:
            self._placed.clear()
            self._task = asyncio.create_task(self._run(), name=f"tail {self._tag}")
        await self._placed.wait()

    def _rest(self) -> None:
        if not self._listeners and not self._watchers and self._task:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        """Never ends by itself: a store that is away is asked again."""
        last: tuple[str, int] | None = None
        while True:
            try:
                async with self._door.blocking() as redis:
                    if last is None:
                        last = await self._log.end(self._tag)
                        self._placed.set()
                    else:
                        # The connection broke: the log may have lost entries that it had given us.
                        self._replay_all()
                    while True:
                        try:
                            found = await self._log.tail(redis, self._tag, last[0])
                        except Exception as error:
                            raise in_our_words(error) from error
                        for one in found:
                            if one.number != last[1] + 1:
                                logger.warning("tail.hole", partition=self._tag, after=last[1], got=one.number)
                                self._replay_all()
                            last = one.entry.id, one.number
                            self._offer(one)
            except Unavailable as error:
                logger.warning("tail.waiting", partition=self._tag, reason=str(error))
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:  # a tail that dies in silence looks like a quiet task for ever
                logger.exception("tail.failed", partition=self._tag)
                await asyncio.sleep(RETRY_SECONDS)

    def _offer(self, one: Logged) -> None:
        for subscription in self._listeners.get((one.org, one.entry.task), ()):
            subscription.offer(one)
        for watcher in tuple(self._watchers):
            watcher(one)

    def _replay_all(self) -> None:
        for subscriptions in self._listeners.values():
            for subscription in subscriptions:
                subscription.restart()

    async def aclose(self) -> None:
        if self._task:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None


class Subscription:
    """One reader of one task. Iterate it: pages of items, in order, without gap or duplicate, until it ended."""

    BACKLOG_BYTES = 1024 * 1024
    """Kept for a live reader. Beyond, they are dropped and read again from the store: no loss, no growth."""

    def __init__(self, log: Log, snapshots: Snapshots, org: str, task: str, after: str) -> None:
        self.org, self.task = org, task
        self._log, self._snapshots = log, snapshots
        self._after = after
        self._seq = -1
        """Of the last entry given; -1 until the first page says where the cursor stands."""
        self._offered = 0
        self._live = False
        self._again = False
        """A replay was asked for since the last page was: that page says nothing about now."""
        self._backlog: deque[Logged] = deque()
        self._backlog_bytes = 0
        self._wake = asyncio.Event()

    def offer(self, one: Logged) -> None:
        """An entry from the tail, in log order."""
        seq = one.entry.seq
        self._offered = max(self._offered, seq)
        if self._live:
            due = self._backlog[-1].entry.seq + 1 if self._backlog else self._seq + 1
            if seq == due and self._backlog_bytes < self.BACKLOG_BYTES:
                self._backlog.append(one)
                self._backlog_bytes += one.entry.size
            elif seq >= due:
                self.replay()
        self._wake.set()

    def replay(self) -> None:
        """Live entries can no longer be trusted to be all: read the store again from the last one given."""
        self._live = False
        self._again = True
        self._drop()
        self._wake.set()

    def restart(self) -> None:
        """As `replay`, after a break: what was offered before it may never have been kept."""
        self._offered = 0
        self.replay()

    def _drop(self) -> None:
        self._backlog.clear()
        self._backlog_bytes = 0

    async def __aiter__(self) -> AsyncIterator[list[Item]]:
        check = True
        while True:
            if self._live:
                if not self._backlog:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                taken = [*takewhile(lambda one: one.after is not Status.GONE, self._backlog)]
                items: list[Item] = [one.entry for one in taken]
                gone = len(taken) < len(self._backlog)
                self._drop()
                if taken:
                    self._after, self._seq = taken[-1].entry.id, taken[-1].entry.seq
                if gone:  # what follows under this id is another task
                    items.append(Ended(last_id="", seq=self._seq))
                elif taken[-1].after in TERMINAL:
                    items.append(Ended(last_id=self._after, seq=self._seq))
                yield items
                if isinstance(items[-1], Ended):
                    return
                continue
            self._again = False
            page = await self._log.read(self.org, self.task, self._after, check=check)
            if page is None:
                yield [Ended(last_id="", seq=max(self._seq, 0))]  # deleted meanwhile
                return
            check = False
            if self._seq > 0 and page.entries and isinstance(page.entries[0].event, Submitted):
                yield [Ended(last_id="", seq=self._seq)]  # deleted, and its id used again
                return
            if page.gap:
                gap = await self._gap(page.gap, page.base_seq, page.last_seq)
                if gap is None:
                    continue
                self._after, self._seq = gap.snapshot.fields["last_event_id"], int(gap.snapshot.fields["last_seq"])
                yield [gap]
                continue
            if page.entries:
                self._after, self._seq = page.entries[-1].id, page.entries[-1].seq
                items = list(page.entries)
                if self._seq == page.last_seq and page.status in TERMINAL:
                    yield [*items, Ended(last_id=self._after, seq=self._seq)]
                    return
                yield items
                continue
            # An empty page: the cursor stands at the end of what was stored when it was read.
            self._after, self._seq = page.last_id, page.last_seq
            if page.status in TERMINAL:
                yield [Ended(last_id=page.last_id, seq=page.last_seq)]
                return
            if not self._again and self._offered <= self._seq:
                self._live = True

    async def _gap(self, reason: str, base_seq: int, last_seq: int) -> Gap | None:
        """None: the task is gone; the next page will say so."""
        snapshot = await self._snapshots.snapshot(self.org, self.task, base=reason == "trimmed")
        if snapshot is None:
            return None
        return Gap(reason=reason, earliest=base_seq + 1, latest=last_seq, snapshot=snapshot)


class Hub:
    def __init__(self, door: Door, partitions: Partitions, log: Log, snapshots: Snapshots) -> None:
        self._log, self._snapshots, self._partitions = log, snapshots, partitions
        self._tails = {tag: Tail(door, log, tag) for tag in partitions.tags}
        self.subscribers = 0

    @asynccontextmanager
    async def follow(self, org: str, task: str, after: str) -> AsyncIterator[Subscription]:
        """Everything after a cursor: an id, `seq:N`, or empty for the start. Raises NotFound at once."""
        if await self._log.read(org, task, after, limit=1) is None:
            raise NotFound("Task not found")
        tail = self._tails[self._partitions.tag(org, task)]
        subscription = Subscription(self._log, self._snapshots, org, task, after)
        self.subscribers += 1
        try:
            await tail.join(subscription)
            yield subscription
        finally:
            self.subscribers -= 1
            tail.leave(subscription)

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

    async def aclose(self) -> None:
        for tail in self._tails.values():
            await tail.aclose()
