"""The open streams of a process: bounded, kept warm, and sent away together when it stops; and their connections."""

import asyncio
import resource
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import structlog
from starlette.types import Message, Scope, Send

from app import metrics
from app.errors import TaskcastError
from app.frames import frames_in
from app.settings import Settings

logger = structlog.get_logger()

WIRE = "taskcast.wire"
"""The ASGI extension under which our server lends a stream its connection."""
WAITS = "taskcast.waits"
"""In the scope of a request that waits, if its query does not say so."""
CHUNK_BYTES = 64 * 1024
"""Frames of one page are sent together up to this size; uvicorn's own mark for a full buffer."""
STALLED_SECONDS = 30.0
"""As TCP_USER_TIMEOUT (`server.py`), which does not see readers behind a proxy."""
DRAIN_BATCH = 100
DRAIN_PAUSE_SECONDS = 0.05
BEATS = 50
"""Steps in which half a heartbeat's time visits every direct stream: an active one is silent for a heartbeat at most."""


class Wire(Protocol):
    """What our server lends a stream of its connection; absent on any other ASGI server."""

    def limit(self, unsent_bytes: int) -> None:
        """`send` waits while more than that is unsent; of a detached connection the owner is told (`filled`)."""

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

    def filled(self) -> None:
        """More is unsent than its limit. Called inside `write`, once until it has drained."""

    def drained(self) -> None:
        """What was unsent has left, or most of it."""

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

    def visit(self, seconds: float) -> None:
        """Twice per heartbeat, so many seconds after the last time."""


class Visitor:
    """An open stream that a task serves."""

    def __init__(self, abort: Callable[[], None]) -> None:
        self.abort = abort
        self.leaving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done: say goodbye and go."""

    def leave(self) -> None:
        if not self.leaving.done():
            self.leaving.set_result(None)

    def visit(self, seconds: float) -> None:
        """Its task sees to it."""


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
        if self._heart is None:
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
            self._tell()

    @contextmanager
    def holding(self, stream: Leaving, key: str) -> Iterator[None]:
        self.add(stream, key)
        try:
            yield
        finally:
            self.remove(stream, key)

    async def _beat(self) -> None:
        """One for all streams: visits each of them twice per heartbeat, a share of them at a time."""
        pause = self.settings.heartbeat_seconds / 2 / BEATS
        while True:
            streams = [*self.open]
            share = -(-len(streams) // BEATS)
            for i in range(BEATS):
                await asyncio.sleep(pause)
                for stream in streams[i * share : (i + 1) * share]:
                    if stream in self.open:
                        stream.visit(pause * BEATS)
                self._tell()

    def stalled(self, seconds: float) -> bool:
        """Whether a reader that took nothing for so long is to be cut off."""
        return seconds >= STALLED_SECONDS

    def count(self, frames: int, size: int) -> None:
        """What was written. It is told with the next beat: a counter's lock for each frame would cost as much as that."""
        self.frames += frames
        self.bytes += size

    def sent(self, body: bytes) -> None:
        """Not chunked."""
        self.count(frames_in(body), len(body))
        self._tell()

    def _tell(self) -> None:
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


def store_away(event: str, error: TaskcastError) -> None:
    logger.warning(event, reason=str(error))
    metrics.STORE_ERRORS.labels(error.code).inc()


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
