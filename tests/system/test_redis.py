"""A Redis of one's own, as `--redis` and TASKCAST_REDIS_URL name it: the one on PATH, which is 7.0 in Debian 12, the oldest
that is served; over TLS, and for a user who has no more rights than README says.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import trustme
from httpx_sse import aconnect_sse

from app.errors import Unavailable
from app.line import Line, client
from tests.system.conftest import ROOT, Process, Server, Worker, ended, held_port, history, lifetime, submit, taskcast
from tests.system.examples import needs
from tests.waiting import wait_until

pytestmark = needs("redis-server")

(USERS,) = re.findall(r"^```\n(user .*?)```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
"""README's."""


class Redis(Process):
    """On a port that it keeps when it starts again."""

    def __init__(self, folder: Path, port: int, *first: str) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "authority.pem"))
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(folder / "redis.pem"))
        self.port = port
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
        self.listens(self.port)

    def url(self, *, password: str = "secret", trusted: bool = True) -> str:
        query = f"?ssl_ca_certs={self.authority}" if trusted else ""
        return f"rediss://taskcast:{password}@127.0.0.1:{self.port}/0{query}"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    with held_port() as port:
        yield from lifetime(Redis(tmp_path, port))


@pytest.fixture
def redis_worker(tmp_path: Path, redis: Redis) -> Iterator[Worker]:
    yield from lifetime(Worker("redis-worker", tmp_path, TASKCAST_REDIS_URL=redis.url()))


@pytest.fixture
def redis_server(tmp_path: Path, redis: Redis, redis_worker: Worker) -> Iterator[Server]:
    yield from lifetime(Server("redis-server", tmp_path, TASKCAST_REDIS_URL=redis.url()))


@pytest.fixture
async def http(redis: Redis, redis_server: Server) -> AsyncIterator[httpx.AsyncClient]:
    made = await taskcast("keys", "create", "--redis", redis.url())
    assert made.returncode == 0, made.stderr
    headers = {"X-API-Key": made.stdout.strip()}
    async with httpx.AsyncClient(base_url=redis_server.url, headers=headers, timeout=30) as client:
        yield client


async def heard(http: httpx.AsyncClient, task: str, told: list[str]) -> None:
    """Adds the ids of what is streamed, over as many connections as it takes, until the stream says that it is done."""
    while True:
        with suppress(httpx.TransportError):
            headers = {"Last-Event-ID": told[-1]} if told else {}
            async with aconnect_sse(http, "GET", f"/api/v1/tasks/{task}/stream", headers=headers) as source:
                assert source.response.status_code == 200
                async for frame in source.aiter_sse():
                    if frame.event == "done":
                        return
                    if frame.id not in told[-1:]:  # else it says more of the same entry
                        told.append(frame.id)


async def test_the_main_job_goes_on_over_a_restart(redis: Redis, redis_server: Server, http: httpx.AsyncClient) -> None:
    short = await submit(http, "one two three")
    long = await submit(http, "x " * 1000, context={"echo": {"steps": 1000, "delay_ms": 50}})
    told: list[str] = []
    reading = asyncio.create_task(heard(http, long, told))
    await wait_until(lambda: len(told) > 10, "ten events are streamed")
    await asyncio.to_thread(redis.stop)
    before = len(told)
    await asyncio.to_thread(redis.start)
    await wait_until(lambda: len(told) > before + 10, "ten more are streamed")
    assert (await http.post(f"/api/v1/tasks/{long}/cancel")).status_code == 202
    await reading
    assert told == [event["stream_id"] for event in await history(http, long)]
    await wait_until(lambda: ended(http, short), "the short one has ended")
    listed = (await http.get("/api/v1/tasks")).json()["tasks"]
    assert {task["task_id"]: task["status"] for task in listed} == {
        long: "TASK_STATUS_CANCELLED",
        short: "TASK_STATUS_COMPLETED",
    }

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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["{folder}/sentinel.conf", "--sentinel"],
            "The URL names a Sentinel; Taskcast needs that of the Redis which it watches.",
        ),
        (
            ["--cluster-enabled", "yes", "--cluster-port", "{free}"],
            "The store is a Redis Cluster; Taskcast needs one Redis that has all keys.",
        ),
    ],
    ids=["sentinel", "cluster"],
)
async def test_what_is_not_one_redis_is_no_store(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "sentinel.conf").touch()
    with held_port() as port, held_port() as free:
        for redis in lifetime(Redis(tmp_path, port, *(word.format(folder=tmp_path, free=free) for word in words))):
            ran = await taskcast("keys", "list", "--redis", redis.url())
            assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", f"{said}\n")
