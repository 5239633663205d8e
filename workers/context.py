"""What a handler holds while it works: `Context`, its words to the world and its questions to it.

It is long because it is one vocabulary, twice: `Blocking` is the same for functions that run in a thread.
"""

import asyncio
import hashlib
import inspect
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cached_property
from typing import Any, Literal, TypeVar

import msgspec
import structlog
from msgspec import Struct

from app import events
from app.agents import DEFAULT, effective, queue_of
from app.errors import Conflict, NotFound, Unavailable
from app.events import FINAL_OUTPUT, AnyEvent, Json, Submission, Usage
from app.log import Appended, random_id, task_id_of
from app.task import Status, Task
from workers.attempt import Attempt, Over

logger = structlog.get_logger()

T = TypeVar("T")

TASKCAST = "taskcast"
"""The actor of what nobody asked for, such as a sub-task's end with its parent."""
CHILD_PAUSE_SECONDS = 0.2
"""Between two looks for a sub-task that its partition has not made yet, or that cannot be followed now."""
CHILD_LOOKS_MAX = 25
"""For one that is not there. Its partition may be away for a while; one that was there before is not looked for."""


class Failed(Exception):
    """Raised by a handler: the task failed, and the message says why. Not retried."""


class Decision(Struct, frozen=True):
    """What a human said to an approval or to a plan."""

    approved: bool
    feedback: str = ""
    payload: Json = {}


class ToolCall:
    """A call of a tool that is under way; `result` is what it gave, anything that JSON can hold."""

    def __init__(self, id_: str) -> None:
        self.id = id_
        self.result: Any = None


class Child:
    """A sub-task. `await child` waits for its end and gives it as it is then: `status`, `result`, `error`."""

    def __init__(self, context: "Context | None", id_: str) -> None:
        self.id = id_
        self._context = context

    def __reduce__(self) -> tuple[Any, ...]:
        return Child, (None, self.id)  # in another process it is a name, for `ctx.wait`

    def __await__(self) -> Generator[Any, None, Task]:
        assert self._context, "a plain function says ctx.wait(child)"
        return self._context.wait(self).__await__()


class Context:
    """What a handler may say and ask. A method returns when the store has the event; `delta` returns before.

    Any method may raise asyncio.CancelledError: the task was cancelled, deleted, timed out or taken over. Let it pass.
    """

    def __init__(self, attempt: Attempt) -> None:
        self.task = task = attempt.claimed.found
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
        self._plans = task.review_version
        self._round = task.review_round
        self._earlier: dict[str, Decision] | None = None

    # Made when they are first wanted: most attempts ask nothing.

    @cached_property
    def _asking(self) -> asyncio.Lock:
        return asyncio.Lock()

    @cached_property
    def _asked(self) -> Counter[str]:
        """How often this attempt has asked the same."""
        return Counter()

    # The answer.

    async def delta(self, text: str, agent: str = FINAL_OUTPUT) -> None:
        """A piece of text, for readers to see at once; pieces that come within 30 ms become one event.

        All of a task's text: at most 192 KiB, else TooLarge, which the next call may raise. Waits only for a slow store.
        """
        if text:
            await self._unless_over(self._attempt.write(agent, text))

    async def flush(self) -> None:
        """Until the store has all that was said."""
        await self._unless_over(self._attempt.settle())

    async def output(
        self, text: str, agent: str = FINAL_OUTPUT, *, usage: Usage | None = None, duration_ms: int | None = None
    ) -> None:
        """The agent's whole text, in place of its deltas. `duration_ms` counts from the attempt's start unless given.

        As the task's answer it carries the usage so far. A handler that returns the same text afterwards has said it
        once: the runtime does not repeat it.
        """
        final = agent == FINAL_OUTPUT
        if usage:
            self._add(usage)
        event = events.TextCompleted(
            agent=agent,
            text=text,
            usage=self.take_usage() if final or usage else None,
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
        self._add(
            Usage(
                model=model,
                provider=provider,
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                cost_nano=round(cost_usd * 1_000_000_000),
            )
        )

    def _add(self, more: Usage) -> None:
        before = self._usage or Usage()
        self._usage = Usage(
            model=more.model or before.model,
            provider=more.provider or before.provider,
            input_tokens=before.input_tokens + more.input_tokens,
            output_tokens=before.output_tokens + more.output_tokens,
            cost_nano=before.cost_nano + more.cost_nano,
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

    async def emit(self, type: str, message: str = "", payload: Json | None = None, *, agent: str = "") -> None:  # noqa: A002 (as readers see it)
        """Any other event. Types are upper-case, such as LLM_PROMPT; another one is Invalid."""
        await self._say(events.Noted(agent=agent, name=type, message=message, payload=payload or {}))

    async def log(
        self, message: str, level: Literal["debug", "info", "warning", "error"] = "info", **fields: Any
    ) -> None:
        """A line in the worker's log, and an event LOG for whoever watches the task."""
        log = logger.bind(**fields).bind(task_id=self.task.id, attempt=self.attempt)  # fields may have these names
        getattr(log, level)(message)
        await self._say(events.Noted(name="LOG", message=message, payload={**fields, "level": level}))

    async def thinking(self, message: str = "", payload: Json | None = None, *, agent: str = "") -> None:
        await self._say(events.Thinking(agent=agent, message=message, payload=payload or {}))

    async def agent_started(self, agent: str, message: str = "", payload: Json | None = None) -> None:
        await self._say(events.AgentStarted(agent=agent, message=message, payload=payload or {}))

    async def agent_completed(self, agent: str, message: str = "", payload: Json | None = None) -> None:
        await self._say(events.AgentCompleted(agent=agent, message=message, payload=payload or {}))

    @asynccontextmanager
    async def tool(
        self, name: str, params: Json | None = None, *, agent: str = "", message: str = ""
    ) -> AsyncIterator[ToolCall]:
        """Records a tool's call, and at the end of the block its result, its duration and whether it raised.

        async with ctx.tool("search", {"q": "Paris"}) as call:
            call.result = await search("Paris")
        """
        call = ToolCall(secrets.token_hex(8))
        await self._say(events.ToolCalled(agent=agent, message=message, tool=name, call=call.id, params=params or {}))
        began, output, success = time.monotonic(), None, False
        try:
            yield call
            output, success = call.result, True
        except BaseException as error:
            output = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise
        finally:
            took = round((time.monotonic() - began) * 1000)
            returned = events.ToolReturned(
                agent=agent, tool=name, call=call.id, success=success, output=output, duration_ms=took
            )
            # A handler that is being cancelled has no more to say.
            if not self._attempt.interrupted.done():
                await self._say(returned)

    async def plan(self, payload: Json, message: str = "", *, agent: str = "") -> None:
        """The plan as it is now, in whatever form the front end knows."""
        await self._say(events.PlanUpdated(agent=agent, message=message, payload=payload))

    # Control.

    async def checkpoint(self, name: str, state: Json | None = None) -> None:
        """A place to pause at: when a pause was asked, keeps `state` in the task and returns once it is resumed.

        Otherwise it costs nothing and keeps nothing. When the worker ends during the pause, a later attempt finds
        the state in `saved`; without one, what an earlier pause kept stays.
        """
        # A handler that never waits for anything else would never hear of the pause, nor of its end.
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
        if attempt.interrupted.done():
            raise asyncio.CancelledError

    async def approve(self, reason: str, payload: Json | None = None) -> Decision:
        """Asks a human, and waits for the answer, however long that takes. The task is paused meanwhile.

        One question at a time. The answer survives this attempt: a later one of the same turn that asks the same, for
        the same reason with the same payload, gets it without asking again, unless more than 5,000 events lie between.
        """
        body = payload or {}
        async with self._asking:
            id_ = self._name("approval", reason, body)
            if earlier := (await self._decided()).get(id_):
                return earlier
            asked = events.ApprovalRequested(approval=id_, reason=reason, payload=body)
            return await self._ask(
                asked, lambda said: isinstance(said, events.ApprovalDecided) and said.approval == id_
            )

    async def review(self, plan: str) -> Decision:
        """Puts a plan up for a human's review: approved as it is, or `feedback` that the next plan should heed.

        As with `approve`, a later attempt that comes up with the same plan gets the same answer.
        """
        async with self._asking:
            if earlier := (await self._decided()).get(self._name("review", plan)):
                return earlier
            self._plans, self._round = self._plans + 1, self._round + 1
            asked = events.ReviewRequested(plan=plan, version=self._plans, round=self._round)
            version = self._plans
            return await self._ask(asked, lambda said: isinstance(said, events.Reviewed) and said.version == version)

    async def _ask(self, question: AnyEvent, answers: Callable[[AnyEvent], bool]) -> Decision:
        attempt = self._attempt
        while True:
            await self.checkpoint("approval")
            try:
                asked = await self._say(question)
            except Conflict:  # a pause was asked in the same moment
                attempt.hear(Status.PAUSED)
                continue
            await attempt.rest()
            async for said in self._history(asked.id):
                if answers(said):
                    return _decision(said)
            # Somebody set the task going without an answer: the question still stands.

    def _name(self, kind: str, *what: Any, among: Counter[str] | None = None) -> str:
        """Of a question: the same in each attempt of this turn that asks the same for as many times."""
        asked = msgspec.json.encode([self.task.id, self.task.turn, kind, *what], order="deterministic")
        digest = hashlib.blake2b(asked, digest_size=10).hexdigest()
        counted = self._asked if among is None else among
        counted[digest] += 1
        times = counted[digest]
        return f"{kind}_{digest}" if times == 1 else f"{kind}_{digest}_{times}"

    async def _decided(self) -> dict[str, Decision]:
        """What earlier attempts of this turn were answered; an explicit retry asks anew."""
        if self._earlier is None:
            decided: dict[str, Decision] = {}
            reviews = Counter[str]()
            plan = ""
            if self.attempt > 1:
                async for said in self._history(""):
                    match said:
                        case events.Continued() | events.Retried():
                            decided.clear()
                            reviews.clear()
                        case events.ReviewRequested():
                            plan = said.plan
                        case events.ApprovalDecided():
                            decided[said.approval] = _decision(said)
                        case events.Reviewed():
                            decided[self._name("review", plan, among=reviews)] = _decision(said)
                        case _:
                            pass
            self._earlier = decided
        return self._earlier

    async def _history(self, after: str) -> AsyncIterator[AnyEvent]:
        """What the task's stream has kept behind a place."""
        attempt = self._attempt
        while True:
            page = await self._unless_over(
                attempt.insist(lambda after=after: attempt.store.events(self.task.org, self.task.id, after))  # type: ignore[misc]
            )
            if page is None or not (page.gap or page.entries):
                return
            after = page.entries[-1].id if page.entries else f"seq:{page.base_seq}"
            for entry in page.entries:
                yield entry.event

    # Sub-tasks.

    async def submit(
        self,
        query: str,
        *,
        queue: str = "",
        agent: str = "",
        context: Json | None = None,
        title: str = "",
        key: str = "",
        priority: int = 0,
        max_attempts: int = 0,
        timeout_seconds: float = 0,
    ) -> Child:
        """Makes a sub-task: of the same owner and session, cancelled together with this one.

        `agent` waits on its own queue, unless another is named, and brings the model of its record; without either the
        sub-task waits on `default`.
        The same `key` again, in a later attempt too, is the same sub-task; one that was cancelled together with this
        task, before somebody retried it, is then tried again as well. A handler that waits for its children holds
        its slot: let them wait on a queue of their own, or give the worker more slots.
        """
        task, attempt = self.task, self._attempt
        if key:
            secret = attempt.store.partitions.secret
            id_ = "task_" + task_id_of(secret, task.org, task.id, str(task.turn), key)
            found = await self._unless_over(attempt.insist(lambda: attempt.store.get(task.org, id_)))
            if found and found.parent == task.id:
                if found.cancelled_by == TASKCAST:  # together with this task, which somebody has set going again
                    await self._unless_over(attempt.insist(lambda: self._again(id_, timeout_seconds)))
                return Child(self, id_)
        else:
            id_ = f"task_{random_id()}"
        called = agent or DEFAULT
        known = await self._unless_over(attempt.insist(lambda: attempt.store.agents.get(task.org, called)))
        child = Submission(
            id=id_,
            org=task.org,
            owner=task.owner,
            user=task.user,
            agent=called,
            session=task.session,
            parent=task.id,
            trigger=task.agent,
            queue=queue or (known.queue if known else queue_of(called)),
            priority=priority,
            dialect=task.dialect,
            title=title,
            query=query,
            context=context or {},
            trace=task.trace,
            max_attempts=max_attempts,
            deadline_seconds=timeout_seconds,
            submission=id_,
        )
        await self._say(events.ChildSubmitted(task=effective(child, known) if known else child))
        return Child(self, id_)

    async def _again(self, id_: str, timeout_seconds: float) -> None:
        """Repeatable: only once per attempt."""
        claimed, retried = self._attempt.claimed, events.Retried(actor=TASKCAST, deadline_seconds=timeout_seconds)
        with suppress(Conflict, NotFound):
            operation = f"again:{claimed.task}:{claimed.fence}"
            await self._attempt.store.append(claimed.org, id_, retried, operation=operation)

    async def wait(self, child: Child) -> Task:
        """The sub-task at its end. Raises NotFound when it was deleted, or could not be made."""
        return await self._unless_over(self._end_of(child.id))

    async def _end_of(self, id_: str) -> Task:
        attempt, org = self._attempt, self.task.org
        looks = CHILD_LOOKS_MAX
        while found := await self._look(id_, looks):
            if found.terminal:
                if found.status is Status.CANCELLED:
                    await self._unless_cancelled()
                return found
            looks = 1
            try:
                async with attempt.store.follow(org, id_, found.last_event_id) as pages:
                    async for _ in pages:
                        pass
            except (NotFound, Unavailable):
                await asyncio.sleep(CHILD_PAUSE_SECONDS)
        raise NotFound(f"The sub-task {id_} is not there: it was deleted, or could not be made.")

    async def _unless_cancelled(self) -> None:
        """A cancel of this task takes its sub-tasks with it, and theirs may be known here before its own. Raises Over."""
        attempt = self._attempt
        mine = await attempt.insist(lambda: attempt.store.get(self.task.org, self.task.id))
        if mine and mine.terminal:
            attempt.hear(mine.status, mine.last_seq)
        if attempt.lost:
            raise Over(attempt.lost)

    async def _look(self, id_: str, times: int) -> Task | None:
        """For a sub-task, which whoever finds its parent's wish first makes."""
        attempt, org = self._attempt, self.task.org
        for left in reversed(range(times)):
            if found := await attempt.insist(lambda: attempt.store.get(org, id_)):
                return found
            if left:
                await asyncio.sleep(CHILD_PAUSE_SECONDS)
                await attempt.insist(attempt.store.queues.follow_up)
        return None

    async def _say(self, event: AnyEvent) -> Appended:
        return await self._unless_over(self._attempt.append(event))

    async def _unless_over(self, wanted: Coroutine[Any, Any, T]) -> T:
        """What is asked for; CancelledError when the attempt is over."""
        if self._attempt.interrupted.done():
            wanted.close()
        else:
            with suppress(Over):
                return await wanted
        # The handler has been cancelled: this is where it notices, unless a task of its own speaks for it.
        await asyncio.sleep(0)
        raise asyncio.CancelledError

    async def until_interrupted(self, wanted: Coroutine[Any, Any, T]) -> T:
        """For a call from a thread: it is a task of its own, which the handler's cancel does not reach."""
        call = asyncio.current_task()
        assert call

        def cancel(_: asyncio.Future[None]) -> None:
            call.cancel()

        self._attempt.interrupted.add_done_callback(cancel)
        try:
            return await wanted
        finally:
            self._attempt.interrupted.remove_done_callback(cancel)

    @property
    def blocking(self) -> "Blocking":
        """The same, for code that runs in a thread: made here, used there."""
        return Blocking(self, asyncio.get_running_loop())


class Blocking:
    """A `Context` for functions that block their thread. Its methods are the same, and return when the answer is there:

        def work(task, ctx: Blocking) -> str:
            ctx.progress(0.5)
            with ctx.tool("search") as call: ...
            child = ctx.submit("…"); done = ctx.wait(child)

    Any of them raises asyncio.CancelledError once the attempt is over: a thread cannot be interrupted elsewhere.
    """

    def __init__(self, context: Context, loop: asyncio.AbstractEventLoop) -> None:
        self._context = context
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._context, name)
        if inspect.iscoroutinefunction(value):
            return lambda *args, **named: self._run(value(*args, **named))
        return value

    @contextmanager
    def tool(self, name: str, params: Json | None = None, *, agent: str = "", message: str = "") -> Iterator[ToolCall]:
        called = self._context.tool(name, params, agent=agent, message=message)
        call = self._run(called.__aenter__())
        try:
            yield call
        except BaseException as error:
            self._run(called.__aexit__(type(error), error, error.__traceback__))
            raise
        self._run(called.__aexit__(None, None, None))

    def at_end(self, end: Callable[[], None], kill: Callable[[], None]) -> None:
        """Calls the one when the attempt is over, and the other an eighth of a grace time later."""
        attempt, loop = self._context._attempt, self._loop  # noqa: SLF001 (the same, for a thread)

        def over(_: asyncio.Future[None]) -> None:
            end()
            loop.call_later(attempt.store.settings.grace_seconds / 8, kill)

        loop.call_soon_threadsafe(attempt.interrupted.add_done_callback, over)

    def _run(self, wanted: Coroutine[Any, Any, T]) -> T:
        try:
            return asyncio.run_coroutine_threadsafe(self._context.until_interrupted(wanted), self._loop).result()
        except CancelledError:  # the one of futures, which handlers would catch with all other exceptions
            raise asyncio.CancelledError from None


def _decision(event: AnyEvent) -> Decision:
    assert isinstance(event, events.ApprovalDecided | events.Reviewed)
    payload = event.payload if isinstance(event, events.ApprovalDecided) else {}
    return Decision(approved=event.approved, feedback=event.feedback, payload=payload)
