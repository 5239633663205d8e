"""The real thing, as processes: an API and a worker on one data folder, and a proxy that cuts connections.

Each process is ended by its own pid; what it wrote stands in the report of a test that failed.
"""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from app.settings import Settings
from app.store import Store, open_store
from tests.system.examples import Desk

KEY = "sk_test_123456"
ROOT = Path(__file__).parents[2]
TASKCAST = str(Path(sys.executable).with_name("taskcast"))
TERMINAL = {f"TASK_STATUS_{word}" for word in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")}
LOG_LINES = 40
"""Of each process, in a report."""

logs: dict[str, Path] = {}
"""Of every process so far, by its name."""


class Process:
    """A child in a session of its own, that can be started again. What it writes goes to a log file."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, **environment: str) -> None:
        self.command, self.log = command, folder / f"{name}.log"
        foreign = {name: value for name, value in os.environ.items() if not name.startswith("TASKCAST_")}
        self.environment = {**foreign, "TASKCAST_DATA": str(folder / "data"), **environment}
        self.running: subprocess.Popen[str] | None = None
        logs[name] = self.log

    def start(self) -> None:
        with self.log.open("a") as log:
            self.running = self._spawn(stdout=log, stderr=log)

    def _spawn(self, **streams: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=self.environment,
            text=True,
            start_new_session=True,
            **{"stdin": subprocess.DEVNULL, **streams},
        )

    def kill(self) -> None:
        """-9."""
        self._end(signal.SIGKILL)

    def listens(self, port: int) -> None:
        """Returns when it does."""
        assert self.running
        while True:
            with socket.socket() as tried:
                if not tried.connect_ex(("127.0.0.1", port)):
                    return
            assert self.running.poll() is None, tail(self.log)
            time.sleep(0.01)

    def stop(self) -> None:
        """In good order."""
        code = self._end(signal.SIGTERM)
        assert code == 0, f"{self.log.stem} ended with {code}: {tail(self.log)}"

    def _end(self, number: signal.Signals) -> int:
        assert self.running
        with self.running as running:  # closes its pipe, and waits
            running.send_signal(number)
            return running.wait()


class Server(Process):
    """`taskcast serve`, without its own worker, on a free port."""

    def __init__(self, name: str, folder: Path, **environment: str) -> None:
        super().__init__(name, [TASKCAST, "serve", "--no-worker", "--port", "0"], folder, **environment)
        self.url = ""

    def start(self) -> None:
        """Returns when it takes requests."""
        with self.log.open("a") as log:
            self.running = self._spawn(stdout=subprocess.PIPE, stderr=log)
        assert self.running.stdout
        for line in self.running.stdout:
            if found := re.search(r"http://127\.0\.0\.1:[0-9]+", line):
                self.url = found[0]
                return
        raise AssertionError(f"the server did not start: {tail(self.log)}")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


class Api(Process):
    """One API process, as `taskcast serve` starts it, on a port that it keeps when it starts again."""

    def __init__(self, name: str, folder: Path, **environment: str) -> None:
        super().__init__(name, [], folder, **environment)
        self.port = 0

    def start(self) -> None:
        """Returns when it takes requests."""
        with self.log.open("a") as log, socket.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(("127.0.0.1", self.port))
            listening.listen(1024)
            self.port = listening.getsockname()[1]
            descriptor = listening.fileno()
            self.command = [TASKCAST, "api", "--socket", str(descriptor)]
            self.running = self._spawn(stdout=log, stderr=log, pass_fds=(descriptor,))
        # Until it does, the request waits in the socket's queue.
        assert httpx.get(f"{self.url}/health", timeout=30).status_code == 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Worker(Process):
    """`taskcast worker`."""

    def __init__(self, name: str, folder: Path, module: str = "workers.echo", **environment: str) -> None:
        super().__init__(name, [TASKCAST, "worker", module], folder, **environment)


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A free one, for a process that sets SO_REUSEADDR: bound here, and not listening, it stays free for that."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


async def taskcast(*words: str) -> subprocess.CompletedProcess[str]:
    """A verb, run to its end."""
    return await asyncio.to_thread(subprocess.run, [TASKCAST, *words], capture_output=True, text=True, check=False)


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:]) if log.exists() else ""


P = TypeVar("P", bound=Process)


def lifetime(process: P) -> Iterator[P]:
    """For fixtures."""
    try:
        process.start()
        yield process
        process.stop()
    finally:
        if process.running and process.running.returncode is None:
            process.kill()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections += [(f"end of {path}", tail(path)) for path in logs.values() if path.exists()]
    return report


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("system")


@pytest.fixture(scope="session")
def worker(folder: Path) -> Iterator[Worker]:
    """One for all tests that do not end processes."""
    yield from lifetime(Worker("worker", folder))


@pytest.fixture(scope="session")
def server(folder: Path, worker: Worker) -> Iterator[Server]:
    """With the worker, for all tests that do not end processes."""
    yield from lifetime(Server("server", folder))


@pytest.fixture
def api(folder: Path, server: Server) -> Iterator[Api]:
    """Another one on the same data, for a test to stop, to kill and to start again."""
    yield from lifetime(Api("api", folder, TASKCAST_GRACE_SECONDS="2"))


@pytest.fixture
def desk(tmp_path: Path, server: Server) -> Desk:
    return Desk(tmp_path, server.port)


@pytest.fixture
async def shared(folder: Path, server: Server) -> AsyncIterator[Store]:
    """The server's own store, for a test that is a worker itself: on a queue that nobody else serves."""
    async with open_store(Settings(data=folder / "data")) as opened:
        yield opened


# What tests ask of an API.


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(server.url) as client:
        yield client


def client_of(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, headers={"X-API-Key": KEY}, timeout=30)


async def submit(http: httpx.AsyncClient, query: str, **body: Any) -> str:
    response = await http.post("/api/v1/tasks", json={"query": query, **body})
    assert response.status_code == 200, response.text
    id_: str = response.json()["task_id"]
    return id_


async def status(http: httpx.AsyncClient, id_: str) -> str:
    response = await http.get(f"/api/v1/tasks/{id_}")
    assert response.status_code == 200, response.text
    said: str = response.json()["status"]
    return said


async def ended(http: httpx.AsyncClient, id_: str) -> bool:
    return await status(http, id_) in TERMINAL


async def running(http: httpx.AsyncClient, id_: str) -> bool:
    return await status(http, id_) == "TASK_STATUS_RUNNING"


async def history(http: httpx.AsyncClient, id_: str) -> list[dict[str, Any]]:
    """The store's own log of the task, all of it, as the contract's raw events."""
    found: list[dict[str, Any]] = []
    while True:
        after = found[-1]["seq"] if found else 0
        response = await http.get(f"/api/v1/tasks/{id_}/events", params={"after": after, "limit": 200})
        assert response.status_code == 200, response.text
        body = response.json()
        assert "gap" not in body, body["gap"]
        if not body["events"]:
            return found
        found += body["events"]


# A network that fails.


class Proxy:
    """TCP in, TCP out. Cuts each connection with a stream after so many bytes of its answer, until the cuts run out."""

    def __init__(self, port: int, cuts: Sequence[int]) -> None:
        self._port, self._cuts = port, list(cuts)
        self.url = ""
        self.streams = 0
        """Streams asked for so far."""
        self.cut = 0
        """Connections cut so far."""
        self._writers: list[asyncio.StreamWriter] = []
        """Of both sides: one that nobody holds any more would be reported if it is open."""
        self._serving: set[asyncio.Task[None]] = set()
        self._closing = False

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """No coroutine: one that is cancelled before its first step would close nothing."""
        self._writers.append(writer)
        if self._closing:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def aclose(self) -> None:
        """Browsers keep connections open for later."""
        self._closing = True
        serving = [*self._serving]
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # asyncio reports a cancelled connection as an error (before 3.12).
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await self._through(reader, writer)
        writer.close()

    async def _through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connecting = asyncio.create_task(asyncio.open_connection("127.0.0.1", self._port))
        try:
            behind_reader, behind_writer = await asyncio.shield(connecting)
        except asyncio.CancelledError:
            self._writers.append((await connecting)[1])
            raise
        self._writers.append(behind_writer)
        line = Line(self, behind_writer)
        asking = asyncio.create_task(line.ask(reader))
        try:
            await line.answer(behind_reader, writer)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            behind_writer.transport.abort()

    def next_cut(self) -> int | None:
        self.streams += 1
        return self._cuts.pop(0) if self._cuts else None


class Line:
    """One connection through the proxy."""

    def __init__(self, owner: Proxy, behind: asyncio.StreamWriter) -> None:
        self._owner, self._behind = owner, behind
        self._left: int | None = None

    async def ask(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(65536):
            # Browsers use a connection again: each request may be the stream's.
            if b"/stream" in data.partition(b"\r\n")[0]:
                self._left = self._owner.next_cut()
            self._behind.write(data)
            await self._behind.drain()
        self._behind.transport.abort()  # the client left

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until its end, or until nothing is left of what it may carry."""
        while data := await reader.read(65536):
            if self._left is not None:
                data, self._left = data[: self._left], self._left - len(data)
            writer.write(data)
            await writer.drain()
            if self._left is not None and self._left <= 0:
                self._owner.cut += 1
                return


@asynccontextmanager
async def proxy(port: int, cuts: Sequence[int]) -> AsyncIterator[Proxy]:
    made = Proxy(port, cuts)
    listener = await asyncio.start_server(made.accept, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        listener.close()
        await made.aclose()
