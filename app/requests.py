"""What all HTTP surfaces ask of a request, and do with it: its body, who acts, and the wait for a task.

A request that waits is bounded as a stream is: it holds a place among the open streams, follows its task as they do,
and goes when the server drains, when its client has left, and when its time is over. Nothing here polls.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from app import metrics
from app.errors import Invalid, TooLarge
from app.events import AnyEvent, Entry, Json
from app.identity import Identity, caller
from app.store import Store
from app.streams import Streams, Visitor

DEPTH_MAX = 100
"""Of nested JSON. What is stored is decoded again in many places, each with less of Python's stack left than this one
may have had (1,000 levels in all)."""
LATER = {"Retry-After": "1"}
"""Of an answer that came before its time."""


def store_of(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def reply(body: Json | list[Json], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


async def read_body(request: Request, bytes_max: int) -> bytes:
    """Raises TooLarge as soon as it is: at most `bytes_max` and one chunk are ever held."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > bytes_max:
        raise too_large(bytes_max)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > bytes_max:
            raise too_large(bytes_max)
    return bytes(body)


def json_of(body: bytes) -> Any:
    """Raises Invalid."""
    try:
        value = msgspec.json.decode(body)
    except RecursionError as error:
        raise _too_deep() from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"Invalid request body: {error}") from error
    level, depth = _containers([value]), 0
    while level:
        if depth == DEPTH_MAX:
            raise _too_deep()
        level = [inner for one in level for inner in _containers(one.values() if isinstance(one, dict) else one)]
        depth += 1
    return value


def _too_deep() -> Invalid:
    return Invalid(f"Invalid request body: nested too deeply (max {DEPTH_MAX} levels)")


def _containers(values: Iterable[Any]) -> list[dict[str, Any] | list[Any]]:
    return [value for value in values if isinstance(value, (dict, list))]


def too_large(bytes_max: int) -> TooLarge:
    return TooLarge(f"Request body too large (max {bytes_max} bytes)")


def actor(who: Identity) -> str:
    return f"user:{who.user}" if who.user else f"key:{who.key}"


# Waiting


Until = Callable[[AnyEvent], bool]


async def changed(request: Request, task: str, after: str, seconds: float, until: Until = lambda _: True) -> bool:
    """Returns when a task has an entry after that cursor, one that `until` wants, or has ended or is deleted; or when
    the time is over.

    False: it may not wait, or not so long. Raises NotFound, Unavailable, TooLarge, ClientDisconnect.
    """
    who, store = caller(request), request.app.state.store
    streams: Streams = request.app.state.streams
    refusal = streams.refusal(who.key)
    if refusal:
        metrics.STREAMS_ABORTED.labels(refusal).inc()
        return False
    visitor = Visitor(lambda: None)
    with streams.holding(visitor, who.key):
        following = asyncio.create_task(_change(store, who.org, task, after, until), name="wait")
        hearing = asyncio.create_task(left(request.receive), name="hear")
        try:
            await asyncio.wait(
                (following, hearing, visitor.leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if following.done():
                following.result()
            elif hearing.done():
                hearing.result()
                raise ClientDisconnect
        finally:
            following.cancel()
            hearing.cancel()
            await asyncio.gather(following, hearing, return_exceptions=True)
    if visitor.leaving.done():
        metrics.STREAMS_ABORTED.labels("draining").inc()
    return not visitor.leaving.done()


async def _change(store: Store, org: str, task: str, after: str, until: Until) -> None:
    async with store.follow(org, task, after) as pull:
        async for items in pull:
            # What is no entry says that the task has ended, or has moved on too far to be followed.
            if any(until(item.event) if isinstance(item, Entry) else True for item in items):
                return


async def left(receive: Receive) -> None:
    """Returns when the client leaves; what it says until then is thrown away (it is bounded below)."""
    while (await receive())["type"] != "http.disconnect":
        pass
