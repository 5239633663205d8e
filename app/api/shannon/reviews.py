"""Reviews over HTTP (contract §1.11): a worker puts up a plan, a human says what should be different, the worker makes
the next one; until the human approves it.

The state is the task's own, and the conversation is read from its log: nothing of it stands anywhere else, and nothing
expires before the task ends. `version` counts the plans; `If-Match` names the one that the human has read. Upstream's
ETag is that bare number, without the quotes that HTTP wants, and its clients send it back: ours is the same.

Upstream's gateway makes the next plan itself while the client waits, up to 60 s. Here a worker makes it, and the client
waits for less, because the SDK gives up after 30 s: whoever is told the version that he knows asks again.
"""

import msgspec
import structlog
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import events
from app.answers import clock
from app.api.shannon.history import open_history
from app.api.shannon.spelling import REVIEW
from app.api.shannon.tasks import may_steer, task_id
from app.errors import Conflict, Forbidden, Invalid, NotFound
from app.events import Json
from app.identity import caller
from app.log import once
from app.requests import LATER, actor, changed, json_of, read_body, reply, store_of
from app.store import Store
from app.task import Task

logger = structlog.get_logger()

PLAN_SECONDS_MAX = 25.0
"""Of waiting for the next plan."""
ROUNDS_MAX = 10
FEEDBACK_BYTES_MAX = 10 * 1024
BODY_BYTES_MAX = 64 * 1024
"""Room for that feedback, however it is escaped."""
UNKNOWN = "Review session not found or expired"


class Opinion(Struct):
    action: str | None = None
    message: str | None = None


async def get_review(request: Request) -> Response:
    task = await _under_review(request)
    return reply(await _state(store_of(request), task), 200, _headers(task))


async def review(request: Request) -> Response:
    asked = _opinion(await read_body(request, BODY_BYTES_MAX))
    task = await _under_review(request)
    approved, message = asked.action == "approve", asked.message or ""
    moved = "plan has been updated. Please review the latest version." if approved else "state has been modified"
    _check(task, request.headers.get("if-match", ""), moved, feedback=None if approved else message)
    who, store = caller(request), store_of(request)
    event = events.Reviewed(
        actor=actor(who), version=task.review_version, approved=approved, feedback="" if approved else message
    )
    try:
        appended = await store.append(who.org, task.id, event, operation=once())
    except Conflict as error:  # somebody else was quicker
        raise Conflict(f"Conflict: {moved}") from error
    logger.info("plan.reviewed", task_id=task.id, org=who.org, version=task.review_version, approved=approved)
    if approved:
        return reply({"status": "approved", "message": "Research started"}, 200, _headers(task))
    in_time = await changed(request, task.id, appended.id, PLAN_SECONDS_MAX, _is_plan)
    task = await store.get(who.org, task.id) or task
    plan: Json = {"message": task.plan, "round": task.review_round, "version": task.review_version, "intent": "ready"}
    # Upstream's documents show the plan alone; its SDK reads the whole state (§10.20).
    body = await _state(store, task) | {"plan": plan}
    return reply(body, 200, _headers(task) | ({} if in_time else LATER))


def _opinion(body: bytes) -> Opinion:
    """Raises Invalid."""
    try:
        asked = msgspec.convert(json_of(body), Opinion)
    except msgspec.ValidationError as error:
        raise Invalid(f"Invalid request body: {error}") from error
    if asked.action not in {"feedback", "approve"}:
        raise Invalid("action must be 'feedback' or 'approve'")
    return asked


async def _under_review(request: Request) -> Task:
    """The task that the path names, if a plan of it was put up. A task that ended before its plan was approved has
    nothing to decide any more. Raises NotFound, Forbidden.
    """
    who, id_ = caller(request), task_id(request)
    task = await store_of(request).get(who.org, id_)
    if task is None or not task.review or (task.terminal and task.review != "approved"):
        raise NotFound(UNKNOWN)
    if not may_steer(who, task):
        raise Forbidden("Forbidden: not the task owner")
    return task


def _check(task: Task, read: str, moved: str, *, feedback: str | None) -> None:
    """In upstream's order of complaints. `read`: the version that the human has read, or `*`, or empty.

    Raises Conflict, Invalid.
    """
    if task.review == "approved":
        raise Conflict("Review already approved")
    version = read.strip().removeprefix("W/").strip('"')
    if version not in {"", "*", str(task.review_version)}:
        raise Conflict(f"Conflict: {moved}")
    if feedback is not None:
        if not feedback:
            raise Invalid("message is required for feedback")
        if len(feedback.encode()) > FEEDBACK_BYTES_MAX:
            raise Invalid("message exceeds maximum length (10KB)")
    if task.waits != f"{REVIEW}{task.review_version}":
        raise Conflict("The next plan is being made: review it when it is there")
    if feedback is not None and task.review_round >= ROUNDS_MAX:
        raise Conflict("Maximum review rounds reached. Please approve the plan.")


def _is_plan(event: events.AnyEvent) -> bool:
    return isinstance(event, events.ReviewRequested)


def _headers(task: Task) -> dict[str, str]:
    return {"ETag": str(task.review_version), "Cache-Control": "no-cache"}


async def _state(store: Store, task: Task) -> Json:
    """As the SDK reads it."""
    rounds: list[Json] = []
    async for entry in (await open_history(store, task.org, task.id)).entries:
        match entry.event:
            case events.Continued():  # another question, another plan
                rounds.clear()
            case events.ReviewRequested(plan=plan):
                rounds.append({"role": "assistant", "message": plan, "timestamp": clock(entry.at)})
            case events.Reviewed(approved=False, feedback=feedback):
                rounds.append({"role": "user", "message": feedback, "timestamp": clock(entry.at)})
            case _:
                pass
    return {
        "status": task.review,
        "round": task.review_round,
        "version": task.review_version,
        "current_plan": task.plan,
        "rounds": rounds,
        "query": task.query,
    }


routes = [
    Route("/api/v1/tasks/{task_id}/review", get_review, methods=["GET"]),
    Route("/api/v1/tasks/{task_id}/review", review, methods=["POST"]),
]
