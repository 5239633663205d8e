"""The application, and the server that runs it and knows how to stop.

`create_app` puts the dialect's routes behind the layers of `edge.py` and the question who is calling; `Server` is
uvicorn with an end of its own: it sends streams away instead of waiting for them for ever (tried), and never ends one
cleanly; its protocols lend each stream its connection (`streams.Wire`). `run` is one process, from settings to exit code.

What this file must never do is log a query string: it may hold a key.
"""

import asyncio
import errno
import gc
import logging
import re
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.resources import files
from typing import Any

import structlog
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from app import __version__, metrics, ops
from app.api import shannon, workers, xpander
from app.claims import Claims
from app.edge import Bounded, Cors, Trace, Unforeseen, http_error, not_found, task_error
from app.errors import Misconfigured, TaskcastError, Unavailable
from app.identity import DEVELOPMENT_KEY, Authentication, Identities
from app.protocol import HANG_UP_SECONDS, Http, WebSocket
from app.settings import Settings
from app.store import Store, open_store
from app.streams import Streams

logger = structlog.get_logger()

CLIENT_MESSAGE_BYTES_MAX = 4096
"""Over WebSocket, where whatever clients say is thrown away."""
PING_SECONDS = 20.0
"""Between pings to a WebSocket reader, and for its pong (Shannon's contract §2.8)."""
KEEP_ALIVE_SECONDS = 75
"""Longer than the idle time of the usual proxies (60 s), so that they close first and no request meets a closed door."""
USER_TIMEOUT_MS = 30_000
"""After which the kernel gives up on a peer that takes nothing, or is gone."""
CONNECTIONS_WAITING_MAX = 2048
DATE_SECONDS = 1.0
"""The resolution of the header that holds it."""
TICK_SECONDS = 1.0
FORGET_SECONDS = 60.0

Ready = Callable[[str], None]


def create_app(store: Store, settings: Settings, *, identities: Identities, streams: Streams) -> Starlette:
    """The application over an open store. Its state has what routes need: `store settings identities streams claims`."""
    routes: list[BaseRoute] = [*shannon.routes, *xpander.routes, *workers.routes, *ops.routes]
    page = files("app") / "page.html"
    if page.is_file():
        routes.append(Route("/", _page(page.read_text(encoding="utf-8"))))
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(xpander.Paths),
            Middleware(Trace),
            Middleware(Cors),
            Middleware(Unforeseen),
            Middleware(Bounded),
            Middleware(Authentication, identities=identities),
        ],
        exception_handlers={TaskcastError: task_error, HTTPException: http_error},
    )
    # A path has one spelling; a redirect would drop a stream's query key on the way.
    app.router.redirect_slashes = False
    app.router.default = not_found
    app.state.store, app.state.settings = store, settings
    app.state.identities, app.state.streams = identities, streams
    app.state.claims = Claims(store)
    return app


def _page(html: str) -> Callable[[Request], Any]:
    async def page(_: Request) -> Response:
        return HTMLResponse(html, headers={"Cache-Control": "no-cache"})

    return page


# The server


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
        self.stopping = asyncio.Event()

    def stop(self) -> None:
        self.force_exit = self.should_exit
        self.end()

    def end(self) -> None:
        self.should_exit = True
        self.stopping.set()

    async def main_loop(self) -> None:
        # uvicorn's looks ten times a second whether to stop, and each time a process wakes up its caches are cold.
        while not await self.on_tick(0):  # writes the date into the headers
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), DATE_SECONDS)

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
        # Bounded: one that swallows its cancel must not keep the process.
        _, stuck = await asyncio.wait([draining, *state.tasks], timeout=HANG_UP_SECONDS)
        logger.info("server.stopped", cut_off=left, stuck=len(stuck))


class _WithoutKeys(logging.Filter):
    """uvicorn tells the query of each WebSocket, and at DEBUG its headers.

    What it takes for errors, and is none, is dropped.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"\?[^\s\"]*", "?…", record.getMessage()), ()
        # Nothing but the end of the drain cancels a request; `server.stopped` counts them.
        cut_off = bool(record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
        return record.levelno >= logging.INFO and not cut_off and record.msg not in _NO_ERRORS


_NO_ERRORS = {
    # A WebSocket that the application refused with a status of its own; `request.answered` tells it.
    "ASGI callable returned without completing handshake.",
    # The client's fault, told to the client with code 1007.
    "Invalid UTF-8 sequence received from client.",
}
"""Any anonymous client can cause these, as many as it likes: at ERROR it would raise alerts, or bury those that count."""

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
        server.end()
        try:
            await running
        finally:
            if watching := app.state.claims.task:
                chores.append(watching)
            for chore in chores:
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

    collect_rarely()
    with sock, _signals(stop):
        async with open_store(settings) as store, serving(store, settings, sock) as server:
            logger.info(
                "server.ready", url=url, version=__version__, store=(settings.redis_url and "redis") or "embedded"
            )
            if store.embedded and Identities(store, settings).development:
                logger.info("server.development_key", key=DEVELOPMENT_KEY, reason="embedded store, loopback only")
            if ready:
                ready(url)
            await server.stopping.wait()
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
    configure_logs(settings.log_level)
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


def collect_rarely() -> None:
    """For a process that serves: what a request or a short task makes is gone with it, and what stays, stays long.

    Looking for cycles after each 700 new objects took a tenth of an API's CPU among many streams, and a fifth of a
    worker's (measured).
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def configure_logs(level: str) -> None:
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
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # One write per line: the printing one makes two, and processes that share stderr would tear lines.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    root = logging.getLogger()
    root.handlers = [_Forward()]
    root.setLevel(logging.WARNING)


class _Forward(logging.Handler):
    """A library's line, as one of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.log(record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info)
