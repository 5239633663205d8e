"""Queues: who gets what, for how long, and what follows when a worker falls silent."""

import asyncio
from typing import Any

import pytest

from app import events, keys
from app.errors import Stale
from app.events import Submission
from app.queues import Claimed, lost
from app.store import Store
from app.task import Status
from tests.waiting import wait_until


async def submit(store: Store, id_: str, **more: Any) -> None:
    values: dict[str, Any] = {"id": id_, "org": "o", "query": "?", "submission": id_} | more
    await store.submit(Submission(**values))


async def claim(store: Store, free: int = 10, queues: tuple[str, ...] = ("default",)) -> list[str]:
    return [one.task for one in await store.claim(queues, "w", free)]


async def status(store: Store, id_: str) -> Status:
    task = await store.get("o", id_)
    assert task is not None
    return task.status


async def expire(store: Store, id_: str) -> None:
    """Ends the lease as time would."""
    tag = store.partitions.tag("o", id_)
    await store.door.call("ZADD", keys.key(tag, "leases"), "XX", 1, keys.member("o", id_))


async def test_the_oldest_ready_task_comes_first_over_all_queues_and_no_more_than_asked(store: Store) -> None:
    for i in range(6):
        await submit(store, f"t{i}", queue=f"q{i % 2}")
    assert await claim(store, 4, ("q0", "q1")) == ["t0", "t1", "t2", "t3"]
    assert await claim(store, 4, ("q0", "q1")) == ["t4", "t5"]
    assert await claim(store, 4, ("q0", "q1")) == []


async def test_a_priority_counts_as_waiting_longer(store: Store) -> None:
    for i, priority in enumerate([0, 1, 2, 0]):
        await submit(store, f"t{i}", priority=priority)
    assert await claim(store) == ["t2", "t1", "t0", "t3"]


async def test_a_delayed_task_is_not_ready_before_its_time(store: Store) -> None:
    await submit(store, "t", delay_seconds=0.3)
    assert await claim(store) == []
    found: list[str] = []

    async def ready() -> bool:
        found.extend(await claim(store))
        return bool(found)

    await wait_until(ready, "the delay ends")
    task = await store.get("o", "t")
    assert task is not None
    assert task.started_at >= task.created_at + 300_000


async def test_racing_workers_never_share_a_task(store: Store) -> None:
    for i in range(100):
        await submit(store, f"t{i}")
    claims = await asyncio.gather(*(store.claim(["default"], f"w{i}", 7) for i in range(20)))
    taken = [one.task for claimed in claims for one in claimed]
    assert len(taken) == len(set(taken)) == 100


async def test_a_repeated_claim_call_answers_with_the_same_tasks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await submit(store, "t0")
    await submit(store, "t1")
    monkeypatch.setattr("app.queues.secrets.token_hex", lambda _: "same")
    assert await claim(store, 1) == ["t0"]
    assert await claim(store, 1) == ["t0"]
    assert await status(store, "t1") is Status.QUEUED


async def test_an_expired_lease_requeues_until_the_attempts_are_used_up(store: Store) -> None:
    await submit(store, "t", max_attempts=2)
    (first,) = await store.claim(["default"], "w1", 1)
    await expire(store, "t")
    assert await store.queues.tick() == 1
    assert await status(store, "t") is Status.QUEUED
    (second,) = await store.claim(["default"], "w2", 1)
    assert second.fence == first.fence + 1
    with pytest.raises(Stale):
        await store.append("o", "t", events.Completed(result="late"), fence=first.fence, n=1)
    await expire(store, "t")
    await store.queues.tick()
    task = await store.get("o", "t")
    assert task is not None
    assert (task.status, task.error) == (Status.ERRORED, "The worker stopped answering (2 times).")


async def test_a_paused_task_whose_worker_dies_is_held_and_resumes_from_the_queue(store: Store) -> None:
    await submit(store, "t")
    await claim(store)
    await store.append("o", "t", events.PauseAsked())
    await expire(store, "t")
    await store.queues.tick()
    assert await status(store, "t") is Status.HELD
    assert await claim(store) == []
    await store.append("o", "t", events.Resumed())
    assert await claim(store) == ["t"]


async def test_a_renewed_lease_does_not_expire_and_a_lost_one_is_told(store: Store) -> None:
    await submit(store, "t")
    (held,) = await store.claim(["default"], "w", 1)
    await expire(store, "t")
    other, nobody = Claimed("o", "t", held.fence + 1, held.found), Claimed("o", "nobody", 1, held.found)
    assert await store.renew([held, other, nobody]) == {held: "running", other: "", nobody: ""}
    assert await store.queues.tick() == 0
    await store.append("o", "t", events.Cancelled())
    assert await store.renew([held]) == {held: ""}


async def test_a_renewal_between_the_tickers_look_and_its_append_wins(store: Store) -> None:
    await submit(store, "t")
    (held,) = await store.claim(["default"], "w", 1)
    await expire(store, "t")
    await store.renew([held])
    with pytest.raises(Stale):
        await store.log.append("o", "t", lost("running", 1, 2), seen=("leases", b"1"))
    assert await status(store, "t") is Status.RUNNING


@pytest.mark.parametrize("before", ["queued", "running", "held"])
async def test_a_deadline_ends_a_task_in_whatever_state_without_any_worker(store: Store, before: str) -> None:
    await submit(store, "t", deadline_seconds=0.2)
    if before == "running":
        await claim(store)
    if before == "held":
        await store.append("o", "t", events.PauseAsked())

    async def ended() -> bool:
        await store.queues.tick()
        return await status(store, "t") is Status.TIMED_OUT

    await wait_until(ended, "the deadline passes")
    task = await store.get("o", "t")
    assert task is not None
    assert task.finished_at >= task.deadline_at
    assert [d async for d in store.snapshots.verify()] == []


async def test_a_task_that_ended_in_time_does_not_time_out(store: Store) -> None:
    await submit(store, "t", deadline_seconds=0.05)
    (held,) = await store.claim(["default"], "w", 1)
    await store.append("o", "t", events.Completed(result="x"), fence=held.fence, n=1)
    (tag,) = store.partitions.tags
    assert await store.door.read("ZCARD", keys.key(tag, "due")) == 0


async def test_ten_racing_tickers_append_one_consequence(store: Store) -> None:
    await submit(store, "t")
    await claim(store)
    await expire(store, "t")
    assert sum(await asyncio.gather(*(store.queues.tick() for _ in range(10)))) == 1


async def test_an_idle_worker_wakes_when_a_task_arrives(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.queues.SWEEP_SECONDS", 9.0)
    async with store.queues.waiting(["default"]) as wait:
        waiting = asyncio.ensure_future(wait())
        (tag,) = store.partitions.tags

        async def blocked() -> bool:
            return int((await store.door.read("INFO", "clients"))["blocked_clients"]) == 1

        await wait_until(blocked, "the worker waits")
        await submit(store, "t")
        async with asyncio.timeout(5):  # the sweep would come only after nine seconds
            await waiting
    assert await store.door.read("LLEN", keys.key(tag, "wake", "default")) == 0


async def test_wake_tokens_that_nobody_takes_are_bounded(store: Store) -> None:
    for i in range(100):
        await submit(store, f"t{i}")
    (tag,) = store.partitions.tags
    assert await store.door.read("LLEN", keys.key(tag, "wake", "default")) == 64


async def test_ended_tasks_are_forgotten_by_age_and_others_never(store: Store) -> None:
    for id_ in ("old", "continued", "open"):
        await submit(store, id_)
    for id_ in ("old", "continued"):
        await store.append("o", id_, events.Cancelled())
    assert await store.queues.forget(3600) == 0
    await store.append("o", "continued", events.Continued(query="more", submission="2"))
    assert await store.snapshots.count() == 3

    async def forgotten() -> bool:
        return await store.queues.forget(0) == 1

    await wait_until(forgotten, "the clock's next second")
    assert await store.get("o", "old") is None
    assert await store.get("o", "continued") is not None
    assert await store.get("o", "open") is not None
    assert await store.snapshots.count() == 2
    assert [d async for d in store.snapshots.verify()] == []
