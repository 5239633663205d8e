"""Crowds as machines without I/O: who goes together misses nothing, gets nothing twice, and may go alone at any time."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from app.crowd import Audience, Crowd, Outbox
from app.log import Logged
from app.seam import Ended, Item, TaskReader
from tests.core.test_seam import World

READERS = 4
OPS = st.lists(
    st.tuples(
        st.sampled_from(["offer"] * 4 + ["page"] * 6 + ["say", "skip", "part", "fill", "break", "come"]),
        st.integers(0, READERS - 1),
    ),
    min_size=40,
    max_size=40,
)


class Numbers:
    """Spells an entry as its number."""

    def __init__(self) -> None:
        self.fails = False
        self.times = 0

    def live(self, one: Logged) -> tuple[bytes, int]:
        self.times += 1
        if self.fails:
            raise ZeroDivisionError
        return b"%d" % one.seq, 1


class Silence(Numbers):
    def live(self, _: Logged) -> tuple[bytes, int]:
        return b"", 0


class Follower:
    """A reader, and what it was given."""

    def __init__(self, scene: "Scene", spelling: Numbers) -> None:
        self.scene, self.spelling = scene, spelling
        self.reader = TaskReader("o", "t0", "")
        self.reader.sink = self
        scene.audience.alone[self.reader] = None
        self.crowd: Crowd | None = None
        self.got: list[int] = []
        self.taken = 0
        self.fills = self.breaks = False
        self.errors: list[Exception] = []

    def write(self, data: bytes) -> None:
        if self.breaks:
            raise ZeroDivisionError
        self.got.append(int(data))
        if self.fills:
            self.part()

    def take(self, one: Logged) -> None:
        self.taken += 1
        if self.spelling.live(one)[1]:
            self.write(b"%d" % one.seq)
        self.crowd = self.scene.audience.gather(self, self.reader)

    def give(self, items: Sequence[Item]) -> None:
        assert isinstance(items[-1], Ended)
        self.leave()

    def behind(self) -> None:
        assert not self.reader.live

    def failed(self, error: Exception) -> None:
        self.errors.append(error)
        self.leave()

    def part(self) -> None:
        if self.crowd:
            crowd, self.crowd = self.crowd, None
            crowd.remove(self)

    def leave(self) -> None:
        self.part()
        self.reader.ended = True
        del self.scene.audience.alone[self.reader]

    def page(self) -> None:
        if want := self.reader.want():
            try:
                next(self.scene.world.reading(want))
            except StopIteration as done:
                self.got += [item.seq for item in self.reader.arrived(done.value) if not isinstance(item, Ended)]  # type: ignore[union-attr]


class Scene:
    """A running task with readers, and the tail that offers its entries to them."""

    def __init__(self, readers: int = READERS) -> None:
        self.world = World(1)
        self.audience = Audience()
        self.outbox = Outbox()
        self.spelling = Numbers()
        self.followers = [Follower(self, self.spelling) for _ in range(readers)]
        self.offered = 0
        self.say()
        self.say("start")

    def say(self, word: str = "say") -> None:
        self.world.say(self.world.tasks[0], word)

    def offer(self) -> int:
        """What is due, to how many."""
        due = self.world.logs[0][self.offered :]
        self.offered += len(due)
        offered = sum(self.audience.offer(one, self.outbox) for one in due)
        self.outbox.write()
        return offered

    def together(self) -> None:
        """All live, and in crowds."""
        self.offer()
        for _ in range(3):
            for follower in self.followers:
                follower.page()
        self.say()
        self.offer()
        assert all(follower.crowd for follower in self.followers)


def counted() -> tuple[float, float]:
    """Frames and bytes that crowds were written, ever."""
    found = [REGISTRY.get_sample_value(f"taskcast_stream_{what}_total") for what in ("frames", "bytes")]
    return found[0] or 0, found[1] or 0


@given(OPS)
@hypothesis_settings(max_examples=300)
def test_whoever_parts_joins_and_falls_behind_nothing_is_lost_or_doubled(ops: list[tuple[str, int]]) -> None:
    scene = Scene()
    for word, i in ops:
        follower = scene.followers[i]
        match word:
            case "offer":
                scene.say()
                scene.offer()
            case "say":
                scene.say()
            case "skip":
                scene.say()
                scene.offered = len(scene.world.logs[0])
            case "page":
                follower.page()
            case "part":
                follower.part()
            case "fill":
                follower.fills = not follower.fills
            case "break":
                scene.audience.lost()
                assert not any(one.reader.live for one in scene.followers)
                assert not scene.audience.crowds
            case _:
                scene.followers.append(Follower(scene, scene.spelling))
    scene.say()
    scene.offer()
    for follower in scene.followers:
        while not follower.reader.live:
            follower.page()
    scene.say("end")
    scene.offer()
    for follower in scene.followers:
        assert follower.got == [*range(1, scene.world.tasks[0].seq + 1)]
        assert not follower.errors
    assert not scene.audience.alone
    assert not scene.audience.crowds


def test_a_crowd_looks_at_an_entry_once() -> None:
    scene = Scene()
    scene.together()
    assert [follower.taken for follower in scene.followers] == [1] * READERS
    scene.say()
    before = counted()
    scene.spelling.times = 0
    assert scene.offer() == READERS
    assert scene.spelling.times == 1
    assert [follower.taken for follower in scene.followers] == [1] * READERS
    assert all(follower.got == [1, 2, 3, 4] for follower in scene.followers)
    assert counted() == (before[0] + READERS, before[1] + READERS)
    assert len({follower.crowd for follower in scene.followers}) == len(scene.audience.crowds) == 1


def test_what_a_crowd_has_taken_is_written_at_last_and_before_anybody_is_offered_more_alone() -> None:
    scene = Scene()
    scene.together()
    for _ in range(3):
        scene.say()
    one, another, third = scene.world.logs[0][scene.offered :]
    scene.audience.offer(one, scene.outbox)
    scene.audience.offer(another, scene.outbox)
    assert all(follower.got == [1, 2, 3] for follower in scene.followers)
    assert scene.outbox.size == 2
    scene.followers[0].part()
    scene.audience.offer(third, scene.outbox)
    assert scene.followers[0].got == [1, 2, 3, 4, 5, 6]
    scene.outbox.write()
    assert all(follower.got == [1, 2, 3, 4, 5, 6] for follower in scene.followers)
    assert scene.outbox.size == 0


def test_who_wants_something_else_goes_with_another_crowd() -> None:
    scene = Scene()
    scene.followers.append(Follower(scene, Silence()))
    scene.together()
    scene.say()
    before, _ = counted()
    assert scene.offer() == READERS + 1
    assert len(scene.audience.crowds) == 2
    assert counted()[0] == before + READERS
    assert scene.followers[-1].crowd
    assert scene.followers[-1].crowd.written == 0


def test_who_stands_elsewhere_does_not_join() -> None:
    scene = Scene()
    scene.together()
    late = Follower(scene, scene.spelling)
    late.reader.number = 2
    assert scene.audience.gather(late, late.reader) is None
    assert late.reader in scene.audience.alone


def test_who_folds_goes_alone() -> None:
    scene = Scene()
    scene.together()
    late = Follower(scene, scene.spelling)
    late.reader = TaskReader("o", "t0", "", folded_from=1)
    late.reader.number = scene.followers[0].reader.number
    assert late.reader.folds
    assert scene.audience.gather(late, late.reader) is None


def test_an_entry_that_cannot_be_spelled_fails_all() -> None:
    scene = Scene()
    scene.together()
    scene.spelling.fails = True
    scene.say()
    scene.offer()
    assert [len(follower.errors) for follower in scene.followers] == [1] * READERS
    assert not scene.audience.crowds


def test_a_connection_that_cannot_be_written_to_fails_alone() -> None:
    scene = Scene()
    scene.together()
    scene.followers[1].breaks = True
    scene.say()
    scene.offer()
    assert [len(follower.errors) for follower in scene.followers] == [0, 1, 0, 0]
    assert [len(follower.got) for follower in scene.followers] == [4, 3, 4, 4]


def test_a_deletion_parts_a_crowd() -> None:
    scene = Scene()
    scene.together()
    scene.say("delete")
    scene.offer()
    assert all(follower.reader.ended for follower in scene.followers)
    assert not scene.audience.crowds
