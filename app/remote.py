"""The verbs that speak to a running Taskcast over HTTP: submit, get, list, watch, cancel, pause, resume, retry, approve,
deny, approvals, delete.

They use Shannon's API, and nothing of the store: this file imports neither, so that a verb answers at once
(measured: 0.3 s, against 0.9 s with the store's and the server's libraries). The verbs share one client, its errors and
its way of following a stream, and so one file.
"""

import ipaddress
import json
import re
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Self

import httpx
import typer
from httpx_sse import ServerSentEvent, connect_sse
from rich.console import Console
from rich.live import Live
from rich.text import Text
from typer import Argument, Option

from app.screen import STYLES, Lines, View, clean, duration, print_columns, word

Json = dict[str, Any]

DEVELOPMENT_KEY = "sk_test_123456"
"""As `identity.py` has it, which would import the store; a test holds them together."""

COMPLETED, FAILED, USAGE, CANCELLED, TIMED_OUT, MISSING = range(6)
"""Exit codes. FAILED: also a control that came too late; USAGE: also a server that cannot be reached or is ill."""
OUTCOME = {
    "TASK_STATUS_COMPLETED": COMPLETED,
    "TASK_STATUS_FAILED": FAILED,
    "TASK_STATUS_CANCELLED": CANCELLED,
    "TASK_STATUS_TIMEOUT": TIMED_OUT,
}

ANSWER_SECONDS_MAX = 30.0
SILENCE_SECONDS_MAX = 60.0
"""Of a stream; the server pings every 10 s unless it was told otherwise. Beyond, we connect again: nothing is lost."""
PAUSE_SECONDS, PAUSE_SECONDS_MAX = 0.5, 8.0
"""Before a lost stream is opened again; doubled each time."""
LOST_SECONDS_MAX = 300.0
"""So long without an answer, and the server counts as gone."""

EXIT_CODES = """Exit codes of watch and of submit --watch: 0 completed, 1 failed, 3 cancelled, 4 timed out. \
Of every verb: 1 refused, 2 wrong usage or no server, 5 no such task."""


class Problem(Exception):
    """Ends the command: one sentence for a person, one exit code for a script."""

    def __init__(self, sentence: str, code: int = USAGE) -> None:
        super().__init__(sentence)
        self.code = code


class Api:
    """A Taskcast at a URL."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise Problem(f"{url} is not a URL: {error}") from error
        if parsed.scheme not in {"http", "https"} or not parsed.host:
            raise Problem(f"{url} is not a URL: it must begin with http:// or https:// and a host.")
        here = loopback(parsed.host)
        if not key and not here:
            raise Problem(f"{self.url} needs a key: --key, or TASKCAST_KEY. `taskcast keys create` makes one.")
        self.http = httpx.Client(
            base_url=self.url,
            headers={"X-API-Key": key or DEVELOPMENT_KEY},
            timeout=httpx.Timeout(ANSWER_SECONDS_MAX, connect=10),
            trust_env=not here,  # a proxy cannot reach this machine's own loopback
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def ask(self, method: str, path: str, **options: Any) -> Json:
        """Raises Problem."""
        try:
            response = self.http.request(method, path, **options)
        except httpx.TransportError as error:
            raise self.unreachable(error) from error
        self.check(response)
        return response.json() if response.content else {}

    def check(self, response: httpx.Response) -> None:
        """Raises Problem unless the request succeeded."""
        if response.is_success:
            return
        try:
            body = json.loads(response.read())
            sentence = clean(body["error"])
        except (ValueError, KeyError, TypeError):
            raise Problem(f"What answers at {self.url} is no Taskcast (HTTP {response.status_code}).") from None
        match response.status_code:
            case 401:
                raise Problem(
                    f"{self.url} does not know this key. Give another with --key or TASKCAST_KEY; "
                    "`taskcast keys create` makes one."
                )
            case 404:
                raise Problem(f"{sentence}.", MISSING)
            case 400 | 413 | 422:
                raise Problem(f"Refused: {sentence.removesuffix('.')}.")
            case 409:
                raise Problem(f"Refused: {sentence.removesuffix('.')}.", FAILED)
            case _:
                raise Problem(f"{self.url} answered: {sentence.removesuffix('.')} (HTTP {response.status_code}).")

    def unreachable(self, error: httpx.TransportError) -> Problem:
        if isinstance(error, httpx.TimeoutException):
            return Problem(f"The Taskcast at {self.url} does not answer.")
        if isinstance(error, httpx.ConnectError):
            return Problem(f"No Taskcast answers at {self.url}. Start one with scripts/serve.")
        return Problem(f"The connection to {self.url} broke: {error}.")

    def follow(self, task: str) -> Iterator[ServerSentEvent | str]:
        """The task's events from the first one on, then live, up to and including `done`. Opens the stream again,
        behind the last event, whenever it breaks; says so, as a text, and an empty one once it is open again.
        Raises Problem.
        """
        cursor, pause, answered, lost = "", PAUSE_SECONDS, 0.0, False
        while True:
            resume = {"Last-Event-ID": cursor} if cursor else {}
            try:
                with connect_sse(
                    self.http,
                    "GET",
                    "/api/v1/stream/sse",
                    params={"workflow_id": task},
                    headers=resume,
                    timeout=httpx.Timeout(ANSWER_SECONDS_MAX, read=SILENCE_SECONDS_MAX),
                ) as source:
                    if not answered or source.response.status_code < 500:
                        self.check(source.response)
                    if source.response.status_code == 204:  # `done` was the last that we had read
                        return
                    answered = time.monotonic()
                    if lost and source.response.is_success:
                        lost = False
                        yield ""
                    for event in source.iter_sse():
                        cursor, pause, answered = event.id, PAUSE_SECONDS, time.monotonic()
                        yield event
                        if event.event == "done":
                            return
            except httpx.TransportError as error:
                if not answered:
                    raise self.unreachable(error) from error
            if time.monotonic() - answered > LOST_SECONDS_MAX:
                raise Problem(f"{self.url} has not answered for {duration(LOST_SECONDS_MAX)}; the task may go on.")
            lost = True
            yield f"The connection was lost; trying again in {pause:g} s."
            time.sleep(pause)
            pause = min(pause * 2, PAUSE_SECONDS_MAX)


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# Verbs

cli = typer.Typer()

Url = Annotated[str, Option("--url", envvar="TASKCAST_URL", help="Where Taskcast answers.", show_default=True)]
Key = Annotated[
    str,
    Option("--key", envvar="TASKCAST_KEY", help="API key; on this machine the development key is taken when absent."),
]
AsJson = Annotated[bool, Option("--json", help="JSON for programs, one object per line.")]
TaskId = Annotated[str, Argument(metavar="ID", help="The task's id.")]
Limit = Annotated[int, Option(min=1, max=100)]
Offset = Annotated[int, Option(min=0)]
Feedback = Annotated[str, Option(help="What the worker is told; of a plan: what should be different.")]
ApprovalId = Annotated[str, Option("--approval", metavar="ID", help="Which approval; the pending one when absent.")]
Reason = Annotated[str, Option(help="Why; kept with the task.")]
HERE = "http://127.0.0.1:8080"
PANEL = "Tasks, over HTTP"


@cli.command(rich_help_panel=PANEL, epilog=EXIT_CODES)
def submit(
    query: Annotated[str, Argument(help="What the task asks for.")],
    watch: Annotated[bool, Option("--watch", help="Then show it live, until it ends.")] = False,
    session: Annotated[str, Option(help="Session id; a new one when absent.")] = "",
    mode: Annotated[str, Option(help="simple, standard, complex or supervisor.")] = "",
    context: Annotated[str, Option(help='JSON object for the worker, such as \'{"echo": {"steps": 20}}\'.')] = "",
    priority: Annotated[int, Option(min=0, max=2, help="2 before 1 before 0, unless it has a delay.")] = 0,
    at: Annotated[str, Option(help="Not before this moment, such as 2030-01-31T09:00; local unless it says.")] = "",
    in_: Annotated[str, Option("--in", metavar="TIME", help="Not before so long from now: 90, 90s, 5m, 2h, 1d.")] = "",
    ttl: Annotated[str, Option(metavar="TIME", help="It times out unless it is begun so soon.")] = "",
    max_attempts: Annotated[int | None, Option(min=1, max=100, help="How often it is tried.")] = None,
    timeout: Annotated[
        str, Option("--timeout", "--timeout-seconds", metavar="TIME", help="It times out unless it ends so soon.")
    ] = "",
    as_json: AsJson = False,
    url: Url = HERE,
    key: Key = "",
) -> None:
    """Submit a task; with --watch, show it live."""
    body: Json = {"query": query}
    body |= {name: value for name, value in (("session_id", session), ("mode", mode)) if value}
    if context:
        body["context"] = _object(context)
    if at and in_:
        raise Problem("--at and --in contradict each other.")
    if at or in_:
        body["run_at"] = (
            _moment(at) if at else datetime.now(UTC) + timedelta(seconds=_seconds("--in", in_))
        ).isoformat()
    body |= {name: value for name, value in (("priority", priority), ("max_attempts", max_attempts)) if value}
    for name, option, text in (("ttl_seconds", "--ttl", ttl), ("timeout_seconds", "--timeout", timeout)):
        if text:
            body[name] = _seconds(option, text)
    with Api(url, key) as api:
        accepted = api.ask("POST", "/api/v1/tasks", json=body)
        if as_json:
            _print_json(accepted)
        elif not watch:
            _print(accepted["task_id"])
        if watch:
            raise typer.Exit(_watch(api, accepted["task_id"], as_json=as_json))


@cli.command(rich_help_panel=PANEL, epilog=EXIT_CODES)
def watch(task: TaskId, as_json: AsJson = False, url: Url = HERE, key: Key = "") -> None:
    """Show a task live, from its beginning, until it ends."""
    with Api(url, key) as api:
        raise typer.Exit(_watch(api, task, as_json=as_json))


@cli.command(rich_help_panel=PANEL)
def get(task: TaskId, as_json: AsJson = False, url: Url = HERE, key: Key = "") -> None:
    """Show a task as it is now."""
    with Api(url, key) as api:
        body = api.ask("GET", _path(task))
    if as_json:
        _print_json(body)
    else:
        _show(body)


@cli.command("list", rich_help_panel=PANEL)
def list_tasks(
    status: Annotated[
        str, Option(help="Only these: queued, running, paused, completed, failed, cancelled, timeout; with commas.")
    ] = "",
    session: Annotated[str, Option(help="Only this session's.")] = "",
    parent: Annotated[str, Option(metavar="ID", help="Only this task's sub-tasks.")] = "",
    dead: Annotated[bool, Option("--dead", help="Only those that an error ended for good; see retry.")] = False,
    limit: Limit = 20,
    offset: Offset = 0,
    as_json: AsJson = False,
    url: Url = HERE,
    key: Key = "",
) -> None:
    """List your tasks, newest first."""
    params: Json = {"limit": limit, "offset": offset, "status": status, "session_id": session, "parent_id": parent}
    if dead:
        params["dead"] = "true"
    with Api(url, key) as api:
        body = api.ask("GET", "/api/v1/tasks", params={name: value for name, value in params.items() if value != ""})
    if as_json:
        _print_json(body)
    else:
        _show_list(body, offset)


@cli.command(rich_help_panel=PANEL)
def cancel(task: TaskId, reason: Reason = "", as_json: AsJson = False, url: Url = HERE, key: Key = "") -> None:
    """End a task now; its worker is interrupted."""
    with Api(url, key) as api:
        _steer(api, "cancel", task, reason, as_json=as_json)


@cli.command(rich_help_panel=PANEL)
def pause(task: TaskId, reason: Reason = "", as_json: AsJson = False, url: Url = HERE, key: Key = "") -> None:
    """Let a task rest from its next checkpoint on."""
    with Api(url, key) as api:
        _steer(api, "pause", task, reason, as_json=as_json)


@cli.command(rich_help_panel=PANEL)
def resume(task: TaskId, reason: Reason = "", as_json: AsJson = False, url: Url = HERE, key: Key = "") -> None:
    """Let a paused task go on."""
    with Api(url, key) as api:
        _steer(api, "resume", task, reason, as_json=as_json)


@cli.command(rich_help_panel=PANEL)
def retry(task: TaskId, reason: Reason = "", as_json: AsJson = False, url: Url = HERE, key: Key = "") -> None:
    """Try a task again that has failed, timed out or was cancelled."""
    with Api(url, key) as api:
        _steer(api, "retry", task, reason, as_json=as_json)


@cli.command(rich_help_panel=PANEL)
def approve(
    task: TaskId,
    feedback: Feedback = "",
    approval: ApprovalId = "",
    as_json: AsJson = False,
    url: Url = HERE,
    key: Key = "",
) -> None:
    """Say yes to what a task waits for: an approval, or its plan."""
    with Api(url, key) as api:
        _decide(api, task, approval, feedback, approved=True, as_json=as_json)


@cli.command(rich_help_panel=PANEL)
def deny(
    task: TaskId,
    feedback: Feedback = "",
    approval: ApprovalId = "",
    as_json: AsJson = False,
    url: Url = HERE,
    key: Key = "",
) -> None:
    """Say no to what a task waits for; a plan is made anew, by your --feedback."""
    with Api(url, key) as api:
        _decide(api, task, approval, feedback, approved=False, as_json=as_json)


@cli.command(rich_help_panel=PANEL)
def approvals(limit: Limit = 20, offset: Offset = 0, as_json: AsJson = False, url: Url = HERE, key: Key = "") -> None:
    """List what your tasks wait for: approvals, and plans to review."""
    with Api(url, key) as api:
        body = api.ask("GET", "/api/v1/approvals", params={"limit": limit, "offset": offset})
    if as_json:
        _print_json(body)
    else:
        _show_approvals(body, offset)


@cli.command(rich_help_panel=PANEL)
def delete(task: TaskId, url: Url = HERE, key: Key = "") -> None:
    """Delete a task and everything of it, for ever."""
    with Api(url, key) as api:
        api.ask("DELETE", _path(task))
    _print(f"Task {task} is deleted.")


def _path(task: str) -> str:
    if not task or not all(c.isascii() and (c.isalnum() or c in ":_.-") for c in task) or task in {".", ".."}:
        raise Problem(f"{clean(task)!r} is not a task id.")
    return f"/api/v1/tasks/{task}"


def _object(text: str) -> Json:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Problem(f"--context is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Problem('--context must be a JSON object, such as \'{"echo": {"steps": 20}}\'.')
    return value


_TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd]?)")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def _seconds(option: str, text: str) -> float:
    found = _TIME.fullmatch(text.strip())
    if not found or float(found[1]) > 1e9:
        raise Problem(f"{option} must be a time, such as 90, 90s, 5m, 2h or 1d.")
    return float(found[1]) * _UNITS[found[2]]


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise Problem("--at must be a moment, such as 2030-01-31T09:00 or 2030-01-31T09:00:00Z.") from error


def _decide(api: Api, task: str, approval: str, feedback: str, *, approved: bool, as_json: bool) -> None:
    path = _path(task)
    if not approval:
        body = api.ask("GET", path)
        plan = body.get("review") or {}
        if plan.get("pending"):
            _review(api, task, plan["version"], feedback, approved=approved, as_json=as_json)
            return
        if "approval" not in body:
            raise Problem(f"Task {task} waits for no decision.", FAILED)
        approval = body["approval"]["approval_id"]
    decision = {"workflow_id": task, "approval_id": approval, "approved": approved, "feedback": feedback}
    answer = api.ask("POST", "/api/v1/approvals/decision", json=decision)
    if as_json:
        _print_json(answer)
    else:
        _print(f"Approval {clean(approval)} of task {task} is {'given' if approved else 'denied'}.")


def _review(api: Api, task: str, version: int, feedback: str, *, approved: bool, as_json: bool) -> None:
    if not approved and not feedback:
        raise Problem("A plan is not denied but changed: say with --feedback what should be different.")
    asked = {"action": "approve"} if approved else {"action": "feedback", "message": feedback}
    body = api.ask("POST", f"{_path(task)}/review", json=asked, headers={"If-Match": str(version)})
    if as_json:
        _print_json(body)
    elif approved:
        _print(f"The plan of task {task} is approved.")
    elif body["version"] == version:
        _print(f"The worker of task {task} makes another plan; `taskcast approvals` shows when it is there.")
    else:
        _print(f"The next plan of task {task}:\n\n{clean(body['current_plan'])}")


def _steer(api: Api, verb: str, task: str, reason: str, *, as_json: bool) -> None:
    body = api.ask("POST", f"{_path(task)}/{verb}", json={"reason": reason} if reason else {})
    if as_json:
        _print_json(body)
    if not body.get("success"):
        raise Problem(f"{clean(body.get('message', 'Refused'))}.", FAILED)
    if not as_json:
        _print(f"Task {task} {STEERED[verb]}.")


STEERED = {
    "cancel": "is cancelled",
    "pause": "pauses at its next checkpoint",
    "resume": "goes on",
    "retry": "is queued again",
}


def _watch(api: Api, task: str, *, as_json: bool) -> int:
    """The exit code."""
    path = _path(task)
    view = View(task)
    if as_json:
        for event in api.follow(task):
            if isinstance(event, str):
                sys.stderr.write(f"{event}\n" if event else "")
            elif event.event != "done":
                _print_json({"event": event.event, "id": event.id, "data": event.json()})
        return OUTCOME.get(api.ask("GET", path)["status"], FAILED)
    console = Console()
    if console.is_terminal:
        body = _live(api, view, console, path)
    else:
        lines = Lines(view, console)
        for event in api.follow(task):
            _take(view, event)
            lines.show()
        body = api.ask("GET", path)
        lines.end(_answer(body))
    console.print(_summary(body), soft_wrap=True, highlight=False)
    return OUTCOME.get(body["status"], FAILED)


def _live(api: Api, view: View, console: Console, path: str) -> Json:
    """While it runs, the screen's last lines are drawn again and again; what stays is the whole text, once."""
    try:
        with Live(view, console=console, refresh_per_second=12, transient=True):
            for event in api.follow(view.task):
                _take(view, event)
            body = api.ask("GET", path)
    except BaseException:
        _print_text(console, view.text)
        raise
    _print_text(console, _answer(body) or view.text)
    return body


def _take(view: View, event: ServerSentEvent | str) -> None:
    if isinstance(event, str):
        view.notice, view.dropped = event, False
    elif event.event != "done":
        view.take(event.event, event.json())


def _answer(body: Json) -> str:
    return clean(body.get("result") or "")


def _print_text(console: Console, text: str) -> None:
    if text:
        console.print(Text(text), soft_wrap=True)
        console.print()


def _summary(body: Json) -> Text:
    status = word(body["status"])
    mark = {"completed": "✓", "failed": "✗", "timed out": "✗"}.get(status, "■")
    parts = [f"{mark} {status}"]
    if took := _seconds_between(body.get("created_at"), body.get("completed_at")):
        parts[0] += f" after {duration(took)}"
    usage = body.get("usage") or {}
    if tokens := usage.get("total_tokens"):
        parts.append(f"{tokens:,} tokens")
    if cost := usage.get("estimated_cost"):
        parts.append(f"${cost:.6f}".rstrip("0").rstrip("."))
    if model := body.get("model_used"):
        parts.append(clean(model))
    if (body.get("attempt") or 0) > 1:
        parts.append(f"{body['attempt']} attempts")
    text = Text(" · ".join(parts), style=STYLES.get(status, ""))
    if error := body.get("error"):
        text.append(f"\n  {clean(error)}", style="not bold")
    return text


def _show(body: Json) -> None:
    console = Console()
    now = datetime.now(UTC)
    status = word(body["status"])
    started, ended = body.get("started_at"), body.get("completed_at")
    usage = body.get("usage") or {}
    took = _seconds_between(started or body["created_at"], ended)
    rows = {
        "task": body["task_id"],
        "status": Text(status, style=f"bold {STYLES.get(status, '')}"),
        "error": body.get("error"),
        "waits for": _waits_for(body),
        "next": _local(body["next_attempt_at"]) if body.get("next_attempt_at") else None,
        "query": body["query"],
        "session": body["session_id"],
        "parent": body.get("parent_task_id"),
        "children": str(body["children"]) if body.get("children") else None,
        "mode": body["mode"].removeprefix("EXECUTION_MODE_").lower(),
        "created": f"{_local(body['created_at'])} ({ago(body['created_at'], now)})",
        "took": duration(took) if ended else None,
        "progress": f"{body['progress']:.0%}" if body.get("progress") and not ended else None,
        "attempt": str(body["attempt"]) if (body.get("attempt") or 0) > 1 else None,
        "model": " by ".join(filter(None, [body.get("model_used"), body.get("provider")])),
        "tokens": f"{usage['input_tokens']:,} in, {usage['output_tokens']:,} out" if usage else None,
        "cost": f"${usage['estimated_cost']:.6f}" if usage.get("estimated_cost") else None,
    }
    for name, value in rows.items():
        if value:
            line = Text.assemble((f"{name:<10}", "dim"), value if isinstance(value, Text) else clean(value))
            console.print(line, soft_wrap=True, highlight=False)
    if result := _answer(body):
        console.print()
        console.print(Text(result), soft_wrap=True)


def _waits_for(body: Json) -> str:
    if approval := body.get("approval"):
        return f"your approval {approval['approval_id']}: {approval['reason']}"
    plan = body.get("review") or {}
    return f"your review of its plan {plan['version']}" if plan.get("pending") else ""


def _show_approvals(body: Json, offset: int) -> None:
    console = Console()
    if not body["approvals"]:
        _print("Nothing waits for you." if not body["total_count"] else f"No more: there are {body['total_count']:,}.")
        return
    now = datetime.now(UTC)
    rows: list[list[str | Text]] = []
    for item in body["approvals"]:
        name = item["approval_id"] or f"plan {item['payload']['version']}"
        reason = " ".join(clean(item["reason"]).split())
        rows.append([item["task_id"], ago(item["requested_at"], now), clean(name), reason])
    print_columns(console, ("TASK", "ASKED", "APPROVAL", "REASON"), rows)
    _show_more(console, offset + len(rows), body["total_count"])


def _show_list(body: Json, offset: int) -> None:
    console = Console()
    if not body["tasks"]:
        _print("No tasks." if not body["total_count"] else f"No more tasks: there are {body['total_count']:,}.")
        return
    now = datetime.now(UTC)
    rows: list[list[str | Text]] = []
    for item in body["tasks"]:
        status, tokens = word(item["status"]), item["total_token_usage"]["total_tokens"]
        about = [ago(item["created_at"], now), f"{tokens:,}" if tokens else "", " ".join(clean(item["query"]).split())]
        rows.append([item["task_id"], Text(status, style=STYLES.get(status, "")), *about])
    print_columns(console, ("TASK", "STATUS", "CREATED", "TOKENS", "QUERY"), rows)
    _show_more(console, offset + len(rows), body["total_count"])


def _show_more(console: Console, last: int, total: int) -> None:
    if last < total:
        more = f"{last:,} of {total:,}; --offset {last} shows more."
        console.print(more, style="dim", soft_wrap=True, highlight=False)


def _seconds_between(begin: str | None, end: str | None) -> float:
    if not begin or not end:
        return 0.0
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def ago(moment: str, now: datetime) -> str:
    seconds = (now - datetime.fromisoformat(moment)).total_seconds()
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return "now" if seconds < 1 else f"{seconds:.0f} s ago"


def _local(moment: str) -> str:
    return f"{datetime.fromisoformat(moment).astimezone():%Y-%m-%d %H:%M:%S}"


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _print_json(body: Json) -> None:
    """Flushed, for whoever reads a pipe reads live."""
    sys.stdout.write(json.dumps(body, separators=(",", ":")) + "\n")
    sys.stdout.flush()
