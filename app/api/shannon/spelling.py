"""The pure part of the Shannon dialect: its request → our submission; our tasks, events and errors → its JSON.

No I/O. Sections (§) are those of the contract that its public source, its SDK and its documents add up to; where they
disagree, both are served: `response` is always there, text frames also carry `message`, `error` has a twin
`error_message`. A task whose submission names no mode is `simple`, as in every example of its documents; upstream
routes such a task as `standard` first and classifies it afterwards, which nobody here does.

It is long because it is one vocabulary: each event is spelled for a stream and for a list side by side, where a
difference between the two would show.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, assert_never, get_args
from urllib.parse import urlencode
from uuid import uuid4

import msgspec
from msgspec import Struct

from app import errors, events
from app.agents import CHARACTERS_MAX, DEFAULT, queue_of
from app.answers import clock, plain
from app.errors import Conflict, Invalid, TaskcastError
from app.events import AnyEvent, Entry, Json, Submission, Usage
from app.frames import FRAME, Frame, Spliced
from app.identity import Identity
from app.log import Logged, canonical_hash, random_id, task_id_of, written_at
from app.requests import json_of, too_large
from app.seam import Began, Ended, Gap, Reached, Selection
from app.task import STORED, Snapshot, Status, Task, task

STATUS: Mapping[Status, str] = {
    Status.QUEUED: "TASK_STATUS_QUEUED",
    Status.RUNNING: "TASK_STATUS_RUNNING",
    Status.PAUSED: "TASK_STATUS_PAUSED",
    Status.HELD: "TASK_STATUS_PAUSED",
    Status.COMPLETED: "TASK_STATUS_COMPLETED",
    Status.FAILED: "TASK_STATUS_FAILED",
    Status.ERRORED: "TASK_STATUS_FAILED",
    Status.CANCELLED: "TASK_STATUS_CANCELLED",
    Status.TIMED_OUT: "TASK_STATUS_TIMEOUT",
}
"""Any other word would be FAILED to the SDK, and end its `wait()` (§0.3)."""

WORD = {status: name.removeprefix("TASK_STATUS_") for status, name in STATUS.items()}
"""As sessions and filters say it (§1.13, §1.5)."""

ASKED = {word: tuple(status for status in STORED if WORD[status] == word) for word in WORD.values()}
ASKED["CANCELED"] = ASKED["CANCELLED"]
"""What a `status` filter means: a set of our statuses."""

MODES = {
    "simple": "EXECUTION_MODE_SIMPLE",
    "standard": "EXECUTION_MODE_STANDARD",
    "complex": "EXECUTION_MODE_COMPLEX",
    # Its documents know three names only; its lists say STANDARD of everything else (§1.5).
    "supervisor": "EXECUTION_MODE_STANDARD",
}
TIERS = ("small", "medium", "large")
STRATEGIES = ("quick", "standard", "deep", "academic")
PROVIDERS = (
    *("openai", "anthropic", "google", "groq", "xai", "deepseek", "qwen"),
    *("zai", "kimi", "minimax", "ollama", "mistral", "cohere"),
)

SUBMISSION_BYTES_MAX = events.EVENT_BYTES_MAX
"""Of a request body; upstream takes 40 MiB, because files travel in it."""
TIMEOUT_SECONDS_MAX = 86_400
"""A day: whatever runs longer needs no deadline, but a human."""
TTL_SECONDS_MAX = 7 * 86_400
DELAY_SECONDS_MAX = 10 * 365 * 86_400
"""Ten years; the times that count from then must still fit `events.Seconds`."""
ATTEMPTS_MAX = 100
PRIORITY_MAX = 2

_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,18})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


class Request(Struct):
    """The body of POST /tasks (§1.2). `null` is as good as absent, as in Go; unknown fields are ignored."""

    query: str | None = None
    session_id: str | None = None
    context: Json | None = None
    mode: str | None = None
    skill: str | None = None
    model_tier: str | None = None
    model_override: str | None = None
    provider_override: str | None = None
    research_strategy: str | None = None
    max_iterations: int | None = None
    max_concurrent_agents: int | None = None
    enable_verification: bool | None = None
    # Ours.
    timeout_seconds: float | None = None
    """From `run_at`, or else from acceptance, to TASK_STATUS_TIMEOUT."""
    ttl_seconds: float | None = None
    """From the same moment to TASK_STATUS_TIMEOUT of a task that no worker has begun."""
    run_at: str | None = None
    """RFC 3339: no worker gets it earlier."""
    priority: int | None = None
    max_attempts: int | None = None


class Execution(Struct):
    """What the body of POST /agents/{id} has beside that of POST /tasks (§1.15)."""

    input: str | Json
    context: Json | None = None


ASKING = ("query", "text", "input")
"""Which field of an agent's `input` is its question, when it is a text; else all of it is."""


def submission(
    body: bytes, who: Identity, *, agent: str = "", secret: bytes = b"", idempotency_key: str = "", trace: str = ""
) -> Submission:
    """`agent`: whom the path names (§1.15). Raises Invalid with the contract's own sentences (§1.2), and TooLarge.

    With an idempotency key the task's id follows from it, so that racing callers meet in one task.
    """
    if len(body) > SUBMISSION_BYTES_MAX:
        raise too_large(SUBMISSION_BYTES_MAX)
    raw = json_of(body)
    try:
        asked = msgspec.convert(_execution(raw) if agent else raw, Request)
    except msgspec.ValidationError as error:
        raise Invalid(f"Invalid request body: {error}") from error
    query = asked.query or ("[User sent file attachments]" if (asked.context or {}).get("attachments") else "")
    if not query:
        raise Invalid("Query is required")
    if asked.session_id and not events.ID.fullmatch(asked.session_id):
        raise Invalid("Invalid session_id format")
    _check(asked)
    delay = _delay_seconds(asked.run_at) if asked.run_at else 0.0
    context = _context(asked)
    mode = (asked.mode or "").strip().lower() or "simple"
    if mode not in MODES:
        raise Invalid(f"Invalid mode (allowed: {', '.join(MODES)})")
    derived = task_id_of(secret, who.org, who.user, idempotency_key) if idempotency_key else ""
    return Submission(
        id=f"task_{derived or random_id()}",
        org=who.org,
        owner=who.user,
        agent=agent or DEFAULT,
        session=asked.session_id or str(uuid4()),
        queue=queue_of(agent or DEFAULT),
        dialect="shannon",
        query=query,
        context=context,
        mode=mode,
        llm_provider=_said(context, "provider_override"),
        llm_model=_said(context, "model_override"),
        trace=trace,
        priority=asked.priority or 0,
        max_attempts=asked.max_attempts or 0,
        deadline_seconds=asked.timeout_seconds + delay if asked.timeout_seconds else 0,
        ttl_seconds=asked.ttl_seconds + delay if asked.ttl_seconds else 0,
        delay_seconds=delay,
        submission=random_id(),
        body_hash=canonical_hash([agent, raw] if agent else raw) if idempotency_key else "",
    )


def _execution(raw: Any) -> Json:
    """The body of POST /tasks that says the same. Raises ValidationError.

    The agent gets the whole of an `input` that is an object as its context; what stands in `context` itself wins.
    """
    asked = msgspec.convert(raw, Execution)
    if isinstance(asked.input, str):
        return {**raw, "query": asked.input}
    texts = [_said(asked.input, name) for name in ASKING]
    query = next(filter(None, texts), "") or msgspec.json.encode(asked.input).decode()
    return {**raw, "query": query, "context": {**asked.input, **(asked.context or {})}}


def _check(asked: Request) -> None:
    """The bounds of what is ours. Raises Invalid."""
    bounds = {
        "timeout_seconds": (1, TIMEOUT_SECONDS_MAX),
        "ttl_seconds": (1, TTL_SECONDS_MAX),
        "priority": (0, PRIORITY_MAX),
        "max_attempts": (1, ATTEMPTS_MAX),
    }
    for name, (least, most) in bounds.items():
        value = getattr(asked, name)
        if value is not None and not least <= value <= most:
            raise Invalid(f"{name} out of range ({least}..{most})")


def _delay_seconds(run_at: str) -> float:
    """From now, by this process's clock: the store's may be a little off. What has passed is now. Raises Invalid."""
    try:
        moment = datetime.fromisoformat(run_at.upper()) if _RFC3339.fullmatch(run_at) else None
    except ValueError:  # the 30th of February
        moment = None
    if moment is None:
        raise Invalid("Invalid run_at (expected RFC 3339 with an offset, such as 2030-01-31T09:00:00Z)")
    seconds = (moment - datetime.now(UTC)).total_seconds()
    if seconds > DELAY_SECONDS_MAX:
        raise Invalid("run_at out of range (at most 10 years ahead)")
    return max(0.0, seconds)


def _context(asked: Request) -> Json:
    """The context with the top-level fields in it: they win (§1.2). In upstream's order of complaints."""
    context = dict(asked.context or {})
    template = context.get("template_name")
    if "template" not in context and isinstance(template, str) and template.strip():
        context["template"] = template.strip()
    if skill := (asked.skill or "").strip():
        raise Invalid(f"Unknown skill: {skill}")
    if tier := (asked.model_tier or "").strip().lower():
        if tier not in TIERS:
            raise Invalid(f"Invalid model_tier (allowed: {', '.join(TIERS)})")
        context["model_tier"] = tier
    if model := (asked.model_override or "").strip():
        context["model_override"] = model
    if provider := (asked.provider_override or "").strip().lower():
        if provider not in PROVIDERS:
            raise Invalid(f"Invalid provider_override: {provider} (allowed: {', '.join(PROVIDERS)})")
        context["provider_override"] = provider
    if strategy := (asked.research_strategy or "").strip().lower():
        if strategy not in STRATEGIES:
            raise Invalid(f"Invalid research_strategy (allowed: {', '.join(STRATEGIES)})")
        context["research_strategy"] = strategy
    for name, most in (("max_iterations", 50), ("max_concurrent_agents", 20)):
        count = getattr(asked, name)
        if count is not None:
            if not 1 <= count <= most:
                raise Invalid(f"{name} out of range (1..{most})")
            context[name] = count
    if asked.enable_verification is not None:
        context["enable_verification"] = asked.enable_verification
    if context.get("force_research") is True and not _said(context, "research_strategy"):
        context["research_strategy"] = "standard"
    if _yes(context.get("disable_ai")) and any(
        _said(context, name) for name in ("model_tier", "model_override", "provider_override")
    ):
        raise Invalid("disable_ai=true conflicts with model_tier/model_override")
    for name in ("model_override", "provider_override"):
        if len(_said(context, name)) > CHARACTERS_MAX:
            raise Invalid(f"{name} too long (max {CHARACTERS_MAX} characters)")
    return context


def _said(context: Json, name: str) -> str:
    """Empty, too, for what is no text."""
    value = context.get(name)
    return value.strip() if isinstance(value, str) else ""


def _yes(value: Any) -> bool:
    """Upstream takes a flag in any of these spellings."""
    if isinstance(value, str):
        return value.strip().lower() in {"true", "1", "yes", "y"}
    return isinstance(value, (bool, int, float)) and bool(value)


def statuses(asked: list[str]) -> list[Status]:
    """Of one filter, or several: repeated, or with commas. The prefix that answers show is welcome. Empty: all.

    Raises Invalid.
    """
    words = [word.strip().upper().removeprefix("TASK_STATUS_") for text in asked if text for word in text.split(",")]
    if not ASKED.keys() >= set(words):
        raise Invalid("Invalid status value")
    return list(dict.fromkeys(status for word in words for status in ASKED[word]))


def task_body(task: Task) -> Json:
    """GET /tasks/{id} (§1.4): the seed's fields under their names, and more (§10, §11).

    `result` stands only in a completed task; `response` is always there, null or an object: a Go client decodes it
    into a map. `last_event_id` is where a stream goes on from this very state.
    """
    body: Json = {"task_id": task.id, "workflow_id": task.id, "status": STATUS[task.status], "response": None}
    if task.status is Status.COMPLETED:
        body |= {"result": task.result, "response": response(task.result, task.result_type)}
    body |= {
        "error": task.error,
        "error_message": task.error,
        "created_at": clock(task.created_at),
        "updated_at": clock(task.updated_at),
        "query": task.query,
        "session_id": task.session,
        "mode": mode_name(task.mode),
        "progress": task.progress,
        "attempt": task.attempt,
        "max_attempts": task.max_attempts,
        "children": task.children,
        "last_seq": task.last_seq,
        "last_event_id": task.last_event_id,
    }
    if task.started_at:
        body["started_at"] = clock(task.started_at)
    if task.finished_at:
        body["completed_at"] = clock(task.finished_at)
    if task.parent:
        body["parent_task_id"] = task.parent
    if task.status is Status.QUEUED and task.ready_at:
        body["next_attempt_at"] = clock(task.ready_at)
    if task.waits.startswith(APPROVAL):
        body["approval"] = approval(task)
    if task.review:
        body["review"] = review(task)
    if task.context:
        body |= {"context": task.context, "metadata": {"task_context": task.context}}
    if task.model:
        body["model_used"] = task.model
    if task.provider:
        body["provider"] = task.provider
    if task.total_tokens or task.cost_nano or task.status is Status.COMPLETED:
        body["usage"] = {
            "total_tokens": task.total_tokens,
            "input_tokens": task.input_tokens,
            "output_tokens": task.output_tokens,
            "estimated_cost": usd(task.cost_nano),
            "cost_usd": usd(task.cost_nano),
        }
    return body


def task_item(task: Task) -> Json:
    """One row of GET /tasks (§1.5). The SDK needs `task_id, query, status, created_at`."""
    item: Json = {
        "task_id": task.id,
        "workflow_id": task.id,
        "query": task.query,
        "status": STATUS[task.status],
        "mode": mode_name(task.mode),
        "session_id": task.session,
        "created_at": clock(task.created_at),
        "total_token_usage": {
            "total_tokens": task.total_tokens,
            "cost_usd": usd(task.cost_nano),
            "prompt_tokens": task.input_tokens,
            "completion_tokens": task.output_tokens,
        },
    }
    if task.started_at:
        item["started_at"] = clock(task.started_at)
    if task.finished_at:
        item["completed_at"] = clock(task.finished_at)
    return item


APPROVAL, REVIEW = "approval:", "review:"
"""What `Task.waits` begins with."""


def approval(task: Task) -> Json:
    """What a task waits for: a yes or no of a human (§1.10)."""
    return {
        "approval_id": task.waits.removeprefix(APPROVAL),
        "reason": task.request.get("reason", ""),
        "payload": task.request.get("payload", {}),
        "requested_at": clock(task.paused_at),
    }


def review(task: Task) -> Json:
    """How far the plan of a task has come (§1.11)."""
    return {
        "status": task.review,
        "round": task.review_round,
        "version": task.review_version,
        "pending": task.waits.startswith(REVIEW),
    }


def waiting_item(task: Task) -> Json:
    """One row of GET /approvals: a decision that a human has to take. A plan's is taken where the plan is."""
    item: Json = {"workflow_id": task.id, "task_id": task.id}
    if task.waits.startswith(APPROVAL):
        item |= {"kind": "approval", **approval(task)}
    else:
        plan = {"round": task.review_round, "version": task.review_version}
        item |= {"kind": "review", "approval_id": "", "reason": "A plan waits for its review.", "payload": plan}
        item["requested_at"] = clock(task.paused_at)
    return item | {"query": task.query, "title": task.title, "session_id": task.session}


def response(result: str, result_type: str) -> Json:
    """A result that is a JSON object is itself; every other stands under `result`, so that the seed's
    `response.result` is the answer (§10.1).
    """
    if result_type == "json" or result.lstrip()[:1] == "{":
        try:
            value = msgspec.json.decode(result)
        except (msgspec.DecodeError, RecursionError):
            return {"result": result}
        return value if isinstance(value, dict) else {"result": value}
    return {"result": result}


def mode_name(mode: str) -> str:
    return MODES.get(mode, "EXECUTION_MODE_STANDARD")


def usd(nano: int) -> float:
    return nano / 1_000_000_000


# Events

RAW: Mapping[type[events.Event], str] = {
    events.Submitted: "DATA_PROCESSING",
    events.Continued: "DATA_PROCESSING",
    events.Retried: "DATA_PROCESSING",
    events.Started: "WORKFLOW_STARTED",
    events.Requeued: "ERROR_RECOVERY",
    events.LeaseLost: "ERROR_RECOVERY",
    events.PauseAsked: "WORKFLOW_PAUSING",
    events.Paused: "WORKFLOW_PAUSED",
    events.Resumed: "WORKFLOW_RESUMED",
    events.Cancelled: "WORKFLOW_CANCELLED",
    events.Completed: "WORKFLOW_COMPLETED",
    events.Failed: "ERROR_OCCURRED",
    events.Errored: "ERROR_OCCURRED",
    events.TimedOut: "ERROR_OCCURRED",
    events.Restated: "TASK_RESTATED",
    events.Progressed: "PROGRESS",
    events.TextDelta: "LLM_PARTIAL",
    events.TextCompleted: "LLM_OUTPUT",
    events.ToolCalled: "TOOL_INVOKED",
    events.ToolReturned: "TOOL_OBSERVATION",
    events.AgentStarted: "AGENT_STARTED",
    events.AgentCompleted: "AGENT_COMPLETED",
    events.Thinking: "AGENT_THINKING",
    events.ApprovalRequested: "APPROVAL_REQUESTED",
    events.ApprovalDecided: "APPROVAL_DECISION",
    events.ChildSubmitted: "DELEGATION",
    events.PlanUpdated: "RESEARCH_PLAN_UPDATED",
}
"""Our event → upstream's raw type (§3). `noted` brings its own, a review's depends on what it says; `deleted` is never
told.
"""

PASSED_ON = {
    events.tag(kind): RAW.get(kind, "")
    for kind in (
        *(events.Noted, events.Thinking, events.AgentStarted, events.AgentCompleted, events.PlanUpdated),
        events.TextDelta,
    )
}
"""Deltas, and activities of which a message and a payload are told: as the worker said them; by our word, as that of
`RAW`.
"""

NO_TEXT, NO_OBJECT, NOTHING = msgspec.Raw(b'""'), msgspec.Raw(b"{}"), msgspec.Raw()
"""What is not said, and so left out."""

SSE_NAME = {
    "LLM_PARTIAL": "thread.message.delta",
    "LLM_OUTPUT": "thread.message.completed",
    "ERROR_OCCURRED": "error",
    "WORKFLOW_PAUSING": "workflow.pausing",
    "WORKFLOW_PAUSED": "workflow.paused",
    "WORKFLOW_RESUMED": "workflow.resumed",
    "WORKFLOW_CANCELLING": "workflow.cancelling",
    "WORKFLOW_CANCELLED": "workflow.cancelled",
}
"""Raw type → SSE event name, where they differ (§2.3)."""

_LIFECYCLE = frozenset(get_args(events.Lifecycle))
"""Looked up for each event: to ask whether it is an instance of so large a union takes longer than to encode it."""

UNLISTED = frozenset({"LLM_PARTIAL", "LLM_PROMPT"})
"""What upstream does not keep, so that its lists, timelines and sessions never show it (§3)."""

MESSAGE_MAX = 2000
"""Characters of a tool's output that make its message (§3); the whole output stands in the payload."""


def frame(entry: Entry) -> list[Frame]:
    """The SSE frames of one entry (§2.3). Only the last carries the id: whoever loses the connection between two
    gets both again. A `types` filter may name the raw type or the SSE name (§10.24).
    """
    return [_frame(entry, body) for body in event_body(entry, stream=True)]


def _frame(entry: Entry, body: Json) -> Frame:
    raw: str = body["type"]
    name = SSE_NAME.get(raw, raw)
    return Frame(event=name, data=_shape(name, body, entry), id=body.get("stream_id", ""), type=raw)


def _shape(name: str, body: Json, entry: Entry) -> Json:
    """The data of a frame: the event object, except where upstream maps it. A mapped frame's `type` may only be the
    SSE name, for the SDK prefers it to the event's name (§11).
    """
    if name is body["type"]:
        return body
    message, payload = body.get("message", ""), body.get("payload", {})
    if name.startswith("thread.message."):
        delta = name == "thread.message.delta"
        return {
            "delta" if delta else "response": message,
            "workflow_id": entry.task,
            "agent_id": body.get("agent_id", ""),
            "seq": entry.seq,
            "stream_id": entry.id,
            **({"metadata": payload} if payload and not delta else {}),
            "message": message,
            "attempt": entry.attempt,
            "type": name,
        }
    if name.startswith("workflow."):
        return {**payload, "workflow_id": entry.task, "agent_id": body["agent_id"], "message": message}
    return body


class Words(Struct, gc=False):
    """What a worker said in an event that is only passed on, as it stands in the log."""

    name: str = ""
    agent: msgspec.Raw = NOTHING
    message: msgspec.Raw = NOTHING
    payload: msgspec.Raw = NOTHING
    text: msgspec.Raw = NOTHING


_words = msgspec.json.Decoder(Words).decode

_DELTA, _DELTA_NAME = events.tag(events.TextDelta), SSE_NAME[RAW[events.TextDelta]]
# Neither an id nor a name has a character that JSON would escape (`events.ID`, `events.NOTED`).
_ACTIVITY_FRAME = FRAME % (
    b"%b",
    b"%b",
    b'{"workflow_id":"%b","type":"%b"%b%b%b%b%b%b,"timestamp":"%b","seq":%d,"stream_id":"%b"}',
)
_DELTA_FRAME = FRAME % (
    b"%b",
    _DELTA_NAME.encode(),
    b'{"delta":%b,"workflow_id":"%b","agent_id":%b,"seq":%d,"stream_id":"%b","message":%b,"attempt":%d,"type":"'
    + _DELTA_NAME.encode()
    + b'"}',
)


def live(one: Logged) -> Spliced | None:
    """As `frame`, spliced from what stands in the log; None: it has to be parsed for that.

    Between the log and a thousand readers of as many tasks an event costs what Python does with it, once for each: so
    what a dialect only passes on is not made into objects first.
    """
    raw = PASSED_ON.get(one.type)
    if raw is None or not one.event.isascii():
        return None
    said, id_, task = _words(one.event), one.id.encode(), one.task.encode()
    agent, message, payload = said.agent, said.message, said.payload
    if one.type == _DELTA:
        whose, text = NO_TEXT if agent is NOTHING else agent, said.text
        return _DELTA_NAME, raw, _DELTA_FRAME % (id_, text, task, whose, one.seq, id_, text, one.attempt)
    raw = raw or said.name
    if raw in SSE_NAME:
        return None
    # An encoder that omits defaults knows them as Python's own: not an enumeration's "", nor an OrderedDict.
    agent = NOTHING if agent == NO_TEXT else agent
    message = NOTHING if message == NO_TEXT else message
    payload = NOTHING if payload == NO_OBJECT else payload
    name = raw.encode()
    told = _ACTIVITY_FRAME % (
        id_,
        name,
        task,
        name,
        b"" if agent is NOTHING else b',"agent_id":',
        agent,
        b"" if message is NOTHING else b',"message":',
        message,
        b"" if payload is NOTHING else b',"payload":',
        payload,
        _clock(one.seconds, one.micros, one.id.partition("-")[0]),
        one.seq,
        id_,
    )
    return raw, raw, told


@lru_cache(maxsize=256)  # what one call of the store writes has one time
def _clock(seconds: int, micros: int, ms: str) -> bytes:
    return clock(written_at(seconds, micros, ms)).encode()


def event_body(entry: Entry, *, stream: bool = False) -> list[Json]:
    """The raw event objects of one entry (§3), as lists and the WebSocket show them: exactly one, but none for
    `deleted`. On a `stream` a cancel is announced first, as upstream does: two, the first without a place.
    """
    event = entry.event
    raw = raw_type(event)
    if not raw:
        return []
    message, payload = _told(entry)
    body: Json = {"workflow_id": entry.task, "type": raw}
    if event.agent:
        body["agent_id"] = event.agent
    elif type(event) in _LIFECYCLE or (raw in SSE_NAME and raw.startswith("WORKFLOW_")):
        body["agent_id"] = "orchestrator"
    if message:
        body["message"] = message
    if payload:
        body["payload"] = payload
    body["timestamp"] = clock(entry.at)
    asked: list[Json] = []
    if stream and raw == "WORKFLOW_CANCELLED":
        asked.append({**body, "type": "WORKFLOW_CANCELLING", "message": "The task is being cancelled."})
    body["seq"], body["stream_id"] = entry.seq, entry.id
    return [*asked, body]


def raw_type(event: AnyEvent) -> str:
    """Empty for `deleted`."""
    if raw := RAW.get(type(event)):
        return raw
    match event:
        case events.Noted():
            return event.name
        case events.ReviewRequested():
            return "RESEARCH_PLAN_READY" if event.round == 1 else "RESEARCH_PLAN_UPDATED"
        case events.Reviewed():
            return "RESEARCH_PLAN_APPROVED" if event.approved else "REVIEW_USER_FEEDBACK"
        case _:
            return ""


def _told(entry: Entry) -> tuple[str, Json]:
    """What people read, and what machines read. A restart says its attempt: a client drops the text it showed."""
    event, attempt = entry.event, entry.attempt
    match event:
        case events.TextDelta():
            return event.text, {"attempt": attempt}
        case (
            events.Noted() | events.Thinking() | events.AgentStarted() | events.AgentCompleted() | events.PlanUpdated()
        ):
            return event.message, event.payload
        case events.TextCompleted():
            took = {"duration_ms": event.duration_ms} if event.duration_ms else {}
            return event.text, {**_usage(event.usage), **took}
        case events.Retried():
            return event.message or "The task is tried once more.", {}
        case events.Submitted() | events.Continued():
            return event.message or "Task accepted.", {}
        case events.Started():
            return event.message or "Task started.", {"attempt": attempt}
        case events.Requeued():
            again: Json = {"attempt": attempt, "reason": "requeued", "delay_seconds": event.delay_seconds}
            again["next_attempt_at"] = clock(entry.at + round(event.delay_seconds * 1_000_000))
            if event.error:
                again["error"] = event.error
            return event.message or "The task is queued again.", again
        case events.LeaseLost():
            lost = {"attempt": attempt, "reason": "lease_lost"}
            return event.message or "The task lost its worker and is queued again.", lost
        case events.PauseAsked():
            return event.message or "The task is being paused.", _reason(event.reason)
        case events.Paused():
            # Upstream's checkpoints are names (§1.8); the handler's state stays inside.
            return event.message or "Task paused.", {"checkpoint": event.checkpoint}
        case events.Resumed():
            return event.message or "Task resumed.", _reason(event.reason)
        case events.Cancelled():
            return event.message or "Task cancelled.", _reason(event.reason)
        case events.Completed():
            return event.message or "Task completed.", _usage(event.usage)
        case events.Failed() | events.Errored():
            return event.error or event.message, {"status": STATUS[Status.FAILED]}
        case events.TimedOut():
            return event.error or event.message, {"status": STATUS[Status.TIMED_OUT]}
        case events.Restated():
            to = {"status": STATUS[Status(event.to)]} if event.to else {}
            return event.message or "The task's state was set.", to
        case events.Progressed():
            return event.message, {**event.payload, "progress": event.fraction}
        case events.ToolCalled():
            call = {"call_id": event.call} if event.call else {}
            return event.message or f"Calling {event.tool}.", {
                **event.payload,
                **call,
                "tool": event.tool,
                "params": event.params,
            }
        case events.ToolReturned():
            output = event.output[:MESSAGE_MAX] if isinstance(event.output, str) else ""
            call = {"call_id": event.call} if event.call else {}
            return event.message or output, {
                **event.payload,
                **call,
                "tool": event.tool,
                "success": event.success,
                "duration_ms": event.duration_ms,
                "output": event.output,
            }
        case events.ApprovalRequested():
            # Without its id nobody could decide it: upstream leaves it out (§1.10).
            asked = {**event.payload, "approval_id": event.approval, "reason": event.reason}
            return event.message or f"Needs approval: {event.reason}", asked
        case events.ApprovalDecided():
            message = event.message or ("Approved." if event.approved else "Denied.")
            decided = {**event.payload, "approval_id": event.approval, "approved": event.approved}
            return message, {**decided, "feedback": event.feedback} if event.feedback else decided
        case events.ReviewRequested():
            return event.message or event.plan, {"round": event.round, "version": event.version}
        case events.Reviewed():
            message = event.message or event.feedback or "The plan is approved."
            return message, {"version": event.version, "approved": event.approved}
        case events.ChildSubmitted():
            made = {"task_id": event.task.id, "agent_id": event.task.agent}
            return event.message or f"Delegated to {event.task.agent}.", made
        case events.Deleted():
            return "", {}
        case _:
            assert_never(event)


def _reason(reason: str) -> Json:
    return {"reason": reason} if reason else {}


def _usage(usage: Usage | None) -> Json:
    """As LLM_OUTPUT's payload names it (§3)."""
    if usage is None:
        return {}
    body: Json = {
        "tokens_used": usage.input_tokens + usage.output_tokens,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cost_usd": usd(usage.cost_nano),
    }
    return body | {name: value for name, value in (("model_used", usage.model), ("provider", usage.provider)) if value}


GAPS = {
    "trimmed": "Events after the cursor are no longer kept.",
    "ahead": "The cursor lies beyond the last event.",
    "unknown": "The cursor was never given here.",
}
"""What a cursor asked for and cannot get; a snapshot says what is true instead."""


def control(item: Gap | Began | Reached | Ended, *, epoch: str = "") -> Frame:
    """What is no event of a task: `done`, the only clean end (§0.5), and three of ours, of names which the UI ignores
    and the SDK delivers (§11). After `gap` and `snapshot` a stream goes on behind the state that they hold, whose id
    they carry; on a stream of many tasks `cursor` carries it for all of them.
    """
    match item:
        case Ended():
            id_ = f"{item.last_id}.end" if item.last_id else ""
            return Frame(event="done", data="[DONE]", id=id_, type="STREAM_END")
        case Reached():
            return _control("cursor", {"log_epoch": epoch, "stream_id": item.cursor}, item.cursor)
        case Began():
            return _control("snapshot", _state(item.snapshot, epoch), item.cursor)
        case Gap():
            data: Json = {"message": GAPS[item.reason], "reason": item.reason}
            if item.snapshot:
                data |= {"earliest_seq": item.earliest, "latest_seq": item.latest, **_state(item.snapshot, epoch)}
                return _control("gap", data, item.snapshot.fields["last_event_id"])
            return _control("gap", data | {"log_epoch": epoch, "list": list_url(item.selection)}, "")


def _control(name: str, data: Json, id_: str) -> Frame:
    return Frame(event=name, data={"type": name, **data}, id=id_)


def _state(snapshot: Snapshot, epoch: str) -> Json:
    known = task(snapshot.fields)
    return {
        "workflow_id": known.id,
        "seq": known.last_seq,
        "log_epoch": epoch,
        "snapshot": {**task_body(known), "texts": snapshot.texts},
    }


def list_url(selection: Selection | None) -> str | None:
    """The list of what a stream of many follows; its answer has the cursor to begin again from. None: a stream of
    named tasks, which is told the state of each.
    """
    if selection is None or selection.tasks:
        return None
    words = dict.fromkeys(WORD[status] for status in sorted(selection.statuses))
    query = {"session_id": selection.session, "agent_id": selection.agent, "status": ",".join(words)}
    asked = urlencode({name: value for name, value in query.items() if value})
    return f"/api/v1/tasks?{asked}" if asked else "/api/v1/tasks"


# Errors


def error_body(error: TaskcastError) -> tuple[int, Json]:
    """`{"error": sentence}` (§1.0), and what upstream adds to it."""
    status, sentence = plain(error)
    body: Json = {"error": sentence}
    match error:
        case errors.Gone():
            numbers = {"earliest_seq": error.earliest, "latest_seq": error.latest} if error.latest else {}
            body = {"error": GAPS.get(error.reason, sentence), "reason": error.reason, **numbers}
        case errors.NotFound():
            body = {"error": sentence or "Task not found"}
        case errors.Conflict() if error.status in STATUS:
            # Upstream's documents show these three on a 409 (§1.8); the UI reads `success`.
            body |= {"success": False, "message": sentence, "status": STATUS[Status(error.status)]}
        case _:
            pass
    return status, body


def refused(verb: str, error: Conflict) -> Conflict:
    """A control's conflict in upstream's words (§1.8): `cannot pause completed task`, `task is already paused`.

    A task that waits for a decision is paused, but not to be resumed: then the store's own sentence says so.
    """
    status = Status(error.status)
    if status.value in ENDED_WORD:
        return Conflict(f"cannot {verb} {ENDED_WORD[status.value]} task", error.status)
    if verb == "retry":
        return Conflict("task has not ended", error.status)
    if verb == "resume" and status in {Status.PAUSED, Status.HELD}:
        return error
    return Conflict("task is already paused" if verb == "pause" else "task is not paused", error.status)


ENDED_WORD = {
    Status.COMPLETED.value: "completed",
    Status.FAILED.value: "failed",
    Status.ERRORED.value: "failed",
    Status.CANCELLED.value: "cancelled",
    Status.TIMED_OUT.value: "timed out",
}
