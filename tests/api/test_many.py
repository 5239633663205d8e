"""Many tasks on one connection: what it begins with, one cursor for all, and nothing that is not its reader's."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from httpx_sse import ServerSentEvent, aconnect_sse
from websockets.exceptions import InvalidStatus

from app import events, hub, keys, seam
from app.api.shannon.spelling import task_body
from app.events import Entry, Json
from app.identity import Identities
from app.log import Logged
from app.settings import Settings
from app.store import Store
from app.task import EMPTY, apply, task
from tests.api import test_streams
from tests.api.serving import KEY, ORG, USER, Attempt, Served, ended, served, started, submit
from tests.api.test_sockets import bodies
from tests.waiting import wait_until

LISTENING = {"Accept": "text/event-stream"}


@pytest.fixture(params=[1, 3])
def partitions(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


@pytest.fixture
def settings(tmp_path: Path, partitions: int) -> Settings:
    return Settings(data=tmp_path / "data", lease_seconds=60, grace_seconds=2, partitions=partitions)


@pytest.fixture
async def server(store: Store, settings: Settings, path: str) -> AsyncIterator[Served]:
    async with served(store, settings) as running:
        yield running


one_partition = pytest.mark.parametrize("partitions", [1], indirect=True)
directly = pytest.mark.parametrize("path", ["direct"], indirect=True)


class Told:
    """A stream of many tasks, as a client reads it."""

    def __init__(self, frames: AsyncIterator[ServerSentEvent]) -> None:
        self._frames = frames
        self.began: dict[str, Json] = {}
        """What the snapshots said, by task."""
        self.cursor = ""
        self.events: list[tuple[str, int]] = []
        """Task and seq of each event, in order."""
        self.names: list[str] = []

    async def next(self) -> tuple[str, Any]:
        frame = await anext(self._frames)
        self.names.append(frame.event)
        self.cursor = frame.id or self.cursor
        data: Any = frame.data if frame.data == "[DONE]" else json.loads(frame.data)
        if frame.event == "snapshot":
            self.began[data["workflow_id"]] = data
        elif frame.event not in {"cursor", "gap", "done"} and "seq" in data:
            self.events.append((data["workflow_id"], data["seq"]))
        return frame.event, data

    async def until(self, *names: str) -> Any:
        """The data of the first frame of one of these names."""
        while True:
            name, data = await self.next()
            if name in names:
                return data

    async def count(self, events_: int) -> None:
        while len(self.events) < events_:
            await self.next()

    def seqs(self, task_: str) -> list[int]:
        return [seq for id_, seq in self.events if id_ == task_]


@asynccontextmanager
async def many(
    server: Served, *ids: str, cursor: str = "", key: str = "", **query: str | list[str]
) -> AsyncIterator[Told]:
    headers = {"X-API-Key": key} if key else dict(KEY)
    if cursor:
        headers["Last-Event-ID"] = cursor
    params = {**query, **({"workflow_id": [*ids]} if ids else {})}
    async with aconnect_sse(server.client, "GET", "/api/v1/stream/sse", params=params, headers=headers) as source:
        assert source.response.status_code == 200, await source.response.aread()
        yield Told(source.aiter_sse())


async def history(store: Store, id_: str) -> list[Entry]:
    page = await store.events(ORG, id_, "")
    assert page
    while page.entries[-1].seq < page.last_seq:
        more = await store.events(ORG, id_, page.entries[-1].id)
        assert more
        page.entries.extend(more.entries)
    return page.entries


async def three(store: Store) -> list[tuple[str, Attempt]]:
    """Running tasks; of three partitions each has one."""
    found: dict[str, tuple[str, Attempt]] = {}
    while len(found) < 3:
        id_, attempt = await started(store)
        place = store.partitions.tag(ORG, id_) if len(store.partitions.tags) == 3 else str(len(found))
        if place in found:
            await store.delete(ORG, id_)
        else:
            found[place] = id_, attempt
    return list(found.values())


async def cut(store: Store) -> None:
    """Trims each partition's log to its last entry."""
    for tag in store.partitions.tags:
        await store.door.call("XTRIM", keys.key(tag, "log"), "MAXLEN", "=", 1)


# What it begins with, and what it tells


async def test_named_tasks_begin_with_their_states_and_go_on_live(store: Store, server: Served) -> None:
    (a, one), (b, two), (c, _) = await three(store)
    await one.write("x")
    over = await ended(store, "y")
    for ids in ([a, b, over], [f"{a},{b}", over, a]):
        async with many(server, *ids) as told:
            cursor = await told.until("cursor")
            assert told.names == ["snapshot", "snapshot", "snapshot", "cursor"]
            assert {id_: said["seq"] for id_, said in told.began.items()} == {
                a: len(await history(store, a)),
                b: len(await history(store, b)),
                over: 4,
            }
            assert told.began[a]["snapshot"]["texts"]["final_output"].startswith("x")
            assert told.began[over]["snapshot"]["status"] == "TASK_STATUS_COMPLETED"
            assert cursor["stream_id"] == told.cursor
            assert cursor["log_epoch"] == told.began[a]["log_epoch"] == store.partitions.epoch
            expected = [(id_, told.began[id_]["seq"] + 1) for id_ in (a, b)]
            await store.append(ORG, c, events.Noted(name="OTHER"))
            for attempt, event in ((one, expected[0]), (two, expected[1])):
                before = told.cursor
                await attempt.write("z")
                await told.next()
                assert told.events[-1] == event
                assert told.cursor != before
                assert told.cursor.count(",") == len(store.partitions.tags) - 1


async def test_without_names_it_is_what_the_list_shows_and_nobody_elses(
    store: Store, server: Served, settings: Settings
) -> None:
    mine = await submit(store, agent="a1", session="s1")
    other = await submit(store, agent="a2", session="s2")
    nobodys = await submit(store, owner="", agent="a1", session="s3")
    foreign = [await submit(store, owner="eve", agent="a1"), await submit(store, org="elsewhere", agent="a1")]
    key = await Identities(store, settings).create("elsewhere", USER, "")
    wanted: list[tuple[dict[str, Any], set[str]]] = [
        ({}, {mine, other, nobodys}),
        ({"session_id": "s1"}, {mine}),
        ({"agent_id": "a1"}, {mine, nobodys}),
        ({"agent_id": "a1", "session_id": "s2"}, set()),
        ({"status": "QUEUED"}, {mine, other, nobodys}),
        ({"status": "RUNNING"}, set()),
        ({"status": ["running", "queued"], "agent_id": "a2"}, {other}),
    ]
    for query, tasks in wanted:
        async with many(server, **query) as told:
            await told.until("cursor")
            assert set(told.began) == tasks
            for id_, org in ((foreign[0], ORG), (foreign[1], "elsewhere"), (mine, ORG), (other, ORG), (nobodys, ORG)):
                await store.append(org, id_, events.Noted(name="HELLO"))
            await told.count(len(tasks) if "RUNNING" not in str(query) else 0)
            assert {id_ for id_, _ in told.events} == tasks
    async with many(server, key=key) as told:
        await told.until("cursor")
        assert set(told.began) == {foreign[1]}


async def test_a_status_means_before_or_after_the_event(store: Store, server: Served) -> None:
    async with many(server, status="RUNNING") as told:
        await told.until("cursor")
        id_, attempt = await started(store)
        await attempt.complete()
        again = await ended(store)
        await told.count(4)
    assert (told.seqs(id_), told.seqs(again)) == ([2, 3], [2, 3])  # the order of several partitions is not fixed


async def test_states_and_what_follows_are_the_log_while_writers_write(store: Store, server: Served) -> None:
    tasks = await three(store)
    ids = [id_ for id_, _ in tasks]
    over = asyncio.Event()

    async def write(attempt: Attempt) -> None:
        for i in range(1_000):
            await attempt.write(f"{i} ")
            if over.is_set():
                break
        await attempt.complete()

    begun: list[Told] = []

    async def join(*names: str) -> Told:
        async with many(server, *names) as told:
            await told.until("cursor")
            begun.append(told)
            if names:
                await told.until("done")
            else:
                for id_ in ids:
                    while not await is_last(told, id_):
                        await told.next()
            return told

    async def is_last(told: Told, id_: str) -> bool:
        found = await store.get(ORG, id_)
        return bool(found and found.terminal and [found.last_seq] == told.seqs(id_)[-1:])

    async with asyncio.TaskGroup() as group:
        for _, attempt in tasks:
            group.create_task(write(attempt))
        joins = []
        for i in range(30):
            joins.append(group.create_task(join(*(ids if i % 2 else []))))
            await asyncio.sleep(0.01)
        await wait_until(lambda: len(begun) == 30, "all have joined")
        over.set()
    for joined in joins:
        told = joined.result()
        for id_ in ids:
            log, seq = await history(store, id_), told.began[id_]["seq"]
            state = EMPTY
            for entry in log[:seq]:
                state = apply(state, entry)
            assert told.began[id_]["snapshot"] == {**task_body(task(state.fields)), "texts": state.texts}
            assert told.seqs(id_) == [*range(seq + 1, len(log) + 1)]


# One cursor


async def test_whoever_is_cut_off_anywhere_gets_exactly_the_rest_from_another_server(
    store: Store, server: Served, settings: Settings
) -> None:
    tasks = await three(store)
    ids = [id_ for id_, _ in tasks]
    places: list[tuple[str, int]] = []
    async with many(server, *ids) as told:
        await told.until("cursor")
        places.append((told.cursor, 0))
        for i in range(4):
            for _, attempt in tasks:
                await attempt.write(str(i))
                await told.count(len(told.events) + 1)
                places.append((told.cursor, len(told.events)))
        for _, attempt in tasks:
            await attempt.complete()
        await told.until("done")
    assert told.cursor.endswith(".end")
    async with served(store, settings) as second:
        for n, (cursor, seen) in enumerate(places):
            where = {"last_event_id": cursor} if n % 2 else {"cursor": cursor}
            async with many(second, *ids, **where) as rest:
                await rest.until("done")
            assert "snapshot" not in rest.names
            for id_ in ids:  # the order of several partitions is not fixed
                assert [e for e in told.events[:seen] + rest.events if e[0] == id_] == [
                    (id_, told.began[id_]["seq"] + k + 1) for k in range(len(told.seqs(id_)))
                ]
            assert rest.cursor == told.cursor


async def test_whoever_is_cut_off_before_anything_happened_loses_nothing(store: Store, server: Served) -> None:
    async with many(server) as told:
        await told.until("cursor")
    id_ = await ended(store)
    async with many(server, cursor=told.cursor) as rest:
        await rest.count(3)
    assert rest.events == [(id_, 1), (id_, 2), (id_, 3)]


async def test_a_cursor_means_the_same_to_a_stream_of_one_task(store: Store, server: Served) -> None:
    (a, one), (b, two), _ = await three(store)
    async with many(server, a, b) as told:
        await told.until("cursor")
        await one.write("x")
        await told.count(1)
        cursor = told.cursor
        await one.write("y")
        await two.write("y")
        await one.complete()
        await two.complete()
        await told.until("done")
    for id_ in (a, b):
        log = await history(store, id_)
        seen = sum(1 for e in told.events[:1] if e[0] == id_) + told.began[id_]["seq"]
        frames = await test_streams.frames(server, id_, header=cursor)
        assert test_streams.seqs(frames) == [*range(seen + 1, len(log) + 1)]
        if len(store.partitions.tags) == 1:
            async with many(server, a, b, cursor=log[seen - 1].id) as rest:
                await rest.until("done")
            assert rest.seqs(id_) == [*range(seen + 1, len(log) + 1)]
        assert (await server.client.get(f"/api/v1/tasks/{id_}/stream", params={"last_event_id": cursor})).is_success


async def test_a_number_is_no_cursor_of_many(store: Store, server: Served) -> None:
    ids = [await submit(store), await submit(store)]
    answer = await server.client.get("/api/v1/stream/sse", params={"workflow_id": ids, "last_event_id": "3"})
    assert (answer.status_code, answer.json()) == (400, {"error": "Invalid last_event_id"})
    async with many(server, *ids, cursor="3") as told:  # an EventSource could not mend it
        await told.until("cursor")
        assert set(told.began) == set(ids)


async def test_readers_of_different_tasks_who_come_back_together_get_each_their_own(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    (a, one), (b, two), (c, three_) = await three(store)
    async with many(server, a, b, c) as told:
        await told.until("cursor")
    for attempt in (one, two, three_):
        await attempt.complete()
    gate, fetch = asyncio.Event(), store.hub.fetch

    async def late(want: seam.Want) -> seam.Answer:
        if isinstance(want, seam.WantLog):
            await gate.wait()
        return await fetch(want)

    monkeypatch.setattr(hub, "REPLAYS", 1)
    monkeypatch.setattr(store.hub, "fetch", late)

    async def read(*ids: str) -> list[tuple[str, int]]:
        async with many(server, *ids, cursor=told.cursor) as rest:
            await rest.until("done")
        return rest.events

    wishes = [(a, b, c), (a, b), (a, c), (c, a)]
    readings = [asyncio.create_task(read(*ids)) for ids in wishes]
    await wait_until(lambda: store.hub.subscribers == len(wishes), "all wait")
    gate.set()
    for ids, reading in zip(wishes, readings, strict=True):
        assert {id_ for id_, _ in await reading} == set(ids)


@pytest.mark.parametrize("partitions", [3], indirect=True)
async def test_a_cursor_never_runs_ahead_of_what_was_told(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One partition is read again while another is live."""
    (a, one), (b, two), (c, _) = await three(store)
    async with many(server, a, b, c) as told:
        await told.until("cursor")
        for n, attempt in enumerate((one, two)):
            await attempt.write("x")
            await told.count(n + 1)
        (strand,) = store.hub._tails[store.partitions.tag(ORG, a)]._strands
        (other,) = store.hub._tails[store.partitions.tag(ORG, b)]._strands
        await wait_until(lambda: strand.live and other.live, "it is live")
        asked, gate, fetch = asyncio.Event(), asyncio.Event(), store.hub.fetch

        async def late(want: seam.Want) -> seam.Answer:
            asked.set()
            await gate.wait()
            return await fetch(want)

        monkeypatch.setattr(store.hub, "fetch", late)
        strand.lost()
        await asked.wait()
        number = other.number
        await one.write("y")
        await two.write("y")
        await wait_until(lambda: other.number > number, "the other one has come")
        gate.set()
        await told.count(3)
        cursor = told.cursor
    async with many(server, a, b, c, cursor=cursor) as rest:
        await rest.count(1)
    assert {*told.events[2:], *rest.events} == {(a, told.began[a]["seq"] + 2), (b, told.began[b]["seq"] + 2)}


@one_partition
async def test_a_wish_that_comes_as_the_last_page_is_served_is_served_too(store: Store) -> None:
    id_ = await ended(store)
    served_: list[str] = []

    class Reading:
        def __init__(self, name: str, then: "Reading | None" = None) -> None:
            self.name, self.then = name, then
            self.reader: seam.Reader = store.hub.one(ORG, id_, "")

        def page(self, *_: Any) -> None:
            served_.append(self.name)
            if self.then:
                asyncio.get_running_loop().call_soon(store.hub.ask, self.then)

        def failed(self, error: Exception) -> None:
            raise error

        def take(self, one: Logged) -> None: ...
        def give(self, items: Sequence[seam.Item]) -> None: ...
        def behind(self) -> None: ...

    store.hub.ask(Reading("first", Reading("second")))
    await wait_until(lambda: served_ == ["first", "second"], "both are served", seconds_max=5)


# Its end


async def test_it_is_done_when_all_named_tasks_are_over_and_then_204(store: Store, server: Served) -> None:
    (a, one), (b, _), (c, _) = await three(store)
    async with many(server, a, b, c) as told:
        await told.until("cursor")
        await one.complete()
        await told.count(1)
        await store.append(ORG, b, events.Cancelled())
        await store.delete(ORG, c)
        await told.until("done")
    params = {"workflow_id": [a, b]}
    async with many(server, a, b) as again:  # they were over before
        await again.until("done")
        assert again.names == ["snapshot", "snapshot", "cursor", "done"]
    for query in ({}, {"on_gap": "fail"}):
        headers = {**LISTENING, "Last-Event-ID": again.cursor}
        answer = await server.client.get("/api/v1/stream/sse", params={**params, **query}, headers=headers)
        assert (answer.status_code, answer.content) == (204, b"")
        async with many(server, a, b, cursor=again.cursor.removesuffix(".end"), **query) as last:
            await last.until("done")
            assert last.names == ["done"]
            with pytest.raises(StopAsyncIteration):  # and the connection closes
                await last.next()


async def test_it_is_done_when_a_task_is_deleted_before_its_first_page(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [await ended(store), await submit(store)]
    fetch = store.hub.fetch

    async def late(want: seam.Want) -> seam.Answer:
        if isinstance(want, seam.WantLog) and await store.get(ORG, ids[1]):
            await store.delete(ORG, ids[1])
        return await fetch(want)

    monkeypatch.setattr(store.hub, "fetch", late)
    async with asyncio.timeout(5), many(server, *ids) as told:
        await told.until("done")


async def test_a_stream_that_named_nobody_never_ends(store: Store, server: Served) -> None:
    async with many(server, session_id="s1") as told:
        await told.until("cursor")
        for _ in range(2):
            id_ = await ended(store)
            await told.count(len(told.events) + 3)
            assert told.seqs(id_) == [1, 2, 3]
    headers = {**LISTENING, "Last-Event-ID": f"{told.cursor}.end"}
    async with server.client.stream(
        "GET", "/api/v1/stream/sse", params={"session_id": "s1"}, headers=headers
    ) as answer:
        assert answer.status_code == 200


# Refusals


@directly
async def test_what_cannot_be_followed_is_refused(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [await submit(store) for _ in range(4)]

    async def status(**params: Any) -> int:
        return (await server.client.get("/api/v1/stream/sse", params=params)).status_code

    assert await status(workflow_id=[ids[0], "task_none"]) == 404
    assert await status(workflow_id=[f"t{i}" for i in range(1001)]) == 400
    assert await status(workflow_id=[ids[0], "a b"]) == 400
    assert await status(session_id="a b") == 400
    assert await status(status="SLEEPING") == 400
    assert await status(on_gap="maybe") == 400
    monkeypatch.setattr(hub, "MATCHING_MAX", 3)
    assert await status(session_id="s1") == 400
    async with many(server, session_id="s1", last_event_id=await page_cursor(server)) as told:
        await store.append(ORG, ids[0], events.Noted(name="X"))
        await told.count(1)
        assert told.names == ["X"]


async def page_cursor(server: Served, url: str = "/api/v1/tasks") -> str:
    cursor: str = (await server.client.get(url)).json()["last_event_id"]
    return cursor


# Gaps


async def test_a_trimmed_log_is_a_gap_with_the_list_to_begin_again_from(store: Store, server: Served) -> None:
    tasks = await three(store)
    async with many(server, session_id="s1") as told:
        await told.until("cursor")
    for _, attempt in tasks:
        for _ in range(3):
            await attempt.write("x")
    await cut(store)
    async with many(server, session_id="s1", cursor=told.cursor) as again:
        gap = await again.until("gap")
        assert (gap["reason"], gap["list"]) == ("trimmed", "/api/v1/tasks?session_id=s1")
        assert again.cursor == ""  # the cursor comes behind the states
        await again.until("cursor")
        assert again.names == ["gap", "snapshot", "snapshot", "snapshot", "cursor"]
        assert {id_: said["seq"] for id_, said in again.began.items()} == {id_: 5 for id_, _ in tasks}
        await tasks[0][1].write("y")
        await again.count(1)
        assert again.events == [(tasks[0][0], 6)]
    from_list = await page_cursor(server, gap["list"])
    async with many(server, session_id="s1", cursor=from_list) as rest:
        await tasks[0][1].write("z")
        await rest.count(1)
        assert (rest.names, rest.events) == (["thread.message.delta"], [(tasks[0][0], 7)])
    for query in ({"session_id": "s1"}, {"workflow_id": [id_ for id_, _ in tasks]}):
        answer = await server.client.get(
            "/api/v1/stream/sse", params={**query, "on_gap": "fail"}, headers={"Last-Event-ID": told.cursor}
        )
        assert (answer.status_code, answer.json()["reason"]) == (410, "trimmed")


async def test_a_cursor_beyond_the_log_is_a_gap(store: Store, server: Served) -> None:
    id_ = await submit(store)
    count = len(store.partitions.tags)
    for cursor, reason in (
        (",".join(["99999999999999-0"] * count), "ahead"),
        (",".join(["1-1"] * (count + 1)), "unknown"),
    ):
        async with many(server, cursor=cursor) as told:
            await told.until("cursor")
        assert told.names == ["gap", "snapshot", "cursor"]
        assert set(told.began) == {id_}
        answer = await server.client.get(
            "/api/v1/stream/sse", params={"on_gap": "fail"}, headers={"Last-Event-ID": cursor}
        )
        assert (answer.status_code, answer.json()["reason"]) == (410, reason)


@pytest.mark.parametrize("query", [{"session_id": "s1"}, {"types": "NOW"}])
async def test_a_quiet_stream_is_told_how_far_it_came(
    store: Store, settings: Settings, path: str, query: dict[str, str]
) -> None:
    mine = await submit(store)
    async with served(store, settings, heartbeat_seconds=0.1) as server:
        async with many(server, **query) as told:
            await told.until("cursor")
            first = told.cursor
            for _ in range(5):
                for _ in range(2):
                    await submit(store, session="s2")
                if "types" in query:
                    await store.append(ORG, mine, events.Noted(name="CHATTER"))
            while told.cursor == first or told.cursor != await page_cursor(server):
                await told.until("cursor")
        await cut(store)
        async with many(server, cursor=told.cursor, **query) as again:
            await store.append(ORG, mine, events.Noted(name="NOW"))
            await again.count(1)
            assert "gap" not in again.names


# The dead


async def test_what_was_deleted_is_never_replayed_also_when_its_id_is_used_again(store: Store, server: Served) -> None:
    keep, lost = await submit(store), await submit(store)
    cursor = await page_cursor(server)
    for id_ in (keep, lost):
        await store.append(ORG, id_, events.Noted(name="SECRET"))
    await store.delete(ORG, lost)
    for used in (False, True):
        if used:
            await store.submit(events.Submission(id=lost, org=ORG, owner=USER, submission="again"))
        async with many(server, cursor=cursor) as told:
            await told.count(2 if used else 1)
        assert {*told.events} == ({(keep, 2), (lost, 4)} if used else {(keep, 2)})


# Elsewhere


@directly
async def test_a_page_with_thirty_live_tasks_needs_one_connection(store: Store, server: Served) -> None:
    ids = [await submit(store) for _ in range(30)]
    await wait_until(lambda: not server.server.server_state.connections, "nobody is connected")
    async with many(server, *ids) as told:
        await told.until("cursor")
        for id_ in ids:
            await store.append(ORG, id_, events.Noted(name="X"))
        await told.count(30)
        assert {*told.events} == {(id_, 2) for id_ in ids}
        assert len(server.server.server_state.connections) == 1
        assert store.hub.subscribers == 1


@directly
async def test_a_filter_by_type_leaves_the_states_and_the_end(store: Store, server: Served) -> None:
    (a, one), (b, two), _ = await three(store)
    async with many(server, a, b, types="WORKFLOW_COMPLETED") as told:
        await told.until("cursor")
        for attempt in (one, two):
            await attempt.write("x")
            await attempt.complete()
        await told.until("done")
    assert told.names == ["snapshot", "snapshot", "cursor", "WORKFLOW_COMPLETED", "WORKFLOW_COMPLETED", "done"]


@directly
async def test_a_socket_tells_many_tasks_too(store: Store, server: Served) -> None:
    ids = [await ended(store, "x"), await ended(store)]
    two = f"{ids[0]},{ids[1]}"
    found = await bodies(server, two)
    assert [body["type"] for body in found] == ["snapshot", "snapshot", "cursor", "STREAM_END"]
    assert "workflow_id" not in found[-1]
    assert found[-1]["stream_id"] == f"{found[-2]['stream_id']}.end"
    third = await ended(store)
    more = await bodies(server, f"{two},{third}", f"&last_event_id={found[-2]['stream_id']}")
    assert [(body["type"], body.get("workflow_id")) for body in more] == [
        ("DATA_PROCESSING", third),
        ("WORKFLOW_STARTED", third),
        ("WORKFLOW_COMPLETED", third),
        ("STREAM_END", None),
    ]
    assert more[-1]["stream_id"] == f"{more[-2]['stream_id']}.end"
    with pytest.raises(InvalidStatus) as refused:
        await bodies(server, two, "&on_gap=fail&last_event_id=1-1,2-2,3-3,4-4")
    assert refused.value.response.status_code == 410


@directly
async def test_large_states_do_not_end_a_stream_of_named_tasks_early(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [await submit(store) for _ in range(4)]
    cursor = await page_cursor(server)
    monkeypatch.setattr(hub, "STATE_BATCH", 1)
    monkeypatch.setattr(hub, "STATE_BYTES_MAX", 1)
    async with many(server, *ids, cursor=cursor) as told:
        for n, id_ in enumerate(ids):
            await store.append(ORG, id_, events.Noted(name="LAST"))
            await told.count(n + 1)
            await store.append(ORG, id_, events.Cancelled())
        await told.until("done")
    assert {id_ for id_, _ in told.events} == set(ids)
