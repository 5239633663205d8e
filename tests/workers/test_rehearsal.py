"""`run_task`: a task in this process, without a server, with the real context and the real runtime."""

import asyncio
from typing import Any

import pytest

from app import events
from app.errors import Misconfigured
from app.task import Status, Task
from workers import Blocking, Context, Decision, Failed, run_task, task


async def test_a_task_runs_to_its_end_and_all_that_it_said_is_there() -> None:
    @task("default")
    async def hello(task: Task, ctx: Context, *, name: str) -> str:
        await ctx.delta("Hello, ")
        await ctx.delta(f"{name}!")
        async with ctx.tool("wave", {"hands": 2}) as call:
            call.result = "waved"
        ctx.used(model="m", input_tokens=2)
        return f"Hello, {name}!"

    run = await run_task(hello, "greet", name="Ada")
    assert (run.task.status, run.result, run.task.query) == (Status.COMPLETED, "Hello, Ada!", "greet")
    assert (run.task.model, run.task.input_tokens) == ("m", 2)
    said = [events.tag(one) for one in run.events]
    assert said == [
        *("submitted", "started", "text_delta", "text_delta", "tool_called", "tool_returned"),
        *("text_completed", "completed"),
    ]
    assert {one.actor for one in run.events if isinstance(one, events.ToolCalled)} == {"worker:rehearsal"}


async def test_a_json_result_is_an_object_again() -> None:
    @task("default")
    def plain(task: Task, ctx: Blocking) -> dict[str, Any]:
        ctx.progress(0.5)
        return {"a": [1]}

    assert (await run_task(plain)).result == {"a": [1]}


async def test_arguments_that_do_not_fit_fail_the_task_as_in_a_worker() -> None:
    @task("default")
    async def strict(task: Task, ctx: Context, *, days: int) -> str:
        return str(days)

    run = await run_task(strict, days="many")
    assert (run.task.status, run.result) == (Status.FAILED, "")
    assert run.task.error.startswith("The task's context does not fit its worker. context.days: ")


@pytest.mark.parametrize(("max_attempts", "attempts"), [(0, 3), (1, 1), (5, 5)])
async def test_retries_follow_at_once_for_as_many_attempts_as_the_decorator_says(
    max_attempts: int, attempts: int
) -> None:
    @task("default", retry=ConnectionError, max_attempts=max_attempts)
    async def shaky(task: Task, ctx: Context) -> str:
        await ctx.delta("half ")
        raise ConnectionResetError(f"attempt {ctx.attempt}")

    run = await run_task(shaky)
    last = f"ConnectionResetError: attempt {attempts}"
    assert (run.task.status, run.task.attempt, run.task.error) == (Status.ERRORED, attempts, last)
    assert len([one for one in run.events if isinstance(one, events.Requeued)]) == attempts - 1


async def test_a_timeout_counts() -> None:
    @task("default", timeout=0.05)
    async def slow(task: Task, ctx: Context) -> str:
        await asyncio.Event().wait()
        return ""

    run = await run_task(slow)
    assert (run.task.status, run.task.error) == (Status.TIMED_OUT, "The attempt took longer than 0.05 s.")


async def test_the_test_decides_in_place_of_a_human() -> None:
    asked: list[str] = []

    def decide(question: str) -> bool | Decision:
        asked.append(question)
        if question == "Buy?":
            return Decision(approved=True, feedback="cheaply", payload={"euros": 5})
        return question == "plan B"

    @task("default")
    async def careful(task: Task, ctx: Context) -> dict[str, Any]:
        bought = await ctx.approve("Buy?")
        plans = [(await ctx.review(plan)).approved for plan in ("plan A", "plan B")]
        return {"payload": bought.payload, "feedback": bought.feedback, "plans": plans}

    run = await run_task(careful, decide=decide)
    assert run.result == {"payload": {"euros": 5}, "feedback": "cheaply", "plans": [False, True]}
    assert asked == ["Buy?", "plan A", "plan B"]
    assert run.task.plan == "plan B"


async def test_an_answer_survives_the_attempt_and_a_loop_of_reviews_ends() -> None:
    asked: list[str] = []

    def decide(question: str) -> bool:
        asked.append(question)
        return len(asked) > 2

    @task("default", retry=ConnectionError)
    async def stubborn(task: Task, ctx: Context) -> str:
        while not (await ctx.review("the same plan")).approved:
            if ctx.attempt == 1 and len(asked) == 2:
                raise ConnectionError("after two refusals")
        return "approved"

    run = await asyncio.wait_for(run_task(stubborn, decide=decide), 5)
    assert (run.result, run.task.attempt, len(asked)) == ("approved", 2, 3)


async def test_sub_tasks_run_on_the_workers_that_were_given() -> None:
    @task("add")
    def add(task: Task, ctx: Blocking, *, a: int, b: int) -> dict[str, int]:
        return {"sum": a + b}

    @task("agent:sums")
    async def sums(task: Task, ctx: Context) -> str:
        child = await ctx.submit("", queue="add", context={"a": 1, "b": 2})
        return (await child).result

    @task("default")
    async def parent(task: Task, ctx: Context) -> str:
        child = await ctx.submit("grand", agent="sums", key="once")
        again = await ctx.submit("grand", agent="sums", key="once")
        assert child.id == again.id
        return (await child).result

    run = await run_task(parent, children=[sums, add])
    assert run.result == '{"sum":3}'
    assert run.task.children == 1


async def test_a_sub_task_that_fails_is_its_parents_to_judge() -> None:
    @task("fails")
    async def fails(task: Task, ctx: Context) -> str:
        raise Failed("No such city.")

    @task("default")
    async def parent(task: Task, ctx: Context) -> str:
        child = await (await ctx.submit("", queue="fails"))
        return f"{child.status}: {child.error}"

    assert (await run_task(parent, children=[fails])).result == "failed: No such city."


async def test_what_the_test_itself_gets_wrong_is_raised() -> None:
    @task("default")
    async def asks(task: Task, ctx: Context) -> str:
        await ctx.approve("Really?")
        return "done"

    def decide(question: str) -> bool:
        raise AssertionError(f"nobody should ask {question}")

    with pytest.raises(AssertionError, match="nobody should ask Really"):
        await asyncio.wait_for(run_task(asks, decide=decide), 5)

    @task("default")
    async def delegates(task: Task, ctx: Context) -> str:
        await ctx.submit("", queue="elsewhere")
        return "done"

    with pytest.raises(Misconfigured, match=r"No worker was given for the queue elsewhere"):
        await asyncio.wait_for(run_task(delegates), 5)


async def test_the_bounds_of_the_store_hold() -> None:
    @task("default")
    async def says_too_much(task: Task, ctx: Context) -> None:
        for _ in range(13):
            await ctx.delta("a" * 16_000)
            await ctx.flush()

    run = await run_task(says_too_much)
    assert run.task.error == "TooLarge: The task's text would exceed 196608 bytes."


async def test_sub_tasks_that_nobody_waited_for_end_with_their_parent() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    @task("endless")
    async def endless(task: Task, ctx: Context) -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    @task("default")
    async def parent(task: Task, ctx: Context) -> str:
        await ctx.submit("", queue="endless")
        await started.wait()
        return "done"

    assert (await run_task(parent, children=[endless])).result == "done"
    await asyncio.wait_for(ended.wait(), 5)
