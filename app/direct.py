"""The direct path: a subscriber on our own server, as one small object that writes to its connection.

No task and no timer: it is offered live entries by the tail, given pages by the hub, and visited by the heartbeat.
"""

from collections.abc import Sequence
from itertools import takewhile

import structlog

from app import metrics
from app.crowd import Crowd
from app.errors import TaskcastError
from app.events import Entry
from app.frames import PING, Spelling, frames_in, retry
from app.hub import Hub
from app.log import Logged
from app.seam import Ended, Item, ManyReader, Reader, TaskReader
from app.streams import CHUNK_BYTES, Streams, Wire, store_away

logger = structlog.get_logger()


def reached(reader: Reader) -> list[Item]:
    return reader.reached() if isinstance(reader, ManyReader) else []


class Direct:
    """A subscriber on our own server: a detached connection, and the reader that it writes for."""

    __slots__ = (
        "_asked",
        "_crowd",
        "_first",
        "_hub",
        "_key",
        "_left",
        "_limit",
        "_said",
        "_streams",
        "_stuck",
        "_unsent",
        "_wire",
        "_written",
        "closed",
        "reader",
        "spelling",
        "write",
    )

    def __init__(self, streams: Streams, hub: Hub, reader: Reader, spelling: Spelling, wire: Wire, key: str) -> None:
        self.reader = reader
        self.closed = True
        """Nothing is written: before it begins, and when it is over."""
        self.spelling = spelling
        self._streams, self._hub, self._wire, self._key = streams, hub, wire, key
        self._limit = streams.settings.stream_backlog_bytes
        self.write, self._unsent = wire.write, wire.unsent
        self._crowd: Crowd | None = None
        self._written = 0
        """Bytes; less what its crowd had written before it joined."""
        self._said = self._left = 0
        """Of the bytes written, all at the last visit, and those that had left then."""
        self._asked = False
        """The hub has its wish for a page."""
        self._first: list[Item] = []
        """What it begins with, and has not left yet; the last one is the next."""
        self._stuck = 0.0
        """Seconds for which not one of them has left."""

    async def open(self) -> list[Item]:
        """Raises as `Hub.open`."""
        self._streams.add(self, self._key)
        try:
            first = await self._hub.open(self.reader)
        except BaseException:
            self._streams.remove(self, self._key)
            raise
        self.reader.sink = self
        return first

    def begin(self, hello: bytes, first: Sequence[Item]) -> None:
        self.closed = False
        self._first = [*reversed(first)]
        self._wire.limit(min(CHUNK_BYTES, self._limit))
        self._send(hello)
        if self._streams.closing:
            self.leave()
        else:
            self.drained()

    # As a sink

    def take(self, one: Logged) -> None:
        if self.closed:
            return
        if self._unsent() > self._limit:
            self._abort("slow")
            return
        spelled = one.spelled.get(self.spelling)
        if spelled is None:
            spelled = one.spelled[self.spelling] = self.spelling.live(one)
        data, frames = spelled
        if frames:
            self._put(data, frames)
        if isinstance(self.reader, TaskReader) and not self._unsent():
            self._crowd = self._hub.gather(self, self.reader)
            self._written -= self._crowd.written if self._crowd else 0

    def give(self, items: Sequence[Item]) -> None:
        if self.closed:
            return
        if self._unsent() > self._limit:
            self._abort("slow")
        else:
            self._send(self.spelling.body(items))
            self._end_if_done(items)

    def page(self, items: Sequence[Item], shared: dict[object, bytes]) -> None:
        self._asked = False
        entries = [*takewhile(lambda item: isinstance(item, Entry), items)]
        # Readers of one page differ in the controls around its entries only.
        same = (self.spelling, *map(id, entries))
        data = shared.get(same)
        if data is None:
            data = shared[same] = self.spelling.body(entries)
        self._send(data + self.spelling.body(items[len(entries) :]))
        self._end_if_done(items)
        self._ask()

    def behind(self) -> None:
        self._ask()

    def failed(self, error: Exception) -> None:
        if isinstance(error, TaskcastError):
            store_away("stream.broken", error)
            self._goodbye("store")
        else:
            logger.error("stream.failed", exc_info=error)
            self._goodbye("failed")

    # As a member of a crowd

    def part(self) -> None:
        if crowd := self._crowd:
            self._crowd = None
            self._written += crowd.written
            crowd.remove(self)

    # As the owner of its connection

    def filled(self) -> None:
        """A crowd does not look how much is unsent: who has much goes alone."""
        self.part()

    def drained(self) -> None:
        """What it begins with may be large: it leaves in pieces, and then the reader goes on."""
        while self._first and not self.closed and self._unsent() <= CHUNK_BYTES:
            item = self._first.pop()
            self._send(self.spelling.body([item]))
            self._end_if_done([item])
        if not self._first:
            self._ask()

    def lost(self) -> None:
        self._close()
        self._hub.close(self.reader)
        self._streams.remove(self, self._key)

    # As one of the open streams

    def leave(self) -> None:
        self._goodbye("draining")

    def abort(self) -> None:
        self._wire.abort()

    def visit(self, seconds: float) -> None:
        """Twice per heartbeat."""
        written, unsent = self._written + (self._crowd.written if self._crowd else 0), self._unsent()
        active, stuck = written != self._said, unsent and written - unsent <= self._left
        self._said, self._left = written, written - unsent
        self._stuck = self._stuck + seconds if stuck else 0.0
        if self._streams.stalled(self._stuck):
            self._abort("stalled")
        elif not active and not unsent and not self.closed:
            self._send(PING + self.spelling.body(reached(self.reader)))

    # Inside

    def _ask(self) -> None:
        """For the next page, if it is wanted and there is room for it."""
        if not (self.closed or self._asked or self._unsent() > CHUNK_BYTES):
            self._asked = self._hub.ask(self)

    def _send(self, body: bytes) -> None:
        if body and not self.closed:
            self._put(self.spelling.chunk(body), frames_in(body))

    def _put(self, data: bytes, frames: int) -> None:
        self._written += len(data)
        self._streams.count(frames, len(data))
        self.write(data)

    def _end_if_done(self, items: Sequence[Item]) -> None:
        if items and isinstance(items[-1], Ended) and not self.closed:
            self._close()
            self._wire.end()

    def _close(self) -> None:
        self.closed = True
        self.part()

    def _goodbye(self, reason: str) -> None:
        if not self.closed:
            metrics.STREAMS_ABORTED.labels(reason).inc()
            self._send(retry())
            self._close()
            self._wire.hang_up()

    def _abort(self, reason: str) -> None:
        """Also of a stream that has ended, and whose last bytes nobody takes."""
        logger.info("stream.aborted", reason=reason, unsent_bytes=self._unsent())
        metrics.STREAMS_ABORTED.labels(reason).inc()
        self._close()
        self._wire.abort()
