"""The transition table: every cell, and what each event does to a snapshot."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import events
from app.errors import Conflict
from app.events import AnyEvent, Entry, Submission
from app.task import (
    CONSTANT,
    EMPTY,
    HELD,
    LEASED,
    NEW,
    PAUSED,
    QUEUED,
    RESTATED,
    RUNNING,
    STORED,
    TABLE,
    TERMINAL,
    Change,
    Row,
    Snapshot,
    Status,
    apply,
    changes,
    diagram,
    rows,
    targets,
    task,
)

SUBMISSION = Submission(id="t", org="o", owner="u", session="s", query="why?", submission="r")
CHILD = Submission(id="t2", org="o", owner="u", parent="t", query="and?", submission="r2")
SAMPLES: dict[str, AnyEvent] = {
    "submitted": events.Submitted(task=SUBMISSION),
    "continued": events.Continued(query="and now?", submission="r2"),
    "retried": events.Retried(),
    "started": events.Started(worker="w"),
    "pause_asked": events.PauseAsked(reason="lunch"),
    "paused": events.Paused(checkpoint="loop", state={"step": 1}),
    "resumed": events.Resumed(),
    "requeued": events.Requeued(delay_seconds=1),
    "lease_lost": events.LeaseLost(),
    "completed": events.Completed(result="42"),
    "failed": events.Failed(error="no"),
    "errored": events.Errored(error="ValueError: no"),
    "cancelled": events.Cancelled(reason="enough"),
    "timed_out": events.TimedOut(),
    "deleted": events.Deleted(),
    "progressed": events.Progressed(fraction=0.5),
    "text_delta": events.TextDelta(text="a"),
    "text_completed": events.TextCompleted(text="a"),
    "tool_called": events.ToolCalled(tool="search"),
    "tool_returned": events.ToolReturned(tool="search"),
    "agent_started": events.AgentStarted(),
    "agent_completed": events.AgentCompleted(),
    "thinking": events.Thinking(),
    "approval_requested": events.ApprovalRequested(approval="a", reason="May I?"),
    "approval_decided": events.ApprovalDecided(approval="a", approved=True),
    "review_requested": events.ReviewRequested(plan="1. Ask.", version=1),
    "reviewed": events.Reviewed(version=1, approved=True),
    "child_submitted": events.ChildSubmitted(task=CHILD),
    "plan_updated": events.PlanUpdated(),
    "noted": events.Noted(name="WAITING"),
}
LEGAL = """
                    new     queued    running   paused    held      completed failed    errored   cancelled timed_out
submitted           queued  .         .         .         .         .         .         .         .         .
continued           .       .         .         .         .         queued    queued    queued    queued    queued
retried             .       .         .         .         .         .         queued    queued    queued    queued
started             .       running   .         .         .         .         .         .         .         .
pause_asked         .       held      paused    .         .         .         .         .         .         .
paused              .       .         .         paused    .         .         .         .         .         .
resumed             .       .         .         running   queued    .         .         .         .         .
requeued            .       .         queued    held      .         .         .         .         .         .
lease_lost          .       .         queued    held      .         .         .         .         .         .
completed           .       completed completed completed .         .         .         .         .         .
failed              .       failed    failed    failed    .         .         .         .         .         .
errored             .       errored   errored   errored   .         .         .         .         .         .
cancelled           .       cancelled cancelled cancelled cancelled .         .         .         .         .
timed_out           .       timed_out timed_out timed_out timed_out .         .         .         .         .
deleted             .       gone      gone      gone      gone      gone      gone      gone      gone      gone
progressed          .       .         running   paused    .         .         .         .         .         .
text_delta          .       .         running   paused    .         .         .         .         .         .
text_completed      .       .         running   paused    .         .         .         .         .         .
tool_called         .       .         running   paused    .         .         .         .         .         .
tool_returned       .       .         running   paused    .         .         .         .         .         .
agent_started       .       .         running   paused    .         .         .         .         .         .
agent_completed     .       .         running   paused    .         .         .         .         .         .
thinking            .       .         running   paused    .         .         .         .         .         .
approval_requested  .       .         paused    .         .         .         .         .         .         .
approval_decided    .       .         .         running   queued    .         .         .         .         .
review_requested    .       .         paused    .         .         .         .         .         .         .
reviewed            .       .         .         running   queued    .         .         .         .         .
child_submitted     .       queued    running   paused    held      .         .         .         .         .
plan_updated        .       .         running   paused    .         .         .         .         .         .
noted               .       queued    running   paused    held      .         .         .         .         .
"""
HEAD, *BODY = [line.split() for line in LEGAL.strip().splitlines()]
CELLS = [(line[0], before, after) for line in BODY for before, after in zip(HEAD, line[1:], strict=True)]


def entry(event: AnyEvent, seq: int = 1, *, attempt: int = 0, fence: int = 0, n: int = 0) -> Entry:
    size = len(events.encode(event))
    return Entry(
        id=f"{seq}-0", task="t", seq=seq, at=seq * 1000, fence=fence, attempt=attempt, n=n, event=event, size=size
    )


def in_status(status: Status, **more: str) -> Snapshot:
    first = apply(EMPTY, entry(SAMPLES["submitted"]))
    return EMPTY if status is NEW else Snapshot(fields=first.fields | {"status": status.value} | more)


WAITS = {"approval_decided": {"waits": "approval:a"}, "reviewed": {"waits": "review:1"}}
"""What these decide."""


@pytest.mark.parametrize(("name", "before", "after"), CELLS)
def test_every_cell_moves_or_is_refused(name: str, before: str, after: str) -> None:
    snapshot = in_status(Status(before), **WAITS.get(name, {}))
    if after == ".":
        with pytest.raises(Conflict) as refused:
            apply(snapshot, entry(SAMPLES[name], 2))
        assert refused.value.status == before
    elif after == "gone":
        assert apply(snapshot, entry(SAMPLES[name], 2)) == EMPTY
    else:
        assert apply(snapshot, entry(SAMPLES[name], 2)).status == after


def test_the_cells_above_are_the_whole_table() -> None:
    kinds = {events.tag(kind) for kind in TABLE}
    assert {line[0] for line in BODY} == kinds
    assert set(SAMPLES) == kinds
    assert {"new", *STORED} == set(HEAD)
    for kind, cells in TABLE.items():
        assert {(b.value, a.value) for b, a in cells.items()} == {
            (before, after) for name, before, after in CELLS if name == events.tag(kind) and after != "."
        }


@pytest.mark.parametrize("before", STORED)
@pytest.mark.parametrize("to", STORED)
def test_every_status_that_an_owner_may_state(before: Status, to: Status) -> None:
    event = events.Restated(to=to.value)
    # An ended task can be re-opened as held, and stating what is so changes nothing; xpander's contract §3.5.
    # Nobody can be paused where no attempt lives: that is held.
    allowed = before not in TERMINAL or to in {HELD, PAUSED, before}
    if allowed:
        expected = HELD if to is PAUSED and before not in LEASED else to
        assert apply(in_status(before), entry(event, 2)).status is expected
    else:
        with pytest.raises(Conflict):
            apply(in_status(before), entry(event, 2))
    assert set(RESTATED) == set(STORED)


def test_a_restatement_without_status_sets_only_what_it_names() -> None:
    before = in_status(RUNNING)
    after = apply(before, entry(events.Restated(internal_status="step-2", result="half"), 2))
    assert (after.status, after.fields["internal_status"], after.fields["result"]) == (RUNNING, "step-2", "half")
    cleared = apply(after, entry(events.Restated(result=""), 3))
    assert "result" not in cleared.fields
    assert cleared.fields["internal_status"] == "step-2"


def test_terminal_statuses_accept_no_event_of_a_worker() -> None:
    for kind in TABLE:
        if kind not in {events.Continued, events.Retried, events.Deleted}:
            assert not TERMINAL & set(targets(SAMPLES[events.tag(kind)]))


def test_a_pause_says_who_when_and_why_and_a_resume_forgets_it() -> None:
    paused = apply(in_status(RUNNING), entry(events.PauseAsked(reason="lunch", actor="user:u"), 2))
    assert {k: paused.fields[k] for k in ("paused_at", "pause_reason", "paused_by")} == {
        "paused_at": "2000",
        "pause_reason": "lunch",
        "paused_by": "user:u",
    }
    saved = apply(paused, entry(events.Paused(checkpoint="loop", state={"step": 3}), 3))
    resumed = apply(saved, entry(events.Resumed(), 4))
    assert not {"paused_at", "pause_reason", "paused_by"} & resumed.fields.keys()
    assert task(resumed.fields).checkpoint == {"step": 3}


def test_text_so_far_is_kept_per_agent_until_it_completes() -> None:
    snapshot = in_status(RUNNING)
    for seq, (agent, text) in enumerate([("a", "Hel"), ("b", "x"), ("a", "lo \u2028"), ("", "?")], 2):
        snapshot = apply(snapshot, entry(events.TextDelta(agent=agent, text=text), seq))
    assert snapshot.texts == {"a": "Hello \u2028", "b": "x", "": "?"}
    dropped = apply(snapshot, entry(events.TextCompleted(agent="a", text="Hello"), 6))
    assert dropped.texts == {"b": "x", "": "?"}
    assert apply(snapshot, entry(events.Requeued(), 6)).texts == {}
    assert apply(snapshot, entry(events.LeaseLost(), 6)).texts == {}


def test_a_new_turn_keeps_the_id_and_forgets_the_last_answer() -> None:
    ended = apply(in_status(RUNNING), entry(events.Completed(result="42"), 2))
    again = task(apply(ended, entry(events.Continued(query="more", title="More", submission="r2"), 3)).fields)
    assert (again.status, again.turn, again.query, again.title) == (QUEUED, 2, "more", "More")
    assert (again.result, again.finished_at, again.progress) == ("", 0, 0)
    assert again.created_at == 1000


def test_a_deadline_and_a_delay_count_from_the_stores_clock() -> None:
    later = msgspec.structs.replace(SUBMISSION, deadline_seconds=2.5, delay_seconds=1)
    found = task(apply(EMPTY, entry(events.Submitted(task=later))).fields)
    assert (found.created_at, found.deadline_at, found.ready_at) == (1000, 2_501_000, 1_001_000)


def test_usage_adds_up() -> None:
    usage = events.Usage(model="m", provider="p", input_tokens=3, output_tokens=4, cost_nano=5)
    snapshot = apply(in_status(RUNNING), entry(events.TextCompleted(text="a", usage=usage), 2))
    found = task(apply(snapshot, entry(events.Completed(result="a", usage=usage), 3)).fields)
    assert (found.input_tokens, found.output_tokens, found.cost_nano, found.model) == (6, 8, 10, "m")


def test_rows_for_the_script_are_the_changes() -> None:
    for event in [*SAMPLES.values(), events.Restated(to="completed", result="x")]:
        pairs = msgspec.json.decode(rows(event), type=list[Row])
        sent = {Status(status): pair.change for pair in pairs for status in pair.statuses}
        assert sent == changes(event), events.tag(event)


def test_events_called_constant_have_rows_that_do_not_depend_on_what_they_say() -> None:
    for kind in CONSTANT:
        sample = SAMPLES[events.tag(kind)]
        assert all(change in (Change(), Change(text="append")) for change in changes(sample).values())
        other = msgspec.structs.replace(sample, message="another", agent="other", actor="worker:x")
        assert changes(sample) == changes(other)


def test_the_diagram_shows_every_move() -> None:
    drawn = diagram()
    for kind, cells in TABLE.items():
        for before, after in cells.items():
            if before is not after and kind is not events.Deleted:
                source = "[*]" if before is NEW else before.value
                line = next(line for line in drawn.splitlines() if line.strip().startswith(f"{source} --> {after}:"))
                assert events.tag(kind).replace("_", " ") in line


@given(st.lists(st.sampled_from(sorted(SAMPLES)), max_size=30), st.integers(0, 30))
def test_folding_in_two_parts_is_folding_at_once(names: list[str], cut: int) -> None:
    def fold(snapshot: Snapshot, numbered: list[tuple[int, str]]) -> Snapshot:
        for seq, name in numbered:
            try:
                snapshot = apply(snapshot, entry(SAMPLES[name], seq))
            except Conflict:
                continue
        return snapshot

    numbered = list(enumerate(["submitted", *names], 1))
    assert fold(EMPTY, numbered) == fold(fold(EMPTY, numbered[:cut]), numbered[cut:])


@given(st.lists(st.sampled_from(sorted(SAMPLES)), max_size=30))
def test_a_snapshot_is_always_a_task(names: list[str]) -> None:
    snapshot = apply(EMPTY, entry(SAMPLES["submitted"]))
    for seq, name in enumerate(names, 2):
        try:
            snapshot = apply(snapshot, entry(SAMPLES[name], seq))
        except Conflict:
            continue
        if snapshot != EMPTY:
            found = task(snapshot.fields)
            assert found.terminal == bool(found.finished_at)
            assert (found.status in {PAUSED, HELD}) == bool(found.paused_at)
            assert found.last_seq == seq
