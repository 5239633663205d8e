"""Tasks over HTTP, as the Shannon dialect speaks it, on a real store; then the real SDK's task methods."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from shannon import AsyncShannonClient, EventType  # type: ignore[import-untyped]
from shannon import errors as sdk_errors
from shannon.models import TaskStatusEnum  # type: ignore[import-untyped]

from app import events, snapshots
from app.events import AnyEvent, Submission, Usage
from app.identity import DEVELOPMENT_KEY, DEVELOPMENT_ORG, DEVELOPMENT_USER
from app.settings import Settings
from app.store import Store
from tests.api.asking import Connect, claimed, tell
from tests.waiting import wait_until

TASKS = "/api/v1/tasks"
USAGE = Usage(model="echo-1", provider="taskcast", input_tokens=2, output_tokens=3, cost_nano=1_500_000)
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def submitted(client: httpx.AsyncClient, query: str = "why?", **more: Any) -> str:
    answer = await client.post(TASKS, json={"query": query, **more})
    assert answer.status_code == 200, answer.text
    id_: str = answer.json()["task_id"]
    return id_


# Submit


async def test_a_submission_is_answered_200_with_where_to_look(client: httpx.AsyncClient, store: Store) -> None:
    answer = await client.post(
        TASKS, json={"query": "why?", "session_id": "s-1", "mode": "complex"}, headers={"traceparent": TRACEPARENT}
    )
    assert answer.status_code == 200
    body = answer.json()
    task = await store.get(DEVELOPMENT_ORG, body["task_id"])
    assert task is not None
    assert body == {
        "task_id": task.id,
        "workflow_id": task.id,
        "status": "STATUS_CODE_OK",
        "message": "Task submitted successfully. Session: s-1",
        "session_id": "s-1",
        "created_at": body["created_at"],
    }
    assert answer.headers["X-Workflow-ID"] == task.id
    assert answer.headers["X-Session-ID"] == "s-1"
    assert (task.owner, task.session, task.mode, task.queue) == (DEVELOPMENT_USER, "s-1", "complex", "default")
    assert (task.dialect, task.trace) == ("shannon", TRACEPARENT)
    shown = (await client.get(f"{TASKS}/{task.id}")).json()
    assert shown["created_at"] == body["created_at"]
    assert shown["status"] == "TASK_STATUS_QUEUED"


async def test_an_invalid_traceparent_is_as_none(client: httpx.AsyncClient, store: Store) -> None:
    for trace in ("nonsense", f"00-{'0' * 32}-b7ad6b7169203331-01"):
        answer = await client.post(TASKS, json={"query": "q"}, headers={"traceparent": trace})
        task = await store.get(DEVELOPMENT_ORG, answer.json()["task_id"])
        assert task is not None
        assert task.trace == ""


async def test_a_session_is_made_when_none_is_named(client: httpx.AsyncClient) -> None:
    answer = await client.post(TASKS, json={"query": "why?"})
    session = answer.headers["X-Session-ID"]
    assert answer.json()["message"] == f"Task submitted successfully. Session: {session}"
    assert (await client.get(f"{TASKS}/{answer.json()['task_id']}")).json()["session_id"] == session


async def test_submit_for_stream_is_answered_201_with_the_streams_url(client: httpx.AsyncClient) -> None:
    answer = await client.post(f"{TASKS}/stream", json={"query": "why?", "session_id": "s-1"})
    assert answer.status_code == 201
    body = answer.json()
    url = f"/api/v1/stream/sse?workflow_id={body['task_id']}"
    assert body == {"workflow_id": body["task_id"], "task_id": body["task_id"], "stream_url": url}
    assert answer.headers["Link"] == f"<{url}>; rel=stream"
    assert answer.headers["X-Workflow-ID"] == body["task_id"]
    assert answer.headers["X-Session-ID"] == "s-1"


@pytest.mark.parametrize("path", ["", "/stream"])
@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "Invalid request body: Input data was truncated"),
        (b"", "Invalid request body: Input data was truncated"),
        (b"{}", "Query is required"),
        (b'{"query": "q", "mode": "warp"}', "Invalid mode (allowed: simple, standard, complex, supervisor)"),
    ],
)
async def test_a_bad_submission_is_a_400(client: httpx.AsyncClient, path: str, body: bytes, sentence: str) -> None:
    answer = await client.post(TASKS + path, content=body)
    assert (answer.status_code, answer.json()) == (400, {"error": sentence})
    assert answer.headers["content-type"] == "application/json"


async def test_a_body_beyond_the_limit_is_a_413_announced_or_not(client: httpx.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(300):
            yield b" " * 1024

    for content in (b" " * 262_145, pieces()):
        answer = await client.post(TASKS, content=content)
        assert answer.status_code == 413
        assert answer.json() == {"error": "Request body too large (max 262144 bytes)"}
    # The whole event has the same limit, and it holds more than the body.
    answer = await client.post(TASKS, json={"query": "x" * (262_144 - 20)})
    assert answer.status_code == 413
    assert "bytes" in answer.json()["error"]


async def test_without_a_key_everything_is_401(connect: Connect) -> None:
    stranger = await connect()
    calls = [
        ("POST", ""),
        ("POST", "/stream"),
        ("GET", ""),
        *(("GET", f"/t{rest}") for rest in ("", "/events", "/timeline", "/control-state")),
        *(("POST", f"/t/{verb}") for verb in ("cancel", "pause", "resume", "retry")),
        ("DELETE", "/t"),
    ]
    for method, path in calls:
        answer = await stranger.request(method, TASKS + path)
        assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"}), (method, path)


# Idempotency


async def test_the_same_key_and_body_get_the_first_answer(client: httpx.AsyncClient) -> None:
    keyed = {"Idempotency-Key": "k"}
    first = await client.post(TASKS, json={"query": "q", "context": {"a": 1, "b": 2}}, headers=keyed)
    again = await client.post(TASKS, json={"context": {"b": 2, "a": 1}, "query": "q"}, headers=keyed)
    assert "X-Idempotency-Cached" not in first.headers
    assert again.json() == first.json()
    assert again.headers["X-Session-ID"] == first.headers["X-Session-ID"]
    assert again.headers["X-Idempotency-Cached"] == "true"
    assert again.headers["X-Idempotency-Key"] == "k"
    stream = await client.post(f"{TASKS}/stream", json={"query": "q", "context": {"a": 1, "b": 2}}, headers=keyed)
    assert stream.json()["task_id"] == first.json()["task_id"]
    assert (await client.get(TASKS)).json()["total_count"] == 1


async def test_the_same_key_with_another_body_is_a_409(client: httpx.AsyncClient) -> None:
    await client.post(TASKS, json={"query": "q"}, headers={"Idempotency-Key": "k"})
    answer = await client.post(TASKS, json={"query": "other"}, headers={"Idempotency-Key": "k"})
    assert answer.status_code == 409
    assert answer.json() == {"error": "This idempotency key was used with another request body."}


async def test_racing_duplicates_meet_in_one_task(client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(
        *(client.post(TASKS, json={"query": "q"}, headers={"Idempotency-Key": "k"}) for _ in range(20))
    )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert sum("X-Idempotency-Cached" not in answer.headers for answer in answers) == 1
    assert (await client.get(TASKS)).json()["total_count"] == 1


async def test_a_key_belongs_to_its_user(connect: Connect, client: httpx.AsyncClient) -> None:
    other = await connect("other")
    ids = {
        (await one.post(TASKS, json={"query": "q"}, headers={"Idempotency-Key": "k"})).json()["task_id"]
        for one in (client, other)
    }
    assert len(ids) == 2


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_a_key_of_the_wrong_length_is_a_400(client: httpx.AsyncClient, key: str) -> None:
    id_ = await submitted(client)
    for path in ("", "/stream", f"/{id_}/cancel"):
        answer = await client.post(TASKS + path, json={"query": "q"}, headers={"Idempotency-Key": key})
        assert (answer.status_code, answer.json()) == (
            400,
            {"error": "Invalid Idempotency-Key (1 to 255 characters)"},
        )
    assert (await client.get(f"{TASKS}/{id_}")).json()["status"] == "TASK_STATUS_QUEUED"


# Get


async def test_a_task_shows_its_whole_life(client: httpx.AsyncClient, store: Store) -> None:
    id_ = await submitted(client, context={"role": "poet"})
    attempt = await claimed(store, id_)
    await tell(attempt, events.Progressed(fraction=0.5), events.TextDelta(text="Be", agent="final_output"))
    running = await client.get(f"{TASKS}/{id_}")
    body = running.json()
    assert (body["status"], body["progress"], body["last_seq"], body["attempt"]) == ("TASK_STATUS_RUNNING", 0.5, 4, 1)
    assert (body["response"], body["error"]) == (None, "")
    assert "result" not in body
    assert running.headers["X-Workflow-ID"] == id_
    assert running.headers["ETag"] == f'"{body["last_event_id"]}"'
    await tell(attempt, events.Completed(result="Because.", usage=USAGE))
    done = await client.get(f"{TASKS}/{id_}")
    body = done.json()
    assert done.headers["ETag"] != running.headers["ETag"]
    assert (body["status"], body["result"], body["response"]) == (
        "TASK_STATUS_COMPLETED",
        "Because.",
        {"result": "Because."},
    )
    assert body["usage"] == {
        "total_tokens": 5,
        "input_tokens": 2,
        "output_tokens": 3,
        "estimated_cost": 0.0015,
        "cost_usd": 0.0015,
    }
    assert (body["model_used"], body["provider"], body["context"]) == ("echo-1", "taskcast", {"role": "poet"})
    assert body["created_at"] < body["started_at"] < body["completed_at"] == body["updated_at"]


@pytest.mark.parametrize("rest", ["", "/events", "/timeline", "/control-state"])
async def test_a_bad_id_is_a_400_and_an_unknown_one_a_404(client: httpx.AsyncClient, rest: str) -> None:
    for id_ in ("no%20spaces", "x" * 129, "caf%C3%A9"):
        answer = await client.get(f"{TASKS}/{id_}{rest}")
        assert (answer.status_code, answer.json()) == (400, {"error": "Invalid task ID format"})
    answer = await client.get(f"{TASKS}/task_unknown{rest}")
    assert (answer.status_code, answer.json()) == (404, {"error": "Task not found"})


async def test_reading_is_for_the_organisation_and_a_foreign_task_is_a_404(
    connect: Connect, client: httpx.AsyncClient
) -> None:
    id_ = await submitted(client)
    colleague, foreigner = await connect("colleague"), await connect(DEVELOPMENT_USER, org="elsewhere")
    for rest in ("", "/events", "/timeline"):
        assert (await colleague.get(f"{TASKS}/{id_}{rest}")).status_code == 200
        answer = await foreigner.get(f"{TASKS}/{id_}{rest}")
        assert (answer.status_code, answer.json()) == (404, {"error": "Task not found"})


# List


async def listed(client: httpx.AsyncClient, **query: Any) -> tuple[list[str], int]:
    answer = await client.get(TASKS, params=query)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return [task["task_id"] for task in body["tasks"]], body["total_count"]


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("limit=0", "Invalid limit parameter"),
        ("limit=101", "Invalid limit parameter"),
        ("limit=ten", "Invalid limit parameter"),
        ("limit=1_0", "Invalid limit parameter"),
        ("limit=%D9%A1", "Invalid limit parameter"),
        ("offset=-1", "Invalid offset parameter"),
        ("offset=1.5", "Invalid offset parameter"),
        (f"offset={10**30}", "Invalid offset parameter"),
        ("session_id=a%20b", "Invalid session_id format"),
        ("status=DONE", "Invalid status value"),
        ("status=QUEUED,", "Invalid status value"),
        ("parent_id=a%20b", "Invalid parent_id format"),
        ("dead=yes", "Invalid dead parameter"),
        ("dead=true&status=FAILED", "dead=true is a status of its own: leave status out"),
    ],
)
async def test_a_bad_list_is_a_400(client: httpx.AsyncClient, query: str, sentence: str) -> None:
    answer = await client.get(f"{TASKS}?{query}")
    assert (answer.status_code, answer.json()) == (400, {"error": sentence})


async def test_a_list_is_newest_first_and_pages_fit_together(client: httpx.AsyncClient) -> None:
    ids = [await submitted(client, f"q{i}") for i in range(25)][::-1]
    assert await listed(client) == (ids[:20], 25)
    assert await listed(client, limit=100) == (ids, 25)
    assert await listed(client, limit="", offset="") == (ids[:20], 25)
    pages = [await listed(client, limit=10, offset=offset) for offset in (0, 10, 20, 30)]
    assert [id_ for page, _ in pages for id_ in page] == ids
    assert {total for _, total in pages} == {25}
    assert await listed(client, offset=2**31 - 1) == ([], 25)


async def test_a_row_has_what_the_sdk_demands(client: httpx.AsyncClient, store: Store) -> None:
    id_ = await submitted(client, "q", session_id="s")
    await tell(await claimed(store, id_), events.Completed(result="r", usage=USAGE))
    (row,) = (await client.get(TASKS)).json()["tasks"]
    task = (await client.get(f"{TASKS}/{id_}")).json()
    assert row == {
        **{name: task[name] for name in ("task_id", "workflow_id", "query", "status", "mode", "session_id")},
        **{name: task[name] for name in ("created_at", "started_at", "completed_at")},
        "total_token_usage": {"total_tokens": 5, "cost_usd": 0.0015, "prompt_tokens": 2, "completion_tokens": 3},
    }


async def test_a_status_is_asked_for_by_the_word_that_is_shown(client: httpx.AsyncClient, store: Store) -> None:
    async def ended(event: AnyEvent) -> str:
        id_ = await submitted(client)
        await tell(await claimed(store, id_), event)
        return id_

    failed, errored = await ended(events.Failed(error="e")), await ended(events.Errored(error="e"))
    completed, timed_out = await ended(events.Completed()), await ended(events.TimedOut())
    cancelled, held, paused, running = [await submitted(client) for _ in range(4)]
    await client.post(f"{TASKS}/{cancelled}/cancel")
    await client.post(f"{TASKS}/{held}/pause")
    await claimed(store, paused)
    await client.post(f"{TASKS}/{paused}/pause")
    await claimed(store, running)
    queued = await submitted(client)
    expected = {
        "QUEUED": [queued],
        "RUNNING": [running],
        "PAUSED": [paused, held],
        "COMPLETED": [completed],
        "FAILED": [errored, failed],
        "CANCELLED": [cancelled],
        "canceled": [cancelled],
        "Timeout": [timed_out],
        "TASK_STATUS_FAILED": [errored, failed],
        "queued,RUNNING": [queued, running],
    }
    for status, ids in expected.items():
        assert await listed(client, status=status) == (ids, len(ids)), status
    assert await listed(client, status=["FAILED", "TIMEOUT"]) == ([timed_out, errored, failed], 3)
    assert await listed(client, status="FAILED", limit=1, offset=1) == ([failed], 2)
    assert (await listed(client, status=""))[1] == 9


async def test_a_list_shows_the_callers_tasks_and_nobodys(connect: Connect, client: httpx.AsyncClient) -> None:
    colleague, foreigner, nobody = await connect("colleague"), await connect("x", org="elsewhere"), await connect("")
    mine, theirs = await submitted(client, session_id="s"), await submitted(colleague, session_id="s")
    nobodys = await submitted(nobody, session_id="s")
    await submitted(foreigner, session_id="s")
    for query in ({}, {"session_id": "s"}, {"status": "QUEUED"}, {"session_id": "s", "status": "QUEUED"}):
        assert await listed(client, **query) == ([nobodys, mine], 2)
        assert await listed(colleague, **query) == ([nobodys, theirs], 2)
        assert await listed(nobody, **query) == ([nobodys], 1)
    assert await listed(client, session_id="other") == ([], 0)
    assert await listed(client, session_id="s", status="RUNNING") == ([], 0)


async def test_the_dead_are_those_whose_attempts_are_used_up_or_whose_handler_raised(
    connect: Connect, client: httpx.AsyncClient, store: Store
) -> None:
    colleague, nobody = await connect("colleague"), await connect("")

    async def ended(event: AnyEvent, who: httpx.AsyncClient = client) -> str:
        id_ = await submitted(who, session_id="s")
        await tell(await claimed(store, id_), event)
        return id_

    await ended(events.Failed(error="e"))
    await ended(events.TimedOut())
    mine, nobodys = await ended(events.Errored(error="e")), await ended(events.Errored(error="e"), nobody)
    theirs = await ended(events.Errored(error="e"), colleague)
    for dead in ("true", "1", "TRUE"):
        assert await listed(client, dead=dead) == ([nobodys, mine], 2)
    assert await listed(client, dead="true", session_id="s", limit=1) == ([nobodys], 2)
    assert await listed(colleague, dead="true") == ([theirs, nobodys], 2)
    assert (await listed(client, dead="false"))[1] == (await listed(client))[1] == 4


async def test_a_tasks_children_are_listed_by_the_lists_rule(
    connect: Connect, client: httpx.AsyncClient, store: Store
) -> None:
    parent = await submitted(client)
    attempt = await claimed(store, parent)
    children = []
    for i, owner in enumerate((DEVELOPMENT_USER, "", "colleague", DEVELOPMENT_USER)):
        children.append(f"child-{i}")
        task = Submission(
            id=children[-1],
            org=DEVELOPMENT_ORG,
            owner=owner,
            parent=parent,
            session=f"s{i}",
            agent=f"a{i}",
            queue="other",
            submission="r",
        )
        await tell(attempt, events.ChildSubmitted(task=task))
    await store.queues.follow_up()
    assert (await client.get(f"{TASKS}/{parent}")).json()["children"] == 4
    assert (await client.get(f"{TASKS}/child-0")).json()["parent_task_id"] == parent
    one, two, three, four = children
    assert await listed(client, parent_id=parent) == ([four, two, one], 3)
    assert await listed(await connect("colleague"), parent_id=parent) == ([three, two], 2)
    assert await listed(client, parent_id=parent, session_id="s3") == ([four], 1)
    assert await listed(client, parent_id=parent, agent_id="a0") == ([one], 1)
    assert await listed(client, parent_id=parent, limit=1, offset=1) == ([two], 3)
    await client.post(f"{TASKS}/{four}/cancel")
    assert await listed(client, parent_id=parent, status="CANCELLED") == ([four], 1)
    assert await listed(client, parent_id=parent, dead="true") == ([], 0)
    assert await listed(client, parent_id=one) == ([], 0)
    assert await listed(await connect("x", org="elsewhere"), parent_id=parent) == ([], 0)


async def test_a_list_too_deep_to_merge_says_so(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "WALK_MAX", 3)
    for _ in range(5):
        await submitted(client)
    answer = await client.get(TASKS, params={"limit": 4})
    assert answer.headers["X-Total-Capped"] == "true"
    assert len(answer.json()["tasks"]) == 3
    assert "X-Total-Capped" not in (await client.get(TASKS, params={"limit": 2})).headers


# Events


async def told(client: httpx.AsyncClient, id_: str, **query: Any) -> dict[str, Any]:
    answer = await client.get(f"{TASKS}/{id_}/events", params=query)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    assert body["count"] == len(body["events"])
    return body


def seqs(body: dict[str, Any]) -> list[int]:
    return [event["seq"] for event in body["events"]]


async def test_events_are_what_upstream_keeps_unless_a_cursor_asks_for_all(
    client: httpx.AsyncClient, store: Store
) -> None:
    id_ = await submitted(client)
    attempt = await claimed(store, id_)
    await tell(
        attempt,
        events.Noted(name="LLM_PROMPT", message="p"),
        events.TextDelta(text="B", agent="final_output"),
        events.TextDelta(text="e", agent="final_output"),
        events.TextCompleted(text="Be", agent="final_output"),
        events.Completed(result="Be"),
    )
    body = await told(client, id_)
    assert [event["type"] for event in body["events"]] == [
        "DATA_PROCESSING",
        "WORKFLOW_STARTED",
        "LLM_OUTPUT",
        "WORKFLOW_COMPLETED",
    ]
    assert seqs(body) == [1, 2, 6, 7]
    assert "gap" not in body
    everything = await told(client, id_, after="")
    assert seqs(everything) == [1, 2, 3, 4, 5, 6, 7]
    assert everything["events"][3] == {
        "workflow_id": id_,
        "type": "LLM_PARTIAL",
        "agent_id": "final_output",
        "message": "B",
        "payload": {"attempt": 1},
        "timestamp": everything["events"][3]["timestamp"],
        "seq": 4,
        "stream_id": everything["events"][3]["stream_id"],
    }
    for after, left in (
        ("0", 7),
        ("0-0", 7),
        ("3", 4),
        ("7", 0),
        (everything["events"][4]["stream_id"], 2),
        (everything["events"][6]["stream_id"] + ".end", 0),
    ):
        assert len((await told(client, id_, after=after))["events"]) == left, after
    assert seqs(await told(client, id_, after="1", limit=2, offset=1)) == [3, 4]


async def test_event_pages_fit_together_over_many_store_pages(client: httpx.AsyncClient, store: Store) -> None:
    id_ = await submitted(client)
    attempt = await claimed(store, id_)
    for i in range(650):
        await tell(attempt, events.TextDelta(text=".") if i % 2 else events.Noted(name="WARNING", message=str(i)))
    await tell(attempt, events.Completed())
    kept = [1, 2, *(3 + i for i in range(650) if i % 2 == 0), 653]
    pages = [await told(client, id_, limit=100, offset=offset) for offset in range(0, 500, 100)]
    assert [seq for page in pages for seq in seqs(page)] == kept
    assert [page["count"] for page in pages] == [100, 100, 100, 28, 0]
    assert seqs(await told(client, id_)) == kept[:50]
    every = [await told(client, id_, after="", limit=200, offset=offset) for offset in range(0, 800, 200)]
    assert [seq for page in every for seq in seqs(page)] == list(range(1, 654))
    assert seqs(await told(client, id_, after="600", limit=200, offset=10)) == list(range(611, 654))


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("limit=201", "Invalid limit parameter"),
        ("limit=0", "Invalid limit parameter"),
        ("offset=x", "Invalid offset parameter"),
        ("after=-1", "Invalid after parameter"),
        ("after=1-", "Invalid after parameter"),
    ],
)
async def test_bad_event_pages_are_a_400(client: httpx.AsyncClient, query: str, sentence: str) -> None:
    id_ = await submitted(client)
    answer = await client.get(f"{TASKS}/{id_}/events?{query}")
    assert (answer.status_code, answer.json()) == (400, {"error": sentence})


async def test_a_cursor_from_elsewhere_is_said_to_be_one(client: httpx.AsyncClient) -> None:
    id_ = await submitted(client)
    last = (await client.get(f"{TASKS}/{id_}")).json()["last_event_id"]
    for after, reason in (("99", "ahead"), ("999999999999999-0", "ahead"), ("18446744073709551615-0", "ahead")):
        body = await told(client, id_, after=after)
        assert body == {
            "events": [],
            "count": 0,
            "last_event_id": last,
            "ended": False,
            "gap": {"reason": reason, "earliest_seq": 1, "latest_seq": 1, "last_event_id": last},
        }
    assert (await told(client, id_, after="5-999999999999999"))["count"] == 1  # before the first: from the start


class TestTrimmed:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"events_per_mark": 10})

    async def test_events_that_are_no_longer_kept_are_a_gap(self, client: httpx.AsyncClient, store: Store) -> None:
        id_ = await submitted(client, session_id="s")
        attempt = await claimed(store, id_)
        for i in range(30):
            await tell(attempt, events.Noted(name="WARNING", message=str(i)))
        page = await store.events(DEVELOPMENT_ORG, id_, "")
        assert page is not None
        assert page.base_seq > 0
        kept = list(range(page.base_seq + 1, 33))
        for query in ({}, {"after": ""}, {"after": "1"}):
            body = await told(client, id_, **query)
            assert seqs(body) == kept
            assert body["gap"] == {
                "reason": "trimmed",
                "earliest_seq": page.base_seq + 1,
                "latest_seq": 32,
                "last_event_id": page.last_id,
            }
        assert seqs(await told(client, id_, limit=3, offset=2)) == kept[2:5]
        assert "gap" not in await told(client, id_, after=str(page.base_seq))
        assert (await client.get(f"{TASKS}/{id_}/timeline")).json()["gap"]["reason"] == "trimmed"
        (turn,) = (await client.get("/api/v1/sessions/s/events")).json()["turns"]
        assert seqs(turn) == kept


async def test_a_task_deleted_while_it_is_read_ends_its_list(
    client: httpx.AsyncClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    id_ = await submitted(client)
    attempt = await claimed(store, id_)
    await tell(attempt, *(events.Noted(name="WARNING") for _ in range(5)))
    read = store.events

    async def read_then_delete(org: str, task: str, after: str, **more: Any) -> Any:
        page = await read(org, task, after, **{**more, "limit": 3})
        if not after:
            await store.delete(org, task)
        return page

    monkeypatch.setattr(store, "events", read_then_delete)
    assert seqs(await told(client, id_)) == [1, 2, 3]


async def test_a_timeline_is_200_and_a_summary_leaves_out_beginnings(client: httpx.AsyncClient, store: Store) -> None:
    id_ = await submitted(client)
    await tell(
        await claimed(store, id_),
        events.ToolCalled(tool="search", params={"q": 1}),
        events.TextDelta(text="."),
        events.ToolReturned(tool="search", output="found"),
        events.Completed(),
    )
    answer = await client.get(f"{TASKS}/{id_}/timeline", params={"persist": "true"})
    assert answer.status_code == 200
    body = answer.json()
    assert [event["type"] for event in body["events"]] == [
        "DATA_PROCESSING",
        "WORKFLOW_STARTED",
        "TOOL_OBSERVATION",
        "WORKFLOW_COMPLETED",
    ]
    assert body["workflow_id"] == id_
    assert body["stats"] == {"total": 4, "mode": "summary"}
    row = body["events"][2]
    assert set(row) == {"id", "workflow_id", "type", "message", "timestamp", "seq", "created_at"}
    assert (row["seq"], row["message"]) == (5, "found")
    full = (await client.get(f"{TASKS}/{id_}/timeline?mode=full&include_payloads=true")).json()
    assert full["stats"] == {"total": 5, "mode": "full"}
    assert full["events"][2]["payload"] == {"tool": "search", "params": {"q": 1}}
    bad = await client.get(f"{TASKS}/{id_}/timeline?mode=some")
    assert (bad.status_code, bad.json()) == (400, {"error": "Invalid mode (allowed: summary, full)"})


# Steer


async def steered(client: httpx.AsyncClient, id_: str, verb: str, **more: Any) -> tuple[int, dict[str, Any]]:
    answer = await client.post(f"{TASKS}/{id_}/{verb}", **more)
    body: dict[str, Any] = answer.json()
    return answer.status_code, body


async def status_of(client: httpx.AsyncClient, id_: str) -> str:
    shown: str = (await client.get(f"{TASKS}/{id_}")).json()["status"]
    return shown.removeprefix("TASK_STATUS_")


async def test_a_cancel_is_202_at_once_and_too_late_it_is_not_a_success(client: httpx.AsyncClient) -> None:
    id_ = await submitted(client)
    assert await steered(client, id_, "cancel", json={"reason": "enough"}) == (
        202,
        {"success": True, "message": "Task cancelled successfully"},
    )
    assert await status_of(client, id_) == "CANCELLED"
    assert await steered(client, id_, "cancel") == (
        202,
        {
            "success": False,
            "message": "Failed to cancel task: cannot cancel cancelled task",
            "status": "TASK_STATUS_CANCELLED",
        },
    )
    state = (await client.get(f"{TASKS}/{id_}/control-state")).json()
    assert state == {
        "is_paused": False,
        "is_cancelled": True,
        "paused_at": "",
        "pause_reason": "",
        "paused_by": "",
        "cancel_reason": "enough",
        "cancelled_by": DEVELOPMENT_USER,
    }


async def test_pause_and_resume_move_a_running_task_and_refuse_the_rest(
    client: httpx.AsyncClient, store: Store
) -> None:
    id_ = await submitted(client)
    attempt = await claimed(store, id_)
    assert await steered(client, id_, "resume") == (
        409,
        {
            "error": "task is not paused",
            "success": False,
            "message": "task is not paused",
            "status": "TASK_STATUS_RUNNING",
        },
    )
    assert await steered(client, id_, "pause", json={"reason": "lunch"}) == (
        202,
        {"success": True, "message": "Pause signal sent", "task_id": id_},
    )
    assert await status_of(client, id_) == "PAUSED"
    state = (await client.get(f"{TASKS}/{id_}/control-state")).json()
    assert (state["is_paused"], state["pause_reason"], state["paused_by"]) == (True, "lunch", DEVELOPMENT_USER)
    assert state["paused_at"].endswith("Z")
    code, body = await steered(client, id_, "pause")
    assert (code, body["error"]) == (409, "task is already paused")
    assert await steered(client, id_, "resume") == (
        202,
        {"success": True, "message": "Resume signal sent", "task_id": id_},
    )
    assert await status_of(client, id_) == "RUNNING"
    assert (await client.get(f"{TASKS}/{id_}/control-state")).json()["paused_at"] == ""
    await tell(attempt, events.Errored(error="e"))
    for verb in ("pause", "resume"):
        code, body = await steered(client, id_, verb)
        assert (code, body["error"]) == (409, f"cannot {verb} failed task")


async def test_a_queued_task_can_be_held_and_go_on(client: httpx.AsyncClient, store: Store) -> None:
    id_ = await submitted(client)
    assert (await steered(client, id_, "pause"))[0] == 202
    assert await status_of(client, id_) == "PAUSED"
    assert await store.claim(["default"], "w", 1) == []
    assert (await steered(client, id_, "pause"))[1]["error"] == "task is already paused"
    assert (await steered(client, id_, "resume"))[0] == 202
    await claimed(store, id_)


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume", "retry"])
async def test_only_the_owner_steers_a_task_and_anybody_one_of_nobody(
    connect: Connect, client: httpx.AsyncClient, verb: str
) -> None:
    mine, nobodys = await submitted(client), await submitted(await connect(""))
    if verb == "resume":
        for id_ in (mine, nobodys):
            await client.post(f"{TASKS}/{id_}/pause")
    if verb == "retry":
        await client.post(f"{TASKS}/{mine}/cancel")
        await client.post(f"{TASKS}/{nobodys}/cancel")
    for other in (await connect("colleague"), await connect(""), await connect("x", org="elsewhere")):
        assert await steered(other, mine, verb) == (404, {"error": "Task not found"})
        assert (await other.get(f"{TASKS}/{mine}/control-state")).status_code == 404
        assert (await other.delete(f"{TASKS}/{mine}")).status_code == 404
    assert (await steered(await connect("x", org="elsewhere"), nobodys, verb))[0] == 404
    assert (await steered(await connect("colleague"), nobodys, verb))[0] == 202
    assert (await steered(client, mine, verb))[0] == 202
    assert await steered(client, "task_unknown", verb) == (404, {"error": "Task not found"})
    assert (await steered(client, "a%20b", verb))[0] == 400


@pytest.mark.parametrize("content", [b"{", b"[]", b'"why"', b'{"reason": 7}'])
async def test_a_controls_body_is_an_object_with_a_text_or_nothing(client: httpx.AsyncClient, content: bytes) -> None:
    id_ = await submitted(client)
    code, body = await steered(client, id_, "cancel", content=content)
    assert code == 400
    assert body["error"].startswith("Invalid request body")
    assert await status_of(client, id_) == "QUEUED"
    for good in (b"", b"{}", b'{"reason": null}'):
        assert (await steered(client, await submitted(client), "cancel", content=good))[0] == 202
    assert (await steered(client, id_, "cancel", json={"reason": "x" * 9000}))[0] == 413


async def test_a_repeated_control_with_a_key_gets_the_first_answer(client: httpx.AsyncClient, store: Store) -> None:
    id_ = await submitted(client)
    keyed = {"Idempotency-Key": "k"}
    for verb in ("pause", "resume", "cancel", "retry"):
        first = await client.post(f"{TASKS}/{id_}/{verb}", headers=keyed)
        again = await client.post(f"{TASKS}/{id_}/{verb}", headers=keyed)
        assert (first.status_code, first.text) == (again.status_code, again.text)
        assert first.json()["success"]
        assert "X-Idempotency-Cached" not in first.headers
        assert again.headers["X-Idempotency-Cached"] == "true"
        assert again.headers["X-Idempotency-Key"] == "k"
    assert [event["type"] for event in (await told(client, id_))["events"]] == [
        "DATA_PROCESSING",
        "WORKFLOW_PAUSING",
        "WORKFLOW_RESUMED",
        "WORKFLOW_CANCELLED",
        "DATA_PROCESSING",
    ]


async def test_an_ended_task_is_tried_again_with_all_its_attempts(client: httpx.AsyncClient, store: Store) -> None:
    id_ = await submitted(client, max_attempts=2)
    for _ in range(2):
        await tell(await claimed(store, id_), events.TextDelta(text="half"), events.Errored(error="e"))
        assert await steered(client, id_, "retry", json={"reason": "mended"}) == (
            202,
            {"success": True, "message": "The task is queued again", "task_id": id_},
        )
    body = (await client.get(f"{TASKS}/{id_}")).json()
    assert (body["status"], body["attempt"], body["max_attempts"], body["error"]) == ("TASK_STATUS_QUEUED", 0, 2, "")
    assert (await told(client, id_))["events"][-1]["message"] == "mended"
    attempt = await claimed(store, id_)
    code, answer = await steered(client, id_, "retry")
    assert (code, answer["error"], answer["status"]) == (409, "task has not ended", "TASK_STATUS_RUNNING")
    await attempt.complete()
    code, answer = await steered(client, id_, "retry")
    assert (code, answer["error"]) == (409, "cannot retry completed task")


@pytest.mark.parametrize("event", [events.Failed(error="e"), events.TimedOut(), events.Cancelled()])
async def test_whatever_ended_badly_can_be_tried_again(
    client: httpx.AsyncClient, store: Store, event: AnyEvent
) -> None:
    id_ = await submitted(client)
    await store.append(DEVELOPMENT_ORG, id_, event)
    assert (await steered(client, id_, "retry"))[0] == 202
    assert (await told(client, id_))["events"][-1]["message"] == "The task is tried once more."
    await claimed(store, id_)


async def test_a_retry_gets_as_much_time_as_the_submission(client: httpx.AsyncClient, store: Store) -> None:
    async def retried(id_: str) -> float:
        """How much time that gives it, in seconds."""
        await client.post(f"{TASKS}/{id_}/cancel")
        assert (await steered(client, id_, "retry"))[0] == 202
        task = await store.get(DEVELOPMENT_ORG, id_)
        assert task
        return (task.deadline_at - task.queued_at) / 1_000_000 if task.deadline_at else 0

    plain, timed = await submitted(client), await submitted(client, timeout_seconds=90, ttl_seconds=5)
    later = await submitted(client, run_at=(datetime.now(UTC) + timedelta(hours=1)).isoformat(), timeout_seconds=50)
    for _ in range(3):
        assert await retried(plain) == 0
        assert await retried(timed) == 90
        assert await retried(later) == pytest.approx(50)
    await client.post(f"{TASKS}/{timed}/cancel")
    continued = events.Continued(query="and?", submission="again", deadline_seconds=40)
    await store.append(DEVELOPMENT_ORG, timed, continued)
    assert await retried(timed) == 40


async def test_a_task_waits_for_its_moment_and_its_turn(client: httpx.AsyncClient, store: Store) -> None:
    moment = datetime.now(UTC) + timedelta(hours=1)
    later = await submitted(client, run_at=moment.isoformat(), max_attempts=5)
    low, urgent = await submitted(client), await submitted(client, priority=2)
    await claimed(store, urgent)
    await claimed(store, low)
    assert await store.claim(["default"], "w", 1) == []
    body = (await client.get(f"{TASKS}/{later}")).json()
    assert body["max_attempts"] == 5
    assert abs(datetime.fromisoformat(body["next_attempt_at"]) - moment) < timedelta(seconds=5)


async def test_a_task_that_nobody_begins_in_time_expires(client: httpx.AsyncClient, store: Store) -> None:
    id_ = await submitted(client, ttl_seconds=1)

    async def timed_out() -> bool:
        await store.queues.tick()
        return await status_of(client, id_) == "TIMEOUT"

    await wait_until(timed_out, "its time to live is over")
    assert "time to live" in (await client.get(f"{TASKS}/{id_}")).json()["error"]


async def test_options_count_in_what_an_idempotency_key_stands_for(client: httpx.AsyncClient) -> None:
    keyed = {"Idempotency-Key": "k"}
    first = await client.post(TASKS, json={"query": "q", "priority": 1}, headers=keyed)
    assert first.status_code == 200
    for changed in ({"priority": 2}, {"priority": 1, "max_attempts": 2}, {}):
        answer = await client.post(TASKS, json={"query": "q", **changed}, headers=keyed)
        assert answer.status_code == 409


async def test_a_task_can_be_deleted_once(client: httpx.AsyncClient, store: Store) -> None:
    id_ = await submitted(client)
    answer = await client.delete(f"{TASKS}/{id_}")
    assert (answer.status_code, answer.content) == (204, b"")
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("POST", "/cancel")):
        gone = await client.request(method, f"{TASKS}/{id_}{path}")
        assert (gone.status_code, gone.json()) == (404, {"error": "Task not found"})
    assert await listed(client) == ([], 0)
    assert await store.get(DEVELOPMENT_ORG, id_) is None


async def test_a_deadline_ends_the_task_as_timeout(client: httpx.AsyncClient, store: Store) -> None:
    id_ = await submitted(client, timeout_seconds=1)

    async def timed_out() -> bool:
        await store.queues.tick()
        return await status_of(client, id_) == "TIMEOUT"

    await wait_until(timed_out, "the deadline fired")
    body = (await client.get(f"{TASKS}/{id_}")).json()
    assert body["error"] == body["error_message"] == "The task exceeded its deadline."


async def test_a_task_of_another_dialect_is_readable_too(client: httpx.AsyncClient, store: Store) -> None:
    task = Submission(id="x-1", org=DEVELOPMENT_ORG, queue="agent:a", agent="a", dialect="xpander", submission="r")
    await store.submit(task)
    body = (await client.get(f"{TASKS}/x-1")).json()
    assert (body["query"], body["session_id"], body["mode"]) == ("", "", "EXECUTION_MODE_STANDARD")


@pytest.mark.parametrize("path", ["/api/v1/schedules", "/api/v1/skills", "/api/v1/tools"])
async def test_what_is_out_of_scope_is_a_404_as_json(client: httpx.AsyncClient, path: str) -> None:
    for method in ("GET", "POST"):
        answer = await client.request(method, path)
        assert answer.status_code == 404
        assert isinstance(answer.json()["error"], str)


# The real SDK


@pytest.fixture
async def sdk(client: httpx.AsyncClient) -> AsyncShannonClient:
    found = AsyncShannonClient("http://localhost", DEVELOPMENT_KEY)
    found._http_client = client
    return found


async def test_the_sdk_submits_waits_and_reads(sdk: AsyncShannonClient, store: Store) -> None:
    handle = await sdk.submit_task(
        "why?", session_id="s", context={"role": "poet"}, mode="simple", model_tier="small", idempotency_key="k"
    )
    assert handle.workflow_id == handle.task_id
    assert handle.session_id == "s"
    attempt = await claimed(store, handle.task_id)
    await tell(attempt, events.Progressed(fraction=0.25))
    status = await sdk.get_status(handle.task_id)
    assert (status.status, status.progress, status.result, status.error_message) == (
        TaskStatusEnum.RUNNING,
        0.25,
        None,
        "",
    )
    assert status.context == {"role": "poet", "model_tier": "small"}
    await tell(
        attempt, events.TextCompleted(text="Be.", agent="final_output"), events.Completed(result="Be.", usage=USAGE)
    )
    status = await sdk.wait(handle.task_id, timeout=5)
    assert (status.status, status.result) == (TaskStatusEnum.COMPLETED, "Be.")
    assert status.usage
    assert status.usage["total_tokens"] == 5
    kinds = [event.type for event in await sdk.get_task_events(handle.task_id)]
    assert kinds == ["DATA_PROCESSING", "WORKFLOW_STARTED", "PROGRESS", "LLM_OUTPUT", "WORKFLOW_COMPLETED"]
    assert EventType.WORKFLOW_COMPLETED in kinds
    timeline = await sdk.get_task_timeline(handle.task_id)
    assert timeline["stats"]["total"] == 4
    tasks, total = await sdk.list_tasks(status="COMPLETED", session_id="s")
    assert total == 1
    assert (tasks[0].task_id, tasks[0].query, tasks[0].total_token_usage.cost_usd) == (handle.task_id, "why?", 0.0015)
    assert tasks[0].completed_at


async def test_the_sdk_steers(sdk: AsyncShannonClient) -> None:
    handle, url = await sdk.submit_and_stream("why?", force_swarm=True)
    assert url == f"/api/v1/stream/sse?workflow_id={handle.task_id}"
    assert await sdk.pause_task(handle.task_id, "lunch")
    state = await sdk.get_control_state(handle.task_id)
    assert (state.is_paused, state.pause_reason) == (True, "lunch")
    assert state.paused_at
    with pytest.raises(sdk_errors.ConnectionError, match="409: task is already paused"):
        await sdk.pause_task(handle.task_id)
    assert await sdk.resume_task(handle.task_id)
    assert await sdk.cancel(handle.task_id, "enough")
    assert not await sdk.cancel(handle.task_id)
    assert (await sdk.get_control_state(handle.task_id)).is_cancelled
    assert (await sdk.wait(handle.task_id)).status is TaskStatusEnum.CANCELLED


async def test_the_sdk_raises_what_it_means(sdk: AsyncShannonClient, connect: Connect) -> None:
    for call in (sdk.get_status, sdk.get_task_events, sdk.get_task_timeline, sdk.cancel, sdk.pause_task):
        with pytest.raises(sdk_errors.TaskNotFoundError, match="Task not found"):
            await call("task_unknown")
    with pytest.raises(sdk_errors.ValidationError, match="Invalid limit parameter"):
        await sdk.list_tasks(limit=1000)
    await sdk.submit_task("q", idempotency_key="k")
    with pytest.raises(sdk_errors.ConnectionError, match="409"):
        await sdk.submit_task("other", idempotency_key="k")
    sdk.api_key, sdk._http_client = "sk_unknown", await connect()
    with pytest.raises(sdk_errors.AuthenticationError, match="Unauthorized"):
        await sdk.submit_task("q")


async def test_a_poller_that_knows_the_present_state_is_told_304(client: httpx.AsyncClient) -> None:
    id_ = await submitted(client)
    first = await client.get(f"{TASKS}/{id_}")
    for known in (first.headers["ETag"], f'"other", W/{first.headers["ETag"]}', "*"):
        answer = await client.get(f"{TASKS}/{id_}", headers={"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", first.headers["ETag"])
    await client.post(f"{TASKS}/{id_}/cancel")
    changed = await client.get(f"{TASKS}/{id_}", headers={"If-None-Match": first.headers["ETag"]})
    assert (changed.status_code, changed.json()["status"]) == (200, "TASK_STATUS_CANCELLED")


@pytest.mark.parametrize(
    ("path", "methods"),
    [(TASKS, "GET, HEAD, POST"), (f"{TASKS}/t", "DELETE, GET, HEAD"), (f"{TASKS}/t/cancel", "POST")],
)
async def test_a_wrong_method_is_told_all_right_ones(client: httpx.AsyncClient, path: str, methods: str) -> None:
    answer = await client.put(path)
    assert (answer.status_code, answer.headers["Allow"]) == (405, methods)
