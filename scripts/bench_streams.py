"""`scripts/bench streams`: what a delivery, a stream and a wait cost, side by side with other servers in one run.

A delivery is one event at one subscriber, and counts when it is whole there. In the fan-out each event reaches all
subscribers before the next one is published, so that no server can send two at once. Every round starts every server
anew, one at a time. The figures are medians of the rounds, the ratios medians of the rounds' own ratios.

What this file must never do is hold a figure that it has not measured.
"""

import asyncio
import http.client
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import redis

from app import events, keys
from app.embedded import Embedded
from app.events import Noted, Submission
from app.identity import DEVELOPMENT_ORG, DEVELOPMENT_USER
from app.settings import Settings
from app.store import Store, open_store
from scripts.bench_rig import (
    SCRIPTS,
    Bench,
    Figures,
    Goal,
    Load,
    Measures,
    NotMeasured,
    Process,
    Program,
    Section,
    compiled_load,
    cpu_ns,
    files_max,
    goal,
    interleaved,
    listening,
    measuring,
    started,
    tail,
)

SUBSCRIBERS = 1000
EVENTS = 200
WARM_UP = 20
SETTLE_SECONDS = 1.0
"""For 1,000 new readers of 1,000 tasks to end their replays, if the machine is not busy with other things; and before
memory is read, for what is freed afterwards.
"""
REST = 0.1
"""Of a core: who takes less has ended them. A client that blocks for 5 s takes a little each time."""
EVENT_BYTES = 200
"""Of an event as the store keeps it. Its frame is longer, and the peers' frames are made as long as that."""
WRITERS = 50
EVENTS_PER_TASK = 10
WAITS = 500
PAUSE_SECONDS = 0.005
STREAMS = 10_000
STREAMS_BEFORE = 100
"""Open already when the memory is read first: what a process needs once is not the streams'."""
FILES_MIN = 13_000
"""For that many streams: Taskcast keeps a fifth of its files for other uses."""
STALLED = 50
STALLED_BUFFER_BYTES = 4096
BIG_EVENT_BYTES = 32 * 1024
BIG_EVENTS = 640
TASK = "bench-%d"
PYTHON = Path(sys.executable)
TASKCAST = PYTHON.with_name("taskcast")
PEERS = SCRIPTS / "bench_peers.py"


def tick(number: int, size: int) -> str:
    """What the load client looks for, filled up to a size; the time is that of the call."""
    return f"tick={number}={time.monotonic_ns()}=".ljust(size, "x")


def noted(text: str) -> Noted:
    return Noted(name="TICK", payload={"text": text})


TEXT_BYTES = EVENT_BYTES - len(events.encode(noted("")))


# Taskcast's tasks, as a worker holds them: events enter through the real store, one append at a time for each task.


class Tasks:
    def __init__(self, store: Store, fences: Mapping[str, int]) -> None:
        self.store, self._fences = store, fences
        self._said = dict.fromkeys(fences, 0)
        self._valkey = int((store.settings.data / "valkey.pid").read_text())

    async def append(self, task: str, text: str) -> None:
        self._said[task] = n = self._said[task] + 1
        await self.store.append(DEVELOPMENT_ORG, task, noted(text), fence=self._fences[task], n=n)

    def valkey_ns(self) -> int:
        return cpu_ns(self._valkey)


@asynccontextmanager
async def tasks(folder: Path, count: int) -> AsyncIterator[Tasks]:
    """Running tasks in a store of their own; `TASK` names them. No lease ends and no stream is trimmed meanwhile."""
    settings = Settings(data=folder / "data", lease_seconds=3600, bytes_per_mark=1 << 30)
    async with open_store(settings) as store:
        for i in range(count):
            task = Submission(
                id=TASK % i, org=DEVELOPMENT_ORG, owner=DEVELOPMENT_USER, query="?", submission=f"submission-{i}"
            )
            await store.submit(task)
        fences: dict[str, int] = {}
        while len(fences) < count:
            fences |= {one.task: one.fence for one in await store.claim(["default"], "bench", 100)}
        yield Tasks(store, fences)


API = (TASKCAST, "api", "--socket")


def api(folder: Path, command: Sequence[str | Path] = API) -> tuple[Process, int]:
    """One API process on the data folder."""
    process, (port,) = started("api", command, folder, TASKCAST_DATA=str(folder / "data"), TASKCAST_GRACE_SECONDS="1")
    return process, port


def peer(name: str, folder: Path, *arguments: str, sockets: int = 1) -> tuple[Process, list[int]]:
    return started(name, [PYTHON, PEERS, name, *arguments], folder, sockets=sockets)


def stream_path(task: str) -> str:
    return f"/api/v1/stream/sse?workflow_id={task}"


# One server with one channel, and how to publish to it


@dataclass(frozen=True)
class Side:
    process: Process
    port: int
    path: str
    publish: Callable[[str], Awaitable[None]]
    text_bytes: int = 0
    """Of each event; 0: so many that its frame is as long as Taskcast's."""
    valkey_ns: Callable[[], int] = lambda: 0


Opens = Callable[[Path], AbstractAsyncContextManager[Side]]


@asynccontextmanager
async def taskcast(
    folder: Path, command: Sequence[str | Path] = API, text_bytes: int = TEXT_BYTES
) -> AsyncIterator[Side]:
    async with tasks(folder, 1) as held:
        process, port = api(folder, command)
        with process:
            task = TASK % 0
            yield Side(process, port, stream_path(task), partial(held.append, task), text_bytes, held.valkey_ns)


def portable(folder: Path) -> AbstractAsyncContextManager[Side]:
    return taskcast(folder, (PYTHON, PEERS, "portable"))


class Poster:
    """Publishes on one connection. It blocks this thread, which nobody else waits for."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    async def post(self, path: str, text: str) -> None:
        self._connection.request("POST", path, text, {"X-EventSource-Event": "TICK"})
        answer = self._connection.getresponse()
        answer.read()
        if answer.status >= 300:
            raise NotMeasured(f"publishing was answered {answer.status}")


@asynccontextmanager
async def sse_starlette(folder: Path) -> AsyncIterator[Side]:
    process, (port,) = peer("sse-starlette", folder)
    with process:
        yield Side(process, port, "/stream", partial(Poster(port).post, "/publish"))


@asynccontextmanager
async def transport_write(folder: Path) -> AsyncIterator[Side]:
    process, (port, entrance) = peer("transport.write", folder, sockets=2)
    with process, socket.create_connection(("127.0.0.1", entrance)) as line:

        async def publish(text: str) -> None:
            line.sendall(text.encode() + b"\n")

        yield Side(process, port, "/", publish)


NGINX = """
load_module {module};
daemon off;
worker_processes 1;
worker_rlimit_nofile {files};
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000;
    nchan_shared_memory_size 64M;
    server {{
        listen 127.0.0.1:{port} backlog=2048;
        location /publish {{
            nchan_publisher;
            nchan_channel_id $arg_id;
            nchan_message_buffer_length 50;
            nchan_message_timeout 10m;
        }}
        location /stream {{
            nchan_subscriber eventsource;
            nchan_channel_id $arg_id;
            nchan_subscriber_first_message oldest;
        }}
    }}
}}
"""


def nginx_and_module() -> tuple[str, Path]:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if not nginx:
        raise NotMeasured("nginx is not installed (Debian: nginx)")
    said = subprocess.run([nginx, "-V"], capture_output=True, text=True, check=True, timeout=30).stderr
    modules = next((word.partition("=")[2] for word in said.split() if word.startswith("--modules-path=")), "")
    module = Path(modules) / "ngx_nchan_module.so"
    if not module.exists():
        raise NotMeasured("nginx has no nchan (Debian: libnginx-mod-nchan)")
    return nginx, module


@asynccontextmanager
async def nchan(folder: Path, channel: str = "bench") -> AsyncIterator[Side]:
    nginx, module = nginx_and_module()
    with listening() as sock:
        port = sock.getsockname()[1]  # free until a moment ago
    settings = {"module": module, "folder": folder, "port": port, "files": files_max(), "connections": STREAMS + 1000}
    (folder / "nginx.conf").write_text(NGINX.format(**settings))
    with Process("nginx", [nginx, "-e", "stderr", "-c", folder / "nginx.conf"], folder) as process:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except ConnectionRefusedError:
                if not process.alive:
                    raise NotMeasured(f"nginx does not start: {tail(process.log)}") from None
                await asyncio.sleep(0.01)
        yield Side(process, port, f"/stream?id={channel}", partial(Poster(port).post, f"/publish?id={channel}"))


# Rows

HEADS = {
    "server_us_per_delivery": "CPU µs/delivery",
    "deliveries_per_second": "deliveries/s",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "server_busy_percent": "server busy %",
    "load_busy_percent": "load busy %",
    "valkey_us_per_event": "Valkey µs/event",
    "frame_bytes": "frame bytes",
    "wire_bytes": "wire bytes",
    "p50_us": "p50 µs",
    "p99_us": "p99 µs",
    "kib_per_stream": "KiB/stream",
    "mib": "MiB in all",
    "redis_connections": "Redis connections",
    "peak_mib": "growth, MiB",
    "end_mib": "MiB at the end",
    "cuts": "cut off",
    "lost": "lost",
    "repeated": "repeated",
}
LEGEND = """\
CPU: user and system time of the server's processes alone, Valkey's apart. Busy: share of a core.
p50, p99: from just before an event is published until it is whole at a subscriber.
Frames: for an event of 200 bytes, padded to the length of Taskcast's; on the wire some servers add chunk sizes."""


async def fan_out_round(side: Side, load: Load, frame_bytes: float, count: int) -> Figures:
    """One task with SUBSCRIBERS, one event after the other."""
    size = side.text_bytes or EVENT_BYTES

    async def one(number: int) -> None:
        await load.expect(SUBSCRIBERS, spin=True)
        await side.publish(tick(number, size))
        await load.got()

    await load.open(SUBSCRIBERS, side.port, side.path)
    load.mark()
    await one(1)
    if not side.text_bytes:
        first = await load.report()
        size += round(frame_bytes) - first["frame_bytes"] // SUBSCRIBERS
    for number in range(2, WARM_UP + 1):
        await one(number)
    load.mark()
    with measuring(side.process.cpu_ns, side.valkey_ns, time.monotonic_ns) as spent:
        for number in range(WARM_UP + 1, WARM_UP + count + 1):
            await one(number)
    return figures(spent, await load.report(), count)


def figures(spent: Sequence[int], counts: Mapping[str, int], appended: int) -> Figures:
    server_ns, valkey_ns, wall_ns = spent
    deliveries = counts["deliveries"]
    if counts["lost"] or counts["repeated"]:
        raise NotMeasured(f"deliveries went wrong: {counts}")
    return {
        "server_us_per_delivery": server_ns / deliveries / 1e3,
        "deliveries_per_second": deliveries / wall_ns * 1e9,
        "p50_ms": counts["p50_ns"] / 1e6,
        "p99_ms": counts["p99_ns"] / 1e6,
        "server_busy_percent": server_ns / wall_ns * 100,
        "load_busy_percent": counts["cpu_ns"] / wall_ns * 100,
        "valkey_us_per_event": valkey_ns / appended / 1e3,
        "frame_bytes": counts["frame_bytes"] / deliveries,
        "wire_bytes": counts["wire_bytes"] / deliveries,
    }


async def fan_out(bench: Bench) -> Section:
    """One task, 1,000 subscribers, an event at a time."""
    section = Section()
    frame_bytes = 2.0 * EVENT_BYTES

    async def measure(opens: Opens, folder: Path) -> Figures:
        nonlocal frame_bytes
        async with opens(folder) as side, Load(compiled_load(bench.folder)) as load:
            measured = await fan_out_round(side, load, frame_bytes, EVENTS // 4 if opens is portable else EVENTS)
        if opens is taskcast:
            frame_bytes = measured["frame_bytes"]
        return measured

    section.notes.append(await capacity(bench))
    sides: dict[str, Opens] = {
        "taskcast": taskcast,
        "nchan": nchan,
        "sse-starlette": sse_starlette,
        "transport.write": transport_write,
        "taskcast on plain uvicorn": portable,
    }
    found = await interleaved(bench, section, "fan-out", {name: partial(measure, one) for name, one in sides.items()})
    section.goals = [
        goal(found, f"CPU per delivery, vs {peer}", limit, "taskcast", peer, "server_us_per_delivery")
        for peer, limit in (("nchan", 1.0), ("sse-starlette", 0.25), ("transport.write", 1.25))
    ]
    return section


async def capacity(bench: Bench) -> str:
    """How much the load client can take: events without a pause, from the server that costs the least."""
    async with transport_write(bench.folder) as side, Load(compiled_load(bench.folder)) as load:
        await load.open(SUBSCRIBERS, side.port, side.path)
        load.mark()
        await load.expect(SUBSCRIBERS * EVENTS)
        for number in range(1, EVENTS + 1):
            await side.publish(tick(number, 2 * EVENT_BYTES))
        await load.got()
        counts = await load.report()
    per_second = counts["deliveries"] / counts["wall_ns"] * 1e9
    busy = counts["cpu_ns"] / counts["wall_ns"]
    return (
        f"The load client took {per_second:,.0f} deliveries/s from transport.write without pauses, at {busy:.0%} of "
        f"its core: about {per_second / busy:,.0f} would fill it."
    )


async def write_all(held: Tasks, first: int, last: int) -> None:
    """The writers' events: each has tasks of its own, and appends its next event when the one before stands."""

    async def write(mine: Sequence[str]) -> None:
        for number in range(first, last + 1):
            for task in mine:
                await held.append(task, tick(number, TEXT_BYTES))

    every = [TASK % i for i in range(SUBSCRIBERS)]
    await asyncio.gather(*(write(every[i::WRITERS]) for i in range(WRITERS)))


async def settled(process: Process) -> None:
    spent = process.cpu_ns()
    while True:
        await asyncio.sleep(SETTLE_SECONDS)
        before, spent = spent, process.cpu_ns()
        if spent - before < REST * SETTLE_SECONDS * 1e9:
            return


async def many_tasks(bench: Bench) -> Section:
    """1,000 tasks with one subscriber each, 50 concurrent writers; bare loop: reads the log and writes, and does no more."""
    section = Section()

    async def measure(folder: Path, *, name: str) -> Figures:
        async with tasks(folder, SUBSCRIBERS) as held:
            tag, url = held.store.partitions.tag(DEVELOPMENT_ORG, TASK), held.store.door.url
            match name:
                case "taskcast":
                    process, port = api(folder)
                    path = stream_path(TASK)
                case "bare-loop":
                    process, (port,) = peer(name, folder, url, keys.key(tag, "log"))
                    path = f"/{TASK}"
                case _:
                    process, (port,) = peer(name, folder, url)
                    path = f"/{keys.key(tag, 'events', DEVELOPMENT_ORG, TASK)}"
            with process:
                async with Load(compiled_load(bench.folder)) as load:
                    await load.open(SUBSCRIBERS, port, path)
                    await settled(process)
                    await load.expect(SUBSCRIBERS)
                    await write_all(held, 1, 1)
                    await load.got()
                    load.mark()
                    await load.expect(SUBSCRIBERS * EVENTS_PER_TASK)
                    with measuring(process.cpu_ns, held.valkey_ns, time.monotonic_ns) as spent:
                        await write_all(held, 2, EVENTS_PER_TASK + 1)
                        await load.got()
                    return figures(spent, await load.report(), SUBSCRIBERS * EVENTS_PER_TASK)

    names = {"taskcast": "taskcast", "XREAD per client": "xread", "bare loop": "bare-loop"}
    sides = {side: partial(measure, name=name) for side, name in names.items()}
    found = await interleaved(bench, section, "many-tasks", sides)
    name = "CPU per delivery, 1,000 tasks, vs XREAD BLOCK per client"
    section.goals = [goal(found, name, 0.2, "taskcast", "XREAD per client", "server_us_per_delivery")]
    return section


async def wait(bench: Bench) -> Section:
    """From before the append until it is there: one subscriber, beside 1,000 of other, idle tasks."""
    section = Section()

    async def ours(folder: Path) -> Figures:
        async with tasks(folder, SUBSCRIBERS + 1) as held:
            process, port = api(folder)
            with process:
                async with Load(compiled_load(bench.folder)) as load:
                    await load.open(SUBSCRIBERS, port, stream_path(TASK))
                    task = TASK % SUBSCRIBERS
                    await load.open(1, port, stream_path(task))
                    for number in range(1, WARM_UP + WAITS + 1):
                        if number == WARM_UP + 1:
                            load.mark()
                        await load.expect(1)
                        await held.append(task, tick(number, TEXT_BYTES))
                        await load.got()
                        await asyncio.sleep(PAUSE_SECONDS)
                    counts = await load.report()
                    return {"p50_us": counts["p50_ns"] / 1e3, "p99_us": counts["p99_ns"] / 1e3}

    async def bare(folder: Path, *, peer: str) -> Figures:
        async with Embedded(folder / "data") as valkey:
            command: list[str | Path] = [PYTHON, PEERS, peer, valkey.url]
            with (
                Process(peer, command, folder, output=subprocess.PIPE) as process,
                redis.Redis.from_url(valkey.url, protocol=2) as store,
            ):
                assert process.output
                spent: list[int] = []
                for _ in range(WARM_UP + WAITS):
                    store.xadd("wake", {"at": time.monotonic_ns(), "event": "x" * EVENT_BYTES})
                    spent.append(int(process.output.readline()))
                    await asyncio.sleep(PAUSE_SECONDS)
        cuts = statistics.quantiles(spent[WARM_UP:], n=100)
        return {"p50_us": cuts[49] / 1e3, "p99_us": cuts[98] / 1e3}

    sides: dict[str, Measures] = {
        "taskcast": ours,
        "bare wake, redis.asyncio": partial(bare, peer="wake-asyncio"),
        "bare wake, redis-py": partial(bare, peer="wake"),
    }
    found = await interleaved(bench, section, "wait", sides)
    section.goals = [
        goal(found, f"publish → received p50, vs {peer}", 2.5, "taskcast", peer, "p50_us") for peer in [*sides][1:]
    ]
    return section


async def memory(bench: Bench) -> Section:
    """10,000 idle streams of 1,000 tasks, after one event each; memory is the processes' own (PSS), growth only."""
    if files_max() < FILES_MIN:
        raise NotMeasured(f"10,000 streams need {FILES_MIN} files per process, and ulimit -n says {files_max()}")
    section = Section()

    async def grown(
        process: Process, port: int, path: str, publish: Callable[[], Awaitable[None]], load: Load
    ) -> Figures:
        await load.open(STREAMS_BEFORE, port, path)
        before = process.pss_bytes()
        for opened in range(STREAMS_BEFORE, STREAMS, SUBSCRIBERS):
            await load.open(min(SUBSCRIBERS, STREAMS - opened), port, path)
        await load.expect(STREAMS)
        await publish()
        await load.got()
        await asyncio.sleep(SETTLE_SECONDS)
        after = process.pss_bytes()
        return {
            "kib_per_stream": (after - before) / (STREAMS - STREAMS_BEFORE) / 1024,
            "mib": after / 2**20,
            "redis_connections": 0,
        }

    async def ours(folder: Path) -> Figures:
        data = Embedded(folder / "data")
        async with data, AsyncExitStack() as writers, Load(compiled_load(bench.folder)) as load:
            held = await writers.enter_async_context(tasks(folder, SUBSCRIBERS))
            process, port = api(folder)
            with process:
                found = await grown(process, port, stream_path(TASK), partial(write_all, held, 1, 1), load)
                await writers.aclose()
                with redis.Redis.from_url(data.url, protocol=2) as asking:
                    # All that is left, but for this connection and the one by which `data` watches the server.
                    return {**found, "redis_connections": len(asking.client_list()) - 2}

    async def theirs(folder: Path) -> Figures:
        async with nchan(folder, TASK) as side, Load(compiled_load(bench.folder)) as load:
            poster = Poster(side.port)

            async def publish() -> None:
                for i in range(SUBSCRIBERS):
                    await poster.post(f"/publish?id={TASK % i}", tick(1, EVENT_BYTES))

            return await grown(side.process, side.port, side.path, publish, load)

    await interleaved(bench, section, "memory", {"taskcast": ours, "nchan": theirs})
    if mine := section.rows.get("taskcast"):
        section.goals = [
            Goal("memory per idle stream, KiB", 6, mine["kib_per_stream"]),
            Goal("Redis connections with 10,000 streams", 4, mine["redis_connections"]),
        ]
    return section


async def stalled(bench: Bench) -> Section:
    """20 MiB of 32 KiB events to 1,000 readers of one task, alone and beside 50 that read nothing until the end."""
    section = Section()

    async def measure(folder: Path, *, readers: int) -> Figures:
        async with taskcast(folder, text_bytes=BIG_EVENT_BYTES) as side, Load(compiled_load(bench.folder)) as load:

            async def one(number: int) -> None:
                await load.expect(SUBSCRIBERS, spin=True)
                await side.publish(tick(number, BIG_EVENT_BYTES))
                await load.got()

            await load.open(SUBSCRIBERS, side.port, side.path)
            for number in range(1, WARM_UP + 1):
                await one(number)
            before = peak = side.process.pss_bytes()
            if readers:
                await load.open(readers, side.port, side.path, buffer_bytes=STALLED_BUFFER_BYTES)
            load.mark()
            for number in range(WARM_UP + 1, WARM_UP + BIG_EVENTS + 1):
                await one(number)
                if number % WARM_UP == 0:
                    peak = max(peak, side.process.pss_bytes())
            counts, end = await load.report(), side.process.pss_bytes()
            if counts["lost"] or counts["repeated"]:
                raise NotMeasured(f"healthy readers did not get everything: {counts}")
            load.mark()
            await load.resume(WARM_UP + BIG_EVENTS)
            resumed = await load.report()
            return {
                "p50_ms": counts["p50_ns"] / 1e6,
                "p99_ms": counts["p99_ns"] / 1e6,
                "peak_mib": (peak - before) / 2**20,
                "end_mib": (end - before) / 2**20,
                "cuts": resumed["cuts"],
                "lost": resumed["lost"],
                "repeated": resumed["repeated"],
            }

    sides = {"beside 50 stalled": partial(measure, readers=STALLED), "alone": partial(measure, readers=0)}
    found = await interleaved(bench, section, "stalled", sides)
    lost = max((one["lost"] for one in found.get("beside 50 stalled", ())), default=None)
    section.goals = [
        goal(
            found, "p99 of 1,000 readers beside 50 stalled ones, vs alone", 1.3, "beside 50 stalled", "alone", "p99_ms"
        ),
        Goal("events that stalled readers lost", 0, lost),
    ]
    return section


SECTIONS = {"fan-out": fan_out, "many-tasks": many_tasks, "wait": wait, "memory": memory, "stalled": stalled}


if __name__ == "__main__":
    Program(name="streams", about=__doc__ or "", sections=SECTIONS, heads=HEADS, legend=LEGEND).main()
