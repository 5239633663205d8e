"""The seam: replay, then live, with no gap and no duplicate, whatever happens in between."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from app import events, hub, keys
from app.errors import NotFound, Unavailable
from app.events import Entry, Submission, TextDelta
from app.log import Logged
from app.seam import Ended, Gap, Item, Reader
from app.settings import Settings
from app.store import Store, open_store
from app.task import apply
from tests.waiting import wait_until


async def running(store: Store, id_: str = "t", **more: Any) -> int:
    values: dict[str, Any] = {"id": id_, "org": "o", "query": "?", "submission": id_, "queue": id_} | more
    await store.submit(Submission(**values))
    (claimed,) = await store.claim([values["queue"]], "w", 1)
    return claimed.fence


async def write(store: Store, fence: int, numbers: range, id_: str = "t") -> None:
    for n in numbers:
        await store.append("o", id_, TextDelta(text=f"{n} "), fence=fence, n=n)


async def finish(store: Store, fence: int, n: int, id_: str = "t") -> None:
    await store.append("o", id_, events.Completed(result="x"), fence=fence, n=n)


@asynccontextmanager
async def reader(store: Store, after: str = "", id_: str = "t") -> AsyncIterator[list[Item]]:
    """Collects in the background; leaves when the stream ended or the block is done."""
    seen: list[Item] = []

    async def read() -> None:
        async with store.follow("o", id_, after) as subscription:
            async for items in subscription:
                seen.extend(items)

    task = asyncio.create_task(read())
    try:
        yield seen
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def ended(seen: list[Item]) -> Callable[[], bool]:
    return lambda: bool(seen) and isinstance(seen[-1], Ended)


def seqs(seen: list[Item]) -> list[int]:
    return [item.seq for item in seen if isinstance(item, Entry)]


async def test_history_then_live_then_the_end(store: Store) -> None:
    fence = await running(store)
    await write(store, fence, range(1, 11))
    async with reader(store) as seen:
        await wait_until(lambda: len(seqs(seen)) == 12, "history arrives")
        await write(store, fence, range(11, 21))
        await finish(store, fence, 21)
        await wait_until(ended(seen), "the end arrives")
    assert seqs(seen) == list(range(1, 24))
    assert seen[-1] == Ended(last_id=seen[-2].id, seq=23)  # type: ignore[union-attr]


async def test_readers_that_join_at_every_moment_of_a_busy_task_see_the_same_log(store: Store) -> None:
    fence = await running(store)
    logs: list[list[int]] = []

    async def join(after: str) -> None:
        async with store.follow("o", "t", after) as subscription:
            seen: list[Item] = []
            async for items in subscription:
                seen += items
            logs.append(seqs(seen))

    joined: list[asyncio.Task[None]] = []
    for n in range(1, 200):
        await store.append("o", "t", TextDelta(text="x"), fence=fence, n=n)
        joined.append(asyncio.create_task(join("" if n % 2 else f"seq:{n}")))
    await finish(store, fence, 200)
    await asyncio.gather(*joined)
    assert len(logs) == 199
    for log in logs:
        assert log == list(range(log[0], 203))
    assert store.hub.subscribers == 0


async def test_nobody_listening_means_no_tail(store: Store) -> None:
    await running(store)

    async def blocked() -> int:
        return int((await store.door.read("INFO", "clients"))["blocked_clients"])

    async def one() -> bool:
        return await blocked() == 1

    async def none() -> bool:
        return await blocked() == 0

    async with reader(store), reader(store):
        await wait_until(one, "one tail for both readers")
    await wait_until(none, "the tail ends with its last reader")


async def test_an_ended_task_is_replayed_and_ends(store: Store) -> None:
    fence = await running(store)
    await finish(store, fence, 1)
    async with reader(store) as seen:
        await wait_until(ended(seen), "the end arrives")
    assert seqs(seen) == [1, 2, 3]
    task = await store.get("o", "t")
    assert task is not None
    async with reader(store, task.last_event_id) as seen:
        await wait_until(ended(seen), "a reader at the end is told so")
    assert seqs(seen) == []


async def test_the_end_of_an_earlier_turn_is_not_the_end(store: Store) -> None:
    fence = await running(store)
    await finish(store, fence, 1)
    await store.append("o", "t", events.Continued(query="more", submission="2"))
    async with reader(store) as seen:
        await wait_until(lambda: seqs(seen) == [1, 2, 3, 4], "both turns arrive")
        (claimed,) = await store.claim(["t"], "w", 1)
        await finish(store, claimed.fence, 1)
        await wait_until(ended(seen), "the second turn ends")
    assert seqs(seen) == [1, 2, 3, 4, 5, 6]
    assert sum(isinstance(item, Ended) for item in seen) == 1


async def test_a_trimmed_cursor_gets_the_base_and_goes_on_after_it(tmp_path: Path) -> None:
    async with open_store(Settings(data=tmp_path / "d", events_per_mark=20)) as store:
        fence = await running(store)
        await write(store, fence, range(1, 100))
        await finish(store, fence, 100)
        async with reader(store, "seq:3") as seen:
            await wait_until(ended(seen), "the end arrives")
        gap = seen[0]
        assert isinstance(gap, Gap)
        assert gap.snapshot
        assert (gap.reason, gap.latest) == ("trimmed", 102)
        assert int(gap.snapshot.fields["last_seq"]) == gap.earliest - 1
        assert seqs(seen) == list(range(gap.earliest, 103))
        folded = gap.snapshot
        for item in seen[1:-1]:
            assert isinstance(item, Entry)
            folded = apply(folded, item)
        assert folded == await store.snapshots.snapshot("o", "t")


async def test_a_cursor_from_the_future_gets_the_present_and_goes_on(store: Store) -> None:
    fence = await running(store)
    async with reader(store, "9999999999999-0") as seen:
        await wait_until(lambda: bool(seen), "the gap is told")
        await write(store, fence, range(1, 3))
        await wait_until(lambda: seqs(seen) == [3, 4], "live entries follow")
    assert isinstance(seen[0], Gap)
    assert seen[0].reason == "ahead"


async def test_an_unknown_task_is_said_at_once(store: Store) -> None:
    with pytest.raises(NotFound):
        async with store.follow("o", "nobody", ""):
            pass
    assert store.hub.subscribers == 0


async def test_deleting_a_followed_task_ends_its_stream(store: Store) -> None:
    await running(store)
    async with reader(store) as seen:
        await wait_until(lambda: len(seen) == 2, "history arrives")
        await store.delete("o", "t")
        await wait_until(ended(seen), "the stream ends")
    assert seen[-1] == Ended(last_id="", seq=2)


async def test_a_reader_slower_than_the_writer_loses_nothing_and_holds_little(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.Pull, "BACKLOG_BYTES", 200)
    fence = await running(store)
    seen: list[int] = []
    go_on = asyncio.Event()

    async def read() -> None:
        async with store.follow("o", "t", "") as subscription:
            async for items in subscription:
                seen.extend(seqs(items))
                if 3 in seen:
                    await go_on.wait()
                assert subscription._bytes <= 200 + 100

    task = asyncio.create_task(read())
    await wait_until(lambda: seen == [1, 2], "history arrives")
    await write(store, fence, range(1, 50))
    await finish(store, fence, 50)
    go_on.set()
    await task
    assert seen == list(range(1, 53))


async def test_a_hole_in_the_partitions_log_sends_readers_back_to_the_store(store: Store) -> None:
    fence = await running(store)
    (tag,) = store.partitions.tags
    async with reader(store) as seen:
        await wait_until(lambda: len(seen) == 2, "history arrives")
        # What a fail-over or a trim under a slow tail looks like: counted, but not in the log that the tail reads.
        await store.door.call("HINCRBY", keys.key(tag, "count"), "n", 1)
        await write(store, fence, range(1, 4))
        await finish(store, fence, 4)
        await wait_until(ended(seen), "the end arrives")
    assert seqs(seen) == list(range(1, 7))


async def test_a_restarted_store_is_followed_again(store: Store, settings: Settings) -> None:
    fence = await running(store)
    async with reader(store) as seen:
        await wait_until(lambda: len(seen) == 2, "history arrives")
        await write(store, fence, range(1, 5))
        await store.door.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await write(store, fence, range(5, 10))
        await finish(store, fence, 10)
        await wait_until(ended(seen), "the end arrives")
    assert seqs(seen) == list(range(1, 13))


async def test_a_reader_who_comes_while_the_store_is_away_is_told_so(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await running(store)

    async def away(_: str) -> tuple[str, int]:
        raise Unavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(store.log, "end", away)
        with pytest.raises(Unavailable):
            async with store.follow("o", "t", ""):
                pass
    assert store.hub.subscribers == 0
    async with reader(store) as seen:
        await wait_until(lambda: len(seen) == 2, "history arrives, now that it is back")


async def test_two_who_ask_in_the_same_moment_are_both_served(store: Store) -> None:
    """The second asks in the tick in which the first one's replay has come to its end."""
    await running(store)
    served: list[str] = []

    class Asking:
        def __init__(self, name: str, then: Callable[[], object]) -> None:
            self.reader: Reader = store.hub.one("o", "t", "")
            self.name, self.then = name, then

        def page(self, _: Sequence[Item], __: dict[object, bytes]) -> None:
            served.append(self.name)
            asyncio.get_running_loop().call_soon(self.then)

        def take(self, _: Logged) -> None: ...
        def give(self, _: Sequence[Item]) -> None: ...
        def behind(self) -> None: ...
        def failed(self, error: Exception) -> None:
            raise error

    second = Asking("second", lambda: None)
    first = Asking("first", lambda: store.hub.ask(second))
    store.hub.ask(first)
    await wait_until(lambda: served == ["first", "second"], "both are served")


async def test_a_reader_whose_sink_fails_is_told_and_the_others_go_on(store: Store) -> None:
    fence = await running(store)
    async with store.follow("o", "t", "") as broken, reader(store) as seen:
        pages = aiter(broken)
        await anext(pages)
        waiting = asyncio.ensure_future(anext(pages))
        await wait_until(lambda: len(seen) == 2 and broken.reader.live, "both are live")
        broken.take = lambda _: 1 / 0  # type: ignore[assignment, method-assign]
        await write(store, fence, range(1, 3))
        with pytest.raises(ZeroDivisionError):
            await waiting
        await wait_until(lambda: seqs(seen) == [1, 2, 3, 4], "the other one has all")


async def test_a_connection_that_the_store_closed_while_it_idled_is_made_again(store: Store) -> None:
    await running(store)
    async with store.door.blocking() as other:
        await other.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await wait_until(lambda: store.door._fast._line.ended, "the connection's end has arrived")
    await store.delete("o", "t")  # not repeatable: sent once, on a connection that works


async def test_a_blocking_connection_that_the_store_closed_between_two_reads_says_so(store: Store) -> None:
    """A tail must hear of it: the store may have lost entries that this connection had given."""
    async with store.door.blocking() as line:
        id_ = await line.ask("CLIENT", "ID")
        await store.door.call("CLIENT", "KILL", "ID", id_)
        await wait_until(lambda: line.ended, "the connection's end has arrived")
        with pytest.raises(Unavailable):
            await line.ask("PING")


async def test_an_answer_that_does_not_come_is_waited_for_so_long_and_the_next_one_is_on_a_new_connection(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.line.TIMEOUT_SECONDS", 0.2)
    async with store.door.blocking() as line:
        before = await line.ask("CLIENT", "ID")
        with pytest.raises(Unavailable, match="No answer"):
            await line.ask("BLPOP", "nothing", 0)
        assert await line.ask("CLIENT", "ID") != before


async def test_a_connection_on_which_the_store_says_what_nobody_asked_is_not_used_again(store: Store) -> None:
    async with store.door.blocking() as line:
        await line.ask("MONITOR")
        await store.door.call("PING")
        await wait_until(lambda: line.ended, "something has come")
        with pytest.raises(Unavailable):
            await line.ask("PING")
        assert await line.ask("PING") == b"PONG"
