"""Fixtures for everybody: a real store in a temporary folder, one embedded server per test."""

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from app.store import Store, open_store

TEST_SECONDS_MAX = 55.0
"""Below pytest's own limit, whose signal leaves the loop in the middle: fixtures would then wait for ever."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that hangs fails as any other, so that what it started is stopped."""
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            own = item.get_closest_marker("timeout")
            item.obj = bounded(item.obj, own.args[0] - 5 if own else TEST_SECONDS_MAX)


def bounded(test: Callable[..., Coroutine[Any, Any, None]], seconds: float) -> Callable[..., Coroutine[Any, Any, None]]:
    @functools.wraps(test)
    async def within(*args: Any, **kwargs: Any) -> None:
        async with asyncio.timeout(seconds):
            await test(*args, **kwargs)

    return within


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
