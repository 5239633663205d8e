"""The work that `scripts/chaos` has done: a module for `taskcast worker`.

Everything that an attempt says carries a word of its own, `«fence.number»`, so that the log shows who spoke and when,
without trust in the fence that the store wrote beside it. What the store has acknowledged is noted in a file that all
workers share, by one unbuffered write each: whoever is killed has noted what was promised to it.
"""

import asyncio
import os
import time
from pathlib import Path

import msgspec

from app.task import Task
from workers import Blocking, Context, Failed, task

PLAIN = "chaos:plain"
"""The queue of the function that blocks its thread."""
PROCESS = "chaos:process"
"""The queue of the function that has a process of its own, whose start takes a second: for few tasks."""
HTTP = "chaos:http"
"""The queue of the worker over HTTP (`chaos_http.py`)."""
FLAKY_ATTEMPTS = 2


class Flaky(Exception):
    """Goes away when the task is tried again."""


class Note(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of that file."""

    what: str
    """`began`, `said` (the store has all up to this word), `ended`; of a zombie also `refused`, `accepted`."""
    at: float
    """Of the machine's monotonic clock, which all its processes share."""
    pid: int
    task: str
    fence: int
    word: int = 0
    detail: str = ""


class Voice:
    """An attempt's words, and its notes."""

    def __init__(self, task: str, fence: int) -> None:
        self.task, self.fence, self.spoken = task, fence, 0
        self._notes = os.open(Path(os.environ["CHAOS_NOTES"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.note("began")

    def word(self) -> str:
        self.spoken += 1
        return f"«{self.fence}.{self.spoken}»"

    def said(self) -> None:
        """The store has answered for all words so far."""
        self.note("said", word=self.spoken)

    def note(self, what: str, *, word: int = 0, detail: str = "") -> None:
        one = Note(what, time.monotonic(), os.getpid(), self.task, self.fence, word, detail)
        os.write(self._notes, msgspec.json.encode(one) + b"\n")

    def close(self) -> None:
        """Also of an attempt that was interrupted."""
        self.note("ended")
        os.close(self._notes)


def result(task: Task) -> str:
    """What a task of most kinds comes to."""
    return f"{task.query} is done"


@task("default", retry=Flaky)
async def work(
    task: Task, ctx: Context, *, kind: str = "stream", steps: int = 3, pause_ms: int = 50
) -> str | dict[str, object]:
    voice = Voice(task.id, task.fence)
    try:
        return await _work(task, ctx, voice, kind, steps, pause_ms / 1000)
    finally:
        voice.close()


async def _work(task: Task, ctx: Context, voice: Voice, kind: str, steps: int, pause: float) -> str | dict[str, object]:
    await ctx.progress(0, voice.word())
    voice.said()
    for step in range(steps):
        await asyncio.sleep(pause)
        await ctx.checkpoint(f"step {step}", {"step": step})
        if kind == "tool":
            async with ctx.tool("count", {"said": voice.word()}) as call:
                await asyncio.sleep(pause)
                call.result = voice.word()
            ctx.used(model="chaos-1", provider="taskcast", input_tokens=3, output_tokens=5, cost_usd=0.001)
        else:
            for _ in range(3):
                await ctx.delta(voice.word())
            await ctx.flush()
        voice.said()
    match kind:
        case "flaky" if ctx.attempt < FLAKY_ATTEMPTS:
            raise Flaky("not yet")
        case "fail":
            raise Failed("as it was told")
        case "raise":
            raise ValueError("as it was told")
        case "approve":
            decision = await ctx.approve("May I go on?", {"of": task.id})
            await ctx.emit("CHAOS_DECIDED", voice.word(), {"approved": decision.approved})
        case "review":
            await ctx.review(f"The plan of {task.id}")
        case "parent":
            children = [
                await ctx.submit(f"{task.query}/{number}", queue=queue, context={"steps": 2}, key=str(number))
                for number, queue in enumerate(("default", PLAIN))
            ]
            await ctx.progress(0.5, voice.word())
            voice.said()
            ends = [await child for child in children]
            return {"of": task.query, "children": {end.id: end.status.value for end in ends}}
        case _:
            pass
    await ctx.emit("CHAOS_ENDING", voice.word())
    voice.said()
    return result(task)


@task(PROCESS, process=True)
def apart(task: Task, ctx: Blocking, *, steps: int = 3, pause_ms: int = 50) -> str:
    return block(task, ctx, steps, pause_ms)


@task(PLAIN)
def plain(task: Task, ctx: Blocking, *, steps: int = 3, pause_ms: int = 50) -> str:
    return block(task, ctx, steps, pause_ms)


def block(task: Task, ctx: Blocking, steps: int, pause_ms: int) -> str:
    voice = Voice(task.id, task.fence)
    try:
        for step in range(steps):
            time.sleep(pause_ms / 1000)
            ctx.progress(step / steps, voice.word())
            voice.said()
            ctx.delta(voice.word())
            with ctx.tool("block", {"said": voice.word()}) as call:
                call.result = voice.word()
            voice.said()
        return result(task)
    finally:
        voice.close()
