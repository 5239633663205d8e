"""The demo worker: streams the query back, word by word. It shows what a handler can do, and needs no model.

`context.echo = {"steps": n, "delay_ms": d, "fail": "message"}` makes a task longer, or makes it fail.
"""

import asyncio
import re

from pydantic import BaseModel, ConfigDict, Field

from app.events import TEXT_BYTES_MAX
from app.task import Task
from workers import Context, Failed, task

AGENT = "echo"
STEPS_MAX = 1000
DELAY_MS_MAX = 60_000

WORD = re.compile(r"\S+\s*|\s+")
"""With the space that follows it, so that the words of a text, joined, are the text."""


class Pace(BaseModel):
    """How a task asks to be echoed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int | None = Field(default=None, ge=1, le=STEPS_MAX, description="Pieces of the answer; else one per word.")
    delay_ms: float = Field(default=0, ge=0, le=DELAY_MS_MAX, description="Before each step.")
    fail: str = Field(default="", max_length=2000, description="With this message, after the last step.")


@task("default", "agent:echo")
async def echo(task: Task, ctx: Context, *, echo: Pace | None = None) -> str:
    """A resumed task that has lost its worker begins again: its readers dropped the text when the attempt ended.

    So the step kept at a checkpoint only tells people how far it was.
    """
    if (size := len(task.query.encode())) > TEXT_BYTES_MAX - 1024:
        raise Failed(f"The query has {size} bytes; an echo has room for {TEXT_BYTES_MAX - 1024}.")
    pace = echo or Pace()
    words = WORD.findall(task.query)
    # A long query in steps of several words: its stream has a bound as well.
    steps = pace.steps or min(max(len(words), 1), STEPS_MAX)
    await ctx.agent_started(AGENT)
    for step in range(steps):
        await ctx.checkpoint("step", {"step": step})
        if pace.delay_ms:
            await asyncio.sleep(pace.delay_ms / 1000)
        await ctx.delta("".join(words[len(words) * step // steps : len(words) * (step + 1) // steps]))
        await ctx.flush()  # each step is an event of its own
        if pace.steps:
            await ctx.progress((step + 1) / steps, f"Step {step + 1} of {steps}")
    if pace.fail:
        raise Failed(pace.fail)
    tokens = len(task.query.split())
    ctx.used(model="echo-1", provider="taskcast", input_tokens=tokens, output_tokens=tokens)
    await ctx.output(task.query)
    await ctx.agent_completed(AGENT)
    return task.query
