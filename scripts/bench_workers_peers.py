"""The task queues that Taskcast's workers are measured against: `bench_workers_peers.py NAME work|submit URL`.

Each runs in an environment of its own, written as its documentation says, with uvloop and SLOTS tasks at a time, and
logs what is WARNING or worse: the default of Python's logging. `work` is one worker process, which says on stdout when
the last no-op begins, and when each timed task began. `submit` reads lines `TASK COUNT` from stdin and answers each
with the time at which it began to submit.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import timedelta
from typing import Any

import uvloop

SLOTS = 100
WARM_UP = 200
TASKS = 2000
CONNECTIONS_MAX = 1000
"""redis-py's own limit of 100 leaves none for what a worker of 100 slots does besides."""
LOOK_SECONDS = 0.005
"""How often those look for work that wait a fixed time: with arq's own 0.5 s and docket's 0.25 s they would be slower."""
SUBMITS_AT_ONCE = 50


# The tasks; Taskcast's handlers call the same.

_runs = 0


def begun() -> None:
    global _runs  # noqa: PLW0603
    _runs += 1
    if _runs == WARM_UP or _runs == WARM_UP + TASKS:
        say("last")


def timed_begun() -> None:
    now = time.monotonic_ns()
    say(f"{now} {_runs}")


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


async def noop(_: Any = None) -> None:
    begun()


async def timed(_: Any = None) -> None:
    timed_begun()


# The peers. Each gives how to work for ever, and how to submit one task by its name.

Work = Callable[[], Awaitable[object]]
Submit = Callable[[str], Awaitable[object]]
Peer = Callable[..., AbstractAsyncContextManager[tuple[Work, Submit]]]
"""Of a URL, and whether it `works` here or only submits."""

FUNCTIONS = {"noop": noop, "timed": timed}


@asynccontextmanager
async def saq(url: str, **_: bool) -> AsyncIterator[tuple[Work, Submit]]:
    from redis import asyncio as redis  # noqa: PLC0415
    from saq import Worker  # noqa: PLC0415
    from saq.queue.redis import RedisQueue  # noqa: PLC0415

    queue = RedisQueue(redis.from_url(url, max_connections=CONNECTIONS_MAX), name="bench", max_concurrent_ops=SLOTS)
    await queue.connect()
    worker = Worker(queue, functions=[*FUNCTIONS.items()], concurrency=SLOTS)
    yield worker.start, queue.enqueue
    await queue.disconnect()


@asynccontextmanager
async def streaq(url: str, *, works: bool) -> AsyncIterator[tuple[Work, Submit]]:
    from streaq import Worker  # noqa: PLC0415

    worker: Any = Worker(redis_url=url, concurrency=SLOTS, redis_kwargs={"max_connections": CONNECTIONS_MAX})

    @worker.task(name="noop")
    async def noop() -> None:
        begun()

    @worker.task(name="timed")
    async def timed() -> None:
        timed_begun()

    tasks = {"noop": noop, "timed": timed}

    async def submit(name: str) -> None:
        await tasks[name].enqueue()

    async with nullcontext() if works else worker:
        yield worker.run_async, submit


@asynccontextmanager
async def pydocket(url: str, **_: bool) -> AsyncIterator[tuple[Work, Submit]]:
    from docket import Docket, Worker  # noqa: PLC0415

    async with Docket(name="bench", url=f"{url}?max_connections={CONNECTIONS_MAX}") as docket:
        for function in FUNCTIONS.values():
            docket.register(function)

        async def work() -> None:
            async with Worker(
                docket, concurrency=SLOTS, minimum_check_interval=timedelta(seconds=LOOK_SECONDS)
            ) as worker:
                await worker.run_forever()

        async def submit(name: str) -> None:
            await docket.add(FUNCTIONS[name])()

        yield work, submit


@asynccontextmanager
async def taskiq_redis(url: str, *, works: bool) -> AsyncIterator[tuple[Work, Submit]]:
    from taskiq.api import run_receiver_task  # noqa: PLC0415
    from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker  # noqa: PLC0415

    results: Any = RedisAsyncResultBackend(url, prefix_str="result", max_connection_pool_size=CONNECTIONS_MAX)
    broker = RedisStreamBroker(url, max_connection_pool_size=CONNECTIONS_MAX).with_result_backend(results)
    tasks = {name: broker.register_task(function, name) for name, function in FUNCTIONS.items()}
    broker.is_worker_process = works
    await broker.startup()
    yield lambda: run_receiver_task(broker, max_async_tasks=SLOTS), lambda name: tasks[name].kiq()
    await broker.shutdown()


@asynccontextmanager
async def arq(url: str, **_: bool) -> AsyncIterator[tuple[Work, Submit]]:
    from arq import Worker, create_pool  # noqa: PLC0415
    from arq.connections import RedisSettings  # noqa: PLC0415

    settings = RedisSettings.from_dsn(url)
    settings.max_connections = CONNECTIONS_MAX
    pool = await create_pool(settings)

    async def work() -> None:
        worker = Worker([*FUNCTIONS.values()], redis_settings=settings, max_jobs=SLOTS, poll_delay=LOOK_SECONDS)
        await worker.async_run()

    yield work, pool.enqueue_job
    await pool.aclose()


@asynccontextmanager
async def taskcast(url: str, **_: bool) -> AsyncIterator[tuple[Work, Submit]]:
    """Submits only: the worker is the command itself."""
    # Here, so that the peers need nothing of it.
    from app.settings import Settings  # noqa: PLC0415
    from app.store import open_store  # noqa: PLC0415
    from scripts.bench_workers_tasks import submission  # noqa: PLC0415

    async with open_store(Settings(redis_url=url)) as store:

        async def submit(name: str) -> None:
            await store.submit(submission(name))

        yield asyncio.Event().wait, submit


PEERS: dict[str, Peer] = {
    "taskcast": taskcast,
    "saq": saq,
    "streaq": streaq,
    "pydocket": pydocket,
    "taskiq-redis": taskiq_redis,
    "arq": arq,
}


async def obey(submit: Submit) -> None:
    while line := await asyncio.to_thread(sys.stdin.readline):
        name, count = line.split()
        left = iter(range(int(count)))

        async def some(left: Any = left, name: str = name) -> None:
            for _ in left:
                await submit(name)

        began = time.monotonic_ns()
        await asyncio.gather(*(some() for _ in range(min(int(count), SUBMITS_AT_ONCE))))
        say(str(began))


async def main(name: str, verb: str, url: str) -> None:
    async with PEERS[name](url, works=verb == "work") as (work, submit):
        await (work() if verb == "work" else obey(submit))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(*sys.argv[1:]))
