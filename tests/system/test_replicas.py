"""A reader goes on at any replica: two API processes on one store, and clients that lose their connection anywhere.

The client reads as an EventSource does (HTML standard, §9.2): a frame counts when its blank line has come, and so does
its id; whatever stood behind it is forgotten when the connection ends. It can be cut at any byte of the answer.
"""

import asyncio
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from httptools import HttpResponseParser

from app import events, keys
from app.events import Entry
from app.settings import Settings
from app.store import Store, open_store
from tests.api.serving import ORG, Attempt, ended, started
from tests.system.conftest import KEY, Api, Process, lifetime
from tests.system.writers import task_of
from tests.waiting import wait_until

WRITERS = 200
READERS = 300
FRAMES_BETWEEN_ENDS = 1500
STREAMS = 1000
GRACE_SECONDS = 10.0
"""The default."""
MARGIN_SECONDS = 5.0
"""For a Python process to end after that, on a loaded machine."""
FILES = 4096
"""Each stream is one, on either side."""


# A client


class Frame(NamedTuple):
    event: str
    data: str
    id: str


class Answer:
    """One answer as it comes in, torn anywhere: its lines are taken one by one."""

    def __init__(self, reader: "Reader") -> None:
        self.bytes, self.status, self.whole = 0, 0, False
        self._reader, self._parser = reader, HttpResponseParser(self)
        self._text, self._fields, self._told = b"", dict[str, str](), False

    @property
    def torn(self) -> str:
        """Where it would be cut at this moment."""
        if not self.status:
            return "in the head" if self.bytes else "before the answer"
        if not self._fields and not self._text:
            return "between two frames" if self._told else "before the first frame"
        return "in an id" if self._text.startswith(b"id: ") else "in a frame"

    def feed(self, data: bytes) -> None:
        self.bytes += len(data)
        self._parser.feed_data(data)

    # What httptools calls.

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_message_complete(self) -> None:
        self.whole = True

    def on_body(self, data: bytes) -> None:
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            name, _, value = line.decode().partition(":")
            if name == "retry":
                self._reader.retries.append(int(value))
            elif name:
                self._fields[name] = value.removeprefix(" ")
            elif line:
                self._reader.comments += 1
            else:
                self._dispatch()

    def _dispatch(self) -> None:
        self._reader.cursor = self._fields.get("id", self._reader.cursor)
        if "data" in self._fields:
            self._reader.frames.append(Frame(*(self._fields.get(field, "") for field in Frame._fields)))
            self._told = True
        self._fields = {}


class Reader:
    """Of one task, over as many connections as it takes."""

    def __init__(self, task: str, *, cursor: str = "", types: str = "") -> None:
        self.task, self.cursor = task, cursor
        self._query = f"?types={types}" if types else ""
        self.frames: list[Frame] = []
        self.retries: list[int] = []
        self.comments = 0

    @property
    def ids(self) -> list[str]:
        """Of the entries."""
        return [frame.id for frame in self.frames if frame.id and frame.event not in {"gap", "done"}]

    @property
    def names(self) -> list[str]:
        return [frame.event for frame in self.frames]

    @property
    def done(self) -> bool:
        return self.told("done")

    def told(self, name: str) -> bool:
        return self.names[-1:] == [name]

    async def read(self, port: int, bytes_max: int = sys.maxsize) -> Answer:
        """One connection, until it ends or so many bytes have come; but after `done` until the body's end."""
        answer = Answer(self)
        with suppress(ConnectionError):
            source, sink = await asyncio.open_connection("127.0.0.1", port)
            try:
                head = [f"GET /api/v1/tasks/{self.task}/stream{self._query} HTTP/1.1", "Host: localhost"]
                head += [f"X-API-Key: {KEY}", "Accept: text/event-stream"]
                head += [f"Last-Event-ID: {self.cursor}"] if self.cursor else []
                sink.write("\r\n".join([*head, "", ""]).encode())
                left = bytes_max
                while not answer.whole and left and (data := await source.read(min(left, 65536))):
                    answer.feed(data)
                    left = 65536 if self.done else left - len(data)
            finally:
                sink.transport.abort()
        return answer

    async def follow(self, ports: Sequence[int], dice: random.Random, torn: Counter[str]) -> None:
        """Until `done`, over connections that are cut at random bytes, to any replica."""
        while True:
            cut = dice.choice((dice.randrange(600), dice.randrange(3000), dice.randrange(10_000)))
            answer = await self.read(dice.choice(ports), cut)
            assert answer.status in {0, 200}, answer.status
            if self.done:
                assert answer.whole, "the end is a clean one"
                return
            torn[answer.torn] += 1
            if not answer.bytes:
                await asyncio.sleep(0.01)  # that replica is down


async def tells(reader: Reader, count: int) -> None:
    await wait_until(lambda: len(reader.ids) >= count, f"the reader has {count} events")


@asynccontextmanager
async def reading(reader: Reader, port: int) -> AsyncIterator[None]:
    """With a connection that has begun."""
    comments = reader.comments
    task = asyncio.create_task(reader.read(port))
    try:
        await wait_until(lambda: reader.comments > comments or task.done(), "the stream begins")
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def log(store: Store, task: str) -> list[Entry]:
    """The server's own."""
    found: list[Entry] = []
    while page := await store.events(ORG, task, found[-1].id if found else ""):
        if not page.entries:
            break
        found += page.entries
    return found


async def ids(store: Store, task: str) -> list[str]:
    return [entry.id for entry in await log(store, task)]


def placed(id_: str) -> tuple[int, ...]:
    return tuple(map(int, id_.split("-")))


async def tells_all(store: Store, reader: Reader, why: str = "") -> None:
    """The reader has the server's log: no gap, no duplicate, and at last one `done`."""
    entries = await log(store, reader.task)
    assert reader.ids == [entry.id for entry in entries], why
    assert reader.names.count("gap") == 0, why
    assert reader.names.index("done") == len(reader.names) - 1, why
    assert reader.frames[-1].id == f"{entries[-1].id}.end", why
    seqs = {entry.id: entry.seq for entry in entries}
    for frame in reader.frames[:-1]:
        if not frame.id:  # the first of two that stand for one entry, and may come again
            assert frame.event == "workflow.cancelling", why
        elif not frame.event.startswith("workflow."):
            assert json.loads(frame.data)["seq"] == seqs[frame.id], why


# Two replicas


class Replica(Api):
    def __init__(self, name: str, folder: Path, grace_seconds: float) -> None:
        super().__init__(name, folder, TASKCAST_GRACE_SECONDS=str(grace_seconds))
        self._seconds_max = grace_seconds + MARGIN_SECONDS

    def _end(self, number: signal.Signals) -> int:
        """One that does not end fails its test, and does not stay."""
        assert self.running
        self.running.send_signal(number)
        try:
            return self.running.wait(self._seconds_max)
        except subprocess.TimeoutExpired:
            self.running.kill()
            raise


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[list[Replica]]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES if hard < 0 else min(hard, FILES), hard))
    running = contextmanager(lifetime)
    with running(Replica("one", folder, 3)) as one, running(Replica("two", folder, 3)) as two:
        yield [one, two]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def replicas(pair: list[Replica]) -> list[Replica]:
    """Both run, whatever the test before left."""
    for api in pair:
        if api.running is None or api.running.poll() is not None:
            api.start()
    return pair


@pytest.fixture
def ports(replicas: list[Replica]) -> list[int]:
    return [api.port for api in replicas]


@pytest.fixture
def settings(folder: Path) -> Settings:
    """The replicas' store, for the test to write to; with a lease that nobody needs to renew."""
    return Settings(data=folder / "data", lease_seconds=600)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> str:
    """Stands in the report of a test that failed."""
    made = str(random.getrandbits(32))
    request.node.add_report_section("setup", "seed", made)
    return made


async def next_turn(store: Store, task: str, number: int) -> Attempt:
    await store.append(ORG, task, events.Continued(query="and?", submission=f"turn-{task}-{number}"))
    (claimed,) = await store.claim(["default"], "w1", 1)
    assert claimed.task == task
    return Attempt(store, task, claimed.fence)


@pytest.mark.timeout(120)  # fifteen seconds, on a machine that does nothing else
async def test_readers_that_are_cut_anywhere_have_the_servers_log_whoever_is_killed(
    folder: Path, replicas: list[Replica], ports: list[int], store: Store, seed: str
) -> None:
    dice, torn = random.Random(seed), Counter[str]()
    command = [sys.executable, "-m", "tests.system.writers", str(folder / "data"), str(WRITERS), seed]
    tasks = [task_of(number) for number in range(WRITERS)]
    readers = [Reader(tasks[number % WRITERS]) for number in range(READERS)]
    ends = [(api, end) for api in replicas for end in (api.kill, api.stop)]
    dice.shuffle(ends)

    async def all_begun() -> bool:
        return all([await store.get(ORG, task) for task in tasks])

    def told(frames: int) -> bool:
        return sum(len(reader.frames) for reader in readers) >= frames

    writers = Process("writers", command, folder)
    writers.start()
    try:
        await wait_until(all_begun, "every writer has a task")
        async with asyncio.TaskGroup() as group:
            for number, reader in enumerate(readers):
                group.create_task(reader.follow(ports, random.Random(f"{seed}/{number}"), torn))
            for number, (api, end) in enumerate(ends, 1):
                await wait_until(partial(told, FRAMES_BETWEEN_ENDS * number), "the readers go on")
                await asyncio.to_thread(end)
                await asyncio.to_thread(api.start)
            await asyncio.to_thread(writers.stop)
    finally:
        if writers.running and writers.running.poll() is None:
            writers.kill()
    for reader in readers:
        await tells_all(store, reader, f"{reader.task}, {seed=}, {torn=}")
    assert torn.keys() == {
        *("before the answer", "in the head", "before the first frame"),
        *("in an id", "in a frame", "between two frames"),
    }


async def test_a_second_drop_before_a_first_event_loses_nothing(store: Store, ports: list[int]) -> None:
    task, attempt = await started(store)
    reader = Reader(task)
    async with reading(reader, ports[0]):
        await tells(reader, 2)
    cursor, met = reader.cursor, set[str]()
    for word in ("a", "b"):
        await attempt.write(word)
    for cut in range(0, 1000, 11):  # on either replica in turn, until one has told a whole event
        answer = await reader.read(ports[cut % 2], cut)
        if reader.cursor != cursor:
            break
        met.add(answer.torn)
    assert met == {"before the answer", "in the head", "before the first frame", "in an id", "in a frame"}
    await attempt.complete()
    await reader.read(ports[1])
    await tells_all(store, reader)


async def test_behind_the_end_of_a_task_each_replica_says_done_and_after_that_nothing(
    store: Store, ports: list[int]
) -> None:
    task = await ended(store, "a")
    last = (await ids(store, task))[-1]
    for port in ports:
        reader = Reader(task, cursor=last)
        assert (await reader.read(port)).whole
        assert reader.frames == [Frame("done", "[DONE]", f"{last}.end")]
        again = Reader(task, cursor=reader.cursor)
        assert (await again.read(port)).status == 204
        assert again.frames == []


async def test_a_replay_without_an_event_goes_live(store: Store, ports: list[int]) -> None:
    task, attempt = await started(store)
    reader = Reader(task, cursor=(await ids(store, task))[-1])
    for number, port in enumerate(ports * 2):
        async with reading(reader, port):
            assert len(reader.ids) == number
            await attempt.write(str(number))
            await tells(reader, number + 1)
    assert reader.ids == (await ids(store, task))[2:]


async def test_a_cursor_is_as_good_under_any_filter(store: Store, ports: list[int]) -> None:
    task, attempt = await started(store)
    for number in range(3):
        await attempt.write(str(number))
        await attempt.say(events.Noted(name="NOTED", payload={"number": number}))
    every = await ids(store, task)  # submitted, started, and three times a delta and a note
    await attempt.complete()
    for cursor in every:
        for types, wanted in (("LLM_PARTIAL", every[2::2]), ("NOTED", every[3::2]), ("ERROR_OCCURRED", [])):
            reader = Reader(task, cursor=cursor, types=types)
            await reader.read(ports[every.index(cursor) % 2])
            assert reader.ids == [id_ for id_ in wanted if every.index(id_) > every.index(cursor)]
            assert reader.done


async def test_a_filtered_reader_goes_on_behind_what_it_was_not_told(store: Store, ports: list[int]) -> None:
    task, attempt = await started(store)
    reader = Reader(task, types="LLM_PARTIAL")
    for number, port in enumerate(ports * 2):
        async with reading(reader, port):
            await attempt.say(events.Noted(name="NOTED"))
            await attempt.write(str(number))
            await tells(reader, number + 1)
            await attempt.say(events.Noted(name="NOTED"))
    assert reader.ids == [entry.id for entry in await log(store, task) if isinstance(entry.event, events.TextDelta)]


async def test_a_cursor_from_another_task_is_a_place_in_this_one(store: Store, ports: list[int]) -> None:
    (task, attempt), (other, others) = await started(store), await started(store)
    for number in range(3):
        await attempt.write(str(number))
        await others.write(str(number))
    await attempt.complete()
    every = await ids(store, task)
    for number, cursor in enumerate(await ids(store, other)):
        reader = Reader(task, cursor=cursor)
        await reader.read(ports[number % 2])
        assert reader.ids == [id_ for id_ in every if placed(id_) > placed(cursor)]
        assert len(reader.ids) < len(every)
        assert reader.names[len(reader.ids) :] == ["done"]


async def test_behind_a_later_place_of_another_task_nothing_is_missing(store: Store, ports: list[int]) -> None:
    (task, attempt), (_, others) = await started(store), await started(store)
    for number, port in enumerate(ports):
        reader = Reader(task, cursor=await others.write("a"))
        async with reading(reader, port):
            following = await attempt.write(str(number))
            await tells(reader, 1)
            assert (reader.ids, reader.cursor, len(reader.frames)) == ([following], following, 1)
    await attempt.complete()
    last = (await ids(store, task))[-1]
    for port in ports:
        reader = Reader(task, cursor=await others.write("a"))
        assert (await reader.read(port)).whole
        assert reader.frames == [Frame("done", "[DONE]", f"{last}.end")]


async def test_a_reader_under_whom_the_log_is_trimmed_sees_all_of_its_task(
    replicas: list[Replica], ports: list[int], settings: Settings
) -> None:
    async with open_store(settings.model_copy(update={"log_entries": 100})) as store:
        task, attempt = await started(store)
        others = [(await started(store))[1] for _ in range(10)]
        readers = [Reader(task), Reader(task)]
        stopped = replicas[0].running
        assert stopped
        async with reading(readers[0], ports[0]), reading(readers[1], ports[1]):
            await wait_until(lambda: all(len(reader.ids) == 2 for reader in readers), "both are live")
            os.kill(stopped.pid, signal.SIGSTOP)
            try:
                for number in range(5):
                    await attempt.write(str(number))
                    await asyncio.gather(*(burst(other) for other in others))
                name = keys.key(store.partitions.tag(ORG, task), "log")
                (first,) = await store.door.read("XRANGE", name, "-", "+", "COUNT", 1)
                assert placed(first[0].decode()) > placed((await ids(store, task))[-2]), "most of it is trimmed"
                assert len(readers[0].ids) == 2
            finally:
                os.kill(stopped.pid, signal.SIGCONT)
            await attempt.write("live")
            await wait_until(lambda: all(len(reader.ids) == 8 for reader in readers), "both have all of it")
            await attempt.complete()
            await wait_until(lambda: all(reader.done for reader in readers), "both are told the end")
        for reader in readers:
            await tells_all(store, reader)


async def burst(attempt: Attempt) -> None:
    for _ in range(40):
        await attempt.write("other")


async def test_the_end_of_an_earlier_turn_is_never_done(store: Store, ports: list[int], seed: str) -> None:
    task = await ended(store, "a")
    reader = Reader(task)
    await reader.read(ports[0])
    assert reader.done  # so far
    first_done = reader.frames.pop()
    await (await next_turn(store, task, 2)).complete()
    attempt = await next_turn(store, task, 3)
    fresh = Reader(task)
    async with reading(reader, ports[1]), reading(fresh, ports[0]), asyncio.TaskGroup() as group:
        many = [Reader(task) for _ in range(20)]
        for number, one in enumerate(many):
            group.create_task(one.follow(ports, random.Random(f"{seed}/{number}"), Counter()))
        await attempt.write("c")
        await wait_until(lambda: reader.ids == fresh.ids != [], "who saw it end, and who did not, are live")
        assert "done" not in reader.names + fresh.names
        await attempt.complete()
        await wait_until(lambda: reader.done and fresh.done, "the last turn's end is done")
    assert reader.frames[-1].id != first_done.id
    assert len([one for one in await log(store, task) if isinstance(one.event, events.Completed)]) == 3
    for one in (reader, fresh, *many):
        await tells_all(store, one, f"{seed=}")


async def test_readers_that_come_and_go_leave_no_connection_to_the_store_behind(store: Store, ports: list[int]) -> None:
    task, attempt = await started(store)

    async def connections() -> int:
        return int((await store.door.read("INFO", "clients"))["connected_clients"])

    async def nobody_reads() -> bool:
        return b" cmd=xread " not in await store.door.read("CLIENT", "LIST")

    await wait_until(nobody_reads, "those of the tests before have left")
    before, most = await connections(), 0
    for number in range(40):
        async with reading(Reader(task, cursor=await attempt.write("a")), ports[number % 2]):
            for _ in range(number % 4):
                await attempt.write("a")
        most = max(most, await connections())
    assert most <= before + 4  # a tail of each replica, and one that is just leaving
    await wait_until(nobody_reads, "no replica reads for nobody", seconds_max=4)  # its wait would take 5
    await attempt.complete()


async def test_a_replica_with_a_thousand_streams_stops_in_its_grace_time_and_nothing_is_lost(
    folder: Path, ports: list[int], store: Store
) -> None:
    attempts = [(await started(store)) for _ in range(20)]
    readers = [Reader(task) for task, _ in attempts for _ in range(STREAMS // len(attempts))]
    leaving = Replica("leaving", folder, GRACE_SECONDS)
    await asyncio.to_thread(leaving.start)
    try:
        answers = [asyncio.create_task(reader.read(leaving.port)) for reader in readers]
        await wait_until(lambda: all(len(reader.ids) == 2 for reader in readers), "all streams are open")
        end = asyncio.create_task(asyncio.to_thread(leaving.stop))
        for _, attempt in attempts[::2]:  # the others stay silent
            await attempt.write("while it stops")
        await end
    finally:
        if leaving.running and leaving.running.poll() is None:
            leaving.kill()
    for answer in await asyncio.gather(*answers):
        assert not answer.whole, "no stream ends cleanly before its task"
    assert all(reader.retries for reader in readers), "each is told when to come back"
    retries = {retry for reader in readers for retry in reader.retries}
    assert 2000 <= min(retries) <= max(retries) <= 5000
    assert len(retries) >= 100, "they come back spread out"
    for _, attempt in attempts:
        await attempt.complete()
    await asyncio.gather(*(reader.read(ports[number % 2]) for number, reader in enumerate(readers)))
    for reader in readers:
        await tells_all(store, reader)
