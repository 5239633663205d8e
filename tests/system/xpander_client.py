"""Calls xpander.ai's own SDK for the tests, in that SDK's environment: JSON lines, a call on stdin, its outcome on stdout.

    {"call": "Tasks.acreate", "named": {"agent_id": "echo", "prompt": "Hello"}}
    {"call": "Task.asave", "task": "ID", "fields": {"title": "New"}}      a task is loaded, and changed, first
    {"said": …} or {"raised": "ModuleException", "status_code": 404, "description": "…"}

The SDK is configured by its environment variables; `configuration` in a call overrides some of it.
"""

import asyncio
import inspect
import json
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

from pydantic import BaseModel
from xpander_sdk import (  # type: ignore[import-not-found]
    AgentExecutionStatus,
    Configuration,
    OutputFormat,
    Task,
    Tasks,
    TaskUpdateEvent,
    Tokens,
    User,
)
from xpander_sdk.models.deep_planning import DeepPlanning  # type: ignore[import-not-found]

TYPES = {
    "status": AgentExecutionStatus,
    "output_format": OutputFormat,
    "deep_planning": DeepPlanning.model_validate,
    "tokens": Tokens.model_validate,
    "user_details": User.model_validate,
}
"""Of arguments and fields that are no plain JSON in the SDK."""


def typed(named: dict[str, Any]) -> dict[str, Any]:
    return {name: TYPES.get(name, lambda plain: plain)(value) for name, value in named.items()}


def plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, TaskUpdateEvent):
        return {**value.model_dump_safe(exclude={"data"}), "data": plain(value.data)}
    if isinstance(value, Task):
        return value.model_dump_safe(exclude={"configuration"})
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


async def collected(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


def outcome(asked: dict[str, Any]) -> Any:
    configuration = Configuration(**asked.get("configuration", {}))
    owner, _, method = asked["call"].partition(".")
    named = typed(asked.get("named", {}))
    task = None
    if owner == "Tasks":
        target = Tasks(configuration=configuration)
    elif "task" in asked:
        target = task = Task.load(asked["task"], configuration=configuration)
        for field, value in typed(asked.get("fields", {})).items():
            setattr(task, field, value)
    else:
        target = Task
        named["configuration"] = configuration
    said = getattr(target, method)(**named)
    if inspect.iscoroutine(said):
        said = asyncio.run(said)
    elif isinstance(said, AsyncIterator):
        said = asyncio.run(collected(said))
    elif isinstance(said, Iterator):
        said = list(said)
    return plain(task if said is None else said)  # many of a task's methods change it, and return nothing


def answer(line: str) -> dict[str, Any]:
    try:
        return {"said": outcome(json.loads(line))}
    except Exception as error:  # noqa: BLE001 (whatever it is, it is the outcome)
        named = {name: getattr(error, name, None) for name in ("status_code", "description")}
        return {"raised": type(error).__name__, "text": str(error), **named}


for line in sys.stdin:
    print(json.dumps(answer(line)), flush=True)
