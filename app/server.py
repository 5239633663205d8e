"""The edge: the application with what every request passes, and the server that runs it and knows how to stop.

`create_app` puts the dialect's routes behind five pure-ASGI layers (trace, CORS, faults, size, who is calling); `Server` is
uvicorn with an end of its own: it sends streams away instead of waiting for them for ever (tried), and never ends one
cleanly; its protocols lend each stream its connection (`sse.Wire`). `run` is one process, from settings to exit code.

What this file must never do is log a query string: it may hold a key.
"""

import asyncio
import errno
import logging
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.resources import files
from typing import Any

import structlog
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from app import __version__, metrics, ops
from app.api import shannon
from app.errors import Full, Misconfigured, Stale, TaskcastError, TooLarge, Unauthorized, Unavailable
from app.identity import DEVELOPMENT_KEY, Authentication, Identities
from app.settings import Settings
from app.sse import WIRE, Aborted, Streams
from app.store import Store, open_store

logger = structlog.get_logger()

BODY_BYTES_MAX = 1024 * 1024
"""Of any request; submissions and events are bounded further by those who read them."""
CLIENT_MESSAGE_BYTES_MAX = 4096
"""Over WebSocket, where whatever clients say is thrown away."""
PING_SECONDS = 20.0
"""Between pings to a WebSocket reader, and for its pong (Shannon's contract §2.8)."""
KEEP_ALIVE_SECONDS = 75
"""Longer than the idle time of the usual proxies (60 s), so that they close first and no request meets a closed door."""
USER_TIMEOUT_MS = 30_000
"""After which the kernel gives up on a peer that takes nothing, or is gone."""
HANG_UP_SECONDS = 1.0
"""For the last bytes before an abort."""
CONNECTIONS_WAITING_MAX = 2048
TICK_SECONDS = 1.0
FORGET_SECONDS = 60.0

Ready = Callable[[str], None]


# What every request passes, outermost first. Pure ASGI: nothing here may hold a stream's body up.


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
        status, streaming = 0, scope["type"] == "websocket"

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
            if not streaming:
                metrics.REQUEST_SECONDS.labels(route).observe(seconds)
            told = {"method": method, "path": scope["path"], "status": status, "ms": round(seconds * 1000, 1)}
            logger.info("request.answered", **told, trace_id=trace)
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
    """Any page may ask: there are no cookies, so a page borrows nothing. As Shannon's gateway (its contract §1.0),
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
            return await JSONResponse({"error": "Internal server error"}, 500)(scope, receive, seen)


class Bounded:
    """Refuses a body beyond BODY_BYTES_MAX, at once when its length is announced."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > BODY_BYTES_MAX:
            return await respond(_too_large())(scope, receive, send)
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


def respond(error: TaskcastError) -> Response:
    """The error, as Shannon spells it."""
    status, body = shannon.error_body(error)
    headers = next((headers for kind, headers in _HEADERS.items() if isinstance(error, kind)), None)
    return JSONResponse(body, status, headers)


_HEADERS = {
    Unauthorized: {"WWW-Authenticate": 'Bearer realm="Taskcast API"'},
    Full: {"Retry-After": "30"},
    Unavailable: {"Retry-After": "1"},
}
"""Of the first class that fits."""


async def _task_error(request: HTTPConnection, error: Exception) -> Response:
    assert isinstance(error, TaskcastError)
    if isinstance(error, Stale):
        metrics.STALE.inc()
    if isinstance(error, Unavailable):
        metrics.STORE_ERRORS.labels(error.code).inc()
        logger.warning("store.unavailable", path=request.scope["path"], reason=str(error))
    return respond(error)


async def _http_error(request: HTTPConnection, error: Exception) -> Response:
    """What the router and the parsers refuse."""
    assert isinstance(error, HTTPException)
    sentences = {404: f"Not found: {request.scope['path'][:200]}", 405: "Method not allowed"}
    sentence = sentences.get(error.status_code, error.detail)
    return JSONResponse({"error": sentence}, error.status_code, error.headers)


async def _not_found(_: Scope, __: Receive, ___: Send) -> None:
    raise HTTPException(404)


def create_app(store: Store, settings: Settings, *, identities: Identities, streams: Streams) -> Starlette:
    """The application over an open store. Its state has what routes need: `store settings identities streams watch`."""
    routes: list[BaseRoute] = [*shannon.routes, *ops.routes]
    page = files("app") / "page.html"
    if page.is_file():
        routes.append(Route("/", _page(page.read_text(encoding="utf-8"))))
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Trace),
            Middleware(Cors),
            Middleware(Unforeseen),
            Middleware(Bounded),
            Middleware(Authentication, identities=identities),
        ],
        exception_handlers={TaskcastError: _task_error, HTTPException: _http_error},
    )
    # A path has one spelling; a redirect would drop a stream's query key on the way.
    app.router.redirect_slashes = False
    app.router.default = _not_found
    app.state.store, app.state.settings = store, settings
    app.state.identities, app.state.streams = identities, streams
    app.state.watch = ops.Watch(store)
    return app


def _page(html: str) -> Callable[[Request], Any]:
    async def page(_: Request) -> Response:
        return HTMLResponse(html, headers={"Cache-Control": "no-cache"})

    return page


# The server


class Connection:
    """A connection of ours, lent to a stream (`sse.Wire`)."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def limit(self, unsent_bytes: int) -> None:
        self._transport.set_write_buffer_limits(high=unsent_bytes)

    def unsent(self) -> int:
        return self._transport.get_write_buffer_size()

    def abort(self) -> None:
        self._transport.abort()

    def hang_up(self) -> None:
        self._transport.close()
        asyncio.get_running_loop().call_later(HANG_UP_SECONDS, self._transport.abort)


class Http(HttpToolsProtocol):
    def on_message_begin(self) -> None:
        super().on_message_begin()
        lent: dict[str, Any] = {WIRE: Connection(self.transport)}
        self.scope["extensions"] = lent


class WebSocket(WebSocketsSansIOProtocol):
    async def run_asgi(self) -> None:
        lent: dict[str, Any] = {WIRE: Connection(self.transport)}
        self.scope["extensions"] = {**(self.scope["extensions"] or {}), **lent}
        await super().run_asgi()


class Server(uvicorn.Server):
    """uvicorn, which `stop` ends: once in good order, twice at once. Signals belong to `serve`."""

    def __init__(self, app: ASGIApp, settings: Settings, streams: Streams) -> None:
        for name in ("uvicorn.error", "uvicorn.access"):
            logging.getLogger(name).addFilter(_without_keys)
        config = uvicorn.Config(
            app,
            http=Http,
            ws=WebSocket,
            ws_max_size=CLIENT_MESSAGE_BYTES_MAX,
            ws_ping_interval=PING_SECONDS,
            ws_ping_timeout=PING_SECONDS,
            ws_per_message_deflate=False,  # frames are small, and a compressor costs each reader 300 KiB
            lifespan="off",
            log_config=None,
            access_log=False,  # it would hold query strings; Trace writes our own lines
            proxy_headers=False,
            server_header=False,
            backlog=CONNECTIONS_WAITING_MAX,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        super().__init__(config)
        self._grace_seconds, self._streams = settings.grace_seconds, streams

    def stop(self) -> None:
        self.force_exit, self.should_exit = self.should_exit, True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn raises a caught signal again at the end, so that a good end would look like a death.
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens no more, closes what idles, sends the streams away, lets plain requests end; then cuts off."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._grace_seconds
        for server in self.servers:
            server.close()
        for sock in sockets or ():
            sock.close()
        state = self.server_state
        for connection in [*state.connections]:
            if not isinstance(connection, WebSocket):  # uvicorn would close all of them at the same moment
                connection.shutdown()
        draining = asyncio.create_task(self._streams.drain(self._grace_seconds * 0.8))
        while (state.connections or state.tasks) and not self.force_exit and loop.time() < deadline:
            await asyncio.sleep(0.01)
        draining.cancel()
        left = len(state.connections)
        for connection in [*state.connections]:
            connection.transport.abort()
        for task in [*state.tasks]:
            task.cancel()
        await asyncio.gather(draining, *state.tasks, return_exceptions=True)
        logger.info("server.stopped", cut_off=left)


class _WithoutKeys(logging.Filter):
    """uvicorn tells the query of each WebSocket, and at DEBUG its headers."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"\?[^\s\"]*", "?…", record.getMessage()), ()
        return record.levelno >= logging.INFO


_without_keys = _WithoutKeys()


def listen(settings: Settings, *, shared: bool = False) -> socket.socket:
    """A listening socket at the settings' host and port; port 0 takes a free one. `shared`: other processes may listen
    there too, and the kernel shares out connections (SO_REUSEPORT).

    Raises Misconfigured.
    """
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise Misconfigured(f"{host} is not an address of this machine: {error.strerror}.") from error
    # localhost has two; clients that try only one of them try this one.
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] is not socket.AF_INET)
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family is socket.AF_INET6 and host in {"", "::"}:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; accepted sockets inherit it (tried)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        sock.bind(address)
        sock.listen(CONNECTIONS_WAITING_MAX)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise Misconfigured(f"Port {port} of {host} is in use; choose another one with --port.") from error
        raise Misconfigured(f"{host}, port {port}, cannot be listened on: {error.strerror}.") from error
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@asynccontextmanager
async def serving(store: Store, settings: Settings, sock: socket.socket) -> AsyncIterator[Server]:
    """Serves an open store on a listening socket, which it closes, until the context ends; then drains."""
    streams = Streams(settings)
    app = create_app(store, settings, identities=Identities(store, settings), streams=streams)
    server = Server(app, settings, streams)
    running = asyncio.create_task(server.serve([sock]), name="server")
    chores = [asyncio.create_task(tick(store), name="ticker")]
    if settings.keep_days:
        chores.append(asyncio.create_task(forget(store, settings.keep_days), name="forget"))
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.001)
        if server.started:
            yield server
    finally:
        server.should_exit = True
        try:
            await running
        finally:
            for chore in (*chores, app.state.watch.task):
                if chore:
                    chore.cancel()
                    await asyncio.wait([chore])


async def tick(store: Store) -> None:
    """Appends what is due, every second: in every process, for the guards make repeats harmless."""
    await _for_ever("ticker", TICK_SECONDS, store.queues.tick)


async def forget(store: Store, keep_days: float) -> None:
    """Deletes tasks that ended long ago, as many as there are."""

    async def once() -> None:
        while await store.queues.forget(keep_days * 86_400):
            pass

    await _for_ever("forget", FORGET_SECONDS, once)


async def _for_ever(name: str, seconds: float, once: Callable[[], Awaitable[object]]) -> None:
    """A chore that ended in silence would look like tasks that never time out."""
    while True:
        try:
            await once()
        except Unavailable as error:
            metrics.STORE_ERRORS.labels(error.code).inc()
            metrics.CHORES_FAILED.labels(name).inc()
            logger.warning("chore.waiting", chore=name, reason=str(error))
        except Exception:
            metrics.CHORES_FAILED.labels(name).inc()
            logger.exception("chore.failed", chore=name)
        await asyncio.sleep(seconds)


async def serve(settings: Settings, *, sock: socket.socket | None = None, ready: Ready | None = None) -> int:
    """One process, until SIGINT or SIGTERM: opens the store, serves, drains. `ready` is given the URL.

    Returns the exit code: 0, or 1 when a second signal cut it short. Raises Misconfigured, Unavailable.
    """
    sock = sock or listen(settings)
    url = url_of(sock)
    server: Server | None = None
    main = asyncio.current_task()
    assert main is not None

    def stop() -> None:
        if server:
            server.stop()
        else:
            main.cancel()  # while the store opens: its context still closes it

    with sock, _signals(stop):
        async with open_store(settings) as store, serving(store, settings, sock) as server:
            logger.info(
                "server.ready", url=url, version=__version__, store=(settings.redis_url and "redis") or "embedded"
            )
            if store.embedded and Identities(store, settings).development:
                logger.info("server.development_key", key=DEVELOPMENT_KEY, reason="embedded store, loopback only")
            if ready:
                ready(url)
            while not server.should_exit:
                await asyncio.sleep(0.05)
        return 1 if server.force_exit else 0


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Both signals call `stop`, in the main thread; elsewhere nobody can ask for signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def run(settings: Settings, *, sock: socket.socket | None = None, ready: Ready | None = None) -> int:
    """The process, from settings to exit code: 0; 1: try again; 2: another start cannot help. It says why on stderr."""
    configure_logs()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(settings, sock=sock, ready=ready))
    except asyncio.CancelledError:
        return 0  # stopped while it started
    except Misconfigured as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except TaskcastError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def configure_logs() -> None:
    """One line per event on stderr: key=value for people, JSON for machines. What libraries log comes through too."""
    last: Any = (
        structlog.dev.ConsoleRenderer()
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            # Plain tracebacks: the pretty ones print local variables, and a key may be among them.
            structlog.processors.format_exc_info,
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    root = logging.getLogger()
    root.handlers = [_Forward()]
    root.setLevel(logging.WARNING)


class _Forward(logging.Handler):
    """A library's line, as one of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.log(record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info)
