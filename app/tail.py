"""The tail: how a process follows one partition's log, and offers each entry to the readers that it concerns.

`seam.py` says what readers do with an entry, `crowd.py` how it serves many at once. The tail never reads after `$`: each
empty answer would move that place.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from app.connect import Door
from app.crowd import Audience, Crowd, Member, Outbox
from app.errors import Unavailable
from app.log import Log, Logged
from app.seam import PAGE_ENTRIES, Strand, TaskReader

logger = structlog.get_logger()

RETRY_SECONDS = 0.2
"""Between attempts of a tail whose store is away."""
READ_PAUSE_SECONDS = 0.004
"""Between two reads of a tail, at least: of a busy log each brings several entries then. One that comes alone is not held
up."""
READ_MANY = 16
"""Entries of one read."""
BUSY_PAUSE_SECONDS = 0.01
"""The pause after a read of so many, unless it was a full page: to wake up for the next ones costs as much as several
deliveries (50 writers: a twenty-fifth of all that a delivery costs, measured)."""
OFFERED_MAX = 1000
"""Readers offered an entry before others get their turn: one tick of the loop writes to about so many sockets."""
WAITING_BYTES = 64 * 1024
"""Taken by crowds and not written yet, before it is: a reader that takes nothing has so much more unsent at most."""


class Tail:
    """Reads one partition's log while anybody listens, and offers each entry to whom it concerns."""

    def __init__(self, door: Door, log: Log, tag: str) -> None:
        self._door, self._log, self._tag = door, log, tag
        self._audiences: dict[str, dict[str, Audience]] = {}
        """By organisation and task."""
        self._outbox = Outbox()
        self._strands: set[Strand] = set()
        self._watchers: set[Callable[[Logged], None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._placed: asyncio.Future[None] | None = None

    async def join(self, reader: TaskReader | Strand) -> None:
        """Registers, and returns once the tail has a position in the log."""
        if isinstance(reader, Strand):
            self._strands.add(reader)
        else:
            self._audiences.setdefault(reader.org, {}).setdefault(reader.task, Audience()).alone[reader] = None
        await self._running()

    def leave(self, reader: TaskReader | Strand) -> None:
        if isinstance(reader, Strand):
            self._strands.discard(reader)
        elif found := self._audience(reader.org, reader.task):
            found.alone.pop(reader, None)
            if not found.alone and not found.crowds:
                del self._audiences[reader.org][reader.task]
                if not self._audiences[reader.org]:
                    del self._audiences[reader.org]
        self._rest()

    def gather(self, member: Member, reader: TaskReader) -> Crowd | None:
        found = self._audience(reader.org, reader.task)
        return found.gather(member, reader) if found else None

    def _audience(self, org: str, task: str) -> Audience | None:
        tasks = self._audiences.get(org)
        return tasks.get(task) if tasks else None

    async def watch(self, watcher: Callable[[Logged], None]) -> None:
        """Offers every entry of the partition; a watcher reads the header and must not raise."""
        self._watchers.add(watcher)
        await self._running()

    def unwatch(self, watcher: Callable[[Logged], None]) -> None:
        self._watchers.discard(watcher)
        self._rest()

    async def _running(self) -> None:
        """Raises Unavailable when the store is away, and no position is known from before."""
        if self._task is None or self._placed is None:
            self._placed = asyncio.get_running_loop().create_future()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"tail {self._tag}")
        await asyncio.shield(self._placed)

    def _rest(self) -> None:
        if not self._audiences and not self._strands and not self._watchers and self._task:
            self._task.cancel()
            self._task = self._placed = None

    async def _run(self) -> None:
        """Never ends by itself: a store that is away is asked again."""
        loop = asyncio.get_running_loop()
        last: tuple[str, int] | None = None
        while True:
            try:
                async with self._door.blocking() as line:
                    if last is None:
                        last = await self._log.end(self._tag)
                        self._tell(None)
                    else:
                        # The connection broke: the log may have lost entries that it had given us.
                        self._replay_all()
                    while True:
                        found = await self._log.tail(line, self._tag, last[0])
                        came = loop.time()
                        offered, outbox = 0, self._outbox
                        try:
                            for one in found:
                                if one.number != last[1] + 1:
                                    logger.warning("tail.hole", partition=self._tag, after=last[1], got=one.number)
                                    self._replay_all()
                                last = one.id, one.number
                                offered += self._offer(one)
                                if offered >= OFFERED_MAX or outbox.size >= WAITING_BYTES:
                                    outbox.write()
                                    offered = 0
                                    await asyncio.sleep(0)
                        finally:  # whatever a watcher does: it is counted as written
                            outbox.write()
                        pause = READ_PAUSE_SECONDS if len(found) < READ_MANY else BUSY_PAUSE_SECONDS
                        if len(found) < PAGE_ENTRIES and (early := came + pause - loop.time()) > 0:
                            await asyncio.sleep(early)
            except Unavailable as error:
                logger.warning("tail.waiting", partition=self._tag, reason=str(error))
                self._tell(error)
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:  # a tail that dies in silence looks like a quiet task for ever
                logger.exception("tail.failed", partition=self._tag)
                self._tell(Unavailable("The store's log cannot be read."))
                await asyncio.sleep(RETRY_SECONDS)

    def _tell(self, error: Unavailable | None) -> None:
        """Those who wait for the first position: that it is known, or that the store is away."""
        placed = self._placed
        if placed is None or placed.done():
            return
        if error:
            placed.set_exception(error)
            placed.exception()  # perhaps nobody waits any more, and a failure that nobody reads is reported
            self._placed = None
        else:
            placed.set_result(None)

    def _offer(self, one: Logged) -> int:
        """To how many. Copies: an offer may make a reader leave."""
        audience = self._audience(one.org, one.task)
        offered = audience.offer(one, self._outbox) if audience else 0
        if self._strands:
            for strand in tuple(self._strands):
                strand.offer(one)
                offered += 1
        if self._watchers:
            for watcher in tuple(self._watchers):
                watcher(one)
        return offered

    def _replay_all(self) -> None:
        self._outbox.write()  # they read on behind it
        for audience in [audience for tasks in self._audiences.values() for audience in tasks.values()]:
            audience.lost()
        for strand in tuple(self._strands):
            strand.lost()

    async def aclose(self) -> None:
        if self._task:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
