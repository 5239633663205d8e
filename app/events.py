"""What can happen to a task: one frozen type per event, facts in the past tense.

Lifecycle events move the transition table (`task.py`); activity events do not. An event is what somebody
says; an `Entry` is that event at its place in the log: the script adds seq, id and time, so no client's clock is
ever trusted. Encoded once, as JSON with the type as tag, and read by every dialect. No I/O here.
"""

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from app.errors import Invalid, TooLarge

EVENT_BYTES_MAX = 256 * 1024
RESULT_BYTES_MAX = 192 * 1024
DEPTH_MAX = 110
"""Of nested JSON; decoders give up at a depth that depends on who calls them."""
TEXT_BYTES_MAX = 192 * 1024
"""All text generated so far by one task, over all its agents."""

ID = re.compile(r"[A-Za-z0-9:_.\-]{1,128}")
"""Task and session ids, as Shannon's gateway checks them (contract §1.0)."""

NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
"""Organisations and owners. No colon and no slash: these part the pieces of a key and of a queue's member."""

NOTED = re.compile(r"(?!STREAM_END\Z)[A-Z][A-Z0-9_]{0,63}")
"""What an event may be called that has no type of its own: anything in upper case but the one name that readers take for
the end of a stream.
"""

FINAL_OUTPUT = "final_output"
"""The agent whose text is the user's answer (Shannon's contract §3)."""

Json = dict[str, Any]
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]
"""Fits a Lua number exactly."""
Seconds = Annotated[float, Meta(ge=0, le=10 * 366 * 86400)]
"""At most ten years: a time in µs must fit a Lua number too."""
Short = Annotated[str, Meta(max_length=256)]
"""What stands in key names, and in the header of every entry."""
Approval = Annotated[str, Meta(min_length=1, max_length=256)]
"""An approval without a name could never be decided."""
Reason = Annotated[str, Meta(max_length=4000)]
"""Stands in the snapshot, and so in every list."""
Name = Annotated[str, Meta(pattern=rf"^{NAME.pattern}\Z")]


class Event(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", gc=False):
    actor: str = ""
    """Who said it: `user:<id>`, `worker:<id>`, or `taskcast` itself."""
    message: str = ""
    """For people; machines read the other fields."""
    agent: Short = ""
    """The agent inside the task that it is about; empty for the task as a whole."""


class Usage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a model call consumed. Cost in nano-USD: Redis and Python print floats differently."""

    model: str = ""
    provider: str = ""
    input_tokens: Count = 0
    output_tokens: Count = 0
    cost_nano: Count = 0


class Submission(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request for work, in our words: what a dialect makes of its own request body."""

    id: Annotated[str, Meta(pattern=rf"^{ID.pattern}\Z")]
    org: Name
    owner: Name | Literal[""] = ""
    """The submitting key's user; empty: nobody's."""
    user: Short = ""
    agent: Short = "default"
    session: Annotated[str, Meta(pattern=rf"^({ID.pattern})?\Z")] = ""
    parent: Short = ""
    trigger: Short = ""
    """The agent that delegated."""
    queue: Short = "default"
    priority: Annotated[int, Meta(ge=0, le=2)] = 0
    """0 normal, 1 before those of the last minute, 2 before those of the last ten minutes."""
    dialect: Short = ""
    source: Short = ""
    """Through what it came, in the submitter's own word: `api`, `sdk`, `webhook` …"""
    title: str = ""
    query: str = ""
    context: Json = {}
    mode: Short = ""
    llm_provider: Short = ""
    llm_model: Short = ""
    llm_effort: Short = ""
    """What the task is to be done with: as the request says, else as its agent's record did when it was accepted."""
    output_schema: Json = {}
    """JSON Schema, which a JSON result has to fit."""
    extra: Json = {}
    """What the dialect alone reads back."""
    trace: Short = ""
    """The W3C traceparent that the work belongs to."""
    max_attempts: Annotated[int, Meta(ge=0, le=100)] = 0
    """0: what the worker's function says, else 3."""
    deadline_seconds: Seconds = 0
    """From acceptance to the end of the task; 0: none."""
    ttl_seconds: Seconds = 0
    """From acceptance to the first start; 0: it may wait for ever."""
    delay_seconds: Seconds = 0
    """From acceptance to the first time that a worker may have it."""
    submission: str
    """Random per request: the same one twice is a repeat, never a second task."""
    body_hash: str = ""
    """Of the canonical request body; set when an idempotency key came with it."""


# Lifecycle


class Submitted(Event, frozen=True, kw_only=True, tag="submitted"):
    task: Submission


class Continued(Event, frozen=True, kw_only=True, tag="continued"):
    """A new turn of an ended task: the same id, a new question."""

    query: str = ""
    title: str = ""
    context: Json = {}
    queue: Short = ""
    """Empty: the same as before."""
    llm_provider: Short = ""
    llm_model: Short = ""
    llm_effort: Short = ""
    output_schema: Json = {}
    extra: Json = {}
    submission: str
    deadline_seconds: Seconds = 0


class Retried(Event, frozen=True, kw_only=True, tag="retried"):
    """Somebody wants an ended task to be tried once more: the same turn, all its attempts anew."""

    deadline_seconds: Seconds = 0


class Started(Event, frozen=True, kw_only=True, tag="started"):
    worker: Short
    max_attempts: Annotated[int, Meta(ge=0, le=100)] = 0
    """Of the worker's function; counts when the task itself named none."""
    lease_seconds: Seconds = 0
    """What this claim asked for, and its renewals keep; 0: as the store's settings say."""


class PauseAsked(Event, frozen=True, kw_only=True, tag="pause_asked"):
    reason: str = ""


class Paused(Event, frozen=True, kw_only=True, tag="paused"):
    """The handler reached a checkpoint and waits there."""

    checkpoint: str = ""
    """Its name."""
    state: Json = {}
    """What a later attempt goes on from, when this one does not live to see the pause's end."""


class Resumed(Event, frozen=True, kw_only=True, tag="resumed"):
    reason: str = ""


class Requeued(Event, frozen=True, kw_only=True, tag="requeued"):
    """The worker gave the task back: to retry after an error, or because it stops."""

    error: str = ""
    """What the attempt ended with; empty when nothing went wrong."""
    delay_seconds: Seconds = 0
    """Until the next attempt may begin."""
    refund: bool = False
    """The attempt does not count against `max_attempts` (a worker that stops in good order)."""


class LeaseLost(Event, frozen=True, kw_only=True, tag="lease_lost"):
    """The worker fell silent."""

    refund: bool = False
    """The attempt does not count: it only waited, for somebody's decision or for the end of a pause."""


class Completed(Event, frozen=True, kw_only=True, tag="completed"):
    result: str = ""
    result_type: str = "text"
    """`text`, or `json` when `result` is a JSON document."""
    usage: Usage | None = None


class Failed(Event, frozen=True, kw_only=True, tag="failed"):
    error: str
    usage: Usage | None = None


class Errored(Event, frozen=True, kw_only=True, tag="errored"):
    error: str


class Cancelled(Event, frozen=True, kw_only=True, tag="cancelled"):
    reason: str = ""


class TimedOut(Event, frozen=True, kw_only=True, tag="timed_out"):
    error: str = "The task exceeded its deadline."


class ApprovalRequested(Event, frozen=True, kw_only=True, tag="approval_requested"):
    """The handler waits for a human's yes or no."""

    approval: Approval
    """Names the request: the same in every attempt that asks the same."""
    reason: Reason
    payload: Json = {}


class ApprovalDecided(Event, frozen=True, kw_only=True, tag="approval_decided"):
    approval: Approval
    approved: bool
    feedback: str = ""
    payload: Json = {}


class ReviewRequested(Event, frozen=True, kw_only=True, tag="review_requested"):
    """The handler waits for a human's opinion of its plan."""

    plan: str
    version: Annotated[int, Meta(ge=1, le=1_000_000)]
    """Counts all plans of the task: one more than its last one's, or it is refused."""
    round: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    """Counts the plans of this turn, and since somebody's retry: as `version`."""


class Reviewed(Event, frozen=True, kw_only=True, tag="reviewed"):
    """An opinion of the plan of that version: approved as it is, or what should be different."""

    version: Annotated[int, Meta(ge=1)]
    approved: bool
    feedback: str = ""


class Restated(Event, frozen=True, kw_only=True, tag="restated"):
    """An owner set the state without an attempt. `None`: unchanged; an empty text clears it."""

    to: str = ""
    result: str | None = None
    """With `failed` and `errored` it is the error."""
    result_type: str = ""
    """As of Completed."""
    title: str | None = None
    internal_status: Annotated[str, Meta(max_length=255)] | None = None
    stated: Json | None = None
    """What the dialect alone reads back of this turn, whole."""
    version: Annotated[int, Meta(ge=0, le=2**53 - 1)] = 0
    """Of `stated`: one more than that of the one it replaces, or it is refused."""
    usage: Usage | None = None
    """Counts when this ends the task, or comes with `stated`, whose version keeps it from counting twice."""


class Deleted(Event, frozen=True, kw_only=True, tag="deleted"):
    children: bool = False
    """Its sub-tasks go with it."""


# Activity


class Progressed(Event, frozen=True, kw_only=True, tag="progressed"):
    fraction: Annotated[float, Meta(ge=0, le=1)]
    payload: Json = {}


class TextDelta(Event, frozen=True, kw_only=True, tag="text_delta"):
    text: str


class TextCompleted(Event, frozen=True, kw_only=True, tag="text_completed"):
    text: str
    usage: Usage | None = None
    duration_ms: Count = 0


class ToolCalled(Event, frozen=True, kw_only=True, tag="tool_called"):
    tool: str
    call: str = ""
    params: Json = {}
    payload: Json = {}


class ToolReturned(Event, frozen=True, kw_only=True, tag="tool_returned"):
    tool: str
    call: str = ""
    success: bool = True
    output: Any = None
    duration_ms: Count = 0
    payload: Json = {}


class AgentStarted(Event, frozen=True, kw_only=True, tag="agent_started"):
    payload: Json = {}


class AgentCompleted(Event, frozen=True, kw_only=True, tag="agent_completed"):
    payload: Json = {}


class Thinking(Event, frozen=True, kw_only=True, tag="thinking"):
    payload: Json = {}


class ChildSubmitted(Event, frozen=True, kw_only=True, tag="child_submitted"):
    """The task made a sub-task. The follow-up of this event creates it, in whichever partition it lives."""

    task: Submission


class PlanUpdated(Event, frozen=True, kw_only=True, tag="plan_updated"):
    payload: Json = {}


class Noted(Event, frozen=True, kw_only=True, tag="noted"):
    """Any other type that a worker names."""

    name: str
    """Fits NOTED. Only `encode` looks: to match it took longer than to read all the rest of an event (measured)."""
    payload: Json = {}


Lifecycle = (
    Submitted
    | Continued
    | Retried
    | Started
    | PauseAsked
    | Paused
    | Resumed
    | ApprovalRequested
    | ApprovalDecided
    | ReviewRequested
    | Reviewed
    | Requeued
    | LeaseLost
    | Completed
    | Failed
    | Errored
    | Cancelled
    | TimedOut
    | Restated
    | Deleted
)
Activity = (
    Progressed
    | TextDelta
    | TextCompleted
    | ToolCalled
    | ToolReturned
    | AgentStarted
    | AgentCompleted
    | Thinking
    | ChildSubmitted
    | PlanUpdated
    | Noted
)
AnyEvent = Lifecycle | Activity

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


def tag(event: Event | type[Event]) -> str:
    name = (event if isinstance(event, type) else type(event)).__struct_config__.tag
    assert isinstance(name, str), "every event type names its tag"
    return name


def encode(event: AnyEvent) -> bytes:
    """Checked in full, whoever made the event. Raises Invalid, or TooLarge beyond `EVENT_BYTES_MAX`."""
    try:
        raw = _encoder.encode(event)
    except (TypeError, ValueError, RecursionError) as error:
        raise Invalid(f"The event cannot be written as JSON: {error}") from error
    if len(raw) > EVENT_BYTES_MAX:
        raise TooLarge(f"The event has {len(raw)} bytes; at most {EVENT_BYTES_MAX} are allowed.")
    if isinstance(event, Completed | Restated) and event.result:
        size = len(event.result.encode())
        if size > RESULT_BYTES_MAX:
            raise TooLarge(f"The result has {size} bytes; at most {RESULT_BYTES_MAX} are allowed.")
    if isinstance(event, Submitted | ChildSubmitted):
        _check_times(event.task)
    if raw.count(b"[") + raw.count(b"{") > DEPTH_MAX and depth(raw) > DEPTH_MAX:
        raise Invalid(f"The event is nested deeper than {DEPTH_MAX} levels.")
    checked = decode(raw)  # msgspec checks bounds and patterns only when it decodes
    if isinstance(checked, Noted) and not NOTED.fullmatch(checked.name):
        raise Invalid(
            "Not an event: a name has at most 64 of A-Z, 0-9 and _, begins with a letter, and is not STREAM_END."
        )
    return raw


def _check_times(task: Submission) -> None:
    for limit, name in ((task.ttl_seconds, "time to live"), (task.deadline_seconds, "deadline")):
        if 0 < limit <= task.delay_seconds:
            raise Invalid(f"The task could never start: its {name} ({limit:g} s) ends before its delay does.")


def depth(raw: bytes) -> int:
    """Of JSON: brackets inside strings do not count."""
    level = deepest = 0
    for bracket in re.sub(rb'"(?:[^"\\]|\\.)*"', b"", raw):
        if bracket in b"[{":
            level += 1
            deepest = max(deepest, level)
        elif bracket in b"]}":
            level -= 1
    return deepest


def decode(raw: bytes) -> AnyEvent:
    try:
        return _decoder.decode(raw)
    except msgspec.DecodeError as error:
        raise Invalid(f"Not an event: {error}") from error


class Entry(Struct, frozen=True, kw_only=True, gc=False):
    """An event at its place in the log."""

    id: str
    """`ms-n`: the Redis stream id, the same in the partition log and in the task's own stream."""
    task: str
    seq: int
    """1, 2, 3 … per task, without a hole."""
    at: int
    """µs since 1970, by the store's clock, never smaller than the id's milliseconds."""
    fence: int
    attempt: int
    n: int
    """The worker's producer number; 0 when no worker said it."""
    event: AnyEvent
    size: int
    """Bytes of the encoded event."""
    after: dict[str, str] | None = None
    """The snapshot's fields after it; None unless its reader folds."""
