"""Fixtures for everybody: a real store in a temporary folder, one embedded server per test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.settings import Settings
from app.store import Store, open_store


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Short times, so that what takes seconds in production takes moments here."""
    return Settings(data=tmp_path / "data", lease_seconds=2, grace_seconds=2)


@pytest.fixture
async def store(settings: Settings) -> AsyncIterator[Store]:
    async with open_store(settings) as opened:
        yield opened
