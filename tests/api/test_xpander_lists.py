"""xpander's lists of many tasks over HTTP: random queries against brute force, page by page, and cursors while others
write. The store's own lists are tried in tests/store/test_big_list.py; this is about what a query means.
"""

import asyncio
import math
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import snapshots
from app.settings import Settings
from app.store import Store
from app.task import Status
from tests.api.asking import Connect
from tests.store.many import AGENTS, ORG, TASKS, Made, move, newest_first, parted, populate, writing

Json = dict[str, Any]
Query = dict[str, str]

MEANT: dict[str, set[Status]] = {
    "pending": {Status.QUEUED},
    "executing": {Status.RUNNING},
    "paused": {Status.PAUSED, Status.HELD},
    "error": {Status.ERRORED},
    "failed": {Status.FAILED, Status.TIMED_OUT},
    "completed": {Status.COMPLETED},
    "stopped": {Status.CANCELLED},
}
WORD = {status: word for word, statuses in MEANT.items() for status in statuses}
UNTOUCHED = ("agent_id", "user_id", "parent_task_id", "triggering_agent_id", "from_date", "to_date")
"""Filters by what no writer changes."""
FILTERS = (*UNTOUCHED, "status", "internal_status")
FOLLOWED = 300
"""Tasks after which nobody follows a list further."""
MOVED, COMPARED, WRITTEN = 100, 1000, 80
"""At least so many tasks are moved, found and written meanwhile."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data", partitions=3)


@pytest.fixture
async def client(connect: Connect) -> httpx.AsyncClient:
    return await connect("u", org=ORG)


def moment(micros: int, chance: random.Random) -> str:
    """In one of the spellings of ISO 8601; without an offset it is UTC."""
    at = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=micros)
    spellings = (
        at.isoformat().replace("+00:00", "Z"),
        at.astimezone(timezone(timedelta(hours=5, minutes=30))).isoformat(),
        at.replace(tzinfo=None).isoformat(),
    )
    return chance.choice(spellings)


def asked(
    chance: random.Random, tasks: list[Made], names: tuple[str, ...] = FILTERS
) -> tuple[Query, Callable[[Made], bool]]:
    """A query of up to four filters, most of which one and the same task meets, and what it means."""
    like = chance.choice(tasks)
    query: Query = {}
    conditions: list[Callable[[Made], bool]] = []
    for name in chance.sample(names, chance.randrange(5)):
        match name:
            case "status":
                word = chance.choice([WORD[like.status], *MEANT])
                query[name] = word
                conditions.append(partial(spelled, word))
            case "internal_status":
                conditions.append(plain(query, name, like.internal_status))
            case "from_date" | "to_date":
                at = chance.choice([like, chance.choice(tasks)]).created_at
                query[name] = moment(at, chance)
                conditions.append(partial(since if name == "from_date" else until, at))
            case _:
                field = {"agent_id": "agent", "user_id": "user", "parent_task_id": "parent"}.get(name, "trigger")
                said = getattr(chance.choice([like, like, chance.choice(tasks)]), field)
                conditions.append(plain(query, name, said, field))
    return query, lambda one: all(condition(one) for condition in conditions)


def spelled(word: str, one: Made) -> bool:
    return one.status in MEANT[word]


def since(at: int, one: Made) -> bool:
    return one.created_at >= at


def until(at: int, one: Made) -> bool:
    return one.created_at <= at


def plain(query: Query, name: str, said: str, field: str = "internal_status") -> Callable[[Made], bool]:
    """Filters by a text; an empty one does not narrow the list."""
    query[name] = said
    return lambda one: not said or getattr(one, field) == said


async def page(client: httpx.AsyncClient, query: Query, chance: random.Random, **more: Any) -> Json:
    """Of an agent, from either of the two places that list its tasks."""
    path, params = "/v1/tasks", {**query, **more}
    if params.get("agent_id") and chance.random() < 0.5:
        path = f"/v1/agents/{params.pop('agent_id')}/tasks"
    answer = await client.get(path, params=params)
    assert answer.status_code == 200, answer.text
    body: Json = answer.json()
    assert ("next_cursor" in body) == ("cursor" in more)
    assert body.keys() - {"next_cursor"} == {"items", "total", "page", "per_page", "total_pages"}
    return body


def ids_of(body: Json) -> list[str]:
    return [row["id"] for row in body["items"]]


async def follow(client: httpx.AsyncClient, query: Query, chance: random.Random, per_page: int) -> list[str]:
    """Page by page, each after the cursor of the one before."""
    ids: list[str] = []
    cursor: str | None = ""
    while cursor is not None and len(ids) < FOLLOWED:
        body = await page(client, query, chance, cursor=cursor, per_page=per_page)
        assert len(body["items"]) == per_page or body["next_cursor"] is None
        ids += ids_of(body)
        cursor = body["next_cursor"]
    return ids


async def pages_are_those_of_brute_force_while_tasks_move(
    store: Store, client: httpx.AsyncClient, chance: random.Random, tasks: list[Made]
) -> None:
    """A task's place never changes: pages by number shift only where tasks are made or deleted."""
    restless, _ = parted(tasks)
    known, moved, reading = {one.id: one for one in tasks}, 0, True
    sizes: list[int] = []

    async def write() -> None:
        nonlocal moved
        while reading:
            moved += await move(store, chance, restless)

    async with asyncio.TaskGroup() as group:
        group.create_task(write())
        while len(sizes) < 25 or moved < MOVED:
            query, meets = asked(chance, tasks, UNTOUCHED)
            expected = newest_first(one for one in tasks if meets(one))
            sizes.append(len(expected))
            per_page = chance.choice([1, 7, 20, 50])
            last = math.ceil(len(expected) / per_page)
            for number in {1, 2, chance.randrange(1, last + 2), max(1, last), last + 1}:
                body = await page(client, query, chance, page=number, per_page=per_page)
                assert ids_of(body) == expected[(number - 1) * per_page : number * per_page], query
                told = (body["total"], body["page"], body["per_page"], body["total_pages"])
                assert told == (len(expected), number, per_page, last)
                for row in body["items"]:
                    agrees(row, known[row["id"]])
        reading = False
    assert (min(sizes), max(sizes)) == (0, TASKS)


def agrees(row: Json, one: Made) -> None:
    said = (row["agent_id"], row["user_id"], row["parent_task_id"], row["triggering_agent_id"])
    assert said == (one.agent, one.user or None, one.parent or None, one.trigger or None)
    at = datetime.fromisoformat(row["created_at"]) - datetime.fromtimestamp(0, UTC)
    assert at == timedelta(microseconds=one.created_at)


async def every_filter_is_what_brute_force_finds(
    client: httpx.AsyncClient, chance: random.Random, tasks: list[Made]
) -> None:
    known, met = {one.id: one for one in tasks}, set()
    for _ in range(30):
        query, meets = asked(chance, tasks)
        expected = newest_first(one for one in tasks if meets(one))
        body = await page(client, query, chance, per_page=50)
        assert (ids_of(body), body["total"]) == (expected[:50], len(expected)), query
        for row in body["items"]:
            assert row["status"] == WORD[known[row["id"]].status]
            met.add(known[row["id"]].status)
        ids = await follow(client, query, chance, chance.choice([20, 50]))
        assert ids == expected[: len(ids)], query
        assert len(ids) >= min(len(expected), FOLLOWED)
    assert met == {*WORD} - {Status.PAUSED}  # see tests/store/many.py


async def cursors_skip_and_repeat_nothing_while_others_write(
    store: Store, client: httpx.AsyncClient, chance: random.Random, tasks: list[Made]
) -> None:
    restless, still = parted(tasks)
    compared = 0
    async with writing(store, chance, restless) as done:
        while compared < COMPARED or min(done.values()) < WRITTEN:
            query, meets = asked(chance, tasks)
            expected = newest_first(one for one in still.values() if meets(one))
            ids = await follow(client, query, chance, chance.choice([20, 50]))
            unmoved = [id_ for id_ in ids if id_ in still]
            assert unmoved == expected[: len(unmoved)], query
            assert len(ids) >= FOLLOWED or len(unmoved) == len(expected), query
            assert len(ids) == len({*ids})
            compared += len(unmoved)


async def bounds_are_refused_beyond_them(client: httpx.AsyncClient) -> None:
    for path in ("/v1/tasks", "/v1/agents/a0/tasks"):
        for name, value in (
            *(("page", "0"), ("page", "-1"), ("page", "x"), ("page", "1.5"), ("per_page", "0"), ("per_page", "51")),
            *(("status", "failed,error"), ("status", ""), ("status", "FAILED"), ("from_date", "yesterday")),
        ):
            answer = await client.get(path, params={name: value})
            assert answer.status_code == 422, f"{path} {name}={value}"
            assert [one["loc"] for one in answer.json()["detail"]] == [["query", name]]
        for number in (10**6, 10**18, 10**400):
            body = (await client.get(path, params={"page": number, "per_page": 50})).json()
            assert (body["items"], body["page"]) == ([], number)
            assert body["total"] > 0
        unmet = await client.get(path, params={"user_id": "x" * 3000})
        assert (unmet.status_code, unmet.json()["total"]) == (200, 0)
    assert (await client.get("/v1/tasks", params={"cursor": "1-x!"})).status_code == 422
    unknown = (await client.get("/v1/agents/nobody/tasks", params={"cursor": ""})).json()
    assert unknown == {"items": [], "total": 0, "page": 1, "per_page": 20, "total_pages": 0, "next_cursor": None}


async def a_walk_that_ends_early_says_so(
    client: httpx.AsyncClient, chance: random.Random, tasks: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two filters that no index has together the total is a lower bound, and the page may be short; its cursor goes
    on.
    """
    monkeypatch.setattr(snapshots, "WALK_MAX", 40)
    like = chance.choice([one for one in tasks if one.trigger and one.internal_status])
    query = {"triggering_agent_id": like.trigger, "internal_status": like.internal_status}
    expected = newest_first(
        one for one in tasks if (one.trigger, one.internal_status) == (like.trigger, like.internal_status)
    )
    answer = await client.get("/v1/tasks", params={**query, "per_page": 50})
    assert answer.headers["X-Total-Capped"] == "true"
    assert ids_of(answer.json()) == expected[: len(answer.json()["items"])]
    assert answer.json()["total"] < len(expected)
    ids: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        body = await page(client, query, chance, cursor=cursor, per_page=50)
        ids += ids_of(body)
        cursor = body["next_cursor"]
    assert ids == expected


@pytest.mark.timeout(120)  # ten seconds, on a machine that does nothing else
async def test_lists_of_many_tasks_are_what_brute_force_finds(
    store: Store, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(5)
    tasks = await populate(store, chance)
    assert len({one.agent for one in tasks}) == AGENTS
    await every_filter_is_what_brute_force_finds(client, chance, tasks)
    await a_walk_that_ends_early_says_so(client, chance, tasks, monkeypatch)
    monkeypatch.undo()
    await pages_are_those_of_brute_force_while_tasks_move(store, client, chance, tasks)
    await cursors_skip_and_repeat_nothing_while_others_write(store, client, chance, tasks)
    await bounds_are_refused_beyond_them(client)
