"""A worker that is told to stop before it has begun just stops."""

import asyncio
import fcntl
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


async def test_a_worker_that_is_stopped_while_its_store_opens_ends_well(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # somebody else is starting the server
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "app.cli", "worker", "workers.echo", "--data", str(tmp_path)),
            cwd=ROOT,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr
        assert b"new, empty store" in await process.stderr.readline()  # said just before the store is opened
        process.send_signal(signal.SIGTERM)
        rest = await process.stderr.read()
        assert (await process.wait(), rest) == (0, b"")
