"""Clients of the application without a server between, tasks that they submit, and attempts at them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx

from app.events import AnyEvent
from app.identity import DEVELOPMENT_ORG, Identities
from app.server import create_app
from app.settings import Settings
from app.store import Store
from app.streams import Streams
from tests.api.serving import Attempt

Connect = Callable[..., Awaitable[httpx.AsyncClient]]


@asynccontextmanager
async def asking(store: Store, settings: Settings) -> AsyncIterator[Connect]:
    """Gives a function that opens a client: with this key, with a new one for this user, or without any."""
    identities = Identities(store, settings)
    app = create_app(store, settings, identities=identities, streams=Streams(settings))
    async with AsyncExitStack() as stack:

        async def connect(user: str | None = None, *, org: str = DEVELOPMENT_ORG, key: str = "") -> httpx.AsyncClient:
            if user is not None:
                key = await identities.create(org, user, "test")
            client = httpx.AsyncClient(
                transport=httpx.ASGITransport(app),
                base_url="http://localhost",
                headers={"X-API-Key": key} if key else {},
            )
            return await stack.enter_async_context(client)

        yield connect


async def invoked(client: httpx.AsyncClient, agent: str = "writer", **body: Any) -> str:
    """A task for an agent, through xpander's API."""
    answer = await client.post(f"/v1/agents/{agent}/invoke/async", json={"input": {"text": "why?"}} | body)
    assert answer.status_code == 200, answer.text
    id_: str = answer.json()["id"]
    return id_


async def claimed(store: Store, task: str, queue: str = "default") -> Attempt:
    """An attempt at the first task in the queue, which must be that one."""
    (found,) = await store.claim([queue], "w", 1)
    assert found.task == task
    return Attempt(store, task, found.fence)


async def tell(attempt: Attempt, *told: AnyEvent) -> None:
    for event in told:
        await attempt.say(event)
