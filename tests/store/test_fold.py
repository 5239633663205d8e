"""The snapshot in Redis is the fold of the task's stream, whatever happened to the task, in whatever order."""

import asyncio
import random
import tempfile
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from msgspec.structs import replace

from app import events, keys
from app.embedded import Embedded
from app.errors import Conflict, Stale, TaskcastError, TooLarge
from app.events import AnyEvent, Entry, Submission, Usage
from app.log import Message, logged, said
from app.seam import Ended, Gap
from app.settings import Settings
from app.store import Store, open_store
from app.task import EMPTY, STORED, TERMINAL, Snapshot, apply, task
from tests.waiting import wait_until

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
    st.builds(
        events.Continued,
        query=TEXT,
        title=TEXT,
        submission=TEXT,
        deadline_seconds=st.sampled_from([0, 60.5]),
        queue=st.sampled_from(["", "", "another"]),
        llm_provider=TEXT,
        llm_model=TEXT,
        llm_effort=TEXT,
        output_schema=st.sampled_from([{}, {"type": "object"}]),
    ),
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
    st.builds(events.Failed, error=TEXT, usage=USAGE),
    st.builds(events.Errored, error=TEXT),
    st.builds(events.Cancelled, reason=TEXT, actor=TEXT),
    st.builds(events.TimedOut),
    st.builds(
        events.Restated,
        to=st.sampled_from(["", *(status.value for status in STORED)]),
        result=st.none() | TEXT,
        result_type=st.sampled_from(["", "json"]),
        title=st.none() | TEXT,
        internal_status=st.none() | TEXT,
        stated=st.none() | st.dictionaries(TEXT, st.integers(), max_size=2),
        version=st.integers(0, 3),
        usage=USAGE,
    ),
    st.builds(events.Progressed, fraction=st.floats(0, 1)),
    st.builds(events.Noted, name=st.just("WAITING"), message=TEXT),
    st.just(events.ChildSubmitted(task=Submission(id="c", org="o", query="?", submission="c"))),
    st.builds(events.ToolCalled, tool=TEXT, params=st.dictionaries(TEXT, TEXT, max_size=2)),
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


def in_thread(entry: Entry, before: Snapshot) -> bool:
    """Whether it belongs to the conversation: what is asked, each tool's call and answer, each result, and what an
    owner states of an ended task.
    """
    match entry.event:
        case events.Restated(to=to, result=result):
            ended = before.status in TERMINAL
            return bool(to) and (ended or (to in TERMINAL and bool(result)))
        case events.Submitted() | events.Continued() | events.Completed() | events.ToolCalled() | events.ToolReturned():
            return True
        case _:
            return False


async def heard(store: Store, id_: str, entries: list[Entry]) -> list[Entry]:
    """Adds what the task's stream has got since the last of them, before any of it is trimmed."""
    page = await store.events("o", id_, entries[-1].id if entries else "")
    assert page is not None
    assert not page.gap
    return [*entries, *page.entries]


async def play(
    store: Store, id_: str, said: list[AnyEvent], *, ttl: float, deadline: float, attempts: int
) -> list[Entry]:
    """Appends what is legal; answers all entries that there ever were."""
    task = Submission(id=id_, org="o", owner="u", session="s", query="?", submission=id_, queue=id_)
    await store.submit(msgspec.structs.replace(task, ttl_seconds=ttl, deadline_seconds=deadline))
    entries = await heard(store, id_, [])
    for event in said:
        entries = await heard(store, id_, entries)
        if isinstance(event, events.ChildSubmitted):
            name = f"{id_}.{len(entries)}"
            below = msgspec.structs.replace(event.task, id=name, parent=id_, submission=name)
            event = events.ChildSubmitted(task=below)  # noqa: PLW2901 (a child knows its parent)
        if isinstance(event, events.Started):
            found = await store.get("o", id_)
            assert found is not None
            for one in await store.claim({found.queue: attempts}, "w", 1):
                assert one.task == id_
            continue
        with suppress(Conflict, TooLarge):
            await store.append("o", id_, event)
    return await heard(store, id_, entries)


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
            assert page.entries == entries[first - 1 :]
            assert [entry.seq for entry in entries] == list(range(1, page.last_seq + 1))
            assert page.last_seq - page.base_seq <= 2 * mark
            folded = base or EMPTY
            for entry in page.entries:
                folded = apply(folded, entry)
            stored = await store.snapshots.snapshot("o", id_)
            assert stored == folded
            task = await store.get("o", id_)
            assert task is not None
            assert (task.status in TERMINAL) == (page.status in TERMINAL)
            states = [EMPTY]
            for entry in entries:
                states.append(apply(states[-1], entry))
            assert states[-1] == stored
            thread = [
                Message(entry.seq, entry.at, entry.event)
                for before, entry in zip(states, entries, strict=False)
                if in_thread(entry, before)
            ]
            assert await store.thread("o", id_) == thread
            assert task.thread_size == sum(entries[one.seq - 1].size for one in thread)
            turns = [entry.seq for entry in entries if isinstance(entry.event, events.Continued)]
            assert (task.turn, task.turn_seq) == (1 + len(turns), max(turns, default=0))
            # One task per example: what an earlier one left is not this one's fault.
            assert [difference async for difference in store.snapshots.verify()] == []
            below = (await store.list("o", [("parent", id_)], limit=100)).tasks
            assert len(below) == task.children
            for one in (task, *below):
                await store.delete("o", one.id)

    asyncio.run(example())


TALK: list[AnyEvent] = [
    events.ToolCalled(tool="search", params={"q": "?"}),
    events.ToolReturned(tool="search", output="!"),
    events.Completed(result="a"),
]


async def talk(store: Store, id_: str, turns: int) -> None:
    """A task of so many turns, each of five entries, of which four belong to the conversation."""
    await store.submit(Submission(id=id_, org="o", query="turn 1", submission=id_))
    for turn in range(1, turns + 1):
        if turn > 1:
            await store.append("o", id_, events.Continued(query=f"turn {turn}", submission=f"{id_}.{turn}"))
        await store.claim(["default"], "w", 1)
        for event in TALK:
            await store.append("o", id_, event)


async def differences(store: Store) -> list[str]:
    return [difference.what async for difference in store.snapshots.verify()]


async def test_a_trimmed_task_keeps_its_whole_conversation_and_rebuild_keeps_it_too(settings: Settings) -> None:
    async with open_store(settings.model_copy(update={"events_per_mark": 10})) as store:
        await talk(store, "t", 60)
        page = await store.events("o", "t", "")
        assert page is not None
        assert page.gap == "trimmed"
        assert page.base_seq > 250
        thread = await store.thread("o", "t")
        assert len(thread) == 4 * 60
        asked = [one.event for one in thread if isinstance(one.event, events.Continued)]
        assert [event.query for event in asked] == [f"turn {turn}" for turn in range(2, 61)]
        assert await differences(store) == []
        assert await store.snapshots.rebuild() == (1, [])
        assert await store.thread("o", "t") == thread
        assert await differences(store) == []


DAMAGES: dict[str, list[tuple[Any, ...]]] = {
    "gone": [("DEL",)],
    "its last item gone": [("RPOP",)],
    "an item too many": [("RPUSH", b"99 1 {}")],
    "no item at all": [("RPUSH", b"rubbish")],
    "another text": [("LSET", -1, b'4 1 {"type":"completed"}')],
    "out of order": [("RPOPLPUSH", "")],
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_conversation_is_found_and_mended(store: Store, damage: str) -> None:
    await talk(store, "t", 3)
    (tag,) = store.partitions.tags
    name = keys.key(tag, "thread", "o", "t")
    before = await store.thread("o", "t")
    for command, *words in DAMAGES[damage]:
        await store.door.call(command, name, *(word or name for word in words))
    assert await differences(store) == ["its conversation differs from its events"]
    assert await store.snapshots.rebuild() == (1, [])
    assert await store.thread("o", "t") == before
    assert await differences(store) == []


async def test_what_is_lost_of_a_trimmed_conversation_stays_told(settings: Settings) -> None:
    """It stands nowhere else; what can be told still is."""
    async with open_store(settings.model_copy(update={"events_per_mark": 10})) as store:
        await talk(store, "t", 10)
        (tag,) = store.partitions.tags
        await store.door.call("LPOP", keys.key(tag, "thread", "o", "t"))
        await store.door.call("LSET", keys.key(tag, "thread", "o", "t"), 0, b"rubbish")
        assert await differences(store) == ["its conversation differs from its events"]
        assert await store.snapshots.rebuild() == (1, [])
        assert len(await store.thread("o", "t")) == 38
        assert await differences(store) == ["its conversation differs from its events"]


async def test_a_reader_that_folds_follows_a_turn_over_trimmed_history(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.hub.Pull.BACKLOG_BYTES", 300)  # what is live is dropped, and folded again, all the time
    async with open_store(settings.model_copy(update={"events_per_mark": 10})) as store:
        await talk(store, "t", 20)
        await store.append("o", "t", events.Continued(query="last", submission="last"))
        began = await store.get("o", "t")
        assert began is not None
        got: list[Entry] = []

        async def speak() -> None:
            await store.claim(["default"], "w", 1)
            for i in range(60):
                said = await store.append("o", "t", events.TextDelta(text=f"{i} ", agent=f"a{i % 2}"))
                # No further ahead than what is kept, for the reader must find what it asked for.
                await wait_until(partial(_has, got, said.seq - 5), "the reader comes along")
            await store.append("o", "t", events.Completed(result="b"))

        async with store.hub.follow(store.hub.folded("o", "t", began.turn_seq)) as pull, asyncio.TaskGroup() as group:
            speaking: asyncio.Task[None] | None = None
            async for items in pull:
                for item in items:
                    if isinstance(item, Entry):
                        got.append(item)
                    else:
                        assert isinstance(item, Ended)
                speaking = speaking or group.create_task(speak())
        assert [one.seq for one in got] == list(range(began.turn_seq, began.turn_seq + 63))
        fold = Snapshot(fields=got[0].after or {})
        assert task(fold.fields) == began
        for one in got[1:]:
            fold = apply(fold, replace(one, after=None))
            assert one.after == fold.fields
        assert await store.snapshots.snapshot("o", "t") == fold
        async with store.hub.follow(store.hub.folded("o", "t", 2)) as pull:
            first = (await anext(aiter(pull)))[0]
        assert isinstance(first, Gap)
        assert (first.reason, first.earliest) == ("trimmed", _base(first) + 1)


def _has(got: list[Entry], seq: int) -> bool:
    return got[-1].seq >= seq


def _base(gap: Gap) -> int:
    assert gap.snapshot is not None
    return int(gap.snapshot.fields["last_seq"])


async def test_a_conversation_of_no_task_is_found(store: Store) -> None:
    await talk(store, "t", 1)
    (tag,) = store.partitions.tags
    name = keys.key(tag, "thread", "o", "nobody")
    await store.door.call("RPUSH", name, b"1 1 {}")
    assert await differences(store) == ["belongs to no task"]


async def test_a_new_task_of_a_deleted_ones_id_begins_another_conversation(store: Store) -> None:
    await talk(store, "t", 2)
    await store.delete("o", "t")
    assert await store.thread("o", "t") == []
    await store.submit(Submission(id="t", org="o", query="again", submission="again"))
    (first,) = await store.thread("o", "t")
    assert isinstance(first.event, events.Submitted)
    assert await differences(store) == []
    await store.snapshots.rebuild()
    assert await store.thread("o", "t") == [first]


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
            case "thread":
                content[name] = await store.door.read("LRANGE", name, 0, -1)
            case "index" | "sessions" | "ready" | "ready-of" | "due" | "ended":
                content[name] = await store.door.read("ZRANGE", name, 0, -1, "WITHSCORES")
            case "leases":
                content[name] = sorted(await store.door.read("ZRANGE", name, 0, -1))
            case _:
                pass
    return content


def _said(rng: random.Random, i: int) -> AnyEvent:
    """Of a worker."""
    choice: list[AnyEvent] = [
        events.TextDelta(text="hi", agent=rng.choice(["", "a", "b"])),
        events.Noted(name="NOTE"),
        events.Progressed(fraction=0.5),
        events.ToolCalled(tool="x"),
        events.TextCompleted(text="t", agent="a", usage=Usage(input_tokens=1)),
        events.Paused(),
        events.ApprovalRequested(approval=f"a{i}", reason="?"),
        events.Completed(result="r", usage=Usage(input_tokens=2)),
        events.Requeued(),
        events.Failed(error="e"),
    ]
    return rng.choice(choice)


def _asked(rng: random.Random, i: int) -> AnyEvent:
    """Of others."""
    choice: list[AnyEvent] = [
        events.PauseAsked(),
        events.Resumed(),
        events.Cancelled(),
        events.Continued(query="c", submission=f"c{i}", queue=rng.choice(["", "q2"]), deadline_seconds=900),
        events.Retried(),
        events.TimedOut(),
        events.Restated(internal_status=rng.choice(["", "i1", "i2"])),
        events.Restated(to=rng.choice(["running", "completed", "paused"]), result="z"),
        events.LeaseLost(),
    ]
    return rng.choice(choice)


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_many_tasks_steps_share_calls_leave_is_the_fold_of_the_log(
    settings: Settings, seed: int
) -> None:
    rng = random.Random(seed)
    fences: dict[str, int] = {}
    refused: set[type[Exception]] = set()
    async with open_store(settings.model_copy(update={"events_per_mark": 10, "lease_seconds": 60})) as store:

        def step(i: int) -> Coroutine[Any, Any, object]:
            id_, kind = f"t{rng.randrange(12)}", rng.random()
            if kind < 0.15:
                more: dict[str, Any] = {"user": rng.choice(["", "p", "p\0a"]), "agent": rng.choice(["a", "a\0b", "b"])}
                more |= {"session": rng.choice(["", "s1", "s2"]), "parent": rng.choice(["", "t0"])}
                task = Submission(id=id_, org="o", owner=rng.choice("uv"), query="?", submission=f"x{i}", **more)
                return store.submit(task)
            if kind < 0.18:
                return store.delete("o", id_)
            if kind < 0.75 and id_ in fences:
                batch = [said(_said(rng, i)) for _ in range(rng.randint(1, 4))]
                return store.extend("o", id_, batch, fence=fences[id_], n=rng.randint(1, 5))
            return store.append("o", id_, _asked(rng, i))

        for turn in range(60):
            steps = [step(100 * turn + i) for i in range(rng.randint(1, 60))]
            for outcome in await asyncio.gather(*steps, return_exceptions=True):
                for one in outcome if isinstance(outcome, list) else [outcome]:
                    if isinstance(one, Exception):
                        assert isinstance(one, TaskcastError), one
                        refused.add(type(one))
            if turn % 2:
                fences |= {one.task: one.fence for one in await store.claim(["default", "q2"], "w", rng.randint(1, 8))}
            if turn % 10 == 9:
                assert [damage async for damage in store.snapshots.verify()] == []
        (tag,) = store.partitions.tags
        entries = await store.door.read("XRANGE", keys.key(tag, "log"), "-", "+")
        numbers = [logged(*one).number for one in entries]
        assert numbers == [*range(1, len(numbers) + 1)]
        assert len(numbers) > 300
        assert refused >= {Conflict, Stale}
