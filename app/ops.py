"""Health, readiness, metrics: for operators and their machines, without a key.

Health says that this process answers, and asks nobody; readiness asks the store. What a scrape tells of tasks, queues
and logs is read from the store at that moment.
"""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app import __version__, metrics
from app.errors import TaskcastError
from app.store import Store

logger = structlog.get_logger()

READY_SECONDS = 2.0
"""For the store's answer; a load balancer asks every few seconds."""
SCRAPE_SECONDS = 5.0
"""Half of Prometheus' default timeout."""
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The client's own variable, and it looks when it is imported: then values live in files there, for all processes."""


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
    store: Store = request.app.state.store
    told = b""
    try:
        async with asyncio.timeout(SCRAPE_SECONDS):
            stored = metrics.Stored()
            await stored.read(store.door.read, store.partitions.tags)
            told = generate_latest(stored)
    except (TaskcastError, TimeoutError) as error:
        # What the process itself counts is worth most while the store is away.
        metrics.STORE_ERRORS.labels("unavailable").inc()
        logger.warning("metrics.partial", reason=str(error) or type(error).__name__)
    return Response(generate_latest(_registry()) + told, headers={"Content-Type": CONTENT_TYPE_LATEST})


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


def _shared_folder() -> Path | None:
    folder = os.environ.get(FOLDER)
    return Path(folder) if folder else None


@contextmanager
def counted_together(processes: int) -> Iterator[dict[str, str]]:
    """The environment in which so many API processes have what they count in common."""
    if processes == 1:
        yield {}
        return
    with TemporaryDirectory(prefix="taskcast-metrics-") as folder:
        yield {FOLDER: folder}


routes = [
    Route("/health", health),
    Route("/readiness", readiness),
    Route("/metrics", scrape),
]
