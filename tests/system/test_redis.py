"""A Redis of one's own, as `--redis` and TASKCAST_REDIS_URL name it: the one on PATH, which is 7.0 in Debian 12, the oldest
that is served; over TLS, and for a user who has no more rights than README says.
"""

import asyncio
import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import trustme
from httpx_sse import aconnect_sse

from app.errors import Unavailable
from app.line import Line, client
from tests.system.conftest import ROOT, TASKCAST, Process, Server, Worker, ended, history, lifetime, running, submit
from tests.system.examples import needs
from tests.waiting import wait_until

pytestmark = needs("redis-server")

(USERS,) = re.findall(r"^```\n(user .*?)```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
"""README's."""


class Redis(Process):
    """On a port of its own, that it keeps when it starts again."""

    def __init__(self, folder: Path, *first: str) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "authority.pem"))
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(folder / "redis.pem"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        options = {
            "bind": "127.0.0.1",
            "port": "0",
            "tls-port": str(self.port),
            "tls-cert-file": str(folder / "redis.pem"),
            "tls-key-file": str(folder / "redis.pem"),
            "tls-ca-cert-file": str(folder / "authority.pem"),
            "tls-auth-clients": "no",
            "aclfile": str(folder / "users.acl"),
            "dir": str(folder),
            "appendonly": "yes",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        (folder / "users.acl").write_text(USERS)
        super().__init__("redis", ["redis-server", *first, *words], folder)
        self.authority = folder / "authority.pem"

    def start(self) -> None:
        """Returns when it listens."""
        super().start()
        while True:
            with socket.socket() as tried, suppress(ConnectionRefusedError):
                tried.connect(("127.0.0.1", self.port))
                return

    def url(self, *, password: str = "secret", trusted: bool = True) -> str:
        query = f"?ssl_ca_certs={self.authority}" if trusted else ""
        return f"rediss://taskcast:{password}@127.0.0.1:{self.port}/0{query}"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    yield from lifetime(Redis(tmp_path))


@pytest.fixture
def redis_worker(tmp_path: Path, redis: Redis) -> Iterator[Worker]:
    yield from lifetime(Worker("redis-worker", tmp_path, TASKCAST_REDIS_URL=redis.url()))


@pytest.fixture
def redis_server(tmp_path: Path, redis: Redis, redis_worker: Worker) -> Iterator[Server]:
    yield from lifetime(Server("redis-server", tmp_path, TASKCAST_REDIS_URL=redis.url()))


async def taskcast(*words: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(subprocess.run, [TASKCAST, *words], capture_output=True, text=True, check=False)


@pytest.fixture
async def http(redis: Redis, redis_server: Server) -> AsyncIterator[httpx.AsyncClient]:
    key = (await taskcast("keys", "create", "--redis", redis.url())).stdout.strip()
    async with httpx.AsyncClient(base_url=redis_server.url, headers={"X-API-Key": key}, timeout=30) as client:
        yield client


async def heard(http: httpx.AsyncClient, task: str, told: list[int]) -> None:
    """Adds the numbers of what is streamed, over as many connections as it takes, until the stream says that it is done."""
    cursor = ""
    while True:
        with suppress(httpx.TransportError):
            headers = {"Last-Event-ID": cursor} if cursor else {}
            async with aconnect_sse(http, "GET", f"/api/v1/tasks/{task}/stream", headers=headers) as source:
                async for frame in source.aiter_sse():
                    cursor = frame.id or cursor
                    if frame.event == "done":
                        return
                    told.append(json.loads(frame.data)["seq"])


async def test_the_main_job_goes_on_over_a_restart(redis: Redis, redis_server: Server, http: httpx.AsyncClient) -> None:
    context = {"echo": {"steps": 20, "delay_ms": 100}}
    long = await submit(http, " ".join(map(str, range(20))), context=context)
    told: list[int] = []
    reading = asyncio.create_task(heard(http, long, told))
    await wait_until(lambda: len(told) > 10, "ten events are streamed")
    await asyncio.to_thread(redis.stop)
    await asyncio.to_thread(redis.start)
    await reading
    assert told == [event["seq"] for event in await history(http, long)]

    stopped = await submit(http, "x", context=context)
    await wait_until(lambda: running(http, stopped), "it runs")
    assert (await http.post(f"/api/v1/tasks/{stopped}/cancel")).status_code == 202
    await wait_until(lambda: ended(http, stopped), "it is cancelled")
    assert {task["task_id"] for task in (await http.get("/api/v1/tasks")).json()["tasks"]} == {long, stopped}

    verified = await taskcast("verify", "--redis", redis.url())
    assert (verified.returncode, verified.stdout) == (0, "2 tasks checked: everything agrees with the log.\n")
    rebuilt = await taskcast("rebuild", "--yes", "--redis", redis.url())
    assert rebuilt.stdout == "2 tasks rebuilt from the log; running ones are queued again.\n"


async def test_it_is_said_who_is_refused(redis: Redis) -> None:
    ran = await taskcast("keys", "list", "--redis", redis.url(password="guessed"))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("The store refuses this user: ")
    assert "guessed" not in ran.stderr


async def test_a_server_whose_certificate_nobody_vouches_for_is_told_nothing(redis: Redis) -> None:
    with pytest.raises(Unavailable, match="certificate verify failed"):
        await Line(client(redis.url(trusted=False))).ask("PING")


async def test_a_sentinel_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "sentinel.conf").touch()
    for redis in lifetime(Redis(tmp_path, str(tmp_path / "sentinel.conf"), "--sentinel")):
        ran = await taskcast("keys", "list", "--redis", redis.url())
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr == "The URL names a Sentinel; Taskcast needs that of the Redis which it watches.\n"
