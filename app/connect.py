"""The only door to Redis: what is asked, to whom it goes together, and who may ask again.

It is one Redis, which has all keys: Sentinel and Redis Cluster are not spoken (`log.open_partitions` refuses them).

Commands asked for while a round trip is under way go out together in the next one, in the order in which they
were asked. Nothing is repeated blindly: callers that may repeat themselves, because the script recognises a repeat, say
so (`repeat=True`).
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from importlib.resources import files
from typing import Any, TypeVar

from msgspec import Struct
from redis import exceptions
from redis.asyncio import Redis

from app.errors import Full, Invalid, Unavailable
from app.line import Arg, Line, client, in_our_words

REPEAT_SECONDS = 8.0
"""How long a repeatable call goes on asking: an embedded server that died is back within about a second."""
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
