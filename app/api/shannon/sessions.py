"""Sessions over HTTP (contract §1.13): a session is every task with that session id of its owner.

Two users may use one session id and never meet; a key without a user owns the sessions that are nobody's. There is no
second id as upstream has (a row's UUID): `session_id` and `context.external_id` are the same, and `task_id` in history
and turns is the task's own. Turns count from the first task on.
"""

import time
import unicodedata

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import events
from app.answers import clock
from app.api.shannon.history import open_history
from app.api.shannon.spelling import UNLISTED, WORD, event_body, raw_type, usd
from app.api.shannon.tasks import CONTROL_BYTES_MAX, OFFSET_MAX, number
from app.errors import Invalid, NotFound, TooLarge
from app.events import Json
from app.identity import Identity, caller
from app.requests import json_of, read_body, reply, store_of
from app.snapshots import LISTED, Session
from app.store import Store
from app.task import Status, Task, text

ACTIVE_MICROS = 24 * 3600 * 1_000_000
EVENTS_MAX = 5000
"""Of one page of turns (§1.13)."""
TITLE_CHARACTERS_MAX = 60
HISTORY_BYTES_MAX = 16 * 1024 * 1024
"""Of one answer's questions and results: a session has no bound, and the SDK asks for the whole history at once."""
CHUNK = 50
"""Tasks with their results per read: at most 50 × (192 KiB result + 256 KiB query and context) are held."""
DETAILED = (*LISTED, "context", "result")


def paging(request: Request, *, limit: int) -> tuple[int, int]:
    """Limit (1 to 100) and offset; what is out of range counts as not given (§1.13)."""
    found = []
    for name, default, least, most in (("limit", limit, 1, 100), ("offset", 0, 0, OFFSET_MAX)):
        try:
            found.append(number(request, name, default, least=least, most=most))
        except Invalid:
            found.append(default)
    return found[0], found[1]


class Opened(Struct, frozen=True):
    """A session that exists, with what every endpoint needs."""

    store: Store
    who: Identity
    session: Session


async def opened(request: Request) -> Opened:
    """Raises NotFound, also for another user's session."""
    who, store, id_ = caller(request), store_of(request), request.path_params["session_id"]
    found = await store.snapshots.session(who.org, who.user, id_) if events.ID.fullmatch(id_) else None
    if found is None:
        raise NotFound("Session not found")
    return Opened(store, who, found)


def session_body(session: Session, owner: str) -> Json:
    """GET /sessions/{id}. The SDK needs `user_id` and `created_at`, and shows `context.external_id` as the id."""
    first = session.first.context if session.first else {}
    context: Json = {"external_id": session.id}
    if session.title:
        context["title"] = session.title
    body: Json = {
        "session_id": session.id,
        "user_id": owner,
        "context": context,
        "tokens_used": session.input_tokens + session.output_tokens,
        "cost_usd": usd(session.cost_nano),
        "task_count": session.tasks,
        "created_at": clock(session.created_at),
        "updated_at": clock(_touched(session)),
        "is_research_session": first.get("force_research") is True,
    }
    if session.title:
        body["title"] = session.title
    if isinstance(strategy := first.get("research_strategy"), str):
        body["research_strategy"] = strategy
    return body


def session_item(session: Session, owner: str, now: int) -> Json:
    """One row of GET /sessions."""
    body = session_body(session, owner)
    touched = _touched(session)
    body |= {
        "last_activity_at": clock(touched),
        "is_active": now - touched < ACTIVE_MICROS,
        "successful_tasks": session.completed,
        "failed_tasks": session.failed,
        "success_rate": session.completed / session.tasks if session.tasks else 0.0,
        "total_cost_usd": usd(session.cost_nano),
        "average_cost_per_task": usd(session.cost_nano) / session.tasks if session.tasks else 0.0,
        # There are no budgets here.
        "is_near_budget_limit": False,
    }
    if session.latest:
        body |= {"latest_task_query": session.latest.query, "latest_task_status": WORD[session.latest.status]}
    if session.first and session.first.mode:
        body["first_task_mode"] = session.first.mode
    return body


def _touched(session: Session) -> int:
    """The last event of its newest task, in µs."""
    return max(session.created_at, session.latest.updated_at if session.latest else 0)


async def list_sessions(request: Request) -> Response:
    who = caller(request)
    limit, offset = paging(request, limit=20)
    found, total = await store_of(request).snapshots.sessions(who.org, who.user, offset=offset, limit=limit)
    now = time.time_ns() // 1000
    return reply({"sessions": [session_item(one, who.user, now) for one in found], "total_count": total})


async def get(request: Request) -> Response:
    found = await opened(request)
    return reply(session_body(found.session, found.who.user))


async def _tasks(found: Opened, offset: int, limit: int) -> tuple[list[Task], int]:
    """A page of the session's tasks with their results, oldest first, and how many tasks there are.

    The store lists newest first, so places are counted from the end: a task submitted meanwhile moves them all by
    one, and we ask again.
    """
    org, source = found.who.org, ("session", f"{found.who.user}:{found.session.id}")
    total = (await found.store.snapshots.counts(org, source))[0]
    tasks: list[Task] = []
    size = 0
    end = min(offset + limit, total)
    while end > offset:
        count = min(CHUNK, end - offset)
        listed = await found.store.list(org, [source], offset=total - end, limit=count, fields=DETAILED)
        if listed.total != total:
            total, end = listed.total, min(end, listed.total)
            continue
        tasks += listed.tasks
        end -= count
        size += sum(len(task.query) + len(task.result) + len(text(task.context)) for task in listed.tasks)
        if size > HISTORY_BYTES_MAX:
            raise TooLarge("Session is too large. Please use pagination with smaller limits.")
    return tasks[::-1], total


async def history(request: Request) -> Response:
    """All tasks, or a page of them when `limit` (1 to 100) or `offset` is given."""
    found = await opened(request)
    limit, offset = paging(request, limit=OFFSET_MAX)
    tasks, total = await _tasks(found, offset, limit)
    rows = [history_item(task) for task in tasks]
    return reply({"session_id": found.session.id, "tasks": rows, "total": total})


def history_item(task: Task) -> Json:
    """`status` and `mode` are bare words here (§5). Agents and tools are not counted: events tell them."""
    item: Json = {
        "task_id": task.id,
        "workflow_id": task.id,
        "query": task.query,
        "status": WORD[task.status],
        "mode": task.mode,
        "result": result_of(task),
        "error_message": task.error,
        "total_tokens": task.total_tokens,
        "total_cost_usd": usd(task.cost_nano),
        "duration_ms": took_ms(task),
        "agents_used": 0,
        "tools_invoked": 0,
        "started_at": clock(task.started_at or task.created_at),
    }
    if task.finished_at:
        item["completed_at"] = clock(task.finished_at)
    if task.context:
        item["metadata"] = {"task_context": task.context}
    return item


def result_of(task: Task) -> str:
    return task.result if task.status is Status.COMPLETED else ""


def took_ms(task: Task) -> int:
    """From start to end; of an unfinished task, to its last event."""
    if not task.started_at:
        return 0
    return max(0, (task.finished_at or task.updated_at) - task.started_at) // 1000


async def session_events(request: Request) -> Response:
    """Turns, oldest first, with what upstream keeps of their events. `payload` is a text of JSON, and only there with
    `include_payload=true`; `events` is never null: the SDK iterates it.
    """
    found = await opened(request)
    limit, offset = paging(request, limit=10)
    with_payload = request.query_params.get("include_payload") == "true"
    tasks, total = await _tasks(found, offset, limit)
    turns: list[Json] = []
    count = 0
    for place, task in enumerate(tasks, start=offset + 1):
        turn = await _turn(found, task, EVENTS_MAX - count, with_payload=with_payload)
        if turn is not None:
            count += len(turn["events"])
            turns.append({"turn": place, **turn})
    return reply({"session_id": found.session.id, "count": total, "turns": turns})


async def _turn(found: Opened, task: Task, events_max: int, *, with_payload: bool) -> Json | None:
    """None: the task was deleted meanwhile."""
    rows: list[Json] = []
    agents: set[str] = set()
    written = ""
    try:
        kept = await open_history(found.store, found.who.org, task.id)
    except NotFound:
        return None
    async for entry in kept.entries:
        if raw_type(entry.event) in UNLISTED:
            continue
        if isinstance(entry.event, events.TextCompleted) and entry.event.agent != "title_generator":
            written = written or entry.event.text
        for row in event_body(entry):
            payload = row.pop("payload", None)
            if with_payload and payload:
                row["payload"] = text(payload)
            agents |= {row["agent_id"]} if "agent_id" in row else set()
            rows.append(row)
        if len(rows) > events_max:
            raise TooLarge("Session has too many events. Please use pagination with smaller turn limits.")
    return {
        "task_id": task.id,
        "user_query": task.query,
        "final_output": result_of(task) or written,
        "timestamp": clock(task.started_at or task.created_at),
        "events": rows,
        "metadata": {
            "tokens_used": task.total_tokens,
            "execution_time_ms": took_ms(task),
            "agents_involved": sorted(agents),
        },
    }


async def retitle(request: Request) -> Response:
    caller(request)
    asked = json_of(await read_body(request, CONTROL_BYTES_MAX))
    title = asked.get("title", "") if isinstance(asked, dict) else None
    if not isinstance(title, str):
        raise Invalid("Invalid request body")
    if not title.strip():
        raise Invalid("Title cannot be empty")
    title = "".join(one for one in title.strip() if unicodedata.category(one) != "Cc" and one not in "\u200b\ufeff")
    if not title.strip():
        raise Invalid("Title cannot contain only control characters")
    if len(title) > TITLE_CHARACTERS_MAX:
        raise Invalid(f"Title must be {TITLE_CHARACTERS_MAX} characters or less")
    found = await opened(request)
    await found.store.snapshots.retitle_session(found.who.org, found.who.user, found.session.id, title)
    return reply({"session_id": found.session.id, "title": title})


async def delete(request: Request) -> Response:
    """204, again and again; 404 only of what never was. Its tasks stay, and a later one begins the session anew."""
    who, snapshots, id_ = caller(request), store_of(request).snapshots, request.path_params["session_id"]
    if not events.ID.fullmatch(id_):
        raise NotFound("Session not found")
    if await snapshots.session(who.org, who.user, id_) is None:
        if not await snapshots.session_was_deleted(who.org, who.user, id_):
            raise NotFound("Session not found")
        return Response(status_code=204)
    await snapshots.delete_session(who.org, who.user, id_)
    return Response(status_code=204)


routes = [
    Route("/api/v1/sessions", list_sessions, methods=["GET"]),
    Route("/api/v1/sessions/{session_id}", get, methods=["GET"]),
    Route("/api/v1/sessions/{session_id}", retitle, methods=["PATCH"]),
    Route("/api/v1/sessions/{session_id}", delete, methods=["DELETE"]),
    Route("/api/v1/sessions/{session_id}/history", history, methods=["GET"]),
    Route("/api/v1/sessions/{session_id}/events", session_events, methods=["GET"]),
]
