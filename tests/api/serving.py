"""The real server over the real store, on a free port of this machine, and tasks to follow."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from httpx_sse import EventSource, ServerSentEvent, aconnect_sse

from app import events
from app.identity import DEVELOPMENT_KEY, DEVELOPMENT_ORG, DEVELOPMENT_USER
from app.log import random_id
from app.server import Server, listen, serving, url_of
from app.settings import Settings
from app.store import Store

ORG, USER = DEVELOPMENT_ORG, DEVELOPMENT_USER
KEY = {"X-API-Key": DEVELOPMENT_KEY}


class Served:
    def __init__(self, url: str, server: Server, client: httpx.AsyncClient) -> None:
        self.url, self.server, self.client = url, server, client
        self.port = int(url.rpartition(":")[2])

    def stream(self, task: str, **query: str) -> Any:
        """As httpx-sse sees it."""
        params = {"workflow_id": task, **query}
        return aconnect_sse(self.client, "GET", f"{self.url}/api/v1/stream/sse", params=params)


@asynccontextmanager
async def served(store: Store, settings: Settings, **changed: Any) -> AsyncIterator[Served]:
    """With the development key in every request."""
    settings = settings.model_copy(update={"port": 0, **changed})
    sock = listen(settings)
    url = url_of(sock)
    async with (
        serving(store, settings, sock) as server,
        httpx.AsyncClient(base_url=url, headers=KEY, timeout=20) as client,
    ):
        yield Served(url, server, client)


async def submit(store: Store, *, org: str = ORG, **fields: Any) -> str:
    task = f"task_{random_id()}"
    submission = {"owner": USER, "session": "s1", "dialect": "shannon", "query": "why?", "mode": "simple"}
    await store.submit(events.Submission(id=task, org=org, submission=random_id(), **(submission | fields)))
    return task


class Attempt:
    """A worker's attempt at a task: counts its own events."""

    def __init__(self, store: Store, task: str, fence: int) -> None:
        self._store, self._task, self._fence, self._n = store, task, fence, 0

    async def say(self, event: events.AnyEvent) -> str:
        """The event's id."""
        self._n += 1
        return (await self._store.append(ORG, self._task, event, fence=self._fence, n=self._n)).id

    async def write(self, text: str) -> str:
        return await self.say(events.TextDelta(text=text, agent="final_output"))

    async def complete(self, result: str = "because") -> str:
        return await self.say(events.Completed(result=result))


async def started(store: Store, **fields: Any) -> tuple[str, Attempt]:
    task = await submit(store, **fields)
    (claimed,) = await store.claim(["default"], "w1", 1)
    assert claimed.task == task
    return task, Attempt(store, task, claimed.fence)


async def ended(store: Store, *words: str) -> str:
    """submitted, started, a delta for each word, completed."""
    task, attempt = await started(store)
    for word in words:
        await attempt.write(word)
    await attempt.complete()
    return task


async def take(source: EventSource) -> list[ServerSentEvent]:
    """All, until the stream ends."""
    return [event async for event in source.aiter_sse()]
