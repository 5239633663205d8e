"""Live tasks over the real server: where a stream begins, what it says, how it ends, and what it never does."""

import asyncio
import json
import random
import re
import socket
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from httpx_sse import ServerSentEvent, aconnect_sse
from httpx_sse._decoders import SSEDecoder
from prometheus_client import REGISTRY

from app import events
from app import streams as streams_
from app.api.shannon.streams import Cursor, parse_cursor
from app.errors import Unavailable
from app.identity import DEVELOPMENT_KEY
from app.settings import Settings
from app.store import Store
from app.streams import Streams
from tests.api.serving import KEY, ORG, Attempt, Served, ended, served, started, submit, take
from tests.waiting import wait_until

production = pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
"""On uvloop, whose transports differ from asyncio's (not everywhere: it keeps pytest's timeout from interrupting)."""


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With a lease that outlasts a loaded machine: nobody renews it here."""
    return settings.model_copy(update={"lease_seconds": 60})


def streams_of(server: Served) -> Streams:
    streams: Streams = server.server.config.app.state.streams  # type: ignore[union-attr]
    return streams


async def frames(server: Served, task: str, *, header: str = "", **query: str) -> list[ServerSentEvent]:
    """All frames of a stream that ends."""
    headers = {"Last-Event-ID": header} if header else {}
    params = {"workflow_id": task, **query}
    async with aconnect_sse(server.client, "GET", "/api/v1/stream/sse", params=params, headers=headers) as source:
        return await take(source)


def names(found: list[ServerSentEvent]) -> list[str]:
    return [frame.event for frame in found]


def seqs(found: list[ServerSentEvent]) -> list[int]:
    """Of the frames that stand for entries."""
    return [
        body["seq"] for body in (json.loads(frame.data) for frame in found if frame.data != "[DONE]") if "seq" in body
    ]


# What a stream says


async def test_a_stream_tells_a_task_from_its_first_event_to_done(store: Store, server: Served) -> None:
    task = await ended(store, "a", "b")
    found = await frames(server, task)
    assert names(found) == [
        "DATA_PROCESSING",
        "WORKFLOW_STARTED",
        "thread.message.delta",
        "thread.message.delta",
        "WORKFLOW_COMPLETED",
        "done",
    ]
    page = await store.events(ORG, task, "")
    assert page
    assert [frame.id for frame in found] == [*(entry.id for entry in page.entries), f"{page.last_id}.end"]
    assert found[-1].data == "[DONE]"
    assert json.loads(found[2].data)["message"] == "a"


async def test_the_response_says_that_nobody_may_hold_it_up(store: Store, server: Served) -> None:
    task = await ended(store)
    answer = await server.client.get("/api/v1/stream/sse", params={"workflow_id": task})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache, no-transform"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["transfer-encoding"] == "chunked"
    hello = rf": connected to workflow {task}\n: log epoch {store.partitions.epoch}\nretry: [2-5][0-9]{{3}}\nid: "
    assert re.match(hello, answer.text)
    assert answer.content.isascii()


async def test_a_task_has_a_stream_of_its_own_that_is_no_redirect(store: Store, server: Served) -> None:
    task = await ended(store)
    async with httpx.AsyncClient(base_url=server.url) as client:
        answer = await client.get(f"/api/v1/tasks/{task}/stream?api_key={DEVELOPMENT_KEY}")
    assert answer.status_code == 200
    assert answer.text.endswith("event: done\ndata: [DONE]\n\n")


async def test_text_of_any_language_survives_clients_that_split_lines_everywhere(store: Store, server: Served) -> None:
    text = "naïve\u0085\u2028\u2029\x0b\x0c ☃😀\r\n"
    task = await ended(store, text)
    async with server.client.stream("GET", f"/api/v1/tasks/{task}/stream") as answer:
        lines = [line async for line in answer.aiter_lines()]  # as the SDK reads
    (delta,) = [line for line in lines if '"delta"' in line]
    assert json.loads(delta.removeprefix("data: "))["delta"] == text


async def test_a_reader_sees_events_as_they_happen(store: Store, server: Served) -> None:
    task, attempt = await started(store)
    async with server.stream(task) as source:
        stream = source.aiter_sse()
        assert [(await anext(stream)).event for _ in range(2)] == ["DATA_PROCESSING", "WORKFLOW_STARTED"]
        for word in ("a", "b", "c"):
            await attempt.write(word)
            assert json.loads((await anext(stream)).data)["delta"] == word
        await attempt.complete()
        assert [frame.event async for frame in stream] == ["WORKFLOW_COMPLETED", "done"]
    await wait_until(lambda: store.hub.subscribers == 0, "the subscription ends")
    assert not streams_of(server).open


async def test_every_end_is_told_and_then_done(store: Store, server: Served) -> None:
    ends: list[tuple[events.AnyEvent, list[str]]] = [
        (events.Completed(result="r"), ["WORKFLOW_COMPLETED", "done"]),
        (events.Failed(error="no"), ["error", "done"]),
        (events.Errored(error="no"), ["error", "done"]),
        (events.Cancelled(), ["workflow.cancelling", "workflow.cancelled", "done"]),
        (events.TimedOut(), ["error", "done"]),
    ]
    for event, told in ends:
        task, attempt = await started(store)
        async with server.stream(task) as source:
            stream = source.aiter_sse()
            await anext(stream)
            if isinstance(event, events.Cancelled | events.TimedOut):
                await store.append(ORG, task, event)
            else:
                await attempt.say(event)
            assert [frame.event async for frame in stream][1:] == told


async def test_the_first_of_a_cancels_two_frames_has_no_id(store: Store, server: Served) -> None:
    task = await submit(store)
    await store.append(ORG, task, events.Cancelled())
    body = (await server.client.get(f"/api/v1/tasks/{task}/stream")).text
    (cancelling,) = [block for block in body.split("\n\n") if "workflow.cancelling" in block]
    assert cancelling.startswith("event: workflow.cancelling\n")


async def test_a_task_deleted_under_a_reader_ends_its_stream(store: Store, server: Served) -> None:
    task = await submit(store)
    async with server.stream(task) as source:
        stream = source.aiter_sse()
        first = await anext(stream)
        await store.delete(ORG, task)
        done = await anext(stream)
        assert (done.event, done.data) == ("done", "[DONE]")
        assert done.id == first.id  # it brought none, so the reader keeps its own
    assert (await server.client.get(f"/api/v1/tasks/{task}/stream")).status_code == 404


async def test_silence_is_filled_with_pings_that_are_no_events(store: Store, settings: Settings) -> None:
    task = await submit(store)
    async with served(store, settings, heartbeat_seconds=0.1) as server:
        async with server.client.stream("GET", f"/api/v1/tasks/{task}/stream") as answer:
            lines = answer.aiter_lines()
            while await anext(lines) != ": ping":
                pass
            assert await anext(lines) == ": ping"  # no blank line between them
        decoder, heard, pings = SSEDecoder(), list[str](), 0
        async with server.client.stream("GET", f"/api/v1/tasks/{task}/stream") as answer:
            async for line in answer.aiter_lines():
                pings += line == ": ping"
                if pings == 2 and line == ": ping":
                    await store.append(ORG, task, events.Cancelled())
                if found := decoder.decode(line):
                    heard.append(found.event)
        assert heard == ["DATA_PROCESSING", "workflow.cancelling", "workflow.cancelled", "done"]
        assert pings >= 2


# Where it begins


@pytest.mark.parametrize(
    ("text", "cursor"),
    [
        ("", Cursor()),
        ("0", Cursor()),
        ("0-0", Cursor()),
        ("000", Cursor()),
        ("7", Cursor("seq:7")),
        (" 7 ", Cursor("seq:7")),
        ("0017", Cursor("seq:17")),
        ("1700000000000-3", Cursor("1700000000000-3")),
        ("1700000000000-3.end", Cursor("1700000000000-3", ended=True)),
        ("18446744073709551616-0", Cursor("999999999999999-0")),  # as far ahead, and the store can count it
        ("1-18446744073709551616", Cursor("1-999999999999999")),
        ("9" * 20, Cursor("seq:999999999999999")),
        ("1-2-3", None),
        ("-1", None),
        ("1-", None),
        ("1.end", None),
        ("1-1.END", None),
        ("٣", None),
        ("abc", None),
        ("1 2", None),
        ("9" * 21, None),
        ("$", None),
    ],
)
def test_a_cursor_is_an_id_a_number_or_an_end(text: str, cursor: Cursor | None) -> None:
    assert parse_cursor(text) == cursor


async def test_a_reader_goes_on_behind_every_form_of_cursor(store: Store, server: Served) -> None:
    task = await ended(store, "a", "b")  # five events
    whole = await frames(server, task)
    third = whole[2].id
    for asked in (
        await frames(server, task, header=third),
        await frames(server, task, last_event_id=third),
        await frames(server, task, header="3"),
        await frames(server, task, last_event_id="3"),
        await frames(server, task, header=f"{third}.end"),
        await frames(server, task, last_event_id=f"{third}.end"),
        await frames(server, task, header=third, last_event_id="1"),  # the header wins
    ):
        assert seqs(asked) == [4, 5]
        assert names(asked)[-1] == "done"
    for asked in (
        await frames(server, task, header="0"),
        await frames(server, task, last_event_id="0-0"),
        await frames(server, task, last_event_id=""),
        await frames(server, task, header="nonsense"),  # an EventSource could not mend it
        await frames(server, task, header="nonsense", last_event_id="3"),
    ):
        assert seqs(asked) == [1, 2, 3, 4, 5]


async def test_a_malformed_parameter_is_400(store: Store, server: Served) -> None:
    task = await ended(store)
    for nasty in ("abc", "1-", "1-2-3", "1.end", "٣", "9" * 30, f"1-{'9' * 30}"):
        for path in ("/api/v1/stream/sse", f"/api/v1/tasks/{task}/stream"):
            answer = await server.client.get(
                path, params={"workflow_id": task, "last_event_id": nasty}, headers={"Last-Event-ID": "1"}
            )
            assert (answer.status_code, answer.json()) == (400, {"error": "Invalid last_event_id"})


async def test_behind_the_last_event_of_an_ended_task_there_is_only_done(store: Store, server: Served) -> None:
    task = await ended(store)
    last = (await frames(server, task))[-2].id
    for found in (await frames(server, task, header=last), await frames(server, task, header="3")):
        assert [(frame.event, frame.id) for frame in found] == [("done", f"{last}.end")]


async def test_who_has_seen_done_is_answered_204_and_nobody_else(store: Store, server: Served) -> None:
    task = await ended(store)
    done = (await frames(server, task))[-1].id
    for path, params in (
        ("/api/v1/stream/sse", {"workflow_id": task}),
        (f"/api/v1/tasks/{task}/stream", {}),
    ):
        listening = {"Accept": "text/event-stream"}
        for answer in (
            await server.client.get(path, params=params, headers={**listening, "Last-Event-ID": done}),
            await server.client.get(path, params={**params, "last_event_id": done}, headers=listening),
            await server.client.head(path, params=params, headers={**listening, "Last-Event-ID": done}),
        ):
            assert answer.status_code == 204
            assert answer.content == b""
        # Who does not ask as an EventSource does takes 204 for a failure, as the SDK.
        answer = await server.client.get(path, params=params, headers={"Last-Event-ID": done})
        assert (answer.status_code, answer.text.count("[DONE]")) == (200, 1)
    assert len(await frames(server, await ended(store), header=done)) == 4  # to another task it means nothing


async def test_a_new_turn_goes_on_for_who_has_seen_done(store: Store, server: Served) -> None:
    task = await ended(store)
    done = (await frames(server, task))[-1].id
    await store.append(ORG, task, events.Continued(query="and?", submission="s2"))
    async with aconnect_sse(
        server.client, "GET", f"/api/v1/tasks/{task}/stream", headers={"Last-Event-ID": done}
    ) as source:
        stream = source.aiter_sse()
        assert json.loads((await anext(stream)).data)["seq"] == 4
        await store.append(ORG, task, events.Cancelled())
        assert [frame.event async for frame in stream][-1] == "done"


async def test_a_running_task_never_answers_204(store: Store, server: Served) -> None:
    task, attempt = await started(store)
    last = await attempt.write("a")
    async with aconnect_sse(
        server.client, "GET", f"/api/v1/tasks/{task}/stream", headers={"Last-Event-ID": f"{last}.end"}
    ) as source:
        assert source.response.status_code == 200
        stream = source.aiter_sse()
        await attempt.write("b")
        assert json.loads((await anext(stream)).data)["delta"] == "b"


async def test_a_cursor_beyond_the_last_event_is_a_gap(store: Store, server: Served) -> None:
    task = await ended(store)
    last = (await frames(server, task))[-2].id
    for cursor in ("99999999999999-0", "99"):
        gap, done = await frames(server, task, last_event_id=cursor)
        assert (gap.event, gap.id, done.event) == ("gap", last, "done")
        data = json.loads(gap.data)
        assert (data["reason"], data["earliest_seq"], data["latest_seq"]) == ("ahead", 1, 3)
        assert data["snapshot"]["status"] == "TASK_STATUS_COMPLETED"


async def test_a_cursor_that_nobody_gave_is_a_gap_and_the_stream_goes_on(store: Store, server: Served) -> None:
    task, attempt = await started(store)
    await attempt.write("a")
    first = (await store.events(ORG, task, "")).entries[0].id  # type: ignore[union-attr]
    never = f"{first.partition('-')[0]}-7"
    async with aconnect_sse(
        server.client, "GET", f"/api/v1/tasks/{task}/stream", headers={"Last-Event-ID": never}
    ) as source:
        stream = source.aiter_sse()
        gap = await anext(stream)
        assert (gap.event, json.loads(gap.data)["reason"]) == ("gap", "unknown")
        assert json.loads(gap.data)["snapshot"]["texts"] == {"final_output": "a"}
        await attempt.write("b")
        frame = await anext(stream)
        assert json.loads(frame.data)["delta"] == "b"
        assert json.loads(frame.data)["seq"] == json.loads(gap.data)["latest_seq"] + 1


async def test_what_is_no_longer_kept_is_a_gap_and_the_rest_follows(store: Store, settings: Settings) -> None:
    store.log._limits = store.log._limits.replace(str(settings.events_per_mark), "10", 1)
    task, attempt = await started(store)
    for i in range(50):
        await attempt.write(str(i))
    await attempt.complete()
    counted = REGISTRY.get_sample_value("taskcast_gaps_total", {"reason": "trimmed"}) or 0
    async with served(store, settings) as server:
        for found in (await frames(server, task), await frames(server, task, header="1")):
            gap = json.loads(found[0].data)
            assert (found[0].event, gap["reason"], gap["latest_seq"]) == ("gap", "trimmed", 53)
            assert seqs(found[1:]) == [*range(gap["earliest_seq"], 54)]
            assert found[0].id != found[1].id
            assert names(found)[-1] == "done"
    assert REGISTRY.get_sample_value("taskcast_gaps_total", {"reason": "trimmed"}) == counted + 2


async def test_a_reader_that_comes_and_goes_sees_every_event_once(store: Store, server: Served) -> None:
    task, attempt = await started(store)

    async def write() -> None:
        for i in range(200):
            await attempt.write(str(i))
        await attempt.complete()

    seen: list[int] = []
    cursor, done = "", False
    async with asyncio.TaskGroup() as group:  # a writer that fails ends the reader, which would wait for ever
        group.create_task(write())
        while not done:
            headers = {"Last-Event-ID": cursor} if cursor else {}
            left = random.randint(1, 30)
            async with aconnect_sse(server.client, "GET", f"/api/v1/tasks/{task}/stream", headers=headers) as source:
                async for frame in source.aiter_sse():
                    cursor, done = frame.id, frame.event == "done"
                    seen += seqs([frame])
                    left -= 1
                    if not left:
                        break
    assert seen == [*range(1, 204)]


# Filters


@pytest.mark.parametrize(
    ("types", "told"),
    [
        ("LLM_PARTIAL", ["thread.message.delta", "done"]),
        ("thread.message.delta", ["thread.message.delta", "done"]),
        (" LLM_PARTIAL , WORKFLOW_STARTED ,,", ["WORKFLOW_STARTED", "thread.message.delta", "done"]),
        ("WORKFLOW_COMPLETED", ["WORKFLOW_COMPLETED", "WORKFLOW_COMPLETED", "done"]),
        ("done", ["done"]),
        ("STREAM_END", ["done"]),
        ("NOTHING_SUCH", ["done"]),
    ],
)
async def test_a_filter_takes_either_name_and_never_ends_a_stream_early(
    store: Store, server: Served, types: str, told: list[str]
) -> None:
    task, attempt = await started(store)
    await attempt.write("a")
    await attempt.say(events.Noted(name="WORKFLOW_COMPLETED", agent="sub"))  # a sub-workflow's
    await attempt.complete()
    assert names(await frames(server, task, types=types)) == told


async def test_an_empty_filter_is_none(store: Store, server: Served) -> None:
    task = await ended(store)
    assert len(await frames(server, task, types=" , ")) == 4


async def test_a_gap_passes_every_filter(store: Store, server: Served) -> None:
    task = await ended(store)
    assert names(await frames(server, task, types="LLM_OUTPUT", last_event_id="99")) == ["gap", "done"]


# Refusals


async def test_an_unknown_task_is_404_at_once(server: Served) -> None:
    for path in ("/api/v1/stream/sse?workflow_id=task_none", "/api/v1/tasks/task_none/stream"):
        for answer in (
            await server.client.get(path),
            await server.client.head(path),
            await server.client.get(path, headers={"Last-Event-ID": "1-1.end"}),
        ):
            assert answer.status_code == 404
        assert (await server.client.get(path)).json() == {"error": "Task not found"}


async def test_a_bad_id_is_400(server: Served) -> None:
    for query in (
        "?workflow_id=",
        "?workflow_id=,",
        "?workflow_id=a%20b",
        "?workflow_id=" + "x" * 129,
        "?workflow_id=a/b",
    ):
        answer = await server.client.get(f"/api/v1/stream/sse{query}")
        assert (answer.status_code, answer.json()) == (400, {"error": "Invalid or missing workflow_id"})
    assert (await server.client.get("/api/v1/tasks/a%20b/stream")).status_code == 400


async def test_head_never_subscribes(store: Store, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    task = await submit(store)

    def never(*_: Any) -> None:
        raise AssertionError("HEAD subscribed")

    monkeypatch.setattr(store.hub, "open", never)
    for path in (f"/api/v1/stream/sse?workflow_id={task}", f"/api/v1/tasks/{task}/stream"):
        answer = await server.client.head(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"


# What cannot begin or go on


async def turned_away(server: Served, path: str) -> None:
    """200, `retry:`, and an abort: neither an end, nor a status on which an EventSource gives up."""
    async with server.client.stream("GET", path, headers={"Accept": "text/event-stream"}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        body = b""
        with pytest.raises(httpx.RemoteProtocolError):
            async for chunk in answer.aiter_raw():
                body += chunk
        assert body.startswith(b"retry: ")


async def test_a_stream_that_comes_while_the_server_stops_is_told_to_come_back(store: Store, server: Served) -> None:
    task = await submit(store)
    streams_of(server).closing = True
    await turned_away(server, f"/api/v1/tasks/{task}/stream")
    assert (await server.client.get("/readiness")).status_code == 503


async def test_a_stream_too_many_is_told_to_come_back(store: Store, server: Served) -> None:
    task = await submit(store)
    streams_of(server).streams_max = 1
    async with server.stream(task) as source:
        await anext(source.aiter_sse())
        await turned_away(server, f"/api/v1/tasks/{task}/stream")


async def test_a_stream_without_a_store_is_told_to_come_back(
    store: Store, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await submit(store)

    async def unknown(*_: Any) -> None:
        raise Unavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(store.hub, "open", unknown)
        await turned_away(server, f"/api/v1/tasks/{task}/stream")
    with monkeypatch.context() as patch:
        patch.setattr(store, "get", unknown)
        await turned_away(server, f"/api/v1/tasks/{task}/stream?last_event_id=1-1.end")
    with monkeypatch.context() as patch:
        patch.setattr(server.server.config.app.state.identities, "of", unknown)  # type: ignore[union-attr]
        await turned_away(server, f"/api/v1/tasks/{task}/stream")


@production
async def test_a_stopping_server_sends_readers_to_another_and_nothing_is_lost(store: Store, settings: Settings) -> None:
    task, attempt = await started(store)
    await attempt.write("a")
    body = b""
    async with AsyncExitStack() as stack, httpx.AsyncClient(headers=KEY) as client:
        first = await stack.enter_async_context(served(store, settings))
        answer = await stack.enter_async_context(client.stream("GET", f"{first.url}/api/v1/tasks/{task}/stream"))
        chunks = answer.aiter_raw()
        while body.count(b"id: ") < 3:
            body += await anext(chunks)
        idle = httpx.AsyncClient()
        await stack.enter_async_context(idle)
        await idle.get(f"{first.url}/health")  # keeps its connection
        first.server.stop()
        with pytest.raises(httpx.RemoteProtocolError):
            async for chunk in chunks:
                body += chunk
        await wait_until(lambda: not first.server.server_state.connections, "idle connections are closed too")
    assert 2000 <= int(body.rpartition(b"retry: ")[2]) <= 5000
    assert b"[DONE]" not in body
    cursor = body.rpartition(b"id: ")[2].split()[0].decode()
    await attempt.write("b")
    await attempt.complete()
    async with served(store, settings) as second:
        assert seqs(await frames(second, task, header=cursor)) == [4, 5]


@production
async def test_an_abort_leaves_the_chunked_body_unfinished(store: Store, settings: Settings) -> None:
    task = await submit(store)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(store, settings))
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            f"GET /api/v1/tasks/{task}/stream?token={DEVELOPMENT_KEY} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        )
        await reader.readuntil(b"DATA_PROCESSING")
        server.server.stop()
        rest = await reader.read()
        assert b"retry: " in rest
        assert not rest.endswith(b"0\r\n\r\n")
        writer.close()


# Slow readers


@production
@pytest.mark.parametrize(("bound", "size"), [(16 * 1024, 15_000), (128 * 1024, 60_000)])
async def test_a_reader_that_takes_nothing_is_cut_off_holds_little_and_loses_nothing(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, bound: int, size: int
) -> None:
    monkeypatch.setattr(streams_, "STALLED_SECONDS", 1.0)
    count = 6_000_000 // size
    task, attempt = await started(store)
    async with served(store, settings, stream_backlog_bytes=bound) as server:
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", server.port))
            slow.sendall(
                f"GET /api/v1/tasks/{task}/stream?token={DEVELOPMENT_KEY} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
            )
            async with server.stream(task) as source:  # beside it, a reader that reads
                stream = source.aiter_sse()
                await anext(stream)
                await wait_until(lambda: len(streams_of(server).open) == 2, "both follow")
                held, read = 0, 0
                for _ in range(count):
                    await attempt.say(events.Noted(name="BIG", payload={"x": "y" * size}))
                    read += bool(await anext(stream))
                    for connection in server.server.server_state.connections:
                        held = max(held, connection.transport.get_write_buffer_size())
                await attempt.complete()
                assert read + len([frame async for frame in stream]) == count + 3
            await wait_until(lambda: not streams_of(server).open, "the slow reader is cut off")
            assert held < bound + size + 1000  # one frame more
            slow.settimeout(5)
            body = b""
            try:
                while chunk := slow.recv(65536):
                    body += chunk
            except ConnectionResetError:
                pass
        assert not body.endswith(b"0\r\n\r\n")
        whole = [block for block in body.replace(b"\r\n", b"\n").split(b"\n\n") if b"\ndata: " in block]
        got = [json.loads(block.partition(b"\ndata: ")[2])["seq"] for block in whole[:-1]]  # the last may be torn
        last = whole[-2].partition(b"id: ")[2].split()[0].decode()
        assert got + seqs(await frames(server, task, header=last)) == [*range(1, count + 4)]


# Many readers


@production
async def test_a_worker_can_end_a_task_while_many_read_it(store: Store, server: Served) -> None:
    task = await submit(store)
    readings = [asyncio.create_task(frames(server, task)) for _ in range(50)]
    await wait_until(lambda: store.hub.subscribers == 50, "all follow")
    (claimed,) = await store.claim(["default"], "w1", 1)
    attempt = Attempt(store, task, claimed.fence)
    for i in range(20):
        await attempt.write(str(i))
    await attempt.complete()
    for reading in readings:
        assert seqs(await reading) == [*range(1, 24)]
