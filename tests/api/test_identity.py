"""Who is calling: keys, their cache, the development key, and where a request may carry one."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from app import identity, keys
from app.errors import Invalid, NotFound, Unauthorized
from app.identity import DEVELOPMENT_KEY, DEVELOPMENT_ORG, DEVELOPMENT_USER, Identities, Identity, hashed, loopback
from app.settings import Settings
from app.store import Store
from tests.api.serving import Served, ended, served


@pytest.fixture
def identities(store: Store, settings: Settings) -> Identities:
    return Identities(store, settings)


async def test_a_key_says_whose_it_is(identities: Identities) -> None:
    key = await identities.create("acme", "ann", "laptop")
    assert key.startswith("sk_")
    assert len(key) == 35
    who = await identities.of(key)
    assert (who.org, who.user) == ("acme", "ann")
    assert who.key not in key


async def test_a_key_may_be_nobodys_in_particular(identities: Identities) -> None:
    assert (await identities.of(await identities.create("acme", "", "ci"))).user == ""


async def test_shannons_long_spelling_of_a_key_is_the_same_key(identities: Identities) -> None:
    key = await identities.create("acme", "ann", "")
    assert await identities.of(key.replace("sk_", "sk-shannon-")) == await identities.of(key)


@pytest.mark.parametrize("key", ["", "sk_nobody", "sk_" + "x" * 32, "sk_\udce4", "ключ"])
async def test_an_unknown_key_is_unauthorized(identities: Identities, key: str) -> None:
    with pytest.raises(Unauthorized):
        await identities.of(key)


@pytest.mark.parametrize(
    ("org", "user", "name"),
    [("", "ann", ""), ("a:b", "ann", ""), ("a/b", "", ""), ("acme", "a b", ""), ("a" * 65, "", ""), ("a", "b", "x\n")],
)
async def test_names_that_could_meet_another_key_are_refused(
    identities: Identities, org: str, user: str, name: str
) -> None:
    with pytest.raises(Invalid):
        await identities.create(org, user, name)


async def test_a_key_may_be_a_workers_for_all_queues_or_some(identities: Identities) -> None:
    plain = await identities.of(await identities.create("acme", "ann", ""))
    everywhere = await identities.of(await identities.create("acme", "ann", "", worker=True))
    some = await identities.of(await identities.create("acme", "ann", "", worker=True, queues=["a", "agent:b", "a"]))
    assert [(who.worker, who.queues) for who in (plain, everywhere, some)] == [
        (False, frozenset()),
        (True, frozenset()),
        (True, frozenset({"a", "agent:b"})),
    ]
    assert [(key.worker, key.queues) for key in await identities.list()] == [
        (False, ()),
        (True, ()),
        (True, ("a", "agent:b")),
    ]


@pytest.mark.parametrize(
    ("worker", "queues"),
    [(False, ["a"]), (True, [""]), (True, ["a,b"]), (True, ["x" * 257]), (True, ["a\n"]), (True, map(str, range(101)))],
)
async def test_a_key_that_cannot_be_meant_is_refused(identities: Identities, worker: bool, queues: Any) -> None:
    with pytest.raises(Invalid):
        await identities.create("acme", "ann", "", worker=worker, queues=list(queues))


async def test_the_store_never_holds_a_key(store: Store, identities: Identities) -> None:
    key = await identities.create("acme", "ann", "laptop")
    (place,) = await store.door.read("KEYS", "*:key:*")
    assert place.decode() == keys.key(store.partitions.home("", "key", hashed(key)), "key", hashed(key))
    assert keys.declared(place)
    assert key.encode() not in str(await store.door.read("HGETALL", place)).encode()


async def test_keys_are_listed_without_what_opens_doors(identities: Identities) -> None:
    first = await identities.create("acme", "ann", "laptop")
    await identities.create("beta", "", "ci")
    listed = await identities.list()
    assert [(key.org, key.user, key.name) for key in listed] == [("acme", "ann", "laptop"), ("beta", "", "ci")]
    assert listed[0].id == (await identities.of(first)).key
    assert 0 < listed[0].created_at <= listed[1].created_at
    assert first not in str(listed)


async def test_any_number_of_keys_is_listed_once(
    store: Store, identities: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.gather(*[identities.create("acme", f"u{i}", "") for i in range(1100)])
    listed = await identities.list()
    assert {key.user for key in listed} == {f"u{i}" for i in range(1100)}
    assert len(listed) == 1100
    read = store.door.read

    async def revoked_meanwhile(*command: Any) -> Any:
        return {} if command[0] == "HGETALL" else await read(*command)

    monkeypatch.setattr(store.door, "read", revoked_meanwhile)
    assert await identities.list() == []


async def test_a_revoked_key_is_unknown(identities: Identities) -> None:
    key = await identities.create("acme", "ann", "laptop")
    await identities.revoke((await identities.of(key)).key)
    with pytest.raises(Unauthorized):
        await identities.of(key)
    assert await identities.list() == []
    with pytest.raises(NotFound):
        await identities.revoke("key_0")


async def test_another_process_forgets_a_revoked_key_soon(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = Identities(store, settings), Identities(store, settings)
    key = await here.create("acme", "ann", "")
    assert await there.of(key)
    await here.revoke((await here.of(key)).key)
    assert await there.of(key)  # known for CACHE_SECONDS
    moment = time.monotonic() + identity.CACHE_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: moment)
    with pytest.raises(Unauthorized):
        await there.of(key)


async def test_the_cache_of_known_keys_is_bounded(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "CACHE_MAX", 2)
    for name in ("a", "b", "c"):
        await identities.of(await identities.create(name, "", ""))
    assert len(identities._cache) == 1


async def test_the_development_key_is_the_seeds_organisation_and_user(identities: Identities) -> None:
    assert await identities.of(DEVELOPMENT_KEY) == Identity(DEVELOPMENT_ORG, DEVELOPMENT_USER, "development")


@pytest.mark.parametrize("changed", [{"host": "0.0.0.0"}, {"host": "::"}, {"host": "example.org"}])
async def test_the_development_key_is_unknown_where_others_can_reach(
    store: Store, settings: Settings, changed: dict[str, str]
) -> None:
    with pytest.raises(Unauthorized):
        await Identities(store, settings.model_copy(update=changed)).of(DEVELOPMENT_KEY)


async def test_the_development_key_is_unknown_on_a_store_of_ones_own(store: Store, settings: Settings) -> None:
    store.settings = settings.model_copy(update={"redis_url": store.door.url})
    with pytest.raises(Unauthorized):
        await Identities(store, settings).of(DEVELOPMENT_KEY)


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("", False), ("10.0.0.1", False)],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, alone: bool) -> None:
    assert loopback(host) is alone


# Over HTTP


@pytest.fixture
async def server(store: Store, settings: Settings) -> AsyncIterator[Served]:
    async with served(store, settings) as running:
        yield running


@pytest.fixture
async def task(store: Store) -> str:
    return await ended(store)


async def ask(server: Served, path: str, **headers: str) -> httpx.Response:
    """Without the client's own key."""
    async with httpx.AsyncClient(base_url=server.url) as client:
        return await client.get(path, headers=headers)


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": DEVELOPMENT_KEY},
        {"Authorization": f"Bearer {DEVELOPMENT_KEY}"},
        {"Authorization": f"bearer  {DEVELOPMENT_KEY}"},
        {"X-API-Key": "sk-shannon-test_123456"},
        {"X-API-Key": DEVELOPMENT_KEY, "Authorization": "Bearer wrong"},
        {"X-API-Key": "", "Authorization": f"Bearer {DEVELOPMENT_KEY}"},
    ],
)
async def test_a_key_comes_in_either_header(server: Served, task: str, headers: dict[str, str]) -> None:
    assert (await ask(server, f"/api/v1/tasks/{task}", **headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": "wrong"},
        {"X-API-Key": "wrong", "Authorization": f"Bearer {DEVELOPMENT_KEY}"},
        {"Authorization": DEVELOPMENT_KEY},
        {"Authorization": f"Basic {DEVELOPMENT_KEY}"},
    ],
)
async def test_without_a_good_key_a_request_is_unauthorized(server: Served, task: str, headers: dict[str, str]) -> None:
    for path in (f"/api/v1/tasks/{task}", f"/api/v1/stream/sse?workflow_id={task}", f"/api/v1/tasks/{task}/stream"):
        answer = await ask(server, path, **headers)
        assert answer.status_code == 401
        assert answer.json() == {"error": "Unauthorized"}
        assert answer.headers["www-authenticate"] == 'Bearer realm="Taskcast API"'


@pytest.mark.parametrize("name", ["api_key", "token"])
async def test_only_streams_take_a_key_in_the_query(server: Served, task: str, name: str) -> None:
    query = f"{name}={DEVELOPMENT_KEY}"
    for path, status in (
        (f"/api/v1/stream/sse?workflow_id={task}&{query}", 200),
        (f"/api/v1/tasks/{task}/stream?{query}", 200),
        (f"/api/v1/tasks/{task}?{query}", 401),
        (f"/api/v1/tasks?{query}", 401),
        (f"/api/v1/tasks/{task}/events?{query}", 401),
    ):
        assert (await ask(server, path)).status_code == status, path
    async with connect(f"ws://127.0.0.1:{server.port}/api/v1/stream/ws?workflow_id={task}&{query}") as socket:
        assert await socket.recv()


async def test_a_query_key_does_not_submit(server: Served) -> None:
    async with httpx.AsyncClient(base_url=server.url) as client:
        answer = await client.post(f"/api/v1/tasks/stream?api_key={DEVELOPMENT_KEY}", json={"query": "q"})
    assert answer.status_code == 401


async def test_the_header_beats_the_query_and_api_key_beats_token(server: Served, task: str) -> None:
    url = f"/api/v1/stream/sse?workflow_id={task}"
    assert (await ask(server, f"{url}&api_key={DEVELOPMENT_KEY}", **{"X-API-Key": "wrong"})).status_code == 401
    assert (await ask(server, f"{url}&api_key={DEVELOPMENT_KEY}&token=wrong")).status_code == 200
    assert (await ask(server, f"{url}&api_key=wrong&token={DEVELOPMENT_KEY}")).status_code == 401


async def test_another_organisations_task_does_not_exist(store: Store, settings: Settings, server: Served) -> None:
    task = await ended(store)
    key = await Identities(store, settings).create("acme", "ann", "")
    for path in (f"/api/v1/tasks/{task}", f"/api/v1/stream/sse?workflow_id={task}", f"/api/v1/tasks/{task}/stream"):
        answer = await ask(server, path, **{"X-API-Key": key})
        assert answer.status_code == 404
        assert answer.json() == {"error": "Task not found"}


@pytest.mark.parametrize("path", ["/health", "/readiness", "/metrics"])
async def test_operators_need_no_key(server: Served, path: str) -> None:
    assert (await ask(server, path)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 401),
        ({"Origin": "null"}, 401),
        ({"Origin": "http://127.0.0.1.evil.example"}, 401),
        ({"Host": "rebind.evil.example"}, 401),
        ({"Host": "["}, 401),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "http://127.0.0.1:8080", "Host": "127.0.0.1:8080"}, 200),
        ({"Host": "[::1]:8080"}, 200),
    ],
)
async def test_a_page_of_another_site_cannot_use_the_development_key(
    store: Store, settings: Settings, server: Served, headers: dict[str, str], status: int
) -> None:
    assert (await ask(server, "/api/v1/tasks", **{"X-API-Key": DEVELOPMENT_KEY, **headers})).status_code == status
    assert (await ask(server, f"/api/v1/stream/ws?token={DEVELOPMENT_KEY}", **headers)).status_code in {401, 404}
    # A key of one's own is a secret that the page was given: it may use it.
    own = await Identities(store, settings).create("acme", "ann", "")
    assert (await ask(server, "/api/v1/tasks", **{"X-API-Key": own, **headers})).status_code == 200
