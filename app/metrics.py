"""Every metric, in one list, for Prometheus: of one process, or of all the API processes that share a port (`ops.py`).

Names follow Prometheus' rules: units last, counters end in `_total`. Whoever does a thing counts it; what the store
knows better than a process (queues, leases, the log) is read when somebody scrapes (`ops.py`).
"""

import collections
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from app import events, keys
from app.task import TERMINAL, Status

# What happens to tasks, as the log tells it from the start of the API on: all tasks, whoever moved them.
TASKS_SUBMITTED = Counter("taskcast_tasks_submitted", "Tasks that were accepted, new turns included.")
TASKS_ENDED = Counter("taskcast_tasks_ended", "Tasks that reached an end, by status.", ["status"])
CLAIMS = Counter("taskcast_claims", "Tasks that a worker started.")
EVENTS = Counter("taskcast_events", "Events that were appended, by kind.", ["kind"])

# What these processes do.
CONNECTIONS_REFUSED = Counter("taskcast_connections_refused", "Connections closed at once because too many were open.")
STREAMS_OPEN = Gauge(
    "taskcast_streams_open",
    "Streams that are open: SSE, WebSocket, and requests that wait.",
    multiprocess_mode="livesum",
)
STREAM_FRAMES = Counter("taskcast_stream_frames", "Frames that were sent to readers.")
STREAM_BYTES = Counter("taskcast_stream_bytes", "Bytes of frames that were sent to readers.")
STREAMS_ABORTED = Counter(
    "taskcast_streams_aborted",
    "Streams that were cut off or turned away: slow, stalled, draining, full, key_full, store, failed.",
    ["reason"],
)
GAPS = Counter("taskcast_gaps", "Gaps that readers were told of, by reason.", ["reason"])
STALE = Counter("taskcast_stale_refusals", "Events refused because their attempt was over.")
STORE_ERRORS = Counter("taskcast_store_errors", "Calls that the store did not answer, by code.", ["code"])
CHORES_FAILED = Counter("taskcast_chores_failed", "Rounds of the ticker, or of forgetting, that failed.", ["chore"])
REQUESTS = Counter("taskcast_requests", "Requests that were answered.", ["route", "method", "status"])
# Up to the read timeout of clients, 30 s; streams are not in it, they last as long as they should.
REQUEST_SECONDS = Histogram(
    "taskcast_request_seconds",
    "Time from a request to its answer.",
    ["route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)

# What the store holds, read at scrape time by whoever is asked.
QUEUE_TASKS = Gauge(
    "taskcast_queue_tasks", "Tasks that are ready for a worker.", ["queue"], multiprocess_mode="livemostrecent"
)
QUEUE_OLDEST_SECONDS = Gauge(
    "taskcast_queue_oldest_seconds",
    "Age of the ready task that is next, priority counted as age.",
    ["queue"],
    multiprocess_mode="livemostrecent",
)
LEASES = Gauge("taskcast_leases", "Tasks that a worker holds.", ["partition"], multiprocess_mode="livemostrecent")
LOG_ENTRIES = Gauge(
    "taskcast_log_entries", "Entries that a partition's log keeps.", ["partition"], multiprocess_mode="livemostrecent"
)
TASKS = Gauge(
    "taskcast_tasks",
    "Tasks that a partition holds, ended ones included.",
    ["partition"],
    multiprocess_mode="livemostrecent",
)


def count(moves: Iterable[tuple[str, Status, Status]]) -> None:
    """Counts entries, of which each is its kind, and the status before and after. Many at once: a counter is slow."""
    for (kind, before, after), number in collections.Counter(moves).items():
        EVENTS.labels(kind).inc(number)
        if kind in {events.tag(events.Submitted), events.tag(events.Continued)}:
            TASKS_SUBMITTED.inc(number)
        if kind == events.tag(events.Started):
            CLAIMS.inc(number)
        if after in TERMINAL and before not in TERMINAL:
            TASKS_ENDED.labels(after.value).inc(number)


async def measure(read: Callable[..., Awaitable[Any]], tags: Iterable[str], queues: Iterable[str]) -> None:
    """Sets the gauges above. `read` asks the store one command; there is no list of queues, so who asks names them."""
    depth = dict.fromkeys(queues, 0)
    oldest = dict.fromkeys(depth, 0.0)
    for tag in tags:
        count = await read("HMGET", keys.key(tag, "count"), "tasks")
        TASKS.labels(tag).set(int(count[0] or 0))
        LEASES.labels(tag).set(await read("ZCARD", keys.key(tag, "leases")))
        LOG_ENTRIES.labels(tag).set(await read("XLEN", keys.key(tag, "log")))
        for queue in depth:
            name = keys.key(tag, "ready", queue)
            depth[queue] += await read("ZCARD", name)
            for first in await read("ZRANGE", name, 0, 0):
                queued_at = float(await read("ZSCORE", name, first) or time.time() * 1_000_000)
                oldest[queue] = max(oldest[queue], time.time() - queued_at / 1_000_000)
    for queue, tasks in depth.items():
        QUEUE_TASKS.labels(queue).set(tasks)
        QUEUE_OLDEST_SECONDS.labels(queue).set(oldest[queue])
