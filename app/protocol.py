"""The connections: uvicorn's protocols, bounded in time and number, and lent to the streams that run on them.

What this file must never do is answer into another answer, or keep a connection that nobody bounds.
"""

import asyncio
import json
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from app import metrics
from app.streams import WIRE, Detached

logger = structlog.get_logger()

REQUEST_SECONDS = 30.0
"""For a whole request to arrive (as the ReadTimeout of Shannon's gateway, its contract §1.0): nobody is known before."""
HANG_UP_SECONDS = 1.0
"""For the last bytes before an abort."""
REFUSALS_TOLD_SECONDS = 1.0
"""Between log lines about refused connections: a flood of them must not become one of lines."""


class Connection:
    """A connection of ours, lent to a stream (`streams.Wire`)."""

    __slots__ = ("_detach", "_transport", "unsent", "write")

    def __init__(self, transport: asyncio.Transport, detach: Callable[["Kept"], None] | None = None) -> None:
        self._transport = transport
        self._detach = detach
        self.unsent = transport.get_write_buffer_size
        self.write = transport.write

    def limit(self, unsent_bytes: int) -> None:
        self._transport.set_write_buffer_limits(high=unsent_bytes)

    def detach(self, owner: Detached) -> bool:
        assert self._detach, "a WebSocket stays with its protocol"
        detach, self._detach = self._detach, None
        if self._transport.is_closing():  # its end is told to the protocol
            owner.lost()
            return False
        detach(Kept(self._transport, owner))
        return True

    @staticmethod  # one function for all connections, so that they share what is spelled
    def chunk(data: bytes) -> bytes:
        """Every client is announced chunks (RFC 9112 §7.1), by uvicorn also those of HTTP/1.0 that ask for none: the
        proxies that still speak it understand them.
        """
        return b"%x\r\n%b\r\n" % (len(data), data)

    def end(self) -> None:
        self.write(b"0\r\n\r\n")
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def hang_up(self) -> None:
        self._transport.close()
        asyncio.get_running_loop().call_later(HANG_UP_SECONDS, self._transport.abort)


class Kept(asyncio.Protocol):
    """What is left of a connection whose stream has detached it: what the client says is thrown away."""

    __slots__ = ("_owner", "connections", "transport")

    def __init__(self, transport: asyncio.Transport, owner: Detached) -> None:
        self.transport = transport
        self._owner = owner
        self.connections: set[Any] = set()

    def connection_lost(self, _: Exception | None) -> None:
        self.connections.discard(self)
        self._owner.lost()

    def pause_writing(self) -> None:
        self._owner.filled()

    def resume_writing(self) -> None:
        self._owner.drained()

    def shutdown(self) -> None:
        """The drain sends streams away."""


def connections_max() -> int:
    """Nine tenths of the files that this process may open: the rest is for the store, and for refusing the next one."""
    files_max, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if files_max == resource.RLIM_INFINITY else files_max * 9 // 10


def _error(status: int, sentence: str, default_headers: list[tuple[bytes, bytes]]) -> bytes:
    """A last answer, from below the application."""
    body = json.dumps({"error": sentence}).encode()
    headers = [
        *default_headers,
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    return b"".join([STATUS_LINE[status], *(b"%s: %s\r\n" % header for header in headers), b"\r\n", body])


class Http(HttpToolsProtocol):
    """uvicorn's, which waits for a request as long as its client likes, and loses the body of one that would upgrade.

    `_timer` runs exactly while a message is incomplete, or the first one is awaited.
    """

    _told_at: ClassVar[float] = float("-inf")

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > connections_max():
            self._turn_away()
        else:
            self._await_message()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cease_waiting()
        super().connection_lost(exc)

    def _turn_away(self) -> None:
        self.connections.discard(self)
        self.transport.abort()
        metrics.CONNECTIONS_REFUSED.inc()
        now = self.loop.time()
        if now - Http._told_at >= REFUSALS_TOLD_SECONDS:
            Http._told_at = now
            logger.warning("connection.refused", open=len(self.connections))

    # Time

    def _await_message(self) -> None:
        self._cease_waiting()
        self._timer = self.loop.call_later(REQUEST_SECONDS, self._late)

    def _cease_waiting(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if self.pipeline or (cycle and not cycle.more_body and not cycle.response_complete):
            self._await_message()  # an earlier request, which came whole, is still being answered: perhaps a stream
        else:
            self._refuse(408, "Request timeout")

    def _refuse(self, status: int, sentence: str) -> None:
        """Answers, unless that would land inside or behind another answer; and closes."""
        cycle = self.cycle
        unfinished = bool(cycle and (cycle.more_body or not cycle.response_complete))
        if not self.pipeline and not (unfinished and cycle.response_started):
            self.transport.write(_error(status, sentence, self.server_state.default_headers))
        if unfinished:
            cycle.disconnected = True  # what the application says from now on would come after the answer
            cycle.message_event.set()
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def shutdown(self) -> None:
        cycle = self.cycle
        if cycle and cycle.more_body and not cycle.response_complete and not self.pipeline:
            self.transport.abort()  # the rest of the body may never come, and the drain would wait for it
        else:
            super().shutdown()

    # Messages

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, but only WebSockets upgrade: a server may ignore any other wish (RFC 9110 §7.8), and serves the
        request as it is. The parser ends at the head of each that has a wish, so its head is told again without it.
        """
        if self.timeout_keep_alive_task and not self._timer:
            self._await_message()  # line breaks alone end the idleness, and begin no message
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        try:
            while True:
                try:
                    return self.parser.feed_data(rest)
                except httptools.HttpParserUpgrade as upgrade:
                    if self._should_upgrade():
                        return self.handle_websocket_upgrade()
                    if self.scope["method"] == "CONNECT":
                        return self.send_400_response("Invalid HTTP request received.")
                    rest = rest[upgrade.args[0] :]
                    head = self._head_without_upgrade()
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn
                    self.parser.feed_data(head)
        except httptools.HttpParserError:
            msg = "Invalid HTTP request received."
            self.logger.warning(msg)
            self.send_400_response(msg)

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _should_upgrade(self) -> bool:
        return self.scope["method"] == "GET" and super()._should_upgrade()  # RFC 6455 §4.1

    def handle_websocket_upgrade(self) -> None:
        self._cease_waiting()
        super().handle_websocket_upgrade()

    def on_message_begin(self) -> None:
        self._await_message()
        super().on_message_begin()
        self.scope["extensions"] = {}

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():  # `data_received` decides
            self.scope["method"] = self.parser.get_method().decode("ascii")
        else:
            super().on_headers_complete()
            lent: dict[str, Any] = {WIRE: Connection(self.transport, partial(self._detach, self.cycle))}
            self.scope["extensions"] = lent

    def _detach(self, cycle: RequestResponseCycle, kept: Kept) -> None:
        """The stream of that request takes the connection; requests behind it are never answered."""
        self._cease_waiting()
        self._unset_keepalive_if_required()
        self.flow.resume_reading()  # or its end would not be noticed
        cycle.disconnected = True  # so that its ASGI call may return
        kept.connections = cast("set[Any]", self.connections)
        kept.connections.discard(self)
        kept.connections.add(kept)
        self.pipeline.clear()
        self.transport.set_protocol(kept)
        # They refer to one another, and would wait for the garbage collector.
        del self.parser, self.scope, self.cycle

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._cease_waiting()
        super().on_message_complete()
        self.cycle.more_body = False  # uvicorn forgets to say so if the answer was faster than the body,
        if self.cycle.response_complete and not self.transport.is_closing():  # and the end of the idleness, too
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )


class WebSocket(WebSocketsSansIOProtocol):
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.handshake_initiated and not self.transport.is_closing():
            # It was given a whole head, cannot read it (a body announced, a line too long), and would say nothing.
            self.transport.write(_error(400, "Invalid WebSocket handshake.", self.default_headers))
            self.transport.close()

    async def run_asgi(self) -> None:
        lent: dict[str, Any] = {WIRE: Connection(self.transport)}
        self.scope["extensions"] = {**(self.scope["extensions"] or {}), **lent}
        await super().run_asgi()
