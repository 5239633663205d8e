"""The command `taskcast`, as a user or a script meets it: real processes, what they print, what they exit with."""

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
from msgspec import Struct
from shannon import Event, ShannonClient, TaskStatus  # type: ignore[import-untyped]

from app import cli, events, identity, remote
from app.errors import Misconfigured
from app.local import settings_of, size_of, without_password
from app.store import Store
from tests.api.serving import Attempt
from tests.api.serving import submit as submit_to
from tests.system.conftest import KEY, ROOT, TASKCAST, Server, client_of, ended, proxy, running, submit
from tests.waiting import wait_until
from workers import model

pytestmark = pytest.mark.timeout(120)  # a dozen processes, one after the other, each a second of a core

TEXT = "one two\nthree four\nfive six"


class Ran(Struct, frozen=True):
    code: int
    out: str
    err: str


class Started(Struct):
    """A process that writes to files: nobody has to read what it says, or loses any of it."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    async def says(self, what: str, *, times: int = 1) -> None:
        await wait_until(lambda: self.out.count(what) >= times, f"{what!r} is said")

    async def end(self) -> Ran:
        code = await asyncio.to_thread(self.process.wait)
        return Ran(code, self.out, (self.folder / "err").read_text())


started: list[Started] = []


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    while started:
        one = started.pop()
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGINT)
            one.process.wait()


def environment(**changed: str) -> dict[str, str]:
    foreign = {name: value for name, value in os.environ.items() if not name.startswith("TASKCAST_")}
    return {**foreign, "COLUMNS": "100", **changed}


def start(*words: str, **changed: str) -> Started:
    folder = Path(tempfile.mkdtemp(prefix="taskcast-cli-"))
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(
            [TASKCAST, *words],
            cwd=ROOT,
            env=environment(**changed),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    started.append(Started(process, folder))
    return started[-1]


async def taskcast(*words: str, **changed: str) -> Ran:
    ran = await start(*words, **changed).end()
    assert "Traceback" not in ran.err
    return ran


def echo(**pace: object) -> str:
    return json.dumps({"echo": pace})


# Verbs over HTTP


async def test_submit_watch_prints_the_text_line_by_line_and_exits_0(server: Server) -> None:
    ran = await taskcast("submit", TEXT, "--watch", TASKCAST_URL=server.url)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert [line for line in lines if line in TEXT.splitlines()] == TEXT.splitlines()
    assert "[running]" in ran.out
    assert re.fullmatch(r"✓ completed after .* s · 12 tokens · echo-1", lines[-1])


async def test_submit_prints_the_id_and_get_and_list_show_the_task(server: Server) -> None:
    submitted = await taskcast("submit", "shown by get", "--session", "cli-shown", TASKCAST_URL=server.url)
    id_ = submitted.out.strip()
    assert submitted == Ran(0, f"{id_}\n", "")
    watched = await taskcast("watch", id_, TASKCAST_URL=server.url)
    assert watched.code == 0
    got = await taskcast("get", id_, "--url", server.url)
    assert got.code == 0
    for shown in (id_, "completed", "cli-shown", "echo-1 by taskcast", "3 in, 3 out", "shown by get"):
        assert shown in got.out
    found = await taskcast("list", "--session", "cli-shown", "--status", "completed", TASKCAST_URL=server.url)
    assert [line.split()[:2] for line in found.out.splitlines()[1:]] == [[id_, "completed"]]
    none = await taskcast("list", "--session", "cli-nothing", TASKCAST_URL=server.url)
    assert none == Ran(0, "No tasks.\n", "")


async def test_json_is_one_object_per_line(server: Server) -> None:
    ran = await taskcast("submit", "a b", "--watch", "--json", TASKCAST_URL=server.url)
    assert ran.code == 0
    first, *told = [json.loads(line) for line in ran.out.splitlines()]
    assert first["status"] == "STATUS_CODE_OK"
    assert [event["event"] for event in told][-1] == "WORKFLOW_COMPLETED"
    assert "".join(e["data"]["delta"] for e in told if e["event"] == "thread.message.delta") == "a b"
    assert all(event["id"] for event in told)
    got = await taskcast("get", first["task_id"], "--json", TASKCAST_URL=server.url)
    assert json.loads(got.out)["result"] == "a b"
    listed = await taskcast("list", "--limit", "1", "--json", TASKCAST_URL=server.url)
    assert len(json.loads(listed.out)["tasks"]) == 1
    await taskcast("submit", "another", TASKCAST_URL=server.url)
    short = await taskcast("list", "--limit", "1", TASKCAST_URL=server.url)
    assert re.search(r"^1 of \d+; --offset 1 shows more\.$", short.out, re.MULTILINE)


async def test_exit_codes_tell_how_the_task_ended(server: Server) -> None:
    url = {"TASKCAST_URL": server.url}
    failed = await taskcast("submit", "x", "--watch", "--context", echo(fail="No more tea."), **url)
    assert failed.code == 1
    assert failed.out.splitlines()[-1] == "  No more tea."
    late = await taskcast("submit", "x", "--watch", "--timeout-seconds", "1", "--context", echo(delay_ms=9000), **url)
    assert late.code == 4
    assert "✗ timed out" in late.out
    async with client_of(server.url) as http:
        id_ = await submit(http, "y", context={"echo": {"delay_ms": 20_000}})
        watching = start("watch", id_, **url)
        await wait_until(lambda: running(http, id_), "the task runs")
        assert (await taskcast("cancel", id_, "--reason", "enough", **url)).out == f"Task {id_} is cancelled.\n"
        cancelled = await watching.end()
    assert cancelled.code == 3
    assert "■ cancelled" in cancelled.out


async def test_a_control_that_comes_too_late_exits_1_and_says_why(server: Server) -> None:
    url = {"TASKCAST_URL": server.url}
    id_ = (await taskcast("submit", "x", **url)).out.strip()
    await taskcast("watch", id_, **url)
    assert await taskcast("cancel", id_, **url) == Ran(1, "", "Failed to cancel task: cannot cancel completed task.\n")
    assert await taskcast("pause", id_, **url) == Ran(1, "", "Refused: cannot pause completed task.\n")


async def test_pause_resume_and_delete(server: Server) -> None:
    url = {"TASKCAST_URL": server.url}
    async with client_of(server.url) as http:
        id_ = await submit(http, "a", context={"echo": {"delay_ms": 50_000}})
        await wait_until(lambda: running(http, id_), "the task runs")
        assert await taskcast("pause", id_, **url) == Ran(0, f"Task {id_} pauses at its next checkpoint.\n", "")
        assert "paused" in (await taskcast("get", id_, **url)).out
        assert await taskcast("resume", id_, **url) == Ran(0, f"Task {id_} goes on.\n", "")
        assert (await taskcast("cancel", id_, "--json", **url)).out.startswith('{"success":true')
    assert await taskcast("delete", id_, **url) == Ran(0, f"Task {id_} is deleted.\n", "")
    for verb in ("get", "watch", "delete", "cancel"):
        assert await taskcast(verb, id_, **url) == Ran(5, "", "Task not found.\n")


async def test_a_task_that_waits_is_watched_listed_approved_and_denied(server: Server, shared: Store) -> None:
    url = {"TASKCAST_URL": server.url}
    id_ = await submit_to(shared, queue="cli-approvals", query="ship it")
    (claimed,) = await shared.claim(["cli-approvals"], "test", 1)
    attempt = Attempt(shared, id_, claimed.fence)
    watching = start("watch", id_, **url)
    await attempt.say(events.ApprovalRequested(approval="ap1", reason="Deploy to production?"))
    await watching.says("[paused]  Needs approval: Deploy to production?")
    await watching.says(f"(To decide: taskcast approve {id_}, or taskcast deny {id_})")
    got = await taskcast("get", id_, **url)
    assert re.search(r"^waits for +your approval ap1: Deploy to production\?$", got.out, re.MULTILINE)
    listed = await taskcast("approvals", **url)
    head, *rows = listed.out.splitlines()
    assert head.split() == ["TASK", "ASKED", "APPROVAL", "REASON"]
    assert [row for row in rows if row.startswith(id_) and row.endswith("ap1       Deploy to production?")]
    said = await taskcast("approve", id_, "--feedback", "Go.", **url)
    assert said == Ran(0, f"Approval ap1 of task {id_} is given.\n", "")
    await watching.says("[running]  Approved.")

    await attempt.say(events.ApprovalRequested(approval="ap2", reason="Really?"))
    assert (await taskcast("deny", id_, "--json", **url)).out.startswith('{"status":"sent","success":true')
    late = await taskcast("approve", id_, "--approval", "ap2", **url)
    assert late == Ran(1, "", "Refused: Approval ap2 was already denied.\n")
    await attempt.complete()
    ran = await watching.end()
    assert (ran.code, ran.err) == (0, "")


async def test_a_plan_that_waits_for_its_review_is_shown_and_approved(server: Server, shared: Store) -> None:
    url = {"TASKCAST_URL": server.url}
    id_ = await submit_to(shared, queue="cli-plans")
    (claimed,) = await shared.claim(["cli-plans"], "test", 1)
    attempt = Attempt(shared, id_, claimed.fence)
    await attempt.say(events.ReviewRequested(plan="1. Ask.\n2. Tell.", version=1))
    watching = start("watch", id_, **url)
    await watching.says("[paused]  1. Ask.\n2. Tell.\n(To decide: ")
    assert "plan 1    A plan waits for its review." in (await taskcast("approvals", **url)).out
    assert "your review of its plan 1" in (await taskcast("get", id_, **url)).out
    assert await taskcast("approve", id_, **url) == Ran(0, f"The plan of task {id_} is approved.\n", "")
    await attempt.complete()
    assert (await watching.end()).code == 0


async def test_a_dead_task_is_listed_and_tried_again(server: Server, shared: Store) -> None:
    url = {"TASKCAST_URL": server.url}
    parent = await submit_to(shared, queue="cli-parent", session="cli-dead")
    id_ = await submit_to(shared, queue="cli-dead", session="cli-dead", parent=parent)

    async def tried(event: events.AnyEvent) -> None:
        (claimed,) = await shared.claim(["cli-dead"], "test", 1)
        await Attempt(shared, id_, claimed.fence).say(event)

    watching = start("watch", id_, **url)
    await tried(events.Requeued(error="ValueError: busy", delay_seconds=0.1))
    await watching.says("[queued]  attempt 1 failed: ValueError: busy; next in 0.1 s")
    late = await taskcast("retry", id_, **url)
    assert late == Ran(1, "", "Refused: task has not ended.\n")

    async def ready() -> bool:
        found = await shared.claim(["cli-dead"], "test", 1)
        for claimed in found:
            await Attempt(shared, id_, claimed.fence).say(events.Errored(error="ValueError: broken"))
        return bool(found)

    await wait_until(ready, "the delay is over")
    assert (await watching.end()).code == 1
    for words in (("--dead", "--session", "cli-dead"), ("--parent", parent)):
        found = await taskcast("list", *words, **url)
        assert [line.split()[:2] for line in found.out.splitlines()[1:]] == [[id_, "failed"]]
    assert re.search(rf"^parent +{parent}$", (await taskcast("get", id_, **url)).out, re.MULTILINE)
    assert await taskcast("retry", id_, "--reason", "mended", **url) == Ran(0, f"Task {id_} is queued again.\n", "")
    await tried(events.Completed(result="done"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("get x --url URL --key sk_wrong", "does not know this key"),
        ("get x --url http://taskcast.example", "needs a key"),
        ("get x --url 127.0.0.1:8080", "is not a URL"),
        ("get ../x --url URL", "is not a task id"),
        ("submit x --mode odd --url URL", "Refused: Invalid mode"),
        ("submit x --context [1] --url URL", "must be a JSON object"),
        ("submit x --context { --url URL", "is not JSON"),
        ("submit x --in soon --url URL", "--in must be a time"),
        ("submit x --ttl 1w --url URL", "--ttl must be a time"),
        ("submit x --at 9 --in 9 --url URL", "contradict"),
        ("submit x --at tomorrow --url URL", "--at must be a moment"),
        ("submit x --in 9999d --url URL", "Refused: run_at out of range"),
        ("submit x --priority 3 --url URL", "--priority must be less than or equal to 2"),
        ("list --dead --status failed --url URL", "Refused: dead=true is a status of its own"),
        ("approve ../x --url URL", "is not a task id"),
        ("serve --port 99999", "--port must be a whole number from 0 to 65535, not '99999'."),
        ("serve --port many", "--port must be a whole number from 0 to 65535, not 'many'."),
        ("serve --keep-days -1", "--keep-days must be a number of at least 0, not '-1'."),
        ("list --limit many", "--limit must be a whole number. See taskcast list --help."),
        ("list --limit 101", "--limit must be less than or equal to 100. See taskcast list --help."),
        ("get", "Missing argument 'ID'. See taskcast get --help."),
        ("get x --odd", "No such option: --odd. See taskcast get --help."),
        ("odd", "No such command 'odd'. See taskcast --help."),
        ("serve --no-worker --llm", "contradict"),
        ("verify --data no-such-folder", "is no data folder"),
        ("keys list --data no-such-folder", "is no data folder"),
        ("agents list --data no-such-folder", "is no data folder"),
        ("agents set", "Missing argument 'ID'. See taskcast agents set --help."),
        ("rebuild --redis redis://127.0.0.1:1", "with --yes"),
    ],
)
def test_what_cannot_work_exits_2_with_one_sentence(
    words: str, said: str, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["taskcast", *words.replace("URL", server.url).split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


async def test_what_cannot_be_reached_or_run_exits_2_with_one_sentence() -> None:
    gone = await taskcast("get", "x", "--url", "http://127.0.0.1:1")
    assert gone == Ran(2, "", "No Taskcast answers at http://127.0.0.1:1. Start one with scripts/serve.\n")
    for words, said in [
        (("serve", "--redis", "redis://127.0.0.1:1", "--port", "0"), "cannot be reached"),
        (("worker", "no_such_module"), "There is no module no_such_module"),
    ]:
        ran = await taskcast(*words)
        assert (ran.code, ran.out) == (2, ""), words
        assert said in ran.err
        assert ran.err.count("\n") == 1


async def test_watch_goes_on_behind_its_cursor_when_the_connection_breaks(server: Server) -> None:
    async with client_of(server.url) as http, proxy(server.port, [900, 1800]) as cutting:
        id_ = await submit(http, TEXT, context={"echo": {"steps": 6, "delay_ms": 150}})
        ran = await taskcast("watch", id_, TASKCAST_URL=cutting.url)
    assert ran.code == 0
    assert cutting.cut == 2
    assert ran.out.count("(The connection was lost; trying again in 0.5 s.)") == 2
    assert [line for line in ran.out.splitlines() if line in TEXT.splitlines()] == TEXT.splitlines()
    async with proxy(server.port, [900]) as cutting:
        ran = await taskcast("watch", id_, "--json", TASKCAST_URL=cutting.url)
    assert (ran.code, ran.err) == (0, "The connection was lost; trying again in 0.5 s.\n")
    cursors = [json.loads(line)["id"] for line in ran.out.splitlines()]
    assert len(cursors) == len(set(cursors))


async def test_a_reader_who_leaves_is_not_told_as_a_failed_task(server: Server) -> None:
    for words in (("submit", "a b c", "--watch"), ("submit", "a b c", "--watch", "--json"), ("list",)):
        ours, theirs = os.pipe()
        os.close(ours)
        with os.fdopen(theirs, "wb") as closed:
            process = await asyncio.create_subprocess_exec(
                *(TASKCAST, *words),
                env=environment(TASKCAST_URL=server.url),
                stdout=closed,
                stderr=asyncio.subprocess.PIPE,
            )
        _, err = await process.communicate()
        assert (process.returncode, err) == (141, b""), words


async def test_what_is_piped_is_not_wrapped(server: Server) -> None:
    why = "No more tea. " * 20
    ran = await taskcast("submit", "x", "--watch", "--context", echo(fail=why), TASKCAST_URL=server.url, COLUMNS="80")
    assert ran.out.splitlines()[-1].strip() == why.strip()


async def test_ctrl_c_ends_watch_quietly_and_the_task_goes_on(server: Server) -> None:
    async with client_of(server.url) as http:
        id_ = await submit(http, "a b", context={"echo": {"steps": 2, "delay_ms": 1500}})
        watching = start("watch", id_, TASKCAST_URL=server.url)
        await watching.says("queued")
        watching.process.send_signal(signal.SIGINT)
        ran = await watching.end()
        assert (ran.code, ran.err) == (130, "")
        await wait_until(lambda: ended(http, id_), "the task ends")


class Terminal:
    """A process on a terminal of its own, and all that it wrote there."""

    def __init__(self, *words: str, **changed: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))
        one = {"env": environment(TERM="xterm-256color", COLUMNS="90", **changed), "start_new_session": True}
        self.process = subprocess.Popen([TASKCAST, *words], stdin=theirs, stdout=theirs, stderr=theirs, **one)  # type: ignore[call-overload]
        os.close(theirs)
        self.raw = ""
        self._reading = asyncio.create_task(asyncio.to_thread(self._read))

    def _read(self) -> None:
        with suppress(OSError):  # Linux says in this way that the other end is closed
            while piece := os.read(self._ours, 65536):
                self.raw += piece.decode()
        os.close(self._ours)

    async def end(self) -> int:
        await self._reading
        code: int = await asyncio.to_thread(self.process.wait)
        return code

    @property
    def kept(self) -> str:
        """What is left behind the last line that was wiped."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw[self.raw.rindex("\x1b[2K") :]).replace("\r", "").strip()


async def test_on_a_terminal_the_task_is_shown_live_and_stays_as_text_and_summary(server: Server) -> None:
    terminal = Terminal("submit", TEXT, "--watch", "--context", echo(steps=6, delay_ms=120), TASKCAST_URL=server.url)
    assert await terminal.end() == 0
    for shown in ("━", "Step 3 of 6", "running"):
        assert shown in terminal.raw
    assert terminal.kept.startswith(TEXT)
    assert "✓ completed" in terminal.kept


async def test_on_a_terminal_ctrl_c_leaves_the_text_so_far(server: Server) -> None:
    terminal = Terminal("submit", TEXT, "--watch", "--context", echo(steps=6, delay_ms=700), TASKCAST_URL=server.url)
    await wait_until(lambda: "Step 2 of 6" in terminal.raw, "the second step is shown")
    terminal.process.send_signal(signal.SIGINT)
    assert await terminal.end() == 130
    assert terminal.kept.startswith("one two")
    assert "Traceback" not in terminal.raw


async def test_help_names_the_verbs_and_the_exit_codes() -> None:
    ran = await taskcast("--help")
    assert ran.code == 0
    for verb in [
        "serve",
        "worker",
        "submit",
        "watch",
        "get",
        "list",
        "cancel",
        "pause",
        "resume",
        "retry",
        "approve",
        "deny",
        "approvals",
        "delete",
        "keys",
        "agents",
        "verify",
        "rebuild",
    ]:
        assert re.search(rf"│ {verb} ", ran.out), verb
    assert "3 cancelled" in ran.out
    assert " api " not in ran.out  # how `serve` starts one process is nobody's business


def test_both_halves_of_the_command_know_the_same_development_key() -> None:
    assert remote.DEVELOPMENT_KEY == identity.DEVELOPMENT_KEY == KEY


# serve


class Served(Struct):
    started: Started
    url: str
    pids: dict[str, list[int]]
    """Of its children, by label, as the welcome names them."""

    @property
    def out(self) -> str:
        return self.started.out

    async def says(self, what: str, *, times: int = 1) -> None:
        await self.started.says(what, times=times)


@asynccontextmanager
async def serving(folder: Path, *words: str, **changed: str) -> AsyncIterator[Served]:
    one = start("serve", "--port", "0", "--data", str(folder / "data"), *words, **changed)
    await one.says("Ctrl-C stops all of it.")
    (url,) = re.findall(r"^  API +(http://127\.0\.0\.1:\d+) ", one.out, re.MULTILINE)
    told = re.findall(r"^  (\w+) .*process(?:es)? ([\d, ]+)$", one.out, re.MULTILINE)
    yield Served(one, url, {label: [int(pid) for pid in pids.split(",")] for label, pids in told})
    one.process.send_signal(signal.SIGINT)
    await one.end()


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie is dead; whoever adopts it will see


def in_use(folder: Path) -> bool:
    """Whether a Valkey server lives on this data."""
    with (folder / "data" / "server").open() as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


async def test_serve_says_what_runs_starts_again_what_dies_and_stops_all_on_ctrl_c(tmp_path: Path) -> None:
    async with serving(tmp_path, TASKCAST_LEASE_SECONDS="1") as served:
        for said in (
            "The development key sk_test_123456 is accepted here, because",
            "0 tasks, kept for ever",
            "on default and agent:echo",
            f"curl {served.url}/api/v1/tasks -H 'X-API-Key: sk_test_123456'",
        ):
            assert said in served.out
        (api,), (worker,) = served.pids["API"], served.pids["Worker"]

        context = echo(steps=6, delay_ms=300)
        watching = start("submit", TEXT, "--watch", "--context", context, TASKCAST_URL=served.url)
        await watching.says("50%")
        os.kill(worker, signal.SIGKILL)
        await served.says(f"The worker workers.echo (process {worker}) was ended by SIGKILL; it starts again in 0.5 s.")
        os.kill(api, signal.SIGKILL)
        await served.says(f"The API (process {api}) was ended by SIGKILL; it starts again in 0.5 s.")
        ran = await watching.end()
        assert ran.code == 0
        for said in ("The connection was lost", "The text above is void", "attempt 2"):
            assert said in ran.out
        assert ran.out.splitlines()[-1].endswith("2 attempts")
        again = [int(pid) for pid in re.findall(r"runs again \(process (\d+)\)", served.out)]
        assert len(again) == 2
        assert all(lives(pid) for pid in again)

        served.started.process.send_signal(signal.SIGINT)
        assert (await served.started.end()).code == 0
        assert not any(lives(pid) for pid in again)
        assert not in_use(tmp_path)
        async with client_of(served.url) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get("/health")


async def test_children_do_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    async with serving(tmp_path, TASKCAST_GRACE_SECONDS="1") as served:
        children = [*served.pids["API"], *served.pids["Worker"]]
        served.started.process.kill()
        await wait_until(lambda: not any(lives(pid) for pid in children), "all children end")
        await wait_until(lambda: not in_use(tmp_path), "the store stops")


def piped(*words: str) -> subprocess.Popen[str]:
    """With its output in a pipe, for somebody who stops listening."""
    return subprocess.Popen(
        [TASKCAST, *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


async def test_a_server_to_whom_nobody_listens_any_more_keeps_its_children(tmp_path: Path) -> None:
    with piped("serve", "--port", "0", "--data", str(tmp_path / "data")) as process:
        try:
            assert process.stdout
            said = ""
            while "Ctrl-C" not in said:
                said += await asyncio.to_thread(process.stdout.readline)
            process.stdout.close()
            (url, *_) = re.findall(r"http://127\.0\.0\.1:\d+", said)
            for label in ("Worker", "API"):
                found = re.search(rf"^  {label} .*process (\d+)$", said, re.MULTILINE)
                assert found
                os.kill(int(found[1]), signal.SIGKILL)
            assert (await taskcast("submit", "x", "--watch", TASKCAST_URL=url)).code == 0
        finally:
            process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(process.wait) == 0


async def test_several_api_processes_share_the_port_and_a_second_server_is_told_so(tmp_path: Path) -> None:
    async with serving(tmp_path, "--processes", "2", "--no-worker") as served:
        assert len(served.pids["API"]) == 2
        port = served.url.rpartition(":")[2]
        second = await taskcast("serve", "--port", port, "--data", str(tmp_path / "other"))
        assert second == Ran(2, "", f"Port {port} of 127.0.0.1 is in use; choose another one with --port.\n")
        os.kill(served.pids["API"][0], signal.SIGKILL)
        async with client_of(served.url) as http:
            assert await submit(http, "answered by the other one, or once this one is back")
        await served.says("API process 1 runs again")


async def test_several_api_processes_tell_the_same_metrics_and_count_every_task_once(tmp_path: Path) -> None:
    def shared_folders() -> list[Path]:
        return [*tmp_path.glob("taskcast-metrics-*")]

    async with serving(tmp_path, "--processes", "2", "--no-worker", TMPDIR=str(tmp_path)) as served:
        pids = served.pids["API"]
        assert len(shared_folders()) == 1

        async def scrape(pid: int) -> dict[str, str]:
            """What this process answers: the others are stopped meanwhile."""
            others = [other for other in pids if other != pid]
            try:
                for other in others:
                    os.kill(other, signal.SIGSTOP)
                async with client_of(served.url) as http:
                    text = (await http.get("/metrics")).text
            finally:
                for other in others:
                    os.kill(other, signal.SIGCONT)
            lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith("taskcast_")]
            # Scrapes are requests too, and age goes on.
            return {name: value for name, _, value in lines if "request" not in name and "seconds" not in name}

        for _ in range(14):
            async with client_of(served.url) as http:  # a connection each: both processes are met
                await submit(http, "counted once")
        first = await scrape(pids[0])
        assert first["taskcast_tasks_submitted_total"] == "14.0"
        assert first['taskcast_events_total{kind="submitted"}'] == "14.0"
        assert first['taskcast_queue_tasks{queue="default"}'] == "14.0"
        assert first["taskcast_streams_open"] == "0.0"
        for pid in pids * 3:
            assert await scrape(pid) == first

        os.kill(pids[0], signal.SIGKILL)
        await served.says("API process 1 runs again")
        pids[0] = int(re.findall(r"runs again \(process (\d+)\)", served.out)[0])
        async with client_of(served.url) as http:
            await submit(http, "counted by either")
        for pid in pids:
            assert (await scrape(pid))["taskcast_tasks_submitted_total"] == "15.0"
    assert not shared_folders()


async def test_with_llm_a_local_model_answers_the_tasks(tmp_path: Path) -> None:
    try:
        model.find_weights()
    except Misconfigured as absent:
        pytest.skip(str(absent))
    async with serving(tmp_path, "--llm") as served:
        assert len(served.pids["Model"]) == 1
        ran = await taskcast("submit", "What is the capital of France?", "--watch", TASKCAST_URL=served.url)
        assert ran.code == 0
        assert "Paris" in ran.out
        assert ran.out.splitlines()[-1].endswith("smollm2-135m-instruct")
        told, status = await asyncio.to_thread(asked, served.url, "What is the capital of France?")
    deltas = [event.message for event in told if event.type == "thread.message.delta" and event.message]
    assert len(deltas) >= 2
    assert "".join(deltas).strip() == status.result.strip()
    assert "Paris" in status.result
    assert (status.model_used, status.provider) == (model.NAME, "llama.cpp")
    assert status.usage["input_tokens"] > 0
    assert status.usage["output_tokens"] > 0


def asked(url: str, query: str) -> tuple[list[Event], TaskStatus]:
    """Through the blocking SDK, with a loop of our own: it makes one otherwise, and never closes it."""
    with asyncio.Runner() as runner:
        asyncio.set_event_loop(runner.get_loop())
        with ShannonClient(url, api_key=KEY) as client:
            handle = client.submit_task(query)
            told = list(client.stream(handle.task_id))
            return told, client.wait(handle.task_id, timeout=20)


async def test_options_of_serve_worker_and_list_do_what_they_say_and_a_closed_terminal_ends_all(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    one = start("serve", "--no-worker", "--port", "0", "--data", data, "--host", "localhost", "--keep-days", "3")
    await one.says("Ctrl-C stops all of it.")
    (url,) = re.findall(r"^  API +(http://localhost:\d+) ", one.out, re.MULTILINE)
    assert "kept 3 days after they end" in one.out
    async with client_of(url) as http:
        ids = [await submit(http, "x", context={"echo": {"steps": 2, "delay_ms": 150}}) for _ in range(2)]
        older = await taskcast("list", "--limit", "1", "--offset", "1", "--json", TASKCAST_URL=url)
        assert [task["task_id"] for task in json.loads(older.out)["tasks"]] == ids[:1]
        working = start("worker", "workers.echo", "--slots", "1", "--data", data)
        for id_ in ids:
            await wait_until(lambda id_=id_: ended(http, id_), f"{id_} ends")  # type: ignore[misc]
        first, second = [(await http.get(f"/api/v1/tasks/{id_}")).json() for id_ in ids]
        assert first["completed_at"] <= second["started_at"]
    working.process.send_signal(signal.SIGTERM)
    assert (await working.end()).code == 0
    (child,) = re.findall(r"^  API .*process (\d+)$", one.out, re.MULTILINE)
    one.process.send_signal(signal.SIGHUP)
    assert (await one.end()).code == 0
    assert not lives(int(child))
    assert not in_use(tmp_path)


async def test_ctrl_c_says_that_running_tasks_get_their_time_and_a_second_one_ends_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path, TASKCAST_GRACE_SECONDS="600") as served, client_of(served.url) as http:
        id_ = await submit(http, "x", context={"echo": {"delay_ms": 60_000}})
        await wait_until(lambda: running(http, id_), "the task runs")
        served.started.process.send_signal(signal.SIGINT)
        await served.says("Stopping: running tasks get up to 600 s; Ctrl-C again ends at once.")
        served.started.process.send_signal(signal.SIGINT)
        assert (await served.started.end()).code == 0
        assert not any(lives(pid) for pids in served.pids.values() for pid in pids)


async def test_a_new_empty_store_is_said_to_be_one(tmp_path: Path) -> None:
    said = f"{tmp_path / 'data'} is a new, empty store; --data names another folder.\n"
    data = ("--data", str(tmp_path / "data"))
    assert (await taskcast("keys", "create", *data)).err == said
    assert (await taskcast("keys", "create", *data)).err == ""
    working = start("worker", "workers.echo", "--data", str(tmp_path / "other"))
    await wait_until(lambda: "worker.started" in (working.folder / "err").read_text(), "the worker runs")
    assert f"{tmp_path / 'other'} is a new, empty store" in (working.folder / "err").read_text()


async def test_with_a_store_of_ones_own_a_key_is_needed(server: Server, folder: Path) -> None:
    store = f"unix://{folder / 'data' / 'valkey.sock'}"
    one = start("serve", "--port", "0", "--no-worker", "--redis", store)
    await one.says("Ctrl-C stops all of it.")
    assert f"Data  {store}" in re.sub(" +", "  ", one.out)
    assert "`taskcast keys create --redis URL` makes one" in one.out
    (url,) = re.findall(r"http://127\.0\.0\.1:\d+", one.out)
    assert "does not know this key" in (await taskcast("list", TASKCAST_URL=url)).err
    made = await taskcast("keys", "create", "--redis", store)
    assert (await taskcast("list", TASKCAST_URL=url, TASKCAST_KEY=made.out.strip())).code == 0
    one.process.send_signal(signal.SIGTERM)
    assert (await one.end()).code == 0


# Verbs on the store


async def test_keys_are_made_listed_and_revoked(server: Server, folder: Path) -> None:
    data = ("--data", str(folder / "data"))
    made = await taskcast("keys", "create", *data, "--org", "acme", "--user", "ada", "--name", "for tests")
    key = made.out.strip()
    assert made == Ran(0, f"{key}\n", "")
    assert key.startswith("sk_")
    ran = await taskcast("submit", "x", "--watch", TASKCAST_URL=server.url, TASKCAST_KEY=key)
    assert ran.code == 0
    listed = (await taskcast("keys", "list", *data)).out
    assert key not in listed
    (line,) = [line for line in listed.splitlines() if line.endswith("for tests")]
    id_, *_, org, user, _, _ = line.split()
    assert (org, user) == ("acme", "ada")
    assert await taskcast("keys", "revoke", id_, *data) == Ran(0, f"{id_} is revoked.\n", "")
    assert (await taskcast("keys", "revoke", id_, *data)).code == 2
    assert (await taskcast("keys", "create", "--org", "a/b", *data)).code == 2


async def test_a_workers_key_says_what_it_is_for(server: Server, folder: Path) -> None:
    data = ("--data", str(folder / "data"))
    key = (await taskcast("keys", "create", *data, "--worker", "--queues", "a, b", "--name", "for-a-and-b")).out.strip()
    everywhere = await taskcast("keys", "create", *data, "--worker", "--name", "for-all")
    assert everywhere.code == 0
    lines = {line.split()[-1]: line for line in (await taskcast("keys", "list", *data)).out.splitlines()}
    assert " work on a, b " in lines["for-a-and-b"]
    assert " work on all queues " in lines["for-all"]
    refused = await taskcast("list", TASKCAST_URL=server.url, TASKCAST_KEY=key)
    assert refused.code == 2
    assert "This key is a worker's" in refused.err
    for wrong in (["--queues", "a"], ["--worker", "--queues", "a\x07"]):
        assert (await taskcast("keys", "create", *data, *wrong)).code == 2


async def test_agents_are_set_listed_and_deleted_while_the_server_runs(
    server: Server, folder: Path, http: httpx.AsyncClient
) -> None:
    data = ("--data", str(folder / "data"))
    none = await taskcast("agents", "list", *data, "--org", "nobody")
    assert none == Ran(0, "There are no agents. `taskcast agents set` makes one, and so does a task for one.\n", "")
    said = "It counts for tasks that are submitted from now on.\n"
    given = ("--provider", "openai", "--model", "m", "--effort", "high", "--name", "The CLI's own")
    assert await taskcast("agents", "set", "cli:agent", *data, *given) == Ran(0, f"cli:agent has version 1. {said}", "")
    assert (await http.get("/api/v1/agents/cli:agent")).json()["model"] == "m"
    changed = await taskcast("agents", "set", "cli:agent", *data, "--model", "n", "--effort", "", "--queue", "cli")
    assert changed == Ran(0, f"cli:agent has version 2. {said}", "")
    task = (await http.post("/api/v1/agents/cli:agent", json={"input": "x"})).json()["task_id"]
    await taskcast("agents", "set", "cli:other", *data)
    lines = (await taskcast("agents", "list", *data)).out.splitlines()
    assert lines[0].split() == ["ID", "CREATED", "VERSION", "PROVIDER", "MODEL", "EFFORT", "QUEUE", "NAME"]
    listed = [line for line in lines if line.startswith("cli:")]
    assert re.fullmatch(
        r"cli:agent +\d{4}-\d\d-\d\d \d\d:\d\d +2 +openai +n +- +cli +The CLI's own", listed[0].rstrip()
    )
    assert re.fullmatch(r"cli:other +\S+ \S+ +1 +- +- +- +agent:cli:other +cli:other", listed[1].rstrip())
    assert await taskcast("agents", "delete", "cli:agent", *data) == Ran(
        0, "cli:agent is forgotten; its tasks stay.\n", ""
    )
    assert (await taskcast("agents", "delete", "cli:agent", *data)).err == "Agent not found\n"
    assert (await http.get("/api/v1/agents/cli:agent")).status_code == 404
    assert (await http.get(f"/api/v1/tasks/{task}")).status_code == 200


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a b"], "An agent's id has 1 to 128"),
        (["a", "--org", "a:b"], "An organisation has 1 to 64"),
        (["a", "--effort", "extreme"], "An agent's effort is one of low, medium, high, xhigh."),
        (["a", "--queue", "a,b"], "has no comma"),
        (["a", "--name", "a\x07"], "printable"),
    ],
)
async def test_an_agent_that_cannot_be_is_refused_in_a_sentence(
    server: Server, folder: Path, words: list[str], sentence: str
) -> None:
    ran = await taskcast("agents", "set", *words, "--data", str(folder / "data"))
    assert (ran.code, ran.out) == (2, "")
    assert sentence in ran.err


async def test_verify_finds_what_differs_and_rebuild_mends_it_when_nobody_else_is_there(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "data"))
    async with serving(tmp_path) as served:
        changed, damaged = [
            json.loads(
                (await taskcast("submit", "x", "--watch", "--json", TASKCAST_URL=served.url)).out.splitlines()[0]
            )["task_id"]
            for _ in range(2)
        ]
        assert (await taskcast("verify", *data)).out == "2 tasks checked: everything agrees with the log.\n"
        assert (await taskcast("keys", "list", *data)).out == "There are no keys. `taskcast keys create` makes one.\n"
        refused = await taskcast("rebuild", *data)
        assert refused.code == 2
        assert "Stop it first" in refused.err
        await _tamper(tmp_path / "data" / "valkey.sock", changed, damaged)
        found = await taskcast("verify", *data)
        assert found.code == 1
        assert f"{changed}: its snapshot differs from its events in query\n" in found.out
        assert f"{damaged}: " in found.out
        assert "2 tasks checked: " in found.out
    rebuilt = await taskcast("rebuild", *data)
    assert (rebuilt.code, rebuilt.err) == (
        1,
        f"The events of task {damaged} are damaged; its keys were left as they are.\n",
    )
    assert "1 task rebuilt from the log" in rebuilt.out
    again = await taskcast("verify", *data)
    assert again.code == 1
    assert changed not in again.out


async def _tamper(socket: Path, changed: str, damaged: str) -> None:
    """Changes one task's snapshot and takes an event from another's stream, behind the log's back."""
    reader, writer = await asyncio.open_unix_connection(socket)

    async def ask(command: str) -> str:
        writer.write(f"{command}\r\n".encode())
        line = (await reader.readline()).decode().strip()
        return (await reader.readline()).decode().strip() if line.startswith("$") else line

    tag = await ask("HGET tc:deployment tags")  # chosen when the store was made
    place = f"{identity.DEVELOPMENT_ORG}:"
    assert await ask(f"HSET tc:{{{tag}}}:task:{place}{changed} query changed") == ":0"
    assert await ask(f"XTRIM tc:{{{tag}}}:events:{place}{damaged} MAXLEN 3") != ":0"
    # A hole in the middle: what is missing at the beginning might have been trimmed by design.
    assert (await ask(f"XLEN tc:{{{tag}}}:events:{place}{damaged}")) == ":3"
    writer.close()


def test_sizes_are_told_as_people_say_them(tmp_path: Path) -> None:
    assert size_of(tmp_path) == "0 bytes"
    (tmp_path / "a").write_bytes(bytes(1500))
    assert size_of(tmp_path) == "1.5 KB"
    (tmp_path / "b").write_bytes(bytes(25_000_000))
    assert size_of(tmp_path) == "25 MB"
    with (tmp_path / "c").open("wb") as sparse:
        sparse.truncate(3_400_000_000)
    assert size_of(tmp_path) == "3.4 GB"


def test_a_password_in_the_store_s_address_is_not_shown() -> None:
    assert without_password("rediss://user:secret@host:6379/0") == "rediss://…@host:6379/0"
    assert without_password("redis://host:6379") == "redis://host:6379"


def test_a_bad_variable_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKCAST_PROCESSES", "many")
    with pytest.raises(Misconfigured, match=r"^TASKCAST_PROCESSES must be a whole number from 1 to 64, not 'many'\.$"):
        settings_of(port=None)
    monkeypatch.delenv("TASKCAST_PROCESSES")
    monkeypatch.setenv("TASKCAST_FSYNC", "never")
    with pytest.raises(Misconfigured, match=r"^TASKCAST_FSYNC must be everysec or always, not 'never'\.$"):
        settings_of()
