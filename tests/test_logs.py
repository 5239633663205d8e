"""One structured line per decision: each is said once, with what an operator needs to find the task."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog

from app import events
from app.events import Submission
from app.settings import Settings
from app.store import Store
from tests.api.serving import served
from tests.waiting import wait_until

TASKS = "/api/v1/tasks"


async def test_what_was_decided_about_a_task_is_logged_with_its_id(store: Store, settings: Settings) -> None:
    with structlog.testing.capture_logs() as lines:
        async with served(store, settings, keep_days=1e-9) as server:
            made: Any = (await server.client.post(TASKS, json={"query": "why?"})).json()
            task = made["task_id"]
            await server.client.post(f"{TASKS}/{task}/pause", json={"reason": "lunch"})
            await server.client.post(f"{TASKS}/{task}/resume")
            await server.client.delete(f"{TASKS}/{task}")
            late: Any = (await server.client.post(TASKS, json={"query": "late", "timeout_seconds": 1})).json()

            def forgotten() -> bool:
                return any(line["event"] == "task.forgotten" for line in lines)

            async def passed() -> bool:
                await store.queues.tick()
                await store.queues.forget(0)
                return forgotten()

            await wait_until(passed, "the deadline passes and the task is forgotten")
    told = [(line["event"], line.get("task_id"), line.get("verb", line.get("consequence", ""))) for line in lines]
    assert [one for one in told if one[1] == task] == [
        ("task.submitted", task, ""),
        ("task.steered", task, "pause"),
        ("task.steered", task, "resume"),
        ("task.deleted", task, ""),
    ]
    assert [one for one in told if one[1] == late["task_id"]] == [
        ("task.submitted", late["task_id"], ""),
        ("task.due", late["task_id"], "timed_out"),
        ("task.forgotten", late["task_id"], ""),
    ]


async def test_a_lost_lease_is_logged(store: Store) -> None:
    await store.submit(Submission(id="t", org="o", query="?", submission="t"))
    await store.claim(["default"], "w", 1)
    with structlog.testing.capture_logs() as lines:
        (tag,) = store.partitions.tags
        await store.door.call("ZADD", f"tc:{{{tag}}}:leases", "XX", 1, "o/t")
        await store.queues.tick()
    (line,) = lines
    assert (line["event"], line["task_id"], line["consequence"]) == ("task.due", "t", events.tag(events.LeaseLost))


@pytest.mark.parametrize(("level", "said"), [("info", ["info", "warning"]), ("warning", ["warning"])])
def test_a_level_leaves_out_what_is_below_it(level: str, said: list[str]) -> None:
    program = f"from app.server import configure_logs, logger; configure_logs({level!r}); logger.info('a'); logger.warning('b')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [json.loads(line)["level"] for line in done.stderr.splitlines()] == said


def test_processes_that_share_an_output_do_not_tear_lines(tmp_path: Path) -> None:
    """Unbuffered, as in a container: the text and its newline are one write."""
    program = """
from app.server import configure_logs, logger
configure_logs("info")
for i in range(300):
    logger.info("line", number=i)
"""
    file = tmp_path / "log"
    with file.open("ab") as output:
        writers = [subprocess.Popen([sys.executable, "-u", "-c", program], stderr=output) for _ in range(3)]
        assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    lines = file.read_text().splitlines()
    assert len(lines) == 900
    assert all(json.loads(line)["event"] == "line" for line in lines)
