"""Real worker processes, killed, frozen or told to stop while they wait for a human or run a plain function."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from app import events
from app.settings import Settings
from app.store import open_store
from app.task import Status
from tests.system.conftest import Worker
from tests.waiting import wait_until
from tests.workers.conftest import Bench

QUICK = {"TASKCAST_LEASE_SECONDS": "1", "TASKCAST_GRACE_SECONDS": "1"}
MODULE = """
import asyncio
import os
import threading
import time

from workers import Blocking, Context, task


@task("asks")
async def asks(task, ctx: Context) -> str:
    return f"{(await ctx.approve('May I?')).feedback} {ctx.attempt}"


@task("asks in a thread")
def asks_in_a_thread(task, ctx: Blocking) -> str:
    return f"{ctx.approve('May I?').feedback} {ctx.attempt}"


@task("deaf")
def deaf(task, ctx: Blocking) -> str:
    ctx.progress(0.1)
    while ctx.attempt == 1:
        time.sleep(0.01)
    return f"attempt {ctx.attempt}"


@task("apart", process=True)
def apart(task, ctx: Blocking) -> str:
    ctx.emit("PID", str(os.getpid()))
    ctx.progress(0.1)
    while ctx.attempt == 1:
        time.sleep(0.01)
    return f"attempt {ctx.attempt}"


@task("talks")
async def talks(task, ctx: Context) -> str:
    while ctx.attempt == 1:
        await ctx.progress(0.1)
        await asyncio.sleep(0.01)
    return f"attempt {ctx.attempt}"


@task("quick")
async def quick(task, ctx: Context) -> str:
    return f"attempt {ctx.attempt}"


@task("blocks")
async def blocks(task, ctx: Context) -> str:
    await ctx.progress(0.1)
    if ctx.attempt == 1:
        threading.Event().wait(4)  # the loop, the renewals and all
        await ctx.progress(0.2)
    return f"attempt {ctx.attempt}"
"""


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    (tmp_path / "ends_module.py").write_text(MODULE)
    async with open_store(Settings(data=tmp_path / "data", lease_seconds=1, grace_seconds=1)) as store:
        yield Bench(store)


@contextmanager
def worker(folder: Path, name: str) -> Iterator[Worker]:
    made = Worker(name, folder, "ends_module", PYTHONPATH=str(folder), **QUICK)
    made.start()
    try:
        yield made
    finally:
        if made.running and made.running.returncode is None:
            made.kill()


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def end(one: Worker, how: str) -> None:
    assert one.running
    if how == "killed":
        await asyncio.to_thread(one.kill)
    elif how == "frozen":
        one.running.send_signal(signal.SIGSTOP)
    else:
        began = time.monotonic()
        await asyncio.to_thread(one.stop)  # its exit code is 0
        assert time.monotonic() - began < 6  # the grace time, and what a busy machine adds


async def thaw(one: Worker) -> None:
    """It goes on, and ends in good order."""
    assert one.running
    one.running.send_signal(signal.SIGCONT)
    await asyncio.to_thread(one.stop)


@pytest.mark.parametrize("how", ["killed", "frozen", "told to stop"])
@pytest.mark.parametrize("queue", ["asks", "asks in a thread"])
async def test_whoever_waits_for_a_human_may_end_and_the_answer_is_asked_for_once(
    tmp_path: Path, bench: Bench, queue: str, how: str
) -> None:
    id_ = await bench.submit(queue=queue, max_attempts=1)
    with worker(tmp_path, "first") as first:
        await bench.until_said(id_, events.ApprovalRequested)
        await end(first, how)
        with worker(tmp_path, "second") as second:
            held = await bench.until(id_, Status.HELD)
            assert held.refunds == 1
            decided = events.ApprovalDecided(
                approval=held.waits.removeprefix("approval:"), approved=True, feedback="yes"
            )
            await bench.say(id_, decided)
            done = await bench.until_ended(id_)
            if how == "frozen":
                await thaw(first)
            await asyncio.to_thread(second.stop)
    assert (done.status, done.result) == (Status.COMPLETED, "yes 2")
    said = await bench.said(id_)
    assert (said.count("approval_requested"), said[-1]) == (1, "completed")
    await bench.prove()


@pytest.mark.parametrize("how", ["killed", "frozen", "told to stop"])
@pytest.mark.parametrize("queue", ["deaf", "talks", "apart"])
async def test_whatever_a_worker_runs_when_it_ends_another_one_runs_again(
    tmp_path: Path, bench: Bench, queue: str, how: str
) -> None:
    id_ = await bench.submit(queue=queue)
    with worker(tmp_path, "first") as first:
        await bench.until_said(id_, events.Progressed)
        await end(first, how)
        with worker(tmp_path, "second") as second:
            done = await bench.until_ended(id_)
            if how == "frozen":
                await thaw(first)
            await asyncio.to_thread(second.stop)
    assert (done.status, done.result, done.refunds) == (Status.COMPLETED, "attempt 2", int(how == "told to stop"))
    entries = await bench.entries(id_)
    assert [one.attempt for one in entries] == sorted(one.attempt for one in entries), "the first attempt spoke last"
    assert events.tag(entries[-1].event) == "completed"
    for one in entries:
        if isinstance(one.event, events.Noted) and one.event.name == "PID":
            pid = int(one.event.message)
            await wait_until(partial(ended, pid), f"process {pid} has ended")
    await bench.prove()


async def test_a_worker_that_is_frozen_while_it_waits_holds_two_tasks_at_most(tmp_path: Path, bench: Bench) -> None:
    async def waits() -> bool:
        return int((await bench.store.door.read("INFO", "clients"))["blocked_clients"]) == 2  # for a task; on the log

    with worker(tmp_path, "first") as first:
        await wait_until(waits, "it waits")
        await end(first, "frozen")
        ids = [await bench.submit(queue="quick") for _ in range(6)]
        with worker(tmp_path, "second") as second:
            results = [(await bench.until_ended(id_)).result for id_ in ids]
            await thaw(first)
            await asyncio.to_thread(second.stop)
    assert {*results} <= {"attempt 1", "attempt 2"}
    assert results.count("attempt 2") <= 2
    await bench.prove()


async def test_a_handler_that_blocks_its_loop_beyond_its_lease_writes_nothing_over_the_next_attempt(
    tmp_path: Path, bench: Bench
) -> None:
    with worker(tmp_path, "first") as first, worker(tmp_path, "second") as second:

        def said(what: str) -> list[bool]:
            return [what in one.log.read_text() for one in (first, second)]

        await wait_until(lambda: all(said("worker.started")), "both run")
        id_ = await bench.submit(queue="blocks")
        done = await bench.until_ended(id_)
        await wait_until(
            lambda: any(said("task.lease_lost") + said("task.cancelled")),
            "the one that blocked knows that it lost the task",
        )
        await asyncio.to_thread(first.stop)
        await asyncio.to_thread(second.stop)
    assert (done.result, done.attempt) == ("attempt 2", 2)
    fractions = [one.event.fraction for one in await bench.entries(id_) if isinstance(one.event, events.Progressed)]
    assert fractions == [0.1, 0.1]
