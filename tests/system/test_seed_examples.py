"""The examples of Shannon's document, run as they are written: only the task's id and the port differ.

They stand in `seeds/`, word for word, with the indentation that the document lost. A `.py3` file is foreign code that
our formatter and type checker leave alone. Some are parts of a page and use what the page defined above them; so they
are run as a reader would who pastes one below the other.
"""

import asyncio
import hashlib
import json
import re
import shutil
from collections.abc import AsyncIterator
from typing import NamedTuple

import httpx
import pytest

from tests.system.conftest import KEY, Server, client_of, ended, history, running, submit
from tests.system.examples import NODE_MODULES, SEEDS, Desk, Outcome, example, needs
from tests.waiting import wait_until

# SHA-256 of each example without its white space, as it occurs in its document: Shannon's, or xpander's.
FINGERPRINTS = {
    "agent_tasks.yaml": "462d3d88c5b70136",
    "backoff.py3": "e184e1e069a8712d",
    "batch.py3": "b889ccdf7afb0b4d",
    "cache.py3": "a6e047f969c72821",
    "check.sh": "0cd923e73bdf49f9",
    "extract_task_info.py3": "820f3950d5db3647",
    "get_status.js": "17bcfd383b9c3a9b",
    "list.sh": "55a472cdd3907b66",
    "list_by_status.sh": "fcc8e0a625fea463",
    "list_by_user.sh": "d877b1053c4fc967",
    "main.go": "5540d606836294b4",
    "match.py3": "c1741aced84c94cb",
    "monitor.sh": "e8ce20d7f0667de0",
    "poll.js": "7d144f502195f636",
    "poll.py3": "54ffcd435d7a1461",
    "status_check.py3": "eaa24f4027668680",
    "stream.py3": "89ab913996e4798e",
    "submit_and_wait.py3": "63fb417d8bb566b3",
    "summary.py3": "fdfd14ff0e58819e",
}

QUERY = "What is the capital of France, and since when has it been its capital?"
FAILURE = "LLM service unavailable: connection timeout"
ID = "task_abc123"
RUNS_MS = 1500
"""A task that an example waits for: longer than the example takes to start, shorter than its pause."""

needs_axios = pytest.mark.skipif(
    not shutil.which("node") or not (NODE_MODULES / "axios").is_dir(),
    reason="node, or axios in tests/system/node, is not installed",
)


def test_the_examples_are_the_documents_word_for_word() -> None:
    """By their fingerprints: the documents are not part of this repository."""
    examples = {file.name: "".join(file.read_text().split()) for file in SEEDS.iterdir()}
    assert {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in examples.items()} == FINGERPRINTS


def status_check(id_: str) -> str:
    """With which the page begins: it defines `get_task_status`, and uses it once."""
    return example("status_check.py3", task_abc123=id_)


def used(id_: str) -> str:
    """The names that some examples take from their reader."""
    return f"task_id, api_key = {id_!r}, {KEY!r}"


class Tasks(NamedTuple):
    """One in each state that does not pass."""

    completed: str
    failed: str
    cancelled: str
    timed_out: str


@pytest.fixture(scope="module")
def tasks(server: Server) -> Tasks:
    async def make() -> Tasks:
        async with client_of(server.url) as http:
            slow = {"echo": {"delay_ms": 60_000}}
            made = Tasks(
                await submit(http, QUERY),
                await submit(http, QUERY, context={"echo": {"fail": FAILURE}}),
                await submit(http, QUERY, context=slow),
                await submit(http, QUERY, context=slow, timeout_seconds=1),
            )
            assert (await http.post(f"/api/v1/tasks/{made.cancelled}/cancel")).json()["success"]
            for id_ in made:
                await wait_until(lambda id_=id_: ended(http, id_), f"{id_} ends")  # type: ignore[misc]
            return made

    return asyncio.run(make())


async def started(http: httpx.AsyncClient, ms: int = RUNS_MS) -> str:
    """A task that runs, and will for so long."""
    id_ = await submit(http, QUERY, context={"echo": {"steps": 3, "delay_ms": ms / 3}})
    await wait_until(lambda: running(http, id_), "the task runs")
    return id_


@pytest.fixture
async def endless(http: httpx.AsyncClient) -> AsyncIterator[str]:
    """A task that runs for as long as the test."""
    id_ = await started(http, 100_000)
    yield id_
    assert (await http.post(f"/api/v1/tasks/{id_}/cancel")).json()["success"]


# Look once


@needs("bash", "curl")
async def test_the_curl_command_shows_the_documents_fields(desk: Desk, tasks: Tasks) -> None:
    text = example("check.sh", task_01HQZX3Y9K8M2P4N5S7T9W2V=tasks.completed)
    body = json.loads((await desk.run("bash", "check.sh", text=text, name="check.sh")).stdout)
    assert (
        body
        | {
            "task_id": tasks.completed,
            "status": "TASK_STATUS_COMPLETED",
            "result": QUERY,
            "error": "",
            "query": QUERY,
            "mode": "EXECUTION_MODE_SIMPLE",
            "model_used": "echo-1",
            "provider": "taskcast",
        }
        == body
    )
    assert body.keys() >= {"response", "created_at", "updated_at", "session_id", "usage"}
    words = len(QUERY.split())
    assert body["usage"] | {"total_tokens": 2 * words, "input_tokens": words, "output_tokens": words} == body["usage"]
    assert isinstance(body["usage"]["estimated_cost"], float)


async def test_a_failed_and_a_running_task_have_the_documents_fields(
    http: httpx.AsyncClient, tasks: Tasks, endless: str
) -> None:
    always = {"task_id", "status", "response", "error", "created_at", "updated_at", "query", "session_id", "mode"}
    response = await http.get(f"/api/v1/tasks/{tasks.failed}")
    assert response.headers["X-Workflow-ID"] == tasks.failed
    body = response.json()
    assert body.keys() >= always
    assert (body["status"], body["response"], body["error"]) == ("TASK_STATUS_FAILED", None, FAILURE)
    body = (await http.get(f"/api/v1/tasks/{endless}")).json()
    assert body.keys() >= always
    assert (body["status"], body["response"], body["error"]) == ("TASK_STATUS_RUNNING", None, "")


async def test_the_errors_are_the_documents(http: httpx.AsyncClient) -> None:
    unknown = await http.get("/api/v1/tasks/task_01HQZX3Y9K8M2P4N5S7T9W2V")
    assert (unknown.status_code, unknown.json()) == (404, {"error": "Task not found"})
    stranger = await http.get("/api/v1/tasks/task_01HQZX3Y9K8M2P4N5S7T9W2V", headers={"X-API-Key": "sk_wrong"})
    assert (stranger.status_code, stranger.json()) == (401, {"error": "Unauthorized"})


async def test_python_status_check(desk: Desk, tasks: Tasks) -> None:
    assert await desk.python(status_check(tasks.completed)) == f"Status: TASK_STATUS_COMPLETED\nResult: {QUERY}\n"
    assert await desk.python(status_check("task_nobody")) == ""


@needs_axios
async def test_javascript_status_check(desk: Desk, tasks: Tasks) -> None:
    async def check(id_: str) -> Outcome:
        return await desk.run("node", "get.js", text=example("get_status.js", task_abc123=id_), name="get.js")

    assert await check(tasks.completed) == (0, f"Status: TASK_STATUS_COMPLETED\nResult: {QUERY}\n", "")
    assert await check(tasks.failed) == (0, "Status: TASK_STATUS_FAILED\n", f"Error: {FAILURE}\n")
    unknown = await check("task_nobody")
    assert unknown.code == 1  # it throws what it has caught
    assert unknown.stderr.startswith("Task not found\n")


async def test_python_summary_batch_cache_and_metadata(desk: Desk, tasks: Tasks, endless: str) -> None:
    five = [*tasks, endless]
    printed = await desk.python(
        status_check(tasks.completed),
        example("summary.py3", task_abc123=tasks.completed),
        example("batch.py3", **{f"task_{number}": id_ for number, id_ in enumerate(five, 1)}),
        example("cache.py3", task_abc123=tasks.completed),
        "print(status['status'])",
        example("extract_task_info.py3"),
        "import json",
        *(f"print(json.dumps(extract_task_info({id_!r}, {KEY!r})))" for id_ in (tasks.completed, tasks.failed)),
    )
    _, _, summary, *batch, cached, completed, failed = printed.splitlines()
    assert summary == f"COMPLETED: {QUERY[:50]}..."
    assert batch == [
        f"{id_}: TASK_STATUS_{word}"
        for id_, word in zip(five, ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "RUNNING"), strict=True)
    ]
    assert cached == "TASK_STATUS_COMPLETED"
    info = json.loads(completed)
    session = info.pop("session_id")
    assert session
    assert info == {
        "task_id": tasks.completed,
        "query": QUERY,
        "status": "TASK_STATUS_COMPLETED",
        "mode": "EXECUTION_MODE_SIMPLE",
        "has_result": True,
        "has_error": False,
        "workflow_url": f"http://localhost:8088/workflows/{tasks.completed}",
    }
    info = json.loads(failed)
    assert (info["has_result"], info["has_error"]) == (False, True)


async def test_python_match_knows_every_state(desk: Desk, tasks: Tasks, endless: str) -> None:
    five = [*tasks, endless]
    match = example("match.py3")
    printed = await desk.python(status_check(tasks.completed), *(f"{used(id_)}\n{match}" for id_ in five))
    assert printed.splitlines()[2:] == [
        f"Result: {QUERY}",
        f"Failed: {FAILURE}",
        "Task was cancelled",
        "Task timed out",
        "Task is running...",
    ]


# Poll


@pytest.mark.parametrize(
    ("state", "printed"),
    [
        ("failed", f"Error: Task failed: {FAILURE}\n"),
        ("cancelled", "Error: Task was cancelled\n"),
        ("timed_out", "Error: Task timed out\n"),
    ],
)
async def test_python_poll_ends_with_every_outcome(desk: Desk, tasks: Tasks, state: str, printed: str) -> None:
    assert await desk.python(example("poll.py3", task_abc123=getattr(tasks, state))) == printed


async def test_python_poll(desk: Desk, http: httpx.AsyncClient) -> None:
    assert await desk.python(example("poll.py3", task_abc123=await started(http))) == f"Result: {QUERY}\n"


async def test_python_submit_and_wait(desk: Desk) -> None:
    submitted, result = (await desk.python(example("submit_and_wait.py3"))).splitlines()
    assert re.fullmatch(r"Task submitted: task_\w+", submitted)
    assert result == "What is Python?"


async def test_python_poll_with_backoff(desk: Desk, http: httpx.AsyncClient) -> None:
    id_ = await started(http)
    printed = await desk.python(
        status_check(id_), example("backoff.py3"), used(id_), "print(poll_with_backoff(task_id, api_key)['result'])"
    )
    assert printed.splitlines()[-1] == QUERY


async def test_python_stream(desk: Desk, http: httpx.AsyncClient) -> None:
    """The document waits for an event that no server sends (TASK_COMPLETED): its loop ends with the stream."""
    id_ = await started(http)
    client = f"from shannon import ShannonClient\nclient = ShannonClient('http://localhost:8080', api_key={KEY!r})"
    printed = await desk.python(client, used(id_), example("stream.py3"), "client.close()")
    lines = [line.partition(" ") for line in printed.splitlines()]
    assert lines[-1][0] == "done"
    assert len(lines) == 1 + len(await history(http, id_))
    deltas = re.findall(r"^thread\.message\.delta (.*)$", printed, re.MULTILINE)
    assert "".join(deltas).split() == QUERY.split()


@needs_axios
async def test_javascript_poll(desk: Desk, http: httpx.AsyncClient, tasks: Tasks) -> None:
    async def poll(id_: str) -> Outcome:
        text = example("get_status.js", task_abc123=id_) + example("poll.js", task_abc123=id_)
        return await desk.run("node", "poll.js", text=text, name="poll.js")

    code, stdout, _ = await poll(await started(http))
    assert (code, stdout.splitlines()[-1]) == (0, f"Result: {QUERY}")
    code, _, stderr = await poll(tasks.failed)
    assert (code, sorted(stderr.splitlines())) == (0, [f"Error: {FAILURE}", f"Error: Task failed: {FAILURE}"])
    assert "Error: Task timed out\n" in (await poll(tasks.timed_out)).stderr


@needs("bash", "curl", "jq")
async def test_bash_monitor(desk: Desk, http: httpx.AsyncClient, tasks: Tasks) -> None:
    async def monitor(*ids: str) -> Outcome:
        return await desk.run("bash", "monitor.sh", *ids, text=example("monitor.sh"), name="monitor.sh")

    id_ = await started(http)
    code, stdout, stderr = await monitor(id_)
    lines = [re.sub(r"^\[\d\d:\d\d:\d\d\] ", "", line) for line in stdout.splitlines()]
    assert (code, stderr) == (0, "")
    assert [line for line in lines if line != "Status: TASK_STATUS_RUNNING"] == [
        f"Monitoring task: {id_}",
        "",
        "Status: TASK_STATUS_COMPLETED",
        "",
        "✓ Task completed!",
        "",
        QUERY,
    ]
    for id_, last in (
        (tasks.failed, f"✗ Task failed!\nError: {FAILURE}\n"),
        (tasks.cancelled, "✗ Task cancelled!\n"),
        (tasks.timed_out, "✗ Task timed out!\n"),
    ):
        code, stdout, _ = await monitor(id_)
        assert code == 1
        assert stdout.endswith(last)
    assert (await monitor()).code == 1


@needs("go")
@pytest.mark.timeout(120)
async def test_go(desk: Desk, http: httpx.AsyncClient, tasks: Tasks) -> None:
    async def go(id_: str) -> str:
        outcome = await desk.run("go", "run", "main.go", text=example("main.go", task_abc123=id_), name="main.go")
        assert outcome.code == 0, outcome.stderr
        return outcome.stdout

    # Compiles for the first time: a task that runs would not run so long.
    assert await go(tasks.failed) == f"Error: task failed: {FAILURE}\n"
    assert await go(await started(http)) == f"Result: map[result:{QUERY}]\n"
    assert await go(tasks.timed_out) == "Error: task timed out\n"
    assert await go("task_nobody") == "Error: task not found\n"
