"""The snapshot in Redis is the fold of the task's stream, whatever happened to the task, in whatever order."""

import asyncio
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app import events, keys
from app.embedded import Embedded
from app.errors import Conflict, TooLarge
from app.events import AnyEvent, Submission, Usage
from app.settings import Settings
from app.store import Store, open_store
from app.task import EMPTY, STORED, TERMINAL, apply

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
AGENT = st.sampled_from(["", "a", "b", "final_output"])
USAGE = st.none() | st.builds(
    Usage,
    model=TEXT,
    provider=TEXT,
    input_tokens=st.integers(0, 10**6),
    output_tokens=st.integers(0, 10**6),
    cost_nano=st.integers(0, 10**12),
)
EVENTS: st.SearchStrategy[AnyEvent] = st.one_of(
    st.builds(events.TextDelta, text=TEXT, agent=AGENT),
    st.builds(events.TextDelta, text=TEXT, agent=AGENT),
    st.builds(events.TextCompleted, text=TEXT, agent=AGENT, usage=USAGE),
    st.builds(events.Continued, query=TEXT, title=TEXT, submission=TEXT, deadline_seconds=st.sampled_from([0, 60.5])),
    st.builds(events.Retried, deadline_seconds=st.sampled_from([0, 60.5])),
    st.builds(events.Started, worker=TEXT),
    st.builds(events.Started, worker=TEXT),
    st.builds(events.PauseAsked, reason=TEXT, actor=TEXT),
    st.builds(events.Paused, checkpoint=TEXT, state=st.dictionaries(TEXT, st.integers(), max_size=2)),
    st.builds(events.Resumed),
    st.builds(events.Requeued, delay_seconds=st.sampled_from([0, 1.5]), refund=st.booleans()),
    st.builds(events.LeaseLost, refund=st.booleans()),
    st.builds(events.ApprovalRequested, approval=st.just("a"), reason=TEXT, actor=TEXT),
    st.builds(events.ApprovalDecided, approval=st.sampled_from(["a", "a", "b"]), approved=st.booleans()),
    st.builds(events.ReviewRequested, plan=TEXT, version=st.just(1), round=st.integers(1, 3)),
    st.builds(events.Reviewed, version=st.sampled_from([1, 1, 2]), approved=st.booleans()),
    st.builds(events.Completed, result=TEXT, usage=USAGE),
    st.builds(events.Failed, error=TEXT),
    st.builds(events.Errored, error=TEXT),
    st.builds(events.Cancelled, reason=TEXT, actor=TEXT),
    st.builds(events.TimedOut),
    st.builds(
        events.Restated,
        to=st.sampled_from(["", *(status.value for status in STORED)]),
        result=st.none() | TEXT,
        internal_status=st.none() | TEXT,
    ),
    st.builds(events.Progressed, fraction=st.floats(0, 1)),
    st.builds(events.Noted, name=st.just("WAITING"), message=TEXT),
    st.just(events.ChildSubmitted(task=Submission(id="c", org="o", query="?", submission="c"))),
    st.builds(events.ToolReturned, tool=TEXT, output=st.none() | TEXT),
)
NUMBER = count()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """One server for all examples; each example has a task of its own."""
    with tempfile.TemporaryDirectory() as folder:
        runner = asyncio.Runner()
        server = Embedded(Path(folder) / "data")
        runner.run(server.__aenter__())
        yield server.url
        runner.run(server.__aexit__(None, None, None))
        runner.close()


async def play(store: Store, id_: str, said: list[AnyEvent], *, ttl: float, deadline: float, attempts: int) -> int:
    """Appends what is legal; answers how many entries there are."""
    task = Submission(id=id_, org="o", owner="u", session="s", query="?", submission=id_, queue=id_)
    await store.submit(msgspec.structs.replace(task, ttl_seconds=ttl, deadline_seconds=deadline))
    entries = 1
    for event in said:
        if isinstance(event, events.ChildSubmitted):
            name = f"{id_}.{entries}"
            below = msgspec.structs.replace(event.task, id=name, parent=id_, submission=name)
            event = events.ChildSubmitted(task=below)  # noqa: PLW2901 (a child knows its parent)
        if isinstance(event, events.Started):
            entries += len(await store.claim({id_: attempts}, "w", 1))
            continue
        try:
            appended = await store.append("o", id_, event)
        except (Conflict, TooLarge):
            continue
        entries += not appended.duplicate
    return entries


@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    said=st.lists(EVENTS, max_size=40),
    mark=st.sampled_from([10, 5000]),
    ttl=st.sampled_from([0, 60]),
    deadline=st.sampled_from([0, 30, 90]),
    attempts=st.sampled_from([0, 5]),
)
def test_the_snapshot_is_the_fold(
    url: str, said: list[AnyEvent], mark: int, ttl: float, deadline: float, attempts: int
) -> None:
    async def example() -> None:
        async with open_store(Settings(redis_url=url, events_per_mark=mark)) as store:
            id_ = f"t{next(NUMBER)}"
            entries = await play(store, id_, said, ttl=ttl, deadline=deadline, attempts=attempts)
            page = await store.events("o", id_, "")
            assert page is not None
            base = await store.snapshots.snapshot("o", id_, base=True)
            if page.gap:
                assert base is not None
                page = await store.events("o", id_, base.fields["last_event_id"])
                assert page is not None
            first = page.base_seq + 1
            assert [entry.seq for entry in page.entries] == list(range(first, entries + 1))
            assert page.last_seq - page.base_seq <= 2 * mark
            folded = base or EMPTY
            for entry in page.entries:
                folded = apply(folded, entry)
            stored = await store.snapshots.snapshot("o", id_)
            assert stored == folded
            task = await store.get("o", id_)
            assert task is not None
            assert (task.status in TERMINAL) == (page.status in TERMINAL)
            # One task per example: what an earlier one left is not this one's fault.
            assert [difference async for difference in store.snapshots.verify()] == []
            below = (await store.list("o", [("parent", id_)], limit=100)).tasks
            assert len(below) == task.children
            for one in (task, *below):
                await store.delete("o", one.id)

    asyncio.run(example())


async def test_indexes_queues_and_totals_agree_with_the_log_and_rebuild_changes_nothing(store: Store) -> None:
    for i in range(30):
        said: list[AnyEvent] = [
            events.TextDelta(text="a"),
            events.TextCompleted(text="a", usage=Usage(input_tokens=i)),
            events.Completed(result="a") if i % 3 else events.PauseAsked(),
        ]
        id_ = f"r{i}"
        await store.submit(
            Submission(id=id_, org="o", owner="u", session="s", query="?", submission=id_, queue=f"q{i}")
        )
        if i % 5:
            await store.claim([f"q{i}"], "w", 1)
            for event in said[: i % 5 - 1]:
                await store.append("o", id_, event)
    assert [difference async for difference in store.snapshots.verify()] == []
    before = await dump(store)
    assert await store.snapshots.rebuild() == (30, [])
    assert await dump(store) == before
    assert [difference async for difference in store.snapshots.verify()] == []


async def dump(store: Store) -> dict[str, object]:
    """Every key that `rebuild` writes, with its content. Lease scores are left out: rebuild ends the leases."""
    content: dict[str, object] = {}
    async for name in store.snapshots._scan("*"):
        kind = name.removeprefix("tc:").split(":")[1] if name != keys.DEPLOYMENT else ""
        match kind:
            case "task" | "totals":
                content[name] = await store.door.read("HGETALL", name)
            case "text":
                content[name] = await store.door.read("GET", name)
            case "index" | "sessions" | "ready" | "ready-of" | "due" | "ended":
                content[name] = await store.door.read("ZRANGE", name, 0, -1, "WITHSCORES")
            case "leases":
                content[name] = sorted(await store.door.read("ZRANGE", name, 0, -1))
            case _:
                pass
    return content
