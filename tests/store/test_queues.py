"""Queues: who gets what, for how long, and what follows when a worker falls silent."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError

from app import events, keys
from app.errors import Conflict, Invalid, Stale, Unavailable
from app.events import Submission
from app.line import Arg, Line
from app.queues import Claimed, Waiting, lost
from app.settings import Settings
from app.store import Store, open_store
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


async def clean(store: Store) -> bool:
    return [difference async for difference in store.snapshots.verify()] == []


async def ahead(store: Store, seconds: int) -> None:
    """Sets the store's clock: the log's last id counts where it is later than the server's."""
    (tag,) = store.partitions.tags
    now, _ = await store.door.read("TIME")
    await store.door.call("XADD", keys.key(tag, "log"), f"{(int(now) + seconds) * 1000}-0", "n", 2, "x", "y")


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


# A worker that waits


@pytest.fixture(params=[1, 3])
async def any_width(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(Settings(data=tmp_path / "wide", partitions=request.param)) as store:
        yield store


@asynccontextmanager
async def waiting(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Waiting, asyncio.Task[list[Claimed]]]]:
    """One that waits already, and which nothing but a word wakes: its sweep would come only after nine seconds."""
    monkeypatch.setattr("app.queues.SWEEP_SECONDS", 9.0)
    async with store.queues.waiting({"default": 0}, "w") as wait:
        claiming = asyncio.create_task(wait.claim(2))

        async def blocked() -> bool:
            return int((await store.door.read("INFO", "clients"))["blocked_clients"]) == len(store.partitions.tags)

        await wait_until(blocked, "the worker waits")
        async with asyncio.timeout(5):
            yield wait, claiming
            await asyncio.wait([claiming])


async def left(store: Store, kind: str) -> list[str]:
    """Keys of that kind."""
    return [name for tag in store.partitions.tags async for name in store.snapshots._scan(f"{keys.prefix(tag)}{kind}*")]


async def test_an_idle_worker_has_a_task_as_soon_as_it_arrives(
    any_width: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with waiting(any_width, monkeypatch) as (_, claiming):
        await submit(any_width, "t")
        (claimed,) = await claiming
    assert (claimed.task, claimed.found.status, claimed.found.worker) == ("t", Status.RUNNING, "w")
    assert await left(any_width, "wake") == []


async def test_a_wait_that_is_ended_claims_nothing_and_leaves_nothing(
    any_width: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with waiting(any_width, monkeypatch) as (wait, claiming):
        await wait.end()
        assert await claiming == []
        await submit(any_width, "t")
        assert await wait.claim(2) == []
    await wait.end()
    assert await status(any_width, "t") is Status.QUEUED
    assert await left(any_width, "stop") == []


async def test_a_wait_ends_although_the_store_is_away(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: Any, **__: Any) -> None:
        raise Unavailable("away")

    async with waiting(store, monkeypatch) as (wait, claiming):
        monkeypatch.setattr(store.door, "call", away)
        await wait.end()
        with pytest.raises(Unavailable):
            await claiming


@pytest.mark.parametrize("answered", [False, True])
async def test_what_a_wait_claimed_is_not_lost_with_its_connection(
    store: Store, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    real = Line.trip

    async def trip(line: Line, commands: Sequence[tuple[Arg, ...]], *tell: Callable[[Any], object]) -> list[Any]:
        if commands[0][0] != "BLPOP":
            return await real(line, commands, *tell)
        if answered:
            await real(line, commands, *tell)
        raise ConnectionResetError("gone")

    await submit(store, "t")
    monkeypatch.setattr(Line, "trip", trip)
    async with store.queues.waiting({"default": 0}, "w") as wait:
        if answered:
            assert [one.task for one in await wait.claim(2)] == ["t"]
        else:
            with pytest.raises(Unavailable):
                await wait.claim(2)
    assert await status(store, "t") is (Status.RUNNING if answered else Status.QUEUED)


async def test_a_server_that_forgot_its_scripts_gives_a_waiting_worker_its_task(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with waiting(store, monkeypatch) as (_, claiming):
        await store.door.call("SCRIPT", "FLUSH")
        await submit(store, "t")
        assert [one.task for one in await claiming] == ["t"]


@pytest.mark.parametrize("kind", ["wake", "claim"])
async def test_a_wait_that_the_store_refuses_says_so(store: Store, kind: str) -> None:
    (tag,) = store.partitions.tags
    if kind == "wake":
        await store.door.call("SET", keys.key(tag, "wake", "default"), "no list")
    else:
        await submit(store, "t")
        await store.door.call("DEL", keys.key(tag, "leases"))
        await store.door.call("SET", keys.key(tag, "leases"), "no set")
    async with store.queues.waiting({"default": 0}, "w") as wait:
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            await wait.claim(2)


async def test_what_is_claimed_behind_a_refused_wait_is_not_forgotten(store: Store) -> None:
    await submit(store, "t")
    (tag,) = store.partitions.tags
    await store.door.call("DEL", keys.key(tag, "wake", "default"))
    await store.door.call("SET", keys.key(tag, "wake", "default"), "no list")
    async with store.queues.waiting({"default": 0}, "w") as wait:
        assert [one.task for one in await wait.claim(2)] == ["t"]


async def test_a_frozen_store_holds_up_no_stop(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.line.TIMEOUT_SECONDS", 3600)
    pid = int((await store.door.read("INFO", "server"))["process_id"])
    async with waiting(store, monkeypatch) as (wait, claiming):
        os.kill(pid, signal.SIGSTOP)
        try:
            await wait.end()
            with pytest.raises(Unavailable):
                await claiming
        finally:
            os.kill(pid, signal.SIGCONT)


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


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({"ttl_seconds": 60}, "The task waited in its queue for longer than its time to live."),
        ({"ttl_seconds": 60, "deadline_seconds": 90}, "The task waited in its queue for longer than its time to live."),
        ({"ttl_seconds": 90, "deadline_seconds": 60}, "The task exceeded its deadline."),
    ],
)
@pytest.mark.parametrize("before", ["queued", "held", "delayed"])
async def test_a_task_that_nobody_began_in_time_is_timed_out_by_the_earlier_of_its_limits(
    store: Store, limits: dict[str, Any], error: str, before: str
) -> None:
    await submit(store, "t", **limits, delay_seconds=30 if before == "delayed" else 0)
    if before == "held":
        await store.append("o", "t", events.PauseAsked())
    await ahead(store, 59)
    assert await store.queues.tick() == 0
    await ahead(store, 61)
    assert await store.queues.tick() == 1
    task = await store.get("o", "t")
    assert task is not None
    assert (task.status, task.error) == (Status.TIMED_OUT, error)
    assert await clean(store)


@pytest.mark.parametrize("deadline", [0, 90])
async def test_a_task_that_was_begun_in_time_has_only_its_deadline_left(store: Store, deadline: int) -> None:
    await submit(store, "t", ttl_seconds=60, deadline_seconds=deadline)
    (one,) = await store.claim(["default"], "w", 1)
    assert await clean(store)
    await store.append("o", "t", events.Requeued(), fence=one.fence, n=1)
    await ahead(store, 61)
    assert await store.queues.tick() == 0
    assert await status(store, "t") is Status.QUEUED
    await ahead(store, 91)
    assert await store.queues.tick() == (1 if deadline else 0)
    assert await clean(store)


@pytest.mark.parametrize("limit", ["ttl_seconds", "deadline_seconds"])
async def test_workers_that_come_before_the_ticker_do_not_begin_what_is_over(store: Store, limit: str) -> None:
    """As after a night in which no process ran."""
    for i in range(150):
        await submit(store, f"old{i}", **{limit: 1})
    await submit(store, "t")
    await ahead(store, 2)
    assert await claim(store, 2) == ["t"]
    assert await status(store, "old0") is Status.QUEUED
    assert await store.queues.tick() == 150
    assert await status(store, "old0") is Status.TIMED_OUT
    assert await clean(store)


@pytest.mark.parametrize("limit", ["ttl_seconds", "deadline_seconds"])
async def test_a_task_whose_time_is_over_before_its_delay_is_refused(store: Store, limit: str) -> None:
    with pytest.raises(Invalid, match="could never start"):
        await submit(store, "t", delay_seconds=10, **{limit: 10})
    await submit(store, "t", delay_seconds=10, **{limit: 10.5})


async def test_a_low_priority_gets_its_turn_under_a_constant_flow_of_high_ones(store: Store) -> None:
    await submit(store, "low")
    await submit(store, "middle", priority=1)
    await ahead(store, 538)
    await submit(store, "h1", priority=2)
    assert await claim(store, 1) == ["h1"]
    await ahead(store, 542)  # 9 minutes between the two head starts
    await submit(store, "h2", priority=2)
    assert await claim(store, 1) == ["middle"]
    await ahead(store, 602)
    for i in range(3, 30):
        await submit(store, f"h{i}", priority=2)
    assert await claim(store, 2) == ["h2", "low"]
    assert await clean(store)


async def test_a_delayed_task_counts_from_the_end_of_its_delay_whatever_its_priority(store: Store) -> None:
    await submit(store, "high", priority=2, delay_seconds=10)
    await submit(store, "low")
    assert await claim(store, 1) == ["low"]
    assert await claim(store, 1) == []
    await ahead(store, 11)
    assert await claim(store, 1) == ["high"]


async def test_a_retried_task_has_all_its_attempts_again_and_a_higher_fence(store: Store) -> None:
    await submit(store, "t", max_attempts=1, session="s", deadline_seconds=60)
    (first,) = await store.claim(["default"], "w", 1)
    await store.append("o", "t", events.TextDelta(text="half"), fence=first.fence, n=1)
    await store.append("o", "t", events.Errored(error="no"), fence=first.fence, n=2)
    await store.append("o", "t", events.Retried(deadline_seconds=30), operation="op")
    assert (await store.append("o", "t", events.Retried(), operation="op")).duplicate
    task = await store.get("o", "t")
    assert task is not None
    assert (task.status, task.turn, task.attempts_left, task.error, task.finished_at) == (Status.QUEUED, 1, 1, "", 0)
    assert task.deadline_at > task.queued_at
    assert await clean(store)
    (second,) = await store.claim(["default"], "w", 1)
    assert (second.fence, second.found.attempt) == (first.fence + 1, 1)
    with pytest.raises(Stale):
        await store.append("o", "t", events.Completed(result="late"), fence=first.fence, n=3)
    await store.append("o", "t", events.Completed(result="x"), fence=second.fence, n=1)
    with pytest.raises(Conflict):
        await store.append("o", "t", events.Retried())
    (tag,) = store.partitions.tags
    assert await store.door.read("ZCARD", keys.key(tag, "due")) == 0


async def test_a_claim_for_one_organisation_takes_only_its_tasks_and_leaves_both_queues_in_step(store: Store) -> None:
    for i in range(4):
        await submit(store, f"t{i}", org=("o", "p")[i % 2], submission=f"r{i}")
    taken = await store.claim(["default"], "w", 9, org="p")
    assert [(one.org, one.task) for one in taken] == [("p", "t1"), ("p", "t3")]
    assert await clean(store)
    await store.append("p", "t1", events.Requeued(), fence=taken[0].fence, n=1)
    await store.append("p", "t3", events.Cancelled())
    await store.append("o", "t0", events.PauseAsked())
    await store.delete("o", "t2")
    assert await clean(store)
    assert [one.task for one in await store.claim(["default"], "w", 9, org="o")] == []
    await store.append("o", "t0", events.Resumed())
    await store.snapshots.rebuild()
    assert await clean(store)
    assert [one.task for one in await store.claim(["default"], "w", 9, org="o")] == ["t0"]
    assert [one.task for one in await store.claim(["default"], "w", 9)] == ["t1"]
    (tag,) = store.partitions.tags
    left = [name async for name in store.snapshots._scan(f"{keys.prefix(tag)}ready*")]
    assert left == []


async def test_what_somebody_else_put_in_a_queue_leaves_it_and_stops_neither_workers_nor_ticker(store: Store) -> None:
    (tag,) = store.partitions.tags
    strays = ("o/ghost", "neither", "/", "p/ghost")
    for name in (("ready", "default"), ("ready-of", "o:default"), ("leases",)):
        await store.door.call("ZADD", keys.key(tag, *name), *(word for one in strays for word in (1, one)))
    await store.door.call("ZADD", keys.key(tag, "due"), 1, "no slash", 1, "o/nobody")
    await submit(store, "t", deadline_seconds=60)
    assert await claim(store, len(strays)) == []
    assert await claim(store) == ["t"]
    assert await store.door.read("ZRANGE", keys.key(tag, "ready", "default"), 0, -1) == []
    assert await store.door.read("ZSCORE", keys.key(tag, "ready-of", "o:default"), "o/ghost") is None
    assert await store.queues.tick() == 0
    await expire(store, "t")
    assert await store.queues.tick() == 1


async def test_claims_of_one_name_by_two_organisations_or_two_workers_never_meet(store: Store) -> None:
    for i in range(3):
        await submit(store, f"t{i}", org=("o", "p", "o")[i], submission=f"r{i}")
    (mine,) = await store.claim(["default"], "w", 1, org="o", claim="1")
    (theirs,) = await store.claim(["default"], "w", 1, org="p", claim="1")
    (second,) = await store.claim(["default"], "w2", 1, org="o", claim="1")
    assert [(one.org, one.task) for one in (mine, theirs, second)] == [("o", "t0"), ("p", "t1"), ("o", "t2")]
    assert [one.task for one in await store.claim(["default"], "w", 1, org="o", claim="1")] == ["t0"]


async def test_a_repeated_claim_leaves_out_what_is_not_this_workers_any_more(store: Store) -> None:
    for id_ in ("deleted", "remade", "cancelled", "lost", "paused"):
        await submit(store, id_)
    first = await store.claim(["default"], "w", 9, claim="c")
    assert len(first) == 5
    await store.delete("o", "deleted")
    await store.delete("o", "remade")
    await submit(store, "remade", submission="again", queue="other")
    await store.append("o", "cancelled", events.Cancelled())
    await store.append("o", "lost", events.LeaseLost())
    assert len(await store.claim(["default"], "w2", 1)) == 1
    await store.append("o", "paused", events.PauseAsked())
    again = await store.claim(["default"], "w", 9, claim="c")
    assert [(one.task, one.found.status) for one in again] == [("paused", Status.PAUSED)]


async def test_a_function_says_how_many_attempts_unless_the_task_does(store: Store) -> None:
    await submit(store, "functions", queue="five")
    await submit(store, "own", queue="five", max_attempts=2)
    await submit(store, "nobodys", queue="none")
    found = {one.task: one for one in await store.claim({"five": 5, "none": 0}, "w", 9)}
    assert {id_: one.found.max_attempts for id_, one in found.items()} == {"functions": 5, "own": 2, "nobodys": 3}
    assert await clean(store)
    # What the first worker's function said stays, whatever another version of it says.
    await store.append("o", "functions", events.Requeued(), fence=found["functions"].fence, n=1)
    (again,) = await store.claim({"five": 9}, "w", 9)
    assert (again.found.max_attempts, again.found.attempts_left) == (5, 3)


async def test_the_ticker_counts_the_attempts_that_the_workers_function_said(store: Store) -> None:
    await submit(store, "t")
    for expected in (Status.QUEUED, Status.ERRORED):
        await store.claim({"default": 2}, "w", 1)
        await expire(store, "t")
        assert await store.queues.tick() == 1
        assert await status(store, "t") is expected


async def test_waiting_for_a_human_and_stopping_in_good_order_cost_no_attempt(store: Store) -> None:
    await submit(store, "t", max_attempts=1)
    for _ in range(3):
        (one,) = await store.claim(["default"], "w", 1)
        approval = events.ApprovalRequested(approval="a", reason="May I?")
        await store.append("o", "t", approval, fence=one.fence, n=1)
        await expire(store, "t")
        assert await store.queues.tick() == 1
        assert await status(store, "t") is Status.HELD
        await store.append("o", "t", events.ApprovalDecided(approval="a", approved=True))
    (one,) = await store.claim(["default"], "w", 1)
    await store.append("o", "t", events.Requeued(refund=True), fence=one.fence, n=1)
    (one,) = await store.claim(["default"], "w", 1)
    assert (one.found.attempt, one.found.refunds, one.found.attempts_left) == (5, 4, 0)
    await expire(store, "t")
    await store.queues.tick()
    assert await status(store, "t") is Status.ERRORED
    assert await clean(store)


async def test_a_pause_between_the_tickers_look_and_its_append_costs_the_task_nothing(store: Store) -> None:
    await submit(store, "t", max_attempts=1)
    await claim(store)
    await expire(store, "t")
    await store.append("o", "t", events.PauseAsked())
    with pytest.raises(Conflict):
        await store.log.append("o", "t", lost("running", 1, 0), seen=("leases", b"1"), status="running")
    assert await store.queues.tick() == 1
    assert await status(store, "t") is Status.HELD


async def test_one_tick_ends_more_than_one_look_finds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.queues.DUE_MAX", 10)
    for i in range(25):
        await submit(store, f"t{i}", ttl_seconds=1)
    await ahead(store, 2)
    assert await store.queues.tick() == 25
    assert await store.queues.tick() == 0
