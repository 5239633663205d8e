"""`run_task`: one task in this process, without a server, for a worker's own unit tests.

The handler, its context and what the runtime makes of the outcome are the real ones; only the store is a stand-in,
which folds the events with the same table as the real one.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
from msgspec import Struct

from app import events
from app.errors import Conflict, Misconfigured, TaskcastError, TooLarge
from app.events import TEXT_BYTES_MAX, AnyEvent, Entry, Json, Submission
from app.log import Appended, Page, Said, said
from app.queues import Claimed
from app.settings import Settings
from app.store import Store
from app.task import EMPTY, QUEUED, Snapshot, Task, apply, task
from workers.attempt import Attempt
from workers.context import Decision
from workers.handlers import Handler, by_queue
from workers.runtime import Worker

ORG, WORKER = "rehearsal", "rehearsal"

Decide = Callable[[str], bool | Decision]
"""What the human says, to an approval's reason or to a plan."""


class Run(Struct, frozen=True):
    """What became of a task."""

    task: Task
    """As it is at its end: `status`, `error`, `attempt`, `input_tokens` …"""
    events: list[AnyEvent]
    """All that was said, from `submitted` on."""

    @property
    def result(self) -> str | Json:
        """Text, or the JSON object."""
        if self.task.result_type == "json":
            return cast("Json", msgspec.json.decode(self.task.result))
        return self.task.result


def _approved(_: str) -> bool:
    return True


async def run_task(
    handler: Handler,
    query: str = "",
    /,
    *,
    children: Sequence[Handler] = (),
    decide: Decide = _approved,
    **context: Any,
) -> Run:
    """Runs a task to its end: `context` are the function's named arguments, as a client would give them in JSON.

    Retries follow at once. `children` are the workers of its sub-tasks, `decide` answers approvals and reviews, all with
    yes unless it is given; what that raises, or Misconfigured for a sub-task that none of these workers serves, is raised here.
    """
    served = by_queue([handler, *children])
    own = handler.queues[0]
    first = Submission(id="task", org=ORG, queue=own, query=query, context=context, submission="task")
    return await _run(first, served, decide)


async def _run(submission: Submission, served: dict[str, Handler], decide: Decide) -> Run:
    store = Rehearsal(submission, served, decide)
    worker = Worker(cast("Store", store), served, stop=asyncio.Event(), slots=1, name=WORKER)
    try:
        while store.snapshot.status is QUEUED:
            await worker.attend(store.begin(served[submission.queue]))
    finally:
        await store.aclose()
    if store.problem:
        raise store.problem
    return Run(task(store.snapshot.fields), [entry.event for entry in store.entries])


async def _nobody(*_: str) -> None:
    """No agent has a record."""


class Rehearsal:
    """As much of a `Store` as the attempts of one task use."""

    def __init__(self, submission: Submission, served: dict[str, Handler], decide: Decide) -> None:
        self.settings = Settings()
        self.queues = SimpleNamespace(follow_up=self._follow_up)
        self.partitions = SimpleNamespace(secret=b"rehearsal")
        self.agents = SimpleNamespace(get=_nobody)
        self.snapshot: Snapshot = EMPTY
        self.entries: list[Entry] = []
        self.problem: BaseException | None = None
        """What the test got wrong, not the handler."""
        self._served, self._decide = served, decide
        self._children: dict[str, asyncio.Task[Run]] = {}
        self._attempt: Attempt | None = None
        self._add(events.Submitted(task=submission), 0)

    def begin(self, handler: Handler) -> Attempt:
        self._add(events.Started(worker=WORKER, max_attempts=handler.max_attempts), 0)
        found = task(self.snapshot.fields)
        self._attempt = Attempt(cast("Store", self), Claimed(ORG, found.id, found.fence, found), worker=WORKER)
        return self._attempt

    def _add(self, event: AnyEvent, n: int) -> Entry:
        seq = len(self.entries) + 1
        began = int(isinstance(event, events.Started))
        fields = self.snapshot.fields
        entry = Entry(
            id=f"{seq}-0",
            task="task",
            seq=seq,
            at=round(time.time() * 1_000_000),
            fence=int(fields.get("fence", "0")) + began,
            attempt=int(fields.get("attempt", "0")) + began,
            n=n,
            event=event,
            size=len(events.encode(event)),
        )
        after = apply(self.snapshot, entry)
        if len(after.text) > TEXT_BYTES_MAX:
            raise TooLarge(f"The task's text would exceed {TEXT_BYTES_MAX} bytes.")
        self.snapshot = after
        self.entries.append(entry)
        return entry

    def _appended(self, entry: Entry) -> Appended:
        return Appended(entry.seq, entry.id, entry.at, self.snapshot.status, entry.attempt)

    async def extend(
        self, _org: str, _task: str, batch: Sequence[Said], *, n: int, **_: Any
    ) -> list[Appended | TaskcastError]:
        outcomes: list[Appended | TaskcastError] = []
        for number, one in enumerate(batch, n):
            try:
                outcomes.append(self._appended(self._add(one.event, number)))
            except (Conflict, TooLarge) as error:
                return [*outcomes, error]
            try:
                self._react(one.event)
            except BaseException as error:  # such as pytest.fail raises
                self.problem = error
                raise RuntimeError("the rehearsal cannot go on") from error
        return outcomes

    def _react(self, event: AnyEvent) -> None:
        """As the world would."""
        match event:
            case events.ChildSubmitted(task=child):
                if child.queue not in self._served:
                    raise Misconfigured(f"No worker was given for the queue {child.queue}: run_task(…, children=[…]).")
                self._children[child.id] = asyncio.create_task(_run(child, self._served, self._decide))
            case events.ApprovalRequested(approval=approval):
                said_ = self._answer(event.reason)
                decided = events.ApprovalDecided(
                    approval=approval, approved=said_.approved, feedback=said_.feedback, payload=said_.payload
                )
                asyncio.get_running_loop().call_soon(self._tell, decided)
            case events.ReviewRequested(version=version):
                said_ = self._answer(event.plan)
                reviewed = events.Reviewed(version=version, approved=said_.approved, feedback=said_.feedback)
                asyncio.get_running_loop().call_soon(self._tell, reviewed)
            case _:
                pass

    def _answer(self, question: str) -> Decision:
        answer = self._decide(question)
        return answer if isinstance(answer, Decision) else Decision(approved=answer)

    def _tell(self, decision: AnyEvent) -> None:
        """From outside, as the log's tail would."""
        try:
            entry = self._add(decision, 0)
        except Conflict:  # the task has ended meanwhile
            return
        if self._attempt:
            self._attempt.hear(self.snapshot.status, entry.seq)

    async def append(self, _org: str, _task: str, event: AnyEvent, **_: Any) -> Appended:
        return self._appended(self._add(said(event).event, 0))

    async def events(self, _org: str, _task: str, after: str) -> Page:
        seq = int(after.partition("-")[0] or 0)
        last = self.entries[-1]
        return Page(
            status=self.snapshot.status,
            last_seq=last.seq,
            last_id=last.id,
            base_seq=0,
            gap="",
            entries=self.entries[seq:],
        )

    async def aclose(self) -> None:
        """Sub-tasks that nobody waited for end with their parent's process, which is here."""
        for child in self._children.values():
            child.cancel()
        await asyncio.gather(*self._children.values(), return_exceptions=True)

    async def get(self, _org: str, id_: str) -> Task | None:
        """A sub-task when it has ended; here nobody looks at one before."""
        if child := self._children.get(id_):
            try:
                return (await asyncio.shield(child)).task
            except Exception as error:
                self.problem = error
                raise
        return None

    async def _follow_up(self) -> int:
        """There is no other partition that could owe a sub-task."""
        return 0
