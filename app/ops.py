"""Health, readiness, metrics: for operators and their machines, without a key.

Health says that this process answers, and asks nobody; readiness asks the store. What a scrape tells of queues, leases
and logs is read from the store at that moment.
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import msgspec
import structlog
from msgspec import Struct
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app import __version__, events, metrics
from app.errors import TaskcastError, Unavailable
from app.store import Store
from app.task import Status

logger = structlog.get_logger()

READY_SECONDS = 2.0
"""For the store's answer; a load balancer asks every few seconds."""
SCRAPE_SECONDS = 5.0
"""Half of Prometheus' default timeout."""
QUEUES_MAX = 200
"""Names in the metrics: each is a series that Prometheus keeps."""
COUNT_SECONDS = 1.0
"""Between two looks at the log: it must not be cut meanwhile."""
LOCK_SECONDS = 0.01
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The client's own variable, and it looks when it is imported: then values live in files there, for all processes."""
COUNTED = "counted.json"
"""Next to them, `Counted`: locked by the process that counts, so that none counts what another one did."""


def _state(status: str, checks: dict[str, str]) -> dict[str, object]:
    return {"status": status, "version": __version__, "time": datetime.now(UTC).isoformat(), "checks": checks}


async def health(_: Request) -> Response:
    return JSONResponse(_state("healthy", {"gateway": "ok"}))


async def readiness(request: Request) -> Response:
    """503 too while the process drains: new requests belong to another one."""
    store: Store = request.app.state.store
    checks = {"gateway": "draining" if request.app.state.streams.closing else "ok", "store": "ok"}
    try:
        async with asyncio.timeout(READY_SECONDS):
            await store.ping()
    except (TaskcastError, TimeoutError):
        checks["store"] = "unavailable"
    ready = set(checks.values()) == {"ok"}
    return JSONResponse(_state("ready" if ready else "not ready", checks), 200 if ready else 503)


async def scrape(request: Request) -> Response:
    watch: Watch = request.app.state.watch
    try:
        async with asyncio.timeout(SCRAPE_SECONDS):
            await watch.read()
    except (TaskcastError, TimeoutError) as error:
        # What the process itself counts is worth most while the store is away.
        metrics.STORE_ERRORS.labels("unavailable").inc()
        logger.warning("metrics.partial", reason=str(error) or type(error).__name__)
    return Response(generate_latest(_registry()), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _registry() -> CollectorRegistry:
    """Of all API processes that share the port, where they do."""
    if not (folder := _shared_folder()):
        return REGISTRY
    for file in folder.glob("gauge_live*.db"):  # a dead process has no open streams
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            with suppress(FileNotFoundError):  # another one saw it too
                mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    return registry


class Counted(Struct):
    """How far the log is counted, and what queues it named."""

    until: dict[str, str]
    """The last id, by partition."""
    queues: set[str]


class Watch:
    """Counts what happens to tasks, from the log: every entry once, by one of the processes that share a port."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._counted = Counted({}, {"default"})
        self._turn = asyncio.Lock()
        self.task = asyncio.create_task(self._run(), name="metrics")

    async def read(self) -> None:
        """Counts what is new, and reads the gauges. Raises Unavailable."""
        await self._count()
        await metrics.measure(self._store.door.read, self._store.partitions.tags, sorted(self._counted.queues))

    async def _run(self) -> None:
        while True:
            try:
                await self._count()
            except Unavailable:
                pass  # the ticker tells
            except Exception:
                logger.exception("metrics.failed")
            await asyncio.sleep(COUNT_SECONDS)

    async def _count(self) -> None:
        async with self._turn:
            folder = _shared_folder()
            if not folder:
                await self._count_all(lambda: None)
                return
            with (folder / COUNTED).open("r+b", buffering=0) as file:
                await _lock(file)
                raw = file.read()
                self._counted = msgspec.json.decode(raw, type=Counted)

                def keep() -> None:
                    # One write, never shorter: whoever is killed leaves it whole.
                    os.pwrite(file.fileno(), msgspec.json.encode(self._counted).ljust(len(raw)), 0)

                await self._count_all(keep)

    async def _count_all(self, keep: Callable[[], None]) -> None:
        counted, log = self._counted, self._store.log
        for tag in self._store.partitions.tags:
            if tag not in counted.until:
                counted.until[tag], _ = await log.end(tag)
            while page := await log.entries(tag, counted.until[tag]):
                counted.until[tag] = page[-1].id
                metrics.count((one.head.type, one.head.before, one.head.after) for one in page)
                made = (one.entry.event for one in page if one.head.before is Status.NEW)
                queues = {event.task.queue for event in made if isinstance(event, events.Submitted)}
                counted.queues |= {*sorted(queues)[: QUEUES_MAX - len(counted.queues)]}
                keep()


@asynccontextmanager
async def counted_together(store: Store, processes: int) -> AsyncIterator[dict[str, str]]:
    """The environment in which so many API processes have their metrics in common, from here on."""
    if processes == 1:
        yield {}
        return
    with TemporaryDirectory(prefix="taskcast-metrics-") as folder:
        until = {tag: (await store.log.end(tag))[0] for tag in store.partitions.tags}
        (Path(folder) / COUNTED).write_bytes(msgspec.json.encode(Counted(until, {"default"})))
        yield {FOLDER: folder}


def _shared_folder() -> Path | None:
    folder = Path(os.environ.get(FOLDER, ""))
    return folder if (folder / COUNTED).is_file() else None


async def _lock(file: BinaryIO) -> None:
    """Until it is closed, or its process ends."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            await asyncio.sleep(LOCK_SECONDS)
        else:
            return


routes = [
    Route("/health", health),
    Route("/readiness", readiness),
    Route("/metrics", scrape),
]
