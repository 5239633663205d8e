"""`scripts/bench workers`: what a task costs a worker and its store, side by side with other task queues in one run.

Each side gets a new store of its own: the embedded one, with the sync of its log that it has by default, over its unix
socket. Its worker is one process with a core to itself and SLOTS tasks at a time. It is warmed up, tells its latency,
and is then held still, while all tasks are queued; the clocks run from there until the last one's end is on record. A
side counts only if its own records have every task, and its handlers ran once for each.

The arguments of bare calls come from the store's own code, made before the clock starts.

What this file must never do is hold a figure that it has not measured.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Self

import redis

from app import keys
from app.embedded import Embedded
from app.identity import DEVELOPMENT_KEY, DEVELOPMENT_ORG
from scripts.bench_rig import (
    ANSWER_SECONDS,
    SCRIPTS,
    Bench,
    Figures,
    Measured,
    Measures,
    NotMeasured,
    Process,
    Program,
    Section,
    cpu_ns,
    goal,
    interleaved,
    measuring,
    medians,
    ratio,
    started,
)
from scripts.bench_workers_peers import SLOTS, TASKS, WARM_UP
from scripts.bench_workers_tasks import BODY, EVENTS_PER_TASK, SUBMITS

WAITS = 200
FIRST_WAITS = 20
PAUSE_SECONDS = 0.005
LOOK_SECONDS = 0.001
"""Between two looks at whether all tasks are on record; the last one has begun by then."""
CONNECTIONS = 50
"""Of the client that submits over HTTP, one request at a time on each."""
PIP_SECONDS = 300

PYTHON = Path(sys.executable)
TASKCAST = PYTHON.with_name("taskcast")
LOGS = {"TASKCAST_LOG_LEVEL": "warning"}
PEERS = SCRIPTS / "bench_workers_peers.py"
TASKS_MODULE = "scripts.bench_workers_tasks"
ENVIRONMENTS = SCRIPTS.parent / ".bench"

# Exact versions of what is compared, and of what carries it; the rest is what each asks for.
FAST = tuple(f"{name}=={version(name)}" for name in ("uvloop", "hiredis"))
"""The same as ours."""
PACKAGES = {
    "saq": ("saq==0.26.4", "redis==7.4.1", "typing_extensions==4.15.0", *FAST),
    "streaq": ("streaq==7.2.0", "coredis==6.9.0", *FAST),
    "pydocket": ("pydocket==0.27.0", "redis==8.1.0", *FAST),
    "taskiq-redis": ("taskiq-redis==1.2.4", "taskiq==0.13.0", "redis==8.1.0", *FAST),
    "arq": ("arq==0.28.0", "redis==5.3.1", *FAST),
}


def environment(peer: str) -> Path:
    """The Python that has the peer. Made once; raises NotMeasured where the packages cannot be had."""
    folder, packages = ENVIRONMENTS / peer, PACKAGES[peer]
    python, made = folder / "bin" / "python", folder / "packages"
    if python.exists() and made.exists() and made.read_text().split() == [*packages]:
        return python
    ENVIRONMENTS.mkdir(exist_ok=True)
    (ENVIRONMENTS / ".gitignore").write_text("*\n")
    sys.stderr.write(f"Making the environment of {peer} ...\n")
    install = ("-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check")
    commands: list[list[str | Path]] = [
        [PYTHON, "-m", "venv", "--clear", folder],
        [python, *install, *packages],
    ]
    for command in commands:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=PIP_SECONDS)
        except subprocess.SubprocessError as error:
            said = str(getattr(error, "stderr", "") or error).strip().splitlines()
            raise NotMeasured(f"its environment cannot be made: {said[-1]}") from error
    made.write_text("\n".join(packages))
    return python


# What each has on record: whether none is left, and how many are complete


@dataclass(frozen=True)
class Records:
    idle: Callable[[redis.Redis], bool]
    complete: Callable[[redis.Redis], int]


def matching(store: redis.Redis, pattern: str) -> set[bytes]:
    return {*store.scan_iter(pattern, count=1000)}  # SCAN may say a name twice


def in_taskcast(store: redis.Redis, status: str) -> int:
    return int(store.zcard(keys.index(keys.tags(1)[0], DEVELOPMENT_ORG, "status", status)))


def group(store: redis.Redis) -> dict[str, int]:
    """Of taskiq's stream."""
    (found,) = store.xinfo_groups("taskiq")
    return found


RECORDS = {
    "taskcast": Records(
        idle=lambda store: not in_taskcast(store, "queued") + in_taskcast(store, "running"),
        complete=partial(in_taskcast, status="completed"),
    ),
    "saq": Records(
        idle=lambda store: not store.zcard("saq:bench:incomplete"),
        complete=lambda store: sum(b'"complete"' in store.get(name) for name in matching(store, "saq:job:bench:*")),
    ),
    "streaq": Records(
        idle=lambda store: not store.xlen("streaq:default:queues:normal"),
        complete=lambda store: len(matching(store, "streaq:default:task:results:*")),
    ),
    "pydocket": Records(
        idle=lambda store: not store.xlen("bench:stream"),
        complete=lambda store: sum(
            store.hget(name, "state") == b"completed" for name in matching(store, "bench:runs:*")
        ),
    ),
    "taskiq-redis": Records(
        idle=lambda store: not group(store)["pending"] + group(store)["lag"],
        complete=lambda store: len(matching(store, "result:*")),
    ),
    "arq": Records(
        idle=lambda store: not store.zcard("arq:queue"),
        complete=lambda store: len(matching(store, "arq:result:*")),
    ),
}


# One side


async def line_of(process: Process) -> str:
    assert process.output
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            line = await asyncio.to_thread(process.output.readline)
    except TimeoutError:
        raise NotMeasured("its worker says nothing any more") from None
    if not line:
        raise NotMeasured("its worker ended")
    return line.decode().strip()


class Submitter:
    """The process that submits, beside the load."""

    def __init__(self, python: Path, name: str, url: str, log: Path) -> None:
        self._command, self._log = (python, PEERS, name, "submit", url), log

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        with self._log.open("a") as log:
            self._running = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, stderr=log)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._running.stdin
        self._running.stdin.close()
        await self._running.wait()

    async def submit(self, task: str, count: int = 1) -> int:
        """Returns when it began."""
        assert self._running.stdin
        assert self._running.stdout
        self._running.stdin.write(f"{task} {count}\n".encode())
        async with asyncio.timeout(ANSWER_SECONDS):
            line = await self._running.stdout.readline()
        if not line:
            raise NotMeasured("its submitter ended")
        return int(line)


@dataclass(frozen=True)
class Side:
    worker: Process
    submitter: Submitter
    store: redis.Redis
    valkey: int

    @property
    def clocks(self) -> Sequence[Callable[[], int]]:
        return self.worker.cpu_ns, partial(cpu_ns, self.valkey), time.monotonic_ns


@asynccontextmanager
async def side(name: str, folder: Path) -> AsyncIterator[Side]:
    python = PYTHON if name == "taskcast" else await asyncio.to_thread(environment, name)
    async with Embedded(folder / "data") as valkey:
        command: list[str | Path] = [python, PEERS, name, "work", valkey.url]
        if name == "taskcast":
            command = [TASKCAST, "worker", TASKS_MODULE, "--slots", str(SLOTS), "--data", folder / "data"]
        with (
            redis.Redis.from_url(valkey.url, protocol=2) as store,
            # The peers log from WARNING on, too.
            Process("worker", command, folder, output=subprocess.PIPE, environment=LOGS) as worker,
        ):
            async with Submitter(python, name, valkey.url, folder / "submitter.log") as submitter:
                yield Side(worker, submitter, store, store.info("server")["process_id"])


async def no_ops(folder: Path, *, name: str) -> Figures:
    async with side(name, folder) as one:
        await waits(one, FIRST_WAITS)
        await one.submitter.submit("noop", WARM_UP)
        await ended(one, name)
        waited = await waits(one, WAITS)
        await idle(one, name)
        with one.worker.held_still():
            await one.submitter.submit("noop", TASKS)
            before = RECORDS[name].complete(one.store)
            clocks = one.clocks
            spent = [clock() for clock in clocks]
        await ended(one, name)
        worker_ns, valkey_ns, wall_ns = (clock() - start for clock, start in zip(clocks, spent, strict=True))
        complete = RECORDS[name].complete(one.store) - before
        runs = await last_run(one)
    if complete != TASKS or runs != WARM_UP + TASKS:
        raise NotMeasured(f"{TASKS} tasks came to {complete} on record and {runs - WARM_UP} runs")
    cuts = statistics.quantiles(waited, n=100)
    return {
        "per_second": TASKS / wall_ns * 1e9,
        "worker_us": worker_ns / TASKS / 1e3,
        "valkey_us": valkey_ns / TASKS / 1e3,
        "both_us": (worker_ns + valkey_ns) / TASKS / 1e3,
        "busy_percent": worker_ns / wall_ns * 100,
        "p50_ms": cuts[49] / 1e6,
        "p99_ms": cuts[98] / 1e6,
    }


async def waits(one: Side, count: int) -> list[int]:
    """From just before a submit to the handler's first line, in ns; the worker has nothing else on its hands."""
    found: list[int] = []
    for _ in range(count):
        began = await one.submitter.submit("timed")
        found.append(int((await line_of(one.worker)).split()[0]) - began)
        await asyncio.sleep(PAUSE_SECONDS)
    return found


async def last_run(one: Side) -> int:
    await one.submitter.submit("timed")
    return int((await line_of(one.worker)).split()[1])


async def ended(one: Side, name: str) -> None:
    """All tasks: after the last one's begin its end is looked for, and nobody asks the store before."""
    while await line_of(one.worker) != "last":
        pass  # a timed task that its queue began once more
    await idle(one, name)


async def idle(one: Side, name: str) -> None:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            while not RECORDS[name].idle(one.store):
                await asyncio.sleep(LOOK_SECONDS)
    except TimeoutError:
        raise NotMeasured("not all of its tasks end") from None


async def tasks(bench: Bench) -> Section:
    """2,000 no-op tasks, from claim to finish, one worker process with 100 slots; then 200 alone, one after the other."""
    section = Section()
    found = await interleaved(bench, section, "tasks", {name: partial(no_ops, name=name) for name in RECORDS})
    if "taskcast" not in found:
        return section
    ours = found["taskcast"]
    for name, rounds in found.items():
        section.rows[name] |= {
            "speed_ratio": ratio(ours, rounds, "per_second"),
            "cpu_ratio": ratio(ours, rounds, "both_us"),
            "p50_ratio": ratio(ours, rounds, "p50_ms"),
        }
    fastest, quickest = best(found, "per_second", max), best(found, "p50_ms", min)
    section.goals = [
        goal(found, f"time per task, vs {fastest}, the fastest", 0.25, fastest, "taskcast", "per_second"),
        goal(found, f"worker + Redis CPU per task, vs {fastest}", 0.25, "taskcast", fastest, "both_us"),
        goal(found, f"submit → started p50, vs {quickest}, the quickest", 1.0, "taskcast", quickest, "p50_ms"),
    ]
    return section


def best(found: Measured, figure: str, of: Callable[..., str]) -> str:
    """The peer with the most or the least of it; empty: none was measured."""
    peers = {name: medians(rounds)[figure] for name, rounds in found.items() if name != "taskcast"}
    return of(peers, key=peers.__getitem__, default="")


# The store alone


async def itself(folder: Path, *, what: str) -> Figures:
    """A process that measures itself."""
    async with Embedded(folder / "data") as valkey:
        command: list[str | Path] = [PYTHON, "-m", TASKS_MODULE, what, valkey.url]
        with Process(what, command, folder, output=subprocess.PIPE) as process:
            figures: Figures = json.loads(await line_of(process))
            return figures


async def emitted(folder: Path) -> Figures:
    async with side("taskcast", folder) as one:
        await waits(one, FIRST_WAITS)
        await one.submitter.submit(f"emit:{one.valkey}", SLOTS)
        figures: Figures = json.loads(await line_of(one.worker))
        return figures


REQUEST = (
    b"POST /api/v1/tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: %s\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (DEVELOPMENT_KEY.encode(), len(BODY), BODY)
)


async def http_submits(folder: Path) -> Figures:
    async with Embedded(folder / "data") as valkey:
        with redis.Redis.from_url(valkey.url, protocol=2) as store:
            pid = store.info("server")["process_id"]
        data = str(folder / "data")
        process, (port,) = started("api", (TASKCAST, "api", "--socket"), folder, TASKCAST_DATA=data)
        with process:
            await posts(port, CONNECTIONS)
            with measuring(process.cpu_ns, partial(cpu_ns, pid), time.monotonic_ns) as spent:
                await posts(port, SUBMITS)
    server_ns, valkey_ns, wall_ns = spent
    return {
        "per_second": SUBMITS / wall_ns * 1e9,
        "worker_us": server_ns / SUBMITS / 1e3,
        "valkey_us": valkey_ns / SUBMITS / 1e3,
    }


async def posts(port: int, count: int) -> None:
    left = iter(range(count))

    async def some() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in left:
            writer.write(REQUEST)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200 "):
                raise NotMeasured(f"a submit was answered {head.splitlines()[0].decode()}")
            length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
            await reader.readexactly(int(length))
        writer.close()

    async with asyncio.timeout(ANSWER_SECONDS):
        await asyncio.gather(*(some() for _ in range(CONNECTIONS)))


async def store(bench: Bench) -> Section:
    """10,000 events of 100 tasks, 10,000 submits; bare: the same EVALSHA; of claims and ends: what they write, without it."""
    assert SLOTS * EVENTS_PER_TASK == SUBMITS
    section = Section()
    sides: dict[str, Measures] = {
        "events, bare": partial(itself, what="events"),
        "events, one worker": emitted,
        "submits, bare": partial(itself, what="bare-submits"),
        "submits, one process": partial(itself, what="submits"),
        "submits, through HTTP": http_submits,
        "claims and ends, bare": partial(itself, what="writes"),
        "claims and ends": partial(itself, what="runs"),
    }
    found = await interleaved(bench, section, "store", sides)
    for name, rounds in found.items():
        if plain := found.get(f"{name.partition(', ')[0]}, bare"):
            section.rows[name]["share"] = ratio(rounds, plain, "per_second")
    section.goals = [
        goal(
            found,
            "time per event, one worker, vs bare EVALSHA",
            2.0,
            "events, bare",
            "events, one worker",
            "per_second",
        )
    ]
    return section


SECTIONS = {"tasks": tasks, "store": store}
HEADS = {
    "per_second": "per second",
    "worker_us": "worker µs",
    "valkey_us": "Redis µs",
    "both_us": "together",
    "busy_percent": "worker busy %",
    "p50_ms": "started p50 ms",
    "p99_ms": "p99 ms",
    "speed_ratio": "speed, ours ÷",
    "cpu_ratio": "CPU, ours ÷",
    "p50_ratio": "p50, ours ÷",
    "share": "of bare",
}
LEGEND = """\
µs: of time, and of CPU (user and system) of the worker's, or otherwise the measured, process and of Redis (here Valkey).
Started: from just before a submit until the first line of its handler. Ours ÷: Taskcast's figure as a share of theirs."""


if __name__ == "__main__":
    Program(name="workers", about=__doc__ or "", sections=SECTIONS, heads=HEADS, legend=LEGEND).main()
