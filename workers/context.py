"""What a handler holds while it works: `Context`, its words to the world; and `Attempt`, the right to say them.

An attempt numbers its events 1, 2, 3 … and sends them one at a time, each until the store has answered for it: a
repeat under the same number is a duplicate there, so nothing is lost and nothing doubled, whatever becomes of the
connection. It may write as long as its lease lives and the store agrees. The moment either ends, the handler is
cancelled, and nothing it still says is sent.

This file must never let a cancelled handler's half-sent event collide with what follows: an event whose answer was
not awaited is sent again, under its number, before the next one.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
import structlog

from app import events
from app.errors import Conflict, Invalid, NotFound, OutOfOrder, Stale, TaskcastError, Unavailable
from app.events import FINAL_OUTPUT, AnyEvent, Json, Usage
from app.queues import Claimed
from app.store import Store
from app.task import LEASED, TERMINAL, Status, Task

logger = structlog.get_logger()

T = TypeVar("T")

PAUSE_SECONDS, PAUSE_SECONDS_MAX = 0.05, 1.0
"""Between two tries of a call to a store that is away; doubled each time."""

GONE, TAKEN, LEASE, LOST = Status.GONE.value, "taken", "lease", "events lost"
"""Why an attempt is over, besides the statuses that end one: task deleted, another attempt runs, lease expired,
the store forgot events that it had accepted (a server that failed over, or died before it synced)."""


class Failed(Exception):
    """Raised by a handler: the task failed, and the message says why. Not retried."""


class Over(Exception):
    """This attempt writes no more; its text is the reason. Never seen by handlers, which are cancelled instead."""


class Attempt:
    """One claim of one task: its fence, its event numbers, its lease's deadline, and whether a pause is asked."""

    def __init__(self, store: Store, claimed: Claimed, *, worker: str) -> None:
        self.claimed = claimed
        self.lost = ""
        """Why it is over; empty while it is not."""
        self.stopped = False
        """Interrupted because the worker stops: the task is to be given back."""
        self.interrupted = asyncio.Event()
        """Set when the handler has no more to say: it was cancelled, or it is done."""
        self.paused = False
        self.seq = 0
        """The task's last entry that this attempt knows of; older news is no news."""
        self.refused = 0
        self.work: asyncio.Task[Any] | None = None
        """The running handler."""
        self._store = store
        self._actor = f"worker:{worker}"
        self._n = 0
        self._unsure: AnyEvent | None = None
        self._turn = asyncio.Lock()
        self._wake = asyncio.Event()
        self._draining = False
        self._expiry: asyncio.TimerHandle | None = None
        self._log = logger.bind(task_id=claimed.task, org=claimed.org, worker=worker, fence=claimed.fence)

    # What the runtime tells it.

    def keep(self, until: float) -> None:
        """The lease lives until then, on the event loop's clock; unless kept again, the attempt is over then."""
        if self.lost:
            return
        if self._expiry:
            self._expiry.cancel()
        self._expiry = asyncio.get_running_loop().call_at(until, self.lose, LEASE)

    def hear(self, status: Status, seq: int = 0) -> None:
        """The task's status after its entry `seq`; 0 when the teller does not know which entry that was."""
        if seq:
            if seq <= self.seq:
                return
            self.seq = seq
        if status in LEASED:
            self.paused = status is Status.PAUSED
            self._wake.set()
        else:
            self.lose(status.value)

    def lose(self, reason: str) -> None:
        """The task is no longer this attempt's: cancels the handler at once."""
        if not self.lost:
            self.lost = reason
            if self._expiry:
                self._expiry.cancel()
            if self.work:
                self.work.cancel()
            self.interrupted.set()

    def drain(self) -> None:
        """The worker is about to stop: a handler that waits for `resumed` is stopped now, others go on."""
        self._draining = True
        self._wake.set()

    def stop(self) -> None:
        """Cancels a handler that still runs, so that the task can be given back."""
        if self.work and self.work.cancel():
            self.stopped = True
            self.interrupted.set()

    # What it asks of the store.

    async def read(self) -> Task:
        """The task as it stands. Raises Over when it is not this attempt's (any more)."""
        one = self.claimed
        task = await self._insist(lambda: self._store.get(one.org, one.task))
        if task is None:
            self.lose(GONE)
        elif task.fence != one.fence:
            self.lose(TAKEN)
        else:
            self.hear(task.status, task.last_seq)
        if task is None or self.lost:
            raise Over(self.lost)
        return task

    async def append(self, event: AnyEvent) -> None:
        """Appends under the next number. A task whose store is away is asked again until the lease ends.

        Raises Over; Invalid for an event that cannot be stored; Conflict when only this event is out of place.
        """
        if not isinstance(event, events.TextDelta):  # these are many, and their attempt tells who speaks
            event = msgspec.structs.replace(event, actor=self._actor)
        async with self._turn:
            if self._unsure:
                # Whoever said it was cancelled and heard no answer; that it was refused is news to nobody.
                with suppress(Invalid, Conflict):
                    await self._send(self._unsure)
            await self._send(event)

    async def give_back(self, event: events.Requeued) -> None:
        """Without a number: for an attempt whose numbers the store no longer knows. Harmless when repeated."""
        one = self.claimed
        with suppress(TaskcastError):
            await self._store.append(one.org, one.task, event, fence=one.fence)

    async def rest(self) -> None:
        """Until the pause ends; a worker that stops does not wait for that."""
        while self.paused and not self._draining:
            self._wake.clear()
            await self._wake.wait()
        if self.paused:
            self.stop()

    async def _send(self, event: AnyEvent) -> None:
        one, self._unsure = self.claimed, event
        try:
            appended = await self._insist(
                lambda: self._store.append(one.org, one.task, event, fence=one.fence, n=self._n + 1)
            )
        except Invalid:  # it was given no number
            self._unsure = None
            raise
        except (Conflict, NotFound) as error:
            self._unsure = None
            status = error.status if isinstance(error, Conflict) else GONE
            if status in LEASED and not isinstance(error, (Stale, OutOfOrder)):
                raise
            await self._refuse(event, error, status)
            self.lose(LOST if isinstance(error, OutOfOrder) else TAKEN if status in LEASED else status)
            raise Over(self.lost) from error
        self._unsure = None
        self._n += 1
        # A duplicate's place is where it once stood, and its status is of now. A status that ends the attempt is our
        # own doing: whoever said so must not be cancelled for it.
        if not appended.duplicate and appended.status in LEASED:
            self.hear(appended.status, appended.seq)

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        pause = PAUSE_SECONDS
        while not self.lost:
            with suppress(Unavailable):
                return await call()
            await asyncio.sleep(pause)
            pause = min(pause * 2, PAUSE_SECONDS_MAX)
        raise Over(self.lost)

    async def _refuse(self, event: AnyEvent, error: TaskcastError, status: str) -> None:
        """Counts and logs it, and warns the task's readers once, unless the task has ended."""
        self.refused += 1
        said, ended = events.tag(event), status == GONE or status in TERMINAL
        log = self._log.info if ended else self._log.warning
        log("task.refused", said=said, reason=error.code, status=status, refused=self.refused)
        if ended or self.refused > 1:
            return
        one, message = self.claimed, f"A worker's event ({said}) was refused: {error}"
        with suppress(TaskcastError):
            await self._store.append(
                one.org, one.task, events.Noted(actor=self._actor, name="WARNING", message=message)
            )


class Context:
    """What a handler may say and ask. Each method returns when the store has the event.

    Any method may raise asyncio.CancelledError: the task was cancelled, deleted, timed out or taken over. Let it pass.
    """

    def __init__(self, attempt: Attempt, task: Task) -> None:
        self.task = task
        """As it was when this attempt began."""
        self.attempt = task.attempt
        """1, 2, 3 … within the task's present turn."""
        self.saved: Json = dict(task.checkpoint)
        """What an earlier attempt gave to `checkpoint` when it was paused; {} when none was."""
        self.final_text: str | None = None
        """The last text that was finished as the task's answer; None: none yet."""
        self._attempt = attempt
        self._usage: Usage | None = None
        self._began = time.monotonic()

    # The answer.

    async def text(self, delta: str, agent: str = FINAL_OUTPUT) -> None:
        """A piece of text, for readers to see at once. All of a task's text: at most 192 KiB, else TooLarge."""
        if delta:
            await self._say(events.TextDelta(agent=agent, text=delta))

    async def finish_text(self, text: str, agent: str = FINAL_OUTPUT, duration_ms: int | None = None) -> None:
        """The agent's whole text, in place of its deltas. `duration_ms` counts from the attempt's start unless given.

        As the task's answer it carries the usage so far. A handler that returns the same text afterwards has said it
        once: the runtime does not repeat it.
        """
        final = agent == FINAL_OUTPUT
        event = events.TextCompleted(
            agent=agent,
            text=text,
            usage=self.take_usage() if final else None,
            duration_ms=self.elapsed_ms if duration_ms is None else duration_ms,
        )
        await self._say(event)
        if final:
            self.final_text = text

    def used(
        self,
        *,
        model: str = "",
        provider: str = "",
        input_tokens: int = 0,
        output_tokens: int = 0,
        cost_usd: float = 0.0,
    ) -> None:
        """Adds what a model call consumed; the sum goes out, once, with the answer. The last model named stands.

        An attempt that ends without an answer takes its usage with it.
        """
        if min(input_tokens, output_tokens, cost_usd) < 0:
            raise ValueError("What a model call consumed cannot be negative.")
        before = self._usage or Usage()
        self._usage = Usage(
            model=model or before.model,
            provider=provider or before.provider,
            input_tokens=before.input_tokens + input_tokens,
            output_tokens=before.output_tokens + output_tokens,
            cost_nano=before.cost_nano + round(cost_usd * 1_000_000_000),
        )

    def take_usage(self) -> Usage | None:
        """What no event has carried yet; whoever takes it must send it."""
        taken, self._usage = self._usage, None
        return taken

    @property
    def elapsed_ms(self) -> int:
        """Since this attempt began to work."""
        return round((time.monotonic() - self._began) * 1000)

    # What goes on meanwhile.

    async def progress(self, fraction: float, message: str = "", payload: Json | None = None) -> None:
        """0 … 1; else Invalid."""
        await self._say(events.Progressed(fraction=fraction, message=message, payload=payload or {}))

    async def note(self, name: str, message: str = "", payload: Json | None = None, *, agent: str = "") -> None:
        """Any other event. Names are upper-case, such as LLM_PROMPT; another one is Invalid."""
        await self._say(events.Noted(agent=agent, name=name, message=message, payload=payload or {}))

    async def thinking(self, message: str = "", payload: Json | None = None, *, agent: str = "") -> None:
        await self._say(events.Thinking(agent=agent, message=message, payload=payload or {}))

    async def agent_started(self, agent: str, message: str = "", payload: Json | None = None) -> None:
        await self._say(events.AgentStarted(agent=agent, message=message, payload=payload or {}))

    async def agent_completed(self, agent: str, message: str = "", payload: Json | None = None) -> None:
        await self._say(events.AgentCompleted(agent=agent, message=message, payload=payload or {}))

    async def tool_called(
        self,
        tool: str,
        params: Json | None = None,
        *,
        call: str = "",
        agent: str = "",
        message: str = "",
        payload: Json | None = None,
    ) -> None:
        """`call` names this call, so that its `tool_returned` can be told from another's."""
        await self._say(
            events.ToolCalled(
                agent=agent,
                message=message,
                tool=tool,
                call=call,
                params=params or {},
                payload=payload or {},
            )
        )

    async def tool_returned(
        self,
        tool: str,
        output: Any = None,
        *,
        call: str = "",
        success: bool = True,
        duration_ms: int = 0,
        agent: str = "",
        message: str = "",
        payload: Json | None = None,
    ) -> None:
        """`output`: anything that JSON can hold."""
        await self._say(
            events.ToolReturned(
                agent=agent,
                message=message,
                tool=tool,
                call=call,
                success=success,
                output=output,
                duration_ms=duration_ms,
                payload=payload or {},
            )
        )

    async def plan(self, payload: Json, message: str = "", *, agent: str = "") -> None:
        """The plan as it is now, in whatever form the front end knows."""
        await self._say(events.PlanUpdated(agent=agent, message=message, payload=payload))

    # Control.

    async def checkpoint(self, name: str, state: Json | None = None) -> None:
        """A place to pause at: when a pause was asked, keeps `state` in the task and returns once it is resumed.

        Otherwise it costs nothing and keeps nothing. When the worker ends during the pause, a later attempt finds
        the state in `saved`; without one, what an earlier pause kept stays.
        """
        # A handler that never waits for anything else would never hear of the pause.
        await asyncio.sleep(0)
        attempt = self._attempt
        while attempt.paused:
            seen = attempt.seq
            try:
                await self._say(events.Paused(message="Task paused.", checkpoint=name, state=state or {}))
            except Conflict:  # resumed in the same moment; perhaps even paused again, which is news of its own
                if attempt.seq == seen:
                    attempt.hear(Status.RUNNING)
            else:
                await attempt.rest()

    async def _say(self, event: AnyEvent) -> None:
        if not self._attempt.interrupted.is_set():
            with suppress(Over):
                return await self._attempt.append(event)
        # The handler has been cancelled: this is where it notices, unless a task of its own speaks for it.
        await asyncio.sleep(0)
        raise asyncio.CancelledError
