"""The workers of an unmodified `xpander-sdk` (`@on_task`): a stream that brings them tasks, and what they say (§3.5).

    GET  /events/{agent_id}     `worker-registration` at once, then an `agent-execution` for each task
    POST /events/{worker_id}    heartbeats, every 2 s, and whether it has room for another task

The process with the stream claims its worker's tasks, and keeps their leases while the stream is open and somebody,
anywhere, hears the heartbeats. Then nothing does: nobody can tell a worker that died from one that comes back, for that
registers anew; so its tasks return when their leases end, and a late result counts while its task is open. What the
worker says of its tasks it says to `executions.py`, and the log tells this file that a slot is free.

What this file must never do is break a stream off: the SDK forgives five breaks in its life, then its process ends; after
a clean end it comes back in a second, for ever. Nor may it send a task before the registration, or one that the SDK
cannot read: that ends its process at once.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

import structlog
from pydantic import BeforeValidator
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app import events, metrics
from app.agents import Agent
from app.answers import clock
from app.api.xpander.models import Model, body_of, checked, id_of, query_of
from app.api.xpander.paths import member
from app.api.xpander.spelling import PINNED, task_body
from app.claims import Claims, Waiter
from app.errors import TaskcastError, Unavailable
from app.events import Json
from app.frames import PING, Frame, encode
from app.queues import Claimed
from app.registrations import Registration
from app.requests import left, reply, store_of
from app.sse import HEADERS
from app.store import Store
from app.streams import Streams, Visitor, store_away, unstalled, wire_of
from app.task import Status

logger = structlog.get_logger()

SLOTS = 6
"""Tasks that the SDK does at once. One more it reads, and keeps from all other workers until it has room (tried)."""
LOOK_SECONDS = 2.0
"""Between looks at whether a worker is heard, which renew its leases; the SDK's own pause between heartbeats."""
FORGOTTEN_LOOKS = 2
"""In a row, in which a worker says that it does nothing while we hold tasks of it: its last PATCH may be on its way."""
SILENT_SECONDS = 10.0
"""After which a worker is given up; what one try of a heartbeat may take in the SDK."""


# What they say


class Listening(Model):
    # An older SDK glues the path's slash to the value.
    environment: Annotated[
        Literal["local", "xpander"] | None,
        BeforeValidator(lambda value: value.strip("/") if isinstance(value, str) else value),
    ] = None


class Word(Model):
    event: Literal["worker-heartbeat", "worker-capacity-update", "worker-finished"]
    data: Any = None


class Capacity(Model):
    is_busy: bool


async def hear(request: Request) -> Response:
    """200 for a worker that nobody knows, too: a task that outlives its stream speaks for the registration it came by."""
    who, id_, registrations = member(request), id_of(request, "worker_id"), store_of(request).registrations
    word = await body_of(request, Word)
    if word.event == "worker-finished":
        await registrations.remove(who.org, id_)
        return reply({"id": id_, "registered": False})
    freed = None
    if word.event == "worker-capacity-update":
        # One of these follows each task; they overtake one another, so that the last one says nothing (tried).
        freed = 0 if checked(Capacity, word.data, "body", "data").is_busy else 1
    return reply({"id": id_, "registered": await registrations.heard(who.org, id_, freed=freed)})


# What they are told


async def listen(request: Request) -> Response:
    """A stream that cannot begin now is empty: its worker comes back in a second."""
    agent_id = id_of(request, "agent_id")
    query_of(request.query_params, Listening)
    streams: Streams = request.app.state.streams
    try:
        who, store = member(request), store_of(request)
        if request.method == "HEAD":  # never registers
            return Response(headers=HEADERS)
        if refusal := streams.refusal(who.key):
            metrics.STREAMS_ABORTED.labels(refusal).inc()
            return Response(headers=HEADERS)
        agent = await store.agents.used(who.org, agent_id)
        worker = await store.registrations.add(who.org, agent_id)
    except Unavailable as error:
        store_away("stream.refused", error)
        return Response(headers=HEADERS)
    return Dispatch(store, request.app.state.claims, streams, who.key, agent, worker)


class Dispatch(Response):
    """The stream of one registered worker."""

    media_type = "text/event-stream"

    def __init__(
        self, store: Store, claims: Claims, streams: Streams, key: str, agent: Agent, worker: Registration
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self._store, self._claims, self._streams, self._key = store, claims, streams, key
        self._agent, self._worker = agent, worker
        self._held: dict[str, Claimed] = {}
        """Tasks that it does, by id."""
        self._sent = 0
        self._unfreed = 0
        """Tasks that ended without its word: there is none by which its handlers could be told, and they go on."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire = wire_of(scope)
        send = unstalled(send, wire)
        visitor = Visitor(wire.abort if wire else lambda: None)
        own = f"{PINNED}{self._worker.id}"
        with self._streams.holding(visitor, self._key):
            try:
                async with self._claims.place(self._worker.org, [self._agent.queue], own=own) as waiter:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await self._serve(waiter, visitor, receive, send)
            except Unavailable as error:
                store_away("stream.refused", error)
                await Response(headers=HEADERS)(scope, receive, send)

    async def _serve(self, waiter: Waiter, visitor: Visitor, receive: Receive, send: Send) -> None:
        told = {"worker": self._worker.id, "org": self._worker.org, "agent": self._agent.id}
        logger.info("worker.registered", **told)
        hearing = asyncio.create_task(left(receive), name="hear")
        keeping = asyncio.create_task(self._keep(waiter), name="keep")
        ends: tuple[asyncio.Future[Any], ...] = (hearing, keeping, visitor.leaving)
        reason = "failed"
        try:
            await self._dispatch(waiter, ends, send)
            reason = "left" if hearing.done() else "draining" if visitor.leaving.done() else keeping.result()
        except Exception:
            logger.exception("stream.failed", **told)
        finally:
            hearing.cancel()
            keeping.cancel()
            await asyncio.gather(hearing, keeping, return_exceptions=True)
            for one in self._held.values():
                self._claims.drop(one)
            # What it does may come to an end; it returns if it does not.
            lost = logger.warning if reason in {"silent", "failed"} else logger.info
            lost("worker.lost", **told, reason=reason, tasks=len(self._held))
        if reason not in {"left", "finished"}:
            metrics.STREAMS_ABORTED.labels(reason).inc()
        if reason != "left":
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        with suppress(TaskcastError):
            await self._store.registrations.remove(self._worker.org, self._worker.id)

    async def _dispatch(self, waiter: Waiter, ends: Sequence[asyncio.Future[Any]], send: Send) -> None:
        """Until one of these is done. One task at a time: many are for all workers that are awake."""
        loop = asyncio.get_running_loop()
        heartbeat = self._streams.settings.heartbeat_seconds

        async def say(frames: bytes) -> float:
            await send({"type": "http.response.body", "body": frames, "more_body": True})
            self._streams.sent(frames)
            return loop.time() + heartbeat

        silent_at = await say(encode(Frame(event="worker-registration", data=deployed(self._worker, self._agent))))
        while not any(end.done() for end in ends):
            waiter.woken.clear()
            claimed = await self._claim() if self._room() > 0 else []
            if any(end.done() for end in ends):
                return await self._give_back([one for one, _ in claimed])
            for one, task in claimed:
                self._hold(one, waiter)
                silent_at = await say(encode(Frame(event="agent-execution", data=task)))
            waiter.full = self._room() <= 0
            if claimed and not waiter.full:
                continue
            waking = asyncio.ensure_future(waiter.woken.wait())
            await asyncio.wait(
                (waking, *ends), timeout=max(0, silent_at - loop.time()), return_when=asyncio.FIRST_COMPLETED
            )
            waking.cancel()
            if loop.time() >= silent_at:
                silent_at = await say(PING)
        return None

    def _room(self) -> int:
        return SLOTS - len(self._held) - self._unfreed

    async def _claim(self) -> list[tuple[Claimed, Json]]:
        """The task that is next, and as the worker alone may read it."""
        worker = self._worker
        queues = [self._agent.queue, f"{PINNED}{worker.id}"]
        claimed: list[Claimed] = []
        try:
            claimed = await self._store.claim(queues, worker.id, 1, org=worker.org)
            return [(one, task_body(one.found) | await self._store.hidden(one.found)) for one in claimed]
        except Unavailable as error:
            # Its tasks are better kept than its stream ended; it looks again with the next sweep.
            store_away("dispatch.waiting", error)
            await self._give_back(claimed)
            return []

    async def _give_back(self, claimed: Sequence[Claimed]) -> None:
        await self._claims.give_back(claimed, f"worker:{self._worker.id}")

    def _hold(self, one: Claimed, waiter: Waiter) -> None:
        told = {"task_id": one.task, "org": one.org, "worker": self._worker.id, "fence": one.fence}
        logger.info("task.dispatched", **told, queue=one.found.queue, attempt=one.found.attempt)
        self._held[one.task] = one
        self._sent += 1
        # The worker's own end of a task is restated, and its slot is free; nobody else's end reaches its handler.
        self._claims.hold(one, lambda entry: self._over(one, waiter, freed=entry.type == events.tag(events.Restated)))

    def _over(self, one: Claimed, waiter: Waiter, *, freed: bool) -> None:
        self._claims.drop(one)
        if self._held.get(one.task) is one:
            del self._held[one.task]
            self._unfreed += not freed
            self._wake(waiter)

    def _wake(self, waiter: Waiter) -> None:
        if self._room() > 0:
            waiter.full = False
            waiter.woken.set()

    async def _keep(self, waiter: Waiter) -> str:
        """While the worker is heard; then why not: `silent`, or `finished`, as it says itself."""
        pause = min(LOOK_SECONDS, self._store.settings.lease_seconds / 3)
        # Counted in looks: while this process or the store stood still, nobody could be heard.
        heartbeat_at, silence, forgotten = self._worker.heartbeat_at, 0.0, 0
        while True:
            await asyncio.sleep(pause)
            try:
                found = await self._store.registrations.get(self._worker.org, self._worker.id)
                if found is None:
                    return "finished"
                silence = silence + pause if found.heartbeat_at == heartbeat_at else 0.0
                if silence >= SILENT_SECONDS:
                    return "silent"
                heartbeat_at = found.heartbeat_at
                for one, status in (await self._store.renew([*self._held.values()])).items():
                    if status != Status.RUNNING:
                        self._over(one, waiter, freed=False)
                self._count(found.freed, waiter)
                forgotten = forgotten + 1 if self._held and (found.freed or 0) >= self._sent else 0
                if forgotten == FORGOTTEN_LOOKS:
                    self._give_up(waiter)
            except Unavailable as error:
                store_away("dispatch.waiting", error)

    def _give_up(self, waiter: Waiter) -> None:
        """It says that all its tasks are out of its hands, so what it said of these was lost: the SDK says nothing twice.
        They return when their leases end.
        """
        for one in [*self._held.values()]:
            logger.warning("task.forgotten", task_id=one.task, org=one.org, worker=self._worker.id, fence=one.fence)
            self._over(one, waiter, freed=True)

    def _count(self, freed: int | None, waiter: Waiter) -> None:
        """Of slots whose tasks have ended elsewhere, those of which the worker has not said since that they are free. One
        that says nothing of its slots is not waited for.
        """
        outstanding = 0 if freed is None else max(0, self._sent - freed - len(self._held))
        if outstanding < self._unfreed:
            self._unfreed = outstanding
            self._wake(waiter)


def deployed(worker: Registration, agent: Agent) -> Json:
    """What the SDK calls a deployed asset, with all keys that it requires; `configuration` must be absent."""
    at = clock(worker.heartbeat_at)
    return {
        "id": worker.id,
        "name": f"worker-{worker.id[:8]}",
        "organization_id": worker.org,
        "type": "worker",
        "created_at": at,
        "created_by": None,
        "last_heartbeat": at,
        "dedicated_agent_id": agent.id,
        "parent_asset_id": None,
        "is_busy": False,
        "metadata": {"name": agent.name, "unique_name": agent.id},
    }


routes = [
    Route("/events/{agent_id}", listen, methods=["GET"]),
    Route("/events/{worker_id}", hear, methods=["POST"]),
]
