"""The only door to Redis: URL → connection, timeouts, pipelining, errors in our own words.

redis-py makes connections and signs in (URL, TLS, names, passwords); what is said then goes through hiredis here, on a
`Line`: one round trip costs a third of the CPU that it costs with redis-py (XREAD of one entry, uvloop; measured).
Commands asked for while a round trip is under way go out together in the next one, in the order in which they
were asked. Nothing is retried blindly: redis-py's default retry writes an `XADD` twice when a reply is lost. Callers
that may repeat themselves, because the script recognises a repeat, say so (`repeat=True`).
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from importlib.resources import files
from typing import Any, TypeVar

import hiredis
from msgspec import Struct
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from app.errors import Full, Invalid, Misconfigured, TaskcastError, Unavailable

Arg = str | bytes | int | float

TIMEOUT_SECONDS = 10.0
"""For a connection, and for an answer. A script takes milliseconds; a server that loads its log answers at once that it does."""
REPEAT_SECONDS = 8.0
"""How long a repeatable call goes on asking: an embedded server that died is back within about a second."""
BLOCK_SECONDS = 5.0
"""Of a blocking read; must stay below TIMEOUT_SECONDS."""
SHARES_MAX = 32
"""In one call. More cost hardly less each."""


READ_ONLY, ALLOW_OOM = " flags=no-writes", " flags=allow-oom"
FLAGS = {
    **dict.fromkeys(("read", "replay", "list", "snapshot", "due"), READ_ONLY),
    # What frees memory, or as a lease's renewal takes none, goes on in a full store.
    **dict.fromkeys(("delete", "delete-agent", "forget", "heartbeat", "renew"), ALLOW_OOM),
}
ALONE = frozenset({"agent", "delete-agent", "deploy", "heartbeat", "read", "replay", "snapshot"})
"""Scripts that need nothing of `commit.lua`."""


class Script(Struct, frozen=True):
    text: str
    sha: str


@lru_cache
def script(name: str) -> Script:
    """`app/lua/<name>.lua` behind what all scripts share.

    The first line makes the server refuse the whole script, instead of one write in its middle, when memory is full.
    """
    folder = files("app") / "lua"
    shared = "" if name in ALONE else (folder / "commit.lua").read_text()
    body = (folder / f"{name}.lua").read_text()
    text = f"#!lua{FLAGS.get(name, '')}\n{shared}\n{body}"
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def evaluation(name: str, keys: Sequence[str], args: Sequence[Arg]) -> tuple[Arg, ...]:
    """The command that runs it."""
    return "EVALSHA", script(name).sha, len(keys), *keys, *args


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


class Door:
    """Calls to one Redis. Two lanes, so that a page of history does not delay a write."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = client(url)
        self._fast, self._slow = Lane(self._client), Lane(self._client)
        self._loading = asyncio.Lock()
        self._loads = 0
        """How often a server had lost the scripts."""

    async def call(self, *command: Arg, repeat: bool = False) -> Any:
        return await self._ask(self._fast, command, repeat=repeat)

    async def read(self, *command: Arg) -> Any:
        """A command that only reads: it may take longer, and be repeated."""
        return await self._ask(self._slow, command, repeat=True)

    async def run(
        self, name: str, keys: Sequence[str], args: Sequence[Arg], *, repeat: bool = False, slow: bool = False
    ) -> Any:
        """Runs `app/lua/<name>.lua`. Raises Unavailable, Full."""
        lane = self._slow if slow else self._fast
        return await self._ask(lane, evaluation(name, keys, args), repeat=repeat)

    async def share(
        self, name: str, key: str, head: tuple[Arg, ...], args: Sequence[Arg], *, weight: float, repeat: bool = False
    ) -> Any:
        """Runs `app/lua/<name>.lua`, which takes one key and `args` for each of many things, for one of them; those that are
        asked for at the same time share a call if their heads are equal, and their weights, parts of what a call may
        hold, are at most 1 together. Raises Unavailable, Full.
        """
        # What does not fit into the next call takes the other lane: on one, the store and who asks it would take turns
        # instead of working at the same time (100 tasks' events in a worker: 7,000 a second, and 13,000 so; measured).
        lane = self._fast if self._fast.waiting < SHARES_MAX else self._slow
        return await self._ask(lane, Share(name, key, head, args, weight), repeat=repeat)

    async def load(self) -> None:
        """Gives the server all scripts."""
        names = sorted(file.name.removesuffix(".lua") for file in (files("app") / "lua").iterdir())
        loads = [self._ask(self._fast, ("SCRIPT", "LOAD", script(n).text), repeat=True) for n in names if n != "commit"]
        await asyncio.gather(*loads)

    async def _ask(self, lane: "Lane", command: "Command", *, repeat: bool) -> Any:
        until = time.monotonic() + REPEAT_SECONDS
        pause, again = 0.02, False
        while True:
            loads = self._loads
            try:
                return await lane.ask(command)
            except exceptions.NoScriptError:  # a restarted server: it has not run anything
                if again:
                    raise
                again = True
                async with self._loading:
                    if self._loads == loads:  # else others have loaded them meanwhile
                        await self.load()
                        self._loads += 1
                continue
            except Unavailable as error:
                if not repeat or isinstance(error, Full) or time.monotonic() > until:
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.5)

    @asynccontextmanager
    async def blocking(self) -> AsyncIterator["Line"]:
        """A connection of its own, for reads that wait. One that breaks fails, and is not made again in silence."""
        line = Line(self._client)
        try:
            yield line
        finally:
            line.close()

    async def aclose(self) -> None:
        for lane in (self._fast, self._slow):
            await lane.aclose()


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
    without a timer for each trip. A process that has little to do finds its caches cold each time, and feels every step (one trip
    after 5 ms of rest: 80 µs of CPU instead of 130; measured).
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
    "MOVED": exceptions.MovedError,
    "ASK": exceptions.AskError,
}
"""Code of an error reply, which stands first in it (Redis protocol)."""


def _refusal(text: str) -> exceptions.RedisError:
    return _REFUSALS.get(text.partition(" ")[0], exceptions.ResponseError)(text)


class Share(Struct, frozen=True, gc=False):
    """One thing's part of a script's call."""

    name: str
    key: str
    head: tuple[Arg, ...]
    args: Sequence[Arg]
    weight: float


Command = tuple[Arg, ...] | Share
Asked = tuple[Command, asyncio.Future[Any]]
T = TypeVar("T")


class Lane:
    """One round trip at a time; what is asked meanwhile goes out together with the next."""

    BATCH_MAX = 500

    def __init__(self, redis: Redis) -> None:
        self._line = Line(redis)
        shapes: Mapping[Any, Callable[..., Any]] = redis.response_callbacks
        self._shapes = {name: shape for name, shape in shapes.items() if name not in {"XRANGE", "XREVRANGE"}}
        """redis-py's, which give some replies a friendlier shape; of entries it would make dictionaries."""
        self._asked: list[Asked] = []
        self._trip: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Asked, and not sent yet."""
        return len(self._asked)

    def ask(self, command: Command) -> asyncio.Future[Any]:
        """Raises Invalid for text that is not UTF-8: it must not spoil the others' trip."""
        if self._closed:
            raise Unavailable("The store is closed.")
        try:
            for word in command.args if isinstance(command, Share) else command:
                if isinstance(word, str):
                    word.encode()
        except UnicodeEncodeError as error:
            raise Invalid(f"Not valid text: {error}") from error
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked.append((command, answer))
        if self._trip is None:
            self._trip = asyncio.create_task(self._travel())
        return answer

    async def _travel(self) -> None:
        try:
            while self._asked:
                batch, self._asked = self._asked[: self.BATCH_MAX], self._asked[self.BATCH_MAX :]
                if self._line.ended:
                    self._line.close()
                await self._take(calls_of(batch))
        finally:
            self._trip = None

    async def _take(self, calls: Sequence[Sequence[Asked]]) -> None:
        """Whoever has an answer goes on while the store works on the next one's."""
        waiting = iter(calls)
        try:
            await self._line.trip(
                [command_of(call) for call in calls], lambda answer: self._tell(next(waiting), answer)
            )
        except asyncio.CancelledError:
            for call in waiting:
                for _, future in call:
                    future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 (whatever it is, everybody in the batch has to hear of it)
            for call in waiting:
                self._tell(call, error)

    def _tell(self, call: Sequence[Asked], answer: Any) -> None:
        shared = isinstance(call[0][0], Share) and not isinstance(answer, Exception)
        if shared and len(answer) != len(call):
            shared, answer = False, RuntimeError(f"A script answered {len(answer)} of {len(call)}.")
        for (command, future), one in zip(call, answer if shared else [answer] * len(call), strict=True):
            if future.done():  # whoever asked has left
                continue
            try:
                if isinstance(one, Exception):
                    raise in_our_words(one)
                shape = None if isinstance(command, Share) else self._shapes.get(command[0])
                future.set_result(shape(one) if shape else one)
            except Exception as error:  # noqa: BLE001 (the others wait for their answers)
                future.set_exception(error)

    async def aclose(self) -> None:
        self._closed = True
        if self._trip:
            self._trip.cancel()
            with suppress(asyncio.CancelledError):
                await self._trip
        self._line.close()
        for _, future in self._asked:
            future.cancel()


def calls_of(batch: Sequence[tuple[Command, T]]) -> list[list[tuple[Command, T]]]:
    """What shares a call stands together; the order stays."""
    calls: list[list[tuple[Command, T]]] = []
    weight, head = 0.0, None
    for asked in batch:
        command = asked[0]
        if not isinstance(command, Share):
            head = None
            calls.append([asked])
        elif head == (command.name, command.head) and weight + command.weight <= 1 and len(calls[-1]) < SHARES_MAX:
            weight += command.weight
            calls[-1].append(asked)
        else:
            weight, head = command.weight, (command.name, command.head)
            calls.append([asked])
    return calls


def command_of(call: Sequence[tuple[Command, T]]) -> tuple[Arg, ...]:
    first = call[0][0]
    if not isinstance(first, Share):
        return first
    shares = [command for command, _ in call if isinstance(command, Share)]
    args = [*first.head, *(word for share in shares for word in share.args)]
    return evaluation(first.name, [share.key for share in shares], args)


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
