"""The xpander dialect's pure part: every status, event and error has a spelling, and a stale echo changes nothing."""

import itertools
import json
from typing import Any, get_args

import pytest
from msgspec.structs import replace

from app import errors, events
from app.agents import Agent
from app.api.xpander.models import Invocation, Listing, Metrics, Paging, Rejected, Report, Tokens, Update, Word, checked
from app.api.xpander.spelling import (
    ASKED,
    NEWER,
    STATUS,
    activity,
    connected,
    control,
    error_body,
    frame,
    frame_extended,
    input_body,
    measured,
    messages,
    pushed,
    report_of,
    reported,
    restated,
    result_of,
    secrets,
    submission,
    task_body,
    task_item,
    tokens_of,
    turn,
    usage_of,
)
from app.errors import Invalid, NotFound, TaskcastError
from app.events import AnyEvent, Json, Restated, Submission, Usage
from app.frames import encode
from app.identity import Identity
from app.log import Message
from app.seam import Ended, Gap, Reached
from app.task import STORED, TERMINAL, Status, Task, task
from tests.api.lives import INVOCATION, LIVES, QUESTION, SAMPLES, STARTED, USAGE, entry, folded, happened

WHO = Identity(org="org", user="user", key="key_1")
AGENT = Agent(
    id="writer", org="org", name="Writer", provider="anthropic", model="m-1", effort="low", queue="agent:writer"
)
SAFE = {
    *("task_created", "task_updated", "task_finished", "chunk", "tool_call_request", "tool_call_result"),
    *("sub_agent_trigger", "think", "analyze", "plan_updated", "auth_event", "task_compactization"),
}
"""Contract §4."""
WHOLE = {
    *("id", "agent_id", "organization_id", "input", "status", "internal_status", "last_executed_node_id"),
    *("agent_version", "created_at", "started_at", "paused_at", "finished_at", "result", "parent_execution"),
    *("sub_executions", "finished_sub_executions", "is_manually_stopped", "payload_extension", "hitl_request"),
    *("pending_eca_request", "source", "worker_id", "additional_context", "expected_output", "instructions_override"),
    *("test_run_node_id", "is_orchestration", "output_format", "voice_id", "output_schema", "events_streaming"),
    *("used_mutating_tools", "is_continuous", "mcp_servers", "triggering_agent_id", "title", "think_mode"),
    *("disable_attachment_injection", "deep_planning", "execution_attempts", "user_tokens", "user_oidc_token"),
    *("return_metrics", "tokens", "llm_model_provider", "llm_model_name", "llm_reasoning_effort"),
    *("should_update_parent", "conversation_id", "conversation_kind", "execution_kind", "is_gateway", "is_app"),
    *("background_auth_eligible", "tool_call_limit", "must_deep_plan", "harness_cli", "permission_mode"),
    *("used_tools", "duration"),
}
"""Contract §2.1, every row of the table."""


def lived(*said: AnyEvent, question: Submission = INVOCATION) -> Task:
    return task(folded(*said, question=question).fields)


def stored(status: Status) -> Task:
    return lived(*LIVES[status])


# Status


def test_every_stored_status_has_one_of_the_seven_words() -> None:
    assert set(STATUS) == set(STORED)
    assert set(STATUS.values()) == set(get_args(Word))
    assert set(itertools.chain.from_iterable(ASKED.values())) == set(STORED)
    assert ASKED["paused"] == (Status.PAUSED, Status.HELD)
    assert ASKED["failed"] == (Status.FAILED, Status.TIMED_OUT)
    assert ASKED["error"] == (Status.ERRORED,)


# Requests


def invoked(**body: Any) -> Invocation:
    return checked(Invocation, {"input": {"text": "q"}} | body, "body")


def asked(**body: Any) -> Submission:
    return submission(invoked(**body), AGENT, WHO, source="api", kind="agent", version="1")


def test_an_input_alone_is_enough() -> None:
    made = asked(input={})
    assert (made.query, made.title, made.context, made.user, made.parent, made.trigger) == ("", "", {}, "", "", "")
    assert (made.org, made.owner, made.agent, made.queue) == ("org", "user", "writer", "agent:writer")
    assert (made.dialect, made.source, made.session) == ("xpander", "api", made.id)
    assert (made.llm_provider, made.llm_model, made.llm_effort) == ("anthropic", "m-1", "low")
    assert asked().id != asked().id
    events.encode(events.Submitted(task=made))


def test_null_is_as_good_as_absent_and_unknown_keys_are_ignored() -> None:
    nulls = asked(**dict.fromkeys(set(Invocation.model_fields) - {"input"}), configuration={"a": 1}, unheard_of=1)
    random = {"id", "session", "submission"}
    assert [getattr(nulls, name) for name in Submission.__struct_fields__ if name not in random] == [
        getattr(asked(), name) for name in Submission.__struct_fields__ if name not in random
    ]


def test_what_a_request_names_wins_over_the_agents_record() -> None:
    made = asked(llm_model_provider="openai", llm_model_name="gpt", llm_reasoning_effort="xhigh")
    assert (made.llm_provider, made.llm_model, made.llm_effort) == ("openai", "gpt", "xhigh")
    assert asked(source="webhook").source == "webhook"
    assert asked(source_node_type="slack").source == "slack"


def test_a_named_worker_has_its_own_queue_and_a_local_one_hands_nothing_out() -> None:
    assert asked(worker_id="w-1").queue == "worker:w-1"
    assert asked(worker_id="w-1", run_locally=True).queue == "local:w-1"
    assert asked(run_locally=True).queue == "agent:writer"


def test_what_a_request_says_is_read_back() -> None:
    said: Json = {
        "id": "conversation-thread-123",
        "input": {"text": "q", "files": ["u"], "user": {"id": "u1", "email": "a@b.c", "first_name": "Ada"}},
        "payload_extension": {"echo": {"steps": 2}},
        "parent_execution_id": "p1",
        "worker_id": "w-1",
        "output_format": "json",
        "output_schema": {"type": "array"},
        "additional_context": "more",
        "expected_output": "less",
        "title": "T",
        "triggering_agent_id": "planner",
        "events_streaming": True,
        "think_mode": "harder",
        "disable_attachment_injection": True,
        "instructions_override": "i",
        "test_run_node_id": "n",
        "return_metrics": True,
        "voice_id": "v",
        "tool_call_limit": 5,
        "harness_cli": "h",
        "permission_mode": "gated",
        "mcp_servers": [{"name": "m", "url": "https://m"}],
    }
    made = asked(**said)
    body = task_body(lived(question=made))
    renamed = {"parent_execution_id": "parent_execution", "payload_extension": "payload_extension"}
    for name, value in said.items():
        if name != "input":
            assert body[renamed.get(name, name)] == value, name
    assert body["input"]["text"] == "q"
    assert body["input"]["files"] == ["u"]
    assert body["input"]["user"]["display_name"] == "Ada"
    assert (made.user, made.output_schema) == ("u1", {"type": "array"})
    assert task_item(lived(question=made))["user_id"] == "u1"


def test_a_schema_binds_a_json_result_only() -> None:
    assert asked(output_schema={"type": "object"}).output_schema == {}
    assert asked(output_schema={"type": "object"}, output_format="json").output_schema == {"type": "object"}


def test_a_workflow_is_an_orchestration() -> None:
    made = submission(invoked(), AGENT, WHO, source="api", kind="workflow", version="1")
    assert task_body(lived(question=made))["is_orchestration"] is True
    assert task_body(lived(question=asked()))["is_orchestration"] is False


SECRET = "s3cret"
SERVER: Json = {
    "id": "m",
    "type": "remote",
    "name": "mail",
    "url": "https://m",
    "api_key": SECRET,
    "client_id": SECRET,
    "client_secret": SECRET,
    "headers": {"Authorization": SECRET},
    "env_vars": {"TOKEN": SECRET},
    "allowed_tools": ["send"],
}


def test_secrets_stand_in_no_event() -> None:
    said = invoked(user_tokens={"mail": SECRET}, user_oidc_token=SECRET, mcp_servers=[SERVER])
    first = submission(said, AGENT, WHO, source="api", kind="agent", version="1")
    next_ = turn(stored(Status.COMPLETED), said, AGENT, "user:u", kind="agent", version="1")
    for event in (events.Submitted(task=first), next_):
        assert SECRET.encode() not in events.encode(event)
    body = task_body(lived(question=first))
    assert (body["user_tokens"], body["user_oidc_token"]) == (None, None)
    kept = {"id": "m", "type": "remote", "name": "mail", "url": "https://m", "allowed_tools": ["send"]}
    assert body["mcp_servers"] == [kept]
    assert secrets(said) == {"user_tokens": {"mail": SECRET}, "user_oidc_token": SECRET, "mcp_servers": [SERVER]}
    assert secrets(invoked(mcp_servers=[kept])) == {}


@pytest.mark.parametrize(
    ("body", "place", "kind"),
    [
        ({"input": None}, ["input"], "model_type"),
        ({"input": "text"}, ["input"], "model_type"),
        ({"input": {"text": 7}}, ["input", "text"], "string_type"),
        ({"input": {"files": [7]}}, ["input", "files", 0], "string_type"),
        ({"input": {"user": {"id": "u"}}}, ["input", "user", "email"], "missing"),
        ({"input": {"user": {"email": None}}}, ["input", "user", "email"], "string_type"),
        ({"id": "no spaces"}, ["id"], "string_pattern_mismatch"),
        ({"id": "x" * 129}, ["id"], "string_pattern_mismatch"),
        ({"id": "new\nline\n"}, ["id"], "string_pattern_mismatch"),
        ({"parent_execution_id": ""}, ["parent_execution_id"], "string_pattern_mismatch"),
        ({"payload_extension": []}, ["payload_extension"], "dict_type"),
        ({"output_format": "html"}, ["output_format"], "literal_error"),
        ({"llm_reasoning_effort": "max"}, ["llm_reasoning_effort"], "literal_error"),
        ({"think_mode": "hard"}, ["think_mode"], "literal_error"),
        ({"mcp_servers": {}}, ["mcp_servers"], "list_type"),
        ({"events_streaming": "perhaps"}, ["events_streaming"], "bool_parsing"),
        ({"source": "x" * 257}, ["source"], "string_too_long"),
    ],
)
def test_a_bad_invocation_is_told_its_places(body: Json, place: list[str | int], kind: str) -> None:
    with pytest.raises(Rejected) as caught:
        invoked(**body)
    status, answer = error_body(caught.value)
    (told,) = answer["detail"]
    assert (status, told["loc"], told["type"]) == (422, ["body", *place], kind)
    assert isinstance(told["msg"], str)


def test_all_wrong_places_are_told_and_large_values_are_not_shown_again() -> None:
    with pytest.raises(Rejected) as caught:
        checked(Invocation, {"title": 7, "id": "x" * 2000}, "body")
    places = {tuple(one["loc"]): one for one in caught.value.places}
    assert set(places) == {("body", "input"), ("body", "title"), ("body", "id")}
    assert places["body", "title"]["input"] == 7
    assert "input" not in places["body", "id"]


def test_of_a_long_list_one_wrong_item_is_told() -> None:
    with pytest.raises(Rejected) as caught:
        checked(Invocation, {"input": {"files": [0] * 100_000}, "mcp_servers": [1] * 100_000}, "body")
    assert [place["loc"] for place in caught.value.places] == [
        ["body", "input", "files", 0],
        ["body", "mcp_servers", 0],
    ]


@pytest.mark.parametrize(
    ("query", "place"),
    [
        *(({"page": page}, "page") for page in ("0", "-1", "x", "")),
        *(({"per_page": size}, "per_page") for size in ("0", "51", "1.5")),
        *(({"status": word}, "status") for word in ("queued", "running", "cancelled", "PENDING", "")),
        ({"from_date": "yesterday"}, "from_date"),
        ({"to_date": ""}, "to_date"),
    ],
)
def test_a_bad_filter_is_told_its_place(query: dict[str, str], place: str) -> None:
    with pytest.raises(Rejected) as caught:
        checked(Paging, query, "query")
    assert [one["loc"] for one in caught.value.places] == [["query", place]]


def test_the_defaults_of_a_page_are_the_contracts() -> None:
    bare = checked(Paging, {}, "query")
    assert (bare.page, bare.per_page) == (1, 20)
    assert checked(Listing, {"status": "stopped", "page": "x"}, "query").status == "stopped"


# Turns


def test_a_turn_begins_with_what_its_request_says_alone() -> None:
    ended = lived(STARTED, events.Completed(result="Paris.", usage=USAGE), Restated(internal_status="x", title="Old"))
    said = turn(ended, invoked(input={"text": "And Spain?"}), AGENT, "user:user", kind="agent", version="1")
    found = lived(*LIVES[Status.COMPLETED], said)
    body = task_body(found)
    assert (body["status"], body["result"], body["finished_at"], body["title"]) == ("pending", None, None, None)
    assert (body["input"]["text"], body["input"]["user"], body["payload_extension"]) == ("And Spain?", None, None)
    assert (body["think_mode"], body["output_format"], body["internal_status"]) == ("default", "text", None)
    assert (body["started_at"], body["duration"], body["tokens"]) == (None, 0, None)
    assert task_item(found)["title"] == "And Spain?"
    assert body["created_at"] == task_body(ended)["created_at"]
    assert (body["llm_model_provider"], body["llm_model_name"]) == ("anthropic", "m-1")


def test_a_turns_tokens_count_beside_those_of_the_turns_before() -> None:
    ended = stored(Status.COMPLETED)
    assert tokens_of(ended) == {"prompt_tokens": 200, "completion_tokens": 100, "total_tokens": 300}
    found = lived(*LIVES[Status.COMPLETED], turn(ended, invoked(), AGENT, "user:u", kind="agent", version="1"), STARTED)
    assert tokens_of(found) is None
    told = Tokens(prompt_tokens=200, completion_tokens=50)
    assert usage_of(told, found) == Usage(model="m-1", provider="anthropic", input_tokens=200, output_tokens=50)
    done = restated(found, Update.model_validate({"status": "completed", "tokens": {"prompt_tokens": 200}}), "user:u")
    assert done is not None
    again = lived(
        *LIVES[Status.COMPLETED], turn(ended, invoked(), AGENT, "user:u", kind="agent", version="1"), STARTED, done
    )
    assert tokens_of(again) == {"prompt_tokens": 200, "completion_tokens": 0, "total_tokens": 200}
    assert again.input_tokens == 400


# Tasks


@pytest.mark.parametrize("question", [QUESTION, INVOCATION], ids=["shannon", "xpander"])
@pytest.mark.parametrize("status", STORED)
def test_a_whole_task_has_every_key_and_never_the_one_on_which_the_sdk_fails(
    status: Status, question: Submission
) -> None:
    found = lived(*LIVES[status], question=question)
    body = task_body(found)
    assert set(body) == WHOLE
    assert body["status"] == STATUS[status]
    assert body["result"] is None or isinstance(body["result"], str)
    assert (body["finished_at"] is not None) == (status in TERMINAL)
    assert (body["paused_at"] is not None) == (body["status"] == "paused")
    assert body["is_manually_stopped"] == (status is Status.CANCELLED)
    assert all(body[name] is not None for name in ("created_at", "source", "input", "background_auth_eligible"))
    json.dumps(body)
    item = task_item(found)
    assert set(item) == {
        *("id", "agent_id", "user_id", "parent_task_id", "triggering_agent_id", "organization_id", "status"),
        *("created_at", "updated_at", "source_node_type", "result", "title"),
    }
    assert (item["id"], item["status"], item["result"]) == (body["id"], body["status"], body["result"])


@pytest.mark.parametrize(
    ("said", "result"),
    [
        ((), None),
        (LIVES[Status.COMPLETED], "Paris."),
        ((STARTED, events.Completed()), ""),
        ((STARTED, events.Completed(result='{"a": 1}', result_type="json")), '{"a": 1}'),
        (LIVES[Status.ERRORED], "ValueError: no such city"),
        (LIVES[Status.TIMED_OUT], "The task exceeded its deadline."),
        (LIVES[Status.CANCELLED], None),
        ((STARTED, Restated(result="half"), Restated(to="errored", result="boom")), "boom"),
        ((STARTED, Restated(result="half"), Restated(to="cancelled")), "half"),
    ],
)
def test_a_result_is_a_text_or_null(said: tuple[AnyEvent, ...], result: str | None) -> None:
    assert result_of(lived(*said)) == result


def test_sub_tasks_are_told_with_those_that_ended() -> None:
    body = task_body(stored(Status.RUNNING), [("a", Status.RUNNING), ("b", Status.TIMED_OUT), ("c", Status.COMPLETED)])
    assert (body["sub_executions"], body["finished_sub_executions"]) == (["a", "b", "c"], ["b", "c"])


def test_a_task_that_its_parent_took_along_was_not_stopped_by_hand() -> None:
    body = task_body(lived(events.Cancelled(actor="taskcast")))
    assert (body["status"], body["is_manually_stopped"]) == ("stopped", False)


def test_a_user_is_told_with_a_name() -> None:
    for given, name in (
        ({"email": "a@b.c"}, "a@b.c"),
        ({"email": "a@b.c", "first_name": "Ada", "last_name": "Lovelace"}, "Ada Lovelace"),
        ({"email": "a@b.c", "last_name": "Lovelace"}, "Lovelace"),
        ({"email": ""}, ""),
    ):
        user = input_body(lived(question=asked(input={"user": given})))["user"]
        assert user["display_name"] == name
        assert user.keys() >= {"id", "first_name", "last_name", "additional_attributes", "timezone", "email"}


def test_a_native_handlers_wait_is_a_hitl_request() -> None:
    approval = events.ApprovalRequested(approval="deploy", reason="Deploy?")
    body = task_body(lived(STARTED, approval))
    assert (body["status"], body["hitl_request"]) == ("paused", {"wait_node_id": "deploy"})
    body = task_body(lived(STARTED, events.ReviewRequested(plan="1. Ask.", version=1)))
    assert body["hitl_request"] == {"wait_node_id": "1"}
    decided = events.ApprovalDecided(approval="deploy", approved=True)
    assert task_body(lived(STARTED, approval, decided))["hitl_request"] is None


# A PATCH

WORDS = ("pending", "executing", "paused", "error", "failed", "completed", "stopped")
PATCHED: dict[Status, tuple[str, ...]] = {
    Status.QUEUED: ("", "running", "paused", "errored", "failed", "completed", "cancelled"),
    Status.RUNNING: ("", "", "paused", "errored", "failed", "completed", "cancelled"),
    Status.PAUSED: ("queued", "running", "", "errored", "failed", "completed", "cancelled"),
    Status.HELD: ("queued", "running", "", "errored", "failed", "completed", "cancelled"),
    **dict.fromkeys(sorted(TERMINAL), ("", "", "held", "", "", "", "")),
}
"""Stored status → what each of the words moves it to; empty: nowhere (contract §3.5)."""


@pytest.mark.parametrize(
    ("status", "word", "to"),
    [(status, word, to) for status, row in PATCHED.items() for word, to in zip(WORDS, row, strict=True)],
)
def test_a_stated_status_moves_a_task_or_is_ignored(status: Status, word: str, to: str) -> None:
    found = stored(status)
    event = restated(found, Update.model_validate({"status": word, "result": "late"}), "user:u")
    if to:
        assert event is not None
        assert event.to == to
        moved = lived(*LIVES[status], event)  # the table takes it
        assert STATUS[moved.status] == word
        if status in TERMINAL:
            assert task_body(moved)["result"] is None
    elif status in TERMINAL:
        assert event is None
    else:  # the status is an echo, the result is not
        assert event is not None
        assert (event.to, event.result) == ("", "late")


def test_a_pickup_that_comes_after_the_lease_was_lost_waits_for_another_worker() -> None:
    found = lived(STARTED, events.LeaseLost())
    assert restated(found, Update.model_validate({"status": "executing", "result": None}), "user:u") is None


@pytest.mark.parametrize("question", [QUESTION, INVOCATION], ids=["shannon", "xpander"])
@pytest.mark.parametrize("status", STORED)
def test_the_echo_of_a_whole_task_changes_nothing(status: Status, question: Submission) -> None:
    found = lived(*LIVES[status], question=question)
    for echo in (task_body(found), {**task_body(found), "used_tools": [], "is_manually_stopped": False}):
        assert restated(found, Update.model_validate(echo), "user:u") is None


@pytest.mark.parametrize("ended", sorted(TERMINAL))
@pytest.mark.parametrize("seen", [Status.QUEUED, Status.RUNNING])
def test_a_stale_echo_of_an_ended_task_changes_nothing(ended: Status, seen: Status) -> None:
    """As a worker sends it that has not heard of a stop: its own word and result, and what it knew from before."""
    said = {**task_body(stored(seen)), "result": "late", "tokens": {"prompt_tokens": 7, "completion_tokens": 7}}
    for word in ("executing", "completed", "error", "failed"):
        assert restated(stored(ended), Update.model_validate({**said, "status": word}), "user:u") is None


def test_an_echo_does_not_answer_for_the_human_for_whom_a_task_waits() -> None:
    waits = lived(STARTED, events.ApprovalRequested(approval="deploy", reason="?"))
    for seen in (Status.QUEUED, Status.RUNNING):
        assert restated(waits, Update.model_validate(task_body(stored(seen))), "user:u") is None
    other = restated(waits, Update.model_validate({"hitl_request": {"wait_node_id": "mine"}}), "user:u")
    assert other is None


@pytest.mark.parametrize("word", ["completed", "executing"])
def test_an_explicit_null_clears_a_result_and_an_absent_one_keeps_it(word: str) -> None:
    found = lived(STARTED, Restated(result="half"))
    cleared = restated(found, Update.model_validate({"status": word, "result": None}), "user:u")
    assert cleared is not None
    assert cleared.result == ""
    assert (result_of(lived(STARTED, Restated(result="half"), cleared)) or None) is None
    kept = restated(found, Update.model_validate({"status": word}), "user:u")
    assert kept is None or kept.result == "half"


def test_what_was_said_before_the_end_is_the_answer_in_the_conversation() -> None:
    found = lived(STARTED, Restated(result="Paris."))
    for said in ({"status": "completed"}, {"status": "completed", "result": "Paris."}):
        event = restated(found, Update.model_validate(said), "user:u")
        assert event is not None
        assert (event.to, event.result) == ("completed", "Paris.")


def test_a_patch_keeps_what_nobody_here_reads_and_forgets_it_when_it_is_taken_back() -> None:
    plan = {"enabled": True, "enforce": False, "started": True, "question_raised": False, "tasks": []}
    said = {
        "deep_planning": plan,
        "last_executed_node_id": "n",
        "hitl_request": {"wait_node_id": "w"},
        "source": "api2",
    }
    first = restated(stored(Status.RUNNING), Update.model_validate(said), "user:u")
    assert first is not None
    assert (first.to, first.result, first.stated, first.version) == ("", None, said, 1)
    found = lived(*LIVES[Status.RUNNING], first)
    assert {name: task_body(found)[name] for name in said} == said
    assert restated(found, Update.model_validate(said), "user:u") is None
    back = restated(found, Update.model_validate({"hitl_request": None, "source": None}), "user:u")
    assert back is not None
    assert back.stated == {name: value for name, value in said.items() if name != "hitl_request"}


def test_a_tool_calls_extension_is_added_to_the_tasks() -> None:
    said = {"tool_call_payload_extension": {"b": 2}}
    event = restated(stored(Status.RUNNING), Update.model_validate(said), "user:u")
    assert event is not None
    assert event.stated == {"payload_extension": {"tone": "short", "b": 2}}


def test_a_patch_never_moves_what_a_task_is() -> None:
    found = stored(Status.RUNNING)
    said = dict.fromkeys(("id", "agent_id", "organization_id", "created_at", "started_at", "finished_at"), "other")
    said |= {"parent_execution": "other", "llm_model_name": "other", "events_streaming": "other"}
    assert restated(found, Update.model_validate(said), "user:u") is None


def test_a_workers_last_word_is_refused_for_as_little_as_possible() -> None:
    said = {"status": "completed", "result": 42, "internal_status": "x" * 300, "tokens": {"prompt_tokens": None}}
    event = restated(stored(Status.RUNNING), Update.model_validate(said), "user:u")
    assert event is not None
    assert (event.result, event.internal_status) == ("42", "x" * 255)


# Reports


def test_a_report_is_a_task_that_no_worker_gets_and_its_end() -> None:
    said = Report.model_validate(
        {"id": None, "input": "q", "is_success": True, "result": "r", "tokens": {"prompt_tokens": 3}, "duration": 1.5}
        | {"used_tools": ["search"], "llm_response": [1]}
    )
    made = reported(said, AGENT, WHO)
    assert made.queue.startswith("local:")
    end = report_of(lived(question=made), said, "user:u")
    assert end is not None
    body = task_body(lived(end, question=made))
    assert (body["status"], body["result"], body["duration"], body["used_tools"]) == ("completed", "r", 1.5, ["search"])
    assert body["tokens"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    assert body["source"] == "sdk"
    assert report_of(lived(end, question=made), said, "user:u") is None


def test_a_report_of_no_success_is_a_failure() -> None:
    said = Report.model_validate({"id": "r1", "is_success": False, "result": "no"})
    made = reported(said, AGENT, WHO)
    end = report_of(lived(question=made), said, "user:u")
    assert end is not None
    assert (end.to, result_of(lived(end, question=made))) == ("failed", "no")


def test_reported_tokens_count_once_whoever_tells_them_first() -> None:
    said = Metrics.model_validate({"llm_tokens": {"worker": {"prompt_tokens": 3, "completion_tokens": 4}}})
    first = measured(stored(Status.RUNNING), said, "user:u")
    assert first is not None
    found = lived(*LIVES[Status.RUNNING], first)
    assert found.total_tokens == 7
    assert measured(found, said, "user:u") is None
    done = restated(
        found,
        Update.model_validate({"status": "completed", "tokens": {"prompt_tokens": 3, "completion_tokens": 4}}),
        "user:u",
    )
    assert done is not None
    ended = lived(*LIVES[Status.RUNNING], first, done)
    assert ended.total_tokens == 7
    assert measured(ended, said, "user:u") is None


# Frames


def told(event: AnyEvent, *, extended: bool = False) -> list[Json]:
    one = happened(event, question=INVOCATION)
    bodies = [one.data for one in (frame_extended(one) if extended else frame(one))]
    assert all(isinstance(body, dict) for body in bodies)
    return [body for body in bodies if isinstance(body, dict)]


KINDS: dict[type[AnyEvent], list[str]] = {
    events.Submitted: ["task_created"],
    events.Continued: ["task_created"],
    events.Completed: ["task_finished"],
    events.Failed: ["task_finished"],
    events.Errored: ["task_finished"],
    events.Cancelled: ["task_finished"],
    events.TimedOut: ["task_finished"],
    events.Restated: ["task_finished"],  # the sample completes the task
    events.TextDelta: ["chunk"],
    events.TextCompleted: [],
    events.AgentStarted: [],
    events.AgentCompleted: [],
    events.Deleted: [],
    events.ToolCalled: ["tool_call_request"],
    events.ToolReturned: ["tool_call_result"],
    events.Thinking: ["think"],
    events.PlanUpdated: ["plan_updated"],
    events.ChildSubmitted: ["sub_agent_trigger"],
    events.Noted: [],
}
"""Design §9; all others are `task_updated`."""


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: type(event).__name__)
def test_every_event_has_the_frames_of_the_design(event: AnyEvent) -> None:
    bodies = told(event)
    assert [body["type"] for body in bodies] == KINDS.get(type(event), ["task_updated"])
    for body in bodies:
        assert body["type"] in SAFE
        assert set(body) == {"type", "task_id", "organization_id", "time", "data"}
        assert (body["task_id"], body["organization_id"]) == (INVOCATION.id, "org")
        if body["type"].startswith("task_"):
            assert set(body["data"]) == WHOLE
            assert (body["type"] == "task_finished") == (body["data"]["finished_at"] is not None)
            if body["type"] == "task_created":
                assert body["data"]["status"] == "pending"


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: type(event).__name__)
def test_a_frame_is_one_line_of_data_and_nothing_else(event: AnyEvent) -> None:
    one = happened(event, question=INVOCATION)
    for extended in (False, True):
        for each in frame(one, extended=extended):
            raw = encode(each)
            assert raw.startswith(b'data: {"type":')
            assert raw.endswith(b"}\n\n")
            assert raw.count(b"\n") == 2
            assert raw.isascii()


def test_text_is_a_plain_string() -> None:
    (chunk,) = told(events.TextDelta(text="Pa\u2028", agent="final_output"))
    assert chunk["data"] == "Pa\u2028"


def test_a_tools_call_and_return_have_the_contracts_keys() -> None:
    keys = {
        "request_id",
        "operation_id",
        "tool_call_id",
        "graph_node_id",
        "tool_name",
        "payload",
        "reasoning",
        "plan_task_id",
    }
    (call,) = told(events.ToolCalled(tool="search", call="c1", params={"q": "x"}))
    assert set(call["data"]) == keys
    assert (call["data"]["tool_name"], call["data"]["payload"], call["data"]["request_id"]) == (
        "search",
        {"q": "x"},
        "c1",
    )
    (result,) = told(events.ToolReturned(tool="search", call="c1", success=False, output="no"))
    assert set(result["data"]) == {*keys, "result", "is_error", "approval_request_id"}
    assert (result["data"]["result"], result["data"]["is_error"]) == ("no", True)


def test_what_is_stated_after_the_end_is_told_to_nobody_but_a_new_beginning_is() -> None:
    ended = LIVES[Status.COMPLETED]

    def after(event: AnyEvent) -> list[str]:
        one = replace(entry(event, 4), after=folded(*ended, event, question=INVOCATION).fields)
        return [each.data["type"] for each in frame(one) if isinstance(each.data, dict)]

    assert after(Restated(internal_status="archived")) == []
    assert after(Restated(stated={"used_tools": ["a"]}, version=1)) == []
    assert after(Restated(to="held")) == ["task_updated"]


def test_types_that_only_the_newest_sdk_knows_are_told_to_those_who_ask() -> None:
    note = events.Noted(name="CONTEXT_STATUS", payload={"data": {"percent": 5}})
    assert told(note) == []
    assert [(body["type"], body["data"]) for body in told(note, extended=True)] == [("context_status", {"percent": 5})]
    child = events.ChildSubmitted(task=QUESTION)
    assert [body["type"] for body in told(child, extended=True)] == ["sub_agent_trigger", "sub_task_created"]
    assert told(events.Noted(name="BUDGET_THRESHOLD", payload={}), extended=True) == []
    hello = connected("org", "t", 0).data
    assert isinstance(hello, dict)
    assert (hello["type"], hello["task_id"]) == ("connected", "t")


PUSHES: dict[str, Any] = {
    "chunk": "Pa",
    "tool_call_request": {
        "request_id": "r",
        "operation_id": "o",
        "tool_call_id": "c",
        "tool_name": "t",
        "payload": {"a": 1},
    },
    "tool_call_result": {
        "request_id": "r",
        "operation_id": "o",
        "tool_name": "t",
        "payload": 1,
        "result": [1],
        "is_error": True,
    },
    "sub_agent_trigger": {"agent_id": "a", "query": "q", "files": [], "reasoning": {"title": "", "description": ""}},
    "think": {"request_id": "r", "operation_id": "think", "payload": {"input": {"title": "T", "thought": "hm"}}},
    "analyze": {"request_id": "r", "operation_id": "analyze", "payload": {"input": {"title": "T", "analysis": "ah"}}},
    "plan_updated": {"enabled": True, "tasks": [{"id": "1", "title": "Ask", "completed": False}]},
    "auth_event": {"type": "login_required", "data": {"url": "https://a"}},
    "task_compactization": {"type": "summarization", "data": {"tokens": 5}},
    **{kind: {"n": 1} for kind in sorted(NEWER)},
}


@pytest.mark.parametrize("kind", PUSHES)
def test_what_a_worker_pushes_comes_back_as_it_was(kind: str) -> None:
    event = pushed(kind, PUSHES[kind], "user:u")
    assert event is not None
    (body,) = told(event, extended=True)
    assert body["type"] == kind
    data = PUSHES[kind]
    if isinstance(data, dict):
        assert {name: body["data"].get(name) for name in data} == data
    else:
        assert body["data"] == data
    assert [body["type"] for body in told(event)] == ([kind] if kind in SAFE else [])


@pytest.mark.parametrize("kind", ["think", "analyze"])
def test_a_thought_may_be_a_text(kind: str) -> None:
    event = pushed(kind, "hm", "user:u")
    assert event is not None
    (body,) = told(event)
    assert body["data"]["operation_id"] == kind
    assert body["data"]["payload"]["input"]["thought"] == "hm"


def test_what_the_store_says_itself_needs_no_push_and_garbage_is_invalid() -> None:
    for kind in ("task_created", "task_updated", "task_finished", "connected"):
        assert pushed(kind, {}, "user:u") is None
    for kind in ("", "CHUNK", "task_started", "x" * 256, "STREAM_END"):
        with pytest.raises(Invalid, match="Unknown event type"):
            pushed(kind, {}, "user:u")


def test_a_gap_is_followed_by_the_task_as_it_stood_and_an_end_is_silence() -> None:
    snapshot = folded(*LIVES[Status.RUNNING], question=INVOCATION)
    shown = control(Gap(reason="trimmed", earliest=2, latest=9, snapshot=snapshot))
    assert shown is not None
    assert isinstance(shown.data, dict)
    assert (shown.data["type"], shown.data["data"]) == ("task_updated", task_body(task(snapshot.fields)))
    assert (shown.event, shown.id) == ("", "")
    assert control(Ended(last_id="5-1", seq=3)) is None
    assert control(Reached(cursor="5-1")) is None


# Conversations

CONVERSATION: tuple[AnyEvent, ...] = (
    events.Submitted(task=INVOCATION),
    events.ToolCalled(tool="search", call="c1", params={"q": "x"}),
    events.ToolReturned(tool="search", call="c1", output={"found": 1}),
    events.Completed(result="Paris.", usage=USAGE),
    events.Continued(query="And Spain?", submission="r2"),
    Restated(to="completed", result="Madrid."),
    events.Continued(query="And Atlantis?", submission="r3"),
    Restated(to="failed", result="no such place"),
)


def conversation() -> list[Message]:
    return [Message(seq, seq * 1_000_000, event) for seq, event in enumerate(CONVERSATION, 1)]


def test_a_thread_has_what_was_asked_and_answered_and_the_full_one_the_tools_too() -> None:
    found = stored(Status.COMPLETED)
    plain = messages(found, conversation(), full=False)
    assert [(one["role"], one["content"]) for one in plain] == [
        ("user", "What is the capital of France?"),
        ("assistant", "Paris."),
        ("user", "And Spain?"),
        ("assistant", "Madrid."),
        ("user", "And Atlantis?"),
    ]
    assert plain[0]["created_at"] == 1
    assert plain[1]["metrics"]["total_tokens"] == 300
    full = messages(found, conversation(), full=True)
    assert [one["role"] for one in full] == ["user", "assistant", "tool", "assistant", "user", "assistant", "user"]
    assert full[1]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "search", "arguments": '{"q":"x"}'}}
    ]
    assert (full[2]["tool_call_id"], full[2]["content"], full[2]["tool_call_error"]) == ("c1", '{"found":1}', False)
    assert len({one["id"] for one in full}) == 7
    assert {len(one) for one in full} == {len(plain[0])}


def test_an_activity_log_has_the_conversation_with_its_tools() -> None:
    log = activity(stored(Status.COMPLETED), conversation())
    assert (log["id"], log["user"]["email"]) == (INVOCATION.id, "ada@example.com")
    assert [one.get("role", one.get("tool_name")) for one in log["messages"]] == [
        *("user", "search", "search", "agent", "user", "agent", "user")
    ]
    assert log["messages"][0]["content"] == {"text": "What is the capital of France?", "files": []}
    assert log["messages"][2]["result"] == {"found": 1}
    assert all(one["id"] and one["created_at"].endswith("Z") for one in log["messages"])


# Errors


def test_errors_are_a_detail_in_fastapis_shape() -> None:
    assert error_body(NotFound("Agent not found")) == (404, {"detail": "Agent not found"})
    assert error_body(NotFound()) == (404, {"detail": "Task not found"})
    assert error_body(errors.Unauthorized("sk_1 is unknown")) == (401, {"detail": "Invalid or missing API key"})
    status, body = error_body(Invalid("No."))
    assert (status, body) == (422, {"detail": [{"type": "value_error", "loc": ["body"], "msg": "No."}]})
    assert error_body(errors.TooLarge("Too much.")) == (413, {"detail": "Too much."})
    assert error_body(TaskcastError("a secret")) == (500, {"detail": "Internal server error"})
