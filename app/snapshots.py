"""Snapshots: what is true now. Reads one, lists many, proves them against the log, and makes them again from it.

Everything here except `rebuild` only reads: the scripts that append write the snapshots. The file is long so that
what is read, proved and made again is one description of the same keys.
"""

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import fields

from app import events, keys
from app.connect import Door
from app.errors import Invalid, TaskcastError
from app.line import Arg
from app.log import Message, Partitions, entry, limits, message
from app.settings import Settings
from app.task import EMPTY, LEASED, OPEN, QUEUED, TERMINAL, Snapshot, Status, Task, apply, task

WALK_MAX = 10_000
"""Steps of a filtered walk, and depth of a merged list; beyond, the total is marked as capped."""
_CURSOR = re.compile(rf"([0-9]{{1,16}})-({events.ID.pattern})")
"""Of a list: when the task before the page was made (µs), and its id."""

THREAD_PAGE = 100
"""Messages per read: each may have 256 KiB."""

_LARGE = frozenset({"context", "extra", "result", "checkpoint", "request", "plan", "output_schema", "stated"})
LISTED = tuple(name for name in Task.__struct_fields__ if name not in _LARGE)
"""What a list reads of each task: everything but what may be large."""
IDENTITY = tuple(field.name for field in fields(Task) if field.required)
"""Which task it is, and where it stands: the least that a list can read."""


class Listed(Struct, frozen=True):
    tasks: list[Task]
    total: int
    capped: bool
    """The walk ended before the list did: `total` counts what it saw, or the page is cut off there."""
    next: str | None = None
    """The cursor after which the list goes on, even where a walk ended before the page was full; None: it ends here."""


Union = tuple[tuple[str, ...], ...]
"""The tasks of any of these indexes, which are disjoint."""
Way = tuple[Union, Sequence[Union]]
"""To a list: what to walk, and what each task must be in besides."""


class Filter(Struct, frozen=True, kw_only=True):
    """Which tasks to list: those for which all of this is so. An empty text or None: it does not matter."""

    owners: Collection[str] | None = None
    """The empty text among them: nobody's."""
    session: str = ""
    """Of these owners, who must be named: a session is its owner's."""
    agent: str = ""
    user: str = ""
    parent: str = ""
    trigger: str = ""
    internal_status: str = ""
    statuses: Collection[Status] | None = None
    since: int = 0
    until: int | None = None
    """When they were made, µs, both included."""

    def ways(self) -> list[Way]:
        """All ways that may be the shortest: which one is, the sizes of the indexes tell. Where indexes hold just what is
        asked for, they are the only way.
        """
        assert self.owners is not None or not self.session, "a session is its owner's"
        paired: list[Union] = [((kind, name),) for kind, name in (("agent", self.agent), ("user", self.user)) if name]
        if self.owners is not None:
            owners = dict.fromkeys(self.owners)
            paired.append(tuple(("session", f"{o}:{self.session}") if self.session else ("owner", o) for o in owners))
        related = (("parent", self.parent), ("trigger", self.trigger), ("internal", self.internal_status))
        single: list[Union] = [((kind, name),) for kind, name in related if name]
        both = [*paired, *single]
        if self.statuses is None:
            return [(one, [each for each in both if each != one]) for one in both] or [(((),), ())]
        states: Union = tuple(("status", status.value) for status in dict.fromkeys(self.statuses))
        ways: list[Way] = [
            (tuple((*state, *place) for state in states for place in one), [each for each in both if each != one])
            for one in paired
        ]
        ways += [(one, [*(each for each in both if each != one), states]) for one in single]
        return ways if paired else [(states, single), *ways]


class Difference(Struct, frozen=True):
    """Where a store disagrees with its own log."""

    task: str
    what: str


FAILURES = (Status.FAILED, Status.ERRORED)
"""What a session counts as failed: not what somebody cancelled, nor what ran out of time."""


class Session(Struct, frozen=True, kw_only=True):
    """A session's totals: sums over its tasks, merged over the partitions. Times in µs."""

    id: str
    created_at: int
    tasks: int
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    cost_nano: int
    title: str = ""
    first: Task | None = None
    latest: Task | None = None


class Snapshots:
    def __init__(self, door: Door, partitions: Partitions, settings: Settings) -> None:
        self.door = door
        self.partitions = partitions
        self._limits = limits(settings)

    async def get(self, org: str, id_: str) -> Task | None:
        tag = self.partitions.tag(org, id_)
        raw = await self.door.call("HGETALL", keys.key(tag, "task", org, id_), repeat=True)
        return task(_fields(raw)) if raw else None

    async def snapshot(self, org: str, id_: str, *, base: bool = False) -> Snapshot | None:
        """Snapshot and text in one step; `base`: those at the trimmed end of the task's stream."""
        tag = self.partitions.tag(org, id_)
        kinds = ("base", "base-text") if base else ("task", "text")
        names = [keys.key(tag, kind, org, id_) for kind in kinds]
        raw = await self.door.run("snapshot", names, [], repeat=True, slow=True)
        return Snapshot(fields=_fields(raw[0]), text=raw[1]) if raw[0] else None

    async def thread(self, org: str, id_: str) -> list[Message]:
        """The task's conversation over all turns: its questions, tool calls and results; at most THREAD_BYTES_MAX, and
        the last result. Empty: no such task.
        """
        return [message(item) async for item in self._thread(self.partitions.tag(org, id_), org, id_)]

    async def _thread(self, tag: str, org: str, id_: str) -> AsyncIterator[bytes]:
        name, seen = keys.key(tag, "thread", org, id_), 0
        while raw := await self.door.read("LRANGE", name, seen, seen + THREAD_PAGE - 1):
            seen += len(raw)
            for item in raw:
                yield item

    async def count(self) -> int:
        """How many tasks the store holds, over all organisations."""
        numbers = [await self.door.read("HGET", keys.key(tag, "count"), "tasks") for tag in self.partitions.tags]
        return sum(int(number or 0) for number in numbers)

    async def counts(self, org: str, *indexes: tuple[str, ...]) -> list[int]:
        """How many tasks stand in each index."""
        totals = [0] * len(indexes)
        for tag in self.partitions.tags:
            for i, what in enumerate(indexes):
                totals[i] += await self.door.read("ZCARD", keys.index(tag, org, *what))
        return totals

    # Sessions: every task with that session id of that owner.

    async def sessions(self, org: str, owner: str, *, offset: int, limit: int) -> tuple[list[Session], int]:
        """An owner's sessions, newest first, and how many there are."""
        first_seen: dict[str, int] = {}
        for tag in self.partitions.tags:
            name = keys.key(tag, "sessions", org, owner)
            if len(self.partitions.tags) == 1:
                total = await self.door.read("ZCARD", name)
                raw = await self.door.read("ZREVRANGE", name, offset, offset + limit - 1)
                return [await self._session(org, owner, id_.decode()) for id_ in raw], total
            for id_, score in _scores(await self.door.read("ZREVRANGE", name, 0, -1, "WITHSCORES")):
                first_seen[id_] = min(score, first_seen.get(id_, score))
        ordered = sorted(first_seen, key=lambda id_: (first_seen[id_], id_), reverse=True)
        return [await self._session(org, owner, id_) for id_ in ordered[offset : offset + limit]], len(ordered)

    async def session(self, org: str, owner: str, id_: str) -> Session | None:
        """None: it never had a task, or it was deleted and has had none since."""
        for tag in self.partitions.tags:
            if await self.door.read("ZSCORE", keys.key(tag, "sessions", org, owner), id_) is not None:
                return await self._session(org, owner, id_)
        return None

    async def _session(self, org: str, owner: str, id_: str) -> Session:
        created: list[int] = []
        sums = {"input_tokens": 0, "output_tokens": 0, "cost_nano": 0}
        first = latest = None
        scope = f"{owner}:{id_}"
        for tag in self.partitions.tags:
            seen = await self.door.read("ZSCORE", keys.key(tag, "sessions", org, owner), id_)
            if seen is not None:
                created.append(int(seen))
            raw = _fields(await self.door.read("HGETALL", keys.key(tag, "totals", org, owner, id_)))
            for name in sums:
                sums[name] += int(raw.get(name, "0"))
            index = keys.index(tag, org, "session", scope)
            for place in (0, -1):
                for member in await self.door.read("ZRANGE", index, place, place):
                    found = await self.get(org, member.decode())
                    if place == 0 and found and (first is None or found.created_at < first.created_at):
                        first = found
                    if place == -1 and found and (latest is None or found.created_at > latest.created_at):
                        latest = found
        ended = [("status", status.value, "session", scope) for status in (Status.COMPLETED, *FAILURES)]
        tasks, completed, *failed = await self.counts(org, ("session", scope), *ended)
        title = await self.door.read("HGET", self._session_home(org, owner, id_), "title")
        return Session(
            id=id_,
            created_at=min(created, default=0),
            tasks=tasks,
            completed=completed,
            failed=sum(failed),
            title=title.decode() if title else "",
            first=first,
            latest=latest,
            **sums,
        )

    def _session_home(self, org: str, owner: str, id_: str) -> str:
        return keys.key(self.partitions.home(org, "session", f"{owner}:{id_}"), "session", org, owner, id_)

    async def retitle_session(self, org: str, owner: str, id_: str, title: str) -> None:
        await self.door.call("HSET", self._session_home(org, owner, id_), "title", title, repeat=True)

    async def delete_session(self, org: str, owner: str, id_: str) -> None:
        """Forgets the session, not its tasks; a later task of the same session id begins it again."""
        for tag in self.partitions.tags:
            names = [keys.key(tag, "sessions", org, owner), keys.key(tag, "totals", org, owner, id_)]
            await self.door.run("forget", names, [keys.prefix(tag), self._limits, id_], repeat=True)
        await self.door.call("DEL", self._session_home(org, owner, id_), repeat=True)

    async def session_was_deleted(self, org: str, owner: str, id_: str) -> bool:
        """It had tasks, and has tasks still, but none since it was deleted."""
        for tag in self.partitions.tags:
            if await self.door.read("HEXISTS", keys.key(tag, "totals", org, owner, id_), "deleted_at"):
                return True
        return False

    # Proof. Only these two scan.

    async def verify(self) -> AsyncIterator[Difference]:
        """Every way in which snapshots, indexes and sets differ from the fold of the log.

        Exact on a store that nobody writes to; on a live one, changes under way may show as differences of sets.
        """
        for tag in self.partitions.tags:
            expected = Expected(await self._forgotten(tag))
            known: set[str] = set()
            async for org, id_ in self._tasks(tag):
                known.add(f"{org}:{id_}")
                # Folded and read in two steps: what moved in between is looked at once more.
                found = await self._verify_task(tag, org, id_) and await self._verify_task(tag, org, id_)
                for difference in found:
                    yield difference
                folded = await self._fold(tag, org, id_)
                if folded and folded.fields:
                    expected.add(tag, org, folded)
            for kind in ("task", "text", "next", "next-text", "base", "base-text", "thread"):
                start = f"{keys.prefix(tag)}{kind}:"
                async for name in self._scan(f"{start}*"):
                    if name.removeprefix(start) not in known:
                        yield Difference(name, "belongs to no task")
            async for difference in self._verify_sets(tag, expected):
                yield difference

    async def _verify_task(self, tag: str, org: str, id_: str) -> list[Difference]:
        names = [keys.key(tag, kind, org, id_) for kind in ("next", "next-text")]
        raw = await self.door.run("snapshot", names, [], repeat=True, slow=True)
        mark = Snapshot(fields=_fields(raw[0]), text=raw[1])
        passed: list[Snapshot] = []
        said: list[bytes] = []
        folded = await self._fold(tag, org, id_, until=mark.fields.get("last_seq", ""), passed=passed, said=said)
        stored = await self.snapshot(org, id_) or EMPTY
        if folded is None:
            return [Difference(id_, "its events have a hole, or are not a task's")]
        if mark.fields and passed != [mark]:
            return [Difference(id_, "the copy kept for trimming differs from its events")]
        if stored.fields != folded.fields:
            differing = {name for name, _ in stored.fields.items() ^ folded.fields.items()}
            return [Difference(id_, f"its snapshot differs from its events in {', '.join(sorted(differing))}")]
        if stored.text != folded.text:
            return [Difference(id_, "its text differs from its events")]
        thread = [item async for item in self._thread(tag, org, id_)]
        size = sum(len(item.split(b" ", 2)[-1]) for item in thread)
        if thread[len(thread) - len(said) :] != said or size != int(folded.fields.get("thread_size", "0")):
            return [Difference(id_, "its conversation differs from its events")]
        return []

    async def _verify_sets(self, tag: str, expected: "Expected") -> AsyncIterator[Difference]:
        sets = expected.scored(tag)
        for pattern in ("index:*", "sessions:*", "ready:*", "ready-of:*"):
            async for name in self._scan(keys.prefix(tag) + pattern):
                sets.setdefault(name, {})
        for name, members in sets.items():
            stored = dict(_scores(await self.door.read("ZRANGE", name, 0, -1, "WITHSCORES")))
            for member in sorted(stored.keys() ^ members.keys()):
                yield Difference(member, f"{name} {'holds it wrongly' if member in stored else 'lacks it'}")
            for member in sorted(stored.keys() & members.keys()):
                # When a lease ends is nobody's event.
                if stored[member] != members[member] and name != keys.key(tag, "leases"):
                    yield Difference(member, f"{name} has it in a wrong place")
        async for name in self._scan(f"{keys.prefix(tag)}totals:*"):
            expected.totals.setdefault(name, {})
        for name, sums in expected.totals.items():
            if _fields(await self.door.read("HGETALL", name)) != {k: str(v) for k, v in sums.items() if v}:
                yield Difference(name, "a session's totals differ from its tasks")
        if int(await self.door.read("HGET", keys.key(tag, "count"), "tasks") or 0) != expected.tasks:
            yield Difference(tag, "the number of tasks differs")

    async def rebuild(self) -> tuple[int, list[str]]:
        """Writes snapshots, text, indexes, queues and deadlines again, from the tasks' streams alone.

        Run it while nobody else uses the store. Running tasks get a lease that has already ended, so that the
        ticker requeues them. Answers the number of tasks, and the ids of those whose events are damaged: their keys
        are left as they are, and no list or queue holds them.
        """
        count, damaged = 0, []
        for tag in self.partitions.tags:
            expected = Expected(await self._forgotten(tag))
            tasks = [pair async for pair in self._tasks(tag)]
            for org, id_ in tasks:
                said: list[bytes] = []
                folded = await self._fold(tag, org, id_, said=said)
                if folded is None:
                    damaged.append(id_)
                    continue
                await self._write(keys.key(tag, "task", org, id_), "HSET", _flat(folded.fields))
                text = keys.key(tag, "text", org, id_)
                await self.door.call("DEL", text)
                if folded.text:
                    await self.door.call("SET", text, folded.text)
                # What was said before the retained events stands in the conversation alone.
                base = await self.snapshot(org, id_, base=True) or EMPTY
                trimmed = int(base.fields.get("last_seq", "0"))
                kept = [item async for item in self._thread(tag, org, id_) if 0 < _number(item) <= trimmed]
                await self._write(keys.key(tag, "thread", org, id_), "RPUSH", [*kept, *said])
                expected.add(tag, org, folded)
                count += 1
            for pattern in ("index:*", "sessions:*", "totals:*", "ready:*", "ready-of:*"):
                async for name in self._scan(keys.prefix(tag) + pattern):
                    await self.door.call("DEL", name)
            for name, members in expected.scored(tag).items():
                await self._write(name, "ZADD", [word for member, score in members.items() for word in (score, member)])
            for name, sums in expected.totals.items():
                await self._write(name, "HSET", _flat({k: str(v) for k, v in sums.items() if v}))
            await self.door.call("HSET", keys.key(tag, "count"), "tasks", expected.tasks)
        return count, damaged

    async def _forgotten(self, tag: str) -> dict[str, int]:
        """A session's totals key → when the session was deleted, µs."""
        found = {}
        async for name in self._scan(f"{keys.prefix(tag)}totals:*"):
            if at := await self.door.read("HGET", name, "deleted_at"):
                found[name] = int(at)
        return found

    async def _write(self, name: str, command: str, words: list[Any]) -> None:
        await self.door.call("DEL", name)
        for i in range(0, len(words), 2000):
            await self.door.call(command, name, *words[i : i + 2000])

    async def _fold(
        self,
        tag: str,
        org: str,
        id_: str,
        *,
        until: str = "",
        passed: list[Snapshot] | None = None,
        said: list[bytes] | None = None,
    ) -> Snapshot | None:
        """The fold of the task's stream over its base; None when it cannot be folded.

        The state at the entry numbered `until` is put into `passed`, and what belongs to the conversation into `said`.
        """
        snapshot = await self.snapshot(org, id_, base=True) or EMPTY
        seq = int(snapshot.fields.get("last_seq", "0"))
        after = "-"
        try:
            while raw := await self.door.read("XRANGE", keys.key(tag, "events", org, id_), after, "+", "COUNT", 100):
                for raw_id, fields in raw:
                    flat = _flat_bytes(fields)
                    found = entry(id_, raw_id, flat)
                    # A reused id goes on from its tombstone: its first event need not be number 1.
                    if found.seq != seq + 1 and (seq or not isinstance(found.event, events.Submitted)):
                        return None
                    before, snapshot, seq = snapshot.fields.get("thread_size"), apply(snapshot, found), found.seq
                    if said is not None and snapshot.fields.get("thread_size") != before:
                        said.append(b"%d %d %b" % (found.seq, found.at, flat[flat.index(b"event") + 1]))
                    if passed is not None and snapshot.fields.get("last_seq") == until:
                        passed.append(snapshot)
                    after = f"({found.id}"
            return snapshot if task(snapshot.fields) else None
        except (TaskcastError, msgspec.ValidationError, KeyError, ValueError):
            return None

    async def _tasks(self, tag: str) -> AsyncIterator[tuple[str, str]]:
        start = f"{keys.prefix(tag)}events:"
        async for name in self._scan(f"{start}*"):
            org, _, id_ = name.removeprefix(start).partition(":")
            yield org, id_

    async def _scan(self, pattern: str) -> AsyncIterator[str]:
        cursor = 0
        seen: set[bytes] = set()
        while True:
            cursor, names = await self.door.read("SCAN", cursor, "MATCH", pattern.replace("[", "\\["), "COUNT", 1000)
            for name in names:
                if name not in seen:
                    seen.add(name)
                    yield name.decode()
            if int(cursor) == 0:
                return

    # Last, for its name hides the built-in type from annotations.

    async def list(
        self,
        org: str,
        what: Filter | Iterable[tuple[str, ...]],
        *,
        after: str = "",
        offset: int = 0,
        limit: int = 20,
        fields: tuple[str, ...] = LISTED,
    ) -> Listed:
        """A page, newest first; ties by id. `what`: a filter, or the names of disjoint indexes whose union is listed:
        `()`, `("owner", u)`, `("status", "queued", "owner", u)`.

        The page begins after the cursor `after`, which an earlier page gave as `next`, and leaves out `offset` tasks
        there. Raises Invalid for what is no cursor. Whoever follows the cursors is given every task that fits all the
        while exactly once, whatever is made, moved and deleted meanwhile, for a task's place never changes. Pages by
        number shift. A walk from a cursor ends with its page: its total is capped.
        """
        search = _search(org, what)
        if len(self.partitions.tags) == 1 or not offset:
            page = await self._page(search, after, offset, limit, fields)
        else:
            # No partition knows how many tasks of the others stand before the page; the last one of these is a cursor.
            before = await self._page(search, after, 0, min(offset, WALK_MAX), ())
            if len(before.found) < offset or before.next is None:
                return Listed([], before.total, before.capped or before.next is not None, before.next)
            page = await self._page(search, before.next, 0, limit, fields)
            page = _Page(page.found, before.total, before.capped, page.next)
        tasks = []
        for _, _, values in page.found:
            pairs = {name: value.decode() for name, value in zip(fields, values, strict=True) if value is not None}
            tasks.append(task(pairs))
        return Listed(tasks, page.total, page.capped, page.next)

    async def _page(self, search: "_Search", after: str, offset: int, limit: int, fields: tuple[str, ...]) -> "_Page":
        """Merges what the partitions answer; of several, each with all that may stand on the page."""
        place = _CURSOR.fullmatch(after)
        if after and not place:
            raise Invalid("Not a cursor of a list")
        start = place.groups() if place else ("", "")
        args: list[Arg] = [
            offset,
            limit,
            WALK_MAX,
            search.ways,
            search.org,
            search.since,
            search.until,
            *start,
            *fields,
        ]

        async def ask(tag: str) -> Any:
            sets = [keys.index(tag, search.org, *where) for where in search.indexes]
            return await self.door.run("list", sets, [keys.prefix(tag), self._limits, *args], repeat=True, slow=True)

        found: list[tuple[int, str, list[bytes | None]]] = []
        ends: list[tuple[int, str]] = []
        total, capped = 0, False
        for count, cut_off, end_score, end_id, *rows in await asyncio.gather(*map(ask, self.partitions.tags)):
            total += int(count)
            capped = capped or cut_off == b"1"
            if end_id:
                ends.append((int(end_score), end_id.decode()))
            found += [(int(created_at), id_.decode(), values) for *values, id_, created_at in rows]
        # Beyond the place up to which all have told all, tasks may be missing between those that are known.
        end = max(ends, default=(0, ""))
        found = sorted((one for one in found if one[:2] >= end), key=lambda one: one[:2], reverse=True)
        if len(found) > limit:
            end = found[limit - 1][:2]
        return _Page(found[:limit], total, capped, f"{end[0]}-{end[1]}" if end[1] else None)


class _Search(Struct, frozen=True):
    """A list as the script takes it, whichever page of it."""

    org: str
    indexes: list[tuple[str, ...]]
    """Of all unions."""
    ways: str
    """JSON: how many indexes each union has, and the ways, which name unions by number."""
    since: int
    until: int | str


def _search(org: str, what: Filter | Iterable[tuple[str, ...]]) -> _Search:
    if isinstance(what, Filter):
        ways, since, until = what.ways(), what.since, "+inf" if what.until is None else what.until
    else:
        ways, since, until = [(tuple(what), ())], 0, "+inf"
    unions = list(dict.fromkeys(union for walked, checks in ways for union in (walked, *checks)))
    number = {union: i for i, union in enumerate(unions, 1)}
    numbered = [(number[walked], [number[union] for union in checks]) for walked, checks in ways]
    sizes = [len(union) for union in unions]
    return _Search(org, [one for union in unions for one in union], json.dumps((sizes, numbered)), since, until)


class _Page(Struct, frozen=True):
    found: list[tuple[int, str, list[bytes | None]]]
    """When the task was made, its id, its fields' values."""
    total: int
    capped: bool
    next: str | None


class Expected:
    """What indexes, queues and totals have to hold, gathered from folded snapshots. Mirrors `lua/commit.lua`."""

    def __init__(self, forgotten: Mapping[str, int]) -> None:
        """`forgotten`: a session's totals key → when it was last deleted, µs."""
        self._forgotten = forgotten
        self.sets: dict[str, dict[str, int]] = defaultdict(dict)
        self.totals: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._waiting: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
        self._leased: dict[str, int] = {}
        self._due: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self.tasks = 0

    def add(self, tag: str, org: str, folded: Snapshot) -> None:
        found = task(folded.fields)
        scope = f"{found.owner}:{found.session}"
        whole = {"agent": found.agent, "user": found.user, "session": scope if found.session else ""}
        related = {"parent": found.parent, "trigger": found.trigger}
        places: list[tuple[str, ...]] = [(), ("owner", found.owner)]
        places += [(kind, value) for kind, value in (whole | related).items() if value]
        states: list[tuple[str, ...]] = [(), ("owner", found.owner)]
        states += [(kind, value) for kind, value in whole.items() if value]
        places += [("status", found.status.value, *state) for state in states]
        if found.waits:
            places += [("waiting",), ("waiting", "owner", found.owner)]
        if found.internal_status:
            places.append(("internal", found.internal_status))
        for place in places:
            self.sets[keys.index(tag, org, *place)][found.id] = found.created_at
        member = keys.member(org, found.id)
        if found.session:
            totals = keys.key(tag, "totals", org, found.owner, found.session)
            sums = self.totals[totals]
            for name in ("input_tokens", "output_tokens", "cost_nano"):
                sums[name] += int(folded.fields.get(name, "0"))
            sums["deleted_at"] = self._forgotten.get(totals, 0)
            if found.created_at > sums["deleted_at"]:
                seen = self.sets[keys.key(tag, "sessions", org, found.owner)]
                seen[found.session] = min(found.created_at, seen.get(found.session, found.created_at))
        if found.status is QUEUED:
            head_start = {1: 60_000_000, 2: 600_000_000}.get(found.priority, 0)
            score = found.ready_at or found.queued_at - head_start
            self._waiting["ready", found.queue][member] = score
            self._waiting["ready-of", f"{org}:{found.queue}"][member] = score
        # Without a worker an owner stated it (`restated`): nobody renews, nothing expires.
        if found.status in LEASED and found.worker:
            self._leased[member] = 0
        deadlines = [at for at in (found.deadline_at, found.expires_at) if at]
        if deadlines and found.status in OPEN:
            self._due[member] = min(deadlines) // 1000
        if found.status in TERMINAL:
            self._ended[member] = found.finished_at
        self.tasks += 1

    def scored(self, tag: str) -> dict[str, dict[str, int]]:
        """Every sorted set of the partition: key → member and score."""
        return {
            **self.sets,
            **{keys.key(tag, *place): members for place, members in self._waiting.items()},
            keys.key(tag, "leases"): self._leased,
            keys.key(tag, "due"): self._due,
            keys.key(tag, "ended"): self._ended,
        }


def _number(item: bytes) -> int:
    """Of a thread's item; 0: it is none."""
    seq, *rest = item.split(b" ", 2)
    return int(seq) if seq.isdigit() and len(rest) == 2 else 0


def _fields(raw: Any) -> dict[str, str]:
    pairs = raw.items() if isinstance(raw, dict) else zip(raw[::2], raw[1::2], strict=True)
    return {name.decode(): value.decode() for name, value in pairs}


def _flat(fields: Mapping[str, str]) -> list[str]:
    return [word for pair in fields.items() for word in pair]


def _flat_bytes(fields: Any) -> list[bytes]:
    return [word for pair in fields.items() for word in pair] if isinstance(fields, dict) else fields


def _scores(raw: Iterable[Any]) -> list[tuple[str, int]]:
    """A `WITHSCORES` answer, flat or in pairs."""
    items = [*raw]
    if items and not isinstance(items[0], (tuple, list)):
        items = list(zip(items[::2], items[1::2], strict=True))
    return [(member.decode(), int(float(score))) for member, score in items]
