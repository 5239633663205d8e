"""Tasks over REST: lists, one task, its conversation, stop and delete (contract §1.1 to §1.6).

Everybody of an organisation sees and steers all its tasks; a foreign id is 404. The controller's routes
(`executions.py`) are other spellings of the same few calls.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import events
from app.api.xpander.models import Decision, Listing, Paging, Rejected, body_of, id_of, query_of, wrong
from app.api.xpander.paths import member
from app.api.xpander.spelling import ASKED, messages, task_body, task_item
from app.errors import Conflict, Invalid, NotFound, TooLarge
from app.events import Json
from app.identity import Identity
from app.log import once
from app.requests import actor, reply, store_of
from app.snapshots import IDENTITY, LISTED, Filter
from app.store import Store
from app.task import Status, Task

logger = structlog.get_logger()

CHILDREN_MAX = 1000
"""Sub-tasks that a whole task names, the newest."""
THREADS_MAX = 100
"""Sub-tasks, over all generations, whose conversations stand beside their root's."""
THREADS_BYTES_MAX = 32 * 1024 * 1024
"""Of all of them together; the root's alone are half of that at most."""
MESSAGE_BYTES = 900
"""Of each, beside what was said: the keys that it has to have."""
ITEM = (*LISTED, "result")


async def task_of(request: Request) -> tuple[Store, Identity, Task]:
    """The task that the path names. Raises NotFound."""
    store, who = store_of(request), member(request)
    found = await store.get(who.org, id_of(request, "task_id"))
    if found is None:
        raise NotFound("Task not found")
    return store, who, found


async def whole(store: Store, found: Task) -> Json:
    """With its sub-tasks."""
    listed = await store.list(found.org, Filter(parent=found.id), limit=CHILDREN_MAX, fields=IDENTITY)
    return task_body(found, [(child.id, child.status) for child in reversed(listed.tasks)])


# Lists


def filter_of(asked: Listing, *, since: datetime | None = None, until: datetime | None = None) -> Filter:
    return Filter(
        agent=asked.agent_id or "",
        user=asked.user_id or "",
        parent=asked.parent_task_id or "",
        trigger=asked.triggering_agent_id or "",
        internal_status=asked.internal_status or "",
        statuses=ASKED[asked.status] if asked.status else None,
        since=_micros(since) if since else 0,
        until=_micros(until) if until else None,
    )


def _micros(moment: datetime) -> int:
    """Without an offset it is UTC, as all times here."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0, round(aware.timestamp() * 1_000_000))


async def list_tasks(request: Request) -> Response:
    return await _list(request, query_of(request.query_params, Paging))


async def list_agent_tasks(request: Request) -> Response:
    """An agent that nobody used has no tasks."""
    asked = query_of(request.query_params, Paging)
    return await _list(request, asked.model_copy(update={"agent_id": request.path_params["agent_id"]}))


async def _list(request: Request, asked: Paging) -> Response:
    """Newest first. With `cursor`, ours, each page answers the next one's; nothing is told twice or left out, whatever
    is written meanwhile. Pages by number shift.
    """
    store, who = store_of(request), member(request)
    sought = filter_of(asked, since=asked.from_date, until=asked.to_date)
    offset = 0 if asked.cursor is not None else asked.offset
    try:
        found = await store.list(
            who.org, sought, after=asked.cursor or "", offset=offset, limit=asked.per_page, fields=ITEM
        )
    except Invalid as error:
        raise Rejected([wrong(("query", "cursor"), "value_error", str(error), asked.cursor)]) from error
    body = asked.envelope([task_item(task) for task in found.tasks], found.total)
    if asked.cursor is not None:
        body["next_cursor"] = found.next
    return reply(body, 200, {"X-Total-Capped": "true"} if found.capped else {})


# One task


async def get(request: Request) -> Response:
    store, _, found = await task_of(request)
    return reply(await whole(store, found))


async def thread(request: Request) -> Response:
    """What was asked and answered, over all turns."""
    store, who, found = await task_of(request)
    return reply(messages(found, await store.thread(who.org, found.id), full=False))


async def thread_full(request: Request) -> Response:
    """With tool calls, and the sub-tasks' conversations beside it. Raises TooLarge."""
    store, who, found = await task_of(request)
    told: Json = {"root": messages(found, await store.thread(who.org, found.id), full=True)}
    size, parents = found.thread_size + MESSAGE_BYTES * len(told["root"]), deque([found])
    while parents:
        listed = await store.list(who.org, Filter(parent=parents.popleft().id), limit=THREADS_MAX + 1)
        for child in reversed(listed.tasks):
            if child.id == found.id:
                continue  # whoever submits a task says what its parent is: a family may stand in a circle
            said = await store.thread(who.org, child.id)
            size += child.thread_size + MESSAGE_BYTES * len(said)
            if len(told) > THREADS_MAX or size > THREADS_BYTES_MAX:
                raise TooLarge(
                    f"The thread has more than {THREADS_MAX} sub-tasks, or {THREADS_BYTES_MAX} bytes: "
                    "ask for those of its sub-tasks."
                )
            told[child.id] = messages(child, said, full=True)
            parents.append(child)
    return reply(told)


async def stop(request: Request) -> Response:
    """The task, stopped; one that had ended, unchanged (§1.6)."""
    store, who, found = await task_of(request)
    return reply(await whole(store, await stopped(store, who, found)))


async def stopped(store: Store, who: Identity, found: Task) -> Task:
    with suppress(Conflict):  # it ends meanwhile
        if not found.terminal:
            cancelled = events.Cancelled(actor=actor(who), message="Task stopped.")
            await store.append(who.org, found.id, cancelled, operation=once())
            logger.info("task.steered", task_id=found.id, org=who.org, verb="stop", status=Status.CANCELLED)
    return await again(store, found)


async def again(store: Store, found: Task) -> Task:
    """As it is now. Raises NotFound."""
    now = await store.get(found.org, found.id)
    if now is None:
        raise NotFound("Task not found")
    return now


async def delete(request: Request) -> Response:
    """Stops it first, and takes its sub-tasks along (§1.5)."""
    store, who, found = await task_of(request)
    await stopped(store, who, found)
    await store.delete(who.org, found.id, actor=actor(who), children=True)
    logger.info("task.deleted", task_id=found.id, org=who.org)
    return Response(status_code=204)


# A human's decision


async def approve(request: Request) -> Response:
    return await _decide(request, approved=True)


async def reject(request: Request) -> Response:
    return await _decide(request, approved=False)


async def _decide(request: Request, *, approved: bool) -> Response:
    """Of what `hitl_request` waits for: an approval or a plan of a native worker, which hears the answer; else of a task
    that was paused by a PATCH, which is queued again or stopped. Raises Conflict when nothing waits.
    """
    store, who, found = await task_of(request)
    asked = await body_of(request, Decision, empty=True)
    kind, _, name = found.waits.partition(":")
    by, feedback = actor(who), asked.feedback or ""
    event: events.AnyEvent
    if kind == "approval":
        event = events.ApprovalDecided(
            actor=by, approval=name, approved=approved, feedback=feedback, payload=asked.payload or {}
        )
    elif kind == "review":
        event = events.Reviewed(actor=by, version=int(name), approved=approved, feedback=feedback)
    elif found.status in {Status.PAUSED, Status.HELD} and found.stated.get("hitl_request"):
        stated = {name: value for name, value in found.stated.items() if name != "hitl_request"}
        to = Status.QUEUED if approved else Status.CANCELLED
        event = events.Restated(actor=by, to=to, stated=stated, version=found.stated_version + 1)
    else:
        raise Conflict("The task waits for no decision.", found.status)
    await store.append(who.org, found.id, event, operation=once())
    logger.info("task.decided", task_id=found.id, org=who.org, approved=approved)
    return reply(await whole(store, await again(store, found)))


def controls(prefix: str) -> Sequence[Route]:
    return [
        Route(f"{prefix}/{{task_id}}/approve", approve, methods=["POST"]),
        Route(f"{prefix}/{{task_id}}/reject", reject, methods=["POST"]),
    ]


routes = [
    Route("/v1/tasks", list_tasks, methods=["GET"]),
    Route("/v1/agents/{agent_id}/tasks", list_agent_tasks, methods=["GET"]),
    Route("/v1/tasks/{task_id}", get, methods=["GET"]),
    Route("/v1/tasks/{task_id}", delete, methods=["DELETE"]),
    Route("/v1/tasks/{task_id}/thread", thread, methods=["GET"]),
    Route("/v1/tasks/{task_id}/thread/full", thread_full, methods=["GET"]),
    Route("/v1/tasks/{task_id}/stop", stop, methods=["POST"]),
    *controls("/v1/tasks"),
    *controls("/hitl"),
]
