"""The README, held to its word: every block runs, every table is what the code says."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import pytest
from msgspec import Struct
from starlette.routing import BaseRoute, Route, WebSocketRoute

from app import ops, remote, tail
from app.api import shannon, workers, xpander
from app.identity import DEVELOPMENT_KEY
from app.settings import Settings
from app.task import Status, diagram

ROOT = Path(__file__).parents[1]
SERVE = str(ROOT / "scripts" / "serve")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SDK = ROOT / ".venv-xpander"
"""Where scripts/test installs xpander's SDK; the page has it in `xpander`."""
SECONDS_MAX = 50


# What the code says


def settings_table() -> str:
    rows = ["| variable | default | |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default == "" else f"`{_plain(field.default)}`"
        rows.append(f"| `TASKCAST_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows)


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and value >= 100_000 else str(value)


def routes_table(routes: Sequence[BaseRoute]) -> str:
    methods: dict[str, set[str]] = {}
    for route in routes:
        if isinstance(route, WebSocketRoute):
            methods.setdefault(route.path, set()).add("WebSocket")
        elif isinstance(route, Route):
            methods.setdefault(route.path, set()).update((route.methods or set()) - {"HEAD"})
    rows = [f"| `{path}` | {', '.join(sorted(methods[path]))} |" for path in sorted(methods)]
    return "\n".join(["| route | methods |", "|---|---|", *rows])


def xpander_routes() -> str:
    """The documents' first, then the controller's."""
    public = [route for route in xpander.routes if route.path.startswith("/v1/")]
    controller = routes_table([route for route in xpander.routes if route not in public])
    return "\n".join([routes_table(public), *controller.splitlines()[2:]])


def statuses_table(whose: str, spelled: Mapping[Status, str]) -> str:
    rows = [f"| {status.replace('_', ' ')} | `{name}` |" for status, name in spelled.items()]
    return "\n".join([f"| our status | {whose} |", "|---|---|", *rows])


def diagram_block() -> str:
    return f"```mermaid\n{diagram()}```"


GENERATED: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "routes": lambda: routes_table([*shannon.routes, *ops.routes]),
    "statuses": lambda: statuses_table("Shannon's", shannon.STATUS),
    "xpander routes": xpander_routes,
    "xpander statuses": lambda: statuses_table("xpander's", xpander.STATUS),
    "diagram": diagram_block,
}


def between(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert found, f"the README has no part <!-- {name} -->"
    return found[1]


@pytest.mark.parametrize("name", GENERATED)
def test_what_is_generated_is_what_the_code_says(name: str) -> None:
    assert between(name).strip() == GENERATED[name]().strip(), "python tests/test_readme.py writes it anew"


def test_exit_codes_are_those_of_the_command() -> None:
    table = dict(re.findall(r"^\| (\d) \| (.*) \|$", README, re.MULTILINE))
    assert list(table) == [str(code) for code in range(6)]
    for code, word in {
        remote.COMPLETED: "completed",
        remote.FAILED: "failed",
        remote.USAGE: "usage",
        remote.CANCELLED: "cancelled",
        remote.TIMED_OUT: "timed out",
        remote.MISSING: "no such task",
    }.items():
        assert word in table[str(code)]


def test_how_late_live_may_be_is_how_long_a_busy_tail_pauses() -> None:
    late = f"up to {1000 * tail.BUSY_PAUSE_SECONDS:g} ms late** after a read of {tail.READ_MANY} events and more"
    assert late in README


def test_every_call_of_a_worker_is_told_and_every_type_of_event() -> None:
    told = set(re.findall(r"^\| `(GET|POST) (/worker/v1\S*)`", README, re.MULTILINE))
    assert told == {(method, route.path) for route in workers.routes for method in (route.methods or set()) - {"HEAD"}}
    (types,) = re.findall(r" Types: (.*) \|$", README, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", types)) - {"name"} == set(workers.TYPES)


def test_local_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(((?!http|#)[^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


# The blocks


class Block(Struct, frozen=True):
    line: int
    language: str
    text: str
    mark: str
    """Of the comment right above it."""


def blocks() -> list[Block]:
    found = re.finditer(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [Block(README[: one.start()].count("\n") + 1, one[2], one[3], one[1] or "") for one in found]


def test_every_block_is_run_or_says_why_not() -> None:
    assert 2 * len(blocks()) == len(re.findall(r"^```", README, re.MULTILINE))
    for block in blocks():
        if block.language in {"bash", "python"}:
            assert not block.mark or block.mark.startswith("not run: "), block
        elif block.language == "text":
            assert block.mark in {"", "prints"}, block
        else:
            assert block.mark.startswith("not run: ") or block.language == "mermaid", block


class Session:
    """A reader who follows the page: one shell, one server at a time, a folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self.server: subprocess.Popen[str] | None = None
        foreign = {name: value for name, value in os.environ.items() if not name.startswith("TASKCAST_")}
        # The page's commands stand on PATH after its second block; the data lies where `taskcast` looks for it.
        path = f"{Path(sys.executable).parent}:{foreign['PATH']}"
        # The SDK's worker listens on a port, too: a free one, for other tests may run beside this one.
        self.environment = {
            **foreign,
            "PATH": path,
            "TASKCAST_DATA": str(folder / "data"),
            "XPANDER_STREAMING_PORT": "0",
        }
        (folder / "xpander").symlink_to(SDK)
        self.shell = subprocess.Popen(
            ["bash"],
            cwd=folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def serve(self, *options: str) -> None:
        """`scripts/serve` itself, here; on the same port when started again."""
        self.stop_server()
        with (self.folder / "server.log").open("w") as log:
            self.server = subprocess.Popen(
                [SERVE, "--port", str(self.port), *options],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert self.server.stdout
        for line in self.server.stdout:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                self.bash(f"export TASKCAST_URL=http://127.0.0.1:{self.port}")
                return
        raise AssertionError((self.folder / "server.log").read_text())

    def bash(self, text: str) -> str:
        """What it prints; it must succeed."""
        text = text.replace("http://127.0.0.1:8080", f"http://127.0.0.1:{self.port}").replace("$PWD/.venv", "/nowhere")
        assert self.shell.stdin
        assert self.shell.stdout
        self.shell.stdin.write(f"set -eu -o pipefail\n{text}\nset +eu\nprintf '\\n%s\\n' '-- end of block --'\n")
        self.shell.stdin.flush()
        said: list[str] = []
        for line in self.shell.stdout:
            if line == "-- end of block --\n":
                return "".join(said)
            said.append(line)
        raise AssertionError(f"This block failed:\n{text}\nIt printed:\n{''.join(said)}")

    def python(self, text: str) -> str:
        if found := re.match(r"# (\w+\.py)\n", text):
            (self.folder / found[1]).write_text(text)
            return ""
        (self.folder / "block.py").write_text(text.replace("http://127.0.0.1:8080", f"http://127.0.0.1:{self.port}"))
        return self.bash(f"{sys.executable} -W ignore block.py")

    def stop_server(self) -> None:
        if self.server:
            self.server.send_signal(signal.SIGINT)
            out, _ = self.server.communicate(timeout=SECONDS_MAX)
            assert self.server.returncode == 0, out
            self.server = None

    def close(self) -> None:
        os.killpg(self.shell.pid, signal.SIGTERM)  # what it left in the background as well
        self.shell.communicate(timeout=SECONDS_MAX)
        self.stop_server()


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    made = Session(tmp_path)
    yield made
    made.close()


@pytest.mark.timeout(180)  # it starts two servers, one after the other
def test_a_reader_who_types_every_block_gets_what_the_page_promises(session: Session) -> None:
    said: str | None = ""
    for block in blocks():
        if block.mark.startswith("not run: "):
            continue
        if "xpander/bin/" in block.text and not (SDK / ".requirements-xpander.lock").exists():
            said = None
        elif block.text.startswith("scripts/serve"):
            session.serve(*block.text.split()[1:])
        elif block.language == "bash":
            said = session.bash(block.text)
        elif block.language == "python":
            said = session.python(block.text)
        elif block.mark == "prints" and said is not None:
            promised = re.escape(block.text.strip()).replace("…", ".*?")
            assert re.search(promised, said, re.DOTALL), f"line {block.line} of the README: not printed, but:\n{said}"
    for name in ("out of scope", "xpander out of scope"):
        for path in re.findall(r"`(/[^`]+)`", between(name)):
            word = "error" if path.startswith("/api/") else "detail"
            url = f"http://127.0.0.1:{session.port}{path.replace('{id}', 'x')}"
            for method in ("GET", "POST"):
                answer = httpx.request(method, url, headers={"X-API-Key": DEVELOPMENT_KEY})
                assert (answer.status_code, list(answer.json())) == (404, [word]), f"{method} {path}"


def write() -> None:
    """Puts what the code says into the README."""
    text = README
    for name, part in GENERATED.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        _, _, after = rest.partition("<!-- end -->")
        text = f"{before}<!-- {name} -->\n{part()}\n<!-- end -->{after}"
    (ROOT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
