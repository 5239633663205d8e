"""What every request passes on its way in, outermost first, and how an error is answered on its way out.

Pure ASGI: nothing here may hold a stream's body up, or log a query string: it may hold a key.
"""

import re
import secrets
import time

import structlog
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import metrics
from app.api import shannon, workers, xpander
from app.errors import Full, Stale, TaskcastError, TooLarge, Unauthorized, Unavailable
from app.streams import WAITS, Aborted

logger = structlog.get_logger()

BODY_BYTES_MAX = 1024 * 1024
"""Of any request; submissions and events are bounded further by those who read them."""


class Trace:
    """Gives each request its trace id, its log line and its place in the metrics."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            return await self._app(scope, receive, send)
        began = time.perf_counter()
        trace = scope[_TRACE] = trace_of(Headers(scope=scope))
        ids = [(b"x-trace-id", trace.encode()), (b"x-span-id", secrets.token_hex(8).encode())]
        # Like streams, requests that wait last as long as they should.
        waits = b"wait=" in scope["query_string"] or scope["path"].endswith("/review")
        status, streaming = 0, scope["type"] == "websocket" or waits

        async def traced(message: Message) -> None:
            nonlocal status, streaming
            match message["type"]:
                case "http.response.start" | "websocket.http.response.start":
                    status = message["status"]
                    streaming = streaming or Headers(raw=message["headers"]).get("content-type") == "text/event-stream"
                    message = {**message, "headers": [*message["headers"], *ids]}
                case "websocket.accept":
                    status = 101
                    message = {**message, "headers": [*message.get("headers", ()), *ids]}
                case _:
                    pass
            await send(message)

        try:
            await self._app(scope, receive, traced)
        finally:
            seconds = time.perf_counter() - began
            route, method = getattr(scope.get("route"), "path", "none"), scope.get("method", "WEBSOCKET")
            metrics.REQUESTS.labels(route, method, status).inc()
            if not (streaming or WAITS in scope):
                metrics.REQUEST_SECONDS.labels(route).observe(seconds)
            told = {"method": method, "path": scope["path"], "status": status, "ms": round(seconds * 1000, 1)}
            # What only looks is counted in the metrics; a line each would hide the decisions among them.
            log = logger.debug if status < 400 and method in {"GET", "HEAD", "OPTIONS"} else logger.info
            log("request.answered", **told, trace_id=trace)
        return None


_TRACE = "taskcast.trace"
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_TRACE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


def trace_of(headers: Headers) -> str:
    """From traceparent, else X-Trace-ID, else X-Request-ID, else made here (Shannon's contract §1.0)."""
    if found := _TRACEPARENT.fullmatch(headers.get("traceparent", "").strip().lower()):
        return found[1]
    for name in ("x-trace-id", "x-request-id"):
        if _TRACE_ID.fullmatch(headers.get(name, "")):
            return headers[name]
    return secrets.token_hex(16)


_SHARED = {
    "access-control-allow-origin": "*",
    "access-control-expose-headers": "ETag, Link, Retry-After, X-Idempotency-Cached, X-Idempotency-Key, "
    "X-RateLimit-Limit-Minute, X-RateLimit-Remaining-Minute, X-RateLimit-Limit-Hour, X-RateLimit-Remaining-Hour, "
    "X-RateLimit-Reset, X-Session-ID, X-Shannon-Session-ID, X-Span-ID, X-Total-Capped, X-Trace-ID, X-Workflow-ID",
}
_PREFLIGHT = {
    "access-control-allow-headers": "Content-Type, Authorization, X-API-Key, X-User-Id, Idempotency-Key, "
    "traceparent, tracestate, X-Trace-ID, X-Request-ID, Cache-Control, Last-Event-ID, If-Match, If-None-Match",
    "access-control-max-age": "3600",
}


class Cors:
    """Any page may ask: there are no cookies, so a page borrows nothing, and the one key that every page knows is not
    taken from it (`identity.from_this_machine`). As Shannon's gateway (its contract §1.0),
    except that every answer, errors too, exposes all headers that clients read.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._shared = [(name.encode(), value.encode()) for name, value in _SHARED.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def shared(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self._shared]}
            await send(message)

        if scope["method"] != "OPTIONS":
            return await self._app(scope, receive, shared)
        path = scope["path"]
        stream = path.startswith("/api/v1/stream/") or path.endswith("/stream")
        methods = "GET, OPTIONS" if stream else "GET, POST, PUT, PATCH, DELETE, OPTIONS"
        headers = {"access-control-allow-methods": methods, **_PREFLIGHT}
        return await Response(status_code=200, headers=headers)(scope, receive, shared)


class Unforeseen:
    """Answers what nobody foresaw, and tells nothing of the inside."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            return await self._app(scope, receive, send)
        began = False

        async def seen(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            return await self._app(scope, receive, seen)
        except ClientDisconnect:
            return None  # nobody is there to be answered
        except Aborted:
            raise
        except Exception:
            logger.exception("request.failed", path=scope["path"], trace_id=scope[_TRACE])
            if began:
                raise
            return await JSONResponse({_word(scope["path"]): "Internal server error"}, 500)(scope, receive, seen)


class Bounded:
    """Refuses a body beyond BODY_BYTES_MAX, at once when its length is announced."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > BODY_BYTES_MAX:
            return await respond(_too_large(), scope["path"])(scope, receive, send)
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > BODY_BYTES_MAX:
                raise _too_large()
            return message

        return await self._app(scope, bounded, send)


def _too_large() -> TooLarge:
    return TooLarge(f"The request body exceeds {BODY_BYTES_MAX} bytes.")


# Errors


def respond(error: TaskcastError, path: str = "") -> Response:
    """The error, as those spell it to whom the path belongs: the workers' API, xpander, else Shannon."""
    error_body = shannon.error_body
    if path.startswith(f"{workers.PREFIX}/"):
        error_body = workers.error_body
    elif xpander.speaks(path):
        error_body = xpander.error_body
    status, body = error_body(error)
    headers = next((headers for kind, headers in _HEADERS.items() if isinstance(error, kind)), None)
    return JSONResponse(body, status, headers)


_HEADERS = {
    Unauthorized: {"WWW-Authenticate": 'Bearer realm="Taskcast API"'},
    Full: {"Retry-After": "30"},
    Unavailable: {"Retry-After": "1"},
}
"""Of the first class that fits."""


async def task_error(request: HTTPConnection, error: Exception) -> Response:
    assert isinstance(error, TaskcastError)
    if isinstance(error, Stale):
        metrics.STALE.inc()
    if isinstance(error, Unavailable):
        metrics.STORE_ERRORS.labels(error.code).inc()
        logger.warning("store.unavailable", path=request.scope["path"], reason=str(error))
    return respond(error, request.scope["path"])


async def http_error(request: HTTPConnection, error: Exception) -> Response:
    """What the router and the parsers refuse."""
    assert isinstance(error, HTTPException)
    sentences = {404: f"Not found: {request.scope['path'][:200]}", 405: "Method not allowed"}
    sentence = sentences.get(error.status_code, error.detail)
    headers = dict(error.headers or {})
    if error.status_code == 405:  # Starlette tells the methods of the first route of the path only
        methods = [route.methods for route in request.app.routes if isinstance(route, Route) and _fits(route, request)]
        headers["Allow"] = ", ".join(sorted({method for one in methods for method in one or ()}))
    return JSONResponse({_word(request.scope["path"]): sentence}, error.status_code, headers)


def _word(path: str) -> str:
    """Under which an error's sentence stands."""
    return "detail" if xpander.speaks(path) else "error"


def _fits(route: Route, request: HTTPConnection) -> bool:
    return route.matches(request.scope)[0] is not Match.NONE


async def not_found(_: Scope, __: Receive, ___: Send) -> None:
    raise HTTPException(404)
