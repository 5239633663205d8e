"""The examples of xpander.ai's documents, run as they are written: only the host, the key and the ids differ.

Of the page about lists the commands stand in `seeds/`, word for word. The page about one task reached us as bare text,
which lost its commands and kept their sentences: "poll until `status` is no longer pending or executing", "`fromjson`
when you explicitly requested JSON output". The commands here do what the sentences say.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.system.conftest import KEY
from tests.system.examples import Desk, example, needs
from tests.waiting import wait_until

pytestmark = needs("bash", "curl", "jq")

Json = dict[str, Any]
ECHO = "echo"
"""The agent whose tasks the demo worker answers."""

ASK = 'curl -s -H "x-api-key: <your-api-key>" "https://api.xpander.ai/v1/tasks/<task-id>"'
POLL = """
while true; do
  status=$(ASK | jq -r .status)
  case "$status" in
    pending|executing) echo "$status"; sleep 0.2 ;;
    *) break ;;
  esac
done
echo "$status"
ASK | jq -r .result
""".replace("ASK", ASK)
INVOKE = """
curl -s -X POST -H "x-api-key: <your-api-key>" -H "Content-Type: application/json" \\
  "https://api.xpander.ai/v1/agents/<agent-id>/invoke/async" \\
  -d '<body>'
"""


async def shell(desk: Desk, text: str, **said: str) -> str:
    """What it prints, with our values in place of the document's."""
    for name, value in {"your_api_key": KEY, **said}.items():
        placeholder = f"<{name.replace('_', '-')}>"
        assert placeholder in text
        text = text.replace(placeholder, value)
    assert "<" not in text
    code, stdout, stderr = await desk.run("bash", "example.sh", text=f"set -eu -o pipefail\n{text}", name="example.sh")
    assert code == 0, stderr
    return stdout


async def invoked(desk: Desk, agent: str, body: Json) -> Json:
    found: Json = json.loads(await shell(desk, INVOKE, agent_id=agent, body=json.dumps(body)))
    return found


async def ended(http: httpx.AsyncClient, id_: str) -> bool:
    return (await http.get(f"/v1/tasks/{id_}")).json()["finished_at"] is not None


# Lists


@pytest.fixture
async def made(http: httpx.AsyncClient) -> AsyncIterator[list[str]]:
    """Six tasks of one agent, oldest first, of two users; one of them failed and one waits."""
    ids = []
    for number in range(6):
        body: Json = {"input": {"text": f"Reply with exactly {number}", "user": {"id": f"u{number % 2}", "email": ""}}}
        answer = await http.post("/v1/agents/lister/invoke/async", json=body)
        ids.append(answer.json()["id"])
        word = {2: "failed", 3: "pending"}.get(number, "completed")
        change = {"status": word, "result": None if word == "pending" else str(number)}
        assert (await http.patch(f"/agent-execution/{ids[-1]}/update", json=change)).json()["status"] == word
    yield ids
    for id_ in ids:
        assert (await http.delete(f"/v1/tasks/{id_}")).status_code == 204


async def test_all_tasks_of_an_agent_come_newest_first_and_in_pages(desk: Desk, made: list[str]) -> None:
    page = json.loads(await shell(desk, example("list.sh"), agent_id="lister"))
    assert [row["id"] for row in page["items"]] == [made[5], made[4]]
    assert {name: page[name] for name in page if name != "items"} == {
        "total": 6,
        "page": 1,
        "per_page": 2,
        "total_pages": 3,
    }
    row = page["items"][0]
    assert row == {
        "id": made[5],
        "agent_id": "lister",
        "user_id": "u1",
        "parent_task_id": None,
        "triggering_agent_id": None,
        "organization_id": "00000000-0000-0000-0000-000000000001",
        "status": "completed",
        "source_node_type": "api",
        "created_at": row["created_at"],
        "updated_at": row["updated_at"],
        "title": "Reply with exactly 5",
        "result": "5",
    }
    assert row["created_at"] < row["updated_at"]


async def test_the_examples_filters_choose_by_status_and_by_user(desk: Desk, made: list[str]) -> None:
    page = json.loads(await shell(desk, example("list_by_status.sh"), agent_id="lister"))
    assert [row["id"] for row in page["items"]] == [made[5], made[4], made[1], made[0]]
    assert (page["total"], page["per_page"], page["total_pages"]) == (4, 10, 1)
    page = json.loads(await shell(desk, example("list_by_user.sh"), agent_id="lister", user_id="u0"))
    assert [row["id"] for row in page["items"]] == [made[4], made[2], made[0]]


# One task


async def test_the_polling_loop_ends_with_the_task(desk: Desk) -> None:
    body = {"input": {"text": "one two three"}, "payload_extension": {"echo": {"steps": 3, "delay_ms": 500}}}
    task = await invoked(desk, ECHO, body)
    assert task["status"] == "pending"  # as it was accepted, though a worker waits
    assert (task["result"], task["output_format"], task["source"]) == (None, "text", "api")
    *waited, status, result = (await shell(desk, POLL, task_id=task["id"])).splitlines()
    assert waited
    assert {*waited} <= {"pending", "executing"}
    assert (status, result) == ("completed", "one two three")


async def test_a_task_that_failed_or_was_stopped_ends_the_loop_as_well(desk: Desk, http: httpx.AsyncClient) -> None:
    failing = {"input": {"text": "why?"}, "payload_extension": {"echo": {"fail": "No reason."}}}
    task = await invoked(desk, ECHO, failing)
    assert (await shell(desk, POLL, task_id=task["id"])).splitlines()[-2:] == ["failed", "No reason."]
    task = await invoked(desk, "nobody", {"input": {"text": "why?"}})
    assert (await http.post(f"/v1/tasks/{task['id']}/stop")).json()["status"] == "stopped"
    assert (await shell(desk, POLL, task_id=task["id"])).splitlines() == ["stopped", "null"]


async def test_a_json_result_is_a_text_that_fromjson_reads(desk: Desk, http: httpx.AsyncClient) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    body = {"input": {"text": "The capital of France?"}, "output_format": "json", "output_schema": schema}
    task = await invoked(desk, "geographer", body)
    assert (task["output_format"], task["output_schema"]) == ("json", schema)
    claim = {"worker": "w", "queues": ["agent:geographer"], "wait_seconds": 5}
    (claimed,) = (await http.post("/worker/v1/claim", json=claim)).json()["tasks"]
    finish = {"fence": claimed["fence"], "n": 1, "result": {"city": "Paris", "since": 987}}
    assert (await http.post(f"/worker/v1/tasks/{task['id']}/finish", json=finish)).status_code == 200
    assert await shell(desk, f"{ASK} | jq -r '.result | fromjson | .city'", task_id=task["id"]) == "Paris\n"
    assert await shell(desk, f"{ASK} | jq -r '.result | type'", task_id=task["id"]) == "string\n"


async def test_an_id_that_is_used_again_continues_its_task(desk: Desk, http: httpx.AsyncClient) -> None:
    id_ = "conversation-thread-123"
    first = await invoked(desk, ECHO, {"id": id_, "input": {"text": "Reply with exactly FIRST"}})
    await wait_until(lambda: ended(http, id_), "the first turn ends")
    second = await invoked(desk, ECHO, {"id": id_, "input": {"text": "Reply with exactly SECOND"}})
    assert (first["id"], second["id"]) == (id_, id_)
    assert second["created_at"] == first["created_at"]
    await shell(desk, POLL, task_id=id_)
    task = json.loads(await shell(desk, ASK, task_id=id_))
    assert (task["status"], task["result"]) == ("completed", "Reply with exactly SECOND")
    assert task["input"]["text"] == "Reply with exactly SECOND"
    assert task["created_at"] <= task["started_at"] <= task["finished_at"]
    rows = (await http.get("/v1/tasks", params={"agent_id": ECHO, "per_page": 50})).json()["items"]
    (row,) = (row for row in rows if row["id"] == id_)
    assert (row["title"], row["result"]) == ("Reply with exactly SECOND", "Reply with exactly SECOND")


FIELDS = (
    *("id", "agent_id", "organization_id", "input", "status", "result", "output_format", "created_at", "started_at"),
    *("finished_at", "source", "think_mode", "hitl_request", "llm_model_provider", "llm_model_name"),
    *("llm_reasoning_effort", "events_streaming", "sub_executions", "parent_execution", "payload_extension"),
)


async def test_a_task_has_every_field_that_the_page_names(desk: Desk) -> None:
    effective = {"llm_model_provider": "openai", "llm_model_name": "gpt-4.1", "llm_reasoning_effort": "high"}
    asked = {"input": {"text": "why?"}, "think_mode": "harder", "output_format": "markdown", **effective}
    task = await invoked(desk, "fields", asked)
    shown = json.loads(await shell(desk, ASK, task_id=task["id"]))
    assert shown.keys() >= {*FIELDS}
    assert shown.items() >= {"think_mode": "harder", "output_format": "markdown", **effective}.items()
