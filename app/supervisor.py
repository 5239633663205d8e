"""What `taskcast serve` is made of: starts child processes, keeps them alive, stops them in good order.

A child runs as `python -P -m app.supervisor DESCRIPTOR PID SECONDS MODULE ARGUMENTS…`. The descriptor is the reading
end of a pipe whose other end only the supervisor holds: whatever ends the supervisor, `kill -9` included, ends that
pipe, and the child, when the process PID is gone, stops itself within those seconds. Each child has a session of its
own, so that Ctrl-C reaches the supervisor alone. It must never leave a child behind, and it knows nothing about tasks.
"""

import asyncio
import os
import runpy
import select
import signal
import sys
import threading
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from msgspec import Struct

from app.errors import Misconfigured

T = TypeVar("T")

MISCONFIGURED_CODE = 2
"""A child's exit code that means: another start cannot help. It has said why."""
STEADY_SECONDS = 5.0
"""A child that lived so long has started well; whatever ends it later, it is started again, for ever."""
QUICK_ENDS_MAX = 3
"""A child that never started well and ended so often never will: the supervisor gives up."""
PAUSE_SECONDS, PAUSE_SECONDS_MAX = 0.5, 15.0
"""Before a child is started again; doubled with each quick end."""
GONE_SECONDS_MAX = 5.0
"""How long, at most, a child waits for a supervisor that ends to be gone; a killed one takes milliseconds."""
LOOK_SECONDS = 0.01
"""Between two looks whether it is, where the system cannot tell."""
MARGIN_SECONDS = 5.0
"""On top of the grace time that children know of, before one is killed."""


class Child(Struct, frozen=True, kw_only=True):
    name: str
    """For people; unique."""
    module: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    descriptors: tuple[int, ...] = ()
    """Open files that it inherits."""
    ready: str = ""
    """It is ready when it has written a line that begins so; empty: as soon as it was started."""


class Stopped(Exception):
    """Somebody asked for the end: not an error."""


class GaveUp(Misconfigured):
    """A child cannot run; the sentence says which one and how it ended."""


class Supervisor:
    """Made by `supervisor` only. Its children are started in stages, and stopped in the opposite order."""

    def __init__(self, say: Callable[[str], None], grace_seconds: float) -> None:
        self._say = say
        # A worker lets its tasks end for the grace time, then has it once more to give the others back.
        self._patience_seconds = 2 * grace_seconds + MARGIN_SECONDS
        # Python makes both ends non-inheritable; children get the reading end, and only that, by name.
        self.lifeline, self._hold = os.pipe()
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stages: list[dict[str, asyncio.Task[None]]] = []
        self._running: dict[str, Process] = {}

    def pid(self, name: str) -> int:
        """0: it does not run at this moment."""
        process = self._running.get(name)
        return process.pid if process else 0

    def stop(self) -> None:
        """Asked for once: all end in good order. Asked for again: at once."""
        if self._over.done():
            for process in self._running.values():
                _send(process, signal.SIGKILL)
        else:
            self._over.set_exception(Stopped())

    async def start(self, *stage: Child) -> list[str]:
        """What each child wrote when it was ready. Raises Stopped, GaveUp."""
        if not stage:
            return []
        ready: list[asyncio.Future[str]] = [asyncio.get_running_loop().create_future() for _ in stage]
        self._stages.append(
            {child.name: asyncio.create_task(self._keep(child, one)) for child, one in zip(stage, ready, strict=True)}
        )
        return await self.unless_over(asyncio.gather(*ready))

    async def unless_over(self, wanted: Awaitable[T]) -> T:
        """Its result. Raises Stopped or GaveUp when the end comes first."""
        waiting = asyncio.ensure_future(wanted)
        both: list[asyncio.Future[Any]] = [waiting, self._over]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if self._over.done():
            waiting.cancel()
            self._over.result()
        return waiting.result()

    async def over(self) -> None:
        """Never returns. Raises Stopped or GaveUp when the time has come."""
        await asyncio.shield(self._over)

    async def _keep(self, child: Child, ready: asyncio.Future[str]) -> None:
        """Starts it again whenever it ends, until all is over."""
        ended, quick_ends, steady = False, 0, False
        while not self._over.done():
            began = time.monotonic()
            try:
                process = await self._spawn(child)
            except OSError as error:  # no more processes, no more files
                self._give_up(f"{child.name} cannot be started: {error}.")
                return
            self._running[child.name] = process
            if ended:
                self._say(f"{child.name} runs again (process {process.pid}).")
            if self._over.done():  # while it was being made
                _send(process, signal.SIGTERM)
            if process.stdout:
                await _read(process.stdout, child.ready, ready)
            elif not ready.done():
                ready.set_result("")
            code = await process.wait()
            del self._running[child.name]
            ended = True
            if self._over.done():
                return
            steady = steady or time.monotonic() - began > STEADY_SECONDS
            quick_ends = 0 if time.monotonic() - began > STEADY_SECONDS else quick_ends + 1
            if code == MISCONFIGURED_CODE and not steady:
                self._give_up(f"{child.name} cannot run; the reason stands above.")
            elif quick_ends == QUICK_ENDS_MAX and not steady:
                self._give_up(
                    f"{child.name} {_how(code)}, {quick_ends} times in a row, each time soon after its start."
                )
            else:
                pause = min(PAUSE_SECONDS * 2 ** max(quick_ends - 1, 0), PAUSE_SECONDS_MAX)
                self._say(f"{child.name} (process {process.pid}) {_how(code)}; it starts again in {pause:g} s.")
                await asyncio.wait([self._over], timeout=pause)

    async def _spawn(self, child: Child) -> Process:
        words = [str(self.lifeline), str(os.getpid()), str(self._patience_seconds), child.module, *child.arguments]
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "app.supervisor", *words),
            stdin=DEVNULL,
            stdout=PIPE if child.ready else None,
            env=os.environ | child.environment,
            pass_fds=(self.lifeline, *child.descriptors),
            start_new_session=True,
        )

    def _give_up(self, sentence: str) -> None:
        if not self._over.done():
            self._over.set_exception(GaveUp(sentence))

    async def aclose(self) -> None:
        if not self._over.done():  # it was not asked for: our own caller failed
            self._over.set_exception(Stopped())
        self._over.exception()  # else asyncio would say that nobody looked at it
        try:
            for stage in reversed(self._stages):
                await self._stop(stage)
        finally:
            os.close(self._hold)  # should anything have gone wrong, this ends every child
            os.close(self.lifeline)

    async def _stop(self, stage: Mapping[str, asyncio.Task[None]]) -> None:
        for name in stage.keys() & self._running.keys():
            _send(self._running[name], signal.SIGTERM)
        await asyncio.wait(stage.values(), timeout=self._patience_seconds)
        for name in stage.keys() & self._running.keys():
            self._say(f"{name} did not stop within {self._patience_seconds:g} s; it is killed.")
            _send(self._running[name], signal.SIGKILL)
        await asyncio.gather(*stage.values())


@asynccontextmanager
async def supervisor(say: Callable[[str], None], *, grace_seconds: float) -> AsyncIterator[Supervisor]:
    """Stops everything that was started in it; returns quietly when that was asked for. Raises GaveUp."""
    made = Supervisor(say, grace_seconds)
    loop = asyncio.get_running_loop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means it
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, made.stop)
    try:
        yield made
    except Stopped:
        pass
    finally:
        await made.aclose()
        for number in numbers:
            loop.remove_signal_handler(number)


async def _read(stdout: asyncio.StreamReader, prefix: str, ready: asyncio.Future[str]) -> None:
    async for raw in stdout:
        line = raw.decode(errors="replace").rstrip("\n")
        if line.startswith(prefix) and not ready.done():
            ready.set_result(line.removeprefix(prefix))


def _send(process: Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


# The child's side.


def run_child(lifeline: int, parent: int, patience_seconds: float, module: str, arguments: Sequence[str]) -> None:
    """Runs the module as the main program, for as long as the supervisor lives."""
    threading.Thread(target=_outlive_nobody, args=(lifeline, parent, patience_seconds), daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _outlive_nobody(lifeline: int, parent: int, patience_seconds: float) -> None:
    # Signals are for the main thread: the local model waits for them there, with all of them blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    with suppress(OSError):
        os.read(lifeline, 1)
    # What is killed closes its files one by one (seen on Linux: the newest first, over milliseconds). While it still
    # holds its lock on the store, no child would find itself the last one out, and the server would stay.
    _await_end(parent)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(patience_seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _await_end(parent: int) -> None:
    if sys.platform == "linux" and hasattr(os, "pidfd_open"):  # some builds of Python lack it
        with suppress(OSError):  # it is gone, or this kernel does not tell
            ended = select.poll()
            ended.register(os.pidfd_open(parent), select.POLLIN)
            ended.poll(GONE_SECONDS_MAX * 1000)
            return
    # The weaker sign: on Linux a child may get another parent while the last thread of this one still closes files.
    until = time.monotonic() + GONE_SECONDS_MAX
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    run_child(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5:])
