"""Chaos: producers, workers, one of them over HTTP (`chaos_http.py`), two API processes and Valkey on one store, as
processes; SIGKILL, SIGSTOP and SIGTERM at random while tasks run, Valkey killed and restarted; then every promise of the
README is checked (`chaos_checks.py`).

What is hit, in which order, for how long and after how many accepted tasks follows from the seed; what the victims are
doing at that moment does not, and who is being hit already is spared for the next one of its kind. A worker that is
stopped for longer than its lease goes on afterwards, as one does whose machine was asleep. The store syncs each write to
disk (`--fsync always`) unless told otherwise.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import chaos_checks
import httpx
import structlog
from chaos_clients import GO, Ack, Fact, lines
from chaos_handlers import HTTP, PROCESS
from chaos_readers import Owner, Reader

from app.settings import Settings
from app.store import Store, open_store

SCRIPTS = Path(__file__).parent
TASKCAST = str(Path(sys.executable).with_name("taskcast"))
LEASE_SECONDS, GRACE_SECONDS, HEARTBEAT_SECONDS = 2.0, 1.0, 1.0
PARTITIONS = 2
"""So that parents and children may live apart."""
APIS, CLIENTS = 2, 2
READERS_SHARE = 6
"""One of so many tasks has a reader."""
STEERED_SHARE, STEERED_SECONDS = 6, 1.5
"""One of so many is cancelled or paused, within so long."""
PACE_SECONDS = 1.0
"""Between two blows, on average: a Python process needs about that time to start."""
YOUNG_SECONDS = 15.0
"""A process that gives up within them never began; one that ends by itself later has broken something."""
START_SECONDS_MAX, STEP_SECONDS_MAX, STOP_SECONDS_MAX, READ_SECONDS_MAX = 60.0, 90.0, 30.0, 30.0
LOG_LINES, WIDTH = 12, 68

KILL, STOP, LONG_STOP, TERM = "killed", "stopped for a moment", "stopped beyond its lease", "ended in good order"
BLOWS = {
    ("worker", KILL): 14,
    ("worker", LONG_STOP): 12,
    ("worker", STOP): 4,
    ("worker", TERM): 4,
    ("HTTP worker", KILL): 4,
    ("HTTP worker", LONG_STOP): 4,
    ("HTTP worker", STOP): 1,
    ("HTTP worker", TERM): 1,
    ("API", KILL): 10,
    ("API", STOP): 5,
    ("API", TERM): 3,
    ("client", KILL): 4,
    ("client", STOP): 1,
    ("Valkey", STOP): 3,
}
"""Who is hit how, and how often of seventy times."""


EXPECTED_ERRORS = {"task.errored"}
"""What processes log as an error because a task ended so."""
TOLD = {
    "attempts that workers began": "attempts",
    "… in processes of their own": f"attempts of {PROCESS}",
    "… over HTTP": f"attempts of {HTTP}",
    "calls over HTTP whose answers were lost": "repeated over HTTP",
    "attempts over HTTP that were told to stop": "cancelled over HTTP",
    "leases that were lost": "lease_lost",
    "attempts that ran on while the next one ran": "beside",
    "tasks that their workers gave back or tried again": "requeued",
    "ended tasks that were tried once more": "retried",
    "tasks that were cancelled": "cancelled",
    "cancels that came too late": "cancel refused",
    "tasks that were paused by their owner": "pause accepted",
    "questions that humans decided": "decided",
    "late writes of zombies that were refused": "zombies refused",
    "warnings of refused writes in the logs": "warnings of refused words",
    "sub-tasks": "sub-tasks",
    "tasks that were completed": "ended completed",
    "tasks that failed": "ended failed",
    "tasks that errored": "ended errored",
    "tasks that errored because their workers lost them too often": "lost too often",
    "tasks that timed out": "ended timed_out",
    "submissions that needed more than one try": "submissions repeated",
    "entries in the logs": "entries",
}
"""A row of the table, and where `chaos_checks` counts it."""
LOGGED = {
    "late writes of workers that were refused, beside the zombies'": "task.refused",
    "attempts that workers gave up by themselves": "task.lease_lost",
    "attempts that workers were told to give up": "task.cancelled",
    "renewals that found no store": "worker.renewal_waiting",
}
"""The same of what workers log."""


class Blow:
    def __init__(self, kind: str, how: str, *, seconds: float = 0, victim: float = 0) -> None:
        self.kind, self.how, self.seconds, self.victim = kind, how, seconds, victim


def blows(dice: random.Random, kills: int, restarts: int) -> list[Blow]:
    """In order. The commonest stand in even the shortest run."""
    over_http = ("HTTP worker", dice.choice((KILL, LONG_STOP)))
    first = [("worker", KILL), ("worker", LONG_STOP), ("API", KILL), over_http]
    chosen = [*first, *dice.choices([*BLOWS], [*BLOWS.values()], k=kills)][:kills]
    dice.shuffle(chosen)
    found = []
    for kind, how in chosen:
        seconds = dice.uniform(1.2, 2.5) * LEASE_SECONDS if how == LONG_STOP else dice.uniform(0.2, 1.5)
        found.append(Blow(kind, how, seconds=seconds, victim=dice.random()))
    for number in range(restarts):
        how = KILL if number == 0 or dice.random() < 0.7 else TERM
        found.insert(round((number + 1) * len(found) / (restarts + 1)), Blow("Valkey", how))
    return found


class Broken(Exception):
    """The run cannot go on; the text is the evidence."""


class Process:
    """A child in a session of its own, which can be started again."""

    def __init__(self, name: str, kind: str, command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self.name, self.kind, self.command, self.environment = name, kind, command, environment
        self.log, self.port = folder / f"{name}.log", 0
        self.running: subprocess.Popen[bytes] | None = None
        self.began = 0.0
        self.busy = False
        """Somebody is hitting it."""

    def start(self) -> None:
        with self.log.open("ab") as log, socket.socket() as listening:
            command, descriptors = [*self.command], []
            if self.kind == "API":
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.bind(("127.0.0.1", self.port))
                listening.listen(1024)
                self.port = listening.getsockname()[1]
                descriptors = [listening.fileno()]
                command += ["--socket", str(listening.fileno())]
            self.running = subprocess.Popen(
                command,
                cwd=SCRIPTS,  # where the worker finds its module
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                start_new_session=True,
            )
        self.began = time.monotonic()

    def send(self, number: signal.Signals) -> None:
        assert self.running
        self.running.send_signal(number)

    @property
    def code(self) -> int | None:
        return self.running.poll() if self.running else None

    async def ended(self, seconds_max: float) -> int | None:
        """Its exit code; None: it runs on."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds_max):
                while self.code is None:
                    await asyncio.sleep(0.02)
        return self.code

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])


class Run:
    """One run: its processes, and what was done to them."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.data = options, folder, folder / "data"
        self.began = time.monotonic()
        self.done: Counter[str] = Counter()
        self.findings = chaos_checks.Findings()
        self.dice = random.Random(options.seed)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("TASKCAST_")}
        self.environment |= {
            "TASKCAST_DATA": str(self.data),
            "TASKCAST_FSYNC": options.fsync,
            "TASKCAST_PARTITIONS": str(PARTITIONS),
            "TASKCAST_LEASE_SECONDS": f"{LEASE_SECONDS:g}",
            "TASKCAST_GRACE_SECONDS": f"{GRACE_SECONDS:g}",
            "TASKCAST_HEARTBEAT_SECONDS": f"{HEARTBEAT_SECONDS:g}",
            "CHAOS_NOTES": str(folder / "attempts.notes"),
        }
        self.processes: list[Process] = []
        for number in range(APIS):
            self._add(f"api-{number}", "API", [TASKCAST, "api"])
        for number in range(options.workers):
            self._add(f"worker-{number}", "worker", [TASKCAST, "worker", "chaos_handlers"])
        self.readers: list[Reader] = []
        self.following: set[asyncio.Task[object]] = set()
        self.hitting: set[asyncio.Task[None]] = set()
        self.frozen: dict[int, str] = {}
        """Pids that have been sent SIGSTOP, and not yet SIGCONT."""

    def _add(self, name: str, kind: str, command: Sequence[str]) -> None:
        self.processes.append(Process(name, kind, command, self.folder, self.environment))

    def say(self, sentence: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {sentence}", flush=True)

    @property
    def ports(self) -> list[int]:
        return [one.port for one in self.processes if one.kind == "API"]

    @property
    def seconds_left(self) -> float:
        left: float = self.options.seconds_max - (time.monotonic() - self.began)
        return left

    async def until(self, what: Callable[[], bool | Awaitable[bool]], sentence: str, seconds_max: float) -> None:
        """Raises Broken."""
        try:
            async with asyncio.timeout(max(0.1, min(seconds_max, self.seconds_left))):
                while True:
                    holds = what()
                    if holds if isinstance(holds, bool) else await holds:
                        return
                    self.look_after()
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise Broken(f"It never happened that {sentence}.") from None

    # Start

    async def start(self) -> None:
        for one in self.processes:
            one.start()
        total = self.options.kills + self.options.restarts
        command = [sys.executable, str(SCRIPTS / "chaos_http.py"), str(self.folder), *map(str, self.ports)]
        self._add("http-worker", "HTTP worker", command)
        self.processes[-1].start()
        for number in range(CLIENTS):
            words = [self.folder, self.options.seed, number, CLIENTS, self.options.tasks, PACE_SECONDS * total]
            command = [sys.executable, str(SCRIPTS / "chaos_clients.py"), *map(str, [*words, *self.ports])]
            self._add(f"client-{number}", "client", command)
            self.processes[-1].start()
        for port in self.ports:
            await self.until(partial(self._answers, port), "the API answers", START_SECONDS_MAX)

    async def _answers(self, port: int) -> bool:
        with suppress(httpx.TransportError):
            async with httpx.AsyncClient(timeout=5) as http:
                return (await http.get(f"http://127.0.0.1:{port}/readiness")).status_code == 200
        return False

    def look_after(self) -> None:
        """Whatever ended by itself starts again, and is remembered."""
        for one in self.processes:
            if not one.busy and one.code is not None:
                seconds = time.monotonic() - one.began
                self.done[f"{one.kind}s that gave up while they started"] += seconds < YOUNG_SECONDS
                evidence = f"{one.name} ended with {one.code} after {seconds:.1f} s:\n{one.tail()}"
                self.findings.check("No process ends by itself", seconds < YOUNG_SECONDS, evidence)
                one.start()

    # Storm

    async def storm(self, owner: Owner) -> None:
        todo, tasks = blows(self.dice, self.options.kills, self.options.restarts), self.options.tasks
        seen: set[str] = set()
        for number, blow in enumerate(todo, 1):
            goal = number * tasks * 0.95 / (len(todo) + 1)

            def reached(goal: float = goal) -> bool:
                return self.accepted(seen, owner) >= goal

            await self.until(reached, f"{goal:.0f} tasks are accepted", STEP_SECONDS_MAX)
            await self.hit(blow)
            if number % max(1, len(todo) // 8) == 0:
                self.say(f"{number} of {len(todo)} blows, {len(seen)} of {tasks} tasks accepted.")
        await self.until(self._submitted, "all tasks are accepted", STEP_SECONDS_MAX)
        self.accepted(seen, owner)
        while self.hitting:
            await asyncio.wait(self.hitting)

    def _submitted(self) -> bool:
        """Every client has said that it has no more to submit."""
        said = [lines(self.folder, f"client-{number}.facts", Fact) for number in range(CLIENTS)]
        return all(any(fact.what == "finished" for fact in facts) for facts in said)

    def accepted(self, seen: set[str], owner: Owner) -> int:
        """How many tasks; of those that are news some get a reader, some are steered."""
        acks: list[Ack] = lines(self.folder, "*.acks", Ack)
        for ack in acks:
            if ack.task in seen:
                continue
            seen.add(ack.task)
            dice = random.Random(f"{self.options.seed}/{ack.number}/watched")
            if dice.randrange(READERS_SHARE) == 0:
                self.watch(f"/api/v1/tasks/{ack.task}/stream", dice, ack.task)
            if dice.randrange(STEERED_SHARE) == 0:
                steering = owner.steer("cancel", ack.task) if dice.random() < 0.4 else owner.pause_for_a_while(ack.task)
                self._keep(steering, dice.uniform(0, STEERED_SECONDS))
        return len(seen)

    def watch(self, path: str, dice: random.Random, task: str = "") -> Reader:
        reader = Reader(path, self.ports, dice, task=task)
        self.readers.append(reader)
        self._keep(reader.follow(), 0)
        return reader

    def _keep(self, wanted: Awaitable[object], pause: float) -> None:
        async def after() -> None:
            await asyncio.sleep(pause)
            await wanted

        one: asyncio.Task[object] = asyncio.create_task(after())
        self.following.add(one)
        one.add_done_callback(self.following.discard)

    async def hit(self, blow: Blow) -> None:
        if blow.kind == "Valkey":
            await self.hit_valkey(blow)
            return
        all_ = [one for one in self.processes if one.kind == blow.kind]
        place = int(blow.victim * len(all_))
        while not (free := [one for one in all_[place:] + all_[:place] if not one.busy and one.code is None]):
            await asyncio.sleep(0.05)
        victim = free[0]
        victim.busy = True
        self.done[f"{blow.kind} {blow.how}"] += 1
        task = asyncio.create_task(self._hit(victim, blow))
        self.hitting.add(task)
        task.add_done_callback(self.hitting.discard)

    async def _hit(self, victim: Process, blow: Blow) -> None:
        assert victim.running
        try:
            if blow.how in {STOP, LONG_STOP}:
                await self._freeze(victim.running.pid, blow.seconds)
                return
            victim.send(signal.SIGKILL if blow.how == KILL else signal.SIGTERM)
            code = await victim.ended(STOP_SECONDS_MAX)
            if blow.how == TERM:
                self._ended_well(victim, code)
            victim.start()
        finally:
            victim.busy = False

    def _ended_well(self, one: Process, code: int | None) -> None:
        young = time.monotonic() - one.began < YOUNG_SECONDS  # it may not have come to its handlers of signals
        well = code == 0 or (code == -signal.SIGTERM and (young or one.kind == "client"))
        evidence = f"{one.name} ended with {code}:\n{one.tail()}"
        self.findings.check("What is told to stop stops, in order", well, evidence)
        if code is None:
            one.send(signal.SIGKILL)
            assert one.running
            one.running.wait()

    async def _freeze(self, pid: int, seconds: float) -> None:
        self.frozen[pid] = ""
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            del self.frozen[pid]

    def valkey(self) -> int:
        """Its pid; 0 when it does not run."""
        with suppress(OSError, ValueError):
            pid = int((self.data / "valkey.pid").read_text())
            if Path(f"/proc/{pid}/cwd").resolve() == self.data.resolve():  # else a killed one's pid is somebody else's
                return pid
        return 0

    async def hit_valkey(self, blow: Blow) -> None:
        await self.until(lambda: self.valkey() > 0, "Valkey runs", STEP_SECONDS_MAX)
        pid = self.valkey()
        if blow.how == STOP:
            self.done["Valkey stopped for a moment"] += 1
            await self._freeze(pid, blow.seconds)
            return
        os.kill(pid, signal.SIGKILL if blow.how == KILL else signal.SIGTERM)
        await self.until(lambda: self.valkey() not in {0, pid}, "Valkey is started again", STEP_SECONDS_MAX)
        self.done[f"Valkey {blow.how}"] += 1

    # Calm

    async def calm(self, owner: Owner) -> None:
        """Until every task has ended."""
        self.say(f"The storm is over: {sum(self.done.values())} blows. What still runs may end.")
        asked = 0.0

        async def over() -> bool:
            nonlocal asked
            if time.monotonic() - asked > 1:
                asked = time.monotonic()
                await owner.resume_all()
            return await owner.open_tasks() == 0

        await self.until(over, "all tasks have ended", STEP_SECONDS_MAX)

    async def check(self, store: Store, owner: Owner, all_of_it: Reader) -> chaos_checks.Checks:
        await self.until(lambda: self._followed(store), "all follow-ups were taken", STEP_SECONDS_MAX)
        logs = await chaos_checks.logs_of(store)
        checks = chaos_checks.Checks(self.findings, logs, self.folder, self.options.seed, LEASE_SECONDS)
        ones = [reader for reader in self.readers if reader is not all_of_it]
        with suppress(Broken):  # the checks tell which
            await self.until(lambda: all(reader.done for reader in ones), "each reader has its end", READ_SECONDS_MAX)
            await self.until(lambda: checks.missing(all_of_it) <= 0, "a reader of all has all", READ_SECONDS_MAX)
        for reader in self.readers:
            reader.leave.set()
        for one in [*self.following]:
            one.cancel()
        await asyncio.gather(*self.following, return_exceptions=True)
        self.say("All tasks have ended. Stopping the processes, and checking.")
        await self.stop()
        self.say("Looking at the logs.")
        checks.all(owner.controls, self.options.tasks)
        for reader in ones:
            checks.read(reader)
        checks.read_all(all_of_it)
        self.findings.looked["Requests are answered as promised"] += sum(owner.answers.values())
        self.findings.broken["Requests are answered as promised"] += owner.wrong
        self.say("Looking at the store.")
        await chaos_checks.stored(store, self.findings)
        await self._synced(store)
        return checks

    async def _synced(self, store: Store) -> None:
        """The server's own word for it."""
        said = str(await store.door.read("CONFIG", "GET", "appendfsync"))
        self.findings.check(f"Valkey syncs {self.options.fsync}", f"'{self.options.fsync}'" in said, said)

    async def _followed(self, store: Store) -> bool:
        tags = store.partitions.tags
        return not sum([await store.door.read("LLEN", f"tc:{{{tag}}}:followups") for tag in tags])

    # End

    async def stop(self) -> None:
        """In good order, all but Valkey, which stops with its last user."""
        for one in self.processes:
            one.busy = True
            one.send(signal.SIGTERM)
        for one in self.processes:
            self._ended_well(one, await one.ended(STOP_SECONDS_MAX))

    def left_over(self) -> None:
        """Processes and sockets of this run."""
        promise = "No process and no socket is left"
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment = (place / "environ").read_bytes()
                if int(place.name) != os.getpid() and str(self.data).encode() in environment:
                    found.append(f"{place.name}: {(place / 'cmdline').read_bytes().replace(bytes(1), b' ').decode()}")
        self.findings.check(promise, not found, "\n".join(found))
        self.findings.check(promise, not (self.data / "valkey.sock").exists(), "valkey.sock is still there")

    def abandon(self) -> None:
        """Whatever happened: nothing of ours stays."""
        for pid in self.frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for one in self.processes:
            if one.running and one.code is None:
                one.running.kill()
                one.running.wait()
        if pid := self.valkey():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def spoken(self) -> Counter[str]:
        """What the processes have logged, by event. What none of them may log is a finding."""
        found: Counter[str] = Counter()
        promise = "No process logs an error of its own"
        for one in self.processes:
            for line in one.log.read_text(errors="replace").splitlines():
                try:
                    said = json.loads(line)
                    event, level = said["event"], said["level"]
                except (ValueError, KeyError, TypeError):
                    event, level = line, "error" if "Traceback" in line or "never retrieved" in line else "info"
                found[event] += 1
                wrong = level in {"error", "critical"} and event not in EXPECTED_ERRORS
                self.findings.check(promise, not wrong, f"{one.name}: {line[:1500]}")
        return found


@asynccontextmanager
async def owning(run: Run) -> AsyncIterator[Owner]:
    owner = Owner(run.ports, random.Random(f"{run.options.seed}/owner"))
    try:
        yield owner
    finally:
        await owner.aclose()


async def chaos(run: Run) -> chaos_checks.Checks | None:
    options = run.options
    who = f"{options.tasks} tasks, {options.workers} workers, {APIS} APIs, {CLIENTS} clients"
    run.say(f"{who}; Valkey with fsync {options.fsync}; seed {options.seed}.")
    checks = None
    try:
        await run.start()
        all_of_it = run.watch("/api/v1/stream/sse", random.Random(f"{options.seed}/all"))
        await run.until(lambda: bool(all_of_it.cursor), "a reader of all begins", START_SECONDS_MAX)
        (run.folder / GO).touch()
        async with owning(run) as owner:
            await run.storm(owner)
            await run.calm(owner)
            settings = Settings(data=run.data, fsync=options.fsync, lease_seconds=LEASE_SECONDS)
            async with open_store(settings) as store:
                checks = await run.check(store, owner, all_of_it)
        run.left_over()
    except Broken as error:
        ends = "\n".join(f"--- {one.name}\n{one.tail()}" for one in run.processes if one.running)
        run.findings.check("The run comes to its end", False, f"{error}\n{ends}")
    finally:
        run.abandon()
    return checks


def table(run: Run, checks: chaos_checks.Checks | None) -> bool:
    """Prints it; whether all is well."""
    spoken, log = run.spoken(), checks.counts if checks else Counter[str]()
    rows = dict(sorted(run.done.items()))
    rows |= {name: log[key] for name, key in TOLD.items()}
    rows |= {name: spoken[key] for name, key in LOGGED.items()}
    rows |= {"streams read": len(run.readers), "connections for them": sum(one.connections for one in run.readers)}
    print(f"\n{'What was done':<{WIDTH}} {'':>10} {'times':>7}")
    for name, count in rows.items():
        print(f"  {name:<{WIDTH}} {'':>8} {count:>7,}")
    findings = run.findings
    print(f"\n{'What was promised':<{WIDTH}} {'looked at':>10} {'broken':>7}")
    for promise in sorted(findings.looked.keys() | findings.broken.keys()):
        print(f"  {promise:<{WIDTH}} {findings.looked[promise]:>8,} {len(findings.broken[promise]):>7,}")
    broken = {promise: evidence for promise, evidence in findings.broken.items() if evidence}
    for promise, evidence in broken.items():
        print(f"\nBroken: {promise} ({len(evidence)})")
        for one in evidence[: chaos_checks.EVIDENCE_MAX]:
            print(f"  {one}")
    return not broken


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description="Kills what runs, and checks what was promised.")
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=60, help="Processes that are killed or stopped.")
    parser.add_argument("--restarts", type=int, default=5, help="Of Valkey.")
    parser.add_argument("--seconds-max", type=float, default=900)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--fsync", choices=["always", "everysec"], default="always")
    parser.add_argument("--keep", action="store_true", help="Keep the data and the logs, as after a broken promise.")
    options = parser.parse_args()
    if sys.platform != "linux":
        parser.error("Linux is needed, which shows what processes hold (/proc).")
    # A short path: a socket's must fit 100 bytes.
    folder = Path(tempfile.mkdtemp(prefix="taskcast-chaos-"))
    run = Run(options, folder)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    # However it ends, nothing that was started stays: a SIGTERM ends it as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    well = table(run, asyncio.run(chaos(run)))
    seconds = time.monotonic() - run.began
    if well and not options.keep:
        shutil.rmtree(folder)
    else:
        print(f"\nData, logs and notes are in {folder}.")
    verdict = "Nothing was lost" if well else "Promises broke"
    print(f"\n{verdict}: {seconds:.0f} s, fsync {options.fsync}, seed {options.seed}.")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
