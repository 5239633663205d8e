"""A plain function in a process of its own: for code that holds the interpreter, forgets to end, or may crash.

A thread of the worker starts the process, one per attempt, and answers with a `Blocking` what it asks over a pipe. So
leases are kept whatever the function does. When the attempt is over the process is told to end (SIGTERM raises
asyncio.CancelledError in the function, so that it can clean up) and killed an eighth of a grace time later. It ends together
with its worker, however that ends. What this file must never do is wait for a process that will not answer.
"""

import asyncio
import importlib
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import reduce
from multiprocessing import connection
from typing import Any

from app.events import Json
from app.task import Task
from workers.context import Blocking, Context, ToolCall

START = """
import sys
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
sys.path[:] = pipe.recv()
from workers.process import main
main(pipe)
"""
"""Not multiprocessing's own processes: they would run the worker's main program again, which a script without a guard
makes a second worker (tried).
"""
LOOK_SECONDS = 1.0
"""Between two looks whether a silent process lives: the pipe does not tell if its own children hold it open."""
EXIT_SECONDS = 1.0
"""For a process that has given its answer to end by itself."""

Pipe = connection.Connection
Outcome = tuple[bool, Any]
"""Whether it went well; the result, or the exception."""


class ProcessDied(Exception):
    """The function's process ended without an answer: killed, crashed, out of memory, os._exit. `retry` may name it."""


def call(function: Callable[..., Any], ctx: Blocking, named: Mapping[str, Any]) -> Any:
    """What the function returns or raises, or ProcessDied. For a thread of the worker."""
    ours, theirs = connection.Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, str(theirs.fileno())],  # a file json.py here is not Python's
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is the worker's to hear
        )
    tools: dict[str, tuple[Any, ToolCall]] = {}
    try:
        ctx.at_end(process.terminate, process.kill)
        with suppress(OSError):  # it is gone already, as the first look finds
            ours.send(sys.path)
            ours.send((function.__module__, function.__qualname__, ctx.task, named))
        while True:
            try:
                while not ours.poll(LOOK_SECONDS) and process.poll() is None:
                    pass
                asked = ours.recv() if ours.poll() else ()
            except (EOFError, OSError):  # it ended, perhaps in the middle of a word
                asked = ()
            match asked:
                case "ended", (True, result):
                    return result
                case "ended", (False, error):
                    raise error
                case "asked", arguments:
                    with suppress(OSError):  # it is gone, as the next look finds
                        ours.send(_outcome(_answer, ctx, tools, *arguments))
                case _:
                    raise ProcessDied(f"The handler's process died ({_how(_end(process))}).")
    finally:
        _end(process)
        ours.close()


def _end(process: subprocess.Popen[bytes]) -> int:
    with suppress(subprocess.TimeoutExpired):
        process.wait(EXIT_SECONDS)
    process.kill()
    return process.wait()


def _answer(
    ctx: Blocking, tools: dict[str, tuple[Any, ToolCall]], name: str, args: tuple[Any, ...], named: Json
) -> Any:
    if name == "tool":
        block = ctx.tool(*args, **named)
        one = block.__enter__()
        tools[one.id] = block, one
        return one
    if name == "tool ended":
        id_, result, error = args
        block, one = tools.pop(id_)
        one.result = result
        block.__exit__(type(error) if error else None, error, None)
        return None
    value = getattr(ctx, name)
    return value(*args, **named) if callable(value) else value


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _outcome(work: Callable[..., Any], *args: Any, **named: Any) -> Outcome:
    try:
        return True, work(*args, **named)
    except BaseException as error:  # noqa: BLE001 (raised again on the pipe's other side)
        return False, _portable(error)


def _portable(error: BaseException) -> BaseException:
    """As it is, if it survives the pipe."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (our own)
    except Exception:  # noqa: BLE001 (its own code may raise anything)
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


# The process's side.


class Remote:
    """A `Blocking` whose context is in the worker's process."""

    def __init__(self, task: Task, pipe: Pipe) -> None:
        self.task = task
        self._pipe = pipe
        self._one_at_a_time = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        if callable(getattr(Context, name, None)):
            return lambda *args, **named: self._ask(name, args, named)
        return self._ask(name, (), {})

    @contextmanager
    def tool(self, *args: Any, **named: Any) -> Iterator[ToolCall]:
        one: ToolCall = self._ask("tool", args, named)
        try:
            yield one
        except BaseException as error:
            self._ask("tool ended", (one.id, None, _portable(error)), {})
            raise
        self._ask("tool ended", (one.id, one.result, None), {})

    def _ask(self, name: str, args: tuple[Any, ...], named: Json) -> Any:
        with self._one_at_a_time:
            self._pipe.send(("asked", (name, args, named)))
            well, answer = self._pipe.recv()
        if well:
            return answer
        raise answer


def main(pipe: Pipe) -> None:
    signal.signal(signal.SIGTERM, _cancel)
    threading.Thread(target=_end_with_the_worker, args=(pipe,), daemon=True).start()
    outcome = _outcome(_work, pipe)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        pipe.send(("ended", outcome))
    except Exception as error:  # noqa: BLE001 (a result that no pipe can carry)
        pipe.send(("ended", (False, TypeError(f"the result cannot leave its process: {error}"))))


def _work(pipe: Pipe) -> Any:
    module, name, task, named = pipe.recv()
    found: Any = reduce(getattr, name.split("."), importlib.import_module(module))
    try:
        return getattr(found, "function", found)(task, Remote(task, pipe), **named)
    except BaseException as error:
        error.add_note(traceback.format_exc())  # a traceback itself cannot leave its process
        raise


def _cancel(*_: Any) -> None:
    raise asyncio.CancelledError


def _end_with_the_worker(pipe: Pipe) -> None:
    hangup = select.poll()
    hangup.register(pipe.fileno(), 0)  # that its other side is closed is told in any case
    hangup.poll()
    os._exit(1)
