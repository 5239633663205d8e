"""`kill -9` of writers and of Valkey, at random, under load: nothing acknowledged is lost, nothing is torn."""

import asyncio
import contextlib
import os
import random
import signal
import sys
from functools import partial
from pathlib import Path

import msgspec
import pytest

from app import events
from app.settings import Settings
from app.store import Store, open_store
from app.task import TERMINAL
from tests.store.test_fold import dump
from tests.store.writer import Ack
from tests.waiting import wait_until

ROUNDS = 12


async def start(folder: Path, name: str) -> asyncio.subprocess.Process:
    with (folder / "writers.log").open("a") as log:
        command = (sys.executable, "-m", "tests.store.writer", str(folder), name)
        return await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)


def stop(writer: asyncio.subprocess.Process) -> None:
    if writer.returncode is None:
        writer.kill()


def acks(folder: Path) -> list[Ack]:
    lines = [line for file in folder.glob("*.acks") for line in file.read_bytes().split(b"\n")]
    # A kill may cut the last line of a file: that promise was never spoken out.
    found = []
    for line in lines:
        with contextlib.suppress(msgspec.DecodeError):
            found.append(msgspec.json.decode(line, type=Ack))
    return found


def acknowledged(folder: Path, count: int) -> bool:
    return len(acks(folder)) > count


@pytest.mark.timeout(180)
async def test_nothing_acknowledged_is_lost_when_writers_and_valkey_are_killed(tmp_path: Path) -> None:
    names = (f"w{number}" for number in range(1000))
    pid_file = tmp_path / "data" / "valkey.pid"
    async with contextlib.AsyncExitStack() as stack:
        writers = [await start(tmp_path, next(names)) for _ in range(3)]
        for writer in writers:
            stack.callback(stop, writer)
        victims = ["valkey", "writer"] * (ROUNDS // 2)
        random.shuffle(victims)
        for kind in victims:
            goal = len(acks(tmp_path)) + random.randint(50, 400)
            await wait_until(partial(acknowledged, tmp_path, goal), "writers make progress", seconds_max=60)
            if kind == "valkey":
                os.kill(int(pid_file.read_text()), signal.SIGKILL)
            else:
                victim = writers.pop(random.randrange(len(writers)))
                victim.kill()
                await victim.wait()
                writers.append(await start(tmp_path, next(names)))
                stack.callback(stop, writers[-1])
        for writer in writers:
            writer.kill()
            await writer.wait()
    async with open_store(Settings(data=tmp_path / "data", lease_seconds=1, fsync="always")) as store:
        await check(store, acks(tmp_path))


async def check(store: Store, promised: list[Ack]) -> None:
    assert [difference async for difference in store.snapshots.verify()] == []
    logs: dict[str, dict[int, str]] = {}
    ended = 0
    async for org, id_ in store.snapshots._tasks(store.partitions.tags[0]):
        page = await store.events(org, id_, "")
        task = await store.get(org, id_)
        assert page is not None
        assert task is not None
        assert [entry.seq for entry in page.entries] == list(range(1, page.last_seq + 1)), "a hole"
        logs[id_] = {entry.seq: events.encode(entry.event).decode() for entry in page.entries}
        finals = [entry for entry in page.entries if isinstance(entry.event, events.Completed)]
        assert len(finals) == (task.status in TERMINAL), "a task ends once"
        ended += len(finals)
    for ack in promised:
        assert ack.task in logs, f"an acknowledged task is missing: {ack}"
        said = logs[ack.task].get(ack.seq)
        assert said is not None, f"an acknowledged event is missing: {ack}"
        if ack.seq > 1:
            assert said == ack.said
    assert len(promised) > 50 * ROUNDS
    assert ended > 0
    before = await dump(store)
    await store.snapshots.rebuild()
    assert await dump(store) == before
