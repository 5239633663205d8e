"""Streams through real proxies: nginx as it comes, nginx that compresses, haproxy, and HTTP/2 in front of either.

Event k is at the client before event k + 1 is appended; silence ends nothing; and a server that dies, or is stopped,
is an error to its clients, never a clean end, so that they come back and lose nothing. The client is curl, which tells
a broken answer from a whole one by its exit code.
"""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from httpx_sse import ServerSentEvent
from httpx_sse._decoders import SSEDecoder
from websockets.asyncio.client import connect

from app.settings import Settings
from app.store import Store
from tests.api.serving import started
from tests.system.conftest import KEY, Api, Process, client_of, held_port, history, lifetime
from tests.waiting import wait_until

SSE = "/api/v1/stream/sse"
HEARTBEAT_SECONDS, PATIENCE_SECONDS, PINGS = 0.2, 2, 12
"""Of the API; of the proxies, with an answer in which nothing comes; and enough of them to outlast that."""
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin"
"""Debian keeps servers in a folder that is not in everybody's path."""
WHOLE, PARTIAL_FILE, HTTP2_STREAM = 0, 18, 92
"""curl's exit codes: as it should; a chunked body without its last chunk; an HTTP/2 stream that was reset."""


class Front(NamedTuple):
    name: str
    """Its first word is the program."""
    listen: str = ""
    more: str = ""
    """What else its users configure."""
    curl: str = "--http1.1"
    broken: Sequence[int] = (PARTIAL_FILE,)
    """How an answer ends whose server has gone."""
    encoding: str = ""
    port: int = 0


HTTP2 = "--http2-prior-knowledge"
FRONTS = (
    Front("nginx"),
    # It compresses in spite of `no-transform`, but flushes whatever must not be buffered.
    Front("nginx-gzip", more="gzip on; gzip_types *;", encoding="gzip"),
    Front("nginx-http2", "http2", curl=HTTP2, broken=(HTTP2_STREAM,)),
    Front("haproxy"),
    # `no-transform` stops this one. http-no-delay spares HTTP/1.1 clients the 200 ms for which the kernel keeps data
    # that haproxy announces more of.
    Front("haproxy-gzip", more="compression algo gzip\n  option http-no-delay"),
    # Its version 2.6 ends the stream cleanly whatever its server does (FIN, RST, a chunk that is none: tried), so
    # that only the missing `done` tells.
    Front("haproxy-http2", "proto h2", curl=HTTP2, broken=(HTTP2_STREAM, WHOLE)),
)


def nginx_config(fronts: Iterable[Front], behind: str) -> str:
    """One process in the foreground. For streams nothing but `proxy_pass`: what it buffers by default, it buffers."""
    upgrade = 'proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";'
    servers = "".join(
        f"""
  server {{
    listen 127.0.0.1:{front.port} {front.listen}; {front.more} proxy_read_timeout {PATIENCE_SECONDS}s;
    location / {{ proxy_pass http://{behind}; }}
    location = /api/v1/stream/ws {{ proxy_pass http://{behind}; proxy_read_timeout 60s; {upgrade} }}
  }}"""
        for front in fronts
    )
    folders = " ".join(f"{name}_temp_path {name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    return f"daemon off; master_process off; pid pid; events {{}} http {{ access_log off; {folders}{servers}\n}}\n"


def haproxy_config(fronts: Iterable[Front], behind: str) -> str:
    listeners = "".join(
        f"listen {front.name}\n  bind 127.0.0.1:{front.port} {front.listen}\n  {front.more}\n  server api {behind}\n"
        for front in fronts
    )
    timeouts = "".join(f"  timeout {of} {PATIENCE_SECONDS}s\n" for of in ("connect", "client", "server"))
    return f"defaults\n  mode http\n{timeouts}  timeout tunnel 60s\n{listeners}"


PROGRAMS = {
    "nginx": (nginx_config, ["nginx", "-e", "stderr", "-p", "{folder}/", "-c", "config"]),
    "haproxy": (haproxy_config, ["haproxy", "-db", "-f", "{folder}/config"]),
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    environment = {"TASKCAST_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS), "TASKCAST_GRACE_SECONDS": "2"}
    yield from lifetime(Api("proxied-api", tmp_path_factory.mktemp("proxied"), **environment))


def needed(program: str) -> Any:
    missing = ", ".join(name for name in (program, "curl") if not shutil.which(name, path=PATH))
    return pytest.param(program, marks=pytest.mark.skipif(bool(missing), reason=f"{missing} is not installed"))


@pytest.fixture(scope="module", params=[*map(needed, PROGRAMS)])
def fronts(request: pytest.FixtureRequest, api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Front]]:
    """All of one program, each on a port of its own, in one process in front of the API."""
    program, folder = request.param, tmp_path_factory.mktemp(request.param)
    spell, command = PROGRAMS[program]
    found = [front for front in FRONTS if front.name.partition("-")[0] == program]
    with ExitStack() as stack:
        for place, front in enumerate(found):
            found[place] = front._replace(port=stack.enter_context(held_port()))
        (folder / "config").write_text(spell(found, f"127.0.0.1:{api.port}"))
        process = Process(program, [word.format(folder=folder) for word in command], folder, PATH=PATH)
        process.start()
        stack.callback(process.kill)
        for front in found:
            process.listens(front.port)
        yield found


@pytest.fixture
def settings(api: Api) -> Settings:
    """The API's own store, for a writer whose lease outlasts a loaded machine."""
    return Settings(data=Path(api.environment["TASKCAST_DATA"]), lease_seconds=60)


class Curl:
    """One request, in a process of its own."""

    def __init__(self, front: Front, process: asyncio.subprocess.Process) -> None:
        self.front, self._process = front, process
        self.head: list[str] = []
        self.body: list[str] = []
        self.frames: list[ServerSentEvent] = []
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> int:
        assert self._process.stdout
        decoder, lines = SSEDecoder(), self.head
        async for raw in self._process.stdout:
            line = raw.decode().rstrip("\r\n")
            if lines is self.body and (frame := decoder.decode(line)):
                self.frames.append(frame)
            lines.append(line)
            if not line:
                lines = self.body
        return await self._process.wait()

    def header(self, name: str) -> str:
        return next((line.partition(": ")[2] for line in self.head if line.lower().startswith(f"{name}:")), "")

    @property
    def places(self) -> list[tuple[str, int]]:
        return [(frame.id, json.loads(frame.data)["seq"]) for frame in self.frames if frame.event != "done"]

    def sees(self, seq: int) -> bool:
        return bool(self.places) and self.places[-1][1] == seq

    def heard(self, line: str, times: int) -> bool:
        return self.body.count(line) >= times

    async def exit(self) -> int:
        return await asyncio.wait_for(asyncio.shield(self.reading), 20)


@asynccontextmanager
async def curl(front: Front, path: str, *options: str) -> AsyncIterator[Curl]:
    said = ("-sSNi", "--compressed", front.curl, "-H", f"X-API-Key: {KEY}", *options)
    url = f"http://127.0.0.1:{front.port}{path}"
    process = await asyncio.create_subprocess_exec("curl", *said, url, stdout=asyncio.subprocess.PIPE)
    made = Curl(front, process)
    try:
        yield made
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await made.reading


@asynccontextmanager
async def following(fronts: Iterable[Front], task: str, after: str = "") -> AsyncIterator[list[Curl]]:
    """A stream by each of them."""
    resume = ("-H", f"Last-Event-ID: {after}") if after else ()
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(curl(front, f"{SSE}?workflow_id={task}", *resume)) for front in fronts]


async def all_see(clients: Iterable[Curl], seq: int) -> None:
    for client in clients:
        await wait_until(partial(client.sees, seq), f"event {seq} arrives by {client.front.name}")


async def all_are_told_the_end(clients: Iterable[Curl]) -> None:
    for client in clients:
        assert await client.exit() == WHOLE, client.front.name
        assert client.frames[-1].event == "done"


async def expected(api: Api, task: str) -> list[tuple[str, int]]:
    async with client_of(api.url) as http:
        return [(event["stream_id"], event["seq"]) for event in await history(http, task)]


async def test_each_event_arrives_before_the_next_is_appended(fronts: list[Front], api: Api, store: Store) -> None:
    task, attempt = await started(store)
    async with following(fronts, task) as clients:
        await all_see(clients, 2)
        for seq in range(3, 8):
            await attempt.write(f"word {seq} ")
            await all_see(clients, seq)
        await attempt.complete()
        await all_are_told_the_end(clients)
    log = await expected(api, task)
    for client in clients:
        assert client.places == log
        assert client.header("content-encoding") == client.front.encoding


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_a_server_that_goes_is_no_clean_end(fronts: list[Front], api: Api, store: Store, end: str) -> None:
    task, attempt = await started(store)
    async with following(fronts, task) as cut:
        last = await attempt.write("before ")
        await all_see(cut, 3)
        try:
            await asyncio.to_thread(getattr(api, end))
            for client in cut:
                assert await client.exit() in client.front.broken, client.front.name
            await attempt.write("meanwhile ")
        finally:
            await asyncio.to_thread(api.start)
    async with following(fronts, task, last) as back:
        await all_see(back, 4)
        await attempt.write("after ")
        await all_see(back, 5)
        await attempt.complete()
        await all_are_told_the_end(back)
    log = await expected(api, task)
    for first, second in zip(cut, back, strict=True):
        assert all(frame.event != "done" for frame in first.frames)
        assert any(line.startswith("retry: ") for line in first.body)
        assert first.places + second.places == log


async def test_silence_is_not_an_end(fronts: list[Front], store: Store) -> None:
    task, attempt = await started(store)
    async with following(fronts, task) as clients:
        for client in clients:
            await wait_until(partial(client.heard, ": ping", PINGS), f"{client.front.name} lets silence through")
        await attempt.complete()
        await all_are_told_the_end(clients)


async def test_plain_answers_are_what_the_server_says(fronts: list[Front], store: Store) -> None:
    task, attempt = await started(store)
    for front in fronts:
        for path, status, sentence in (
            ("/api/v1/tasks/none", "404", "Task not found"),
            (f"{SSE}?workflow_id=none", "404", "Task not found"),
            (f"{SSE}?workflow_id=none&last_event_id=x", "400", "Invalid last_event_id"),
        ):
            async with curl(front, path) as get, curl(front, path, "--head") as head:
                assert (await get.exit(), await head.exit()) == (WHOLE, WHOLE)
            for answer in (get, head):
                assert answer.head[0].split()[1] == status
                assert answer.header("content-type") == "application/json"
            assert (json.loads("".join(get.body)), head.body) == ({"error": sentence}, [])
        async with curl(front, f"{SSE}?workflow_id={task}", "--head") as head:
            assert await head.exit() == WHOLE
        assert (head.header("content-type"), head.body) == ("text/event-stream", [])
    await attempt.complete()


async def test_a_websocket_is_told_each_event_and_closed_with_1000(fronts: list[Front], api: Api, store: Store) -> None:
    task, attempt = await started(store)
    url = f"ws://127.0.0.1:{fronts[0].port}/api/v1/stream/ws?workflow_id={task}&api_key={KEY}"
    async with connect(url, proxy=None) as websocket:
        heard = [json.loads(await websocket.recv()) for _ in range(2)]
        for seq in range(3, 8):
            await attempt.write(f"word {seq} ")
            heard.append(json.loads(await websocket.recv()))
        await attempt.complete()
        heard += [json.loads(text) async for text in websocket]  # fails unless it is closed in good order
    assert websocket.close_code == 1000
    assert heard.pop()["type"] == "STREAM_END"
    assert [(event["stream_id"], event["seq"]) for event in heard] == await expected(api, task)
