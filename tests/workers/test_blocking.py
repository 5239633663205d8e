"""Plain functions: they run in threads, speak through `Blocking`, and cannot hold up anybody but their own slot."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from app import events
from app.errors import Invalid
from app.store import Store, open_store
from app.task import Status, Task
from tests.waiting import wait_until
from tests.workers.conftest import ORG, Bench, Logs
from workers import Blocking, Context, task
from workers.handlers import Handler
from workers.runtime import Worker


@asynccontextmanager
async def opened_beside(bench: Bench, **more: Any) -> AsyncIterator[Store]:
    """The bench's data with other settings."""
    async with open_store(bench.store.settings.model_copy(update=more)) as store:
        yield store


def said_in(logs: Logs, event: str) -> bool:
    return any(one["event"] == event for one in logs)


@contextmanager
def kept(raised: list[BaseException]) -> Iterator[None]:
    """Whatever is raised in it, for the test to look at."""
    try:
        yield
    except BaseException as error:
        raised.append(error)
        raise


class Deaf:
    """A plain function that never uses its ctx, until it is released."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.release = threading.Event()

    def handler(self, *queues: str, **options: Any) -> Handler:
        @task(*(queues or ("default",)), **options)
        def deaf(task: Task, ctx: Blocking) -> str:
            self.running.append(task.id)
            try:
                self.release.wait()
            finally:
                self.running.remove(task.id)
            return "too late"

        return deaf


@pytest.fixture
def deaf() -> Iterator[Deaf]:
    made = Deaf()
    yield made
    made.release.set()


@task("other")
async def quick(task: Task, ctx: Context) -> str:
    return "quick"


async def test_a_plain_function_says_in_its_thread_all_that_a_coroutine_may_say(bench: Bench) -> None:
    threads: list[threading.Thread] = []

    @task("default")
    def plain(task: Task, ctx: Blocking, *, city: str) -> dict[str, Any]:
        threads.append(threading.current_thread())
        ctx.delta("a")
        with ctx.tool("search", {"q": city}) as call:
            call.result = [1]
        with pytest.raises(ZeroDivisionError), ctx.tool("divide"):
            1 / 0  # noqa: B018
        with pytest.raises(Invalid):
            ctx.emit("lower case")
        ctx.used(input_tokens=3)
        ctx.checkpoint("here")
        found = ctx.wait(ctx.submit("q", queue="other"))
        return {"child": found.result, "attempt": ctx.attempt}

    id_ = await bench.submit(context={"city": "Kyōto"})
    async with bench.work(plain, quick):
        done = await bench.until_ended(id_)
    assert (done.status, done.result, done.input_tokens) == (Status.COMPLETED, '{"child":"quick","attempt":1}', 3)
    assert threads[0] is not threading.main_thread()
    tools = [one.event for one in await bench.entries(id_) if isinstance(one.event, events.ToolReturned)]
    assert [(one.tool, one.success, one.output) for one in tools] == [
        ("search", True, [1]),
        ("divide", False, "ZeroDivisionError: division by zero"),
    ]


def pauses(ctx: Blocking) -> None:
    while True:
        ctx.checkpoint("step")


def asks(ctx: Blocking) -> None:
    ctx.approve("May I?")


def waits(ctx: Blocking) -> None:
    ctx.wait(ctx.submit("q", queue="nobody serves this"))


def talks(ctx: Blocking) -> None:
    while True:
        ctx.delta(".")
        ctx.flush()


@pytest.mark.parametrize(
    ("use", "until"),
    [
        (pauses, events.Paused),
        (asks, events.ApprovalRequested),
        (waits, events.ChildSubmitted),
        (talks, events.TextDelta),
    ],
)
@pytest.mark.parametrize("end", ["cancelled", "timed out", "stopped"])
async def test_whatever_a_function_waits_for_its_end_reaches_it(
    bench: Bench, use: Callable[[Blocking], None], until: type[events.Event], end: str
) -> None:
    raised: list[BaseException] = []

    def plain(task: Task, ctx: Blocking) -> None:
        with kept(raised):
            use(ctx)

    # Time that it is paused for does not count.
    late = end == "timed out" and use in {waits, talks}
    id_ = await bench.submit()
    async with (
        opened_beside(bench, lease_seconds=600, grace_seconds=0.1) as store,
        bench.work(task("default", timeout=0.2 if late else None)(plain), store=store) as working,
    ):
        await bench.until(id_, Status.PAUSED if use is asks else Status.RUNNING)
        if use is pauses:
            await bench.say(id_, events.PauseAsked())
        await bench.until_said(id_, until)
        if end == "stopped":
            await asyncio.wait_for(working.stop(), 5)
        elif not late:
            await bench.say(id_, events.Cancelled())
        await wait_until(lambda: bool(raised), "the function hears of it")
    assert isinstance(raised[0], asyncio.CancelledError)
    said = (await bench.said(id_))[-1]
    assert said == ("requeued" if end == "stopped" else "timed_out" if late else "cancelled")


async def test_the_end_of_a_sub_task_that_went_with_its_parent_is_the_end_of_the_wait(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be known before the parent's own cancel: here the worker never hears of that."""
    raised: list[BaseException] = []

    @task("default")
    def plain(task: Task, ctx: Blocking) -> None:
        with kept(raised):
            waits(ctx)

    monkeypatch.setattr(Worker, "_hear", lambda *_: None)
    id_ = await bench.submit()
    async with bench.work(plain):
        await bench.until_said(id_, events.ChildSubmitted)
        await bench.say(id_, events.Cancelled())
        await wait_until(lambda: bool(raised), "the function hears of it")
    assert isinstance(raised[0], asyncio.CancelledError)
    assert (await bench.said(id_))[-1] == "cancelled"


async def test_a_function_that_uses_its_ctx_no_more_is_timed_out_and_takes_only_its_own_slot(
    bench: Bench, deaf: Deaf, logs: Logs
) -> None:
    late, others = await bench.submit(), [await bench.submit(queue="other") for _ in range(3)]
    async with (
        opened_beside(bench, grace_seconds=0.1) as store,
        bench.work(deaf.handler(timeout=0.1), quick, store=store, slots=2),
    ):
        done = await bench.until_ended(late, *others)
        assert done.result == "quick"
        assert await bench.status(late) is Status.TIMED_OUT
        await wait_until(lambda: said_in(logs, "task.not_interruptible"), "it is told")
        assert deaf.running == [late]


async def test_its_slot_is_taken_for_as_long_as_the_thread_runs(bench: Bench, deaf: Deaf, logs: Logs) -> None:
    renewals: list[int] = []
    first, second = await bench.submit(), await bench.submit()
    async with opened_beside(bench, lease_seconds=0.6, grace_seconds=0.1) as store:
        real = store.renew

        async def renew(held: list[Any]) -> Any:
            answer = await real(held)
            renewals.append(len(held))
            return answer

        store.renew = renew  # type: ignore[assignment]
        async with bench.work(deaf.handler(timeout=0.1), store=store, slots=1):
            await bench.until_ended(first)
            await wait_until(lambda: said_in(logs, "task.not_interruptible"), "it is told")
            so_far = len(renewals)
            await wait_until(lambda: len(renewals) > so_far + 2, "renewals have told that the lease is gone")
            assert deaf.running == [first]
            assert await bench.status(second) is Status.QUEUED
            deaf.release.set()
            await bench.until_ended(second)


@pytest.mark.parametrize("ended", [False, True], ids=["while it works", "when its task is long over"])
async def test_a_worker_stops_within_its_grace_although_a_thread_goes_on(
    bench: Bench, deaf: Deaf, ended: bool, logs: Logs
) -> None:
    id_ = await bench.submit()
    loop = asyncio.get_running_loop()
    async with (
        opened_beside(bench, grace_seconds=2) as store,
        bench.work(deaf.handler(), store=store) as working,
    ):
        await wait_until(lambda: deaf.running == [id_], "it runs")
        if ended:
            await bench.say(id_, events.Cancelled())
            await wait_until(lambda: said_in(logs, "task.not_interruptible"), "it is told")
        began = loop.time()
        await asyncio.wait_for(working.stop(), 10)
        took = loop.time() - began
        assert deaf.running == [id_]
    assert took < 1.9  # nothing to wait for; or three quarters of the grace time
    assert (await bench.said(id_))[-1] == ("cancelled" if ended else "requeued")


async def test_a_thread_that_outlives_its_attempt_writes_nothing_more(bench: Bench) -> None:
    heard: list[BaseException] = []
    go, started = threading.Event(), threading.Event()

    @task("default", timeout=0.1, retry=TimeoutError)
    def slow(task: Task, ctx: Blocking) -> str:
        if ctx.attempt > 1:
            return "second"
        started.set()
        go.wait()
        with kept(heard):
            ctx.delta("from the first attempt")
        return "first"

    id_ = await bench.submit()
    async with bench.work(slow, slots=2):
        try:
            done = await bench.until_ended(id_)
        finally:
            go.set()
        await wait_until(lambda: bool(heard), "the first thread hears of it")
    assert isinstance(heard[0], asyncio.CancelledError)
    assert (done.result, done.attempt) == ("second", 2)
    requeued = [one.event for one in await bench.entries(id_) if isinstance(one.event, events.Requeued)]
    assert [one.error for one in requeued] == ["The attempt took longer than 0.1 s."]
    assert "text_delta" not in await bench.said(id_)


async def test_a_function_answered_after_its_worker_stopped_is_not_asked_again(bench: Bench) -> None:
    decisions: list[bool] = []

    @task("default")
    def careful(task: Task, ctx: Blocking) -> str:
        decisions.append(ctx.approve("May I?").approved)
        return "done"

    id_ = await bench.submit(max_attempts=1)
    async with opened_beside(bench, grace_seconds=600) as store, bench.work(careful, store=store) as working:
        await bench.until_said(id_, events.ApprovalRequested)
        await asyncio.wait_for(working.stop(), 10)
    held = await bench.task(id_)
    assert (held.status, held.refunds) == (Status.HELD, 1)
    await bench.say(id_, events.ApprovalDecided(approval=held.waits.removeprefix("approval:"), approved=True))
    async with bench.work(careful):
        done = await bench.until_ended(id_)
    assert (done.result, done.attempt, decisions) == ("done", 2, [True])
    assert (await bench.said(id_)).count("approval_requested") == 1


async def test_an_exit_inside_a_thread_ends_the_task_not_the_worker(bench: Bench) -> None:
    @task("default")
    def exits(task: Task, ctx: Blocking) -> str:
        raise SystemExit(3)

    id_, other = await bench.submit(), await bench.submit(queue="other")
    async with bench.work(exits, quick):
        done = await bench.until_ended(other, id_)
    assert (done.status, done.error) == (Status.ERRORED, "RuntimeError: the handler called sys.exit(3)")


async def test_an_async_function_may_lend_its_context_to_a_thread(bench: Bench) -> None:
    @task("default")
    async def lends(task: Task, ctx: Context) -> str:
        blocking = ctx.blocking
        await asyncio.to_thread(lambda: [blocking.progress(step / 4) for step in range(5)])
        return ORG

    id_ = await bench.submit()
    async with bench.work(lends):
        await bench.until_ended(id_)
    assert (await bench.said(id_)).count("progressed") == 5


async def test_many_threads_speak_at_once_and_every_word_arrives_once(bench: Bench) -> None:
    @task("default")
    def crowd(task: Task, ctx: Blocking) -> None:
        def speak(first: int) -> None:
            for number in range(first, first + 25):
                ctx.emit("SAID", payload={"number": number})

        threads = [threading.Thread(target=speak, args=(first,)) for first in range(0, 200, 25)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()

    id_ = await bench.submit()
    async with bench.work(crowd):
        await bench.until_ended(id_)
    entries = await bench.entries(id_)
    assert [one.n for one in entries] == [0, *range(202)]
    numbers = [one.event.payload["number"] for one in entries if isinstance(one.event, events.Noted)]
    assert sorted(numbers) == [*range(200)]
