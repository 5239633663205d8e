"""The context: what a handler says arrives in order and in few round trips, humans answer once, sub-tasks are found."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from app import events
from app.errors import Conflict, Invalid, NotFound, TooLarge, Unavailable
from app.events import TextDelta
from app.log import Said
from app.settings import Settings
from app.store import Store, open_store
from app.task import Status, Task
from tests.waiting import wait_until
from tests.workers.conftest import ORG, Bench, Logs
from workers import Context, task
from workers.attempt import UNSENT_BYTES_MAX, Attempt, Over
from workers.handlers import Handler
from workers.runtime import Worker


@pytest.fixture
async def context(bench: Bench) -> AsyncIterator[Context]:
    """Of a running attempt of the task t1, which no worker looks after."""
    await bench.submit()
    (claimed,) = await bench.store.claim(["default"], "w", 1)
    attempt = Attempt(bench.store, claimed, worker="w")
    yield Context(attempt)
    attempt.lose("the test is over")


class Valve:
    """Between an attempt and its store: counts round trips, and holds them up while it is shut."""

    def __init__(self, store: Store) -> None:
        self.batches: list[list[str]] = []
        self.open = asyncio.Event()
        self.open.set()
        self._extend = store.extend
        store.extend = self.extend  # type: ignore[assignment]

    async def extend(self, org: str, id_: str, batch: list[Said], **more: Any) -> Any:
        self.batches.append([one.tag for one in batch])
        await self.open.wait()
        return await self._extend(org, id_, batch, **more)


# Text


async def test_pieces_of_text_become_few_events_and_the_first_goes_out_at_once(bench: Bench, context: Context) -> None:
    for piece in ("a", "b", "c"):
        await context.delta(piece)
    await bench.until_said("t1", TextDelta)
    texts = [one.event.text for one in await bench.entries("t1") if isinstance(one.event, TextDelta)]
    assert texts[0] == "a"
    await context.delta("d")
    await context.flush()
    texts = [one.event.text for one in await bench.entries("t1") if isinstance(one.event, TextDelta)]
    assert "".join(texts) == "abcd"
    assert len(texts) <= 3


async def test_text_that_nobody_follows_up_is_sent_within_moments(bench: Bench, context: Context) -> None:
    await context.delta("a")
    await context.delta("b")

    async def arrived() -> bool:
        return [one.event.text for one in await bench.entries("t1") if isinstance(one.event, TextDelta)] == ["a", "b"]

    await wait_until(arrived, "the second piece arrives although nothing follows", seconds_max=5)


async def test_text_of_several_agents_and_other_events_keep_their_order(bench: Bench, context: Context) -> None:
    await context.delta("1", "a")
    await context.delta("2", "a")
    await context.delta("3", "b")
    await context.delta("4", "a")
    await context.progress(0.5)
    await context.delta("5", "a")
    await context.flush()
    said = [
        (one.event.agent, one.event.text) if isinstance(one.event, TextDelta) else events.tag(one.event)
        for one in (await bench.entries("t1"))[2:]
    ]
    assert said == [("a", "1"), ("a", "2"), ("b", "3"), ("a", "4"), "progressed", ("a", "5")]


async def test_text_beyond_its_bound_is_an_error_of_the_handler_that_wrote_it(bench: Bench, context: Context) -> None:
    await context.delta("a" * 190_000)
    await context.flush()
    await context.delta("b" * 10_000)
    with pytest.raises(TooLarge, match="text would exceed"):
        await context.flush()
    await context.progress(0.5)  # said once, it is over
    with pytest.raises(Invalid, match="Not valid text"):
        await context.delta("\udc80")
    assert (await bench.said("t1"))[2:] == ["text_delta", "progressed"]


async def test_a_slow_store_slows_the_writer_down_and_memory_stays_flat(bench: Bench, context: Context) -> None:
    valve = Valve(bench.store)
    valve.open.clear()
    written = said = 0

    async def write() -> None:
        nonlocal written
        for _ in range(100):
            await context.delta("x" * 1000, "a")
            written += 1000

    async def say() -> None:
        nonlocal said
        await context.emit("SAID", "y" * 10_000)
        said += 1

    crowd = [asyncio.create_task(write()), *(asyncio.create_task(say()) for _ in range(200))]
    await wait_until(lambda: bool(valve.batches), "the first events are under way")
    for _ in range(1000):  # turns of the loop, in which everybody says what may be said
        await asyncio.sleep(0)
    unsent = context._attempt._unsent
    assert UNSENT_BYTES_MAX / 2 < unsent < UNSENT_BYTES_MAX + 20_000
    valve.open.set()
    await asyncio.gather(*crowd)
    await context.flush()
    assert (written, said, context._attempt._unsent) == (100_000, 200, 0)
    entries = await bench.entries("t1")
    assert [one.n for one in entries] == [0, *range(len(entries) - 1)]


async def test_events_said_at_once_go_out_together(bench: Bench, context: Context) -> None:
    valve = Valve(bench.store)
    await asyncio.gather(*(context.emit("SAID", str(number)) for number in range(250)))
    assert sum(len(one) for one in valve.batches) == 250
    assert len(valve.batches) <= 5
    said = [one.event.message for one in (await bench.entries("t1"))[2:]]
    assert said == [str(number) for number in range(250)]


async def test_one_refused_event_does_not_take_its_neighbours_with_it(bench: Bench, context: Context) -> None:
    answers = await asyncio.gather(
        context.emit("FIRST"),
        context._say(events.Paused(checkpoint="nobody asked for it")),
        context.emit("SECOND"),
        return_exceptions=True,
    )
    assert [type(one) for one in answers] == [type(None), Conflict, type(None)]
    assert [one.n for one in await bench.entries("t1")] == [0, 0, 1, 2]


async def test_flush_waits_also_for_an_event_whose_writer_left(bench: Bench, context: Context) -> None:
    valve = Valve(bench.store)
    valve.open.clear()
    saying = asyncio.create_task(context.emit("SAID"))
    await wait_until(lambda: bool(valve.batches), "it is under way")
    saying.cancel()
    flushing = asyncio.create_task(context.flush())
    await asyncio.wait([saying])
    for _ in range(10):
        await asyncio.sleep(0)
    assert not flushing.done()
    valve.open.set()
    await flushing
    assert (await bench.said("t1"))[-1] == "noted"


async def test_nothing_is_sent_after_the_end_not_even_by_those_the_handler_left_behind(bench: Bench) -> None:
    go, heard = asyncio.Event(), list[BaseException]()
    left_behind: list[asyncio.Task[None]] = []

    @task("default")
    async def untidy(task: Task, ctx: Context) -> str:
        async def later() -> None:
            await go.wait()
            try:
                await ctx.delta("late")
            except asyncio.CancelledError as error:
                heard.append(error)
                raise

        left_behind.append(asyncio.create_task(later()))
        return "done"

    id_ = await bench.submit()
    async with bench.work(untidy):
        await bench.until_ended(id_)
        go.set()
        await asyncio.wait(left_behind)
    assert len(heard) == 1
    assert (await bench.said(id_))[2:] == ["text_completed", "completed"]


async def test_a_refusal_heard_in_two_ways_at_once_keeps_nobody_waiting(bench: Bench, context: Context) -> None:
    attempt = context._attempt
    real = bench.store.append
    warning = asyncio.Event()

    async def append(*words: Any, **more: Any) -> Any:
        warning.set()
        await asyncio.Event().wait()

    await bench.store.append(ORG, "t1", events.LeaseLost())
    bench.store.append = append  # type: ignore[method-assign]
    saying = asyncio.create_task(attempt.append(events.Noted(name="LATE")))
    await warning.wait()
    attempt.lose("taken")  # as the log's tail says
    with pytest.raises(Over, match="taken"):
        await asyncio.wait_for(saying, 5)
    bench.store.append = real  # type: ignore[method-assign]


async def test_an_attempt_that_was_lost_before_it_began_runs_no_handler(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, logs: Logs
) -> None:
    ran: list[int] = []

    @task("default")
    async def quick(task: Task, ctx: Context) -> str:
        ran.append(ctx.attempt)
        return ""

    keep = Worker._keep

    def too_late(worker: Worker, attempt: Attempt, until: float) -> None:
        keep(worker, attempt, until)
        if attempt.claimed.fence == 1:
            attempt.lose("lease")

    monkeypatch.setattr(Worker, "_keep", too_late)
    id_ = await bench.submit()
    async with bench.work(quick):
        await wait_until(lambda: any(one["event"] == "task.lease_lost" for one in logs), "it is noticed")
        await bench.say(id_, events.LeaseLost())
        await bench.until_ended(id_)
    assert ran == [2]


# Tools, log


async def test_a_tool_leaves_its_call_its_result_its_duration_and_what_it_raised(bench: Bench) -> None:
    @task("default")
    async def handy(task: Task, ctx: Context) -> None:
        async with ctx.tool("search", {"q": "x"}, agent="a", message="Searching") as call:
            await asyncio.sleep(0.01)
            call.result = {"hits": 2}
        with pytest.raises(KeyError):
            async with ctx.tool("lookup"):
                raise KeyError("city")
        with pytest.raises(TimeoutError):
            async with ctx.tool("hang"), asyncio.timeout(0.01):
                await asyncio.Event().wait()

    id_ = await bench.submit()
    async with bench.work(handy):
        assert (await bench.until_ended(id_)).error == ""
    said = [one.event for one in await bench.entries(id_)]
    calls = [one for one in said if isinstance(one, events.ToolCalled)]
    returns = [one for one in said if isinstance(one, events.ToolReturned)]
    assert [one.call for one in calls] == [one.call for one in returns]
    assert (calls[0].params, calls[0].agent, calls[0].message) == ({"q": "x"}, "a", "Searching")
    assert [(one.tool, one.success, one.output) for one in returns] == [
        ("search", True, {"hits": 2}),
        ("lookup", False, "KeyError: 'city'"),
        ("hang", False, "TimeoutError"),
    ]
    assert returns[0].duration_ms >= 8


async def test_a_line_of_the_log_is_also_an_event_whatever_its_fields_are_called(
    bench: Bench, context: Context, logs: Logs
) -> None:
    await context.log("Found.", "warning", event="click", task_id="mine", hits=2)
    (line,) = [one for one in logs if one["event"] == "Found."]
    assert (line["log_level"], line["task_id"], line["hits"]) == ("warning", "t1", 2)
    noted = (await bench.entries("t1"))[-1].event
    assert isinstance(noted, events.Noted)
    assert (noted.name, noted.message) == ("LOG", "Found.")
    assert noted.payload == {"event": "click", "task_id": "mine", "hits": 2, "level": "warning"}


# Questions


async def decide(bench: Bench, id_: str, *, approved: bool = True, feedback: str = "") -> None:
    """Answers what the task waits for."""

    async def waits() -> bool:
        return bool((await bench.task(id_)).waits)

    await wait_until(waits, "something is asked")
    kind, _, name = (await bench.task(id_)).waits.partition(":")
    if kind == "approval":
        await bench.say(id_, events.ApprovalDecided(approval=name, approved=approved, feedback=feedback))
    else:
        await bench.say(id_, events.Reviewed(version=int(name), approved=approved, feedback=feedback))


def asking(answers: list[Any], *, times: int = 1, retry: type[Exception] | tuple[()] = ()) -> Handler:
    @task("default", retry=retry)
    async def asks(task: Task, ctx: Context) -> str:
        for _ in range(times):
            decision = await ctx.approve("Deploy?", {"to": "production"})
            answers.append((decision.approved, decision.feedback))
        if retry and ctx.attempt == 1:
            raise ConnectionError("after the answer")
        return "done"

    return asks


@pytest.mark.parametrize("approved", [True, False])
async def test_a_question_pauses_the_task_until_somebody_decides(bench: Bench, approved: bool) -> None:
    answers: list[Any] = []
    id_ = await bench.submit()
    async with bench.work(asking(answers)):
        await bench.until_said(id_, events.ApprovalRequested)
        paused = await bench.task(id_)
        assert (paused.status, paused.request) == (
            Status.PAUSED,
            {"reason": "Deploy?", "payload": {"to": "production"}},
        )
        with pytest.raises(Conflict):  # there is something to decide first
            await bench.say(id_, events.Resumed())
        await decide(bench, id_, approved=approved, feedback="because")
        done = await bench.until_ended(id_)
    assert (done.result, done.waits, answers) == ("done", "", [(approved, "because")])
    await bench.prove()


async def test_the_answer_outlives_an_attempt_and_each_repetition_has_its_own(bench: Bench) -> None:
    answers: list[Any] = []
    id_ = await bench.submit()
    async with bench.work(asking(answers, times=2, retry=ConnectionError)):
        await decide(bench, id_, approved=False)
        await wait_until(lambda: len(answers) == 1, "the first answer arrives")
        await decide(bench, id_, approved=True)
        done = await bench.until_ended(id_)
    assert (done.attempt, answers) == (2, [(False, ""), (True, "")] * 2)
    assert (await bench.said(id_)).count("approval_requested") == 2


async def test_an_explicit_retry_asks_anew(bench: Bench) -> None:
    answers: list[Any] = []
    id_ = await bench.submit()
    async with bench.work(asking(answers, retry=ValueError)):
        await decide(bench, id_)
        done = await bench.until_ended(id_)
        assert done.status is Status.ERRORED
        await bench.say(id_, events.Retried())
        await decide(bench, id_, approved=False)
        await bench.until_ended(id_)
    assert (await bench.said(id_)).count("approval_requested") == 2
    assert answers == [(True, ""), (False, "")]


@pytest.mark.parametrize("decided", ["while it is held", "before its lease is lost"])
async def test_the_answer_survives_the_death_of_the_worker_that_waited(
    tmp_path: Path, decided: str, logs: Logs
) -> None:
    answers: list[Any] = []
    async with open_store(Settings(data=tmp_path / "data", lease_seconds=1, grace_seconds=1)) as store:
        bench = Bench(store)
        id_ = await bench.submit(max_attempts=1)  # to wait costs none
        async with bench.work(asking(answers)) as first:
            await bench.until_said(id_, events.ApprovalRequested)
            await first.crash()
        if decided == "before its lease is lost":
            await decide(bench, id_)
        async with bench.work(asking(answers)):  # its ticker notices the death
            if decided == "while it is held":
                await bench.until(id_, Status.HELD)
                await decide(bench, id_)
            done = await bench.until_ended(id_)
        assert (done.result, done.attempt, answers) == ("done", 2, [(True, "")])
        assert (await bench.said(id_)).count("approval_requested") == 1
        await bench.prove()


async def test_a_pause_in_the_moment_of_asking_comes_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real, paused = bench.store.extend, list[str]()

    async def extend(org: str, id_: str, batch: list[Said], **more: Any) -> Any:
        if isinstance(batch[0].event, events.ApprovalRequested) and not paused:
            paused.append(id_)
            await bench.say(id_, events.PauseAsked())
        return await real(org, id_, batch, **more)

    monkeypatch.setattr(bench.store, "extend", extend)
    answers: list[Any] = []
    id_ = await bench.submit()
    async with bench.work(asking(answers)):
        await bench.until_said(id_, events.Paused)
        assert "approval_requested" not in await bench.said(id_)
        await bench.say(id_, events.Resumed())
        await decide(bench, id_)
        done = await bench.until_ended(id_)
    assert (done.result, answers) == ("done", [(True, "")])


async def test_two_questions_at_once_are_asked_one_after_the_other(bench: Bench) -> None:
    @task("default")
    async def curious(task: Task, ctx: Context) -> str:
        both = await asyncio.gather(ctx.approve("First?"), ctx.review("the plan"))
        return " ".join(one.feedback for one in both)

    id_ = await bench.submit()
    async with bench.work(curious):
        await decide(bench, id_, feedback="one")
        await bench.until_said(id_, events.ReviewRequested)
        await decide(bench, id_, feedback="two")
        done = await bench.until_ended(id_)
    assert done.result == "one two"
    said = await bench.said(id_)
    assert said.index("approval_decided") < said.index("review_requested")


async def test_refused_plans_are_put_up_again_and_a_later_attempt_hears_the_same_answers(bench: Bench) -> None:
    heard: list[tuple[int, bool, str]] = []

    @task("default", retry=ConnectionError)
    async def planner(task: Task, ctx: Context) -> str:
        while True:
            decision = await ctx.review("the same plan")
            heard.append((ctx.attempt, decision.approved, decision.feedback))
            if decision.approved:
                return "done"
            if ctx.attempt == 1:
                raise ConnectionError("after a refusal")

    id_ = await bench.submit()
    async with bench.work(planner):
        await decide(bench, id_, approved=False, feedback="think again")
        await wait_until(lambda: len(heard) == 2, "the second attempt hears the same")
        await decide(bench, id_, approved=True)
        done = await bench.until_ended(id_)
    assert heard == [(1, False, "think again"), (2, False, "think again"), (2, True, "")]
    assert (done.review, done.review_version, done.review_round) == ("approved", 2, 2)


async def test_the_wait_for_a_human_is_no_part_of_the_timeout(bench: Bench) -> None:
    @task("default", timeout=1)
    async def patient(task: Task, ctx: Context) -> str:
        await ctx.approve("May I?")
        return "done"

    id_ = await bench.submit()
    async with bench.work(patient):
        await bench.until_said(id_, events.ApprovalRequested)
        asked_at = (await bench.task(id_)).paused_at

        async def long_ago() -> bool:
            seconds, micros = await bench.store.door.read("TIME")
            return bool(seconds * 1_000_000 + micros > asked_at + 1_500_000)

        await wait_until(long_ago, "longer than the timeout has passed")
        await decide(bench, id_)
        assert (await bench.until_ended(id_)).result == "done"


# Sub-tasks


@task("child")
async def echoes(task: Task, ctx: Context) -> str:
    return task.query


@pytest.fixture(params=[1, 3], ids=["1 partition", "3 partitions"])
async def wide(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    settings = Settings(data=tmp_path / "wide", lease_seconds=2, grace_seconds=2, partitions=request.param)
    async with open_store(settings) as store:
        yield Bench(store)


async def test_a_sub_task_has_its_agents_queue_and_model(wide: Bench) -> None:
    await wide.store.agents.save("o", "writer", provider="openai", model="m", effort="low", queue="child")

    @task("parent")
    async def parent(task: Task, ctx: Context) -> str:
        asked: list[dict[str, Any]] = [{"agent": "writer"}, {"agent": "writer", "queue": "q"}, {"agent": "a b"}, {}]
        return " ".join([(await ctx.submit("q", **one)).id for one in asked])

    id_ = await wide.submit(queue="parent")
    async with wide.work(parent):
        done = await wide.until_ended(id_)
    children = [await wide.task(child) for child in done.result.split()]
    assert [(one.agent, one.queue, one.llm_model, one.llm_provider, one.llm_effort) for one in children] == [
        ("writer", "child", "m", "openai", "low"),
        ("writer", "q", "m", "openai", "low"),
        ("a b", "agent:a b", "", "", ""),
        ("default", "default", "", "", ""),
    ]


async def test_a_sub_task_knows_its_family_and_its_end_is_awaited_without_polling(
    wide: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, began = asyncio.Event(), asyncio.Event()
    monkeypatch.setattr("workers.context.CHILD_PAUSE_SECONDS", 3600)  # who looks again and again would wait for ever

    @task("child")
    async def slow(task: Task, ctx: Context) -> str:
        began.set()
        await go.wait()
        return task.query

    @task("default")
    async def parent(task: Task, ctx: Context) -> str:
        child = await ctx.submit("q", queue="child", context={"a": 1}, title="T", max_attempts=2, timeout_seconds=60)
        return f"{child.id} {(await child).result}"

    id_ = await wide.submit(agent="boss", session="s", owner="ann")
    async with wide.work(parent, slow):
        await began.wait()
        go.set()
        done = await wide.until_ended(id_)
    child = await wide.task(done.result.split()[0])
    assert done.result.endswith(" q")
    assert (child.parent, child.trigger, child.session, child.owner) == (id_, "boss", "s", "ann")
    assert (child.title, child.context, child.max_attempts) == ("T", {"a": 1}, 2)
    assert child.deadline_at
    assert done.children == 1


async def test_a_key_finds_the_same_sub_task_in_a_later_attempt(wide: Bench) -> None:
    ids: list[str] = []

    @task("default", retry=ConnectionError)
    async def parent(task: Task, ctx: Context) -> str:
        child = await ctx.submit("q", queue="child", key="the one")
        ids.append(child.id)
        result = (await child).result
        if ctx.attempt == 1:
            raise ConnectionError
        return result

    id_ = await wide.submit()
    async with wide.work(parent, echoes):
        done = await wide.until_ended(id_)
    assert (done.result, done.attempt, done.children) == ("q", 2, 1)
    assert len(ids) == 2
    assert ids[0] == ids[1]
    assert (await wide.said(id_)).count("child_submitted") == 1


async def test_children_and_grandchildren_are_cancelled_with_their_parent_and_tried_again_with_it(wide: Bench) -> None:
    ids, ended, go = dict[str, str](), list[str](), asyncio.Event()

    def relative(queue: str, below: str) -> Handler:
        @task(queue)
        async def waits(task: Task, ctx: Context) -> str:
            ids[queue] = task.id
            try:
                if below:
                    return (await (await ctx.submit("", queue=below, key="k"))).result
                await go.wait()
                return "done"
            except asyncio.CancelledError:
                ended.append(queue)
                raise

        return waits

    id_ = await wide.submit()
    async with wide.work(relative("default", "child"), relative("child", "grandchild"), relative("grandchild", "")):
        await wait_until(lambda: "grandchild" in ids, "all three run")
        family = dict(ids)
        await wide.store.append(ORG, id_, events.Cancelled(reason="enough"))
        await wait_until(lambda: sorted(ended) == ["child", "default", "grandchild"], "all three are interrupted")
        for one in family.values():
            assert await wide.status(one) is Status.CANCELLED
        assert (await wide.task(family["grandchild"])).cancel_reason.startswith(
            f"Its parent task {family['child']} was"
        )
        go.set()
        await wide.say(id_, events.Retried())
        done = await wide.until_ended(id_)
    assert (done.result, ids) == ("done", family)
    await wide.prove()


@pytest.mark.parametrize("when", ["while it runs", "before anybody looks"])
async def test_a_sub_task_that_was_deleted_is_an_error_of_who_waits_for_it(
    bench: Bench, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.context.CHILD_PAUSE_SECONDS", 0.01)
    children: list[str] = []
    go = asyncio.Event()

    @task("default")
    async def parent(task: Task, ctx: Context) -> str:
        child = await ctx.submit("q", queue="nobody serves this")
        children.append(child.id)
        if when == "before anybody looks":
            await go.wait()
        with pytest.raises(NotFound, match="was deleted"):
            await child
        return "alone"

    id_ = await bench.submit()
    async with bench.work(parent):
        await wait_until(lambda: bool(children), "the sub-task is made")
        await bench.until(children[0], Status.QUEUED)
        await bench.store.delete(ORG, children[0])
        go.set()
        assert (await bench.until_ended(id_)).result == "alone"


async def test_a_sub_task_that_is_made_late_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real, away = bench.store.log.submit, [1, 2, 3]

    async def submit(child: events.Submission, **more: Any) -> Any:
        if child.parent and away:
            away.pop()
            raise Unavailable("Its partition is away.")
        return await real(child, **more)

    monkeypatch.setattr(bench.store.log, "submit", submit)

    @task("default")
    async def parent(task: Task, ctx: Context) -> str:
        return (await (await ctx.submit("late", queue="child"))).result

    id_ = await bench.submit()
    async with bench.work(parent, echoes):
        assert (await bench.until_ended(id_)).result == "late"
    assert not away


Say = Callable[[Context], Awaitable[Any]]
WORDS: dict[str, Say] = {
    "progress": lambda ctx: ctx.progress(0.5),
    "delta": lambda ctx: ctx.delta("late"),
    "flush": lambda ctx: ctx.flush(),
    "approve": lambda ctx: ctx.approve("late?"),
    "submit": lambda ctx: ctx.submit("late"),
    "checkpoint": lambda ctx: ctx.checkpoint("late"),
}


@pytest.mark.parametrize("word", WORDS.values(), ids=WORDS.keys())
async def test_no_word_of_an_attempt_that_is_over_is_heard(bench: Bench, context: Context, word: Say) -> None:
    before = await bench.said("t1")
    context._attempt.lose("taken")
    with pytest.raises(asyncio.CancelledError):
        await word(context)
    assert await bench.said("t1") == before
