"""Health, readiness, metrics: for operators and their machines, without a key.

Health says that this process answers, and asks nobody; readiness asks the store. What a scrape tells of queues, leases
and logs is read from the store at that moment.
"""

import asyncio
from datetime import UTC, datetime

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app import __version__, events, metrics
from app.errors import TaskcastError
from app.log import Logged
from app.store import Store
from app.task import TERMINAL

logger = structlog.get_logger()

READY_SECONDS = 2.0
"""For the store's answer; a load balancer asks every few seconds."""
SCRAPE_SECONDS = 5.0
"""Half of Prometheus' default timeout."""
QUEUES_MAX = 200
"""Names in the metrics: each is a series that Prometheus keeps."""


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
    return Response(generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})


class Watch:
    """Counts what happens to tasks, from the first scrape on: until somebody asks, nobody reads the log for it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._queues = {"default"}
        self.task: asyncio.Task[None] | None = None

    async def read(self) -> None:
        """Reads the gauges. Raises Unavailable."""
        if self.task is None:
            self.task = asyncio.create_task(self._run(), name="metrics")
        await metrics.measure(self._store.door.read, self._store.partitions.tags, sorted(self._queues))

    async def _run(self) -> None:
        async with self._store.watch(self._count):
            await asyncio.get_running_loop().create_future()

    def _count(self, one: Logged) -> None:
        event = one.entry.event
        metrics.EVENTS.labels(events.tag(event)).inc()
        if isinstance(event, events.Submitted | events.Continued):
            metrics.TASKS_SUBMITTED.inc()
        if isinstance(event, events.Submitted) and len(self._queues) < QUEUES_MAX:
            self._queues.add(event.task.queue)
        if isinstance(event, events.Started):
            metrics.CLAIMS.inc()
        if one.after in TERMINAL and one.before not in TERMINAL:
            metrics.TASKS_ENDED.labels(one.after.value).inc()


routes = [
    Route("/health", health),
    Route("/readiness", readiness),
    Route("/metrics", scrape),
]
