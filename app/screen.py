"""What `taskcast watch` shows of a task: the state that its stream tells, for people, live or line by line.

It knows Shannon's frames (its contract §2.3) and no network. Text of tasks is untrusted: control characters, with
which it could steer a terminal, never reach it.
"""

import re
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

Json = Mapping[str, Any]

STYLES = {
    "queued": "cyan",
    "running": "blue",
    "pausing": "yellow",
    "paused": "yellow",
    "completed": "green",
    "failed": "red",
    "cancelled": "magenta",
    "timed out": "red",
}
FINAL_OUTPUT = "final_output"
"""The agent whose text is the answer."""
TAIL_CHARACTERS = 20_000
"""Of the text, laid out anew ten times a second: more than any screen shows."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_STATUS = {
    "DATA_PROCESSING": "queued",
    "WORKFLOW_STARTED": "running",
    "WORKFLOW_COMPLETED": "completed",
    "ERROR_RECOVERY": "queued",
    "workflow.pausing": "pausing",
    "workflow.paused": "paused",
    "workflow.resumed": "running",
    "workflow.cancelled": "cancelled",
    "error": "failed",
}


def clean(text: object) -> str:
    return _CONTROLS.sub("", str(text))


def word(status: object) -> str:
    """`TASK_STATUS_TIMEOUT` → `timed out`."""
    found = str(status).removeprefix("TASK_STATUS_").lower()
    return "timed out" if found == "timeout" else found


class View:
    """The state after each event, from one task's stream."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.status = "queued"
        self.attempt = 0
        self.progress: float | None = None
        self.message = ""
        """What the task said last about itself."""
        self.error = ""
        self.texts: dict[str, str] = {}
        """Agent → what it has written in this attempt."""
        self.notice = ""
        """What happens to the connection."""
        self.dropped = False
        """The last event made the text shown so far void: another attempt, or another turn, writes it anew."""
        self._began = time.monotonic()

    def take(self, event: str, data: Json) -> None:
        self.notice, self.dropped = "", False
        payload = data.get("payload") or {}
        self.status = _STATUS.get(event, self.status)
        match event:
            case "thread.message.delta":
                self._attempt(data.get("attempt"))
                agent = str(data.get("agent_id") or FINAL_OUTPUT)
                self.texts[agent] = self.texts.get(agent, "") + clean(data.get("delta", ""))
            case "thread.message.completed":
                self._attempt(data.get("attempt"))
                self.texts[str(data.get("agent_id") or FINAL_OUTPUT)] = clean(data.get("response", ""))
            case "WORKFLOW_STARTED":
                self._attempt(payload.get("attempt"))
            case "DATA_PROCESSING" | "ERROR_RECOVERY":
                self._restart()
                self.attempt = 0 if event == "DATA_PROCESSING" else self.attempt
            case "PROGRESS":
                self.progress = payload.get("progress", self.progress)
            case "error":
                self.error = clean(data.get("message", ""))
                self.status = word(payload.get("status", "failed"))
            case "TASK_RESTATED":
                self.status = word(payload.get("status", self.status))
            case "gap":
                self._jump(data.get("snapshot") or {})
            case _:
                pass
        if not event.startswith("thread.") and data.get("message"):
            self.message = clean(data["message"])

    def _attempt(self, number: object) -> None:
        if isinstance(number, int) and number != self.attempt:
            if self.attempt:
                self._restart()
            self.attempt = number

    def _restart(self) -> None:
        self.dropped = any(self.texts.values())
        self.texts, self.progress = {}, None

    def _jump(self, snapshot: Json) -> None:
        """Earlier events are no longer kept; the snapshot holds their outcome, the text included."""
        self.texts = {str(agent or FINAL_OUTPUT): clean(text) for agent, text in (snapshot.get("texts") or {}).items()}
        self.status = word(snapshot.get("status", self.status))
        self.attempt = snapshot.get("attempt") or self.attempt
        self.progress = snapshot.get("progress") or None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def text(self) -> str:
        """The answer; before there is one, whatever the agents write, each under its name."""
        if FINAL_OUTPUT in self.texts or not self.texts:
            return self.texts.get(FINAL_OUTPUT, "")
        if len(self.texts) == 1:
            return next(iter(self.texts.values()))
        return "\n\n".join(f"{clean(agent)}:\n{text}" for agent, text in self.texts.items())

    # On a terminal, through rich's Live.

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        footer = Group(*self._footer())
        room = options.max_height - len(console.render_lines(footer, options)) - 2
        lines = Text(self.text[-TAIL_CHARACTERS:]).wrap(console, options.max_width)
        shown = lines[-room:] if room > 0 else []
        if shown:
            yield from (Text("⋯", style="dim"),) if len(shown) < len(lines) else ()
            yield from shown
            yield Text()
        yield footer

    def _footer(self) -> list[RenderableType]:
        label = Text.assemble(
            (self.status, f"bold {STYLES.get(self.status, '')}"),
            "  ",
            (self.task, "dim"),
            (f"  attempt {self.attempt}" if self.attempt > 1 else "", "yellow"),
            (f"  {duration(self.seconds)}", "dim"),
        )
        lines: list[RenderableType] = [_spinner(label)]
        if self.progress is not None:
            bar = Table.grid(padding=(0, 1))
            said = Text(self.message, style="dim", overflow="ellipsis", no_wrap=True)
            bar.add_row(ProgressBar(1.0, self.progress, width=30), f"{self.progress:4.0%}", said)
            lines.append(bar)
        if self.notice:
            lines.append(Text(self.notice, style="yellow"))
        return lines


_shared_spinner = Spinner("dots", style="blue")


def _spinner(label: Text) -> Spinner:
    """One for all frames: a new one would always show its first picture."""
    _shared_spinner.update(text=label)
    return _shared_spinner
