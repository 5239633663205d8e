"""The readers of one task: who goes alone, and crowds, in which one look at an entry serves a thousand of them.

In a crowd are live readers that stand at the same place, do not fold, and are written the same bytes. What a fan-out
costs beside its system calls is the memory that it walks through: so an offer touches neither a reader nor its sink, and
only calls one `write` after the other (1,000 readers: 0.06 µs each, of which offering it to each made 0.7, and twice
that in a server whose caches hold other things; measured).

A write goes through the kernel, which pushes everything else out of the caches. So a crowd only takes an entry; what
all crowds took of one read is written by one loop that does nothing else (`Outbox`; 1,000 tasks with a reader each: a
fifteenth of what a delivery costs, measured).

A crowd only ever goes on with the next entry of a task that goes on. Before anything else (an end, a deletion, a hole,
a break of the tail) it parts, and each reader sees to that alone (`seam.py`).
"""

from collections.abc import Callable, Hashable
from typing import Protocol

from app import metrics
from app.log import Logged
from app.seam import Place, Sink, TaskReader


class Spelling(Hashable, Protocol):
    """How some readers want what they get: the same bytes for all of them."""

    def live(self, one: Logged) -> tuple[bytes, int]:
        """An entry, perhaps as nothing, and how many frames that is."""


class Member(Sink, Protocol):
    """A sink that may go with others."""

    @property
    def spelling(self) -> Spelling: ...

    def write(self, data: bytes) -> None: ...

    def part(self) -> None:
        """It goes alone from here: removes itself from its crowd."""


Writes = tuple[Callable[[bytes], None], ...]


class Outbox:
    """What crowds took and nobody has written yet. It goes before all that a reader of theirs is offered alone."""

    __slots__ = ("size", "waiting")

    def __init__(self) -> None:
        self.size = 0
        """Bytes, at most, for any of the connections."""
        self.waiting: list[tuple[Crowd, Writes, bytes, int]] = []
        """Data, and how many frames it is."""

    def write(self) -> None:
        waiting, self.waiting, self.size = self.waiting, [], 0
        all_frames = all_bytes = 0
        for crowd, writes, data, frames in waiting:
            all_frames += frames * len(writes)
            all_bytes += len(data) * len(writes)
            for write in writes:  # a connection that fills up makes its reader part: the crowd has others then
                try:
                    write(data)
                except Exception as error:  # noqa: BLE001 (as of one: `seam.py`)
                    crowd.failed(write, error)
        if waiting:
            metrics.STREAM_FRAMES.inc(all_frames)
            metrics.STREAM_BYTES.inc(all_bytes)


class Crowd:
    __slots__ = ("_audience", "_readers", "_spelling", "_writes", "after", "number", "written")

    def __init__(self, audience: "Audience", member: Member, place: Place) -> None:
        self.number, self.after = place.number, place.after
        """Of the last entry that all have taken, as of a reader's place."""
        self.written = 0
        """Bytes, to each."""
        self._audience, self._spelling = audience, member.spelling
        self._readers: dict[Member, TaskReader] = {}
        self._writes: Writes = ()
        """Of all members; empty: to be made anew, because they have changed."""

    def add(self, member: Member, reader: TaskReader) -> None:
        self._readers[member] = reader
        self._writes = ()
        del self._audience.alone[reader]

    def remove(self, member: Member) -> None:
        reader = self._readers.pop(member)
        self._writes = ()
        reader.number, reader.after = self.number, self.after
        self._audience.alone[reader] = None
        if not self._readers:
            del self._audience.crowds[self._spelling]
            self._audience.walk = (*self._audience.crowds.values(),)

    def part(self, error: Exception | None = None) -> None:
        for member in [*self._readers]:
            member.part()
            if error:
                member.failed(error)

    def offer(self, one: Logged, outbox: Outbox) -> int:
        """To how many. Who has parted is then offered it alone."""
        if one.over:
            self.part()
            return 0
        if one.seq != self.number + 1:
            if one.seq > self.number:  # a hole
                self.part()
            return 0
        self.number, self.after = one.seq, one.id
        try:
            data, frames = self._spelling.live(one)
        except Exception as error:  # noqa: BLE001 (the readers' own, as of one: `seam.py`)
            readers = len(self._readers)
            outbox.write()
            self.part(error)
            return readers
        writes = self._writes
        if not writes:
            self._writes = writes = (*(member.write for member in self._readers),)
        if frames:
            self.written += len(data)
            outbox.waiting.append((self, writes, data, frames))
            outbox.size += len(data)
        return len(writes)

    def failed(self, write: Callable[[bytes], None], error: Exception) -> None:
        for member in [member for member in self._readers if member.write == write]:
            member.part()
            member.failed(error)


class Audience:
    """The readers of one task."""

    __slots__ = ("alone", "crowds", "walk")

    def __init__(self) -> None:
        self.alone: dict[TaskReader, None] = {}
        """In the order in which they came, which is that of their memory: it is walked through faster."""
        self.crowds: dict[Spelling, Crowd] = {}
        self.walk: tuple[Crowd, ...] = ()
        """The same: an offer may change them."""

    def offer(self, one: Logged, outbox: Outbox) -> int:
        """To how many."""
        # Crowds first: who parts is offered it alone, and who has taken it alone may join.
        offered = 0
        for crowd in self.walk:
            offered += crowd.offer(one, outbox)
        if self.alone:
            outbox.write()
            for reader in tuple(self.alone):
                reader.offer(one)
                offered += 1
        return offered

    def gather(self, member: Member, reader: TaskReader) -> Crowd | None:
        """The crowd that it has joined, if there is one for its live reader."""
        if reader.folds:  # the state goes from entry to entry with the reader
            return None
        crowd = self.crowds.get(member.spelling)
        if crowd is None:
            crowd = self.crowds[member.spelling] = Crowd(self, member, reader)
            self.walk = (*self.walk, crowd)
        if crowd.number != reader.number:
            return None
        crowd.add(member, reader)
        return crowd

    def lost(self) -> None:
        for crowd in [*self.crowds.values()]:
            crowd.part()
        for reader in [*self.alone]:
            reader.lost()
