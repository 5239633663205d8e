"""Queues: who works on what. Claims tasks, keeps their leases, and finds what is due.

A claim pops, starts and leases in one step, so that a task is never between the queue and a worker. The ticker
(`Queues.tick`) runs in every process: whoever sees an expired lease or a passed deadline first appends the
consequence, and the guards of that append make all others' attempts harmless. The file is long because whoever waits,
claims, renews or ticks leans on what the others leave in the same sets.
"""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import msgspec
import structlog
from msgspec import Struct
from redis.exceptions import NoScriptError

from app import events, keys
from app.connect import Door, evaluation
from app.errors import Conflict, Full, Invalid, NotFound, Unavailable
from app.line import Arg, Line, in_our_words
from app.log import Log, Partitions, entry, limits
from app.settings import Settings
from app.task import LEASED, MAX_ATTEMPTS, PAUSED, RUNNING, Task, rows, task

logger = structlog.get_logger()

DUE_MAX = 200
"""Expired leases, and passed deadlines, that one look takes from a partition."""
DUE_ROUNDS = 10
"""Looks of one tick: tasks that expired overnight stand before those that workers may have."""
WAIT_ENDS = (events.ApprovalDecided, events.Reviewed, events.Resumed)
"""What a worker that waits has to hear of; one that died before it did has only waited."""
BACKOFF_SECONDS_MAX = 60
FORGET_MAX = 200
FOLLOW_MAX = 1000
"""Follow-ups that one pass takes from a partition: deadlines must not wait for all of them."""
FOLLOW_LEFT_MAX = 2000
"""Follow-ups that cannot be taken now, and which a pass looks behind."""
FOLLOW_PAGE = 50
"""Each may have 256 KiB."""
FOLLOW_PASSES = 10
"""Generations, more or less; those below them are the next tick's."""
SWEEP_SECONDS = 1.0
"""An idle worker looks again after this time: a delayed task makes no wake-up call."""
WOKEN_MAX = 2
"""Tasks that a wait claims: the one that woke it, and one more, so that a single one says that no others are there. A
process that is frozen while it waits gets so many all the same.
"""
STOP_SECONDS = 1.0
"""A store that is away must not hold up a worker's stop for longer."""


class Claimed(Struct, eq=False):
    """One claim of one task."""

    org: str
    task: str
    fence: int
    found: Task
    """As it stood right after its start."""


class Lease(Protocol):
    """What a renewal has to know of a claim."""

    org: str
    task: str
    fence: int


L = TypeVar("L", bound=Lease)


class Queues:
    def __init__(self, door: Door, partitions: Partitions, settings: Settings, log: Log) -> None:
        self.door = door
        self.partitions = partitions
        self.log = log
        self._limits = limits(settings)
        self.lease_ms = round(settings.lease_seconds * 1000)
        self._turn = 0

    async def claim(
        self,
        queues: Sequence[str] | Mapping[str, int],
        worker: str,
        free: int,
        *,
        org: str = "",
        claim: str = "",
        lease_seconds: float = 0,
    ) -> list[Claimed]:
        """At most `free` ready tasks, each started and leased to this worker, oldest first.

        `queues` may say how many attempts a task gets there that names no number itself (0: 3). `org`: only of that
        organisation. `claim`: a random name; the same one again, within 60 s, gets the same tasks.
        `lease_seconds` holds for the renewals, too; 0: as the settings say.
        """
        attempts = queues if isinstance(queues, Mapping) else dict.fromkeys(queues, 0)
        started = {queue: _started(worker, count, lease_seconds) for queue, count in attempts.items()}
        # Callers choose such names: nobody may meet another one's claim.
        name = f"{org}:{worker}:{claim or secrets.token_hex(16)}"
        lease_ms = round(lease_seconds * 1000) or self.lease_ms
        # What a repeated call was given stands in any partition: none may hand out new tasks before all have told.
        if claim and len(self.partitions.tags) > 1 and (known := await self.claim_as(name, started, 0, lease_ms, org)):
            return known
        return await self.claim_as(name, started, free, lease_ms, org)

    async def claim_as(
        self, claim: str, started: Mapping[str, tuple[bytes, bytes]], free: int, lease_ms: int, org: str
    ) -> list[Claimed]:
        """Under a name, the same one for a repeat. `free` 0: only what this claim was given before."""
        claimed: list[Claimed] = []
        # Each call begins at another partition, so that none starves.
        tags = self.partitions.tags
        self._turn = (self._turn + 1) % len(tags)
        for tag in tags[self._turn :] + tags[: self._turn]:
            if free and len(claimed) == free:
                break
            args = self.arguments(tag, claim, started, max(0, free - len(claimed)), lease_ms, org)
            try:
                raw = await self.door.run("claim", [keys.key(tag, "leases")], args, repeat=True)
            except Unavailable:
                if not claimed:
                    raise
                break  # what other partitions have handed out must not wait for this one
            claimed += _claimed(raw)
        return claimed

    def arguments(
        self, tag: str, claim: str, started: Mapping[str, tuple[bytes, bytes]], free: int, lease_ms: int, org: str
    ) -> list[Arg]:
        args: list[Arg] = [keys.prefix(tag), self._limits, claim, free, lease_ms, org]
        for queue, said in started.items():
            args += [queue, *said]
        return args

    async def renew(self, held: Sequence[L], *, lease_seconds: float = 0) -> dict[L, str]:
        """Each lease's task → its status; empty: the lease is lost and its handler must stop.

        `lease_seconds`: for this time only; 0: as each claim asked for.
        """
        answer: dict[L, str] = {}
        by_tag: dict[str, list[L]] = {}
        for one in held:
            by_tag.setdefault(self.partitions.tag(one.org, one.task), []).append(one)
        for tag, leases in by_tag.items():
            args: list[Arg] = [keys.prefix(tag), self._limits, self.lease_ms, round(lease_seconds * 1000)]
            args += [word for one in leases for word in (one.org, one.task, one.fence)]
            raw = await self.door.run("renew", [keys.key(tag, "leases")], args, repeat=True)
            answer |= {one: status.decode() for one, status in zip(leases, raw, strict=True)}
        return answer

    @asynccontextmanager
    async def waiting(self, queues: Mapping[str, int], worker: str) -> AsyncIterator["Waiting"]:
        async with AsyncExitStack() as stack:
            lines = {tag: await stack.enter_async_context(self.door.blocking()) for tag in self.partitions.tags}
            waiting = Waiting(self, lines, queues, worker)
            stack.push_async_callback(waiting.aclose)
            yield waiting

    async def tick(self) -> int:
        """Appends what is due in all partitions; returns how many events that made."""
        count = 0
        for tag in self.partitions.tags:
            for _ in range(DUE_ROUNDS):
                found, made = await self._tick(tag)
                count += made
                if not made or found < DUE_MAX:
                    break
        return count + await self.follow_up()

    async def _tick(self, tag: str) -> tuple[int, int]:
        """How much one look found, and how many events that made."""
        count = 0
        sets = [keys.key(tag, "leases"), keys.key(tag, "due")]
        found = await self.door.run("due", sets, [keys.prefix(tag), self._limits, DUE_MAX], repeat=True)
        for what, member, score, *state in found:
            ((org, id_),) = keys.of_members([member])
            status, attempt, max_attempts, refunds, expires_at = (value.decode() for value in state)
            event: events.AnyEvent
            if what == b"leases":
                left = int(max_attempts or MAX_ATTEMPTS) + int(refunds or 0) - int(attempt or 0)
                waited = status == RUNNING and await self._only_waited(tag, org, id_)
                event = lost(PAUSED if waited else status, int(attempt or 0), left)
            else:
                event = late(expired=bool(expires_at) and int(expires_at) // 1000 == int(score))
            # Somebody else's tick, a renewal or the task's own end came first: then this one is not due.
            with suppress(Conflict, NotFound):
                await self.log.append(org, id_, event, seen=(what.decode(), score), status=status)
                logger.info("task.due", task_id=id_, org=org, consequence=events.tag(event))
                count += 1
        return len(found), count

    async def _only_waited(self, tag: str, org: str, id_: str) -> bool:
        """Whether the end of a wait is the last that happened: the worker did not live to hear of it."""
        last = await self.door.read("XREVRANGE", keys.key(tag, "events", org, id_), "+", "-", "COUNT", 1)
        return bool(last) and isinstance(entry(id_, *last[0]).event, WAIT_ENDS)

    async def follow_up(self, org: str = "", task: str = "") -> int:
        """Takes the steps that events asked for in other partitions; returns how many. Of one task and those below
        it, or of all.

        Each may be taken twice, by two processes at once, and leaves its list when it was taken. Of one task they are
        taken in order: a sub-task is made before it is cancelled with its parent.
        """
        family = {keys.member(org, task)} if task else None
        total = 0
        for _ in range(FOLLOW_PASSES):
            # A step may ask for further ones: a child that is cancelled may have children.
            tags = [tag for tag in self.partitions.tags if family is None or tag in self._tags(family)]
            count = sum([await self._follow_up(tag, family) for tag in tags])
            if not count:
                break
            total += count
        return total

    def _tags(self, members: Iterable[str]) -> set[str]:
        return {self.partitions.tag(*member.split("/")) for member in members}

    async def _follow_up(self, tag: str, family: set[str] | None) -> int:
        """One pass over a partition's list. Adds to `family` whom the steps reached."""
        name = keys.key(tag, "followups")
        count = left = 0
        last = b""
        held_up: set[str] = set()
        while count < FOLLOW_MAX and left < FOLLOW_LEFT_MAX:
            # What cannot be taken now stays, and must not hide what stands behind it. The page begins with the last one
            # that was left: if that moved, somebody else took some, and what is read now may come too early.
            items = await self.door.read("LRANGE", name, max(left - 1, 0), left + FOLLOW_PAGE - 1)
            if left and items[:1] != [last]:
                break
            items = items[1 if left else 0 :]
            if not items:
                break
            for item in items:
                place, _, event = item.partition(b" ")
                member, _, seq = place.decode(errors="replace").rpartition("/")
                if member not in held_up and (family is None or member in family):
                    if await self._take(name, item, member, seq, event, family):
                        count += 1
                        continue
                    held_up.add(member)
                left, last = left + 1, item
        return count

    async def _take(self, name: str, item: bytes, member: str, seq: str, event: bytes, family: set[str] | None) -> bool:
        """False: it cannot be taken now, and stays in the list."""
        ((org, id_),) = keys.of_members([member.encode()])
        # Somebody else may have taken it since the list was read, and the world gone on.
        if await self.door.read("LPOS", name, item) is None:
            return True
        try:
            reached = await self._follow(org, id_, seq, events.decode(event))
        except Full:
            raise  # so is the rest
        except (Invalid, NotFound, Conflict):  # it will not get better, and must not hold up the others
            logger.exception("followup.dropped", task_id=id_, org=org, seq=seq)
            reached = []
        except Unavailable:
            return False
        except Exception:
            logger.exception("followup.held_up", task_id=id_, org=org, seq=seq)
            return False
        if family is not None:
            family.update(reached)
        await self.door.call("LREM", name, 1, item, repeat=True)
        return True

    async def _follow(self, org: str, id_: str, seq: str, event: events.AnyEvent) -> list[str]:
        """Answers the members that may now ask for further steps."""
        if isinstance(event, events.ChildSubmitted):
            with suppress(Conflict):  # the id is taken: who asked for it sees whose it is
                await self.log.submit(event.task, actor=event.actor)
            return []
        deleted = isinstance(event, events.Deleted)
        why = event.to if isinstance(event, events.Restated) else events.tag(event)
        cancelled = events.Cancelled(
            actor="taskcast",
            message="Task cancelled.",
            reason=f"Its parent task {id_} was {why.replace('_', ' ')}.",
        )
        reached: list[str] = []
        for tag in self.partitions.tags:
            index = keys.index(tag, org, "parent", id_)
            children = await self.door.read("ZRANGE", index, 0, -1)
            if deleted and (again := await self._made(org, id_)):  # those of a new task of the same id are not meant
                children = await self.door.read("ZRANGEBYSCORE", index, "-inf", f"({again}")
            for child in children:
                with suppress(Conflict, NotFound):
                    await self.log.append(org, child.decode(), cancelled, operation=f"with:{id_}:{seq}")
                    reached.append(keys.member(org, child.decode()))
                if deleted:
                    with suppress(NotFound):  # by somebody else, or by an earlier try
                        await self.log.delete(org, child.decode(), actor="taskcast", children=True)
                        reached.append(keys.member(org, child.decode()))
        return reached

    async def _made(self, org: str, id_: str) -> str:
        """When the task was, µs; empty: there is none."""
        at = await self.door.read("HGET", keys.key(self.partitions.tag(org, id_), "task", org, id_), "created_at")
        return at.decode() if at else ""

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
            for (org, id_), score in zip(keys.of_members(raw[::2]), raw[1::2], strict=True):
                # A new turn may have begun since: then it has not ended.
                with suppress(Conflict, NotFound):
                    await self.log.delete(org, id_, actor="taskcast", seen=score)
                    logger.info("task.forgotten", task_id=id_, org=org)
                    count += 1
        return count


class Waiting:
    """A worker that waits for tasks: one call at a time. Made by `Queues.waiting`.

    In a store of one partition the claim stands behind the wait on the same connection, and the store goes on with it by
    itself: a task begins one trip earlier. Elsewhere it follows the wake-up, for it looks at all partitions.
    """

    def __init__(self, queues: Queues, lines: Mapping[str, Line], wanted: Mapping[str, int], worker: str) -> None:
        self._queues, self._lines, self._wanted, self._worker = queues, lines, wanted, worker
        own = secrets.token_hex(8)
        self._stops = {tag: keys.key(tag, "stop", own) for tag in lines}
        self._waits = self._ended = False
        self._pending: dict[str, asyncio.Future[Any]] = {}

    async def claim(self, free: int) -> list[Claimed]:
        """Waits until a task may be ready, for SWEEP_SECONDS at most, and claims up to `free`. Raises Unavailable."""
        if self._ended:
            return []
        self._waits = True
        try:
            if len(self._lines) == 1:
                ((tag, line),) = self._lines.items()
                return await self._claim_behind(tag, line, free)
            await self._wait()
        finally:
            self._waits = False
        return [] if self._ended else await self._queues.claim(self._wanted, self._worker, free)

    def _pop(self, tag: str) -> tuple[Arg, ...]:
        names = [keys.key(tag, "wake", queue) for queue in self._wanted]
        return ("BLPOP", self._stops[tag], *names, SWEEP_SECONDS)

    async def _claim_behind(self, tag: str, line: Line, free: int) -> list[Claimed]:
        queues = self._queues
        started = {queue: _started(self._worker, count, 0) for queue, count in self._wanted.items()}
        name = f":{self._worker}:{secrets.token_hex(16)}"
        args = queues.arguments(tag, name, started, free, queues.lease_ms, "")
        command = evaluation("claim", [keys.key(tag, "leases")], args)
        try:
            popped, raw = await line.trip([self._pop(tag), command])
        except Exception as error:
            # Did it come to the claim? The same name tells; a claim of no tasks takes none.
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS if self._ended else None):
                    if claimed := await queues.claim_as(name, started, 0, queues.lease_ms, ""):
                        return claimed
            raise in_our_words(error) from error
        if isinstance(raw, NoScriptError):  # a restarted server
            return await queues.claim_as(name, started, free, queues.lease_ms, "")
        if isinstance(raw, Exception):
            raise in_our_words(raw)
        claimed = _claimed(raw)
        if isinstance(popped, Exception) and not claimed:  # the claim behind a refused wait is run all the same
            raise in_our_words(popped)
        return claimed

    async def _wait(self) -> None:
        for tag, line in self._lines.items():
            if tag not in self._pending:
                self._pending[tag] = asyncio.ensure_future(line.ask(*self._pop(tag)))
        # The others' reads go on: cancelled, each would cost a connection, and perhaps a token.
        await asyncio.wait(self._pending.values(), return_when=asyncio.FIRST_COMPLETED)
        for tag, one in [*self._pending.items()]:
            if one.done():
                del self._pending[tag]
                if error := one.exception():
                    raise error

    async def end(self) -> None:
        """Ends the wait. Cut off, it could leave tasks that nobody knows of: it is woken, and answers what it has."""
        self._ended = True
        if not self._waits:
            return
        tag, own = next(iter(self._stops.items()))
        call = self._queues.door.call
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await asyncio.gather(call("RPUSH", own, "1"), call("EXPIRE", own, 60))
        except (TimeoutError, Unavailable):
            self._lines[tag].close()

    async def aclose(self) -> None:
        for one in self._pending.values():
            one.cancel()
        await asyncio.gather(*self._pending.values(), return_exceptions=True)


def _claimed(raw: Iterable[Any]) -> list[Claimed]:
    """The script's answer. A repeated claim may name tasks that ended since, were given to others, or were deleted."""
    claimed: list[Claimed] = []
    for org, id_, fence, encoded in raw:
        flat: list[str] = msgspec.json.decode(encoded)
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        if fields.get("fence") == fence.decode() and fields["status"] in LEASED:
            claimed.append(Claimed(org.decode(), id_.decode(), int(fence), task(fields)))
    return claimed


@lru_cache
def _started(worker: str, max_attempts: int, lease_seconds: float) -> tuple[bytes, bytes]:
    """A worker's `started`, and its rows: the same for all tasks of a queue."""
    event = events.Started(
        actor=f"worker:{worker}",
        message="Task started.",
        worker=worker,
        max_attempts=max_attempts,
        lease_seconds=lease_seconds,
    )
    return events.encode(event), rows(event)


def again(task: Task, error: str, seconds: float | None = None) -> events.Requeued:
    """What follows an attempt that ended with an error, and is not the last: another one after `seconds`."""
    if seconds is None:
        seconds = backoff_seconds(task.attempt - task.refunds)
    message = f"Attempt {task.attempt} ended with {error.removesuffix('.')}; the next one begins in {seconds:.1f} s."
    return events.Requeued(message=message, error=error, delay_seconds=seconds)


def backoff_seconds(attempt: int) -> float:
    """At random up to 1, 2, 4 … 60 after attempts 1, 2, 3 …: many that failed together do not come back together."""
    return random.uniform(0, min(1 << min(max(attempt - 1, 0), 6), BACKOFF_SECONDS_MAX))


def lost(status: str, attempt: int, attempts_left: int) -> events.LeaseLost | events.Errored:
    """What follows when a worker falls silent. Waiting for a human costs no attempt."""
    if status == PAUSED:
        return events.LeaseLost(
            actor="taskcast", message="The task lost its worker while it waited; no attempt is lost.", refund=True
        )
    if attempts_left > 0:
        return events.LeaseLost(
            actor="taskcast", message=f"Attempt {attempt} lost its worker; the task is queued again."
        )
    times = "once" if attempt == 1 else f"{attempt} times"
    return events.Errored(
        actor="taskcast",
        message="The task lost its worker too often.",
        error=f"The worker stopped answering ({times}).",
    )


def late(*, expired: bool) -> events.TimedOut:
    """What follows a deadline: the task's own, or (`expired`) that of its first start."""
    if expired:
        message = "The task waited in its queue for longer than its time to live."
        return events.TimedOut(actor="taskcast", message=message, error=message)
    return events.TimedOut(actor="taskcast", message="The task exceeded its deadline.")
