"""An attempt: the right of one worker to speak for one task, until its lease ends or the store says otherwise.

What is said is numbered 1, 2, 3 … and sent in that order, as many events in one round trip as have gathered meanwhile,
each until the store has answered for it: a repeat under the same number is a duplicate there, so nothing is lost and
nothing doubled, whatever becomes of the connection. Pieces of text that come within MERGE_SECONDS become one event.

The moment the attempt is over its handler is cancelled, and nothing that it still says is sent. What this file must
never do is let a handler run ahead of its store without bound: who says more than UNSENT_BYTES_MAX waits.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import msgspec
import structlog

from app import events
from app.errors import Conflict, Invalid, NotFound, OutOfOrder, Stale, TaskcastError, Unavailable
from app.events import AnyEvent
from app.log import BATCH_BYTES_MAX, BATCH_EVENTS_MAX, Appended, Said, said
from app.queues import Claimed
from app.store import Store
from app.task import LEASED, TERMINAL, Status

logger = structlog.get_logger()

T = TypeVar("T")

MERGE_SECONDS = 0.03
"""A piece of text waits at most so long for the next one; the first after a silence does not wait."""
MERGED_BYTES_MAX = 16 * 1024
UNSENT_BYTES_MAX = 256 * 1024
"""Of events that the store has not answered for; whoever has more to say waits."""
PAUSE_SECONDS, PAUSE_SECONDS_MAX = 0.05, 1.0
"""Between two tries of a call to a store that is away; doubled each time."""

GONE, TAKEN, LEASE, LOST, BROKEN = Status.GONE.value, "taken", "lease", "events lost", "broken"
"""Why an attempt is over, besides the statuses that end one: task deleted, another attempt runs, lease expired,
the store forgot events that it had accepted (a server that failed over, or died before it synced), a bug."""


class Over(Exception):
    """This attempt writes no more; its text is the reason. Never seen by handlers, which are cancelled instead."""


class Attempt:
    """One claim of one task: its fence, its event numbers, its lease's deadline, and whether a pause is asked."""

    # What most attempts never change stands here: each costs its worker some 50 µs, and thirty assignments are felt.
    lost = ""
    """Why it is over; empty while it is not."""
    stopped = False
    """Interrupted because the worker stops: the task is to be given back."""
    late = False
    """Interrupted because its function's timeout has passed."""
    abandoned = False
    """Its worker is cancelled: nothing more is to be said of it."""
    until = float("inf")
    """When its lease ends, on the event loop's clock, unless it is kept."""
    refused = 0
    work: asyncio.Task[Any] | None = None
    """The running handler; when that has ended by itself, the last words about it."""
    see_off: "Callable[[Attempt], object] | None" = None
    """Called when a running handler is interrupted: who then waits for its end, and says what came of it."""
    timer: asyncio.TimerHandle | None = None
    """Its function's timeout."""
    _ended = False
    """The handler has ended by itself."""
    _n = 0
    _unsent = 0
    _sending: asyncio.Task[Any] | None = None
    _last: "asyncio.Future[Appended] | None" = None
    _text_bytes = 0
    _text_at = float("-inf")
    """When text was handed over last, on the loop's clock."""
    _text_timer: asyncio.TimerHandle | None = None
    _text_error: TaskcastError | None = None
    """What became of a piece of text whose writer had gone on."""
    _wake: asyncio.Event | None = None
    """While it rests."""
    _rested = 0.0
    _resting_since: float | None = None
    _draining = False

    def __init__(self, store: Store, claimed: Claimed, *, worker: str) -> None:
        self.store = store
        self.claimed = claimed
        self.interrupted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the handler has no more to say: it was cancelled, or it has ended."""
        self.paused = claimed.found.status is Status.PAUSED
        self.seq = claimed.found.last_seq
        """The task's last entry that this attempt knows of; older news is no news."""
        self._actor = f"worker:{worker}"
        self._queue: deque[tuple[Said, asyncio.Future[Appended]]] = deque()
        """What the store has not answered for; those that are under way stand first."""
        self._text: list[tuple[str, list[str]]] = []
        """Pieces not yet handed over, by agent, in order."""

    # What the runtime tells it.

    def hear(self, status: Status, seq: int = 0) -> None:
        """The task's status after its entry `seq`; 0 when the teller does not know which entry that was."""
        if seq:
            if seq <= self.seq:
                return
            self.seq = seq
        if status in LEASED:
            self.paused = status is Status.PAUSED
            if self._wake:
                self._wake.set()
        else:
            self.lose(status.value)

    def lose(self, reason: str) -> None:
        """The task is no longer this attempt's: cancels the handler at once."""
        if self.lost:
            return
        self.lost = reason
        if self._text_timer:
            self._text_timer.cancel()
        if self._sending and self._sending is not asyncio.current_task():
            self._sending.cancel()
        self._text, self._text_bytes, self._unsent = [], 0, 0
        while self._queue:
            _, answer = self._queue.popleft()
            _fail(answer, Over(reason))
        self.interrupt()

    def interrupt(self) -> None:
        """Cancels the handler; what it still says is not sent.

        Once only: a second cancel would cut off its cleaning up, or the wait for a thread that goes on.
        """
        if self.interrupted.done():
            return
        self.interrupted.set_result(None)
        if self.work:
            self.work.cancel()
            if self.see_off:
                self.see_off(self)

    def end(self) -> None:
        """The handler has ended by itself: it has no more to say."""
        self._ended = True
        self.interrupted.set_result(None)

    def abandon(self) -> None:
        """Cancels the handler, and nobody says what came of it."""
        self.abandoned = True
        self.see_off = None
        self.interrupt()

    def drain(self) -> None:
        """The worker is about to stop: a handler that waits for the end of a pause is stopped now, others go on."""
        self._draining = True
        if self._wake:
            self._wake.set()

    def stop(self) -> None:
        """Cancels a handler that still runs, so that the task can be given back."""
        if self.work and not self.interrupted.done():
            self.stopped = True
            self.interrupt()

    # What is said.

    def say(self, event: AnyEvent) -> "asyncio.Future[Appended]":
        """Hands an event over, behind all that was said before; the future is the store's answer.

        It fails with Over; with TooLarge or Conflict when only this event is out of place. Raises Over, Invalid,
        TooLarge at once.
        """
        self._hand_over_text()
        return self._hand_over(event)

    async def append(self, event: AnyEvent) -> Appended:
        """Says it, and waits for the store's answer. Raises what `say` raises, and what earlier text came to."""
        self._raise_text_error()
        await self._room()
        answer = self.say(event)
        await asyncio.wait([answer])  # it is not cancelled together with who waits: others wait for it too
        return answer.result()

    async def finish(self, last: Sequence[AnyEvent]) -> None:
        """Says the last words, and waits for the store's answers; sends them itself, unless others are under way.

        Raises what `say` raises, and what the store refused.
        """
        self._hand_over_text()
        answers = [self._put(event) for event in last]
        if self._sending is None:
            self._sending = asyncio.current_task()
            try:
                await self._send()
            except asyncio.CancelledError:
                if not self.lost:  # else it was `lose`, which has given its reason to those who wait
                    if not self._deaf:
                        raise
                    self._send_apart()
                uncancel()
        for answer in answers:
            await self.outlast(answer)
            answer.result()

    async def write(self, agent: str, text: str) -> None:
        """A piece of text. Returns at once, unless the store is slow. Raises Over, Invalid, and TooLarge, perhaps for
        an earlier piece.
        """
        self._raise_text_error()
        await self._room()
        if self.lost:
            raise Over(self.lost)
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise Invalid(f"Not valid text: {error}") from error
        if self._text and self._text[-1][0] == agent:
            self._text[-1][1].append(text)
        else:
            self._text.append((agent, [text]))
        self._text_bytes += size
        loop = asyncio.get_running_loop()
        idle = self._sending is None and loop.time() >= self._text_at + MERGE_SECONDS
        if idle or self._text_bytes >= MERGED_BYTES_MAX:
            self._hand_over_text()
        elif self._text_timer is None:
            self._text_timer = loop.call_later(MERGE_SECONDS, self._hand_over_text)

    async def _room(self) -> None:
        """Until the store has caught up so far that more may be said. Many may wait here: each looks for itself."""
        while self._unsent > UNSENT_BYTES_MAX and self._last:
            await asyncio.wait([self._last])

    async def settle(self) -> None:
        """Until the store has answered for all that was said. Raises Over, and what text came to."""
        self._hand_over_text()
        if self._last:
            await self.outlast(self._last)
        self._raise_text_error()
        if self.lost:
            raise Over(self.lost)

    async def outlast(self, wanted: "asyncio.Future[Any]") -> None:
        """Until it is done; for the last words of a handler that ended by itself although their task is cancelled.

        It is the handler's own task, for which a timer or a child of the handler may have a cancel left. That must not
        cost the outcome.
        """
        while not wanted.done():
            try:
                await asyncio.wait([wanted])
            except asyncio.CancelledError:
                if not self._deaf:
                    raise
                uncancel()

    @property
    def _deaf(self) -> bool:
        return self._ended and not self.abandoned

    async def give_back(self, event: events.Requeued) -> None:
        """Without a number: for an attempt whose numbers the store no longer knows. Harmless when repeated."""
        one = self.claimed
        with suppress(TaskcastError):
            await self.store.append(one.org, one.task, event, fence=one.fence)

    async def rest(self) -> None:
        """Until the pause ends; a worker that stops does not wait for that."""
        self._resting_since = asyncio.get_running_loop().time()
        self._wake = asyncio.Event()
        try:
            while self.paused and not self._draining:
                self._wake.clear()
                await self._wake.wait()
        finally:
            self._wake = None
            self._rested, self._resting_since = self.rested_seconds, None
        if self.paused:
            self.stop()

    @property
    def rested_seconds(self) -> float:
        """How long it has waited for pauses to end."""
        if self._resting_since is None:
            return self._rested
        return self._rested + asyncio.get_running_loop().time() - self._resting_since

    def _hand_over(self, event: AnyEvent) -> "asyncio.Future[Appended]":
        answer = self._put(event)
        if self._sending is None:
            self._send_apart()
        return answer

    def _send_apart(self) -> None:
        self._sending = asyncio.create_task(self._send(), name=f"events of {self.claimed.task}")

    def _put(self, event: AnyEvent) -> "asyncio.Future[Appended]":
        """Behind what was said before; somebody has to send it."""
        if self.lost:
            raise Over(self.lost)
        if not isinstance(event, events.TextDelta):  # these are many, and their attempt tells who speaks
            event = msgspec.structs.replace(event, actor=self._actor)
        one = said(event, LEASED)
        answer: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        self._queue.append((one, answer))
        self._unsent += len(one.encoded)
        self._last = answer
        return answer

    def _hand_over_text(self) -> None:
        if self._text_timer:
            self._text_timer.cancel()
            self._text_timer = None
        if not self._text:
            return
        text, self._text, self._text_bytes = self._text, [], 0
        self._text_at = asyncio.get_running_loop().time()
        for agent, pieces in text:
            try:
                with suppress(Over):
                    self._hand_over(events.TextDelta(agent=agent, text="".join(pieces))).add_done_callback(self._wrote)
            except Invalid as error:
                self._text_error = self._text_error or error

    def _wrote(self, answer: "asyncio.Future[Appended]") -> None:
        if not answer.cancelled() and isinstance(error := answer.exception(), TaskcastError):
            self._text_error = self._text_error or error

    def _raise_text_error(self) -> None:
        if error := self._text_error:
            self._text_error = None
            raise error

    async def _send(self) -> None:
        """Until nothing is left to say."""
        one = self.claimed
        try:
            while self._queue:
                batch = self._batch()
                asking = partial(self.store.extend, one.org, one.task, batch, fence=one.fence, n=self._n + 1)
                outcomes = await self.insist(asking)
                for outcome in outcomes:
                    if self.lost:
                        return
                    await self._answer(*self._queue.popleft(), outcome)
        except Over:
            return
        except Exception:
            # Whether the store has these events nobody knows: another event under their numbers could be lost.
            logger.exception("attempt.broken", task_id=one.task, org=one.org)
            self.lose(BROKEN)
        finally:
            self._sending = None

    def _batch(self) -> list[Said]:
        if len(self._queue) == 1:
            return [self._queue[0][0]]
        batch: list[Said] = []
        size = 0
        for one, _ in islice(self._queue, BATCH_EVENTS_MAX):
            size += len(one.encoded)
            if batch and size > BATCH_BYTES_MAX:
                break
            batch.append(one)
        return batch

    async def _answer(self, one: Said, answer: "asyncio.Future[Appended]", outcome: Appended | TaskcastError) -> None:
        self._unsent -= len(one.encoded)
        if isinstance(outcome, Appended):
            self._n += 1
            # A duplicate's place is where it once stood, and its status is of now. A status that ends the attempt is
            # our own doing: whoever said so must not be cancelled for it.
            if not outcome.duplicate and outcome.status in LEASED:
                self.hear(outcome.status, outcome.seq)
            if not answer.done():
                answer.set_result(outcome)
            return
        over = isinstance(outcome, NotFound)
        status = GONE
        if isinstance(outcome, Conflict):
            status = outcome.status
            over = status not in LEASED or isinstance(outcome, (Stale, OutOfOrder))
        error: Exception = outcome
        try:
            if over:
                await self._refuse(one, outcome, status)
        finally:  # the same news may come another way meanwhile, and cancel this
            if over:
                self.lose(LOST if isinstance(outcome, OutOfOrder) else TAKEN if status in LEASED else status)
                error = Over(self.lost)
            _fail(answer, error)

    async def insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Asks a store that is away again, until the attempt is over. Raises Over."""
        pause = PAUSE_SECONDS
        while not self.lost:
            try:
                return await call()
            except Unavailable:
                await asyncio.sleep(pause)
            pause = min(pause * 2, PAUSE_SECONDS_MAX)
        raise Over(self.lost)

    async def _refuse(self, one: Said, error: TaskcastError, status: str) -> None:
        """Counts and logs it, and warns the task's readers once, unless the task has ended."""
        self.refused += 1
        ended = status == GONE or status in TERMINAL
        claimed = self.claimed
        log = logger.bind(task_id=claimed.task, org=claimed.org, actor=self._actor, fence=claimed.fence)
        tell = log.info if ended else log.warning
        tell("task.refused", said=one.tag, reason=error.code, status=status, refused=self.refused)
        if ended or self.refused > 1:
            return
        message = f"A worker's event ({one.tag}) was refused: {error}"
        with suppress(TaskcastError):
            await self.store.append(
                claimed.org, claimed.task, events.Noted(actor=self._actor, name="WARNING", message=message)
            )


def uncancel() -> None:
    """The current task goes on as if never cancelled: timeouts and task groups look at the count."""
    this = asyncio.current_task()
    assert this
    for _ in range(this.cancelling()):
        this.uncancel()


def _fail(answer: "asyncio.Future[Appended]", error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
        answer.exception()  # a failure that nobody waits for is no news: asyncio would report it
