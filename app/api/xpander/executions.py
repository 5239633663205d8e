"""The controller that the SDK calls: `/agent-execution/…` and its neighbours (contract §3.3, §3.4).

Lists are plain arrays, and DELETE stops. Whatever the SDK sends of a task that has ended is answered with the task as it
is: it takes a refusal for a failure of its own, and says so (§3.5).
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import events
from app.api.xpander.invoke import accepted, stream
from app.api.xpander.models import (
    UPDATE_BYTES_MAX,
    Listing,
    Metrics,
    Pushed,
    Report,
    Update,
    body_of,
    id_of,
    list_of,
    query_of,
)
from app.api.xpander.paths import member
from app.api.xpander.spelling import activity, measured, pushed, report_of, reported, restated, task_item
from app.api.xpander.tasks import ITEM, again, filter_of, get, stop, task_of, whole
from app.errors import Conflict, Invalid, NotFound
from app.events import Json
from app.identity import Identity
from app.log import once
from app.requests import actor, reply, store_of
from app.schema import misfit
from app.store import Store
from app.task import Task

logger = structlog.get_logger()

LISTED_MAX = 1000
"""Tasks of an answer that has no pages: the newest."""
HISTORY_BYTES_MAX = 16 * 1024 * 1024
"""Of their questions and results, before a page of them, and so of that page too."""
HISTORY_PAGE = 50
PUSHED_MAX = 200
RESTATE_TRIES = 5
"""Of a PATCH whose task moves while it is looked at."""


async def create(request: Request) -> Response:
    """With the secrets that it came with: a worker that makes a task for itself begins it from this answer."""
    store = store_of(request)
    found = await accepted(request, id_of(request, "agent_id"), source="sdk")
    return reply(await whole(store, found) | await store.hidden(found))


async def history(request: Request) -> Response:
    asked = query_of(request.query_params, Listing)
    return await _history(request, asked.model_copy(update={"agent_id": request.path_params["agent_id"]}))


async def user_history(request: Request) -> Response:
    asked = query_of(request.query_params, Listing)
    return await _history(request, asked.model_copy(update={"user_id": request.path_params["user_id"]}))


async def _history(request: Request, asked: Listing) -> Response:
    """At most LISTED_MAX rows, and HISTORY_BYTES_MAX; `X-Total-Capped` says that there are more."""
    store, who = store_of(request), member(request)
    items: list[Json] = []
    size, after = 0, ""
    while len(items) < LISTED_MAX and size < HISTORY_BYTES_MAX:
        limit = min(HISTORY_PAGE, LISTED_MAX - len(items))
        found = await store.list(who.org, filter_of(asked), after=after, limit=limit, fields=ITEM)
        items += [task_item(task) for task in found.tasks]
        size += sum(len(task.query) + len(task.title) + len(task.result) + len(task.error) for task in found.tasks)
        if found.next is None:
            return reply(items)
        after = found.next
    return reply(items, 200, {"X-Total-Capped": "true"})


async def update(request: Request) -> Response:
    store, who, found = await task_of(request)
    asked = await body_of(request, Update, most=UPDATE_BYTES_MAX)
    if asked.status == "completed" and (why := await _misfit(found, asked.result or found.result)):
        asked = asked.model_copy(update={"status": "failed", "result": why})
    found = await _restate(store, who, found, lambda task: restated(task, asked, actor(who)))
    return reply(await whole(store, found))


async def _misfit(found: Task, result: str) -> str:
    """Why an end is a failure, as of every other worker: its result does not fit. Refused, it would never be said again."""
    if found.terminal:
        return ""
    if (size := len(result.encode())) > events.RESULT_BYTES_MAX:
        return f"The result has {size} bytes; at most {events.RESULT_BYTES_MAX} are allowed."
    return await asyncio.to_thread(misfit, found.output_schema, result) if found.output_schema else ""


async def _restate(store: Store, who: Identity, found: Task, state: Callable[[Task], events.Restated | None]) -> Task:
    """`state` says what is to change of a task as it stands. Raises Conflict when it moves faster than it can be stated."""
    for left in reversed(range(RESTATE_TRIES)):
        event = state(found)
        if event is None:
            return found
        try:
            await store.append(who.org, found.id, event, operation=once(), status=found.status)
        except Conflict:
            if not left:
                raise
        else:
            logger.info("task.restated", task_id=found.id, org=who.org, status=event.to or found.status)
            return await again(store, found)
        found = await again(store, found)
    return found


async def report(request: Request) -> Response:
    """A task that ran elsewhere: made if its id is new, and ended."""
    store, who, agent_id = store_of(request), member(request), id_of(request, "agent_id")
    asked = await body_of(request, Report)
    agent = await store.agents.used(who.org, agent_id)
    made = reported(asked, agent, who)
    with suppress(Conflict):  # it is known
        await store.submit(made, actor=actor(who))
    found = await store.get(who.org, made.id)
    if found is None or found.agent != agent_id:
        raise NotFound("Task not found")
    if asked.is_success is not False and (why := await _misfit(found, asked.result or found.result)):
        asked = asked.model_copy(update={"is_success": False, "result": why})
    found = await _restate(store, who, found, lambda task: report_of(task, asked, actor(who)))
    return reply(await whole(store, found))


async def metrics(request: Request) -> Response:
    """Of a task that is not known they are nobody's, and no fault of the worker's."""
    store, who = store_of(request), member(request)
    asked = await body_of(request, Metrics)
    found = await store.get(who.org, asked.execution_id) if asked.execution_id else None
    if found:
        with suppress(Conflict):  # it moves, and the numbers of its end count
            await _restate(store, who, found, lambda task: measured(task, asked, actor(who)))
    return reply({"success": found is not None})


async def log(request: Request) -> Response:
    """Unknown agents are no matter: the task's id is enough."""
    store, who, found = await task_of(request)
    return reply(activity(found, await store.thread(who.org, found.id)))


async def push(request: Request) -> Response:
    """A worker's events, in order; the first that cannot be taken ends the call (409: the task does not run)."""
    store, who, found = await task_of(request)
    asked = await list_of(request, Pushed)
    if len(asked) > PUSHED_MAX:
        raise Invalid(f"These are {len(asked)} events; at most {PUSHED_MAX} are allowed at once.")
    said = [event for one in asked if (event := pushed(one.type, one.data, actor(who)))]
    for event in said:
        await store.append(who.org, found.id, event, operation=once())
    body: Json = {"success": True, "accepted": len(said)}
    return reply(body)


async def follow(request: Request) -> Response:
    """From the latest turn's `task_created` on; ends after `task_finished`, at once if that has been."""
    _, _, found = await task_of(request)
    return stream(request, found)


routes = [
    Route("/agent-execution/executions/history/user/{user_id}", user_history, methods=["GET"]),
    Route("/agent-execution/executions/history/{agent_id}", history, methods=["GET"]),
    Route("/agent-execution/{agent_id}", create, methods=["POST"]),
    Route("/agent-execution/{task_id}", stop, methods=["DELETE"]),
    Route("/agent-execution/{task_id}/status", get, methods=["GET"]),
    Route("/agent-execution/{task_id}/update", update, methods=["PATCH"]),
    Route("/agent-execution/{task_id}/events", follow, methods=["GET"]),
    Route("/agent-execution/{task_id}/events/push", push, methods=["POST"]),
    Route("/agent-execution/{agent_id}/report_task", report, methods=["POST"]),
    Route("/agents-metrics/{agent_id}/execution", metrics, methods=["POST"]),
    Route("/activity/{agent_id}/{task_id}", log, methods=["GET"]),
]
