"""The claims of a process that wait for a task, and what it knows of those that got one.

A claim that waits holds no connection to the store: one watcher on the log wakes all of them, and exists only while
somebody waits. What this file must never do is poll for each: a sweep a second, for delayed tasks, is for all.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress

import structlog

from app import events
from app.errors import TaskcastError, Unavailable
from app.log import Logged
from app.queues import SWEEP_SECONDS, Claimed
from app.store import Store
from app.task import Status

logger = structlog.get_logger()

KNOWN_MAX = 10_000
"""Claims whose queue is remembered, for keys that may not work on all."""


class Waiter:
    """A claim that waits, for one organisation's tasks in some queues."""

    def __init__(self, org: str, queues: Sequence[str]) -> None:
        self.org, self.queues = org, queues
        self.woken = asyncio.Event()
        """There may be a task for it."""
        self.full = False
        """It could not take one, and looks by itself as soon as it can."""


Over = Callable[[Logged], None]


class Claims:
    """A task that is queued wakes that waiter of its queue whose turn is longest ago, of those that are not awake yet.
    Whoever leaves wakes the next one, so that no task is slept over.
    """

    def __init__(self, store: Store) -> None:
        self.task: asyncio.Task[None] | None = None
        self._store = store
        self._known: dict[tuple[str, str, int], str] = {}
        """Organisation, task and fence of recent claims → queue."""
        self._waiting: dict[str, dict[str, dict[Waiter, None]]] = {}
        """By organisation and queue, in the order in which they came."""
        self._own: set[tuple[str, str]] = set()
        """Queues that one waiter alone has."""
        self._held: dict[tuple[str, str], tuple[int, Over]] = {}
        """Organisation and task → the fence of its attempt, and who wants to hear of the end of that."""
        self._placed: asyncio.Future[None] | None = None

    def queue(self, org: str, task: str, fence: int) -> str | None:
        """Of a task that was claimed a while ago, as far as it is remembered."""
        return self._known.get((org, task, fence))

    def remember(self, org: str, task: str, fence: int, queue: str) -> None:
        if len(self._known) >= KNOWN_MAX:
            self._known.clear()
        self._known[org, task, fence] = queue

    def hold(self, one: Claimed, over: Over) -> None:
        """Gives `over` the entry with which the attempt ended, or paused, unless that has happened before. Whoever holds
        has a place, so that the log is watched; what is lost on the way, the renewal of the lease tells.
        """
        self._held[one.org, one.task] = one.fence, over

    def drop(self, one: Claimed) -> None:
        fence, _ = self._held.get((one.org, one.task), (0, None))
        if fence == one.fence:  # else somebody else here has claimed it since
            del self._held[one.org, one.task]

    async def give_back(self, claimed: Iterable[Claimed], actor: str) -> None:
        """For a worker that left before it heard of these tasks: the attempts do not count."""
        event = events.Requeued(actor=actor, message="The worker left before it had the task.", refund=True)
        for one in claimed:
            with suppress(TaskcastError):
                await self._store.append(one.org, one.task, event, fence=one.fence)
                logger.info("task.requeued", task_id=one.task, org=one.org, reason=event.message)

    @asynccontextmanager
    async def place(self, org: str, queues: Sequence[str], *, own: str = "") -> AsyncIterator[Waiter]:
        """`own`: one more queue, which nobody else serves and where no task is delayed: no sweep looks there.

        Raises Unavailable when the log cannot be watched.
        """
        queues = [*queues, own] if own else queues
        waiter = Waiter(org, queues)
        lines = self._waiting.setdefault(org, {})
        self._own.add((org, own))
        for queue in queues:
            lines.setdefault(queue, {})[waiter] = None
        try:
            await self._watching()
            yield waiter
        finally:
            self._own.discard((org, own))
            for queue in queues:
                del lines[queue][waiter]
                if not lines[queue]:
                    del lines[queue]
            if not lines:
                self._waiting.pop(org, None)
            self._wake(org, queues)

    async def _watching(self) -> None:
        if self.task is None or self._placed is None:
            self._placed = asyncio.get_running_loop().create_future()
            self.task = asyncio.create_task(self._watch(self._placed), name="claims")
        await asyncio.shield(self._placed)

    async def _watch(self, placed: asyncio.Future[None]) -> None:
        """While somebody waits."""
        failure: TaskcastError = Unavailable("The store's log is not watched.")
        try:
            async with self._store.watch(self._hear):
                placed.set_result(None)
                while self._waiting:
                    await asyncio.sleep(SWEEP_SECONDS)
                    for org, lines in self._waiting.items():  # a delayed task becomes ready without a word
                        self._wake(org, [queue for queue in lines if (org, queue) not in self._own])
        except TaskcastError as error:
            failure = error
        finally:  # in the same tick as it looked for the last time, or who comes then would wait for nobody
            self.task = self._placed = None
            if not placed.done():
                placed.set_exception(failure)
                placed.exception()  # perhaps nobody waits any more, and a failure that nobody reads is reported

    def _hear(self, one: Logged) -> None:
        if one.after is Status.QUEUED and one.before is not Status.QUEUED:
            self._wake(one.org, (one.queue,))
        fence, over = self._held.get((one.org, one.task), (0, None))
        # A claim may be faster than the log: what came before it is heard after it.
        if over and (one.fence > fence or (one.fence == fence and one.after is not Status.RUNNING)):
            over(one)

    def _wake(self, org: str, queues: Iterable[str]) -> None:
        lines = self._waiting.get(org, {})
        for queue in queues:
            line = lines.get(queue, {})
            for waiter in line:
                if not (waiter.full or waiter.woken.is_set()):
                    waiter.woken.set()
                    del line[waiter]
                    line[waiter] = None  # to the end
                    break
