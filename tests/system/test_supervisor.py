"""The supervisor, with children that are as bad as children can be."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from app import supervisor as module
from app.supervisor import Child, GaveUp, supervisor
from tests.waiting import wait_until

STAY = "import signal, sys; print('ready: yes', flush=True); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + STAY.replace(
    "signal.pause()", "[signal.pause() for _ in iter(int, 1)]"
)

Make = Callable[..., Child]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A child from its program."""

    def made(name: str, program: str, *, ready: bool = False) -> Child:
        (tmp_path / f"{name}.py").write_text(program)
        return Child(
            name=name, module=name, environment={"PYTHONPATH": str(tmp_path)}, ready="ready: " if ready else ""
        )

    return made


async def test_a_child_that_ends_at_once_again_and_again_is_given_up(make: Make) -> None:
    said: list[str] = []
    with pytest.raises(GaveUp, match=r"^a ended with exit code 3, 3 times in a row, each time soon after its start\.$"):
        async with supervisor(said.append, grace_seconds=0) as kept:
            await kept.start(make("a", "raise SystemExit(3)"), make("b", STAY))
            await kept.over()
    assert sum("starts again" in line for line in said) == 2


async def test_a_child_that_says_that_another_start_cannot_help_gets_none(make: Make) -> None:
    said: list[str] = []
    with pytest.raises(GaveUp, match=r"^a cannot run; the reason stands above\.$"):
        async with supervisor(said.append, grace_seconds=0) as kept:
            await kept.start(make("a", "raise SystemExit(2)"))
            await kept.over()
    assert said == []


async def test_a_stage_starts_when_the_one_before_is_ready_and_ends_before_it(make: Make, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = (
        "import signal, sys\n"
        f"def end(*_): open({str(log)!r}, 'a').write(NAME + '\\n'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('chatter', flush=True); print('ready: ' + NAME, flush=True)\n"
        "while True: signal.pause()\n"
    )
    async with supervisor(print, grace_seconds=0) as kept:
        for name in ("a", "b"):
            assert await kept.start(make(name, f"NAME = {name!r}\n{program}", ready=True)) == [name]
            assert kept.pid(name)
        assert await kept.start() == []
        os.kill(os.getpid(), signal.SIGTERM)
        await kept.over()
    assert log.read_text() == "b\na\n"


async def test_a_child_that_ignores_the_end_is_killed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MARGIN_SECONDS", 0.2)
    said: list[str] = []
    async with supervisor(said.append, grace_seconds=0) as kept:
        await kept.start(make("a", STUBBORN, ready=True))
        pid = kept.pid("a")
        kept.stop()
        await kept.over()
    assert said == ["a did not stop within 0.2 s; it is killed."]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_asked_twice_it_ends_at_once(make: Make, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    program = STUBBORN.replace("signal.SIG_IGN", f"lambda *_: open({str(asked)!r}, 'w').close()")

    async def ask_again() -> None:
        await wait_until(asked.exists, "the child is asked to end, and does not")
        kept.stop()

    async with asyncio.timeout(30), supervisor(print, grace_seconds=60) as kept:
        await kept.start(make("a", program, ready=True))
        kept.stop()
        asking = asyncio.create_task(ask_again())
        await kept.over()
    await asking


async def test_an_error_of_its_own_caller_stops_the_children_too(make: Make) -> None:
    with pytest.raises(ZeroDivisionError):
        async with supervisor(print, grace_seconds=0) as kept:
            await kept.start(make("a", STAY, ready=True))
            pid = kept.pid("a")
            raise ZeroDivisionError
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_stop_during_the_start_is_heard(make: Make) -> None:
    async with asyncio.timeout(10), supervisor(print, grace_seconds=0) as kept:
        starting = asyncio.create_task(kept.start(make("a", "import time; time.sleep(60)", ready=True)))
        await wait_until(lambda: bool(kept.pid("a")), "the child is there")
        kept.stop()
        await starting


@pytest.mark.parametrize("tells", [True, False], ids=["with a pidfd", "without"])
async def test_a_child_hears_of_the_end_of_a_killed_supervisor_when_all_its_files_are_closed(
    make: Make, tmp_path: Path, *, tells: bool
) -> None:
    """A killed process closes its files one by one, and the pipe stands between the two locks."""
    lock, found = tmp_path / "lock", tmp_path / "found"
    if not tells:
        (tmp_path / "sitecustomize.py").write_text("import os\nvars(os).pop('pidfd_open', None)\n")
    child = make(
        "a",
        "import fcntl, os, signal\n"
        "def end(*_):\n"
        f"    one, other = (os.open({str(lock)!r} + name, os.O_RDWR) for name in '12')\n"
        "    said = 'free'\n"
        "    try: fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB); fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "    except BlockingIOError: said = 'held'\n"
        f"    open({str(found)!r} + '.new', 'w').write(said)\n"
        f"    os.rename({str(found)!r} + '.new', {str(found)!r}); os._exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('ready: yes', flush=True)\n"
        "while True: signal.pause()\n",
        ready=True,
    )
    program = (
        "import asyncio, fcntl, os, resource, signal\n"
        "from app.supervisor import Child, supervisor\n"
        "_, most = resource.getrlimit(resource.RLIMIT_NOFILE); most = min(most, 20_000)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))\n"
        "def lock(name):\n"
        f"    fcntl.flock(os.open({str(lock)!r} + name, os.O_RDWR | os.O_CREAT), fcntl.LOCK_SH)\n"
        "def many(): return [os.pipe() for _ in range((most - 100) // 4)]\n"
        "lock('1'); before = many()\n"
        "async def main():\n"
        "    async with supervisor(print, grace_seconds=30) as kept:\n"
        "        after = many(); lock('2')\n"
        f"        await kept.start(Child(name='a', module='a', environment={dict(child.environment)!r}, ready='ready: '))\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    dying = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    assert await dying.wait() == -signal.SIGKILL
    await wait_until(found.exists, "the child is told to end")
    assert found.read_text() in ({"free"} if tells and sys.platform == "linux" else {"free", "held"})
