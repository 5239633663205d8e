"""`scripts/chaos`, with small numbers: it cannot rot, and a promise that breaks under two blows need not wait for sixty."""

import asyncio
import sys
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "scripts" / "chaos"
SMALL = ("--tasks", "60", "--workers", "2", "--kills", "6", "--restarts", "1", "--seconds-max", "150")


@pytest.mark.skipif(sys.platform != "linux", reason="it looks at processes as Linux shows them")
@pytest.mark.timeout(180)
async def test_whoever_is_killed_or_stopped_no_promise_breaks() -> None:
    process = await asyncio.create_subprocess_exec(str(CHAOS), *SMALL, stdout=PIPE, stderr=STDOUT)
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:  # it ends what it started
            process.terminate()
            await process.wait()
    table = said.decode()
    assert process.returncode == 0, table
    assert "Nothing was lost" in table, table
