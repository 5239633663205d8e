"""Task, Status and the transition table: everything that can change a task's state is in this file.

`TABLE` says which event moves which status where; `changes` adds, for one event, what the move does to the
snapshot; the script gets those rows as arguments and holds no rule of its own; `apply` performs the same rows in
Python. A property test keeps the two equal: the snapshot in Redis is the fold of the task's stream.
No I/O here. The file is long so that no rule about states stands anywhere else.

Where it differs from the design: fields that take the script's own time or number are named apart (`stamp`, `later`,
`number`) instead of by placeholders such as `@at` among the values, which a user's text could imitate.

Snapshots are flat: field name → text, as in the Redis hash, so that equal means equal byte for byte.
Counters are whole numbers. An entry also sets, without any row: `last_seq`, `last_event_id`, `updated_at`,
`size` (bytes of all its events), `fence`, `attempt` and, when a worker said it, `n`.
"""

from collections.abc import Collection, Mapping
from enum import StrEnum
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import Struct

from app import events
from app.errors import Conflict
from app.events import AnyEvent, Entry, Event, Json, Usage


class Status(StrEnum):
    NEW = "new"
    """Before `submitted`: no such task."""
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    """An attempt lives; its handler stops at its next checkpoint."""
    HELD = "held"
    """Paused, and no attempt lives."""
    COMPLETED = "completed"
    FAILED = "failed"
    """The handler said so."""
    ERRORED = "errored"
    """The handler raised, or its attempts are used up."""
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    GONE = "gone"
    """After `deleted`."""


NEW, QUEUED, RUNNING, PAUSED, HELD = Status.NEW, Status.QUEUED, Status.RUNNING, Status.PAUSED, Status.HELD
COMPLETED, FAILED, ERRORED, CANCELLED = Status.COMPLETED, Status.FAILED, Status.ERRORED, Status.CANCELLED
TIMED_OUT, GONE = Status.TIMED_OUT, Status.GONE

STORED = tuple(status for status in Status if status not in {NEW, GONE})
"""The statuses that a snapshot can show."""
TERMINAL = frozenset({COMPLETED, FAILED, ERRORED, CANCELLED, TIMED_OUT})
LEASED = frozenset({RUNNING, PAUSED})
"""Statuses in which a worker holds the task."""
OPEN = (QUEUED, RUNNING, PAUSED, HELD)

_STAY_LEASED = {RUNNING: RUNNING, PAUSED: PAUSED}
_STAY_OPEN = {status: status for status in OPEN}

TABLE: dict[type[Event], dict[Status, Status]] = {
    events.Submitted: {NEW: QUEUED},
    events.Continued: dict.fromkeys(sorted(TERMINAL), QUEUED),
    events.Retried: dict.fromkeys(sorted(TERMINAL - {COMPLETED}), QUEUED),
    events.Started: {QUEUED: RUNNING},
    events.PauseAsked: {QUEUED: HELD, RUNNING: PAUSED},
    events.Paused: {PAUSED: PAUSED},
    events.Resumed: {PAUSED: RUNNING, HELD: QUEUED},
    events.ApprovalRequested: {RUNNING: PAUSED},
    events.ApprovalDecided: {PAUSED: RUNNING, HELD: QUEUED},
    events.ReviewRequested: {RUNNING: PAUSED},
    events.Reviewed: {PAUSED: RUNNING, HELD: QUEUED},
    events.Requeued: {RUNNING: QUEUED, PAUSED: HELD},
    events.LeaseLost: {RUNNING: QUEUED, PAUSED: HELD},
    events.Completed: {QUEUED: COMPLETED, RUNNING: COMPLETED, PAUSED: COMPLETED},
    events.Failed: {QUEUED: FAILED, RUNNING: FAILED, PAUSED: FAILED},
    events.Errored: {QUEUED: ERRORED, RUNNING: ERRORED, PAUSED: ERRORED},
    events.Cancelled: dict.fromkeys(OPEN, CANCELLED),
    events.TimedOut: dict.fromkeys(OPEN, TIMED_OUT),
    events.Deleted: dict.fromkeys(STORED, GONE),
    # A note may warn of a stale worker after its task went back to the queue, and a sub-task be made by somebody who
    # is no worker. All other activity is the running attempt's.
    events.ChildSubmitted: _STAY_OPEN,
    events.Noted: _STAY_OPEN,
    events.Progressed: _STAY_LEASED,
    events.TextDelta: _STAY_LEASED,
    events.TextCompleted: _STAY_LEASED,
    events.ToolCalled: _STAY_LEASED,
    events.ToolReturned: _STAY_LEASED,
    events.AgentStarted: _STAY_LEASED,
    events.AgentCompleted: _STAY_LEASED,
    events.Thinking: _STAY_LEASED,
    events.PlanUpdated: _STAY_LEASED,
}
"""Event → status before → status after. What is not here is a Conflict. `restated` stands in `RESTATED`."""

RESTATED: dict[Status, frozenset[Status]] = {
    **{status: frozenset({*OPEN, *TERMINAL}) for status in OPEN},
    # xpander's workers PATCH a finished status after a stop (contract §3.5): an ended task ignores it,
    # but an explicit pause re-opens it, as upstream's own test expects.
    **{status: frozenset({HELD}) for status in TERMINAL},
}
"""Status before → the statuses that an owner may state."""


class Change(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one event does to a task in one status: a row of arguments for the script."""

    status: str = ""
    """The status after; empty: the same."""
    guard: dict[str, str] = {}
    """What fields must hold, or the event is refused; empty: they must be absent."""
    set: dict[str, str] = {}
    fill: dict[str, str] = {}
    """Set where absent."""
    add: dict[str, int] = {}
    spend: dict[str, int] = {}
    """Added to the task's and to its session's totals."""
    clear: tuple[str, ...] = ()
    stamp: tuple[str, ...] = ()
    """Fields that take the entry's own time, in µs."""
    later: dict[str, int] = {}
    """Fields that take the entry's own time plus so many µs."""
    number: tuple[str, ...] = ()
    """Fields that take the entry's own seq."""
    text: str = ""
    """`append` this event's text; `drop` its agent's text; `clear` everybody's."""
    thread: str = ""
    """`add` the event to the conversation; `bounded`: unless that has THREAD_BYTES already."""
    ready: str = ""
    """`add` to, or `remove` from, the queue."""
    lease: str = ""
    """`remove`: no worker holds it any more."""
    due: str = ""
    """`set` to the earliest of the task's deadlines, or `remove`."""
    ended: str = ""
    """`add` to, or `remove` from, the tasks that have ended."""
    follow: str = ""
    """A field: if the task has it, the event has a follow-up in other partitions (`queues.Queues.follow_up`)."""


FOLLOWED = (events.ChildSubmitted, events.Cancelled, events.TimedOut, events.Restated, events.Deleted)
"""The events whose changes may name a `follow`."""
ENDED = ("deadline_at", "expires_at", "error", "result", "result_type", "finished_at", "cancel_reason", "cancelled_by")
PAUSE = ("paused_at", "pause_reason", "paused_by", "waits", "request")
"""What a pause leaves in the snapshot until it ends, whether somebody asked for it or the handler waits for a human."""


ATTEMPT = ("progress", "ready_at")
"""What one attempt leaves that the next one must not find."""
ATTEMPTS = (*ATTEMPT, "refunds", "plan", "review", "review_round")
"""What all attempts of a turn leave that the next turn, or an explicit retry, must not find."""
TURN = (
    *("title", "query", "context", "extra", "llm_provider", "llm_model", "llm_effort", "output_schema"),
    *("started_at", "checkpoint", "internal_status", "stated", "stated_version"),
)
"""What a turn was asked, and what it leaves, that the next one must not find."""
THREAD_BYTES_MAX = 8 * 1024 * 1024
THREAD_MESSAGES_MAX = 10_000
"""Of a conversation's events, over all turns; beyond it tool calls and new turns are refused, results are not."""
MAX_ATTEMPTS = 3
"""Of a task of which neither its submission nor its worker's function says how many."""


def targets(event: AnyEvent) -> dict[Status, Status]:
    """Status before → status after, for each status in which the event is legal."""
    if isinstance(event, events.Restated):
        if not event.to:
            return {status: status for status in STORED}
        to = Status(event.to)
        # Without an attempt nobody can be paused: resumed, it would run for ever with nobody running it.
        return {
            status: HELD if to is PAUSED and status not in LEASED else to
            for status, allowed in RESTATED.items()
            if to in allowed or to is status or (to is PAUSED and status in TERMINAL)
        }
    return TABLE[type(event)]


def changes(event: AnyEvent, only: Collection[str] = ()) -> dict[Status, Change]:
    """The event's row for each status in which it is legal; `only`: for these."""
    moves = _among(targets(event), only)
    return {before: _change(_effects(event, before), before, after) for before, after in moves.items()}


def _among(moves: Mapping[Status, Status], only: Collection[str]) -> dict[Status, Status]:
    return {before: after for before, after in moves.items() if not only or before in only}


def _change(row: Change, before: Status, after: Status) -> Change:
    """An event's effects, with those of the move."""
    if after is before:
        return row
    stamp, clear = list(row.stamp), list(row.clear)
    # From `running` too, where there is nothing to clear: so a worker's events have one row, not two.
    if before in {RUNNING, PAUSED, HELD} and after not in {PAUSED, HELD}:
        clear += PAUSE
    if after in TERMINAL:
        stamp.append("finished_at")
    elif before in TERMINAL:
        clear += ENDED
    if after is QUEUED:
        stamp.append("queued_at")
    if before in LEASED and after not in LEASED:
        clear += ["worker", "lease_ms"]
    begins = before in {QUEUED, HELD} and after in LEASED
    if begins:
        clear.append("expires_at")
    return msgspec.structs.replace(
        row,
        status=after.value,
        stamp=tuple(stamp),
        clear=tuple(name for name in clear if name not in row.set and name not in row.later),
        ready="add" if after is QUEUED else "remove" if before is QUEUED else "",
        lease="remove" if before in LEASED and after not in LEASED else "",
        due="remove" if after in TERMINAL or after is GONE else "set" if begins else row.due,
        ended="add" if after in TERMINAL else "remove" if before in TERMINAL else "",
    )


def _effects(event: AnyEvent, before: Status) -> Change:
    """What the event sets besides the status."""
    match event:
        case events.Submitted(task=task):
            # The stamps come first in life: `deadline_at` and `ready_at` count from acceptance.
            return Change(
                set=_submitted_fields(task),
                stamp=("created_at",),
                later=_times(deadline=task.deadline_seconds, delay=task.delay_seconds, ttl=task.ttl_seconds),
                thread="add",
                due="set" if task.deadline_seconds or task.ttl_seconds else "",
            )
        case events.Continued():
            fields = {"query": event.query, "title": event.title, "submission": event.submission, "attempt": "0"}
            fields |= {"queue": event.queue, **_particulars(event)}
            return Change(
                set=_present(fields),
                add={"turn": 1},
                clear=tuple(name for name in (*TURN, *ATTEMPTS) if not fields.get(name)),
                later=_times(deadline=event.deadline_seconds),
                number=("turn_seq",),
                text="clear",
                thread="bounded",
                due="set" if event.deadline_seconds else "",
            )
        case events.Retried():
            return Change(
                set={"attempt": "0"},
                clear=ATTEMPTS,
                later=_times(deadline=event.deadline_seconds),
                text="clear",
                due="set" if event.deadline_seconds else "",
            )
        case events.Started():
            lease = {"lease_ms": str(round(event.lease_seconds * 1000))} if event.lease_seconds else {}
            return Change(
                set={"worker": event.worker, "n": "0", **lease},
                fill={"max_attempts": str(event.max_attempts)} if event.max_attempts else {},
                add={"fence": 1, "attempt": 1},
                stamp=("started_at",),
            )
        case events.PauseAsked():
            fields = {"pause_reason": event.reason, "paused_by": event.actor}
            return Change(set=_present(fields), stamp=("paused_at",))
        case events.Paused():
            return Change(set={"checkpoint": text(event.state)} if event.state else {})
        case events.Resumed():
            return Change(guard={"waits": ""})
        case events.ApprovalRequested():
            request = text({"reason": event.reason, "payload": event.payload})
            fields = {"waits": f"approval:{event.approval}", "request": request}
            fields |= {"pause_reason": event.reason, "paused_by": event.actor}
            return Change(set=_present(fields), stamp=("paused_at",))
        case events.ApprovalDecided():
            return Change(guard={"waits": f"approval:{event.approval}"})
        case events.ReviewRequested():
            fields = {"waits": f"review:{event.version}", "plan": event.plan, "review": "reviewing"}
            fields |= {"review_round": str(event.round), "review_version": str(event.version), "paused_by": event.actor}
            guard = {"review_round": str(event.round - 1 or ""), "review_version": str(event.version - 1 or "")}
            return Change(guard=guard, set=_present(fields), stamp=("paused_at",))
        case events.Reviewed():
            guard = {"waits": f"review:{event.version}"}
            return Change(guard=guard, set={"review": "approved"} if event.approved else {})
        case events.Requeued():
            return Change(
                add={"refunds": 1} if event.refund else {},
                clear=ATTEMPT,
                later=_times(delay=event.delay_seconds),
                text="clear",
            )
        case events.LeaseLost():
            return Change(add={"refunds": 1} if event.refund else {}, clear=ATTEMPT, text="clear")
        case events.ChildSubmitted():
            return Change(add={"children": 1}, follow="id")
        case events.Completed():
            fields = {"result": event.result, "result_type": event.result_type, "progress": "1"}
            return Change(set={**fields, **_model(event.usage)}, spend=_usage(event.usage), thread="add")
        case events.Failed():
            return Change(set={"error": event.error, **_model(event.usage)}, spend=_usage(event.usage))
        case events.Errored():
            return Change(set={"error": event.error})
        case events.TimedOut():
            return Change(set={"error": event.error}, follow="children")
        case events.Cancelled():
            fields = {"cancel_reason": event.reason, "cancelled_by": event.actor}
            return Change(set=_present(fields), follow="children")
        case events.Restated():
            outcome = "error" if event.to in {FAILED, ERRORED} else "result"
            stated = {outcome: event.result, "internal_status": event.internal_status, "title": event.title}
            fields = {name: value for name, value in stated.items() if value}
            gone = [name for name, value in stated.items() if value == ""]
            if event.result and outcome == "result":
                fields["result_type"] = event.result_type or "text"
            paused = ("paused_at",) if event.to in {PAUSED, HELD} and before not in {PAUSED, HELD} else ()
            started = ("started_at",) if event.to == RUNNING and before is not RUNNING else ()
            ends = event.to in TERMINAL and before not in TERMINAL
            counts = ends or event.stated is not None
            if event.stated is not None:
                fields |= {"stated": text(event.stated), "stated_version": str(event.version)}
            return Change(
                guard={"stated_version": str(event.version - 1 or "")} if event.stated is not None else {},
                set=_present(fields | (_model(event.usage) if counts else {})),
                spend=_usage(event.usage) if counts else {},
                clear=tuple(gone),
                stamp=paused + started,
                # Re-opened, it may end once more: so that too is counted.
                thread="add" if ends and event.result else "bounded" if before in TERMINAL and event.to else "",
                follow="children" if ends and event.to in {CANCELLED, TIMED_OUT} else "",
            )
        case events.Deleted():
            return Change(follow="id" if event.children else "")
        case events.ToolCalled() | events.ToolReturned():
            return Change(thread="bounded")
        case events.Progressed():
            return Change(set={"progress": f"{event.fraction:.6g}"})
        case events.TextDelta():
            return Change(text="append")
        case events.TextCompleted():
            return Change(set=_model(event.usage), spend=_usage(event.usage), text="drop")
        case _:
            return Change()


def _present(fields: Mapping[str, str]) -> dict[str, str]:
    """In a snapshot an empty field is an absent one."""
    return {name: value for name, value in fields.items() if value}


def _submitted_fields(task: events.Submission) -> dict[str, str]:
    fields = {
        "id": task.id,
        "org": task.org,
        "owner": task.owner,
        "user": task.user,
        "agent": task.agent,
        "session": task.session,
        "parent": task.parent,
        "trigger": task.trigger,
        "queue": task.queue,
        "priority": str(task.priority),
        "dialect": task.dialect,
        "source": task.source,
        "title": task.title,
        "query": task.query,
        "mode": task.mode,
        "trace": task.trace,
        "turn": "1",
        "max_attempts": str(task.max_attempts or ""),
        "submission": task.submission,
        "body_hash": task.body_hash,
    }
    return _present(fields | _particulars(task))


def _particulars(asked: events.Submission | events.Continued) -> dict[str, str]:
    """What is the same in a task's first turn and in a later one."""
    documents = {"context": asked.context, "extra": asked.extra, "output_schema": asked.output_schema}
    return {
        "llm_provider": asked.llm_provider,
        "llm_model": asked.llm_model,
        "llm_effort": asked.llm_effort,
        **{name: text(value) if value else "" for name, value in documents.items()},
    }


def _times(*, deadline: float = 0, delay: float = 0, ttl: float = 0) -> dict[str, int]:
    seconds = {"deadline_at": deadline, "ready_at": delay, "expires_at": ttl}
    return {name: round(value * 1_000_000) for name, value in seconds.items() if value}


def _model(usage: Usage | None) -> dict[str, str]:
    fields = {"model": usage.model, "provider": usage.provider} if usage else {}
    return _present(fields)


def _usage(usage: Usage | None) -> dict[str, int]:
    if usage is None:
        return {}
    counts = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cost_nano": usage.cost_nano,
    }
    return {name: count for name, count in counts.items() if count}


def text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


_shape = msgspec.json.Decoder(Change).decode


class Row(Struct, frozen=True, array_like=True):
    statuses: tuple[str, ...]
    change: Change


def rows(event: AnyEvent, only: Collection[str] = ()) -> bytes:
    """`changes`, as a script takes them: JSON, statuses that share a change together. `only`: of these statuses."""
    return _rows(changes(event, only))


def parts(event: AnyEvent, only: Collection[str] = ()) -> tuple[bytes, list[str]]:
    """`rows` in two parts: without what the event sets, and the fields that it sets in each status, name and value in
    turn. The first is often the same and therefore at hand, but not of events with usage, times or a guard.
    """
    if type(event) in CONSTANT:
        return _constant_rows(type(event), (*only,)), []
    if isinstance(event, events.Restated):  # sets other fields in other statuses
        return rows(event, only), []
    effects = _effects(event, QUEUED)
    values = effects.set
    bare = msgspec.structs.replace(effects, set={}) if values else effects
    shape = msgspec.json.encode(bare)
    return _shaped_rows(type(event), (*only,), shape, (*values,)), [word for pair in values.items() for word in pair]


# Events whose rows do not depend on what they say. They are the frequent ones.
CONSTANT: frozenset[type[Event]] = frozenset(
    {
        events.TextDelta,
        events.Noted,
        events.ToolCalled,
        events.ToolReturned,
        events.Thinking,
        events.AgentStarted,
        events.AgentCompleted,
        events.PlanUpdated,
    }
)


@lru_cache
def _constant_rows(kind: type[AnyEvent], only: tuple[str, ...]) -> bytes:
    effects = Change(
        text="append" if kind is events.TextDelta else "",
        thread="bounded" if kind in {events.ToolCalled, events.ToolReturned} else "",
    )
    return _rows(dict.fromkeys(_among(TABLE[kind], only), effects))


@lru_cache(maxsize=1000)
def _shaped_rows(kind: type[AnyEvent], only: tuple[str, ...], shape: bytes, names: tuple[str, ...]) -> bytes:
    effects = msgspec.structs.replace(_shape(shape), set=dict.fromkeys(names, ""))
    moves = _among(TABLE[kind], only)
    return _rows(
        {before: msgspec.structs.replace(_change(effects, before, after), set={}) for before, after in moves.items()}
    )


def _rows(moves: Mapping[Status, Change]) -> bytes:
    grouped: list[tuple[list[str], Change]] = []
    for before, change in moves.items():
        for statuses, seen in grouped:
            if seen == change:
                statuses.append(before.value)
                break
        else:
            grouped.append(([before.value], change))
    return msgspec.json.encode([Row(tuple(statuses), change) for statuses, change in grouped])


class Snapshot(Struct, frozen=True, kw_only=True):
    """A task's state after its entry number `last_seq`."""

    fields: dict[str, str]
    text: bytes = b""
    """Text so far, framed per agent: 0xFF agent 0xFE text (bytes that UTF-8 cannot contain)."""

    @property
    def status(self) -> Status:
        return Status(self.fields.get("status", NEW.value))

    @property
    def size(self) -> int:
        """In characters and bytes, roughly: what it takes to hold."""
        return len(self.text) + sum(len(value) for value in self.fields.values())

    @property
    def texts(self) -> dict[str, str]:
        """Agent → what it has written so far."""
        texts: dict[str, str] = {}
        for frame in self.text.split(b"\xff")[1:]:
            agent, _, written = frame.partition(b"\xfe")
            texts[agent.decode()] = texts.get(agent.decode(), "") + written.decode()
        return texts


EMPTY = Snapshot(fields={})


def apply(snapshot: Snapshot, entry: Entry) -> Snapshot:
    """The state after one more entry; of an ended (`deleted`) task: `EMPTY`. Raises Conflict on an illegal move."""
    change = changes(entry.event).get(snapshot.status)
    if change is None:
        sentence = f"A task that is {snapshot.status} cannot be {events.tag(entry.event)}."
        raise Conflict(sentence, snapshot.status)
    if any(snapshot.fields.get(name, "") != value for name, value in change.guard.items()):
        raise Conflict(f"The task has moved on: it cannot be {events.tag(entry.event)}.", snapshot.status)
    if change.status == GONE:
        return EMPTY
    fields = dict(snapshot.fields)
    for name in change.clear:
        fields.pop(name, None)
    fields.update(change.set)
    for name, value in change.fill.items():
        fields.setdefault(name, value)
    for name, count in (*change.add.items(), *change.spend.items()):
        fields[name] = str(int(fields.get(name, "0")) + count)
    for name in change.stamp:
        fields[name] = str(entry.at)
    for name, micros in change.later.items():
        fields[name] = str(entry.at + micros)
    for name in change.number:
        fields[name] = str(entry.seq)
    if change.thread:
        fields["thread_size"] = str(int(fields.get("thread_size", "0")) + entry.size)
    if change.status:
        fields["status"] = change.status
    if entry.n:
        fields["n"] = str(entry.n)
    fields |= {
        "last_seq": str(entry.seq),
        "last_event_id": entry.id,
        "updated_at": str(entry.at),
        "size": str(int(fields.get("size", "0")) + entry.size),
        "fence": str(entry.fence),
        "attempt": str(entry.attempt),
    }
    written = _text(snapshot.text, change.text, entry.event)
    # Whose text stands last: the script appends to that frame without reading the text.
    if written:
        fields["text_agent"] = written.rpartition(b"\xff")[2].partition(b"\xfe")[0].decode()
    else:
        fields.pop("text_agent", None)
    return Snapshot(fields=fields, text=written)


def _text(before: bytes, how: str, event: AnyEvent) -> bytes:
    agent = event.agent.encode()
    if how == "append" and isinstance(event, events.TextDelta):
        last = before.rpartition(b"\xff")[2].partition(b"\xfe")[0] if before else None
        frame = b"" if last == agent else b"\xff" + agent + b"\xfe"
        return before + frame + event.text.encode()
    if how == "drop":
        frames = before.split(b"\xff")[1:]
        return b"".join(b"\xff" + frame for frame in frames if frame.partition(b"\xfe")[0] != agent)
    return b"" if how == "clear" else before


class Task(Struct, frozen=True, kw_only=True):
    """A snapshot, typed: what is true now. Times are µs since 1970, 0 when it never happened."""

    id: str
    org: str
    status: Status
    queue: str
    submission: str
    last_seq: int
    last_event_id: str
    created_at: int
    updated_at: int
    owner: str = ""
    user: str = ""
    agent: str = "default"
    session: str = ""
    parent: str = ""
    trigger: str = ""
    dialect: str = ""
    source: str = ""
    title: str = ""
    query: str = ""
    context: Json = {}
    extra: Json = {}
    mode: str = ""
    llm_provider: str = ""
    llm_model: str = ""
    llm_effort: str = ""
    output_schema: Json = {}
    stated: Json = {}
    """What an owner stated of this turn for its own dialect."""
    stated_version: int = 0
    trace: str = ""
    body_hash: str = ""
    internal_status: str = ""
    worker: str = ""
    lease_ms: int = 0
    """What its worker asked for; 0: as the store's settings say."""
    priority: int = 0
    turn: int = 1
    turn_seq: int = 0
    """Of the entry with which the present turn began; 0: of the first one."""
    attempt: int = 0
    max_attempts: int = MAX_ATTEMPTS
    refunds: int = 0
    """Attempts that do not count: their workers stopped in good order, or they only waited."""
    children: int = 0
    fence: int = 0
    n: int = 0
    size: int = 0
    thread_size: int = 0
    queued_at: int = 0
    started_at: int = 0
    finished_at: int = 0
    paused_at: int = 0
    deadline_at: int = 0
    expires_at: int = 0
    """When it is too late for the first start."""
    ready_at: int = 0
    pause_reason: str = ""
    paused_by: str = ""
    cancel_reason: str = ""
    cancelled_by: str = ""
    checkpoint: Json = {}
    waits: str = ""
    """`approval:<id>` or `review:<version>`: what a human has to decide; empty: nothing."""
    request: Json = {}
    """Of that approval: reason, payload."""
    plan: str = ""
    """The last one that was put up for review in this turn."""
    review: str = ""
    """`reviewing` or `approved`; empty: there was none."""
    review_round: int = 0
    review_version: int = 0
    progress: float = 0.0
    result: str = ""
    result_type: str = ""
    error: str = ""
    model: str = ""
    provider: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cost_nano: int = 0

    @property
    def terminal(self) -> bool:
        return self.status in TERMINAL

    @property
    def attempts_left(self) -> int:
        """After the present one."""
        return self.max_attempts + self.refunds - self.attempt

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


_JSON_FIELDS = ("context", "extra", "checkpoint", "request", "output_schema", "stated")


def task(fields: Mapping[str, str]) -> Task:
    """The snapshot's fields, typed. Raises msgspec.ValidationError when they are not a task's."""
    typed: dict[str, Any] = dict(fields)
    for name in _JSON_FIELDS:
        if name in typed:
            typed[name] = msgspec.json.decode(typed[name])
    return msgspec.convert(typed, Task, strict=False)


def diagram() -> str:
    """The lifecycle as a Mermaid state diagram, from the table; the README shows it."""
    lines = ["stateDiagram-v2"]
    moves: dict[tuple[str, str], list[str]] = {}
    for kind, cells in TABLE.items():
        if kind is events.Deleted:
            continue
        for before, after in cells.items():
            if before is not after or kind is events.Paused:
                name = events.tag(kind).replace("_", " ")
                source = "[*]" if before is NEW else before.value
                moves.setdefault((source, after.value), []).append(name)
    lines += [f"    {before} --> {after}: {', '.join(names)}" for (before, after), names in moves.items()]
    lines += [f"    {status.value} --> [*]" for status in Status if status in TERMINAL]
    return "\n".join(lines) + "\n"
