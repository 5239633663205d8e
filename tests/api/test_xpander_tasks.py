"""xpander's tasks over REST, on a real store: lists and their filters, one task, its conversation, stop and delete."""

import asyncio
import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from app import events
from app.api.xpander import tasks as tasks_
from app.errors import NotFound
from app.events import Submission
from app.log import random_id
from app.store import Store
from app.task import TERMINAL, Status
from tests.api.asking import Connect, claimed, invoked
from tests.api.serving import ORG, USER

TASKS, WRITER = "/v1/tasks", "agent:writer"
STATUSES = ("pending", "executing", "paused", "error", "failed", "completed", "stopped")
NULLABLE = {"anyOf": [{"type": "string"}, {"type": "null"}]}
PAGE = Draft202012Validator(
    {
        "type": "object",
        "required": ["items", "total", "page", "per_page", "total_pages"],
        "additionalProperties": False,
        "properties": {
            **{key: {"type": "integer"} for key in ("total", "page", "per_page", "total_pages")},
            "next_cursor": NULLABLE,
            "items": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["id", "agent_id", "organization_id", "status"],
                    "additionalProperties": False,
                    "properties": {
                        **{key: {"type": "string"} for key in ("id", "agent_id", "organization_id")},
                        "status": {"enum": [*STATUSES]},
                        **dict.fromkeys(
                            ("user_id", "parent_task_id", "triggering_agent_id", "result", "title"), NULLABLE
                        ),
                        **dict.fromkeys(("created_at", "updated_at", "source_node_type"), NULLABLE),
                    },
                },
            },
        },
    }
)
"""The seed's `PaginatedResponse_TasksListItem_`, and no more, but for our own cursor."""


async def brought(client: httpx.AsyncClient, store: Store, status: Status) -> str:
    """A task that ended so."""
    id_ = await invoked(client)
    attempt = await claimed(store, id_, WRITER)
    ends: dict[Status, events.AnyEvent] = {
        Status.COMPLETED: events.Completed(result="because"),
        Status.FAILED: events.Failed(error="no luck"),
        Status.ERRORED: events.Errored(error="ValueError"),
    }
    if status in ends:
        await attempt.say(ends[status])
    else:
        await store.append(ORG, id_, events.Cancelled() if status is Status.CANCELLED else events.TimedOut())
    return id_


async def listed(client: httpx.AsyncClient, path: str = TASKS, **query: Any) -> Any:
    answer = await client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    PAGE.validate(body)
    return body


async def ids(client: httpx.AsyncClient, path: str = TASKS, **query: Any) -> list[str]:
    return [item["id"] for item in (await listed(client, path, **query))["items"]]


# Lists


async def test_a_list_has_the_seeds_envelope_and_items_newest_first(client: httpx.AsyncClient, store: Store) -> None:
    assert await listed(client) == {"items": [], "total": 0, "page": 1, "per_page": 20, "total_pages": 0}
    user = {"id": "u1", "email": "ada@example.com"}
    first = await invoked(client, source="sdk", input={"text": "Reply with exactly SECOND", "user": user})
    await (await claimed(store, first, WRITER)).complete("SECOND")
    second = await invoked(client, title="T", triggering_agent_id="planner", parent_execution_id=first)
    body = await listed(client, per_page=5)
    assert (body["total"], body["total_pages"]) == (2, 1)
    newer, older = body["items"]
    assert older == {
        "id": first,
        "agent_id": "writer",
        "user_id": "u1",
        "parent_task_id": None,
        "triggering_agent_id": None,
        "organization_id": ORG,
        "status": "completed",
        "source_node_type": "sdk",
        "created_at": older["created_at"],
        "updated_at": older["updated_at"],
        "title": "Reply with exactly SECOND",
        "result": "SECOND",
    }
    assert datetime.fromisoformat(older["created_at"]) < datetime.fromisoformat(older["updated_at"])
    assert (newer["id"], newer["title"], newer["result"], newer["source_node_type"]) == (second, "T", None, "api")
    assert (newer["parent_task_id"], newer["triggering_agent_id"], newer["user_id"]) == (first, "planner", None)


async def test_pages_have_bounds_and_one_beyond_the_end_is_empty(client: httpx.AsyncClient) -> None:
    every = [await invoked(client) for _ in range(5)][::-1]
    pages = [await ids(client, page=page, per_page=2) for page in (1, 2, 3, 4)]
    assert pages == [every[:2], every[2:4], every[4:], []]
    body = await listed(client, page=4, per_page=2)
    assert (body["total"], body["page"], body["per_page"], body["total_pages"]) == (5, 4, 2, 3)
    assert await ids(client, per_page=50) == every
    assert await ids(client, page=10**30, per_page=50) == []
    for name in ("user_id", "agent_id", "parent_task_id", "triggering_agent_id", "internal_status"):
        assert await ids(client, **{name: "x" * 2000}) == []
    for wrong in (
        {"page": 0},
        {"page": "x"},
        {"per_page": 0},
        {"per_page": 51},
        {"status": "running"},
        {"from_date": "x"},
    ):
        answer = await client.get(TASKS, params=wrong)
        assert answer.status_code == 422
        ((name, _),) = wrong.items()
        (place,) = answer.json()["detail"]
        assert place["loc"] == ["query", name]
        assert place.keys() >= {"loc", "msg", "type"}


async def test_every_filter_narrows_and_all_of_them_together(client: httpx.AsyncClient, store: Store) -> None:
    names = ("agent", "user", "trigger", "status")
    every: dict[tuple[str, ...], str] = {}
    for agent, user, trigger in itertools.product(("a", "b"), ("u", "v"), ("x", "y")):
        who = {"id": user, "email": ""}
        body: dict[str, Any] = {
            "input": {"user": who},
            "triggering_agent_id": trigger,
            "parent_execution_id": f"p-{user}",
        }
        every[agent, user, trigger, "pending"] = await invoked(client, agent, **body)
        ended = every[agent, user, trigger, "stopped"] = await invoked(client, agent, **body)
        await client.patch(f"/agent-execution/{ended}/update", json={"status": "stopped", "internal_status": "done"})
    queries = {"agent": "agent_id", "user": "user_id", "trigger": "triggering_agent_id", "status": "status"}
    for chosen in itertools.product(*((None, value) for value in ("b", "v", "y", "stopped"))):
        asked = {queries[name]: value for name, value in zip(names, chosen, strict=True) if value}
        expected = {
            id_ for key, id_ in every.items() if all(want in {None, has} for want, has in zip(chosen, key, strict=True))
        }
        assert set(await ids(client, **asked)) == expected, asked
        asked.pop("agent_id", None)
        of_b = {id_ for key, id_ in every.items() if key[0] == "b"} & {
            id_
            for key, id_ in every.items()
            if all(want in {None, has} for want, has in zip(chosen[1:], key[1:], strict=True))
        }
        assert set(await ids(client, "/v1/agents/b/tasks", **asked)) == of_b
    of_v = {id_ for key, id_ in every.items() if key[1] == "v"}
    assert set(await ids(client, parent_task_id="p-v")) == of_v
    assert set(await ids(client, internal_status="done")) == {i for key, i in every.items() if key[3] == "stopped"}
    assert await ids(client, internal_status="don") == []
    assert await ids(client, "/v1/agents/nobody/tasks") == []


@pytest.mark.parametrize(
    ("word", "statuses"),
    [("failed", {Status.FAILED, Status.TIMED_OUT}), ("error", {Status.ERRORED}), ("stopped", {Status.CANCELLED})],
)
async def test_a_word_finds_every_status_that_it_shows(
    client: httpx.AsyncClient, store: Store, word: str, statuses: set[Status]
) -> None:
    found = {status: await brought(client, store, status) for status in sorted(TERMINAL)}
    assert set(await ids(client, status=word)) == {found[status] for status in statuses}


async def test_a_list_knows_dates_both_included(client: httpx.AsyncClient) -> None:
    first, second, third = [await invoked(client) for _ in range(3)]
    moments = {item["id"]: item["created_at"] for item in (await listed(client))["items"]}
    assert await ids(client, from_date=moments[second]) == [third, second]
    assert await ids(client, to_date=moments[second]) == [second, first]
    assert await ids(client, from_date=moments[second], to_date=moments[second]) == [second]
    local = datetime.fromisoformat(moments[second]).replace(tzinfo=None).isoformat()
    assert await ids(client, to_date=local) == [second, first]  # without an offset it is UTC
    east = datetime.fromisoformat(moments[second]) + timedelta(hours=5)
    assert await ids(client, to_date=east.replace(tzinfo=None).isoformat() + "+05:00") == [second, first]
    assert await ids(client, from_date=moments[third], to_date=moments[first]) == []
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).date().isoformat()
    assert await ids(client, from_date=tomorrow) == []
    for far in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
        assert len(await ids(client, from_date=far)) == (3 if far < "1" else 0)
    assert await ids(client, "/v1/agents/writer/tasks", from_date=moments[third]) == [third]


async def test_a_cursor_gives_every_task_once_while_others_are_invoked(client: httpx.AsyncClient) -> None:
    every = [await invoked(client) for _ in range(7)]
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        body = await listed(client, cursor=cursor, per_page=2)
        seen += [item["id"] for item in body["items"]]
        cursor = body["next_cursor"]
        await invoked(client)
    assert seen == every[::-1]
    assert "next_cursor" not in await listed(client)
    answer = await client.get(TASKS, params={"cursor": "nonsense"})
    assert answer.status_code == 422


# Who may


async def test_without_a_key_everything_is_401_and_a_foreign_task_is_a_404(
    connect: Connect, client: httpx.AsyncClient
) -> None:
    id_ = await invoked(client)
    stranger, foreigner = await connect(), await connect("ada", org="elsewhere")
    calls = [
        ("GET", ""),
        *(("GET", f"/{id_}{rest}") for rest in ("", "/thread", "/thread/full")),
        *(("POST", f"/{id_}/{verb}") for verb in ("stop", "approve", "reject")),
        ("DELETE", f"/{id_}"),
    ]
    for method, path in calls:
        answer = await stranger.request(method, TASKS + path)
        assert (answer.status_code, answer.json()) == (401, {"detail": "Invalid or missing API key"})
        if path:
            answer = await foreigner.request(method, TASKS + path)
            assert (answer.status_code, answer.json()) == (404, {"detail": "Task not found"})
    assert await ids(foreigner) == []
    colleague = await connect("colleague")
    assert await ids(colleague) == [id_]
    assert (await client.get(f"{TASKS}/{id_}")).json()["status"] == "pending"
    assert (
        await client.get(TASKS, headers={"X-API-Key": "", "Authorization": f"Bearer {'sk_wrong'}"})
    ).status_code == 401


@pytest.mark.parametrize("rest", ["", "/thread", "/thread/full"])
async def test_a_bad_id_is_a_422_and_an_unknown_one_a_404(client: httpx.AsyncClient, rest: str) -> None:
    for id_ in ("no%20spaces", "x" * 129, "caf%C3%A9", "a%0A", "a%00"):
        answer = await client.get(f"{TASKS}/{id_}{rest}")
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["path", "task_id"]
    answer = await client.get(f"{TASKS}/unknown{rest}")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Task not found"})


async def test_what_is_no_route_is_told_in_this_dialects_shape(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/nothing")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not found: /v1/nothing"})
    answer = await client.put(TASKS)
    assert (answer.status_code, answer.json(), answer.headers["Allow"]) == (
        405,
        {"detail": "Method not allowed"},
        "GET, HEAD",
    )


# Conversations


async def test_threads_hold_all_turns_and_the_full_one_tools_and_sub_tasks(
    client: httpx.AsyncClient, store: Store
) -> None:
    id_ = await invoked(client)
    attempt = await claimed(store, id_, WRITER)
    await attempt.say(events.ToolCalled(tool="search", call="c1", params={"q": "x"}))
    await attempt.say(events.ToolReturned(tool="search", call="c1", output="found"))
    child = await invoked(client, "helper", input={"text": "help"}, parent_execution_id=id_)
    grandchild = await invoked(client, "helper", input={"text": "more help"}, parent_execution_id=child)
    for one in (child, grandchild):
        await (await claimed(store, one, "agent:helper")).complete(f"done {one}")
    await attempt.complete("Paris.")
    await invoked(client, id=id_, input={"text": "And Spain?"})
    await (await claimed(store, id_, WRITER)).complete("Madrid.")
    thread = (await client.get(f"{TASKS}/{id_}/thread")).json()
    said = [("user", "why?"), ("assistant", "Paris."), ("user", "And Spain?"), ("assistant", "Madrid.")]
    assert [(one["role"], one["content"]) for one in thread] == said
    assert all(type(one["created_at"]) is int for one in thread)
    full = (await client.get(f"{TASKS}/{id_}/thread/full")).json()
    assert [*full] == ["root", child, grandchild]
    assert [one["role"] for one in full["root"]] == ["user", "assistant", "tool", "assistant", "user", "assistant"]
    assert full["root"][1]["tool_calls"][0]["function"]["name"] == "search"
    assert [one["content"] for one in full[grandchild]] == ["more help", f"done {grandchild}"]
    whole = (await client.get(f"{TASKS}/{id_}")).json()
    assert (whole["sub_executions"], whole["finished_sub_executions"]) == ([child], [child])


async def test_a_full_thread_is_bounded_never_cut_off(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_, "THREADS_MAX", 2)
    id_ = await invoked(client)
    children = [await invoked(client, "helper", parent_execution_id=id_) for _ in range(2)]
    assert [*(await client.get(f"{TASKS}/{id_}/thread/full")).json()] == ["root", *children]
    await invoked(client, "helper", parent_execution_id=id_)
    answer = await client.get(f"{TASKS}/{id_}/thread/full")
    assert answer.status_code == 413
    assert "sub-tasks" in answer.json()["detail"]


async def test_tasks_that_are_each_others_parents_have_a_full_thread(client: httpx.AsyncClient) -> None:
    await invoked(client, id="a", parent_execution_id="b")
    await invoked(client, id="b", parent_execution_id="a")
    await invoked(client, id="self", parent_execution_id="self")
    assert [*(await client.get(f"{TASKS}/a/thread/full")).json()] == ["root", "b"]
    assert [*(await client.get(f"{TASKS}/self/thread/full")).json()] == ["root"]
    for id_ in ("a", "self"):
        assert (await client.delete(f"{TASKS}/{id_}")).status_code == 204
    assert await ids(client) == []


# Stop and delete


@pytest.mark.parametrize("status", sorted(TERMINAL))
async def test_a_stop_of_what_has_ended_changes_nothing(
    client: httpx.AsyncClient, store: Store, status: Status
) -> None:
    id_ = await brought(client, store, status)
    before = (await client.get(f"{TASKS}/{id_}")).json()
    stored = await store.get(ORG, id_)
    for _ in range(2):
        answer = await client.post(f"{TASKS}/{id_}/stop")
        assert (answer.status_code, answer.json()) == (200, before)
    assert await store.get(ORG, id_) == stored


@pytest.mark.parametrize("word", ["pending", "executing", "paused"])
async def test_a_stop_is_seen_at_once_and_takes_sub_tasks_along(
    client: httpx.AsyncClient, store: Store, word: str
) -> None:
    id_ = await invoked(client)
    child = await invoked(client, "helper", parent_execution_id=id_)
    await client.patch(f"/agent-execution/{id_}/update", json={"status": word})
    body = (await client.post(f"{TASKS}/{id_}/stop")).json()
    assert (body["status"], body["is_manually_stopped"]) == ("stopped", True)
    assert body["finished_at"] is not None
    assert (body["sub_executions"], body["finished_sub_executions"]) == ([child], [child])
    taken = (await client.get(f"{TASKS}/{child}")).json()
    assert (taken["status"], taken["is_manually_stopped"]) == ("stopped", False)


async def test_stops_that_race_are_one(client: httpx.AsyncClient, store: Store) -> None:
    id_ = await invoked(client)
    answers = await asyncio.gather(*(client.post(f"{TASKS}/{id_}/stop") for _ in range(5)))
    assert {(answer.status_code, answer.json()["status"]) for answer in answers} == {(200, "stopped")}
    page = await store.events(ORG, id_, "")
    assert page
    assert [type(entry.event) for entry in page.entries] == [events.Submitted, events.Cancelled]


async def test_a_delete_stops_first_takes_sub_tasks_along_and_works_once(
    client: httpx.AsyncClient, store: Store
) -> None:
    id_ = await invoked(client)
    attempt = await claimed(store, id_, WRITER)
    child = await invoked(client, "helper", parent_execution_id=id_)
    grandchild = await invoked(client, "helper", parent_execution_id=child)
    other = await invoked(client)
    answer = await client.delete(f"{TASKS}/{id_}")
    assert (answer.status_code, answer.content) == (204, b"")
    for gone in (id_, child, grandchild):
        assert (await client.get(f"{TASKS}/{gone}")).status_code == 404
    assert await ids(client) == [other]
    answer = await client.delete(f"{TASKS}/{id_}")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Task not found"})
    with pytest.raises(NotFound):
        await attempt.write("late")
    assert [difference async for difference in store.snapshots.verify()] == []


async def test_deletes_that_race_are_one(client: httpx.AsyncClient) -> None:
    id_ = await invoked(client)
    answers = await asyncio.gather(*(client.delete(f"{TASKS}/{id_}") for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [204, 404, 404, 404, 404]


async def test_a_deleted_id_may_be_used_again(client: httpx.AsyncClient) -> None:
    await invoked(client, id="again", input={"text": "old"})
    await client.delete(f"{TASKS}/again")
    assert await invoked(client, id="again", input={"text": "new"}) == "again"
    thread = (await client.get(f"{TASKS}/again/thread")).json()
    assert [one["content"] for one in thread] == ["new"]


async def test_tasks_of_other_owners_and_dialects_are_the_organisations_too(
    client: httpx.AsyncClient, store: Store
) -> None:
    theirs = Submission(id="t1", org=ORG, owner=USER, session="s", query="q", mode="simple", submission=random_id())
    await store.submit(theirs)
    await store.submit(Submission(id="t2", org=ORG, query="q", submission=random_id()))
    assert await ids(client) == ["t2", "t1"]
    assert (await client.get(f"{TASKS}/t1")).json()["agent_id"] == "default"
