"""Reviews over HTTP: a plan, what a human says of it, and the next plan, on a real store."""

import asyncio
from typing import Any

import httpx
import pytest
from shannon import AsyncShannonClient  # type: ignore[import-untyped]
from shannon import errors as sdk_errors

from app import events
from app.api.shannon import reviews
from app.identity import DEVELOPMENT_KEY, DEVELOPMENT_ORG
from app.settings import Settings
from app.store import Store
from app.task import Status
from tests.api.asking import Connect, tell
from tests.api.serving import Attempt, served, started
from tests.waiting import wait_until

TASKS = "/api/v1/tasks"
UNKNOWN = (404, {"error": "Review session not found or expired"})


def plan(version: int, text: str = "") -> events.ReviewRequested:
    return events.ReviewRequested(plan=text or f"Plan {version}", version=version, round=version)


async def planned(store: Store, *, version: int = 1, **fields: Any) -> tuple[str, Attempt]:
    """A task whose worker waits for a review, of its first plan or of a later one."""
    task, attempt = await started(store, **fields)
    for earlier in range(1, version):
        await tell(attempt, plan(earlier))
        await store.append(DEVELOPMENT_ORG, task, events.Reviewed(version=earlier, approved=False, feedback="No."))
    await tell(attempt, plan(version))
    return task, attempt


async def reviewed(
    client: httpx.AsyncClient, task: str, action: str = "feedback", message: str | None = None, match: str = ""
) -> httpx.Response:
    headers = {"If-Match": match} if match else {}
    return await client.post(f"{TASKS}/{task}/review", json={"action": action, "message": message}, headers=headers)


async def replanned(store: Store, task: str, attempt: Attempt, version: int) -> None:
    """What a worker does: it waits for the feedback, and makes the next plan."""

    async def running() -> bool:
        found = await store.get(DEVELOPMENT_ORG, task)
        return found is not None and found.status is Status.RUNNING

    await wait_until(running, "the feedback is there")
    await tell(attempt, events.TextDelta(text="Thinking again."), plan(version))


async def test_feedback_is_answered_with_the_next_plan(client: httpx.AsyncClient, store: Store) -> None:
    task, attempt = await planned(store)
    answer = await client.get(f"{TASKS}/{task}/review")
    body = answer.json()
    assert (answer.status_code, answer.headers["ETag"]) == (200, "1")
    assert body == {
        "status": "reviewing",
        "round": 1,
        "version": 1,
        "current_plan": "Plan 1",
        "rounds": [{"role": "assistant", "message": "Plan 1", "timestamp": body["rounds"][0]["timestamp"]}],
        "query": "why?",
    }
    working = asyncio.create_task(replanned(store, task, attempt, 2))
    answer = await reviewed(client, task, message="Shorter.", match="1")
    await working
    assert (answer.status_code, answer.headers["ETag"]) == (200, "2")
    assert "Retry-After" not in answer.headers
    body = answer.json()
    assert body["plan"] == {"message": "Plan 2", "round": 2, "version": 2, "intent": "ready"}
    assert (body["status"], body["round"], body["version"], body["current_plan"]) == ("reviewing", 2, 2, "Plan 2")
    assert [(one["role"], one["message"]) for one in body["rounds"]] == [
        ("assistant", "Plan 1"),
        ("user", "Shorter."),
        ("assistant", "Plan 2"),
    ]
    assert {**body, "plan": None} == {**(await client.get(f"{TASKS}/{task}/review")).json(), "plan": None}
    answer = await reviewed(client, task, "approve", match='"2"')
    assert (answer.status_code, answer.json()) == (200, {"status": "approved", "message": "Research started"})
    found = await store.get(DEVELOPMENT_ORG, task)
    assert found
    assert (found.status, found.review) == (Status.RUNNING, "approved")
    await attempt.complete()
    done = (await client.get(f"{TASKS}/{task}/review")).json()
    assert (done["status"], done["current_plan"], len(done["rounds"])) == ("approved", "Plan 2", 3)


async def test_a_worker_that_takes_its_time_is_not_waited_for_without_end(
    client: httpx.AsyncClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reviews, "PLAN_SECONDS_MAX", 0.05)
    task, attempt = await planned(store)
    answer = await reviewed(client, task, message="Shorter.")
    body = answer.json()
    assert (answer.status_code, answer.headers["ETag"], body["version"], body["plan"]["version"]) == (200, "1", 1, 1)
    assert [one["role"] for one in body["rounds"]] == ["assistant", "user"]
    for action in ("feedback", "approve"):
        busy = await reviewed(client, task, action, "Shorter!")
        assert (busy.status_code, busy.json()) == (
            409,
            {"error": "The next plan is being made: review it when it is there"},
        )
    await tell(attempt, plan(2))
    assert (await client.get(f"{TASKS}/{task}/review")).json()["version"] == 2


async def test_a_task_that_ends_instead_ends_the_wait(client: httpx.AsyncClient, store: Store) -> None:
    task, _ = await planned(store)
    asking_ = asyncio.create_task(reviewed(client, task, message="Shorter."))

    async def told() -> bool:
        found = await store.get(DEVELOPMENT_ORG, task)
        return found is not None and not found.waits

    await wait_until(told, "the feedback is there")
    await client.post(f"{TASKS}/{task}/cancel")
    answer = await asking_
    assert (answer.status_code, answer.json()["version"]) == (200, 1)
    for again in (await client.get(f"{TASKS}/{task}/review"), await reviewed(client, task, "approve")):
        assert (again.status_code, again.json()) == UNKNOWN


async def test_a_client_that_leaves_ends_its_wait(store: Store, settings: Settings) -> None:
    task, attempt = await planned(store)
    async with served(store, settings) as server:
        with pytest.raises(httpx.ReadTimeout):
            await server.client.post(
                f"{TASKS}/{task}/review", json={"action": "feedback", "message": "Shorter."}, timeout=0.5
            )
        await wait_until(lambda: store.hub.subscribers == 0, "nobody waits any more")
    await tell(attempt, plan(2))  # the feedback was taken all the same


async def test_only_one_of_many_that_have_read_the_same_plan_is_heard(client: httpx.AsyncClient, store: Store) -> None:
    task, _ = await planned(store)
    answers = await asyncio.gather(*(reviewed(client, task, "approve", match="1") for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409, 409]
    assert {answer.json()["error"] for answer in answers if answer.status_code == 409} <= {
        "Review already approved",
        "Conflict: plan has been updated. Please review the latest version.",
    }
    answer = await reviewed(client, task, message="too late")
    assert (answer.status_code, answer.json()) == (409, {"error": "Review already approved"})


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        ("feedback", "Conflict: state has been modified"),
        ("approve", "Conflict: plan has been updated. Please review the latest version."),
    ],
)
async def test_an_opinion_of_another_version_is_a_409(
    client: httpx.AsyncClient, store: Store, action: str, sentence: str
) -> None:
    task, _ = await planned(store, version=2)
    for version in ("1", '"3"', "latest"):
        answer = await reviewed(client, task, action, "Shorter.", match=version)
        assert (answer.status_code, answer.json()) == (409, {"error": sentence})
    for i, version in enumerate(('W/"2"', "*")):
        other, _ = await planned(store, version=2, session=f"s{i}")
        assert (await reviewed(client, other, "approve", match=version)).status_code == 200


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "Invalid request body: Input data was truncated"),
        (b"[]", "Invalid request body: Expected `object`, got `array`"),
        (b'{"action": 7}', "Invalid request body: Expected `str | null`, got `int` - at `$.action`"),
        (b"{}", "action must be 'feedback' or 'approve'"),
        (b'{"action": "reject"}', "action must be 'feedback' or 'approve'"),
        (b'{"action": "feedback"}', "message is required for feedback"),
        (b'{"action": "feedback", "message": ""}', "message is required for feedback"),
        (
            b'{"action": "feedback", "message": "' + "é".encode() * 5121 + b'"}',
            "message exceeds maximum length (10KB)",
        ),
    ],
)
async def test_what_is_no_opinion_is_a_400(client: httpx.AsyncClient, store: Store, body: bytes, sentence: str) -> None:
    task, _ = await planned(store)
    answer = await client.post(f"{TASKS}/{task}/review", content=body)
    assert (answer.status_code, answer.json()) == (400, {"error": sentence})
    flood = await reviewed(client, task, message="x" * 70_000)
    assert flood.status_code == 413


async def test_after_ten_rounds_a_plan_can_only_be_approved(client: httpx.AsyncClient, store: Store) -> None:
    task, _ = await planned(store, version=10)
    answer = await reviewed(client, task, message="Once more.")
    assert (answer.status_code, answer.json()) == (
        409,
        {"error": "Maximum review rounds reached. Please approve the plan."},
    )
    assert (await reviewed(client, task, "approve")).status_code == 200


async def test_a_new_question_begins_a_new_conversation(client: httpx.AsyncClient, store: Store) -> None:
    task, attempt = await planned(store)
    await reviewed(client, task, "approve")
    await attempt.complete()
    await store.append(DEVELOPMENT_ORG, task, events.Continued(query="and now?", submission="again"))
    assert (await client.get(f"{TASKS}/{task}/review")).status_code == 404
    (claimed,) = await store.claim(["default"], "w2", 1)
    second = events.ReviewRequested(plan="Plan 2", version=2, round=1)
    await tell(Attempt(store, task, claimed.fence), second)
    body = (await client.get(f"{TASKS}/{task}/review")).json()
    assert [one["message"] for one in body["rounds"]] == ["Plan 2"]


async def test_who_may_not_review_is_told_so_or_nothing(
    connect: Connect, client: httpx.AsyncClient, store: Store
) -> None:
    mine, _ = await planned(store)
    nobodys, _ = await planned(store, owner="")
    plain, _ = await started(store)

    async def asked(who: httpx.AsyncClient, task: str) -> list[tuple[int, Any]]:
        answers = [await who.get(f"{TASKS}/{task}/review"), await reviewed(who, task, "approve")]
        return [(answer.status_code, answer.json()) for answer in answers]

    for colleague in (await connect("colleague"), await connect("")):
        assert await asked(colleague, mine) == [(403, {"error": "Forbidden: not the task owner"})] * 2
    for task in (mine, nobodys):
        assert await asked(await connect("x", org="elsewhere"), task) == [UNKNOWN] * 2
    assert await asked(client, plain) == [UNKNOWN] * 2
    assert await asked(client, "task_unknown") == [UNKNOWN] * 2
    assert await asked(client, "no%20spaces") == [(400, {"error": "Invalid task ID format"})] * 2
    assert await asked(await connect(), mine) == [(401, {"error": "Unauthorized"})] * 2
    assert [code for code, _ in await asked(await connect("colleague"), nobodys)] == [200, 200]


# The real SDK


async def test_the_sdk_reviews(client: httpx.AsyncClient, connect: Connect, store: Store) -> None:
    sdk = AsyncShannonClient("http://localhost", DEVELOPMENT_KEY)
    sdk._http_client = client
    task, attempt = await planned(store)
    state = await sdk.get_review_state(task)
    assert (state.status, state.round, state.version, state.current_plan, state.query) == (
        "reviewing",
        1,
        1,
        "Plan 1",
        "why?",
    )
    assert state.rounds[0].timestamp
    working = asyncio.create_task(replanned(store, task, attempt, 2))
    state = await sdk.submit_review_feedback(task, "Shorter.", version=1)
    await working
    assert (state.round, state.version, state.current_plan) == (2, 2, "Plan 2")
    assert [one.role for one in state.rounds] == ["assistant", "user", "assistant"]
    for call in (sdk.submit_review_feedback(task, "Shorter.", version=1), sdk.approve_review(task, version=1)):
        with pytest.raises(sdk_errors.ValidationError, match="Conflict: "):
            await call
    assert await sdk.approve_review(task, version=2) == {"status": "approved", "message": "Research started"}
    for call in (sdk.get_review_state("task_x"), sdk.approve_review("task_x")):
        with pytest.raises(sdk_errors.TaskNotFoundError, match="Review session not found or expired"):
            await call
    sdk.api_key, sdk._http_client = None, await connect("colleague")
    with pytest.raises(sdk_errors.PermissionDeniedError):
        await sdk.approve_review(task)
