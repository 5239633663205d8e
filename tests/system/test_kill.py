"""`kill -9` of the API, the worker and Valkey, at random moments, in the middle of 200 tasks.

Every task that was accepted is there and ended exactly once. A client that heard nothing asks again under its
Idempotency-Key, so that also the tasks whose answer got lost are one each.
"""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.system.conftest import Api, Worker, client_of, history, lifetime, taskcast
from tests.waiting import wait_until

TASKS = 200
KILLS = ("api", "worker", "valkey") * 2
CLIENTS = 8
SECONDS_MAX = 60
QUICK = {"TASKCAST_LEASE_SECONDS": "1", "TASKCAST_GRACE_SECONDS": "1"}
ENDS = {"WORKFLOW_COMPLETED", "WORKFLOW_CANCELLED", "ERROR_OCCURRED"}


@pytest.fixture
def own_worker(tmp_path: Path) -> Iterator[Worker]:
    yield from lifetime(Worker("killed-worker", tmp_path, **QUICK))


@pytest.fixture
def own_api(tmp_path: Path, own_worker: Worker) -> Iterator[Api]:
    yield from lifetime(Api("killed-api", tmp_path, **QUICK))


async def submit(http: httpx.AsyncClient, number: int) -> str:
    """Asks until it has heard an answer. The task's id."""
    body = {"query": f"Task number {number} of the many", "context": {"echo": {"steps": 4, "delay_ms": 40}}}
    while True:
        with contextlib.suppress(httpx.TransportError):
            response = await http.post("/api/v1/tasks", json=body, headers={"Idempotency-Key": f"kill-{number}"})
            if response.status_code == 200:
                id_: str = response.json()["task_id"]
                return id_
            assert response.status_code == 503, response.text
        await asyncio.sleep(0.05)


async def submit_all(http: httpx.AsyncClient) -> dict[int, str]:
    """Task number → id, from several clients at a time."""
    numbers = iter(range(TASKS))
    accepted: dict[int, str] = {}

    async def some() -> None:
        for number in numbers:
            accepted[number] = await submit(http, number)

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(some())
    return accepted


async def count(http: httpx.AsyncClient, *states: str) -> int:
    """-1: nobody answers."""
    with contextlib.suppress(httpx.TransportError):
        response = await http.get("/api/v1/tasks", params={"status": ",".join(states), "limit": 1})
        if response.status_code == 200:
            return int(response.json()["total_count"])
    return -1


async def ended(http: httpx.AsyncClient) -> int:
    return await count(http, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


async def kill(victim: str, folder: Path, api: Api, worker: Worker) -> None:
    """And starts it again; Valkey is started again by its users."""
    if victim == "valkey":
        os.kill(int((folder / "data" / "valkey.pid").read_text()), signal.SIGKILL)
        return
    process = api if victim == "api" else worker
    await asyncio.to_thread(process.kill)
    await asyncio.to_thread(process.start)


@pytest.mark.timeout(180)
async def test_every_accepted_task_ends_once_whoever_is_killed(
    tmp_path: Path, own_api: Api, own_worker: Worker
) -> None:
    async with client_of(own_api.url) as http:
        submitting = asyncio.create_task(submit_all(http))
        victims = random.sample(KILLS, len(KILLS))
        goals = sorted(random.sample(range(5, TASKS * 9 // 10), len(KILLS)))
        for victim, goal in zip(victims, goals, strict=True):

            async def reached(goal: int = goal) -> bool:
                return await ended(http) >= goal

            await wait_until(reached, f"{goal} tasks have ended", seconds_max=SECONDS_MAX)
            await kill(victim, tmp_path, own_api, own_worker)
        accepted = await submitting
        assert len(set(accepted.values())) == TASKS

        async def all_ended() -> bool:
            return await ended(http) == TASKS

        await wait_until(all_ended, "all tasks have ended", seconds_max=SECONDS_MAX)
        assert await count(http, "QUEUED", "RUNNING", "PAUSED") == 0
        for number, id_ in accepted.items():
            await check(http, id_, f"Task number {number} of the many")
    own_api.stop()
    own_worker.stop()
    verified = await taskcast("verify", "--data", str(tmp_path / "data"))
    assert verified.returncode == 0, verified.stdout


async def check(http: httpx.AsyncClient, id_: str, query: str) -> None:
    response = await http.get(f"/api/v1/tasks/{id_}")
    assert response.status_code == 200, f"{id_} was accepted, and is not there"
    task = response.json()
    assert task["query"] == query
    log = await history(http, id_)
    assert [event["seq"] for event in log] == list(range(1, task["last_seq"] + 1)), f"{id_} has a hole"
    assert [event for event in log if event["type"] in ENDS] == log[-1:], f"{id_} ends once, and nothing follows"
    if task["status"] == "TASK_STATUS_COMPLETED":
        assert task["result"] == query
        last = max(place for place, event in enumerate(log) if event["type"] == "WORKFLOW_STARTED")
        assert "".join(event["message"] for event in log[last:] if event["type"] == "LLM_PARTIAL") == query
    else:  # three attempts at least, each of which met a kill
        assert task["status"] == "TASK_STATUS_FAILED"
        assert len([event for event in log if event["type"] == "WORKFLOW_STARTED"]) >= 3
