"""Invoking an agent or a workflow: at once, waiting for the end, or as a stream (contract §1.7, §1.8).

An `id` that is known continues that task as its next turn; while a turn runs, another one is 409. A stream says what
follows in frames of `data:` alone, each with the whole task where its state moved, and ends after `task_finished`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import events, schema
from app.api.xpander.models import Invocation, body_of, id_of
from app.api.xpander.paths import member
from app.api.xpander.spelling import connected, control, frame, frame_extended, schema_of, secrets, submission, turn
from app.api.xpander.tasks import again, whole
from app.errors import Conflict, Invalid, NotFound
from app.events import Entry, Json, Submission
from app.frames import Spelling, encode, spelling
from app.identity import Identity
from app.log import Appended, once
from app.requests import actor, changed, reply, store_of
from app.sse import Stream
from app.store import Store
from app.streams import WAITS, Streams
from app.task import EMPTY, Snapshot, Task, apply, task

logger = structlog.get_logger()

SYNC_SECONDS_MAX = 1500.0
"""What the SDK waits for any answer (contract §3.2); then a task is answered as it stands."""
VERSION_CHARACTERS_MAX = 64


async def accepted(request: Request, agent_id: str, *, source: str, kind: str = "agent") -> Task:
    """The task that the body asks for, new or in its next turn, as it was when that was accepted: a worker may have it by
    now. Raises Rejected, Conflict, NotFound, TooLarge.
    """
    store, who = store_of(request), member(request)
    asked = await body_of(request, Invocation)
    if wanted := schema_of(asked):
        await asyncio.to_thread(schema.check, wanted)  # it may take a quarter of a second
    before = await store.snapshots.snapshot(who.org, asked.id) if asked.id else None
    if before and before.fields["agent"] != agent_id:
        raise NotFound("Task not found")
    agent = await store.agents.used(who.org, agent_id)
    version = request.query_params.get("version") or request.headers.get("x-agent-version") or str(agent.version)
    version = version[:VERSION_CHARACTERS_MAX]
    hidden = secrets(asked)
    event: events.AnyEvent
    if before is None:
        made = submission(asked, agent, who, source=source, kind=kind, version=version)
        event = events.Submitted(task=made)
        async with _hiding(store, who.org, made.id, made.submission, hidden):
            appended = await _submit(store, who, made)
        logger.info("task.submitted", task_id=made.id, org=who.org, agent=agent_id)
        return _then(EMPTY, made.id, event, appended)
    known = task(before.fields)
    event = said = turn(known, asked, agent, actor(who), kind=kind, version=version)
    try:
        async with _hiding(store, who.org, known.id, said.submission, hidden):
            appended = await store.append(who.org, known.id, event)
    except Conflict as error:
        sentence = "The task is still at work on its last turn; wait for its end, or stop it."
        raise Conflict(sentence, error.status) from error
    await store.hide(who.org, known.id, known.submission, {})  # those of the turn before
    logger.info("task.continued", task_id=known.id, org=who.org, agent=agent_id)
    if not known.terminal:  # it ended since it was looked at
        return await again(store, known)
    return _then(before, known.id, event, appended)


def _then(before: Snapshot, id_: str, event: events.AnyEvent, appended: Appended) -> Task:
    fence = int(before.fields.get("fence", "0"))
    entry = Entry(
        id=appended.id, task=id_, seq=appended.seq, at=appended.at, fence=fence, attempt=0, n=0, event=event, size=0
    )
    return task(apply(before, entry).fields)


@asynccontextmanager
async def _hiding(store: Store, org: str, task: str, submission: str, hidden: Json) -> AsyncIterator[None]:
    """Of a turn that is refused nothing stays hidden."""
    if hidden:
        await store.hide(org, task, submission, hidden)
    try:
        yield
    except (Invalid, NotFound, Conflict):
        if hidden:
            await store.hide(org, task, submission, {})
        raise


async def _submit(store: Store, who: Identity, made: Submission) -> Appended:
    if made.parent and made.parent != made.id:
        # Said by the parent, so that a cancel of it reaches the new task; one that has ended says nothing any more.
        with suppress(Conflict, NotFound):
            child = events.ChildSubmitted(actor=actor(who), task=made)
            await store.append(who.org, made.parent, child, operation=once())
    try:
        return await store.submit(made, actor=actor(who))
    except Conflict as error:
        sentence = f"A task with the id {made.id} was made at the same moment; ask again to continue it."
        raise Conflict(sentence, error.status) from error


async def invoke(request: Request, kind: str) -> Response:
    """Answers at the end of the turn; earlier when the server stops, or has no room for one more that waits, and then
    with the task as it stands.
    """
    found = await accepted(request, id_of(request, f"{kind}_id"), source="api", kind=kind)
    return reply(await whole(store_of(request), await ended(request, found)))


async def ended(request: Request, found: Task) -> Task:
    request.scope[WAITS] = True
    if found.terminal:
        return found
    await changed(request, found.id, found.last_event_id, SYNC_SECONDS_MAX, lambda _: False)
    return await again(store_of(request), found)


async def invoke_async(request: Request, kind: str) -> Response:
    found = await accepted(request, id_of(request, f"{kind}_id"), source="api", kind=kind)
    return reply(await whole(store_of(request), found))


async def invoke_stream(request: Request, kind: str) -> Response:
    found = await accepted(request, id_of(request, f"{kind}_id"), source="api", kind=kind)
    return stream(request, found)


def stream(request: Request, found: Task) -> Response:
    """The task's present turn, from `task_created` on. With `events=all`, ours, also the types that only the newest SDK
    knows.
    """
    store, who = store_of(request), member(request)
    streams: Streams = request.app.state.streams
    extended = request.query_params.get("events") == "all"
    hello = b": connected\n"
    if extended:
        hello += encode(connected(found.org, found.id, found.updated_at))
    reader = store.hub.folded(who.org, found.id, max(1, found.turn_seq))
    return Stream(streams, store.hub, reader, partial(_spelling, extended), hello=hello, key=who.key)


def _spelling(extended: bool, chunk: Callable[[bytes], bytes]) -> Spelling:
    return spelling(frame_extended if extended else frame, control, frozenset(), chunk)


routes = [
    Route(f"/v1/{kind}s/{{{kind}_id}}/invoke{mode}", partial(endpoint, kind=kind), methods=["POST"])
    for kind in ("agent", "workflow")
    for mode, endpoint in (("", invoke), ("/async", invoke_async), ("/stream", invoke_stream))
]
