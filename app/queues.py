"""Queues: who works on what. Claims tasks, keeps their leases, and finds what is due.

A claim pops, starts and leases in one step, so that a task is never between the queue and a worker. The ticker
(`Queues.tick`) runs in every process: whoever sees an expired lease or a passed deadline first appends the
consequence, and the guards of that append make all others' attempts harmless.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import structlog
from msgspec import Struct

from app import events, keys
from app.connect import Arg, Door
from app.errors import Conflict, NotFound, Unavailable
from app.log import Log, Partitions, limits
from app.settings import Settings
from app.task import rows

logger = structlog.get_logger()

DUE_MAX = 200
"""Expired leases and passed deadlines that one tick takes from a partition."""


FORGET_MAX = 200
SWEEP_SECONDS = 1.0
"""An idle worker looks again after this time: a delayed task makes no wake-up call."""


class Claimed(Struct, frozen=True):
    org: str
    task: str
    fence: int


class Queues:
    def __init__(self, door: Door, partitions: Partitions, settings: Settings, log: Log) -> None:
        self.door = door
        self.partitions = partitions
        self.log = log
        self._limits = limits(settings)
        self.lease_ms = round(settings.lease_seconds * 1000)
        self._turn = 0

    async def claim(self, queues: Sequence[str], worker: str, free: int) -> list[Claimed]:
        """At most `free` ready tasks, each started and leased to this worker."""
        claimed: list[Claimed] = []
        event = events.Started(actor=f"worker:{worker}", message="Task started.", worker=worker)
        # Each call begins at another partition, so that none starves.
        tags = self.partitions.tags
        self._turn = (self._turn + 1) % len(tags)
        for tag in tags[self._turn :] + tags[: self._turn]:
            if len(claimed) == free:
                break
            args: list[Arg] = [
                keys.prefix(tag),
                self._limits,
                secrets.token_hex(16),
                free - len(claimed),
                self.lease_ms,
            ]
            args += [events.encode(event), rows(event), *dict.fromkeys(queues)]
            try:
                raw = await self.door.run("claim", [keys.key(tag, "leases")], args, repeat=True)
            except Unavailable:
                if not claimed:
                    raise
                break  # what other partitions have handed out must not wait for this one
            claimed += [Claimed(org.decode(), task.decode(), int(fence)) for org, task, fence in raw]
        return claimed

    async def renew(self, held: Sequence[Claimed]) -> dict[Claimed, str]:
        """Each lease's task → its status; empty: the lease is lost and its handler must stop."""
        answer: dict[Claimed, str] = {}
        by_tag: dict[str, list[Claimed]] = {}
        for one in held:
            by_tag.setdefault(self.partitions.tag(one.org, one.task), []).append(one)
        for tag, leases in by_tag.items():
            args: list[Arg] = [keys.prefix(tag), self._limits, self.lease_ms]
            args += [word for one in leases for word in (one.org, one.task, one.fence)]
            raw = await self.door.run("renew", [keys.key(tag, "leases")], args, repeat=True)
            answer |= {one: status.decode() for one, status in zip(leases, raw, strict=True)}
        return answer

    @asynccontextmanager
    async def waiting(self, queues: Sequence[str]) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Gives a function that returns when a task may be ready in one of these queues, or after SWEEP_SECONDS."""
        pops: list[Callable[[], Awaitable[Any]]] = []
        pending: dict[int, asyncio.Future[Any]] = {}
        async with AsyncExitStack() as stack:
            for tag in self.partitions.tags:
                line = await stack.enter_async_context(self.door.blocking())
                names = [keys.key(tag, "wake", queue) for queue in queues]
                pops.append(partial(line.ask, "BLPOP", *names, SWEEP_SECONDS))

            async def wait() -> None:
                for i, pop in enumerate(pops):
                    if i not in pending:
                        pending[i] = asyncio.ensure_future(pop())
                # The others' reads go on: cancelled, each would cost a connection, and perhaps a token.
                await asyncio.wait(pending.values(), return_when=asyncio.FIRST_COMPLETED)
                for i, one in [*pending.items()]:
                    if one.done():
                        del pending[i]
                        if error := one.exception():
                            raise error

            try:
                yield wait
            finally:
                for one in pending.values():
                    one.cancel()
                await asyncio.gather(*pending.values(), return_exceptions=True)

    async def tick(self) -> int:
        """Appends what is due in all partitions; returns how many events that made."""
        count = 0
        for tag in self.partitions.tags:
            sets = [keys.key(tag, "leases"), keys.key(tag, "due")]
            for what, member, score, attempt, max_attempts in await self.door.run(
                "due", sets, [keys.prefix(tag), self._limits, DUE_MAX], repeat=True
            ):
                ((org, task),) = keys.of_members([member])
                event: events.AnyEvent = events.TimedOut(actor="taskcast", message="The task exceeded its deadline.")
                if what == b"leases":
                    event = lost(int(attempt), int(max_attempts))
                # Somebody else's tick, a renewal or the task's own end came first: then this one is not due.
                with suppress(Conflict, NotFound):
                    await self.log.append(org, task, event, seen=(what.decode(), score))
                    logger.info("task.due", task_id=task, org=org, consequence=events.tag(event))
                    count += 1
        return count

    async def running(self) -> int:
        """How many tasks workers hold."""
        return sum([await self.door.read("ZCARD", keys.key(tag, "leases")) for tag in self.partitions.tags])

    async def forget(self, keep_seconds: float) -> int:
        """Deletes tasks that ended longer ago; at most FORGET_MAX per partition and call. Returns how many."""
        count = 0
        seconds, _ = await self.door.read("TIME")
        until = round((int(seconds) - keep_seconds) * 1_000_000)
        for tag in self.partitions.tags:
            command = ("ZRANGEBYSCORE", keys.key(tag, "ended"), "-inf", until, "WITHSCORES", "LIMIT", 0, FORGET_MAX)
            raw = await self.door.read(*command)
            for (org, task), score in zip(keys.of_members(raw[::2]), raw[1::2], strict=True):
                # A new turn may have begun since: then it has not ended.
                with suppress(Conflict, NotFound):
                    await self.log.delete(org, task, actor="taskcast", seen=score)
                    logger.info("task.forgotten", task_id=task, org=org)
                    count += 1
        return count


def lost(attempt: int, max_attempts: int) -> events.LeaseLost | events.Errored:
    """What follows when a worker falls silent."""
    if attempt < max_attempts:
        return events.LeaseLost(
            actor="taskcast", message=f"Attempt {attempt} lost its worker; the task is queued again."
        )
    times = "once" if attempt == 1 else f"{attempt} times"
    return events.Errored(
        actor="taskcast",
        message="The task lost its worker too often.",
        error=f"The worker stopped answering ({times}).",
    )
