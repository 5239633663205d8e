"""Agents: records that a first use makes once, that a change counts, and that callers cannot fill the store with."""

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import asdict

from app import agents, keys
from app.agents import Agents
from app.errors import Invalid, NotFound
from app.events import Submission
from app.settings import Settings
from app.store import Store

HOSTILE = ["", " ", "a b", "a/b", "a\n", "ä", "a\0b", "*", "[a]", "{p0}", "x" * 129]


@pytest.fixture(params=[1, 3])
def settings(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    return Settings(data=tmp_path / "data", lease_seconds=2, grace_seconds=2, partitions=request.param)


async def ids(store: Store, org: str = "o", *, offset: int = 0, limit: int = 100) -> list[str]:
    found, _ = await store.agents.list(org, offset=offset, limit=limit)
    return [agent.id for agent in found]


async def test_a_first_use_makes_the_agent_and_later_ones_find_it(store: Store) -> None:
    assert await store.agents.get("o", "a:1.b-c_D") is None
    made = await store.agents.used("o", "a:1.b-c_D")
    assert (made.id, made.org, made.name, made.queue) == ("a:1.b-c_D", "o", "a:1.b-c_D", "agent:a:1.b-c_D")
    assert (made.provider, made.model, made.effort, made.version) == ("", "", "", 1)
    seconds, _ = await store.door.read("TIME")
    assert made.created_at == made.updated_at
    assert abs(made.created_at - int(seconds) * 1_000_000) < 60_000_000
    assert await store.agents.used("o", "a:1.b-c_D") == made == await store.agents.get("o", "a:1.b-c_D")


async def test_many_first_uses_at_once_make_one_record(store: Store) -> None:
    elsewhere = Agents(store.door, store.partitions)
    made = await asyncio.gather(*(one.used("o", "a") for one in [store.agents, elsewhere] * 20))
    assert {agent.version for agent in made} == {1}
    assert len({agent.created_at for agent in made}) == 1
    assert await store.agents.list("o") == ([made[0]], 1)


async def test_a_change_counts_and_what_says_the_same_does_not(store: Store) -> None:
    await store.agents.used("o", "a")
    first = await store.agents.save("o", "a", name="Ada", provider="openai", model="m", effort="high", queue="q")
    assert asdict(first) | {"created_at": 0, "updated_at": 0} == {
        "id": "a",
        "org": "o",
        "name": "Ada",
        "provider": "openai",
        "model": "m",
        "effort": "high",
        "queue": "q",
        "version": 2,
        "created_at": 0,
        "updated_at": 0,
    }
    assert await store.agents.save("o", "a", model="m", name="Ada") == first
    second = await store.agents.save("o", "a", model="n")
    assert (second.model, second.provider, second.name, second.version) == ("n", "openai", "Ada", 3)
    assert second.created_at == first.created_at < first.updated_at < second.updated_at
    # Empty is as of a new one.
    third = await store.agents.save("o", "a", name="", provider="", model="", effort="", queue="")
    assert (third.name, third.provider, third.model, third.effort, third.queue) == ("a", "", "", "", "agent:a")
    assert third.version == 4
    assert await store.agents.save("o", "a", name="", queue="") == third


async def test_saving_makes_an_agent_with_what_it_says(store: Store) -> None:
    made = await store.agents.save("o", "a", model="m", queue="")
    assert (made.model, made.queue, made.version) == ("m", "agent:a", 1)
    assert await store.agents.used("o", "a") == made


async def test_changes_at_once_all_count(store: Store) -> None:
    await store.agents.used("o", "a")
    await asyncio.gather(*(store.agents.save("o", "a", model=f"m{i}") for i in range(20)))
    found = await store.agents.get("o", "a")
    assert found is not None
    assert found.version == 21


async def test_a_page_is_oldest_first_and_ties_go_by_id(store: Store) -> None:
    made = [await store.agents.used("o", f"a{9 - i}") for i in range(10)]
    assert await store.agents.list("o", limit=100) == (made, 10)
    assert await store.agents.list("o", offset=3, limit=4) == (made[3:7], 10)
    assert await store.agents.list("o", offset=9, limit=5) == (made[9:], 10)
    assert await store.agents.list("o", offset=10, limit=5) == ([], 10)
    assert await store.agents.list("o", limit=0) == ([], 10)
    for agent in made:
        tag = store.partitions.home("o", "agent", agent.id)
        await store.door.call("ZADD", keys.key(tag, "agents", "o"), made[0].created_at, agent.id)
    assert await ids(store) == sorted(agent.id for agent in made)
    assert await ids(store, offset=2, limit=3) == ["a2", "a3", "a4"]


async def test_a_page_leaves_out_a_record_that_went_while_it_was_read(store: Store) -> None:
    for id_ in ("a", "b", "c"):
        await store.agents.used("o", id_)
    await store.door.call("DEL", keys.key(store.partitions.home("o", "agent", "b"), "agent", "o", "b"))
    assert await ids(store) == ["a", "c"]


async def test_an_organisation_sees_its_own_agents(store: Store) -> None:
    await store.agents.save("o", "a", model="m")
    await store.agents.save("other", "a", model="n")
    found = await store.agents.get("o", "a")
    assert found is not None
    assert (found.model, await ids(store), await ids(store, "third")) == ("m", ["a"], [])
    await store.agents.delete("other", "a")
    assert await store.agents.get("o", "a") == found


async def test_a_deleted_record_leaves_its_tasks_and_the_next_use_makes_a_new_one(store: Store) -> None:
    await store.agents.save("o", "a", model="m")
    await store.submit(Submission(id="t", org="o", agent="a", query="?", submission="t", llm_model="m"))
    await store.agents.delete("o", "a")
    assert await store.agents.get("o", "a") is None
    assert await store.agents.list("o") == ([], 0)
    with pytest.raises(NotFound):
        await store.agents.delete("o", "a")
    task = await store.get("o", "t")
    assert task is not None
    assert (task.agent, task.llm_model) == ("a", "m")
    again = await store.agents.used("o", "a")
    assert (again.model, again.version) == ("", 1)


@pytest.mark.parametrize("id_", HOSTILE)
async def test_what_is_no_id_is_nobody(store: Store, id_: str) -> None:
    assert await store.agents.get("o", id_) is None
    with pytest.raises(Invalid):
        await store.agents.used("o", id_)
    with pytest.raises(Invalid):
        await store.agents.save("o", id_, model="m")
    with pytest.raises(NotFound):
        await store.agents.delete("o", id_)
    assert await store.agents.list("o") == ([], 0)


@pytest.mark.parametrize(
    "given",
    [
        {"name": "x" * 257},
        {"name": "a\nb"},
        {"provider": "\x1b[31m"},
        {"model": "x" * 257},
        {"model": "\ud800"},
        {"effort": "extreme"},
        {"queue": "a,b"},
        {"queue": "\0"},
    ],
)
async def test_what_a_record_cannot_hold_is_refused_and_changes_nothing(store: Store, given: dict[str, str]) -> None:
    before = await store.agents.save("o", "a", name="Ä", model="m")
    with pytest.raises(Invalid):
        await store.agents.save("o", "a", **given)
    assert await store.agents.get("o", "a") == before


async def test_callers_cannot_fill_the_store_with_agents(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "AGENTS_MAX", 30)
    bounded = Agents(store.door, store.partitions)
    used = await asyncio.gather(*(bounded.used("o", f"a{i}") for i in range(200)))
    _, total = await bounded.list("o", limit=0)
    assert total == 30 == len([agent for agent in used if agent.version])
    beyond = next(agent for agent in used if not agent.version)
    assert (beyond.name, beyond.queue, beyond.model) == (beyond.id, f"agent:{beyond.id}", "")
    assert await bounded.get("o", beyond.id) is None
    known = next(agent for agent in used if agent.version)
    assert await bounded.used("o", known.id) == known
    assert (await bounded.used("other", "a")).version == 1
    # An operator who saves one means it.
    assert (await bounded.save("o", beyond.id, model="m")).version == 1
    assert (await bounded.used("o", beyond.id)).model == "m"


async def test_agents_are_no_difference_to_the_log_and_survive_a_rebuild(store: Store) -> None:
    agent = await store.agents.save("o", "a", model="m")
    await store.submit(Submission(id="t", org="o", agent="a", query="?", submission="t"))
    assert [found async for found in store.snapshots.verify()] == []
    assert await store.snapshots.rebuild() == (1, [])
    assert await store.agents.list("o") == ([agent], 1)
    for tag in store.partitions.tags:
        async for name in store.snapshots._scan(f"{keys.prefix(tag)}agent*"):
            kind = keys.declared(name.encode())
            assert kind is not None, name
            assert (await store.door.read("TYPE", name)).decode() == kind.type
