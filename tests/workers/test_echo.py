"""The demo worker: what goes in comes out, in pieces, and each of its switches does what it says."""

import asyncio

import pytest

from app import events
from app.events import TextDelta
from app.task import Status
from tests.workers.conftest import Bench
from workers.echo import STEPS_MAX, WORD, Pace, echo
from workers.handlers import by_queue


async def deltas(bench: Bench, id_: str) -> list[str]:
    return [one.event.text for one in await bench.entries(id_) if isinstance(one.event, TextDelta)]


@pytest.mark.parametrize("query", ["one two  three\n", "  leading", "word", " ", "a\u2028b\u00a0c 🎈\tz", ""])
def test_words_joined_are_the_text(query: str) -> None:
    assert "".join(WORD.findall(query)) == query


async def test_a_query_comes_back_word_by_word_with_its_usage(bench: Bench) -> None:
    id_ = await bench.submit("to be, or  not to be")
    async with bench.work(echo):
        task = await bench.until_ended(id_)
    assert (task.status, task.result, task.result_type) == (Status.COMPLETED, "to be, or  not to be", "text")
    assert (task.model, task.provider, task.cost_nano) == ("echo-1", "taskcast", 0)
    assert (task.input_tokens, task.output_tokens) == (6, 6)
    assert await deltas(bench, id_) == ["to ", "be, ", "or  ", "not ", "to ", "be"]
    said = await bench.said(id_)
    assert said[:3] == ["submitted", "started", "agent_started"]
    assert said[3:-3] == ["text_delta"] * 6
    assert said[-3:] == ["text_completed", "agent_completed", "completed"]
    assert {one.event.agent for one in await bench.entries(id_)} == {"", "echo", "final_output"}
    await bench.prove()


async def test_steps_divide_the_words_and_report_progress(bench: Bench) -> None:
    few = await bench.submit("a b c d e", context={"echo": {"steps": 2}})
    many = await bench.submit("a b", context={"echo": {"steps": 4, "delay_ms": 1}})
    async with bench.work(echo):
        await bench.until_ended(few, many)
    assert await deltas(bench, few) == ["a b ", "c d e"]
    assert await deltas(bench, many) == ["a ", "b"]
    fractions = [one.event.fraction for one in await bench.entries(many) if isinstance(one.event, events.Progressed)]
    assert fractions == [0.25, 0.5, 0.75, 1]


async def test_a_long_query_takes_a_bounded_number_of_steps(bench: Bench) -> None:
    query = "word " * 3000
    id_ = await bench.submit(query)
    async with bench.work(echo):
        task = await bench.until_ended(id_)
    assert task.result == query
    assert len(await deltas(bench, id_)) == STEPS_MAX
    assert task.output_tokens == 3000


async def test_a_query_that_no_text_can_hold_fails_with_a_sentence(bench: Bench) -> None:
    id_ = await bench.submit("x" * 200_000)
    async with bench.work(echo):
        task = await bench.until_ended(id_)
    assert (task.status, task.error) == (Status.FAILED, "The query has 200000 bytes; an echo has room for 195584.")


async def test_an_empty_query_is_an_empty_answer(bench: Bench) -> None:
    id_ = await bench.submit("")
    async with bench.work(echo):
        task = await bench.until_ended(id_)
    assert (task.status, task.result) == (Status.COMPLETED, "")


async def test_it_fails_with_the_message_it_was_given(bench: Bench) -> None:
    id_ = await bench.submit("a b", context={"echo": {"fail": "The disk is full."}})
    async with bench.work(echo):
        task = await bench.until_ended(id_)
    assert (task.status, task.error) == (Status.FAILED, "The disk is full.")
    assert await deltas(bench, id_) == ["a ", "b"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"steps": 1001}, "context.echo.steps: Input should be less than or equal to 1000"),
        ({"steps": 0}, "context.echo.steps: Input should be greater than or equal to 1"),
        ({"delay_ms": 60_001}, "context.echo.delay_ms: Input should be less than or equal to 60000"),
        ({"stepz": 1}, "context.echo.stepz: Extra inputs are not permitted"),
        (True, "context.echo: Input should be a valid dictionary"),
    ],
)
async def test_a_wrong_switch_fails_the_task_with_its_name(bench: Bench, asked: object, sentence: str) -> None:
    id_ = await bench.submit(context={"echo": asked, "other": 1})
    async with bench.work(echo):
        task = await bench.until_ended(id_)
    assert task.status is Status.FAILED
    assert sentence in task.error


async def test_paused_between_steps_it_goes_on_where_it_was(bench: Bench) -> None:
    id_ = await bench.submit("a b c d", context={"echo": {"delay_ms": 200}})
    async with bench.work(echo):
        await bench.until_said(id_, TextDelta)
        await bench.say(id_, events.PauseAsked())
        await bench.until_said(id_, events.Paused)
        step = (await bench.task(id_)).checkpoint["step"]
        assert len(await deltas(bench, id_)) == step
        await bench.say(id_, events.Resumed())
        task = await bench.until_ended(id_)
    assert (task.result, task.attempt) == ("a b c d", 1)
    assert await deltas(bench, id_) == ["a ", "b ", "c ", "d"]


async def test_resumed_after_its_worker_is_gone_it_says_the_whole_text_again(bench: Bench) -> None:
    id_ = await bench.submit("a b c d", context={"echo": {"delay_ms": 200}})
    async with bench.work(echo) as first:
        await bench.until_said(id_, TextDelta)
        await bench.say(id_, events.PauseAsked())
        await bench.until_said(id_, events.Paused)
        await first.stop()
    await bench.until(id_, Status.HELD)
    await bench.say(id_, events.Resumed())
    async with bench.work(echo):
        task = await bench.until_ended(id_)
    assert (task.result, task.attempt) == ("a b c d", 2)
    second = [one for one in await bench.entries(id_) if one.attempt == 2 and isinstance(one.event, TextDelta)]
    assert len(second) == 4
    await bench.prove()


def test_it_can_be_limited_to_its_own_agent() -> None:
    assert set(by_queue([echo])) == {"default", "agent:echo"}
    assert set(by_queue([echo], ["agent:echo"])) == {"agent:echo"}


async def test_limited_to_its_own_agent_it_leaves_the_default_queue_alone(bench: Bench) -> None:
    other = await bench.submit()
    id_ = await bench.submit(queue="agent:echo", agent="echo")
    async with bench.work(echo, queues=["agent:echo"]):
        await bench.until_ended(id_)
        assert await bench.status(other) is Status.QUEUED


def test_the_longest_pace_is_bounded() -> None:
    pace = Pace(steps=1000, delay_ms=60_000)
    assert (pace.steps, pace.delay_ms) == (1000, 60_000)


async def test_a_cancelled_echo_stops_at_once(bench: Bench) -> None:
    id_ = await bench.submit("a b", context={"echo": {"delay_ms": 60_000}})
    async with bench.work(echo) as working:
        await bench.until_said(id_, events.AgentStarted)
        await bench.say(id_, events.Cancelled())
        await asyncio.wait_for(working.stop(), 10)
    assert await bench.status(id_) is Status.CANCELLED
