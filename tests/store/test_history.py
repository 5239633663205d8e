"""Reading a task's stream: pages, cursors, and never silence about what is missing."""

from pathlib import Path

import pytest

from app import keys
from app.events import Noted, Submission, TextDelta
from app.log import Page
from app.settings import Settings
from app.store import Store, open_store
from app.task import EMPTY, apply


async def written(store: Store, count: int, id_: str = "t") -> list[str]:
    """A running task with `count` entries; answers their ids."""
    ids = [(await store.submit(Submission(id=id_, org="o", query="?", submission=id_, queue=id_))).id]
    (claimed,) = await store.claim([id_], "w", 1)
    for n in range(1, count - 1):
        appended = await store.append("o", id_, TextDelta(text=f"{n} "), fence=claimed.fence, n=n)
        ids.append(appended.id)
    page = await store.events("o", id_, f"seq:{1}", limit=1)
    assert page is None or page.gap or page.entries[0].seq == 2
    if page and page.entries:
        ids.insert(1, page.entries[0].id)
    return ids


async def read(store: Store, after: str, *, check: bool = True, id_: str = "t") -> Page:
    page = await store.events("o", id_, after, check=check)
    assert page is not None
    return page


async def test_every_cursor_form_gives_exactly_what_follows(store: Store) -> None:
    ids = await written(store, 50)
    assert [e.id for e in (await read(store, "")).entries] == ids
    for i, id_ in enumerate(ids):
        by_id, by_seq = await read(store, id_), await read(store, f"seq:{i + 1}")
        assert [e.id for e in by_id.entries] == [e.id for e in by_seq.entries] == ids[i + 1 :]
        assert by_id.gap == by_seq.gap == ""


async def test_pages_join_without_gap_or_duplicate(store: Store) -> None:
    await written(store, 50)
    after, seen = "", []
    while (page := await store.events("o", "t", after, limit=7)) and page.entries:
        assert len(page.entries) <= 7
        seen += [e.seq for e in page.entries]
        after = page.entries[-1].id
    assert seen == list(range(1, 51))


async def test_a_cursor_before_the_first_entry_of_an_untrimmed_task_starts_at_the_beginning(store: Store) -> None:
    await written(store, 5)
    for after in ("", "0-0", "0-1", "1-0", "seq:0"):
        page = await read(store, after)
        assert (page.gap, len(page.entries)) == ("", 5)


async def test_a_cursor_beyond_the_last_entry_is_ahead(store: Store) -> None:
    await written(store, 5)
    for after in ("9999999999999-0", "seq:6"):
        assert (await read(store, after)).gap == "ahead"


async def test_a_cursor_of_another_task_is_a_place_in_the_log_and_not_a_gap(store: Store) -> None:
    await store.submit(Submission(id="a", org="o", query="?", submission="a", queue="a"))
    other = await store.submit(Submission(id="b", org="o", query="?", submission="b"))
    (claimed,) = await store.claim(["a"], "w", 1)
    await store.append("o", "a", TextDelta(text="x"), fence=claimed.fence, n=1)
    page = await read(store, other.id, id_="a")
    assert (page.gap, [e.seq for e in page.entries]) == ("", [2, 3])


async def test_an_id_that_nobody_gave_is_unknown_but_only_when_it_comes_from_outside(store: Store) -> None:
    ids = await written(store, 5)
    ms, n = ids[2].split("-")
    forged = f"{ms}-{int(n) + 7}"
    assert (await read(store, forged)).gap in {"unknown", "ahead"}
    assert (await read(store, forged, check=False)).gap in {"", "ahead"}


async def test_no_such_task_is_none(store: Store) -> None:
    assert await store.events("o", "nobody", "") is None
    await written(store, 3)
    assert await store.events("another-org", "t", "") is None


async def test_a_trimmed_stream_keeps_a_base_from_which_every_later_state_follows(tmp_path: Path) -> None:
    async with open_store(Settings(data=tmp_path / "d", events_per_mark=20)) as store:
        ids = await written(store, 3)
        page: Page | None = None
        for n in range(2, 120):
            await store.append("o", "t", TextDelta(text=f"{n} "), fence=1, n=n)
            task = await store.get("o", "t")
            assert task is not None
            page = await store.events("o", "t", f"seq:{max(task.last_seq - 5, 0)}")
            assert page is not None
            assert page.last_seq - page.base_seq <= 40
        assert page is not None
        base = await store.snapshots.snapshot("o", "t", base=True)
        assert base is not None
        assert (await read(store, "")).gap == "trimmed"
        assert (await read(store, ids[0])).gap == "trimmed"
        assert (await read(store, f"seq:{page.base_seq - 1}")).gap == "trimmed"
        for after in (base.fields["last_event_id"], f"seq:{page.base_seq}"):
            rest = await read(store, after)
            assert rest.gap == ""
            assert [e.seq for e in rest.entries] == list(range(page.base_seq + 1, page.last_seq + 1))
        folded = base
        for entry in rest.entries:
            folded = apply(folded, entry)
        assert folded == await store.snapshots.snapshot("o", "t")
        assert folded != EMPTY
        assert [d async for d in store.snapshots.verify()] == []


async def test_the_partitions_log_is_bounded_in_entries_and_bytes(tmp_path: Path) -> None:
    small = Settings(data=tmp_path / "d", log_entries=200, log_bytes=20 * 1024 * 1024)
    async with open_store(small) as store:
        await store.submit(Submission(id="t", org="o", query="?", submission="t"))
        await store.claim(["default"], "w", 1)
        (tag,) = store.partitions.tags
        for n in range(1, 250):
            await store.append("o", "t", TextDelta(text="x"), fence=1, n=n)
        assert await store.door.read("XLEN", keys.key(tag, "log")) == 200
        assert (await read(store, "seq:1")).entries[0].seq == 2  # the task's own stream is whole
        size = 200_000
        for n in range(250, 400):
            await store.append("o", "t", Noted(name="NOTE", message="x" * size), fence=1, n=n)
        kept = await store.door.read("XLEN", keys.key(tag, "log"))
        share = small.log_bytes // 64
        assert small.log_bytes - 2 * share <= kept * size <= small.log_bytes + 2 * share
        assert await store.door.read("LLEN", keys.key(tag, "marks")) <= 65


@pytest.mark.parametrize("count", [2, 3, 10])
async def test_log_and_stream_hold_the_same_entries(store: Store, count: int) -> None:
    await written(store, count)
    (tag,) = store.partitions.tags
    async with store.door.blocking() as redis:
        tail = await store.log.tail(redis, tag, "0-0")
    assert [one.entry for one in tail] == (await read(store, "")).entries
    assert [one.number for one in tail] == list(range(1, count + 1))
    assert (tail[0].before, tail[0].after, tail[1].after) == ("new", "queued", "running")
