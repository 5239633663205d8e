"""Lists of many tasks: random filters against brute force, page by page, and cursors while others write."""

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app import snapshots
from app.settings import Settings
from app.snapshots import Filter
from app.store import Store
from app.task import STORED, Task
from tests.store.many import ORG, OWNERS, TASKS, Made, newest_first, parted, populate, writing

WRITTEN, COMPARED = 150, 3000
"""Of each kind of write, and of tasks that were found meanwhile, at least so many."""
FOLLOWED = 500
"""Tasks after which nobody follows a list further: reading all of each would take minutes."""
TOLD = ("id", "org", "status", "queue", "submission", "last_seq", "last_event_id", "created_at", "updated_at")
FIELDS = (*TOLD, "owner", "session", "agent", "user", "parent", "trigger", "internal_status")


@pytest.fixture(params=[1, 3], ids=["one partition", "three partitions"])
def settings(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    return Settings(data=tmp_path / "data", partitions=request.param)


def filters(chance: random.Random, tasks: list[Made]) -> Filter:
    """Up to four conditions, most of which one and the same task meets."""
    like = chance.choice(tasks)
    told: dict[str, Any] = {}
    for _ in range(chance.randrange(5)):
        match chance.choice(["owners", "session", "status", "when", "agent", "user", "parent", "trigger", "internal"]):
            case "owners":
                told["owners"] = chance.choice([("", "u"), ("v",), (like.owner,), (like.owner, like.owner)])
            case "session":
                told |= {"session": like.session, "owners": told.get("owners", (like.owner, "u"))}
            case "status":
                told["statuses"] = chance.choice(
                    [chance.sample(STORED, 1 + chance.randrange(8)), [like.status] * 2, []]
                )
            case "when":
                times = sorted(one.created_at for one in chance.choices(tasks, k=2))
                told |= chance.choice(
                    [{"since": times[0]}, {"until": times[1]}, {"since": times[0], "until": times[1]}]
                )
            case "internal":
                told["internal_status"] = like.internal_status
            case name:
                told[name] = chance.choice([getattr(like, name), getattr(chance.choice(tasks), name)])
    return Filter(**told)


def fits(one: Made | Task, wanted: Filter) -> bool:
    return (
        wanted.agent in {"", one.agent}
        and wanted.user in {"", one.user}
        and wanted.session in {"", one.session}
        and wanted.parent in {"", one.parent}
        and wanted.trigger in {"", one.trigger}
        and wanted.internal_status in {"", one.internal_status}
        and (wanted.owners is None or one.owner in wanted.owners)
        and (wanted.statuses is None or one.status in wanted.statuses)
        and wanted.since <= one.created_at
        and (wanted.until is None or one.created_at <= wanted.until)
    )


def found(tasks: list[Made], wanted: Filter) -> list[str]:
    return newest_first(one for one in tasks if fits(one, wanted))


async def follow(store: Store, wanted: Filter, limit: int, after: str | None = "") -> list[str]:
    """Page by page, each after the cursor of the one before; only the last, or a walk that ended, may be short."""
    ids: list[str] = []
    while after is not None and len(ids) < FOLLOWED:
        page = await store.list(ORG, wanted, after=after, limit=limit, fields=FIELDS)
        assert len(page.tasks) <= limit
        assert len(page.tasks) == limit or page.next is None or page.capped
        assert page.next != after
        for task in page.tasks:
            assert fits(task, wanted)
        ids += [task.id for task in page.tasks]
        after = page.next
    return ids


async def pages_are_those_of_brute_force(store: Store, chance: random.Random, tasks: list[Made]) -> None:
    sizes = []
    for wanted in [Filter(), Filter(agent="nobody"), *(filters(chance, tasks) for _ in range(48))]:
        expected = found(tasks, wanted)
        sizes.append(len(expected))
        for offset in (0, chance.randrange(len(expected) + 1), len(expected)):
            limit = chance.randrange(1, 40)
            page = await store.list(ORG, wanted, offset=offset, limit=limit, fields=FIELDS)
            assert [task.id for task in page.tasks] == expected[offset : offset + limit], wanted
            assert (page.total, page.capped) == (len(expected), False)
            assert (page.next is None) == (offset + limit >= len(expected))
            rest = expected[offset + limit :]
            ids = await follow(store, wanted, chance.choice([7, 100, 250]) if len(rest) < 50 else 100, page.next)
            assert ids == rest[: len(ids)], wanted
            assert len(ids) >= min(len(rest), FOLLOWED)
    assert min(sizes) == 0
    assert max(sizes) == TASKS
    assert sum(0 < size < TASKS / 100 for size in sizes) > 10


async def cursors_skip_and_repeat_nothing_while_others_write(
    store: Store, chance: random.Random, tasks: list[Made]
) -> list[Made]:
    """Answers the tasks that there are when the writers have stopped."""
    restless, still = parted(tasks)
    compared = 0
    async with writing(store, chance, restless) as done:
        while compared < COMPARED or min(done.values()) < WRITTEN:
            wanted = filters(chance, tasks)
            expected = found([*still.values()], wanted)
            ids = await follow(store, wanted, chance.choice([20, 50, 100]))
            unmoved = [id_ for id_ in ids if id_ in still]
            assert unmoved == expected[: len(unmoved)], wanted
            assert len(ids) >= FOLLOWED or len(unmoved) == len(expected), wanted
            assert len(ids) == len({*ids})
            compared += len(unmoved)
    return [*still.values(), *restless.values()]


async def walks_that_end_early_say_so_and_go_on(
    store: Store, chance: random.Random, tasks: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "WALK_MAX", 40)
    capped = 0
    for _ in range(25):
        wanted = msgspec.structs.replace(filters(chance, tasks), trigger=chance.choice(tasks).trigger)
        expected = found(tasks, wanted)
        ids = await follow(store, wanted, 30)
        assert ids == expected[: len(ids)], wanted
        assert len(ids) >= min(len(expected), FOLLOWED)
        page = await store.list(ORG, wanted, limit=100, fields=FIELDS)
        assert [task.id for task in page.tasks] == expected[: len(page.tasks)]
        assert page.capped or page.total == len(expected)
        assert page.total <= len(expected)
        capped += page.capped
    assert 5 < capped < 25
    # A merge is no deeper than a walk, unless a cursor takes it there.
    expected = found(tasks, wanted := Filter(owners=OWNERS))
    page = await store.list(ORG, wanted, offset=50, limit=5, fields=FIELDS)
    assert (page.tasks, page.total, page.capped) == ([], len(tasks), True)
    assert await follow(store, wanted, 30, page.next) == expected[40 : 40 + 510]


@pytest.mark.timeout(120)  # ten seconds, on a machine that does nothing else
async def test_lists_of_many_tasks_are_what_brute_force_finds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(20)
    tasks = await populate(store, chance)
    await pages_are_those_of_brute_force(store, chance, tasks)
    tasks = await cursors_skip_and_repeat_nothing_while_others_write(store, chance, tasks)
    await walks_that_end_early_say_so_and_go_on(store, chance, tasks, monkeypatch)
