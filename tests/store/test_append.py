"""Submit and append: one atomic step, guards before writes, and a repeat is never a second write."""

import asyncio
from typing import Any

import pytest

from app import events, keys
from app.errors import Conflict, Full, Misconfigured, NotFound, OutOfOrder, Stale, TooLarge
from app.events import Submission, TextDelta
from app.log import open_partitions
from app.settings import Settings
from app.store import Store, open_store
from app.task import Status


def submission(id_: str = "t", **more: Any) -> Submission:
    return Submission(**({"id": id_, "org": "o", "owner": "u", "query": "why?", "submission": f"r-{id_}"} | more))


async def started(store: Store, id_: str = "t", **more: Any) -> int:
    """A running task; answers its fence."""
    await store.submit(submission(id_, **more))
    (claimed,) = await store.claim([more.get("queue", "default")], "w", 1)
    assert claimed.task == id_
    return claimed.fence


async def test_a_submitted_task_is_queued_and_its_first_event_is_number_one(store: Store) -> None:
    appended = await store.submit(submission(context={"a": 1}))
    task = await store.get("o", "t")
    assert task is not None
    assert (task.status, task.last_seq, task.last_event_id) == (Status.QUEUED, 1, appended.id)
    assert task.created_at == task.updated_at == appended.at
    assert task.context == {"a": 1}


async def test_the_same_submission_twice_is_one_task(store: Store) -> None:
    first = await store.submit(submission())
    again = await store.submit(submission())
    assert again.duplicate
    assert again.id == first.id
    with pytest.raises(Conflict, match="exists"):
        await store.submit(submission(submission="another"))


async def test_racing_submissions_with_one_idempotency_key_make_one_task(store: Store) -> None:
    racing = [submission(submission=f"r{i}", body_hash="h") for i in range(50)]
    answers = await asyncio.gather(*(store.submit(one) for one in racing))
    assert sum(not one.cached for one in answers) == 1
    assert {one.id for one in answers} == {answers[0].id}
    with pytest.raises(Conflict, match="another request body"):
        await store.submit(submission(submission="r99", body_hash="other"))


async def test_a_producer_number_is_accepted_once_and_only_in_order(store: Store) -> None:
    fence = await started(store)
    first = await store.append("o", "t", TextDelta(text="a"), fence=fence, n=1)
    again = await store.append("o", "t", TextDelta(text="a"), fence=fence, n=1)
    assert (first.duplicate, again.duplicate) == (False, True)
    with pytest.raises(OutOfOrder):
        await store.append("o", "t", TextDelta(text="c"), fence=fence, n=3)
    await store.append("o", "t", TextDelta(text="b"), fence=fence, n=2)
    snapshot = await store.snapshots.snapshot("o", "t")
    assert snapshot is not None
    assert snapshot.texts == {"": "ab"}


async def test_a_stale_fence_is_refused_and_writes_nothing(store: Store) -> None:
    fence = await started(store)
    await store.append("o", "t", events.Requeued(), fence=fence, n=1)
    await store.claim(["default"], "w2", 1)
    before = await store.snapshots.snapshot("o", "t")
    with pytest.raises(Stale):
        await store.append("o", "t", TextDelta(text="late"), fence=fence, n=2)
    assert await store.snapshots.snapshot("o", "t") == before


async def test_an_illegal_move_is_a_conflict_that_names_the_status(store: Store) -> None:
    await store.submit(submission())
    with pytest.raises(Conflict, match="queued") as refused:
        await store.append("o", "t", events.Resumed())
    assert refused.value.status == "queued"
    with pytest.raises(NotFound):
        await store.append("o", "nobody", events.Cancelled())
    with pytest.raises(NotFound):
        await store.append("another-org", "t", events.Cancelled())


async def test_a_repeated_control_call_answers_as_the_first_time(store: Store) -> None:
    await store.submit(submission())
    first = await store.append("o", "t", events.Cancelled(reason="x"), operation="op")
    again = await store.append("o", "t", events.Cancelled(reason="x"), operation="op")
    assert (again.seq, again.id, again.duplicate) == (first.seq, first.id, True)
    with pytest.raises(Conflict):
        await store.append("o", "t", events.Cancelled(reason="x"), operation="other")


async def test_text_beyond_192_kib_is_refused_and_the_text_so_far_stays(store: Store) -> None:
    fence = await started(store)
    half = "a" * (events.TEXT_BYTES_MAX // 2)
    await store.append("o", "t", TextDelta(text=half), fence=fence, n=1)
    with pytest.raises(TooLarge):
        await store.append("o", "t", TextDelta(text=half), fence=fence, n=2)
    await store.append("o", "t", TextDelta(text="b"), fence=fence, n=2)  # the refused number was not used up
    snapshot = await store.snapshots.snapshot("o", "t")
    assert snapshot is not None
    assert snapshot.texts == {"": half + "b"}


async def test_values_that_look_like_lua_or_placeholders_stay_what_they_are(store: Store) -> None:
    odd = "@at '\"\\ \x00\x1e\x7f\u2028 ]] %d 🎈"
    await store.submit(submission(query=odd, title="@id", user="@seq", agent="a:b/c\x00", context={"@at": odd}))
    task = await store.get("o", "t")
    assert task is not None
    assert (task.query, task.title, task.user, task.context) == (odd, "@id", "@seq", {"@at": odd})
    assert [d async for d in store.snapshots.verify()] == []


async def test_a_deleted_task_leaves_nothing_but_a_tombstone_and_its_id_goes_on(store: Store) -> None:
    fence = await started(store, session="s", deadline_seconds=60)
    await store.append("o", "t", events.TextDelta(text="a"), fence=fence, n=1)
    usage = events.Usage(input_tokens=5)
    await store.append("o", "t", events.TextCompleted(text="a", usage=usage), fence=fence, n=2)
    gone = await store.delete("o", "t")
    assert await store.get("o", "t") is None
    left = [key async for key in store.snapshots._scan("*")]
    kinds = {kind.name for kind in map(keys.declared, (name.encode() for name in left)) if kind}
    assert kinds <= {"log", "count", "wake", "claim", "tombstone"}
    again = await store.submit(submission(submission="r2"))
    assert again.seq == gone.seq + 1
    (claimed,) = await store.claim(["default"], "w", 1)
    assert claimed.fence == fence + 1
    assert [d async for d in store.snapshots.verify()] == []


async def test_every_key_of_a_used_store_is_declared_with_its_type(store: Store) -> None:
    fence = await started(store, session="s", user="x", parent="p", trigger="a2", deadline_seconds=60)
    await store.append("o", "t", TextDelta(text="a", agent="b"), fence=fence, n=1)
    await store.append("o", "t", events.Restated(internal_status="deep"), operation="op")
    await store.append("o", "t", events.Requeued(), fence=fence, n=2)
    await store.submit(submission("t2"))
    await store.delete("o", "t2")
    await store.snapshots.retitle_session("o", "u", "s", "Title")
    seen = set()
    async for name in store.snapshots._scan("*"):
        if name == keys.DEPLOYMENT:
            continue
        kind = keys.declared(name.encode())
        assert kind is not None, f"{name} is not declared in keys.py"
        assert (await store.door.read("TYPE", name)).decode() == kind.type, name
        expires = await store.door.read("TTL", name) >= 0
        assert expires == (kind.name in {"claim", "outcome", "tombstone"}), name
        seen.add(kind.name)
    assert seen >= {"log", "count", "task", "events", "index", "sessions", "session", "ready", "wake", "due"}
    assert {"claim", "outcome", "tombstone"} <= seen


async def test_a_store_that_is_full_says_so_and_goes_on_reading_and_deleting(store: Store) -> None:
    await store.submit(submission())
    await store.door.call("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(Full):
        await store.submit(submission("t2"))
    with pytest.raises(Full):
        await store.append("o", "t", events.Cancelled())
    assert await store.get("o", "t2") is None
    assert (await store.events("o", "t", "")) is not None
    await store.delete("o", "t")
    await store.door.call("CONFIG", "SET", "maxmemory", "0")
    assert [d async for d in store.snapshots.verify()] == []


async def test_a_wrong_type_under_a_key_stops_the_step_before_its_first_write(store: Store) -> None:
    await store.submit(submission())
    tag = store.partitions.tag("o", "t")
    await store.door.call("DEL", keys.key(tag, "leases"))
    await store.door.call("SET", keys.key(tag, "leases"), "x")
    before = await store.log.end(tag)
    with pytest.raises(Exception, match="WRONGTYPE"):
        await store.claim(["default"], "w", 1)
    assert await store.log.end(tag) == before
    await store.door.call("DEL", keys.key(tag, "leases"))
    assert [d async for d in store.snapshots.verify()] == []


async def test_another_data_format_number_of_partitions_or_an_evicting_server_is_refused(
    store: Store, settings: Settings
) -> None:
    with pytest.raises(Misconfigured, match="1 partitions, not 4"):
        await open_partitions(store.door, 4)
    await store.door.call("HSET", keys.DEPLOYMENT, "format", "0")
    with pytest.raises(Misconfigured, match="format 0"):
        await open_partitions(store.door, 0)
    await store.door.call("HSET", keys.DEPLOYMENT, "format", keys.FORMAT)
    await store.door.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with pytest.raises(Misconfigured, match="noeviction"):
        await open_partitions(store.door, 0)


async def test_several_partitions_behave_as_one_store(settings: Settings) -> None:
    async with open_store(settings.model_copy(update={"partitions": 5})) as store:
        for i in range(40):
            await store.submit(submission(f"t{i}", session=f"s{i % 3}"))
        assert len({store.partitions.tag("o", f"t{i}") for i in range(40)}) == 5
        page = await store.list("o", [("owner", "u")], offset=10, limit=10)
        assert page.total == 40
        assert [task.id for task in page.tasks] == [f"t{i}" for i in range(29, 19, -1)]
        sessions, total = await store.snapshots.sessions("o", "u", offset=0, limit=10)
        assert (total, sorted(one.tasks for one in sessions)) == (3, [13, 13, 14])
        claimed = await store.claim(["default"], "w", 100)
        assert len(claimed) == 40
        assert set((await store.renew(claimed)).values()) == {"running"}
        assert [d async for d in store.snapshots.verify()] == []
        await store.snapshots.rebuild()
        assert [d async for d in store.snapshots.verify()] == []
