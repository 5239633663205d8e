"""The claims of a process that wait for a task, and what it remembers of those that got one.

A claim that waits holds no connection to the store: one watcher on the log wakes all of them, and exists only while
somebody waits. What this file must never do is poll for each: a sweep a second, for delayed tasks, is for all.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from app.errors import TaskcastError, Unavailable
from app.log import Logged
from app.queues import SWEEP_SECONDS
from app.store import Store
from app.task import Status

KNOWN_MAX = 10_000
"""Claims whose queue is remembered, for keys that may not work on all."""


class Waiter:
    """A claim that waits, for one organisation's tasks in some queues."""

    def __init__(self, org: str, queues: Sequence[str]) -> None:
        self.org, self.queues = org, queues
        self.woken = asyncio.Event()
        """There may be a task for it."""


class Claims:
    """A task that is queued wakes the first waiter of its queue that is not awake yet. Whoever leaves wakes the next one,
    so that no task is slept over.
    """

    def __init__(self, store: Store) -> None:
        self.task: asyncio.Task[None] | None = None
        self._store = store
        self._known: dict[tuple[str, str, int], str] = {}
        """Organisation, task and fence of recent claims → queue."""
        self._waiting: dict[str, dict[str, dict[Waiter, None]]] = {}
        """By organisation and queue, in the order in which they came."""
        self._placed: asyncio.Future[None] | None = None

    def queue(self, org: str, task: str, fence: int) -> str | None:
        """Of a task that was claimed a while ago, as far as it is remembered."""
        return self._known.get((org, task, fence))

    def remember(self, org: str, task: str, fence: int, queue: str) -> None:
        if len(self._known) >= KNOWN_MAX:
            self._known.clear()
        self._known[org, task, fence] = queue

    @asynccontextmanager
    async def place(self, org: str, queues: Sequence[str]) -> AsyncIterator[Waiter]:
        """Raises Unavailable when the log cannot be watched."""
        waiter = Waiter(org, queues)
        lines = self._waiting.setdefault(org, {})
        for queue in queues:
            lines.setdefault(queue, {})[waiter] = None
        try:
            await self._watching()
            yield waiter
        finally:
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
                        self._wake(org, lines)
        except TaskcastError as error:
            failure = error
        finally:  # in the same tick as it looked for the last time, or who comes then would wait for nobody
            self.task = self._placed = None
            if not placed.done():
                placed.set_exception(failure)
                placed.exception()  # perhaps nobody waits any more, and a failure that nobody reads is reported

    def _hear(self, one: Logged) -> None:
        if one.head.after is Status.QUEUED and one.head.before is not Status.QUEUED:
            self._wake(one.org, (one.head.queue,))

    def _wake(self, org: str, queues: Iterable[str]) -> None:
        lines = self._waiting.get(org, {})
        for queue in queues:
            for waiter in lines.get(queue, ()):
                if not waiter.woken.is_set():
                    waiter.woken.set()
                    break
