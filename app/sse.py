"""Server-Sent Events: frame → bytes, and the two ways to stream them.

**Direct**, on our own server: after the headers the stream takes its connection over (`Wire`), and the ASGI call
returns. What remains of a subscriber is one small object that writes: no task, no timer. A live entry is spelled once for
all who want the same and go together (`crowd.py`), and once for those who go alone.

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
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager

import structlog
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app import metrics
from app.direct import Direct, reached
from app.errors import TaskcastError, Unavailable
from app.frames import PING, Spelling, retry, whole
from app.hub import Hub, Pull
from app.seam import Reader
from app.streams import CHUNK_BYTES, Aborted, Streams, Visitor, Wire, store_away, unstalled, wire_of

# The library patches uvicorn's exit handler when it is imported; our server drains by itself (2.).
AppStatus.enable_automatic_graceful_drain = False

logger = structlog.get_logger()

HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}

Pages = Callable[[], AbstractAsyncContextManager[AsyncIterator[bytes]]]
"""Opens what a stream sends. Raises before the first byte what the request deserves (NotFound)."""


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
        self._pull: Pull | None = None
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
        return self._spell(whole).body(reached(self._reader)) if self._pull and self._pull.told else b""

    async def _directly(self, wire: Wire, send: Send) -> None:
        refusal = self._streams.refusal(self._key)
        if refusal:
            return await turn_away(wire, send, refusal)
        direct = Direct(self._streams, self._hub, self._reader, self._spell(wire.chunk), wire, self._key)
        try:
            first = await direct.open()
        except Unavailable as error:
            store_away("stream.refused", error)
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
            self._pull = pull
            yield self._chunks(pull)

    async def _chunks(self, pull: Pull) -> AsyncIterator[bytes]:
        """The frames of each page, together, but not so many that a slow reader holds much."""
        spelling = self._spell(whole)
        async for page in pull:
            frames: list[bytes] = []
            size = 0
            for item in page:
                frames.append(spelling.body([item]))
                size += len(frames[-1])
                if size >= CHUNK_BYTES:
                    yield b"".join(frames)
                    frames, size = [], 0
            if size:
                yield b"".join(frames)


def _start(headers: Sequence[tuple[bytes, bytes]]) -> Message:
    """A detached connection can serve no second request."""
    return {"type": "http.response.start", "status": 200, "headers": [*headers, (b"connection", b"close")]}


class Away:
    """Owns a connection that says goodbye."""

    def filled(self) -> None:
        """Nothing follows."""

    def drained(self) -> None:
        """As `filled`."""

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
                store_away("stream.refused", error)
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
