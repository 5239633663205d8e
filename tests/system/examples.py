"""The examples of the seeds' documents, which stand in `seeds/` word for word, and where they are run."""

import asyncio
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

SEEDS = Path(__file__).parent / "seeds"
NODE_MODULES = Path(__file__).parent / "node" / "node_modules"
HOSTS = ("http://localhost:8080", "https://api.xpander.ai")
SECONDS_MAX = 50
"""For an example: it polls every two seconds, and Go compiles its library when it is run for the first time."""


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if not shutil.which(program)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


class Desk:
    """Where examples are run."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._port = folder, port

    async def run(self, *command: str, text: str, name: str) -> Outcome:
        """Runs the command with a file of that name, the text with this server's port in it."""
        text, count = re.subn("|".join(HOSTS), f"http://localhost:{self._port}", text)
        assert count
        file = self._folder / name
        file.write_text(text)
        process = await asyncio.create_subprocess_exec(
            *(str(file) if word == name else word for word in command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "NODE_PATH": str(NODE_MODULES), "PYTHONUTF8": "1"},
            cwd=self._folder,
        )
        try:
            async with asyncio.timeout(SECONDS_MAX):
                stdout, stderr = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return Outcome(process.returncode, stdout.decode(), stderr.decode())

    async def python(self, *texts: str) -> str:
        """What they print, one below the other; they must end well."""
        outcome = await self.run(sys.executable, "example.py", text="\n\n".join(texts), name="example.py")
        assert outcome.code == 0, outcome.stderr
        return outcome.stdout


def example(name: str, **ids: str) -> str:
    """Its text, with our tasks' ids in place of the document's."""
    text = (SEEDS / name).read_text()
    for old, new in ids.items():
        text, count = re.subn(rf"\b{old}\b", new, text)
        assert count == 1
    return text
