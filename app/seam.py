"""The seam: how a reader comes from history to what is live, with no gap and no duplicate. Pure: no I/O.

A `Reader` says what it wants to read next, is told what came, and is offered each entry of the partition's log that
concerns it; it gives its sink items, in order. The rule, which stands in `Place` alone:

* A reader is registered, and the tail has a concrete position, before the page is read that makes it live.
* While it replays it keeps nothing; it only notes the highest number that the tail offered.
* It goes live in the moment in which a page comes back empty and nothing above its own number was offered. No other
  code runs between that page's arrival and the switch, so nothing can fall between.
* Live, it takes only the next number. Anything above is a hole (the log was trimmed, failed over): back to replay.
  Anything at or below was seen.

A `TaskReader` counts by a task's `seq`; a `ManyReader`, which reads the partitions' logs, by their dense counters. The
file is long because both machines stand beside the rule that they share.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from app.errors import Gone, Invalid, NotFound
from app.events import Continued, Entry, Submitted
from app.log import Logged, LogPage, Page
from app.task import EMPTY, OPEN, TERMINAL, Snapshot, Status, apply

PAGE_ENTRIES = 200
"""Of history, per read; a page also ends at 1 MiB."""
PAGE_BYTES = 1024 * 1024
"""Of states, that a folding reader gives at once."""
FIRST_STATE_BYTES = 256 * 1024
"""What a task's first entry may make of nothing."""
MATCHING_MAX = 1000
"""Unfinished tasks with which a stream of many may begin, and ids that it may name."""
STATE_BYTES_MAX = 16 * 1024 * 1024
"""Of their snapshots."""


# What a reader gives


class Gap(Struct, frozen=True, kw_only=True):
    """What a cursor asked for cannot be given in full. A stream of one task goes on after `snapshot`; one of many
    begins again, with the snapshots of what is unfinished.
    """

    reason: str
    """`trimmed`: older than what is kept; `ahead`: later than the last entry; `unknown`: never given here."""
    earliest: int = 0
    latest: int = 0
    snapshot: Snapshot | None = None
    """None on a stream of many tasks."""
    selection: "Selection | None" = None
    """Of a stream of many."""


class Began(Struct, frozen=True, kw_only=True):
    """The state from which the entries that follow go on."""

    snapshot: Snapshot
    cursor: str = ""
    """Empty on a stream of many tasks: there `Reached` follows the last of them."""


class Placed(Struct, frozen=True, kw_only=True):
    """An entry whose cursor is more than its id: of a store of several partitions."""

    entry: Entry
    cursor: str


class Reached(Struct, frozen=True, kw_only=True):
    """A stream of many tasks has come to this cursor, without an entry to carry it."""

    cursor: str


class Ended(Struct, frozen=True, kw_only=True):
    """The last entry is terminal, and the reader has it. `last_id` is empty for a deleted task."""

    last_id: str
    seq: int = 0


Item = Entry | Placed | Began | Gap | Reached | Ended


# What a reader wants


class WantPage(Struct, frozen=True):
    """A page of a task's history."""

    org: str
    task: str
    after: str
    check: bool
    limit: int = PAGE_ENTRIES


class WantSnapshot(Struct, frozen=True):
    org: str
    task: str
    base: bool


class WantLog(Struct, frozen=True):
    """A page of a partition's log: the organisation's entries of tasks that exist."""

    tag: str
    org: str
    after: str
    check: bool


class WantState(Struct, frozen=True):
    """Where the logs end, and then the snapshots of the named tasks, or of the unfinished ones that match."""

    selection: "Selection"


Want = WantPage | WantSnapshot | WantLog | WantState


class State(Struct, frozen=True):
    """Answer to WantState."""

    ends: list[tuple[str, int]]
    """Each partition's last id and counter, read before the snapshots."""
    statuses: dict[str, Status]
    """Of all of those tasks that are there."""
    snapshots: list[Snapshot]
    more: bool
    """There are more than MATCHING_MAX, or STATE_BYTES_MAX."""


Answer = Page | LogPage | Snapshot | State | None
Fetch = Callable[[Want], Awaitable[Answer]]


class Sink(Protocol):
    """Who gets what a reader gives."""

    def take(self, one: Logged) -> None:
        """An entry, live, whose cursor is its id."""

    def give(self, items: Sequence[Item]) -> None: ...

    def behind(self) -> None:
        """The reader wants to read again."""

    def failed(self, error: Exception) -> None:
        """What it gave could not be taken; it will give nothing more."""


class Place:
    """Where a reader stands in one dense sequence, and whether what is live follows on that."""

    __slots__ = ("after", "again", "live", "number", "offered")

    def __init__(self, after: str) -> None:
        self.after = after
        """The cursor: an id, `seq:N`, or empty for the start."""
        self.number = -1
        """Of the last entry given; -1 until a page says where the cursor stands."""
        self.offered = 0
        self.live = False
        self.again = True
        """A replay was asked for since the page on its way was: an empty one says nothing about now."""

    def due(self, number: int, id_: str) -> bool:
        """Whether an offered entry is the next one; it is then taken. If it is a later one, the place is behind."""
        if self.live:
            if number == self.number + 1:
                self.number = number
                self.after = id_
                return True
            if number > self.number:
                self.fall_behind()
        self.offered = max(self.offered, number)
        return False

    def fall_behind(self) -> None:
        self.live = False
        self.again = True

    def restart(self) -> None:
        """After a break: what was offered before it may never have been kept."""
        self.offered = 0
        self.fall_behind()

    def caught_up(self) -> None:
        """A page came back empty."""
        if not self.again and self.offered <= self.number:
            self.live = True


class TaskReader(Place):
    """Reads one task."""

    __slots__ = (
        *("_born", "_check", "_gap", "_since", "_start", "_state", "_turn"),
        *("ended", "org", "sink", "strict", "task"),
    )

    def __init__(
        self,
        org: str,
        task: str,
        after: str,
        *,
        snapshot: bool = False,
        strict: bool = False,
        folded_from: int | None = None,
    ) -> None:
        """`snapshot`: begin with the present state. `strict`: a gap is an error, Gone. `folded_from`: read the whole
        history, and give the entries from that number on, each with the state after it, until the next turn begins.
        """
        super().__init__(after)
        assert folded_from is None or not (after or snapshot or strict), "a fold begins where the history does"
        self._state: Snapshot | None = None if folded_from is None else EMPTY
        self._born = 0
        """When the task was made that it folds, µs: another one may have its id by the time that it folds again."""
        self._since = self._turn = folded_from or 0
        self.org, self.task = org, task
        self.strict = strict
        self.ended = False
        self.sink: Sink = NOWHERE
        self._start = snapshot
        self._check = True
        self._gap: Page | None = None

    @property
    def folds(self) -> bool:
        return self._state is not None

    async def begin(self, fetch: Fetch) -> list[Item]:
        """Finds out whether it may begin at all. Raises NotFound, Gone."""
        page = await fetch(WantPage(self.org, self.task, self.after, self._check, limit=1))
        assert page is None or isinstance(page, Page)
        if page is None:
            raise NotFound("Task not found")
        if page.gap and self.strict and not self._start:
            raise _gone(page)
        return []

    def mark(self) -> "Mark":
        return [(self.number, self.after)]

    def rewind(self, mark: "Mark") -> None:
        """Back to where it was: what it gave since was not kept."""
        ((self.number, self.after),) = mark
        if self._state is not None:
            self._since = max(self._since, self.number + 1)
            self.number, self.after, self._state = -1, "", EMPTY
        self.ended = False
        self.fall_behind()

    def want(self) -> Want | None:
        """The next thing to read; None while it is live, and when it has ended."""
        if self.live or self.ended:
            return None
        self.again = False
        if self._start:
            return WantSnapshot(self.org, self.task, base=False)
        if self._gap:
            return WantSnapshot(self.org, self.task, base=self._gap.gap == "trimmed")
        return WantPage(self.org, self.task, self.after, self._check, self._page_entries())

    def _page_entries(self) -> int:
        """So many that a page of whole states stays small: half a megabyte may stand in each."""
        if self._state is None:
            return PAGE_ENTRIES
        size = self._state.size or FIRST_STATE_BYTES
        return max(1, min(PAGE_ENTRIES, PAGE_BYTES // size))

    def offer(self, one: Logged) -> None:
        was_live = self.live
        if self.due(one.seq, one.id):
            if one.gone:  # what follows under this id is another task
                self.ended = True
                self.sink.give([Ended(last_id="", seq=one.seq - 1)])
                return
            try:
                if self._state is not None:
                    self._state = one.fold(self._state)
                if one.seq >= self._since:
                    self.sink.take(one)
            except Exception as error:  # noqa: BLE001 (it would be lost for this reader, and stop the others')
                self.sink.failed(error)
                return
            if one.ends and self.live:
                self.ended = True
                self.sink.give([Ended(last_id=one.id, seq=one.seq)])
        elif was_live and not self.live:
            self.sink.behind()

    def lost(self) -> None:
        """The tail may have missed entries."""
        if not self.ended:
            was_live = self.live
            self.restart()
            if was_live:
                self.sink.behind()

    def arrived(self, answer: Answer) -> list[Item]:
        """What it gives for what it wanted. Raises Gone."""
        if isinstance(answer, Snapshot) or (answer is None and (self._start or self._gap)):
            return self._begin(answer)
        assert answer is None or isinstance(answer, Page)
        self._check = False
        if answer is None:
            return self._end("", self._given)  # deleted meanwhile
        if answer.entries and isinstance(answer.entries[0].event, Submitted) and self._other(answer.entries[0].at):
            return self._end("", self._given)  # deleted, and its id used again
        if answer.gap:
            if self.strict:
                raise _gone(answer)
            self._gap = answer
            return []
        items = self._told(answer.entries)
        if self.ended:
            return items
        if answer.entries:
            self.after, self.number = answer.entries[-1].id, answer.entries[-1].seq
            if self.number < answer.last_seq:
                return items
        elif self.number < 0:
            self.after, self.number = answer.last_id, answer.last_seq
        if answer.status in TERMINAL:
            return [*items, *self._end(answer.last_id, answer.last_seq)]
        if not answer.entries:
            self.caught_up()
        return items

    def _told(self, entries: Sequence[Entry]) -> list[Item]:
        if self._state is None:
            return [*entries]
        if entries and isinstance(entries[0].event, Submitted):
            self._born = entries[0].at
        told: list[Item] = []
        for entry in entries:
            if entry.seq > self._turn and isinstance(entry.event, Continued):
                return [*told, *self._end("", entry.seq - 1)]
            self._state = apply(self._state, entry)
            if entry.seq >= self._since:
                told.append(replace(entry, after=self._state.fields))
        return told

    def _begin(self, snapshot: Snapshot | None) -> list[Item]:
        """From a state; None: the task is gone, and the next page will say so."""
        gap, self._gap, self._start = self._gap, None, False
        if snapshot is None:
            return []
        if self._state is not None and self._other(int(snapshot.fields["created_at"])):
            return self._end("", self._given)
        self.after, self.number = snapshot.fields["last_event_id"], int(snapshot.fields["last_seq"])
        if gap is None:
            return [Began(snapshot=snapshot, cursor=self.after)]
        if self._state is not None:
            self._state, self._born = snapshot, int(snapshot.fields["created_at"])
            if gap.gap == "trimmed" and self.number < self._since:  # nothing that was asked for is missing
                return []
            self._since = self.number + 1
        latest = max(gap.last_seq, self.number)  # the snapshot was read after the page
        earliest = self.number + 1 if gap.gap == "trimmed" else gap.base_seq + 1
        told: Item = Gap(reason=gap.gap, earliest=earliest, latest=latest, snapshot=snapshot)
        if self._state is not None and int(snapshot.fields.get("turn_seq", "0")) > self._turn:
            return [told, *self._end("", self.number)]
        return [told]

    def _other(self, created_at: int) -> bool:
        """Whether a task that was made then is another one than what it has read before."""
        return self._born != created_at if self._born else self.number > 0

    @property
    def _given(self) -> int:
        """The number of the last entry that it gave, as far as it knows."""
        return max(self.number, 0 if self._state is None else self._since - 1, 0)

    def _end(self, last_id: str, seq: int) -> list[Item]:
        self.ended = True
        return [Ended(last_id=last_id, seq=seq)]


def _gone(page: Page) -> Gone:
    return Gone(page.gap, page.base_seq + 1, page.last_seq)


def cursor_of(places: Iterable[tuple[str, int]]) -> str:
    """Of a stream of many: where it stands in each partition's log."""
    return ",".join(id_ or "0-0" for id_, _ in places)


def order(id_: str) -> tuple[int, int]:
    ms, _, n = id_.partition("-")
    return (int(ms), int(n)) if ms.isdecimal() and n.isdecimal() else (-1, -1)


class Selection(Struct, frozen=True, kw_only=True):
    """Many tasks of one organisation. What is empty does not narrow it."""

    org: str
    owners: frozenset[str] = frozenset()
    tasks: frozenset[str] = frozenset()
    session: str = ""
    agent: str = ""
    statuses: frozenset[Status] = frozenset()
    """Before or after the entry."""

    def matches(self, one: Logged) -> bool:
        return (
            one.org == self.org
            and not one.gone
            and (not self.tasks or one.task in self.tasks)
            and (not self.owners or one.owner in self.owners)
            and (not self.session or one.session == self.session)
            and (not self.agent or one.agent == self.agent)
            and (not self.statuses or one.before in self.statuses or one.after in self.statuses)
        )

    @property
    def open_statuses(self) -> list[Status]:
        return [status for status in OPEN if not self.statuses or status in self.statuses]


class Strand(Place):
    """A stream of many's place in one partition's log."""

    __slots__ = ("_reader", "check", "org", "tag")

    def __init__(self, reader: "ManyReader", tag: str, after: str) -> None:
        super().__init__(after)
        self._reader = reader
        self.org = reader.selection.org
        self.tag = tag
        self.check = True

    def offer(self, one: Logged) -> None:
        was_live = self.live
        if self.due(one.number, one.id):
            try:
                self._reader.pass_on(one)
            except Exception as error:  # noqa: BLE001 (as of one task)
                self._reader.sink.failed(error)
        elif was_live and not self.live:
            self._reader.sink.behind()

    def lost(self) -> None:
        was_live = self.live
        self.restart()
        if was_live:
            self._reader.sink.behind()


class ManyReader:
    """Reads many tasks: of each partition's log, the entries that match."""

    __slots__ = (
        "_fresh",
        "_gap",
        "_known",
        "_open",
        "_reported",
        "_settled",
        "_wanted",
        "ended",
        "selection",
        "sink",
        "strands",
        "strict",
    )

    def __init__(self, selection: Selection, tags: Sequence[str], after: str, *, strict: bool = False) -> None:
        """`after`: one id per partition, joined by commas; empty: begin with what is unfinished."""
        self.selection = selection
        self.strict = strict
        self.sink: Sink = NOWHERE
        self.ended = False
        places = after.split(",")
        foreign = bool(after) and len(places) != len(tags)
        self._gap = "unknown" if foreign else ""
        self._fresh = foreign or not after
        """Begin with snapshots."""
        self.strands = [Strand(self, tag, "" if self._fresh else places[i]) for i, tag in enumerate(tags)]
        self._reported = after
        """The cursor that was last told by itself."""
        self._settled = not self._fresh and not selection.tasks
        """What it needs to know of the state, it knows."""
        self._known: dict[str, int] = {}
        """Task → the seq of the snapshot that was given; entries up to it are in it."""
        self._open: set[str] = set()
        """Of the named tasks, those that have not ended."""
        self._wanted: Strand | None = None

    @property
    def cursor(self) -> str:
        return cursor_of((strand.after, strand.number) for strand in self.strands)

    @property
    def live(self) -> bool:
        return self._settled and all(strand.live for strand in self.strands)

    async def begin(self, fetch: Fetch) -> list[Item]:
        """What it gives first. Raises NotFound, Gone, and Invalid when it would be too much."""
        items: list[Item] = []
        while not self._settled or (self.strict and any(strand.check for strand in self.strands)):
            want = self.want()
            assert want is not None
            items += self.arrived(await fetch(want))
            for strand in self.strands:
                strand.fall_behind()  # nobody takes yet what is live
        return items

    def mark(self) -> "Mark":
        return [(strand.number, strand.after) for strand in self.strands]

    def rewind(self, mark: "Mark") -> None:
        """Back to where it was: what it gave since was not kept."""
        self.ended = False
        for strand, (number, after) in zip(self.strands, mark, strict=True):
            strand.number, strand.after = number, after
            strand.fall_behind()

    def want(self) -> Want | None:
        if self.ended:
            return None
        if not self._settled:
            return WantState(self.selection)
        behind = [strand for strand in self.strands if not strand.live]
        if not behind:
            return None
        strand = self._wanted = next((strand for strand in behind if strand.check), behind[0])
        strand.again = False
        return WantLog(strand.tag, self.selection.org, strand.after, strand.check)

    def arrived(self, answer: Answer) -> list[Item]:
        """Raises NotFound, Gone, Invalid."""
        if isinstance(answer, State):
            return self._begin(answer)
        strand = self._wanted
        assert isinstance(answer, LogPage)
        assert strand is not None
        if answer.gap:
            if self.strict:
                raise Gone(answer.gap)
            self._gap, self._fresh, self._settled = answer.gap, True, False
            return []
        strand.check = False
        items: list[Item] = []
        for one in answer.entries:
            strand.after = one.id
            items += self._items(one)
        strand.after, strand.number = answer.after, answer.number
        if not answer.scanned:
            strand.caught_up()
            if self.live:
                items += self._ended()
        return items

    def _begin(self, state: State) -> list[Item]:
        found = state.statuses
        self._open = {id_ for id_ in self.selection.tasks & found.keys() if found[id_] not in TERMINAL}
        if not self._fresh:
            self._settled = True
            return []
        items: list[Item] = []
        if self._gap:
            if self.strict:
                raise Gone(self._gap)
            items.append(Gap(reason=self._gap, selection=self.selection))
            # Who comes back with a cursor must not be refused: the gap names the list to read instead.
            began = [] if state.more else state.snapshots
        else:
            if state.more:
                raise Invalid(
                    f"More than {MATCHING_MAX} unfinished tasks match, or their state exceeds {STATE_BYTES_MAX} bytes; "
                    "narrow the stream, or begin it with a list's cursor."
                )
            if missing := self.selection.tasks - found.keys():
                raise NotFound(f"Task not found: {min(missing)}")
            began = state.snapshots
        self._gap, self._fresh, self._settled = "", False, True
        for strand, (id_, number) in zip(self.strands, state.ends, strict=True):
            strand.after, strand.number = id_, number
            strand.check = False
            strand.fall_behind()
        self._known = {one.fields["id"]: int(one.fields["last_seq"]) for one in began}
        return [*items, *(Began(snapshot=one) for one in began), *self._report()]

    def pass_on(self, one: Logged) -> None:
        """An entry, live."""
        items = self._items(one)
        if items and len(self.strands) == 1:
            self.sink.take(one)
        elif items:
            self.sink.give(items)
        if (one.ends or one.gone) and self.live and (ended := self._ended()):
            self.sink.give(ended)

    def _items(self, one: Logged) -> list[Item]:
        """The entry, if it matches and is not in a snapshot that was given."""
        if one.org != self.selection.org:
            return []
        if one.task in self.selection.tasks:
            (self._open.discard if one.ends or one.gone else self._open.add)(one.task)
        if one.gone and one.seq > self._known.get(one.task, 0):
            self._known.pop(one.task, None)  # what follows under this id is another task
        if not self.selection.matches(one) or one.seq <= self._known.get(one.task, 0):
            return []
        return [one.entry if len(self.strands) == 1 else Placed(entry=one.entry, cursor=self.cursor)]

    def reached(self) -> list[Item]:
        """Its cursor, if it moved: perhaps by what the client was not told, and a log is trimmed some day."""
        return self._report() if self.live and not self.ended and self._reported != self.cursor else []

    def _report(self) -> list[Item]:
        self._reported = self.cursor
        return [Reached(cursor=self._reported)]

    def _ended(self) -> list[Item]:
        if not self.selection.tasks or self._open:
            return []
        self.ended = True
        return [Ended(last_id=self.cursor)]


Mark = list[tuple[int, str]]


class Nowhere:
    """A sink for a reader that has none yet."""

    def take(self, one: Logged) -> None:
        """Never called: such a reader is not live."""

    def give(self, items: Sequence[Item]) -> None:
        """As `take`."""

    def behind(self) -> None:
        """As `take`."""

    def failed(self, error: Exception) -> None:
        """As `take`."""


NOWHERE = Nowhere()

Reader = TaskReader | ManyReader
