"""Approvals over HTTP: what waits for a human, and the human's decision, on a real store."""

import asyncio
from typing import Any

import httpx
import pytest
from shannon import AsyncShannonClient  # type: ignore[import-untyped]
from shannon import errors as sdk_errors

from app import events
from app.identity import DEVELOPMENT_KEY, DEVELOPMENT_ORG, DEVELOPMENT_USER
from app.store import Store
from app.task import Status
from tests.api.asking import Connect, claimed, tell
from tests.api.serving import Attempt, started

TASKS, APPROVALS = "/api/v1/tasks", "/api/v1/approvals"
UNKNOWN = (404, {"error": "Workflow or approval not found"})
ASKED = events.ApprovalRequested(approval="ap1", reason="Deploy?", payload={"risk": "high"})


async def asked(store: Store, event: events.AnyEvent = ASKED, **fields: Any) -> tuple[str, Attempt]:
    """A task whose worker waits for an approval."""
    task, attempt = await started(store, **fields)
    await tell(attempt, event)
    return task, attempt


async def decided(
    client: httpx.AsyncClient, task: str, *, approval: str = "ap1", key: str = "", **more: Any
) -> tuple[int, dict[str, Any]]:
    body = {"workflow_id": task, "approval_id": approval, "approved": True, **more}
    headers = {"Idempotency-Key": key} if key else {}
    answer = await client.post(f"{APPROVALS}/decision", json=body, headers=headers)
    said: dict[str, Any] = answer.json()
    return answer.status_code, said


async def decisions(store: Store, task: str) -> list[events.ApprovalDecided]:
    page = await store.events(DEVELOPMENT_ORG, task, "")
    assert page
    return [entry.event for entry in page.entries if isinstance(entry.event, events.ApprovalDecided)]


async def status_of(store: Store, task: str) -> Status:
    found = await store.get(DEVELOPMENT_ORG, task)
    assert found
    return found.status


async def test_a_decision_lets_the_task_go_on_and_reaches_the_worker(client: httpx.AsyncClient, store: Store) -> None:
    task, attempt = await asked(store)
    shown = (await client.get(f"{TASKS}/{task}")).json()
    assert (shown["status"], shown["approval"]["approval_id"]) == ("TASK_STATUS_PAUSED", "ap1")
    answer = await decided(client, task, feedback="Go.", modified_action="deploy --slowly", run_id="r")
    assert answer == (
        200,
        {
            "status": "sent",
            "success": True,
            "message": "Approval ap1 processed successfully",
            "workflow_id": task,
            "run_id": "r",
            "approval_id": "ap1",
        },
    )
    (event,) = await decisions(store, task)
    assert event == events.ApprovalDecided(
        actor=f"user:{DEVELOPMENT_USER}",
        approval="ap1",
        approved=True,
        feedback="Go.",
        payload={"modified_action": "deploy --slowly"},
    )
    assert await status_of(store, task) is Status.RUNNING
    assert "approval" not in (await client.get(f"{TASKS}/{task}")).json()
    await attempt.complete()


async def test_a_denial_is_a_decision_too_and_none_at_all_is_a_denial(client: httpx.AsyncClient, store: Store) -> None:
    task, attempt = await asked(store)
    assert (await decided(client, task, approved=False, approved_by="boss"))[0] == 200
    await tell(attempt, events.ApprovalRequested(approval="ap2", reason="Really?"))
    assert (await decided(client, task, approval="ap2", approved=None, approved_by=DEVELOPMENT_USER))[0] == 200
    first, second = await decisions(store, task)
    assert (first.approved, first.payload) == (False, {"approved_by": "boss"})
    assert (second.approved, second.payload) == (False, {})


async def test_a_task_that_lost_its_worker_while_it_waited_is_queued_by_the_decision(
    client: httpx.AsyncClient, store: Store
) -> None:
    task, attempt = await asked(store)
    await tell(attempt, events.Requeued(refund=True))
    assert await status_of(store, task) is Status.HELD
    assert (await client.get(APPROVALS)).json()["total_count"] == 1
    assert (await decided(client, task))[0] == 200
    assert await status_of(store, task) is Status.QUEUED


async def test_the_same_decision_again_is_the_same_answer_and_another_is_too_late(
    client: httpx.AsyncClient, store: Store
) -> None:
    task, attempt = await asked(store)
    answers = await asyncio.gather(*(decided(client, task) for _ in range(5)))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0] == 200
    assert len(await decisions(store, task)) == 1
    for _ in range(2):  # also when the task has ended
        assert (await decided(client, task))[0] == 200
        code, body = await decided(client, task, approved=False)
        assert (code, body["error"]) == (409, "Approval ap1 was already approved")
        if await status_of(store, task) is Status.RUNNING:
            await attempt.complete()
    assert len(await decisions(store, task)) == 1


async def test_the_latest_answer_to_a_question_that_was_asked_again_counts(
    client: httpx.AsyncClient, store: Store
) -> None:
    task, attempt = await asked(store)
    await decided(client, task)
    await tell(attempt, ASKED)
    assert (await decided(client, task, approved=False))[0] == 200
    code, body = await decided(client, task)
    assert (code, body["error"]) == (409, "Approval ap1 was already denied")


async def test_a_question_that_nobody_answered_in_time_is_no_longer_open(
    client: httpx.AsyncClient, store: Store
) -> None:
    task, _ = await asked(store)
    await client.post(f"{TASKS}/{task}/cancel")
    code, body = await decided(client, task)
    assert (code, body["error"]) == (409, "Approval ap1 is no longer pending")
    assert body["status"] == "TASK_STATUS_CANCELLED"


async def test_a_key_makes_a_repeat_the_first_answer_and_belongs_to_its_body(
    client: httpx.AsyncClient, store: Store
) -> None:
    task, attempt = await asked(store)
    path, keyed = f"{APPROVALS}/decision", {"Idempotency-Key": "k"}
    body = {"workflow_id": task, "approval_id": "ap1", "approved": True}
    first = await client.post(path, json=body, headers=keyed)
    await tell(attempt, ASKED)
    again = await client.post(path, json=body, headers=keyed)
    assert (again.status_code, again.text) == (first.status_code, first.text)
    assert "X-Idempotency-Cached" not in first.headers
    assert again.headers["X-Idempotency-Cached"] == "true"
    assert await status_of(store, task) is Status.PAUSED  # that was asked anew, and the repeat answers the first
    assert (await decided(client, task, feedback="now", key="k"))[0] == 200
    assert await status_of(store, task) is Status.RUNNING


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "Invalid request body: Input data was truncated"),
        (b"[]", "Invalid request body: Expected `object`, got `array`"),
        (b"{}", "workflow_id and approval_id are required"),
        (b'{"workflow_id": "t"}', "workflow_id and approval_id are required"),
        (b'{"workflow_id": "", "approval_id": "a"}', "workflow_id and approval_id are required"),
        (
            b'{"workflow_id": "t", "approval_id": "a", "approved": "yes"}',
            "Invalid request body: Expected `bool | null`, got `str` - at `$.approved`",
        ),
    ],
)
async def test_what_is_no_decision_is_a_400(client: httpx.AsyncClient, body: bytes, sentence: str) -> None:
    answer = await client.post(f"{APPROVALS}/decision", content=body)
    assert (answer.status_code, answer.json()) == (400, {"error": sentence})


async def test_what_nobody_asked_for_is_a_404_and_a_flood_a_413(client: httpx.AsyncClient, store: Store) -> None:
    task, _ = await asked(store)
    for id_, approval in ((task, "ap2"), (task, "x" * 257), ("task_unknown", "ap1"), ("no spaces", "ap1")):
        assert await decided(client, id_, approval=approval) == UNKNOWN
    assert (await decided(client, task, feedback="x" * 70_000))[0] == 413
    reviewed, _ = await asked(store, events.ReviewRequested(plan="p", version=1))
    assert await decided(client, reviewed, approval="1") == UNKNOWN


async def test_only_the_owner_decides_and_anybody_for_a_task_of_nobody(
    connect: Connect, client: httpx.AsyncClient, store: Store
) -> None:
    mine, _ = await asked(store)
    nobodys, _ = await asked(store, owner="")
    for other in (await connect("colleague"), await connect(""), await connect("x", org="elsewhere")):
        assert await decided(other, mine) == UNKNOWN
    assert await decided(await connect("x", org="elsewhere"), nobodys) == UNKNOWN
    assert (await decided(await connect("colleague"), nobodys))[0] == 200
    assert (await decided(client, mine))[0] == 200
    for method, path in (("GET", ""), ("POST", "/decision")):
        answer = await (await connect()).request(method, APPROVALS + path, json={})
        assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})


# The list


async def test_the_list_shows_what_waits_for_this_key_until_it_is_decided(
    connect: Connect, client: httpx.AsyncClient, store: Store
) -> None:
    mine, _ = await asked(store, query="ship it", title="Shipping")
    nobodys, attempt = await asked(store, owner="")
    planned, _ = await asked(store, events.ReviewRequested(plan="1. Ask.", version=1))
    theirs, _ = await asked(store, owner="colleague")
    paused, _ = await started(store)
    await client.post(f"{TASKS}/{paused}/pause")  # waits for nothing but its end
    body = (await client.get(APPROVALS)).json()
    assert body["total_count"] == 3
    review, common, own = body["approvals"]
    assert own == {
        "workflow_id": mine,
        "task_id": mine,
        "kind": "approval",
        "approval_id": "ap1",
        "reason": "Deploy?",
        "payload": {"risk": "high"},
        "requested_at": own["requested_at"],
        "query": "ship it",
        "title": "Shipping",
        "session_id": "s1",
    }
    assert own["requested_at"] == (await client.get(f"{TASKS}/{mine}")).json()["approval"]["requested_at"]
    assert common["task_id"] == nobodys
    assert (review["task_id"], review["kind"], review["payload"]) == (planned, "review", {"round": 1, "version": 1})
    listed = (await (await connect("colleague")).get(APPROVALS)).json()["approvals"]
    assert [item["task_id"] for item in listed] == [theirs, nobodys]
    assert (await (await connect("x", org="elsewhere")).get(APPROVALS)).json() == {"approvals": [], "total_count": 0}
    await decided(client, mine)
    await tell(attempt, events.Failed(error="e"))
    left = (await client.get(APPROVALS)).json()
    assert ([item["task_id"] for item in left["approvals"]], left["total_count"]) == ([planned], 1)


async def test_pages_of_the_list_fit_together(client: httpx.AsyncClient, store: Store) -> None:
    tasks = [(await asked(store))[0] for _ in range(5)][::-1]
    pages = [(await client.get(APPROVALS, params={"limit": 2, "offset": offset})).json() for offset in (0, 2, 4, 6)]
    assert [item["task_id"] for page in pages for item in page["approvals"]] == tasks
    assert {page["total_count"] for page in pages} == {5}
    for query in ("limit=0", "limit=101", "limit=x"):
        answer = await client.get(f"{APPROVALS}?{query}")
        assert (answer.status_code, answer.json()) == (400, {"error": "Invalid limit parameter"})


async def test_a_task_that_waits_is_decided_about_and_not_resumed(client: httpx.AsyncClient, store: Store) -> None:
    task, _ = await asked(store)
    answer = await client.post(f"{TASKS}/{task}/resume")
    assert answer.status_code == 409
    assert "decide instead of resuming" in answer.json()["error"]


# The real SDK


async def test_the_sdk_approves_and_denies(client: httpx.AsyncClient, store: Store) -> None:
    sdk = AsyncShannonClient("http://localhost", DEVELOPMENT_KEY)
    sdk._http_client = client
    handle = await sdk.submit_task("Deploy")
    attempt = await claimed(store, handle.task_id)
    await tell(attempt, ASKED)
    assert await sdk.approve("ap1", handle.task_id, feedback="Go.") is True
    await tell(attempt, events.ApprovalRequested(approval="ap2", reason="Really?"))
    assert await sdk.approve("ap2", handle.task_id, approved=False) is True
    assert [(event.approved, event.feedback) for event in await decisions(store, handle.task_id)] == [
        (True, "Go."),
        (False, ""),
    ]
    with pytest.raises(sdk_errors.ShannonError, match="Workflow or approval not found"):
        await sdk.approve("ap3", handle.task_id)
