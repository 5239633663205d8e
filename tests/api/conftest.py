"""Clients of the application, without a server between: one per key, and that of the development key; and the real
server, once for each of its ways to stream.
"""

from collections.abc import AsyncIterator

import httpx
import pytest

from app import sse
from app.identity import DEVELOPMENT_KEY
from app.settings import Settings
from app.store import Store
from tests.api.asking import Connect, asking
from tests.api.serving import Served, served


@pytest.fixture
async def connect(store: Store, settings: Settings) -> AsyncIterator[Connect]:
    async with asking(store, settings) as connected:
        yield connected


@pytest.fixture
async def client(connect: Connect) -> httpx.AsyncClient:
    return await connect(key=DEVELOPMENT_KEY)


@pytest.fixture(params=["direct", "portable"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of frames to the reader: over a detached connection, or through sse-starlette, as on any other ASGI server."""
    if request.param == "portable":
        monkeypatch.setattr(sse, "wire_of", lambda _: None)
    return str(request.param)


@pytest.fixture
async def server(store: Store, settings: Settings, path: str) -> AsyncIterator[Served]:
    async with served(store, settings) as running:
        yield running
