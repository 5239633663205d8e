"""One server per data folder, however many processes come, go and die."""

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from app import embedded
from app.embedded import Embedded, EmbeddedError, _Answer, server_binary
from tests.waiting import wait_until

# A user in a process of its own: says the URL when it is in, leaves when its input ends.
USER = """
import asyncio, sys
from pathlib import Path
from app.embedded import Embedded

async def main():
    async with Embedded(Path(sys.argv[1])) as server:
        sys.stderr.write(server.url + "\\n")
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


@asynccontextmanager
async def user(folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        USER,
        str(folder),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        assert await process.wait() in {0, -signal.SIGKILL}


async def entered(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    line = (await process.stderr.readline()).decode().strip()
    assert line.startswith("unix://"), line + (await process.stderr.read()).decode()
    return line


async def server_pid(url: str) -> int:
    async with Redis.from_url(url) as redis:
        return int((await redis.info("server"))["process_id"])


def lives(pid: int) -> bool:
    """False for a zombie too: its memory and its locks are gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def answered_by_another(url: str, pid: int) -> bool:
    try:
        return await server_pid(url) != pid
    except RedisConnectionError:
        return False


async def test_the_folder_is_made_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet?"
    async with Embedded(folder) as server, Redis.from_url(server.url) as redis:
        assert await redis.ping()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (await redis.config_get("maxmemory-policy")) == {"maxmemory-policy": "noeviction"}


async def test_eight_processes_that_race_share_one_server(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        users = [await stack.enter_async_context(user(tmp_path)) for _ in range(8)]
        urls = await asyncio.gather(*map(entered, users))
        assert len(set(urls)) == 1
        assert len(set(await asyncio.gather(*map(server_pid, urls)))) == 1
        pid = await server_pid(urls[0])
    assert (tmp_path / "valkey.log").read_text().lower().count("ready to accept connections") == 1
    assert not lives(pid)


async def test_users_that_come_and_go_at_the_same_time_always_find_a_server(tmp_path: Path) -> None:
    async def come_and_go() -> None:
        for _ in range(10):
            async with Embedded(tmp_path) as server, Redis.from_url(server.url) as redis:
                await redis.incr("visits")

    await asyncio.gather(*(come_and_go() for _ in range(5)))
    async with Embedded(tmp_path) as server, Redis.from_url(server.url) as redis:
        assert await redis.get("visits") == b"50"


async def test_data_survives_the_kill_of_the_server_and_its_user_starts_it_again(tmp_path: Path) -> None:
    async with Embedded(tmp_path) as server:
        async with Redis.from_url(server.url) as redis:
            await redis.set("kept", "yes")
        pid = await server_pid(server.url)
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: answered_by_another(server.url, pid), "a new server answers")
        async with Redis.from_url(server.url) as redis:
            assert await redis.get("kept") == b"yes"


async def test_a_server_that_is_shut_down_by_hand_is_started_again(tmp_path: Path) -> None:
    async with Embedded(tmp_path) as server:
        pid = await server_pid(server.url)
        async with Redis.from_url(server.url) as redis:
            await redis.shutdown()
        await wait_until(lambda: answered_by_another(server.url, pid), "a new server answers")


async def test_the_server_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    async with user(tmp_path) as first:
        url = await entered(first)
        pid = await server_pid(url)
        async with Embedded(tmp_path) as server:
            first.kill()
            await first.wait()
            assert await server_pid(server.url) == pid
        assert not lives(pid)


async def test_another_user_starts_the_server_again_when_both_it_and_its_starter_are_killed(tmp_path: Path) -> None:
    async with user(tmp_path) as first:
        pid = await server_pid(await entered(first))
        async with Embedded(tmp_path) as server:
            first.kill()
            os.kill(pid, signal.SIGKILL)
            await wait_until(lambda: answered_by_another(server.url, pid), "a new server answers")


async def test_only_the_last_user_out_stops_the_server(tmp_path: Path) -> None:
    async with Embedded(tmp_path) as first:
        pid = await server_pid(first.url)
        async with Embedded(tmp_path) as second:
            assert await server_pid(second.url) == pid
        assert lives(pid)
    assert not lives(pid)
    assert not (tmp_path / "valkey.sock").exists()


async def test_a_killed_user_does_not_keep_the_server_alive(tmp_path: Path) -> None:
    async with Embedded(tmp_path) as server, user(tmp_path) as other:
        await entered(other)
        pid = await server_pid(server.url)
        other.kill()
        await other.wait()
    assert not lives(pid)


async def test_a_stale_socket_and_pid_file_are_no_server(tmp_path: Path) -> None:
    async with user(tmp_path) as first:
        pid = await server_pid(await entered(first))
        first.kill()
        await first.wait()
    os.kill(pid, signal.SIGKILL)
    await wait_until(lambda: not lives(pid), "the server is dead")
    assert (tmp_path / "valkey.sock").exists()
    (tmp_path / "valkey.pid").write_text(str(os.getpid()))
    async with Embedded(tmp_path) as server:
        assert await server_pid(server.url) != pid


async def test_a_living_server_whose_socket_is_gone_is_never_joined_by_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "START_SECONDS_MAX", 0.2)
    async with Embedded(tmp_path) as server:
        pid = await server_pid(server.url)
        (tmp_path / "valkey.sock").unlink()
        with pytest.raises(EmbeddedError, match=r"holds .* but does not answer"):
            await server.ensure()
        os.kill(pid, signal.SIGTERM)  # what the operator does then
        await wait_until(lambda: answered_by_another(server.url, pid), "a new server answers")


async def test_a_user_waits_while_the_server_replays_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: set[_Answer] = set()
    ping = Embedded._ping

    async def remembering_ping() -> _Answer:
        answers.add(answer := await ping(server))
        return answer

    async with Embedded(tmp_path) as server, Redis.from_url(server.url) as redis:
        for start in range(0, 100_000, 10_000):
            async with redis.pipeline(transaction=False) as pipe:
                for number in range(start, start + 10_000):
                    pipe.xadd("log", {"n": number})
                await pipe.execute()
        pid = await server_pid(server.url)
        os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: not lives(pid), "the server is dead")
        monkeypatch.setattr(server, "_ping", remembering_ping)
        await server.ensure()
        assert _Answer.LOADING in answers
        assert await redis.xlen("log") == 100_000


async def test_fsync_always_holds_for_a_server_that_another_user_started(tmp_path: Path) -> None:
    async with Embedded(tmp_path), Embedded(tmp_path, fsync="always") as strict, Redis.from_url(strict.url) as redis:
        assert await redis.config_get("appendfsync") == {"appendfsync": "always"}


async def test_a_long_path_gets_a_short_private_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    async with Embedded(folder) as server, Redis.from_url(server.url) as redis:
        socket = Path(server.url.removeprefix("unix://"))
        assert await redis.ping()
        assert len(str(socket)) < 100
        assert socket.parent.stat().st_mode & 0o777 == 0o700
    assert not socket.parent.exists()


async def test_a_socket_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    server = Embedded(tmp_path / ("long" * 30))
    socket = Path(server.url.removeprefix("unix://"))
    socket.parent.mkdir()
    socket.parent.chmod(0o755)
    try:
        with pytest.raises(EmbeddedError, match="not a private folder"):
            await server.__aenter__()
    finally:
        socket.parent.rmdir()


async def test_without_a_binary_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TASKCAST_SERVER_BINARY", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EmbeddedError, match=r"There is no Valkey server here.*--redis URL"):
        await Embedded(tmp_path / "data").__aenter__()


async def test_a_server_that_cannot_start_is_an_error_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "broken-server"
    binary.write_text("#!/bin/sh\necho 'the disk is on fire'\nexit 1\n")
    binary.chmod(0o700)
    monkeypatch.setenv("TASKCAST_SERVER_BINARY", str(binary))
    with pytest.raises(EmbeddedError, match=r"did not start.*\n.*the disk is on fire"):
        await Embedded(tmp_path / "data").__aenter__()


def test_the_named_binary_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TASKCAST_SERVER_BINARY", raising=False)
    assert server_binary().name == "valkey-server"
    monkeypatch.setenv("TASKCAST_SERVER_BINARY", "redis-is-not-here")
    with pytest.raises(EmbeddedError, match="not a program"):
        server_binary()
    monkeypatch.setenv("TASKCAST_SERVER_BINARY", "sh")
    assert server_binary().name == "sh"


async def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedError, match="cannot be used"):
        await Embedded(tmp_path / "file" / "data").__aenter__()


async def test_a_user_that_leaves_while_the_server_starts_leaves_no_server(tmp_path: Path) -> None:
    server = Embedded(tmp_path)
    entering = asyncio.create_task(server.__aenter__())
    await wait_until((tmp_path / "valkey.log").exists, "the server is being started")
    entering.cancel()
    with suppress(asyncio.CancelledError):
        await entering
    held = os.open(tmp_path / "server", os.O_RDWR)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a server that lived would hold it
    finally:
        os.close(held)
