"""Frames as bytes, and the portable response, of any ASGI server: heartbeat, aborts, slow readers."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.types import Message

from app import frames as frames_
from app import streams as streams_
from app.errors import NotFound, Unavailable
from app.frames import Frame, encode
from app.settings import Settings
from app.sse import Pages, Portable
from app.streams import Aborted, Streams, Visitor
from tests.waiting import wait_until


def test_a_frame_is_id_event_data_and_a_blank_line() -> None:
    assert encode(Frame(event="E", data={"a": 1}, id="5-0")) == b'id: 5-0\nevent: E\ndata: {"a":1}\n\n'


def test_a_frame_without_an_id_leaves_the_readers_cursor_alone() -> None:
    assert encode(Frame(event="E", data={})) == b"event: E\ndata: {}\n\n"


def test_a_text_is_written_as_it_is() -> None:
    assert encode(Frame(event="done", data="[DONE]", id="5-0.end")) == b"id: 5-0.end\nevent: done\ndata: [DONE]\n\n"


def test_no_character_of_the_data_can_end_a_line() -> None:
    nasty = "\u0085\u2028\u2029\r\n\x0b\x0c\x1c\x00é😀"
    raw = encode(Frame(event="E", data={"text": nasty}))
    assert raw.isascii()
    lines = raw.decode().splitlines()  # splits where httpx does
    assert lines[0] == "event: E"
    assert json.loads(lines[1].removeprefix("data: ")) == {"text": nasty}
    assert lines[2:] == [""]


def test_retry_is_two_to_five_seconds_and_no_event() -> None:
    delays = {int(frames_.retry().removeprefix(b"retry: ")) for _ in range(200)}
    assert min(delays) >= 2000
    assert max(delays) <= 5000
    assert len(delays) > 50
    assert not frames_.retry().endswith(b"\n\n")


# The response, driven by hand


class Client:
    """Collects what a response sends."""

    def __init__(self, *, method: str = "GET") -> None:
        self.scope = {"type": "http", "method": method}
        self.gone = asyncio.Event()
        self.messages: list[Message] = []

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def ended(self) -> bool:
        """Cleanly, that is."""
        return bool(self.messages) and self.messages[-1].get("more_body") is False


@pytest.fixture
def streams(settings: Settings) -> Streams:
    return Streams(settings.model_copy(update={"heartbeat_seconds": 0.1}))


def pages_of(iterator: Callable[[], AsyncIterator[bytes]]) -> Pages:
    @asynccontextmanager
    async def pages() -> AsyncIterator[AsyncIterator[bytes]]:
        yield iterator()

    return pages


def refusing(error: Exception) -> Pages:
    @asynccontextmanager
    async def pages() -> AsyncIterator[AsyncIterator[bytes]]:
        raise error
        yield

    return pages


async def two() -> AsyncIterator[bytes]:
    yield b"one\n\n"
    yield b"two\n\n"


async def silence() -> AsyncIterator[bytes]:
    yield b"one\n\n"
    await asyncio.get_running_loop().create_future()


async def broken() -> AsyncIterator[bytes]:
    yield b"one\n\n"
    raise Unavailable("gone")


async def faulty() -> AsyncIterator[bytes]:
    yield b"one\n\n"
    raise ZeroDivisionError


async def respond(streams: Streams, pages: Pages, client: Client) -> None:
    await Portable(streams, pages, hello=b": hello\n\n")(client.scope, client.receive, client.send)


async def test_a_stream_is_its_greeting_and_its_pages_and_a_clean_end(streams: Streams) -> None:
    client = Client()
    await respond(streams, pages_of(two), client)
    assert client.body == b": hello\n\none\n\ntwo\n\n"
    assert client.ended
    assert not streams.open


async def test_silence_is_filled_with_a_comment_line_that_is_no_event(streams: Streams) -> None:
    client = Client()
    running = asyncio.create_task(respond(streams, pages_of(silence), client))
    await wait_until(lambda: client.body.count(b": ping\n") == 3, "three pings")
    client.gone.set()
    await running
    assert client.body.startswith(b": hello\n\none\n\n: ping\n: ping\n: ping\n")
    assert b": ping\n\n" not in client.body


async def test_what_a_request_deserves_is_raised_before_the_first_byte(streams: Streams) -> None:
    client = Client()
    with pytest.raises(NotFound):
        await respond(streams, refusing(NotFound("Task not found")), client)
    assert client.messages == []


async def test_a_store_that_is_away_is_a_stream_that_begins_later(streams: Streams) -> None:
    client = Client()
    with pytest.raises(Aborted):
        await respond(streams, refusing(Unavailable("gone")), client)
    assert client.messages[0]["status"] == 200
    assert client.body.startswith(b"retry: ")
    assert not client.ended


@pytest.mark.parametrize("pages", [broken, faulty])
async def test_a_stream_that_cannot_go_on_is_aborted_not_ended(
    streams: Streams, pages: Callable[[], AsyncIterator[bytes]]
) -> None:
    client = Client()
    with pytest.raises(Aborted):
        await respond(streams, pages_of(pages), client)
    assert client.body.startswith(b": hello\n\none\n\nretry: ")
    assert not client.ended


async def test_a_stream_beyond_the_bound_is_told_to_come_back(settings: Settings) -> None:
    streams = Streams(settings, streams_max=1)
    first = Client()
    running = asyncio.create_task(respond(streams, pages_of(silence), first))
    await wait_until(lambda: len(streams.open) == 1, "the first stream is open")
    second = Client()
    with pytest.raises(Aborted):
        await respond(streams, pages_of(two), second)
    assert second.messages[0]["status"] == 200
    assert second.body.startswith(b"retry: ")
    assert not second.ended
    first.gone.set()
    await running


async def test_a_drain_sends_every_stream_away_and_takes_no_new_one(streams: Streams) -> None:
    clients = [Client() for _ in range(250)]
    running = [asyncio.create_task(respond(streams, pages_of(silence), client)) for client in clients]
    await wait_until(lambda: all(b"one" in client.body for client in clients), "all read")
    await streams.drain(2)
    ends = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(end, Aborted) for end in ends)
    assert not streams.open
    for client in clients:
        assert b"retry: " in client.body
        assert not client.ended
    late = Client()
    with pytest.raises(Aborted):
        await respond(streams, pages_of(two), late)
    assert late.body.startswith(b"retry: ")


async def test_a_drain_cuts_off_who_does_not_leave(streams: Streams) -> None:
    said: list[str] = []
    with streams.holding(Visitor(lambda: said.append("aborted")), "k"):
        await streams.drain(0.05)
        await streams.drain(0.05)  # asked again, it is not confused
    assert said == ["aborted", "aborted"]


async def test_head_gets_the_headers_and_starts_nothing(streams: Streams) -> None:
    client = Client(method="HEAD")
    await respond(streams, pages_of(faulty), client)
    assert client.messages[0]["status"] == 200
    assert client.body == b""


# Slow readers


class Slow(Client):
    """Takes nothing while it is shut, as a transport whose buffer is full."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self.taking = asyncio.Event()

    async def send(self, message: Message) -> None:
        if not self.gone.is_set():
            waiting = [asyncio.ensure_future(one.wait()) for one in (self.taking, self.gone)]
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in waiting:
                    one.cancel()
        if self.taking.is_set():
            await super().send(message)


async def test_nothing_is_taken_from_the_store_while_a_reader_takes_nothing(streams: Streams) -> None:
    taken: list[int] = []

    async def many() -> AsyncIterator[bytes]:
        for i in range(1000):
            taken.append(i)
            yield b"x\n\n"

    client = Slow()
    running = asyncio.create_task(respond(streams, pages_of(many), client))
    await wait_until(lambda: len(streams.open) == 1, "the stream is open")
    await asyncio.sleep(0)
    assert len(taken) <= 1
    client.taking.set()
    await running
    assert len(taken) == 1000
    assert client.ended


async def test_a_reader_that_takes_nothing_for_long_is_aborted(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_, "STALLED_SECONDS", 0.05)
    with pytest.raises(Aborted):
        await respond(streams, pages_of(two), Slow())
    assert not streams.open
