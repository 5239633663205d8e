"""The controller that xpander's SDK calls: its addresses in all their spellings, PATCHes that come late, reports, events."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from httpx_sse import aconnect_sse

from app import events
from app.api.xpander import executions
from app.api.xpander.spelling import NEWER
from app.events import Json
from app.log import Appended
from app.settings import Settings
from app.store import Store
from app.task import TERMINAL, Status
from tests.api.asking import Connect, claimed, invoked
from tests.api.serving import ORG, Served
from tests.waiting import wait_until

WRITER = "agent:writer"
PREFIXES = ("", f"/{ORG}", "/agent-controller", f"/agent-controller/{ORG}", f"/agent-controller//{ORG}", f"//{ORG}")
SLASHES = ("", "/", "//")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With a lease that outlasts a loaded machine: nobody renews it here."""
    return settings.model_copy(update={"lease_seconds": 60})


async def status(client: httpx.AsyncClient, id_: str) -> Any:
    answer = await client.get(f"/agent-execution/{id_}/status")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def patched(client: httpx.AsyncClient, id_: str, **said: Any) -> Any:
    answer = await client.patch(f"/agent-execution/{id_}/update", json=said)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def said(store: Store, id_: str) -> list[str]:
    page = await store.events(ORG, id_, "")
    assert page
    return [events.tag(entry.event) for entry in page.entries]


# Addresses


@pytest.mark.parametrize("slash", SLASHES, ids=["plain", "trailing", "doubled"])
@pytest.mark.parametrize("prefix", PREFIXES)
async def test_every_route_is_there_under_every_spelling(
    client: httpx.AsyncClient, store: Store, prefix: str, slash: str
) -> None:
    async def ask(method: str, path: str, body: Any = None) -> Any:
        answer = await client.request(method, f"http://localhost{prefix}{path}{slash}", json=body)
        assert answer.status_code == 200, (method, path, answer.text)
        assert answer.headers["content-type"] == "application/json"
        return answer.json()

    made = await ask("POST", "/agent-execution/writer", {"input": {"text": "q", "user": {"id": "u1", "email": ""}}})
    id_ = made["id"]
    assert await ask("GET", f"/agent-execution/{id_}/status") == made
    (row,) = await ask("GET", "/agent-execution/executions/history/writer")
    assert row["id"] == id_
    assert await ask("GET", "/agent-execution/executions/history/user/u1") == [row]
    assert (await ask("PATCH", f"/agent-execution/{id_}/update", {"status": "executing"}))["status"] == "executing"
    pushed = [{"type": "chunk", "task_id": id_, "organization_id": ORG, "time": made["created_at"], "data": "x"}]
    assert (await ask("POST", f"/agent-execution/{id_}/events/push", pushed))["success"] is True
    assert (await ask("GET", f"/activity/writer/{id_}"))["id"] == id_
    waits = {"status": "paused", "hitl_request": {"wait_node_id": "n"}}
    await ask("PATCH", f"/agent-execution/{id_}/update", waits)
    assert (await ask("POST", f"/hitl/{id_}/approve"))["status"] == "pending"
    await ask("PATCH", f"/agent-execution/{id_}/update", waits)
    assert (await ask("POST", f"/hitl/{id_}/reject"))["status"] == "stopped"
    assert (await ask("DELETE", f"/agent-execution/{id_}"))["status"] == "stopped"
    assert (await ask("POST", "/agent-execution/writer/report_task", {"input": "q"}))["status"] == "completed"
    assert await ask("POST", "/agents-metrics/writer/execution", {"execution_id": id_, "source": "sdk"})
    assert (await ask("GET", "/agents/writer"))["id"] == "writer"
    assert [agent["id"] for agent in await ask("GET", "/agents/list")] == ["writer"]
    told = await client.get(f"http://localhost{prefix}/agent-execution/{id_}/events{slash}")
    assert (told.status_code, told.headers["content-type"]) == (200, "text/event-stream")


async def test_another_organisations_address_is_a_404_whoever_asks(connect: Connect, client: httpx.AsyncClient) -> None:
    id_ = await invoked(client)
    foreigner = await connect("ada", org="acme")
    for path in (f"agent-execution/{id_}/status", "agents/list", "agent-execution/executions/history/writer"):
        for asked in (client.get(f"/acme/{path}"), client.get(f"/agent-controller/acme/{path}")):
            answer = await asked
            assert (answer.status_code, answer.json()) == (404, {"detail": "Organization not found"})
        answer = await foreigner.get(f"/{ORG}/{path}")
        assert (answer.status_code, answer.json()) == (404, {"detail": "Organization not found"})
    answer = await foreigner.get(f"/acme/agent-execution/{id_}/status")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Task not found"})
    stranger = await connect()
    assert (await stranger.get(f"/{ORG}/agent-execution/{id_}/status")).status_code == 401


async def test_a_task_or_an_agent_may_have_the_name_of_a_route(client: httpx.AsyncClient) -> None:
    for name in ("events", "agents", "activity", "hitl", "agent-execution"):
        made = await client.post(f"/agent-execution/{name}", json={"id": name, "input": {}})
        assert (made.status_code, made.json()["agent_id"]) == (200, name)
        assert (await client.get(f"/agent-execution/{name}/status")).json()["id"] == name
        assert (await client.get(f"/{ORG}/agent-execution/{name}/status")).json()["id"] == name
        assert (await client.get(f"/agents/{name}")).json()["id"] == name
        assert (await client.get(f"/activity/{name}/{name}")).json()["id"] == name
        (row,) = (await client.get(f"/agent-execution/executions/history/{name}")).json()
        assert row["id"] == name
    assert (await client.get("/agent-execution/executions/history/user/user")).json() == []


async def test_the_other_surfaces_keep_their_paths(client: httpx.AsyncClient) -> None:
    await invoked(client)
    assert "agents" in (await client.get("/api/v1/agents")).json()
    assert "items" in (await client.get("/v1/agents")).json()
    assert (await client.get("/api/agents/writer")).json() == {"error": "Not found: /api/agents/writer"}
    for path in ("/agent-execution/x/nothing", "/agents/a/b", "/hitl/x"):
        assert (await client.get(path)).json() == {"detail": f"Not found: {path}"}


# Create, get, list, stop


async def test_a_created_task_is_pending_and_echoes_what_the_sdk_sends(client: httpx.AsyncClient) -> None:
    sent: Json = {
        **dict.fromkeys(("id", "payload_extension", "source", "worker_id", "output_format", "output_schema")),
        **dict.fromkeys(("additional_context", "instructions_override", "test_run_node_id", "user_oidc_token")),
        **dict.fromkeys(("expected_output", "triggering_agent_id", "title", "tool_call_limit", "user_tokens")),
        **dict.fromkeys(("llm_model_provider", "llm_model_name", "llm_reasoning_effort", "harness_cli")),
        "permission_mode": None,
        "return_metrics": False,
        "think_mode": "default",
        "mcp_servers": [],
        "run_locally": False,
        "disable_attachment_injection": False,
        "events_streaming": True,
        "input": {"text": "why?", "files": [], "user": None},
    }
    answer = await client.post("/agent-execution/writer", json=sent, headers={"x-agent-version": "4"})
    body = answer.json()
    assert (body["status"], body["events_streaming"], body["source"]) == ("pending", True, "sdk")
    assert (body["input"]["text"], body["agent_version"]) == ("why?", "4")
    assert body == await status(client, body["id"])


async def test_lists_are_plain_arrays_with_the_same_filters(client: httpx.AsyncClient) -> None:
    user = {"id": "u1", "email": ""}
    first = await invoked(client, input={"user": user}, triggering_agent_id="planner", parent_execution_id="p")
    second = await invoked(client, input={"user": user})
    other = await invoked(client, "helper", input={"user": user})
    await patched(client, first, status="stopped", internal_status="done")

    async def ids(path: str, **query: str) -> list[str]:
        answer = await client.get(f"/agent-execution/executions/history/{path}", params=query)
        assert answer.status_code == 200, answer.text
        return [row["id"] for row in answer.json()]

    assert await ids("writer") == [second, first]
    assert await ids("user/u1") == [other, second, first]
    assert await ids("user/u1", agent_id="helper") == [other]
    queries = (
        {"status": "stopped"},
        {"internal_status": "done"},
        {"triggering_agent_id": "planner"},
        {"parent_task_id": "p"},
    )
    for query in queries:
        assert await ids("writer", **query) == [first]
        assert await ids("user/u1", **query) == [first]
    assert await ids("writer", user_id="u2") == []
    assert await ids("nobody") == []
    answer = await client.get("/agent-execution/executions/history/writer", params={"status": "running"})
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["query", "status"])


async def test_a_list_that_is_cut_off_says_so(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executions, "LISTED_MAX", 2)
    _, second, third = [await invoked(client) for _ in range(3)]
    answer = await client.get("/agent-execution/executions/history/writer")
    assert [row["id"] for row in answer.json()] == [third, second]
    assert answer.headers["X-Total-Capped"] == "true"


async def test_of_long_questions_a_list_holds_so_many_bytes(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executions, "HISTORY_PAGE", 2)
    monkeypatch.setattr(executions, "HISTORY_BYTES_MAX", 1000)
    for _ in range(3):
        await invoked(client, input={"text": "x" * 600})
    answer = await client.get("/agent-execution/executions/history/writer")
    assert (len(answer.json()), answer.headers["X-Total-Capped"]) == (2, "true")


async def test_what_a_handler_left_in_a_text_is_kept_as_json(client: httpx.AsyncClient) -> None:
    id_ = await invoked(client)
    left = {"result": {"a": 1}, "internal_status": True, "used_tools": ["a", None, 7], "duration": "long"}
    found = await patched(client, id_, status="completed", **left)
    assert (found["status"], found["result"], found["internal_status"]) == ("completed", '{"a":1}', "true")
    assert found["used_tools"] == ["a", "7"]


async def test_a_report_that_does_not_fit_its_schema_is_a_failure(client: httpx.AsyncClient) -> None:
    id_ = await invoked(client, output_format="json", output_schema={"type": "object"})
    answer = await client.post(
        "/agent-execution/writer/report_task", json={"id": id_, "result": "[]", "is_success": True}
    )
    assert (answer.status_code, answer.json()["status"]) == (200, "failed")
    assert "does not fit" in answer.json()["result"]


async def test_delete_stops_and_a_paused_task_can_be_stopped_again(client: httpx.AsyncClient, store: Store) -> None:
    """As upstream's own test does it (contract §3.5)."""
    id_ = await invoked(client)
    for _ in range(2):
        stopped = (await client.delete(f"/agent-execution/{id_}")).json()
        assert (stopped["status"], stopped["is_manually_stopped"]) == ("stopped", True)
        assert stopped == (await client.delete(f"/agent-execution/{id_}")).json()
        reopened = await patched(client, id_, **{**stopped, "status": "paused"})
        assert (reopened["status"], reopened["is_manually_stopped"]) == ("paused", False)
        assert (reopened["finished_at"], reopened["paused_at"] is not None) == (None, True)
    assert (await client.get(f"/v1/tasks/{id_}")).status_code == 200
    assert (await said(store, id_)) == ["submitted", "cancelled", "restated", "cancelled", "restated"]


async def test_a_reopened_task_ends_when_its_worker_says_so(client: httpx.AsyncClient) -> None:
    id_ = await invoked(client)
    await client.delete(f"/agent-execution/{id_}")
    await patched(client, id_, status="paused")
    assert (await patched(client, id_, status="executing"))["status"] == "executing"
    done = await patched(client, id_, status="completed", result="r")
    assert (done["status"], done["result"]) == ("completed", "r")


# PATCH


async def test_a_worker_that_was_given_a_task_ends_it(client: httpx.AsyncClient, store: Store) -> None:
    """What the SDK sends, in its order: a whole task, then a look, then a whole task."""
    id_ = await invoked(client)
    pending = await status(client, id_)
    executing = await patched(client, id_, **{**pending, "status": "executing"})
    assert (executing["status"], executing["result"], executing["started_at"] is not None) == ("executing", None, True)
    assert executing["finished_at"] is None
    tokens = {"completion_tokens": 4, "prompt_tokens": 3, "total_tokens": 7, "cache_read_tokens": 0}
    last = {**await status(client, id_), "status": "completed", "result": "done", "tokens": tokens, "used_tools": ["t"]}
    done = await patched(client, id_, **last)
    assert (done["status"], done["result"], done["used_tools"]) == ("completed", "done", ["t"])
    assert done["tokens"] == {"completion_tokens": 4, "prompt_tokens": 3, "total_tokens": 7}
    assert done["finished_at"] is not None
    assert done["duration"] > 0
    assert await said(store, id_) == ["submitted", "restated", "restated"]
    assert await patched(client, id_, **last) == done  # said twice (P8)
    assert await patched(client, id_, **{**last, "duration": 0.0}) == done
    assert await said(store, id_) == ["submitted", "restated", "restated"]
    thread = (await client.get(f"/v1/tasks/{id_}/thread")).json()
    assert [one["content"] for one in thread] == ["why?", "done"]
    assert thread[1]["metrics"]["total_tokens"] == 7


async def test_an_intermediate_result_is_in_the_conversation_once_it_is_the_last(client: httpx.AsyncClient) -> None:
    id_ = await invoked(client)
    await patched(client, id_, status="executing", result="half")
    await patched(client, id_, status="executing", result="whole")
    await patched(client, id_, status="completed", result="whole")
    thread = (await client.get(f"/v1/tasks/{id_}/thread")).json()
    assert [one["content"] for one in thread] == ["why?", "whole"]


@pytest.mark.parametrize("ended", sorted(TERMINAL))
@pytest.mark.parametrize("word", ["pending", "executing", "completed", "error", "failed", "stopped"])
async def test_a_patch_of_what_has_ended_is_answered_with_the_end(
    client: httpx.AsyncClient, store: Store, ended: Status, word: str
) -> None:
    id_ = await invoked(client)
    pending = await status(client, id_)
    attempt = await claimed(store, id_, WRITER)
    executing = await status(client, id_)
    if ended in {Status.CANCELLED, Status.TIMED_OUT}:
        await store.append(ORG, id_, events.Cancelled() if ended is Status.CANCELLED else events.TimedOut())
    else:
        ends: dict[Status, events.AnyEvent] = {
            Status.COMPLETED: events.Completed(result="r"),
            Status.FAILED: events.Failed(error="f"),
        }
        await attempt.say(ends.get(ended, events.Errored(error="e")))
    before, passed = await status(client, id_), await said(store, id_)
    tokens = {"prompt_tokens": 5, "completion_tokens": 5}
    for seen in (pending, executing):
        assert await patched(client, id_, **{**seen, "status": word, "result": "late", "tokens": tokens}) == before
    assert await patched(client, id_, status=word, result=None) == before
    assert await said(store, id_) == passed


async def test_a_stop_before_the_pickup_leaves_the_workers_result_alone(client: httpx.AsyncClient) -> None:
    """Facts 4, P7: the handler runs all the same, and says `stopped` with its result."""
    id_ = await invoked(client)
    pending = await status(client, id_)
    await client.delete(f"/agent-execution/{id_}")
    picked = await patched(client, id_, **{**pending, "status": "executing"})
    assert picked["status"] == "stopped"
    last = await patched(client, id_, **{**picked, "result": "never asked for"})
    assert (last["status"], last["result"], last["is_manually_stopped"]) == ("stopped", None, True)


async def test_a_patch_may_pause_and_go_on(client: httpx.AsyncClient) -> None:
    id_ = await invoked(client)
    await patched(client, id_, status="executing")
    paused = await patched(client, id_, status="paused")
    assert (paused["status"], paused["paused_at"] is not None) == ("paused", True)
    assert await patched(client, id_, status="paused") == paused
    going = await patched(client, id_, status="executing")
    assert (going["status"], going["paused_at"]) == ("executing", None)


async def test_the_sdks_second_run_clears_nothing_but_the_result(client: httpx.AsyncClient, store: Store) -> None:
    """Fact 11: after a promise the handler runs again, with another PATCH of `executing`."""
    id_ = await invoked(client)
    await patched(client, id_, status="executing", internal_status="step 1", title="T")
    await client.post(f"/agent-execution/{id_}/events/push", json=[{"type": "chunk", "data": "I will"}])
    first = await patched(client, id_, status="executing", result="I will")
    again = {**first, "result": None, "additional_context": "<continuation>", "tokens": {"prompt_tokens": 2}}
    second = await patched(client, id_, **again)
    assert (second["result"], second["additional_context"]) == (None, "<continuation>")
    assert (second["internal_status"], second["title"], second["status"]) == ("step 1", "T", "executing")
    assert second["started_at"] == first["started_at"]
    for _ in range(2):  # P8
        done = await patched(
            client, id_, **{**second, "status": "completed", "result": "Done.", "tokens": {"prompt_tokens": 2}}
        )
        report = {"execution_id": id_, "source": "sdk", "llm_tokens": {"worker": {"prompt_tokens": 2}}}
        assert (await client.post("/agents-metrics/writer/execution", json=report)).status_code == 200
    assert done["tokens"]["total_tokens"] == 2
    assert (await status(client, id_))["tokens"]["total_tokens"] == 2
    assert (await said(store, id_)).count("restated") == 5


async def test_tokens_are_counted_once_in_every_turn(client: httpx.AsyncClient, store: Store) -> None:
    id_ = "counted"
    for _ in range(3):
        await invoked(client, id=id_)
        assert (await status(client, id_))["tokens"] is None
        tokens = {"prompt_tokens": 10, "completion_tokens": 5}
        await patched(client, id_, status="executing", tokens=tokens)
        done = await patched(client, id_, status="completed", result="r", tokens=tokens)
        report = {"execution_id": id_, "source": "sdk", "llm_tokens": {"worker": tokens}}
        await client.post("/agents-metrics/writer/execution", json=report)
        assert done["tokens"]["total_tokens"] == 15
        assert (await status(client, id_))["tokens"]["total_tokens"] == 15
    task = await store.get(ORG, id_)
    assert task is not None
    assert (task.input_tokens, task.output_tokens) == (30, 15)


async def test_the_last_word_of_a_stopped_turn_does_not_end_the_next(client: httpx.AsyncClient, store: Store) -> None:
    id_ = "again"
    await invoked(client, id=id_)
    await claimed(store, id_, "agent:writer")
    held = await status(client, id_)
    await client.delete(f"/agent-execution/{id_}")
    await invoked(client, id=id_)
    for word, result in (("executing", None), ("completed", "old"), ("error", "old")):
        late = await patched(client, id_, **{**held, "status": word, "result": result})
        assert (late["status"], late["result"]) == ("pending", None)
    await claimed(store, id_, "agent:writer")
    assert (await patched(client, id_, status="completed", result="new"))["result"] == "new"


async def test_a_patch_changes_what_its_owner_may_and_nothing_else(client: httpx.AsyncClient) -> None:
    id_ = await invoked(client)
    before = await status(client, id_)
    fixed = {
        "id": "other",
        "agent_id": "other",
        "organization_id": "other",
        "created_at": "2001-01-01T00:00:00Z",
        "started_at": "2001-01-01T00:00:00Z",
        "finished_at": "2001-01-01T00:00:00Z",
        "is_manually_stopped": True,
        "input": {"text": "other"},
        "parent_execution": "other",
        "sub_executions": ["other"],
        "worker_id": "other",
        "mcp_servers": [{"name": "other"}],
        "user_tokens": {"a": "b"},
        "configuration": {"api_key": "k"},
    }
    assert await patched(client, id_, **fixed) == before
    plan = {"enabled": True, "enforce": True, "started": True, "question_raised": False, "tasks": []}
    free = {
        "internal_status": "x" * 255,
        "title": "T",
        "last_executed_node_id": "n",
        "source": "api",
        "deep_planning": plan,
        "pending_eca_request": {"connector_name": "c", "auth_url": "https://a"},
        "used_tools": ["a"],
        "payload_extension": {"a": 1},
        "additional_context": "c",
    }
    assert await patched(client, id_, **free) == {**before, **free}
    assert (await patched(client, id_, internal_status="y" * 300))["internal_status"] == "y" * 255
    echo = await status(client, id_)
    del echo["deep_planning"]
    assert (await patched(client, id_, **echo))["deep_planning"] == plan  # absent is kept
    cleared = await patched(client, id_, internal_status=None, title=None)
    assert (cleared["internal_status"], cleared["title"]) == (None, None)
    (row,) = (await client.get("/v1/tasks")).json()["items"]
    assert row["title"] == "why?"


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        (b"", ["body"]),
        (b"[]", ["body"]),
        (b'{"status": "running"}', ["body", "status"]),
        (b'{"tokens": {"prompt_tokens": -1}}', ["body", "tokens", "prompt_tokens"]),
        (b'{"hitl_request": "n"}', ["body", "hitl_request"]),
        # What the SDK could not read would end its workers, one after the other.
        (b'{"hitl_request": {}}', ["body", "hitl_request", "wait_node_id"]),
        (b'{"deep_planning": {"tasks": [1]}}', ["body", "deep_planning", "tasks", 0]),
        (b'{"pending_eca_request": {"auth_url": "x"}}', ["body", "pending_eca_request", "connector_name"]),
    ],
)
async def test_a_patch_that_does_not_fit_is_a_422(client: httpx.AsyncClient, body: bytes, loc: list[str]) -> None:
    id_ = await invoked(client)
    answer = await client.patch(f"/agent-execution/{id_}/update", content=body)
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, loc)
    assert (await client.patch("/agent-execution/unknown/update", json={})).status_code == 404


async def test_patches_that_race_with_a_stop_never_undo_it(client: httpx.AsyncClient, store: Store) -> None:
    for _ in range(5):
        id_ = await invoked(client)
        await patched(client, id_, status="executing")
        words = ["executing", "completed", "error", "failed"] * 2
        answers = await asyncio.gather(
            client.delete(f"/agent-execution/{id_}"),
            *(client.patch(f"/agent-execution/{id_}/update", json={"status": word, "result": word}) for word in words),
        )
        assert {answer.status_code for answer in answers} == {200}
        stored = await store.get(ORG, id_)
        assert stored is not None
        assert stored.terminal
        page = await store.events(ORG, id_, "")
        assert page
        ends = [entry for entry in page.entries if getattr(entry.event, "to", "") in TERMINAL]
        assert len(ends) + [events.tag(entry.event) for entry in page.entries].count("cancelled") == 1
    assert [difference async for difference in store.snapshots.verify()] == []


async def test_a_patch_that_a_stop_overtakes_changes_nothing(
    client: httpx.AsyncClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    id_ = await invoked(client)
    await patched(client, id_, status="executing")
    append = store.append

    async def overtaken(org: str, task: str, event: events.AnyEvent, **more: Any) -> Appended:
        monkeypatch.undo()
        await append(ORG, id_, events.Cancelled())
        return await append(org, task, event, **more)

    monkeypatch.setattr(store, "append", overtaken)
    late = await patched(client, id_, status="executing", result="late")
    assert (late["status"], late["result"]) == ("stopped", None)
    assert await said(store, id_) == ["submitted", "restated", "cancelled"]


# Reports, metrics, activity


async def test_a_report_makes_an_ended_task_and_is_said_once(client: httpx.AsyncClient, store: Store) -> None:
    tokens = {"completion_tokens": 4, "prompt_tokens": 3, "cache_read_tokens": 1, "total_tokens": 7}
    report: Json = {"id": None, "input": "q", "llm_response": {"any": ["json"]}, "tokens": tokens, "is_success": True}
    report |= {"result": "r", "duration": 1.5, "used_tools": ["search"]}
    body = (await client.post("/agent-execution/writer/report_task", json=report)).json()
    assert (body["status"], body["result"], body["agent_id"], body["source"]) == ("completed", "r", "writer", "sdk")
    assert (body["tokens"]["total_tokens"], body["duration"], body["used_tools"]) == (7, 1.5, ["search"])
    assert (body["input"]["text"], body["finished_at"] is not None) == ("q", True)
    again = await client.post("/agent-execution/writer/report_task", json={**report, "id": body["id"]})
    assert (again.status_code, again.json()) == (200, body)
    assert await said(store, body["id"]) == ["submitted", "restated"]
    better = await client.post("/agent-execution/writer/report_task", json={**report, "id": body["id"], "result": "r2"})
    assert better.json() == {**body, "result": "r2"}
    assert await store.claim([WRITER], "w", 1) == []


async def test_a_report_of_a_known_task_ends_it(client: httpx.AsyncClient) -> None:
    id_ = await invoked(client)
    report = {"id": id_, "input": "ignored", "is_success": False, "result": "no luck", "duration": 2}
    body = (await client.post("/agent-execution/writer/report_task", json=report)).json()
    assert (body["id"], body["status"], body["result"], body["input"]["text"]) == (id_, "failed", "no luck", "why?")
    stopped = await invoked(client)
    await client.delete(f"/agent-execution/{stopped}")
    body = (await client.post("/agent-execution/writer/report_task", json={**report, "id": stopped})).json()
    assert (body["status"], body["result"]) == ("stopped", None)


async def test_a_report_is_of_its_agent_and_fits_its_model(client: httpx.AsyncClient) -> None:
    id_ = await invoked(client)
    answer = await client.post("/agent-execution/helper/report_task", json={"id": id_, "result": "r"})
    assert (answer.status_code, answer.json()) == (404, {"detail": "Task not found"})
    assert (await status(client, id_))["status"] == "pending"
    answer = await client.post("/agent-execution/writer/report_task", json={"input": 7})
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["body", "input"])
    new = str(uuid4())
    answer = await client.post("/agent-execution/writer/report_task", json={"id": new, "result": None})
    assert (answer.json()["id"], answer.json()["result"]) == (new, "")


async def test_reports_that_race_are_one_task(client: httpx.AsyncClient, store: Store) -> None:
    report = {"id": "raced", "input": "q", "result": "r", "tokens": {"prompt_tokens": 3}}
    answers = await asyncio.gather(*(client.post("/agent-execution/writer/report_task", json=report) for _ in range(6)))
    assert {(answer.status_code, answer.json()["status"]) for answer in answers} == {(200, "completed")}
    assert (await status(client, "raced"))["tokens"]["total_tokens"] == 3


async def test_metrics_are_taken_whatever_became_of_the_task(client: httpx.AsyncClient) -> None:
    id_ = await invoked(client)
    await client.delete(f"/agent-execution/{id_}")
    report: Json = {
        "execution_id": id_,
        "source": "sdk",
        "sub_executions": [],
        "memory_thread_id": id_,
        "task": "why?",
        "triggered_by": "N/A",
        "skills": [],
        "status": "stopped",
        "internal_status": None,
        "duration": 0.0,
        "ai_model": "xpander",
        "worker": None,
        "ai_employee_id": "writer",
        "api_calls_made": [],
        "result": None,
        "llm_tokens": {"inner": {}, "worker": {"completion_tokens": 1, "prompt_tokens": None, "total_tokens": 1}},
    }
    for _ in range(2):
        answer = await client.post("/agents-metrics/writer/execution", json=report)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert ((await status(client, id_))["status"], (await status(client, id_))["tokens"]["total_tokens"]) == (
        "stopped",
        1,
    )
    unknown = await client.post("/agents-metrics/writer/execution", json={**report, "execution_id": "unknown"})
    assert unknown.status_code == 200


async def test_an_activity_log_is_the_sdks_thread(client: httpx.AsyncClient) -> None:
    user = {"id": "u1", "email": "ada@example.com"}
    id_ = await invoked(client, input={"text": "why?", "user": user})
    await patched(client, id_, status="executing")
    call = {"request_id": "r", "operation_id": "o", "tool_name": "search", "payload": {"q": "x"}}
    pushed = [{"type": "tool_call_request", "data": call}, {"type": "tool_call_result", "data": {**call, "result": 1}}]
    assert (await client.post(f"/agent-execution/{id_}/events/push", json=pushed)).json()["accepted"] == 2
    await patched(client, id_, status="completed", result="because")
    log = (await client.get(f"/activity/writer/{id_}")).json()
    assert (log["id"], log["user"]["id"], log["created_at"]) == (id_, "u1", (await status(client, id_))["created_at"])
    asked, called, returned, answered = log["messages"]
    assert (asked["role"], asked["content"]) == ("user", {"text": "why?", "files": []})
    assert (answered["role"], answered["content"]["text"]) == ("agent", "because")
    assert (called["tool_name"], called["payload"], returned["result"]) == ("search", {"q": "x"}, 1)
    assert returned["is_error"] is False
    assert (await client.get("/activity/writer/unknown")).status_code == 404


# Events


SAFE_PUSHES: dict[str, Any] = {
    "chunk": "be",
    "tool_call_request": {"request_id": "r", "operation_id": "o", "tool_name": "t", "payload": {"a": 1}},
    "tool_call_result": {"request_id": "r", "operation_id": "o", "tool_name": "t", "result": "x" * 3000},
    "sub_agent_trigger": {"agent_id": "a", "query": "q"},
    "think": {"operation_id": "think", "payload": {"input": {"thought": "hm"}}},
    "analyze": {"operation_id": "analyze", "payload": {"input": {"analysis": "ah"}}},
    "plan_updated": {"enabled": True, "tasks": []},
    "auth_event": {"type": "login_required", "data": {"url": "https://a"}},
    "task_compactization": {"type": "retry", "data": None},
}
OURS = ("task_created", "task_updated", "task_finished", "connected")


def update_of(kind: str, data: Any, id_: str) -> Json:
    moment = "2026-03-23T00:45:24.296117Z"
    return {"type": kind, "task_id": id_, "organization_id": ORG, "time": moment, "data": data, "identity": None}


async def push(client: httpx.AsyncClient, id_: str, *updates: Any) -> httpx.Response:
    return await client.post(f"/agent-execution/{id_}/events/push", json=updates)


async def test_every_type_can_be_pushed_and_the_stores_own_are_said_once(
    client: httpx.AsyncClient, store: Store
) -> None:
    id_ = await invoked(client)
    await patched(client, id_, status="executing")
    updates = [update_of(kind, data, id_) for kind, data in SAFE_PUSHES.items()]
    updates += [update_of(kind, {"n": 1}, id_) for kind in sorted(NEWER)]
    answer = await push(client, id_, *updates, *(update_of(kind, {}, id_) for kind in OURS))
    assert (answer.status_code, answer.json()) == (200, {"success": True, "accepted": len(updates)})
    assert len(await said(store, id_)) == 2 + len(updates)
    assert (await push(client, id_)).json() == {"success": True, "accepted": 0}


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({}, ["body"]),
        ("chunk", ["body"]),
        ([1], ["body", 0]),
        ([{"data": "no type"}], ["body", 0, "type"]),
        ([{"type": "chunk", "data": "x"}, {"type": 7}], ["body", 1, "type"]),
        ([{"type": "chunk", "data": "x"}, {"type": "task_started"}], ["body"]),
        ([{"type": "chunk", "data": "x"}] * 201, ["body"]),
    ],
)
async def test_garbage_is_a_422_and_nothing_of_it_is_kept(
    client: httpx.AsyncClient, store: Store, body: Any, loc: list[str | int]
) -> None:
    id_ = await invoked(client)
    await patched(client, id_, status="executing")
    answer = await client.post(f"/agent-execution/{id_}/events/push", json=body)
    assert answer.status_code == 422
    (place,) = answer.json()["detail"]
    assert place["loc"] == loc
    assert await said(store, id_) == ["submitted", "restated"]


async def test_who_does_not_run_says_nothing(client: httpx.AsyncClient) -> None:
    id_ = await invoked(client)
    assert (await push(client, id_, {"type": "chunk", "data": "x"})).status_code == 409
    await client.delete(f"/agent-execution/{id_}")
    assert (await push(client, id_, {"type": "chunk", "data": "x"})).status_code == 409
    assert (await push(client, "unknown", {"type": "chunk", "data": "x"})).status_code == 404


# The event stream


async def events_of(server: Served, id_: str) -> AsyncIterator[Json]:
    headers = {"cache-control": "no-store"}
    async with aconnect_sse(server.client, "GET", f"/{ORG}/agent-execution/{id_}/events", headers=headers) as source:
        async for event in source.aiter_sse():
            yield json.loads(event.data)


async def test_a_subscriber_is_told_all_from_the_beginning_then_what_comes_and_then_the_end(
    store: Store, server: Served
) -> None:
    id_ = await invoked(server.client)
    await patched(server.client, id_, status="executing")
    pushes = [update_of(kind, data, id_) for kind, data in SAFE_PUSHES.items()]
    await push(server.client, id_, *pushes[:5])
    frames = events_of(server, id_)
    replayed = [await anext(frames) for _ in range(7)]
    assert [frame["type"] for frame in replayed] == ["task_created", "task_updated", *[*SAFE_PUSHES][:5]]
    await push(server.client, id_, *pushes[5:])
    live = [await anext(frames) for _ in pushes[5:]]
    assert [frame["type"] for frame in live] == [*SAFE_PUSHES][5:]
    assert replayed[4]["data"]["result"] == "x" * 3000
    await patched(server.client, id_, status="completed", result="because")
    last = [frame async for frame in frames]
    assert [frame["type"] for frame in last] == ["task_finished"]
    assert last[0]["data"] == await status(server.client, id_)
    assert [frame async for frame in events_of(server, id_)] == [*replayed, *live, *last]
    await wait_until(lambda: store.hub.subscribers == 0, "the subscriptions end")


async def test_what_is_stated_after_the_end_is_no_frame_behind_it(server: Served) -> None:
    id_ = await invoked(server.client)
    await patched(server.client, id_, status="completed", result="r")
    report = {"execution_id": id_, "source": "sdk", "llm_tokens": {"worker": {"prompt_tokens": 2}}}
    await server.client.post("/agents-metrics/writer/execution", json=report)
    await patched(server.client, id_, internal_status="archived")
    assert [frame["type"] async for frame in events_of(server, id_)] == ["task_created", "task_finished"]


async def test_a_stopped_tasks_late_worker_is_not_heard(server: Served) -> None:
    id_ = await invoked(server.client)
    frames = events_of(server, id_)
    await anext(frames)
    executing = await patched(server.client, id_, status="executing")
    await server.client.delete(f"/agent-execution/{id_}")
    await patched(server.client, id_, **{**executing, "status": "completed", "result": "late"})
    rest = [frame async for frame in frames]
    assert [(frame["type"], frame["data"]["status"]) for frame in rest] == [
        ("task_updated", "executing"),
        ("task_finished", "stopped"),
    ]


async def test_a_reopened_tasks_stream_goes_on_until_the_next_end(server: Served) -> None:
    id_ = await invoked(server.client)
    await server.client.delete(f"/agent-execution/{id_}")
    await patched(server.client, id_, status="paused")
    frames = events_of(server, id_)
    told = [await anext(frames) for _ in range(3)]
    assert [frame["type"] for frame in told] == ["task_created", "task_finished", "task_updated"]
    await server.client.delete(f"/agent-execution/{id_}")
    assert [frame["type"] async for frame in frames] == ["task_finished"]


async def test_many_subscribers_are_told_the_same(server: Served) -> None:
    id_ = await invoked(server.client)
    crowd = [events_of(server, id_) for _ in range(10)]
    first = [await anext(frames) for frames in crowd]
    await patched(server.client, id_, status="executing")
    await patched(server.client, id_, status="completed", result="r")

    async def rest(frames: AsyncIterator[Json]) -> list[Json]:
        return [frame async for frame in frames]

    told = await asyncio.gather(*(rest(frames) for frames in crowd))
    assert all(one == told[0] for one in told)
    assert all(one == first[0] for one in first)
    assert [frame["type"] for frame in told[0]] == ["task_updated", "task_finished"]
