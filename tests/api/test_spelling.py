"""The Shannon dialect's pure part: every status, event and error has a spelling, and it is the contract's."""

import itertools
import json
import re
from collections import OrderedDict
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import errors, events
from app.answers import clock
from app.api.shannon.spelling import (
    ASKED,
    PASSED_ON,
    RAW,
    SSE_NAME,
    STATUS,
    control,
    error_body,
    event_body,
    frame,
    live,
    raw_type,
    refused,
    response,
    submission,
    task_body,
    task_item,
)
from app.errors import Conflict, Invalid, TaskcastError, TooLarge
from app.events import AnyEvent, Event, Submission
from app.frames import encode
from app.identity import Identity
from app.log import logged
from app.seam import Ended, Gap
from app.task import STORED, TERMINAL, Status, Task, task
from tests.api.lives import ASKING, AT, LIVES, QUESTION, SAMPLES, STARTED, entry, folded

GOLDEN = Path(__file__).parent / "golden"
WHO = Identity(org="org", user="user", key="key_1")


def snapshot_of(status: Status, **more: Any) -> Task:
    return task(folded(*LIVES[status], question=msgspec.structs.replace(QUESTION, **more)).fields)


# Status


def test_every_stored_status_has_a_name_that_the_sdk_knows() -> None:
    assert tuple(STATUS) == STORED
    known = {"QUEUED", "RUNNING", "PAUSED", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}
    assert {name.removeprefix("TASK_STATUS_") for name in STATUS.values()} == known


def test_a_status_filter_means_every_status_that_is_shown_by_its_word() -> None:
    assert set(itertools.chain.from_iterable(ASKED.values())) == set(STORED)
    assert ASKED["FAILED"] == (Status.FAILED, Status.ERRORED)
    assert ASKED["PAUSED"] == (Status.PAUSED, Status.HELD)
    assert ASKED["CANCELED"] == ASKED["CANCELLED"]


# Submissions


def submitted(body: object, **more: Any) -> Submission:
    return submission(json.dumps(body).encode(), WHO, **more)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "Query is required"),
        ({"query": ""}, "Query is required"),
        ({"query": None}, "Query is required"),
        ({"query": "", "context": {"attachments": []}}, "Query is required"),
        ({"query": "q", "session_id": "no spaces"}, "Invalid session_id format"),
        ({"query": "q", "session_id": "x" * 129}, "Invalid session_id format"),
        ({"query": "q", "skill": " juggling "}, "Unknown skill: juggling"),
        ({"query": "q", "model_tier": "huge"}, "Invalid model_tier (allowed: small, medium, large)"),
        (
            {"query": "q", "provider_override": "Acme"},
            (
                "Invalid provider_override: acme (allowed: openai, anthropic, google, groq, xai, deepseek, qwen, zai, "
                "kimi, minimax, ollama, mistral, cohere)"
            ),
        ),
        (
            {"query": "q", "research_strategy": "vague"},
            "Invalid research_strategy (allowed: quick, standard, deep, academic)",
        ),
        ({"query": "q", "max_iterations": 0}, "max_iterations out of range (1..50)"),
        ({"query": "q", "max_iterations": 51}, "max_iterations out of range (1..50)"),
        ({"query": "q", "max_concurrent_agents": 21}, "max_concurrent_agents out of range (1..20)"),
        (
            {"query": "q", "context": {"disable_ai": True}, "model_tier": "small"},
            "disable_ai=true conflicts with model_tier/model_override",
        ),
        (
            {"query": "q", "context": {"disable_ai": " Yes ", "model_override": "m"}},
            "disable_ai=true conflicts with model_tier/model_override",
        ),
        (
            {"query": "q", "context": {"disable_ai": 1, "provider_override": "p"}},
            "disable_ai=true conflicts with model_tier/model_override",
        ),
        ({"query": "q", "mode": "deep"}, "Invalid mode (allowed: simple, standard, complex, supervisor)"),
        ({"query": "q", "timeout_seconds": 0}, "timeout_seconds out of range (1..86400)"),
        ({"query": "q", "timeout_seconds": 86401}, "timeout_seconds out of range (1..86400)"),
        ({"query": "q", "ttl_seconds": 0.9}, "ttl_seconds out of range (1..604800)"),
        ({"query": "q", "ttl_seconds": 604_801}, "ttl_seconds out of range (1..604800)"),
        ({"query": "q", "priority": -1}, "priority out of range (0..2)"),
        ({"query": "q", "priority": 3}, "priority out of range (0..2)"),
        ({"query": "q", "max_attempts": 0}, "max_attempts out of range (1..100)"),
        ({"query": "q", "max_attempts": 101}, "max_attempts out of range (1..100)"),
        ({"query": "q", "priority": True}, "Invalid request body: Expected `int | null`, got `bool` - at `$.priority`"),
        *(
            (
                {"query": "q", "run_at": moment},
                "Invalid run_at (expected RFC 3339 with an offset, such as 2030-01-31T09:00:00Z)",
            )
            for moment in ("soon", "2030-01-31T09:00:00", "2030-02-30T09:00:00Z", "2030-01-31", "20300131T090000Z", " ")
        ),
        ({"query": "q", "run_at": "9999-12-31T23:59:59Z"}, "run_at out of range (at most 10 years ahead)"),
        ({"query": 7}, "Invalid request body: Expected `str | null`, got `int` - at `$.query`"),
        ({"query": "q", "context": []}, "Invalid request body: Expected `object | null`, got `array` - at `$.context`"),
        (["query"], "Invalid request body: Expected `object`, got `array`"),
    ],
)
def test_a_bad_submission_gets_the_contracts_sentence(body: object, sentence: str) -> None:
    with pytest.raises(Invalid) as caught:
        submitted(body)
    assert str(caught.value) == sentence
    assert error_body(caught.value) == (400, {"error": sentence})


@pytest.mark.parametrize("body", [b"", b"{", b'"\xff"', b"[" * 100_000, b'{"query": NaN}', b'{"query": "\\ud800"}'])
def test_what_is_no_json_is_an_invalid_request_body(body: bytes) -> None:
    with pytest.raises(Invalid, match="Invalid request body: "):
        submission(body, WHO)


def test_json_is_taken_to_a_bounded_depth() -> None:
    def nested(levels: int) -> bytes:
        return b'{"query": "q", "context": {"a": ' + b"[" * levels + b"]" * levels + b"}}"

    assert submission(nested(98), WHO).context
    for levels in (99, 500, 965):
        with pytest.raises(Invalid, match=r"Invalid request body: nested too deeply \(max 100 levels\)"):
            submission(nested(levels), WHO)


def test_a_body_beyond_the_limit_is_too_large() -> None:
    with pytest.raises(TooLarge) as caught:
        submitted({"query": "x" * 256 * 1024})
    assert error_body(caught.value) == (413, {"error": "Request body too large (max 262144 bytes)"})


def test_a_question_alone_is_enough() -> None:
    asked = submitted({"query": " q ", "unheard_of": {"a": 1}})
    assert (asked.query, asked.mode, asked.context, asked.queue, asked.agent) == (
        " q ",
        "simple",
        {},
        "default",
        "default",
    )
    assert (asked.org, asked.owner, asked.dialect, asked.deadline_seconds) == ("org", "user", "shannon", 0)
    assert re.fullmatch(r"task_[0-9A-HJKMNP-TV-Z]{26}", asked.id)
    assert events.ID.fullmatch(asked.session)
    assert asked.body_hash == ""
    assert asked.submission
    again = submitted({"query": " q "})
    assert asked.id != again.id
    assert asked.session != again.session


def test_null_is_as_good_as_absent() -> None:
    names = Submission.__struct_fields__
    bare = submitted({"query": "q", "session_id": "s"})
    nulls = submitted({"query": "q", "session_id": "s"} | dict.fromkeys(("context", "mode", "skill", "max_iterations")))
    random = {"id", "submission"}
    assert all(getattr(bare, name) == getattr(nulls, name) for name in names if name not in random)


def test_top_level_fields_win_over_the_context() -> None:
    asked = submitted(
        {
            "query": "q",
            "mode": " Supervisor ",
            "context": {"model_tier": "small", "force_swarm": True, "template_name": " t ", "echo": {"steps": 3}},
            "model_tier": " LARGE ",
            "model_override": " m ",
            "provider_override": "OpenAI",
            "research_strategy": "Deep",
            "max_iterations": 5,
            "max_concurrent_agents": 20,
            "enable_verification": False,
            "timeout_seconds": 1.5,
        }
    )
    assert asked.mode == "supervisor"
    assert asked.deadline_seconds == 1.5
    assert asked.context == {
        "model_tier": "large",
        "force_swarm": True,
        "template_name": " t ",
        "template": "t",
        "echo": {"steps": 3},
        "model_override": "m",
        "provider_override": "openai",
        "research_strategy": "deep",
        "max_iterations": 5,
        "max_concurrent_agents": 20,
        "enable_verification": False,
    }


def test_what_is_ours_in_a_submission_reaches_the_store() -> None:
    moment = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    asked = submitted(
        {
            "query": "q",
            "run_at": moment,
            "priority": 2,
            "max_attempts": 100,
            "ttl_seconds": 604_800,
            "timeout_seconds": 86_400,
        }
    )
    assert (asked.priority, asked.max_attempts) == (2, 100)
    assert 3500 < asked.delay_seconds <= 3600
    # Both count from the moment at which a worker may have it.
    assert asked.ttl_seconds == 604_800 + asked.delay_seconds
    assert asked.deadline_seconds == 86_400 + asked.delay_seconds
    bare = submitted({"query": "q"})
    assert (bare.priority, bare.max_attempts, bare.delay_seconds, bare.ttl_seconds) == (0, 0, 0, 0)


def test_a_moment_has_any_offset_and_what_has_passed_is_now() -> None:
    for moment in ("2001-01-01T00:00:00Z", "2001-01-01t00:00:00.123456789z", "2001-01-01 00:00:00+05:30"):
        asked = submitted({"query": "q", "run_at": moment, "timeout_seconds": 1})
        assert (asked.delay_seconds, asked.deadline_seconds) == (0, 1)
    furthest = datetime.now(UTC) + timedelta(days=3649)
    late = submitted({"query": "q", "run_at": furthest.isoformat(), "ttl_seconds": 604_800, "timeout_seconds": 86_400})
    events.encode(events.Submitted(task=late))  # the store takes it


def test_forced_research_is_standard_unless_a_strategy_is_named() -> None:
    assert submitted({"query": "q", "context": {"force_research": True}}).context["research_strategy"] == "standard"
    named = {"query": "q", "context": {"force_research": True, "research_strategy": "quick"}}
    assert submitted(named).context["research_strategy"] == "quick"
    assert "research_strategy" not in submitted({"query": "q", "context": {"force_research": "yes"}}).context


def test_attachments_need_no_question() -> None:
    asked = submitted({"query": "", "context": {"attachments": [{"name": "a.pdf"}]}})
    assert asked.query == "[User sent file attachments]"


def test_an_idempotency_key_fixes_the_id_and_hashes_the_body() -> None:
    one = submitted({"query": "q", "session_id": "s"}, secret=b"x", idempotency_key="k")
    two = submission(b'{ "session_id":"s", "query":"q" }', WHO, secret=b"x", idempotency_key="k")
    assert one.id == two.id
    assert one.body_hash == two.body_hash
    assert one.submission != two.submission
    assert submitted({"query": "other"}, secret=b"x", idempotency_key="k").body_hash != one.body_hash
    others = [
        submitted({"query": "q"}, secret=b"y", idempotency_key="k"),
        submitted({"query": "q"}, secret=b"x", idempotency_key="l"),
        submission(b'{"query":"q"}', Identity("org", "somebody", "key_2"), secret=b"x", idempotency_key="k"),
    ]
    assert len({one.id, *(other.id for other in others)}) == 4


# Tasks


@pytest.mark.parametrize("status", STORED)
def test_each_status_has_its_golden_body(status: Status) -> None:
    body = json.loads(msgspec.json.encode(task_body(snapshot_of(status))))
    assert body == json.loads((GOLDEN / f"shannon_{status}.json").read_text())


def test_a_body_says_what_the_task_waits_for() -> None:
    asked = events.ApprovalRequested(approval="ap1", reason="Deploy?", payload={"risk": "high"})
    body = task_body(task(folded(STARTED, asked).fields))
    assert body["status"] == "TASK_STATUS_PAUSED"
    assert body["approval"] == {
        "approval_id": "ap1",
        "reason": "Deploy?",
        "payload": {"risk": "high"},
        "requested_at": "2025-10-22T10:30:02.000002Z",
    }
    decided = events.ApprovalDecided(approval="ap1", approved=True)
    assert "approval" not in task_body(task(folded(STARTED, asked, decided).fields))
    plan = events.ReviewRequested(plan="1. Ask.", version=1)
    body = task_body(task(folded(STARTED, plan).fields))
    assert body["review"] == {"status": "reviewing", "round": 1, "version": 1, "pending": True}
    said = events.Reviewed(version=1, approved=True)
    body = task_body(task(folded(STARTED, plan, said).fields))
    assert body["review"] == {"status": "approved", "round": 1, "version": 1, "pending": False}
    assert "approval" not in body


def test_a_body_says_when_the_next_attempt_may_begin_and_whose_child_it_is() -> None:
    body = task_body(task(folded(STARTED, events.Requeued(delay_seconds=3)).fields))
    assert (body["next_attempt_at"], body["attempt"], body["max_attempts"]) == ("2025-10-22T10:30:05.000002Z", 1, 3)
    again = folded(STARTED, events.Requeued(delay_seconds=3), STARTED, events.ChildSubmitted(task=QUESTION))
    assert "next_attempt_at" not in task_body(task(again.fields))
    assert task_body(task(again.fields))["children"] == 1
    child = snapshot_of(Status.QUEUED, parent="task_parent", max_attempts=7)
    assert (task_body(child)["parent_task_id"], task_body(child)["max_attempts"]) == ("task_parent", 7)


@pytest.mark.parametrize("status", STORED)
def test_the_seeds_snippets_read_every_body(status: Status) -> None:
    body = task_body(snapshot_of(status))
    assert body["workflow_id"] == body["task_id"]
    assert body["response"] is None or isinstance(body["response"], dict)
    assert (body["response"] is not None) == (status is Status.COMPLETED) == ("result" in body)
    assert bool(body["error"]) == (status in {Status.FAILED, Status.ERRORED, Status.TIMED_OUT})
    assert body["error"] == body["error_message"]
    assert body["query"][:50]
    assert body["mode"].replace("EXECUTION_MODE_", "") == "SIMPLE"
    assert ("completed_at" in body) == (status in TERMINAL)
    assert body["last_event_id"]


@pytest.mark.parametrize(
    ("result", "result_type", "expected"),
    [
        ("Paris.", "text", {"result": "Paris."}),
        ("", "text", {"result": ""}),
        ("42", "text", {"result": "42"}),
        ("{not json", "text", {"result": "{not json"}),
        (' {"city": "Paris"}', "text", {"city": "Paris"}),
        ('{"city": "Paris"}', "json", {"city": "Paris"}),
        ("[1, 2]", "json", {"result": [1, 2]}),
        ("null", "json", {"result": None}),
        ("broken", "json", {"result": "broken"}),
        ("[" * 100_000, "json", {"result": "[" * 100_000}),
    ],
)
def test_a_response_is_always_an_object(result: str, result_type: str, expected: object) -> None:
    assert response(result, result_type) == expected


def test_a_mode_that_its_documents_do_not_know_is_standard() -> None:
    named = {mode: task_body(snapshot_of(Status.QUEUED, mode=mode))["mode"] for mode in ("complex", "supervisor", "")}
    assert named == {
        "complex": "EXECUTION_MODE_COMPLEX",
        "supervisor": "EXECUTION_MODE_STANDARD",
        "": "EXECUTION_MODE_STANDARD",
    }


def test_the_context_stands_where_the_sdk_and_the_ui_look_for_it() -> None:
    body = task_body(snapshot_of(Status.QUEUED, context={"role": "poet"}))
    assert body["context"] == body["metadata"]["task_context"] == {"role": "poet"}


def test_a_list_item_has_what_the_sdk_demands() -> None:
    assert task_item(snapshot_of(Status.COMPLETED)) == {
        "task_id": QUESTION.id,
        "workflow_id": QUESTION.id,
        "query": QUESTION.query,
        "status": "TASK_STATUS_COMPLETED",
        "mode": "EXECUTION_MODE_SIMPLE",
        "session_id": "user-123-session",
        "created_at": "2025-10-22T10:30:00.000000Z",
        "started_at": "2025-10-22T10:30:01.000001Z",
        "completed_at": "2025-10-22T10:30:02.000002Z",
        "total_token_usage": {
            "total_tokens": 300,
            "cost_usd": 0.006,
            "prompt_tokens": 200,
            "completion_tokens": 100,
        },
    }


# Events


def said(kind: type[Event]) -> Any:
    return next(sample for sample in SAMPLES if type(sample) is kind)


def only(event: AnyEvent, **more: Any) -> Any:
    (one,) = frame(entry(event, **more))
    return one


def test_there_is_a_sample_of_every_event_and_a_name_for_each() -> None:
    every = set(get_args(AnyEvent))
    assert {type(sample) for sample in SAMPLES} == every
    named_by_what_they_say = {events.Noted, events.ReviewRequested, events.Reviewed}
    assert set(RAW) == every - named_by_what_they_say - {events.Deleted}


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: type(event).__name__)
def test_every_event_is_told_once_in_lists_and_at_least_once_on_streams(event: AnyEvent) -> None:
    one = entry(event)
    frames, listed, streamed = frame(one), event_body(one), event_body(one, stream=True)
    if isinstance(event, events.Deleted):
        assert (frames, listed, streamed) == ([], [], [])
        return
    assert len(listed) == 1
    assert len(frames) == len(streamed) == (2 if isinstance(event, events.Cancelled) else 1)
    assert [one.id for one in frames][-1] == one.id
    for told in frames:
        assert isinstance(told.data, dict)
        assert told.event in told.types
        assert told.data["workflow_id"] == QUESTION.id
        # The SDK prefers `type` to the event's name: where it stands it is one of both.
        assert told.data.get("type", told.event) in told.types
        msgspec.json.encode(told.data)
    body = listed[0]
    assert body.keys() >= {"workflow_id", "type", "timestamp", "seq", "stream_id"}
    assert body["timestamp"] == "2025-10-22T10:30:06.000006Z"
    assert (body["seq"], body["stream_id"]) == (7, one.id)
    assert body.get("message", "?") != ""


def same_live(event: AnyEvent) -> bool:
    """Whether who reads it live is told the same as who reads it later, or it has to be parsed for that."""
    one = entry(event)
    place = [1, "org", one.task, "", "", "", "", "running", "running", one.seq, *divmod(one.at, 1_000_000)]
    header = msgspec.json.encode([*place, events.tag(event), one.fence, one.attempt, one.n, ""])
    encoded = events.encode(event)
    told = live(logged(one.id.encode(), [b"head", header, b"event", encoded]))
    mapped = raw_type(event) in SSE_NAME and not isinstance(event, events.TextDelta)
    if mapped or events.tag(event) not in PASSED_ON or not encoded.isascii():
        return told is None
    (later,) = frame(one)
    return told == (later.event, later.type, encode(later))


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: type(event).__name__)
def test_every_event_is_told_live_as_it_is_later(event: AnyEvent) -> None:
    assert same_live(event)


class Nothing(StrEnum):
    NOTHING = ""


@pytest.mark.parametrize(
    "said", [{"agent": Nothing.NOTHING}, {"message": Nothing.NOTHING}, {"payload": OrderedDict()}], ids=str
)
def test_what_is_empty_is_left_out_live_also_if_the_log_has_it(said: dict[str, Any]) -> None:
    event = events.Noted(name="NOTE", **said)
    assert b'""' in events.encode(event) or b"{}" in events.encode(event)
    assert same_live(event)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(
    st.sampled_from([kind for kind in get_args(AnyEvent) if events.tag(kind) in PASSED_ON]),
    st.sampled_from(["NOTE", *SSE_NAME, *RAW.values()]),
    st.fixed_dictionaries(
        {
            "agent": TEXTS,
            "message": TEXTS,
            "text": TEXTS,
            "payload": st.dictionaries(
                TEXTS,
                st.recursive(
                    TEXTS
                    | st.none()
                    | st.booleans()
                    | st.floats(allow_nan=False, allow_infinity=False)
                    # So many as JSON's readers agree on.
                    | st.integers(-(2**53), 2**53),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
                    max_leaves=5,
                ),
                max_size=3,
            ),
        }
    ),
)
def test_whatever_a_worker_says_is_passed_on_live_as_it_is_later(
    kind: type[AnyEvent], name: str, fields: dict[str, Any]
) -> None:
    assert same_live(msgspec.convert({**fields, "type": events.tag(kind), "name": name}, kind))


def test_a_delta_is_a_thread_message_whose_text_the_sdk_can_see() -> None:
    told = only(said(events.TextDelta), attempt=2)
    assert told.event == "thread.message.delta"
    assert told.types == {"LLM_PARTIAL", "thread.message.delta"}
    assert told.data == {
        "delta": "Pa\u2028",
        "message": "Pa\u2028",
        "workflow_id": QUESTION.id,
        "agent_id": "final_output",
        "seq": 7,
        "stream_id": told.id,
        "attempt": 2,
        "type": "thread.message.delta",
    }
    assert event_body(entry(said(events.TextDelta)))[0]["message"] == "Pa\u2028"


def test_a_delta_of_nobody_has_an_empty_agent_because_the_ui_asks_for_it() -> None:
    assert only(events.TextDelta(text="x")).data["agent_id"] == ""


def test_an_output_carries_its_usage_as_metadata() -> None:
    told = only(said(events.TextCompleted))
    assert told.event == "thread.message.completed"
    assert told.data == {
        "response": "Paris.",
        "message": "Paris.",
        "workflow_id": QUESTION.id,
        "agent_id": "final_output",
        "seq": 7,
        "stream_id": told.id,
        "attempt": 1,
        "type": "thread.message.completed",
        "metadata": {
            "tokens_used": 300,
            "input_tokens": 200,
            "output_tokens": 100,
            "cost_usd": 0.006,
            "model_used": "gpt-5-mini-2025-08-07",
            "provider": "openai",
            "duration_ms": 12,
        },
    }
    assert "metadata" not in only(events.TextCompleted(text="bare")).data


@pytest.mark.parametrize(
    ("event", "name", "more"),
    [
        (ASKING, "workflow.pausing", {"message": "The task is being paused.", "reason": "lunch"}),
        (said(events.Paused), "workflow.paused", {"message": "Task paused.", "checkpoint": "pre_synthesis"}),
        (events.Paused(), "workflow.paused", {"message": "Task paused.", "checkpoint": ""}),
        (events.Resumed(), "workflow.resumed", {"message": "Task resumed."}),
    ],
)
def test_control_events_have_the_contracts_small_shape(event: AnyEvent, name: str, more: dict[str, str]) -> None:
    told = only(event)
    assert told.event == name
    assert told.data == {"workflow_id": QUESTION.id, "agent_id": "orchestrator", **more}


def test_a_cancel_is_announced_and_only_its_end_moves_the_cursor() -> None:
    first, last = frame(entry(said(events.Cancelled)))
    assert (first.event, first.id) == ("workflow.cancelling", "")
    assert first.types == {"workflow.cancelling", "WORKFLOW_CANCELLING"}
    assert (last.event, last.id) == ("workflow.cancelled", entry(STARTED).id)
    assert last.data == {
        "workflow_id": QUESTION.id,
        "agent_id": "orchestrator",
        "message": "Task cancelled.",
        "reason": "enough",
    }
    announced, done = event_body(entry(said(events.Cancelled)), stream=True)
    assert announced["type"] == "WORKFLOW_CANCELLING"
    assert "seq" not in announced
    assert "stream_id" not in announced
    assert (done["type"], done["seq"]) == ("WORKFLOW_CANCELLED", 7)
    assert event_body(entry(said(events.Cancelled))) == [done]


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (said(events.Failed), "TASK_STATUS_FAILED"),
        (said(events.Errored), "TASK_STATUS_FAILED"),
        (said(events.TimedOut), "TASK_STATUS_TIMEOUT"),
    ],
)
def test_a_failure_is_an_error_frame_with_the_whole_event(event: Any, status: str) -> None:
    told = only(event)
    assert told.event == "error"
    assert told.data == event_body(entry(event))[0]
    assert told.data["type"] == "ERROR_OCCURRED"
    assert told.data["message"] == event.error
    assert told.data["payload"] == {"status": status}


@pytest.mark.parametrize(
    ("event", "payload"),
    [
        (said(events.ToolCalled), {"tool": "search", "call_id": "c1", "params": {"q": "x"}}),
        (
            said(events.ToolReturned),
            {"tool": "search", "call_id": "c1", "success": True, "duration_ms": 5, "output": "y" * 3000},
        ),
        (events.ToolReturned(tool="t"), {"tool": "t", "success": True, "duration_ms": 0, "output": None}),
        (said(events.Progressed), {"plan": [1], "progress": 0.5}),
        (said(events.ApprovalRequested), {"risk": "high", "approval_id": "ap1", "reason": "Deploy?"}),
        (said(events.ApprovalDecided), {"approval_id": "ap1", "approved": False}),
        (said(events.Noted), {"level": "warn"}),
        (said(events.PlanUpdated), {"round": 1}),
        (said(events.Restated), {"status": "TASK_STATUS_COMPLETED"}),
        (events.Restated(internal_status="x"), None),
        (
            said(events.Requeued),
            {
                "attempt": 1,
                "reason": "requeued",
                "delay_seconds": 2.5,
                "next_attempt_at": clock(entry(said(events.Requeued)).at + 2_500_000),
            },
        ),
        (said(events.LeaseLost), {"attempt": 1, "reason": "lease_lost"}),
        (STARTED, {"attempt": 1}),
    ],
)
def test_machines_find_what_they_need_in_the_payload(event: AnyEvent, payload: object) -> None:
    assert only(event).data.get("payload") == payload


def test_a_tools_message_is_short_however_long_its_output() -> None:
    assert only(said(events.ToolReturned)).data["message"] == "y" * 2000


def test_the_orchestrator_speaks_for_the_task_and_agents_for_themselves() -> None:
    assert only(STARTED).data["agent_id"] == "orchestrator"
    assert only(said(events.ToolCalled)).data["agent_id"] == "a"
    assert "agent_id" not in only(said(events.Noted)).data


def test_an_events_own_message_is_told() -> None:
    assert only(events.Started(worker="w", message="Off we go")).data["message"] == "Off we go"


def test_a_worker_may_note_a_name_that_upstream_maps_and_gets_its_shape() -> None:
    told = only(events.Noted(name="WORKFLOW_PAUSED", payload={"checkpoint": "c", "workflow_id": "forged"}))
    assert told.event == "workflow.paused"
    assert told.data["workflow_id"] == QUESTION.id
    assert told.data["checkpoint"] == "c"
    assert only(events.Noted(name="LLM_OUTPUT", message="m")).data["response"] == "m"


def test_every_mapped_name_is_one_that_the_table_knows() -> None:
    assert set(SSE_NAME) - {"WORKFLOW_CANCELLING"} <= set(RAW.values())


# Control frames


def test_done_is_the_literal_and_its_id_marks_the_end() -> None:
    told = control(Ended(last_id="5-1", seq=3))
    assert (told.event, told.data, told.id) == ("done", "[DONE]", "5-1.end")
    assert told.types == {"done", "STREAM_END"}
    assert control(Ended(last_id="", seq=3)).id == ""


@pytest.mark.parametrize("reason", ["trimmed", "ahead", "unknown"])
def test_a_gap_carries_the_snapshot_from_which_the_stream_goes_on(reason: str) -> None:
    snapshot = folded(STARTED, events.TextDelta(text="Par", agent="final_output"), events.TextDelta(text="is"))
    told = control(Gap(reason=reason, earliest=2, latest=9, snapshot=snapshot))
    assert (told.event, told.id) == ("gap", snapshot.fields["last_event_id"])
    assert isinstance(told.data, dict)
    assert told.data["type"] == "gap"
    assert told.data["message"]
    assert (told.data["reason"], told.data["earliest_seq"], told.data["latest_seq"]) == (reason, 2, 9)
    shown = told.data["snapshot"]
    assert shown["texts"] == {"final_output": "Par", "": "is"}
    assert (shown["last_seq"], shown["last_event_id"], shown["status"]) == (4, told.id, "TASK_STATUS_RUNNING")


# Errors


def every_error(kind: type[TaskcastError] = TaskcastError) -> set[type[TaskcastError]]:
    return {kind}.union(*(every_error(child) for child in kind.__subclasses__() if child.__module__ == errors.__name__))


def test_every_error_of_the_tree_has_a_status_and_a_sentence() -> None:
    expected = {
        errors.TaskcastError: 500,
        errors.Invalid: 400,
        errors.TooLarge: 413,
        errors.Unauthorized: 401,
        errors.Forbidden: 403,
        errors.Gone: 410,
        errors.Forbidden: 403,
        errors.NotFound: 404,
        errors.Conflict: 409,
        errors.Stale: 409,
        errors.OutOfOrder: 409,
        errors.Unavailable: 503,
        errors.Full: 503,
        errors.Misconfigured: 500,
    }
    assert set(expected) == every_error()
    for kind, status in expected.items():
        answered, body = error_body(kind("the sentence"))
        assert answered == status
        assert isinstance(body["error"], str)
        assert body["error"]


def test_the_inside_never_leaks() -> None:
    for kind in (errors.Unavailable, errors.Misconfigured, TaskcastError):
        assert "valkey.sock" not in str(error_body(kind("cannot connect to /data/valkey.sock")))
    assert error_body(errors.Unauthorized("key sk_1 is unknown")) == (401, {"error": "Unauthorized"})
    assert error_body(errors.Full("The store is full."))[1] == {"error": "The store is full."}


def test_a_conflict_about_a_status_says_which() -> None:
    assert error_body(Conflict("task is not paused", "running")) == (
        409,
        {
            "error": "task is not paused",
            "success": False,
            "message": "task is not paused",
            "status": "TASK_STATUS_RUNNING",
        },
    )
    assert error_body(Conflict("other body")) == (409, {"error": "other body"})


@pytest.mark.parametrize(
    ("verb", "status", "sentence"),
    [
        ("pause", Status.COMPLETED, "cannot pause completed task"),
        ("pause", Status.FAILED, "cannot pause failed task"),
        ("pause", Status.ERRORED, "cannot pause failed task"),
        ("pause", Status.CANCELLED, "cannot pause cancelled task"),
        ("pause", Status.TIMED_OUT, "cannot pause timed out task"),
        ("pause", Status.PAUSED, "task is already paused"),
        ("pause", Status.HELD, "task is already paused"),
        ("resume", Status.RUNNING, "task is not paused"),
        ("resume", Status.QUEUED, "task is not paused"),
        ("resume", Status.TIMED_OUT, "cannot resume timed out task"),
        ("resume", Status.PAUSED, "ours"),
        ("resume", Status.HELD, "ours"),
        ("retry", Status.COMPLETED, "cannot retry completed task"),
        ("retry", Status.PAUSED, "task has not ended"),
    ],
)
def test_a_refused_control_speaks_upstreams_words(verb: str, status: Status, sentence: str) -> None:
    assert str(refused(verb, Conflict("ours", status.value))) == sentence


def test_times_are_utc_with_microseconds() -> None:
    assert clock(0) == "1970-01-01T00:00:00.000000Z"
    assert clock(AT + 1) == "2025-10-22T10:30:00.000001Z"
