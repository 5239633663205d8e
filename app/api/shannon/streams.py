"""Live tasks: Server-Sent Events and WebSocket (contract §2).

One `workflow_id` is that task's stream. Several, a `session_id`, an `agent_id`, a `status`, or nothing at all is one
stream of all tasks that match: those of the list's rule, or the named ones.

A stream begins behind the client's cursor, says everything that follows once, and ends with `done`; one of many tasks
ends only if it names them. The cursor is the `Last-Event-ID` header, which an EventSource sets by itself, or else
`last_event_id`: an id that we gave, a decimal, which is a task's seq, or `<id>.end`, which `done` carries and which
nothing but a later event can follow. The id of a stream of many tasks is a place in each partition's log, joined by
commas; it says where a task's own stream goes on, too. A malformed header replays from the start, for it comes from a
machine that cannot mend it (400 would end an EventSource for good); a malformed parameter is 400.
"""

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial

import msgspec
import structlog
from msgspec import Struct
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from app import events, metrics
from app.answers import clock
from app.api.shannon.spelling import SSE_NAME, control, event_body, frame, live, statuses
from app.errors import Invalid, NotFound, TaskcastError, Unavailable
from app.events import Entry, Json
from app.frames import Frame, Spelling, retry, spelling
from app.hub import Pull
from app.identity import Identity, caller
from app.seam import MATCHING_MAX, Began, Ended, Gap, Item, Placed, Reached, Reader, Selection, order
from app.sse import HEADERS, Later, Stream
from app.store import Store
from app.streams import Streams, Visitor, unstalled, wire_of

logger = structlog.get_logger()

CLOSE_DONE, CLOSE_FAILED, CLOSE_RESTART, CLOSE_LATER = 1000, 1011, 1012, 1013
"""WebSocket close codes (RFC 6455 §7.4.1 and the IANA registry): a client of any but the first should come back."""


# What a request asks for


class Cursor(Struct, frozen=True):
    after: str = ""
    """As the store takes it; of a stream of many tasks, one id per partition."""
    ended: bool = False
    """The client has seen `done` at this id."""


_IDS = re.compile(r"([0-9]{1,20}-[0-9]{1,20}(?:,[0-9]{1,20}-[0-9]{1,20})*)(\.end)?")
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
    found = _IDS.fullmatch(text)
    if found is None:
        return None
    ids = ["-".join(str(min(int(number), _NUMBER_MAX)) for number in id_.split("-")) for id_ in found[1].split(",")]
    return Cursor("" if ids == ["0-0"] else ",".join(ids), ended=bool(found[2]))


def parse_places(text: str) -> Cursor | None:
    """Of a stream of many tasks: they have no common number, and before the first entry is a place like any other."""
    found = parse_cursor(text)
    if text.strip() and found == Cursor(ended=bool(found and found.ended)):
        return Cursor("0-0", ended=found.ended) if "-" in text else None
    return None if found is None or found.after.startswith("seq:") else found


def of_task(cursor: Cursor, store: Store, org: str, task: str) -> Cursor:
    """What a stream's cursor means to one task: of several places, that in the task's partition."""
    places = cursor.after.split(",")
    if len(places) == 1:
        return cursor
    partitions = store.partitions
    tag = partitions.tags.index(partitions.tag(org, task))
    place = places[tag] if len(places) == len(partitions.tags) else ""
    return Cursor("" if place == "0-0" else place, ended=cursor.ended)


def _cursor(request: HTTPConnection, *, many: bool) -> Cursor:
    """Raises Invalid for a malformed parameter, also when the header wins."""
    parse = parse_places if many else parse_cursor
    asked = parse(request.query_params.get("last_event_id", ""))
    if asked is None:
        raise Invalid("Invalid last_event_id")
    header = request.headers.get("last-event-id", "")
    return (parse(header) or Cursor()) if header.strip() else asked


def _words(request: HTTPConnection, name: str) -> list[str]:
    """Of a parameter that may be repeated, or hold commas."""
    words = [word.strip() for text in request.query_params.getlist(name) for word in text.split(",")]
    return [word for word in words if word]


TYPES_MAX = 64
"""Names in a filter, each as long as an id at most: what is spelled is kept by filter."""


def _types(request: HTTPConnection) -> frozenset[str]:
    """Raises Invalid."""
    types = frozenset(_words(request, "types"))
    if len(types) > TYPES_MAX or any(len(name) > 128 for name in types):
        raise Invalid(f"Too many types (max {TYPES_MAX}, of 128 characters)")
    return types


class Asked(Struct, frozen=True):
    """A stream, as a request asks for it."""

    who: Identity
    reader: Reader
    cursor: Cursor
    types: frozenset[str]
    """Raw types or SSE names; empty: all."""
    task: str = ""
    """The one that it follows; empty: many."""


def asked_of(request: HTTPConnection, store: Store) -> Asked:
    """Raises Unauthorized, Invalid."""
    who, query = caller(request), request.query_params
    ids = list(dict.fromkeys(_words(request, "workflow_id")))
    session, agent = query.get("session_id", ""), query.get("agent_id", "")
    states = frozenset(statuses(query.getlist("status")))
    if not all(events.ID.fullmatch(id_) for id_ in ids) or ("workflow_id" in query and not ids):
        raise Invalid("Invalid or missing workflow_id")
    for name, value in (("session_id", session), ("agent_id", agent)):
        if name in query and not events.ID.fullmatch(value):
            raise Invalid(f"Invalid {name} format")
    if len(ids) == 1 and not (session or agent or states):
        return asked_of_task(request, store, ids[0])
    if len(ids) > MATCHING_MAX:
        raise Invalid(f"Too many workflow_ids (max {MATCHING_MAX})")
    cursor = _cursor(request, many=True)
    selection = Selection(
        org=who.org,
        owners=frozenset() if ids else frozenset({"", who.user}),
        tasks=frozenset(ids),
        session=session,
        agent=agent,
        statuses=states,
    )
    reader = store.hub.many(selection, cursor.after, strict=fails_on_gap(request))
    return Asked(who, reader, cursor, _types(request))


def asked_of_task(request: HTTPConnection, store: Store, id_: str) -> Asked:
    """Raises Unauthorized, Invalid."""
    who = caller(request)
    if not events.ID.fullmatch(id_):
        raise Invalid("Invalid task ID format")
    cursor = of_task(_cursor(request, many=False), store, who.org, id_)
    snapshot = _flag(request, "snapshot") and not cursor.after
    reader = store.hub.one(who.org, id_, cursor.after, snapshot=snapshot, strict=fails_on_gap(request))
    return Asked(who, reader, cursor, _types(request), task=id_)


def _flag(request: HTTPConnection, name: str) -> bool:
    text = request.query_params.get(name, "").lower()
    if text not in {"", "0", "1", "false", "true"}:
        raise Invalid(f"Invalid {name} (allowed: 0, 1)")
    return text in {"1", "true"}


def fails_on_gap(request: HTTPConnection) -> bool:
    """Raises Invalid."""
    text = request.query_params.get("on_gap", "")
    if text not in {"", "fail"}:
        raise Invalid("Invalid on_gap (allowed: fail)")
    return text == "fail"


# Server-Sent Events


async def sse(request: Request) -> Response:
    return await _stream(request, lambda store: asked_of(request, store))


async def task_stream(request: Request) -> Response:
    """Served, not redirected as upstream does: its 307 loses a browser's query key (§1.7)."""
    return await _stream(request, lambda store: asked_of_task(request, store, request.path_params["task_id"]))


async def _stream(request: Request, parse: Callable[[Store], Asked]) -> Response:
    """Raises Unauthorized, Invalid, NotFound; but a store that is away is a stream that begins later (`sse.py`)."""
    streams: Streams = request.app.state.streams
    store: Store = request.app.state.store
    try:
        asked = parse(store)
        # Only an EventSource stops for good at 204, and it always asks for this type (HTML standard, §9.2.2);
        # other clients take 204 for a failure (the SDK retries for a minute) and get `done` again.
        listening = "text/event-stream" in request.headers.get("accept", "")
        if request.method == "HEAD" or (listening and asked.cursor.ended):
            if await _over(store, asked) and listening and asked.cursor.ended:
                return Response(status_code=204)
            if request.method == "HEAD":  # never subscribes
                return Response(headers=HEADERS)
    except Unavailable:
        return Response(headers=HEADERS) if request.method == "HEAD" else Later(streams, "store")
    what = f"workflow {asked.task}" if asked.task else "many workflows"
    epoch = store.partitions.epoch
    # `retry` stands here too, for a server that is killed says nothing, and a proxy may drop its last words (tried).
    # No blank line: by the letter of the HTML standard (§9.2.6) one before the first id would clear a client's cursor.
    hello = f": connected to {what}\n: log epoch {epoch}\n".encode() + retry()
    return Stream(
        streams, store.hub, asked.reader, partial(_spelling, epoch, asked.types), hello=hello, key=asked.who.key
    )


def _spelling(epoch: str, types: frozenset[str], chunk: Callable[[bytes], bytes]) -> Spelling:
    return spelling(frame, _control(epoch), types, chunk, live)


@lru_cache
def _control(epoch: str) -> Callable[[Gap | Began | Reached | Ended], Frame]:
    return partial(control, epoch=epoch)


async def _over(store: Store, asked: Asked) -> bool:
    """Nothing follows the cursor: all that it names has ended, no later than that. Raises NotFound."""
    selection = getattr(asked.reader, "selection", None)
    ids = selection.tasks if isinstance(selection, Selection) else {asked.task}
    for id_ in ids:
        task = await store.get(asked.who.org, id_)
        if task is None:
            raise NotFound("Task not found")
        after = of_task(asked.cursor, store, asked.who.org, id_).after
        last = task.last_event_id
        if not task.terminal or (last != after if asked.task else order(last) > order(after)):
            return False
    return bool(ids)


# WebSocket


async def ws(socket: WebSocket) -> None:
    """One JSON text per event: the raw event object (§2.8), at last STREAM_END, then close 1000.

    Refused before the handshake with 401, 400, 404, 410 as JSON.
    """
    store: Store = socket.app.state.store
    streams: Streams = socket.app.state.streams
    asked = asked_of(socket, store)
    wire = wire_of(socket.scope)
    if wire:
        wire.limit(streams.settings.stream_backlog_bytes)
    # Whatever happens to the connection below, a reader that takes nothing must not stay.
    socket._send = unstalled(socket._send, wire)  # noqa: SLF001 (Starlette's only hook for one socket)
    visitor = Visitor(wire.abort if wire else lambda: None)
    refusal = streams.refusal(asked.who.key)
    if refusal:
        metrics.STREAMS_ABORTED.labels(refusal).inc()
        await socket.accept()
        await socket.close(CLOSE_RESTART if streams.closing else CLOSE_LATER)
        return
    with streams.holding(visitor, asked.who.key):
        async with store.hub.follow(asked.reader) as pull:
            await socket.accept()
            with suppress(WebSocketDisconnect, OSError):  # it left: there is nobody to tell
                await socket.close(await _follow(socket, asked, pull, visitor))


async def _follow(socket: WebSocket, asked: Asked, pull: Pull, visitor: Visitor) -> int:
    """Sends until the task ended, the client left or the server stops; the close code."""
    telling = asyncio.create_task(_tell(socket, asked, pull))
    hearing = asyncio.create_task(_hear(socket))
    try:
        await asyncio.wait({telling, hearing, visitor.leaving}, return_when=asyncio.FIRST_COMPLETED)
        if hearing.done():
            raise WebSocketDisconnect
        if visitor.leaving.done():
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


async def _tell(socket: WebSocket, asked: Asked, pull: Pull) -> None:
    store: Store = socket.app.state.store
    async for page in pull:
        for item in page:
            for body in _bodies(item, asked, store.partitions.epoch):
                text = msgspec.json.encode(body).decode()
                await socket.send_text(text)
                metrics.STREAM_FRAMES.inc()
                metrics.STREAM_BYTES.inc(len(text))


def _bodies(item: Item, asked: Asked, epoch: str) -> list[Json]:
    if isinstance(item, Entry | Placed):
        entry = item if isinstance(item, Entry) else item.entry
        bodies = event_body(entry, stream=True)
        if isinstance(item, Placed):
            bodies = [{**body, "stream_id": item.cursor} if "stream_id" in body else body for body in bodies]
        return [body for body in bodies if not asked.types or asked.types & _names(body["type"])]
    told = control(item, epoch=epoch)
    place = {"stream_id": told.id} if told.id else {}
    if isinstance(item, Ended):
        end = {"type": "STREAM_END", "message": "Done", "timestamp": clock(time.time_ns() // 1000)}
        one = {"workflow_id": asked.task, "seq": item.seq} if asked.task else {}
        return [{**end, **one, **place}]
    if isinstance(item, Gap):
        metrics.GAPS.labels(item.reason).inc()
    assert isinstance(told.data, dict)
    return [{**told.data, **place}]


def _names(raw: str) -> set[str]:
    return {raw, SSE_NAME.get(raw, raw)}


routes = [
    Route("/api/v1/stream/sse", sse),
    WebSocketRoute("/api/v1/stream/ws", ws),
    Route("/api/v1/tasks/{task_id}/stream", task_stream),
]
