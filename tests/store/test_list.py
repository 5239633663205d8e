"""Lists: newest first, stable pages, filters that combine, totals that say when they are capped."""

import functools
import operator
from typing import Any

import pytest

from app import events, snapshots
from app.events import Submission
from app.store import Store


async def submit(store: Store, id_: str, **more: Any) -> None:
    values: dict[str, Any] = {"id": id_, "org": "o", "owner": "u", "query": f"q {id_}", "submission": id_} | more
    await store.submit(Submission(**values))


async def ids(store: Store, *sources: tuple[str, ...], **more: Any) -> list[str]:
    return [task.id for task in (await store.list("o", sources, **more)).tasks]


async def test_pages_are_newest_first_and_join(store: Store) -> None:
    for i in range(25):
        await submit(store, f"t{i}")
    pages = [await ids(store, (), offset=offset, limit=10) for offset in (0, 10, 20, 30)]
    assert [len(page) for page in pages] == [10, 10, 5, 0]
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
    page = await store.list("o", [("agent", "a1")], where={"user": ["x1"], "status": ["queued"]}, limit=2)
    assert ([task.id for task in page.tasks], page.total, page.capped) == (["t25", "t19"], 5, False)
    monkeypatch.setattr(snapshots, "WALK_MAX", 10)
    page = await store.list("o", [()], where={"agent": ["a1"]})
    assert (page.capped, page.total) == (True, 3)


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
