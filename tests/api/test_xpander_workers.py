"""xpander's workers: the real server, the real store, and workers that fall silent, leave, and stop in good order."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Self

import httpx
import pytest
from httpx_sse import EventSource, aconnect_sse

from app import claims, events, keys
from app.api.xpander import workers
from app.api.xpander.workers import SLOTS
from app.claims import Claims
from app.errors import Unavailable
from app.identity import DEVELOPMENT_KEY, Identities
from app.log import Logged
from app.queues import Claimed
from app.settings import Settings
from app.store import Store, open_store
from app.task import Status, Task
from tests.api.serving import ORG, Served, served, submit
from tests.waiting import wait_until

Json = dict[str, Any]


@pytest.fixture
async def server(store: Store, settings: Settings) -> AsyncIterator[Served]:
    async with served(store, settings) as running:
        yield running


@pytest.fixture
def never_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SWEEP_SECONDS", 1000)


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.02)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For workers that never beat."""
    monkeypatch.setattr(workers, "SILENT_SECONDS", 1000)


class Worker:
    """As the SDK: a stream, and posts and patches on connections of their own."""

    def __init__(self, client: httpx.AsyncClient, source: EventSource, agent: str) -> None:
        self.client, self.agent = client, agent
        self.source = source
        self._events = source.aiter_sse()
        self.asset: Json = {}

    @property
    def id(self) -> str:
        found: str = self.asset["id"]
        return found

    async def registered(self) -> Self:
        event = await anext(self._events)
        assert event.event == "worker-registration"
        self.asset = event.json()
        return self

    async def task(self) -> Json:
        event = await anext(self._events)
        assert event.event == "agent-execution"
        found: Json = event.json()
        return found

    async def tasks(self, count: int) -> list[str]:
        return [(await self.task())["id"] for _ in range(count)]

    async def end(self) -> list[str]:
        """What comes until the stream ends, cleanly: httpx raises otherwise."""
        return [event.event async for event in self._events]

    async def says(self, event: str, data: Any = None, *, id_: str = "") -> Json:
        path = f"/{ORG}/events/{id_ or self.id}?type=worker&agent_id={self.agent}"
        answer = await self.client.post(path, json={"id": "x", "event": event, "data": data})
        assert answer.status_code == 200, answer.text
        said: Json = answer.json()
        return said

    async def beats(self) -> Json:
        return await self.says("worker-heartbeat", "2026-11-22T22:10:00.123456")

    async def busy(self, *, is_busy: bool) -> Json:
        return await self.says("worker-capacity-update", {"is_busy": is_busy})

    async def patches(self, id_: str, **fields: Any) -> Json:
        answer = await self.client.patch(f"/agent-execution/{id_}/update", json=fields)
        assert answer.status_code == 200, answer.text
        found: Json = answer.json()
        return found

    async def completes(self, id_: str, result: str = "done") -> Json:
        await self.patches(id_, status="executing", result=None)
        return await self.patches(id_, status="completed", result=result)


@asynccontextmanager
async def working(server: Served, agent: str = "a", client: httpx.AsyncClient | None = None) -> AsyncIterator[Worker]:
    client = client or server.client
    path = f"/{ORG}/events/{agent}/?environment=local&supports_llm_gateway=true"
    async with aconnect_sse(client, "GET", path) as source:
        worker = await Worker(client, source, agent).registered()
        yield worker


async def create(server: Served, agent: str = "a", **fields: Any) -> str:
    answer = await server.client.post(f"/agent-execution/{agent}", json={"input": {"text": "why?"}, **fields})
    assert answer.status_code == 200, answer.text
    id_: str = answer.json()["id"]
    return id_


async def now(store: Store, id_: str) -> Task:
    task = await store.get(ORG, id_)
    assert task
    return task


async def is_(store: Store, id_: str, status: Status) -> bool:
    return (await now(store, id_)).status is status


async def passed(server: Served) -> None:
    """What was queued before has been seen, by all who wait: another agent's worker is given a later task."""
    async with working(server, "barrier") as other:
        id_ = await create(server, "barrier")
        assert (await other.task())["id"] == id_
        await other.completes(id_)


def place(store: Store, id_: str) -> str:
    return keys.key(store.partitions.tag(ORG, id_), "leases")


async def lease(store: Store, id_: str) -> float:
    return float(await store.door.read("ZSCORE", place(store, id_), f"{ORG}/{id_}"))


async def expire(store: Store, id_: str) -> None:
    """As time would."""
    await store.door.call("ZADD", place(store, id_), "XX", 1, f"{ORG}/{id_}")
    await store.queues.tick()


def claims_of(server: Served) -> Claims:
    found: Claims = server.server.config.app.state.claims  # type: ignore[union-attr]
    return found


async def told(store: Store, id_: str) -> list[str]:
    page = await store.events(ORG, id_, "")
    assert page
    return [events.tag(entry.event) for entry in page.entries]


# Registration


async def test_a_worker_is_registered_at_once_under_all_spellings_of_its_path(store: Store, server: Served) -> None:
    ids = set()
    for path in (
        "/events/a",
        f"/{ORG}/events/a/?environment=local&supports_llm_gateway=true",
        f"/{ORG}/events/a?environment=local/",
        f"/agent-controller//{ORG}/events/a/?environment=xpander",
        "/events/a?environment=",
    ):
        if path.endswith("="):
            assert (await server.client.get(path)).status_code == 422
            continue
        async with aconnect_sse(server.client, "GET", path) as source:
            worker = await Worker(server.client, source, "a").registered()
            assert worker.source.response.headers["content-type"].startswith("text/event-stream")
            ids.add(worker.id)
    assert len(ids) == 4
    asset = worker.asset
    assert asset == {
        "id": worker.id,
        "name": f"worker-{worker.id[:8]}",
        "organization_id": ORG,
        "type": "worker",
        "created_at": asset["created_at"],
        "created_by": None,
        "last_heartbeat": asset["created_at"],
        "dedicated_agent_id": "a",
        "parent_asset_id": None,
        "is_busy": False,
        "metadata": {"name": "a", "unique_name": "a"},
    }
    assert await store.agents.get(ORG, "a")


async def test_its_record_is_declared_lives_a_minute_and_goes_with_the_stream(store: Store, server: Served) -> None:
    async with working(server) as worker:
        name = keys.key(store.partitions.home(ORG, "worker", worker.id), "worker", ORG, worker.id)
        kind = keys.declared(name.encode())
        assert kind
        assert (await store.door.read("TYPE", name)).decode() == kind.type
        await store.door.call("EXPIRE", name, 7)
        before = await store.registrations.get(ORG, worker.id)
        assert await worker.beats() == {"id": worker.id, "registered": True}
        after = await store.registrations.get(ORG, worker.id)
        assert before
        assert after
        assert after.heartbeat_at > before.heartbeat_at
        assert 7 < await store.door.read("TTL", name) <= 60

    async def gone() -> bool:
        return await store.registrations.get(ORG, worker.id) is None

    await wait_until(gone, "its record goes")
    # A task that outlives the stream goes on to speak for it.
    assert await worker.busy(is_busy=False) == {"id": worker.id, "registered": False}
    assert not await store.door.read("EXISTS", name)
    assert not claims_of(server)._waiting
    assert not claims_of(server)._own


async def test_head_registers_nobody(server: Served) -> None:
    answer = await server.client.head(f"/{ORG}/events/a/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
    assert not claims_of(server)._waiting


async def test_a_silent_stream_is_kept_warm(store: Store, settings: Settings) -> None:
    async with (
        served(store, settings, heartbeat_seconds=0.1) as server,
        server.client.stream("GET", f"/{ORG}/events/a/") as answer,
    ):
        lines = answer.aiter_lines()
        told = [await anext(lines) for _ in range(5)]
        assert (told[0], told[2:]) == ("event: worker-registration", ["", ": ping", ": ping"])


# Dispatch


async def test_a_task_that_waited_comes_behind_the_registration_whole_and_executing(
    store: Store, server: Served
) -> None:
    id_ = await create(server, title="T\u2028", events_streaming=True)
    async with working(server) as worker:
        task = await worker.task()
        assert (task["id"], task["status"], task["worker_id"]) == (id_, "executing", worker.id)
        assert (task["input"]["text"], task["title"], task["result"]) == ("why?", "T\u2028", None)
        assert "configuration" not in task
        assert task == (await server.client.get(f"/agent-execution/{id_}/status")).json()
        assert (await now(store, id_)).worker == worker.id
        done = await worker.completes(id_, "because")
        assert (done["status"], done["result"]) == ("completed", "because")
        await wait_until(lambda: not claims_of(server)._held, "the slot is free")
    assert await told(store, id_) == ["submitted", "started", "restated"]


async def test_a_task_that_comes_later_is_dispatched_by_the_log(
    store: Store, server: Served, never_sweeps: None
) -> None:
    async with working(server) as worker:
        for i in range(3):
            id_ = await create(server)
            assert (await worker.task())["id"] == id_
            await worker.completes(id_, str(i))


async def test_the_seventh_waits_until_one_has_ended(store: Store, server: Served, never_sweeps: None) -> None:
    ids = [await create(server) for _ in range(SLOTS + 2)]
    async with working(server) as worker:
        assert await worker.tasks(SLOTS) == ids[:SLOTS]
        ids.append(await create(server))
        await passed(server)
        assert [(await now(store, id_)).status for id_ in ids[SLOTS:]] == [Status.QUEUED] * 3
        for done, expected in zip([3, 0, 5], ids[SLOTS:], strict=True):
            await worker.completes(ids[done])
            assert (await worker.task())["id"] == expected


@pytest.mark.parametrize("word", ["error", "failed", "stopped", "paused"])
async def test_whatever_ends_a_handler_frees_its_slot(
    store: Store, server: Served, never_sweeps: None, word: str
) -> None:
    ids = [await create(server) for _ in range(SLOTS + 1)]
    async with working(server) as worker:
        await worker.tasks(SLOTS)
        assert (await worker.patches(ids[2], status=word, result="no luck"))["status"] == word
        assert (await worker.task())["id"] == ids[SLOTS]


async def test_a_worker_of_six_slots_flows(store: Store, server: Served, never_sweeps: None, patient: None) -> None:
    """No sweep runs, and nobody looks: each end brings the next task."""
    ids = [await create(server) for _ in range(120)]
    most = 0
    got: list[str] = []
    async with working(server) as worker, asyncio.TaskGroup() as group:
        while len(got) < len(ids):
            got.append((await worker.task())["id"])
            running = await store.queues.running()
            most = max(most, running)
            group.create_task(worker.completes(got[-1]))
    assert got == ids
    assert 1 <= most <= SLOTS
    assert await store.queues.running() == 0


async def test_workers_share_what_waits_each_as_its_room_allows(
    store: Store, server: Served, never_sweeps: None
) -> None:
    async with working(server) as one, working(server) as other:
        ids = [await create(server) for _ in range(2 * SLOTS + 2)]
        mine, theirs = await one.tasks(SLOTS), await other.tasks(SLOTS)
        assert {*mine, *theirs} == {*ids[: 2 * SLOTS]}
        await one.completes(mine[0])
        assert (await one.task())["id"] == ids[-2]
        await other.completes(theirs[0])
        assert (await other.task())["id"] == ids[-1]


async def test_who_waits_longest_is_woken_first_and_who_is_full_is_not(
    store: Store, server: Served, never_sweeps: None
) -> None:
    waiting = claims_of(server)
    async with waiting.place(ORG, ["q"]) as one, waiting.place(ORG, ["q"]) as other, waiting.place(ORG, ["q"]) as full:
        full.full = True
        for expected, rests in ((one, other), (other, one), (one, other)):
            await submit(store, queue="q")
            await wait_until(expected.woken.is_set, "one is woken")
            assert not rests.woken.is_set()
            expected.woken.clear()
        assert not full.woken.is_set()


async def test_a_pinned_task_is_its_workers_and_one_that_runs_locally_is_nobodys(
    store: Store, server: Served, never_sweeps: None
) -> None:
    async with working(server) as one, working(server) as other:
        local = await create(server, worker_id=one.id, run_locally=True, source="sdk")
        for worker in (other, one, other):
            id_ = await create(server, worker_id=worker.id)
            task = await worker.task()
            assert (task["id"], task["worker_id"]) == (id_, worker.id)
        assert (await now(store, local)).status is Status.QUEUED
        # The worker that made it has begun it by itself.
        assert (await one.completes(local, "mine"))["result"] == "mine"


async def test_an_agents_tasks_are_its_own_and_its_queue_is_its_records(
    store: Store, server: Served, never_sweeps: None
) -> None:
    await store.agents.save(ORG, "b", queue="shared")
    async with working(server, "a") as one, working(server, "b") as other:
        of_a, of_b = await create(server, "a"), await create(server, "b")
        assert (await one.task())["id"] == of_a
        assert (await other.task())["id"] == of_b
        assert (await now(store, of_b)).queue == "shared"
        by_hand = await submit(store, queue="shared", agent="b")
        assert (await other.task())["id"] == by_hand


async def test_another_organisations_tasks_and_workers_are_not_there(
    store: Store, settings: Settings, server: Served
) -> None:
    key = await Identities(store, settings).create("acme", "", "")
    async with (
        httpx.AsyncClient(base_url=server.url, headers={"X-API-Key": key}, timeout=20) as theirs,
        working(server) as worker,
    ):
        assert (await theirs.get(f"/{ORG}/events/a/")).status_code == 404
        said = {"event": "worker-finished", "data": {}}
        assert (await theirs.post(f"/{ORG}/events/{worker.id}", json=said)).status_code == 404
        assert (await theirs.post(f"/events/{worker.id}", json=said)).json()["registered"] is False
        assert (await worker.beats())["registered"] is True
        pinned = {"input": {"text": "mine?"}, "worker_id": worker.id}
        for body in ({"input": {"text": "mine?"}}, pinned):
            assert (await theirs.post("/agent-execution/a", json=body)).status_code == 200
        async with aconnect_sse(theirs, "GET", "/acme/events/a/") as source:
            other = await Worker(theirs, source, "a").registered()
            assert other.asset["organization_id"] == "acme"
            assert (await other.task())["organization_id"] == "acme"
            own = await create(server)
            assert (await worker.task())["id"] == own


async def test_a_stopped_task_keeps_its_slot_until_the_worker_says_that_it_is_free(
    store: Store, server: Served, never_sweeps: None, looks_often: None
) -> None:
    ids = [await create(server) for _ in range(SLOTS + 1)]
    async with working(server) as worker:
        await worker.tasks(SLOTS)
        await worker.busy(is_busy=True)
        for id_ in ids[:2]:
            assert (await server.client.delete(f"/agent-execution/{id_}")).json()["status"] == "stopped"
        before = await lease(store, ids[3])

        async def looked() -> bool:
            return await lease(store, ids[3]) > before

        await wait_until(looked, "its leases are renewed")
        await passed(server)
        assert (await now(store, ids[SLOTS])).status is Status.QUEUED
        await worker.busy(is_busy=False)
        assert (await worker.task())["id"] == ids[SLOTS]


async def test_who_says_nothing_of_its_slots_is_not_waited_for(
    store: Store, server: Served, never_sweeps: None, looks_often: None
) -> None:
    ids = [await create(server) for _ in range(SLOTS + 1)]
    async with working(server) as worker:
        await worker.tasks(SLOTS)
        await server.client.delete(f"/agent-execution/{ids[0]}")
        assert (await worker.task())["id"] == ids[SLOTS]


async def test_posts_that_overtake_one_another_leave_no_slot_unused(
    store: Store, server: Served, never_sweeps: None, looks_often: None
) -> None:
    async with working(server) as worker:
        for _ in range(2):
            ids = [await create(server) for _ in range(SLOTS)]
            assert await worker.tasks(SLOTS) == ids
            for id_ in ids:
                await worker.completes(id_)
                await worker.busy(is_busy=False)
            await worker.busy(is_busy=True)


async def test_an_attempt_is_over_with_its_own_end_however_late_the_log_is_heard(store: Store) -> None:
    heard: list[Logged] = []
    async with store.watch(heard.append):
        id_ = await submit(store)
        (first,) = await store.claim(["default"], "w", 1)
        await store.append(ORG, id_, events.Requeued(), fence=first.fence)
        (second,) = await store.claim(["default"], "w", 1)
        await store.append(ORG, id_, events.Restated(to="completed"))
        await wait_until(lambda: len(heard) == 5, "the log is heard")
    for attempt, end in ((first, heard[2]), (second, heard[4])):
        over: list[Logged] = []
        waiting = Claims(store)
        waiting.hold(attempt, over.append)
        for one in heard:
            waiting._hear(one)
        assert over[0] is end
        waiting.drop(attempt)
        waiting.drop(attempt)
        assert not waiting._held


async def test_what_is_lost_in_the_log_a_renewal_tells(
    store: Store, server: Served, never_sweeps: None, looks_often: None
) -> None:
    ids = [await create(server) for _ in range(SLOTS + 1)]
    async with working(server) as worker:
        await worker.tasks(SLOTS)
        claims_of(server)._held.clear()
        await worker.completes(ids[0])
        await worker.busy(is_busy=False)
        assert (await worker.task())["id"] == ids[SLOTS]


# Leases


async def test_the_leases_of_a_worker_that_is_heard_are_kept(store: Store, server: Served, looks_often: None) -> None:
    id_ = await create(server)
    async with working(server) as worker:
        await worker.task()
        before = await lease(store, id_)

        async def kept() -> bool:
            return await lease(store, id_) > before + 100

        await wait_until(kept, "its lease is renewed")


async def test_a_worker_that_falls_silent_is_sent_away_and_its_task_is_the_next_ones(
    store: Store, server: Served, looks_often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SILENT_SECONDS", 0.5)
    id_ = await create(server)
    async with working(server) as silent:
        await silent.task()
        assert await silent.end() == []
    async with working(server) as worker:
        beating = asyncio.create_task(beat(worker))
        await expire(store, id_)
        assert (await worker.task())["id"] == id_
        assert (await now(store, id_)).worker == worker.id
        # Whoever is first counts.
        assert (await silent.completes(id_, "late"))["result"] == "late"
        assert (await worker.completes(id_, "later"))["result"] == "late"
        beating.cancel()
    assert await told(store, id_) == ["submitted", "started", "lease_lost", "started", "restated"]


async def test_a_task_whose_end_was_lost_returns_though_its_worker_lives(
    store: Store, server: Served, looks_often: None
) -> None:
    id_ = await create(server)
    async with working(server) as worker:
        await worker.task()
        beating = asyncio.create_task(beat(worker))
        await passed(server)
        assert await is_(store, id_, Status.RUNNING)
        await worker.busy(is_busy=False)  # its PATCH was lost on the way
        claims_ = claims_of(server)
        await wait_until(lambda: not claims_._held, "the task is given up")
        await expire(store, id_)
        assert (await worker.task())["id"] == id_
        assert (await worker.completes(id_))["execution_attempts"] == 2
        beating.cancel()


async def beat(worker: Worker) -> None:
    while True:
        await worker.beats()
        await asyncio.sleep(0.01)


async def test_a_worker_that_beats_is_never_silent(
    store: Store, server: Served, looks_often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SILENT_SECONDS", 0.5)
    loop = asyncio.get_running_loop()
    async with working(server) as worker:
        until = loop.time() + 1.5
        while loop.time() < until:
            assert (await worker.beats())["registered"]
        id_ = await create(server)
        assert (await worker.task())["id"] == id_


async def test_heartbeats_count_at_any_process(
    store: Store, settings: Settings, server: Served, looks_often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SILENT_SECONDS", 0.5)
    loop = asyncio.get_running_loop()
    async with open_store(settings) as elsewhere, served(elsewhere, settings) as other, working(server) as worker:
        ids = [await create(other) for _ in range(SLOTS + 1)]
        assert await worker.tasks(SLOTS) == ids[:SLOTS]
        worker.client = other.client
        until = loop.time() + 1.5
        while loop.time() < until:
            assert (await worker.beats())["registered"]
        await worker.completes(ids[0])
        assert (await worker.task())["id"] == ids[SLOTS]


async def test_two_processes_share_an_agents_tasks(store: Store, settings: Settings, server: Served) -> None:
    async with (
        open_store(settings) as elsewhere,
        served(elsewhere, settings) as other,
        working(server) as one,
        working(other) as two,
    ):
        ids = [await create(server) for _ in range(2 * SLOTS)]
        assert {*await one.tasks(SLOTS), *await two.tasks(SLOTS)} == {*ids}


async def test_a_worker_that_is_killed_loses_its_task_within_a_lease_and_a_sweep(store: Store, server: Served) -> None:
    id_ = await create(server)
    async with working(server) as killed:
        await killed.task()
    loop = asyncio.get_running_loop()
    left_at = loop.time()
    async with working(server) as worker:
        beating = asyncio.create_task(beat(worker))
        assert (await worker.task())["id"] == id_
        beating.cancel()
    assert loop.time() - left_at < store.settings.lease_seconds + 5  # a loaded machine


async def test_a_worker_that_says_it_has_finished_is_released(server: Served, looks_often: None) -> None:
    async with working(server) as worker:
        assert (await worker.says("worker-finished", {}))["registered"] is False
        assert await worker.end() == []


async def test_a_client_that_leaves_with_its_task_on_the_way_loses_it_and_no_attempt(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, go = asyncio.Event(), asyncio.Event()
    claim = store.claim

    async def slow(*args: Any, **options: Any) -> list[Claimed]:
        found = await claim(*args, **options)
        if found:
            got.set()
            await go.wait()
        return found

    async with working(server):
        monkeypatch.setattr(store, "claim", slow)
        id_ = await create(server)
        await got.wait()
    await wait_until(lambda: len(server.server.server_state.connections) == 1, "the server knows")
    go.set()
    await wait_until(lambda: is_(store, id_, Status.QUEUED), "given back")
    assert (await now(store, id_)).attempts_left == 3


# Ends


async def test_a_drain_ends_the_stream_cleanly_so_that_the_worker_comes_back(store: Store, settings: Settings) -> None:
    async with served(store, settings, grace_seconds=20) as server:
        id_ = await create(server)
        async with working(server) as worker:
            await worker.task()
            server.server.stop()
            assert await worker.end() == []
    # Its task is still its own: it may end it elsewhere.
    async with served(store, settings) as server:
        assert (await now(store, id_)).status is Status.RUNNING
        worker.client = server.client
        assert (await worker.completes(id_))["status"] == "completed"


async def test_who_may_not_have_a_stream_gets_an_empty_one(store: Store, settings: Settings) -> None:
    async with served(store, settings, streams_per_key=1) as server, working(server) as worker:
        async with aconnect_sse(server.client, "GET", f"/{ORG}/events/a/") as source:
            assert await Worker(server.client, source, "a").end() == []
        id_ = await create(server)
        assert (await worker.task())["id"] == id_


async def test_a_store_that_is_away_costs_no_worker_its_stream(
    store: Store, server: Served, looks_often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any, **__: Any) -> Any:
        raise Unavailable("cannot connect to /data/valkey.sock")

    monkeypatch.setattr(workers, "SILENT_SECONDS", 0.5)
    loop = asyncio.get_running_loop()
    async with working(server) as worker:
        with monkeypatch.context() as patched:
            for part, name in ((store, "claim"), (store, "renew"), (store.registrations, "get")):
                patched.setattr(part, name, away)
            id_ = await create(server)
            until = loop.time() + 1
            await wait_until(lambda: loop.time() > until, "longer than a worker may be silent")
            patched.setattr(store.registrations, "add", away)
            async with aconnect_sse(server.client, "GET", f"/{ORG}/events/a/") as source:
                assert await Worker(server.client, source, "a").end() == []
        beating = asyncio.create_task(beat(worker))
        assert (await worker.task())["id"] == id_
        beating.cancel()


async def test_a_task_that_cannot_be_read_in_full_goes_back(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> Any:
        raise Unavailable("away")

    async def back() -> bool:
        return "requeued" in await told(store, id_)

    id_ = await create(server, user_oidc_token="secret")
    with monkeypatch.context() as patched:
        patched.setattr(store, "hidden", away)
        async with working(server):
            await wait_until(back, "it goes back")
    async with working(server) as worker:
        task = await worker.task()
        assert (task["id"], task["user_oidc_token"]) == (id_, "secret")
        assert (await now(store, id_)).attempts_left == 2


async def test_a_log_that_cannot_be_watched_is_an_empty_stream(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> Any:
        raise Unavailable("away")

    monkeypatch.setattr(store, "watch", broken)
    async with aconnect_sse(server.client, "GET", f"/{ORG}/events/a/") as source:
        assert await Worker(server.client, source, "a").end() == []
    assert not claims_of(server)._waiting


async def test_a_fault_of_ours_ends_the_stream_cleanly_too(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Task) -> Json:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(workers, "task_body", broken)
    async with working(server) as worker:
        await create(server)
        assert await worker.end() == []


# Hostile


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b"", ["body"]),
        (b"{", ["body"]),
        (b"[]", ["body"]),
        (b"null", ["body"]),
        (b'{"data": {}}', ["body", "event"]),
        (b'{"event": 7}', ["body", "event"]),
        (b'{"event": "worker-registration"}', ["body", "event"]),
        (b'{"event": "worker-capacity-update"}', ["body", "data"]),
        (b'{"event": "worker-capacity-update", "data": []}', ["body", "data"]),
        (b'{"event": "worker-capacity-update", "data": {"is_busy": null}}', ["body", "data", "is_busy"]),
        (b"[" * 2000, ["body"]),
        (b'{"event": "\xff"}', ["body"]),
    ],
)
async def test_garbage_is_422_and_changes_nothing(server: Served, body: bytes, where: list[str]) -> None:
    async with working(server) as worker:
        answer = await server.client.post(f"/{ORG}/events/{worker.id}?type=worker&agent_id=a", content=body)
        assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, where)
        assert (await worker.beats())["registered"]


@pytest.mark.parametrize(
    "path", ["/events/a%20b", "/events/%00", f"/events/{'x' * 129}", "/events/a?environment=moon", "/events/a%0A"]
)
async def test_what_names_no_agent_and_no_environment_is_422(server: Served, path: str) -> None:
    answer = await server.client.get(path)
    assert answer.status_code == 422, answer.text
    assert not claims_of(server)._waiting


async def test_other_verbs_and_deeper_paths_are_refused_as_json(server: Served) -> None:
    assert (await server.client.delete("/events/a")).json() == {"detail": "Method not allowed"}
    assert (await server.client.get("/events")).status_code == 404
    assert (await server.client.get(f"/{ORG}/events/a/b")).status_code == 404


async def test_a_body_without_end_is_refused(server: Served) -> None:
    body = b'{"event": "worker-heartbeat", "data": "' + b"x" * (300 * 1024)
    assert (await server.client.post("/events/w", content=body)).status_code == 413


async def test_unknown_fields_and_unknown_workers_are_no_fault(server: Served) -> None:
    body = {"event": "worker-heartbeat", "data": {"any": ["thing"]}, "more": 1}
    answer = await server.client.post("/events/nobody?type=gateway&x=1", json=body)
    assert (answer.status_code, answer.json()) == (200, {"id": "nobody", "registered": False})


async def test_a_key_is_needed_and_a_native_workers_key_is_for_its_own_routes(
    store: Store, settings: Settings, server: Served
) -> None:
    """It could not say how a task ended: `PATCH …/update` is refused to it as well."""
    key = await Identities(store, settings).create(ORG, "", "", worker=True)
    for headers, status in (({}, 401), ({"X-API-Key": "sk_no"}, 401), ({"X-API-Key": key}, 403)):
        async with httpx.AsyncClient(base_url=server.url, headers=headers) as client:
            for answer in (
                await client.get(f"/{ORG}/events/a/"),
                await client.post(f"/{ORG}/events/w", json={"event": "worker-heartbeat"}),
            ):
                assert answer.status_code == status
                assert isinstance(answer.json()["detail"], str)


async def test_many_workers_come_and_go_and_leave_nothing(store: Store, server: Served, patient: None) -> None:
    limits = httpx.Limits(max_connections=None)
    headers = {"X-API-Key": DEVELOPMENT_KEY}
    async with (
        httpx.AsyncClient(base_url=server.url, headers=headers, timeout=20, limits=limits) as many,
        AsyncExitStack() as stack,
    ):
        found = [await stack.enter_async_context(working(server, client=many)) for _ in range(30)]
        ids = {await create(server) for _ in range(30 * SLOTS)}
        assert {id_ for worker in found for id_ in await worker.tasks(SLOTS)} == ids
    await wait_until(lambda: not claims_of(server)._waiting, "all have left")
    assert not claims_of(server)._held
    assert not claims_of(server)._own
