"""What `watch` shows, event by event: no network, no terminal."""

import io
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console
from rich.text import Text

from app.remote import ago
from app.screen import Lines, View, clean, duration, print_columns


def delta(text: str, *, agent: str = "final_output", attempt: int = 1) -> tuple[str, dict[str, Any]]:
    return "thread.message.delta", {"delta": text, "agent_id": agent, "attempt": attempt}


def seen(*events: tuple[str, dict[str, Any]]) -> View:
    view = View("task_1")
    for event in events:
        view.take(*event)
    return view


STARTED = ("WORKFLOW_STARTED", {"message": "Task started.", "payload": {"attempt": 1}})


def test_text_grows_by_deltas_and_is_replaced_by_the_whole() -> None:
    view = seen(STARTED, delta("a "), delta("b"))
    assert (view.status, view.text) == ("running", "a b")
    view.take("thread.message.completed", {"response": "A b.", "agent_id": "final_output", "attempt": 1})
    assert view.text == "A b."


def test_another_attempt_drops_the_text_whoever_says_so_first() -> None:
    recovery = ("ERROR_RECOVERY", {"message": "again", "payload": {"attempt": 1}})
    view = seen(STARTED, delta("a"), recovery)
    assert (view.text, view.dropped, view.status) == ("", True, "queued")
    view = seen(STARTED, delta("a"), delta("b", attempt=2))
    assert (view.text, view.dropped, view.attempt) == ("b", True, 2)


def test_a_gap_brings_the_text_and_the_state_so_far() -> None:
    snapshot = {"texts": {"": "so far"}, "status": "TASK_STATUS_RUNNING", "attempt": 3, "progress": 0.5}
    view = seen(("gap", {"message": "Earlier events are no longer kept.", "snapshot": snapshot}))
    assert (view.text, view.status, view.attempt, view.progress) == ("so far", "running", 3, 0.5)
    view.take(*delta(" and on", attempt=3))
    assert view.text == "so far and on"


def test_the_answer_hides_what_agents_wrote_on_the_way() -> None:
    view = seen(delta("x", agent="finder"), delta("y", agent="writer"))
    assert view.text == "finder:\nx\n\nwriter:\ny"
    view.take(*delta("z"))
    assert view.text == "z"


def test_ends_have_their_own_words() -> None:
    late = {"message": "too late", "payload": {"status": "TASK_STATUS_TIMEOUT"}}
    assert seen(("error", late)).status == "timed out"
    assert seen(("error", {"message": "no"})).status == "failed"
    assert seen(("workflow.cancelled", {"message": "enough"})).status == "cancelled"
    assert seen(("TASK_RESTATED", {"payload": {"status": "TASK_STATUS_PAUSED"}})).status == "paused"


APPROVAL = ("APPROVAL_REQUESTED", {"message": "Needs approval: Deploy?", "payload": {"approval_id": "a"}})
DECISION = ("APPROVAL_DECISION", {"message": "Approved.", "payload": {"approval_id": "a", "approved": True}})
LOST = ("ERROR_RECOVERY", {"message": "lost", "payload": {"attempt": 1, "reason": "lease_lost"}})
PLAN = ("RESEARCH_PLAN_READY", {"message": "1. Ask.", "payload": {"round": 1, "version": 1}})
DECIDE = "To decide: taskcast approve task_1, or taskcast deny task_1"


def test_a_task_that_waits_for_a_human_says_what_to_type() -> None:
    view = seen(STARTED, APPROVAL)
    assert (view.status, view.message, view.decide) == ("paused", "Needs approval: Deploy?", DECIDE)
    view.take(*DECISION)
    assert (view.status, view.decide) == ("running", "")
    view = seen(STARTED, PLAN)
    assert view.decide == f"{DECIDE} --feedback 'what should be different'"
    view.take("REVIEW_USER_FEEDBACK", {"message": "Shorter."})
    assert (view.status, view.decide) == ("running", "")
    view.take("RESEARCH_PLAN_UPDATED", {"message": "1.", "payload": {"round": 2, "version": 2}})
    assert view.status == "paused"
    view.take("RESEARCH_PLAN_APPROVED", {"message": "The plan is approved."})
    assert (view.status, view.decide) == ("running", "")
    view.take("RESEARCH_PLAN_UPDATED", {"payload": {"steps": []}})  # a worker's own, which waits for nobody
    assert (view.status, view.decide) == ("running", "")
    assert seen(STARTED, APPROVAL, ("workflow.cancelled", {"message": "enough"})).decide == ""


def test_a_task_whose_worker_left_while_it_waited_still_waits_and_is_queued_then() -> None:
    view = seen(STARTED, APPROVAL, LOST)
    assert (view.status, view.decide) == ("paused", DECIDE)
    view.take(*DECISION)
    assert view.status == "queued"
    view.take(*STARTED)
    assert view.status == "running"
    view = seen(("workflow.pausing", {"message": "Pausing."}))  # nobody works at it
    assert view.status == "paused"
    view.take("workflow.resumed", {"message": "Task resumed."})
    assert view.status == "queued"


def test_a_snapshot_says_what_the_task_waits_for() -> None:
    paused = {"status": "TASK_STATUS_PAUSED"}
    view = seen(("gap", {"snapshot": {**paused, "approval": {"approval_id": "a", "reason": "Deploy?"}}}))
    assert (view.status, view.decide) == ("paused", DECIDE)
    view = seen(("gap", {"snapshot": {**paused, "review": {"pending": True, "version": 1}}}))
    assert "--feedback" in view.decide
    assert seen(("gap", {"snapshot": {**paused, "review": {"pending": False, "version": 1}}})).decide == ""


def test_a_retry_says_what_went_wrong_and_when_it_goes_on() -> None:
    payload = {"attempt": 1, "reason": "requeued", "delay_seconds": 3.0, "error": "Busy\x1b."}
    again = ("ERROR_RECOVERY", {"message": "The task is queued again.", "payload": payload})
    assert seen(STARTED, again).message == "attempt 1 failed: Busy.; next in 3 s"
    assert seen(STARTED, ("workflow.paused", {}), again).message == "attempt 1 failed: Busy."
    out = io.StringIO()
    view = View("task_1")
    lines = Lines(view, Console(file=out, width=40))
    for event in (STARTED, again, STARTED, APPROVAL, DECISION):
        view.take(*event)
        lines.show()
    assert out.getvalue().splitlines() == [
        "[running]  Task started.",
        "[queued]  attempt 1 failed: Busy.; next in 3 s",
        "[running]  Task started.",
        "[paused]  Needs approval: Deploy?",
        f"({DECIDE})",
        "[running]  Approved.",
    ]


def rendered(view: View) -> list[str]:
    console = Console(file=io.StringIO(), width=120, height=24, force_terminal=True)
    lines = console.render_lines(view, console.options, pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def test_the_live_screen_shows_the_question_and_how_to_answer_it() -> None:
    assert rendered(seen(STARTED, APPROVAL))[-2:] == ["Needs approval: Deploy?", DECIDE]
    long = ("RESEARCH_PLAN_READY", {"message": "\n".join(f"{n}. Ask." for n in range(1, 30)), "payload": {}})
    shown = rendered(seen(STARTED, long))
    assert shown[-3:-1] == ["10. Ask.", "⋯"]
    payload = {"attempt": 1, "delay_seconds": 0.5, "error": "Busy."}
    assert rendered(seen(STARTED, ("ERROR_RECOVERY", {"payload": payload})))[-1].startswith("attempt 1 failed: Busy.")


def test_text_cannot_steer_the_terminal() -> None:
    assert seen(delta("a\x1b[2Jb\rc\x9b1md\te\n")).text == "a[2Jbc1md\te\n"
    unseen = [*range(0x2028, 0x202F), *range(0x2066, 0x206A)]  # line breaks and changes of direction
    assert clean("".join(f"{chr(one)}a" for one in unseen)) == "a" * len(unseen)


def test_the_live_screen_fits_and_shows_the_end_of_a_long_text() -> None:
    view = seen(STARTED, delta("\n".join(f"line {n}" for n in range(100))))
    view.take("PROGRESS", {"message": "Step [1]", "payload": {"progress": 0.25}})
    view.notice = "The connection was lost."
    console = Console(file=io.StringIO(), width=60, height=12, force_terminal=True)
    lines = console.render_lines(view, console.options, pad=False)
    shown = ["".join(segment.text for segment in line).rstrip() for line in lines]
    assert len(shown) <= 12
    assert "line 99" in shown
    assert "line 0" not in shown
    assert shown[0] == "⋯"
    assert "25% Step [1]" in shown[-2]
    assert shown[-1] == "The connection was lost."


def test_a_screen_without_room_for_text_shows_the_state() -> None:
    console = Console(file=io.StringIO(), width=60, height=2, force_terminal=True)
    lines = console.render_lines(seen(STARTED, delta("a\nb\nc")), console.options)
    assert len(lines) == 1


def test_without_a_terminal_whole_lines_are_printed_as_they_come() -> None:
    out = io.StringIO()
    view = View("task_1")
    lines = Lines(view, Console(file=out, width=40))
    for event in (STARTED, delta("one\ntw"), delta("o\nthr"), delta("ee")):
        view.take(*event)
        lines.show()
    assert out.getvalue() == "[running]  Task started.\none\ntwo\n"
    view.notice = "The connection was lost."
    lines.show()
    lines.end("one\ntwo\nthree")
    assert out.getvalue().endswith("two\n(The connection was lost.)\nthree\n")


def test_without_a_terminal_an_answer_that_was_never_streamed_is_printed_at_the_end() -> None:
    out = io.StringIO()
    lines = Lines(seen(STARTED), Console(file=out, width=40))
    lines.end('{"answer": 42}')
    assert out.getvalue() == '{"answer": 42}\n'


def test_columns_are_cut_on_a_terminal_only() -> None:
    for terminal, last in ((True, "a very l…"), (False, "a very long name")):
        out = io.StringIO()
        console = Console(file=out, width=20, force_terminal=terminal, color_system=None)
        print_columns(console, ("ID", "STATE", "NAME"), [["1", Text("up"), "a very long name"]])
        assert out.getvalue() == f"ID  STATE  NAME\n1   up     {last}\n"


def test_durations_are_told_as_people_say_them() -> None:
    assert [duration(s) for s in (0.04, 59.9, 61, 3599.6, 7260)] == [
        "0.0 s",
        "59.9 s",
        "1 min 01 s",
        "1 h 00 min",
        "2 h 01 min",
    ]


def test_ages_are_told_in_one_unit() -> None:
    now = datetime(2026, 1, 3, tzinfo=UTC)
    ages = {0.5: "now", 59: "59 s ago", 61: "1 min ago", 7200: "2 h ago", 90_000: "1 d ago"}
    for seconds, told in ages.items():
        assert ago((now - timedelta(seconds=seconds)).isoformat(), now) == told
