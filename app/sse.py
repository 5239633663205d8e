"""Server-Sent Events: frame → bytes, and the response that streams them.

Where it differs from `sse_starlette.EventSourceResponse`, on which it stands, and from the design of streams:

1. Our own heartbeat: after silence only, and one comment line without a blank line (httpx-sse yields an empty event
   for a blank line after an id: tried).
2. Our own end of a stopping server: theirs ends streams cleanly, and a clean end without `done` makes clients stop.
3. A stream that cannot go on is aborted: the connection closes inside the chunked body, so that every client sees an
   error and comes back with its cursor. A stream that cannot begin (stopping, too many, no store) is answered 200,
   `retry:` and that abort: a native EventSource gives up for good on 503 and 429 (HTML standard, §9.2.3).
4. Slow readers. Here nothing is pushed: the next page is taken from the store when the last one has left, so a slow
   reader costs the store a read of its own later, and nobody a frame. What it holds is bounded by the transport's
   `stream_backlog_bytes`; with more unsent it waits, and if in STALLED_SECONDS not one byte more was taken, it is
   aborted. A reader that is slow but reads is never cut off: it would come back, and be cut off again. (The rule
   "over the bound before this frame: abort" belongs to frames that are pushed to everybody at once.)

What this file must never do is end a stream cleanly before its iterator ends.
"""

import asyncio
import json
import random
import resource
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from typing import Protocol

import structlog
from msgspec import Struct
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app import metrics
from app.errors import TaskcastError, Unavailable
from app.events import Json
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
HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}

Pages = Callable[[], AbstractAsyncContextManager[AsyncIterator[bytes]]]
"""Opens what a stream sends. Raises before the first byte what the request deserves (NotFound)."""


class Frame(Struct, frozen=True):
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
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"), allow_nan=False)
    head = f"id: {frame.id}\n" if frame.id else ""
    return f"{head}event: {frame.event}\ndata: {text}\n\n".encode()


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

    def hang_up(self) -> None:
        """Closes after what is unsent has left, or soon."""


def wire_of(scope: Scope) -> Wire | None:
    found: Wire | None = (scope.get("extensions") or {}).get(WIRE)
    return found


class Aborted(Exception):
    """On a server without a Wire an exception is the only way to end a response in its middle."""


class Reader:
    """One open stream, of either protocol, as the drain sees it."""

    def __init__(self, abort: Callable[[], None]) -> None:
        self.abort = abort
        self.leaving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done: say goodbye and go."""

    def leave(self) -> None:
        if not self.leaving.done():
            self.leaving.set_result(None)


class Streams:
    """The open streams of a process: bounded, and sent away together when it stops."""

    def __init__(self, settings: Settings, *, streams_max: int = 0) -> None:
        self.settings = settings
        # Each stream is a file descriptor; a fifth of them is left for plain requests and the store.
        self.streams_max = streams_max or resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 4 // 5
        self.open: set[Reader] = set()
        self.closing = False

    @property
    def room(self) -> bool:
        return not self.closing and len(self.open) < self.streams_max

    @contextmanager
    def holding(self, reader: Reader) -> Iterator[None]:
        self.open.add(reader)
        metrics.STREAMS_OPEN.inc()
        try:
            yield
        finally:
            self.open.discard(reader)
            metrics.STREAMS_OPEN.dec()

    async def drain(self, seconds: float) -> None:
        """Takes no more, and sends all away, in batches; who has not left after so many seconds is aborted."""
        self.closing = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        readers = [*self.open]
        batches = [readers[i : i + DRAIN_BATCH] for i in range(0, len(readers), DRAIN_BATCH)]
        for batch in batches:
            for reader in batch:
                reader.leave()
            await asyncio.sleep(min(DRAIN_PAUSE_SECONDS, seconds / 2 / len(batches)))
        while self.open and loop.time() < deadline:
            await asyncio.sleep(0.01)
        for reader in [*self.open]:  # a slow reader's own `send` waits: it cannot say goodbye
            metrics.STREAMS_ABORTED.labels("stalled").inc()
            reader.abort()


class Stream(Response):
    """The response: `hello`, then the pages, with a heartbeat while there are none, until they end or it is aborted."""

    media_type = "text/event-stream"

    def __init__(self, streams: Streams, pages: Pages, *, hello: bytes) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self._streams, self._pages, self._hello = streams, pages, hello
        self._wire: Wire | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._wire = wire_of(scope)
        send = unstalled(send, self._wire)
        if self._wire:
            self._wire.limit(self._streams.settings.stream_backlog_bytes)
        reader = Reader(self._wire.abort if self._wire else lambda: None)
        if not self._streams.room:
            why = "draining" if self._streams.closing else "full"
            return await self._respond(self._turned_away(why), scope, receive, send)
        with self._streams.holding(reader):
            try:
                async with self._pages() as pages:
                    await self._respond(self._body(pages, reader), scope, receive, send)
            except Unavailable as error:
                logger.warning("stream.refused", reason=str(error))
                metrics.STORE_ERRORS.labels(error.code).inc()
                await self._respond(self._turned_away("store"), scope, receive, send)

    async def _respond(self, body: AsyncIterator[bytes], scope: Scope, receive: Receive, send: Send) -> None:
        await _Response(body, headers=HEADERS, ping=0)(scope, receive, send)

    async def _body(self, pages: AsyncIterator[bytes], reader: Reader) -> AsyncIterator[bytes]:
        yield self._hello
        async with aclosing(awaiting(pages, reader.leaving, self._streams.settings.heartbeat_seconds)) as chunks:
            async for chunk in chunks:
                match chunk:
                    case bytes():
                        metrics.STREAM_BYTES.inc(len(chunk))
                        yield chunk
                    case None:
                        yield PING
                    case reason:
                        yield retry()
                        await self._abort(reason)

    async def _turned_away(self, reason: str) -> AsyncIterator[bytes]:
        yield retry()
        await self._abort(reason)

    async def _abort(self, reason: str) -> None:
        """Never returns."""
        metrics.STREAMS_ABORTED.labels(reason).inc()
        if self._wire is None:
            raise Aborted(reason)
        self._wire.hang_up()
        await asyncio.get_running_loop().create_future()  # the disconnect that follows cancels us


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
