"""The OpenAPI fragment of xpander.ai's document is the contract: what the real server answers is held against it, for
requests that it allows and for hostile ones, as schemathesis makes them up. The seed is fixed.

Taken as it stands, but for three things:

* It lists the answers 200 and 422; that a missing key is 401, the documents only say in their text. So 401 is added.
* `GET /v1/tasks` has the same parameters, with `agent_id` among them, and the same answers (contract §1.1).
* Query parameters that it does not name are no fault: its own server, FastAPI, ignores them, and so do we. schemathesis
  knows that habit, and does not count them.
"""

import asyncio
import copy
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
import yaml
from jsonschema import Draft202012Validator
from msgspec import Struct, field
from schemathesis.config import SchemathesisConfig
from schemathesis.core import NOT_SET
from schemathesis.core.failures import Failure, FailureGroup, ServerError
from schemathesis.core.transport import Response
from schemathesis.engine import events, from_schema
from schemathesis.openapi.checks import JsonSchemaError, UndefinedContentType, UndefinedStatusCode
from schemathesis.specs.openapi.schemas import OpenApiSchema

from tests.system.conftest import KEY, Server, client_of
from tests.system.examples import SEEDS

Json = dict[str, Any]
LIST = "/v1/agents/{agent_id}/tasks"
WORDS = ("pending", "executing", "paused", "error", "failed", "completed", "stopped")
AGENT = "contract"
"""Nobody serves it."""
CHECKS = {
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("positive_data_acceptance", "negative_data_rejection", "unsupported_method", "ignored_auth"),
}
EXAMPLES = 40
"""Random ones for each route, beside some 80 at the bounds of what is allowed."""


def contract() -> Json:
    document: Json = yaml.safe_load((SEEDS / "agent_tasks.yaml").read_text())
    operation = document["paths"][LIST]["get"]
    refusal = {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]}
    content = {"application/json": {"schema": refusal}}
    operation["responses"]["401"] = {"description": "Invalid or missing API key", "content": content}
    every: Json = copy.deepcopy(operation)
    every["operationId"] = "Get_Tasks_v1_tasks_get"
    (agent,) = (one for one in every["parameters"] if one["name"] == "agent_id")
    agent |= {"in": "query", "required": False}
    document["paths"]["/v1/tasks"] = {"get": every}
    return document


class Outcome(Struct):
    """What a run of schemathesis came to."""

    failures: Counter[str] = field(default_factory=Counter)
    """The check, what it found, and the request."""
    checked: set[str] = field(default_factory=set)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Of the answers to GET, by route."""
    words: set[str] = field(default_factory=set)
    """In the rows of all lists."""


Doctor = Callable[[Json], Any]
"""Changes a list before it is looked at."""


def load(url: str, **more: Any) -> OpenApiSchema:
    told = {"base-url": url, "headers": {"x-api-key": KEY}, "seed": 5, "continue-on-failure": True, **more}
    return schemathesis.openapi.from_dict(contract(), config=SchemathesisConfig.from_dict(told))


def run(url: str, examples: int, *, bounds: bool, doctor: Doctor = lambda body: body, **more: Any) -> Outcome:
    """`bounds`: what stands at the bounds of each parameter as well, beside the random examples."""
    generation = {"deterministic": True, "max-examples": examples, "database": "none"}
    schema = load(url, generation=generation, phases={"coverage": {"enabled": bounds}}, **more)

    @schema.hook("after_call")
    def change(context: Any, case: Any, response: Response) -> None:
        if response.status_code == 200 and case.method == "GET":
            response.content = json.dumps(doctor(response.json())).encode()
            response._deserialized = NOT_SET

    outcome = Outcome()
    for event in from_schema(schema).execute():
        assert not isinstance(event, events.NonFatalError | events.FatalError), event
        if isinstance(event, events.ScenarioFinished):
            note(event, outcome)
    return outcome


def note(event: events.ScenarioFinished, outcome: Outcome) -> None:
    for id_, one in event.recorder.interactions.items():
        case = event.recorder.cases[id_].value
        if one.response is None or case.method != "GET":
            continue
        outcome.statuses[case.operation.path, one.response.status_code] += 1
        if one.response.status_code == 200 and isinstance(body := one.response.json(), dict):
            outcome.words |= {row["status"] for row in body.get("items", []) if isinstance(row, dict)}
    for id_, checks in event.recorder.checks.items():
        for check in checks:
            outcome.checked.add(check.name)
            if check.failure_info:
                failure, case = check.failure_info.failure, event.recorder.cases[id_].value
                outcome.failures[f"{check.name}: {failure.message} ({case.method} {case.as_curl_command()})"] += 1


@pytest.fixture(scope="module")
def url(server: Server) -> str:
    """Of a server that has an agent's tasks in every status."""

    async def make() -> None:
        async with client_of(server.url) as http:
            for word in WORDS:
                said = {"input": {"text": f"{word}?", "user": {"id": "ada", "email": "ada@example.com"}}}
                made = await http.post(f"/v1/agents/{AGENT}/invoke/async", json=said)
                assert made.status_code == 200, made.text
                change = {"status": word, "result": f"{word}!", "internal_status": "seen"}
                told = await http.patch(f"/agent-execution/{made.json()['id']}/update", json=change)
                assert (told.status_code, told.json()["status"]) == (200, word)

    asyncio.run(make())
    return server.url


def test_no_answer_breaks_the_contract_whatever_is_asked(url: str) -> None:
    outcome = run(url, EXAMPLES, bounds=True)
    assert not outcome.failures
    assert outcome.checked >= CHECKS
    assert {*outcome.statuses} == {(route, status) for route in (LIST, "/v1/tasks") for status in (200, 401, 422)}
    assert outcome.words == {*WORDS}  # the list of all agents' tasks has them


def test_an_agents_own_list_keeps_the_contract_with_tasks_in_every_status(url: str) -> None:
    outcome = run(url, EXAMPLES, bounds=False, parameters={"path.agent_id": AGENT})
    assert not outcome.failures
    assert outcome.statuses[LIST, 200]


# That the checks have teeth


def test_a_server_that_breaks_the_contract_would_be_noticed(url: str) -> None:
    outcome = run(url, 5, bounds=False, doctor=lambda body: body | {"page": str(body["page"])})
    assert outcome.failures
    assert {failure.partition(":")[0] for failure in outcome.failures} == {"response_schema_conformance"}


FAULTS: dict[str, Doctor] = {
    "no total": lambda body: {name: value for name, value in body.items() if name != "total"},
    "a plain array": lambda body: body["items"],
    "a word of another dialect": lambda body: each(body, status="running"),
    "no status": lambda body: each(body, status=None),
    "a result that is an object": lambda body: each(body, result={"text": "Paris"}),
    "a time that is a number": lambda body: each(body, created_at=1774226724),
    "a time that is none": lambda body: each(body, updated_at="yesterday"),
    "an agent that is null": lambda body: each(body, agent_id=None),
}


def each(body: Json, **changed: Any) -> Json:
    return body | {"items": [row | changed for row in body["items"]]}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_doctored_answer_is_refused(url: str, fault: str) -> None:
    case = load(url)[LIST]["GET"].Case(path_parameters={"agent_id": AGENT})
    response = case.call(headers={"x-api-key": KEY})
    case.validate_response(response)
    assert len(response.json()["items"]) == len(WORDS)
    response.content = json.dumps(FAULTS[fault](response.json())).encode()
    response._deserialized = NOT_SET
    with pytest.raises(FailureGroup) as refused:
        case.validate_response(response)
    assert {type(one) for one in refused.value.exceptions} == {JsonSchemaError}


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"status_code": 404}, UndefinedStatusCode),
        ({"status_code": 500}, ServerError),
        ({"headers": {"content-type": ["text/html"]}}, UndefinedContentType),
    ],
)
def test_a_doctored_status_or_content_type_is_refused(url: str, changed: Json, kind: type[Failure]) -> None:
    case = load(url)[LIST]["GET"].Case(path_parameters={"agent_id": AGENT})
    response = case.call(headers={"x-api-key": KEY})
    for name, value in changed.items():
        setattr(response, name, value)
    with pytest.raises(FailureGroup) as refused:
        case.validate_response(response)
    assert kind in {type(one) for one in refused.value.exceptions}


# Errors of all routes


def detail(places: Json | None = None) -> Json:
    """The fragment's own `HTTPValidationError`, in which nothing is required, made strict; else a sentence."""
    return {"type": "object", "properties": {"detail": places or {"type": "string"}}, "required": ["detail"]}


REFUSED: list[tuple[str, str, Any, list[str]]] = [
    ("GET", "/v1/tasks?per_page=51", None, ["query", "per_page"]),
    ("GET", "/v1/tasks?page=0", None, ["query", "page"]),
    ("GET", "/v1/tasks?status=running", None, ["query", "status"]),
    ("GET", "/v1/tasks?from_date=yesterday", None, ["query", "from_date"]),
    ("GET", "/v1/tasks/%00", None, ["path", "task_id"]),
    ("POST", "/v1/agents/a%20b/invoke", {"input": {}}, ["path", "agent_id"]),
    ("POST", "/v1/agents/a/invoke", None, ["body"]),
    ("POST", "/v1/agents/a/invoke/async", {}, ["body", "input"]),
    ("POST", "/v1/agents/a/invoke/stream", {"input": {"user": {"id": "ada"}}}, ["body", "input", "user", "email"]),
    ("POST", "/v1/workflows/a/invoke", {"input": {}, "output_format": "html"}, ["body", "output_format"]),
    ("POST", "/agent-execution/a", {"input": []}, ["body", "input"]),
]


@pytest.mark.parametrize(("method", "path", "body", "place"), REFUSED)
def test_what_does_not_fit_is_refused_at_its_place(
    url: str, method: str, path: str, body: Json | None, place: Json
) -> None:
    document = contract()
    errors = {"type": "array", "items": {"$ref": "#/components/schemas/ValidationError"}, "minItems": 1}
    schema = detail(errors) | {"components": document["components"]}
    answer = httpx.request(method, url + path, json=body, headers={"x-api-key": KEY})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/json")
    Draft202012Validator(schema).validate(answer.json())
    assert place in [one["loc"] for one in answer.json()["detail"]]


@pytest.mark.parametrize(
    ("status", "method", "path", "key"),
    [
        (401, "GET", "/v1/tasks", "sk_wrong"),
        (401, "GET", "/agents/list", "sk_wrong"),
        (404, "GET", "/v1/tasks/nobody", KEY),
        (404, "DELETE", "/v1/tasks/nobody", KEY),
        (404, "GET", "/v1/tasks/nobody/thread/full", KEY),
        (404, "GET", "/v1/agents/never-used", KEY),
        (404, "GET", "/another-organisation/agent-execution/nobody/status", KEY),
        (404, "GET", "/v1/nowhere", KEY),
    ],
)
def test_other_errors_are_a_sentence(url: str, status: int, method: str, path: str, key: str) -> None:
    answer = httpx.request(method, url + path, headers={"x-api-key": key})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    Draft202012Validator(detail()).validate(answer.json())
