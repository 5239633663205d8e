"""One connection to Redis: URL → connection → round trips, errors in our own words.

redis-py makes connections and signs in (URL, TLS, names, passwords); what is said then goes through hiredis here, on a
`Line`: one round trip costs a third of the CPU that it costs with redis-py (XREAD of one entry, uvloop; measured).
Nothing is retried: redis-py's default retry writes an `XADD` twice when a reply is lost.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import hiredis
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from app.errors import Full, Misconfigured, TaskcastError, Unavailable

Arg = str | bytes | int | float

TIMEOUT_SECONDS = 10.0
"""For a connection, and for an answer. A script takes milliseconds; a server that loads its log answers at once that it
does.
"""
BLOCK_SECONDS = 5.0
"""Of a blocking read; must stay below TIMEOUT_SECONDS."""


def client(url: str) -> Redis:
    """redis-py without its retries, answering bytes."""
    try:
        made: Redis = Redis.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            health_check_interval=0,
        )
    except ValueError as error:
        raise Misconfigured(f"Not the URL of a store: {url} ({error})") from error
    return made


def in_our_words(error: BaseException) -> BaseException:
    """What an error of the client library means to the store's users."""
    match error:
        case TaskcastError():
            return error
        case exceptions.OutOfMemoryError():
            return Full("The store is full: its memory limit is reached. Tasks can still be read and deleted.")
        case exceptions.AuthenticationError() | exceptions.AuthorizationError() | exceptions.NoPermissionError():
            return Misconfigured(f"The store refuses this user: {error}")
        case exceptions.ConnectionError() | exceptions.TimeoutError() | exceptions.ReadOnlyError() | OSError():
            return Unavailable(f"The store cannot be reached: {error or type(error).__name__}")
        # The code stands first in every error reply (Redis protocol); these have no class of their own.
        case exceptions.ResponseError() if str(error).startswith(("MISCONF", "OOM")):
            return Full(f"The store cannot write: {error}")
        case exceptions.ResponseError() if str(error).startswith(("BUSY ", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN")):
            return Unavailable(f"The store cannot answer now: {error}")
        case _:
            return error


def _nobody(_: Any) -> None:
    """Wants to hear of an answer as it comes."""


class Line:
    """One connection, made by the first trip, and by the first one after a failure. One trip at a time."""

    def __init__(self, redis: Redis) -> None:
        self._made: Any = redis.connection_pool.connection_class(**redis.connection_pool.connection_kwargs)
        self._link: Link | None = None

    async def ask(self, *command: Arg) -> Any:
        """Raises in our words."""
        try:
            (answer,) = await self.trip([command])
        except Exception as error:
            raise in_our_words(error) from error
        if isinstance(answer, Exception):
            raise in_our_words(answer)
        return answer

    async def trip(self, commands: Sequence[tuple[Arg, ...]], tell: Callable[[Any], object] = _nobody) -> list[Any]:
        """The replies, each of which is told as it comes; an error among them stands in its place. Whatever else goes wrong
        closes the connection.
        """
        try:
            if self._link is None:
                self._link = await self._connected()
            packed = [hiredis.pack_command(command) for command in commands]  # type: ignore[arg-type] # its stub allows one word
            return await self._link.trip(b"".join(packed), len(packed), tell)
        except BaseException:
            self.close()
            raise

    async def _connected(self) -> "Link":
        made = self._made
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await made.connect()
            # Python 3.11's `wait_for`, under which redis-py connects, may lose a cancel that comes as it succeeds.
            if (this := asyncio.current_task()) and this.cancelling():
                raise asyncio.CancelledError
            return Link(made._writer)  # noqa: SLF001 (redis-py has no other way to its streams)
        except BaseException:
            if writer := made._writer:  # noqa: SLF001
                writer.close()
            raise
        finally:
            made._reader = made._writer = None  # noqa: SLF001 (it is ours, and the next one is made anew)

    @property
    def ended(self) -> bool:
        """It is of no use any more: the server closed it, or said what nobody asked. A trip fails then; who needs nothing
        of this very connection closes it first.
        """
        return self._link is not None and self._link.ended

    def close(self) -> None:
        if self._link:
            self._link.close()
            self._link = None


class Link(asyncio.Protocol):
    """A connection that redis-py has made and signed in on, and that is a `Line`'s from there: without streams, and
    without a timer for each trip. A process that has little to do finds its caches cold each time, and feels every step
    (one trip after 5 ms of rest: 80 µs of CPU instead of 130; measured).
    """

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer, self._loop = writer, asyncio.get_running_loop()
        self._replies = hiredis.Reader(replyError=_refusal)
        self._tell: Callable[[Any], object] = _nobody
        self._wanted = 0
        self._answers: list[Any] = []
        self._arrived: asyncio.Future[None] | None = None
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.ended = False
        writer.transport.set_protocol(self)

    async def trip(self, data: bytes, wanted: int, tell: Callable[[Any], object]) -> list[Any]:
        """Raises OSError, and hiredis's errors: the connection is of no use then."""
        if self.ended:
            raise ConnectionResetError("The connection has ended.")
        self._answers, self._wanted, self._tell = [], wanted, tell
        self._arrived = self._loop.create_future()
        self._deadline = self._loop.time() + TIMEOUT_SECONDS
        self._timer = self._timer or self._loop.call_at(self._deadline, self._look)
        self._writer.transport.write(data)
        try:
            await self._arrived
            return self._answers
        finally:
            self._arrived = None
            self._answers, self._tell = [], _nobody  # what they hold may be large, and the next trip far

    def data_received(self, data: bytes) -> None:
        if self._arrived is None or self._arrived.done():
            self.ended = True  # nobody asked: perhaps why it closes
            return
        try:
            self._replies.feed(data)
            while len(self._answers) < self._wanted and (answer := self._replies.gets()) is not False:
                self._answers.append(answer)
                self._tell(answer)
        except Exception as error:  # noqa: BLE001 (whoever waits has to hear of it)
            self._fail(error)
        else:
            if len(self._answers) == self._wanted:
                self.ended = self._replies.has_data()  # as above
                self._arrived.set_result(None)

    def _fail(self, error: Exception) -> None:
        self.ended = True
        if self._arrived and not self._arrived.done():
            self._arrived.set_exception(error)

    def _look(self) -> None:
        """One timer for many trips: it looks whether the one under way is late."""
        self._timer = None
        if self._arrived is None:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._look)
        else:
            self._fail(TimeoutError("No answer."))

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionResetError("Connection closed by server."))

    def close(self) -> None:
        self.ended = True
        if self._timer:
            self._timer.cancel()
        self._writer.close()


_REFUSALS: dict[str, type[exceptions.RedisError]] = {
    "NOSCRIPT": exceptions.NoScriptError,
    "OOM": exceptions.OutOfMemoryError,
    "LOADING": exceptions.BusyLoadingError,
    "READONLY": exceptions.ReadOnlyError,
    "NOAUTH": exceptions.AuthenticationError,
    "WRONGPASS": exceptions.AuthenticationError,
    "NOPERM": exceptions.NoPermissionError,
    "NOREPLICAS": exceptions.ConnectionError,
}
"""Code of an error reply, which stands first in it (Redis protocol)."""


def _refusal(text: str) -> exceptions.RedisError:
    return _REFUSALS.get(text.partition(" ")[0], exceptions.ResponseError)(text)
