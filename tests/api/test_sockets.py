"""Live tasks over WebSocket: the same cursors and filters, raw event objects, and close codes that say what to do."""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from app import events
from app import streams as streams_
from app.errors import Unavailable
from app.identity import DEVELOPMENT_KEY
from app.settings import Settings
from app.store import Store
from tests.api.serving import KEY, ORG, Served, ended, served, started, submit
from tests.api.test_streams import production, streams_of
from tests.waiting import wait_until


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With a lease that outlasts a loaded machine: nobody renews it here."""
    return settings.model_copy(update={"lease_seconds": 60})


@pytest.fixture
async def server(store: Store, settings: Settings) -> AsyncIterator[Served]:
    async with served(store, settings) as running:
        yield running


@asynccontextmanager
async def socket_of(server: Served, task: str, query: str = "", **headers: str) -> AsyncIterator[ClientConnection]:
    url = f"ws://127.0.0.1:{server.port}/api/v1/stream/ws?workflow_id={task}{query}"
    async with connect(url, additional_headers={**KEY, **headers}) as made:
        yield made


async def bodies(server: Served, task: str, query: str = "", **headers: str) -> list[dict[str, Any]]:
    """All of a socket that closes in good order."""
    async with socket_of(server, task, query, **headers) as made:
        return [json.loads(text) async for text in made]


async def test_a_socket_tells_raw_events_then_the_end_and_closes_in_good_order(store: Store, server: Served) -> None:
    task = await ended(store, "ü")
    async with socket_of(server, task) as made:
        told = [json.loads(text) async for text in made]
        assert made.close_code == 1000
    assert [body["type"] for body in told] == [
        "DATA_PROCESSING",
        "WORKFLOW_STARTED",
        "LLM_PARTIAL",
        "WORKFLOW_COMPLETED",
        "STREAM_END",
    ]
    assert [body["seq"] for body in told] == [1, 2, 3, 4, 4]
    assert told[2]["message"] == "ü"
    assert all(body["workflow_id"] == task and body["timestamp"].endswith("Z") for body in told)
    assert told[-1]["stream_id"] == f"{told[-2]['stream_id']}.end"


async def test_a_socket_tells_events_as_they_happen(store: Store, server: Served) -> None:
    task, attempt = await started(store)
    async with socket_of(server, task) as made:
        assert [json.loads(await made.recv())["seq"] for _ in range(2)] == [1, 2]
        await attempt.write("a")
        assert json.loads(await made.recv())["message"] == "a"
        await store.append(ORG, task, events.Cancelled())
        assert [json.loads(text)["type"] async for text in made] == [
            "WORKFLOW_CANCELLING",
            "WORKFLOW_CANCELLED",
            "STREAM_END",
        ]


async def test_a_socket_has_the_same_cursors_and_filters(store: Store, server: Served) -> None:
    task = await ended(store, "a", "b")
    third = (await bodies(server, task))[2]["stream_id"]
    for told in (
        await bodies(server, task, f"&last_event_id={third}"),
        await bodies(server, task, "&last_event_id=3"),
        await bodies(server, task, **{"Last-Event-ID": third}),
        await bodies(server, task, "&last_event_id=1", **{"Last-Event-ID": "3"}),
    ):
        assert [body["seq"] for body in told] == [4, 5, 5]
    for types in ("LLM_PARTIAL", "thread.message.delta"):
        assert [body["type"] for body in await bodies(server, task, f"&types={types}")] == [
            "LLM_PARTIAL",
            "LLM_PARTIAL",
            "STREAM_END",
        ]
    (end,) = await bodies(server, task, f"&last_event_id={(await bodies(server, task))[-1]['stream_id']}")
    assert end["type"] == "STREAM_END"


async def test_a_socket_tells_a_gap(store: Store, server: Served) -> None:
    task = await ended(store)
    gap, end = await bodies(server, task, "&last_event_id=99")
    assert (gap["type"], gap["reason"], end["type"]) == ("gap", "ahead", "STREAM_END")
    assert gap["stream_id"] == gap["snapshot"]["last_event_id"]


@pytest.mark.parametrize(
    ("query", "key", "status", "sentence"),
    [
        ("workflow_id=task_none", DEVELOPMENT_KEY, 404, "Task not found"),
        ("workflow_id=", DEVELOPMENT_KEY, 400, "Invalid or missing workflow_id"),
        ("workflow_id=task_none&last_event_id=x", DEVELOPMENT_KEY, 400, "Invalid last_event_id"),
        ("workflow_id=task_none", "wrong", 401, "Unauthorized"),
    ],
)
async def test_a_socket_is_refused_before_the_handshake(
    server: Served, query: str, key: str, status: int, sentence: str
) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"ws://127.0.0.1:{server.port}/api/v1/stream/ws?{query}&api_key={key}"):
            pass
    answer = refused.value.response
    assert answer.status_code == status
    assert json.loads(bytes(answer.body)) == {"error": sentence}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-trace-id"]


async def test_a_socket_without_a_store_is_refused(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await submit(store)

    @asynccontextmanager
    async def follow(*_: Any) -> AsyncIterator[None]:
        raise Unavailable("gone")
        yield

    monkeypatch.setattr(store.hub, "follow", follow)
    with pytest.raises(InvalidStatus) as refused:
        await bodies(server, task)
    assert refused.value.response.status_code == 503


async def test_an_unknown_socket_path_is_404(server: Served) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"ws://127.0.0.1:{server.port}/nowhere"):
            pass
    assert refused.value.response.status_code == 404


async def test_what_a_client_says_is_thrown_away_and_bounded(store: Store, server: Served) -> None:
    task, attempt = await started(store)
    async with socket_of(server, task) as made:
        for _ in range(100):
            await made.send('{"type":"subscribe"}')
        await attempt.complete()
        assert [json.loads(text)["type"] async for text in made][-1] == "STREAM_END"
    task, _ = await started(store)
    async with socket_of(server, task) as made:
        await made.send("x" * 100_000)
        with pytest.raises(ConnectionClosed):
            async for _ in made:
                pass
        assert made.close_code == 1009  # message too big
    await wait_until(lambda: not streams_of(server).open, "its stream ends")


async def test_a_socket_whose_client_leaves_ends_its_subscription(store: Store, server: Served) -> None:
    task = await submit(store)
    async with socket_of(server, task) as made:
        await made.recv()
        assert store.hub.subscribers == 1
    await wait_until(lambda: store.hub.subscribers == 0, "the subscription ends")
    assert not streams_of(server).open


async def test_no_frame_is_compressed(store: Store, server: Served) -> None:
    async with socket_of(server, await submit(store)) as made:
        assert made.protocol.extensions == []


@production
async def test_a_stopping_server_closes_sockets_with_restart(store: Store, settings: Settings) -> None:
    task = await submit(store)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(store, settings))
        made = await stack.enter_async_context(socket_of(server, task))
        await made.recv()
        server.server.stop()
        with pytest.raises(ConnectionClosed):
            await made.recv()
        assert made.close_code == 1012


@pytest.mark.parametrize(("changed", "code"), [({"closing": True}, 1012), ({"streams_max": 0}, 1013)])
async def test_a_socket_that_cannot_begin_is_told_to_come_back(
    store: Store, server: Served, changed: dict[str, Any], code: int
) -> None:
    task = await submit(store)
    for name, value in changed.items():
        setattr(streams_of(server), name, value)
    async with socket_of(server, task) as made:
        with pytest.raises(ConnectionClosed):
            await made.recv()
        assert made.close_code == code


@pytest.mark.parametrize(("error", "code"), [(Unavailable("gone"), 1013), (ZeroDivisionError(), 1011)])
async def test_a_socket_that_cannot_go_on_is_not_closed_in_good_order(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    task = await submit(store)

    async def broken() -> AsyncIterator[list[Any]]:
        raise error
        yield []

    @asynccontextmanager
    async def follow(*_: Any) -> AsyncIterator[AsyncIterator[list[Any]]]:
        yield broken()

    monkeypatch.setattr(store.hub, "follow", follow)
    async with socket_of(server, task) as made:
        with pytest.raises(ConnectionClosed):
            await made.recv()
        assert made.close_code == code


@production
async def test_a_socket_that_takes_nothing_is_cut_off(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_, "STALLED_SECONDS", 1.0)
    task, attempt = await started(store)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(
            f"GET /api/v1/stream/ws?workflow_id={task}&token={DEVELOPMENT_KEY} HTTP/1.1\r\nHost: localhost\r\n"
            "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\n\r\n".encode()
        )
        await wait_until(lambda: len(streams_of(server).open) == 1, "it follows")
        for _ in range(100):
            await attempt.say(events.Noted(name="BIG", payload={"x": "y" * 60_000}))
        await wait_until(lambda: not streams_of(server).open, "the slow reader is cut off")
    assert store.hub.subscribers == 0
