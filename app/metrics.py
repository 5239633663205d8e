"""Every metric, in one list, for Prometheus: of one process, or of all the API processes that share a port (`ops.py`).

Names follow Prometheus' rules: units last, counters end in `_total`. Whoever does a thing counts it; what the store
knows better than a process (`Stored`) is read when somebody scrapes (`ops.py`).
"""

import time
from collections import Counter as Counted
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from app import keys

QUEUES_MAX = 200
"""Names in the metrics, those that were used last: each is a series that Prometheus keeps. As in `commit.lua`."""

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
    "Streams that were cut off or turned away: slow, stalled, draining, full, key_full, store, failed, silent.",
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


class Stored:
    """What the store knows, at one moment: of all tasks, whoever moved them."""

    def __init__(self) -> None:
        # Counted since the store was made, in the step that appends the event.
        self.submitted = CounterMetricFamily(
            "taskcast_tasks_submitted", "Tasks that were accepted, new turns included."
        )
        self.ended = CounterMetricFamily(
            "taskcast_tasks_ended", "Tasks that reached an end, by status.", labels=["status"]
        )
        self.claims = CounterMetricFamily("taskcast_claims", "Tasks that a worker started.")
        self.events = CounterMetricFamily("taskcast_events", "Events that were appended, by kind.", labels=["kind"])
        self.queue_tasks = GaugeMetricFamily(
            "taskcast_queue_tasks", "Tasks that are ready for a worker.", labels=["queue"]
        )
        self.queue_oldest_seconds = GaugeMetricFamily(
            "taskcast_queue_oldest_seconds",
            "Age of the ready task that is next, priority counted as age.",
            labels=["queue"],
        )
        self.leases = GaugeMetricFamily("taskcast_leases", "Tasks that a worker holds.", labels=["partition"])
        self.log_entries = GaugeMetricFamily(
            "taskcast_log_entries", "Entries that a partition's log keeps.", labels=["partition"]
        )
        self.tasks = GaugeMetricFamily(
            "taskcast_tasks", "Tasks that a partition holds, ended ones included.", labels=["partition"]
        )

    def collect(self) -> Iterable[Metric]:
        """As the client's collectors do."""
        return vars(self).values()

    async def read(self, read: Callable[..., Awaitable[Any]], tags: Sequence[str]) -> None:
        """Once. `read` asks the store one command."""
        counted: Counted[str] = Counted()
        used: Counted[str] = Counted({"default": 0})
        for tag in tags:
            raw = await read("HGETALL", keys.key(tag, "count"))
            count = {name.decode(): int(number) for name, number in raw.items()}
            counted.update(count)
            self.tasks.add_metric([tag], count.get("tasks", 0))
            self.leases.add_metric([tag], await read("ZCARD", keys.key(tag, "leases")))
            self.log_entries.add_metric([tag], await read("XLEN", keys.key(tag, "log")))
            queues = await read("ZRANGE", keys.key(tag, "queues"), 0, -1, "WITHSCORES")
            used |= Counted({name.decode(): int(float(at)) for name, at in zip(queues[::2], queues[1::2], strict=True)})
        for field, number in sorted(counted.items()):
            what, _, label = field.partition(":")
            if what == "event":
                self.events.add_metric([label], number)
            elif what == "ended":
                self.ended.add_metric([label], number)
        self.submitted.add_metric([], counted["event:submitted"] + counted["event:continued"])
        self.claims.add_metric([], counted["event:started"])
        for queue, _ in used.most_common(QUEUES_MAX):
            await self._measure(queue, [keys.key(tag, "ready", queue) for tag in tags], read)

    async def _measure(self, queue: str, sets: Sequence[str], read: Callable[..., Awaitable[Any]]) -> None:
        tasks, oldest = 0, 0.0
        for name in sets:
            tasks += await read("ZCARD", name)
            for first in await read("ZRANGE", name, 0, 0):
                queued_at = float(await read("ZSCORE", name, first) or time.time() * 1_000_000)
                oldest = max(oldest, time.time() - queued_at / 1_000_000)
        self.queue_tasks.add_metric([queue], tasks)
        self.queue_oldest_seconds.add_metric([queue], oldest)
