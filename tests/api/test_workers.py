"""Workers over HTTP: the real server, the real store, and workers that lose answers, leases and patience."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from app import claims, errors, events, metrics
from app.answers import moment
from app.api import workers
from app.api.workers import TYPES
from app.claims import Claims
from app.errors import TaskcastError, Unavailable
from app.identity import DEVELOPMENT_KEY, Identities
from app.queues import Claimed
from app.settings import Settings
from app.store import Store, open_store
from app.task import Status, Task
from tests.api.serving import ORG, Served, served, submit
from tests.waiting import wait_until

V1 = "/worker/v1"
Json = dict[str, Any]


@pytest.fixture
async def server(store: Store, settings: Settings) -> AsyncIterator[Served]:
    async with served(store, settings) as running:
        yield running


class Worker:
    """One that speaks HTTP, as a worker in another language would."""

    def __init__(self, client: httpx.AsyncClient, *queues: str) -> None:
        self.client, self.queues = client, [*queues] or ["default"]

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(f"{V1}{path}", json=body)

    async def claim(self, **body: Any) -> list[Json]:
        answer = await self.post("/claim", worker="w1", queues=self.queues, **body)
        assert answer.status_code == 200, answer.text
        tasks: list[Json] = answer.json()["tasks"]
        return tasks

    async def one(self, **body: Any) -> Json:
        (task,) = await self.claim(**body)
        return task

    async def say(self, task: Json, n: int, *said: Json) -> httpx.Response:
        numbered = [{"n": n + i, **one} for i, one in enumerate(said)]
        return await self.post(f"/tasks/{task['id']}/events", fence=task["fence"], events=numbered)

    async def end(self, task: Json, verb: str, n: int, **body: Any) -> httpx.Response:
        return await self.post(f"/tasks/{task['id']}/{verb}", fence=task["fence"], n=n, **body)

    async def beat(self, *tasks: Json, **body: Any) -> list[Json]:
        held = [{"id": task["id"], "fence": task["fence"]} for task in tasks]
        answer = await self.post("/heartbeat", tasks=held, **body)
        assert answer.status_code == 200, answer.text
        told: list[Json] = answer.json()["tasks"]
        return told

    async def look(self, task: Json) -> httpx.Response:
        return await self.client.get(f"{V1}/tasks/{task['id']}", params={"fence": task["fence"]})


@pytest.fixture
def worker(server: Served) -> Worker:
    return Worker(server.client)


async def now(store: Store, id_: str) -> Task:
    task = await store.get(ORG, id_)
    assert task
    return task


async def told(store: Store, id_: str) -> list[events.AnyEvent]:
    page = await store.events(ORG, id_, "")
    assert page
    return [entry.event for entry in page.entries]


async def expire(store: Store, id_: str) -> None:
    """As time would."""
    tag = store.partitions.tag(ORG, id_)
    await store.door.call("ZADD", f"tc:{{{tag}}}:leases", "XX", 1, f"{ORG}/{id_}")
    await store.queues.tick()


def claims_of(server: Served) -> Claims:
    found: Claims = server.server.config.app.state.claims  # type: ignore[union-attr]
    return found


async def waiting(server: Served, count: int = 1) -> None:
    """So many claims wait, and have asked in vain."""

    def asleep() -> bool:
        lines = [line for lines in claims_of(server)._waiting.values() for line in lines.values()]
        waiters = {waiter for line in lines for waiter in line}
        return len(waiters) == count and all(waiter.woken._waiters for waiter in waiters)

    await wait_until(asleep, f"{count} claims wait")


def client_of(server: Served, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, headers={"X-API-Key": key}, timeout=20)


@pytest.fixture
def never_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SWEEP_SECONDS", 1000)


# Claim


async def test_a_claim_tells_all_that_a_worker_needs(store: Store, worker: Worker) -> None:
    id_ = await submit(
        store,
        context={"a": 1},
        agent="writer",
        deadline_seconds=60,
        trace="00-ab-cd-01",
        max_attempts=2,
        llm_model="m",
        llm_effort="high",
        output_schema={"type": "object"},
    )
    answer = await worker.post("/claim", worker="w1", queues=["other", "default"], slots=5)
    assert answer.status_code == 200
    task = await now(store, id_)
    assert (task.status, task.worker) == (Status.RUNNING, "w1")
    assert answer.json() == {
        "claim": None,
        "lease_seconds": 2,
        "tasks": [
            {
                "id": id_,
                "queue": "default",
                "fence": 1,
                "attempt": 1,
                "max_attempts": 2,
                "query": "why?",
                "context": {"a": 1},
                "agent": "writer",
                "session": "s1",
                "parent": None,
                "user": None,
                "title": None,
                "mode": "simple",
                "turn": 1,
                "llm_provider": None,
                "llm_model": "m",
                "llm_effort": "high",
                "output_schema": {"type": "object"},
                "checkpoint": {},
                "deadline_at": moment(task.deadline_at),
                "created_at": moment(task.created_at),
                "trace": "00-ab-cd-01",
            }
        ],
    }
    assert moment(1_700_000_000_000_001) == "2023-11-14T22:13:20.000001Z"


async def test_a_batch_is_the_oldest_tasks_and_no_two_workers_get_the_same(store: Store, worker: Worker) -> None:
    ids = [await submit(store) for _ in range(20)]
    assert [task["id"] for task in await worker.claim(slots=3)] == ids[:3]
    batches = await asyncio.gather(*(worker.claim(slots=5) for _ in range(6)))
    got = Counter(task["id"] for batch in batches for task in batch)
    assert got == Counter(ids[3:])
    assert await worker.claim() == []


async def test_a_repeated_claim_gets_the_same_tasks_and_only_under_its_own_key(
    store: Store, settings: Settings, server: Served, worker: Worker
) -> None:
    ids = [await submit(store) for _ in range(3)]
    first = await worker.claim(slots=2, claim="c-1")
    assert await worker.claim(slots=2, claim="c-1") == first
    assert [task["id"] for task in first] == ids[:2]
    key = await Identities(store, settings).create(ORG, "", "", worker=True)
    async with client_of(server, key) as client:
        assert [task["id"] for task in await Worker(client).claim(slots=2, claim="c-1")] == ids[2:]


async def test_a_repeated_claim_gets_the_same_tasks_from_all_partitions(settings: Settings) -> None:
    settings = settings.model_copy(update={"partitions": 4, "data": settings.data.with_name("parts")})
    async with open_store(settings) as store, served(store, settings) as server:
        worker = Worker(server.client)
        for _ in range(3):
            await submit(store)
        first = await worker.claim(slots=4, claim="c-1")
        assert len(first) == 3
        for _ in range(8):  # in every partition, so that a new claim would find some
            await submit(store)
        for _ in range(5):  # each call begins at another partition
            again = await worker.claim(slots=4, claim="c-1")
            assert {task["id"] for task in again} == {task["id"] for task in first}
        assert len(await worker.claim(slots=100)) == 8


async def test_the_log_is_watched_only_while_somebody_waits(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "SWEEP_SECONDS", 0.05)
    for _ in range(2):
        waits = asyncio.create_task(Worker(server.client).claim(wait_seconds=30))
        await waiting(server)
        assert claims_of(server).task
        await submit(store)
        assert len(await waits) == 1
        await wait_until(lambda: claims_of(server).task is None, "nobody watches")


async def test_a_claim_that_waits_is_woken_by_the_log(store: Store, server: Served, never_sweeps: None) -> None:
    waits = asyncio.create_task(Worker(server.client).claim(wait_seconds=30))
    await waiting(server)
    id_ = await submit(store)
    (task,) = await waits
    assert task["id"] == id_
    assert (await now(store, id_)).status is Status.RUNNING


@pytest.mark.parametrize("again", ["requeued", "retried", "resumed"])
async def test_a_task_that_comes_back_to_its_queue_wakes_too(
    store: Store, server: Served, worker: Worker, never_sweeps: None, again: str
) -> None:
    id_ = await submit(store)
    if again == "resumed":
        await store.append(ORG, id_, events.PauseAsked())
    else:
        task = await worker.one()
        if again == "retried":
            await worker.end(task, "fail", 1, error="no")
    waits = asyncio.create_task(worker.claim(wait_seconds=30))
    await waiting(server)
    if again == "requeued":
        await worker.end(task, "release", 1)
    else:
        await store.append(ORG, id_, events.Resumed() if again == "resumed" else events.Retried())
    assert [one["id"] for one in await waits] == [id_]


async def test_a_delayed_task_is_found_by_the_sweep(store: Store, server: Served) -> None:
    id_ = await submit(store, delay_seconds=0.5)
    assert [task["id"] for task in await Worker(server.client).claim(wait_seconds=30)] == [id_]


async def test_a_wait_ends_in_time_without_a_task(server: Served) -> None:
    answer = await Worker(server.client).post("/claim", worker="w", queues=["default"], wait_seconds=0.2, claim="c")
    assert answer.json() == {"claim": "c", "lease_seconds": 2, "tasks": []}
    assert "retry-after" not in answer.headers


async def test_many_claims_wait_for_one_watcher_and_each_gets_a_task(
    store: Store, server: Served, never_sweeps: None
) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, headers=server.client.headers, timeout=30, limits=limits) as many:
        waits = [asyncio.create_task(Worker(many).claim(wait_seconds=30)) for _ in range(50)]
        await waiting(server, 50)
        names = Counter(task.get_name().partition(" ")[0] for task in asyncio.all_tasks())
        assert (names["claims"], names["tail"]) == (1, 1)
        ids = {await submit(store) for _ in range(50)}
        found = await asyncio.gather(*waits)
    assert {task["id"] for tasks in found for task in tasks} == ids
    assert not claims_of(server)._waiting


async def test_other_queues_and_other_organisations_do_not_wake(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch, never_sweeps: None
) -> None:
    waits = asyncio.create_task(Worker(server.client).claim(wait_seconds=30))
    await waiting(server)
    asked = 0
    claim = store.claim

    async def counted(*args: Any, **options: Any) -> list[Claimed]:
        nonlocal asked
        asked += 1
        return await claim(*args, **options)

    monkeypatch.setattr(store, "claim", counted)
    await submit(store, org="acme")
    await submit(store, queue="other")
    id_ = await submit(store)
    assert [task["id"] for task in await waits] == [id_]
    assert asked == 1


async def test_a_client_that_leaves_while_it_waits_takes_no_task(
    store: Store, server: Served, never_sweeps: None
) -> None:
    async with client_of(server, DEVELOPMENT_KEY) as leaving:
        gone = asyncio.create_task(Worker(leaving).claim(wait_seconds=30))
        await waiting(server)
        stays = asyncio.create_task(Worker(server.client).claim(wait_seconds=30))
        await waiting(server, 2)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        first = await submit(store)  # at once: the server may not know yet that nobody is there
        assert [task["id"] for task in await stays] == [first]
    await wait_until(lambda: not claims_of(server)._waiting, "the claim has ended")
    second = await submit(store)
    assert (await now(store, second)).status is Status.QUEUED


@pytest.fixture
def slow_claims(store: Store, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Set when a claim has got a task; and to be set, for it to go on."""
    got, go = asyncio.Event(), asyncio.Event()
    claim = store.claim

    async def slow(*args: Any, **options: Any) -> list[Claimed]:
        found = await claim(*args, **options)
        got.set()
        await go.wait()
        return found

    monkeypatch.setattr(store, "claim", slow)
    return got, go


@pytest.mark.parametrize("name", [None, "c-1"])
async def test_a_client_that_leaves_with_its_task_on_the_way_loses_it_unless_it_may_ask_again(
    store: Store, server: Served, slow_claims: tuple[asyncio.Event, asyncio.Event], name: str | None
) -> None:
    got, go = slow_claims
    id_ = await submit(store)
    async with client_of(server, DEVELOPMENT_KEY) as leaving:
        gone = asyncio.create_task(Worker(leaving).claim(claim=name))
        await got.wait()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
    requests = server.server.server_state.connections
    await wait_until(lambda: not requests, "the server knows")
    go.set()
    if name:
        assert (await Worker(server.client).one(claim=name))["id"] == id_
    else:
        await wait_until(lambda: _is(store, id_, Status.QUEUED), "given back")
        assert (await now(store, id_)).attempts_left == 3


async def _is(store: Store, id_: str, status: Status) -> bool:
    return (await now(store, id_)).status is status


async def test_a_drain_answers_at_once(store: Store, settings: Settings, never_sweeps: None) -> None:
    async with served(store, settings, grace_seconds=20) as server:
        waits = asyncio.create_task(server.client.post(f"{V1}/claim", json=CLAIM | {"wait_seconds": 30}))
        await waiting(server)
        server.server.stop()
        answer = await waits
    assert (answer.status_code, answer.json()["tasks"], answer.headers["retry-after"]) == (200, [], "1")
    # Who comes now, on a connection that was open, is given nothing that he could not work on.
    async with served(store, settings) as server:
        await submit(store)
        server.server.config.app.state.streams.closing = True  # type: ignore[union-attr]
        answer = await server.client.post(f"{V1}/claim", json=CLAIM | {"wait_seconds": 30})
    assert (answer.json()["tasks"], answer.headers["retry-after"]) == ([], "1")


async def test_who_may_not_wait_is_answered_at_once(store: Store, settings: Settings) -> None:
    async with served(store, settings, streams_per_key=1) as server:
        waits = asyncio.create_task(server.client.post(f"{V1}/claim", json=CLAIM | {"wait_seconds": 30}))
        await waiting(server)
        answer = await server.client.post(f"{V1}/claim", json=CLAIM | {"wait_seconds": 30})
        assert (answer.json()["tasks"], answer.headers["retry-after"]) == ([], "1")
        await submit(store)
        assert len((await waits).json()["tasks"]) == 1


async def test_a_store_that_is_away_is_a_503_also_while_one_waits(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = asyncio.create_task(server.client.post(f"{V1}/claim", json=CLAIM | {"wait_seconds": 30}))
    await waiting(server)

    async def away(*_: Any, **__: Any) -> list[Claimed]:
        raise Unavailable("cannot connect to /data/valkey.sock")

    monkeypatch.setattr(store, "claim", away)
    for answer in (await waits, await server.client.post(f"{V1}/claim", json=CLAIM)):
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json() == {"error": "The store cannot be reached; try again."}


async def test_a_log_that_cannot_be_watched_is_told_to_who_waits(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> Any:
        raise Unavailable("away")

    monkeypatch.setattr(store, "watch", broken)
    answer = await server.client.post(f"{V1}/claim", json=CLAIM | {"wait_seconds": 30})
    assert answer.status_code == 503
    assert claims_of(server).task is None


async def test_the_time_that_a_claim_waits_is_not_the_servers(server: Served) -> None:
    def observed() -> float:
        found = metrics.REQUEST_SECONDS.labels(f"{V1}/claim")._sum.get()
        return float(found)

    before = observed()
    await Worker(server.client).claim(wait_seconds=0.3)
    assert observed() == before
    await Worker(server.client).claim()
    assert observed() > before


# Keys


async def test_a_workers_key_works_and_does_nothing_else(store: Store, settings: Settings, server: Served) -> None:
    identities = Identities(store, settings)
    key = await identities.create(ORG, "ann", "", worker=True)
    task = await submit(store)
    async with client_of(server, key) as client:
        for method, path in [
            ("GET", "/api/v1/tasks"),
            ("POST", "/api/v1/tasks"),
            ("GET", f"/api/v1/tasks/{task}"),
            ("POST", f"/api/v1/tasks/{task}/cancel"),
            ("GET", f"/api/v1/stream/sse?workflow_id={task}"),
            ("GET", "/api/v1/sessions"),
        ]:
            answer = await client.request(method, path)
            assert answer.status_code == 403, path
            assert answer.json() == {"error": "This key is a worker's: it may use /worker/v1 only."}
        assert (await Worker(client).one())["id"] == task
    other = await identities.create(ORG, "ann", "")
    async with client_of(server, other) as client:
        for path in ("/claim", "/heartbeat", *(f"/tasks/t/{verb}" for verb in ("events", "finish", "fail", "release"))):
            answer = await client.post(f"{V1}{path}", json={})
            assert answer.status_code == 403, path
            assert answer.json() == {"error": "This key is no worker's: `taskcast keys create --worker` makes one."}
        assert (await client.get(f"{V1}/tasks/t?fence=1")).status_code == 403


async def test_without_a_key_everything_is_401(server: Served) -> None:
    async with client_of(server, "nobody's") as client:
        for path in ("/claim", "/heartbeat", "/tasks/t/events", "/tasks/t/finish", "/tasks/t/fail", "/tasks/t/release"):
            answer = await client.post(f"{V1}{path}", json={})
            assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
            assert answer.headers["www-authenticate"]
        assert (await client.get(f"{V1}/tasks/t?fence=1")).status_code == 401


async def test_another_organisations_tasks_do_not_exist(
    store: Store, settings: Settings, server: Served, worker: Worker
) -> None:
    await submit(store)
    task = await worker.one()
    queued = await submit(store)
    key = await Identities(store, settings).create("acme", "", "", worker=True)
    async with client_of(server, key) as client:
        other = Worker(client)
        assert await other.claim(slots=10) == []
        assert (await other.say(task, 1, DELTA)).status_code == 404
        assert (await other.end(task, "finish", 1)).status_code == 404
        assert (await other.end(task, "fail", 1, error="x", retry=True)).status_code == 404
        assert (await other.look(task)).status_code == 404
        assert await other.beat(task) == [{"id": task["id"], "status": "gone", "cancelled": True, "paused": False}]
    assert (await now(store, queued)).status is Status.QUEUED
    assert (await now(store, task["id"])).status is Status.RUNNING


async def test_a_workers_key_may_be_for_some_queues(
    store: Store, settings: Settings, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, foreign = await submit(store, queue="a"), await submit(store, queue="b")
    everywhere = Worker(server.client, "a", "b")
    key = await Identities(store, settings).create(ORG, "", "", worker=True, queues=["a", "c", "a"])
    async with client_of(server, key) as client:
        worker = Worker(client, "a", "b")
        answer = await worker.post("/claim", worker="w", queues=["a", "b"])
        assert (answer.status_code, answer.json()) == (403, {"error": "This key does not work on b."})
        worker.queues = ["a"]
        task = await worker.one(slots=10)
        assert task["id"] == own
        assert (await worker.say(task, 1, DELTA)).status_code == 200
        (not_its,) = await everywhere.claim(slots=10)
        assert not_its["id"] == foreign
        # Also where this process has not seen the claim; and it is asked for once.
        monkeypatch.setattr(claims_of(server), "_known", {})
        assert (await worker.say(not_its, 1, DELTA)).status_code == 404
        assert (await worker.look(not_its)).status_code == 404
        told = await worker.beat(not_its, task, {"id": "nothing", "fence": 1})
        assert [one["status"] for one in told] == ["gone", "running", "gone"]
        assert (await worker.say({**task, "fence": 9}, 2, DELTA)).json()["fence"] == "stale"
        monkeypatch.setattr(store, "get", None)
        assert (await worker.say(task, 2, DELTA)).status_code == 200
    assert (await now_of(store, foreign)).n == 0


async def now_of(store: Store, id_: str) -> Task:
    found = await store.snapshots.get(ORG, id_)
    assert found
    return found


async def test_what_is_remembered_of_claims_is_bounded(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "KNOWN_MAX", 3)
    for _ in range(5):
        await submit(store)
    await Worker(server.client).claim(slots=5)
    assert 1 <= len(claims_of(server)._known) <= 3


# Say

CLAIM = {"worker": "w1", "queues": ["default"]}
DELTA = {"type": "delta", "text": "x"}
SAID: list[tuple[Json, events.AnyEvent]] = [
    (
        {"type": "progress", "fraction": 0.5, "message": "half", "payload": {"a": 1}},
        events.Progressed(fraction=0.5, message="half", payload={"a": 1}),
    ),
    ({"type": "delta", "text": "Hel"}, events.TextDelta(agent="final_output", text="Hel")),
    ({"type": "delta", "text": "lo", "agent": "poet"}, events.TextDelta(agent="poet", text="lo")),
    (
        {
            "type": "output",
            "text": "Hello",
            "agent": "poet",
            "usage": {"model": "m", "input_tokens": 3, "cost_usd": 0.002},
        },
        events.TextCompleted(
            agent="poet", text="Hello", usage=events.Usage(model="m", input_tokens=3, cost_nano=2_000_000)
        ),
    ),
    ({"type": "output", "text": "Hello", "usage": None}, events.TextCompleted(agent="final_output", text="Hello")),
    (
        {"type": "tool_called", "tool": "search", "call": "c1", "params": {"q": 1}, "agent": "a"},
        events.ToolCalled(tool="search", call="c1", params={"q": 1}, agent="a"),
    ),
    (
        {"type": "tool_returned", "tool": "search", "call": "c1", "success": False, "output": [None], "duration_ms": 5},
        events.ToolReturned(tool="search", call="c1", success=False, output=[None], duration_ms=5),
    ),
    ({"type": "thinking", "message": "hm"}, events.Thinking(message="hm")),
    ({"type": "agent_started", "agent": "a"}, events.AgentStarted(agent="a")),
    ({"type": "agent_completed", "agent": "a", "payload": {}}, events.AgentCompleted(agent="a")),
    ({"type": "plan", "payload": {"steps": []}}, events.PlanUpdated(payload={"steps": []})),
    (
        {"type": "event", "name": "LLM_PROMPT", "message": "?", "unknown": 1},
        events.Noted(name="LLM_PROMPT", message="?"),
    ),
    (
        {"type": "approval_requested", "approval": "a1", "reason": "money", "payload": {"eur": 9}},
        events.ApprovalRequested(approval="a1", reason="money", payload={"eur": 9}),
    ),
    ({"type": "paused", "checkpoint": "c", "state": {"at": 1}}, events.Paused(checkpoint="c", state={"at": 1})),
]


async def test_every_type_of_event_is_told_as_the_store_knows_it(store: Store, worker: Worker) -> None:
    id_ = await submit(store)
    task = await worker.one()
    actor = {"actor": "nobody"}  # whoever the worker says it is
    answer = await worker.say(task, 1, *({**said, **actor} for said, _ in SAID))
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "status": "paused",
        "cancelled": False,
        "paused": True,
        "last_seq": 2 + len(SAID),
        "accepted": len(SAID),
        "duplicates": 0,
    }
    found = await told(store, id_)
    for event, (_, expected) in zip(found[2:], SAID, strict=True):
        by = "" if isinstance(event, events.TextDelta) else "worker:development"
        assert event == type(expected)(**{**_fields(expected), "actor": by})
    reviewed = {"type": "review_requested", "plan": "1. think", "version": 1, "round": 1}
    await store.append(ORG, id_, events.ApprovalDecided(approval="a1", approved=True))
    assert (await worker.say(task, len(SAID) + 1, reviewed)).json()["paused"] is True
    assert (await now(store, id_)).waits == "review:1"
    assert {said["type"] for said, _ in SAID} | {"review_requested"} == set(TYPES)


def _fields(event: events.AnyEvent) -> Json:
    return {name: getattr(event, name) for name in event.__struct_fields__}


async def test_repeated_numbers_are_duplicates_and_told_apart_from_new_ones(store: Store, worker: Worker) -> None:
    id_ = await submit(store)
    task = await worker.one()
    first = (await worker.say(task, 1, DELTA, DELTA)).json()
    assert first == {**RUNNING, "last_seq": 4, "accepted": 2, "duplicates": 0}
    assert (await worker.say(task, 1, DELTA, DELTA)).json() == {
        **RUNNING,
        "last_seq": 4,
        "accepted": 0,
        "duplicates": 2,
    }
    assert (await worker.say(task, 2, DELTA, DELTA)).json() == {
        **RUNNING,
        "last_seq": 5,
        "accepted": 1,
        "duplicates": 1,
    }
    for n in range(4, 1104, 100):
        await worker.say(task, n, *[{"type": "thinking"}] * 100)
    # Too far back to look for its place: that of the task.
    assert (await worker.say(task, 1, DELTA)).json() == {**RUNNING, "last_seq": 1105, "accepted": 0, "duplicates": 1}
    assert len([one for one in await told(store, id_) if isinstance(one, events.TextDelta)]) == 3


RUNNING: Json = {"status": "running", "cancelled": False, "paused": False}


async def test_a_hole_in_the_numbers_is_a_409_that_says_which_was_expected(store: Store, worker: Worker) -> None:
    await submit(store)
    task = await worker.one()
    assert (await worker.say(task, 1, DELTA)).status_code == 200
    answer = await worker.say(task, 3, DELTA)
    assert answer.status_code == 409
    assert answer.json() == {
        "error": "An earlier event of this attempt is missing.",
        **RUNNING,
        "accepted": 0,
        "duplicates": 0,
        "expected": 2,
    }
    assert (await worker.say(task, 2, DELTA)).status_code == 200


async def test_the_first_refusal_ends_a_batch_and_what_was_before_it_stands(store: Store, worker: Worker) -> None:
    id_ = await submit(store)
    task = await worker.one()
    answer = await worker.say(task, 1, DELTA, {"type": "paused"}, DELTA)
    assert answer.status_code == 409
    assert answer.json() == {
        "error": "A task that is running cannot be paused.",
        **RUNNING,
        "accepted": 1,
        "duplicates": 0,
        "expected": 2,
    }
    big = {"type": "delta", "text": "x" * 120_000}
    answer = await worker.say(task, 2, big, big, DELTA)
    assert answer.status_code == 413
    assert answer.json() == {
        "error": f"The task's text would exceed {events.TEXT_BYTES_MAX} bytes.",
        "accepted": 1,
        "duplicates": 0,
        "expected": 3,
    }
    assert (await now(store, id_)).n == 2
    assert (await worker.say(task, 3, DELTA)).json()["accepted"] == 1


async def test_one_unfit_event_stores_none_of_its_batch(store: Store, worker: Worker) -> None:
    id_ = await submit(store)
    task = await worker.one()
    too_large = {"type": "thinking", "message": "x" * events.EVENT_BYTES_MAX}
    assert (await worker.say(task, 1, DELTA, too_large)).status_code == 413
    assert (await worker.say(task, 1, DELTA, {"type": "event", "name": "lower"})).status_code == 400
    assert (await now(store, id_)).n == 0


async def test_a_worker_whose_lease_was_lost_is_told_so_everywhere(store: Store, worker: Worker) -> None:
    id_ = await submit(store)
    task = await worker.one()
    await expire(store, id_)
    before = metrics.STALE._value.get()
    stale = {
        "error": "This attempt is over: the task was taken from this worker.",
        "status": "queued",
        "cancelled": True,
        "paused": False,
        "fence": "stale",
        "accepted": 0,
        "duplicates": 0,
    }
    answer = await worker.say(task, 1, DELTA)
    assert (answer.status_code, answer.json()) == (409, stale)
    assert await worker.beat(task) == [{"id": id_, "status": "queued", "cancelled": True, "paused": False}]
    again = await worker.one()
    assert (again["id"], again["fence"], again["attempt"]) == (id_, 2, 2)
    stale["status"] = "running"
    for answer in (
        await worker.say(task, 1, DELTA),
        await worker.end(task, "finish", 1, result="late"),
        await worker.end(task, "fail", 1, error="late", retry=True),
        await worker.end(task, "release", 1),
    ):
        assert (answer.status_code, answer.json()) == (409, stale)
    look = await worker.look(task)
    assert (look.status_code, look.json()["fence"]) == (409, "stale")
    assert await worker.beat(task, again) == [
        {"id": id_, "status": "running", "cancelled": True, "paused": False},
        {"id": id_, **RUNNING},
    ]
    assert metrics.STALE._value.get() == before + 6
    assert (await now(store, id_)).n == 0


# Heartbeat


async def test_a_pause_and_a_cancel_are_told_in_the_replies(store: Store, worker: Worker) -> None:
    id_ = await submit(store)
    task = await worker.one()
    assert await worker.beat(task) == [{"id": id_, **RUNNING}]
    await store.append(ORG, id_, events.PauseAsked())
    paused = {"status": "paused", "cancelled": False, "paused": True}
    assert await worker.beat(task) == [{"id": id_, **paused}]
    assert {**(await worker.say(task, 1, DELTA)).json(), **paused} == {
        **paused,
        "last_seq": 4,
        "accepted": 1,
        "duplicates": 0,
    }
    assert (await worker.say(task, 2, {"type": "paused", "checkpoint": "c"})).json()["paused"] is True
    await store.append(ORG, id_, events.Resumed())
    assert (await worker.say(task, 3, DELTA)).json()["paused"] is False
    await store.append(ORG, id_, events.Cancelled())
    cancelled = {"status": "cancelled", "cancelled": True, "paused": False}
    assert await worker.beat(task) == [{"id": id_, **cancelled}]
    answer = await worker.say(task, 4, DELTA)
    assert answer.status_code == 409
    assert {name: answer.json()[name] for name in cancelled} == cancelled
    # What had been accepted is a duplicate still, and tells it too.
    assert {**(await worker.say(task, 3, DELTA)).json(), **cancelled} == (await worker.say(task, 3, DELTA)).json()
    await store.delete(ORG, id_)
    assert (await worker.beat(task))[0]["status"] == "gone"
    assert (await worker.say(task, 4, DELTA)).status_code == 404
    assert (await worker.look(task)).status_code == 404


async def lease_ms(store: Store, id_: str) -> float:
    """What is left of it."""
    tag = store.partitions.tag(ORG, id_)
    until = await store.door.read("ZSCORE", f"tc:{{{tag}}}:leases", f"{ORG}/{id_}")
    seconds, micros = await store.door.read("TIME")
    return float(until) - int(seconds) * 1000 - int(micros) / 1000


async def test_a_lease_is_as_long_as_its_claim_asked_for_and_stays_so(store: Store, worker: Worker) -> None:
    plain, long = await submit(store), await submit(store)
    tasks = [await worker.one(), await worker.one(lease_seconds=600)]
    assert await lease_ms(store, plain) <= 2000
    for _ in range(2):
        assert 500_000 < await lease_ms(store, long) <= 600_000
        await store.door.call("ZADD", f"tc:{{{store.partitions.tag(ORG, long)}}}:leases", "XX", 1e14, f"{ORG}/{long}")
        await worker.beat(*tasks)
    await worker.beat(*tasks, lease_seconds=60)
    for id_ in (plain, long):
        assert 50_000 < await lease_ms(store, id_) <= 60_000
    await worker.end(tasks[1], "release", 1)
    assert (await now(store, long)).lease_ms == 0
    assert (await worker.one())["id"] == long
    assert await lease_ms(store, long) <= 2000
    assert [one async for one in store.snapshots.verify()] == []


async def test_a_heartbeat_tells_of_a_thousand_tasks(store: Store, worker: Worker) -> None:
    await submit(store)
    task = await worker.one()
    others = [{"id": f"t{i}", "fence": 1} for i in range(999)]
    told = await worker.beat(*others, task)
    assert [one["status"] for one in told] == ["gone"] * 999 + ["running"]
    answer = await worker.post("/heartbeat", tasks=[*others, task, task])
    assert answer.status_code == 400


# End


async def test_a_text_result_is_the_tasks_output_and_its_end(store: Store, worker: Worker) -> None:
    id_ = await submit(store)
    task = await worker.one()
    await worker.say(task, 1, DELTA)
    body = {"result": "because", "usage": {"model": "m", "provider": "p", "output_tokens": 2, "cost_usd": 1.5}}
    answer = await worker.end(task, "finish", 2, **body)
    assert answer.json() == {"status": "completed", "last_seq": 5, "accepted": 2, "duplicates": 0}
    again = await worker.end(task, "finish", 2, **body)
    assert again.json() == {"status": "completed", "last_seq": 5, "accepted": 0, "duplicates": 2}
    done = await now(store, id_)
    assert (done.status, done.result, done.result_type, done.model) == (Status.COMPLETED, "because", "text", "m")
    assert (done.output_tokens, done.cost_nano, done.progress) == (2, 1_500_000_000, 1)
    *_, output, end = await told(store, id_)
    assert isinstance(output, events.TextCompleted)
    assert (output.text, output.agent) == ("because", "final_output")
    assert isinstance(end, events.Completed)
    assert end.usage is None


async def test_an_output_that_went_out_before_is_not_told_twice(store: Store, worker: Worker) -> None:
    id_ = await submit(store)
    task = await worker.one()
    await worker.say(task, 1, {"type": "output", "text": "because"})
    answer = await worker.end(task, "finish", 2, result="because", said=True, usage={"input_tokens": 1})
    assert answer.json()["accepted"] == 1
    assert len([one for one in await told(store, id_) if isinstance(one, events.TextCompleted)]) == 1
    assert (await now(store, id_)).input_tokens == 1


async def test_an_object_is_a_json_result(store: Store, worker: Worker) -> None:
    id_ = await submit(store)
    await worker.end(await worker.one(), "finish", 1, result={"answer": [42]})
    done = await now(store, id_)
    assert (done.result, done.result_type) == ('{"answer":[42]}', "json")
    too_large = await submit(store)
    answer = await worker.end(await worker.one(), "finish", 1, result="x" * (events.RESULT_BYTES_MAX + 1))
    assert answer.status_code == 413
    assert (await now(store, too_large)).status is Status.RUNNING


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
MISFIT = "The result does not fit its output schema at $.n: 'x' is not of type 'integer'"
NO_JSON = "The result is no JSON, as its output schema asks for."


@pytest.mark.parametrize("result", [{"n": 1}, '{"n": 1}'])
async def test_a_result_that_fits_the_tasks_schema_completes_it(
    store: Store, worker: Worker, result: str | Json
) -> None:
    id_ = await submit(store, output_schema=SCHEMA)
    task = await worker.one()
    assert task["output_schema"] == SCHEMA
    answer = (await worker.end(task, "finish", 1, result=result)).json()
    assert (answer["status"], "reason" in answer) == ("completed", False)
    done = await now(store, id_)
    assert (msgspec.json.decode(done.result), done.result_type) == ({"n": 1}, "json")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"result": {"n": "x"}}, MISFIT),
        ({"result": '{"n": "x"}'}, MISFIT),
        ({"result": "One.", "said": True}, NO_JSON),
        ({}, NO_JSON),
    ],
)
async def test_a_result_that_does_not_fit_fails_the_task_and_the_answer_says_where(
    store: Store, worker: Worker, body: Json, reason: str
) -> None:
    id_ = await submit(store, output_schema=SCHEMA)
    task = await worker.one()
    body = {**body, "usage": {"input_tokens": 3}}
    first = await worker.end(task, "finish", 1, **body)
    again = await worker.end(task, "finish", 1, **body)
    assert (first.status_code, again.status_code) == (200, 200)
    accepted = 2 if isinstance(body.get("result", ""), str) and not body.get("said") else 1
    counts = {"accepted": accepted, "duplicates": 0}
    assert first.json() == {"status": "failed", "last_seq": 2 + accepted, **counts, "reason": reason}
    assert again.json() == first.json() | {"accepted": 0, "duplicates": accepted}
    done = await now(store, id_)
    assert (done.status, done.error, done.input_tokens) == (Status.FAILED, reason, 3)
    assert [one async for one in store.snapshots.verify()] == []


async def test_a_result_that_is_too_large_is_refused_whatever_its_schema(store: Store, worker: Worker) -> None:
    id_ = await submit(store, output_schema=SCHEMA)
    answer = await worker.end(await worker.one(), "finish", 1, result="x" * (events.RESULT_BYTES_MAX + 1))
    assert answer.status_code == 413
    assert (await now(store, id_)).status is Status.RUNNING


async def test_a_late_result_that_does_not_fit_is_stale_as_any_other(store: Store, worker: Worker) -> None:
    id_ = await submit(store, output_schema=SCHEMA)
    task = await worker.one()
    await worker.end(task, "release", 1)
    answer = await worker.end(task, "finish", 2, result="One.")
    assert (answer.status_code, answer.json()["fence"]) == (409, "stale")
    assert "reason" not in answer.json()
    assert (await now(store, id_)).status is Status.QUEUED


async def test_an_end_under_a_number_of_an_earlier_event_is_no_end(store: Store, worker: Worker) -> None:
    id_ = await submit(store)
    task = await worker.one()
    await worker.say(task, 1, DELTA, DELTA)
    for verb, body in (("finish", {"result": "x"}), ("fail", {"error": "x"}), ("release", {})):
        answer = await worker.end(task, verb, 1, **body)
        assert answer.status_code == 409
        assert answer.json()["expected"] == 3
    assert (await now(store, id_)).status is Status.RUNNING


async def test_a_failure_ends_the_task(store: Store, worker: Worker) -> None:
    id_ = await submit(store)
    task = await worker.one()
    assert (await worker.end(task, "fail", 1, error="no luck")).json()["status"] == "failed"
    assert (await worker.end(task, "fail", 1, error="no luck")).json()["duplicates"] == 1
    assert (await now(store, id_)).error == "no luck"


async def test_a_failure_may_be_tried_again_while_attempts_are_left(store: Store, worker: Worker) -> None:
    id_ = await submit(store, max_attempts=3)
    task = await worker.one()
    answer = await worker.end(task, "fail", 1, error="busy", retry=True, delay_seconds=0)
    assert answer.json()["status"] == "queued"
    assert (await worker.end(task, "fail", 1, error="busy", retry=True, delay_seconds=0)).json()["duplicates"] == 1
    task = await worker.one()
    assert task["attempt"] == 2
    await worker.end(task, "fail", 1, error="busy", retry=True)  # a pause of its own
    requeued = (await told(store, id_))[-1]
    assert isinstance(requeued, events.Requeued)
    assert requeued.error == "busy"
    assert 0 <= requeued.delay_seconds <= 2
    assert requeued.message == f"Attempt 2 ended with busy; the next one begins in {requeued.delay_seconds:.1f} s."
    task = await worker.one(wait_seconds=30)
    assert (await worker.end(task, "fail", 1, error="busy", retry=True)).json()["status"] == "errored"
    assert (await now(store, id_)).error == "busy"


async def test_a_released_task_goes_back_and_its_attempt_does_not_count(store: Store, worker: Worker) -> None:
    id_ = await submit(store)
    task = await worker.one()
    await worker.say(task, 1, DELTA)
    assert (await worker.end(task, "release", 2)).json()["status"] == "queued"
    assert (await worker.end(task, "release", 2)).json()["duplicates"] == 1
    again = await worker.one()
    assert (again["id"], again["fence"]) == (id_, 2)
    assert (await now(store, id_)).attempts_left == 2


# Look


async def test_a_worker_that_waits_for_a_human_reads_the_decision(store: Store, worker: Worker) -> None:
    id_ = await submit(store)
    task = await worker.one()
    assert (await worker.look(task)).json() == {
        **task,
        **RUNNING,
        "last_seq": 2,
        "n": 0,
        "waits": None,
        "decision": None,
    }
    await worker.say(task, 1, {"type": "approval_requested", "approval": "a1", "reason": "money"})
    seen = (await worker.look(task)).json()
    assert (seen["status"], seen["paused"], seen["waits"], seen["n"]) == ("paused", True, "approval:a1", 1)
    decided = events.ApprovalDecided(approval="a1", approved=False, feedback="too much", payload={"by": "ann"})
    await store.append(ORG, id_, decided)
    assert (await worker.beat(task))[0]["paused"] is False
    seen = (await worker.look(task)).json()
    assert (seen["paused"], seen["waits"]) == (False, None)
    assert seen["decision"] == {"approval": "a1", "approved": False, "feedback": "too much", "payload": {"by": "ann"}}
    await worker.say(task, 2, {"type": "review_requested", "plan": "p", "version": 1})
    await store.append(ORG, id_, events.Reviewed(version=1, approved=True))
    for n in range(3, 303, 100):  # several pages
        await worker.say(task, n, *[{"type": "thinking", "message": "x" * 6000}] * 100)
    seen = (await worker.look(task)).json()
    assert seen["decision"] == {"version": 1, "approved": True, "feedback": ""}


async def test_a_decision_of_long_ago_is_not_looked_for_and_trimmed_history_is_no_error(settings: Settings) -> None:
    settings = settings.model_copy(update={"events_per_mark": 10, "data": settings.data.with_name("small")})
    async with open_store(settings) as store, served(store, settings) as server:
        worker = Worker(server.client)
        id_ = await submit(store)
        task = await worker.one()
        await worker.say(task, 1, {"type": "approval_requested", "approval": "a1", "reason": "money"})
        await store.append(ORG, id_, events.ApprovalDecided(approval="a1", approved=True))
        assert (await worker.look(task)).json()["decision"]["approved"] is True
        await worker.say(task, 2, *[{"type": "thinking"}] * 50)
        assert (await worker.look(task)).json()["decision"] is None


# What is wrong with a request


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("/claim", {}, "Object missing required field `worker`"),
        ("/claim", {"worker": "", "queues": ["a"]}, "length >= 1 - at `$.worker`"),
        ("/claim", {"worker": "w" * 257, "queues": ["a"]}, "length <= 256 - at `$.worker`"),
        ("/claim", {"worker": "w", "queues": []}, "length >= 1 - at `$.queues`"),
        ("/claim", {"worker": "w", "queues": ["a"] * 33}, "length <= 32 - at `$.queues`"),
        ("/claim", {"worker": "w", "queues": [""]}, "at `$.queues[0]`"),
        ("/claim", {"worker": "w", "queues": "a"}, "Expected `array`"),
        ("/claim", {**CLAIM, "slots": 0}, ">= 1 - at `$.slots`"),
        ("/claim", {**CLAIM, "slots": 101}, "<= 100 - at `$.slots`"),
        ("/claim", {**CLAIM, "slots": True}, "Expected `int`, got `bool`"),
        ("/claim", {**CLAIM, "wait_seconds": -1}, ">= 0.0 - at `$.wait_seconds`"),
        ("/claim", {**CLAIM, "wait_seconds": 31}, "<= 30.0 - at `$.wait_seconds`"),
        ("/claim", {**CLAIM, "claim": "a b"}, "matching regex"),
        ("/claim", {**CLAIM, "lease_seconds": 4}, ">= 5.0 - at `$.lease_seconds`"),
        ("/claim", {**CLAIM, "lease_seconds": 601}, "<= 600.0 - at `$.lease_seconds`"),
        ("/claim", [], "Expected `object`, got `array`"),
        ("/heartbeat", {"tasks": []}, "length >= 1"),
        ("/heartbeat", {"tasks": [{"id": "a b", "fence": 1}]}, "matching regex"),
        ("/heartbeat", {"tasks": [{"id": "a", "fence": 0}]}, ">= 1 - at `$.tasks[0].fence`"),
        ("/heartbeat", {"tasks": [1]}, "Expected `object`"),
        ("/tasks/t/events", {"fence": 1, "events": []}, "length >= 1"),
        ("/tasks/t/events", {"fence": 1, "events": [{}] * 101}, "length <= 100"),
        ("/tasks/t/events", {"events": [{"n": 1, **DELTA}]}, "missing required field `fence`"),
        ("/tasks/t/events", {"fence": 1, "events": [DELTA]}, "events[0]: Object missing required field `n`"),
        ("/tasks/t/events", {"fence": 1, "events": [{"n": 0, **DELTA}]}, "events[0]: Expected `int` >= 1"),
        ("/tasks/t/events", {"fence": 1, "events": [{"n": 1}]}, "events[0]: Object missing required field `type`"),
        (
            "/tasks/t/events",
            {"fence": 1, "events": [{"n": 1, **DELTA}, {"n": 3, **DELTA}]},
            "events[1].n is 3, and must be 2",
        ),
        (
            "/tasks/t/events",
            {"fence": 1, "events": [{"n": 1, "type": "completed"}]},
            "events[0].type is none of progress,",
        ),
        (
            "/tasks/t/events",
            {"fence": 1, "events": [{"n": 1, "type": "progress", "fraction": 2}]},
            "events[0]: Expected `float` <= 1.0 - at `$.fraction`",
        ),
        (
            "/tasks/t/events",
            {"fence": 1, "events": [{"n": 1, "type": "output", "text": "", "usage": {"cost_usd": -1}}]},
            "events[0]: Expected `float` >= 0.0 - at `$.cost_usd`",
        ),
        (
            "/tasks/t/events",
            {"fence": 1, "events": [{"n": 1, "type": "event", "name": "STREAM_END"}]},
            "is not STREAM_END",
        ),
        ("/tasks/t/finish", {"fence": 1, "n": 0}, ">= 1 - at `$.n`"),
        ("/tasks/t/finish", {"fence": 1, "n": 1, "result": [1]}, "at `$.result`"),
        ("/tasks/t/finish", {"fence": 1, "n": 1, "usage": {"input_tokens": -1}}, "at `$.usage.input_tokens`"),
        ("/tasks/t/fail", {"fence": 1, "n": 1}, "missing required field `error`"),
        ("/tasks/t/fail", {"fence": 1, "n": 1, "error": ""}, "length >= 1"),
        ("/tasks/t/fail", {"fence": 1, "n": 1, "error": "x" * 4001}, "length <= 4000"),
        ("/tasks/t/fail", {"fence": 1, "n": 1, "error": "x", "delay_seconds": 86_401}, "at `$.delay_seconds`"),
        ("/tasks/t/release", {"n": 1}, "missing required field `fence`"),
        ("/tasks/a b/release", {"n": 1, "fence": 1}, "Invalid task ID format"),
    ],
)
async def test_a_bad_request_is_a_400_that_says_what_is_wrong(
    worker: Worker, path: str, body: Any, sentence: str
) -> None:
    answer = await worker.client.post(f"{V1}{path}", json=body)
    assert answer.status_code == 400, answer.text
    assert [*answer.json()] == ["error"]
    assert sentence in answer.json()["error"]


@pytest.mark.parametrize("path", ["/claim", "/heartbeat", "/tasks/t/events", "/tasks/t/finish"])
async def test_a_body_that_is_no_json_is_a_400_and_one_too_large_a_413(worker: Worker, path: str) -> None:
    for content in (b"", b"{", b"1", b'{"worker": "\xff"}', b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}"):
        answer = await worker.client.post(f"{V1}{path}", content=content)
        assert answer.status_code == 400, content
        assert answer.json()["error"].startswith("Invalid request body: ")
    answer = await worker.client.post(f"{V1}{path}", content=b" " * (1024 * 1024 + 1))
    assert answer.status_code == 413
    assert [*answer.json()] == ["error"]


@pytest.mark.parametrize("fence", ["", "x", "-1", "1.0", "1" * 16, "\u0661"])
async def test_a_look_needs_a_fence(worker: Worker, fence: str) -> None:
    answer = await worker.client.get(f"{V1}/tasks/t", params={"fence": fence})
    assert (answer.status_code, answer.json()) == (400, {"error": "Invalid fence parameter"})


async def test_null_is_as_good_as_absent_and_unknown_fields_are_ignored(store: Store, worker: Worker) -> None:
    id_ = await submit(store)
    task = await worker.one(slots=None, wait_seconds=None, claim=None, lease_seconds=None, colour="red")
    answer = await worker.say(task, 1, {**DELTA, "agent": None, "message": None, "colour": "red"})
    assert answer.status_code == 200, answer.text
    answer = await worker.end(task, "finish", 2, result=None, usage={"model": None, "colour": 1}, colour="red")
    assert answer.json()["status"] == "completed"
    assert (await now(store, id_)).result == ""


async def test_an_unknown_task_is_a_404_and_an_unknown_path_too(worker: Worker) -> None:
    task = {"id": "nothing", "fence": 1}
    for answer in (
        await worker.say(task, 1, DELTA),
        await worker.end(task, "finish", 1),
        await worker.end(task, "fail", 1, error="x"),
        await worker.end(task, "fail", 1, error="x", retry=True),
        await worker.end(task, "release", 1),
        await worker.look(task),
    ):
        assert (answer.status_code, answer.json()) == (404, {"error": "Task not found"})
    assert (await worker.post("/nothing")).status_code == 404
    assert (await worker.client.get(f"{V1}/claim")).status_code == 405


def test_every_error_has_a_body() -> None:
    def kinds(kind: type[TaskcastError]) -> list[type[TaskcastError]]:
        return [kind, *(each for one in kind.__subclasses__() for each in kinds(one))]

    known = {
        errors.Invalid: 400,
        errors.TooLarge: 413,
        errors.Unauthorized: 401,
        errors.Forbidden: 403,
        errors.Gone: 410,
        errors.NotFound: 404,
        errors.Conflict: 409,
        errors.Stale: 409,
        errors.OutOfOrder: 409,
        errors.Unavailable: 503,
        errors.Full: 503,
        errors.Misconfigured: 500,
        TaskcastError: 500,
    }
    assert set(known) == {kind for kind in kinds(TaskcastError) if kind.__module__ == errors.__name__}
    for kind, status in known.items():
        answered, body = workers.error_body(kind("the sentence"))
        assert answered == status
        assert body["error"]
    assert "secret" not in str(workers.error_body(errors.Misconfigured("secret")))
