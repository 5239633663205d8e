"""The transition table: every cell, and what each event does to a snapshot."""

import re
from importlib.resources import files
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import events
from app.connect import ALONE
from app.errors import Conflict
from app.events import AnyEvent, Entry, Submission
from app.task import (
    CANCELLED,
    COMPLETED,
    CONSTANT,
    EMPTY,
    ERRORED,
    FOLLOWED,
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
    TIMED_OUT,
    Change,
    Row,
    Snapshot,
    Status,
    apply,
    changes,
    diagram,
    parts,
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


def test_a_new_turn_takes_its_own_particulars_and_no_others() -> None:
    schema = {"type": "object"}
    particulars: dict[str, Any] = {
        "llm_provider": "p",
        "llm_model": "m",
        "llm_effort": "high",
        "title": "One",
        "context": {"a": 1},
        "extra": {"b": 2},
        "output_schema": schema,
    }
    first = events.Submitted(task=msgspec.structs.replace(SUBMISSION, **particulars))
    snapshot = apply(EMPTY, entry(first))
    found = task(snapshot.fields)
    assert {name: getattr(found, name) for name in particulars} == particulars
    stated = events.Restated(stated={"x": 1}, version=1, internal_status="deep")
    snapshot = apply(apply(snapshot, entry(stated, 2)), entry(events.Completed(result="a"), 3))
    nothing = task(apply(snapshot, entry(events.Continued(submission="r2"), 4)).fields)
    assert {name: getattr(nothing, name) for name in particulars} == {
        name: type(value)() for name, value in particulars.items()
    }
    assert (nothing.stated, nothing.stated_version, nothing.internal_status) == ({}, 0, "")
    assert (nothing.queue, nothing.turn_seq) == ("default", 4)
    again = events.Continued(submission="r2", queue="other", **particulars)
    found = task(apply(snapshot, entry(again, 4)).fields)
    assert {name: getattr(found, name) for name in particulars} == particulars
    assert found.queue == "other"
    third = apply(apply(snapshot, entry(again, 4)), entry(events.Completed(result="b"), 5))
    assert task(apply(third, entry(events.Continued(submission="r3"), 6)).fields).turn_seq == 6


CONVERSATION: list[tuple[AnyEvent, Status, str]] = [
    (SAMPLES["submitted"], NEW, "add"),
    (SAMPLES["continued"], COMPLETED, "bounded"),
    (SAMPLES["completed"], RUNNING, "add"),
    (SAMPLES["tool_called"], RUNNING, "bounded"),
    (SAMPLES["tool_returned"], PAUSED, "bounded"),
    (events.Restated(to="completed", result="a"), RUNNING, "add"),
    (events.Restated(to="failed", result="no"), QUEUED, "add"),
    (events.Restated(to="completed"), RUNNING, ""),
    (events.Restated(to="running", result="half"), QUEUED, ""),
    (events.Restated(result="other"), COMPLETED, ""),
    (events.Restated(to="completed", result="other"), COMPLETED, "bounded"),
    (events.Restated(to="held"), COMPLETED, "bounded"),
    (SAMPLES["failed"], RUNNING, ""),
    (SAMPLES["retried"], ERRORED, ""),
    (SAMPLES["text_completed"], RUNNING, ""),
    (SAMPLES["deleted"], RUNNING, ""),
]


@pytest.mark.parametrize(("event", "before", "thread"), CONVERSATION)
def test_what_is_asked_called_and_answered_is_the_conversation(event: AnyEvent, before: Status, thread: str) -> None:
    assert changes(event)[before].thread == thread
    after = apply(in_status(before, thread_size="1000"), entry(event, 2))
    if after != EMPTY:
        size = (0 if before is NEW else 1000) + (entry(event).size if thread else 0)
        assert task(after.fields).thread_size == size


def test_what_an_owner_states_replaces_the_version_before_it_and_no_other() -> None:
    snapshot = in_status(RUNNING)
    for version in (1, 2):
        for wrong in (0, version - 1, version + 1):
            with pytest.raises(Conflict, match="moved on"):
                apply(snapshot, entry(events.Restated(stated={}, version=wrong), 2))
        snapshot = apply(snapshot, entry(events.Restated(stated={"v": version}, version=version), 2))
        found = task(snapshot.fields)
        assert (found.stated, found.stated_version) == ({"v": version}, version)
    kept = apply(snapshot, entry(events.Restated(internal_status="x", version=9), 3))
    assert task(kept.fields).stated == {"v": 2}


@pytest.mark.parametrize("before", STORED)
@pytest.mark.parametrize("to", ["", "running", "completed", "failed", "cancelled"])
def test_usage_that_an_owner_states_counts_only_where_it_ends_the_task(before: Status, to: str) -> None:
    event = events.Restated(to=to, usage=events.Usage(model="m", input_tokens=3))
    change = changes(event).get(before)
    if change:
        ends = before not in TERMINAL and to not in {"", "running"}
        assert change.spend == ({"input_tokens": 3} if ends else {})
        assert ("model" in change.set) == ends


def test_a_failure_tells_what_it_consumed() -> None:
    usage = events.Usage(model="m", provider="p", input_tokens=3, cost_nano=5)
    found = task(apply(in_status(RUNNING), entry(events.Failed(error="no", usage=usage), 2)).fields)
    assert (found.error, found.input_tokens, found.cost_nano, found.model) == ("no", 3, 5, "m")


def test_a_deletion_is_followed_only_when_the_sub_tasks_go_too() -> None:
    for children in (False, True):
        for change in changes(events.Deleted(children=children)).values():
            assert change.follow == ("id" if children else "")


def test_a_deadline_and_a_delay_count_from_the_stores_clock() -> None:
    later = msgspec.structs.replace(SUBMISSION, deadline_seconds=2.5, delay_seconds=1)
    found = task(apply(EMPTY, entry(events.Submitted(task=later))).fields)
    assert (found.created_at, found.deadline_at, found.ready_at) == (1000, 2_501_000, 1_001_000)


def test_a_retry_keeps_the_turn_and_forgets_how_it_ended() -> None:
    running = apply(in_status(QUEUED), entry(events.Started(worker="w", max_attempts=2), 2, attempt=1, fence=1))
    saved = apply(running, entry(events.PauseAsked(), 3, attempt=1, fence=1))
    saved = apply(saved, entry(events.Paused(state={"step": 3}), 4, attempt=1, fence=1))
    refunded = apply(saved, entry(events.LeaseLost(refund=True), 5, attempt=1, fence=1))
    spoken = Snapshot(fields=refunded.fields | {"progress": "0.5"}, text=b"\xff\xfehalf")
    ended = apply(spoken, entry(events.Cancelled(reason="enough", actor="user:u"), 6, attempt=1, fence=1))
    again = apply(ended, entry(events.Retried(deadline_seconds=1), 7, attempt=0, fence=1))
    found = task(again.fields)
    assert (found.status, found.turn, found.attempt, found.refunds, found.fence) == (QUEUED, 1, 0, 0, 1)
    assert (found.error, found.cancel_reason, found.cancelled_by, found.finished_at) == ("", "", "", 0)
    assert (found.progress, again.texts, found.deadline_at) == (0, {}, 1_007_000)
    # What the turn is about, and how far its handler came, stays; and so does what its function said.
    assert (found.query, found.checkpoint, found.max_attempts) == ("why?", {"step": 3}, 2)


def test_every_ended_task_but_a_completed_one_may_be_retried() -> None:
    assert set(targets(events.Retried())) == TERMINAL - {Status.COMPLETED}


def test_a_functions_attempts_fill_only_what_nobody_said() -> None:
    own = msgspec.structs.replace(SUBMISSION, max_attempts=5)
    start = events.Started(worker="w", max_attempts=2)
    for submitted, expected in ((SUBMISSION, 2), (own, 5)):
        found = task(apply(apply(EMPTY, entry(events.Submitted(task=submitted))), entry(start, 2)).fields)
        assert found.max_attempts == expected
    assert task(apply(in_status(QUEUED), entry(events.Started(worker="w"), 2)).fields).max_attempts == 3


@pytest.mark.parametrize(
    ("waits", "event"),
    [
        ("approval:a", events.Resumed()),
        ("approval:a", events.ApprovalDecided(approval="b", approved=True)),
        ("approval:a", events.Reviewed(version=1, approved=True)),
        ("review:2", events.Resumed()),
        ("review:2", events.Reviewed(version=1, approved=True)),
        ("review:2", events.ApprovalDecided(approval="2", approved=True)),
        ("", events.ApprovalDecided(approval="a", approved=True)),
        ("", events.Reviewed(version=1, approved=True)),
    ],
)
@pytest.mark.parametrize("before", [PAUSED, HELD])
def test_what_a_task_waits_for_is_ended_by_nothing_else(before: Status, waits: str, event: AnyEvent) -> None:
    snapshot = in_status(before, **({"waits": waits} if waits else {}))
    with pytest.raises(Conflict, match="moved on") as refused:
        apply(snapshot, entry(event, 2))
    assert refused.value.status == before


@pytest.mark.parametrize("lost", [False, True])
def test_an_approval_says_what_is_asked_and_its_end_forgets_it(lost: bool) -> None:
    ask = events.ApprovalRequested(approval="a", reason="May I?", payload={"cost": 3}, actor="worker:w")
    asked = apply(in_status(RUNNING, worker="w"), entry(ask, 2))
    found = task(asked.fields)
    assert (found.status, found.waits, found.paused_at) == (PAUSED, "approval:a", 2000)
    assert (found.request, found.pause_reason) == ({"reason": "May I?", "payload": {"cost": 3}}, "May I?")
    if lost:
        asked = apply(asked, entry(events.LeaseLost(refund=True), 3))
        held = task(asked.fields)
        assert (held.status, held.waits, held.refunds, held.worker) == (HELD, "approval:a", 1, "")
    decided = apply(asked, entry(events.ApprovalDecided(approval="a", approved=False), 4))
    assert decided.status is (QUEUED if lost else RUNNING)
    assert not {"waits", "request", "paused_at", "pause_reason", "paused_by"} & decided.fields.keys()
    with pytest.raises(Conflict):
        apply(decided, entry(events.ApprovalDecided(approval="a", approved=True), 5))


def test_a_review_goes_round_until_a_plan_is_approved() -> None:
    snapshot = in_status(RUNNING)
    for seq, round_ in ((2, 1), (4, 2)):
        ask = events.ReviewRequested(plan=f"plan {round_}", version=round_, round=round_)
        snapshot = apply(snapshot, entry(ask, seq))
        assert task(snapshot.fields).waits == f"review:{round_}"
        answer = events.Reviewed(version=round_, approved=round_ == 2)
        snapshot = apply(snapshot, entry(answer, seq + 1))
        found = task(snapshot.fields)
        assert (found.status, found.waits, found.plan) == (RUNNING, "", f"plan {round_}")
        assert (found.review, found.review_round) == ("approved" if round_ == 2 else "reviewing", round_)
    ended = apply(snapshot, entry(events.Completed(result="x"), 6))
    again = task(apply(ended, entry(events.Continued(query="more", submission="r2"), 7)).fields)
    assert (again.plan, again.review, again.review_round) == ("", "", 0)
    # Versions count all plans of the task: an opinion of an old one must never meet a new one.
    assert again.review_version == 2


@pytest.mark.parametrize(("version", "round_"), [(1, 1), (2, 1), (3, 2), (1, 2), (4, 3)])
def test_a_plan_that_does_not_count_on_is_refused(version: int, round_: int) -> None:
    """An opinion of one plan must never meet another one under the same version."""
    once = in_status(RUNNING, review_version="1", review_round="1")
    ask = events.ReviewRequested(plan="p", version=version, round=round_)
    with pytest.raises(Conflict):
        apply(once, entry(ask, 2))
    assert task(apply(once, entry(events.ReviewRequested(plan="p", version=2, round=2), 2)).fields).review_version == 2


def test_a_time_to_live_counts_from_acceptance_and_ends_with_the_first_start() -> None:
    queued = in_status(QUEUED, expires_at="61000000")
    assert "expires_at" not in apply(queued, entry(events.Started(worker="w"), 2)).fields
    assert "expires_at" not in apply(queued, entry(events.Restated(to="running"), 2)).fields
    assert "expires_at" in apply(queued, entry(events.PauseAsked(), 2)).fields
    ended = apply(queued, entry(events.Cancelled(), 2))
    assert "expires_at" not in apply(ended, entry(events.Retried(), 3)).fields
    later = msgspec.structs.replace(SUBMISSION, ttl_seconds=60)
    assert task(apply(EMPTY, entry(events.Submitted(task=later))).fields).expires_at == 60_001_000


def test_who_has_children_is_followed_when_it_is_stopped_and_only_then() -> None:
    stops: list[AnyEvent] = [events.Cancelled(), events.TimedOut()]
    stops += [events.Restated(to=to) for to in (CANCELLED, TIMED_OUT)]
    for event in stops:
        assert isinstance(event, FOLLOWED)
        for before, change in changes(event).items():
            assert change.follow == ("" if before in TERMINAL else "children")
    for other in (*SAMPLES.values(), events.Restated(to=ERRORED), events.Restated(internal_status="x")):
        follows = {change.follow for change in changes(other).values()} - {""}
        assert not follows or isinstance(other, FOLLOWED)
        assert isinstance(other, (events.Cancelled, events.TimedOut)) == (follows == {"children"})


def test_children_are_counted_over_all_attempts_and_turns() -> None:
    snapshot = in_status(RUNNING)
    for seq in (2, 3):
        snapshot = apply(snapshot, entry(SAMPLES["child_submitted"], seq))
    ended = apply(snapshot, entry(events.Cancelled(), 4))
    again = apply(ended, entry(events.Retried(), 5))
    assert task(again.fields).children == 2


def test_the_scripts_load_every_field_that_they_look_at() -> None:
    """What is not loaded looks absent: a step would overwrite it, or leave a task in a list."""
    scripts = {file.name: file.read_text() for file in (files("app") / "lua").iterdir()}
    names = re.search(r"local NAMES = \{(.*?)\}", scripts["commit.lua"], re.DOTALL)
    made = re.search(r"  return \{ (status = v\[1\].*?)\}", scripts["commit.lua"], re.DOTALL)
    assert names
    assert made
    loaded = re.findall(r"'(\w+)'", names[1])
    assert re.findall(r"(\w+) = v\[(\d+)\]", made[1]) == [(name, str(i)) for i, name in enumerate(loaded, 1)]
    looked_at = {
        name
        for name, text in scripts.items()
        if name.removesuffix(".lua") not in ALONE
        for name in re.findall(r"\b(?:fields|before|after|found|f)\.(\w+)", text)
    }
    of_new_tasks = {"parent", "trigger", "priority", "ready_at"}
    assert looked_at - of_new_tasks <= {*loaded}
    assert len(looked_at) > 15


def test_rows_for_one_status_are_those_of_that_status() -> None:
    (pair,) = msgspec.json.decode(rows(events.LeaseLost(), ["running"]), type=list[Row])
    assert (pair.statuses, pair.change) == (("running",), changes(events.LeaseLost())[RUNNING])
    assert msgspec.json.decode(rows(events.LeaseLost(), ["queued"])) == []


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


def test_the_two_parts_of_rows_are_the_rows() -> None:
    usage = events.Usage(model="m", provider="p", input_tokens=3)
    more: list[AnyEvent] = [
        events.Restated(to="completed", result="x"),
        events.Completed(result="", usage=usage),
        events.Completed(result="x"),
        events.Paused(state={"a": 1}),
    ]
    for event in [*SAMPLES.values(), *more, *SAMPLES.values()]:  # the second time from memory
        for only in ((), ("running",)):
            encoded, sets = parts(event, only)
            pairs = msgspec.json.decode(encoded, type=list[Row])
            values = dict(zip(sets[::2], sets[1::2], strict=True))
            sent = {
                Status(status): msgspec.structs.replace(pair.change, set={**pair.change.set, **values})
                for pair in pairs
                for status in pair.statuses
            }
            assert sent == changes(event, only), events.tag(event)


def test_events_called_constant_have_rows_that_do_not_depend_on_what_they_say() -> None:
    for kind in CONSTANT:
        sample = SAMPLES[events.tag(kind)]
        plain = (Change(), Change(text="append"), Change(thread="bounded"))
        assert all(change in plain for change in changes(sample).values())
        other = msgspec.structs.replace(sample, message="another", agent="other", actor="worker:x")
        assert changes(sample) == changes(other)


def test_rows_at_hand_hold_no_text_of_an_event() -> None:
    first, second = (parts(events.Completed(result=text)) for text in ("one", "two"))
    assert first[0] is second[0]
    assert (first[1], second[1]) == (
        ["result", "one", "result_type", "text", "progress", "1"],
        ["result", "two", "result_type", "text", "progress", "1"],
    )


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
