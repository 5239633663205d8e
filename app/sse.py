"""Server-Sent Events: frame → bytes, and the two ways to stream them.

**Direct**, on our own server: after the headers the stream takes its connection over (`Wire`), and the ASGI call
returns. What remains of a subscriber is one small object that writes: no task, no timer. A live entry is spelled once,
and the same bytes go to everybody.

**Portable**, on any other ASGI server, by `sse_starlette.EventSourceResponse`: pages, pulled one after the other.

What both keep, and where they differ from the library and from the design of streams:

1. A heartbeat after silence only, and one comment line without a blank line (httpx-sse yields an empty event for a
   blank line after an id: tried). A stream of many tasks also tells its cursor then, when other tasks have moved it.
2. Our own end of a stopping server: the library ends streams cleanly, and a clean end without `done` makes clients stop.
3. A stream that cannot go on is aborted: the connection closes inside the chunked body, so that every client sees an
   error and comes back with its cursor. A stream that cannot begin (stopping, too many, no store) is answered 200,
   `retry:` and that abort: a native EventSource gives up for good on 503 and 429 (HTML standard, §9.2.3).
4. Slow readers. History is read when what was read before has left. Live frames are pushed: who has more than
   `stream_backlog_bytes` unsent when the next one comes is aborted, and comes back with its cursor; nothing is ever
   dropped. Who takes not one byte in STALLED_SECONDS is aborted as well. The portable way only pulls, and so knows
   only the latter.

What this file must never do is end a stream cleanly before its reader has ended.
"""

import asyncio
import json
import random
import resource
import sys
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from functools import lru_cache
from itertools import takewhile
from typing import Protocol

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app import metrics
from app.errors import TaskcastError, Unavailable
from app.events import Entry, Json
from app.hub import Hub, Pull
from app.log import Logged
from app.seam import Began, Ended, Gap, Item, ManyReader, Placed, Reached, Reader
from app.settings import Settings

# The library patches uvicorn's exit handler when it is imported; our server drains by itself (2.).
AppStatus.enable_automatic_graceful_drain = False

logger = structlog.get_logger()

WIRE = "taskcast.wire"
"""The ASGI extension under which our server lends a stream its connection."""
PING = b": ping\n"
CHUNK_BYTES = 64 * 1024
"""Frames of one page are sent together up to this size; uvicorn's own mark for a full buffer."""
STALLED_SECONDS = 30.0
"""As TCP_USER_TIMEOUT (`server.py`), which does not see readers behind a proxy."""
RETRY_MS = (2000, 5000)
"""Jitter, so that the readers of a stopping server do not come back all at once."""
DRAIN_BATCH = 100
DRAIN_PAUSE_SECONDS = 0.05
BEATS = 50
"""Steps in which half a heartbeat's time visits every direct stream: an active one is silent for a heartbeat at most."""
HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}

Pages = Callable[[], AbstractAsyncContextManager[AsyncIterator[bytes]]]
"""Opens what a stream sends. Raises before the first byte what the request deserves (NotFound)."""


class Frame(Struct, frozen=True, gc=False):
    """One SSE event, as a dialect spells it."""

    event: str
    data: Json | str
    """An object, or a text that is written as it is (`[DONE]`)."""
    id: str = ""
    types: frozenset[str] = frozenset()
    """All names by which a `types` filter may ask for it."""


def encode(frame: Frame) -> bytes:
    """ASCII: httpx splits lines on U+0085 and U+2028 too, and would tear a frame there (tried)."""
    data = frame.data
    text = data.encode() if isinstance(data, str) else msgspec.json.encode(data)
    if not (text.isascii() or isinstance(data, str)):  # ten times slower
        text = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
    head = b"id: %b\n" % frame.id.encode() if frame.id else b""
    return b"%bevent: %b\ndata: %b\n\n" % (head, frame.event.encode(), text)


class Spelling:
    """What readers who want the same get, as bytes. One for each dialect, filter and framing (`spelling`)."""

    def __init__(
        self,
        frames: Callable[[Entry], list[Frame]],
        control: Callable[[Gap | Began | Reached | Ended], Frame],
        types: frozenset[str],
        chunk: Callable[[bytes], bytes],
    ) -> None:
        """`control`'s frames pass every filter; `types` empty: so does all else. `chunk` frames a piece of a body."""
        self._frames, self._control, self._types = frames, control, types
        self.chunk = chunk

    def live(self, one: Logged) -> tuple[bytes, int]:
        """Of an entry whose cursor is its id, chunked, and how many frames that is; empty: the filter leaves nothing."""
        frames = [encode(frame) for frame in self._frames(one.entry) if not self._types or self._types & frame.types]
        one.spelled[self] = spelled = (self.chunk(b"".join(frames)) if frames else b"", len(frames))
        return spelled

    def body(self, items: Sequence[Item]) -> bytes:
        """Not chunked."""
        return b"".join(encode(frame) for item in items for frame in self._told(item))

    def _told(self, item: Item) -> list[Frame]:
        if not isinstance(item, Entry | Placed):
            if isinstance(item, Gap):
                metrics.GAPS.labels(item.reason).inc()
            return [self._control(item)]
        frames = self._frames(item if isinstance(item, Entry) else item.entry)
        if isinstance(item, Placed):
            frames = [replace(frame, id=item.cursor) if frame.id else frame for frame in frames]
        return [frame for frame in frames if not self._types or self._types & frame.types]


spelling = lru_cache(maxsize=256)(Spelling)
"""The same one for the same wishes, so that its bytes are shared."""


def frames_in(body: bytes) -> int:
    """Each ends with the only blank line in it."""
    return body.count(b"\n\n")


def whole(data: bytes) -> bytes:
    """As it is: the server frames what it is sent."""
    return data


def retry() -> bytes:
    """Without a blank line, as PING."""
    return b"retry: %d\n" % random.randint(*RETRY_MS)


class Wire(Protocol):
    """What our server lends a stream of its connection; absent on any other ASGI server."""

    def limit(self, unsent_bytes: int) -> None:
        """`send` waits while more than that is unsent."""

    def unsent(self) -> int: ...

    def abort(self) -> None:
        """Closes at once; what is unsent is lost."""

    def detach(self, owner: "Detached") -> bool:
        """After the headers: the connection is the owner's alone, and the ASGI call may return. False: it is closed."""

    def chunk(self, data: bytes) -> bytes:
        """A piece of the body, as it has to be written."""

    def write(self, data: bytes) -> None:
        """Never waits."""

    def end(self) -> None:
        """Ends the body cleanly, and closes when all has left."""

    def hang_up(self) -> None:
        """Closes inside the body, after what is unsent has left, or soon."""


class Detached(Protocol):
    """Who owns a detached connection."""

    def drained(self) -> None:
        """What was unsent has left."""

    def lost(self) -> None:
        """The connection is closed. Called once."""


def wire_of(scope: Scope) -> Wire | None:
    found: Wire | None = (scope.get("extensions") or {}).get(WIRE)
    return found


class Aborted(Exception):
    """On a server without a Wire an exception is the only way to end a response in its middle."""


class Leaving(Protocol):
    """An open stream, as the drain sees it."""

    def leave(self) -> None:
        """Say goodbye and go."""

    def abort(self) -> None:
        """Be gone."""


class Visitor:
    """An open stream that a task serves."""

    def __init__(self, abort: Callable[[], None]) -> None:
        self.abort = abort
        self.leaving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done: say goodbye and go."""

    def leave(self) -> None:
        if not self.leaving.done():
            self.leaving.set_result(None)


class Streams:
    """The open streams of a process: bounded, kept warm, and sent away together when it stops."""

    def __init__(self, settings: Settings, *, streams_max: int = 0) -> None:
        self.settings = settings
        # Each stream is a file descriptor; a fifth of them is left for plain requests and the store.
        files_max, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        unbounded = files_max == resource.RLIM_INFINITY
        self.streams_max = streams_max or (sys.maxsize if unbounded else files_max * 4 // 5)
        self.open: set[Leaving] = set()
        self.closing = False
        self._keys: dict[str, int] = defaultdict(int)
        self._heart: asyncio.Task[None] | None = None
        self.frames = self.bytes = 0
        """Written since they were last counted."""

    def refusal(self, key: str) -> str:
        """Why a stream of that key cannot begin: `draining`, `full`, `key_full`; empty: it can."""
        if self.closing:
            return "draining"
        if len(self.open) >= self.streams_max:
            return "full"
        return "key_full" if self._keys.get(key, 0) >= self.settings.streams_per_key else ""

    def add(self, stream: Leaving, key: str) -> None:
        self.open.add(stream)
        self._keys[key] += 1
        metrics.STREAMS_OPEN.inc()
        if self._heart is None and isinstance(stream, Direct):
            self._heart = asyncio.create_task(self._beat(), name="heartbeat")

    def remove(self, stream: Leaving, key: str) -> None:
        self.open.discard(stream)
        self._keys[key] -= 1
        if not self._keys[key]:
            del self._keys[key]
        metrics.STREAMS_OPEN.dec()
        if not self.open and self._heart:
            self._heart.cancel()
            self._heart = None
            self._count()

    @contextmanager
    def holding(self, stream: Leaving, key: str) -> Iterator[None]:
        self.add(stream, key)
        try:
            yield
        finally:
            self.remove(stream, key)

    async def _beat(self) -> None:
        """One for all direct streams: visits each of them twice per heartbeat, a share of them at a time."""
        pause = self.settings.heartbeat_seconds / 2 / BEATS
        while True:
            streams = [stream for stream in self.open if isinstance(stream, Direct)]
            share = -(-len(streams) // BEATS)
            for i in range(BEATS):
                await asyncio.sleep(pause)
                for stream in streams[i * share : (i + 1) * share]:
                    if stream in self.open:
                        stream.visit(pause * BEATS)
                self._count()

    def sent(self, body: bytes) -> None:
        """Not chunked."""
        self.frames += frames_in(body)
        self.bytes += len(body)
        self._count()

    def _count(self) -> None:
        """A counter's lock for each frame would cost as much as writing it."""
        metrics.STREAM_FRAMES.inc(self.frames)
        metrics.STREAM_BYTES.inc(self.bytes)
        self.frames = self.bytes = 0

    async def drain(self, seconds: float) -> None:
        """Takes no more, and sends all away, in batches; who has not left after so many seconds is aborted."""
        self.closing = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        streams = [*self.open]
        batches = [streams[i : i + DRAIN_BATCH] for i in range(0, len(streams), DRAIN_BATCH)]
        for batch in batches:
            for stream in batch:
                stream.leave()
            await asyncio.sleep(min(DRAIN_PAUSE_SECONDS, seconds / 2 / len(batches)))
        while self.open and loop.time() < deadline:
            await asyncio.sleep(0.01)
        for stream in [*self.open]:  # a slow reader's own `send` waits: it cannot say goodbye
            metrics.STREAMS_ABORTED.labels("stalled").inc()
            stream.abort()


class Stream(Response):
    """The response: `hello`, then all that the reader gives, until it ends or the stream is aborted."""

    media_type = "text/event-stream"

    def __init__(
        self,
        streams: Streams,
        hub: Hub,
        reader: Reader,
        spell: Callable[[Callable[[bytes], bytes]], Spelling],
        *,
        hello: bytes,
        key: str,
    ) -> None:
        """`spell` makes the spelling for a framing; `key` is whose stream it is."""
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self._streams, self._hub, self._reader, self._spell = streams, hub, reader, spell
        self._portable = spell(whole)
        self._hello, self._key = hello, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises before the first byte what the request deserves: NotFound, Gone, Invalid."""
        wire = wire_of(scope)
        if wire:
            await self._directly(wire, send)
        else:
            portable = Portable(self._streams, self._pages, hello=self._hello, key=self._key, idle=self._idle)
            await portable(scope, receive, send)

    def _idle(self) -> bytes:
        return self._portable.body(reached(self._reader))

    async def _directly(self, wire: Wire, send: Send) -> None:
        refusal = self._streams.refusal(self._key)
        if refusal:
            return await turn_away(wire, send, refusal)
        direct = Direct(self._streams, self._hub, self._reader, self._spell(wire.chunk), wire, self._key)
        try:
            first = await direct.open()
        except Unavailable as error:
            _store_away("stream.refused", error)
            return await turn_away(wire, send, "store")
        try:
            await send(_start(self.raw_headers))
        except BaseException:
            direct.lost()
            raise
        if wire.detach(direct):
            direct.begin(self._hello, first)
        return None

    @asynccontextmanager
    async def _pages(self) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._hub.follow(self._reader) as pull:
            yield self._chunks(pull)

    async def _chunks(self, pull: Pull) -> AsyncIterator[bytes]:
        """The frames of each page, together, but not so many that a slow reader holds much."""
        async for page in pull:
            frames: list[bytes] = []
            size = 0
            for item in page:
                frames.append(self._portable.body([item]))
                size += len(frames[-1])
                if size >= CHUNK_BYTES:
                    yield b"".join(frames)
                    frames, size = [], 0
            if size:
                yield b"".join(frames)


def _start(headers: Sequence[tuple[bytes, bytes]]) -> Message:
    """A detached connection can serve no second request."""
    return {"type": "http.response.start", "status": 200, "headers": [*headers, (b"connection", b"close")]}


def _store_away(event: str, error: TaskcastError) -> None:
    logger.warning(event, reason=str(error))
    metrics.STORE_ERRORS.labels(error.code).inc()


class Away:
    """Owns a connection that says goodbye."""

    def drained(self) -> None:
        """Nothing follows."""

    def lost(self) -> None:
        """Nothing is held."""


class Later(Response):
    """A stream that cannot begin now."""

    def __init__(self, streams: Streams, reason: str) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self._streams, self._reason = streams, reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Aborted where there is no Wire."""
        if wire := wire_of(scope):
            await turn_away(wire, send, self._reason)
        else:
            await _Response(_goodbye(self._reason), headers=HEADERS, ping=0)(scope, receive, send)


async def turn_away(wire: Wire, send: Send, reason: str) -> None:
    """200, `retry:`, and an abort."""
    metrics.STREAMS_ABORTED.labels(reason).inc()
    await send(_start([(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]))
    if wire.detach(Away()):
        wire.write(wire.chunk(retry()))
        wire.hang_up()


def reached(reader: Reader) -> list[Item]:
    return reader.reached() if isinstance(reader, ManyReader) else []


# Direct


class Direct:
    """A subscriber on our own server: a detached connection, and the reader that it writes for."""

    __slots__ = (
        "_active",
        "_asked",
        "_first",
        "_held",
        "_hub",
        "_key",
        "_limit",
        "_spelling",
        "_streams",
        "_stuck",
        "_unsent",
        "_wire",
        "_write",
        "closed",
        "reader",
    )

    def __init__(self, streams: Streams, hub: Hub, reader: Reader, spelling: Spelling, wire: Wire, key: str) -> None:
        self.reader = reader
        self.closed = True
        """Nothing is written: before it begins, and when it is over."""
        self._streams, self._hub, self._spelling, self._wire, self._key = streams, hub, spelling, wire, key
        self._limit = streams.settings.stream_backlog_bytes
        self._write, self._unsent = wire.write, wire.unsent
        self._active = False
        """Written to since the last visit."""
        self._asked = False
        """The hub has its wish for a page."""
        self._held = 0
        """Unsent bytes at the last visit, and what was added since."""
        self._first: deque[Item] = deque()
        """What it begins with, and has not left yet."""
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
        self._first = deque(first)
        self._send(hello)
        if self._streams.closing:
            self.leave()
        else:
            self.drained()

    # As a sink

    def take(self, one: Logged) -> None:
        """The hot path: every live event of every reader comes by."""
        if self.closed:
            return None
        if self._unsent() > self._limit:
            return self._abort("slow")
        data, frames = one.spelled.get(self._spelling) or self._spelling.live(one)
        if frames:
            self._active = True
            self._held += len(data)
            streams = self._streams
            streams.frames += frames
            streams.bytes += len(data)
            self._write(data)
        return None

    def give(self, items: Sequence[Item]) -> None:
        if self.closed:
            return
        if self._unsent() > self._limit:
            self._abort("slow")
        else:
            self._send(self._spelling.body(items))
            self._end_if_done(items)

    def page(self, items: Sequence[Item], shared: dict[object, bytes]) -> None:
        self._asked = False
        entries = [*takewhile(lambda item: isinstance(item, Entry), items)]
        # Readers of one page differ in the controls around its entries only.
        same = (self._spelling, *map(id, entries))
        data = shared.get(same)
        if data is None:
            data = shared[same] = self._spelling.body(entries)
        self._send(data + self._spelling.body(items[len(entries) :]))
        self._end_if_done(items)
        self._ask()

    def behind(self) -> None:
        self._ask()

    def failed(self, error: Exception) -> None:
        if isinstance(error, TaskcastError):
            _store_away("stream.broken", error)
            self._goodbye("store")
        else:
            logger.error("stream.failed", exc_info=error)
            self._goodbye("failed")

    # As the owner of its connection

    def drained(self) -> None:
        """What it begins with may be large: it leaves in pieces, and then the reader goes on."""
        while self._first and not self.closed and self._unsent() <= CHUNK_BYTES:
            item = self._first.popleft()
            self._send(self._spelling.body([item]))
            self._end_if_done([item])
        if not self._first:
            self._ask()

    def lost(self) -> None:
        self.closed = True
        self._hub.close(self.reader)
        self._streams.remove(self, self._key)

    # As one of the open streams

    def leave(self) -> None:
        self._goodbye("draining")

    def abort(self) -> None:
        self._wire.abort()

    def visit(self, seconds: float) -> None:
        """Twice per heartbeat."""
        unsent = self._unsent()
        self._stuck = self._stuck + seconds if unsent and unsent >= self._held else 0.0
        self._held = unsent
        if self._stuck >= STALLED_SECONDS:
            return self._abort("stalled")
        if not self._active and not unsent and not self.closed:
            self._send(PING + self._spelling.body(reached(self.reader)))
        else:
            self._active = False
        return None

    # Inside

    def _ask(self) -> None:
        """For the next page, if it is wanted and there is room for it."""
        if not (self.closed or self._asked or self._unsent() > CHUNK_BYTES):
            self._asked = self._hub.ask(self)

    def _send(self, body: bytes) -> None:
        if body and not self.closed:
            data = self._spelling.chunk(body)
            self._active = True
            self._held += len(data)
            self._streams.frames += frames_in(body)
            self._streams.bytes += len(data)
            self._write(data)

    def _end_if_done(self, items: Sequence[Item]) -> None:
        if items and isinstance(items[-1], Ended) and not self.closed:
            self.closed = True
            self._wire.end()

    def _goodbye(self, reason: str) -> None:
        if not self.closed:
            metrics.STREAMS_ABORTED.labels(reason).inc()
            self._send(retry())
            self.closed = True
            self._wire.hang_up()

    def _abort(self, reason: str) -> None:
        """Also of a stream that has ended, and whose last bytes nobody takes."""
        logger.info("stream.aborted", reason=reason, unsent_bytes=self._unsent())
        metrics.STREAMS_ABORTED.labels(reason).inc()
        self.closed = True
        self._wire.abort()


# Portable


class Portable(Response):
    """`hello`, then the pages, with a heartbeat while there are none, until they end or it is aborted."""

    media_type = "text/event-stream"

    def __init__(
        self, streams: Streams, pages: Pages, *, hello: bytes, key: str = "", idle: Callable[[], bytes] = bytes
    ) -> None:
        """`idle`: what goes along with a heartbeat."""
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self._streams, self._pages, self._hello, self._key, self._idle = streams, pages, hello, key, idle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises as `Stream`, and Aborted."""
        send = unstalled(send, None)
        refusal = self._streams.refusal(self._key)
        if refusal:
            return await Later(self._streams, refusal)(scope, receive, send)
        visitor = Visitor(lambda: None)
        with self._streams.holding(visitor, self._key):
            try:
                async with self._pages() as pages:
                    await _Response(self._body(pages, visitor), headers=HEADERS, ping=0)(scope, receive, send)
            except Unavailable as error:
                _store_away("stream.refused", error)
                await Later(self._streams, "store")(scope, receive, send)
        return None

    async def _body(self, pages: AsyncIterator[bytes], visitor: Visitor) -> AsyncIterator[bytes]:
        yield self._hello
        async with aclosing(awaiting(pages, visitor.leaving, self._streams.settings.heartbeat_seconds)) as chunks:
            async for chunk in chunks:
                match chunk:
                    case bytes():
                        self._streams.sent(chunk)
                        yield chunk
                    case None:
                        yield PING + self._idle()
                    case reason:
                        async for last in _goodbye(reason):
                            yield last


async def _goodbye(reason: str) -> AsyncIterator[bytes]:
    metrics.STREAMS_ABORTED.labels(reason).inc()
    yield retry()
    raise Aborted(reason)


class _Response(EventSourceResponse):
    async def _listen_for_exit_signal_with_grace(self) -> None:
        # Theirs would start a watcher per loop, that polls twice a second for ever.
        await asyncio.get_running_loop().create_future()


async def awaiting(
    pages: AsyncIterator[bytes], leaving: asyncio.Future[None], heartbeat_seconds: float
) -> AsyncGenerator[bytes | str | None]:
    """The pages; None for each silence of that length; and, last, why it cannot go on: `draining`, `store`, `failed`."""
    page: asyncio.Future[bytes | None] | None = None
    reason = ""
    try:
        while not reason:
            page = asyncio.ensure_future(anext(pages, None))
            while not page.done() and not leaving.done():
                await asyncio.wait((page, leaving), timeout=heartbeat_seconds, return_when=asyncio.FIRST_COMPLETED)
                if not page.done() and not leaving.done():
                    yield None
            try:
                if leaving.done():
                    reason = "draining"
                elif (chunk := page.result()) is None:
                    return
                else:
                    yield chunk
            except TaskcastError as error:
                logger.warning("stream.broken", reason=str(error))
                metrics.STORE_ERRORS.labels(error.code).inc()
                reason = "store"
            except Exception:
                # A fault of ours must not look like the end of the task.
                logger.exception("stream.failed")
                reason = "failed"
        yield reason
    finally:
        if page:
            page.cancel()
            page.add_done_callback(_forget)


def _forget(page: asyncio.Future[bytes | None]) -> None:
    """Nobody reads it any more, whatever it holds."""
    if not page.cancelled():
        page.exception()


def unstalled(send: Send, wire: Wire | None) -> Callable[[Message], Awaitable[None]]:
    """`send`, for a reader that must take something every STALLED_SECONDS; one that does not is aborted."""

    async def sending(message: Message) -> None:
        while True:
            before = wire.unsent() if wire else 0
            try:
                async with asyncio.timeout(STALLED_SECONDS):
                    return await send(message)
            except TimeoutError:
                # uvicorn waits before it writes, never after: nothing of the message has gone out, it may be repeated.
                if wire and wire.unsent() < before:
                    continue
                logger.info("stream.stalled", unsent_bytes=before)
                metrics.STREAMS_ABORTED.labels("stalled").inc()
                if wire is None:
                    raise Aborted("stalled") from None
                wire.abort()
                return None

    return sending
