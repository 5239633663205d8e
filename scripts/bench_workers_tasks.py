"""Taskcast's side of `scripts/bench workers`: its handlers, and the processes that speak to the store directly.

As a module it is what `taskcast worker` loads. As a program, `bench_workers_tasks.py submits|bare-submits|events|runs|writes
URL`, it is a process that measures itself and says its figures on stdout, as the handler `emit` does.
"""

import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import unquote, urlsplit

import hiredis
import redis
import uvloop

from app import events, keys
from app.api.shannon import spelling
from app.connect import SHARES_MAX, Door, Share, calls_of, command_of
from app.events import Completed, Submission, Thinking
from app.identity import DEVELOPMENT, DEVELOPMENT_ORG, DEVELOPMENT_USER, Identity
from app.line import Arg
from app.log import Log
from app.settings import Settings
from app.store import Store, open_store
from app.task import Task
from scripts.bench_rig import Figures, cpu_ns, measuring
from scripts.bench_workers_peers import SLOTS, TASKS, begun, say, timed_begun
from workers import Context, task

EVENTS_PER_TASK = 100
SUBMITS = 10_000
EVENT_BYTES = 200
ACTOR = "worker:12345678"
"""As long as a worker's own name."""
BODY = b'{"query":"What is the answer?"}'
READ_BYTES = 256 * 1024


def submission(what: str) -> Submission:
    """For a queue; or, as `emit:PID`, with the server's process as well."""
    queue, _, valkey = what.partition(":")
    return Submission(
        id=token_hex(16),
        org=DEVELOPMENT_ORG,
        owner=DEVELOPMENT_USER,
        queue=queue,
        query="?",
        context={"valkey": int(valkey)} if valkey else {},
        submission=token_hex(16),
    )


# The handlers


@task("noop")
async def noop(_: Task, __: Context) -> None:
    begun()


@task("timed")
async def timed(_: Task, __: Context) -> None:
    timed_begun()


def thought(actor: str) -> Thinking:
    """As a worker says it, with EVENT_BYTES."""
    empty = Thinking(actor=actor, message="-")
    return Thinking(actor=actor, message="-" * (EVENT_BYTES - len(events.encode(empty)) + 1))


_speaking: list[Context] = []
_all_said = asyncio.Event()


@task("emit")
async def emit(_: Task, context: Context, *, valkey: int) -> None:
    """The last of SLOTS tasks to begin lets all of them speak, each one event after the other."""
    message = thought(ACTOR).message

    async def speak(one: Context) -> None:
        for _ in range(EVENTS_PER_TASK):
            await one.thinking(message)

    _speaking.append(context)
    if len(_speaking) == SLOTS:
        with measuring(*clocks(valkey)) as spent:
            await asyncio.gather(*map(speak, _speaking))
        tell(spent, SLOTS * EVENTS_PER_TASK)
        _all_said.set()
    await _all_said.wait()


# Figures of this process


def clocks(valkey: int) -> Sequence[Callable[[], int]]:
    return time.process_time_ns, partial(cpu_ns, valkey), time.monotonic_ns


def tell(spent: Sequence[int], count: int) -> None:
    mine_ns, valkey_ns, wall_ns = spent
    figures: Figures = {
        "per_second": count / wall_ns * 1e9,
        "worker_us": mine_ns / count / 1e3,
        "valkey_us": valkey_ns / count / 1e3,
    }
    say(json.dumps(figures))


# Bare: what is asked of the store, made before the clock starts and shared as it shares it, SLOTS at a time over a plain
# socket


def bare(url: str, valkey: int, shares: Sequence[Share]) -> None:
    calls = [
        call for i in range(0, len(shares), SLOTS) for call in calls_of([(share, 1) for share in shares[i : i + SLOTS]])
    ]
    replies, spent = sent(url, valkey, [command_of(call) for call in calls], at_once=-(-SLOTS // SHARES_MAX))
    for call, reply in zip(calls, replies, strict=True):
        assert len(reply) == len(call), reply
        for one in reply:
            code, *_ = one[0] if isinstance(one[0], list) else one  # of an append: one reply per event
            assert code == b"ok", one
    tell(spent, len(shares))


def sent(
    url: str, valkey: int, commands: Sequence[tuple[Arg, ...]], *, at_once: int
) -> tuple[list[Any], Sequence[int]]:
    """The replies, and what was spent."""
    packed = [hiredis.pack_command(command) for command in commands]  # type: ignore[arg-type] # as in line.py
    batches = [packed[i : i + at_once] for i in range(0, len(packed), at_once)]
    joined = [b"".join(batch) for batch in batches]
    reader, replies = hiredis.Reader(), []
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(unquote(urlsplit(url).path))
        with measuring(*clocks(valkey)) as spent:
            for data, batch in zip(joined, batches, strict=True):
                sock.sendall(data)
                for _ in batch:
                    while (reply := reader.gets()) is False:
                        reader.feed(sock.recv(READ_BYTES))
                    replies.append(reply)
    return replies, spent


async def queued(store: Store) -> None:
    await asyncio.gather(*(store.submit(submission("noop")) for _ in range(TASKS)))


async def run(store: Store) -> None:
    """TASKS from claim to end."""
    for _ in range(TASKS // SLOTS):
        claimed = await store.claim(["noop"], "bench", SLOTS)
        assert len(claimed) == SLOTS
        end = Completed(actor=ACTOR, result="null", result_type="json")
        await asyncio.gather(*(store.append(one.org, one.task, end, fence=one.fence, n=1) for one in claimed))


def bare_writes(url: str, valkey: int, data: Path, asking: redis.Redis) -> None:
    """What `run` wrote, from the server's own log: the commands alone, without the scripts that read, check and refuse."""
    (log,) = data.glob("**/*.incr.aof")
    reader, written = hiredis.Reader(), []
    reader.feed(log.read_bytes())
    while (words := reader.gets()) is not False:
        written.append((*words,))
    first = next(i for i, words in enumerate(written) if any(b',"started",' in word for word in words))
    while written[first] != (b"MULTI",):
        first -= 1
    asking.flushall()
    sent(url, valkey, written[:first], at_once=SLOTS)
    replies, spent = sent(url, valkey, written[first:], at_once=SLOTS)
    assert not any(isinstance(reply, Exception) for reply in replies)
    assert asking.zcard(keys.key(keys.tags(1)[0], "ended")) == TASKS
    tell(spent, TASKS)


class Kept(Exception):
    """Instead of an answer."""


class Keeps(Door):
    """Keeps what it is asked to share instead of sending it."""

    def __init__(self) -> None:
        self.shares: list[Share] = []

    async def share(
        self, name: str, key: str, head: tuple[Arg, ...], args: Sequence[Arg], *, weight: float, **_: bool
    ) -> Any:
        self.shares.append(Share(name, key, head, args, weight))
        raise Kept


async def event_shares(store: Store) -> list[Share]:
    """What a worker sends for the events of SLOTS tasks, which run."""
    for _ in range(SLOTS):
        await store.submit(submission("emit"))
    claimed = await store.claim(["emit"], "bench", SLOTS)
    door, event = Keeps(), thought(ACTOR)
    log = Log(door, store.partitions, store.settings)
    for n in range(1, EVENTS_PER_TASK + 1):
        for one in claimed:
            with suppress(Kept):
                await log.append(one.org, one.task, event, fence=one.fence, n=n)
    return door.shares


def asked() -> Submission:
    """As the API makes it of a request."""
    return spelling.submission(BODY, Identity(org=DEVELOPMENT_ORG, user=DEVELOPMENT_USER, key=DEVELOPMENT))


async def submit_shares(store: Store) -> list[Share]:
    door = Keeps()
    log = Log(door, store.partitions, store.settings)
    for _ in range(SUBMITS):
        with suppress(Kept):
            await log.submit(asked())
    return door.shares


async def submits(store: Store, valkey: int) -> None:
    left = iter(range(SUBMITS))

    async def some() -> None:
        for _ in left:
            await store.submit(asked())

    with measuring(*clocks(valkey)) as spent:
        await asyncio.gather(*(some() for _ in range(SLOTS)))
    tell(spent, SUBMITS)


async def main(what: str, url: str) -> None:
    with redis.Redis.from_url(url, protocol=2) as asking:
        valkey = asking.info("server")["process_id"]
        data = Path(str(asking.config_get("dir")["dir"]))
        async with open_store(Settings(redis_url=url)) as store:
            match what:
                case "submits":
                    await submits(store, valkey)
                case "bare-submits":
                    bare(url, valkey, await submit_shares(store))
                case "events":
                    bare(url, valkey, await event_shares(store))
                case "runs":
                    await queued(store)
                    with measuring(*clocks(valkey)) as spent:
                        await run(store)
                    tell(spent, TASKS)
                case "writes":
                    await queued(store)
                    await run(store)
                    bare_writes(url, valkey, data, asking)
                case _:
                    sys.exit(f"No such figure: {what}")


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(*sys.argv[1:]))
