"""A cursor that cannot be served: what is said instead, and how the stream goes on. Never silence."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import ServerSentEvent
from httpx_sse._decoders import SSEDecoder
from websockets.exceptions import InvalidStatus

from app import events
from app.api.shannon.spelling import task_body
from app.events import Entry, Json
from app.identity import DEVELOPMENT_KEY
from app.log import Page
from app.settings import Settings
from app.store import Store, open_store
from app.task import EMPTY, Snapshot, apply, task
from tests.api.serving import ORG, Attempt, Served, ended, served, started, submit
from tests.api.test_sockets import bodies, socket_of
from tests.api.test_streams import frames, production, seqs
from tests.waiting import wait_until

MARK = 20
REASONS = ("trimmed", "ahead", "unknown")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Trims early, and has a lease that outlasts a loaded machine."""
    return settings.model_copy(update={"lease_seconds": 60, "events_per_mark": MARK})


@pytest.fixture
async def server(store: Store, settings: Settings, path: str) -> AsyncIterator[Served]:
    async with served(store, settings) as running:
        yield running


async def written(store: Store, words: int) -> tuple[str, Attempt, list[Entry]]:
    """A running task that wrote, and its log; of many words the first are no longer kept."""
    id_, attempt = await started(store)
    log = (await page(store, id_)).entries
    for i in range(words):
        await attempt.write(f"{i} ")
        log += (await page(store, id_, f"seq:{log[-1].seq}")).entries
    return id_, attempt, log


async def page(store: Store, id_: str, after: str = "") -> Page:
    found = await store.events(ORG, id_, after)
    assert found
    return found


def fold(log: list[Entry]) -> Snapshot:
    state = EMPTY
    for entry in log:
        state = apply(state, entry)
    return state


def told(state: Snapshot) -> Json:
    return {**task_body(task(state.fields)), "texts": state.texts}


async def bad_cursor(store: Store, reason: str) -> tuple[str, Attempt, list[Entry], str]:
    """A running task, its log, and a cursor that cannot be served for that reason."""
    id_, attempt, log = await written(store, 50 if reason == "trimmed" else 3)
    first, last = log[0].id, log[-1].id
    cursor = {"trimmed": first, "ahead": f"9{last}", "unknown": f"{first.partition('-')[0]}-77"}[reason]
    return id_, attempt, log, cursor


# What is told


@pytest.mark.parametrize("reason", REASONS)
async def test_a_gap_says_why_and_the_stream_goes_on_behind_its_state(
    store: Store, server: Served, reason: str
) -> None:
    id_, attempt, log, cursor = await bad_cursor(store, reason)
    base = (await page(store, id_, f"seq:{len(log)}")).base_seq
    async with server.stream(id_, last_event_id=cursor) as source:
        stream = source.aiter_sse()
        gap = await anext(stream)
        data = json.loads(gap.data)
        seq = base if reason == "trimmed" else len(log)
        assert (gap.event, gap.id) == ("gap", log[seq - 1].id)
        assert (data["type"], data["reason"], data["workflow_id"]) == ("gap", reason, id_)
        assert (data["earliest_seq"], data["latest_seq"], data["seq"]) == (base + 1, len(log), seq)
        assert data["log_epoch"] == store.partitions.epoch
        assert data["snapshot"] == told(fold(log[:seq]))
        assert data["snapshot"]["texts"]["final_output"].startswith("0 1 2 ")
        await attempt.write("more")
        await attempt.complete()
        rest = [frame async for frame in stream]
    log += (await page(store, id_, log[-1].id)).entries
    assert seqs(rest) == [*range(seq + 1, len(log) + 1)]
    assert [frame.id for frame in rest] == [*(entry.id for entry in log[seq:]), f"{log[-1].id}.end"]
    state = await store.snapshots.snapshot(ORG, id_)
    assert state == fold(log)
    again = await frames(server, id_, header=gap.id)
    assert [frame.data for frame in again] == [frame.data for frame in rest]


@pytest.mark.parametrize("reason", REASONS)
async def test_a_socket_says_the_same(store: Store, server: Served, reason: str) -> None:
    id_, attempt, log, cursor = await bad_cursor(store, reason)
    async with socket_of(server, id_, f"&last_event_id={cursor}") as made:
        gap = json.loads(await made.recv())
        assert (gap["type"], gap["reason"], gap["latest_seq"]) == ("gap", reason, len(log))
        assert gap["stream_id"] == log[gap["seq"] - 1].id
        assert gap["log_epoch"] == store.partitions.epoch
        assert gap["snapshot"] == told(fold(log[: gap["seq"]]))
        await attempt.complete()
        rest = [json.loads(text) async for text in made]
    assert [body["seq"] for body in rest] == [*range(gap["seq"] + 1, len(log) + 2), len(log) + 1]


# As an error


@pytest.mark.parametrize("reason", REASONS)
async def test_a_gap_can_be_an_error_before_the_first_byte(store: Store, server: Served, reason: str) -> None:
    id_, _, log, cursor = await bad_cursor(store, reason)
    base = (await page(store, id_, log[-1].id)).base_seq
    for url in ("/api/v1/stream/sse", f"/api/v1/tasks/{id_}/stream"):
        for headers, query in (({"Last-Event-ID": cursor}, {}), ({}, {"last_event_id": cursor})):
            params = {"workflow_id": id_, "on_gap": "fail", **query}
            answer = await server.client.get(url, params=params, headers=headers)
            assert (answer.status_code, answer.headers["content-type"]) == (410, "application/json")
            body = answer.json()
            assert (body["reason"], body["earliest_seq"], body["latest_seq"]) == (reason, base + 1, len(log))
            assert body["error"]
    with pytest.raises(InvalidStatus) as refused:
        await bodies(server, id_, f"&on_gap=fail&last_event_id={cursor}")
    assert refused.value.response.status_code == 410
    assert json.loads(bytes(refused.value.response.body)) == body
    await wait_until(lambda: store.hub.subscribers == 0, "nobody follows")


async def test_who_asks_for_an_error_gets_a_whole_stream_when_there_is_no_gap(store: Store, server: Served) -> None:
    task_ = await ended(store, "a")
    assert seqs(await frames(server, task_, on_gap="fail")) == [1, 2, 3, 4]
    for word in ("FAIL", "skip", "1"):
        for url in ("/api/v1/stream/sse", f"/api/v1/tasks/{task_}/stream"):
            answer = await server.client.get(url, params={"workflow_id": task_, "on_gap": word})
            assert (answer.status_code, answer.json()) == (400, {"error": "Invalid on_gap (allowed: fail)"})


async def test_a_gap_in_mid_stream_aborts_who_asked_for_an_error(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    id_, attempt, _ = await written(store, 3)
    read, seen = store.log.read, list[ServerSentEvent]()

    async def late(*args: Any, **kwargs: Any) -> Page | None:
        """The reader is slow: before its second page history is trimmed."""
        if kwargs["limit"] > 1 and args[2]:
            for i in range(60):
                await attempt.write(str(i))
            monkeypatch.setattr(store.log, "read", read)
        return await read(*args, **kwargs)

    monkeypatch.setattr(store.log, "read", late)
    with pytest.raises(httpx.RemoteProtocolError):
        async with server.stream(id_, on_gap="fail") as source:
            async for frame in source.aiter_sse():
                seen.append(frame)
    assert seqs(seen) == [1, 2, 3, 4, 5]
    assert "done" not in {frame.event for frame in seen}
    params = {"workflow_id": id_, "on_gap": "fail"}
    answer = await server.client.get("/api/v1/stream/sse", params=params, headers={"Last-Event-ID": seen[-1].id})
    assert (answer.status_code, answer.json()["reason"]) == (410, "trimmed")


# The present state first


async def test_a_stream_can_begin_with_the_state(store: Store, server: Served) -> None:
    id_, attempt, log = await written(store, 3)
    async with server.stream(id_, snapshot="1") as source:
        stream = source.aiter_sse()
        first = await anext(stream)
        data = json.loads(first.data)
        assert (first.event, first.id, data["seq"]) == ("snapshot", log[-1].id, 5)
        assert data["snapshot"] == told(fold(log))
        assert data["log_epoch"] == store.partitions.epoch
        await attempt.write("x")
        assert json.loads((await anext(stream)).data)["seq"] == 6
    await attempt.complete()
    found = await frames(server, id_, snapshot="true", last_event_id=first.id)
    assert seqs(found) == [6, 7]
    assert found[0].event != "snapshot"
    found = await frames(server, id_, snapshot="1")  # it has ended
    assert [frame.event for frame in found] == ["snapshot", "done"]
    assert (json.loads(found[0].data)["seq"], found[1].id) == (7, f"{found[0].id}.end")
    assert (await server.client.get(f"/api/v1/tasks/{id_}/stream?snapshot=maybe")).status_code == 400


@pytest.mark.parametrize("query", [{}, {"on_gap": "fail"}])
async def test_the_state_of_a_trimmed_task_is_no_gap(store: Store, server: Served, query: dict[str, str]) -> None:
    id_, attempt, log = await written(store, 50)
    await attempt.complete()
    assert (await page(store, id_)).gap == "trimmed"
    found = await frames(server, id_, snapshot="1", **query)
    assert [frame.event for frame in found] == ["snapshot", "done"]
    assert json.loads(found[0].data)["seq"] == len(log) + 1


@production
@pytest.mark.timeout(120)  # fifteen seconds, on a machine that does nothing else
@pytest.mark.parametrize("path", ["direct"], indirect=True)
async def test_a_thousand_who_join_while_a_writer_writes_each_have_the_whole(store: Store, server: Served) -> None:
    store.log._limits = store.log._limits.replace(str(MARK), "5000", 1)
    id_, attempt = await started(store)
    joined: list[asyncio.Task[bytes]] = []
    request = f"GET /api/v1/tasks/{id_}/stream?snapshot=1&token={DEVELOPMENT_KEY} HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def join() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request.encode())
        body = await reader.read()
        writer.close()
        return body

    while len(joined) < 1_000:
        await attempt.write(f"{len(joined)} ")
        joined += [asyncio.create_task(join()) for _ in range(20)]
        while store.hub.subscribers < len(joined) - 100:
            await attempt.write("w ")
    await wait_until(
        lambda: store.hub.subscribers == 1_000 or any(one.done() for one in joined), "all have joined", seconds_max=40
    )
    assert not any(one.done() for one in joined), "somebody was cut off"
    await attempt.complete()
    log = (await page(store, id_)).entries
    while log[-1].seq < (found := await page(store, id_, log[-1].id)).last_seq:
        log += found.entries
    last, final = log[-1].seq, fold(log)
    texts = {final.texts["final_output"]}
    for one in joined:
        told_ = [frame for frame in decoded(await one) if frame.event != "done"]
        data = json.loads(told_[0].data)
        assert told_[0].event == "snapshot"
        assert seqs(told_[1:]) == [*range(data["seq"] + 1, last + 1)]
        deltas = (json.loads(frame.data).get("delta", "") for frame in told_[1:])
        assert {data["snapshot"]["texts"].get("final_output", "") + "".join(deltas)} == texts


def decoded(body: bytes) -> list[ServerSentEvent]:
    """The frames of a chunked body."""
    rest, text, decoder = body.partition(b"\r\n\r\n")[2], b"", SSEDecoder()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        text += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return [event for line in text.decode().split("\n")[:-1] if (event := decoder.decode(line))]


# Whose data it is


async def test_the_epoch_tells_one_stores_data_from_anothers(store: Store, server: Served, tmp_path: Path) -> None:
    async with open_store(Settings(data=tmp_path / "other", lease_seconds=60)) as other:
        epochs = set()
        async with served(other, other.settings) as second:
            for one, running in ((store, server), (other, second)):
                id_ = await submit(one)
                await one.append(ORG, id_, events.Cancelled())
                answer = await running.client.get(f"/api/v1/tasks/{id_}/stream?snapshot=1")
                comments = [line for line in answer.text.splitlines() if line.startswith(":")]
                assert f": log epoch {one.partitions.epoch}" in comments
                (data,) = [line for line in answer.text.splitlines() if line.startswith("data: {")]
                assert json.loads(data.removeprefix("data: "))["log_epoch"] == one.partitions.epoch
                epochs.add(one.partitions.epoch)
        assert len(epochs) == 2
