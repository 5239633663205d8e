"""A worker of xpander.ai's own SDK for the tests, in that SDK's environment: `xpander_worker.py FOLDER`.

A task whose text begins with "Hold" is finished once FOLDER has a file with its id; "Search" uses a tool, "Fail" raises.
The SDK connects, and stays, as it decorates.
"""

import asyncio
import os
import sys
from pathlib import Path

from xpander_sdk import Task, Tokens, on_task  # type: ignore[import-not-found]
from xpander_sdk.modules.backend.utils.tool_call_events import (  # type: ignore[import-not-found]
    report_tool_call_request,
    report_tool_call_result,
)

FOLDER = Path(sys.argv[1])


def may_end(task: Task) -> bool:
    return not task.input.text.startswith("Hold") or (FOLDER / task.id).exists()


async def search(task: Task) -> None:
    """As the SDK tells of an agent's tools."""
    call = {"request_id": "call-1", "operation_id": "search", "tool_name": "Search", "payload": {"query": "logs"}}
    await report_tool_call_request(task, **call)
    await report_tool_call_result(task, **call, result={"found": 3})


@on_task  # type: ignore[untyped-decorator]
async def echo(task: Task) -> Task:
    print(f"works on {task.id}", flush=True)
    while not may_end(task):
        await asyncio.sleep(0.01)
    if task.input.text == "Search":
        await search(task)
    if task.input.text == "Fail":
        raise ValueError("no luck")
    task.result = f"{task.input.text}, said process {os.getpid()}"
    task.tokens = Tokens(prompt_tokens=3, completion_tokens=4)
    return task
