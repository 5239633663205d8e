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
file must never do is let a handler, its errors or its silence stop the renewal of the others' leases. It is long
because all these ends meet in one attempt, whose end must be said once.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
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
from app.queues import WOKEN_MAX, Claimed, Waiting, again
from app.schema import misfit
from app.store import Store
from app.task import TERMINAL, Status, Task
from workers.attempt import GONE, LEASE, LOST, TAKEN, Attempt, Over, uncancel
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


def conclusion(handler: Handler, context: Context, result: Result, error: BaseException | None) -> list[AnyEvent]:
    """What is said of a handler that ended by itself: it returned this, or raised that."""
    if error is None:
        try:
            return answer(result, context)
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


def _error_of(work: asyncio.Task[None] | None) -> BaseException | None:
    return work.exception() if work and work.done() and not work.cancelled() else None


async def _cancelled_itself() -> BaseException | None:
    """Whether a cancel that the handler asked for is still to come: here it comes, or the words after it were cut off."""
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError as error:
        return error
    finally:
        uncancel()
    return None


def _names(attempt: Attempt) -> dict[str, Any]:
    """For the log; bound to a logger of its own they would cost more than all that is not logged."""
    one = attempt.claimed
    return {"task_id": one.task, "org": one.org, "fence": one.fence, "attempt": one.found.attempt}


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
        self._expiry: asyncio.TimerHandle | None = None
        self._freed = asyncio.Event()
        self._share = (slots + 1) // 2
        """Of the slots, that one claim fills while more tasks wait."""
        self._more = True
        """The last claim got all that it asked for: more tasks may wait."""
        self._waiting: Waiting | None = None
        self._log = logger.bind(worker=name)

    async def run(self) -> None:
        self._log.info("worker.started", queues=[*self._queues], slots=self._slots)
        try:
            async with self._store.watch(self._hear), asyncio.TaskGroup() as group:
                rounds = [group.create_task(ticker(self._store)), group.create_task(self._renew())]
                claiming = group.create_task(self._claim())
                await self._stop.wait()
                # Handlers hear of it at once, even from a store that hangs.
                draining = group.create_task(self._drain(claiming))
                # Not cut off: what the store has handed out must be known here.
                self._freed.set()
                if self._waiting:
                    await self._waiting.end()
                await claiming
                await draining
                for one in rounds:
                    one.cancel()
        finally:
            if self._expiry:
                self._expiry.cancel()
            await self._abandon()
        self._log.info("worker.stopped", refused=self.refused)

    async def _claim(self) -> None:
        """Until the stop."""
        while not self._stop.is_set():
            try:
                async with self._store.queues.waiting(self._queues, self.name) as self._waiting:
                    while not self._stop.is_set():
                        await self._claim_free(self._waiting)
            except Unavailable as error:
                self._log.warning("worker.waiting", reason=str(error))
                await self._unless_stopped(asyncio.sleep(PAUSE_SECONDS))
            except Exception:  # a worker that dies drops its running handlers; one that waits may be mended
                logger.exception("worker.claim_failed", worker=self.name)
                await self._unless_stopped(asyncio.sleep(PAUSE_SECONDS))

    async def _claim_free(self, waiting: Waiting) -> None:
        free = await self._room()
        if free and self._more:
            await self._claim_on(free)
        elif free:
            wanted = min(free, WOKEN_MAX)
            asked_at = asyncio.get_running_loop().time()
            claimed = await waiting.claim(wanted)
            self._more = len(claimed) == wanted
            self._begin(claimed, asked_at)
            await asyncio.sleep(0)  # they begin before the next wait is written, which takes 0.1 ms

    async def _room(self) -> int:
        """How many slots are free, once one is. While more tasks wait: once half of them are, or GATHER_SECONDS after."""
        until: asyncio.TimerHandle | None = None
        waited = False

        def enough() -> None:
            nonlocal waited
            waited = True
            self._freed.set()

        while not self._stop.is_set():
            free = self._slots - len(self._runners)
            if free >= (self._share if self._more else 1) or (free and waited):
                break
            if free and not until:
                until = asyncio.get_running_loop().call_later(GATHER_SECONDS, enough)
            self._freed.clear()
            await self._freed.wait()
        if until:
            until.cancel()
        return self._slots - len(self._runners)

    async def _claim_on(self, free: int) -> None:
        """As long as claims fill their share of the slots. The next one leaves before the tasks of the last one begin, so
        that the store works on it while they do: with all slots in one claim they would take turns.
        """
        last: list[Claimed] = []
        last_asked_at = 0.0
        while free and self._more and not self._stop.is_set():
            wanted = min(free, self._share)
            asked_at = asyncio.get_running_loop().time()
            asking = asyncio.create_task(self._store.claim(self._queues, self.name, wanted))
            for _ in range(2):  # it is asked for in the first tick, and sent in the second
                await asyncio.sleep(0)
            self._begin(last, last_asked_at)
            last, last_asked_at = await asking, asked_at
            self._more = len(last) == wanted
            free = self._slots - len(self._runners) - len(last)
            if free < self._share:
                break
        self._begin(last, last_asked_at)

    def _begin(self, claimed: Sequence[Claimed], asked_at: float) -> None:
        for one in claimed:
            attempt = Attempt(self._store, one, worker=self.name)
            self.begin(attempt)
            self._keep(attempt, self._lease_until(asked_at))

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

    def begin(self, attempt: Attempt) -> None:
        """Takes a slot for it, until it has come to its end."""
        one, task = attempt.claimed, attempt.claimed.found
        if old := self._held.get((one.org, one.task)):
            old.lose(TAKEN)
        self._held[one.org, one.task] = attempt
        self._log.info("task.claimed", **_names(attempt), queue=task.queue)
        if self._stop.is_set():
            attempt.end()
            self._run(self._until_said(attempt, self._conclude(attempt, [STOPPED])))
            return
        handler = self._handlers[task.queue]
        attempt.see_off = self._see_off
        attempt.work = self._run(self._work(attempt, handler))
        if handler.timeout is not None:
            loop = asyncio.get_running_loop()
            attempt.timer = loop.call_later(handler.timeout, self._look_at_clock, attempt, loop.time(), handler.timeout)

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        runner = asyncio.create_task(work)
        self._runners.add(runner)
        runner.add_done_callback(self._free)
        return runner

    def _free(self, runner: asyncio.Task[None]) -> None:
        self._runners.discard(runner)
        self._freed.set()

    async def attend(self, attempt: Attempt) -> None:
        """One attempt, to its end: for who claims by other means, and nothing else here."""
        self.begin(attempt)
        try:
            while self._runners:
                await asyncio.wait(self._runners)
        finally:
            await self._abandon()

    async def _abandon(self) -> None:
        """Cancels what still runs. Nothing is said of it."""
        for attempt in self._held.values():
            attempt.abandon()
        for runner in self._runners:
            runner.cancel()
        await asyncio.sleep(0)  # each hears of it; none is waited for, for it may be deaf

    # One attempt. Its handler's task also says what came of it: a second one would cost as much again.

    async def _work(self, attempt: Attempt, handler: Handler) -> None:
        """Runs the handler. One that is interrupted ends whenever it likes, and `_see_off` says what came of it."""
        context = Context(attempt)
        result: Result = None
        error: BaseException | None = None
        try:
            result = await handler(context)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as raised:
            if attempt.interrupted.done():
                raise
            error = raised
        if attempt.interrupted.done():
            return
        attempt.end()
        try:
            if attempt.work and attempt.work.cancelling():
                late = await _cancelled_itself()
                error = error or late
            await self._until_said(attempt, self._tell(attempt, handler, context, result, error))
        finally:
            del error  # it holds this frame

    async def _until_said(self, attempt: Attempt, saying: Coroutine[Any, Any, None]) -> None:
        """The end of every attempt."""
        one = attempt.claimed
        try:
            await saying
        except Over:
            self._log_over(attempt)
            if attempt.lost == LOST:
                message = "The store lost events of this attempt; the task begins again."
                back = attempt.give_back(events.Requeued(message=message, refund=True))
                await attempt.outlast(asyncio.create_task(back))
        except asyncio.CancelledError:
            if not attempt.abandoned:
                logger.exception("task.abandoned", worker=self.name, **_names(attempt))
            raise
        except Exception:
            logger.exception("task.abandoned", worker=self.name, **_names(attempt))
        finally:
            attempt.lose("ended")
            if attempt.timer:
                attempt.timer.cancel()
            self.refused += attempt.refused
            if self._held.get((one.org, one.task)) is attempt:
                del self._held[one.org, one.task]

    async def _tell(
        self, attempt: Attempt, handler: Handler, context: Context, result: Result, error: BaseException | None
    ) -> None:
        """What came of a handler that ended by itself. Raises Over."""
        if isinstance(error, asyncio.CancelledError):
            error = asyncio.CancelledError("the handler cancelled itself")
        said = conclusion(handler, context, result, error)
        if context.task.output_schema:
            fitting = asyncio.create_task(fitted(said, context.task.output_schema))
            await attempt.outlast(fitting)
            said = fitting.result()
        try:
            await attempt.settle()
        except TaskcastError as unsaid:  # of a text that the handler did not wait for
            if error is None or isinstance(error, asyncio.CancelledError):
                said = [_errored(unsaid)]
        await self._conclude(attempt, said, error)

    async def _conclude(self, attempt: Attempt, said: list[AnyEvent], error: BaseException | None = None) -> None:
        try:
            await attempt.finish(said)
        except Invalid as invalid:  # for example a text that takes more room as JSON than an event may have
            said = [_errored(invalid)]
            await attempt.finish(said)
        self._log_end(attempt, said[-1], error)

    # An attempt whose handler is interrupted

    def _look_at_clock(self, attempt: Attempt, began: float, seconds: float) -> None:
        """Interrupts a handler that takes too long. Pauses do not count."""
        if attempt.interrupted.done():
            return
        loop = asyncio.get_running_loop()
        left = began + seconds + attempt.rested_seconds - loop.time()
        if left > 0:
            again_in = max(left, LATE_SECONDS)
            attempt.timer = loop.call_later(again_in, self._look_at_clock, attempt, began, seconds)
        else:
            attempt.late = True
            attempt.interrupt()

    def _see_off(self, attempt: Attempt) -> None:
        """The slot stays taken, by who waits for the handler's end; a worker that stops leaves a deaf one behind."""
        assert attempt.work, "it is a running handler that is interrupted"
        self._runners.discard(attempt.work)
        self._run(self._until_said(attempt, self._tell_interrupted(attempt, attempt.work)))

    async def _tell_interrupted(self, attempt: Attempt, work: asyncio.Task[None]) -> None:
        """Raises Over."""
        if attempt.late:
            task = attempt.claimed.found
            await self._conclude(attempt, [timed_out(self._handlers[task.queue], task)])
        await self._until_ended(attempt, work)
        if (attempt.late or attempt.stopped) and (error := _error_of(work)):
            # While it was being cancelled: nobody else would hear of it.
            self._log.warning("task.ended_late", **_names(attempt), exc_info=error)
        if attempt.late:
            return
        if attempt.lost:
            raise Over(attempt.lost)
        await self._conclude(attempt, [STOPPED])

    async def _until_ended(self, attempt: Attempt, work: asyncio.Task[None]) -> None:
        """Until an interrupted handler has ended; or, when the worker stops, until it was waited for long enough."""
        if not work.done():
            await asyncio.wait([work], timeout=self._grace_seconds / 4)
        if not work.done():
            stopping, seconds = self._stop.is_set(), self._grace_seconds / 4
            self._log.warning("task.not_interruptible", **_names(attempt), seconds=seconds, stopping=stopping)
            await self._unless_stopped(asyncio.wait([work]))  # its slot is taken as long as it runs

    def _log_over(self, attempt: Attempt) -> None:
        error = _error_of(attempt.work)
        if attempt.lost in TERMINAL or attempt.lost == GONE:
            self._log.info("task.cancelled", **_names(attempt), status=attempt.lost, exc_info=error)
        else:
            self._log.warning("task.lease_lost", **_names(attempt), reason=attempt.lost, exc_info=error)

    def _log_end(self, attempt: Attempt, event: AnyEvent, error: BaseException | None) -> None:
        log, names = self._log, _names(attempt)
        if isinstance(event, events.Completed):
            log.info("task.completed", **names, bytes=len(event.result), result_type=event.result_type)
        elif isinstance(event, events.Failed):
            log.info("task.failed", **names, error=event.error)
        elif isinstance(event, events.Requeued):
            log.info("task.requeued", **names, reason=event.message, delay_seconds=event.delay_seconds)
        elif isinstance(event, events.TimedOut):
            log.warning("task.timed_out", **names, error=event.error)
        else:
            assert isinstance(event, events.Errored), "an attempt comes to one of these five"
            log.error("task.errored", **names, error=event.error, exc_info=error)

    # What keeps attempts alive, and what ends them

    def _hear(self, one: Logged) -> None:
        """An entry of the partition's log; most are not about a task of ours."""
        attempt = self._held.get((one.org, one.task))
        if attempt is None or one.fence < attempt.claimed.fence or one.n:
            return
        if one.fence > attempt.claimed.fence:
            attempt.lose(TAKEN)
        elif one.before is not one.after:
            attempt.hear(one.after, one.seq)

    def _keep(self, attempt: Attempt, until: float) -> None:
        """The lease lives until then, on the event loop's clock; unless kept again, the attempt is over then."""
        attempt.until = until
        if self._expiry is None or until < self._expiry.when():
            self._expire_at(until)

    def _expire_at(self, until: float) -> None:
        if self._expiry:
            self._expiry.cancel()
        self._expiry = asyncio.get_running_loop().call_at(until, self._expire)

    def _expire(self) -> None:
        """One timer for all: it knows the earliest end that any of them had."""
        self._expiry = None
        now = asyncio.get_running_loop().time()
        for attempt in [*self._held.values()]:
            if attempt.until <= now:
                attempt.lose(LEASE)
        if left := [attempt.until for attempt in self._held.values() if not attempt.lost]:
            self._expire_at(min(left))

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
                self._keep(attempt, self._lease_until(asked_at))
                if attempt.seq == seq:  # else it has heard something newer than this answer
                    attempt.hear(Status(status))
            # A slow answer has used up part of what it granted.
            pause = max(0.0, asked_at + period - loop.time())

    async def _drain(self, claiming: asyncio.Task[None]) -> None:
        """Lets handlers end for half the grace time, then cancels them; each gives its task back within the other half.
        So does what a claim still brings.
        """
        began = asyncio.get_running_loop().time()
        for attempt in [*self._held.values()]:
            attempt.drain()
        if self._runners:
            self._log.info("worker.draining", tasks=len(self._runners), grace_seconds=self._grace_seconds)
        await self._until_idle(claiming, began + self._grace_seconds / 2)
        for attempt in [*self._held.values()]:
            attempt.stop()
        await self._until_idle(claiming, began + self._grace_seconds)

    async def _until_idle(self, claiming: asyncio.Task[None], until: float) -> None:
        """Until no slot is taken and no claim is under way; or until then, on the event loop's clock."""
        loop = asyncio.get_running_loop()
        while (self._runners or not claiming.done()) and (left := until - loop.time()) > 0:
            await asyncio.wait([claiming, *self._runners], timeout=left)
