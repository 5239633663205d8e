"""One store, two spellings: a task made through one dialect reads correctly through the other, in every status.

Golden files hold what each dialect says, of its own tasks and of the other's. `python -m tests.api.test_agreement`
writes them anew; read the difference before you commit it.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import msgspec
import pytest

from app import errors, events
from app.api import shannon, xpander
from app.errors import TaskcastError
from app.events import AnyEvent, Json, Submission
from app.frames import encode
from app.log import random_id
from app.store import Store
from app.task import STORED, TERMINAL, Status, task
from tests.api.asking import claimed, invoked
from tests.api.lives import INVOCATION, LIVES, QUESTION, SAMPLES, folded, happened
from tests.api.serving import ORG

GOLDEN = Path(__file__).parent / "golden"
DIALECTS = pytest.mark.parametrize("dialect", [shannon, xpander], ids=["shannon", "xpander"])


# The same names


@DIALECTS
def test_a_dialect_has_the_names_of_a_dialect_and_a_word_for_every_status(dialect: ModuleType) -> None:
    names = ["STATUS", "control", "error_body", "frame", "routes", "submission", "task_body"]
    own = {"Paths", "speaks"} if dialect is xpander else set()  # its paths have several spellings
    assert [name for name in dialect.__all__ if name not in own] == names
    assert set(dialect.__all__) == {*names, *own}
    assert all(hasattr(dialect, name) for name in names)
    assert set(dialect.STATUS) == set(STORED)


def every_error(kind: type[TaskcastError] = TaskcastError) -> set[type[TaskcastError]]:
    return {kind}.union(*(every_error(child) for child in kind.__subclasses__() if child.__module__ == errors.__name__))


@DIALECTS
def test_every_error_has_a_status_and_a_body_in_each_dialect_and_the_inside_never_leaks(dialect: ModuleType) -> None:
    word = "detail" if dialect is xpander else "error"
    for kind in every_error():
        status, body = dialect.error_body(kind("cannot connect to /data/valkey.sock"))
        assert 400 <= status < 600
        assert body[word]
        msgspec.json.encode(body)
        if status == 500 or kind is errors.Unavailable:
            assert "valkey.sock" not in str(body)


def test_the_dialects_differ_in_the_status_of_what_does_not_fit_alone() -> None:
    differing = {kind for kind in every_error() if shannon.error_body(kind("?"))[0] != xpander.error_body(kind("?"))[0]}
    assert differing == {errors.Invalid}  # 400 there, FastAPI's 422 here


# What they say, in files


def bodies(status: Status, question: Submission) -> dict[str, Json]:
    found = task(folded(*LIVES[status], question=question).fields)
    return {"shannon": shannon.task_body(found), "xpander": xpander.task_body(found)}


def golden() -> dict[str, Any]:
    """File → what it holds."""
    files: dict[str, Any] = {}
    for status in STORED:
        own, other = bodies(status, QUESTION), bodies(status, INVOCATION)
        files[f"shannon_{status}.json"], files[f"xpander_{status}.json"] = own["shannon"], other["xpander"]
        files[f"crossed_{status}.json"] = {
            "xpander of Shannon's task": own["xpander"],
            "Shannon of xpander's task": other["shannon"],
        }
    entries = {type(event).__name__: happened(event, question=INVOCATION) for event in SAMPLES}
    for dialect in (shannon, xpander):
        files[f"{dialect.__name__.rpartition('.')[2]}_frames.json"] = {
            name: [encode(frame).decode() for frame in dialect.frame(entry)] for name, entry in entries.items()
        }
    return {name: json.loads(msgspec.json.encode(held)) for name, held in files.items()}


@pytest.mark.parametrize("name", golden())
def test_a_dialect_says_what_its_golden_file_holds(name: str) -> None:
    assert golden()[name] == json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def test_there_is_no_other_golden_file() -> None:
    assert {file.name for file in GOLDEN.iterdir()} == set(golden())


# One store

SHANNON, XPANDER = "/api/v1/tasks", "/v1/tasks"
Make = Callable[[httpx.AsyncClient], Awaitable[str]]


async def through_shannon(client: httpx.AsyncClient) -> str:
    answer = await client.post("/api/v1/agents/writer", json={"input": "why?"})
    id_: str = answer.json()["task_id"]
    return id_


ENDS: dict[Status, AnyEvent] = {
    Status.COMPLETED: events.Completed(result="because"),
    Status.FAILED: events.Failed(error="no luck"),
    Status.ERRORED: events.Errored(error="ValueError"),
}


async def bring(client: httpx.AsyncClient, store: Store, id_: str, status: Status) -> None:
    """Each status by a way that is open to everybody: a worker's word, or a control of either dialect."""
    if status is Status.QUEUED:
        return
    if status is Status.HELD:
        assert (await client.post(f"{SHANNON}/{id_}/pause")).status_code == 202
        return
    attempt = await claimed(store, id_, "agent:writer")
    await attempt.write("be")
    if status in ENDS:
        await attempt.say(ENDS[status])
    elif status is Status.PAUSED:
        await client.patch(f"/agent-execution/{id_}/update", json={"status": "paused"})
    elif status is Status.CANCELLED:
        assert (await client.post(f"{XPANDER}/{id_}/stop")).status_code == 200
    elif status is Status.TIMED_OUT:
        await store.append(ORG, id_, events.TimedOut())


MADE = pytest.mark.parametrize("make", [through_shannon, invoked], ids=["shannon", "xpander"])


@MADE
@pytest.mark.parametrize("status", STORED)
async def test_a_task_reads_the_same_through_both(
    client: httpx.AsyncClient, store: Store, make: Make, status: Status
) -> None:
    id_ = await make(client)
    await bring(client, store, id_, status)
    stored = await store.get(ORG, id_)
    assert stored is not None
    assert stored.status is status
    theirs = (await client.get(f"{SHANNON}/{id_}")).json()
    ours = (await client.get(f"{XPANDER}/{id_}")).json()
    sdks = (await client.get(f"/agent-execution/{id_}/status")).json()
    (row,) = (await client.get(XPANDER, params={"status": xpander.STATUS[status]})).json()["items"]
    (listed,) = (await client.get(SHANNON, params={"status": shannon.STATUS[status]})).json()["tasks"]
    assert ours == sdks
    assert theirs["task_id"] == listed["task_id"] == ours["id"] == row["id"] == id_
    assert (theirs["status"], listed["status"]) == (shannon.STATUS[status], shannon.STATUS[status])
    assert (ours["status"], row["status"]) == (xpander.STATUS[status], xpander.STATUS[status])
    # The same terminality, at the same moment, after the same entry.
    assert ("completed_at" in theirs) == (ours["finished_at"] is not None) == (status in TERMINAL)
    assert theirs.get("completed_at") == ours["finished_at"]
    assert (theirs["created_at"], theirs.get("started_at")) == (ours["created_at"], ours["started_at"])
    assert (theirs["last_seq"], theirs["last_event_id"]) == (stored.last_seq, stored.last_event_id)
    assert theirs["updated_at"] == row["updated_at"]
    # The same words.
    assert theirs["query"] == ours["input"]["text"] == row["title"] == "why?"
    assert (theirs.get("result") or theirs["error"] or None) == ours["result"] == row["result"]
    assert ours["agent_id"] == "writer"


@MADE
@pytest.mark.parametrize("status", sorted(TERMINAL))
async def test_a_stream_tells_the_same_story_through_both(
    client: httpx.AsyncClient, store: Store, make: Make, status: Status
) -> None:
    id_ = await make(client)
    await bring(client, store, id_, status)
    theirs = await lines(client, f"{SHANNON}/{id_}/stream")
    ours = [json.loads(line) for line in await lines(client, f"/agent-execution/{id_}/events")]
    shown = [json.loads(line) for line in theirs if line != "[DONE]"]
    stored = await store.get(ORG, id_)
    assert stored is not None
    assert theirs[-1] == "[DONE]"
    if status is not Status.CANCELLED:  # whose frame is made of what upstream puts into it
        assert shown[-1]["seq"] == stored.last_seq
    assert [frame["type"] for frame in ours] == ["task_created", "task_updated", "chunk", "task_finished"]
    last = ours[-1]["data"]
    assert last == (await client.get(f"{XPANDER}/{id_}")).json()
    row = (await client.get(XPANDER)).json()["items"][0]
    assert datetime.fromisoformat(ours[-1]["time"]) == datetime.fromisoformat(row["updated_at"])


async def lines(client: httpx.AsyncClient, path: str) -> list[str]:
    async with asyncio.timeout(10):
        answer = await client.get(path)
    assert answer.headers["content-type"] == "text/event-stream"
    return [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]


@MADE
async def test_each_dialect_ends_what_the_other_began(client: httpx.AsyncClient, store: Store, make: Make) -> None:
    stopped, cancelled, deleted, forgotten = [await make(client) for _ in range(4)]
    assert (await client.post(f"{XPANDER}/{stopped}/stop")).json()["is_manually_stopped"] is True
    assert (await client.get(f"{SHANNON}/{stopped}")).json()["status"] == "TASK_STATUS_CANCELLED"
    assert (await client.post(f"{SHANNON}/{cancelled}/cancel")).status_code == 202
    assert (await client.get(f"{XPANDER}/{cancelled}")).json()["is_manually_stopped"] is True
    assert (await client.delete(f"{XPANDER}/{deleted}")).status_code == 204
    assert (await client.get(f"{SHANNON}/{deleted}")).status_code == 404
    assert (await client.delete(f"{SHANNON}/{forgotten}")).status_code == 204
    assert (await client.get(f"{XPANDER}/{forgotten}")).status_code == 404


@MADE
async def test_a_turn_follows_whoever_began(client: httpx.AsyncClient, store: Store, make: Make) -> None:
    id_ = await make(client)
    await bring(client, store, id_, Status.COMPLETED)
    answer = await client.post("/v1/agents/writer/invoke/async", json={"id": id_, "input": {"text": "and then?"}})
    assert (answer.status_code, answer.json()["status"]) == (200, "pending")
    theirs = (await client.get(f"{SHANNON}/{id_}")).json()
    assert (theirs["status"], theirs["query"], theirs["response"]) == ("TASK_STATUS_QUEUED", "and then?", None)


async def test_what_only_its_own_dialect_reads_stays_hidden_from_the_other(
    client: httpx.AsyncClient, store: Store
) -> None:
    made: Json = {
        "input": {"text": "q", "user": {"email": "a@b.c"}},
        "additional_context": "ours alone",
        "source": random_id(),
    }
    id_ = await invoked(client, **made)
    theirs = (await client.get(f"{SHANNON}/{id_}")).text
    assert "ours alone" not in theirs
    assert "a@b.c" not in theirs


if __name__ == "__main__":
    for name, held in golden().items():
        (GOLDEN / name).write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
