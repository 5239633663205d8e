"""The runtime: claims tasks for handlers, keeps the leases, and says how each attempt ended.

Who decides that an attempt is over, and what then:

    the partition's log     cancelled, timed out, deleted, requeued or taken    ┐ the handler is cancelled at once,
    a refused event         the same, heard later                               │ and nothing more is written
    its function's timeout  the task is timed out, or tried again               │
    a renewal's answer      the same, should the log's tail have missed it      │
    the lease's own clock   the store was away for too long                     ┘
    the worker's stop       the handler is cancelled, and the task given back, its attempt not counted

A dead store ends nothing by itself: renewals and events go on asking until the lease's deadline has passed.
Cancelling `run` is not its stop but its crash: handlers are cancelled and their leases left to expire. What this
file must never do is let a handler, its errors or its silence stop the renewal of the others' leases.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace
from pydantic import BaseModel

from app import events
from app.errors import Invalid, Misconfigured, TaskcastError, Unavailable
from app.events import FINAL_OUTPUT, RESULT_BYTES_MAX, AnyEvent, Json
from app.log import Logged
from app.queues import Claimed, again
from app.schema import misfit
from app.store import Store
from app.task import TERMINAL, Status, Task
from workers.attempt import GONE, LEASE, LOST, TAKEN, Attempt, Over
from workers.context import Context, Failed
from workers.handlers import Handler, Result, by_queue, sentence, short

logger = structlog.get_logger()

TICK_SECONDS = 1.0
"""Between two looks at what is due; deadlines and lost leases are noticed so late at most."""
GATHER_SECONDS = 0.002
"""While more tasks wait, slots that become free within this time are filled by one claim: it costs less than several."""
PAUSE_SECONDS = 1.0
"""Before claims go on after an error of the store."""
LATE_SECONDS = 0.1
"""A handler's timeout is noticed so late at most, if it was paused meanwhile."""
RENEW_PAUSE_SECONDS_MAX = 0.2
"""Between two tries of a renewal that failed: a lease may have little time left."""

STOPPED = events.Requeued(message="The worker stopped and gave the task back.", refund=True)

# What an attempt comes to


def conclusion(handler: Handler, context: Context, work: asyncio.Task[Result]) -> list[AnyEvent]:
    """What is said of a handler that ended by itself."""
    cancelled = asyncio.CancelledError("the handler cancelled itself")
    error = cancelled if work.cancelled() else work.exception()
    if error is None:
        try:
            return answer(work.result(), context)
        except Exception as unfit:  # noqa: BLE001 (a model's own serialiser may raise anything)
            # Not a case for `retry`: the next attempt would return it again.
            return [_errored(unfit)]
    leaves = _leaves(error)
    for leaf in leaves:
        if isinstance(leaf, Failed):
            text = short(str(leaf)) or "The task failed."
            return [events.Failed(message=text, error=text)]
    if all(isinstance(leaf, handler.retry) for leaf in leaves) and context.task.attempts_left > 0:
        return [again(context.task, sentence(leaves[0]))]
    return [_errored(leaves[0])]


def timed_out(handler: Handler, task: Task) -> AnyEvent:
    """What is said of a handler that took longer than its function allows."""
    text = f"The attempt took longer than {handler.timeout:g} s."
    if any(issubclass(TimeoutError, kind) for kind in handler.retry):
        return again(task, text) if task.attempts_left > 0 else events.Errored(message=text, error=text)
    return events.TimedOut(message=text, error=text)


def _errored(error: BaseException) -> events.Errored:
    text = sentence(error)
    return events.Errored(message=text, error=text)


def answer(result: Result, context: Context) -> list[AnyEvent]:
    """The events of a handler's result. Raises TypeError, ValueError for one that is none."""
    kind = "text"
    if result is None:
        text = ""
    elif isinstance(result, str):
        text = result
    elif isinstance(result, (Mapping, BaseModel, Struct)):
        kind, text = "json", msgspec.json.encode(result, enc_hook=_plain).decode()
        if not text.startswith("{"):
            raise TypeError("a worker's JSON result is an object")
    else:
        raise TypeError(f"a worker returns text, a dict or a model, not {type(result).__name__}")
    if (size := len(text.encode())) > RESULT_BYTES_MAX:
        raise ValueError(f"the result has {size} bytes; at most {RESULT_BYTES_MAX} are allowed")
    usage = context.take_usage()
    said: list[AnyEvent] = []
    if kind == "text" and text and context.final_text != text:
        duration = context.elapsed_ms
        said = [events.TextCompleted(agent=FINAL_OUTPUT, text=text, usage=usage, duration_ms=duration)]
        usage = None
    return [*said, events.Completed(message="Task completed.", result=text, result_type=kind, usage=usage)]


async def fitted(said: list[AnyEvent], schema: Json) -> list[AnyEvent]:
    """What is said of a result that has to fit the task's `output_schema`: a text that does is JSON, and one that does
    not fails the task; another attempt would hardly do better.
    """
    end = said[-1]
    if not (schema and isinstance(end, events.Completed)):
        return said
    if why := await asyncio.to_thread(misfit, schema, end.result):  # it may take seconds, and others' leases go on
        return [*said[:-1], events.Failed(message=why, error=why, usage=end.usage)]
    return [*said[:-1], replace(end, result_type="json")]


def _plain(value: Any) -> Any:
    """What msgspec does not know inside a result."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a result cannot hold {type(value).__name__}")


def _leaves(error: BaseException) -> list[BaseException]:
    """An exception, or those in a group: a handler's own TaskGroup raises such."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in _leaves(one)]
    return [error]


def _error_of(work: asyncio.Task[Result] | None) -> BaseException | None:
    return work.exception() if work and work.done() and not work.cancelled() else None


# The worker


async def run(
    store: Store,
    handlers: Sequence[Handler],
    *,
    stop: asyncio.Event,
    queues: Sequence[str] = (),
    slots: int = 10,
    name: str = "",
) -> None:
    """Works until `stop` is set, and then until no task is on its hands. At most `slots` tasks at a time.

    `queues` limits those served; empty: all that the handlers name. Raises Misconfigured at once.
    """
    served = by_queue(handlers, queues)
    if slots < 1:
        raise Misconfigured("A worker needs at least one slot.")
    await Worker(store, served, stop=stop, slots=slots, name=name or secrets.token_hex(4)).run()


async def ticker(store: Store) -> None:
    """Appends what is due, once a second, for ever. Every process runs one."""
    while True:
        try:
            await store.queues.tick()
        except Unavailable as error:
            logger.warning("ticker.waiting", reason=str(error))
        except Exception:
            logger.exception("ticker.failed")
        await asyncio.sleep(TICK_SECONDS)


class Worker:
    """One process's share of the work; made and run by `run`."""

    def __init__(
        self, store: Store, handlers: Mapping[str, Handler], *, stop: asyncio.Event, slots: int, name: str
    ) -> None:
        self.name = name
        self.refused = 0
        """Events that the store would not have from this worker."""
        self._store = store
        self._handlers = handlers
        self._queues = {queue: handlers[queue].max_attempts for queue in sorted(handlers)}
        self._stop = stop
        self._slots = slots
        self._lease_seconds = store.settings.lease_seconds
        self._grace_seconds = store.settings.grace_seconds
        self._held: dict[tuple[str, str], Attempt] = {}
        """What this worker has a lease for. A handler that will not end may outlive its place here."""
        self._runners: set[asyncio.Task[None]] = set()
        """One per taken slot."""
        self._freed = asyncio.Event()
        self._more = False
        """The last claim filled all free slots: more may wait."""
        self._log = logger.bind(worker=name)

    async def run(self) -> None:
        self._log.info("worker.started", queues=[*self._queues], slots=self._slots)
        try:
            async with self._store.watch(self._hear), asyncio.TaskGroup() as group:
                rounds = [group.create_task(ticker(self._store)), group.create_task(self._renew())]
                await self._claim()
                await self._drain()
                for one in rounds:
                    one.cancel()
        finally:
            for runner in self._runners:
                runner.cancel()
            await asyncio.gather(*self._runners, return_exceptions=True)
        self._log.info("worker.stopped", refused=self.refused)

    async def _claim(self) -> None:
        """Until the stop."""
        while not self._stop.is_set():
            try:
                async with self._store.queues.waiting([*self._queues]) as woken:
                    while not self._stop.is_set():
                        await self._claim_free(woken)
            except Unavailable as error:
                self._log.warning("worker.waiting", reason=str(error))
                await self._unless_stopped(asyncio.sleep(PAUSE_SECONDS))
            except Exception:  # a worker that dies drops its running handlers; one that waits may be mended
                logger.exception("worker.claim_failed", worker=self.name)
                await self._unless_stopped(asyncio.sleep(PAUSE_SECONDS))

    async def _claim_free(self, woken: Callable[[], Awaitable[None]]) -> None:
        self._freed.clear()
        free = self._slots - len(self._runners)
        if not free:
            await self._unless_stopped(self._freed.wait())
            return
        if self._more and free < self._slots // 2:
            await self._unless_stopped(asyncio.sleep(GATHER_SECONDS))
            free = self._slots - len(self._runners)
        # Not to be cut off by the stop: what the store has handed out must be known here.
        asked_at = asyncio.get_running_loop().time()
        claimed = await self._store.claim(self._queues, self.name, free)
        for one in claimed:
            self._begin(one, self._lease_until(asked_at))
        self._more = len(claimed) == free
        if not self._more:
            await self._unless_stopped(woken())

    def _lease_until(self, asked_at: float) -> float:
        """By this process's clock. A call that the store's absence drew out was answered for its last try; that the
        lease may date from an earlier one is what fences are for.
        """
        now = asyncio.get_running_loop().time()
        return max(asked_at + self._lease_seconds, now + self._lease_seconds / 2)

    async def _unless_stopped(self, wanted: Awaitable[object]) -> None:
        """Raises what it raises."""
        both = [asyncio.ensure_future(wanted), asyncio.ensure_future(self._stop.wait())]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if both[0].done():
                both[0].result()
        finally:
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    def _begin(self, claimed: Claimed, lease_until: float) -> None:
        attempt = Attempt(self._store, claimed, worker=self.name)
        attempt.keep(lease_until)
        self._held[claimed.org, claimed.task] = attempt
        runner = asyncio.create_task(self.attend(attempt), name=f"attempt {claimed.task} {claimed.fence}")
        self._runners.add(runner)
        runner.add_done_callback(self._free)

    def _free(self, runner: asyncio.Task[None]) -> None:
        self._runners.discard(runner)
        self._freed.set()

    # One attempt

    async def attend(self, attempt: Attempt) -> None:
        """Runs an attempt to its end, whatever that is."""
        one, task = attempt.claimed, attempt.claimed.found
        log = self._log.bind(task_id=one.task, org=one.org, fence=one.fence, attempt=task.attempt)
        log.info("task.claimed", queue=task.queue)
        try:
            await self._work(attempt, log)
        except Over:
            self._log_over(attempt, log)
            if attempt.lost == LOST:
                message = "The store lost events of this attempt; the task begins again."
                await attempt.give_back(events.Requeued(message=message, refund=True))
        except Exception:
            log.exception("task.abandoned")
        finally:
            attempt.lose("ended")
            self.refused += attempt.refused
            if self._held.get((one.org, one.task)) is attempt:
                del self._held[one.org, one.task]

    async def _work(self, attempt: Attempt, log: Any) -> None:
        """Runs the handler, and says what came of it. Raises Over."""
        if attempt.lost:  # before it began
            raise Over(attempt.lost)
        context = Context(attempt)
        handler = self._handlers[context.task.queue]
        if self._stop.is_set():
            await self._conclude(attempt, [STOPPED], None, log)
            return
        work = attempt.work = asyncio.create_task(handler(context), name=f"handler {context.task.id}")
        try:
            late = await self._until_late(attempt, work, handler.timeout)
            if late:
                attempt.interrupt()
                await self._conclude(attempt, [timed_out(handler, context.task)], None, log)
            await self._until_ended(work, log)
        finally:
            attempt.interrupt()
        if (late or attempt.stopped) and (error := _error_of(work)):
            log.warning("task.ended_late", exc_info=error)  # while it was being cancelled: nobody else would hear of it
        if late:
            return
        if attempt.lost:
            raise Over(attempt.lost)
        if attempt.stopped:
            said: list[AnyEvent] = [STOPPED]
        else:
            said = await fitted(conclusion(handler, context, work), context.task.output_schema)
            try:
                await attempt.settle()
            except TaskcastError as error:  # of a text that the handler did not wait for
                if work.cancelled() or not work.exception():
                    said = [_errored(error)]
        await self._conclude(attempt, said, work, log)

    async def _conclude(
        self, attempt: Attempt, said: list[AnyEvent], work: asyncio.Task[Result] | None, log: Any
    ) -> None:
        try:
            for answer in [attempt.say(event) for event in said]:
                await answer
        except Invalid as error:  # for example a text that takes more room as JSON than an event may have
            said = [_errored(error)]
            await attempt.append(said[0])
        self._log_end(said[-1], work, log)

    async def _until_late(self, attempt: Attempt, work: asyncio.Task[Result], seconds: float | None) -> bool:
        """Until the handler has ended or was interrupted; or True: it took too long. Pauses do not count."""
        now = asyncio.get_running_loop().time
        began, left = now(), seconds
        both: tuple[asyncio.Future[Any], ...] = (work, attempt.interrupted)
        while True:
            await asyncio.wait(both, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if work.done() or attempt.interrupted.done():
                return False
            assert seconds is not None, "without a timeout nothing else ends the wait"
            left = began + seconds + attempt.rested_seconds - now()
            if left <= 0:
                return True
            left = max(left, LATE_SECONDS)

    async def _until_ended(self, work: asyncio.Task[Result], log: Any) -> None:
        """Until an interrupted handler has ended; or, when the worker stops, until it was waited for long enough."""
        if not work.done():
            await asyncio.wait([work], timeout=self._grace_seconds / 4)
        if not work.done():
            log.warning("task.not_interruptible", seconds=self._grace_seconds / 4, stopping=self._stop.is_set())
            await self._unless_stopped(asyncio.wait([work]))  # its slot is taken as long as it runs

    def _log_over(self, attempt: Attempt, log: Any) -> None:
        error = _error_of(attempt.work)
        if attempt.lost in TERMINAL or attempt.lost == GONE:
            log.info("task.cancelled", status=attempt.lost, exc_info=error)
        else:
            log.warning("task.lease_lost", reason=attempt.lost, exc_info=error)

    def _log_end(self, event: AnyEvent, work: asyncio.Task[Result] | None, log: Any) -> None:
        if isinstance(event, events.Completed):
            log.info("task.completed", bytes=len(event.result), result_type=event.result_type)
        elif isinstance(event, events.Failed):
            log.info("task.failed", error=event.error)
        elif isinstance(event, events.Requeued):
            log.info("task.requeued", reason=event.message, delay_seconds=event.delay_seconds)
        elif isinstance(event, events.TimedOut):
            log.warning("task.timed_out", error=event.error)
        else:
            assert isinstance(event, events.Errored), "an attempt comes to one of these five"
            log.error("task.errored", error=event.error, exc_info=_error_of(work))

    # What keeps attempts alive, and what ends them

    def _hear(self, one: Logged) -> None:
        """An entry of the partition's log; most are not about a task of ours."""
        attempt = self._held.get((one.org, one.task))
        if attempt is None or one.head.fence < attempt.claimed.fence or one.head.n:
            return
        if one.head.fence > attempt.claimed.fence:
            attempt.lose(TAKEN)
        elif one.head.before is not one.head.after:
            attempt.hear(one.head.after, one.seq)

    async def _renew(self) -> None:
        """Keeps all leases, in one call per third of a lease. Never ends by itself: whatever fails, it asks again."""
        loop = asyncio.get_running_loop()
        period = self._lease_seconds / 3
        pause, again = period, min(period / 4, RENEW_PAUSE_SECONDS_MAX)
        while True:
            await asyncio.sleep(pause)
            asked_at = loop.time()
            held = {attempt.claimed: (attempt, attempt.seq) for attempt in self._held.values()}
            try:
                answers = await self._store.renew(list(held))
            except Unavailable as error:
                self._log.warning("worker.renewal_waiting", reason=str(error))
                pause = again
                continue
            except Exception:
                logger.exception("worker.renewal_failed", worker=self.name)
                pause = again
                continue
            for claimed, status in answers.items():
                attempt, seq = held[claimed]
                if not status:
                    attempt.lose(LEASE)
                    continue
                attempt.keep(self._lease_until(asked_at))
                if attempt.seq == seq:  # else it has heard something newer than this answer
                    attempt.hear(Status(status))
            # A slow answer has used up part of what it granted.
            pause = max(0.0, asked_at + period - loop.time())

    async def _drain(self) -> None:
        """Lets handlers end for half the grace time, then cancels them; each gives its task back within the other half."""
        for attempt in [*self._held.values()]:
            attempt.drain()
        if self._runners:
            self._log.info("worker.draining", tasks=len(self._runners), grace_seconds=self._grace_seconds)
            await asyncio.wait(self._runners, timeout=self._grace_seconds / 2)
        for attempt in [*self._held.values()]:
            attempt.stop()
        if self._runners:
            await asyncio.wait(self._runners, timeout=self._grace_seconds / 2)
