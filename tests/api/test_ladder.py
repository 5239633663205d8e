"""One cursor on every rung: SSE, WebSocket, a request that waits, plain pages, lists and states; and how waiting ends."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from httpx_sse import EventSource
from prometheus_client import REGISTRY
from websockets.asyncio.client import connect

from app import events
from app.errors import Unavailable
from app.settings import Settings
from app.store import Store
from tests.api.serving import KEY, ORG, Attempt, Served, ended, served, started, submit
from tests.api.test_streams import production, streams_of
from tests.waiting import wait_until

TASKS = "/api/v1/tasks"
SSE = "/api/v1/stream/sse"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With a lease that outlasts a loaded machine: nobody renews it here."""
    return settings.model_copy(update={"lease_seconds": 60})


@pytest.fixture
async def server(store: Store, settings: Settings) -> AsyncIterator[Served]:
    async with served(store, settings) as running:
        yield running


async def got(server: Served, path: str, **query: Any) -> dict[str, Any]:
    answer = await server.client.get(f"{TASKS}{path}", params=query)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def page(server: Served, task: str, **query: Any) -> dict[str, Any]:
    body = await got(server, f"/{task}/events", **query)
    assert body["count"] == len(body["events"])
    return body


def seqs(body: dict[str, Any]) -> list[int]:
    return [event["seq"] for event in body["events"]]


# One cursor, from every rung to every other

Told = tuple[list[int], str]
"""The numbers of a task's events that a reader got, and its cursor behind them."""


@asynccontextmanager
async def frames(server: Served, after: str, **query: Any) -> AsyncIterator[AsyncIterator[tuple[str, Any, str]]]:
    """Of a stream: name, data, id."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
    async with server.client.stream("GET", SSE, params=query, headers=headers) as answer:

        async def each() -> AsyncIterator[tuple[str, Any, str]]:
            if answer.status_code == 204:  # it has seen `done`
                return
            async for frame in EventSource(answer).aiter_sse():
                yield frame.event, frame.data if frame.data == "[DONE]" else json.loads(frame.data), frame.id

        yield each()


async def by_sse(server: Served, task: str, after: str = "", count: int = 200) -> Told:
    """At most `count`; as the others below."""
    told: list[int] = []
    async with frames(server, after, workflow_id=task) as found:
        async for name, data, id_ in found:
            after = id_
            told += [data["seq"]] if name != "done" else []
            if len(told) == count:
                break
    return told, after


async def by_parameter(server: Served, task: str, after: str) -> Told:
    told: list[int] = []
    async with frames(server, "", workflow_id=task, last_event_id=after) as found:
        async for name, data, id_ in found:
            after = id_
            told += [data["seq"]] if name != "done" else []
    return told, after


async def by_websocket(server: Served, task: str, after: str = "", count: int = 200) -> Told:
    told: list[int] = []
    url = f"ws://127.0.0.1:{server.port}/api/v1/stream/ws?workflow_id={task}&last_event_id={after}"
    async with connect(url, additional_headers=KEY) as socket:
        async for text in socket:
            body = json.loads(text)
            after = body["stream_id"]
            told += [body["seq"]] if body["type"] != "STREAM_END" else []
            if len(told) == count:
                break
    return told, after


async def by_waiting(server: Served, task: str, after: str = "", count: int = 200) -> Told:
    told: list[int] = []
    while True:
        body = await page(server, task, after=after, wait=20, limit=count)
        told, after = told + seqs(body), body["last_event_id"]
        if body["ended"] or len(told) == count:
            return told, after
        assert body["events"]


async def by_paging(server: Served, task: str, after: str = "", count: int = 200) -> Told:
    told: list[int] = []
    while True:
        body = await page(server, task, after=after, limit=2)
        told, after = told + seqs(body), body["last_event_id"]
        if body["ended"] or len(told) == count:
            return told, after
        await asyncio.sleep(0 if body["events"] else 0.01)


async def of_many(server: Served, tasks: list[str], after: str) -> Told:
    """One stream of both; what it tells of the first."""
    told: list[int] = []
    async with frames(server, after, workflow_id=",".join(tasks)) as found:
        async for name, data, id_ in found:
            assert name != "gap"
            after = id_ or after
            told += [data["seq"]] if name != "done" and data["workflow_id"] == tasks[0] else []
    return told, after


async def listed(server: Served, task: str, count: int) -> Told:
    """As upstream lists them."""
    body = await page(server, task, limit=count)
    return seqs(body), body["last_event_id"]


async def of_list(server: Served, task: str, _: int) -> Told:
    cursor = (await got(server, ""))["last_event_id"]
    return [*range(1, (await got(server, f"/{task}"))["last_seq"] + 1)], cursor


async def of_state(server: Served, task: str, _: int) -> Told:
    body = await got(server, f"/{task}")
    return [*range(1, body["last_seq"] + 1)], body["last_event_id"]


async def of_snapshots(server: Served, task: str, _: int) -> Told:
    """Of a stream of many."""
    told: list[int] = []
    async with frames(server, "", session_id="s1") as found:
        async for name, data, id_ in found:
            if name == "cursor":
                return told, id_
            if name == "snapshot" and data["workflow_id"] == task:
                told = [*range(1, data["seq"] + 1)]
    raise AssertionError("no cursor")


async def as_number(server: Served, task: str, count: int) -> Told:
    return [*range(1, count + 1)], str(count)


GIVING: dict[str, Callable[[Served, str, int], Coroutine[Any, Any, Told]]] = {
    "sse": lambda server, task, count: by_sse(server, task, count=count),
    "websocket": lambda server, task, count: by_websocket(server, task, count=count),
    "waiting": lambda server, task, count: by_waiting(server, task, count=count),
    "paging": lambda server, task, count: by_paging(server, task, count=count),
    "listed": listed,
    "list": of_list,
    "state": of_state,
    "snapshots": of_snapshots,
    "number": as_number,
}
TAKING: dict[str, Callable[[Served, str, str], Coroutine[Any, Any, Told]]] = {
    "sse": by_sse,
    "parameter": by_parameter,
    "websocket": by_websocket,
    "waiting": by_waiting,
    "paging": by_paging,
}


class TestOneCursor:
    @pytest.fixture(params=[1, 3], ids=["one_partition", "three_partitions"])
    def settings(self, settings: Settings, request: pytest.FixtureRequest) -> Settings:
        return settings.model_copy(update={"partitions": request.param})

    @pytest.mark.parametrize("giving", GIVING)
    async def test_a_cursor_from_anywhere_goes_on_everywhere(self, store: Store, server: Served, giving: str) -> None:
        task, attempt = await started(store)
        for _ in range(2):
            await attempt.say(events.Noted(name="WARNING"))
        other, other_attempt = await started(store)  # whose entries lie between in the partition's log
        told, cursor = await GIVING[giving](server, task, 4)
        assert told == [1, 2, 3, 4]
        taking = {name: asyncio.create_task(take(server, task, cursor)) for name, take in TAKING.items()}
        # A task's own id is no place in the logs of three partitions.
        both = (store.settings.partitions == 1 and "-" in cursor) or "," in cursor
        if both:
            taking["many"] = asyncio.create_task(of_many(server, [task, other], cursor))
        await wait_until(lambda: store.hub.subscribers == len(taking) - 1, "all but the pages follow")
        for i in range(5):
            await attempt.write(str(i))
            await other_attempt.write(str(i))
        await other_attempt.complete()
        await attempt.complete()
        taken = {name: await reading for name, reading in taking.items()}
        assert {name: told for name, (told, _) in taken.items()} == {name: [*range(5, 11)] for name in taking}
        # And from the end of each, nothing more: everywhere, at once.
        for name, (_, end) in taken.items():
            for again, take in TAKING.items():
                assert (await take(server, task, end))[0] == [], (name, again)

    @pytest.mark.parametrize("giving", sorted(GIVING.keys() - {"snapshots"}))  # of what is unfinished
    async def test_a_cursor_at_the_end_is_the_end_everywhere(self, store: Store, server: Served, giving: str) -> None:
        task = await ended(store)
        await ended(store)
        told, cursor = await GIVING[giving](server, task, 3)
        assert told == [1, 2, 3]
        for name, take in TAKING.items():
            assert (await take(server, task, cursor))[0] == [], name
        body = await page(server, task, after=cursor, wait=60)
        assert (body["events"], body["ended"]) == ([], True)


async def test_who_asks_again_and_again_sees_a_whole_task_once(store: Store, server: Served) -> None:
    task, attempt = await started(store)

    async def write() -> None:
        for i in range(200):
            await attempt.write(str(i))
        await attempt.complete()

    async def read(limit: int) -> list[int]:
        told: list[int] = []
        query: dict[str, Any] = {}
        while True:
            body = await page(server, task, **query, wait=20, limit=limit)
            assert "gap" not in body
            told += seqs(body)
            if body["ended"]:
                return told
            query["after"] = body["last_event_id"]

    async with asyncio.TaskGroup() as group:  # a writer that fails ends the readers, which would wait for ever
        readings = [group.create_task(read(limit)) for limit in (1, 7, 200)]
        group.create_task(write())
    for reading in readings:
        assert reading.result() == [*range(1, 204)]
    assert (store.hub.subscribers, streams_of(server).open) == (0, set())


# What a page says


async def test_a_page_says_where_to_go_on_and_whether_there_is_more(store: Store, server: Served) -> None:
    task, attempt = await started(store)
    third = await attempt.write("a")
    body = await page(server, task, after="", limit=2)
    assert (seqs(body), body["ended"]) == ([1, 2], False)
    body = await page(server, task, after=body["last_event_id"])
    assert (seqs(body), body["last_event_id"], body["ended"]) == ([3], third, False)
    for after in (third, f"{third}.end", "3"):
        body = await page(server, task, after=after)
        assert (seqs(body), body["last_event_id"], body["ended"]) == ([], third, False)
    last = await attempt.complete()
    for query, told in (
        ({"after": ""}, [1, 2, 3, 4]),
        ({"after": third}, [4]),
        ({"after": "1", "offset": 1}, [3, 4]),
        ({"after": "1", "offset": 9}, []),  # what is skipped is not asked for again
        ({"wait": 0}, [1, 2, 3, 4]),
        ({"wait": ""}, [1, 2, 4]),
        ({}, [1, 2, 4]),
        ({"offset": 2}, [4]),
    ):
        body = await page(server, task, **query)
        assert (seqs(body), body["last_event_id"], body["ended"]) == (told, last, True), query
    for query in ({"after": "", "limit": 3}, {"limit": 2}):
        assert not (await page(server, task, **query))["ended"]


async def test_a_new_turn_goes_on_behind_the_end(store: Store, server: Served) -> None:
    task = await ended(store)
    end = (await page(server, task, after=""))["last_event_id"]
    await store.append(ORG, task, events.Continued(query="and?", submission="s2"))
    body = await page(server, task, after=end, wait=60)
    assert (seqs(body), body["ended"]) == ([4], False)


async def test_a_later_place_of_other_tasks_is_kept(store: Store, server: Served) -> None:
    task = await ended(store)
    await ended(store)
    cursor = (await got(server, ""))["last_event_id"]
    body = await page(server, task, after=cursor)
    assert (body["events"], body["last_event_id"], body["ended"]) == ([], cursor, True)


async def test_a_task_that_ends_while_it_is_read_is_said_to_have_ended(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, attempt = await started(store)
    await attempt.write("a")
    read = store.events

    async def read_then_complete(org: str, task: str, after: str, **more: Any) -> Any:
        found = await read(org, task, after, **{**more, "limit": 2})
        if not after:
            await attempt.complete()
        return found

    monkeypatch.setattr(store, "events", read_then_complete)
    body = await page(server, task, after="")
    assert (seqs(body), body["ended"]) == ([1, 2, 3, 4], True)


async def test_a_gap_is_said_at_once_and_the_answer_says_where_to_go_on(store: Store, server: Served) -> None:
    task, attempt = await started(store)
    first = (await page(server, task, after="", limit=1))["last_event_id"]
    last = await attempt.write("a")
    for after, reason in (("99", "ahead"), ("99999999999999-0", "ahead"), (f"{first.partition('-')[0]}-7", "unknown")):
        body = await page(server, task, after=after, wait=60)
        assert body["gap"]["reason"] == reason
        assert (body["events"], body["last_event_id"], body["ended"]) == ([], last, False)
        answer = await server.client.get(f"{TASKS}/{task}/events", params={"after": after, "on_gap": "fail"})
        assert answer.status_code == 410
        assert answer.json() == {
            "error": answer.json()["error"],
            "reason": reason,
            "earliest_seq": 1,
            "latest_seq": 3,
        }
    assert seqs(await page(server, task, after="2", on_gap="fail")) == [3]
    await attempt.complete()
    assert (await page(server, task, after="99", wait=60))["ended"]


async def test_what_is_trimmed_is_a_gap_before_the_rest(store: Store, server: Served, settings: Settings) -> None:
    store.log._limits = store.log._limits.replace(str(settings.events_per_mark), "10", 1)
    task, attempt = await started(store)
    for i in range(50):
        await attempt.write(str(i))
    for query in ({"after": ""}, {"after": "1"}, {"wait": "60"}):
        body = await page(server, task, **query)
        assert (body["gap"]["reason"], body["gap"]["latest_seq"]) == ("trimmed", 52)
        assert seqs(body) == [*range(body["gap"]["earliest_seq"], 53)]
        assert body["last_event_id"] == body["gap"]["last_event_id"]
        answer = await server.client.get(f"{TASKS}/{task}/events", params={**query, "on_gap": "fail"})
        assert (answer.status_code, answer.json()["reason"]) == (410, "trimmed")
    assert (await page(server, task))["last_event_id"] == body["last_event_id"]  # deltas alone are left: none is listed


async def test_a_wait_is_a_number_of_seconds_up_to_a_minute(store: Store, server: Served) -> None:
    task = await submit(store)
    for path in (f"{TASKS}/{task}", f"{TASKS}/{task}/events"):
        for wait in ("-1", "61", "60.01", "x", "1s", "nan", "inf", "1e99", "1_0", "٣", ".5", "1.", " 1"):
            answer = await server.client.get(path, params={"wait": wait})
            assert (answer.status_code, answer.json()) == (400, {"error": "Invalid wait parameter"}), wait
        for wait in ("", "0", "60", "60.0", "0.25", "1e-3", "6E1", "00"):
            assert (await server.client.get(path, params={"wait": wait})).status_code == 200, wait


async def test_other_bad_requests(store: Store, server: Served) -> None:
    task = await submit(store)
    for query, status, sentence in (
        ("after=x&wait=1", 400, "Invalid after parameter"),
        ("after=1-1,2&wait=1", 400, "Invalid after parameter"),
        ("on_gap=skip", 400, "Invalid on_gap (allowed: fail)"),
        ("limit=0&wait=1", 400, "Invalid limit parameter"),
    ):
        answer = await server.client.get(f"{TASKS}/{task}/events?{query}")
        assert (answer.status_code, answer.json()) == (status, {"error": sentence})
    for rest in ("", "/events"):
        answer = await server.client.get(f"{TASKS}/task_none{rest}", params={"wait": 60})
        assert (answer.status_code, answer.json()) == (404, {"error": "Task not found"})
        answer = await server.client.get(f"{TASKS}/{task}{rest}", params={"wait": 60}, headers={"X-API-Key": "wrong"})
        assert answer.status_code == 401


# Waiting


class Waits:
    """Asks for what a task has not got yet: its next event, or its next state."""

    def __init__(self, server: Served, store: Store, kind: str) -> None:
        self._server, self._store, self._kind = server, store, kind

    async def ask(self, task: str, wait: float = 60, client: httpx.AsyncClient | None = None) -> httpx.Response:
        known = await self._store.get(ORG, task)
        assert known
        client = client or self._server.client
        if self._kind == "event":
            query: dict[str, Any] = {"after": known.last_event_id, "wait": wait}
            return await client.get(f"{TASKS}/{task}/events", params=query)
        tag = {"If-None-Match": f'W/"{known.last_event_id}"'}
        return await client.get(f"{TASKS}/{task}", params={"wait": wait}, headers=tag)

    async def begin(self, task: str, count: int = 1) -> list[asyncio.Task[httpx.Response]]:
        """That many, each of which waits."""
        asking = [asyncio.create_task(self.ask(task)) for _ in range(count)]
        await wait_until(lambda: self._store.hub.subscribers == count, "all wait")
        return asking

    def news(self, answer: httpx.Response) -> int:
        """The number of the event that it tells; 0: none."""
        if answer.status_code == 304:
            assert answer.content == b""
            return 0
        assert answer.status_code == 200, answer.text
        body = answer.json()
        if self._kind == "event":
            return (seqs(body) or [0])[-1]
        assert answer.headers["ETag"] == f'"{body["last_event_id"]}"'
        return int(body["last_seq"])

    def at_rest(self) -> bool:
        return self._store.hub.subscribers == 0 and not streams_of(self._server).open


@pytest.fixture(params=["event", "state"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def waits(server: Served, store: Store, kind: str) -> Waits:
    return Waits(server, store, kind)


async def test_a_wait_ends_with_the_next_event(store: Store, waits: Waits) -> None:
    task, attempt = await started(store)
    for seq in (3, 4):
        (asking,) = await waits.begin(task)
        await attempt.write("a")
        answer = await asking
        assert waits.news(answer) == seq
        assert "Retry-After" not in answer.headers
        assert waits.at_rest()
    (asking,) = await waits.begin(task)
    await attempt.complete()
    answer = await asking
    assert waits.news(answer) == 5
    assert answer.json().get("ended", True)


async def test_all_who_wait_are_answered_and_only_those_of_the_task(store: Store, waits: Waits) -> None:
    task, attempt = await started(store)
    _, other = await started(store)
    asking = await waits.begin(task, 5)
    await other.write("a")
    assert waits.news(await waits.ask(task, 0.05)) == 0  # by now they would have been answered
    assert not any(one.done() for one in asking)
    await attempt.write("a")
    assert [waits.news(await one) for one in asking] == [3] * 5
    assert waits.at_rest()


async def test_when_the_time_is_over_there_is_nothing_new(store: Store, waits: Waits) -> None:
    task = await submit(store)
    for wait in (0, 0.05):
        answer = await waits.ask(task, wait)
        assert waits.news(answer) == 0
        assert "Retry-After" not in answer.headers
    assert waits.at_rest()


async def test_nobody_waits_for_a_task_that_has_ended(
    store: Store, waits: Waits, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "follow", None)
    answer = await waits.ask(await ended(store))
    assert waits.news(answer) == 0
    assert answer.status_code == (200 if kind == "event" else 304)
    if kind == "event":
        assert answer.json()["ended"]


async def test_a_task_deleted_while_somebody_waits_is_a_404(store: Store, waits: Waits) -> None:
    task = await submit(store)
    (asking,) = await waits.begin(task)
    await store.delete(ORG, task)
    answer = await asking
    assert (answer.status_code, answer.json()) == (404, {"error": "Task not found"})
    assert waits.at_rest()


async def test_a_client_that_leaves_ends_its_wait(store: Store, waits: Waits) -> None:
    task = await submit(store)
    first, second = await waits.begin(task, 2)
    first.cancel()
    await wait_until(lambda: store.hub.subscribers == 1, "one is left")
    second.cancel()
    await wait_until(waits.at_rest, "nothing is left")


async def test_a_client_that_says_too_much_while_it_waits_is_a_413(store: Store, server: Served) -> None:
    task = await submit(store)

    async def flood() -> AsyncIterator[bytes]:
        for _ in range(17):
            yield b"x" * 65536
        await wait_until(lambda: store.hub.subscribers == 0, "the wait ends")

    answer = await server.client.request("GET", f"{TASKS}/{task}/events?after=1&wait=60", content=flood())
    assert answer.status_code == 413
    assert not streams_of(server).open


@production
async def test_a_stopping_server_answers_at_once(store: Store, settings: Settings, kind: str) -> None:
    task = await submit(store)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(store, settings, grace_seconds=20))
        waits = Waits(server, store, kind)
        asking = await waits.begin(task, 2)
        server.server.stop()
        for one in asking:
            answer = await one
            assert waits.news(answer) == 0
            assert (answer.headers["Retry-After"], answer.headers["Connection"]) == ("1", "close")
        await wait_until(waits.at_rest, "nothing is left")


@pytest.mark.parametrize("changed", [{"streams_max": 1}, {"closing": True}], ids=["full", "draining"])
async def test_where_there_is_no_room_nobody_waits(
    store: Store, server: Served, waits: Waits, changed: dict[str, Any]
) -> None:
    task, attempt = await started(store)
    (asking,) = await waits.begin(task)
    for name, value in changed.items():
        setattr(streams_of(server), name, value)
    (label,) = ({"streams_max": "full", "closing": "draining"}[name] for name in changed)
    counted = REGISTRY.get_sample_value("taskcast_streams_aborted_total", {"reason": label}) or 0
    answer = await waits.ask(task)
    assert waits.news(answer) == 0
    assert answer.headers["Retry-After"] == "1"
    assert REGISTRY.get_sample_value("taskcast_streams_aborted_total", {"reason": label}) == counted + 1
    assert (await server.client.get(f"{TASKS}/{task}/events", params={"wait": 60})).json()["count"] == 2
    await attempt.write("a")
    assert waits.news(await asking) == 3


async def test_a_key_has_so_many_waits_and_streams_together(store: Store, settings: Settings, kind: str) -> None:
    async with served(store, settings, streams_per_key=2) as server:
        task = await submit(store)
        waits = Waits(server, store, kind)
        asking = await waits.begin(task, 2)
        assert (await waits.ask(task)).headers["Retry-After"] == "1"
        await store.append(ORG, task, events.Cancelled())
        assert [waits.news(await one) for one in asking] == [2, 2]
        assert waits.at_rest()


async def test_a_wait_without_a_store_is_a_503(store: Store, waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    task = await submit(store)

    @asynccontextmanager
    async def follow(*_: Any) -> AsyncIterator[None]:
        raise Unavailable("gone")
        yield

    monkeypatch.setattr(store, "follow", follow)
    answer = await waits.ask(task)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert waits.at_rest()


# States


async def test_a_state_is_answered_at_once_unless_the_client_has_it(store: Store, server: Served) -> None:
    task, attempt = await started(store)
    path = f"{TASKS}/{task}"
    first = await server.client.get(path, params={"wait": 60})
    assert first.status_code == 200
    assert first.json()["log_epoch"] == store.partitions.epoch
    await attempt.write("a")
    for tags in (first.headers["ETag"], '"x"', "", f'"x", W/{first.headers["ETag"]}'):
        answer = await server.client.get(path, params={"wait": 60}, headers={"If-None-Match": tags})
        assert (answer.status_code, answer.json()["last_seq"]) == (200, 3)
    for tags in (answer.headers["ETag"], f'"x", W/{answer.headers["ETag"]}', "*"):
        for query in ({}, {"wait": 0}, {"wait": 0.05}):
            same = await server.client.get(path, params=query, headers={"If-None-Match": tags})
            assert (same.status_code, same.headers["ETag"]) == (304, answer.headers["ETag"])
            assert same.headers["Cache-Control"] == "no-cache"


async def test_whoever_has_any_state_waits_for_the_next_one(store: Store, server: Served) -> None:
    task, attempt = await started(store)
    asking = asyncio.create_task(
        server.client.get(f"{TASKS}/{task}", params={"wait": 60}, headers={"If-None-Match": "*"})
    )
    await wait_until(lambda: store.hub.subscribers == 1, "it waits")
    await attempt.write("a")
    answer = await asking
    assert (answer.status_code, answer.json()["last_seq"]) == (200, 3)


async def test_a_page_that_waits_for_states_sees_the_task_end(store: Store, server: Served) -> None:
    task, attempt = await started(store)

    async def write(attempt: Attempt) -> None:
        for i in range(50):
            await attempt.write(str(i))
        await attempt.complete()

    seen: list[int] = []
    headers: dict[str, str] = {}
    async with asyncio.TaskGroup() as group:
        group.create_task(write(attempt))
        status = ""
        while status != "TASK_STATUS_COMPLETED":
            answer = await server.client.get(f"{TASKS}/{task}", params={"wait": 20}, headers=headers)
            assert answer.status_code == 200
            headers = {"If-None-Match": answer.headers["ETag"]}
            status = answer.json()["status"]
            seen.append(answer.json()["last_seq"])
    assert seen == sorted(set(seen))
    assert seen[-1] == 53
    assert (await server.client.get(f"{TASKS}/{task}", params={"wait": 60}, headers=headers)).status_code == 304
