"""A worker of xpander.ai's own SDK for the tests, in that SDK's environment: `xpander_worker.py RELEASE`.

A task is finished once the file RELEASE is there. The SDK connects, and stays, as it decorates.
"""

import asyncio
import os
import sys
from pathlib import Path

from xpander_sdk import Task, Tokens, on_task  # type: ignore[import-not-found]

RELEASE = Path(sys.argv[1])


def released() -> bool:
    return RELEASE.exists()


@on_task  # type: ignore[untyped-decorator]
async def echo(task: Task) -> Task:
    print(f"works on {task.id}", flush=True)
    while not released():
        await asyncio.sleep(0.01)
    if task.input.text == "fail":
        raise ValueError("no luck")
    task.result = f"{task.input.text}, said process {os.getpid()}"
    task.tokens = Tokens(prompt_tokens=3, completion_tokens=4)
    return task
