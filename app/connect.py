"""The only door to Redis: URL → client, timeouts, pipelining, errors in our own words.

Commands asked for while a round trip is under way go out together in the next one, in the order in which they
were asked (measured: about three times redis-py's pool). Nothing is retried blindly: redis-py's default retry
writes an `XADD` twice when a reply is lost. Callers that may repeat themselves, because the script recognises a
repeat, say so (`repeat=True`).
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from importlib.resources import files
from typing import Any

from msgspec import Struct
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from app.errors import Full, Invalid, Misconfigured, TaskcastError, Unavailable

Arg = str | bytes | int | float

TIMEOUT_SECONDS = 10.0
"""For an answer. A script takes milliseconds; a server that loads its log answers at once that it does."""
REPEAT_SECONDS = 8.0
"""How long a repeatable call goes on asking: an embedded server that died is back within about a second."""
BLOCK_SECONDS = 5.0
"""Of a blocking read; must stay below TIMEOUT_SECONDS."""


READ_ONLY, ALLOW_OOM = " flags=no-writes", " flags=allow-oom"
FLAGS = {
    **dict.fromkeys(("read", "replay", "list", "snapshot", "due"), READ_ONLY),
    # What frees memory, or as a lease's renewal takes none, goes on in a full store.
    **dict.fromkeys(("delete", "forget", "renew"), ALLOW_OOM),
}
ALONE = frozenset({"deploy", "read", "replay", "snapshot"})
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

    async def call(self, *command: Arg, repeat: bool = False) -> Any:
        return await self._ask(self._fast, command, repeat=repeat)

    async def read(self, *command: Arg) -> Any:
        """A command that only reads: it may take longer, and be repeated."""
        return await self._ask(self._slow, command, repeat=True)

    async def run(
        self, name: str, keys: Sequence[str], args: Sequence[Arg], *, repeat: bool = False, slow: bool = False
    ) -> Any:
        """Runs `app/lua/<name>.lua`. Raises Unavailable, Full."""
        lua = script(name)
        lane = self._slow if slow else self._fast
        try:
            return await self._ask(lane, ("EVALSHA", lua.sha, len(keys), *keys, *args), repeat=repeat)
        except exceptions.NoScriptError:  # a restarted server: it has not run anything
            await self.load()
            return await self._ask(lane, ("EVALSHA", lua.sha, len(keys), *keys, *args), repeat=repeat)

    async def load(self) -> None:
        """Gives the server all scripts."""
        names = sorted(file.name.removesuffix(".lua") for file in (files("app") / "lua").iterdir())
        loads = [self._ask(self._fast, ("SCRIPT", "LOAD", script(n).text), repeat=True) for n in names if n != "commit"]
        await asyncio.gather(*loads)

    async def _ask(self, lane: "Lane", command: tuple[Arg, ...], *, repeat: bool) -> Any:
        until = time.monotonic() + REPEAT_SECONDS
        pause = 0.02
        while True:
            try:
                return await lane.ask(command)
            except Unavailable as error:
                if not repeat or isinstance(error, Full) or time.monotonic() > until:
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.5)

    @asynccontextmanager
    async def blocking(self) -> AsyncIterator[Redis]:
        """A connection of its own, for reads that wait."""
        alone = client(self.url, connections=1)
        try:
            yield alone
        finally:
            with suppress(exceptions.RedisError, OSError):
                await alone.aclose()

    async def aclose(self) -> None:
        for lane in (self._fast, self._slow):
            await lane.aclose()
        with suppress(exceptions.RedisError, OSError):
            await self._client.aclose()


class Lane:
    """One round trip at a time; what is asked meanwhile goes out together with the next."""

    BATCH_MAX = 500

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._asked: list[tuple[tuple[Arg, ...], asyncio.Future[Any]]] = []
        self._trip: asyncio.Task[None] | None = None
        self._closed = False

    async def ask(self, command: tuple[Arg, ...]) -> Any:
        """Raises Invalid for text that is not UTF-8: it must not spoil the others' trip."""
        if self._closed:
            raise Unavailable("The store is closed.")
        try:
            for word in command:
                if isinstance(word, str):
                    word.encode()
        except UnicodeEncodeError as error:
            raise Invalid(f"Not valid text: {error}") from error
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked.append((command, answer))
        if self._trip is None:
            self._trip = asyncio.create_task(self._travel())
        return await answer

    async def _travel(self) -> None:
        try:
            while self._asked:
                batch, self._asked = self._asked[: self.BATCH_MAX], self._asked[self.BATCH_MAX :]
                pipeline = self._redis.pipeline(transaction=False)
                for command, _ in batch:
                    pipeline.execute_command(*command)
                try:
                    answers = await pipeline.execute(raise_on_error=False)
                except asyncio.CancelledError:
                    for _, future in batch:
                        future.cancel()
                    raise
                except Exception as error:  # noqa: BLE001 (whatever it is, everybody in the batch has to hear of it)
                    answers = [error] * len(batch)
                for (_, future), answer in zip(batch, answers, strict=True):
                    if future.done():  # whoever asked has left
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(in_our_words(answer))
                    else:
                        future.set_result(answer)
        finally:
            self._trip = None

    async def aclose(self) -> None:
        self._closed = True
        if self._trip:
            self._trip.cancel()
            with suppress(asyncio.CancelledError):
                await self._trip
        for _, future in self._asked:
            future.cancel()


def client(url: str, *, connections: int = 8) -> Redis:
    """redis-py without its retries, answering bytes."""
    try:
        made: Redis = Redis.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            max_connections=connections,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            health_check_interval=0,
        )
    except ValueError as error:
        raise Misconfigured(f"Not the URL of a store: {url} ({error})") from error
    return made
