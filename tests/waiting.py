"""Waiting in tests: for a named condition, never for a length of time."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable


async def wait_until(
    predicate: Callable[[], bool | Awaitable[bool]],
    description: str,
    *,
    seconds_max: float = 20,  # a loaded machine of two cores; nothing waits so long when all is well
) -> None:
    """Returns when the predicate holds; fails with the description of what never happened."""
    try:
        async with asyncio.timeout(seconds_max):
            while True:
                holds = predicate()
                if inspect.isawaitable(holds):
                    holds = await holds
                if holds:
                    return
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never happened in {seconds_max} s: {description}") from None
