"""The real client: `shannon-sdk` 0.7.0, unmodified, against the real server and a real worker (contract §1.19, §2.6).

What it shows of text, of errors and of a broken connection is what its users see, so the tests look through it, and
through nothing else.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from shannon import AsyncShannonClient, EventType, ShannonClient, TaskStatusEnum, errors  # type: ignore[import-untyped]
from shannon.models import Event, TaskHandle  # type: ignore[import-untyped]
from websockets.exceptions import InvalidStatus

from app import events
from app.settings import Settings
from app.store import Store, open_store
from tests.api.serving import ORG, Attempt, submit
from tests.system.conftest import KEY, Api, Server, history, proxy
from tests.waiting import wait_until

QUERY = "What is an event log good for?"
POLL_SECONDS = 0.05
ACTIVITY = ["AGENT_STARTED", *["thread.message.delta"] * len(QUERY.split()), "thread.message.completed"]
LIFE = ["DATA_PROCESSING", "WORKFLOW_STARTED", *ACTIVITY, "AGENT_COMPLETED", "WORKFLOW_COMPLETED", "done"]
"""What a stream tells of an echoed task."""
RAW = {"thread.message.delta": "LLM_PARTIAL", "thread.message.completed": "LLM_OUTPUT", "done": "STREAM_END"}


def slow(steps: int, delay_ms: int, fail: str = "") -> dict[str, object]:
    """The context that makes the echo worker take its time."""
    return {"echo": {"steps": steps, "delay_ms": delay_ms, "fail": fail}}


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncShannonClient]:
    async with AsyncShannonClient(server.url, api_key=KEY) as made:
        yield made


@pytest.fixture
def blocking(server: Server) -> Iterator[ShannonClient]:
    """With a loop of our own: the SDK makes one otherwise, and never closes it."""
    with asyncio.Runner() as runner:
        asyncio.set_event_loop(runner.get_loop())
        with ShannonClient(server.url, api_key=KEY) as made:
            yield made
    asyncio.set_event_loop(None)


async def streamed(client: AsyncShannonClient, id_: str, **options: object) -> list[Event]:
    return [event async for event in client.stream(id_, **options)]


async def finished(client: AsyncShannonClient, query: str = QUERY, **options: object) -> TaskHandle:
    handle = await client.submit_task(query, **options)
    await client.wait(handle.task_id, timeout=20, poll_interval=POLL_SECONDS)
    return handle


async def has_status(client: AsyncShannonClient, id_: str, wanted: TaskStatusEnum) -> bool:
    return (await client.get_status(id_)).status is wanted


def test_the_sdk_is_the_one_that_the_contract_describes() -> None:
    assert version("shannon-sdk") == "0.7.0"


# Submit, wait, get


async def test_a_task_is_submitted_waited_for_and_read(client: AsyncShannonClient) -> None:
    before = datetime.now(UTC)
    handle = await client.submit_task(QUERY, mode="standard", model_tier="small", context={"role": "tester"})
    assert re.fullmatch(r"[A-Za-z0-9:_.-]{1,128}", handle.task_id)
    assert handle.workflow_id == handle.task_id
    assert uuid.UUID(handle.session_id)
    done = await client.wait(handle.task_id, timeout=20, poll_interval=POLL_SECONDS)
    assert done.status is TaskStatusEnum.COMPLETED
    assert done.task_id == done.workflow_id == handle.task_id
    assert (done.query, done.result, done.error_message) == (QUERY, QUERY, "")
    assert (done.session_id, done.mode) == (handle.session_id, "EXECUTION_MODE_STANDARD")
    assert (done.model_used, done.provider, done.progress) == ("echo-1", "taskcast", 1.0)
    assert done.context == {"role": "tester", "model_tier": "small"}
    words = len(QUERY.split())
    assert done.usage == {
        "total_tokens": 2 * words,
        "input_tokens": words,
        "output_tokens": words,
        "estimated_cost": 0.0,
        "cost_usd": 0.0,
    }
    # The server's clock is this machine's, except for fractions.
    assert before - timedelta(seconds=1) < done.created_at < done.updated_at < datetime.now(UTC) + timedelta(seconds=1)
    assert await client.get_status(handle.task_id) == done


async def test_an_agent_is_executed_waited_for_listed_and_read(
    client: AsyncShannonClient, http: httpx.AsyncClient
) -> None:
    with pytest.raises(errors.ShannonError) as raised:
        await client.get_agent("never-used")
    assert (str(raised.value.message), raised.value.code) == ("Agent not found", "404")
    known = {agent.id for agent in await client.list_agents()}
    assert "never-used" not in known
    execution = await client.execute_agent("echo", {"query": QUERY, "depth": 2}, session_id="of-an-agent")
    assert (execution.agent_id, execution.status, execution.session_id) == ("echo", "STATUS_CODE_OK", "of-an-agent")
    assert execution.workflow_id == execution.task_id
    done = await client.wait(execution.task_id, timeout=20, poll_interval=POLL_SECONDS)
    assert (done.result, done.query, done.context) == (QUERY, QUERY, {"query": QUERY, "depth": 2})
    assert execution.created_at == done.created_at
    assert [event.type for event in await streamed(client, execution.workflow_id)] == LIFE
    without_question = await client.execute_agent("echo", {"symbol": "TSLA"}, stream=True)
    done = await client.wait(without_question.task_id, timeout=20, poll_interval=POLL_SECONDS)
    assert (done.result, done.session_id) == ('{"symbol":"TSLA"}', without_question.session_id)
    (found,) = [agent for agent in await client.list_agents() if agent.id == "echo"]
    assert found == await client.get_agent("echo")
    assert (found.name, found.description, found.input_schema, found.cost_per_call) == ("echo", "", {}, 0.0)
    assert (await http.get("/api/v1/agents/echo")).json()["queue"] == "agent:echo"


def test_an_agent_is_executed_by_the_blocking_client(blocking: ShannonClient) -> None:
    execution = blocking.execute_agent("echo", {"text": QUERY})
    # Not by its own `wait`: what it holds is the other client, whose coroutine nobody would run.
    assert blocking.wait(execution.task_id, timeout=20, poll_interval=POLL_SECONDS).result == QUERY
    assert blocking.get_agent("echo") in blocking.list_agents()


async def test_a_bearer_token_is_as_good_as_an_api_key(server: Server) -> None:
    async with AsyncShannonClient(server.url, bearer_token=KEY) as client:
        handle = await finished(client)
        assert [event.type for event in await streamed(client, handle.task_id)] == LIFE


async def test_an_idempotency_key_makes_one_task(client: AsyncShannonClient) -> None:
    key = uuid.uuid4().hex
    handles = await asyncio.gather(*(client.submit_task(QUERY, idempotency_key=key) for _ in range(5)))
    assert len({(handle.task_id, handle.session_id) for handle in handles}) == 1
    with pytest.raises(errors.ConnectionError) as raised:
        await client.submit_task("Something else", idempotency_key=key)
    assert raised.value.code == "409"


async def test_failure_and_timeout_are_told_with_their_reason(
    client: AsyncShannonClient, http: httpx.AsyncClient
) -> None:
    failing = await client.submit_task(QUERY, context=slow(1, 0, "The model is on holiday."))
    failed = await client.wait(failing.task_id, timeout=20, poll_interval=POLL_SECONDS)
    assert (failed.status, failed.error_message, failed.result) == (
        TaskStatusEnum.FAILED,
        "The model is on holiday.",
        None,
    )
    told = await streamed(client, failing.task_id)
    assert [(event.type, event.message) for event in told[-2:]] == [
        ("ERROR_OCCURRED", "The model is on holiday."),
        ("done", "[DONE]"),
    ]
    # The SDK cannot ask for a deadline; whoever reads the task through it sees one all the same.
    body = {"query": QUERY, "context": slow(1, 60_000), "timeout_seconds": 1}
    late = (await http.post("/api/v1/tasks", json=body)).json()["task_id"]
    timed_out = await client.wait(late, timeout=20, poll_interval=POLL_SECONDS)
    assert timed_out.status is TaskStatusEnum.TIMEOUT
    assert timed_out.error_message


async def test_waiting_gives_up_after_its_timeout(client: AsyncShannonClient) -> None:
    handle = await client.submit_task(QUERY, context=slow(1, 60_000))
    with pytest.raises(errors.TaskTimeoutError):
        await client.wait(handle.task_id, timeout=0.2, poll_interval=POLL_SECONDS)
    assert await client.cancel(handle.task_id)


# Lists


async def test_a_session_of_tasks_is_listed_newest_first(client: AsyncShannonClient) -> None:
    session = f"list-{uuid.uuid4()}"
    handles = [await finished(client, f"{QUERY} {number}", session_id=session) for number in range(3)]
    failing = await finished(client, session_id=session, context=slow(1, 0, "no"))
    tasks, total = await client.list_tasks(session_id=session)
    assert total == 4
    assert [task.task_id for task in tasks] == [failing.task_id, *(handle.task_id for handle in reversed(handles))]
    assert [task.status for task in tasks] == ["TASK_STATUS_FAILED", *["TASK_STATUS_COMPLETED"] * 3]
    oldest = tasks[-1]
    assert (oldest.query, oldest.mode) == (f"{QUERY} 0", "EXECUTION_MODE_SIMPLE")
    assert oldest.created_at < oldest.completed_at
    assert oldest.total_token_usage.total_tokens == 2 * (len(QUERY.split()) + 1)
    page, total = await client.list_tasks(session_id=session, limit=2, offset=1)
    assert total == 4
    assert [task.task_id for task in page] == [handles[2].task_id, handles[1].task_id]
    completed, total = await client.list_tasks(session_id=session, status="COMPLETED")
    assert total == 3
    assert {task.task_id for task in completed} == {handle.task_id for handle in handles}
    assert failing.task_id in {task.task_id for task in (await client.list_tasks(status="failed", limit=100))[0]}


async def test_events_and_timeline_of_a_task_are_kept(client: AsyncShannonClient) -> None:
    handle = await finished(client)
    events = await client.get_task_events(handle.task_id)
    kept = [RAW.get(type_, type_) for type_ in LIFE if type_ not in {"thread.message.delta", "done"}]
    assert [event.type for event in events] == kept
    assert all(event.workflow_id == handle.task_id and event.timestamp.tzinfo and event.stream_id for event in events)
    assert [event.seq for event in events] == sorted({event.seq for event in events})
    assert [event.message for event in events if event.type == "LLM_OUTPUT"] == [QUERY]
    timeline = await client.get_task_timeline(handle.task_id)
    assert timeline["workflow_id"] == handle.task_id
    assert timeline["stats"]["total"] == len(timeline["events"]) > 0
    assert timeline["events"][-1]["type"] == "WORKFLOW_COMPLETED"


# Streams


async def test_the_text_of_a_task_is_visible_while_it_runs(client: AsyncShannonClient) -> None:
    words = len(QUERY.split())
    handle, url = await client.submit_and_stream(QUERY, context=slow(words * 10, 50))
    assert url == f"/api/v1/stream/sse?workflow_id={handle.task_id}"
    text = ""
    async with aclosing(client.stream(handle.workflow_id)) as events:
        async for event in events:
            text += event.message if event.type == "thread.message.delta" else ""
            if len(text.split()) == 2:
                break
    assert await has_status(client, handle.task_id, TaskStatusEnum.RUNNING)
    assert QUERY.startswith(text)
    assert await client.cancel(handle.task_id)


async def test_a_stream_tells_everything_once_and_ends(client: AsyncShannonClient) -> None:
    handle = await client.submit_task(QUERY)
    live = await streamed(client, handle.task_id)
    assert [event.type for event in live] == LIFE
    *entries, done = live
    assert [event.seq for event in entries] == list(range(1, len(entries) + 1))
    assert (done.type, done.message) == (EventType.STREAM_END.value, "[DONE]")
    assert "".join(event.message for event in live if event.type == "thread.message.delta") == QUERY
    # What its users show, and what upstream leaves empty there.
    assert [event.message for event in live if event.type == "thread.message.completed"] == [QUERY]
    # After the end it tells the same.
    again = await streamed(client, handle.task_id)
    assert [(event.type, event.id, event.message) for event in again] == [
        (event.type, event.id, event.message) for event in live
    ]


@pytest.mark.parametrize("place", ["stream_id", "seq"])
async def test_a_stream_resumes_behind_any_event(client: AsyncShannonClient, place: str) -> None:
    handle = await finished(client)
    *entries, _ = await streamed(client, handle.task_id)
    for number, event in enumerate(entries):
        rest = await streamed(client, handle.task_id, last_event_id=str(getattr(event, place)))
        assert [event.id for event in rest[:-1]] == [event.id for event in entries[number + 1 :]]
        assert rest[-1].type == "done"


async def test_a_stream_resumed_behind_its_end_only_ends(client: AsyncShannonClient) -> None:
    """`event.id` of the last event is what a user keeps; contract §11: `done` at once."""
    handle = await finished(client)
    *_, done = await streamed(client, handle.task_id)
    rest = await streamed(client, handle.task_id, last_event_id=done.id, reconnect=False)
    assert [event.type for event in rest] == ["done"]


async def test_a_stream_can_be_filtered_by_the_sdks_own_types(client: AsyncShannonClient) -> None:
    handle = await finished(client)
    for asked, expected in (
        ([EventType.THREAD_MESSAGE_DELTA], ["thread.message.delta"] * len(QUERY.split())),
        ([EventType.LLM_PARTIAL], ["thread.message.delta"] * len(QUERY.split())),
        (["WORKFLOW_STARTED", EventType.WORKFLOW_COMPLETED], ["WORKFLOW_STARTED", "WORKFLOW_COMPLETED"]),
        ([EventType.STREAM_END], []),
        ([EventType.WORKFLOW_PAUSED], []),
    ):
        told = await streamed(client, handle.task_id, types=asked)
        assert [event.type for event in told] == [*expected, "done"]


async def test_a_stream_that_breaks_goes_on_where_it_was(client: AsyncShannonClient, server: Server) -> None:
    handle = await client.submit_task(QUERY, context=slow(60, 25))
    # In the middle of the task; the SDK then waits for two seconds, and the task goes on without it.
    async with proxy(server.port, [3000]) as network:
        told = await streamed(AsyncShannonClient(network.url, api_key=KEY), handle.task_id)
        assert (network.cut, network.streams) == (1, 2)
    *entries, done = told
    assert done.type == "done"
    assert [event.seq for event in entries] == list(range(1, len(entries) + 1))
    assert "".join(event.message for event in told if event.type == "thread.message.delta") == QUERY


async def test_a_server_that_stops_sends_its_streams_away_and_they_come_back(
    client: AsyncShannonClient, api: Api, http: httpx.AsyncClient
) -> None:
    handle = await client.submit_task(QUERY, context=slow(50, 50))
    told: list[Event] = []

    async def read() -> None:
        async for event in AsyncShannonClient(api.url, api_key=KEY).stream(handle.task_id):
            told.append(event)  # noqa: PERF401 (it is looked at meanwhile)

    reading = asyncio.create_task(read())
    await wait_until(lambda: len(told) > 10, "the stream is in the middle of the task")
    await asyncio.to_thread(api.stop)
    assert not reading.done(), "the stream was not ended, but broken off"
    await asyncio.to_thread(api.start)
    await reading
    assert told[-1].type == "done"
    assert [event.seq for event in told[:-1]] == [event["seq"] for event in await history(http, handle.task_id)]


async def test_a_stream_of_nothing_ends_and_one_without_a_key_fails(client: AsyncShannonClient, server: Server) -> None:
    assert await streamed(client, "task_that_never_was") == []
    stranger = AsyncShannonClient(server.url, api_key="sk_wrong")
    with pytest.raises(errors.ConnectionError, match="HTTP 401"):
        await streamed(stranger, "task_that_never_was", reconnect=False)


async def test_a_websocket_tells_the_raw_events_and_ends(client: AsyncShannonClient) -> None:
    handle = await client.submit_task(QUERY)
    live = [event async for event in client.stream_ws(handle.task_id)]
    assert [event.type for event in live] == [RAW.get(type_, type_) for type_ in LIFE]
    *entries, _ = live
    assert [event.seq for event in entries] == list(range(1, len(entries) + 1))
    assert "".join(event.message for event in live if event.type == "LLM_PARTIAL") == QUERY
    rest = [event async for event in client.stream_ws(handle.task_id, last_event_id=entries[4].id)]
    assert [event.id for event in rest] == [event.id for event in live[5:]]
    outputs = [event async for event in client.stream_ws(handle.task_id, types=[EventType.LLM_OUTPUT])]
    assert [event.message for event in outputs if event.type == "LLM_OUTPUT"] == [QUERY]
    assert {event.type for event in outputs} <= {"LLM_OUTPUT", "STREAM_END"}


async def test_a_websocket_is_refused_without_a_key(server: Server, client: AsyncShannonClient) -> None:
    stranger = AsyncShannonClient(server.url, api_key="sk_wrong")
    for asker, id_, code in ((stranger, "task_that_never_was", 401), (client, "task_that_never_was", 404)):
        with pytest.raises(InvalidStatus) as raised:
            [event async for event in asker.stream_ws(id_)]
        assert raised.value.response.status_code == code


# Controls


async def test_a_task_is_cancelled_once_and_at_once(client: AsyncShannonClient, http: httpx.AsyncClient) -> None:
    handle = await client.submit_task(QUERY, context=slow(100, 100))
    watching = asyncio.create_task(streamed(client, handle.task_id))
    await wait_until(lambda: has_status(client, handle.task_id, TaskStatusEnum.RUNNING), "the task runs")
    assert await client.cancel(handle.task_id, reason="changed my mind") is True
    assert await has_status(client, handle.task_id, TaskStatusEnum.CANCELLED)
    assert await client.cancel(handle.task_id) is False
    state = await client.get_control_state(handle.task_id)
    assert (state.is_cancelled, state.is_paused, state.cancel_reason) == (True, False, "changed my mind")
    assert state.cancelled_by
    types = [event.type for event in await watching]
    assert types[-3:] == ["workflow.cancelling", "workflow.cancelled", "done"]
    # The worker was told: nothing follows the end.
    log = await history(http, handle.task_id)
    assert log[-1]["type"] == "WORKFLOW_CANCELLED"
    assert (await client.get_status(handle.task_id)).result is None


async def test_a_task_is_paused_and_resumed(client: AsyncShannonClient) -> None:
    handle = await client.submit_task(QUERY, context=slow(100, 30))
    watching = asyncio.create_task(streamed(client, handle.task_id))
    await wait_until(lambda: has_status(client, handle.task_id, TaskStatusEnum.RUNNING), "the task runs")
    fresh = await client.get_control_state(handle.task_id)
    assert (fresh.is_paused, fresh.is_cancelled, fresh.paused_at) == (False, False, None)
    before = datetime.now(UTC)
    assert await client.pause_task(handle.task_id, reason="lunch") is True
    assert await has_status(client, handle.task_id, TaskStatusEnum.PAUSED)
    state = await client.get_control_state(handle.task_id)
    assert (state.is_paused, state.pause_reason) == (True, "lunch")
    assert state.paused_by
    assert abs(state.paused_at - before) < timedelta(seconds=5)
    with pytest.raises(errors.ConnectionError) as raised:
        await client.pause_task(handle.task_id)
    assert raised.value.code == "409"

    async def at_a_checkpoint() -> bool:
        return "WORKFLOW_PAUSED" in {event.type for event in await client.get_task_events(handle.task_id)}

    await wait_until(at_a_checkpoint, "the worker waits at a checkpoint")
    assert await client.resume_task(handle.task_id) is True
    with pytest.raises(errors.ConnectionError) as raised:
        await client.resume_task(handle.task_id)
    assert raised.value.code == "409"
    assert not (await client.get_control_state(handle.task_id)).is_paused
    done = await client.wait(handle.task_id, timeout=20, poll_interval=POLL_SECONDS)
    assert (done.status, done.result) == (TaskStatusEnum.COMPLETED, QUERY)
    types = [event.type for event in await watching]
    assert [type_ for type_ in types if type_.startswith("workflow.")] == [
        EventType.WORKFLOW_PAUSING,
        EventType.WORKFLOW_PAUSED,
        EventType.WORKFLOW_RESUMED,
    ]
    with pytest.raises(errors.ConnectionError) as raised:
        await client.pause_task(handle.task_id)
    assert raised.value.code == "409"


# Approvals, reviews


async def waiting(store: Store, queue: str, event: events.AnyEvent) -> tuple[str, Attempt]:
    """A task whose worker, which is this test, waits for a human."""
    id_ = await submit(store, queue=queue, query=QUERY)
    (claimed,) = await store.claim([queue], "test", 1)
    attempt = Attempt(store, id_, claimed.fence)
    await attempt.say(event)
    return id_, attempt


async def replan(store: Store, id_: str, attempt: Attempt) -> None:
    """The worker's side of a review: once there is feedback, it makes the second plan."""

    async def told() -> bool:
        found = await store.get(ORG, id_)
        return found is not None and not found.waits

    await wait_until(told, "the feedback is there")
    await attempt.say(events.ReviewRequested(plan="1. Ask twice.", version=2, round=2))


async def test_an_approval_is_given_and_denied(client: AsyncShannonClient, shared: Store) -> None:
    asked = events.ApprovalRequested(approval="ap1", reason="Deploy?", payload={"risk": "high"})
    id_, attempt = await waiting(shared, "sdk-approvals", asked)
    watching = asyncio.create_task(streamed(client, id_))
    assert await has_status(client, id_, TaskStatusEnum.PAUSED)
    assert await client.approve("ap1", id_, feedback="Go.") is True
    assert await client.approve("ap1", id_) is True  # a repeat
    with pytest.raises(errors.ConnectionError) as raised:
        await client.approve("ap1", id_, approved=False)
    assert raised.value.code == "409"
    await attempt.say(events.ApprovalRequested(approval="ap2", reason="Really?"))
    assert await client.approve("ap2", id_, approved=False) is True
    with pytest.raises(errors.ShannonError) as raised:
        await client.approve("ap3", id_)
    assert raised.value.message == "Workflow or approval not found"
    await attempt.complete()
    types = [event.type for event in await watching]
    assert types == [
        "DATA_PROCESSING",
        "WORKFLOW_STARTED",
        *["APPROVAL_REQUESTED", "APPROVAL_DECISION"] * 2,
        "WORKFLOW_COMPLETED",
        "done",
    ]
    assert (await client.get_status(id_)).status is TaskStatusEnum.COMPLETED


async def test_a_plan_is_read_changed_and_approved(client: AsyncShannonClient, shared: Store) -> None:
    id_, attempt = await waiting(shared, "sdk-reviews", events.ReviewRequested(plan="1. Ask.", version=1))
    state = await client.get_review_state(id_)
    assert (state.status, state.round, state.version, state.current_plan, state.query) == (
        "reviewing",
        1,
        1,
        "1. Ask.",
        QUERY,
    )
    working = asyncio.create_task(replan(shared, id_, attempt))
    state = await client.submit_review_feedback(id_, "Twice.", version=1)
    await working
    assert (state.status, state.round, state.version, state.current_plan) == ("reviewing", 2, 2, "1. Ask twice.")
    assert [(one.role, one.message) for one in state.rounds] == [
        ("assistant", "1. Ask."),
        ("user", "Twice."),
        ("assistant", "1. Ask twice."),
    ]
    assert all(one.timestamp for one in state.rounds)
    for call in (client.submit_review_feedback(id_, "Thrice.", version=1), client.approve_review(id_, version=1)):
        with pytest.raises(errors.ValidationError) as raised:
            await call
        assert raised.value.code == "409"
    assert await client.approve_review(id_, version=2) == {"status": "approved", "message": "Research started"}
    assert (await client.get_review_state(id_)).status == "approved"
    await attempt.complete()
    with pytest.raises(errors.TaskNotFoundError):
        await client.get_review_state("task_that_never_was")


def test_the_blocking_client_decides_as_well(blocking: ShannonClient, folder: Path) -> None:
    approval: Future[str] = Future()
    plan: Future[str] = Future()

    async def work() -> None:
        async with open_store(Settings(data=folder / "data")) as store:
            asked = events.ApprovalRequested(approval="ap1", reason="Deploy?")
            approval.set_result((await waiting(store, "sdk-blocking-approvals", asked))[0])
            first = events.ReviewRequested(plan="1. Ask.", version=1)
            id_, attempt = await waiting(store, "sdk-blocking-reviews", first)
            plan.set_result(id_)
            await replan(store, id_, attempt)

    with ThreadPoolExecutor(1) as thread:  # the client's calls block its own
        working = thread.submit(asyncio.run, work())
        assert blocking.approve("ap1", approval.result(20), approved=False, feedback="No.") is True
        id_ = plan.result(20)
        assert blocking.get_review_state(id_).current_plan == "1. Ask."
        assert blocking.submit_review_feedback(id_, "Twice.", version=1).current_plan == "1. Ask twice."
        working.result(20)
    with pytest.raises(errors.ValidationError):
        blocking.submit_review_feedback(id_, "Thrice.", version=1)
    assert blocking.approve_review(id_, version=2)["status"] == "approved"


# Sessions


async def test_a_session_is_listed_read_named_and_deleted(client: AsyncShannonClient) -> None:
    id_ = f"session-{uuid.uuid4()}"
    first = await finished(client, f"{QUERY} First", session_id=id_)
    second = await finished(client, f"{QUERY} Second", session_id=id_, context=slow(1, 0, "no"))
    session = await client.get_session(id_)
    assert (session.session_id, session.task_count) == (id_, 2)
    assert session.user_id
    assert session.total_tokens_used == 2 * (len(QUERY.split()) + 1)
    assert session.created_at.tzinfo
    sessions, total = await client.list_sessions(limit=100)
    assert total >= len(sessions) > 0
    listed = next(one for one in sessions if one.session_id == id_)
    assert (listed.message_count, listed.successful_tasks, listed.failed_tasks) == (2, 1, 1)
    assert (listed.latest_task_query, listed.latest_task_status) == (f"{QUERY} Second", "FAILED")
    assert (listed.is_active, listed.title) == (True, None)

    past = await client.get_session_history(id_)
    assert [(item.task_id, item.query, item.result, item.status) for item in past] == [
        (first.task_id, f"{QUERY} First", f"{QUERY} First", "COMPLETED"),
        (second.task_id, f"{QUERY} Second", "", "FAILED"),
    ]
    assert past[0].tokens_used == session.total_tokens_used
    assert past[0].created_at < past[0].completed_at <= past[1].created_at

    turns, total = await client.get_session_events(id_)
    assert total == 2
    assert [(turn.turn, turn.task_id, turn.user_query) for turn in turns] == [
        (1, first.task_id, f"{QUERY} First"),
        (2, second.task_id, f"{QUERY} Second"),
    ]
    assert turns[0].final_output == f"{QUERY} First"
    assert turns[0].metadata["tokens_used"] == session.total_tokens_used
    assert [event.type for event in turns[0].events][-1] == "WORKFLOW_COMPLETED"
    assert not [event for turn in turns for event in turn.events if event.type == "LLM_PARTIAL"]
    page, total = await client.get_session_events(id_, limit=1, offset=1)
    assert (total, [turn.turn for turn in page]) == (2, [2])

    assert await client.update_session_title(id_, "What logs are good for") is True
    assert (await client.get_session(id_)).title == "What logs are good for"
    for title in ("", "x" * 61):
        with pytest.raises(errors.ValidationError):
            await client.update_session_title(id_, title)

    assert await client.delete_session(id_) is True
    assert await client.delete_session(id_) is True
    with pytest.raises(errors.SessionNotFoundError):
        await client.get_session(id_)
    assert id_ not in {one.session_id for one in (await client.list_sessions(limit=100))[0]}


# Errors, health


async def test_a_wrong_key_and_none_are_authentication_errors(server: Server) -> None:
    for key in ("sk_wrong", None):
        async with AsyncShannonClient(server.url, api_key=key) as stranger:
            for call in (
                stranger.submit_task(QUERY),
                stranger.submit_and_stream(QUERY),
                stranger.get_status("task_x"),
                stranger.list_tasks(),
                stranger.get_task_events("task_x"),
                stranger.get_task_timeline("task_x"),
                stranger.cancel("task_x"),
                stranger.get_control_state("task_x"),
                stranger.approve("ap1", "task_x"),
                stranger.get_review_state("task_x"),
                stranger.submit_review_feedback("task_x", "Twice."),
                stranger.approve_review("task_x"),
                stranger.list_sessions(),
            ):
                with pytest.raises(errors.AuthenticationError) as raised:
                    await call
                assert raised.value.message == "Unauthorized"


async def test_an_unknown_task_or_session_is_not_found(client: AsyncShannonClient) -> None:
    id_ = "task_that_never_was"
    for call in (
        client.get_status(id_),
        client.wait(id_),
        client.get_task_events(id_),
        client.get_task_timeline(id_),
        client.cancel(id_),
        client.pause_task(id_),
        client.resume_task(id_),
        client.get_control_state(id_),
    ):
        with pytest.raises(errors.TaskNotFoundError) as raised:
            await call
        assert raised.value.message == "Task not found"
    for call in (
        client.get_session(id_),
        client.get_session_history(id_),
        client.get_session_events(id_),
        client.update_session_title(id_, "x"),
        client.delete_session(id_),
    ):
        with pytest.raises(errors.SessionNotFoundError):
            await call


async def test_what_cannot_be_meant_is_a_validation_error(client: AsyncShannonClient) -> None:
    for call, sentence in (
        (client.submit_task(QUERY, mode="hasty"), "Invalid mode (allowed: simple, standard, complex, supervisor)"),
        (client.submit_task(QUERY, model_tier="huge"), "Invalid model_tier (allowed: small, medium, large)"),
        (client.list_tasks(limit=101), "Invalid limit parameter"),
        (client.list_tasks(status="DREAMING"), "Invalid status value"),
        (client.get_status("no task!"), "Invalid task ID format"),
    ):
        with pytest.raises(errors.ValidationError) as raised:
            await call
        assert raised.value.message == sentence


async def test_health_and_readiness_need_no_key(server: Server) -> None:
    async with AsyncShannonClient(server.url) as stranger:
        health, readiness = await stranger.health(), await stranger.readiness()
    assert health["status"] == "healthy"
    assert health["checks"]["gateway"] == "ok"
    assert readiness["status"] == "ready"


# The blocking client


def test_the_blocking_client_does_all_of_it(blocking: ShannonClient) -> None:
    session = f"blocking-{uuid.uuid4()}"
    handle = blocking.submit_task(QUERY, session_id=session)
    told = list(handle.stream())
    assert [event.type for event in told] == LIFE
    assert "".join(event.message for event in told if event.type == "thread.message.delta") == QUERY
    assert handle.result(timeout=20) == QUERY
    assert blocking.get_status(handle.task_id).status is TaskStatusEnum.COMPLETED
    assert handle.cancel() is False
    assert [task.task_id for task in blocking.list_tasks(session_id=session)[0]] == [handle.task_id]
    assert blocking.get_task_events(handle.task_id)[-1].type == "WORKFLOW_COMPLETED"
    assert blocking.get_task_timeline(handle.task_id)["events"]
    assert [event.type for event in blocking.stream_ws(handle.task_id)] == [RAW.get(type_, type_) for type_ in LIFE]

    paused, url = blocking.submit_and_stream(QUERY, session_id=session, context=slow(1000, 10))
    assert url.endswith(paused.task_id)
    assert blocking.pause_task(paused.task_id)
    assert blocking.get_control_state(paused.task_id).is_paused
    assert blocking.resume_task(paused.task_id)
    assert blocking.cancel(paused.task_id, reason="enough")
    assert paused.wait(timeout=20).status is TaskStatusEnum.CANCELLED

    assert blocking.get_session(session).task_count == 2
    assert len(blocking.get_session_history(session)) == 2
    assert len(blocking.get_session_events(session)[0]) == 2
    assert session in {one.session_id for one in blocking.list_sessions(limit=100)[0]}
    assert blocking.update_session_title(session, "Blocking")
    assert blocking.delete_session(session)
    with pytest.raises(errors.SessionNotFoundError):
        blocking.get_session(session)
    with pytest.raises(errors.TaskNotFoundError):
        blocking.get_status("task_that_never_was")
    assert blocking.health()["status"] == "healthy"
    assert blocking.readiness()["status"] == "ready"
