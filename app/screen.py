"""What `taskcast watch` shows of a task: the state that its stream tells, for people, live or line by line.

It knows Shannon's frames (its contract §2.3) and no network. Text of tasks is untrusted: control characters, with
which it could steer a terminal, never reach it.
"""

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
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
ENDED = {"completed", "failed", "cancelled", "timed out"}
FINAL_OUTPUT = "final_output"
"""The agent whose text is the answer."""
TAIL_CHARACTERS = 20_000
"""Of the text, laid out anew ten times a second: more than any screen shows."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Also what breaks lines or turns their direction where nobody sees it."""
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
    "APPROVAL_REQUESTED": "paused",
    "APPROVAL_DECISION": "running",
    "RESEARCH_PLAN_READY": "paused",
    "RESEARCH_PLAN_APPROVED": "running",
    "REVIEW_USER_FEEDBACK": "running",
}
_GOES_ON = {"workflow.resumed", "APPROVAL_DECISION", "RESEARCH_PLAN_APPROVED", "REVIEW_USER_FEEDBACK"}
ASKED_LINES = 10
"""Of what a human has to decide about, on a live screen."""


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
        self.decide = ""
        """What to type while the task waits for a human; `message` says what it is about."""
        self.notice = ""
        """What happens to the connection."""
        self.dropped = False
        """The last event made the text shown so far void: another attempt, or another turn, writes it anew."""
        self._held = False
        """Paused, and no attempt lives: it will be queued when it goes on."""
        self._began = time.monotonic()
        self._spinner = Spinner("dots", style="blue")

    def take(self, event: str, data: Json) -> None:
        self.notice, self.dropped = "", False
        payload = data.get("payload") or {}
        before, self.status = self.status, _STATUS.get(event, self.status)
        if not event.startswith("thread."):
            self._pause(event, before, payload)
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
        if event == "ERROR_RECOVERY" and payload.get("error"):
            again = f"; next in {round(payload.get('delay_seconds') or 0, 1):g} s" if self.status == "queued" else ""
            self.message = f"attempt {payload.get('attempt')} failed: {clean(payload['error'])}{again}"

    def _pause(self, event: str, before: str, payload: Json) -> None:
        """Whether the task waits for a human, and whether somebody still works at it meanwhile."""
        resting = {"workflow.pausing": {"queued"}, "ERROR_RECOVERY": {"pausing", "paused"}}
        if before in resting.get(event, ()):
            self._held, self.status = True, "paused"
        elif event in {"DATA_PROCESSING", "WORKFLOW_STARTED"}:
            self._held = False
        elif event in _GOES_ON and self._held:
            self._held, self.status = False, "queued"
        # A worker's own plan has the same name, but no version.
        plan = event == "RESEARCH_PLAN_READY" or (event == "RESEARCH_PLAN_UPDATED" and "version" in payload)
        if event == "APPROVAL_REQUESTED" or plan:
            self.status = "paused"
            self._ask(plan=plan)
        elif self.status != "paused":
            self.decide = ""

    def _ask(self, *, plan: bool) -> None:
        what = " --feedback 'what should be different'" if plan else ""
        self.decide = f"To decide: taskcast approve {self.task}, or taskcast deny {self.task}{what}"

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
        self.decide, self._held = "", False
        if approval := snapshot.get("approval"):
            self.message = f"Needs approval: {clean(approval.get('reason', ''))}"
            self._ask(plan=False)
        elif (snapshot.get("review") or {}).get("pending"):
            self._ask(plan=True)

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
        self._spinner.update(text=label)
        lines: list[RenderableType] = [self._spinner]
        if self.progress is not None:
            bar = Table.grid(padding=(0, 1))
            said = Text(self.message, style="dim", overflow="ellipsis", no_wrap=True)
            bar.add_row(ProgressBar(1.0, self.progress, width=30), f"{self.progress:4.0%}", said)
            lines.append(bar)
        if self.decide:
            asked = self.message.splitlines()
            more = ["⋯"] if len(asked) > ASKED_LINES else []
            lines += [Text("\n".join(asked[:ASKED_LINES] + more)), Text(self.decide, style="yellow")]
        elif self.progress is None and self.status == "queued":
            lines.append(Text(self.message, style="dim"))
        if self.notice:
            lines.append(Text(self.notice, style="yellow"))
        return lines


class Lines:
    """The same, line by line, for whoever is no terminal: text as soon as a line of it is whole."""

    def __init__(self, view: View, console: Console) -> None:
        self._view, self._console = view, console
        self._state: tuple[str, int, str] = ("", 0, "")
        self._said = ""
        self._printed = ""

    def show(self) -> None:
        """After each change of the view."""
        view = self._view
        if view.dropped or not view.text.startswith(self._printed):
            if self._printed:
                self._line("(The text above is void: it is written anew.)")
            self._printed = ""
        self._print(upto=view.text.rfind("\n") + 1)
        state = (view.status, view.attempt, view.decide)
        progress = "" if view.progress is None else f"{view.progress:.0%}"
        if view.notice:
            self._line(f"({view.notice})")
        elif state != self._state:
            self._print(upto=len(view.text))
            if view.status in ENDED:
                return  # the summary says it
            attempt = f"attempt {view.attempt}" if view.attempt > 1 and view.status == "running" else ""
            self._line("  ".join(filter(None, [f"[{view.status}]", attempt, progress, view.message])))
            if view.decide:
                self._line(f"({view.decide})")
        elif progress and progress + view.message != self._said:
            self._line(f"[{view.status}]  {progress}  {view.message}".rstrip())
        self._state, self._said = state, progress + view.message

    def end(self, answer: str) -> None:
        """Whatever of the text was not printed; and the answer, should it be another."""
        self._print(upto=len(self._view.text))
        if answer and answer != self._printed:
            self._line(answer)

    def _print(self, *, upto: int) -> None:
        new = self._view.text[len(self._printed) : upto]
        if new:
            self._line(new.removesuffix("\n"))
            self._printed += new

    def _line(self, text: str) -> None:
        self._console.out(text, highlight=False)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def print_columns(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
    """Left-aligned. On a terminal the last column is cut where the screen ends; elsewhere nothing is cut."""
    table = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    lines = [[Text(head, style="dim") for head in heads], *table]
    widths = [max(cell_len(line[column].plain) for line in lines) for column in range(len(heads))]
    for line in lines:
        text = Text()
        for cell, width in zip(line[:-1], widths[:-1], strict=True):
            text.append_text(cell).append(" " * (width - cell_len(cell.plain) + 2))
        last = line[-1].copy()
        room = console.width - cell_len(text.plain)
        if console.is_terminal and cell_len(last.plain) > room > 1:
            last.plain = set_cell_size(last.plain, room - 1) + "…"
        console.print(text.append_text(last), soft_wrap=True, highlight=False)
