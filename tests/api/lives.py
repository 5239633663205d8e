"""Lives of a task, made without a store: the state in each status, and a sample of every event."""

from collections.abc import Mapping

from msgspec.structs import replace

from app import events
from app.events import AnyEvent, Entry, Submission, Usage
from app.task import EMPTY, Snapshot, Status, apply

AT = 1_761_129_000_000_000  # 2025-10-22T10:30:00Z, as in the seed's examples
USAGE = Usage(
    model="gpt-5-mini-2025-08-07", provider="openai", input_tokens=200, output_tokens=100, cost_nano=6_000_000
)
QUESTION = Submission(
    id="task_01HQZX3Y9K8M2P4N5S7T9W2V",
    org="org",
    owner="user",
    session="user-123-session",
    query="What is the capital of France?",
    mode="simple",
    submission="r",
)

INVOCATION = replace(
    QUESTION,
    id="8f14e45f-ceea-467f-a9b1-0d3f5c6e7a10",
    user="user-7",
    agent="writer",
    session="8f14e45f-ceea-467f-a9b1-0d3f5c6e7a10",
    trigger="planner",
    queue="agent:writer",
    dialect="xpander",
    source="api",
    title="Capitals",
    mode="",
    context={"tone": "short"},
    llm_provider="openai",
    llm_model="gpt-5",
    llm_effort="high",
    output_schema={"type": "object"},
    extra={
        "agent_version": "3",
        "output_format": "json",
        "output_schema": {"type": "object"},
        "think_mode": "harder",
        "events_streaming": True,
        "input": {"files": ["https://example.com/a.pdf"], "user": {"id": "user-7", "email": "ada@example.com"}},
    },
)
"""The same question, as xpander's API takes it."""


def entry(event: AnyEvent, seq: int = 7, attempt: int = 1) -> Entry:
    at = AT + (seq - 1) * 1_000_001
    return Entry(
        id=f"{at // 1000}-0",
        task=QUESTION.id,
        seq=seq,
        at=at,
        fence=attempt,
        attempt=attempt,
        n=0,
        event=event,
        size=100,
    )


def folded(*said: AnyEvent, question: Submission = QUESTION) -> Snapshot:
    snapshot = EMPTY
    for seq, event in enumerate((events.Submitted(task=question), *said), start=1):
        snapshot = apply(snapshot, entry(event, seq, attempt=1 if seq > 1 else 0))
    return snapshot


STARTED = events.Started(worker="w")
ASKING = events.PauseAsked(actor="user:user", reason="lunch")
LIVES: dict[Status, tuple[AnyEvent, ...]] = {
    Status.QUEUED: (),
    Status.RUNNING: (STARTED, events.Progressed(fraction=0.25)),
    Status.PAUSED: (STARTED, ASKING),
    Status.HELD: (ASKING,),
    Status.COMPLETED: (STARTED, events.Completed(result="Paris.", usage=USAGE)),
    Status.FAILED: (STARTED, events.Failed(error="LLM service unavailable: connection timeout")),
    Status.ERRORED: (STARTED, events.Errored(error="ValueError: no such city")),
    Status.CANCELLED: (STARTED, events.Cancelled(actor="user:user", reason="enough")),
    Status.TIMED_OUT: (STARTED, events.TimedOut()),
}


SAMPLES: tuple[AnyEvent, ...] = (
    events.Submitted(task=QUESTION),
    events.Continued(query="and Spain?", submission="r2"),
    STARTED,
    ASKING,
    events.Paused(checkpoint="pre_synthesis", state={"secret": 1}),
    events.Resumed(reason="back"),
    events.Requeued(delay_seconds=2.5),
    events.LeaseLost(),
    events.Completed(result="Paris.", usage=USAGE),
    events.Failed(error="no luck"),
    events.Errored(error="ValueError"),
    events.Cancelled(reason="enough"),
    events.TimedOut(),
    events.Restated(to="completed", result="r"),
    events.Deleted(),
    events.Progressed(fraction=0.5, message="half", payload={"plan": [1]}),
    events.TextDelta(text="Pa\u2028", agent="final_output"),
    events.TextCompleted(text="Paris.", agent="final_output", usage=USAGE, duration_ms=12),
    events.ToolCalled(tool="search", call="c1", params={"q": "x"}, agent="a"),
    events.ToolReturned(tool="search", call="c1", output="y" * 3000, duration_ms=5),
    events.AgentStarted(agent="a", payload={"role": "poet"}),
    events.AgentCompleted(agent="a"),
    events.Thinking(message="hm", agent="a"),
    events.Retried(),
    events.ApprovalRequested(approval="ap1", reason="Deploy?", payload={"risk": "high"}),
    events.ApprovalDecided(approval="ap1", approved=False),
    events.ReviewRequested(plan="1. Ask.", version=1),
    events.Reviewed(version=1, approved=False, feedback="Ask twice."),
    events.ChildSubmitted(task=QUESTION),
    events.PlanUpdated(payload={"round": 1}),
    events.Noted(name="BUDGET_THRESHOLD", payload={"level": "warn"}),
)

BEFORE: Mapping[type[AnyEvent], tuple[AnyEvent, ...]] = {
    events.Submitted: (),
    events.Started: (),
    events.Continued: (STARTED, events.Completed(result="Paris.", usage=USAGE)),
    events.Retried: (STARTED, events.Failed(error="no luck")),
    events.Paused: (STARTED, ASKING),
    events.Resumed: (STARTED, ASKING),
    events.ApprovalDecided: (STARTED, events.ApprovalRequested(approval="ap1", reason="Deploy?")),
    events.Reviewed: (STARTED, events.ReviewRequested(plan="1. Ask.", version=1)),
}
"""What comes before each sample; before all others the task was started."""


def happened(event: AnyEvent, *, question: Submission = QUESTION) -> Entry:
    """A sample at its place in such a life, with the state after it."""
    if isinstance(event, events.Submitted):
        event = events.Submitted(actor=event.actor, message=event.message, task=question)
        before, seq = EMPTY, 1
    else:
        passed = BEFORE.get(type(event), (STARTED,))
        before, seq = folded(*passed, question=question), len(passed) + 2
    found = replace(entry(event, seq), task=question.id)
    return replace(found, after=apply(before, found).fields)
