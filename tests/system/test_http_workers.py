"""The README's workers in other languages, run as they stand there: a real server, and nothing of ours beside them."""

import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from tests.system.conftest import ROOT, Process, Server, client_of, ended, history, lifetime, running, status, submit
from tests.waiting import wait_until

README = (ROOT / "README.md").read_text(encoding="utf-8")
QUERY = 'Words * of "two"\nlines \\n, ünd $more'
WORDS = QUERY.split()
LONG = "word " * 400
"""Takes a worker that does not hear of its cancel longer than a test may last."""


def block(first: str) -> str:
    """The one that begins with this line."""
    (found,) = re.findall(rf"^```\w+\n({re.escape(first)}.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Without workers of our own: they would take the tasks."""
    yield from lifetime(Server("server-alone", tmp_path_factory.mktemp("alone")))


@pytest.fixture
async def http(alone: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(alone.url) as client:
        yield client


@pytest.fixture(
    params=[("sh", "worker.sh", "# worker.sh: "), ("node", "worker.mjs", "// worker.mjs: ")], ids=["sh", "js"]
)
def worker(request: pytest.FixtureRequest, alone: Server, tmp_path: Path) -> Iterator[str]:
    """Its name, while it runs."""
    program, name, first = request.param
    for needed in (program, "curl", "jq"):
        if not shutil.which(needed):
            pytest.skip(f"not installed: {needed}")
    (tmp_path / name).write_text(block(first), encoding="utf-8")
    process = Process(f"{program}-worker", [program, str(tmp_path / name)], tmp_path, TASKCAST_URL=alone.url)
    process.start()
    assert process.running
    with process.running as started:
        try:
            yield program
            assert started.poll() is None, "it works until it is stopped"
        finally:
            os.killpg(started.pid, signal.SIGKILL)  # with the shell's own children, one of which waits for a task


async def test_a_task_is_streamed_and_completed(worker: str, http: httpx.AsyncClient) -> None:
    id_ = await submit(http, QUERY)
    await wait_until(lambda: ended(http, id_), "the task has ended")
    task = (await http.get(f"/api/v1/tasks/{id_}")).json()
    assert (task["status"], task["result"]) == ("TASK_STATUS_COMPLETED", QUERY)
    told = await history(http, id_)
    assert "".join(event["message"] for event in told if event["type"] == "LLM_PARTIAL").split() == WORDS
    (output,) = [event for event in told if event["type"] == "LLM_OUTPUT"]
    assert output["message"] == QUERY


async def test_a_cancelled_task_is_left_and_the_next_one_taken(worker: str, http: httpx.AsyncClient) -> None:
    long = [await submit(http, LONG) for _ in range(1 if worker == "sh" else 4)]  # all that it works on at a time
    for id_ in long:
        await wait_until(lambda id_=id_: running(http, id_), "the task runs")  # type: ignore[misc]
        assert (await http.post(f"/api/v1/tasks/{id_}/cancel")).json()["success"] is True
    id_ = await submit(http, "next")
    await wait_until(lambda: ended(http, id_), "the next task has ended")
    assert await status(http, id_) == "TASK_STATUS_COMPLETED"
    for id_ in long:
        assert await status(http, id_) == "TASK_STATUS_CANCELLED"
