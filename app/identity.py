"""API keys: who is calling, and for which organisation.

A key is kept as its SHA-256 only; whoever reads the store cannot speak for anybody. A key belongs to no task, so it
lives in the partition of its own hash, and this file asks the store's door itself, as the other nouns do. Requests
never scan: only `list` and `revoke`, which an operator calls on the store, look for keys by pattern.

What this file must never do is let a key reach a log line, an error sentence or a task.
"""

import hashlib
import ipaddress
import re
import secrets
import string
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from urllib.parse import urlsplit

from msgspec import Struct
from starlette.datastructures import Headers, QueryParams
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from app import events, keys
from app.errors import Forbidden, Invalid, NotFound, TaskcastError, Unauthorized
from app.settings import Settings
from app.store import Store

DEVELOPMENT_KEY = "sk_test_123456"
DEVELOPMENT_ORG = "00000000-0000-0000-0000-000000000001"
DEVELOPMENT_USER = "00000000-0000-0000-0000-000000000002"

CACHE_SECONDS = 10.0
"""A revoked key works in other processes for so long."""
CACHE_MAX = 10_000
NAME_CHARACTERS_MAX = 100
QUEUES_MAX = 100
"""That a worker's key may name."""
QUEUE_CHARACTERS_MAX = 256

_ALPHABET = string.ascii_letters + string.digits
_QUERY_KEY_PATH = re.compile(r"/api/v1/(stream/[a-z]+|tasks/[^/]+/stream)")
"""A native EventSource cannot send headers (Shannon's contract §2.1)."""
_CALLER = "taskcast.caller"
_OPEN = frozenset({"/", "/health", "/readiness", "/metrics"})
"""Where nobody asks who is calling: these must answer while the store is away."""


class Identity(Struct, frozen=True):
    org: str
    user: str
    """Empty: the organisation's key, nobody's in particular."""
    key: str
    """The key's public id."""
    worker: bool = False
    """It may claim tasks and work on them, and nothing else."""
    queues: frozenset[str] = frozenset()
    """A worker's: where it may; empty: everywhere."""


DEVELOPMENT = "development"
"""In place of a public id."""


class Key(Struct, frozen=True, kw_only=True):
    """What may be shown of a key."""

    id: str
    org: str
    user: str
    name: str
    created_at: int
    """µs since 1970."""
    worker: bool = False
    queues: tuple[str, ...] = ()
    """As of `Identity`."""


class Identities:
    def __init__(self, store: Store, settings: Settings) -> None:
        self._door, self._partitions = store.door, store.partitions
        self.development = store.embedded and loopback(settings.host)
        """The development key is known: nobody else's machine can reach this server, and its data is this folder's."""
        self._cache: dict[str, tuple[float, Identity]] = {}

    async def of(self, api_key: str) -> Identity:
        """Raises Unauthorized, Unavailable."""
        api_key = normalised(api_key)
        digest = hashed(api_key)
        if self.development and digest == hashed(DEVELOPMENT_KEY):
            return Identity(DEVELOPMENT_ORG, DEVELOPMENT_USER, DEVELOPMENT)
        until, known = self._cache.get(digest, (0.0, None))
        if known and time.monotonic() < until:
            return known
        fields = _text(await self._door.call("HGETALL", self._place(digest), repeat=True))
        if not fields:
            # Not kept: unknown keys are without number, and one made a moment ago must work.
            self._cache.pop(digest, None)
            raise Unauthorized("Unauthorized")
        shown = _key(public_id(digest), fields)
        found = Identity(shown.org, shown.user, shown.id, shown.worker, frozenset(shown.queues))
        if len(self._cache) >= CACHE_MAX:
            self._cache.clear()
        self._cache[digest] = time.monotonic() + CACHE_SECONDS, found
        return found

    async def create(self, org: str, user: str, name: str, *, worker: bool = False, queues: Sequence[str] = ()) -> str:
        """The new key: shown once, for only its hash is kept. `user` may be empty. Raises Invalid."""
        for what, value in (("organisation", org), ("user", user)):
            if not events.NAME.fullmatch(value) and (value or what == "organisation"):
                raise Invalid(f"The {what} must have 1 to 64 of the characters A-Z a-z 0-9 _ . -")
        if len(name) > NAME_CHARACTERS_MAX or not name.isprintable():
            raise Invalid(f"The name must have at most {NAME_CHARACTERS_MAX} printable characters.")
        queues = [*dict.fromkeys(queues)]
        if queues and not worker:
            raise Invalid("Only a worker's key names queues.")
        if len(queues) > QUEUES_MAX or not all(_queue_name(queue) for queue in queues):
            raise Invalid(
                f"A worker's key names at most {QUEUES_MAX} queues, each of 1 to {QUEUE_CHARACTERS_MAX} printable "
                "characters without a comma."
            )
        api_key = "sk_" + "".join(secrets.choice(_ALPHABET) for _ in range(32))
        fields = {"org": org, "user": user, "name": name, "created_at": str(time.time_ns() // 1000)}
        if worker:
            fields |= {"scope": "worker", "queues": ",".join(queues)}
        words = [word for pair in fields.items() for word in pair]
        await self._door.call("HSET", self._place(hashed(api_key)), *words, repeat=True)
        return api_key

    async def revoke(self, id_: str) -> None:
        """By public id. Raises NotFound; other processes know the key for CACHE_SECONDS more."""
        names = [name async for name, key in self._all() if key.id == id_]
        if not names:
            raise NotFound(f"There is no key {id_}.")
        for name in names:
            await self._door.call("DEL", name, repeat=True)
        self._cache.clear()

    async def list(self) -> list[Key]:
        """All keys, oldest first."""
        return sorted([key async for _, key in self._all()], key=lambda key: (key.created_at, key.id))

    async def _all(self) -> AsyncIterator[tuple[str, Key]]:
        for tag in self._partitions.tags:
            start = keys.key(tag, "key", "")
            cursor, seen = "0", set[str]()
            while True:
                raw_cursor, names = await self._door.read("SCAN", cursor, "MATCH", start + "*", "COUNT", 1000)
                for name in {name.decode() for name in names} - seen:
                    seen.add(name)
                    fields = _text(await self._door.read("HGETALL", name))
                    if fields:  # else: revoked meanwhile
                        yield name, _key(public_id(name.removeprefix(start)), fields)
                cursor = raw_cursor.decode() if isinstance(raw_cursor, bytes) else str(raw_cursor)
                if cursor == "0":
                    break

    def _place(self, digest: str) -> str:
        return keys.key(self._partitions.home("", "key", digest), "key", digest)


def _key(id_: str, fields: Mapping[str, str]) -> Key:
    return Key(
        id=id_,
        org=fields["org"],
        user=fields.get("user", ""),
        name=fields.get("name", ""),
        created_at=int(fields.get("created_at", "0")),
        worker=fields.get("scope") == "worker",
        queues=tuple(queue for queue in fields.get("queues", "").split(",") if queue),
    )


def _queue_name(text: str) -> bool:
    return bool(text) and len(text) <= QUEUE_CHARACTERS_MAX and text.isprintable() and "," not in text


def _text(raw: Mapping[bytes, bytes] | list[bytes]) -> dict[str, str]:
    pairs = raw.items() if isinstance(raw, Mapping) else zip(raw[::2], raw[1::2], strict=True)
    return {name.decode(): value.decode() for name, value in pairs}


def normalised(api_key: str) -> str:
    """Shannon's gateway takes `sk-shannon-X` for `sk_X` (its contract §6)."""
    start = "sk-shannon-"
    return "sk_" + api_key.removeprefix(start) if api_key.startswith(start) else api_key


def hashed(api_key: str) -> str:
    # Not a password hash: a key has 190 random bits, and every request pays.
    return hashlib.sha256(api_key.encode("utf-8", "replace")).hexdigest()


def public_id(digest: str) -> str:
    return f"key_{digest[:12]}"


def loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to that host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# At the edge.


def credential(scope: Scope) -> str:
    """The key that a request brings: X-API-Key, Authorization: Bearer, and for streams ?api_key= or ?token=."""
    headers = Headers(scope=scope)
    if api_key := headers.get("x-api-key", "").strip():
        return api_key
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    if scope.get("method", "GET") in {"GET", "HEAD"} and _QUERY_KEY_PATH.fullmatch(scope["path"]):
        query = QueryParams(scope["query_string"])
        return query.get("api_key") or query.get("token") or ""
    return ""


class Authentication:
    """Finds out who is calling. It refuses nobody: routes that ask `caller` do, the others are open."""

    def __init__(self, app: ASGIApp, identities: Identities) -> None:
        self._app, self._identities = app, identities

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in {"http", "websocket"} and scope["path"] not in _OPEN:
            scope[_CALLER] = await self._caller(scope)
        await self._app(scope, receive, send)

    async def _caller(self, scope: Scope) -> Identity | TaskcastError:
        api_key = credential(scope)
        if not api_key:
            return Unauthorized("Unauthorized")
        try:
            found = await self._identities.of(api_key)
        except TaskcastError as error:
            return error
        if found.key == DEVELOPMENT and not from_this_machine(Headers(scope=scope)):
            return Unauthorized("Unauthorized")
        return found


def from_this_machine(headers: Headers) -> bool:
    """Whether no page of another site stands behind a request. Every page knows the development key, and a browser
    reaches loopback for it: the page's own site is its Origin, or, with a name that was bound anew to 127.0.0.1, its Host.
    """
    origin, host = headers.get("origin"), headers.get("host")
    sites = [site for site in (origin, host and f"//{host}") if site]
    try:
        return all(loopback(urlsplit(site).hostname or "") for site in sites)
    except ValueError:
        return False


def caller(request: HTTPConnection) -> Identity:
    """Who asks. Raises Unauthorized, Forbidden, or Unavailable when the store could not tell."""
    found = _known(request)
    if found.worker:
        raise Forbidden("This key is a worker's: it may use /worker/v1 only.")
    return found


def worker(request: HTTPConnection) -> Identity:
    """Who works: a worker's key, or the development key. Raises as `caller`."""
    found = _known(request)
    if not found.worker and found.key != DEVELOPMENT:
        raise Forbidden("This key is no worker's: `taskcast keys create --worker` makes one.")
    return found


def _known(request: HTTPConnection) -> Identity:
    found: Identity | TaskcastError = request.scope.get(_CALLER) or Unauthorized("Unauthorized")
    if isinstance(found, TaskcastError):
        raise found
    return found
