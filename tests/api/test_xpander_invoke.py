"""Invoking over xpander's API: waiting, at once, as a stream; turns of one task; decisions; and secrets that stay secret."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from httpx_sse import EventSource, aconnect_sse
from structlog.testing import capture_logs

from app import events, keys
from app.api.xpander import invoke
from app.events import AnyEvent, Json
from app.settings import Settings
from app.store import Store
from app.task import Task
from tests.api.asking import claimed, invoked, tell
from tests.api.serving import ORG, Served, served
from tests.waiting import wait_until
from workers import Context, task
from workers.handlers import Handler
from workers.runtime import run

WRITER = "agent:writer"
SAFE = {
    *("task_created", "task_updated", "task_finished", "chunk", "tool_call_request", "tool_call_result"),
    *("sub_agent_trigger", "think", "analyze", "plan_updated", "auth_event", "task_compactization"),
}
"""Contract §4."""


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With a lease that outlasts a loaded machine: nobody renews it here."""
    return settings.model_copy(update={"lease_seconds": 60})


Frames = AsyncIterator[Json]


async def frames_of(source: EventSource) -> Frames:
    assert source.response.status_code == 200, await source.response.aread()
    assert source.response.headers["content-type"] == "text/event-stream"
    async for event in source.aiter_sse():
        assert (event.event, event.id) == ("message", "")
        frame = json.loads(event.data)
        assert set(frame) == {"type", "task_id", "organization_id", "time", "data"}
        yield frame


@asynccontextmanager
async def streaming(server: Served, agent: str = "writer", *, query: str = "", **body: Any) -> AsyncIterator[Frames]:
    url = f"/v1/agents/{agent}/invoke/stream{query}"
    async with aconnect_sse(server.client, "POST", url, json={"input": {"text": "why?"}} | body) as source:
        yield frames_of(source)


async def followed(server: Served, id_: str, *, query: str = "") -> list[Json]:
    """All frames of a stream that ends, as the SDK asks for it."""
    url = f"/{ORG}/agent-execution/{id_}/events{query}"
    async with aconnect_sse(server.client, "GET", url) as source:
        return [frame async for frame in frames_of(source)]


def kinds(frames: list[Json]) -> list[str]:
    return [frame["type"] for frame in frames]


async def whole(client: httpx.AsyncClient, id_: str) -> Any:
    answer = await client.get(f"/v1/tasks/{id_}")
    assert answer.status_code == 200, answer.text
    return answer.json()


# At once


@pytest.mark.parametrize("kind", ["agent", "workflow"])
async def test_an_invocation_is_answered_with_the_whole_pending_task(
    client: httpx.AsyncClient, store: Store, kind: str
) -> None:
    answer = await client.post(f"/v1/{kind}s/writer/invoke/async?version=7", json={"input": {"text": "why?"}})
    assert answer.status_code == 200
    body = answer.json()
    assert body == await whole(client, body["id"])
    assert (body["status"], body["source"], body["agent_id"], body["agent_version"]) == (
        "pending",
        "api",
        "writer",
        "7",
    )
    assert body["is_orchestration"] is (kind == "workflow")
    found = await store.get(ORG, body["id"])
    assert found is not None
    assert (found.queue, found.session, found.dialect) == (WRITER, found.id, "xpander")


async def test_an_unused_agent_is_made_on_first_use(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/agents/writer")).status_code == 404
    assert (await whole(client, await invoked(client)))["agent_version"] == "1"
    assert (await client.get("/v1/agents/writer")).json()["version"] == 1


@pytest.mark.parametrize("mode", ["", "/async", "/stream"])
async def test_what_does_not_fit_is_a_422_and_makes_nothing(client: httpx.AsyncClient, mode: str) -> None:
    for body, loc in (
        (b"", ["body"]),
        (b"{", ["body"]),
        (b"[]", ["body"]),
        (b"[" * 200, ["body"]),
        (b"{}", ["body", "input"]),
        (b'{"input": {"user": {}}}', ["body", "input", "user", "email"]),
    ):
        answer = await client.post(f"/v1/agents/writer/invoke{mode}", content=body)
        assert answer.status_code == 422, body
        (place,) = answer.json()["detail"]
        assert place["loc"] == loc
        assert place.keys() >= {"msg", "type"}
    answer = await client.post(f"/v1/agents/no%20id/invoke{mode}", json={"input": {}})
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["path", "agent_id"])
    answer = await client.post(f"/v1/agents/writer/invoke{mode}", content=b" " * 262_145)
    assert answer.status_code == 413
    assert isinstance(answer.json()["detail"], str)
    assert (await client.get("/v1/tasks")).json()["total"] == 0


# Waiting


@asynccontextmanager
async def waiting(
    client: httpx.AsyncClient, store: Store, kind: str = "agent", **body: Any
) -> AsyncIterator["tuple[str, asyncio.Task[httpx.Response]]"]:
    """A task whose caller waits, and the caller."""
    url = f"/v1/{kind}s/writer/invoke"
    asking = asyncio.create_task(client.post(url, json={"id": "waited", "input": {"text": "why?"}} | body))

    async def made() -> bool:
        return await store.get(ORG, "waited") is not None

    try:
        await wait_until(made, "the task is made")
        yield "waited", asking
    finally:
        asking.cancel()
        await asyncio.wait([asking])


ENDS: list[tuple[AnyEvent, str, str | None]] = [
    (events.Completed(result="because"), "completed", "because"),
    (events.Failed(error="no luck"), "failed", "no luck"),
    (events.Errored(error="ValueError"), "error", "ValueError"),
    (events.Cancelled(), "stopped", None),
    (events.TimedOut(), "failed", "The task exceeded its deadline."),
]


@pytest.mark.parametrize(("event", "word", "result"), ENDS, ids=[word for _, word, _ in ENDS[:-1]] + ["timed out"])
@pytest.mark.parametrize("kind", ["agent", "workflow"])
async def test_who_waits_is_answered_with_the_end(
    client: httpx.AsyncClient, store: Store, kind: str, event: AnyEvent, word: str, result: str | None
) -> None:
    async with waiting(client, store, kind) as (id_, asking):
        attempt = await claimed(store, id_, WRITER)
        await attempt.write("be")
        assert not asking.done()
        if isinstance(event, events.Cancelled | events.TimedOut):
            await store.append(ORG, id_, event)
        else:
            await attempt.say(event)
        answer = await asking
    assert answer.status_code == 200
    body = answer.json()
    assert (body["status"], body["result"]) == (word, result)
    assert body["finished_at"] is not None
    assert body == await whole(client, id_)


async def test_who_waits_is_not_answered_by_a_pause(client: httpx.AsyncClient, store: Store) -> None:
    async with waiting(client, store) as (id_, asking):
        await client.patch(f"/agent-execution/{id_}/update", json={"status": "paused"})
        await client.patch(f"/agent-execution/{id_}/update", json={"status": "executing"})
        assert not asking.done()
        await client.patch(f"/agent-execution/{id_}/update", json={"status": "completed", "result": "r"})
        assert (await asking).json()["result"] == "r"


async def test_a_wait_has_an_end(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invoke, "SYNC_SECONDS_MAX", 0.05)
    answer = await client.post("/v1/agents/writer/invoke", json={"input": {}})
    assert (answer.status_code, answer.json()["status"]) == (200, "pending")


async def test_a_task_that_is_deleted_while_somebody_waits_is_a_404(client: httpx.AsyncClient, store: Store) -> None:
    async with waiting(client, store) as (id_, asking):
        await store.delete(ORG, id_)
        answer = await asking
    assert (answer.status_code, answer.json()) == (404, {"detail": "Task not found"})


async def test_a_server_that_stops_answers_who_waits_with_the_task_as_it_stands(
    store: Store, settings: Settings
) -> None:
    async with httpx.AsyncClient(timeout=20) as client:
        async with served(store, settings) as server:
            client.base_url, client.headers = httpx.URL(server.url), server.client.headers
            asking = asyncio.create_task(client.post("/v1/agents/writer/invoke", json={"id": "w", "input": {}}))
            streams = server.server.config.app.state.streams  # type: ignore[union-attr]
            await wait_until(lambda: bool(streams.open), "somebody waits")
        answer = await asking
    assert (answer.status_code, answer.json()["status"]) == (200, "pending")


# As a stream


async def test_a_stream_tells_a_task_from_its_making_to_its_end(store: Store, server: Served) -> None:
    async with streaming(server, source="webhook") as frames:
        created = await anext(frames)
        id_ = created["task_id"]
        assert (created["type"], created["data"]["status"]) == ("task_created", "pending")
        attempt = await claimed(store, id_, WRITER)
        updated = await anext(frames)
        assert (updated["type"], updated["data"]["status"]) == ("task_updated", "executing")
        for word in ("be", "cause\u2028"):
            await attempt.write(word)
            chunk = await anext(frames)
            assert (chunk["type"], chunk["data"]) == ("chunk", word)
        await attempt.complete("because\u2028")
        (finished,) = [frame async for frame in frames]
    assert (finished["type"], finished["data"]) == ("task_finished", await whole(server.client, id_))
    assert finished["data"]["result"] == "because\u2028"
    assert {frame["organization_id"] for frame in (created, updated, finished)} == {ORG}
    await wait_until(lambda: store.hub.subscribers == 0, "the subscription ends")


@pytest.mark.parametrize(("event", "word", "result"), ENDS, ids=[word for _, word, _ in ENDS[:-1]] + ["timed out"])
async def test_every_end_is_the_last_frame(
    store: Store, server: Served, event: AnyEvent, word: str, result: str | None
) -> None:
    async with streaming(server) as frames:
        id_ = (await anext(frames))["task_id"]
        attempt = await claimed(store, id_, WRITER)
        if isinstance(event, events.Cancelled | events.TimedOut):
            await store.append(ORG, id_, event)
        else:
            await attempt.say(event)
        rest = [frame async for frame in frames]
    assert kinds(rest) == ["task_updated", "task_finished"]
    last = rest[-1]["data"]
    assert (last["status"], last["result"], last["is_manually_stopped"]) == (word, result, word == "stopped")
    assert last["finished_at"] is not None
    assert kinds(await followed(server, id_)) == ["task_created", "task_updated", "task_finished"]


async def test_the_bytes_are_data_lines_and_comments_alone(store: Store, server: Served) -> None:
    id_ = await invoked(server.client)
    await (await claimed(store, id_, WRITER)).complete()
    answer = await server.client.get(f"/{ORG}/agent-execution/{id_}/events")
    assert answer.content.isascii()
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith(("data: {", ":")) for line in lines)
    blocks = [block for block in answer.text.removeprefix(": connected\n").split("\n\n") if block]
    assert len(blocks) == 3
    assert all("\n" not in block for block in blocks)


@pytest.mark.parametrize("kind", ["agent", "workflow"])
async def test_a_workflow_streams_as_an_agent_does(store: Store, server: Served, kind: str) -> None:
    url = f"/v1/{kind}s/writer/invoke/stream"
    async with aconnect_sse(server.client, "POST", url, json={"input": {}}) as source:
        frames = frames_of(source)
        created = await anext(frames)
        assert created["data"]["is_orchestration"] is (kind == "workflow")
        await server.client.post(f"/v1/tasks/{created['task_id']}/stop")
        assert kinds([frame async for frame in frames]) == ["task_finished"]


ACTIVITY: list[AnyEvent] = [
    events.Thinking(message="hm"),
    events.ToolCalled(tool="search", call="c1", params={"q": "x"}),
    events.ToolReturned(tool="search", call="c1", output="y"),
    events.PlanUpdated(payload={"tasks": []}),
    events.AgentStarted(agent="a"),
    events.AgentCompleted(agent="a"),
    events.TextDelta(text="be", agent="final_output"),
    events.TextCompleted(text="because", agent="final_output"),
    events.Noted(name="BUDGET_THRESHOLD", payload={"level": "warn"}),
    events.Noted(name="CONTEXT_STATUS", payload={"percent": 5}),
    events.Noted(name="AUTH_EVENT", payload={"type": "login_required", "data": {}}),
    events.Progressed(fraction=0.5),
]


async def test_only_what_every_sdk_knows_is_told_unless_all_is_asked_for(store: Store, server: Served) -> None:
    id_ = await invoked(server.client)
    attempt = await claimed(store, id_, WRITER)
    await tell(attempt, *ACTIVITY)
    await invoked(server.client, "helper", parent_execution_id=id_)
    await attempt.complete()
    told = kinds(await followed(server, id_))
    assert set(told) <= SAFE
    assert told == [
        *("task_created", "task_updated", "think", "tool_call_request", "tool_call_result", "plan_updated", "chunk"),
        *("auth_event", "task_updated", "sub_agent_trigger", "task_finished"),
    ]
    extended = await followed(server, id_, query="?events=all")
    assert kinds(extended) == [
        *("connected", "task_created", "task_updated", "think", "tool_call_request", "tool_call_result"),
        *("plan_updated", "chunk", "context_status", "auth_event", "task_updated", "sub_agent_trigger"),
        *("sub_task_created", "task_finished"),
    ]
    async with streaming(server, query="?events=all") as frames:
        assert [(await anext(frames))["type"] for _ in range(2)] == ["connected", "task_created"]


async def test_an_error_before_the_stream_is_an_ordinary_answer(server: Served) -> None:
    id_ = await invoked(server.client)
    answer = await server.client.post("/v1/agents/writer/invoke/stream", json={"id": id_, "input": {}})
    assert (answer.status_code, answer.headers["content-type"]) == (409, "application/json")
    answer = await server.client.get("/agent-execution/unknown/events")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Task not found"})


async def test_a_task_deleted_under_a_reader_ends_its_stream(store: Store, server: Served) -> None:
    async with streaming(server) as frames:
        await store.delete(ORG, (await anext(frames))["task_id"])
        assert [frame async for frame in frames] == []


async def test_a_reader_of_a_task_that_is_deleted_is_told_that_it_was_stopped(store: Store, server: Served) -> None:
    async with streaming(server) as frames:
        id_ = (await anext(frames))["task_id"]
        (reader,) = [one for tail in store.hub._tails.values() for one in tail._audiences[ORG][id_].alone]
        await wait_until(lambda: reader.live, "the reader has caught up")
        assert (await server.client.delete(f"/v1/tasks/{id_}")).status_code == 204
        (last,) = [frame async for frame in frames]
    assert (last["type"], last["data"]["status"]) == ("task_finished", "stopped")


# Turns


async def test_a_known_id_begins_the_next_turn_of_the_same_task(client: httpx.AsyncClient, store: Store) -> None:
    assert await invoked(client, id="thread-1", input={"text": "Reply FIRST"}) == "thread-1"
    await (await claimed(store, "thread-1", WRITER)).complete("FIRST")
    first = await whole(client, "thread-1")
    assert await invoked(client, id="thread-1", input={"text": "Reply SECOND"}, output_format="markdown") == "thread-1"
    pending = await whole(client, "thread-1")
    assert (pending["status"], pending["result"], pending["finished_at"]) == ("pending", None, None)
    assert (pending["input"]["text"], pending["output_format"]) == ("Reply SECOND", "markdown")
    await (await claimed(store, "thread-1", WRITER)).complete("SECOND")
    second = await whole(client, "thread-1")
    assert second["created_at"] == first["created_at"]
    assert second["finished_at"] > first["finished_at"]
    body = (await client.get("/v1/agents/writer/tasks")).json()
    (row,) = body["items"]
    assert (body["total"], row["title"], row["result"]) == (1, "Reply SECOND", "SECOND")
    assert row["updated_at"] == second["finished_at"]
    thread = (await client.get("/v1/tasks/thread-1/thread")).json()
    assert [one["content"] for one in thread] == ["Reply FIRST", "FIRST", "Reply SECOND", "SECOND"]


@pytest.mark.parametrize("word", ["completed", "failed", "error", "stopped"])
async def test_every_end_can_be_followed_by_a_turn(client: httpx.AsyncClient, word: str) -> None:
    id_ = await invoked(client)
    await client.patch(f"/agent-execution/{id_}/update", json={"status": word, "result": "r"})
    assert await invoked(client, id=id_) == id_
    body = await whole(client, id_)
    assert (body["status"], body["result"], body["is_manually_stopped"]) == ("pending", None, False)


@pytest.mark.parametrize("word", ["pending", "executing", "paused"])
@pytest.mark.parametrize("mode", ["", "/async", "/stream"])
async def test_a_second_invocation_of_what_runs_is_a_409(client: httpx.AsyncClient, word: str, mode: str) -> None:
    id_ = await invoked(client)
    await client.patch(f"/agent-execution/{id_}/update", json={"status": word})
    before = await whole(client, id_)
    answer = await client.post(f"/v1/agents/writer/invoke{mode}", json={"id": id_, "input": {"text": "another"}})
    assert answer.status_code == 409
    assert "still at work" in answer.json()["detail"]
    assert await whole(client, id_) == before


@pytest.mark.parametrize("known", [True, False], ids=["known", "new"])
async def test_of_invocations_that_race_for_an_id_one_wins(
    client: httpx.AsyncClient, store: Store, known: bool
) -> None:
    if known:
        await invoked(client, id="raced")
        await (await claimed(store, "raced", WRITER)).complete()
    answers = await asyncio.gather(
        *(
            client.post("/v1/agents/writer/invoke/async", json={"id": "raced", "input": {"text": str(i)}})
            for i in range(8)
        )
    )
    assert sorted(answer.status_code for answer in answers) == [200, *[409] * 7]
    (won,) = [answer.json()["input"]["text"] for answer in answers if answer.status_code == 200]
    thread = (await client.get("/v1/tasks/raced/thread")).json()
    assert [one["content"] for one in thread if one["role"] == "user"] == (["why?", won] if known else [won])


async def test_another_agents_task_cannot_be_continued(client: httpx.AsyncClient, store: Store) -> None:
    id_ = await invoked(client)
    await (await claimed(store, id_, WRITER)).complete()
    answer = await client.post("/v1/agents/helper/invoke/async", json={"id": id_, "input": {}})
    assert (answer.status_code, answer.json()) == (404, {"detail": "Task not found"})


async def test_a_follow_up_is_streamed_from_its_own_beginning(store: Store, server: Served) -> None:
    id_ = await invoked(server.client, input={"text": "first"})
    await (await claimed(store, id_, WRITER)).complete("FIRST")
    async with streaming(server, id=id_, input={"text": "second"}) as frames:
        created = await anext(frames)
        assert (created["type"], created["task_id"]) == ("task_created", id_)
        assert (created["data"]["status"], created["data"]["result"]) == ("pending", None)
        assert created["data"]["input"]["text"] == "second"
        attempt = await claimed(store, id_, WRITER)
        await attempt.complete("SECOND")
        rest = [frame async for frame in frames]
    assert kinds(rest) == ["task_updated", "task_finished"]
    assert rest[-1]["data"]["result"] == "SECOND"
    assert await followed(server, id_) == [created, *rest]


# What a task is done with


async def test_a_task_keeps_what_was_effective_when_it_was_accepted(client: httpx.AsyncClient, store: Store) -> None:
    def effective(body: Json) -> tuple[str, str, str]:
        return body["llm_model_provider"], body["llm_model_name"], body["llm_reasoning_effort"]

    await store.agents.save(ORG, "writer", provider="openai", model="gpt-5", effort="low")
    plain = await invoked(client)
    over = {"llm_model_provider": "anthropic", "llm_model_name": "claude", "llm_reasoning_effort": "xhigh"}
    overridden = await invoked(client, **over)
    partly = await invoked(client, llm_reasoning_effort="high")
    await store.agents.save(ORG, "writer", provider="google", model="gemini", effort="medium")
    assert effective(await whole(client, plain)) == ("openai", "gpt-5", "low")
    assert effective(await whole(client, overridden)) == ("anthropic", "claude", "xhigh")
    assert effective(await whole(client, partly)) == ("openai", "gpt-5", "high")
    await client.patch(f"/agent-execution/{plain}/update", json={"llm_model_name": "other", "status": "completed"})
    assert effective(await whole(client, plain)) == ("openai", "gpt-5", "low")
    await invoked(client, id=plain)
    assert effective(await whole(client, plain)) == ("google", "gemini", "medium")
    await store.agents.delete(ORG, "writer")
    assert effective(await whole(client, plain)) == ("google", "gemini", "medium")


async def test_how_a_task_is_to_think_and_answer_reaches_its_worker_and_its_reader(
    client: httpx.AsyncClient, store: Store
) -> None:
    schema = {"type": "object", "required": ["city"]}
    id_ = await invoked(client, think_mode="harder", output_format="json", output_schema=schema)
    body = await whole(client, id_)
    assert (body["think_mode"], body["output_format"], body["output_schema"]) == ("harder", "json", schema)
    (found,) = await store.claim([WRITER], "w", 1)
    assert found.found.output_schema == schema
    assert found.found.extra["think_mode"] == "harder"
    done = events.Completed(result='{"city":"Paris"}', result_type="json")
    await store.append(ORG, id_, done, fence=found.fence, n=1)
    assert json.loads((await whole(client, id_))["result"]) == {"city": "Paris"}  # jq … fromjson
    theirs = (await client.get(f"/api/v1/tasks/{id_}")).json()
    assert theirs["response"] == {"city": "Paris"}


# A human's decision


@asynccontextmanager
async def working(store: Store, *handlers: Handler) -> AsyncIterator[None]:
    stop = asyncio.Event()
    running = asyncio.create_task(run(store, handlers, stop=stop))
    try:
        yield
    finally:
        stop.set()
        await running


@task(WRITER)
async def deploy(task: Task, ctx: Context) -> str:
    answer = await ctx.approve("Deploy?", {"risk": "high"})
    return f"{answer.approved} {answer.feedback}"


@task(WRITER)
async def plan(task: Task, ctx: Context) -> str:
    answer = await ctx.review("1. Ask.")
    return f"{answer.approved} {answer.feedback}"


@pytest.mark.parametrize("handler", [deploy, plan], ids=["approval", "review"])
@pytest.mark.parametrize(("verb", "result"), [("approve", "True yes"), ("reject", "False yes")])
@pytest.mark.parametrize("prefix", ["/v1/tasks", "/hitl", f"/{ORG}/hitl"])
async def test_a_decision_reaches_the_handler_that_waits_for_it(
    client: httpx.AsyncClient, store: Store, handler: Handler, verb: str, result: str, prefix: str
) -> None:
    id_ = await invoked(client)
    async with working(store, handler):

        async def asks() -> bool:
            return bool((await whole(client, id_))["hitl_request"])

        await wait_until(asks, "the handler asks")
        body = await whole(client, id_)
        assert body["status"] == "paused"
        assert body["hitl_request"].keys() == {"wait_node_id"}
        assert body["hitl_request"]["wait_node_id"]
        # What a client saved meanwhile, of what it saw before, answers for nobody.
        await client.patch(f"/agent-execution/{id_}/update", json={**body, "status": "executing", "hitl_request": None})
        assert (await whole(client, id_))["hitl_request"] == body["hitl_request"]
        answer = await client.post(f"{prefix}/{id_}/{verb}", json={"feedback": "yes"})
        assert (answer.status_code, answer.json()["hitl_request"]) == (200, None)

        async def done() -> bool:
            return bool((await whole(client, id_))["status"] == "completed")

        await wait_until(done, "the handler went on")
    assert (await whole(client, id_))["result"] == result


@pytest.mark.parametrize(("verb", "word"), [("approve", "pending"), ("reject", "stopped")])
async def test_a_decision_of_a_patched_request_queues_the_task_or_stops_it(
    client: httpx.AsyncClient, store: Store, verb: str, word: str
) -> None:
    id_ = await invoked(client)
    await client.patch(f"/agent-execution/{id_}/update", json={"status": "executing"})
    said = {"status": "paused", "hitl_request": {"wait_node_id": "node-1"}}
    body = (await client.patch(f"/agent-execution/{id_}/update", json=said)).json()
    assert (body["status"], body["hitl_request"]) == ("paused", {"wait_node_id": "node-1"})
    assert body["paused_at"] is not None
    answer = await client.post(f"/v1/tasks/{id_}/{verb}")
    assert answer.status_code == 200
    assert (answer.json()["status"], answer.json()["hitl_request"]) == (word, None)
    assert len(await store.claim([WRITER], "w", 1)) == (verb == "approve")
    again = await client.post(f"/v1/tasks/{id_}/{verb}")
    assert (again.status_code, again.json()) == (409, {"detail": "The task waits for no decision."})


async def test_of_decisions_that_race_one_counts(client: httpx.AsyncClient) -> None:
    id_ = await invoked(client)
    said = {"status": "paused", "hitl_request": {"wait_node_id": "n"}}
    await client.patch(f"/agent-execution/{id_}/update", json=said)
    answers = await asyncio.gather(*(client.post(f"/hitl/{id_}/{verb}") for verb in ("approve", "reject") * 3))
    assert sorted(answer.status_code for answer in answers) == [200, *[409] * 5]


async def test_where_nothing_waits_there_is_nothing_to_decide(client: httpx.AsyncClient) -> None:
    id_ = await invoked(client)
    for word in ("pending", "paused", "stopped"):
        await client.patch(f"/agent-execution/{id_}/update", json={"status": word})
        for verb in ("approve", "reject"):
            assert (await client.post(f"/v1/tasks/{id_}/{verb}")).status_code == 409
    answer = await client.post(f"/v1/tasks/{id_}/approve", json={"feedback": None, "payload": None})
    assert answer.status_code == 409  # null is as good as absent: the body fits
    assert (await client.post(f"/v1/tasks/{id_}/approve", json={"feedback": 7})).status_code == 422


async def test_stops_of_a_task_that_waits_are_final(client: httpx.AsyncClient, store: Store) -> None:
    id_ = await invoked(client)
    attempt = await claimed(store, id_, WRITER)
    await attempt.say(events.ApprovalRequested(approval="a", reason="?"))
    body = (await client.post(f"/v1/tasks/{id_}/stop")).json()
    assert (body["status"], body["hitl_request"]) == ("stopped", None)
    assert (await client.post(f"/v1/tasks/{id_}/approve")).status_code == 409


# Secrets

SECRET = "s3cr3t-of-nobody-else"
SECRETS: Json = {
    "user_oidc_token": SECRET,
    "user_tokens": {"mail": SECRET},
    "mcp_servers": [
        {"name": "mail", "url": "https://m", "allowed_tools": ["send"]}
        | dict.fromkeys(("api_key", "client_secret"), SECRET)
        | {"headers": {"Authorization": SECRET}, "env_vars": {"TOKEN": SECRET}}
    ],
}


async def holders(store: Store, word: str = SECRET) -> set[str]:
    """The kinds of keys in which it stands, in their names or in what they hold."""
    found = set()
    reads = {
        "string": ("GET",),
        "hash": ("HGETALL",),
        "list": ("LRANGE", 0, -1),
        "zset": ("ZRANGE", 0, -1),
        "stream": ("XRANGE", "-", "+"),
    }
    for name in await store.door.read("KEYS", "*"):
        kind = (await store.door.read("TYPE", name)).decode()
        command, *rest = reads[kind]
        if word in str(await store.door.read(command, name, *rest)) or word in name.decode():
            declared = keys.declared(name)
            found.add(declared.name if declared else name.decode())
    return found


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with capture_logs() as captured:
        yield captured


async def test_secrets_reach_no_log_frame_list_or_answer(store: Store, server: Served, logs: list[Any]) -> None:
    client = server.client
    first = await invoked(client, **SECRETS)
    assert await holders(store) == {"secrets"}
    assert await holders(store, "https://m") == {"secrets", "log", "events", "task", "thread"}  # it looks everywhere
    attempt = await claimed(store, first, WRITER)
    await attempt.complete()
    await invoked(client, id=first, **SECRETS)
    saved = await whole(client, first)
    await client.patch(f"/agent-execution/{first}/update", json={**saved, **SECRETS, "status": "executing"})
    await client.patch(f"/agent-execution/{first}/update", json={**saved, **SECRETS, "status": "completed"})
    made = (await client.post("/agent-execution/writer", json={"input": {}, **SECRETS})).json()
    assert made["user_oidc_token"] == SECRET  # who made it may be the worker that begins it from this answer
    for id_ in (first, made["id"]):
        shown = await whole(client, id_)
        assert (shown["user_oidc_token"], shown["user_tokens"]) == (None, None)
        assert shown["mcp_servers"] == [{"name": "mail", "url": "https://m", "allowed_tools": ["send"]}]
        paths = [
            *(f"/v1/tasks/{id_}{rest}" for rest in ("", "/thread", "/thread/full")),
            *(f"/agent-execution/{id_}/status", f"/activity/writer/{id_}", f"/api/v1/tasks/{id_}"),
            *("/v1/tasks", "/agent-execution/executions/history/writer", "/api/v1/tasks", "/v1/agents/writer"),
            *(f"/api/v1/tasks/{id_}/events", f"/api/v1/tasks/{id_}/timeline"),
        ]
        for path in paths:
            answer = await client.get(path)
            assert answer.status_code == 200, path
            assert SECRET not in answer.text, path
        stopped = await client.post(f"/v1/tasks/{id_}/stop")
        assert SECRET not in stopped.text
        assert SECRET not in json.dumps(await followed(server, id_, query="?events=all"))
    assert await holders(store) == {"secrets"}
    for name in await store.door.read("KEYS", "*:secrets:*"):
        assert 0 < await store.door.read("TTL", name) <= 24 * 3600
    await invoked(client, id=first)  # a turn that brings none has none
    found = await store.get(ORG, first)
    assert found is not None
    assert await store.hidden(found) == {}
    for id_ in (first, made["id"]):
        await client.delete(f"/v1/tasks/{id_}")
    assert await holders(store) == set()
    assert {"task.submitted", "task.continued"} <= {one["event"] for one in logs}
    assert SECRET not in str(logs)


async def test_a_refused_request_hides_nothing(store: Store, client: httpx.AsyncClient, logs: list[Any]) -> None:
    answer = await client.post("/v1/agents/writer/invoke/async", json={"title": "no input", **SECRETS})
    assert answer.status_code == 422
    id_ = await invoked(client)
    answer = await client.post("/v1/agents/writer/invoke/async", json={"id": id_, "input": {}, **SECRETS})
    assert answer.status_code == 409
    assert await holders(store) == set()
    assert SECRET not in str(logs)
