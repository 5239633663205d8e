"""Agents over HTTP, as the Shannon dialect speaks of them, and what a task keeps of its agent."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import agents
from app.identity import DEVELOPMENT_ORG, DEVELOPMENT_USER
from app.settings import Settings
from app.store import Store
from app.task import Task
from tests.api.asking import Connect

AGENTS, TASKS = "/api/v1/agents", "/api/v1/tasks"


@pytest.fixture(params=[1, 3])
def settings(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    return Settings(data=tmp_path / "data", lease_seconds=2, grace_seconds=2, partitions=request.param)


async def stored(store: Store, id_: str) -> Task:
    task = await store.get(DEVELOPMENT_ORG, id_)
    assert task is not None
    return task


async def executed(client: httpx.AsyncClient, store: Store, agent: str, body: Any) -> Task:
    answer = await client.post(f"{AGENTS}/{agent}", json=body)
    assert answer.status_code == 202, answer.text
    return await stored(store, answer.json()["task_id"])


# Read


async def test_agents_are_listed_oldest_first_with_upstreams_fields_and_ours(
    client: httpx.AsyncClient, store: Store
) -> None:
    assert (await client.get(AGENTS)).json() == {"agents": [], "count": 0}
    await store.agents.used(DEVELOPMENT_ORG, "writer")
    await store.agents.save(
        DEVELOPMENT_ORG, "coder", name="Coder", provider="openai", model="m", effort="high", queue="q"
    )
    listed = (await client.get(AGENTS)).json()
    writer, coder = listed["agents"]
    assert listed["count"] == 2
    assert coder == {
        "id": "coder",
        "name": "Coder",
        "description": "",
        "category": "",
        "tool": "",
        "input_schema": {},
        "cost_per_call": 0.0,
        "provider": "openai",
        "model": "m",
        "effort": "high",
        "queue": "q",
        "version": 1,
    }
    assert (writer["id"], writer["name"], writer["queue"], writer["model"]) == ("writer", "writer", "agent:writer", "")
    assert (await client.get(f"{AGENTS}/coder")).json() == coder
    page = (await client.get(AGENTS, params={"limit": 1, "offset": 1})).json()
    assert page == {"agents": [coder], "count": 2}
    for wrong in ({"limit": 0}, {"limit": 1001}, {"offset": -1}, {"limit": "x"}):
        assert (await client.get(AGENTS, params=wrong)).status_code == 400


async def test_an_agent_is_its_organisations(client: httpx.AsyncClient, connect: Connect) -> None:
    other = await connect("ada", org="acme")
    assert (await client.post(f"{AGENTS}/writer", json={"input": "?"})).status_code == 202
    answer = await other.get(f"{AGENTS}/writer")
    assert (answer.status_code, answer.json()) == (404, {"error": "Agent not found"})
    assert (await other.get(AGENTS)).json()["count"] == 0
    assert (await client.get(f"{AGENTS}/writer")).status_code == 200
    nobody = await connect()
    for asked in (nobody.get(AGENTS), nobody.get(f"{AGENTS}/writer"), nobody.post(f"{AGENTS}/writer", json={})):
        assert (await asked).status_code == 401


@pytest.mark.parametrize("id_", ["a%20b", "a%0A", "%2A", "%C3%A4", "a%00", "x" * 129, "{p0}", "a%7Bb"])
async def test_what_is_no_id_names_nobody(client: httpx.AsyncClient, id_: str) -> None:
    for answer in (await client.get(f"{AGENTS}/{id_}"), await client.post(f"{AGENTS}/{id_}", json={"input": "?"})):
        assert (answer.status_code, answer.json()) == (400, {"error": "Invalid agent ID format"})
    assert (await client.get(AGENTS)).json()["count"] == 0


@pytest.mark.parametrize("id_", ["a%2Fb", ""])
async def test_what_is_no_single_part_of_a_path_is_not_found(client: httpx.AsyncClient, id_: str) -> None:
    assert (await client.get(f"{AGENTS}/{id_}")).status_code == 404
    assert (await client.get(AGENTS)).json()["count"] == 0


# Execute


async def test_an_execution_is_a_task_in_the_agents_queue(client: httpx.AsyncClient, store: Store) -> None:
    answer = await client.post(f"{AGENTS}/writer", json={"input": "why?", "session_id": "s-1", "stream": True})
    assert answer.status_code == 202
    body = answer.json()
    task = await stored(store, body["task_id"])
    assert body == {
        "task_id": task.id,
        "workflow_id": task.id,
        "agent_id": "writer",
        "status": "STATUS_CODE_OK",
        "created_at": (await client.get(f"{TASKS}/{task.id}")).json()["created_at"],
    }
    assert (answer.headers["X-Workflow-ID"], answer.headers["X-Session-ID"]) == (task.id, "s-1")
    assert (task.agent, task.queue, task.query, task.session) == ("writer", "agent:writer", "why?", "s-1")
    assert (task.dialect, task.owner, task.context) == ("shannon", DEVELOPMENT_USER, {})
    (claimed,) = await store.claim(["agent:writer"], "w", 1)
    assert claimed.task == task.id
    listed = (await client.get(TASKS, params={"agent_id": "writer"})).json()
    assert [one["task_id"] for one in listed["tasks"]] == [task.id]


@pytest.mark.parametrize(
    ("given", "query"),
    [
        ({"query": "q", "text": "t", "input": "i"}, "q"),
        ({"query": " ", "text": "t", "input": "i"}, "t"),
        ({"query": 5, "input": "i", "depth": [1]}, "i"),
        ({"symbol": "TSLA", "days": 5}, '{"symbol":"TSLA","days":5}'),
        ({}, "{}"),
    ],
)
async def test_an_object_is_the_context_and_holds_the_question(
    client: httpx.AsyncClient, store: Store, given: dict[str, Any], query: str
) -> None:
    task = await executed(client, store, "writer", {"input": given})
    assert (task.query, task.context) == (query, given)


async def test_an_execution_may_say_what_a_submission_may(client: httpx.AsyncClient, store: Store) -> None:
    body = {
        "input": {"query": "why?", "depth": 1, "role": "input"},
        "context": {"role": "context"},
        "mode": "complex",
        "priority": 2,
        "max_attempts": 7,
        "model_override": "m",
    }
    task = await executed(client, store, "writer", body)
    assert task.context == {"query": "why?", "depth": 1, "role": "context", "model_override": "m"}
    assert (task.mode, task.priority, task.max_attempts, task.llm_model) == ("complex", 2, 7, "m")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "Object missing required field `input`"),
        ({"query": "why?"}, "Object missing required field `input`"),
        ({"input": ""}, "Query is required"),
        ({"input": None}, "Expected `str | object`, got `null`"),
        ({"input": ["a"]}, "Expected `str | object`, got `array`"),
        ({"input": "a", "context": 5}, "Expected `object | null`, got `int`"),
        ([], "Expected `object`, got `array`"),
        ({"input": "a", "session_id": "a b"}, "Invalid session_id format"),
        ({"input": "a", "provider_override": "nobody"}, "Invalid provider_override"),
    ],
)
async def test_a_wrong_execution_is_400_and_makes_no_agent(client: httpx.AsyncClient, body: Any, sentence: str) -> None:
    answer = await client.post(f"{AGENTS}/writer", json=body)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]
    assert (await client.get(AGENTS)).json()["count"] == 0


async def test_an_idempotency_key_makes_one_task_of_one_agent(client: httpx.AsyncClient) -> None:
    key = {"Idempotency-Key": "k"}
    body = {"input": "why?"}
    answers = await asyncio.gather(*(client.post(f"{AGENTS}/writer", json=body, headers=key) for _ in range(5)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["task_id"] for answer in answers}) == 1
    assert len({answer.headers["X-Session-ID"] for answer in answers}) == 1
    assert [answer.headers.get("X-Idempotency-Cached") for answer in answers].count("true") == 4
    assert (await client.post(f"{AGENTS}/coder", json=body, headers=key)).status_code == 409
    assert (await client.post(f"{AGENTS}/writer", json={"input": "how?"}, headers=key)).status_code == 409
    assert (await client.post(TASKS, json={"query": "why?"}, headers=key)).status_code == 409


async def test_executions_at_once_make_one_agent(client: httpx.AsyncClient) -> None:
    await asyncio.gather(*(client.post(f"{AGENTS}/writer", json={"input": "why?"}) for _ in range(20)))
    listed = (await client.get(AGENTS)).json()
    assert (listed["count"], listed["agents"][0]["version"]) == (1, 1)


async def test_an_agent_beyond_the_bound_works_without_a_record(
    store: Store, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents, "AGENTS_MAX", len(store.partitions.tags))
    store.agents = agents.Agents(store.door, store.partitions)
    tasks = [await executed(client, store, f"a{i}", {"input": "?"}) for i in range(30)]
    assert [(task.agent, task.queue) for task in tasks] == [(f"a{i}", f"agent:a{i}") for i in range(30)]
    assert (await client.get(AGENTS)).json()["count"] == len(store.partitions.tags)


# What a task keeps


async def test_a_task_keeps_what_the_request_says_and_else_what_its_agent_says(
    client: httpx.AsyncClient, store: Store
) -> None:
    await store.agents.save(DEVELOPMENT_ORG, "writer", provider="openai", model="m", effort="low", queue="q")
    asked: list[tuple[dict[str, Any], tuple[str, str]]] = [
        ({"input": "?"}, ("openai", "m")),
        ({"input": "?", "model_override": " n "}, ("openai", "n")),
        ({"input": "?", "provider_override": "Groq"}, ("groq", "m")),
        ({"input": {"query": "?", "model_override": "n", "provider_override": "own"}}, ("own", "n")),
        ({"input": "?", "context": {"model_override": "n"}}, ("openai", "n")),
        # What is no text is for the worker to refuse.
        ({"input": "?", "context": {"model_override": 5, "provider_override": " "}}, ("openai", "m")),
    ]
    for body, wanted in asked:
        task = await executed(client, store, "writer", body)
        assert (task.llm_provider, task.llm_model) == wanted, body
        assert (task.llm_effort, task.queue) == ("low", "q")


async def test_a_change_of_the_agent_leaves_earlier_tasks_alone(client: httpx.AsyncClient, store: Store) -> None:
    await store.agents.save(DEVELOPMENT_ORG, "writer", model="m")
    task = await executed(client, store, "writer", {"input": "?"})
    await store.agents.save(DEVELOPMENT_ORG, "writer", model="n", queue="q")
    later = await executed(client, store, "writer", {"input": "?"})
    kept = await stored(store, task.id)
    assert (kept.llm_model, kept.queue) == ("m", "agent:writer")
    assert (later.llm_model, later.queue) == ("n", "q")
    await store.agents.delete(DEVELOPMENT_ORG, "writer")
    assert (await stored(store, later.id)).llm_model == "n"


async def test_a_plain_task_is_the_default_agents_and_makes_no_record(client: httpx.AsyncClient, store: Store) -> None:
    async def submitted(**more: Any) -> Task:
        answer = await client.post(TASKS, json={"query": "why?", **more})
        assert answer.status_code == 200
        return await stored(store, answer.json()["task_id"])

    task = await submitted(model_override="n", provider_override="groq")
    assert (task.agent, task.queue, task.llm_provider, task.llm_model) == ("default", "default", "groq", "n")
    assert (await submitted()).llm_model == ""
    assert (await client.get(AGENTS)).json()["count"] == 0
    await store.agents.save(DEVELOPMENT_ORG, "default", model="m", effort="high")
    task = await submitted(provider_override="groq")
    assert (task.llm_provider, task.llm_model, task.llm_effort, task.queue) == ("groq", "m", "high", "default")
    await store.agents.save(DEVELOPMENT_ORG, "default", queue="q")
    assert (await submitted()).queue == "q"
    answer = await client.post(f"{TASKS}/stream", json={"query": "why?"})
    assert (await stored(store, answer.json()["task_id"])).queue == "q"


async def test_a_model_name_that_nothing_could_keep_is_400(client: httpx.AsyncClient) -> None:
    for name in ("model_override", "provider_override"):
        answer = await client.post(TASKS, json={"query": "why?", "context": {name: "m" * 257}})
        assert (answer.status_code, answer.json()) == (400, {"error": f"{name} too long (max 256 characters)"})
    answer = await client.post(TASKS, json={"query": "why?", "model_override": "m" * 256})
    assert answer.status_code == 200
