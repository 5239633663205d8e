"""What the store must survive: zombies, repeated words, damaged data, clocks that jump, bad arguments."""

import asyncio
from typing import Any

import pytest

from app import events, keys
from app.errors import Conflict, Invalid, Stale, TooLarge, Unavailable
from app.events import Submission, TextDelta, Usage
from app.line import Arg
from app.queues import Claimed
from app.seam import Ended, Item
from app.store import Store
from app.task import Status
from tests.waiting import wait_until


async def running(store: Store, id_: str = "t", **more: Any) -> Claimed:
    values: dict[str, Any] = {"id": id_, "org": "o", "query": "?", "submission": id_, "queue": id_} | more
    await store.submit(Submission(**values))
    (claimed,) = await store.claim([values["queue"]], "w", 1)
    return claimed


async def clean(store: Store) -> bool:
    return [difference async for difference in store.snapshots.verify()] == []


async def test_a_zombie_of_the_last_turn_cannot_end_the_next_one(store: Store) -> None:
    old = await running(store)
    await store.append("o", "t", events.Cancelled())
    await store.append("o", "t", events.Continued(query="second", submission="2"))
    with pytest.raises(Stale):
        await store.append("o", "t", events.Completed(result="first"), fence=old.fence, n=1)
    task = await store.get("o", "t")
    assert task is not None
    assert (task.status, task.turn) == (Status.QUEUED, 2)


async def test_a_zombie_cannot_speak_between_its_lost_lease_and_the_next_claim(store: Store) -> None:
    old = await running(store)
    await store.append("o", "t", events.LeaseLost())
    with pytest.raises(Stale):
        await store.append("o", "t", events.Completed(result="late"), fence=old.fence, n=1)


async def test_a_repeat_of_the_last_event_of_an_ended_attempt_is_a_duplicate_with_its_place(store: Store) -> None:
    one = await running(store)
    await store.append("o", "t", TextDelta(text="a"), fence=one.fence, n=1)
    ended = await store.append("o", "t", events.Completed(result="x"), fence=one.fence, n=2)
    again = await store.append("o", "t", events.Completed(result="x"), fence=one.fence, n=2)
    assert again.duplicate
    assert (again.seq, again.id, again.at) == (ended.seq, ended.id, ended.at)
    first = await store.append("o", "t", TextDelta(text="a"), fence=one.fence, n=1)
    assert (first.duplicate, first.seq) == (True, 3)


async def test_a_repeated_continuation_is_one_turn(store: Store) -> None:
    one = await running(store)
    await store.append("o", "t", events.Completed(result="x"), fence=one.fence, n=1)
    more = events.Continued(query="more", submission="2")
    assert not (await store.append("o", "t", more)).duplicate
    assert (await store.append("o", "t", more)).duplicate
    (two,) = await store.claim(["t"], "w", 1)
    await store.append("o", "t", events.Completed(result="y"), fence=two.fence, n=1)
    assert (await store.append("o", "t", more)).duplicate
    task = await store.get("o", "t")
    assert task is not None
    assert (task.turn, task.result) == (2, "y")


async def test_a_queue_named_twice_gives_a_task_once(store: Store) -> None:
    await store.submit(Submission(id="t", org="o", query="?", submission="t"))
    tag = store.partitions.tag("o", "t")
    assert len(await store.claim(["default", "default"], "w", 5)) == 1
    # The script guards itself too: other clients speak to it.
    await store.submit(Submission(id="t2", org="o", query="?", submission="t2"))
    event = events.Started(worker="w")
    claim: list[Arg] = [keys.prefix(tag), store.log._limits, "c", 5, 2000, ""]
    rows = b'[[["queued"],{"status":"running","ready":"remove","add":{"fence":1,"attempt":1}}]]'
    raw = await store.door.run(
        "claim", [keys.key(tag, "leases")], [*claim, *2 * ("default", events.encode(event), rows)]
    )
    assert len(raw) == 1


async def test_a_foreign_member_of_a_queue_does_not_stop_it(store: Store) -> None:
    await store.submit(Submission(id="t", org="o", query="?", submission="t"))
    tag = store.partitions.tag("o", "t")
    await store.door.call("ZADD", keys.key(tag, "ready", "default"), 1, "o/ghost")
    await store.claim(["default"], "w", 1)
    assert [one.task for one in await store.claim(["default"], "w", 1)] in ([], ["t"])
    task = await store.get("o", "t")
    assert task is not None
    assert task.status is Status.RUNNING
    assert await clean(store)


async def test_rebuild_keeps_a_damaged_tasks_keys_and_restores_all_others(store: Store) -> None:
    for i in range(5):
        await running(store, f"t{i}")
    page = await store.events("o", "t2", "")
    assert page is not None
    tag = store.partitions.tag("o", "t2")
    await store.append("o", "t2", events.Noted(name="X"))
    await store.door.call("XDEL", keys.key(tag, "events", "o", "t2"), page.entries[1].id)
    assert not await clean(store)
    assert await store.snapshots.rebuild() == (4, ["t2"])
    assert {task.id for task in (await store.list("o", [()])).tasks} == {"t0", "t1", "t3", "t4"}
    assert await store.get("o", "t2") is not None
    left = await store.events("o", "t2", page.entries[1].id)
    assert left is not None
    assert len(left.entries) == 1


async def test_one_bad_argument_fails_alone(store: Store) -> None:
    fine = [asyncio.ensure_future(store.door.call("PING")) for _ in range(3)]
    with pytest.raises(Invalid):
        await store.door.call("GET", "\ud800")
    assert await asyncio.gather(*fine) == [True] * 3
    with pytest.raises(Invalid):
        await store.list("o", [("user", "\ud800")])


@pytest.mark.parametrize("cursor", ["abc", "5", "1-1-1", "5-99999999999999999999", "seq:x", "-", "(1-1", "1-1\n"])
async def test_what_is_no_cursor_is_said_to_be_none(store: Store, cursor: str) -> None:
    await running(store)
    with pytest.raises(Invalid):
        await store.events("o", "t", cursor)


@pytest.mark.parametrize(
    "bad",
    [
        {"id": ""},
        {"id": "a/b"},
        {"id": "a\n"},
        {"id": "x" * 129},
        {"org": "o:a"},
        {"org": "o/p"},
        {"owner": "a:b"},
        {"session": "a b"},
        {"user": "x" * 257},
        {"queue": "x" * 257},
        {"deadline_seconds": 1e10},
        {"delay_seconds": -1},
        {"max_attempts": -1},
    ],
)
async def test_names_that_could_meet_another_key_or_break_a_bound_are_refused(
    store: Store, bad: dict[str, Any]
) -> None:
    values: dict[str, Any] = {"id": "t", "org": "o", "query": "?", "submission": "t"} | bad
    with pytest.raises(Invalid):
        await store.submit(Submission(**values))
    assert await store.snapshots.count() == 0


async def test_sums_that_a_number_cannot_hold_are_refused_before_anything_is_written(store: Store) -> None:
    one = await running(store, session="s", owner="u")
    usage = Usage(cost_nano=2**53 - 1)
    await store.append("o", "t", events.TextCompleted(text="", usage=usage), fence=one.fence, n=1)
    with pytest.raises(TooLarge):
        await store.append("o", "t", events.Completed(result="", usage=Usage(cost_nano=1)), fence=one.fence, n=2)
    await store.append("o", "t", events.Completed(result=""), fence=one.fence, n=2)
    two = await running(store, "t2", session="s", owner="u")
    with pytest.raises(TooLarge):  # the session's sum
        await store.append("o", "t2", events.Completed(result="", usage=Usage(cost_nano=1)), fence=two.fence, n=1)
    assert await clean(store)


async def test_a_result_has_192_kib_at_most(store: Store) -> None:
    one = await running(store)
    with pytest.raises(TooLarge, match="196608"):
        completed = events.Completed(result="x" * (events.RESULT_BYTES_MAX + 1))
        await store.append("o", "t", completed, fence=one.fence, n=1)
    completed = events.Completed(result="x" * events.RESULT_BYTES_MAX)
    await store.append("o", "t", completed, fence=one.fence, n=1)


async def test_a_clock_that_went_back_stops_neither_queue_nor_deadline(store: Store) -> None:
    """As after a fail-over to a server an hour behind: the log's last id is in the future."""
    tag = store.partitions.tag("o", "t")
    seconds, _ = await store.door.call("TIME")
    ahead = f"{(int(seconds) + 3600) * 1000}-0"
    await store.submit(Submission(id="first", org="o", query="?", submission="first", queue="other"))
    page = await store.events("o", "first", "")
    assert page is not None
    await store.door.call("XADD", keys.key(tag, "log"), ahead, "n", 2, "x", "y")
    one = await running(store)
    assert set((await store.renew([one])).values()) == {"running"}
    assert await store.queues.tick() == 0
    await store.door.call("ZADD", keys.key(tag, "leases"), "XX", (int(seconds) + 3599) * 1000, "o/t")
    assert await store.queues.tick() == 1


async def test_a_task_opened_again_has_no_old_deadline(store: Store) -> None:
    await running(store, deadline_seconds=3600)
    await store.append("o", "t", events.Cancelled())
    await store.append("o", "t", events.Restated(to="held"))
    task = await store.get("o", "t")
    assert task is not None
    assert task.deadline_at == 0
    assert await clean(store)


async def test_a_full_store_still_renews_leases(store: Store) -> None:
    one = await running(store)
    await store.door.call("CONFIG", "SET", "maxmemory", "1")
    assert await store.renew([one]) == {one: "running"}


async def test_a_page_of_large_events_is_bounded_in_bytes_and_pages_still_join(store: Store) -> None:
    one = await running(store)
    for n in range(1, 31):
        await store.append("o", "t", events.Noted(name="BIG", message="x" * 200_000), fence=one.fence, n=n)
    after, seen, pages = "", list[int](), 0
    while (page := await store.events("o", "t", after)) and page.entries:
        assert sum(entry.size for entry in page.entries) < 1024 * 1024 + 256 * 1024
        seen += [entry.seq for entry in page.entries]
        after, pages = page.entries[-1].id, pages + 1
    assert seen == list(range(1, 33))
    assert pages > 4


async def test_a_reader_of_a_deleted_task_never_sees_the_next_one_of_that_id(store: Store) -> None:
    await running(store)
    seen: list[Item] = []
    go_on = asyncio.Event()

    async def read() -> None:
        async with store.follow("o", "t", "") as subscription:
            async for items in subscription:
                seen.extend(items)
                await go_on.wait()

    reading = asyncio.create_task(read())
    await wait_until(lambda: len(seen) == 2, "history arrives")
    await store.delete("o", "t")
    await running(store, owner="another", submission="again")
    go_on.set()
    await reading
    assert seen[2:] == [Ended(last_id="", seq=2)]


async def test_a_reader_of_a_store_that_lost_its_last_entries_is_told_and_does_not_spin(store: Store) -> None:
    """As after a fail-over to a replica that had not everything."""
    one = await running(store)
    tag = store.partitions.tag("o", "t")
    seen: list[Item] = []

    async def read() -> None:
        async with store.follow("o", "t", "") as subscription:
            async for items in subscription:
                seen.extend(items)

    reading = asyncio.create_task(read())
    for n in range(1, 6):
        await store.append("o", "t", TextDelta(text="a"), fence=one.fence, n=n)
    await wait_until(lambda: len(seen) == 7, "all arrive")
    page = await store.events("o", "t", "")
    assert page is not None
    for entry in page.entries[4:]:
        await store.door.call("XDEL", keys.key(tag, "events", "o", "t"), entry.id)
    kept = page.entries[3]
    await store.door.call(
        "HSET", keys.key(tag, "task", "o", "t"), "last_seq", kept.seq, "last_event_id", kept.id, "n", 2
    )
    await store.door.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await wait_until(lambda: len(seen) == 8, "the reader is told")
    before = (await store.door.call("INFO", "commandstats"))["cmdstat_evalsha"]["calls"]
    for n in range(3, 6):
        await store.append("o", "t", TextDelta(text="b"), fence=one.fence, n=n)
    await wait_until(lambda: len(seen) == 11, "what follows arrives")
    assert [getattr(item, "seq", None) for item in seen[8:]] == [5, 6, 7]
    after = (await store.door.call("INFO", "commandstats"))["cmdstat_evalsha"]["calls"]
    assert after - before < 30
    reading.cancel()


async def test_a_closed_store_answers_everybody(store: Store) -> None:
    await store.door.aclose()
    with pytest.raises(Unavailable):
        await store.ping()


async def test_stating_a_pause_without_an_attempt_is_holding(store: Store) -> None:
    await store.submit(Submission(id="t", org="o", query="?", submission="t"))
    assert (await store.append("o", "t", events.Restated(to="paused"))).status is Status.HELD
    assert (await store.append("o", "t", events.Resumed())).status is Status.QUEUED
    with pytest.raises(Conflict):
        await store.append("o", "t", events.Resumed())
