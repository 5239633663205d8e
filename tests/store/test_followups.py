"""Follow-ups: what an event asks for in other tasks happens once, in order, whoever crashes in between."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from app import events, keys, log
from app.errors import Conflict, Full, Invalid, TooLarge, Unavailable
from app.events import AnyEvent, Submission
from app.log import Appended
from app.settings import Settings
from app.store import Store, open_store
from app.task import Status
from tests.waiting import wait_until


@pytest.fixture(params=[1, 3])
async def stores(settings: Settings, request: pytest.FixtureRequest) -> AsyncIterator[tuple[Store, Store]]:
    """Two processes' views of one store."""
    settings = settings.model_copy(update={"partitions": request.param})
    async with open_store(settings) as one, open_store(settings) as other:
        yield one, other


def submission(id_: str, parent: str = "", **more: Any) -> Submission:
    return Submission(**({"id": id_, "org": "o", "parent": parent, "query": "?", "submission": f"r-{id_}"} | more))


async def child(store: Store, id_: str, parent: str, **more: Any) -> None:
    await store.append("o", parent, events.ChildSubmitted(task=submission(id_, parent, **more)))


async def status(store: Store, id_: str) -> str:
    found = await store.get("o", id_)
    return found.status.value if found else "gone"


async def said(store: Store, id_: str, kind: type[AnyEvent]) -> int:
    page = await store.events("o", id_, "")
    assert page is not None
    return sum(isinstance(entry.event, kind) for entry in page.entries)


async def pending(store: Store) -> int:
    return sum([await store.door.read("LLEN", keys.key(tag, "followups")) for tag in store.partitions.tags])


async def clean(store: Store) -> bool:
    return [difference async for difference in store.snapshots.verify()] == []


async def family(store: Store) -> list[str]:
    """A task, five children, and one child of each of these; answers the descendants."""
    await store.submit(submission("p"))
    for i in range(5):
        await child(store, f"c{i}", "p")
        await child(store, f"g{i}", f"c{i}")
    return [f"{kind}{i}" for kind in "cg" for i in range(5)]


async def test_a_child_is_made_in_its_own_partition_and_names_its_parent(stores: tuple[Store, Store]) -> None:
    store, _ = stores
    below = await family(store)
    assert len({store.partitions.tag("o", id_) for id_ in below}) == len(store.partitions.tags)
    assert {await status(store, id_) for id_ in below} == {"queued"}
    assert {task.id for task in (await store.list("o", [("parent", "p")])).tasks} == {f"c{i}" for i in range(5)}
    parent = await store.get("o", "p")
    assert parent is not None
    assert parent.children == 5
    assert await pending(store) == 0
    assert await clean(store)


async def test_a_cancel_reaches_all_below_in_whatever_state_and_leaves_what_has_ended(
    stores: tuple[Store, Store],
) -> None:
    store, _ = stores
    below = await family(store)
    await store.append("o", "c1", events.PauseAsked())
    await store.append("o", "g2", events.Completed(result="done"))
    running = await store.claim(["default"], "w", 3)
    await store.append("o", "p", events.Cancelled(), operation="op")
    assert {id_: await status(store, id_) for id_ in below} == dict.fromkeys(below, "cancelled") | {"g2": "completed"}
    assert set((await store.renew(running)).values()) == {""}
    found = await store.get("o", "g0")
    assert found is not None
    assert found.cancel_reason == "Its parent task c0 was cancelled."
    assert await pending(store) == 0
    assert await clean(store)


@pytest.mark.parametrize("limit", ["deadline_seconds", "ttl_seconds"])
async def test_what_ends_a_parent_by_time_ends_its_children(stores: tuple[Store, Store], limit: str) -> None:
    store, _ = stores
    limits: dict[str, Any] = {limit: 0.2}
    await store.submit(submission("p", **limits))
    await child(store, "c", "p")

    async def ended() -> bool:
        await store.queues.tick()
        return await status(store, "c") == "cancelled"

    await wait_until(ended, "the parent's time is over, and its child's with it")
    assert await status(store, "p") == "timed_out"
    found = await store.get("o", "c")
    assert found is not None
    assert found.cancel_reason == "Its parent task p was timed out."


async def test_a_parent_that_is_stated_to_be_cancelled_takes_its_children_with_it(store: Store) -> None:
    await store.submit(submission("p"))
    await child(store, "c", "p")
    await store.append("o", "p", events.Restated(to="held"))
    assert await status(store, "c") == "queued"
    await store.append("o", "p", events.Restated(to="cancelled"))
    assert await status(store, "c") == "cancelled"


@pytest.mark.parametrize("end", [events.Completed(result="x"), events.Failed(error="x"), events.Errored(error="x")])
async def test_a_parent_that_comes_to_its_own_end_leaves_its_children(store: Store, end: AnyEvent) -> None:
    await store.submit(submission("p"))
    await child(store, "c", "p")
    await store.append("o", "p", end)
    await store.queues.tick()
    assert await status(store, "c") == "queued"


async def test_what_a_crashed_process_left_is_done_by_another_ones_ticker(stores: tuple[Store, Store]) -> None:
    crashed, other = stores
    await crashed.submit(submission("p"))
    # The log alone, as when the process dies right after the event.
    await crashed.log.append("o", "p", events.ChildSubmitted(task=submission("c", "p")))
    assert await status(other, "c") == "gone"
    assert await clean(other)
    await other.snapshots.rebuild()  # leaves what is still to be done
    await other.queues.tick()
    assert await status(other, "c") == "queued"
    await crashed.log.append("o", "p", events.Cancelled())
    assert await status(other, "c") == "queued"
    await other.queues.tick()
    assert await status(other, "c") == "cancelled"
    assert await pending(other) == 0


async def test_a_store_that_goes_away_in_the_middle_of_a_cascade_loses_and_repeats_nothing(
    stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = stores
    below = await family(store)
    append, calls = store.log.append, 0

    async def failing(org: str, task: str, event: AnyEvent, **more: Any) -> Appended:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Unavailable("away")
        return await append(org, task, event, **more)

    monkeypatch.setattr(store.log, "append", failing)
    await store.append("o", "p", events.Cancelled())  # answers all the same
    # Two of five children, and below them.
    assert sorted([await status(store, f"c{i}") for i in range(5)]).count("cancelled") == 2
    assert await pending(store) > 0
    await other.queues.tick()
    assert {await status(other, id_) for id_ in below} == {"cancelled"}
    assert {await said(other, id_, events.Cancelled) for id_ in below} == {1}
    assert await pending(other) == 0


async def test_several_processes_at_once_take_each_step_once(settings: Settings, store: Store) -> None:
    await store.submit(submission("p"))
    for i in range(20):
        await store.log.append("o", "p", events.ChildSubmitted(task=submission(f"c{i}", "p")))
    await store.log.append("o", "p", events.Cancelled())
    async with AsyncExitStack() as stack:
        many = [await stack.enter_async_context(open_store(settings)) for _ in range(4)]
        await asyncio.gather(*(one.queues.tick() for one in many))
    for i in range(20):
        assert await said(store, f"c{i}", events.Submitted) == 1
        assert await said(store, f"c{i}", events.Cancelled) == 1
    assert await pending(store) == 0
    assert await clean(store)


async def test_a_child_is_made_before_it_is_cancelled_however_late(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.submit(submission("p"))

    async def away(*_: Any, **__: Any) -> Appended:
        raise Unavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(store.log, "submit", away)
        await child(store, "c", "p")
        await store.append("o", "p", events.Cancelled())
        await store.queues.tick()
        assert await pending(store) == 2
    await store.queues.tick()
    assert await status(store, "c") == "cancelled"
    assert await pending(store) == 0


async def test_many_steps_that_cannot_be_taken_do_not_hide_one_that_can(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.queues.FOLLOW_PAGE", 3)
    for i in range(10):
        await store.submit(submission(f"p{i}"))
        await store.log.append("o", f"p{i}", events.ChildSubmitted(task=submission(f"c{i}", f"p{i}")))
    submit = store.log.submit

    async def nearly_away(task: Submission, *, actor: str = "") -> Appended:
        if task.id != "c9":
            raise Unavailable("away")
        return await submit(task, actor=actor)

    with monkeypatch.context() as patched:
        patched.setattr(store.log, "submit", nearly_away)
        assert await store.queues.follow_up() == 1
    assert await status(store, "c9") == "queued"
    assert await pending(store) == 9
    assert await store.queues.follow_up() == 9


async def test_a_page_that_moved_while_it_was_read_changes_no_order(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else takes what stands before this one's place: what is read next may come too early."""
    monkeypatch.setattr("app.queues.FOLLOW_PAGE", 2)
    (tag,) = store.partitions.tags
    for id_ in ("a", "b", "p"):
        await store.submit(submission(id_))
    for id_ in ("a", "b", "p"):
        await store.log.append("o", id_, events.ChildSubmitted(task=submission(f"{id_}1", id_)))
    await store.log.append("o", "p", events.Cancelled())
    submit = store.log.submit
    left = 2

    async def away(task: Submission, *, actor: str = "") -> Appended:
        nonlocal left
        if left:
            left -= 1
            if not left:  # both are held up here, and one is taken elsewhere: all that follow move forward
                await store.door.call("LPOP", keys.key(tag, "followups"))
            raise Unavailable("away")
        return await submit(task, actor=actor)

    monkeypatch.setattr(store.log, "submit", away)
    await store.queues.follow_up()
    await store.queues.follow_up()
    assert await status(store, "p1") == "cancelled"


async def test_a_full_store_keeps_the_steps_for_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await store.submit(submission("p"))
    await store.log.append("o", "p", events.ChildSubmitted(task=submission("c", "p")))
    await store.door.call("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(Full):
        await store.queues.tick()
    await store.door.call("CONFIG", "SET", "maxmemory", "0")
    await store.queues.tick()
    assert await status(store, "c") == "queued"


@pytest.mark.parametrize("rubbish", [b"", b"x", b"o/p/1 {}", b'o/p/1 {"type":"deleted"', b"\xff\xfe/1 x"])
async def test_rubbish_in_the_list_leaves_it_and_holds_up_nobody(store: Store, rubbish: bytes) -> None:
    await store.submit(submission("p"))
    (tag,) = store.partitions.tags
    await store.door.call("RPUSH", keys.key(tag, "followups"), rubbish)
    await child(store, "c", "p")
    await store.queues.tick()
    assert await status(store, "c") == "queued"
    assert await pending(store) == 0


async def test_a_step_that_the_store_cannot_take_holds_up_only_itself(store: Store) -> None:
    for id_ in ("p", "q"):
        await store.submit(submission(id_))
    (tag,) = store.partitions.tags
    await store.door.call("SET", keys.key(tag, "events", "o", "c"), "not a stream")
    await child(store, "c", "p")
    await child(store, "d", "q")
    await store.queues.tick()
    assert await status(store, "d") == "queued"
    assert await pending(store) == 1
    await store.door.call("DEL", keys.key(tag, "events", "o", "c"))
    await store.queues.tick()
    assert await status(store, "c") == "queued"


async def test_a_child_whose_id_is_taken_is_not_made_and_who_has_it_keeps_it(store: Store) -> None:
    await store.submit(submission("c", query="mine"))
    await store.submit(submission("p"))
    await child(store, "c", "p", submission="theirs")
    await store.append("o", "p", events.Cancelled())
    found = await store.get("o", "c")
    assert found is not None
    assert (found.query, found.parent, found.status) == ("mine", "", Status.QUEUED)
    assert await pending(store) == 0


async def test_who_takes_a_step_too_late_undoes_nothing_that_happened_since(store: Store) -> None:
    (tag,) = store.partitions.tags
    name = keys.key(tag, "followups")
    await store.submit(submission("p"))
    await store.log.append("o", "p", events.ChildSubmitted(task=submission("c", "p")))
    await store.log.append("o", "p", events.Cancelled())
    slow = await store.door.read("LRANGE", name, 0, -1)
    await store.queues.tick()
    # The user wants both after all, and the parent makes another child.
    await store.append("o", "c", events.Retried())
    await store.append("o", "p", events.Retried())
    await child(store, "d", "p")
    for item in slow:
        place, _, event = item.partition(b" ")
        member, _, seq = place.decode().rpartition("/")
        assert await store.queues._take(name, item, member, seq, event, None)
    assert (await status(store, "c"), await status(store, "d")) == ("queued", "queued")


async def test_a_cancel_that_is_taken_twice_cancels_a_child_once(store: Store) -> None:
    """As when both looked before either was done."""
    await store.submit(submission("p"))
    await child(store, "c", "p")
    cancelled = events.Cancelled()
    await store.append("o", "p", cancelled)
    await store.append("o", "c", events.Retried())
    found = await store.get("o", "p")
    assert found is not None
    await store.queues._follow("o", "p", str(found.last_seq), cancelled)
    assert await status(store, "c") == "queued"


async def test_a_deleted_child_is_not_made_again_by_who_comes_late(store: Store) -> None:
    await store.submit(submission("p"))
    await child(store, "c", "p")
    await store.delete("o", "c")
    again = await store.submit(submission("c", "p"))
    assert again.duplicate
    assert again.status is Status.GONE
    assert again.at > 0
    assert await status(store, "c") == "gone"
    assert not (await store.submit(submission("c", submission="another"))).duplicate


async def test_a_parent_that_was_deleted_meanwhile_has_its_steps_taken(stores: tuple[Store, Store]) -> None:
    store, _ = stores
    await store.submit(submission("p"))
    await store.log.append("o", "p", events.ChildSubmitted(task=submission("c", "p")))
    await store.log.append("o", "p", events.Cancelled())
    await store.delete("o", "p")
    await store.queues.tick()
    assert await status(store, "c") == "cancelled"
    assert await clean(store)


@pytest.mark.parametrize(
    "bad",
    [{"org": "another"}, {"parent": "another"}, {"parent": ""}, {"id_": "p"}, {"ttl_seconds": 1, "delay_seconds": 2}],
)
async def test_a_child_that_could_not_be_made_is_refused_when_it_is_asked_for(
    store: Store, bad: dict[str, Any]
) -> None:
    await store.submit(submission("p"))
    asked = submission(**({"id_": "c", "parent": "p"} | bad))
    with pytest.raises(Invalid):
        await store.append("o", "p", events.ChildSubmitted(task=asked))
    assert await said(store, "p", events.ChildSubmitted) == 0


async def test_a_child_that_is_too_large_by_a_byte_is_refused_when_it_is_asked_for(store: Store) -> None:
    await store.submit(submission("p"))
    bare = events.ChildSubmitted(task=submission("c", "p", query=""))
    room = events.EVENT_BYTES_MAX - len(events.encode(bare))
    for size in range(room - 40, room):
        asked = events.ChildSubmitted(task=submission("c", "p", query="x" * size))
        try:
            await store.append("o", "p", asked)
        except TooLarge:
            break
    made = await store.get("o", "c")
    assert made is not None
    found = await store.get("o", "p")
    assert found is not None
    assert found.children > 0
    with pytest.raises(TooLarge):
        await store.append("o", "p", asked)


async def test_a_cancel_waits_only_for_the_steps_of_its_own_family(store: Store) -> None:
    for id_ in ("p", "q"):
        await store.submit(submission(id_))
    await child(store, "c", "p")
    await child(store, "g", "c")
    await store.log.append("o", "q", events.ChildSubmitted(task=submission("d", "q")))
    await store.append("o", "p", events.Cancelled())
    assert (await status(store, "c"), await status(store, "g")) == ("cancelled", "cancelled")
    assert await status(store, "d") == "gone"
    assert await pending(store) == 1


async def test_children_asked_for_in_a_batch_are_made_at_once(store: Store) -> None:
    await store.submit(submission("p"))
    (one,) = await store.claim(["default"], "w", 1)
    batch = [events.ChildSubmitted(task=submission(f"c{i}", "p", queue="q")) for i in range(3)]
    first = await store.extend("o", "p", [*map(log.said, batch)], fence=one.fence, n=1)
    again = await store.extend("o", "p", [*map(log.said, batch)], fence=one.fence, n=1)
    assert [isinstance(answer, Appended) and answer.duplicate for answer in (*first, *again)] == [False] * 3 + [
        True
    ] * 3
    assert sorted(claimed.task for claimed in await store.claim(["q"], "w", 9)) == ["c0", "c1", "c2"]
    found = await store.get("o", "p")
    assert found is not None
    assert found.children == 3


async def test_the_children_of_a_retried_task_stay_as_they_ended(store: Store) -> None:
    await store.submit(submission("p"))
    await child(store, "c", "p")
    await store.append("o", "p", events.Cancelled())
    await store.append("o", "p", events.Retried())
    await child(store, "c", "p", submission="r2")  # the same id is taken: by the cancelled one
    assert await status(store, "c") == "cancelled"
    await child(store, "d", "p")
    await store.append("o", "p", events.Cancelled())
    assert await status(store, "d") == "cancelled"
    with pytest.raises(Conflict):
        await store.append("o", "p", events.ChildSubmitted(task=submission("e", "p")))


async def test_a_deletion_takes_all_below_with_it_over_generations_and_partitions(stores: tuple[Store, Store]) -> None:
    store, _ = stores
    below = await family(store)
    await child(store, "deep", "g0")
    await store.append("o", "c1", events.PauseAsked())
    await store.append("o", "g2", events.Completed(result="done"))
    await store.submit(submission("other", session="s"))
    running = await store.claim(["default"], "w", 3)
    await store.delete("o", "p", actor="user:u", children=True)
    assert {await status(store, id_) for id_ in ["p", *below, "deep"]} == {"gone"}
    assert set((await store.renew([one for one in running if one.task != "other"])).values()) == {""}
    assert await status(store, "other") in {"queued", "running"}
    assert await pending(store) == 0
    assert await store.snapshots.count() == 1
    assert await clean(store)


async def test_a_deletion_leaves_the_sub_tasks_unless_it_says_otherwise(stores: tuple[Store, Store]) -> None:
    store, _ = stores
    below = await family(store)
    await store.delete("o", "p")
    await store.queues.tick()
    assert {await status(store, id_) for id_ in below} == {"queued"}
    assert await clean(store)


async def test_a_sub_task_is_cancelled_before_it_is_deleted_so_that_its_worker_hears_why(store: Store) -> None:
    await store.submit(submission("p"))
    await child(store, "c", "p")
    await store.claim(["default"], "w", 2)
    (tag,) = store.partitions.tags
    last, _ = await store.log.end(tag)
    await store.delete("o", "p", children=True)
    raw = await store.door.read("XRANGE", keys.key(tag, "log"), f"({last}", "+")
    heard = [log.logged(*item) for item in raw]
    assert [(one.task, one.type) for one in heard] == [("p", "deleted"), ("c", "cancelled"), ("c", "deleted")]


async def test_a_deletion_that_crashed_goes_on_where_another_process_finds_it(stores: tuple[Store, Store]) -> None:
    crashed, other = stores
    below = await family(crashed)
    await crashed.log.delete("o", "p", children=True)
    assert {await status(other, id_) for id_ in below} == {"queued"}
    assert await clean(other)
    await other.snapshots.rebuild()  # leaves what is still to be done
    await other.queues.tick()
    assert {await status(other, id_) for id_ in below} == {"gone"}
    assert await pending(other) == 0
    assert await clean(other)


@pytest.mark.parametrize("lost", range(1, 8))
async def test_a_deletion_whose_store_goes_away_in_the_middle_is_finished(
    stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """Before, or after, any one of its steps: what was done, and not noted as done, is asked for again."""
    store, other = stores
    below = await family(store)
    calls = 0

    def failing(step: Any) -> Any:
        async def call(*args: Any, **more: Any) -> Appended:
            nonlocal calls
            calls += 1
            if calls == lost and lost % 2:
                raise Unavailable("away")
            appended: Appended = await step(*args, **more)
            if calls == lost:
                raise Unavailable("the answer is lost")
            return appended

        return call

    delete = store.log.delete
    monkeypatch.setattr(store.log, "append", failing(store.log.append))
    monkeypatch.setattr(store.queues.log, "delete", failing(delete))
    await delete("o", "p", children=True)
    with contextlib.suppress(Unavailable):
        await store.queues.follow_up("o", "p")
    assert calls >= lost
    await other.queues.tick()
    assert {await status(other, id_) for id_ in below} == {"gone"}
    assert await pending(other) == 0
    assert await clean(other)


async def test_a_child_that_was_asked_for_before_the_deletion_is_made_and_deleted(store: Store) -> None:
    await store.submit(submission("p"))
    await store.log.append("o", "p", events.ChildSubmitted(task=submission("c", "p")))
    await store.log.delete("o", "p", children=True)
    await store.queues.tick()
    assert (await status(store, "c"), await pending(store)) == ("gone", 0)


async def test_a_late_deletion_spares_the_sub_tasks_of_a_new_task_of_the_same_id(stores: tuple[Store, Store]) -> None:
    crashed, other = stores
    await crashed.submit(submission("p"))
    for i in range(5):
        await child(crashed, f"c{i}", "p")
    await crashed.log.delete("o", "p", children=True)
    # It comes back before anybody has deleted its old sub-tasks, and makes new ones.
    await crashed.submit(submission("p", submission="again"))
    for i in range(5):
        await crashed.log.append("o", "p", events.ChildSubmitted(task=submission(f"d{i}", "p")))
        await crashed.log.submit(submission(f"d{i}", "p"))
    await other.queues.tick()
    assert {await status(other, f"c{i}") for i in range(5)} == {"gone"}
    assert {await status(other, id_) for id_ in ["p", *(f"d{i}" for i in range(5))]} == {"queued"}
    assert await clean(other)
