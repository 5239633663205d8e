"""Functions in processes of their own: what they say, how they end, and that nothing they do harms the worker."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app import events
from app.store import Store, open_store
from app.task import Status, Task
from tests.waiting import wait_until
from tests.workers.conftest import Bench, Logs
from workers import Blocking, Context, run_task, task
from workers.handlers import Handler, load

MODULE = """
import asyncio
import os
import signal
import sys
from pathlib import Path

from workers import Blocking, Failed, ProcessDied, task


class Odd(Exception):
    def __init__(self, one, two):
        super().__init__("odd")


@task("talks", process=True)
def talks(task, ctx: Blocking, *, city: str = "") -> dict:
    ctx.delta("a")
    with ctx.tool("search", {"q": city}) as call:
        call.result = [1]
    try:
        with ctx.tool("divide"):
            1 / 0
    except ZeroDivisionError:
        pass
    try:
        ctx.emit("lower case")
    except Exception as error:
        refused = type(error).__name__
    ctx.used(input_tokens=3)
    ctx.checkpoint("here")
    allowed = ctx.approve("May I?").approved
    child = ctx.wait(ctx.submit("q", queue="other")).result
    return {"pid": os.getpid(), "refused": refused, "child": child, "allowed": allowed, "attempt": ctx.attempt}


@task("exits", "exits once", process=True, retry=ProcessDied)
def exits(task, ctx: Blocking) -> str:
    if task.queue == "exits" or ctx.attempt == 1:
        os._exit(3)
    return f"attempt {ctx.attempt}"


@task("crashes", process=True)
def crashes(task, ctx: Blocking) -> str:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)


@task("raises", process=True, retry=KeyError)
def raises(task, ctx: Blocking, *, what: str) -> str:
    match what:
        case "failed":
            raise Failed("No such city.")
        case "odd":
            raise Odd(1, 2)
        case "exit":
            sys.exit(3)
        case "result":
            return {"a": lambda: None}
    if ctx.attempt == 1:
        raise KeyError("again")
    return "retried"


@task("hogs", process=True)
def hogs(task, ctx: Blocking) -> str:
    ctx.emit("PID", payload={"pid": os.getpid()})
    return str(sum(range(10**13)))  # never gives the interpreter away, nor hears of a signal


@task("tidy", "late", process=True, timeout=None)
def tidy(task, ctx: Blocking, *, file: Path) -> str:
    ctx.emit("PID", payload={"pid": os.getpid()})
    try:
        signal.pause()
    finally:
        file.write_text("tidied up")
"""


@pytest.fixture
def handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Handler]:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "process_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    return {one.function.__name__: one for one in load(["process_module"])}


@asynccontextmanager
async def opened_beside(bench: Bench, **more: Any) -> AsyncIterator[Store]:
    """The bench's data with other settings."""
    async with open_store(bench.store.settings.model_copy(update=more)) as store:
        yield store


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def pid_of(bench: Bench, id_: str) -> int:
    await bench.until_said(id_, events.Noted)
    (noted,) = [one.event for one in await bench.entries(id_) if isinstance(one.event, events.Noted)]
    return int(noted.payload["pid"])


@task("other")
async def quick(task: Task, ctx: Context) -> str:
    return "quick"


async def test_a_function_says_from_its_process_all_that_one_may_say(
    bench: Bench, handlers: dict[str, Handler]
) -> None:
    id_ = await bench.submit(queue="talks", context={"city": "Kyōto"})
    async with bench.work(handlers["talks"], quick):
        await bench.until_said(id_, events.ApprovalRequested)
        waits = (await bench.task(id_)).waits.removeprefix("approval:")
        await bench.say(id_, events.ApprovalDecided(approval=waits, approved=True))
        done = await bench.until_ended(id_)
    assert done.error == ""
    result = msgspec.json.decode(done.result)
    assert result.pop("pid") != os.getpid()
    assert result == {"refused": "Invalid", "child": "quick", "allowed": True, "attempt": 1}
    assert done.input_tokens == 3
    tools = [one.event for one in await bench.entries(id_) if isinstance(one.event, events.ToolReturned)]
    assert [(one.tool, one.success, one.output) for one in tools] == [
        ("search", True, [1]),
        ("divide", False, "ZeroDivisionError: division by zero"),
    ]


async def test_a_process_that_dies_is_an_error_of_its_attempt_and_retried_when_the_worker_names_it(
    bench: Bench, handlers: dict[str, Handler]
) -> None:
    ids = [await bench.submit(queue=queue, max_attempts=2) for queue in ("exits", "exits once", "crashes")]
    async with bench.work(handlers["exits"], handlers["crashes"]):
        await bench.until_ended(*ids)
    done = [await bench.task(id_) for id_ in ids]
    assert [(one.status, one.error or one.result, one.attempt) for one in done] == [
        (Status.ERRORED, "ProcessDied: The handler's process died (exit code 3).", 2),
        (Status.COMPLETED, "attempt 2", 2),
        (Status.ERRORED, "ProcessDied: The handler's process died (signal 11).", 1),
    ]


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("failed", Status.FAILED, "No such city."),
        ("odd", Status.ERRORED, "RuntimeError: Odd: odd"),
        ("exit", Status.ERRORED, "RuntimeError: the handler called sys.exit(3)"),
        ("result", Status.ERRORED, "TypeError: the result cannot leave its process: "),
        ("again", Status.COMPLETED, "retried"),
    ],
)
async def test_what_a_function_raises_crosses_the_pipe(
    handlers: dict[str, Handler], what: str, status: Status, said: str
) -> None:
    run = await run_task(handlers["raises"], what=what)
    assert run.task.status is status
    assert (run.task.error or str(run.result)).startswith(said)


async def test_a_function_that_holds_the_interpreter_harms_no_lease_and_a_cancel_ends_it(
    bench: Bench, handlers: dict[str, Handler], logs: Logs
) -> None:
    renewed: list[int] = []
    id_, other = await bench.submit(queue="hogs"), await bench.submit(queue="other")
    async with opened_beside(bench, lease_seconds=0.6, grace_seconds=1) as store:
        real = store.renew

        async def renew(held: list[Any]) -> Any:
            answer = await real(held)
            renewed.append(len([one for one in answer.values() if one]))
            return answer

        store.renew = renew  # type: ignore[assignment]
        async with bench.work(handlers["hogs"], quick, store=store):
            pid = await pid_of(bench, id_)
            so_far = len(renewed)
            await wait_until(lambda: len(renewed) > so_far + 6, "twice its lease has passed")
            assert await bench.status(other) is Status.COMPLETED
            assert (await bench.task(id_)).attempt == 1
            await bench.say(id_, events.Cancelled())
            await wait_until(lambda: not alive(pid), "it is killed")
            await wait_until(lambda: any(one["event"] == "task.cancelled" for one in logs), "its slot is free")
    assert not any(one["event"] == "task.not_interruptible" for one in logs)


@pytest.mark.parametrize("end", ["cancelled", "requeued"])
async def test_an_interrupted_function_may_clean_up(
    bench: Bench, handlers: dict[str, Handler], tmp_path: Path, end: str, logs: Logs
) -> None:
    file = tmp_path / "tidied"
    id_ = await bench.submit(queue="tidy", context={"file": str(file)})
    async with (
        opened_beside(bench, grace_seconds=2) as store,
        bench.work(handlers["tidy"], store=store) as working,
    ):
        pid = await pid_of(bench, id_)
        if end == "cancelled":
            await bench.say(id_, events.Cancelled())
            await wait_until(lambda: any(one["event"] == "task.cancelled" for one in logs), "it has ended")
        else:
            await asyncio.wait_for(working.stop(), 10)
    assert (file.read_text(), alive(pid)) == ("tidied up", False)
    assert (await bench.said(id_))[-1] == end


async def test_a_process_is_not_misled_by_files_in_the_current_folder(
    handlers: dict[str, Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "socket.py").write_text("raise SystemError('the wrong socket')")
    monkeypatch.chdir(tmp_path)
    assert (await run_task(handlers["raises"], what="again")).result == "retried"


def test_what_no_process_could_find_or_run_is_refused_at_once() -> None:
    def inner(task: Task, ctx: Blocking) -> None: ...

    async def coroutine(task: Task, ctx: Context) -> None: ...

    for function in (inner, coroutine):
        with pytest.raises(TypeError, match="must be a plain function of a module"):
            task("q", process=True)(function)
