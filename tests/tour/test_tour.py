"""A tour of Taskcast: what it is for, in the order in which one meets it. Read it from top to bottom.

Over HTTP it is Shannon's API that speaks; the last two tests go through the door below it.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import httpx
import pytest
from httpx_sse import aconnect_sse

from app.events import Completed, Entry, Submission, TextDelta
from app.identity import DEVELOPMENT_KEY
from app.seam import Ended, Item
from app.server import listen, serving, url_of
from app.settings import Settings
from app.store import Store
from app.task import Status, Task
from tests.waiting import wait_until
from workers import Context, runtime, task

# A worker is a function. It takes tasks from a queue, says what it does, and returns the answer.


@task("default")
async def shout(task: Task, ctx: Context, *, pause_seconds: float = 0) -> str:
    for word in task.query.split():
        await ctx.checkpoint("step")
        await ctx.delta(f"{word.upper()} ")
        await asyncio.sleep(pause_seconds)
    return f"{task.query.upper()}!"


@asynccontextmanager
async def working(store: Store) -> AsyncIterator[None]:
    """As `taskcast worker` does it."""
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(runtime.run(store, [shout], stop=stop))
        yield
        stop.set()


@pytest.fixture
async def api(store: Store, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an API over the store; nobody works yet."""
    settings = settings.model_copy(update={"port": 0})
    sock = listen(settings)
    headers = {"X-API-Key": DEVELOPMENT_KEY}
    async with serving(store, settings, sock), httpx.AsyncClient(base_url=url_of(sock), headers=headers) as client:
        yield client


async def submit(api: httpx.AsyncClient, query: str, **context: object) -> str:
    response = await api.post("/api/v1/tasks", json={"query": query, "context": context})
    id_: str = response.json()["task_id"]
    return id_


async def until(api: httpx.AsyncClient, id_: str, status: str) -> None:
    async def holds() -> bool:
        return bool((await api.get(f"/api/v1/tasks/{id_}")).json()["status"] == f"TASK_STATUS_{status}")

    await wait_until(holds, f"the task is {status}")


class Told(NamedTuple):
    """What a stream tells: an event's id, name and data."""

    id: str
    name: str
    data: str


async def stream(api: httpx.AsyncClient, id_: str, after: str = "") -> list[Told]:
    """To its end, as an EventSource reads it: how far it has been, it says in a header."""
    headers = {"Last-Event-ID": after} if after else {}
    url, query = "/api/v1/stream/sse", {"workflow_id": id_}
    async with aconnect_sse(api, "GET", url, params=query, headers=headers) as source:
        return [Told(event.id, event.event, event.data) async for event in source.aiter_sse()]


async def test_a_task_is_submitted_and_waits_for_a_worker(api: httpx.AsyncClient) -> None:
    response = await api.post("/api/v1/tasks", json={"query": "hello there"})
    body = (await api.get(f"/api/v1/tasks/{response.json()['task_id']}")).json()
    assert (body["query"], body["status"], body["response"]) == ("hello there", "TASK_STATUS_QUEUED", None)


async def test_a_worker_takes_it_and_its_answer_is_read_back(api: httpx.AsyncClient, store: Store) -> None:
    id_ = await submit(api, "hello there")
    async with working(store):
        await until(api, id_, "COMPLETED")
    body = (await api.get(f"/api/v1/tasks/{id_}")).json()
    assert body["result"] == "HELLO THERE!"
    assert body["response"] == {"result": "HELLO THERE!"}


async def test_everybody_watches_it_live_and_is_told_the_end(api: httpx.AsyncClient, store: Store) -> None:
    id_ = await submit(api, "hello there", pause_seconds=0.05)
    watchers = [asyncio.create_task(stream(api, id_)) for _ in range(3)]
    async with working(store):
        first, *others = await asyncio.gather(*watchers)
    assert others == [first, first]
    assert [told.name for told in first] == [
        "DATA_PROCESSING",
        "WORKFLOW_STARTED",
        "thread.message.delta",
        "thread.message.delta",
        "thread.message.completed",
        "WORKFLOW_COMPLETED",
        "done",
    ]
    deltas = [json.loads(told.data)["delta"] for told in first if told.name == "thread.message.delta"]
    assert "".join(deltas) == "HELLO THERE "


async def test_whoever_lost_the_connection_goes_on_where_he_was(api: httpx.AsyncClient, store: Store) -> None:
    id_ = await submit(api, "hello there")
    async with working(store):
        everything = await stream(api, id_)
    for place, told in enumerate(everything[:-1], 1):
        assert await stream(api, id_, told.id) == everything[place:]


async def test_a_snapshot_says_where_the_stream_goes_on(api: httpx.AsyncClient, store: Store) -> None:
    id_ = await submit(api, "hello there")
    snapshot = (await api.get(f"/api/v1/tasks/{id_}")).json()
    async with working(store):
        rest = await stream(api, id_, snapshot["last_event_id"])
    numbers = [json.loads(told.data)["seq"] for told in rest[:-1]]
    assert numbers == list(range(snapshot["last_seq"] + 1, snapshot["last_seq"] + 1 + len(numbers)))


async def test_a_task_is_paused_resumed_and_cancelled(api: httpx.AsyncClient, store: Store) -> None:
    id_ = await submit(api, "this takes longer than anybody would want to wait", pause_seconds=0.1)
    async with working(store):
        await until(api, id_, "RUNNING")
        await api.post(f"/api/v1/tasks/{id_}/pause", json={"reason": "lunch"})
        await until(api, id_, "PAUSED")
        await api.post(f"/api/v1/tasks/{id_}/resume")
        await until(api, id_, "RUNNING")
        assert (await api.post(f"/api/v1/tasks/{id_}/cancel")).json()["success"]
        names = [told.name for told in await stream(api, id_)]
    assert names[-3:] == ["workflow.cancelling", "workflow.cancelled", "done"]


async def test_what_happened_is_kept_and_listed(api: httpx.AsyncClient, store: Store) -> None:
    ids = [await submit(api, f"hello number {number}") for number in range(3)]
    async with working(store):
        for id_ in ids:
            await until(api, id_, "COMPLETED")
    listed = (await api.get("/api/v1/tasks", params={"status": "COMPLETED", "limit": 2})).json()
    assert ([task["task_id"] for task in listed["tasks"]], listed["total_count"]) == ([ids[2], ids[1]], 3)
    log = (await api.get(f"/api/v1/tasks/{ids[0]}/events", params={"after": 0})).json()["events"]
    assert [event["seq"] for event in log] == list(range(1, len(log) + 1))


async def test_below_it_all_a_task_is_a_log_and_its_fold(store: Store) -> None:
    await store.submit(Submission(id="t", org="o", query="hello there", submission="once"))
    (claimed,) = await store.claim(["default"], "me", 1)
    await store.append("o", "t", TextDelta(text="HELLO "), fence=claimed.fence, n=1)
    await store.append("o", "t", Completed(result="HELLO!"), fence=claimed.fence, n=2)
    snapshot = await store.get("o", "t")
    assert snapshot
    assert (snapshot.status, snapshot.result, snapshot.last_seq) == (Status.COMPLETED, "HELLO!", 4)
    assert [difference async for difference in store.snapshots.verify()] == []


async def test_below_every_stream_is_one_subscription(store: Store) -> None:
    await store.submit(Submission(id="t", org="o", query="hello there", submission="once"))
    (claimed,) = await store.claim(["default"], "me", 1)
    seen: list[Item] = []
    async with store.follow("o", "t", "") as subscription:
        await store.append("o", "t", Completed(result="HELLO!"), fence=claimed.fence, n=1)
        async for page in subscription:
            seen += page
    assert [item.seq for item in seen if isinstance(item, Entry)] == [1, 2, 3]
    assert isinstance(seen[-1], Ended)
