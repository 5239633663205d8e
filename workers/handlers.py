"""Handlers: what `@task` makes of a function, and how a worker finds them and validates their arguments."""

import asyncio
import importlib
import inspect
import sys
import threading
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import Struct
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from app.errors import Misconfigured
from app.events import Json
from workers.context import Context, Failed
from workers.process import call

ERROR_CHARACTERS_MAX = 4000
"""Of an exception's text; the log has the whole."""
ATTEMPTS_MAX = 100

Result = str | Mapping[str, Any] | BaseModel | Struct | None
Function = Callable[..., Any]
"""Of a Result, or a coroutine that gives one."""


class Parameter(Struct, frozen=True, kw_only=True):
    """A named argument: what the task's context may say for it."""

    adapter: Any
    required: bool


class Handler(Struct, frozen=True, kw_only=True):
    """A decorated function, and what the decorator was told."""

    function: Function
    queues: tuple[str, ...]
    retry: tuple[type[Exception], ...]
    max_attempts: int
    """0: the task's own number, else 3."""
    timeout: float | None
    """Seconds that one attempt may take."""
    parameters: Mapping[str, Parameter]
    blocking: bool
    """A plain `def`: it runs in a thread of its own."""
    process: bool = False
    """And that thread only looks after a process of its own."""

    @property
    def name(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"

    def arguments(self, context: Json) -> dict[str, Any]:
        """The named arguments that a task's context gives; other keys are not looked at. Raises Failed."""
        named, problems = {}, []
        for name, parameter in self.parameters.items():
            if name in context:
                try:
                    named[name] = parameter.adapter.validate_python(context[name])
                except ValidationError as error:
                    for one in error.errors(include_url=False):
                        where = ".".join(["context", name, *map(str, one["loc"])])
                        problems.append(f"{where}: {one['msg']}")
            elif parameter.required:
                problems.append(f"context.{name}: a value is required")
        if problems:
            raise Failed(f"The task's context does not fit its worker. {'; '.join(problems)}.")
        return named

    async def __call__(self, ctx: Context) -> Result:
        """Raises Failed when the task's context does not fit, and whatever the function raises."""
        named = self.arguments(ctx.task.context)
        result: Result
        try:
            if self.process:
                result = await _in_thread(partial(call, self.function, ctx.blocking, named))
            elif self.blocking:
                result = await _in_thread(partial(self.function, ctx.task, ctx.blocking, **named))
            else:
                result = await self.function(ctx.task, ctx, **named)
        except SystemExit as error:  # it would end the whole worker, and with each attempt another one
            raise RuntimeError(f"the handler called sys.exit({error.code!r})") from error
        return result


async def _in_thread(work: Callable[[], Any]) -> Any:
    """The result of `work`. When this is cancelled, it goes on until the thread has ended, for nothing can stop that.

    Not asyncio's own threads: at its end the process would wait for one that never ends.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def run() -> None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = work(), None
        except BaseException as error:  # noqa: BLE001 (raised again below)
            outcome = None, error
        with suppress(RuntimeError):  # the loop is closed: the worker has gone
            loop.call_soon_threadsafe(lambda: None if ended.done() else ended.set_result(outcome))

    threading.Thread(target=copy_context().run, args=(run,), daemon=True, name="handler").start()
    try:
        await asyncio.wait([ended])
    except asyncio.CancelledError:
        await asyncio.wait([ended])
        raise
    result, error = ended.result()
    if error:
        raise error
    return result


def task(
    *queues: str,
    retry: type[Exception] | tuple[type[Exception], ...] = (),
    max_attempts: int = 0,
    timeout: float | None = None,
    process: bool = False,
) -> Callable[[Function], Handler]:
    """Makes `f(task, ctx, *, named…)`, an `async def` or a plain one, the worker of these queues.

    It returns text (str), a JSON object (a dict or a model), or None for no text. Its named arguments are validated,
    with pydantic, from the keys of the same name in `task.context`. `raise Failed(message)` fails the task; an
    exception named in `retry` queues it again while it has attempts left (`max_attempts`, unless the task itself names
    a number; 3 without either), after a random time of at most 1, 2, 4 … 60 s; any other errors it. An attempt
    that takes longer than `timeout` seconds ends the task as timed out, unless `retry` names TimeoutError: then it counts
    as that exception.

    A plain function runs in a thread, and its `ctx` is a `Blocking`: a cancel reaches it the next time it uses that.
    With `process=True` each attempt runs in a process of its own, which takes a moment to start: a cancel ends it
    wherever it is, and should it die the attempt has raised ProcessDied.

    Raises TypeError for a function of another form, ValueError for numbers out of bounds.
    """
    if not queues or not all(isinstance(queue, str) and queue for queue in queues):
        raise TypeError('A worker names the queues it serves: @task("default").')

    kinds = retry if isinstance(retry, tuple) else (retry,)
    if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
        raise TypeError("A worker's `retry` names types of exceptions.")
    if not 0 <= max_attempts <= ATTEMPTS_MAX:
        raise ValueError(f"A task has 1 to {ATTEMPTS_MAX} attempts.")
    if timeout is not None and timeout <= 0:
        raise ValueError("A worker's `timeout` is a number of seconds above 0.")

    def decorate(function: Function) -> Handler:
        if process and (inspect.iscoroutinefunction(function) or "<locals>" in function.__qualname__):
            raise TypeError(f"{function.__qualname__} must be a plain function of a module to run in a process.")
        return Handler(
            function=function,
            queues=queues,
            retry=kinds,
            max_attempts=max_attempts,
            timeout=timeout,
            parameters=_parameters(function),
            blocking=not inspect.iscoroutinefunction(function),
            process=process,
        )

    return decorate


def _parameters(function: Function) -> dict[str, Parameter]:
    name = getattr(function, "__qualname__", repr(function))
    if not inspect.isroutine(function) or inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(f"{name} must be a function, `async def` or `def`, that returns its result.")
    positional: list[str] = []
    named: dict[str, Parameter] = {}
    hints = typing.get_type_hints(function, include_extras=True)
    for one in inspect.signature(function).parameters.values():
        if one.kind in {one.VAR_POSITIONAL, one.VAR_KEYWORD}:
            raise TypeError(f"{name} must name its arguments one by one, without {one}.")
        if one.kind is not one.KEYWORD_ONLY and len(positional) < 2:
            positional.append(one.name)
            continue
        if one.kind is one.POSITIONAL_ONLY:
            raise TypeError(f"{name}: only task and ctx are given by position, not {one.name}.")
        if isinstance(one.default, FieldInfo):
            raise TypeError(f"{name}: write {one.name}: Annotated[…, Field(…)] = default.")
        adapter = TypeAdapter(hints.get(one.name, Any))
        named[one.name] = Parameter(adapter=adapter, required=one.default is one.empty)
    if len(positional) < 2:
        raise TypeError(f"{name} must take a task and a context: def {name}(task, ctx).")
    return named


def load(modules: Sequence[str]) -> list[Handler]:
    """Imports the modules and returns their handlers, each once. The current folder is the last place to look.

    Raises Misconfigured.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    found: dict[int, Handler] = {}
    for name in modules:
        if name == "workers" or name.partition(".")[0] == "app":
            raise Misconfigured(f"A worker module cannot be called {name}: that is a package of Taskcast's own.")
        handlers = [value for value in vars(_import(name)).values() if isinstance(value, Handler)]
        if not handlers:
            raise Misconfigured(f"The module {name} has no worker: no function with @task(…) stands in it.")
        found |= {id(one): one for one in handlers}
    return list(found.values())


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name != missing and not name.startswith(f"{missing}."):
            raise Misconfigured(f"The module {name} needs {missing}, which is not installed.") from error
        hint = f" Did you mean {name.removesuffix('.py')}?" if name.endswith(".py") else ""
        raise Misconfigured(f"There is no module {name}, neither installed nor in the current folder.{hint}") from error
    except Exception as error:
        raise Misconfigured(f"The module {name} cannot be imported: {sentence(error)}") from error


def by_queue(handlers: Sequence[Handler], queues: Sequence[str] = ()) -> dict[str, Handler]:
    """Which handler serves which queue; `queues` limits them. Raises Misconfigured."""
    served: dict[str, Handler] = {}
    for handler in handlers:
        for queue in handler.queues:
            if queues and queue not in queues:
                continue
            other = served.setdefault(queue, handler)
            if other is not handler:
                raise Misconfigured(f"The queue {queue} is served twice: by {other.name} and by {handler.name}.")
    if absent := [queue for queue in queues if queue not in served]:
        raise Misconfigured(f"No worker here serves the queue {absent[0]}.")
    if not served:
        raise Misconfigured("There is no worker to run.")
    return served


def sentence(error: BaseException) -> str:
    """`TypeName: message`."""
    name = type(error).__name__
    return short(f"{name}: {error}" if str(error) else name)


def short(text: str) -> str:
    """Short enough for an event, and without what JSON cannot hold."""
    if len(text) > ERROR_CHARACTERS_MAX:
        text = f"{text[:ERROR_CHARACTERS_MAX]} …"
    return text.encode(errors="replace").decode()
