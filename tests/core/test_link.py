"""A connection to the store as a machine without I/O: whose answer is whose, and what it holds on to."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from app.line import Link


class Writer:
    """As much of a stream's writer as a link needs."""

    def __init__(self) -> None:
        self.transport = self

    def set_protocol(self, link: Link) -> None:
        self.link = link

    def write(self, _: bytes) -> None:
        """The test answers."""

    def close(self) -> None:
        """Nothing is open."""


def linked() -> Link:
    return Link(cast("asyncio.StreamWriter", Writer()))


async def trip(link: Link, wanted: int, chunks: Sequence[bytes], told: list[Any] | None = None) -> list[Any]:
    under_way = asyncio.create_task(link.trip(b"?", wanted, (told if told is not None else []).append))
    await asyncio.sleep(0)
    for chunk in chunks:
        link.data_received(chunk)
    return await under_way


async def test_answers_are_told_as_they_come_however_they_are_cut() -> None:
    link = linked()
    told: list[Any] = []
    assert await trip(link, 3, [b":1\r\n$3\r\na", b"bc\r\n", b"-ERR no\r\n"], told) == told
    assert told[:2] == [1, b"abc"]
    assert str(told[2]) == "ERR no"
    assert await trip(link, 1, [b"+OK\r\n"]) == [b"OK"]
    assert not link.ended


@pytest.mark.parametrize("chunks", [[b":1\r\n+MORE\r\n"], [b":1\r\n", b"+MORE\r\n"], [b":1\r\n+MO"]])
async def test_an_answer_to_nothing_is_never_the_next_ones(chunks: list[bytes]) -> None:
    link = linked()
    assert await trip(link, 1, chunks) == [1]
    assert link.ended
    with pytest.raises(ConnectionResetError):
        await link.trip(b"?", 1, print)


async def test_what_is_no_answer_fails_the_trip() -> None:
    link = linked()
    with pytest.raises(Exception, match="Protocol error"):
        await trip(link, 1, [b"what?\r\n"])
    assert link.ended


async def test_whoever_waits_hears_of_the_end() -> None:
    link = linked()
    under_way = asyncio.create_task(link.trip(b"?", 1, print))
    await asyncio.sleep(0)
    link.eof_received()
    with pytest.raises(ConnectionResetError):
        await under_way


async def test_nothing_of_a_trip_is_held_when_it_is_over() -> None:
    """An idle process would keep its largest page."""
    link = linked()
    told: list[Any] = []
    answers = await trip(link, 1, [b"+large\r\n"], told)
    held = [*vars(link).values()]
    assert not any(one is answers or getattr(one, "__self__", None) is told for one in held)
