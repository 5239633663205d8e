"""Workers over HTTP, in any language: claim tasks, say what happens, renew the leases, end them. `/worker/v1`.

    POST /claim                 tasks of this key's organisation and queues; waits for one if asked to
    POST /tasks/{id}/events     what happens, under the attempt's numbers n = 1, 2, 3 …
    POST /heartbeat             renews leases, and tells of cancels and pauses
    POST /tasks/{id}/finish     the result · fail: an error, perhaps to be tried again · release: gives the task back
    GET  /tasks/{id}?fence=     the task as it stands, and what a human decided

Whoever claims a task holds its `fence`: what is said with an older one is 409, `"fence": "stale"`. Every call may be
repeated after a lost answer: a claim that has a name gets the same tasks for 60 s, and a number that was accepted is a
duplicate. In every answer `cancelled` says that this attempt is over, whoever ended it: stop; `status` says why.

Three clocks run. The lease, from the claim on: `lease_seconds`, and as long again from each heartbeat; events do not
renew it. The task's own `deadline_at`, which nothing moves. And its attempts, `max_attempts`: a lost lease uses one up,
a released task does not.

The fields of an event are those of `events.py`, for which `TYPES` has the names that a worker's author expects. Unknown
fields are ignored, and `null` is as good as absent, as on all other routes.

What this file must never do is take a task for a client that has left: it would wait out its lease. The
file is long because a call's fields, bounds and answer stand beside each other: it is what authors of workers read.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
import structlog
from msgspec import Meta, Struct
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from app import errors, events, log, metrics
from app.answers import moment, plain
from app.claims import Claims
from app.errors import Forbidden, Invalid, NotFound, OutOfOrder, Stale, TaskcastError
from app.events import FINAL_OUTPUT, AnyEvent, Json
from app.identity import Identity, worker
from app.log import PAGE_ENTRIES, Appended
from app.queues import Claimed, again
from app.requests import left, reply, store_of
from app.schema import misfit
from app.store import Store
from app.streams import WAITS, Streams, Visitor
from app.task import LEASED, TERMINAL, Status, Task

logger = structlog.get_logger()

PREFIX = "/worker/v1"
STATES_AT_ONCE = 50
"""Snapshots that one heartbeat reads at a time: each may have half a megabyte."""
ERROR_CHARACTERS_MAX = 4000
"""It is copied into the snapshot, and every list reads that."""

T = TypeVar("T")


# What a request says

Id = Annotated[str, Meta(pattern=rf"^{events.ID.pattern}\Z")]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Fence = Annotated[int, Meta(ge=1, le=2**53 - 1)]
Number = Annotated[int, Meta(ge=1, le=10**12)]
LeaseSeconds = Annotated[float, Meta(ge=5, le=600)]


class Claim(Struct):
    worker: Name
    queues: Annotated[list[Name], Meta(min_length=1, max_length=32)]
    slots: Annotated[int, Meta(ge=1, le=100)] = 1
    wait_seconds: Annotated[float, Meta(ge=0, le=30)] = 0
    claim: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.\-]{1,64}\Z")] = ""
    """Names this call: repeated, it gets the same tasks."""
    lease_seconds: LeaseSeconds = 0


class Report(Struct):
    fence: Fence
    events: Annotated[list[Json], Meta(min_length=1, max_length=100)]


class Numbered(Struct):
    n: Number
    type: str


class Held(Struct):
    id: Id
    fence: Fence


class Heartbeat(Struct):
    tasks: Annotated[list[Held], Meta(min_length=1, max_length=1000)]
    lease_seconds: LeaseSeconds = 0
    """From now, this once; else as the claim asked for."""


class Used(Struct):
    model: str = ""
    provider: str = ""
    input_tokens: events.Count = 0
    output_tokens: events.Count = 0
    cost_usd: Annotated[float, Meta(ge=0, le=9_000_000)] = 0


class Finish(Struct):
    """A text is also told as the task's `output`, under n; the end is n + 1 then."""

    fence: Fence
    n: Number
    result: str | Json = ""
    usage: Used | None = None
    said: bool = False
    """The text went out before, as an `output` event."""


class Fail(Struct):
    fence: Fence
    n: Number
    error: Annotated[str, Meta(min_length=1, max_length=ERROR_CHARACTERS_MAX)]
    retry: bool = False
    """While attempts are left."""
    delay_seconds: Annotated[float, Meta(ge=0, le=86_400)] | None = None
    """Until the next attempt; absent: 1, 2, 4 … 60 s after attempts 1, 2, 3 …"""


class Release(Struct):
    fence: Fence
    n: Number


TYPES: dict[str, type[AnyEvent]] = {
    "progress": events.Progressed,
    "delta": events.TextDelta,
    "output": events.TextCompleted,
    "tool_called": events.ToolCalled,
    "tool_returned": events.ToolReturned,
    "thinking": events.Thinking,
    "agent_started": events.AgentStarted,
    "agent_completed": events.AgentCompleted,
    "plan": events.PlanUpdated,
    "paused": events.Paused,
    "approval_requested": events.ApprovalRequested,
    "review_requested": events.ReviewRequested,
    "event": events.Noted,
}


async def asked(request: Request, kind: type[T]) -> T:
    """The body; its size is bounded at the edge. Raises Invalid, TooLarge."""
    body = await request.body()
    if body.count(b"[") + body.count(b"{") > events.DEPTH_MAX and events.depth(body) > events.DEPTH_MAX:
        raise Invalid(f"Invalid request body: nested too deeply (max {events.DEPTH_MAX} levels)")
    try:
        return msgspec.convert(_without_nulls(msgspec.json.decode(body)), kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"Invalid request body: {error}") from error


def _without_nulls(value: Any) -> Any:
    """Of the body, of its `usage`, and of the items of its lists: what is deeper is the author's own."""
    if isinstance(value, list):
        return [_shallow(item) for item in value]
    if not isinstance(value, dict):
        return value
    deep = {"usage", "events", "tasks"}
    return {name: _without_nulls(one) if name in deep else one for name, one in _shallow(value).items()}


def _shallow(value: Any) -> Any:
    return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


def events_of(raw: Sequence[Json], actor: str) -> tuple[int, list[AnyEvent]]:
    """The first number, and the events. Raises Invalid."""
    first, found = 0, list[AnyEvent]()
    for i, one in enumerate(raw):
        try:
            numbered = msgspec.convert(one, Numbered)
            first = first or numbered.n
            if numbered.n != first + i:
                raise Invalid(f"Invalid request body: events[{i}].n is {numbered.n}, and must be {first + i}")
            if not (kind := TYPES.get(numbered.type)):
                raise Invalid(f"Invalid request body: events[{i}].type is none of {', '.join(TYPES)}")
            found.append(_event(kind, one, actor))
        except msgspec.ValidationError as error:
            raise Invalid(f"Invalid request body: events[{i}]: {error}") from error
    return first, found


def _event(kind: type[AnyEvent], said: Json, actor: str) -> AnyEvent:
    fields: Json = {**said, "type": events.tag(kind), "actor": actor}
    if kind in {events.TextDelta, events.TextCompleted}:
        fields.setdefault("agent", FINAL_OUTPUT)
    if kind is events.TextDelta:
        del fields["actor"]  # these are many, and their attempt tells who speaks
    if usage := fields.pop("usage", None):
        fields["usage"] = msgspec.to_builtins(_usage(msgspec.convert(_shallow(usage), Used)))
    return msgspec.convert(fields, kind)


def _usage(used: Used | None) -> events.Usage | None:
    if used is None:
        return None
    return events.Usage(
        model=used.model,
        provider=used.provider,
        input_tokens=used.input_tokens,
        output_tokens=used.output_tokens,
        cost_nano=round(used.cost_usd * 1_000_000_000),
    )


# What an answer says


def told(status: str, *, ours: bool = True) -> Json:
    """`ours`: the attempt that asks is the task's present one."""
    over = not ours or status not in LEASED
    return {"status": status, "cancelled": over, "paused": status == Status.PAUSED and not over}


def task_body(task: Task) -> Json:
    return {
        "id": task.id,
        "queue": task.queue,
        "fence": task.fence,
        "attempt": task.attempt,
        "max_attempts": task.max_attempts,
        "query": task.query,
        "context": task.context,
        "agent": task.agent,
        "session": task.session or None,
        "parent": task.parent or None,
        "user": task.user or None,
        "title": task.title or None,
        "mode": task.mode or None,
        "turn": task.turn,
        "llm_provider": task.llm_provider or None,
        "llm_model": task.llm_model or None,
        "llm_effort": task.llm_effort or None,
        "output_schema": task.output_schema or None,
        "checkpoint": task.checkpoint,
        "deadline_at": moment(task.deadline_at),
        "created_at": moment(task.created_at),
        "trace": task.trace or None,
    }


def error_body(error: TaskcastError) -> tuple[int, Json]:
    """`{"error": sentence}`; of a conflict also where the task stands."""
    status, sentence = plain(error)
    body: Json = {"error": sentence}
    if isinstance(error, errors.Stale):
        body |= {**told(error.status, ours=False), "fence": "stale"}
    elif isinstance(error, errors.Conflict) and error.status:
        body |= told(error.status)
    return status, body


# Whose task it is


def streams_of(request: Request) -> Streams:
    streams: Streams = request.app.state.streams
    return streams


def claims_of(request: Request) -> Claims:
    claims: Claims = request.app.state.claims
    return claims


def actor(who: Identity) -> str:
    return f"worker:{who.key}"


async def only_own(request: Request, fence: int) -> tuple[Identity, str]:
    """Who works, and on which task. Raises NotFound when the key does not work on its queue."""
    who, id_ = worker(request), request.path_params["task_id"]
    if not events.ID.fullmatch(id_):
        raise Invalid("Invalid task ID format")
    if not await may(request, who, id_, fence):
        raise NotFound("Task not found")
    return who, id_


async def may(request: Request, who: Identity, id_: str, fence: int) -> bool:
    """Whether this key works on the queue of that task."""
    if not who.queues:
        return True
    claims = claims_of(request)
    queue = claims.queue(who.org, id_, fence)
    if queue is None:
        task = await store_of(request).get(who.org, id_)
        if task is None:
            return False
        queue = task.queue
        if task.fence == fence:
            claims.remember(who.org, id_, fence, queue)
    return queue in who.queues


# Claim


async def claim(request: Request) -> Response:
    """At most `slots` tasks, oldest first; when there is none, the first that comes within `wait_seconds`."""
    who, want = worker(request), await asked(request, Claim)
    queues = [*dict.fromkeys(want.queues)]
    if who.queues and (others := [queue for queue in queues if queue not in who.queues]):
        raise Forbidden(f"This key does not work on {', '.join(others)}.")
    store, streams = store_of(request), streams_of(request)

    async def take() -> list[Claimed]:
        # Names are this key's own: another one's worker may use the same.
        name = want.claim and f"{who.key}:{want.claim}"
        return await store.claim(
            queues, want.worker, want.slots, org=who.org, claim=name, lease_seconds=want.lease_seconds
        )

    claimed: list[Claimed] | None = None
    hearing = asyncio.create_task(left(request.receive), name="hear")
    try:
        if not streams.closing:
            await _present(hearing)
            claimed = await take()
        if not (claimed or streams.closing) and want.wait_seconds:
            claimed = await _wait(request, who, queues, take, hearing, want.wait_seconds)
        if claimed and hearing.done() and not want.claim:  # a named one is kept for its repetition
            await claims_of(request).give_back(claimed, actor(who))
            raise ClientDisconnect
    finally:
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
    for one in claimed or ():
        said = {"task_id": one.task, "org": one.org, "worker": want.worker, "fence": one.fence}
        logger.info("task.claimed", **said, queue=one.found.queue, attempt=one.found.attempt)
        claims_of(request).remember(one.org, one.task, one.fence, one.found.queue)
    body: Json = {
        "claim": want.claim or None,
        "lease_seconds": want.lease_seconds or store.settings.lease_seconds,
        "tasks": [task_body(one.found) for one in claimed or ()],
    }
    return reply(body, 200, {"Retry-After": "1"} if claimed is None else {})


async def _wait(
    request: Request,
    who: Identity,
    queues: Sequence[str],
    take: Callable[[], Coroutine[Any, Any, list[Claimed]]],
    hearing: asyncio.Task[None],
    seconds: float,
) -> list[Claimed] | None:
    """The first tasks that come. None: it may not wait, or not so long. Raises ClientDisconnect.

    As a stream it holds a place among them, and goes when the server drains.
    """
    streams, loop = streams_of(request), asyncio.get_running_loop()
    if refusal := streams.refusal(who.key):
        metrics.STREAMS_ABORTED.labels(refusal).inc()
        return None
    request.scope[WAITS] = True
    deadline = loop.time() + seconds
    visitor = Visitor(lambda: None)
    with streams.holding(visitor, who.key):
        async with claims_of(request).place(who.org, queues) as waiter:
            while not visitor.leaving.done():
                await _present(hearing)
                waiter.woken.clear()
                if claimed := await take():
                    return claimed
                if loop.time() >= deadline:
                    return []
                waking = asyncio.ensure_future(waiter.woken.wait())
                await asyncio.wait(
                    (waking, hearing, visitor.leaving),
                    timeout=deadline - loop.time(),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                waking.cancel()
    metrics.STREAMS_ABORTED.labels("draining").inc()
    return None


async def _present(hearing: asyncio.Task[None]) -> None:
    """Raises ClientDisconnect."""
    await asyncio.sleep(0)  # its own turn, if the client left in this moment
    if hearing.done():
        raise ClientDisconnect


# Say


async def report(request: Request) -> Response:
    """In order; the first that is refused ends the batch, and the answer says how many were accepted before it."""
    worker(request)
    want = await asked(request, Report)
    who, id_ = await only_own(request, want.fence)
    n, said = events_of(want.events, actor(who))
    return await _answer(request, who, id_, want.fence, n, said)


async def finish(request: Request) -> Response:
    """Completed. A task that has an `output_schema` wants JSON that fits it, as an object or as a text; with any other
    result it fails: 200, `"status": "failed"`, and `reason` says where the result does not fit.
    """
    worker(request)
    want = await asked(request, Finish)
    who, id_ = await only_own(request, want.fence)
    by, usage = actor(who), _usage(want.usage)
    kind, result = "text", want.result
    said: list[AnyEvent] = []
    if not isinstance(result, str):
        kind, result = "json", msgspec.json.encode(result).decode()
    elif not want.said:
        said, usage = [events.TextCompleted(actor=by, agent=FINAL_OUTPUT, text=result, usage=usage)], None
    task, why = await store_of(request).get(who.org, id_), ""
    if task and task.output_schema and len(result.encode()) <= events.RESULT_BYTES_MAX:  # else it is refused
        kind, why = "json", await asyncio.to_thread(misfit, task.output_schema, result)
    end: AnyEvent = events.Completed(actor=by, message="Task completed.", result=result, result_type=kind, usage=usage)
    if why:
        end = events.Failed(actor=by, message=why, error=why, usage=usage)
    return await _answer(request, who, id_, want.fence, want.n, [*said, end], {"reason": why} if why else None)


async def fail(request: Request) -> Response:
    """Failed; with `retry` queued again while attempts are left, and errored after the last one."""
    worker(request)
    want = await asked(request, Fail)
    who, id_ = await only_own(request, want.fence)
    error, by = want.error, actor(who)
    event: AnyEvent = events.Failed(actor=by, message=error, error=error)
    if want.retry:
        task = await store_of(request).get(who.org, id_)
        if task is None:
            raise NotFound("Task not found")
        event = events.Errored(actor=by, message=error, error=error)
        if task.attempts_left > 0:
            event = msgspec.structs.replace(again(task, error, want.delay_seconds), actor=by)
    return await _answer(request, who, id_, want.fence, want.n, [event])


async def release(request: Request) -> Response:
    """The attempt does not count."""
    worker(request)
    want = await asked(request, Release)
    who, id_ = await only_own(request, want.fence)
    message = "The worker stopped and gave the task back."
    event = events.Requeued(actor=actor(who), message=message, refund=True)
    return await _answer(request, who, id_, want.fence, want.n, [event])


ENDS: dict[type[AnyEvent], str] = {
    events.Completed: "task.completed",
    events.Failed: "task.failed",
    events.Errored: "task.errored",
    events.Requeued: "task.requeued",
}
"""What ends an attempt, and its log line."""


async def _answer(
    request: Request, who: Identity, id_: str, fence: int, n: int, said: Sequence[AnyEvent], more: Json | None = None
) -> Response:
    """`more` is told of what was accepted. Raises NotFound, Invalid, TooLarge, Unavailable."""
    store, ends = store_of(request), ENDS.get(type(said[-1]))
    outcomes = await store.extend(who.org, id_, [log.said(event) for event in said], fence=fence, n=n)
    stand = [one for one in outcomes if isinstance(one, Appended)]
    refusal = next((one for one in outcomes if isinstance(one, TaskcastError)), None)
    if isinstance(refusal, NotFound):
        raise refusal
    if not refusal and ends and stand[-1].duplicate and stand[-1].status in LEASED:
        refusal = OutOfOrder("This number belongs to an earlier event of the attempt.", stand[-1].status)
    duplicates = sum(one.duplicate for one in stand)
    body: Json = {"accepted": len(stand) - duplicates, "duplicates": duplicates}
    told_of = {"task_id": id_, "org": who.org, "worker": who.key, "fence": fence}
    if refusal:
        return await _refuse(request, refusal, body, told_of, next_n=n + len(stand))
    last, seq = stand[-1], max(one.seq for one in stand)
    if not seq:  # duplicates of long ago
        task = await store.get(who.org, id_)
        seq = task.last_seq if task else 0
    if ends and not last.duplicate:
        logger.info(ends, **told_of)
    # To have ended it oneself is no news.
    return reply({**({"status": last.status} if ends else told(last.status)), "last_seq": seq, **body, **(more or {})})


async def _refuse(
    request: Request, refusal: TaskcastError, body: Json, told_of: dict[str, Any], *, next_n: int
) -> Response:
    """409 or 413, with what was accepted before it and, where it goes on, the number expected next."""
    status, refused = error_body(refusal)
    body |= refused
    if isinstance(refusal, OutOfOrder):
        task = await store_of(request).get(told_of["org"], told_of["task_id"])
        body["expected"] = task.n + 1 if task else 1
    elif isinstance(refusal, Stale):
        metrics.STALE.inc()
    else:
        body["expected"] = next_n
    level = logger.info if body.get("status") in TERMINAL else logger.warning
    level("task.refused", **told_of, reason=refusal.code, status=body.get("status", ""))
    return reply(body, status)


# Look


class Lease(Struct, eq=False):
    org: str
    task: str
    fence: int


async def heartbeat(request: Request) -> Response:
    who, store, want = worker(request), store_of(request), await asked(request, Heartbeat)
    held = [Lease(who.org, one.id, one.fence) for one in want.tasks]
    own = [one for one in held if await may(request, who, one.task, one.fence)]
    renewed = await store.renew(own, lease_seconds=want.lease_seconds)
    lost = [one for one in own if not renewed[one]]
    states: dict[Lease, Task | None] = {}
    for i in range(0, len(lost), STATES_AT_ONCE):
        batch = lost[i : i + STATES_AT_ONCE]
        states.update(zip(batch, await asyncio.gather(*(store.get(one.org, one.task) for one in batch)), strict=True))
    tasks: list[Json] = []
    for one in held:
        state = states.get(one)
        lost_to = state.status if state else Status.GONE
        status = renewed.get(one, "")
        tasks.append({"id": one.task, **(told(status) if status else told(lost_to, ours=False))})
    return reply({"tasks": tasks})


async def look(request: Request) -> Response:
    """The task as in its claim, and whether its attempt goes on: for one that waits for a human."""
    worker(request)
    text = request.query_params.get("fence", "")
    if not (text.isascii() and text.isdecimal() and len(text) <= 15):
        raise Invalid("Invalid fence parameter")
    who, id_ = await only_own(request, int(text))
    task = await store_of(request).get(who.org, id_)
    if task is None:
        raise NotFound("Task not found")
    if task.fence != int(text):
        raise Stale("This attempt is over: the task was taken from this worker.", task.status)
    decision = await _decision(store_of(request), task)
    body = {**task_body(task), **told(task.status), "last_seq": task.last_seq, "n": task.n}
    return reply(body | {"waits": task.waits or None, "decision": decision})


async def _decision(store: Store, task: Task) -> Json | None:
    """What a human said last, as far as it stands among the latest events: whoever waits for it asks soon."""
    found: Json | None = None
    seq = max(0, task.last_seq - PAGE_ENTRIES)
    while (page := await store.events(task.org, task.id, f"seq:{seq}")) and seq < page.last_seq:
        for entry in page.entries:
            match entry.event:
                case events.ApprovalDecided() as said:
                    found = {"approval": said.approval, "approved": said.approved, "feedback": said.feedback}
                    found["payload"] = said.payload
                case events.Reviewed() as said:
                    found = {"version": said.version, "approved": said.approved, "feedback": said.feedback}
                case _:
                    pass
        # What is trimmed meanwhile was old; a page without entries has one of these gaps.
        seq = page.entries[-1].seq if page.entries else max(page.base_seq, seq + 1)
    return found


def _route(path: str, endpoint: Any, method: str) -> Route:
    return Route(PREFIX + path, endpoint, methods=[method])


routes = [
    _route("/claim", claim, "POST"),
    _route("/heartbeat", heartbeat, "POST"),
    _route("/tasks/{task_id}", look, "GET"),
    _route("/tasks/{task_id}/events", report, "POST"),
    _route("/tasks/{task_id}/finish", finish, "POST"),
    _route("/tasks/{task_id}/fail", fail, "POST"),
    _route("/tasks/{task_id}/release", release, "POST"),
]
