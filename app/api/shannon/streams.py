"""Live tasks: Server-Sent Events and WebSocket (contract §2).

A stream begins behind the client's cursor, says everything that follows once, and ends with `done`. The cursor is the
`Last-Event-ID` header, which an EventSource sets by itself, or else `last_event_id`: an id that we gave, a decimal,
which is a seq, or `<id>.end`, which `done` carries and which nothing but a later event can follow. A malformed header
replays from the start, for it comes from a machine that cannot mend it (400 would end an EventSource for good); a
malformed parameter is 400.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import msgspec
import structlog
from msgspec import Struct
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from app import events, metrics
from app.api.shannon.spelling import SSE_NAME, clock, control, event_body, frame
from app.errors import Invalid, NotFound, TaskcastError, Unavailable
from app.events import Entry, Json
from app.hub import Ended, Gap, Item, Subscription
from app.identity import Identity, caller
from app.sse import CHUNK_BYTES, HEADERS, Reader, Stream, Streams, encode, unstalled, wire_of
from app.store import Store

logger = structlog.get_logger()

CLOSE_DONE, CLOSE_FAILED, CLOSE_RESTART, CLOSE_LATER = 1000, 1011, 1012, 1013
"""WebSocket close codes (RFC 6455 §7.4.1 and the IANA registry): a client of any but the first should come back."""


# What a request asks for


class Cursor(Struct, frozen=True):
    after: str = ""
    """As the store takes it."""
    ended: bool = False
    """The client has seen `done` at this id."""


_ID = re.compile(r"([0-9]{1,20})-([0-9]{1,20})(\.end)?")
_SEQ = re.compile(r"[0-9]{1,20}")
_NUMBER_MAX = 10**15 - 1
"""What the store takes (`log.CURSOR`). No real id or seq is larger, so a larger one is as far ahead as this."""


def parse_cursor(text: str) -> Cursor | None:
    """None: not a cursor."""
    text = text.strip()
    if not text:
        return Cursor()
    if _SEQ.fullmatch(text):
        return Cursor(f"seq:{min(int(text), _NUMBER_MAX)}" if int(text) else "")
    found = _ID.fullmatch(text)
    if found is None:
        return None
    after = f"{min(int(found[1]), _NUMBER_MAX)}-{min(int(found[2]), _NUMBER_MAX)}"
    return Cursor("" if after == "0-0" else after, ended=bool(found[3]))


def _cursor(request: HTTPConnection) -> Cursor:
    """Raises Invalid for a malformed parameter, also when the header wins."""
    asked = parse_cursor(request.query_params.get("last_event_id", ""))
    if asked is None:
        raise Invalid("Invalid last_event_id")
    header = request.headers.get("last-event-id", "")
    return (parse_cursor(header) or Cursor()) if header.strip() else asked


def _types(request: HTTPConnection) -> frozenset[str]:
    """Raw types or SSE names; empty: all."""
    names = [name.strip() for text in request.query_params.getlist("types") for name in text.split(",")]
    return frozenset(name for name in names if name)


def _workflow_id(request: HTTPConnection) -> str:
    id_ = request.query_params.get("workflow_id", "")
    if not events.ID.fullmatch(id_):
        raise Invalid("Invalid or missing workflow_id")
    return id_


class Asked(Struct, frozen=True):
    """A stream, as a request asks for it."""

    who: Identity
    task: str
    cursor: Cursor
    types: frozenset[str]


# Server-Sent Events


async def sse(request: Request) -> Response:
    return await _stream(request, _workflow_id)


async def task_stream(request: Request) -> Response:
    """Served, not redirected as upstream does: its 307 loses a browser's query key (§1.7)."""
    return await _stream(request, lambda request: _task_id(request.path_params["task_id"]))


def _task_id(id_: str) -> str:
    if not events.ID.fullmatch(id_):
        raise Invalid("Invalid task ID format")
    return id_


async def _stream(request: Request, task_id: Callable[[Request], str]) -> Response:
    """Raises Unauthorized, Invalid, NotFound; but a store that is away is a stream that begins later (`sse.py`)."""
    streams: Streams = request.app.state.streams
    store: Store = request.app.state.store
    try:
        asked = Asked(caller(request), task_id(request), _cursor(request), _types(request))
        if asked.cursor.ended or request.method == "HEAD":
            task = await store.get(asked.who.org, asked.task)
            if task is None:
                raise NotFound("Task not found")
            # Only an EventSource stops for good at 204, and it always asks for this type (HTML standard, §9.2.2);
            # other clients take 204 for a failure (the SDK retries for a minute) and get `done` again.
            listening = "text/event-stream" in request.headers.get("accept", "")
            if listening and asked.cursor.ended and task.terminal and task.last_event_id == asked.cursor.after:
                return Response(status_code=204)
            if request.method == "HEAD":  # never subscribes
                return Response(headers=HEADERS)
    except Unavailable as error:
        return Stream(streams, _failing(error), hello=b"")
    hello = f": connected to workflow {asked.task}\n: log epoch {store.partitions.epoch}\n\n".encode()
    return Stream(streams, lambda: _pages(store, asked), hello=hello)


def _failing(error: Unavailable) -> Callable[[], AbstractAsyncContextManager[AsyncIterator[bytes]]]:
    @asynccontextmanager
    async def pages() -> AsyncIterator[AsyncIterator[bytes]]:
        raise error
        yield

    return pages


@asynccontextmanager
async def _pages(store: Store, asked: Asked) -> AsyncIterator[AsyncIterator[bytes]]:
    async with store.follow(asked.who.org, asked.task, asked.cursor.after) as subscription:
        yield _chunks(subscription, asked.types)


async def _chunks(subscription: Subscription, types: frozenset[str]) -> AsyncIterator[bytes]:
    """The frames of each page, together, but not so many that a slow reader holds much."""
    async for page in subscription:
        frames: list[bytes] = []
        size = 0
        for item in page:
            for encoded in _encoded(item, types):
                frames.append(encoded)
                size += len(encoded)
            if size >= CHUNK_BYTES:
                metrics.STREAM_FRAMES.inc(len(frames))
                yield b"".join(frames)
                frames, size = [], 0
        if frames:
            metrics.STREAM_FRAMES.inc(len(frames))
            yield b"".join(frames)


def _encoded(item: Item, types: frozenset[str]) -> list[bytes]:
    """`gap` and `done` pass every filter."""
    if isinstance(item, Entry):
        return [encode(one) for one in frame(item) if not types or types & one.types]
    _count(item)
    return [encode(control(item))]


def _count(item: Gap | Ended) -> None:
    if isinstance(item, Gap):
        metrics.GAPS.labels(item.reason).inc()


# WebSocket


async def ws(socket: WebSocket) -> None:
    """One JSON text per event: the raw event object (§2.8), at last STREAM_END, then close 1000.

    Refused before the handshake with 401, 400, 404 as JSON.
    """
    store: Store = socket.app.state.store
    streams: Streams = socket.app.state.streams
    asked = Asked(caller(socket), _workflow_id(socket), _cursor(socket), _types(socket))
    wire = wire_of(socket.scope)
    # Whatever happens to the connection below, a reader that takes nothing must not stay.
    socket._send = unstalled(socket._send, wire)  # noqa: SLF001 (Starlette's only hook for one socket)
    reader = Reader(wire.abort if wire else lambda: None)
    if not streams.room:
        metrics.STREAMS_ABORTED.labels("draining" if streams.closing else "full").inc()
        await socket.accept()
        await socket.close(CLOSE_RESTART if streams.closing else CLOSE_LATER)
        return
    with streams.holding(reader):
        async with store.follow(asked.who.org, asked.task, asked.cursor.after) as subscription:
            await socket.accept()
            with suppress(WebSocketDisconnect, OSError):  # it left: there is nobody to tell
                await socket.close(await _follow(socket, asked, subscription, reader))


async def _follow(socket: WebSocket, asked: Asked, subscription: Subscription, reader: Reader) -> int:
    """Sends until the task ended, the client left or the server stops; the close code."""
    telling = asyncio.create_task(_tell(socket, asked, subscription))
    hearing = asyncio.create_task(_hear(socket))
    try:
        await asyncio.wait({telling, hearing, reader.leaving}, return_when=asyncio.FIRST_COMPLETED)
        if hearing.done():
            raise WebSocketDisconnect
        if reader.leaving.done():
            metrics.STREAMS_ABORTED.labels("draining").inc()
            return CLOSE_RESTART
        telling.result()
    except TaskcastError as error:
        logger.warning("stream.broken", reason=str(error))
        metrics.STREAMS_ABORTED.labels("store").inc()
        metrics.STORE_ERRORS.labels(error.code).inc()
        return CLOSE_LATER
    except (WebSocketDisconnect, OSError):
        raise
    except Exception:
        logger.exception("stream.failed")
        metrics.STREAMS_ABORTED.labels("failed").inc()
        return CLOSE_FAILED
    finally:
        for task in (telling, hearing):
            task.cancel()
        await asyncio.gather(telling, hearing, return_exceptions=True)
    return CLOSE_DONE


async def _hear(socket: WebSocket) -> None:
    """Throws away what the client says (each message is bounded by the server), and returns when it leaves."""
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass


async def _tell(socket: WebSocket, asked: Asked, subscription: Subscription) -> None:
    async for page in subscription:
        for item in page:
            for body in _bodies(item, asked):
                text = msgspec.json.encode(body).decode()
                await socket.send_text(text)
                metrics.STREAM_FRAMES.inc()
                metrics.STREAM_BYTES.inc(len(text))


def _bodies(item: Item, asked: Asked) -> list[Json]:
    if isinstance(item, Entry):
        bodies = event_body(item, stream=True)
        return [body for body in bodies if not asked.types or asked.types & _names(body["type"])]
    _count(item)
    if isinstance(item, Gap):
        data: Any = control(item).data
        return [{**data, "stream_id": item.snapshot.fields["last_event_id"]}]
    end = {
        "workflow_id": asked.task,
        "type": "STREAM_END",
        "message": "Done",
        "timestamp": clock(time.time_ns() // 1000),
    }
    return [{**end, "seq": item.seq, "stream_id": control(item).id}]


def _names(raw: str) -> set[str]:
    return {raw, SSE_NAME.get(raw, raw)}


routes = [
    Route("/api/v1/stream/sse", sse),
    WebSocketRoute("/api/v1/stream/ws", ws),
    Route("/api/v1/tasks/{task_id}/stream", task_stream),
]
