"""Lists: newest first, stable pages, filters that combine, totals that say when they are capped."""

import functools
import operator
from typing import Any

import msgspec
import pytest

from app import events, keys, snapshots
from app.errors import Invalid
from app.events import Submission
from app.snapshots import Filter
from app.store import Store
from app.task import Status


async def submit(store: Store, id_: str, **more: Any) -> int:
    """When it was made, µs."""
    values: dict[str, Any] = {"id": id_, "org": "o", "owner": "u", "query": f"q {id_}", "submission": id_} | more
    return (await store.submit(Submission(**values))).at


async def listed(store: Store, wanted: Filter, **more: Any) -> list[str]:
    return [task.id for task in (await store.list("o", wanted, **more)).tasks]


async def ids(store: Store, *sources: tuple[str, ...], **more: Any) -> list[str]:
    return [task.id for task in (await store.list("o", sources, **more)).tasks]


async def test_pages_are_newest_first_and_join(store: Store) -> None:
    for i in range(25):
        await submit(store, f"t{i}")
    pages = [await ids(store, (), offset=offset, limit=10) for offset in (0, 10, 20, 30, 10**18)]
    assert [len(page) for page in pages] == [10, 10, 5, 0, 0]
    assert functools.reduce(operator.iadd, pages, []) == [f"t{i}" for i in range(24, -1, -1)]
    assert (await store.list("o", [()])).total == 25


async def test_a_union_of_owners_or_statuses_is_merged_by_time(store: Store) -> None:
    for i in range(12):
        await submit(store, f"t{i}", owner=["u", "", "other"][i % 3], queue=f"q{i}")
    mine = [("owner", "u"), ("owner", "")]
    assert await ids(store, *mine) == ["t10", "t9", "t7", "t6", "t4", "t3", "t1", "t0"]
    assert await ids(store, *mine, offset=2, limit=3) == ["t7", "t6", "t4"]
    await store.claim(["q0"], "w", 1)
    await store.append("o", "t3", events.Cancelled())
    both = [("status", status, "owner", "u") for status in ("running", "cancelled")]
    assert await ids(store, *both) == ["t3", "t0"]
    assert await ids(store, ("status", "queued", "owner", "u")) == ["t9", "t6"]


async def test_other_filters_walk_and_count_what_matches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(30):
        await submit(store, f"t{i}", agent=f"a{i % 3}", user=f"x{i % 2}", session="s")
    page = await store.list("o", Filter(agent="a1", user="x1", statuses=[Status.QUEUED]), limit=2)
    assert ([task.id for task in page.tasks], page.total, page.capped) == (["t25", "t19"], 5, False)
    monkeypatch.setattr(snapshots, "WALK_MAX", 4)
    page = await store.list("o", Filter(agent="a1", user="x1"))
    assert ([task.id for task in page.tasks], page.total, page.capped) == (["t25", "t19"], 2, True)


async def test_the_smallest_index_is_walked_and_none_where_one_tells_all(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk of more than two steps would be capped here."""
    common: dict[str, Any] = {"agent": "a", "user": "x", "session": "s", "parent": "p", "trigger": "b"}
    for i in range(9):
        await submit(store, f"t{i}", **common)
        await store.append("o", f"t{i}", events.Restated(internal_status="w"))
    for name in (*common, "owner"):
        await submit(store, f"rare-{name}", **{**common, name: "rare"})
        await store.append("o", f"rare-{name}", events.Restated(to="held", internal_status="w"))
    await submit(store, "rare-word", **common)
    await store.append("o", "rare-word", events.Restated(to="held", internal_status="rare"))
    monkeypatch.setattr(snapshots, "WALK_MAX", 2)
    usual = Filter(owners=["u", "x"], **common, internal_status="w")
    assert (await store.list("o", usual)).capped
    for name in common:
        assert await listed(store, msgspec.structs.replace(usual, **{name: "rare"})) == [f"rare-{name}"]
    assert await listed(store, msgspec.structs.replace(usual, owners=["rare", ""])) == ["rare-owner"]
    assert await listed(store, msgspec.structs.replace(usual, internal_status="rare")) == ["rare-word"]
    held, both = [Status.HELD], [Status.HELD, Status.QUEUED]
    for told, rare in (
        (Filter(), 7),
        (Filter(agent="a"), 6),
        (Filter(user="x"), 6),
        (Filter(owners=["u"]), 6),
        (Filter(owners=["u"], session="s"), 5),
    ):
        for statuses, total in ((held, rare), (both, rare + 9)):
            page = await store.list("o", msgspec.structs.replace(told, statuses=statuses), limit=1)
            assert (page.total, page.capped) == (total, False), told
    walked = await store.list("o", Filter(parent="p", statuses=[Status.QUEUED, Status.HELD]))
    assert (len(walked.tasks), walked.capped) == (2, True)
    narrow = Filter(parent="p", trigger="b", internal_status="w", statuses=[Status.PAUSED, Status.FAILED])
    assert (await store.list("o", narrow)).capped is False


async def test_a_filter_of_none_lists_nothing(store: Store) -> None:
    """Whoever's statuses, or owners, are none of ours is not shown everybody's."""
    await submit(store, "t", agent="a")
    assert await listed(store, Filter()) == await listed(store, Filter(statuses=[Status.QUEUED])) == ["t"]
    nothing = [Filter(statuses=[]), Filter(statuses=[], agent="a"), Filter(owners=[]), Filter(owners=[], session="s")]
    for none in [*nothing, Filter(owners=[], agent="a"), Filter(statuses=[], trigger="b")]:
        page = await store.list("o", none)
        assert (page.tasks, page.total, page.capped, page.next) == ([], 0, False, None)


async def test_a_window_holds_both_of_its_ends_and_is_counted_without_a_walk(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "WALK_MAX", 3)
    times = [await submit(store, f"t{i}", agent="a") for i in range(8)]
    page = await store.list("o", Filter(agent="a", since=times[1], until=times[6]), limit=2)
    assert ([task.id for task in page.tasks], page.total, page.capped) == (["t6", "t5"], 6, False)
    assert await listed(store, Filter(since=times[1] + 1, until=times[2])) == ["t2"]
    assert await listed(store, Filter(since=times[1] + 1, until=times[2] - 1)) == []
    assert await listed(store, Filter(since=times[6], until=times[1])) == []
    assert await listed(store, Filter(until=-1)) == await listed(store, Filter(since=times[-1] + 1)) == []
    assert await listed(store, Filter(agent="a", until=times[6]), offset=5, limit=9) == ["t1", "t0"]
    after = (await store.list("o", Filter(agent="a"), limit=3)).next
    assert after
    assert await listed(store, Filter(agent="a", until=times[3], since=times[2]), after=after) == ["t3", "t2"]


@pytest.mark.parametrize("sources", [[()], [("owner", "u"), ("owner", "")]], ids=["one set", "two sets"])
async def test_tasks_of_the_same_moment_stand_by_their_ids_and_cursors_keep_their_places(
    store: Store, sources: list[tuple[str, ...]]
) -> None:
    """A clock that was set back gives many tasks one time."""
    names = ["a", "B", "_", "b", "A", "0", "-", ".", "a-", "aB", "Ab", "a.b", "a:b", "a_b", "aa", "Z", "z", "zz"]
    (tag,) = store.partitions.tags
    for i, id_ in enumerate(names):
        await submit(store, id_, owner="u" if i % 2 else "")
        for index in ((), ("owner", "u" if i % 2 else "")):
            await store.door.call("ZADD", keys.index(tag, "o", *index), 1700000000000000, id_)
    expected = sorted(names, reverse=True)
    assert await ids(store, *sources) == expected
    seen: list[str] = []
    after: str | None = ""
    while after is not None:
        page = await store.list("o", sources, after=after, limit=4)
        assert page.total == len(names) - len(seen) // 4
        seen += [task.id for task in page.tasks]
        after = page.next
        if after:
            await store.delete("o", seen[-1])  # the cursor's own task
    assert seen == expected


@pytest.mark.parametrize("after", ["x", "-", "1-", "-t", "1:t", "12345678901234567-t", "1-t\n", "1-t t", " 1-t", "²-t"])
async def test_what_is_no_cursor_is_refused(store: Store, after: str) -> None:
    with pytest.raises(Invalid):
        await store.list("o", [()], after=after)


async def test_a_cursor_goes_on_where_a_walk_ended_that_filled_no_page(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "WALK_MAX", 4)
    for i in range(12):
        await submit(store, f"t{i}", agent="a", user="x" if i == 1 else "y", trigger="b" if i < 11 else "")
    await submit(store, "other", user="x")
    pages, after = [], ""
    while True:
        page = await store.list("o", Filter(agent="a", trigger="b", statuses=[Status.QUEUED]), after=after, limit=3)
        pages.append([task.id for task in page.tasks])
        assert page.capped
        if page.next is None:
            break
        after = page.next
    assert functools.reduce(operator.iadd, pages, []) == [f"t{i}" for i in range(10, -1, -1)]
    monkeypatch.setattr(snapshots, "WALK_MAX", 1)
    page = await store.list("o", Filter(agent="a", user="x"), limit=3)
    assert (page.tasks, page.capped) == ([], True)
    assert page.next
    assert await listed(store, Filter(agent="a", user="x"), after=page.next) == ["t1"]


async def test_what_may_be_large_is_left_out_unless_asked_for(store: Store) -> None:
    await submit(store, "t", context={"big": "x" * 1000})
    (task,) = (await store.list("o", [()])).tasks
    assert task.context == {}
    (task,) = (await store.list("o", [()], fields=(*snapshots.LISTED, "context"))).tasks
    assert task.context["big"]


async def test_organisations_see_only_their_own(store: Store) -> None:
    await submit(store, "t")
    await submit(store, "t", org="o2", query="theirs")
    assert [task.query for task in (await store.list("o2", [()])).tasks] == ["theirs"]
    mine = await store.get("o", "t")
    assert mine is not None
    assert mine.query == "q t"


async def test_sessions_sum_up_their_tasks_and_are_their_owners(store: Store) -> None:
    for i in range(4):
        await submit(store, f"t{i}", session="s", owner="u" if i < 3 else "v", queue=f"q{i}")
    (one,) = await store.claim(["q0"], "w", 1)
    usage = events.Usage(input_tokens=2, output_tokens=3, cost_nano=7)
    await store.append("o", "t0", events.Completed(result="x", usage=usage), fence=one.fence, n=1)
    await store.append("o", "t1", events.Errored(error="x"))
    await store.append("o", "t2", events.Cancelled())
    session = await store.snapshots.session("o", "u", "s")
    assert session is not None
    assert (session.tasks, session.completed, session.failed) == (3, 1, 1)
    assert (session.input_tokens, session.output_tokens, session.cost_nano) == (2, 3, 7)
    assert session.first is not None
    assert session.latest is not None
    assert (session.first.id, session.latest.id) == ("t0", "t2")
    theirs = await store.snapshots.session("o", "v", "s")
    assert theirs is not None
    assert theirs.tasks == 1


async def test_a_deleted_session_is_gone_until_a_new_task_begins_it_again(store: Store) -> None:
    await submit(store, "t0", session="s")
    await store.snapshots.retitle_session("o", "u", "s", "Old")
    await store.snapshots.delete_session("o", "u", "s")
    assert await store.snapshots.session("o", "u", "s") is None
    assert await store.snapshots.session_was_deleted("o", "u", "s")
    assert [d async for d in store.snapshots.verify()] == []
    await submit(store, "t1", session="s")
    session = await store.snapshots.session("o", "u", "s")
    assert session is not None
    assert session.title == ""
    assert [d async for d in store.snapshots.verify()] == []
    await store.snapshots.rebuild()
    assert [d async for d in store.snapshots.verify()] == []


async def test_verify_names_what_somebody_else_changed(store: Store) -> None:
    await submit(store, "t", session="s")
    (tag,) = store.partitions.tags
    await store.door.call("HSET", f"tc:{{{tag}}}:task:o:t", "title", "forged")
    await store.door.call("ZADD", f"tc:{{{tag}}}:index:o:status:running", 1, "t")
    await store.door.call("DEL", f"tc:{{{tag}}}:ready:default")
    found = [f"{one.task}: {one.what}" for one in [d async for d in store.snapshots.verify()]]
    assert any("title" in line for line in found)
    assert any("holds it wrongly" in line for line in found)
    assert any("ready:default lacks it" in line for line in found)
    await store.snapshots.rebuild()
    assert [d async for d in store.snapshots.verify()] == []
