"""What the benchmarks stand on: processes pinned to cores, what these cost, the load client, and the table.

The server that is measured has one core to itself; everything else (the load client, whoever publishes, Valkey) shares
the other one. The machine may be shared, so what counts is the CPU time that the kernel charges to a server's threads:
it is user plus system time, to the nanosecond, which `utime` and `stime` show in hundredths of a second only.
"""

import argparse
import asyncio
import json
import logging
import os
import platform
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import structlog
import uvloop

SCRIPTS = Path(__file__).parent
RESULTS = Path("bench-results.json")
STOP_SECONDS = 15
ANSWER_SECONDS = 60.0
"""Of the load client, for anything that is asked of it."""
LOG_LINES = 15


class NotMeasured(Exception):
    """Why a row is left out, in words for the table."""


@cache
def cores() -> tuple[int, int]:
    """One for the server, one for everything else; as it was at the start. Raises NotMeasured."""
    if not hasattr(os, "sched_getaffinity"):
        raise NotMeasured("Linux is needed, which pins processes to cores.")
    found = sorted(os.sched_getaffinity(0))
    if len(found) < 2:
        raise NotMeasured("Two cores are needed: one for the server, one for the load.")
    return found[0], found[1]


def prepare() -> None:
    """Moves this process, and so all that it starts, off the servers' core, and lets all of them open many files.

    Raises NotMeasured.
    """
    os.sched_setaffinity(0, {cores()[1]})
    if not Path("/proc/self/schedstat").exists():
        raise NotMeasured("This kernel does not say what a thread costs (/proc/PID/schedstat).")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for name in [name for name in os.environ if name.startswith("TASKCAST_")]:
        del os.environ[name]


def files_max() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def listening() -> socket.socket:
    """On a free port of this machine alone."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    sock.listen(2048)
    return sock


class Process:
    """A child, on the servers' core unless told otherwise, ended with the context. It writes to a log in its folder."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        folder: Path,
        *,
        inherits: Iterable[socket.socket] = (),
        output: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = folder / f"{name}.log"
        server_core, load_core = cores()
        os.sched_setaffinity(0, {server_core})  # it is inherited; set from outside it would miss threads
        try:
            with self.log.open("a") as log:
                self._running = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output or log,
                    stderr=log,
                    env={**os.environ, **(environment or {})},
                    pass_fds=[sock.fileno() for sock in inherits],
                    start_new_session=True,
                )
        finally:
            os.sched_setaffinity(0, {load_core})
        self.output = self._running.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._running as running:
            running.send_signal(signal.SIGTERM)
            try:
                running.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                running.kill()

    @property
    def alive(self) -> bool:
        return self._running.poll() is None

    def cpu_ns(self) -> int:
        return sum(cpu_ns(pid) for pid in self._family())

    def pss_bytes(self) -> int:
        """Memory that is its own, and its share of what it has together with others."""
        return sum(_pss_bytes(pid) for pid in self._family())

    @contextmanager
    def held_still(self) -> Iterator[None]:
        """It gets no CPU meanwhile, so that work can be laid before it and clocks be read."""
        pid = self._running.pid
        self._running.send_signal(signal.SIGSTOP)
        try:
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            yield
        finally:
            self._running.send_signal(signal.SIGCONT)

    def _family(self) -> Iterator[int]:
        pid = self._running.pid
        yield pid
        yield from map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def cpu_ns(pid: int) -> int:
    """Of all threads that live."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def _pss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise NotMeasured("This kernel does not say how much memory a process has.")


def started(
    name: str, command: Sequence[str | Path], folder: Path, *, sockets: int = 1, **environment: str
) -> tuple[Process, list[int]]:
    """A server that inherits listening sockets, whose numbers end its command; and their ports.

    Until it accepts, clients wait in the sockets' queues; if it dies, they hear of it.
    """
    with ExitStack() as stack:
        made = [stack.enter_context(listening()) for _ in range(sockets)]
        numbers = [str(sock.fileno()) for sock in made]
        process = Process(name, [*command, *numbers], folder, inherits=made, environment=environment)
        return process, [sock.getsockname()[1] for sock in made]


class Load:
    """The load client, a process of its own (`load.c` says what it understands)."""

    def __init__(self, binary: Path) -> None:
        self._binary = binary

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._running = await asyncio.create_subprocess_exec(self._binary, stdin=pipe, stdout=pipe)
        assert self._running.stdin
        assert self._running.stdout
        self._in, self._out = self._running.stdin, self._running.stdout
        return self

    async def __aexit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            self._running.kill()
        await self._running.wait()

    def _say(self, line: str) -> None:
        self._in.write(f"{line}\n".encode())

    async def _hear(self) -> str:
        async with asyncio.timeout(ANSWER_SECONDS):
            line = (await self._out.readline()).decode().strip()
        if not line or line.startswith("failed"):
            raise NotMeasured(f"the load client {line or 'ended'}")
        return line

    async def open(self, count: int, port: int, path: str, *, buffer_bytes: int = 0) -> None:
        """Returns when all have the head of their answer. With `buffer_bytes` they read no further than that."""
        self._say(f"open {count} {port} {buffer_bytes} {path}")
        await self._hear()

    async def expect(self, deliveries: int, *, spin: bool = False) -> None:
        """For `got`, once each. `spin`: to be said of a fan-out, whose server must not pay for waking the reader."""
        self._say(f"expect {deliveries} {spin:d}")
        await asyncio.sleep(0)  # so that it has left before a publisher blocks this thread

    async def got(self) -> None:
        try:
            await self._hear()
        except TimeoutError:
            self._say("report")
            raise NotMeasured(f"deliveries are missing; the load client says {await self._hear()}") from None

    async def resume(self, number: int) -> None:
        self._say(f"resume {number}")
        try:
            await self._hear()
        except TimeoutError:
            raise NotMeasured("a stalled client did not get everything when it came back") from None

    def mark(self) -> None:
        self._say("mark")

    async def report(self) -> dict[str, int]:
        """What was counted since the mark, in the names of `load.c`."""
        self._say("report")
        counts: dict[str, int] = json.loads(await self._hear())
        return counts


@cache
def compiled_load(folder: Path) -> Path:
    """Raises NotMeasured."""
    if not (compiler := shutil.which("cc")):
        raise NotMeasured("A C compiler (cc) is needed for the load client.")
    command = [compiler, "-O2", "-Wall", "-Wextra", "-o", folder / "load", SCRIPTS / "load.c"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise NotMeasured(f"The load client does not compile: {done.stderr}")
    return folder / "load"


# Figures

Figures = dict[str, float]


def medians(rounds: Sequence[Figures]) -> Figures:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def ratio(ours: Sequence[Figures], theirs: Sequence[Figures], name: str) -> float:
    """The median of the rounds' own ratios: what disturbs one round disturbs both of its sides."""
    return statistics.median(a[name] / b[name] for a, b in zip(ours, theirs, strict=True))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths)))  # noqa: B905
        for line in lines
    ]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


def write_results(name: str, results: Mapping[str, Any]) -> None:
    """Beside what other benchmarks have written there."""
    found: dict[str, Any] = {}
    with suppress(FileNotFoundError, json.JSONDecodeError):
        found = json.loads(RESULTS.read_text())
    RESULTS.write_text(json.dumps({**found, name: results}, indent=2) + "\n")


@contextmanager
def measuring(*clocks: Callable[[], int]) -> Iterator[list[int]]:
    """Fills the list with how far each clock went."""
    spent: list[int] = []
    before = [clock() for clock in clocks]
    yield spent
    spent += [clock() - start for clock, start in zip(clocks, before, strict=True)]


# What a benchmark is made of


@dataclass
class Goal:
    name: str
    limit: float
    found: float | None
    """None: not measured."""

    @property
    def verdict(self) -> str:
        return "not measured" if self.found is None else "met" if self.found <= self.limit else "not met"


@dataclass
class Section:
    """What one of a benchmark's functions has measured."""

    rows: dict[str, Figures] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    folder: Path
    rounds: int

    @contextmanager
    def place(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=self.folder) as made:
            yield Path(made)


Measures = Callable[[Path], Awaitable[Figures]]
"""One round of one side, in a folder of its own."""
Measured = Mapping[str, Sequence[Figures]]
"""Of each side, its rounds."""


async def interleaved(bench: Bench, section: Section, what: str, sides: Mapping[str, Measures]) -> Measured:
    """All sides in turn, for as many rounds. One that cannot be measured is left out from then on."""
    found: dict[str, list[Figures]] = {name: [] for name in sides}
    for number in range(bench.rounds):
        for name, measure in sides.items():
            if name not in found:
                continue
            with bench.place(what) as folder:
                try:
                    found[name].append(await measure(folder))
                except NotMeasured as reason:
                    section.notes.append(f"{name}: not measured: {reason}")
                    section.notes += [tail(log) for log in folder.glob("*.log")]
                    del found[name]
        sys.stderr.write(f"{what}: round {number + 1} of {bench.rounds}\n")
    section.rows |= {name: medians(rounds) for name, rounds in found.items()}
    return found


def goal(found: Measured, name: str, limit: float, ours: str, theirs: str, figure: str) -> Goal:
    both = ours in found and theirs in found
    return Goal(name, limit, ratio(found[ours], found[theirs], figure) if both else None)


def cell(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.2f}"


def show(name: str, about: str, section: Section, heads: Mapping[str, str]) -> None:
    print(f"\n{name}: {about}")
    if section.rows:
        columns = next(iter(section.rows.values()))
        head = ["", *(heads[column] for column in columns)]
        print(table(head, [[side, *map(cell, row.values())] for side, row in section.rows.items()]))
    print("".join(f"{note}\n" for note in section.notes), end="", flush=True)


def show_goals(goals: Sequence[Goal]) -> None:
    rows = [(one.name, f"{one.limit:g}", "" if one.found is None else f"{one.found:.2f}", one.verdict) for one in goals]
    print(f"\n{table(('goal', 'at most', 'found', ''), rows)}")


@dataclass(frozen=True, kw_only=True)
class Program:
    """A benchmark as a command: its sections, what their columns are called, and what its tables need said."""

    name: str
    about: str
    sections: Mapping[str, Callable[[Bench], Awaitable[Section]]]
    heads: Mapping[str, str]
    legend: str

    def main(self) -> None:
        asked = self._asked()
        try:
            prepare()
            server_core, load_core = cores()
            print(f"Servers run on core {server_core}, everything else on core {load_core}. Rounds: {asked.rounds}.")
            print(self.legend, flush=True)
            structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
            with (
                tempfile.TemporaryDirectory(prefix="taskcast-bench-") as folder,
                asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
            ):
                found = runner.run(self._measured(Bench(Path(folder), asked.rounds), asked.only or [*self.sections]))
        except NotMeasured as reason:
            sys.exit(f"Not measured: {reason}")
        except (asyncio.CancelledError, KeyboardInterrupt):
            sys.exit("Stopped.")
        show_goals([goal for section in found.values() for goal in section.goals])
        self._write(found, asked.rounds)

    def _asked(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(prog=f"scripts/bench {self.name}", description=self.about.splitlines()[0])
        parser.add_argument("--rounds", type=int, default=5, choices=range(1, 100), metavar="N")
        parser.add_argument("--only", choices=self.sections, action="append", help="may be given more than once")
        return parser.parse_args()

    async def _measured(self, bench: Bench, names: Sequence[str]) -> dict[str, Section]:
        main_task = asyncio.current_task()
        assert main_task
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main_task.cancel)
        found: dict[str, Section] = {}
        for what in names:
            measure = self.sections[what]
            try:
                found[what] = await measure(bench)
            except NotMeasured as reason:
                found[what] = Section(notes=[f"not measured: {reason}"])
            show(what, measure.__doc__ or "", found[what], self.heads)
        return found

    def _write(self, found: Mapping[str, Section], rounds: int) -> None:
        machine = {"system": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()}
        sections = {
            name: {
                "rows": one.rows,
                "goals": [{**asdict(goal), "verdict": goal.verdict} for goal in one.goals],
                "notes": one.notes,
            }
            for name, one in found.items()
        }
        write_results(self.name, {"rounds": rounds, "machine": machine, "sections": sections})
