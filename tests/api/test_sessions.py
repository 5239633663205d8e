"""Sessions over HTTP, as the Shannon dialect speaks them, on a real store; then the real SDK's session methods."""

import json
from typing import Any

import httpx
import pytest
from shannon import AsyncShannonClient  # type: ignore[import-untyped]
from shannon import errors as sdk_errors

from app import events
from app.api.shannon import sessions
from app.events import AnyEvent, Usage
from app.identity import DEVELOPMENT_KEY, DEVELOPMENT_ORG, DEVELOPMENT_USER
from app.snapshots import Session
from app.store import Store
from tests.api.asking import Connect, claimed, tell

SESSIONS = "/api/v1/sessions"
USAGE = Usage(input_tokens=2, output_tokens=3, cost_nano=1_500_000)
DONE = events.Completed(result="Because.", usage=USAGE)


async def submitted(client: httpx.AsyncClient, session: str, query: str = "why?", **more: Any) -> str:
    answer = await client.post("/api/v1/tasks", json={"query": query, "session_id": session, **more})
    assert answer.status_code == 200, answer.text
    id_: str = answer.json()["task_id"]
    return id_


async def ended(client: httpx.AsyncClient, store: Store, session: str, *told: AnyEvent, **more: Any) -> str:
    id_ = await submitted(client, session, **more)
    await tell(await claimed(store, id_), *told)
    return id_


async def got(client: httpx.AsyncClient, path: str = "", **query: Any) -> dict[str, Any]:
    answer = await client.get(SESSIONS + path, params=query)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def test_a_session_sums_up_its_tasks(client: httpx.AsyncClient, store: Store) -> None:
    research = {"force_research": True, "research_strategy": "deep"}
    await ended(client, store, "s", DONE, query="first", mode="complex", context=research)
    await ended(client, store, "s", events.Failed(error="e"), query="second")
    last = await submitted(client, "s", "third")
    task = (await client.get(f"/api/v1/tasks/{last}")).json()
    one = await got(client, "/s")
    created = one["created_at"]
    assert one == {
        "session_id": "s",
        "user_id": DEVELOPMENT_USER,
        "context": {"external_id": "s"},
        "tokens_used": 5,
        "cost_usd": 0.0015,
        "task_count": 3,
        "created_at": created,
        "updated_at": task["updated_at"],
        "is_research_session": True,
        "research_strategy": "deep",
    }
    listed = await got(client)
    assert listed == {
        "sessions": [
            {
                **one,
                "last_activity_at": task["updated_at"],
                "is_active": True,
                "successful_tasks": 1,
                "failed_tasks": 1,
                "success_rate": 1 / 3,
                "total_cost_usd": 0.0015,
                "average_cost_per_task": 0.0005,
                "is_near_budget_limit": False,
                "latest_task_query": "third",
                "latest_task_status": "QUEUED",
                "first_task_mode": "complex",
            }
        ],
        "total_count": 1,
    }


def test_a_session_is_active_for_a_day() -> None:
    session = Session(
        id="s", created_at=5, tasks=0, completed=0, failed=0, input_tokens=0, output_tokens=0, cost_nano=0
    )
    day = 86_400_000_000
    assert sessions.session_item(session, "u", 5 + day - 1)["is_active"]
    idle = sessions.session_item(session, "u", 5 + day)
    assert not idle["is_active"]
    assert (idle["success_rate"], idle["average_cost_per_task"]) == (0.0, 0.0)
    assert "latest_task_query" not in idle


async def test_sessions_are_newest_first_and_a_wrong_page_is_the_default_one(client: httpx.AsyncClient) -> None:
    for i in range(22):
        await submitted(client, f"s{i}")
    names = [f"s{i}" for i in range(22)][::-1]

    async def page(**query: Any) -> list[str]:
        body = await got(client, **query)
        assert body["total_count"] == 22
        return [session["session_id"] for session in body["sessions"]]

    assert await page() == names[:20]
    assert await page(limit=5, offset=20) == names[20:]
    for wrong in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"offset": -1}, {"offset": "x"}):
        assert await page(**wrong) == names[:20]


async def test_a_session_is_its_owners_alone(connect: Connect, client: httpx.AsyncClient) -> None:
    colleague, foreigner, nobody = await connect("colleague"), await connect("x", org="elsewhere"), await connect("")
    for one in (client, colleague, nobody):
        await submitted(one, "s")
    for one, user in ((client, DEVELOPMENT_USER), (colleague, "colleague"), (nobody, "")):
        assert (await got(one, "/s"))["task_count"] == 1
        assert (await got(one, "/s"))["user_id"] == user
        assert (await got(one, "/s/history"))["total"] == 1
    await submitted(client, "mine")
    for other in (colleague, foreigner, nobody):
        for method, path in (
            ("GET", "/mine"),
            ("GET", "/mine/history"),
            ("GET", "/mine/events"),
            ("PATCH", "/mine"),
            ("DELETE", "/mine"),
            ("GET", "/a%20b"),
            ("DELETE", "/a%20b"),
        ):
            answer = await other.request(method, SESSIONS + path, json={"title": "t"})
            assert (answer.status_code, answer.json()) == (404, {"error": "Session not found"}), (method, path)
    assert (await got(foreigner))["sessions"] == []


async def test_without_a_key_everything_is_401(connect: Connect) -> None:
    stranger = await connect()
    calls = [("GET", ""), *(("GET", f"/s{rest}") for rest in ("", "/history", "/events"))]
    for method, path in [*calls, ("PATCH", "/s"), ("DELETE", "/s")]:
        answer = await stranger.request(method, SESSIONS + path)
        assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"}), (method, path)


async def test_history_is_every_task_with_its_result_oldest_first(client: httpx.AsyncClient, store: Store) -> None:
    done = await ended(client, store, "s", DONE, query="first", mode="supervisor", context={"role": "poet"})
    failed = await ended(client, store, "s", events.Errored(error="no luck"), query="second")
    waiting = await submitted(client, "s", "third")
    body = await got(client, "/s/history")
    assert (body["session_id"], body["total"]) == ("s", 3)
    assert [row["task_id"] for row in body["tasks"]] == [done, failed, waiting]
    task = (await client.get(f"/api/v1/tasks/{done}")).json()
    first, second, third = body["tasks"]
    assert first == {
        "task_id": done,
        "workflow_id": done,
        "query": "first",
        "status": "COMPLETED",
        "mode": "supervisor",
        "result": "Because.",
        "error_message": "",
        "total_tokens": 5,
        "total_cost_usd": 0.0015,
        "duration_ms": first["duration_ms"],
        "agents_used": 0,
        "tools_invoked": 0,
        "started_at": task["started_at"],
        "completed_at": task["completed_at"],
        "metadata": {"task_context": {"role": "poet"}},
    }
    assert first["duration_ms"] >= 0
    assert (second["status"], second["error_message"], second["result"]) == ("FAILED", "no luck", "")
    assert (third["status"], third["duration_ms"]) == ("QUEUED", 0)
    assert "completed_at" not in third


async def test_a_long_history_is_whole_and_its_pages_fit_together(client: httpx.AsyncClient) -> None:
    ids = [await submitted(client, "s", f"q{i}") for i in range(120)]
    whole = await got(client, "/s/history")
    assert [row["task_id"] for row in whole["tasks"]] == ids
    pages = [await got(client, "/s/history", limit=50, offset=offset) for offset in (0, 50, 100, 150)]
    assert [row["task_id"] for page in pages for row in page["tasks"]] == ids
    assert {page["total"] for page in pages} == {120}


async def test_a_task_that_arrives_while_history_is_read_moves_nothing(
    client: httpx.AsyncClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "CHUNK", 2)
    ids = [await submitted(client, "s") for _ in range(6)]
    listing, asked = store.list, 0

    async def list_while_others_submit(*args: Any, **more: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:
            await submitted(client, "s")
        return await listing(*args, **more)

    monkeypatch.setattr(store, "list", list_while_others_submit)
    body = await got(client, "/s/history")
    assert [row["task_id"] for row in body["tasks"]] == ids
    assert body["total"] == 7


async def test_a_history_too_large_for_one_answer_is_a_413(
    client: httpx.AsyncClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "HISTORY_BYTES_MAX", 20)
    for _ in range(2):
        await ended(client, store, "s", DONE)
    answer = await client.get(f"{SESSIONS}/s/history")
    assert answer.status_code == 413
    assert answer.json() == {"error": "Session is too large. Please use pagination with smaller limits."}
    assert len((await got(client, "/s/history", limit=1))["tasks"]) == 1


async def test_turns_tell_what_upstream_keeps(client: httpx.AsyncClient, store: Store) -> None:
    done = await ended(
        client,
        store,
        "s",
        events.Noted(name="LLM_PROMPT", message="p"),
        events.AgentStarted(agent="simple-agent", payload={"role": "poet"}),
        events.TextDelta(text="Be", agent="final_output"),
        events.TextCompleted(text="Because.", agent="final_output", usage=USAGE),
        DONE,
    )
    failed = await ended(
        client,
        store,
        "s",
        events.TextCompleted(text="A title", agent="title_generator"),
        events.TextCompleted(text="Well", agent="final_output"),
        events.Failed(error="no luck"),
        query="again?",
    )
    body = await got(client, "/s/events", include_payload="true")
    assert (body["session_id"], body["count"]) == ("s", 2)
    first, second = body["turns"]
    task = (await client.get(f"/api/v1/tasks/{done}")).json()
    assert (first["turn"], first["task_id"], first["user_query"]) == (1, done, "why?")
    assert (first["final_output"], first["timestamp"]) == ("Because.", task["started_at"])
    assert first["metadata"] == {
        "tokens_used": 10,
        "execution_time_ms": first["metadata"]["execution_time_ms"],
        "agents_involved": ["final_output", "orchestrator", "simple-agent"],
    }
    assert [event["type"] for event in first["events"]] == [
        "DATA_PROCESSING",
        "WORKFLOW_STARTED",
        "AGENT_STARTED",
        "LLM_OUTPUT",
        "WORKFLOW_COMPLETED",
    ]
    assert isinstance(first["events"][2]["payload"], str)
    assert json.loads(first["events"][2]["payload"]) == {"role": "poet"}
    assert "payload" not in first["events"][0]
    # Without a result, what was written; a title is no answer.
    assert (second["turn"], second["task_id"], second["final_output"]) == (2, failed, "Well")
    assert all("payload" not in event for event in (await got(client, "/s/events"))["turns"][0]["events"])


async def test_turns_come_in_pages_and_count_from_the_first_task(client: httpx.AsyncClient) -> None:
    ids = [await submitted(client, "s") for _ in range(12)]
    body = await got(client, "/s/events")
    assert [turn["task_id"] for turn in body["turns"]] == ids[:10]
    body = await got(client, "/s/events", limit=5, offset=10)
    assert [(turn["turn"], turn["task_id"]) for turn in body["turns"]] == [(11, ids[10]), (12, ids[11])]
    assert body["count"] == 12
    beyond = await got(client, "/s/events", offset=12)
    assert (beyond["turns"], beyond["count"]) == ([], 12)
    assert len((await got(client, "/s/events", limit=101, offset="x"))["turns"]) == 10


async def test_a_task_deleted_while_turns_are_read_is_left_out(
    client: httpx.AsyncClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, kept = await submitted(client, "s"), await submitted(client, "s")
    listing = store.list

    async def list_then_delete(*args: Any, **more: Any) -> Any:
        found = await listing(*args, **more)
        await store.delete(DEVELOPMENT_ORG, gone)
        return found

    monkeypatch.setattr(store, "list", list_then_delete)
    assert [turn["task_id"] for turn in (await got(client, "/s/events"))["turns"]] == [kept]


async def test_too_many_events_are_a_413(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "EVENTS_MAX", 2)
    for _ in range(3):
        await submitted(client, "s")
    answer = await client.get(f"{SESSIONS}/s/events")
    assert answer.status_code == 413
    assert answer.json() == {"error": "Session has too many events. Please use pagination with smaller turn limits."}
    assert len((await got(client, "/s/events", limit=2))["turns"]) == 2


async def test_a_title_is_cleaned_and_shown(client: httpx.AsyncClient) -> None:
    await submitted(client, "s")
    answer = await client.patch(f"{SESSIONS}/s", json={"title": "  A\x07 \u200btitle\n "})
    assert (answer.status_code, answer.json()) == (200, {"session_id": "s", "title": "A title"})
    for body in (await got(client, "/s"), (await got(client))["sessions"][0]):
        assert body["title"] == body["context"]["title"] == "A title"
    long = "é" * 60
    assert (await client.patch(f"{SESSIONS}/s", json={"title": long})).json()["title"] == long


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"title": " \\n "}', "Title cannot be empty"),
        ("{}", "Title cannot be empty"),
        ('{"title": "\\u0007\\u200b"}', "Title cannot contain only control characters"),
        (json.dumps({"title": "x" * 61}), "Title must be 60 characters or less"),
        ('{"title": 7}', "Invalid request body"),
        ('"title"', "Invalid request body"),
        ("{", "Invalid request body: Input data was truncated"),
    ],
)
async def test_a_bad_title_is_a_400(client: httpx.AsyncClient, content: str, sentence: str) -> None:
    await submitted(client, "s")
    answer = await client.patch(f"{SESSIONS}/s", content=content)
    assert (answer.status_code, answer.json()) == (400, {"error": sentence})


async def test_deleting_a_session_is_idempotent_and_leaves_its_tasks(client: httpx.AsyncClient) -> None:
    id_ = await submitted(client, "s")
    await client.patch(f"{SESSIONS}/s", json={"title": "old"})
    for _ in range(2):
        answer = await client.delete(f"{SESSIONS}/s")
        assert (answer.status_code, answer.content) == (204, b"")
    assert (await client.get(f"{SESSIONS}/s")).status_code == 404
    assert (await got(client))["total_count"] == 0
    assert (await client.get(f"/api/v1/tasks/{id_}")).status_code == 200
    never = await client.delete(f"{SESSIONS}/never")
    assert (never.status_code, never.json()) == (404, {"error": "Session not found"})
    await submitted(client, "s")
    assert "title" not in await got(client, "/s")


# The real SDK


async def test_the_sdk_reads_names_and_forgets_sessions(client: httpx.AsyncClient, store: Store) -> None:
    sdk = AsyncShannonClient("http://localhost", DEVELOPMENT_KEY)
    sdk._http_client = client
    done = await ended(client, store, "s", events.TextCompleted(text="Because.", agent="final_output"), DONE)
    assert await sdk.update_session_title("s", "A title")
    found, total = await sdk.list_sessions()
    assert total == 1
    assert (found[0].session_id, found[0].title, found[0].user_id) == ("s", "A title", DEVELOPMENT_USER)
    assert (found[0].total_tokens_used, found[0].successful_tasks, found[0].is_active) == (5, 1, True)
    session = await sdk.get_session("s")
    assert (session.session_id, session.total_cost_usd, session.task_count) == ("s", 0.0015, 1)
    (item,) = await sdk.get_session_history("s")
    assert (item.task_id, item.query, item.result, item.tokens_used) == (done, "why?", "Because.", 5)
    assert item.completed_at
    turns, count = await sdk.get_session_events("s")
    assert count == 1
    assert (turns[0].turn, turns[0].final_output, len(turns[0].events)) == (1, "Because.", 4)
    assert await sdk.delete_session("s")
    with pytest.raises(sdk_errors.SessionNotFoundError, match="Session not found"):
        await sdk.get_session("s")
    with pytest.raises(sdk_errors.ValidationError, match="Title must be 60 characters or less"):
        await sdk.update_session_title("s", "x" * 61)
