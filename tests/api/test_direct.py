"""The direct path: what a stream costs while it is open, what bounds it, and that nothing of it is left behind."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from prometheus_client import REGISTRY

from app import events
from app import streams as streams_
from app.crowd import Crowd, Outbox
from app.direct import Direct
from app.frames import Spelling
from app.identity import DEVELOPMENT_KEY
from app.log import Logged, said
from app.protocol import Kept
from app.settings import Settings
from app.store import Store
from app.tail import WAITING_BYTES
from tests.api.serving import ORG, Served, served, started, submit
from tests.api.test_streams import frames, production, seqs, streams_of, turned_away
from tests.waiting import wait_until

MANY = 100


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With a lease that outlasts a loaded machine: nobody renews it here."""
    return settings.model_copy(update={"lease_seconds": 60})


@pytest.fixture
async def server(store: Store, settings: Settings) -> AsyncIterator[Served]:
    async with served(store, settings) as running:
        yield running


@asynccontextmanager
async def raw(
    server: Served, task: str, query: str = "", version: str = "1.1"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A stream that has begun."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        target = f"/api/v1/stream/sse?workflow_id={task}&api_key={DEVELOPMENT_KEY}{query}"
        writer.write(f"GET {target} HTTP/{version}\r\nHost: localhost\r\n\r\n".encode())
        await reader.readuntil(b": log epoch")
        yield reader, writer
    finally:
        writer.transport.abort()


async def store_connections(store: Store) -> int:
    return int((await store.door.read("INFO", "clients"))["connected_clients"])


@production
async def test_an_open_stream_has_no_task_and_no_connection_to_the_store(store: Store, server: Served) -> None:
    task, attempt = await started(store)
    async with AsyncExitStack() as stack:
        first, _ = await stack.enter_async_context(raw(server, task))
        await first.readuntil(b"WORKFLOW_STARTED")
        tasks, connections = len(asyncio.all_tasks()), await store_connections(store)
        others = [await stack.enter_async_context(raw(server, task)) for _ in range(MANY)]
        for reader, _ in others:
            await reader.readuntil(b"WORKFLOW_STARTED")
        await wait_until(lambda: not server.server.server_state.tasks, "the calls have returned")
        await wait_until(lambda: len(asyncio.all_tasks()) <= tasks, "no task is left for a stream")
        assert await store_connections(store) == connections <= 4
        assert sum(isinstance(one, Kept) for one in server.server.server_state.connections) == MANY + 1
        await attempt.complete()
        for reader, _ in others:
            assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    await wait_until(lambda: not server.server.server_state.connections, "all connections are closed")
    assert not streams_of(server).open
    assert store.hub.subscribers == 0


async def test_an_open_stream_has_no_timer(store: Store, server: Served) -> None:
    """On asyncio's own loop, whose timers can be counted."""

    def timers() -> int:
        return sum(not timer.cancelled() for timer in asyncio.get_running_loop()._scheduled)  # type: ignore[attr-defined]

    task = await submit(store)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(raw(server, task))
        await wait_until(lambda: not server.server.server_state.tasks, "the call has returned")
        before = timers()
        for _ in range(MANY):
            await stack.enter_async_context(raw(server, task))
        await wait_until(lambda: timers() < before + MANY / 10, "no timer is left for a stream")


async def test_clients_that_leave_leave_nothing_behind(store: Store, server: Served) -> None:
    task, attempt = await started(store)
    async with AsyncExitStack() as stack:
        for _ in range(MANY):
            await stack.enter_async_context(raw(server, task))
        assert store.hub.subscribers == MANY
    for _ in range(3):
        await attempt.write("x")
    await wait_until(lambda: store.hub.subscribers == 0, "all subscriptions end")
    assert not streams_of(server).open
    assert not streams_of(server)._keys
    assert not any(tail._audiences for tail in store.hub._tails.values())


async def test_a_client_that_leaves_before_its_stream_begins_leaves_nothing_behind(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await submit(store)
    opened, go_on = asyncio.Event(), asyncio.Event()
    open_ = store.hub.open

    async def slowly(*args: Any) -> Any:
        opened.set()
        await go_on.wait()
        return await open_(*args)

    monkeypatch.setattr(store.hub, "open", slowly)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        f"GET /api/v1/stream/sse?workflow_id={task}&api_key={DEVELOPMENT_KEY} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    )
    await opened.wait()
    writer.transport.abort()
    await wait_until(lambda: not server.server.server_state.connections, "the server noticed")
    go_on.set()
    await wait_until(lambda: not server.server.server_state.tasks, "the call has returned")
    assert not streams_of(server).open
    assert store.hub.subscribers == 0


async def test_a_key_has_so_many_streams_and_no_more(store: Store, settings: Settings) -> None:
    task, attempt = await started(store)
    async with served(store, settings, streams_per_key=2) as server:
        async with raw(server, task), raw(server, task):
            await turned_away(server, f"/api/v1/tasks/{task}/stream")
        await wait_until(lambda: not streams_of(server).open, "both have left")
        await attempt.complete()
        assert len(await frames(server, task)) == 4


async def test_a_long_history_waits_for_its_reader(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held for a replaying reader is a page, however long the history, and it is never cut off for that."""
    task, attempt = await started(store)
    for _ in range(60):
        await attempt.say(events.Noted(name="BIG", payload={"x": "y" * 100_000}))
    await attempt.complete()
    async with served(store, settings, stream_backlog_bytes=64 * 1024) as server, raw(server, task) as (reader, _):
        (kept,) = server.server.server_state.connections
        held, body = 0, bytearray()
        while chunk := await reader.read(65536):
            held = max(held, kept.transport.get_write_buffer_size())
            body += chunk
        assert body.count(b"event: BIG") == 60
        assert body.endswith(b"0\r\n\r\n")
        assert held < 3 * 1024 * 1024


@production
async def test_a_replaying_reader_that_takes_nothing_is_cut_off(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_, "STALLED_SECONDS", 0.5)
    task, attempt = await started(store)
    for _ in range(80):
        await attempt.say(events.Noted(name="BIG", payload={"x": "y" * 100_000}))
    async with served(store, settings, heartbeat_seconds=0.2) as server:
        async with raw(server, task) as (_, writer):
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await wait_until(lambda: not streams_of(server).open, "it is cut off")
        assert store.hub.subscribers == 0
        await attempt.complete()
        assert seqs(await frames(server, task)) == [*range(1, 84)]


async def test_a_client_of_http_1_0_gets_chunks_that_tell_an_end_from_an_abort(store: Store, server: Served) -> None:
    """As nginx asks by default."""
    task, attempt = await started(store)
    async with raw(server, task, version="1.0") as (reader, _):
        await attempt.complete()
        assert (await reader.read()).endswith(b"0\r\n\r\n")


async def test_what_a_client_says_on_its_stream_is_thrown_away(store: Store, server: Served) -> None:
    task, attempt = await started(store)
    async with raw(server, task) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        await writer.drain()
        await attempt.complete()
        rest = await reader.read()
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert b"HTTP/1.1" not in rest


async def test_an_event_is_spelled_once_for_all_who_want_the_same_alone_or_together(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, attempt = await started(store)
    spelled: list[Spelling] = []
    live = Spelling.live

    def counted(spelling: Spelling, one: Logged) -> tuple[bytes, int]:
        spelled.append(spelling)
        return live(spelling, one)

    async with AsyncExitStack() as stack:
        readers = [(await stack.enter_async_context(raw(server, task)))[0] for _ in range(10)]
        filtered = [(await stack.enter_async_context(raw(server, task, "&types=LLM_PARTIAL")))[0] for _ in range(10)]
        await wait_until(lambda: all(one.reader.live for one in streams_of(server).open), "all are live")  # type: ignore[attr-defined]
        monkeypatch.setattr(Spelling, "live", counted)
        await attempt.write("word")
        for reader in (*readers, *filtered):
            await reader.readuntil(b'"delta":"word"')
        assert len(spelled) == 2
        await wait_until(lambda: len(together(server)) == 2 and None not in together(server), "they go together")
        await attempt.write("another")
        for reader in (*readers, *filtered):
            await reader.readuntil(b'"delta":"another"')
        assert len(spelled) == 4


def counted(server: Served) -> tuple[float, float]:
    """Frames and bytes that were written to readers, ever; those of who goes alone are told with the next beat."""
    frames, size = (REGISTRY.get_sample_value(f"taskcast_stream_{what}_total") or 0 for what in ("frames", "bytes"))
    return frames + streams_of(server).frames, size + streams_of(server).bytes


def together(server: Served) -> set[Crowd | None]:
    return {stream._crowd for stream in streams_of(server).open if isinstance(stream, Direct)}


async def test_readers_who_have_caught_up_go_on_together(store: Store, settings: Settings) -> None:
    """Whatever they do, each gets all, and what they get is counted."""
    task, attempt = await started(store)
    async with served(store, settings, heartbeat_seconds=300) as server, AsyncExitStack() as stack:
        readers = [(await stack.enter_async_context(raw(server, task)))[0] for _ in range(3)]
        async with raw(server, task):
            await wait_until(lambda: all(one.reader.live for one in streams_of(server).open), "all are live")  # type: ignore[attr-defined]
            assert together(server) == {None}
            await attempt.write("alone")
            await wait_until(lambda: len(together(server) - {None}) == len(together(server)) == 1, "they go together")
            before = counted(server)
            await attempt.write("together")
            for reader in readers:
                await reader.readuntil(b'"delta":"alone"')
                await reader.readuntil(b"\n\n\r\n")
                chunk = await reader.readuntil(b"\n\n\r\n")
                assert b'"delta":"together"' in chunk
            assert counted(server) == (before[0] + 4, before[1] + 4 * len(chunk))
        await wait_until(lambda: len(streams_of(server).open) == 3, "one has left")
        (crowd,) = together(server)
        assert crowd
        assert len(crowd._readers) == 3
        readers.append((await stack.enter_async_context(raw(server, task)))[0])
        await readers[-1].readuntil(b'"delta":"together"')
        await attempt.write("more")
        await attempt.complete()
        for reader in readers:
            body = await reader.read()
            assert body.count(b'"delta":"more"') == body.count(b"data: [DONE]") == 1
            assert b'"delta":"together"' not in body
        await wait_until(lambda: store.hub.subscribers == 0, "all have left")
        assert not any(tail._audiences for tail in store.hub._tails.values())


async def test_what_one_read_brings_is_written_in_pieces(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is taken and not written yet is beyond every bound of a reader's backlog."""
    task, attempt = await started(store)
    sizes: list[int] = []
    write = Outbox.write

    def measured(outbox: Outbox) -> None:
        sizes.append(outbox.size)
        write(outbox)

    async with raw(server, task) as (reader, _):
        await wait_until(lambda: all(one.reader.live for one in streams_of(server).open), "it is live")  # type: ignore[attr-defined]
        await attempt.write("x")
        await wait_until(lambda: None not in together(server), "it has joined a crowd")
        monkeypatch.setattr(Outbox, "write", measured)
        big = said(events.Noted(name="BIG", payload={"x": "y" * 20_000}))
        await store.extend(ORG, task, [big] * 20, fence=attempt._fence, n=2)
        for _ in range(20):
            await reader.readuntil(b"event: BIG\n")
    assert sum(sizes) > 20 * 20_000
    assert max(sizes) < WAITING_BYTES + 21_000


async def test_who_goes_with_others_gets_a_heartbeat_after_silence_only(store: Store, settings: Settings) -> None:
    task, attempt = await started(store)
    async with served(store, settings, heartbeat_seconds=300) as server, raw(server, task) as (reader, _):
        (stream,) = streams_of(server).open
        assert isinstance(stream, Direct)
        await wait_until(lambda: stream.reader.live, "it is live")
        for word in (b"a", b"b", b"c"):
            await attempt.write(word.decode())
            assert b": ping" not in await reader.readuntil(b'"delta":"%s"' % word)
            assert stream._crowd
            stream.visit(150)
        for then in (stream.part, lambda: stream.visit(150)):  # alone, too; and after its own heartbeat
            then()
            stream.visit(150)
            await reader.readuntil(b": ping\n")


@production
async def test_who_goes_with_others_and_takes_nothing_is_cut_off(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little there is for it to take."""
    monkeypatch.setattr(streams_, "STALLED_SECONDS", 0.5)
    task, attempt = await started(store)
    async with (
        served(store, settings, heartbeat_seconds=0.2) as server,
        raw(server, task) as (reader, _),
        raw(server, task) as (_, stuck),
    ):
        await wait_until(lambda: all(one.reader.live for one in streams_of(server).open), "both are live")  # type: ignore[attr-defined]
        stuck.transport.pause_reading()  # type: ignore[attr-defined]
        await attempt.write("x")
        await wait_until(lambda: len(together(server) - {None}) == 1 == len(together(server)), "they go together")
        both = [one for one in streams_of(server).open if isinstance(one, Direct)]
        number = 0
        while not any(one._unsent() for one in both):
            number += 1
            await attempt.say(events.Noted(name="BIG", payload={"x": "y" * 20_000 + f"<{number}>"}))
            await reader.readuntil(b"<%d>" % number)
        assert len(together(server)) == 1
        await wait_until(lambda: len(streams_of(server).open) == 1, "it is cut off")
        await attempt.complete()
        await reader.readuntil(b"data: [DONE]")


@production
async def test_a_large_beginning_leaves_in_pieces(store: Store, server: Served) -> None:
    """Of a client that takes nothing, no more is held than a piece, and one state."""
    for _ in range(40):
        await submit(store, query="q" * 200_000)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=4096)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(
        f"GET /api/v1/stream/sse?session_id=s1&api_key={DEVELOPMENT_KEY} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    )
    await wait_until(lambda: bool(streams_of(server).open), "the stream is open")
    (stream,) = streams_of(server).open
    assert isinstance(stream, Direct)
    await wait_until(lambda: not stream.closed and stream._unsent() > streams_.CHUNK_BYTES, "it has begun")
    assert stream._unsent() < streams_.CHUNK_BYTES + 2 * 200_000 + 10_000
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    body = bytearray()
    while b"event: cursor" not in body:
        body += await reader.read(65536)
    assert body.count(b"event: snapshot") == 40
    writer.transport.abort()


async def test_a_filter_is_bounded(server: Served) -> None:
    for types in (",".join(f"T{i}" for i in range(65)), "T" * 129):
        answer = await server.client.get("/api/v1/stream/sse", params={"workflow_id": "t", "types": types})
        assert answer.status_code == 400


async def test_nobody_learns_what_is_wrong_with_a_request_before_who_asks(server: Served) -> None:
    for path in (
        "/api/v1/tasks/bad%20id/stream",
        "/api/v1/stream/sse?workflow_id=",
        "/api/v1/stream/sse?types=" + "x" * 200,
    ):
        assert (await server.client.get(path, headers={"X-API-Key": "wrong"})).status_code == 401
