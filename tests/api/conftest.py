"""Clients of the application, without a server between: one per key, and that of the development key."""

from collections.abc import AsyncIterator

import httpx
import pytest

from app.identity import DEVELOPMENT_KEY
from app.settings import Settings
from app.store import Store
from tests.api.asking import Connect, asking


@pytest.fixture
async def connect(store: Store, settings: Settings) -> AsyncIterator[Connect]:
    async with asking(store, settings) as connected:
        yield connected


@pytest.fixture
async def client(connect: Connect) -> httpx.AsyncClient:
    return await connect(key=DEVELOPMENT_KEY)
