"""The servers that Taskcast is measured against, each as one process: `bench_peers.py NAME [URL] FD…`.

FD is a listening socket that it inherits, URL the store. Each is written as its library's own users would, with the fast event loop
and parser that Taskcast has too, and none does anything for the benchmark's sake.
"""

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, ClassVar

import redis
import uvicorn
import uvloop
from redis.asyncio import Redis
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

BLOCK_SECONDS = 5
READ_SECONDS = 10
"""redis-py's own limit is as long as the block: now and then a quiet client would die of it."""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n\r\n"
"""The body ends with the connection: no chunks to write."""


async def serve(app: Starlette, fd: str) -> None:
    config = uvicorn.Config(app, http="httptools", lifespan="off", log_level="warning", access_log=False)
    await uvicorn.Server(config).serve([socket.socket(fileno=int(fd))])


# sse-starlette: a queue per client; an event comes as the body of a POST.


async def sse_starlette(fd: str) -> None:
    clients: set[asyncio.Queue[str]] = set()

    async def stream(_: Request) -> Response:
        queue: asyncio.Queue[str] = asyncio.Queue()
        clients.add(queue)

        async def events() -> AsyncIterator[dict[str, str]]:
            try:
                while True:
                    yield {"event": "TICK", "data": await queue.get()}
            finally:
                clients.discard(queue)

        return EventSourceResponse(events(), sep="\n")

    async def publish(request: Request) -> Response:
        data = (await request.body()).decode()
        for queue in clients:
            queue.put_nowait(data)
        return Response(status_code=202)

    await serve(Starlette(routes=[Route("/stream", stream), Route("/publish", publish, methods=["POST"])]), fd)


# The practical limit in Python: a frame made once, and `transport.write`. Events come on another socket, one per line.


class Stream(asyncio.Protocol):
    writes: ClassVar[dict["Stream", Callable[[bytes], None]]] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, _: bytes) -> None:
        self.transport.write(HEAD)
        Stream.writes[self] = self.transport.write

    def connection_lost(self, _: Exception | None) -> None:
        Stream.writes.pop(self, None)


class Publish(asyncio.Protocol):
    rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            frame = b"event: TICK\ndata: %s\n\n" % line
            for write in Stream.writes.values():
                write(frame)


async def transport_write(fd: str, publish_fd: str) -> None:
    loop = asyncio.get_running_loop()
    await loop.create_server(Publish, sock=socket.socket(fileno=int(publish_fd)))
    server = await loop.create_server(Stream, sock=socket.socket(fileno=int(fd)), backlog=2048)
    await server.serve_forever()


def entries(answer: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Of an XREAD of one stream; none after a timeout."""
    found: list[tuple[bytes, dict[bytes, bytes]]] = answer[0][1] if answer else []
    return found


# A blocking XREAD, on a connection of its own, for each client. It asks for /<the key of a stream>.


async def xread(url: str, fd: str) -> None:
    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1][1:]
        writer.write(HEAD)
        last = b"0"
        async with Redis.from_url(url, protocol=2, max_connections=1, socket_timeout=READ_SECONDS) as store:
            while not writer.is_closing():
                for id_, fields in entries(await store.xread({key: last}, block=BLOCK_SECONDS * 1000)):
                    last = id_
                    writer.write(b"id: %s\nevent: TICK\ndata: %s\n\n" % (id_, fields[b"event"]))
                await writer.drain()

    server = await asyncio.start_server(stream, sock=socket.socket(fileno=int(fd)), backlog=2048)
    await server.serve_forever()


# The practical limit in Python of many tasks: one reader of Taskcast's own log, which passes each entry's event on as it
# stands there, to the client that asked for /<its task>. It knows no organisation, filter, cursor, hole or end.


class Follower(asyncio.Protocol):
    writes: ClassVar[dict[bytes, Callable[[bytes], None]]] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(HEAD)
        Follower.writes[data.split(b" ", 2)[1][1:]] = self.transport.write


async def bare_loop(url: str, log: str, fd: str) -> None:
    from app.connect import Door  # noqa: PLC0415 (as below)
    from app.tail import READ_PAUSE_SECONDS  # noqa: PLC0415

    loop = asyncio.get_running_loop()
    await loop.create_server(Follower, sock=socket.socket(fileno=int(fd)), backlog=2048)
    last = b"0"
    async with Door(url).blocking() as line:
        while True:
            read = ("XREAD", "COUNT", 500, "BLOCK", BLOCK_SECONDS * 1000, "STREAMS", log, last)
            answer = await line.ask(*read)
            found = answer[0][1] if answer else []
            came = loop.time()
            for last, (_, head, _, event) in found:
                if write := Follower.writes.get(head.split(b'"', 4)[3]):
                    write(b"id: %s\nevent: TICK\ndata: %s\n\n" % (last, event))
            await asyncio.sleep(max(0, came + READ_PAUSE_SECONDS - loop.time()))


# Taskcast's own application, by a server that lends streams no connection.


async def portable(fd: str) -> None:
    # Here, so that the other peers are without Taskcast's modules and memory.
    from app.identity import Identities  # noqa: PLC0415
    from app.server import create_app  # noqa: PLC0415
    from app.settings import Settings  # noqa: PLC0415
    from app.store import open_store  # noqa: PLC0415
    from app.streams import Streams  # noqa: PLC0415

    settings = Settings()
    async with open_store(settings) as store:
        app = create_app(store, settings, identities=Identities(store, settings), streams=Streams(settings))
        await serve(app, fd)


# No server: how long after an XADD a blocked XREAD has its entry, in ns, one line each; with the client that blocks
# its thread, which is the quickest, and with the one that a server of many streams would use.


async def wake(url: str) -> None:
    last = b"0"
    with redis.Redis.from_url(url, protocol=2, socket_timeout=READ_SECONDS) as store:
        while True:
            for id_, fields in entries(store.xread({"wake": last}, block=BLOCK_SECONDS * 1000)):
                print(time.monotonic_ns() - int(fields[b"at"]), flush=True)
                last = id_


async def wake_asyncio(url: str) -> None:
    last = b"0"
    async with Redis.from_url(url, protocol=2, socket_timeout=READ_SECONDS) as store:
        while True:
            for id_, fields in entries(await store.xread({"wake": last}, block=BLOCK_SECONDS * 1000)):
                print(time.monotonic_ns() - int(fields[b"at"]), flush=True)
                last = id_


PEERS: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
    "sse-starlette": sse_starlette,
    "transport.write": transport_write,
    "xread": xread,
    "bare-loop": bare_loop,
    "portable": portable,
    "wake": wake,
    "wake-asyncio": wake_asyncio,
}


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(PEERS[sys.argv[1]](*sys.argv[2:]))
