"""Tasks over HTTP: parse, one store call, spell.

A task is read by its organisation, and steered by its owner, or by anybody of the organisation when it is nobody's;
what a caller may not see answers as 404 (contract §5, §6, §11). Conflicts of pause and resume are 409, as upstream's
documents say (its gateway makes 502 of them), but a cancel that comes too late is 202 with `success: false`, because
the SDK answers `False` to that and raises on everything else (§1.8). The routes share the parsing of a task's path and
of a submission, and so one file.
"""

import re
from collections.abc import Callable
from typing import Any

import structlog
from msgspec import Struct
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import events
from app.agents import effective
from app.answers import clock
from app.api.shannon.history import History, cursor, open_history, wait_seconds
from app.api.shannon.spelling import (
    STATUS,
    SUBMISSION_BYTES_MAX,
    UNLISTED,
    event_body,
    raw_type,
    refused,
    statuses,
    submission,
    task_body,
    task_item,
)
from app.api.shannon.streams import fails_on_gap
from app.errors import Conflict, Invalid, NotFound
from app.events import AnyEvent, Json
from app.identity import Identity, caller
from app.log import PAGE_ENTRIES, once, task_id_of
from app.requests import LATER, actor, changed, json_of, read_body, reply, store_of
from app.seam import cursor_of
from app.snapshots import Filter
from app.store import Store
from app.task import Status, Task

logger = structlog.get_logger()

CONTROL_BYTES_MAX = 8 * 1024
"""Of a control's body: its reason is copied into the snapshot, and every list reads that."""
KEY_CHARACTERS_MAX = 255
OFFSET_MAX = 2**31 - 1
"""Redis takes no larger whole number from a script without losing digits; nobody pages that far."""

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
"""What Go's Atoi takes."""


def number(request: Request, name: str, default: int, *, least: int = 0, most: int = OFFSET_MAX) -> int:
    """Raises Invalid in the contract's words (§1.5)."""
    text = request.query_params.get(name, "")
    if not text:
        return default
    if not _NUMBER.fullmatch(text) or not least <= int(text) <= most:
        raise Invalid(f"Invalid {name} parameter")
    return int(text)


def _flag(request: Request, name: str) -> bool:
    """Raises Invalid."""
    text = request.query_params.get(name, "").lower()
    if text not in {"", "true", "false", "1", "0"}:
        raise Invalid(f"Invalid {name} parameter")
    return text in {"true", "1"}


def idempotency_key(request: Request) -> str:
    """Empty: none was given."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= KEY_CHARACTERS_MAX:
        raise Invalid(f"Invalid Idempotency-Key (1 to {KEY_CHARACTERS_MAX} characters)")
    return key or ""


def said_before(key: str) -> dict[str, str]:
    """Headers of an answer that an earlier request with the same key got (§6)."""
    return {"X-Idempotency-Cached": "true", "X-Idempotency-Key": key}


# Submit


class Accepted(Struct, frozen=True):
    task: str
    session: str
    at: int
    headers: dict[str, str]


async def accept(request: Request, agent: str = "") -> Accepted:
    """`agent`: whom the path names. A task is for the default agent otherwise, whose record nobody has to make."""
    who, store = caller(request), store_of(request)
    key = idempotency_key(request)
    trace = request.headers.get("traceparent", "")
    body = await read_body(request, SUBMISSION_BYTES_MAX)
    asked = submission(
        body,
        who,
        agent=agent,
        secret=store.partitions.secret,
        idempotency_key=key,
        # An invalid one is as none (W3C Trace Context §3.2).
        trace=trace if _TRACEPARENT.fullmatch(trace) else "",
    )
    record = store.agents.used(who.org, agent) if agent else store.agents.get(who.org, asked.agent)
    if known := await record:
        asked = replace(effective(asked, known), queue=known.queue)
    appended = await store.submit(asked, actor=actor(who))
    session, headers = asked.session, {}
    if appended.cached:
        headers = said_before(key)
        # The first caller's session, which this one may not have named.
        first = await store.get(who.org, asked.id)
        session = first.session if first else session
    else:
        logger.info("task.submitted", task_id=asked.id, org=who.org, session_id=session)
    headers |= {"X-Workflow-ID": asked.id, "X-Session-ID": session}
    return Accepted(asked.id, session, appended.at, headers)


async def submit(request: Request) -> Response:
    """200, and no other 2xx: the SDK takes all else for an error (§0.1). `status` is the call's, not the task's."""
    accepted = await accept(request)
    body = {
        "task_id": accepted.task,
        "workflow_id": accepted.task,
        "status": "STATUS_CODE_OK",
        "message": f"Task submitted successfully. Session: {accepted.session}",
        "session_id": accepted.session,
        "created_at": clock(accepted.at),
    }
    return reply(body, 200, accepted.headers)


async def submit_for_stream(request: Request) -> Response:
    """§1.3."""
    accepted = await accept(request)
    url = f"/api/v1/stream/sse?workflow_id={accepted.task}"
    body = {"workflow_id": accepted.task, "task_id": accepted.task, "stream_url": url}
    return reply(body, 201, {**accepted.headers, "Link": f"<{url}>; rel=stream"})


# Read


def task_id(request: Request) -> str:
    id_: str = request.path_params["task_id"]
    if not events.ID.fullmatch(id_):
        raise Invalid("Invalid task ID format")
    return id_


async def task_of(request: Request) -> Task:
    """The task that the path names, for any caller of its organisation. Raises NotFound."""
    who, id_ = caller(request), task_id(request)
    task = await store_of(request).get(who.org, id_)
    if task is None:
        raise NotFound("Task not found")
    return task


async def own_task(request: Request) -> Task:
    """The task that the path names, for a caller who may steer it. Raises NotFound."""
    task = await task_of(request)
    if not may_steer(caller(request), task):
        raise NotFound("Task not found")
    return task


def may_steer(who: Identity, task: Task) -> bool:
    return task.owner in {"", who.user}


async def get(request: Request) -> Response:
    """The state, with the cursor from which its stream goes on; 304 for a poller that has this state already.

    With `wait` such a poller is answered as soon as the state changes; of a task that has ended, at once.
    """
    task, seconds, store = await task_of(request), wait_seconds(request), store_of(request)
    known = {each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")}
    seen = task.last_event_id if known & {f'"{task.last_event_id}"', "*"} else ""
    headers = {"X-Workflow-ID": task.id, "Cache-Control": "no-cache"}
    if seen and seconds and not task.terminal:
        if not await changed(request, task.id, seen, seconds):
            headers |= LATER
        task = await task_of(request)
    headers["ETag"] = f'"{task.last_event_id}"'
    if task.last_event_id == seen:
        return Response(status_code=304, headers=headers)
    return reply(task_body(task) | {"log_epoch": store.partitions.epoch}, 200, headers)


async def list_tasks(request: Request) -> Response:
    """The organisation's tasks of this owner or of nobody, newest first; ties by id, so that pages are stable (§1.5).

    `last_event_id` is where a stream of the same tasks goes on from this page. `dead`: those that ended because their
    attempts were used up, or by an exception that is not tried again. `parent_id`: a task's sub-tasks.
    """
    who = caller(request)
    limit = number(request, "limit", 20, least=1, most=100)
    offset = number(request, "offset", 0)
    session = request.query_params.get("session_id", "")
    if session and not events.ID.fullmatch(session):
        raise Invalid("Invalid session_id format")
    parent = request.query_params.get("parent_id", "")
    if parent and not events.ID.fullmatch(parent):
        raise Invalid("Invalid parent_id format")
    states = statuses(request.query_params.getlist("status"))
    if _flag(request, "dead"):
        if states:
            raise Invalid("dead=true is a status of its own: leave status out")
        states = [Status.ERRORED]
    sought = Filter(
        owners=("", who.user),
        agent=request.query_params.get("agent_id", ""),
        session=session,
        parent=parent,
        statuses=states or None,
    )
    store = store_of(request)
    ends = await store.hub.ends()  # before the list: a stream from there on misses nothing that it shows
    found = await store.list(who.org, sought, offset=offset, limit=limit)
    headers = {"X-Total-Capped": "true"} if found.capped else {}
    body = {"tasks": [task_item(task) for task in found.tasks], "total_count": found.total}
    return reply(body | {"last_event_id": cursor_of(ends)}, 200, headers)


async def task_events(request: Request) -> Response:
    """Without `after` and `wait`, what upstream keeps: no deltas, no prompts (§1.6, §3). With either, every event after
    that cursor; while there is none, and may still be one, it waits.

    What is no longer kept, or a cursor from elsewhere, is said: `gap`; with `on_gap=fail` it is 410. `last_event_id` is
    the cursor to ask with next, here or in a stream; `ended` says that nothing more is to come.
    """
    who, id_, store = caller(request), task_id(request), store_of(request)
    limit = number(request, "limit", 50, least=1, most=200)
    offset = number(request, "offset", 0)
    seconds, strict = wait_seconds(request), fails_on_gap(request)
    text = request.query_params.get("after")
    after, every = cursor(text or "", store, who.org, id_), text is not None or seconds is not None
    page = min(limit + offset, PAGE_ENTRIES) if every else PAGE_ENTRIES

    async def read() -> Json:
        history = await open_history(store, who.org, id_, after, page=page, strict=strict)
        return await _told(history, every=every, limit=limit, offset=offset)

    body, headers = await read(), {"Cache-Control": "no-cache"}
    if seconds and not (body["events"] or body["ended"] or "gap" in body):
        if not await changed(request, id_, body["last_event_id"], seconds):
            headers |= LATER
        body = await read()
    return reply(body, 200, headers)


async def _told(history: History, *, every: bool, limit: int, offset: int) -> Json:
    bodies: list[Json] = []
    seen, place = 0, ""
    async for entry in history.entries:
        if not every and raw_type(entry.event) in UNLISTED:
            continue
        seen, place = seen + 1, entry.id
        if seen > offset:
            bodies += event_body(entry)
        if seen == limit + offset:
            break
    place = place or history.end
    body: Json = {"events": bodies, "count": len(bodies), "last_event_id": place, "ended": history.over(place)}
    return body | {"gap": history.gap} if history.gap else body


STEPS = frozenset({"TOOL_INVOKED", "AGENT_STARTED", "AGENT_THINKING", "PROGRESS"})
"""What a summary leaves out: beginnings and chatter. Upstream's leaves out what was scheduled and started."""


async def timeline(request: Request) -> Response:
    """§1.12; always 200, for the SDK takes nothing else, and nothing is left to persist."""
    who, id_ = caller(request), task_id(request)
    mode = request.query_params.get("mode") or "summary"
    if mode not in {"summary", "full"}:
        raise Invalid("Invalid mode (allowed: summary, full)")
    with_payloads = request.query_params.get("include_payloads", "").lower() == "true"
    history = await open_history(store_of(request), who.org, id_)
    rows: list[Json] = []
    async for entry in history.entries:
        raw = raw_type(entry.event)
        if raw in UNLISTED or (mode == "summary" and raw in STEPS):
            continue
        for event in event_body(entry):
            row = {
                "id": entry.id,
                "workflow_id": entry.task,
                "type": raw,
                "message": event.get("message", ""),
                "timestamp": event["timestamp"],
                "seq": entry.seq,
                "created_at": event["timestamp"],
            }
            if with_payloads and "payload" in event:
                row["payload"] = event["payload"]
            rows.append(row)
    body: Json = {"workflow_id": id_, "events": rows, "stats": {"total": len(rows), "mode": mode}}
    if history.gap:
        body["gap"] = history.gap
    return reply(body)


# Steer


async def _steer(request: Request, verb: str, event: Callable[[str, str], AnyEvent]) -> tuple[Task, dict[str, str]]:
    """Appends what the owner asks for; `event` gets the actor and the reason. Raises NotFound, Conflict.

    With an idempotency key the outcome is kept under it; without one a random name lets the store repeat itself.
    """
    who, store = caller(request), store_of(request)
    key = idempotency_key(request)
    reason = _reason(await read_body(request, CONTROL_BYTES_MAX))
    task = await own_task(request)
    appended = await store.append(
        who.org, task.id, event(actor(who), reason), operation=operation_of(store, who, verb, key)
    )
    logger.info("task.steered", task_id=task.id, org=who.org, verb=verb, status=appended.status)
    return task, said_before(key) if key and appended.duplicate else {}


def operation_of(store: Store, who: Identity, verb: str, key: str, *said: str) -> str:
    """The name under which the store keeps an outcome: the same for the same idempotency key, if there is one."""
    return f"{verb}:{task_id_of(store.partitions.secret, verb, who.user, key, *said)}" if key else once()


def _reason(body: bytes) -> str:
    """Of a control's body, which may be empty (§1.8)."""
    if not body:
        return ""
    asked = json_of(body)
    reason = asked.get("reason") if isinstance(asked, dict) else asked
    if isinstance(asked, dict) and (reason is None or isinstance(reason, str)):
        return reason or ""
    raise Invalid("Invalid request body: expected an object with a text `reason`")


async def cancel(request: Request) -> Response:
    try:
        _, headers = await _steer(
            request, "cancel", lambda by, why: events.Cancelled(actor=by, message="Task cancelled.", reason=why)
        )
    except Conflict as error:
        sentence = f"Failed to cancel task: {refused('cancel', error)}"
        return reply({"success": False, "message": sentence, "status": STATUS[Status(error.status)]}, 202)
    return reply({"success": True, "message": "Task cancelled successfully"}, 202, headers)


async def pause(request: Request) -> Response:
    """Visible at once; the handler stops at its next checkpoint."""
    try:
        task, headers = await _steer(
            request, "pause", lambda by, why: events.PauseAsked(actor=by, message="Pausing the task.", reason=why)
        )
    except Conflict as error:
        raise refused("pause", error) from error
    return reply({"success": True, "message": "Pause signal sent", "task_id": task.id}, 202, headers)


async def resume(request: Request) -> Response:
    try:
        task, headers = await _steer(
            request, "resume", lambda by, why: events.Resumed(actor=by, message="Task resumed.", reason=why)
        )
    except Conflict as error:
        raise refused("resume", error) from error
    return reply({"success": True, "message": "Resume signal sent", "task_id": task.id}, 202, headers)


async def retry(request: Request) -> Response:
    """Ours: an ended task is tried once more, with all its attempts and as much time as it had."""
    who, store = caller(request), store_of(request)
    seconds = await _given_seconds(store, who.org, await own_task(request))
    try:
        task, headers = await _steer(
            request,
            "retry",
            lambda by, why: events.Retried(
                actor=by, message=why or "The task is tried once more.", deadline_seconds=seconds
            ),
        )
    except Conflict as error:
        raise refused("retry", error) from error
    return reply({"success": True, "message": "The task is queued again", "task_id": task.id}, 202, headers)


async def _given_seconds(store: Store, org: str, task: Task) -> float:
    """How long the task's latest turn was given when it began; 0: as long as it takes.

    The snapshot knows only when that time was over, and an earlier retry moved that.
    """
    if not task.deadline_at:
        return 0
    # Of a turn whose beginning is no longer kept: at least what it was given.
    seconds = (task.deadline_at - task.created_at) / 1_000_000
    async for entry in (await open_history(store, org, task.id)).entries:
        match entry.event:
            case events.Submitted(task=asked):
                waited = asked.delay_seconds if asked.delay_seconds < asked.deadline_seconds else 0
                seconds = asked.deadline_seconds - waited
            case events.Continued() | events.Retried():
                seconds = entry.event.deadline_seconds
            case _:
                pass
    return seconds


async def control_state(request: Request) -> Response:
    """§1.8; texts are never null."""
    task = await own_task(request)
    paused = task.status in {Status.PAUSED, Status.HELD}
    return reply(
        {
            "is_paused": paused,
            "is_cancelled": task.status is Status.CANCELLED,
            "paused_at": clock(task.paused_at) if paused and task.paused_at else "",
            "pause_reason": task.pause_reason,
            "paused_by": task.paused_by.removeprefix("user:"),
            "cancel_reason": task.cancel_reason,
            "cancelled_by": task.cancelled_by.removeprefix("user:"),
        }
    )


async def delete(request: Request) -> Response:
    """Ours: upstream has no way to delete a task (§1.1)."""
    who, task = caller(request), await own_task(request)
    await store_of(request).delete(who.org, task.id, actor=actor(who))
    logger.info("task.deleted", task_id=task.id, org=who.org)
    return Response(status_code=204)


def _route(path: str, endpoint: Any, method: str) -> Route:
    return Route(f"/api/v1/tasks{path}", endpoint, methods=[method])


routes = [
    _route("", submit, "POST"),
    _route("", list_tasks, "GET"),
    _route("/stream", submit_for_stream, "POST"),
    _route("/{task_id}", get, "GET"),
    _route("/{task_id}", delete, "DELETE"),
    _route("/{task_id}/events", task_events, "GET"),
    _route("/{task_id}/timeline", timeline, "GET"),
    _route("/{task_id}/cancel", cancel, "POST"),
    _route("/{task_id}/pause", pause, "POST"),
    _route("/{task_id}/resume", resume, "POST"),
    _route("/{task_id}/retry", retry, "POST"),
    _route("/{task_id}/control-state", control_state, "GET"),
]
