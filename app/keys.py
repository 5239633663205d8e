"""Every key that Taskcast keeps in Redis: its name, type, bound and lifetime. Nothing else is ever written.

A key is `tc:{tag}:<kind>:<rest>`. The tag names the partition, so that all keys of one atomic step share a
Redis Cluster slot. `app/lua/commit.lua` builds the same names from the same kinds; a test scans a used
store for keys that are not declared here. Free text stands last in a name, so that no two names can meet.
"""

import re
from binascii import crc32
from collections.abc import Iterable

from msgspec import Struct

DEPLOYMENT = "tc:deployment"
"""Hash: format, partitions, tags, epoch, secret. Made once, before everything else."""

FORMAT = "4"
"""Of the data; another one is refused at start."""


class Kind(Struct, frozen=True):
    name: str
    type: str
    rest: str
    bound: str
    lifetime: str


KINDS = (
    Kind("log", "stream", "", "100,000 entries and 256 MiB", "for ever, trimmed"),
    Kind("count", "hash", "", "3 fields, and one per kind of event and of end", "for ever"),
    Kind("marks", "list", "", "65 ids: one per 4 MiB of log", "for ever, trimmed"),
    Kind("task", "hash", "org:task", "the snapshot; input ≤ 256 KiB, result ≤ 192 KiB", "until deleted"),
    Kind("events", "stream", "org:task", "10,000 entries, 16 MiB", "until deleted"),
    Kind("text", "string", "org:task", "192 KiB", "until its text completes"),
    Kind("next", "hash", "org:task", "a snapshot", "until deleted"),
    Kind("next-text", "string", "org:task", "192 KiB", "until deleted"),
    Kind("base", "hash", "org:task", "a snapshot", "until deleted"),
    Kind("base-text", "string", "org:task", "192 KiB", "until deleted"),
    Kind("thread", "list", "org:task", "8 MiB and 10,000 messages, and its last turn's result", "until deleted"),
    Kind("secrets", "string", "org:task:submission", "64 KiB", "24 h, or until deleted"),
    Kind("index", "zset", "org:what[:value]", "one member per task", "until its last task is deleted"),
    Kind("sessions", "zset", "org:owner", "one member per session", "until its session is deleted"),
    Kind("totals", "hash", "org:owner:session", "3 counters, deleted_at", "until its last task is deleted"),
    Kind("session", "hash", "org:owner:session", "title", "until the session is deleted"),
    Kind("ready", "zset", "queue", "one member per queued task", "while tasks wait"),
    Kind("ready-of", "zset", "org:queue", "the same, of one organisation", "while tasks wait"),
    Kind("queues", "zset", "", "200 names, with the time of their last new task", "for ever"),
    Kind("wake", "list", "queue", "64 tokens", "an hour from the first"),
    Kind("stop", "list", "random", "1 token: a worker that waits for tasks stops", "60 s"),
    Kind("leases", "zset", "", "one member per running task", "while tasks run"),
    Kind("due", "zset", "", "one member per task with a deadline", "while tasks have deadlines"),
    Kind("followups", "list", "", "one item per step that another partition has to take", "until it was taken"),
    Kind("ended", "zset", "", "one member per ended task", "until deleted"),
    Kind("claim", "string", "org:worker:claim id", "the tasks of one claim", "60 s"),
    Kind("outcome", "string", "org:task:operation", "one reply", "24 h; 60 s of a name that only its call knows"),
    Kind("tombstone", "hash", "org:task", "last_seq, fence, created_at, submission", "24 h"),
    Kind("agent", "hash", "org:agent", "name, provider, model, effort, queue, version, times", "until deleted"),
    Kind("agents", "zset", "org", "one member per agent", "until its last agent is deleted"),
    Kind("worker", "hash", "org:worker", "agent, heartbeat_at, freed", "60 s after its last word"),
    Kind("key", "hash", "sha256 of an API key", "who it is", "until revoked"),
)

_BY_NAME = {kind.name: kind for kind in KINDS}
_PATTERN = re.compile(rb"tc:\{[a-z0-9]+\}:([a-z\-]+)(?::.*)?", re.DOTALL)


def declared(key: bytes) -> Kind | None:
    """The kind that a key in the store belongs to, or None: a key that nobody declared."""
    found = _PATTERN.fullmatch(key)
    return _BY_NAME.get(found[1].decode()) if found else None


def prefix(tag: str) -> str:
    return f"tc:{{{tag}}}:"


def key(tag: str, kind: str, *rest: str) -> str:
    assert kind in _BY_NAME, f"{kind} is not declared"
    return prefix(tag) + ":".join((kind, *rest))


def partition(org: str, task: str, count: int) -> int:
    """Where a task lives."""
    return crc32(f"{org}\0{task}".encode()) % count


def home(org: str, kind: str, name: str, count: int) -> int:
    """Where something lives that is not a task's: a session's title, an API key."""
    return crc32(f"{org}\0{kind}\0{name}".encode()) % count


SLOTS = 16384
"""Of a Redis Cluster."""


def slot(tag: str) -> int:
    """The cluster's slot of a hash tag: CRC16/XMODEM mod 16384 (Redis Cluster specification)."""
    crc = 0
    for byte in tag.encode():
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021) & 0xFFFF if crc & 0x8000 else crc << 1
    return crc % SLOTS


def tags(count: int) -> list[str]:
    """One tag per partition, their slots evenly spaced, so that primaries get equal shares."""
    width = SLOTS / count
    found: dict[int, str] = {}
    number = 0
    while len(found) < count:
        name = f"p{number}"
        number += 1
        place = slot(name) / width
        # The middle half of each share: a primary's border may lie anywhere near a share's edge.
        if 0.25 <= place % 1 <= 0.75:
            found.setdefault(int(place), name)
    return [found[place] for place in range(count)]


def member(org: str, task: str) -> str:
    """A task in a queue, a lease set or a due set. Neither half can hold a slash."""
    return f"{org}/{task}"


def index(tag: str, org: str, *what: str) -> str:
    """A list's sorted set: `index(tag, org, "agent", "a1")`, `index(tag, org, "status", "queued", "agent", "a1")`."""
    return key(tag, "index", org, *what)


def of_members(raw: Iterable[bytes]) -> list[tuple[str, str]]:
    """Members as (organisation, task id)."""
    pairs = [value.decode().partition("/") for value in raw]
    return [(org, task) for org, _, task in pairs]
