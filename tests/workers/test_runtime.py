"""The runtime: what an attempt comes to, and that nothing which happens on the way loses, doubles or blocks."""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
import pytest
import uvloop
from msgspec import Struct
from pydantic import BaseModel, Field

from app import events
from app.errors import Conflict, Invalid, Misconfigured, OutOfOrder, Unavailable
from app.events import Json, Noted, TextDelta
from app.log import Appended, Logged, Said
from app.queues import Claimed, backoff_seconds
from app.schema import misfit
from app.settings import Settings
from app.store import Store, open_store
from app.task import Status, Task
from tests.waiting import wait_until
from tests.workers.conftest import ORG, Bench, Logs
from workers import Context, Failed, runtime, task
from workers.attempt import Attempt, Over
from workers.handlers import Handler, by_queue, load, sentence
from workers.runtime import run

SHORT_SECONDS = 1.0
"""A lease that a busy machine of two cores still renews in time."""


@asynccontextmanager
async def opened(tmp_path: Path, **more: Any) -> AsyncIterator[Store]:
    """Another user of the same data, or the first one with other settings."""
    async with open_store(Settings(data=tmp_path / "data", **more)) as store:
        yield store


def hanging(started: asyncio.Event, ended: asyncio.Event | None = None) -> Handler:
    """Works until it is cancelled."""
    ended = ended or asyncio.Event()

    @task("default")
    async def hang(task: Task, ctx: Context) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    return hang


@task("default")
async def hello(task: Task, ctx: Context) -> str:
    await ctx.delta("Hel")
    await ctx.delta("")
    await ctx.delta("lo")
    return "Hello"


@task("default")
async def hello_at_once(task: Task, ctx: Context) -> str:
    return "Hello"


# What an attempt comes to


async def test_a_task_is_claimed_run_and_finished_in_this_order(bench: Bench, logs: Logs) -> None:
    id_ = await bench.submit()
    async with bench.work(hello, name="w1"):
        done = await bench.until_ended(id_)
    assert (done.status, done.result, done.result_type) == (Status.COMPLETED, "Hello", "text")
    said = ["submitted", "started", "text_delta", "text_delta", "text_completed", "completed"]
    assert await bench.said(id_) == said
    entries = await bench.entries(id_)
    assert [one.n for one in entries] == [0, 0, 1, 2, 3, 4]
    assert {one.event.actor for one in entries[-2:]} == {"worker:w1"}
    decisions = [one["event"] for one in logs if one["event"].startswith("task.")]
    assert decisions == ["task.claimed", "task.completed"]
    await bench.prove()


async def test_a_dict_or_a_model_is_a_json_result_and_carries_the_usage(bench: Bench) -> None:
    class Inner(BaseModel):
        at: Path

    class Answer(msgspec.Struct):
        inner: Inner

    @task("dict")
    async def as_dict(task: Task, ctx: Context) -> dict[str, Any]:
        ctx.used(model="m", provider="p", input_tokens=1, cost_usd=0.25)
        ctx.used(input_tokens=2, output_tokens=5, cost_usd=0.5)
        return {"a": [1, None], "inner": MappingProxyType({"at": "x"})}

    @task("model")
    async def as_model(task: Task, ctx: Context) -> Inner:
        return Inner(at=Path("x"))

    @task("struct")
    async def as_struct(task: Task, ctx: Context) -> Answer:
        return Answer(inner=Inner(at=Path("x")))

    ids = [await bench.submit(queue=queue) for queue in ("dict", "model", "struct")]
    async with bench.work(as_dict, as_model, as_struct):
        await bench.until_ended(*ids)
    done = [await bench.task(id_) for id_ in ids]
    assert [msgspec.json.decode(one.result) for one in done] == [
        {"a": [1, None], "inner": {"at": "x"}},
        {"at": "x"},
        {"inner": {"at": "x"}},
    ]
    assert {one.result_type for one in done} == {"json"}
    assert await bench.said(ids[0]) == ["submitted", "started", "completed"]
    first = done[0]
    assert (first.model, first.provider, first.input_tokens, first.output_tokens) == ("m", "p", 3, 5)
    assert first.cost_nano == 750_000_000


class Fits(Struct):
    returned: Any
    status: Status
    result_type: str = ""
    error: str = ""


FITTING = [
    Fits({"n": 1}, Status.COMPLETED, "json"),
    Fits(' {"n": 1}\n', Status.COMPLETED, "json"),
    Fits({"n": "1"}, Status.FAILED, error="The result does not fit its output schema at $.n: '1' is not of type"),
    Fits('{"m": 1}', Status.FAILED, error="The result does not fit its output schema at $: 'n' is a required property"),
    Fits("One.", Status.FAILED, error="The result is no JSON, as its output schema asks for."),
    Fits(None, Status.FAILED, error="The result is no JSON, as its output schema asks for."),
]


@pytest.mark.parametrize("case", FITTING, ids=lambda case: repr(case.returned))
async def test_a_result_fits_the_tasks_schema_or_the_task_fails_and_says_where(
    bench: Bench, logs: Logs, case: Fits
) -> None:
    @task("default", retry=Exception)
    async def answers(task: Task, ctx: Context) -> Any:
        assert task.output_schema == schema
        ctx.used(model="m", input_tokens=3)
        return case.returned

    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    id_ = await bench.submit(output_schema=schema, session="s")
    async with bench.work(answers):
        done = await bench.until_ended(id_)
    assert (done.status, done.attempt, done.result_type) == (case.status, 1, case.result_type)
    assert done.error.startswith(case.error)
    assert bool(done.error) == (case.status is Status.FAILED)
    # What was consumed counts, and what was said stays.
    assert (done.input_tokens, done.model) == (3, "m")
    texts = [one.event.text for one in await bench.entries(id_) if isinstance(one.event, events.TextCompleted)]
    assert texts == ([case.returned] if isinstance(case.returned, str) else [])
    told = [one["error"] for one in logs if one["event"] == "task.failed"]
    assert told == ([done.error] if done.error else [])
    await bench.prove()


async def test_a_task_without_a_schema_may_answer_anything(bench: Bench) -> None:
    @task("default")
    async def answers(task: Task, ctx: Context) -> str:
        return '{"n":'

    id_ = await bench.submit()
    async with bench.work(answers):
        done = await bench.until_ended(id_)
    assert (done.status, done.result_type) == (Status.COMPLETED, "text")


async def test_a_long_check_stops_no_other_attempt_and_no_renewal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = {"items": {"anyOf": [{"type": "null"}] * 900}}  # two seconds of one core
    beats = 0
    checking, renewed = threading.Event(), threading.Event()

    def check(schema: Json, result: str) -> str:
        checking.set()
        said = misfit(schema, result)
        assert renewed.wait(30)
        return said

    @task("slow")
    async def slow(task: Task, ctx: Context) -> str:
        return f"[{'1,' * 60_000}1]"

    @task("quick")
    async def quick(task: Task, ctx: Context) -> str:
        nonlocal beats
        while await bench.status(checked) is Status.RUNNING:
            beats += checking.is_set()
            await asyncio.sleep(0.01)
        return ""

    # Whoever renews shares the interpreter with the check: twice the time that is usual here.
    async with opened(tmp_path, lease_seconds=2 * SHORT_SECONDS) as store:
        bench = Bench(store)
        renew = store.renew

        async def watched(held: Sequence[Claimed]) -> Mapping[Claimed, str]:
            during = checking.is_set()
            answers = await renew(held)
            if during and any(one.task == checked and answers[one] for one in held):
                renewed.set()
            return answers

        monkeypatch.setattr(store, "renew", watched)
        monkeypatch.setattr(runtime, "misfit", check)
        checked = await bench.submit(queue="slow", output_schema=schema)
        async with bench.work(slow, quick):
            await bench.until(checked, Status.RUNNING)
            other = await bench.submit(queue="quick")
            done = await bench.until_ended(other, checked)
        assert (done.status, done.attempt) == (Status.FAILED, 1)
        assert done.error == "The result cannot be checked against its output schema: that would take too long."
        assert beats > 5


async def test_usage_goes_out_once_with_the_text(bench: Bench) -> None:
    @task("default")
    async def frugal(task: Task, ctx: Context) -> str:
        ctx.used(model="m", input_tokens=1)
        await ctx.output("notes", agent="researcher", duration_ms=7)
        await ctx.output("draft")
        ctx.used(output_tokens=2)
        return "final"

    id_ = await bench.submit()
    async with bench.work(frugal):
        done = await bench.until_ended(id_)
    assert (done.model, done.input_tokens, done.output_tokens) == ("m", 1, 2)
    texts = [one.event for one in await bench.entries(id_) if isinstance(one.event, events.TextCompleted)]
    assert [(one.agent, one.text, one.usage is not None) for one in texts] == [
        ("researcher", "notes", False),
        ("final_output", "draft", True),
        ("final_output", "final", True),
    ]
    assert texts[0].duration_ms == 7


async def test_a_text_that_the_handler_finished_itself_is_not_said_twice(bench: Bench) -> None:
    @task("default")
    async def tidy(task: Task, ctx: Context) -> str:
        ctx.used(output_tokens=1)
        await ctx.output("done")
        ctx.used(output_tokens=1)
        return "done"

    id_ = await bench.submit()
    async with bench.work(tidy):
        done = await bench.until_ended(id_)
    assert (await bench.said(id_)).count("text_completed") == 1
    assert done.output_tokens == 2


async def test_none_is_an_empty_text(bench: Bench) -> None:
    @task("default")
    async def silent(task: Task, ctx: Context) -> None:
        return None

    id_ = await bench.submit()
    async with bench.work(silent):
        done = await bench.until_ended(id_)
    assert (done.status, done.result, done.result_type) == (Status.COMPLETED, "", "text")


async def test_every_word_of_a_context_is_an_event_of_its_own(bench: Bench) -> None:
    @task("default")
    async def talkative(task: Task, ctx: Context) -> str:
        assert (ctx.attempt, ctx.saved, ctx.task.query) == (1, {}, "why?")
        await ctx.plan({"steps": ["look"]}, "The plan")
        await ctx.agent_started("researcher", payload={"role": "r"})
        await ctx.thinking("Hm", agent="researcher")
        await ctx.emit("LLM_PROMPT", "why?", {"tokens": 1})
        async with ctx.tool("search", {"q": "why"}) as call:
            call.result = [1, 2]
        await ctx.log("Found two.", hits=2)
        await ctx.progress(0.5, "half")
        await ctx.agent_completed("researcher")
        await ctx.checkpoint("step", {"never": "kept"})
        return ""

    id_ = await bench.submit()
    async with bench.work(talkative):
        done = await bench.until_ended(id_)
    assert done.error == ""
    assert (await bench.said(id_))[2:-1] == [
        "plan_updated",
        "agent_started",
        "thinking",
        "noted",
        "tool_called",
        "tool_returned",
        "noted",
        "progressed",
        "agent_completed",
    ]
    assert done.checkpoint == {}


@pytest.mark.parametrize("grouped", [False, True])
async def test_failed_is_an_answer_and_not_retried(bench: Bench, grouped: bool, logs: Logs) -> None:
    @task("default", retry=Exception)
    async def fails(task: Task, ctx: Context) -> str:
        if grouped:
            raise ExceptionGroup("two", [ValueError("x"), Failed("No such city.")])
        raise Failed("No such city.")

    id_ = await bench.submit()
    async with bench.work(fails):
        done = await bench.until_ended(id_)
    assert (done.status, done.error, done.attempt) == (Status.FAILED, "No such city.", 1)
    assert [one["error"] for one in logs if one["event"] == "task.failed"] == ["No such city."]


async def test_an_exception_errors_the_task_and_only_the_log_has_the_traceback(bench: Bench, logs: Logs) -> None:
    @task("default")
    async def breaks(task: Task, ctx: Context) -> str:
        raise KeyError("city")

    id_ = await bench.submit()
    async with bench.work(breaks):
        done = await bench.until_ended(id_)
    assert (done.status, done.error) == (Status.ERRORED, "KeyError: 'city'")
    (logged,) = [one for one in logs if one["event"] == "task.errored"]
    assert isinstance(logged["exc_info"], KeyError)


async def exits(task: Task, ctx: Context) -> str:
    sys.exit(3)


async def cancels_itself(task: Task, ctx: Context) -> str:
    raise asyncio.CancelledError


async def asks_for_its_own_cancel(task: Task, ctx: Context) -> str:
    itself = asyncio.current_task()
    assert itself
    itself.cancel()
    return "cut off before it can be said"


async def says_too_much(task: Task, ctx: Context) -> None:
    await ctx.delta("a" * 200_000)


async def returns_too_much(task: Task, ctx: Context) -> str:
    return "a" * 196_609


async def returns_what_grows(task: Task, ctx: Context) -> str:
    return "\0" * 100_000  # six bytes each in JSON


async def returns_a_list(task: Task, ctx: Context) -> Any:
    return [1]


async def returns_no_object(task: Task, ctx: Context) -> Any:
    class Point(msgspec.Struct, array_like=True):
        x: int

    return Point(x=1)


async def returns_what_json_cannot_hold(task: Task, ctx: Context) -> Any:
    return {"a": object()}


async def raises_much(task: Task, ctx: Context) -> str:
    raise ValueError("\udc80" + "x" * 5000)


async def says_nonsense(task: Task, ctx: Context) -> None:
    await ctx.emit("lower case")


async def uses_less_than_nothing(task: Task, ctx: Context) -> None:
    ctx.used(input_tokens=-1)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (uses_less_than_nothing, "ValueError: What a model call consumed cannot be negative."),
        (exits, "RuntimeError: the handler called sys.exit(3)"),
        (cancels_itself, "CancelledError: the handler cancelled itself"),
        (asks_for_its_own_cancel, "CancelledError: the handler cancelled itself"),
        (says_too_much, "TooLarge: The task's text would exceed 196608 bytes."),
        (returns_too_much, "ValueError: the result has 196609 bytes; at most 196608 are allowed"),
        (returns_what_grows, "TooLarge: The event has "),
        (returns_a_list, "TypeError: a worker returns text, a dict or a model, not list"),
        (returns_no_object, "TypeError: a worker's JSON result is an object"),
        (returns_what_json_cannot_hold, "TypeError: a result cannot hold object"),
        (raises_much, "ValueError: ?xxxx"),
        (says_nonsense, "Invalid: Not an event: "),
    ],
)
async def test_whatever_a_handler_gets_wrong_is_told_in_a_sentence(
    bench: Bench, function: Callable[..., Any], error: str
) -> None:
    id_ = await bench.submit()
    async with bench.work(task("default", retry=(TypeError, asyncio.QueueEmpty))(function)):
        done = await bench.until_ended(id_)
    assert done.status is Status.ERRORED
    assert done.error.startswith(error)
    assert len(done.error) < 4100


async def test_a_handler_that_survives_its_own_cancel_has_its_say(bench: Bench) -> None:
    @task("default")
    async def survives(task: Task, ctx: Context) -> str:
        itself = asyncio.current_task()
        assert itself
        itself.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return "alive"

    id_ = await bench.submit()
    async with bench.work(survives):
        done = await bench.until_ended(id_)
    assert (done.status, done.result) == (Status.COMPLETED, "alive")


async def cancels_itself_and_raises(task: Task, ctx: Context) -> str:
    await ctx.delta("hello")
    await asks_for_its_own_cancel(task, ctx)
    raise ValueError("boom")


async def is_cancelled_a_tick_later(task: Task, ctx: Context) -> str:
    await ctx.delta("hello")
    itself = asyncio.current_task()
    assert itself
    asyncio.get_running_loop().call_soon(itself.cancel)
    return "{}"


async def is_cancelled_again_and_again(task: Task, ctx: Context) -> str:
    itself = asyncio.current_task()
    assert itself

    def cancel() -> None:
        if not itself.done():
            itself.cancel()
            asyncio.get_running_loop().call_soon(cancel)

    asyncio.get_running_loop().call_soon(cancel)
    return "{}"


@pytest.mark.parametrize(
    ("function", "status", "error"),
    [
        (cancels_itself_and_raises, Status.ERRORED, "ValueError: boom"),
        (is_cancelled_a_tick_later, Status.COMPLETED, ""),
        (is_cancelled_again_and_again, Status.COMPLETED, ""),
    ],
)
@pytest.mark.parametrize("schema", [{}, {"type": "object"}])
async def test_a_cancel_that_a_handler_left_behind_does_not_cost_its_outcome(
    bench: Bench, function: Callable[..., Any], status: Status, error: str, schema: dict[str, Any]
) -> None:
    id_ = await bench.submit(output_schema=schema)
    async with (
        opened_beside(bench, lease_seconds=SHORT_SECONDS) as store,
        bench.work(task("default")(function), store=store),
    ):
        done = await bench.until_ended(id_)
    assert (done.status, done.error, done.attempt) == (status, error, 1)
    await bench.prove()


@pytest.mark.parametrize("pieces", [0, 1])
@pytest.mark.parametrize("answered", [False, True])
async def test_last_words_that_a_stray_cancel_cuts_off_are_said_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, pieces: int, *, answered: bool
) -> None:
    handlers: list[asyncio.Task[Any]] = []

    @task("default")
    async def brief(task: Task, ctx: Context) -> str:
        for _ in range(pieces):
            await ctx.delta("hel")
        itself = asyncio.current_task()
        assert itself
        handlers.append(itself)
        return "hello"

    id_ = await bench.submit()
    async with opened_beside(bench, lease_seconds=SHORT_SECONDS) as store:
        real = store.extend

        async def extend(*words: Any, **more: Any) -> Any:
            outcomes = await real(*words, **more) if answered else None
            handlers[0].cancel()
            await asyncio.sleep(0)
            return outcomes or await real(*words, **more)

        monkeypatch.setattr(store, "extend", extend)
        async with bench.work(brief, store=store):
            done = await bench.until_ended(id_)
    assert (done.status, done.result, done.attempt) == (Status.COMPLETED, "hello", 1)
    assert await bench.said(id_) == ["submitted", "started", *["text_delta"] * pieces, "text_completed", "completed"]
    await bench.prove()


async def test_a_handler_that_waits_for_the_store_can_be_cancelled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, away = bench.store.extend, True

    async def extend(*words: Any, **more: Any) -> Any:
        if away:
            raise Unavailable("away")
        return await real(*words, **more)

    @task("default")
    async def impatient(task: Task, ctx: Context) -> str:
        nonlocal away
        await ctx.delta("hello")
        try:
            async with asyncio.timeout(0.01):
                await ctx.flush()
        finally:
            away = False
        return "hello"

    monkeypatch.setattr(bench.store, "extend", extend)
    id_ = await bench.submit()
    async with bench.work(impatient):
        done = await bench.until_ended(id_)
    assert (done.status, done.error) == (Status.ERRORED, "TimeoutError")


async def test_a_task_is_queued_again_for_the_exceptions_that_the_worker_names(bench: Bench) -> None:
    attempts: list[int] = []

    @task("default", retry=(ConnectionError,))
    async def shaky(task: Task, ctx: Context) -> str:
        attempts.append(ctx.attempt)
        await ctx.delta("half ")
        if ctx.attempt == 1:
            raise ConnectionResetError("gone")
        return f"attempt {ctx.attempt}"

    id_ = await bench.submit()
    async with bench.work(shaky):
        done = await bench.until_ended(id_)
    assert (done.result, attempts) == ("attempt 2", [1, 2])
    entries = await bench.entries(id_)
    (requeued,) = [one for one in entries if isinstance(one.event, events.Requeued)]
    (second,) = [one for one in entries if isinstance(one.event, events.Started) and one.attempt == 2]
    assert isinstance(requeued.event, events.Requeued)
    assert requeued.event.error == "ConnectionResetError: gone"
    assert requeued.event.message.startswith("Attempt 1 ended with ConnectionResetError: gone; the next one begins in ")
    assert 0 < requeued.event.delay_seconds <= 1
    assert second.at - requeued.at >= requeued.event.delay_seconds * 1_000_000


async def test_the_last_attempts_exception_ends_the_task(bench: Bench) -> None:
    @task("default", retry=(ConnectionError,))
    async def shaky(task: Task, ctx: Context) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self_destruct())

    async def self_destruct() -> None:
        raise ConnectionResetError("gone")

    id_ = await bench.submit(max_attempts=2)
    async with bench.work(shaky):
        done = await bench.until_ended(id_)
    assert (done.status, done.error, done.attempt) == (Status.ERRORED, "ConnectionResetError: gone", 2)


@pytest.mark.parametrize(("own", "workers", "attempts"), [(2, 4, 2), (0, 4, 4), (0, 0, 3)])
async def test_the_tasks_own_number_of_attempts_goes_before_its_workers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, own: int, workers: int, attempts: int
) -> None:
    monkeypatch.setattr("app.queues.backoff_seconds", lambda _: 0.0)

    @task("default", retry=ConnectionError, max_attempts=workers)
    async def shaky(task: Task, ctx: Context) -> None:
        raise ConnectionError

    id_ = await bench.submit(max_attempts=own)
    async with bench.work(shaky):
        done = await bench.until_ended(id_)
    assert (done.status, done.attempt, done.max_attempts) == (Status.ERRORED, attempts, attempts)


async def test_a_timeout_that_is_retried_counts_as_any_error_once_the_attempts_are_used_up(bench: Bench) -> None:
    @task("default", timeout=0.05, retry=TimeoutError, max_attempts=2)
    async def slow(task: Task, ctx: Context) -> None:
        await asyncio.Event().wait()

    id_ = await bench.submit()
    async with bench.work(slow):
        done = await bench.until_ended(id_)
    assert (done.status, done.attempt, done.error) == (Status.ERRORED, 2, "The attempt took longer than 0.05 s.")


@pytest.mark.parametrize("retried", [False, True])
async def test_an_attempt_that_takes_too_long_is_interrupted_and_what_it_raises_then_is_logged(
    bench: Bench, retried: bool, logs: Logs
) -> None:
    @task("default", timeout=0.1, retry=TimeoutError if retried else ())
    async def slow(task: Task, ctx: Context) -> str:
        if ctx.attempt > 1:
            return "quick"
        try:
            await asyncio.Event().wait()
        finally:
            raise KeyError("while it was cancelled")
        return "slow"

    id_ = await bench.submit()
    async with bench.work(slow):
        done = await bench.until_ended(id_)
        await wait_until(lambda: said_in(logs, "task.ended_late"), "its error is logged")
    if retried:
        assert (done.result, done.attempt) == ("quick", 2)
    else:
        assert (done.status, done.error) == (Status.TIMED_OUT, "The attempt took longer than 0.1 s.")


def test_the_backoff_is_anything_up_to_a_bound_that_doubles_up_to_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    for attempt, bound in ((1, 1), (2, 2), (3, 4), (4, 8), (7, 60), (100, 60)):
        waits = [backoff_seconds(attempt) for _ in range(200)]
        assert 0 <= min(waits) < bound / 4
        assert bound * 3 / 4 < max(waits) <= bound


# Named arguments


async def test_named_arguments_come_from_the_context_and_others_are_ignored(bench: Bench) -> None:
    seen: list[object] = []

    @task("default")
    async def named(
        task: Task, ctx: Context, city: str, *, days: Annotated[int, Field(ge=1)] = 3, anything: Any = None
    ) -> str:
        seen.append((city, days, anything))
        return ""

    ids = [
        await bench.submit(context={"city": "Kyōto", "days": "2", "copy": 1, "anything": [1]}),
        await bench.submit(context={"city": "Kyōto"}),
        await bench.submit(context={"days": 0}),
    ]
    async with bench.work(named, slots=1):
        done = await bench.until_ended(*ids)
    assert seen == [("Kyōto", 2, [1]), ("Kyōto", 3, None)]
    assert done.status is Status.FAILED
    assert done.error == (
        "The task's context does not fit its worker. context.city: a value is required; "
        "context.days: Input should be greater than or equal to 1."
    )


def test_a_function_of_another_form_is_refused_at_once() -> None:
    async def generator(task: Task, ctx: Context) -> AsyncIterator[str]:
        yield "a"

    async def alone(task: Task) -> None: ...

    async def rest(task: Task, ctx: Context, **rest: int) -> None: ...

    async def positional(task: Task, ctx: Context, city: str, /) -> None: ...

    async def fielded(task: Task, ctx: Context, *, days: int = Field(3, ge=1)) -> None: ...

    for function, sentence_ in (
        (generator, "must be a function"),
        (alone, "must take a task and a context"),
        (rest, r"without \*\*rest: int"),
        (positional, "not city"),
        (fielded, "Annotated"),
    ):
        with pytest.raises(TypeError, match=sentence_):
            task("q")(function)
    with pytest.raises(TypeError, match="names the queues"):
        task()
    with pytest.raises(TypeError, match="names types"):
        task("q", retry="ValueError")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 to 100 attempts"):
        task("q", max_attempts=101)
    with pytest.raises(ValueError, match="seconds above 0"):
        task("q", timeout=0)


# Cancel, pause


async def test_a_cancelled_task_interrupts_its_handler_at_once(bench: Bench, logs: Logs) -> None:
    started, ended = asyncio.Event(), asyncio.Event()
    id_ = await bench.submit()
    # Nothing but the log's tail can be so fast: no renewal comes within this lease, and the worker does not stop.
    async with opened_beside(bench, lease_seconds=600) as store, bench.work(hanging(started, ended), store=store):
        await started.wait()
        await bench.say(id_, events.Cancelled(reason="enough"))
        await asyncio.wait_for(ended.wait(), 5)
        await wait_until(lambda: said_in(logs, "task.cancelled"), "the cancellation is logged")
    assert (await bench.said(id_))[-1] == "cancelled"
    assert not said_in(logs, "task.errored")
    assert not said_in(logs, "task.refused")


@asynccontextmanager
async def opened_beside(bench: Bench, **more: Any) -> AsyncIterator[Store]:
    """The bench's data with other settings."""
    async with open_store(bench.store.settings.model_copy(update=more)) as store:
        yield store


def said_in(logs: Logs, event: str) -> bool:
    return any(one["event"] == event for one in logs)


async def test_a_cancel_that_comes_while_the_last_words_are_on_their_way_frees_the_slot(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, logs: Logs
) -> None:
    real = bench.store.extend
    on_its_way = asyncio.Event()

    async def extend(*words: Any, **more: Any) -> Any:
        if on_its_way.is_set():
            return await real(*words, **more)
        on_its_way.set()
        return await asyncio.Event().wait()

    monkeypatch.setattr(bench.store, "extend", extend)
    first, second = await bench.submit(), await bench.submit()
    async with bench.work(hello_at_once, slots=1):
        await on_its_way.wait()
        await bench.say(first, events.Cancelled(reason="enough"))
        await bench.until_ended(second)
    assert await bench.said(first) == ["submitted", "started", "cancelled"]
    assert await bench.status(second) is Status.COMPLETED
    assert [one["status"] for one in logs if one["event"] == "task.cancelled"] == ["cancelled"]


@pytest.mark.parametrize("kind", ["deleted", "timed out", "restated"])
async def test_other_ends_interrupt_as_well(bench: Bench, kind: str) -> None:
    started, ended = asyncio.Event(), asyncio.Event()
    id_ = await bench.submit(deadline_seconds=0.5 if kind == "timed out" else 0)
    async with bench.work(hanging(started, ended)):
        await started.wait()
        if kind == "deleted":
            await bench.store.delete(ORG, id_)
        elif kind == "restated":
            await bench.say(id_, events.Restated(to="completed", result="by hand"))
        await asyncio.wait_for(ended.wait(), 5)
    if kind == "timed out":
        assert await bench.status(id_) is Status.TIMED_OUT


async def test_what_a_cancelled_handler_still_says_goes_nowhere(bench: Bench, logs: Logs) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    @task("default")
    async def stubborn(task: Task, ctx: Context) -> str:
        await ctx.delta("a")
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            with pytest.raises(asyncio.CancelledError):
                await ctx.delta("late")
        ended.set()
        raise ValueError("while it was cancelled")

    id_ = await bench.submit()
    async with bench.work(stubborn):
        await started.wait()
        await bench.say(id_, events.Cancelled())
        await ended.wait()
        await wait_until(lambda: said_in(logs, "task.cancelled"), "the cancellation is logged")
    assert await bench.said(id_) == ["submitted", "started", "text_delta", "cancelled"]
    (cancelled,) = [one for one in logs if one["event"] == "task.cancelled"]
    assert isinstance(cancelled["exc_info"], ValueError)


async def test_a_handler_that_ignores_its_cancellation_is_logged_and_keeps_its_slot(bench: Bench, logs: Logs) -> None:
    started, deaf, release = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @task("default")
    async def ignores(task: Task, ctx: Context) -> str:
        started.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                deaf.set()
        return ""

    first, second = await bench.submit(), await bench.submit()
    async with opened_beside(bench, grace_seconds=0.1) as store, bench.work(ignores, store=store, slots=1):
        try:
            await started.wait()
            await bench.say(first, events.Cancelled())
            await wait_until(lambda: said_in(logs, "task.not_interruptible"), "the deaf handler is logged")
            assert deaf.is_set()
            assert await bench.status(second) is Status.QUEUED
        finally:
            release.set()  # nothing else would ever end it
        await bench.until_ended(second)


def ignoring(started: asyncio.Event, deaf: asyncio.Event, release: asyncio.Event) -> Handler:
    """Passes over its cancels until it is released."""

    @task("default")
    async def ignores(task: Task, ctx: Context) -> str:
        while not release.is_set():
            started.set()
            try:
                await release.wait()
            except asyncio.CancelledError:
                deaf.set()
        return "too late"

    return ignores


async def test_a_worker_stops_although_a_handler_ignores_it(bench: Bench) -> None:
    started, deaf, release = asyncio.Event(), asyncio.Event(), asyncio.Event()
    ignores = ignoring(started, deaf, release)
    id_ = await bench.submit()
    async with opened_beside(bench, grace_seconds=0.1) as store, bench.work(ignores, store=store) as working:
        try:
            await started.wait()
            await asyncio.wait_for(working.stop(), 10)
            assert (await bench.said(id_))[-1] == "requeued"
        finally:
            release.set()


def running(function: str) -> list[asyncio.Task[Any]]:
    return [one for one in asyncio.all_tasks() if getattr(one.get_coro(), "__name__", "") == function]


async def test_a_crash_waits_for_no_handler_and_says_nothing(bench: Bench, logs: Logs) -> None:
    started, deaf, release = asyncio.Event(), asyncio.Event(), asyncio.Event()
    id_ = await bench.submit()
    async with bench.work(ignoring(started, deaf, release)) as working:
        await started.wait()
        try:
            await asyncio.wait_for(working.crash(), 5)
            assert deaf.is_set()
        finally:
            release.set()
        (handler,) = running("_work")
        await asyncio.wait([handler])
    assert await bench.said(id_) == ["submitted", "started"]
    assert not said_in(logs, "task.completed")


@pytest.mark.parametrize("pieces", [0, 1])
async def test_a_crash_cuts_off_the_last_words(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, logs: Logs, pieces: int
) -> None:
    on_its_way = asyncio.Event()

    async def extend(*words: Any, **more: Any) -> Any:
        on_its_way.set()
        return await asyncio.Event().wait()

    @task("default")
    async def brief(task: Task, ctx: Context) -> str:
        for _ in range(pieces):
            await ctx.delta("hel")
        return "hello"

    monkeypatch.setattr(bench.store, "extend", extend)
    id_ = await bench.submit()
    async with bench.work(brief) as working:
        await on_its_way.wait()
        await asyncio.wait_for(working.crash(), 5)
        assert not running("_work")
    assert await bench.said(id_) == ["submitted", "started"]
    assert not said_in(logs, "task.abandoned")


async def test_a_stray_cancel_that_leaves_a_task_to_its_lease_is_logged(bench: Bench, logs: Logs) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    @task("default")
    async def ignores(task: Task, ctx: Context) -> None:
        while not release.is_set():
            started.set()
            with suppress(asyncio.CancelledError):
                await release.wait()

    id_ = await bench.submit()
    async with bench.work(ignores):
        try:
            await started.wait()
            await bench.say(id_, events.Cancelled())
            await wait_until(lambda: bool(running("_until_said")), "its end is waited for")
            await asyncio.sleep(0)
            running("_until_said")[0].cancel()
            await wait_until(lambda: said_in(logs, "task.abandoned"), "the cut is logged")
        finally:
            release.set()


async def test_a_handler_pauses_at_its_checkpoint_and_goes_on(bench: Bench) -> None:
    enough = asyncio.Event()
    reached: list[int] = []

    @task("default")
    async def stepwise(task: Task, ctx: Context) -> str:
        while not enough.is_set():
            await ctx.checkpoint("step", {"step": len(reached)})
            reached.append(len(reached))
        return "done"

    id_ = await bench.submit()
    async with bench.work(stepwise):
        await bench.until(id_, Status.RUNNING)
        await bench.say(id_, events.PauseAsked(reason="lunch"))
        await bench.until_said(id_, events.Paused)
        paused, before = await bench.task(id_), len(reached)
        assert (paused.status, paused.checkpoint, paused.pause_reason) == (Status.PAUSED, {"step": before}, "lunch")
        await bench.say(id_, events.Resumed())
        await wait_until(lambda: len(reached) > before, "it goes on")
        enough.set()
        done = await bench.until_ended(id_)
    assert (done.result, done.attempt, reached) == ("done", 1, [*range(len(reached))])
    said = await bench.said(id_)
    assert said.count("paused") == 1
    assert said.index("pause_asked") < said.index("paused") < said.index("resumed")


async def test_a_task_without_checkpoints_completes_although_it_is_paused(bench: Bench) -> None:
    go = asyncio.Event()

    @task("default")
    async def busy(task: Task, ctx: Context) -> str:
        await go.wait()
        return "done"

    id_ = await bench.submit()
    async with bench.work(busy):
        await bench.until(id_, Status.RUNNING)
        await bench.say(id_, events.PauseAsked())
        go.set()
        done = await bench.until_ended(id_)
    assert done.status is Status.COMPLETED


async def test_a_cancel_reaches_a_handler_that_is_paused(bench: Bench) -> None:
    ended = asyncio.Event()

    @task("default")
    async def stepwise(task: Task, ctx: Context) -> str:
        try:
            while True:
                await ctx.checkpoint("step")
        finally:
            ended.set()

    id_ = await bench.submit()
    async with bench.work(stepwise):
        await bench.until(id_, Status.RUNNING)
        await bench.say(id_, events.PauseAsked())
        await bench.until_said(id_, events.Paused)
        await bench.say(id_, events.Cancelled())
        await asyncio.wait_for(ended.wait(), 5)
    assert await bench.status(id_) is Status.CANCELLED


async def test_paused_when_its_worker_dies_it_is_held_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    saved: list[object] = []

    @task("default")
    async def stepwise(task: Task, ctx: Context) -> str:
        saved.append(ctx.saved)
        if ctx.saved:
            return "done"
        while True:
            await ctx.checkpoint("step", {"step": 7})

    async with opened(tmp_path, lease_seconds=SHORT_SECONDS) as store:
        bench = Bench(store)
        id_ = await bench.submit()
        async with bench.work(stepwise) as first:
            await bench.until(id_, Status.RUNNING)
            await bench.say(id_, events.PauseAsked())
            await bench.until_said(id_, events.Paused)
            await first.crash()
        async with bench.work(stepwise):  # its ticker notices
            held = await bench.until(id_, Status.HELD)
            assert held.checkpoint == {"step": 7}
            await bench.say(id_, events.Resumed())
            done = await bench.until_ended(id_)
        assert (done.result, done.attempt, saved) == ("done", 2, [{}, {"step": 7}])
        await bench.prove()


async def test_resumed_in_the_moment_of_pausing_it_goes_on(bench: Bench) -> None:
    """The attempt believes in a pause that the store has already ended."""
    await bench.submit()
    (claimed,) = await bench.store.claim(["default"], "w", 1)
    attempt = Attempt(bench.store, claimed, worker="w")
    context = Context(attempt)
    attempt.hear(Status.PAUSED)
    await asyncio.wait_for(context.checkpoint("step"), 5)
    assert not attempt.paused


# Leases, fences, a store that is away


async def deafen(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker on this store hears of nothing and renews nothing, but believes that it does."""

    @asynccontextmanager
    async def watch(_: Callable[[Logged], None]) -> AsyncIterator[None]:
        yield

    async def renew(held: list[Claimed]) -> dict[Claimed, str]:
        return dict.fromkeys(held, "running")

    async def tick() -> int:
        return 0

    monkeypatch.setattr(store, "watch", watch)
    monkeypatch.setattr(store, "renew", renew)
    monkeypatch.setattr(store.queues, "tick", tick)


@pytest.mark.parametrize("ended", [False, True], ids=["while the other works", "after the end"])
async def test_a_worker_that_lost_its_lease_is_refused_and_its_task_is_done_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: bool, logs: Logs
) -> None:
    go, finish, cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @task("default")
    async def slow(task: Task, ctx: Context) -> None:
        await ctx.delta("slow")
        await go.wait()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(5):
                    group.create_task(ctx.progress(0.5, "late"))
        except asyncio.CancelledError:
            cancelled.set()
            raise

    @task("default")
    async def quick(task: Task, ctx: Context) -> str:
        await ctx.delta("quick")
        await finish.wait()
        return f"attempt {ctx.attempt}"

    async with (
        opened(tmp_path, lease_seconds=SHORT_SECONDS) as old,
        opened(tmp_path, lease_seconds=SHORT_SECONDS) as new,
    ):
        await deafen(old, monkeypatch)
        bench = Bench(new)
        id_ = await bench.submit()
        async with bench.work(slow, store=old, slots=1):
            await bench.until_said(id_, TextDelta)
            async with bench.work(quick):
                await bench.until_said(id_, events.LeaseLost)
                await bench.until(id_, Status.RUNNING)
                if ended:
                    finish.set()
                    await bench.until_ended(id_)
                go.set()
                await cancelled.wait()
                over = "task.cancelled" if ended else "task.lease_lost"
                await wait_until(lambda: said_in(logs, over), "the old worker knows")
                finish.set()
                done = await bench.until_ended(id_)
        assert (done.status, done.result, done.attempt) == (Status.COMPLETED, "attempt 2", 2)
        texts = [one.event.text for one in await bench.entries(id_) if isinstance(one.event, TextDelta)]
        assert texts == ["slow", "quick"]
        warnings = [one.event for one in await bench.entries(id_) if isinstance(one.event, Noted)]
        assert [one.name for one in warnings] == ([] if ended else ["WARNING"])
        refused = [one for one in logs if one["event"] == "task.refused"]
        assert [(one["said"], one["reason"]) for one in refused] == [("progressed", "stale")]
        await bench.prove()


# Here and below, that the logs are captured matters: the development renderer takes long enough over a traceback to
# lose a short lease.


async def test_one_error_does_not_stop_the_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: Logs
) -> None:
    outcomes: list[str] = []

    async with opened(tmp_path, lease_seconds=SHORT_SECONDS) as store:
        real, errors = store.renew, [RuntimeError("a bug"), Unavailable("away"), Unavailable("away")]

        async def renew(held: list[Claimed]) -> dict[Claimed, str]:
            if held and errors:
                raise errors.pop()
            answer = await real(held)
            outcomes.extend(answer.values())
            return answer

        monkeypatch.setattr(store, "renew", renew)
        bench = Bench(store)
        started, ended = asyncio.Event(), asyncio.Event()
        id_ = await bench.submit()
        async with bench.work(hanging(started, ended)):
            await wait_until(lambda: len(outcomes) >= 6, "the lease was renewed for twice its length")
            assert not ended.is_set()
            assert (await bench.task(id_)).attempt == 1
            await bench.say(id_, events.Cancelled())
            await bench.until_ended(id_)
    assert set(outcomes[:6]) == {"running"}
    assert said_in(logs, "worker.renewal_failed")
    assert said_in(logs, "worker.renewal_waiting")


async def test_a_lease_that_cannot_be_renewed_ends_the_attempt_on_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: Logs
) -> None:
    starts: list[int] = []

    @task("default")
    async def hang(task: Task, ctx: Context) -> None:
        starts.append(ctx.attempt)
        await asyncio.Event().wait()

    async with opened(tmp_path, lease_seconds=SHORT_SECONDS) as store:

        async def renew(held: list[Claimed]) -> dict[Claimed, str]:
            raise Unavailable("away")

        monkeypatch.setattr(store, "renew", renew)
        bench = Bench(store)
        id_ = await bench.submit(max_attempts=2)
        async with bench.work(hang, slots=1):
            done = await bench.until_ended(id_)
    assert (done.status, done.error, starts) == (Status.ERRORED, "The worker stopped answering (2 times).", [1, 2])
    lost = [one for one in logs if one["event"] in {"task.lease_lost", "task.cancelled"}]
    assert len(lost) == 2


async def test_what_the_tail_misses_a_renewal_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()

    @task("default")
    async def stepwise(task: Task, ctx: Context) -> str:
        try:
            while True:
                await ctx.checkpoint("step", {"a": 1})
                await asyncio.sleep(0.01)
        finally:
            ended.set()

    async with opened(tmp_path, lease_seconds=SHORT_SECONDS) as store:
        real = store.renew
        await deafen(store, monkeypatch)
        monkeypatch.setattr(store, "renew", real)
        bench = Bench(store)
        id_ = await bench.submit()
        async with bench.work(stepwise):
            await bench.until(id_, Status.RUNNING)
            await bench.say(id_, events.PauseAsked())
            await bench.until_said(id_, events.Paused)
            await bench.say(id_, events.Resumed())
            await bench.say(id_, events.PauseAsked())
            await bench.say(id_, events.Cancelled())
            await asyncio.wait_for(ended.wait(), 5)


async def test_a_store_that_is_away_for_a_while_loses_and_doubles_nothing(tmp_path: Path) -> None:
    @task("default")
    async def counts(task: Task, ctx: Context) -> str:
        for number in range(1500):
            await ctx.delta(f"{number} ")
            await ctx.flush()
        ctx.used(output_tokens=1500)
        return "".join(f"{number} " for number in range(1500))

    # With fsync `always` what the store has answered for survives its death: only then is this a promise.
    async with opened(tmp_path, lease_seconds=20, fsync="always") as store:
        bench = Bench(store)
        id_ = await bench.submit()
        async with bench.work(counts):
            for least in (100, 600):

                async def so_far(least: int = least) -> bool:
                    return (await bench.task(id_)).last_seq > least

                await wait_until(so_far, f"{least} events")
                os.kill(int((tmp_path / "data" / "valkey.pid").read_text()), signal.SIGKILL)
            done = await bench.until_ended(id_)
        assert (done.status, done.attempt, done.output_tokens) == (Status.COMPLETED, 1, 1500)
        entries = await bench.entries(id_)
        assert [one.n for one in entries] == [0, *range(1503)]
        texts = [one.event.text for one in entries if isinstance(one.event, TextDelta)]
        assert "".join(texts) == done.result
        await bench.prove()


async def test_a_store_that_forgot_events_gets_its_task_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a failover: the store's last number is below the attempt's."""
    real = bench.store.extend
    forgotten: list[Said] = []

    async def extend(org: str, id_: str, batch: list[Said], **more: Any) -> Any:
        if isinstance(batch[0].event, TextDelta) and not forgotten:
            forgotten.extend(batch)
            return [await bench.store.append(org, id_, Noted(name="FORGOTTEN")) for _ in batch]
        return await real(org, id_, batch, **more)

    monkeypatch.setattr(bench.store, "extend", extend)
    id_ = await bench.submit()
    async with bench.work(hello):
        done = await bench.until_ended(id_)
    assert (done.status, done.result, done.attempt, done.refunds) == (Status.COMPLETED, "Hello", 2, 1)


async def test_an_event_whose_answer_was_not_awaited_is_sent_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench.store.extend
    held, release = asyncio.Event(), asyncio.Event()

    async def extend(org: str, id_: str, batch: list[Said], **more: Any) -> Any:
        answer = await real(org, id_, batch, **more)
        held.set()
        await release.wait()
        return answer

    @task("default")
    async def impatient(task: Task, ctx: Context) -> str:
        for step in (1, 2, 3):
            asking = asyncio.ensure_future(ctx.progress(step / 3))
            await held.wait()
            asking.cancel()
        release.set()
        return "abc"

    monkeypatch.setattr(bench.store, "extend", extend)
    id_ = await bench.submit()
    async with bench.work(impatient):
        await bench.until_ended(id_)
    assert (await bench.said(id_))[2:] == ["progressed", "text_completed", "completed"]
    assert [one.n for one in await bench.entries(id_)] == [0, 0, 1, 2, 3]


async def test_an_answer_lost_on_its_way_is_asked_for_under_the_same_number(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench.store.extend

    async def extend(org: str, id_: str, batch: list[Said], **more: Any) -> Any:
        answer = await real(org, id_, batch, **more)
        if not all(one.duplicate for one in answer if isinstance(one, Appended)):
            raise Unavailable("The reply was lost.")
        return answer

    id_ = await bench.submit()
    monkeypatch.setattr(bench.store, "extend", extend)
    async with bench.work(hello):
        await bench.until_ended(id_)
    entries = await bench.entries(id_)
    assert [one.n for one in entries] == [0, 0, *range(1, len(entries) - 1)]
    assert (await bench.task(id_)).result == "Hello"


async def test_paused_again_in_the_moment_of_pausing_it_stays_paused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.submit()
    (claimed,) = await bench.store.claim(["default"], "w", 1)
    attempt = Attempt(bench.store, claimed, worker="w")
    context = Context(attempt)
    sent: list[events.AnyEvent] = []

    async def extend(org: str, id_: str, batch: list[Said], **more: Any) -> Any:
        sent.extend(one.event for one in batch)
        if len(sent) == 1:  # refused, for it was resumed; and paused again before the refusal was heard
            attempt.hear(Status.PAUSED, attempt.seq + 2)
        return [Conflict("A task that is running cannot be paused.", "running")]

    monkeypatch.setattr(bench.store, "extend", extend)
    attempt.hear(Status.PAUSED)
    await asyncio.wait_for(context.checkpoint("step"), 5)
    assert len(sent) == 2


async def test_an_attempt_that_is_over_is_not_stopped(bench: Bench) -> None:
    await bench.submit()
    (claimed,) = await bench.store.claim(["default"], "w", 1)
    attempt = Attempt(bench.store, claimed, worker="w")
    attempt.stop()
    assert not attempt.stopped
    attempt.lose("lease")
    attempt.hear(Status.CANCELLED, 9)
    assert attempt.lost == "lease"


async def test_a_task_comes_back_to_a_worker_whose_old_handler_still_ends(bench: Bench) -> None:
    started, cancelled, release = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @task("default")
    async def untidy(task: Task, ctx: Context) -> str | None:  # type: ignore[return]
        if ctx.attempt > 1:
            return "second"
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
            await release.wait()

    id_ = await bench.submit()
    async with bench.work(untidy, slots=2):
        await started.wait()
        await bench.say(id_, events.LeaseLost())
        done = await bench.until_ended(id_)
        await cancelled.wait()
        release.set()
    assert (done.result, done.attempt) == ("second", 2)


async def test_events_of_many_tasks_inside_a_handler_keep_their_numbers(bench: Bench) -> None:
    @task("default")
    async def crowd(task: Task, ctx: Context) -> str:
        await asyncio.gather(*(ctx.progress(number / 100) for number in range(100)))
        return ""

    id_ = await bench.submit()
    async with bench.work(crowd):
        await bench.until_ended(id_)
    entries = await bench.entries(id_)
    assert [one.n for one in entries] == [0, *range(102)]
    assert {one.event.fraction for one in entries if isinstance(one.event, events.Progressed)} == {
        number / 100 for number in range(100)
    }


async def test_a_deleted_task_refuses_without_a_warning(bench: Bench) -> None:
    id_ = await bench.submit()
    (claimed,) = await bench.store.claim(["default"], "w", 1)
    attempt = Attempt(bench.store, claimed, worker="w")
    await bench.store.delete(ORG, id_)
    with pytest.raises(Over, match="gone"):
        await attempt.append(TextDelta(text="late"))
    assert attempt.refused == 1


async def test_a_worker_that_is_killed_costs_an_attempt_and_nothing_else(tmp_path: Path) -> None:
    script = """
import asyncio, sys
from pathlib import Path
from app.settings import Settings
from app.store import open_store
from workers import Context, task
from workers.runtime import run

@task("default")
async def hang(task, ctx: Context) -> str:
    await ctx.delta("half ")
    await asyncio.Event().wait()

async def main():
    async with open_store(Settings(data=Path(sys.argv[1]), lease_seconds=1)) as store:
        await run(store, [hang], stop=asyncio.Event())

asyncio.run(main())
"""
    async with opened(tmp_path, lease_seconds=1) as store:
        bench = Bench(store)
        id_ = await bench.submit()
        root = Path(__file__).parents[2]
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, str(tmp_path / "data"), cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
        )
        try:
            await bench.until_said(id_, TextDelta)
        finally:
            child.kill()
            await child.wait()
        async with bench.work(hello):
            done = await bench.until_ended(id_)
        assert (done.result, done.attempt, done.max_attempts) == ("Hello", 2, 3)
        assert (await bench.said(id_))[:4] == ["submitted", "started", "text_delta", "lease_lost"]
        await bench.prove()


# Slots, queues, the stop


async def test_no_more_tasks_run_than_there_are_slots(bench: Bench) -> None:
    running, most, release = set[str](), 0, asyncio.Event()

    @task("default")
    async def counted(task: Task, ctx: Context) -> str:
        nonlocal most
        running.add(task.id)
        most = max(most, len(running))
        await release.wait()
        running.discard(task.id)
        return ""

    ids = [await bench.submit() for _ in range(6)]
    async with bench.work(counted, slots=2):
        await wait_until(lambda: len(running) == 2, "both slots are taken")
        assert [await bench.status(id_) for id_ in ids].count(Status.QUEUED) == 4
        release.set()
        await bench.until_ended(*ids)
    assert most == 2


async def test_a_free_slot_takes_a_new_task_at_once(bench: Bench) -> None:
    async with bench.work(hello):
        ids = [await bench.submit() for _ in range(5)]
        await bench.until_ended(*ids)
    for id_ in ids:
        task_ = await bench.task(id_)
        assert task_.started_at - task_.queued_at < 5_000_000


async def test_a_worker_serves_only_the_queues_it_is_limited_to(bench: Bench) -> None:
    @task("a", "b")
    async def both(task: Task, ctx: Context) -> str:
        return task.queue

    a, b = await bench.submit(queue="a"), await bench.submit(queue="b")
    async with bench.work(both, queues=["b"]):
        assert (await bench.until_ended(b)).result == "b"
        assert await bench.status(a) is Status.QUEUED


def test_queues_and_handlers_must_fit_each_other() -> None:
    @task("a", "b")
    async def one(task: Task, ctx: Context) -> None: ...

    @task("b")
    async def two(task: Task, ctx: Context) -> None: ...

    assert by_queue([one, two], ["a"]) == {"a": one}
    with pytest.raises(Misconfigured, match=r"queue b is served twice: by .*one and by .*two"):
        by_queue([one, two])
    with pytest.raises(Misconfigured, match="serves the queue c"):
        by_queue([one], ["a", "c"])
    with pytest.raises(Misconfigured, match="no worker"):
        by_queue([])


async def test_a_worker_without_slots_is_refused(bench: Bench) -> None:
    with pytest.raises(Misconfigured, match="at least one slot"):
        await run(bench.store, [hello], stop=asyncio.Event(), slots=0)


async def test_a_stopping_worker_lets_its_handlers_end(bench: Bench, logs: Logs) -> None:
    started, go = asyncio.Event(), asyncio.Event()

    @task("default")
    async def brief(task: Task, ctx: Context) -> str:
        started.set()
        await go.wait()
        await ctx.delta("x")
        return "done"

    id_ = await bench.submit()
    async with opened_beside(bench, grace_seconds=20) as store, bench.work(brief, store=store) as working:
        await started.wait()
        stopping = asyncio.create_task(working.stop())
        await wait_until(lambda: said_in(logs, "worker.draining"), "the worker drains")
        later = await bench.submit()
        go.set()
        await stopping
    assert (await bench.task(id_)).result == "done"
    assert await bench.status(later) is Status.QUEUED


async def test_a_stopping_worker_gives_back_what_does_not_end_and_no_attempt_is_used_up(bench: Bench) -> None:
    started, ended = asyncio.Event(), asyncio.Event()
    id_ = await bench.submit(max_attempts=1)
    async with (
        opened_beside(bench, grace_seconds=0.1) as store,
        bench.work(hanging(started, ended), store=store) as working,
    ):
        await started.wait()
        await working.stop()
    assert ended.is_set()
    given_back = await bench.task(id_)
    assert (given_back.status, given_back.attempt, given_back.attempts_left) == (Status.QUEUED, 1, 1)
    async with bench.work(hello):
        done = await bench.until_ended(id_)
    assert (done.status, done.attempt) == (Status.COMPLETED, 2)
    await bench.prove()


async def test_handlers_hear_of_the_stop_while_a_claim_hangs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    started, ended, answer = asyncio.Event(), asyncio.Event(), asyncio.Event()
    claims = 0
    id_ = await bench.submit()
    async with opened_beside(bench, grace_seconds=0.1) as store:
        real = store.claim

        async def claim(queues: list[str], worker: str, free: int) -> list[Claimed]:
            nonlocal claims
            claims += 1
            if claims == 1:
                return await real(queues, worker, free)
            await answer.wait()
            return []

        monkeypatch.setattr(store, "claim", claim)
        async with bench.work(hanging(started, ended), store=store, slots=2) as working:
            await started.wait()
            assert claims == 2
            stopping = asyncio.create_task(working.stop())
            try:
                await wait_until(ended.is_set, "the handler is cancelled")
                assert await bench.until(id_, Status.QUEUED)
                assert not stopping.done()
            finally:
                answer.set()
            await stopping
    assert (await bench.task(id_)).refunds == 1


async def test_a_stopping_worker_does_not_wait_for_a_pause_to_end(bench: Bench) -> None:
    @task("default")
    async def stepwise(task: Task, ctx: Context) -> str:
        while True:
            await ctx.checkpoint("step", {"step": 1})

    id_ = await bench.submit()
    async with opened_beside(bench, grace_seconds=600) as store, bench.work(stepwise, store=store) as working:
        await bench.until(id_, Status.RUNNING)
        await bench.say(id_, events.PauseAsked())
        await bench.until_said(id_, events.Paused)
        await asyncio.wait_for(working.stop(), 10)
    held = await bench.task(id_)
    assert (held.status, held.checkpoint, held.refunds) == (Status.HELD, {"step": 1}, 1)


async def test_what_is_claimed_while_the_worker_stops_is_given_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = asyncio.Event()
    real = bench.store.claim

    async def claim(queues: list[str], worker: str, free: int) -> list[Claimed]:
        stop.set()
        return await real(queues, worker, free)

    monkeypatch.setattr(bench.store, "claim", claim)
    id_ = await bench.submit()
    await run(bench.store, [hello], stop=stop)
    assert await bench.said(id_) == ["submitted", "started", "requeued"]


async def test_claims_go_on_after_errors_of_the_store(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, logs: Logs
) -> None:
    real, errors = bench.store.claim, [RuntimeError("a bug"), Unavailable("away")]

    async def claim(queues: list[str], worker: str, free: int) -> list[Claimed]:
        if errors:
            raise errors.pop()
        return await real(queues, worker, free)

    async def tick() -> int:
        raise Unavailable("away") if errors else RuntimeError("a bug")

    monkeypatch.setattr(bench.store, "claim", claim)
    monkeypatch.setattr(bench.store.queues, "tick", tick)
    monkeypatch.setattr("workers.runtime.PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("workers.runtime.TICK_SECONDS", 0.01)
    id_ = await bench.submit()
    async with bench.work(hello):
        done = await bench.until_ended(id_)
        await wait_until(lambda: said_in(logs, "ticker.failed"), "the ticker failed")
    assert done.status is Status.COMPLETED
    assert said_in(logs, "ticker.waiting")
    assert said_in(logs, "worker.waiting")
    assert said_in(logs, "worker.claim_failed")


async def test_a_bug_of_ours_leaves_the_task_to_its_lease(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, logs: Logs
) -> None:
    async def extend(org: str, id_: str, batch: list[Said], **more: Any) -> Any:
        raise RuntimeError("a bug")

    id_ = await bench.submit(max_attempts=1)
    async with opened_beside(bench, lease_seconds=SHORT_SECONDS) as store:
        monkeypatch.setattr(store, "extend", extend)
        async with bench.work(hello, store=store):
            done = await bench.until_ended(id_)
    assert (done.status, done.error) == (Status.ERRORED, "The worker stopped answering (once).")
    assert said_in(logs, "attempt.broken")


# Modules


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the path of a command that was not started in it."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder


HELLO = """
from workers import task

@task("{queue}")
async def hello(task, ctx):
    return "hello"
"""


def test_modules_are_found_in_the_current_folder_which_comes_last(folder: Path) -> None:
    (folder / "hello_module.py").write_text(HELLO.format(queue="hello"))
    (folder / "again_module.py").write_text("from hello_module import hello, task")
    (folder / "json.py").write_text("raise SystemError('the wrong json')")
    (one,) = load(["hello_module", "again_module"])
    assert one.queues == ("hello",)
    assert one.name == "hello_module.hello"
    assert sys.path[-1] == str(folder)
    (echo,) = load(["workers.echo"])
    assert "agent:echo" in echo.queues


def test_what_cannot_be_loaded_is_told_in_a_sentence(folder: Path) -> None:
    (folder / "app.py").write_text(HELLO.format(queue="q"))
    (folder / "empty_module.py").write_text("")
    (folder / "needy_module.py").write_text("import no_such_package_at_all")
    (folder / "broken_module.py").write_text("def f(:")
    for module, sentence_ in (
        ("app", "cannot be called app"),
        ("app.workers", "cannot be called app.workers"),
        ("workers", "cannot be called workers"),
        ("workers.mine", "no module workers.mine"),
        ("nowhere", "no module nowhere"),
        ("nowhere.to.be_found", "no module nowhere.to.be_found"),
        ("empty_module.py", r"no module empty_module.py.* Did you mean empty_module\?"),
        ("empty_module", "has no worker"),
        ("needy_module", "needs no_such_package_at_all, which is not installed"),
        ("broken_module", "cannot be imported: SyntaxError"),
    ):
        with pytest.raises(Misconfigured, match=sentence_):
            load([module])


def test_an_error_without_text_is_its_name() -> None:
    assert sentence(ValueError()) == "ValueError"
    assert sentence(Conflict("x")) == "Conflict: x"
    assert sentence(OutOfOrder("y")) == "OutOfOrder: y"
    assert sentence(Invalid("z")) == "Invalid: z"


def test_a_worker_fills_its_last_slots_too(tmp_path: Path) -> None:
    """On the loop of production, whose clock is coarser than its timers, and often: it once waited for ever in one of five."""
    running = 0
    go = asyncio.Event()

    @task("default")
    async def holds(_: Task, __: Context) -> None:
        nonlocal running
        running += 1
        await go.wait()
        running -= 1

    async def rounds() -> None:
        async with opened(tmp_path) as store:
            bench = Bench(store)
            async with bench.work(holds, slots=10):
                for _ in range(12):
                    go.clear()
                    ids = await asyncio.gather(*(bench.submit() for _ in range(12)))
                    await wait_until(lambda: running == 10, "all slots are taken")
                    go.set()
                    for id_ in ids:
                        await bench.until(id_, Status.COMPLETED)
                    await wait_until(lambda: running == 0, "all have ended")

    uvloop.run(rounds())
