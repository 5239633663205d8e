"""The pure part of the xpander dialect: its request → our submission or next turn; our tasks, events, errors → its JSON.

No I/O. Sections (§) are those of the contract that its documents and its SDK add up to. A whole task is always sent with
every key: an older SDK breaks on one that is absent, and a newer one takes its own default for it (§2.1). `result` is
always a text, and the key `configuration` never appears: the SDK fails on both.

It is long because it is one vocabulary: what a client may say, and each task, event and message that answers it.

What it cannot say of a task: `held` and `paused` are one word, and a timed-out task is `failed`. Secrets
(`user_oidc_token`, `user_tokens`, the keys and headers of MCP servers) reach the worker alone, and are null elsewhere.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, assert_never
from uuid import uuid4

from msgspec.structs import replace

from app import errors, events
from app.agents import Agent, effective
from app.answers import clock, moment, plain
from app.api.xpander.models import Invocation, Metrics, Rejected, Report, Tokens, Update, Word
from app.errors import Invalid, TaskcastError, TooLarge
from app.events import AnyEvent, Continued, Entry, Json, Restated, Submission, Usage
from app.frames import Frame
from app.identity import Identity
from app.log import Message, random_id
from app.seam import Began, Ended, Gap, Reached
from app.task import STORED, TERMINAL, Status, Task, task, text

STATUS: Mapping[Status, Word] = {
    Status.QUEUED: "pending",
    Status.RUNNING: "executing",
    Status.PAUSED: "paused",
    Status.HELD: "paused",
    Status.COMPLETED: "completed",
    Status.FAILED: "failed",
    Status.ERRORED: "error",
    Status.CANCELLED: "stopped",
    Status.TIMED_OUT: "failed",
}

ASKED = {word: tuple(status for status in STORED if STATUS[status] == word) for word in STATUS.values()}
"""What a `status` filter means: a set of our statuses."""

METRICS = "metrics"
"""Among what is stated: what the SDK reported."""
STOPPED = "stopped"
"""Among a turn's own: the turn before was stopped, and its worker may not know it yet."""
COUNTED = "counted"
"""In `extra`: the task's tokens, in and out, before its present turn. The SDK tells those of a turn."""

SECRETS = ("user_tokens", "user_oidc_token")
MCP_SECRETS = ("api_key", "client_id", "client_secret", "headers", "env_vars")
PINNED = "worker:"
"""Queue of what one registered worker alone may have."""
LOCAL = "local:"
"""Queue of what a worker made for itself, and begins at once from the answer (its `--invoke`): nobody else claims it."""
REPORTED = f"{LOCAL}report"
"""Queue of tasks that ran elsewhere."""

# Its request → our words


class Particulars(TypedDict):
    """What is the same in a first turn and in a later one."""

    query: str
    title: str
    context: Json
    queue: str
    llm_provider: str
    llm_model: str
    llm_effort: str
    output_schema: Json
    extra: Json
    submission: str


def _particulars(asked: Invocation, agent: Agent, *, kind: str, version: str) -> Particulars:
    return {
        "query": asked.input.text or "",
        "title": asked.title or "",
        "context": asked.payload_extension or {},
        "queue": _queue(asked, agent),
        "llm_provider": asked.llm_model_provider or "",
        "llm_model": asked.llm_model_name or "",
        "llm_effort": asked.llm_reasoning_effort or "",
        "output_schema": schema_of(asked),
        "extra": {**_extra(asked, kind), "agent_version": version},
        "submission": random_id(),
    }


def submission(asked: Invocation, agent: Agent, who: Identity, *, source: str, kind: str, version: str) -> Submission:
    """A new task. `kind`: `agent` or `workflow`, as which the agent was invoked; `source`: when the request names none.

    Raises Invalid when it could not be stored.
    """
    id_ = asked.id or str(uuid4())
    user = asked.input.user
    made = Submission(
        id=id_,
        org=who.org,
        owner=who.user,
        user=(user.id or "") if user else "",
        agent=agent.id,
        session=id_,
        parent=asked.parent_execution_id or "",
        trigger=asked.triggering_agent_id or "",
        dialect="xpander",
        source=asked.source or asked.source_node_type or source,
        **_particulars(asked, agent, kind=kind, version=version),
    )
    return effective(made, agent)


def turn(known: Task, asked: Invocation, agent: Agent, actor: str, *, kind: str, version: str) -> Continued:
    """The next turn of the task that the request names."""
    particulars = _particulars(asked, agent, kind=kind, version=version)
    if known.status is Status.CANCELLED and known.attempt:
        particulars["extra"][STOPPED] = True
    if known.total_tokens:
        particulars["extra"][COUNTED] = [known.input_tokens, known.output_tokens]
    return effective(Continued(actor=actor, **particulars), agent)


def secrets(asked: Invocation) -> Json:
    """Of a request: what its worker alone may read (`Store.hide`). MCP servers are told whole there."""
    given = asked.model_dump(mode="json", include={*SECRETS, "mcp_servers"}, exclude_none=True)
    bare = not any(name in one for one in given.get("mcp_servers", []) for name in MCP_SECRETS)
    return {name: value for name, value in given.items() if value and not (name == "mcp_servers" and bare)}


def _queue(asked: Invocation, agent: Agent) -> str:
    if not asked.worker_id:
        return agent.queue
    return f"{LOCAL if asked.run_locally else PINNED}{asked.worker_id}"


def schema_of(asked: Invocation) -> Json:
    """What the result has to fit: only JSON can (§1.7)."""
    return (asked.output_schema or {}) if asked.output_format == "json" else {}


def _extra(asked: Invocation, kind: str) -> Json:
    """What this dialect alone reads back."""
    own = {"input", "id", "payload_extension", "parent_execution_id", "triggering_agent_id", "title", "source"}
    fields = asked.model_dump(mode="json", exclude=own | {*SECRETS, "llm_model_provider"}, exclude_none=True)
    for name in ("llm_model_name", "llm_reasoning_effort", "source_node_type"):
        fields.pop(name, None)
    if servers := fields.get("mcp_servers"):
        fields["mcp_servers"] = [{k: v for k, v in one.items() if k not in MCP_SECRETS} for one in servers]
    fields["input"] = asked.input.model_dump(mode="json", exclude={"text"}, exclude_none=True)
    if kind == "workflow":
        fields["is_orchestration"] = True
    return fields


STATED = (
    *("last_executed_node_id", "deep_planning", "hitl_request", "pending_eca_request", "additional_context"),
    *("payload_extension", "used_tools", "used_mutating_tools", "duration", "source"),
)
"""What a PATCH may change and nobody here reads: kept as it is, for this turn."""


def restated(found: Task, update: Update, actor: str) -> Restated | None:
    """What a PATCH changes; None: nothing. The SDK sends a whole task as it saw it last, so what is an echo counts for
    nothing, and what came too late is ignored, never refused: to a refusal it answers with `error` (§3.5).
    """
    sent = update.model_fields_set
    to = _stated_status(found, update.status) if update.status else ""
    frozen = found.terminal or _unbegun(found)
    result = None
    if "result" in sent and not frozen:
        known = found.error if to in {Status.FAILED, Status.ERRORED} else found.result
        result = update.result or "" if (update.result or "") != known else None
    if to == Status.COMPLETED and result is None and found.result:
        result = found.result  # said before, and now the turn's answer: the conversation has it from its end
    internal = _changed(update, "internal_status", found.internal_status)
    title = _changed(update, "title", found.title)
    stated = _stated(found, update)
    if not to and result is None and internal is None and title is None and stated is None:
        return None
    ends = to in TERMINAL and not frozen
    return Restated(
        actor=actor,
        to=to,
        result=result,
        result_type="json" if found.extra.get("output_format") == "json" else "text",
        internal_status=internal,
        title=title,
        stated=stated,
        version=found.stated_version + 1 if stated is not None else 0,
        usage=usage_of(update.tokens, found) if ends else None,
    )


def _stated_status(found: Task, word: Word) -> str:
    """The status that a PATCH moves a task to; empty: none."""
    before = found.status
    if STATUS[before] == word:
        return ""
    if _unbegun(found) and word != "stopped":
        return ""
    if found.waits and word in {"pending", "executing"}:
        return ""  # an echo: the handler waits for a decision, and would wait for ever if the task went on without it
    if found.terminal:
        # A stopped worker says `completed`, and there is no word by which it could be told: but an explicit pause
        # re-opens the task, as upstream's own test expects (§3.5).
        return Status.HELD if word == "paused" else ""
    match word:
        case "pending":
            # Of a running task it is the echo of what its submitter saw.
            return Status.QUEUED if before in {Status.PAUSED, Status.HELD} else ""
        case "executing":
            # A worker that lost its lease before it began: the task waits for another one.
            return "" if before is Status.QUEUED and found.attempt else Status.RUNNING
        case "paused":
            return Status.PAUSED
        case "error":
            return Status.ERRORED
        case "failed":
            return Status.FAILED
        case "completed":
            return Status.COMPLETED
        case "stopped":
            return Status.CANCELLED
        case _:
            assert_never(word)


def _unbegun(found: Task) -> bool:
    """It follows a turn that was stopped while a worker had it, and nobody was given it yet: what a worker says is its last
    word of the turn before.
    """
    return found.status is Status.QUEUED and not found.attempt and STOPPED in found.extra and LOCAL not in found.queue


def _changed(update: Update, name: str, known: str) -> str | None:
    if name not in update.model_fields_set:
        return None
    value: str = getattr(update, name) or ""
    return value if value != known else None


def _stated(found: Task, update: Update) -> Json | None:
    """None: it states nothing new."""
    ours, before = task_body(replace(found, stated={})), task_body(found)
    stated = dict(found.stated)
    for name in STATED:
        if name not in update.model_fields_set or (value := getattr(update, name)) == before[name]:
            continue
        if name in {"duration", "source"} and not value:
            continue  # the SDK's own defaults: it says 0 of each task that it knows from before its end
        if name == "hitl_request" and found.waits:
            continue  # what its handler waits for, the handler says
        if value == ours[name]:
            stated.pop(name, None)
        else:
            stated[name] = value
    if extension := update.tool_call_payload_extension:
        stated["payload_extension"] = {**(before["payload_extension"] or {}), **extension}
    return stated if stated != found.stated else None


def usage_of(tokens: Tokens | None, found: Task) -> Usage | None:
    """Beyond what is counted already: the SDK tells the same sum more than once."""
    if tokens is None:
        return None
    prompt, completion = _counted(found)
    return Usage(
        model=found.llm_model,
        provider=found.llm_provider,
        input_tokens=max(0, tokens.prompt_tokens - prompt),
        output_tokens=max(0, tokens.completion_tokens - completion),
    )


def _counted(found: Task) -> tuple[int, int]:
    """Tokens of the present turn, in and out."""
    before: list[int] = found.extra.get(COUNTED, [0, 0])
    return found.input_tokens - before[0], found.output_tokens - before[1]


def reported(report: Report, agent: Agent, who: Identity) -> Submission:
    """A task that ran elsewhere, to be ended by `report_of`. No worker gets it."""
    id_ = report.id or str(uuid4())
    made = Submission(
        id=id_,
        org=who.org,
        owner=who.user,
        agent=agent.id,
        session=id_,
        queue=REPORTED,
        dialect="xpander",
        source="sdk",
        query=report.input or "",
        extra={"input": {}},
        submission=random_id(),
    )
    return effective(made, agent)


def measured(found: Task, metrics: Metrics, actor: str) -> Restated | None:
    """What the SDK reports of an execution, kept with the turn; its tokens count as far as they were not told before."""
    said = metrics.model_dump(mode="json", exclude_none=True)
    if found.stated.get(METRICS) == said:
        return None
    tokens = metrics.llm_tokens.worker if metrics.llm_tokens else None
    return Restated(
        actor=actor,
        stated={**found.stated, METRICS: said},
        version=found.stated_version + 1,
        usage=usage_of(tokens, found),
    )


def report_of(found: Task, report: Report, actor: str) -> Restated | None:
    """The end of a reported task; of one that was reported before, what is new."""
    if found.terminal:
        # Its outcome stands; a better answer of a task that ran elsewhere is welcome.
        better = found.queue == REPORTED and found.status is Status.COMPLETED and report.is_success is not False
        result = report.result or ""
        return Restated(actor=actor, result=result) if better and result != found.result else None
    said: Json = {"status": "failed" if report.is_success is False else "completed", "result": report.result}
    said |= {"tokens": report.tokens, "used_tools": report.used_tools, "duration": report.duration}
    return restated(found, Update.model_validate({name: one for name, one in said.items() if one is not None}), actor)


# Our task → its JSON


def task_body(found: Task, children: Sequence[tuple[str, Status]] = ()) -> Json:
    """The whole task (§2.1). `children`: its sub-tasks; a frame, which knows of none, tells each as it is made."""
    extra, stated = found.extra, found.stated
    body: Json = {
        "id": found.id,
        "agent_id": found.agent,
        "organization_id": found.org,
        "input": input_body(found),
        "status": STATUS[found.status],
        "internal_status": found.internal_status or None,
        "last_executed_node_id": None,
        "agent_version": extra.get("agent_version"),
        "created_at": clock(found.created_at),
        "started_at": moment(found.started_at),
        "paused_at": moment(found.paused_at),
        "finished_at": moment(found.finished_at),
        "result": result_of(found),
        "parent_execution": found.parent or None,
        "sub_executions": [id_ for id_, _ in children],
        "finished_sub_executions": [id_ for id_, status in children if status in TERMINAL],
        "is_manually_stopped": found.status is Status.CANCELLED and found.cancelled_by != "taskcast",
        "payload_extension": found.context or None,
        "hitl_request": {"wait_node_id": found.waits.partition(":")[2]} if found.waits else None,
        "pending_eca_request": None,
        "source": found.source or "api",
        "worker_id": extra.get("worker_id") or found.worker or None,
        "additional_context": extra.get("additional_context"),
        "expected_output": extra.get("expected_output"),
        "instructions_override": extra.get("instructions_override"),
        "test_run_node_id": extra.get("test_run_node_id"),
        "is_orchestration": extra.get("is_orchestration", False),
        "output_format": extra.get("output_format", "text"),
        "voice_id": extra.get("voice_id"),
        "output_schema": extra.get("output_schema"),
        "events_streaming": extra.get("events_streaming", False),
        "used_mutating_tools": False,
        "is_continuous": False,
        "mcp_servers": extra.get("mcp_servers", []),
        "triggering_agent_id": found.trigger or None,
        "title": found.title or None,
        "think_mode": extra.get("think_mode", "default"),
        "disable_attachment_injection": extra.get("disable_attachment_injection", False),
        "deep_planning": None,
        "execution_attempts": max(1, found.attempt),
        "user_tokens": None,
        "user_oidc_token": None,
        "return_metrics": extra.get("return_metrics", False),
        "tokens": tokens_of(found),
        "llm_model_provider": found.llm_provider or found.provider or None,
        "llm_model_name": found.llm_model or found.model or None,
        "llm_reasoning_effort": found.llm_effort or None,
        "should_update_parent": False,
        "conversation_id": None,
        "conversation_kind": None,
        "execution_kind": None,
        "is_gateway": False,
        "is_app": False,
        "background_auth_eligible": False,
        "tool_call_limit": extra.get("tool_call_limit"),
        "must_deep_plan": False,
        "harness_cli": extra.get("harness_cli"),
        "permission_mode": extra.get("permission_mode"),
        "used_tools": [],
        "duration": max(0, found.finished_at - found.started_at) / 1_000_000 if found.started_at else 0,
    }
    return body | {name: stated[name] for name in STATED if name in stated}


def input_body(found: Task) -> Json:
    """Of the latest turn (§2.2)."""
    given = found.extra.get("input", {})
    body: Json = {"text": found.query, "files": [], "user": None, **given}
    if user := body["user"]:
        names = [user[name] for name in ("first_name", "last_name") if user.get(name)]
        body["user"] = {**_NOBODY, **user, "display_name": " ".join(names) or user.get("email", "")}
    return body


_NOBODY: Json = dict.fromkeys(("id", "first_name", "last_name", "additional_attributes", "timezone"))


def result_of(found: Task) -> str | None:
    """A text, always (§2.1): a JSON result as its JSON, an error as its sentence, whatever had come out before it."""
    return found.error or found.result or ("" if found.status is Status.COMPLETED else None)


def tokens_of(found: Task) -> Json | None:
    """Of the present turn, as its result."""
    prompt, completion = _counted(found)
    if not prompt + completion:
        return None
    return {"completion_tokens": completion, "prompt_tokens": prompt, "total_tokens": prompt + completion}


def task_item(found: Task) -> Json:
    """A row of a list (§2.3)."""
    return {
        "id": found.id,
        "agent_id": found.agent,
        "user_id": found.user or None,
        "parent_task_id": found.parent or None,
        "triggering_agent_id": found.trigger or None,
        "organization_id": found.org,
        "status": STATUS[found.status],
        "created_at": clock(found.created_at),
        "updated_at": clock(found.updated_at),
        "source_node_type": found.source or "api",
        "result": result_of(found),
        "title": found.title or found.query or None,
    }


# Our events → its frames

NOTED = {
    "AUTH_EVENT": "auth_event",
    "TASK_COMPACTIZATION": "task_compactization",
    "SUB_AGENT_TRIGGER": "sub_agent_trigger",
}
"""Notes that have a safe type of their own."""
NEWER = frozenset(
    {
        *("context_status", "agent_gateway_decision", "process_state_changed", "process_update", "inline_card"),
        *("gateway_steer_applied", "ask_user_questions", "sub_task_created", "sub_task_updated", "sub_task_finished"),
        *("invite_member", "member_invited", "ask_for_secret", "secret_saved", "live_surface_created"),
    }
)
"""Types that an older SDK raises on."""


def frame(entry: Entry, *, extended: bool = False) -> list[Frame]:
    """The frames of one entry, which holds the state after it: `data:` alone, no name and no id (§1.8). `extended`: of
    every type, not only of those that each version of the SDK knows (§4).
    """
    assert entry.after is not None, "these frames carry the whole task"
    told = _told(entry, extended=extended)
    return [_frame(kind, entry.task, entry.after["org"], entry.at, data) for kind, data in told]


def frame_extended(entry: Entry) -> list[Frame]:
    return frame(entry, extended=True)


def connected(org: str, id_: str, at: int) -> Frame:
    """What a stream of all types begins with."""
    return _frame("connected", id_, org, at, None)


def _frame(kind: str, id_: str, org: str, at: int, data: Any) -> Frame:
    return Frame(event="", data={"type": kind, "task_id": id_, "organization_id": org, "time": clock(at), "data": data})


def _told(entry: Entry, *, extended: bool) -> list[tuple[str, Any]]:
    event = entry.event
    match event:
        case events.TextDelta():
            return [("chunk", event.text)]
        case events.TextCompleted() | events.AgentStarted() | events.AgentCompleted() | events.Deleted():
            return []
        case events.ToolCalled():
            return [("tool_call_request", _call(event))]
        case events.ToolReturned():
            returned = {"result": event.output, "is_error": not event.success, "approval_request_id": None}
            return [("tool_call_result", _call(event) | returned)]
        case events.Thinking():
            kind = "analyze" if event.payload.get("operation_id") == "analyze" else "think"
            return [(kind, _thought(event, kind))]
        case events.PlanUpdated():
            return [("plan_updated", {**_PLAN, **event.payload})]
        case events.ChildSubmitted(task=child):
            trigger = {"agent_id": child.agent, "query": child.query, "files": [], "reasoning": _REASONING}
            told: list[tuple[str, Any]] = [("sub_agent_trigger", {**trigger, "plan_task_id": None})]
            made = {"task_id": child.id, "agent_id": child.agent, "parent_task_id": entry.task}
            return [*told, ("sub_task_created", made)] if extended else told
        case events.Noted():
            kind = NOTED.get(event.name, event.name.lower())
            known = event.name in NOTED or (extended and kind in NEWER)
            return [(kind, event.payload.get("data", event.payload))] if known else []
        case events.Submitted() | events.Continued():
            return [("task_created", _state(entry))]
        case _:
            found = _state(entry)
            if found["status"] not in _ENDED:
                return [("task_updated", found)]
            # What is stated of an ended task comes after its readers have left, and `task_finished` is the last frame.
            late = isinstance(event, events.Restated) and not event.to
            return [] if late else [("task_finished", found)]


_ENDED = frozenset(STATUS[status] for status in TERMINAL)
_PLAN: Json = {"enabled": True, "enforce": False, "started": True, "question_raised": False, "tasks": []}
_REASONING: Json = {"title": "", "description": ""}


def _state(entry: Entry) -> Json:
    assert entry.after is not None
    return task_body(task(entry.after))


def _call(event: events.ToolCalled | events.ToolReturned) -> Json:
    """What a worker of this dialect pushed comes back as it was."""
    call: Json = {
        "request_id": event.call,
        "operation_id": event.tool,
        "tool_call_id": event.call or None,
        "graph_node_id": None,
        "tool_name": event.tool,
        "payload": event.params if isinstance(event, events.ToolCalled) else None,
        "reasoning": _REASONING,
        "plan_task_id": None,
    }
    return call | event.payload


def _thought(event: events.Thinking, kind: str) -> Json:
    body = event.payload or {"payload": {"input": {"title": "", "thought": event.message}}}
    return {"request_id": "", "operation_id": kind, "tool_call_id": None, "tool_name": kind, **body}


def control(item: Gap | Began | Reached | Ended) -> Frame | None:
    """After a gap the whole task as it stood there; the end is the end of the stream (§1.8, §3.4)."""
    snapshot = item.snapshot if isinstance(item, Gap | Began) else None
    if snapshot is None:
        return None
    fields = snapshot.fields
    return _frame("task_updated", fields["id"], fields["org"], int(fields["updated_at"]), task_body(task(fields)))


PUSHED: Mapping[str, str] = {spelled: name for name, spelled in NOTED.items()}
OURS = frozenset({"task_created", "task_updated", "task_finished", "connected"})
"""What the store says itself, so that nobody else needs to."""


def pushed(kind: str, data: Any, actor: str) -> AnyEvent | None:
    """A worker's event in our words; None: one that we say ourselves. Raises Invalid."""
    fields: Json = data if isinstance(data, dict) else {"data": data}
    match kind:
        case _ if kind in OURS:
            return None
        case "chunk":
            return events.TextDelta(text=data if isinstance(data, str) else text(fields), agent=events.FINAL_OUTPUT)
        case "tool_call_request":
            params = fields.get("payload")
            return events.ToolCalled(
                actor=actor,
                tool=_tool(fields),
                call=_call_id(fields),
                params=params if isinstance(params, dict) else {},
                payload=fields,
            )
        case "tool_call_result":
            kept = {name: value for name, value in fields.items() if name not in {"result", "is_error"}}
            return events.ToolReturned(
                actor=actor,
                tool=_tool(fields),
                call=_call_id(fields),
                success=not fields.get("is_error"),
                output=fields.get("result"),
                payload=kept,
            )
        case "think" | "analyze":
            if isinstance(data, str):
                fields = {"payload": {"input": {"title": "", "thought": data}}}
            return events.Thinking(actor=actor, payload={**fields, "operation_id": kind})
        case "plan_updated":
            return events.PlanUpdated(actor=actor, payload=fields)
        case _ if kind in PUSHED or kind in NEWER:
            return events.Noted(actor=actor, name=PUSHED.get(kind, kind.upper()), payload={"data": data})
        case _:
            raise Invalid(f"Unknown event type: {kind[:100]}")


def _tool(fields: Json) -> str:
    return str(fields.get("tool_name") or fields.get("operation_id") or "tool")


def _call_id(fields: Json) -> str:
    return str(fields.get("tool_call_id") or fields.get("request_id") or "")


# Conversations


def _question(event: AnyEvent) -> str | None:
    if isinstance(event, events.Submitted):
        return event.task.query
    return event.query if isinstance(event, events.Continued) else None


def _answer(event: AnyEvent) -> events.Completed | Restated | None:
    """An end with a result, by whomever."""
    if isinstance(event, events.Completed):
        return event
    return event if isinstance(event, Restated) and event.to == Status.COMPLETED and event.result else None


def messages(found: Task, said: Iterable[Message], *, full: bool) -> list[Json]:
    """Of all turns; tool calls in the full thread only (§1.4)."""
    told: list[Json] = []
    for one in said:
        event = one.event
        if (question := _question(event)) is not None:
            told.append(_message(found, one, "user", question))
        if answered := _answer(event):
            told.append(_message(found, one, "assistant", answered.result) | _metrics(answered.usage))
        match event:
            case events.ToolCalled() if full:
                call = {"name": event.tool, "arguments": text(event.params)}
                made = {"id": event.call, "type": "function", "function": call}
                told.append(_message(found, one, "assistant", None) | {"tool_calls": [made]})
            case events.ToolReturned() if full:
                output = event.output if isinstance(event.output, str) else text(event.output)
                answer = {"tool_call_id": event.call or None, "tool_name": event.tool}
                told.append(_message(found, one, "tool", output) | answer | {"tool_call_error": not event.success})
            case _:
                pass
    return told


_METRICS: Json = {
    **dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0),
    **dict.fromkeys(("audio_input_tokens", "audio_output_tokens", "audio_total_tokens"), 0),
    **dict.fromkeys(("cache_read_tokens", "cache_write_tokens", "reasoning_tokens"), 0),
    **dict.fromkeys(("timer", "time_to_first_token", "duration", "provider_metrics", "additional_metrics")),
}
_ABSENT = (
    *("name", "tool_call_id", "tool_calls", "audio", "images", "videos", "files", "audio_output", "image_output"),
    *("video_output", "file_output", "redacted_reasoning_content", "provider_data", "citations", "reasoning_content"),
    *("tool_name", "tool_args", "tool_call_error", "references"),
)


def _message(found: Task, one: Message, role: str, content: str | None) -> Json:
    return {
        "id": f"{found.id}:{one.seq}",
        "role": role,
        "content": content,
        "created_at": one.at // 1_000_000,
        **dict.fromkeys(_ABSENT),
        "stop_after_tool_call": False,
        "add_to_agent_memory": True,
        "from_history": False,
        "metrics": _METRICS,
    }


def _metrics(usage: Usage | None) -> Json:
    if usage is None:
        return {}
    counted = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
    return {"metrics": {**_METRICS, **counted, "total_tokens": usage.input_tokens + usage.output_tokens}}


def activity(found: Task, said: Iterable[Message]) -> Json:
    """What the SDK calls a task's activity log (§2.5)."""
    entries: list[Json] = []
    for one in said:
        event = one.event
        entry: Json = {"id": f"{found.id}:{one.seq}", "created_at": clock(one.at)}
        if (question := _question(event)) is not None:
            entries.append(entry | _said("user", question))
        if answered := _answer(event):
            entries.append(entry | _said("agent", answered.result or ""))
        match event:
            case events.ToolCalled():
                entries.append(entry | _used(event) | {"is_error": None, "result": None})
            case events.ToolReturned():
                entries.append(entry | _used(event) | {"is_error": not event.success, "result": event.output})
            case _:
                pass
    return {
        "id": found.id,
        "created_at": clock(found.created_at),
        "messages": entries,
        "user": input_body(found)["user"],
    }


def _said(role: str, words: str) -> Json:
    return {"role": role, "content": {"text": words, "files": []}}


def _used(event: events.ToolCalled | events.ToolReturned) -> Json:
    call = _call(event)
    return {name: call[name] for name in ("tool_name", "payload", "reasoning", "plan_task_id")}


# Errors


def error_body(error: TaskcastError) -> tuple[int, Json]:
    """`{"detail": sentence}`; what does not fit its model is 422 with its places (§1.0)."""
    status, sentence = plain(error)
    match error:
        case Rejected():
            return 422, {"detail": error.places}
        case TooLarge():
            return status, {"detail": sentence}
        case Invalid():
            return 422, {"detail": [{"type": "value_error", "loc": ["body"], "msg": sentence}]}
        case errors.Unauthorized():
            return status, {"detail": "Invalid or missing API key"}
        case errors.NotFound():
            return status, {"detail": sentence or "Task not found"}
        case _:
            return status, {"detail": sentence}
