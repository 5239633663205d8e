"""The seam as a machine without I/O: whatever the interleaving of writers, tail and pages, nothing is lost or doubled."""

from collections.abc import Coroutine, Generator, Sequence
from types import coroutine
from typing import Any

import msgspec
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from msgspec.structs import replace

from app import events
from app.errors import Gone, NotFound
from app.events import EVENT_BYTES_MAX, AnyEvent, Entry, Submission
from app.log import Logged, LogPage, Page, logged
from app.seam import (
    PAGE_BYTES,
    Answer,
    Began,
    Ended,
    Gap,
    Item,
    ManyReader,
    Placed,
    Reached,
    Reader,
    Selection,
    State,
    TaskReader,
    Want,
    WantLog,
    WantPage,
    WantSnapshot,
    WantState,
    order,
)
from app.task import COMPLETED, EMPTY, GONE, NEW, QUEUED, RUNNING, TERMINAL, Snapshot, Status, apply

ORG = "o"
TASKS = 4
"""Task i is of owner i % 2; the last one is of another organisation, and has the first one's id."""
MOSTLY = (0, 0, 0, 0, 1, 1, 2, 3)
"""Which task something happens to."""
WORDS = ["wait", *("say", "say", "say", "start", "end", "delete"), *("offer", "offer", "offer", "jump", "break")]
WORDS += ["ask", "read", "page", "page", "page", "page", "cut", "full", "keep", "beat"]
OPS = st.lists(st.tuples(st.sampled_from(WORDS), st.integers(0, 15)), min_size=50, max_size=50)


class Task:
    """What the store knows of it."""

    def __init__(self, number: int, partition: int) -> None:
        self.org = "other" if number == TASKS - 1 else ORG
        self.id, self.partition = (f"t{number}", partition) if self.org == ORG else ("t0", 0)
        self.owner = f"u{number % 2}"
        self.status, self.seq, self.life = NEW, 0, 0
        self.entries: list[Logged] = []
        self.states: list[Snapshot] = []
        """After each of them."""
        self.base: Snapshot | None = None

    @property
    def there(self) -> bool:
        return self.status not in {NEW, GONE}

    @property
    def base_seq(self) -> int:
        return int(self.base.fields["last_seq"]) if self.base else 0

    def snapshot(self) -> Snapshot:
        return self.states[-1]


class World:
    """The store, as its scripts answer: partition logs with dense counters, and the tasks that they make."""

    def __init__(self, partitions: int, *, shared: bool = False) -> None:
        """`shared`: another reader folds each entry before."""
        self.shared = shared
        self.logs: list[list[Logged]] = [[] for _ in range(partitions)]
        self.trimmed = [0] * partitions
        self.tasks = [Task(number, number % partitions) for number in range(TASKS)]
        self.lives: dict[Logged, tuple[str, str, int]] = {}
        self.folds: dict[Logged, Snapshot] = {}
        """The state after each entry."""
        self.dead: set[tuple[str, str, int]] = set()

    def append(self, task: Task, event: AnyEvent, after: Status) -> None:
        log = self.logs[task.partition]
        if not task.there:
            task.life += 1
        task.seq += 1
        n = len(log) + 1
        before = task.status if task.there else NEW
        place = [n, task.org, task.id, task.owner, "", "", "", before, after, task.seq]
        header = msgspec.json.encode([*place, 0, 0, events.tag(event), 0, 0, 0, "default"])
        # Two in each millisecond.
        one = logged(b"%d-%d" % (n // 2 + 1, n % 2), [b"head", header, b"event", events.encode(event)])
        log.append(one)
        self.lives[one] = (task.org, task.id, task.life)
        task.status = after
        # Not of `one`, which is for readers.
        state = task.snapshot() if task.states else EMPTY
        self.folds[one] = fold = apply(state, read(one))
        if self.shared and after is not GONE:
            one.fold(state)
        if after is GONE:
            task.entries, task.states, task.base = [], [], None
            self.dead.add(self.lives[one])
        else:
            assert fold.status is after
            task.entries.append(one)
            task.states.append(fold)

    def say(self, task: Task, word: str) -> None:
        if not task.there:
            submission = Submission(id=task.id, org=task.org, submission="s")
            self.append(task, events.Submitted(task=submission), QUEUED)
        elif word == "delete":
            self.append(task, events.Deleted(), GONE)
        elif task.status in TERMINAL:
            self.append(task, events.Continued(submission="s"), QUEUED)
        elif word == "end":
            self.append(task, events.Completed(), COMPLETED)
        elif word == "start" and task.status is QUEUED:
            self.append(task, events.Started(worker="w"), RUNNING)
        else:
            self.append(task, events.Noted(name="X"), task.status)

    def cut(self, task: Task, share: int) -> None:
        """Trims the task's history, or the partition's log."""
        log = self.logs[task.partition]
        if share % 2 and log:
            self.trimmed[task.partition] = max(self.trimmed[task.partition], (len(log) - 1) * share // 15)
        elif len(task.entries) > 1:
            task.base = max(task.base or task.states[0], task.states[-2], key=_seq)

    def number(self, partition: int, id_: str) -> int:
        return next((one.number for one in self.logs[partition] if one.id == id_), 0)

    def reading(self, want: Want) -> Generator[None, None, Answer]:
        """The answer; what is read in several steps pauses between them."""
        match want:
            case WantPage():
                return self._page(want)
            case WantSnapshot():
                task = self._task(want.task)
                return (task.base if want.base else task.snapshot()) if task.there else None
            case WantLog():
                return self._log_page(want)
            case WantState(selection=selection):
                ends = [(log[-1].id, log[-1].number) if log else ("0-0", 0) for log in self.logs]
                yield
                found = [
                    task
                    for task in self.tasks
                    if task.org == selection.org
                    and (task.id in selection.tasks if selection.tasks else task.status in selection.open_statuses)
                    and (not selection.owners or task.owner in selection.owners)
                ]
                yield
                there = [task for task in found if task.there]
                statuses = {task.id: task.status for task in there}
                return State(ends, statuses, [task.snapshot() for task in there], more=False)

    def _task(self, id_: str) -> Task:
        return next(task for task in self.tasks if (task.org, task.id) == (ORG, id_))

    def _page(self, want: WantPage) -> Page | None:
        """As read.lua."""
        task = self._task(want.task)
        if not task.there:
            return None
        after, gap = want.after, ""
        log, last, base = self._kept(task.partition), task.entries[-1], task.base_seq
        kept = [one for one in task.entries if one.seq > base]
        if after.startswith("seq:"):
            seq = int(after.removeprefix("seq:"))
            gap = "ahead" if seq > last.seq else "trimmed" if seq < base else ""
            kept = [one for one in kept if one.seq > seq]
        elif after:
            known = {one.id: one for one in log}
            if order(last.id) < order(after):
                gap = "" if after in known and known[after] not in task.entries else "ahead"
            elif task.base and order(after) < order(task.base.fields["last_event_id"]):
                gap = "trimmed"
            elif want.check and after not in {*known, *(one.id for one in task.entries)}:
                gap = "" if kept and order(after) < order(kept[0].id) else "unknown"
            kept = [one for one in kept if order(one.id) > order(after)]
        elif base:
            gap = "trimmed"
        entries = [] if gap else [read(one) for one in kept[: self._page_size(want.limit)]]
        return Page(status=task.status, last_seq=last.seq, last_id=last.id, base_seq=base, gap=gap, entries=entries)

    def _log_page(self, want: WantLog) -> LogPage:
        """As replay.lua."""
        p = int(want.tag)
        log, at = self._kept(p), self.number(p, want.after)
        gap = ""
        if self.logs[p] and order(want.after) > order(self.logs[p][-1].id):
            gap = "ahead"
        elif log and order(want.after) < order(log[0].id):
            gap = "trimmed" if log[0].number > 1 else ""
        elif not at and want.after != "0-0" and want.check:
            gap = "unknown"
        looked = [] if gap else [one for one in log if order(one.id) > order(want.after)][: self._page_size(200)]
        last = looked[-1] if looked else None
        entries = [one for one in looked if one.org == want.org and (one.gone or self.lives[one] not in self.dead)]
        return LogPage(
            gap=gap,
            after=last.id if last else want.after,
            number=last.number if last else at,
            scanned=len(looked),
            entries=entries,
        )

    def _kept(self, partition: int) -> list[Logged]:
        return self.logs[partition][self.trimmed[partition] :]

    page_size = 3

    def _page_size(self, limit: int) -> int:
        return min(limit, self.page_size)


def _seq(snapshot: Snapshot) -> int:
    return int(snapshot.fields["last_seq"])


def read(one: Logged) -> Entry:
    """As the task's own stream has it: nobody has folded there."""
    return replace(one.entry, after=None)


@coroutine
def fetch(want: Want) -> Generator[Want, Answer, Answer]:
    """Leaves the answer to who drives."""
    return (yield want)


class Run:
    """A reader in a world: the tails that offer to it, the one page on its way, and what it gave."""

    def __init__(self, world: World, reader: Reader, lag: int) -> None:
        self.world, self.reader = world, reader
        self.got: list[Item] = []
        self.kept, self.mark = 0, reader.mark()
        self.room = -1
        """Calls after which the sink drops what was not kept, and goes back; -1: it does not."""
        self.tails = [max(0, len(log) - lag) for log in world.logs]
        self.jumped = [""] * len(world.logs)
        self.over = False
        self.beginning: Coroutine[Want, Answer, list[Item]] | None = reader.begin(fetch)
        self.reading: Generator[None, None, Answer] | None = None
        self.answer: tuple[Answer] | None = None
        self._ask(self._send(None))

    # As a sink

    def take(self, one: Logged) -> None:
        self.give([one.entry])

    def give(self, items: Sequence[Item]) -> None:
        if self.room == 0:
            self.room = -1
            del self.got[self.kept :]
            self.reader.rewind(self.mark)
        else:
            self.room = max(self.room - 1, -1)
            self.got += items

    def behind(self) -> None:
        assert not self.reader.live

    def failed(self, error: Exception) -> None:
        raise error

    # What happens

    def play(self, ops: Sequence[tuple[str, int]]) -> None:
        for word, argument in ops:
            p = argument % len(self.tails)
            match word:
                case "offer":
                    for _ in range(1 if argument % 2 else len(self.world.logs[p])):
                        self.offer(p)
                case "jump" if self.tails[p] < len(self.world.logs[p]):
                    self.tails[p] += 1
                    self.jumped[p] = self.jumped[p] or ("told" if argument % 2 else "untold")
                case "break":
                    self.members()[p].lost()
                case "ask":
                    self._ask(None if self.reading or self.beginning or self.over else self.reader.want())
                case "read":
                    self.read()
                case "page":
                    self.play([("ask", 0), ("read", 0), ("read", 0), ("read", 0)])
                    self.arrive()
                case "cut":
                    self.world.cut(self.world.tasks[MOSTLY[argument % 8]], argument)
                case "full":
                    self.room = argument % 3
                case "keep":
                    self.keep()
                case "beat" if isinstance(self.reader, ManyReader) and not (
                    self.beginning or self.over or self.reader.ended
                ):
                    self.got += self.reader.reached()
                    self.keep()
                case "say" | "start" | "end" | "delete":
                    self.world.say(self.world.tasks[MOSTLY[argument % 8]], word)
                case _:
                    pass  # nothing to be done now

    def members(self) -> Sequence[Any]:
        return [self.reader] if isinstance(self.reader, TaskReader) else self.reader.strands

    def offer(self, p: int) -> None:
        if self.tails[p] < len(self.world.logs[p]) and not self.over:
            one = self.world.logs[p][self.tails[p]]
            self.tails[p] += 1
            if self.jumped[p] == "told":
                self.members()[p].lost()
                self.jumped[p] = ""
            reader = self.reader
            if not reader.ended and (
                isinstance(reader, ManyReader) or (one.org, one.task) == (reader.org, reader.task)
            ):
                self.members()[p].offer(one)

    def _ask(self, want: Want | None) -> None:
        if want is not None:
            self.reading, self.answer = self.world.reading(want), None

    def read(self) -> None:
        """One step of it."""
        if self.reading and not self.answer:
            try:
                next(self.reading)
            except StopIteration as done:
                self.answer = (done.value,)

    def arrive(self) -> None:
        if self.answer:
            (answer,), self.reading, self.answer = self.answer, None, None
            try:
                if self.beginning:
                    self._ask(self._send(answer))
                else:
                    self.got += self.reader.arrived(answer)
                    self.keep()
            except (Gone, NotFound):
                self.over = True

    def _send(self, answer: Answer) -> Want | None:
        assert self.beginning
        try:
            return self.beginning.send(answer)
        except StopIteration as begun:
            self.beginning = None
            self.got += begun.value
            self.reader.sink = self
            self.keep()
            return None

    def keep(self) -> None:
        if not self.beginning:
            self.kept, self.mark = len(self.got), self.reader.mark()

    def settle(self) -> None:
        """Everything is offered, and every wish is answered."""
        for p, how in enumerate(self.jumped):
            if how:  # the next entry shows it
                self.world.say(self.world.tasks[p], "say")
        for _ in range(300):
            for p in range(len(self.tails)):
                self.offer(p)
            offered = all(tail == len(log) for tail, log in zip(self.tails, self.world.logs, strict=True))
            if self.over or (offered and self.reading is None and self.reader.want() is None):
                return
            self.play([("page", 0)])
        raise AssertionError("it never settles")


NOW = [("page", 0), ("page", 0), ("page", 0)]
"""It is live then."""
OFFERED = [("page", 0), ("page", 0), ("ask", 0), ("read", 0), ("say", 0), ("offer", 0), ("page", 0)]
"""An entry is offered while an empty page is on its way."""
LOST = [
    ("page", 0),
    ("page", 0),
    ("ask", 0),
    ("read", 0),
    ("say", 0),
    ("jump", 1),
    ("say", 4),
    ("offer", 0),
    ("page", 0),
]
"""The tail loses an entry meanwhile."""
FULL = [*NOW, ("full", 1), ("end", 0), ("end", 4), ("offer", 0)]
"""There is no room for the end."""
OTHERS = [*NOW, ("end", 0), ("offer", 0), ("say", 7), ("end", 4), ("offer", 0)]
"""Another organisation uses the same id."""
DELETED = [("end", 4), ("page", 0), ("delete", 0)]
"""Between the state and the first page."""
REUSED = [("read", 0), ("delete", 0), ("say", 0), *NOW]
"""Between the ends of the logs and the state, and its id is used again."""
ONE: dict[str, Any] = {"history": [], "place": -1, "by_seq": False, "snapshot": False, "strict": False, "lag": 0}
MANY: dict[str, Any] = {"partitions": 1, "history": [], "places": None, "strict": False, "lag": 0}
ALL = Selection(org=ORG, owners=frozenset({"", "u0", "u1"}))
NAMED = Selection(org=ORG, tasks=frozenset({"t0", "t1"}))
HISTORY = st.lists(
    st.tuples(st.sampled_from(["say", "say", "say", "start", "end", "delete", "cut"]), st.integers(0, 15))
)
LAG = st.integers(0, 5)


def world_of(partitions: int, history: Sequence[tuple[str, int]], *, shared: bool = False) -> World:
    world = World(partitions, shared=shared)
    for word, number in [("say", 0), ("say", 4), *history]:
        if word == "cut":
            world.cut(world.tasks[MOSTLY[number % 8]], number)
        else:
            world.say(world.tasks[MOSTLY[number % 8]], word)
    return world


@hypothesis_settings(max_examples=600, deadline=None)
@given(
    history=HISTORY,
    place=st.integers(-1, 20),
    by_seq=st.booleans(),
    snapshot=st.booleans(),
    strict=st.booleans(),
    lag=LAG,
    ops=OPS,
)
@example(**ONE, ops=OFFERED)
@example(**ONE, ops=LOST)
@example(**ONE, ops=FULL)
def test_a_reader_of_one_task_gets_its_log_whatever_happens(
    history: list[tuple[str, int]],
    place: int,
    by_seq: bool,
    snapshot: bool,
    strict: bool,
    lag: int,
    ops: list[tuple[str, int]],
) -> None:
    world = world_of(1, history)
    (log,), task = world.logs, world.tasks[0]
    own = [one for one in log if one in task.entries]
    after = "" if place < 0 else f"seq:{place}" if by_seq else log[place % len(log)].id
    at = place if by_seq else sum(order(one.id) <= order(after) for one in own)
    if own and not by_seq:
        at += own[0].seq - 1
    reader = TaskReader(ORG, task.id, after, snapshot=snapshot and not after, strict=strict)
    run = Run(world, reader, lag)
    run.play(ops)
    run.settle()
    told(run, task, max(at, 0))


def told(run: Run, task: Task, at: int) -> None:
    """Everything after `at`, in order, once; and all of it, unless the reader may not have that."""
    log = [one for one in run.world.logs[0] if (one.org, one.task) == (task.org, task.id)]
    given_any = False
    for i, item in enumerate(run.got):
        match item:
            case Entry():
                # A task deleted before its first page, and its id used again, is another one from its start.
                assert item.seq == at + 1 or (isinstance(item.event, events.Submitted) and not given_any)
                assert item == read(log[item.seq - 1])
                at = item.seq
            case Gap(snapshot=Snapshot() as state) | Began(snapshot=state):
                assert not given_any or _seq(state) > at
                at = _seq(state)
            case Ended():
                assert i == len(run.got) - 1
                assert run.reader.ended
                if item.last_id:
                    assert (item.seq, item.last_id) == (at, log[at - 1].id)
                    assert log[at - 1].ends
                else:
                    assert any(one.gone for one in log[at if given_any else 0 :])
            case _:
                raise AssertionError(f"a reader of one task gave {item}")
        given_any = True
    if not run.over and not run.reader.ended:
        assert run.reader.want() is None
        assert at == task.seq
    assert not run.reader.ended or isinstance(run.got[-1], Ended)


AGAIN = [*NOW, ("say", 0), ("offer", 1), ("full", 0), ("say", 4), ("offer", 1)]
"""There is no room for an entry, and all of it is folded again."""
CUT = [*AGAIN, ("say", 0), ("cut", 0), *NOW]
"""Meanwhile what was given already is trimmed."""
BORN = [*AGAIN, ("delete", 0), ("say", 0), *NOW]
"""Meanwhile the task is deleted, and its id used again."""
FOLD: dict[str, Any] = {"history": [("say", 0)] * 3, "since": 3, "lag": 0}


@hypothesis_settings(max_examples=600, deadline=None)
@given(history=HISTORY, since=st.integers(0, 20), lag=LAG, ops=OPS, shared=st.booleans())
@example(**FOLD, ops=OFFERED, shared=False)
@example(**FOLD, ops=LOST, shared=True)
@example(**FOLD, ops=FULL, shared=False)
@example(**FOLD, ops=AGAIN, shared=False)
@example(**FOLD, ops=CUT, shared=True)
@example(**FOLD, ops=BORN, shared=False)
@example(**FOLD | {"history": [*FOLD["history"], ("cut", 0)]}, ops=NOW, shared=False)
def test_a_reader_that_folds_gets_each_entry_with_the_state_after_it_whatever_happens(
    history: list[tuple[str, int]], since: int, lag: int, ops: list[tuple[str, int]], *, shared: bool
) -> None:
    world = world_of(1, history, shared=shared)
    run = Run(world, TaskReader(ORG, "t0", "", folded_from=since), lag)
    run.play(ops)
    run.settle()
    told_folded(run, since)


def told_folded(run: Run, since: int) -> None:
    """Each entry from the number `since` on until the next turn, in order, once, with its own state; what is missing was
    trimmed.
    """
    task = run.world.tasks[0]
    log = [one for one in run.world.logs[0] if (one.org, one.task) == (task.org, task.id)]
    born = [one.seq for one in log if isinstance(one.entry.event, events.Submitted)]
    turns = {one.seq for one in log if isinstance(one.entry.event, events.Continued) and one.seq > since}
    at, life = since - 1, -1
    for i, item in enumerate(run.got):
        match item:
            case Entry():
                one = log[item.seq - 1]
                assert item == replace(read(one), after=run.world.folds[one].fields)
                if life < 0:  # the first that it gives: of a task that was not there before, perhaps the first of all
                    assert item.seq == max(since, at + 1) or (item.seq in born and item.seq > at)
                    life = run.world.lives[one][2]
                else:
                    assert item.seq == at + 1
                assert run.world.lives[one][2] == life
                assert item.seq not in turns
                at = item.seq
            case Gap(snapshot=Snapshot() as state):
                one = log[_seq(state) - 1]
                assert item.reason == "trimmed"
                assert state == run.world.folds[one]
                assert _seq(state) > at
                assert life in {-1, run.world.lives[one][2]}
                at, life = _seq(state), run.world.lives[one][2]
            case Ended():
                assert i == len(run.got) - 1
                if item.last_id:
                    assert log[item.seq - 1].id == item.last_id
                    assert log[item.seq - 1].ends
                    assert at == max(item.seq, since - 1)
                else:
                    passed = isinstance(run.got[i - 1], Gap) and any(seq <= at for seq in turns)
                    assert at + 1 in turns or passed or any(one.gone for one in log)
            case _:
                raise AssertionError(f"a reader that folds gave {item}")
    if not run.over and not run.reader.ended:
        assert run.reader.want() is None
        assert at == max(task.seq, since - 1)
        assert life in {-1, task.life}
    assert not run.reader.ended or isinstance(run.got[-1], Ended)


def test_a_folding_reader_asks_for_pages_whose_states_stay_small() -> None:
    reader = TaskReader(ORG, "t0", "", folded_from=1)
    first = reader.want()
    assert isinstance(first, WantPage)
    assert 1 <= first.limit * EVENT_BYTES_MAX <= PAGE_BYTES
    submitted = events.Submitted(task=Submission(id="t0", org=ORG, submission="s", query="x" * 200_000))
    entry = Entry(id="1-0", task="t0", seq=1, at=1, fence=0, attempt=0, n=0, event=submitted, size=1)
    reader.arrived(Page(status=QUEUED, last_seq=900, last_id="9-0", base_seq=0, gap="", entries=[entry]))
    further = reader.want()
    assert isinstance(further, WantPage)
    assert 1 <= further.limit <= PAGE_BYTES // 200_000


SELECTIONS = st.sampled_from(
    [
        Selection(org=ORG, owners=frozenset({"", "u0"})),
        Selection(org=ORG, owners=frozenset({"", "u0", "u1"}), statuses=frozenset({RUNNING})),
        NAMED,
        Selection(org=ORG, tasks=frozenset({"t0", "t1"}), statuses=frozenset({QUEUED, COMPLETED})),
    ]
)


@hypothesis_settings(max_examples=600, deadline=None)
@given(
    partitions=st.sampled_from([1, 3]),
    selection=SELECTIONS,
    history=HISTORY,
    places=st.none() | st.lists(st.integers(-1, 20), min_size=3, max_size=3),
    strict=st.booleans(),
    lag=LAG,
    ops=OPS,
)
@example(**MANY, selection=ALL, ops=OFFERED[1:])
@example(**MANY, selection=ALL, ops=LOST[1:])
@example(**MANY, selection=NAMED, ops=FULL)
@example(**MANY, selection=NAMED, ops=OTHERS)
@example(**MANY, selection=NAMED, ops=DELETED)
@example(**MANY, selection=ALL, ops=REUSED)
@example(
    **MANY | {"partitions": 3, "strict": True, "places": [0, 0, -1]},
    selection=ALL,
    ops=[NOW[0], ("say", 0), ("offer", 0)],
)
def test_a_reader_of_many_gets_what_matches_whatever_happens(
    partitions: int,
    selection: Selection,
    history: list[tuple[str, int]],
    places: list[int] | None,
    strict: bool,
    lag: int,
    ops: list[tuple[str, int]],
) -> None:
    world = world_of(partitions, history)
    after = ""
    if places:
        ids = [(["0-0", *(one.id for one in log)], place + 1) for log, place in zip(world.logs, places, strict=False)]
        after = ",".join(log[place % len(log)] for log, place in ids)
    run = Run(world, ManyReader(selection, [str(p) for p in range(partitions)], after, strict=strict), lag)
    run.play(ops)
    run.settle()
    told_many(run, selection, after)


def told_many(run: Run, selection: Selection, after: str) -> None:
    world, known, began = run.world, dict[str, int](), dict[str, int]()
    places = {one.entry.id: (p, one) for p, log in enumerate(world.logs) for one in log}

    def numbers(cursor: str) -> list[int]:
        return [world.number(p, id_) for p, id_ in enumerate(cursor.split(","))]

    def due(p: int, above: int, to: float = float("inf")) -> list[Logged]:
        return [
            one
            for one in world.logs[p]
            if above < one.number <= to
            and selection.matches(one)
            and world.lives[one] not in world.dead
            and one.seq > known.get(one.task, 0)
        ]

    at = numbers(after) if after else [0] * len(world.logs)
    fresh = not after
    for i, item in enumerate(run.got):
        cursor = ""
        match item:
            case Gap():
                fresh, began = True, {}
            case Began():
                began[item.snapshot.fields["id"]] = _seq(item.snapshot)
            case Reached():
                cursor = item.cursor
                if fresh:
                    fresh, known, at = False, began, numbers(cursor)
            case Entry() | Placed():
                assert not fresh
                p, cursor = 0, getattr(item, "cursor", "") or getattr(item, "id", "")
                entry = item.entry if isinstance(item, Placed) else item
                p, one = next((p, one) for p, log in enumerate(world.logs) for one in log if one.entry is entry)
                missed = due(p, at[p], one.number)
                assert missed == [one] or (missed == [] and one.number > at[p] and world.lives[one] in world.dead)
                at[p] = one.number
            case Ended():
                cursor = item.last_id
                assert i == len(run.got) - 1
        if cursor:  # whoever comes back with it gets exactly the rest
            for p, number in enumerate(numbers(cursor)):
                assert number >= at[p]
                assert due(p, at[p], number) == []
    assert places or not run.got
    if run.reader.ended:
        assert isinstance(run.got[-1], Ended)
        for id_ in selection.tasks:
            said = [
                one
                for p, n in enumerate(numbers(cursor))
                for one in world.logs[p][:n]
                if (one.org, one.task) == (ORG, id_)
            ]
            assert not said or said[-1].ends or said[-1].gone or world.lives[said[-1]] in world.dead
    elif not run.over:
        assert run.reader.want() is None
        for p, number in enumerate(at):
            assert due(p, number) == []
        named = [task for task in world.tasks if task.org == ORG and task.id in selection.tasks]
        assert not named or any(task.there and task.status not in TERMINAL for task in named)
