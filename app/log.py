"""The log: append, read, tail. One partition log per partition, one stream per task; both hold the same entries.

The partition's log allocates the id, so that ids of different tasks compare; the task's stream keeps the history.
The file is long because an entry is written and read back here alone, in both of its forms.
"""

import hashlib
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from app import events, keys
from app.connect import Door
from app.errors import Conflict, Invalid, Misconfigured, NotFound, OutOfOrder, Stale, TaskcastError, TooLarge
from app.events import AnyEvent, Entry, Submission
from app.line import BLOCK_SECONDS, Arg, Line
from app.settings import Settings
from app.task import GONE, TERMINAL, THREAD_BYTES_MAX, THREAD_MESSAGES_MAX, Snapshot, Status, apply, parts, rows

PAGE_ENTRIES = 500
"""Of history, per read; a page also ends at 1 MiB."""
CURSOR = re.compile(r"|[0-9]{1,15}-[0-9]{1,15}|seq:[0-9]{1,15}")
"""Fits the script's numbers."""
ID = re.compile(r"[0-9]{1,15}-[0-9]{1,15}")
BATCH_EVENTS_MAX = 200
BATCH_BYTES_MAX = 1024 * 1024
"""Of what a worker says at once: a tenth of a second of the store (200 deltas on two loaded cores, measured), and less
than a repeat looks back at."""


class Partitions:
    """Where tasks live: the tags chosen when this store was made, and the secret behind idempotency keys."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.tags = fields["tags"].split()
        self.epoch = fields["epoch"]
        """Made with the data: a reader that sees another one has another store before it."""
        self.secret = fields["secret"].encode()

    def tag(self, org: str, task: str) -> str:
        return self.tags[keys.partition(org, task, len(self.tags))]

    def home(self, org: str, kind: str, name: str) -> str:
        return self.tags[keys.home(org, kind, name, len(self.tags))]


async def open_partitions(door: Door, wanted: int) -> Partitions:
    """Reads, or in an empty store makes, what is fixed for its life. `wanted` 0: whatever is there, else 1.

    Raises Misconfigured for another data format, another number of partitions, an old or an evicting server, a Sentinel, a
    Redis Cluster.
    """
    server = await door.read("INFO", "server")
    version = server["redis_version"]
    mode = server.get("redis_mode") or server["server_mode"]  # Valkey's name for it
    if mode == "sentinel":
        raise Misconfigured("The URL names a Sentinel; Taskcast needs that of the Redis which it watches.")
    if mode == "cluster":
        raise Misconfigured("The store is a Redis Cluster; Taskcast needs one Redis that has all keys.")
    if int(version.split(".")[0]) < 7:
        raise Misconfigured(f"The store is Redis {version}; Taskcast needs Redis 7.0 or newer, or Valkey.")
    found = (await door.read("INFO", "memory"))["maxmemory_policy"]
    if found != "noeviction":
        raise Misconfigured(
            f"The store's maxmemory-policy is {found}: it may drop tasks. Set it to noeviction and start again."
        )
    await door.load()
    count = wanted or 1
    fresh = {
        "format": keys.FORMAT,
        "partitions": str(count),
        "tags": " ".join(keys.tags(count)),
        "epoch": secrets.token_hex(8),
        "secret": secrets.token_hex(32),
    }
    raw = await door.run("deploy", [keys.DEPLOYMENT], [word for pair in fresh.items() for word in pair], repeat=True)
    fields = _text_of(raw)
    if fields.get("format") != keys.FORMAT:
        raise Misconfigured(
            f"The store's data has format {fields.get('format')}; this version of Taskcast reads format {keys.FORMAT}."
        )
    if wanted and fields["partitions"] != str(wanted):
        raise Misconfigured(
            f"The store has {fields['partitions']} partitions, not {wanted}; their number is fixed when it is made."
        )
    return Partitions(fields)


def _text_of(raw: Any) -> dict[str, str]:
    """A flat field-value answer, or a mapping, as text."""
    pairs = raw.items() if isinstance(raw, dict) else zip(raw[::2], raw[1::2], strict=True)
    return {_str(name): _str(value) for name, value in pairs}


def _str(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()


def limits(settings: Settings) -> str:
    """As the scripts take them; the log is cut in 64 shares."""
    return f"{settings.events_per_mark} {settings.bytes_per_mark} {settings.log_entries} {settings.log_bytes // 64}"


class Appended(Struct, frozen=True):
    """Where an event stands, or where the same one already stood (`duplicate`; seq 0: too far back to look)."""

    seq: int
    id: str
    at: int
    status: Status
    attempt: int
    duplicate: bool = False
    cached: bool = False
    """An idempotency key met its earlier task."""


class Said(Struct, frozen=True, gc=False):
    """An event as the script takes it."""

    event: AnyEvent
    tag: str
    encoded: bytes
    rows: bytes
    sets: list[str]
    """`task.parts`."""


def said(event: AnyEvent, only: Collection[str] = ()) -> Said:
    """Encoded and checked, once; `only`: legal in no other statuses. Raises Invalid; TooLarge beyond EVENT_BYTES_MAX."""
    assert not isinstance(event, events.Submitted | events.Started | events.Deleted), "these have their own steps"
    return Said(event, events.tag(event), events.encode(event), *parts(event, only))


class Log:
    def __init__(self, door: Door, partitions: Partitions, settings: Settings) -> None:
        self.door = door
        self.partitions = partitions
        self._limits = limits(settings)

    def _place(self, org: str, task: str) -> tuple[str, tuple[str, str]]:
        tag = self.partitions.tag(org, task)
        return keys.key(tag, "task", org, task), (keys.prefix(tag), self._limits)

    async def submit(self, task: Submission, *, actor: str = "") -> Appended:
        """Creates the task. Repeatable: the same `submission` is a duplicate.

        Raises Conflict when the id is taken, or when its idempotency key came with another body.
        """
        event = _submitted(task, actor)
        place, head = self._place(task.org, task.id)
        encoded, (moves, sets) = events.encode(event), parts(event)
        args: list[Arg] = [task.org, task.id, encoded, moves, task.submission, task.body_hash, len(sets), *sets]
        weight = max(2 * len(encoded) / BATCH_BYTES_MAX, 1 / BATCH_EVENTS_MAX)
        answer = await self.door.share("submit", place, head, args, weight=weight, repeat=True)
        code = answer[0].decode()
        if code == "mismatch":
            raise Conflict("This idempotency key was used with another request body.")
        if code == "exists":
            raise Conflict(f"A task with the id {task.id} exists.", answer[4].decode())
        return _appended(answer, duplicate=code == "duplicate", cached=code == "cached")

    async def append(
        self,
        org: str,
        task: str,
        event: AnyEvent,
        *,
        fence: int | None = None,
        n: int | None = None,
        operation: str = "",
        seen: tuple[str, bytes] = ("", b""),
        status: str = "",
    ) -> Appended:
        """Appends one event, and its effect on the snapshot, in one step.

        A worker gives its fence, and n = 1, 2, 3 … per attempt; a control call gives a random `operation`: both make
        a repeat harmless. The ticker gives what it has `seen`: a set (`leases`, `due`) and the task's score there;
        if that moved, the append is Stale. `status`: the event is for this one only, elsewhere a Conflict.
        One append at a time per attempt: after a store's restart pipelined ones may arrive out of order.
        Raises NotFound, Conflict, Stale, OutOfOrder, TooLarge, Unavailable, Full.
        """
        submission = event.submission if isinstance(event, events.Continued) else ""
        repeat = bool(operation or submission) or (fence is not None and n is not None) or bool(seen[0])
        numbered = [("" if n is None else n, said(event, [status] if status else ()))]
        (outcome,) = await self._append(org, task, numbered, fence, (operation, *seen, submission), repeat=repeat)
        if isinstance(outcome, TaskcastError):
            raise outcome
        return outcome

    async def extend(
        self, org: str, task: str, batch: "Sequence[Said]", *, fence: int, n: int
    ) -> list[Appended | TaskcastError]:
        """Appends a worker's events under the numbers n, n + 1, … Each is a step of its own; all take one round trip.

        Answers for each in turn. The first refusal is the last answer: what follows it was not looked at.
        Repeated in full, what was stored already is a duplicate, and the rest is looked at again.
        Raises Invalid and TooLarge, of any of them or of all together, before the first is sent; Unavailable, Full.
        """
        if len(batch) > BATCH_EVENTS_MAX:
            raise TooLarge(f"These are {len(batch)} events; at most {BATCH_EVENTS_MAX} are allowed at once.")
        return await self._append(org, task, list(enumerate(batch, n)), fence, ("", "", b"", ""), repeat=True)

    async def _append(
        self,
        org: str,
        task: str,
        numbered: "Sequence[tuple[int | str, Said]]",
        fence: int | None,
        options: Sequence[Arg],
        *,
        repeat: bool,
    ) -> list[Appended | TaskcastError]:
        place, head = self._place(org, task)
        words: list[Arg] = []
        size = 0
        for n, one in numbered:
            if isinstance(one.event, events.ChildSubmitted):
                _check_child(org, task, one.event)
            if isinstance(n, int) and n < 1:
                raise Invalid("A worker's events are numbered from 1.")  # before that, all would seem repeated
            size += len(one.encoded)
            words += (n, one.tag, one.encoded, one.rows, len(one.sets), *one.sets)
        if size > BATCH_BYTES_MAX:
            raise TooLarge(f"These events have {size} bytes; at most {BATCH_BYTES_MAX} are allowed at once.")
        outcomes: list[Appended | TaskcastError] = []
        args: list[Arg] = [org, task, "" if fence is None else fence, *options, len(words), *words]
        weight = max(size / BATCH_BYTES_MAX, len(numbered) / BATCH_EVENTS_MAX)
        answers = await self.door.share("append", place, head, args, weight=weight, repeat=repeat)
        for answer, (_, one) in zip(answers, numbered, strict=False):
            code = answer[0].decode()
            if code in {"ok", "duplicate"}:
                outcomes.append(_appended(answer, duplicate=code == "duplicate"))
            else:
                outcomes.append(refusal(code, one.event, answer[4].decode()))
        return outcomes

    async def delete(
        self, org: str, task: str, *, actor: str = "", seen: bytes = b"", children: bool = False
    ) -> Appended:
        """Removes the task and everything of it. `seen`: only if it ended at this score of the `ended` set.
        `children`: its sub-tasks follow it.

        Raises NotFound, Stale.
        """
        event = events.Deleted(actor=actor, children=children)
        place, head = self._place(org, task)
        args: list[Arg] = [*head, org, task, events.encode(event), rows(event), seen]
        answer = await self.door.run("delete", [place], args)
        if answer[0] != b"ok":
            raise refusal(answer[0].decode(), event, "")
        return _appended(answer)

    async def read(
        self, org: str, task: str, after: str, *, limit: int = PAGE_ENTRIES, check: bool = False
    ) -> "Page | None":
        """Entries after a cursor: an id, `seq:N`, or empty for the start; at most `limit`, and about 1 MiB.

        None: no such task. Raises Invalid for what is no cursor.

        `check` says that the cursor comes from outside, so that an id nobody gave is a gap, `unknown`.
        """
        if not CURSOR.fullmatch(after):
            raise Invalid(f"Not a cursor: {after}")
        tag = self.partitions.tag(org, task)
        names = [keys.key(tag, kind, org, task) for kind in ("events", "task", "base")]
        args: list[Arg] = [keys.prefix(tag), self._limits, after, limit, "1" if check else ""]
        raw = await self.door.run("read", [*names, keys.key(tag, "log")], args, repeat=True, slow=True)
        if not raw:
            return None
        return Page(
            status=Status(raw[0].decode()),
            last_seq=int(raw[1]),
            last_id=raw[2].decode(),
            base_seq=int(raw[3]),
            gap=raw[5].decode(),
            entries=[entry(task, id_, fields) for id_, fields in raw[6]],
        )

    async def end(self, tag: str) -> tuple[str, int]:
        """The last id of a partition's log and its counter; `0-0` and 0 when it is empty."""
        last = await self.door.read("XREVRANGE", keys.key(tag, "log"), "+", "-", "COUNT", 1)
        if not last:
            return "0-0", 0
        found = logged(*last[0])
        return found.id, found.number

    async def tail(self, line: Line, tag: str, after: str) -> "list[Logged]":
        """What a partition's log got after `after`, a concrete id: `$` would mean another place each time.

        Waits up to BLOCK_SECONDS on the given connection.
        """
        name = keys.key(tag, "log")
        block = int(BLOCK_SECONDS * 1000)
        raw = await line.ask("XREAD", "COUNT", PAGE_ENTRIES, "BLOCK", block, "STREAMS", name, after)
        return [logged(*item) for _, entries in raw or () for item in entries]

    async def replay(self, tag: str, org: str, after: str, *, limit: int, check: bool = False) -> "LogPage":
        """An organisation's entries of a partition's log, after an id; looks at most at `limit`, and about 1 MiB.

        Raises Invalid for what is no id.
        """
        if not ID.fullmatch(after):
            raise Invalid(f"Not a cursor: {after}")
        args: list[Arg] = [keys.prefix(tag), org, after, limit, "1" if check else ""]
        raw = await self.door.run("replay", [keys.key(tag, "log")], args, repeat=True, slow=True)
        return LogPage(
            gap=raw[0].decode(),
            after=raw[1].decode(),
            number=int(raw[2]),
            scanned=int(raw[3]),
            entries=[logged(*item) for item in raw[4]],
        )


class Page(Struct, frozen=True, kw_only=True):
    """A piece of a task's history, and the bounds it was read with."""

    status: Status
    last_seq: int
    last_id: str
    base_seq: int
    """Entries up to this one are trimmed; 0: none is."""
    gap: str
    """`trimmed`, `ahead`, `unknown`; empty: `entries` follow the cursor without a hole."""
    entries: list[Entry]


_OVER = TERMINAL | {GONE}


class Logged(Struct, array_like=True, eq=False, gc=False):
    """An entry of a partition's log: the header tells who may want it, before anybody parses the event.

    The header is read into the entry itself; what follows its fields is not of it. Made by `logged`.
    """

    # As `lua/commit.lua` writes it.
    number: int
    """The partition's dense counter."""
    org: str
    task: str
    owner: str
    user: str
    agent: str
    session: str
    before: Status
    after: Status
    seq: int
    seconds: int
    micros: int
    """The store's time."""
    type: str
    fence: int
    attempt: int
    n: int
    queue: str

    id: str = ""
    event: bytes = b""
    """As it was encoded."""
    _spelled: dict[Any, tuple[bytes, int]] | None = None
    _entry: Entry | None = None
    _state: Snapshot | None = None

    @property
    def spelled(self) -> dict[Any, tuple[bytes, int]]:
        """What its readers get, by how they want it, and how many frames that is: made once for all who go alone."""
        if self._spelled is None:
            self._spelled = {}
        return self._spelled

    @property
    def gone(self) -> bool:
        """The task was deleted."""
        return self.after is GONE

    @property
    def ends(self) -> bool:
        """The task is over, with this entry or before it."""
        return self.after in TERMINAL

    @property
    def over(self) -> bool:
        """Either."""
        return self.after in _OVER

    @property
    def at(self) -> int:
        """As of `Entry`."""
        return written_at(self.seconds, self.micros, self.id.partition("-")[0])

    def fold(self, before: Snapshot) -> Snapshot:
        """The state after this entry, which `entry` then holds too; made once for all its readers."""
        if self._state is None:
            self._state = apply(before, self.entry)
            self._entry = replace(self.entry, after=self._state.fields)
        return self._state

    @property
    def entry(self) -> Entry:
        if self._entry is None:
            self._entry = Entry(
                id=self.id,
                task=self.task,
                seq=self.seq,
                at=self.at,
                fence=self.fence,
                attempt=self.attempt,
                n=self.n,
                event=events.decode(self.event),
                size=len(self.event),
            )
        return self._entry


def written_at(seconds: int, micros: int, ms: str) -> int:
    """When an entry was written, as of `Entry`: at a time of the store's, but never before what its id says."""
    return max(seconds * 1_000_000 + micros, int(ms) * 1000)


_header = msgspec.json.Decoder(Logged).decode


def logged(id_: bytes, fields: Sequence[bytes]) -> Logged:
    _, header, _, event = fields
    one = _header(header)
    one.id, one.event = id_.decode(), event
    return one


class Message(Struct, frozen=True, gc=False):
    """An event that belongs to a task's conversation."""

    seq: int
    at: int
    event: AnyEvent


def message(raw: bytes) -> Message:
    """An item of a thread."""
    seq, at, event = raw.split(b" ", 2)
    return Message(int(seq), int(at), events.decode(event))


class LogPage(Struct, frozen=True, kw_only=True):
    """A piece of a partition's log, read for one organisation."""

    gap: str
    """As of `Page`."""
    after: str
    number: int
    """Id and counter of the last entry that was looked at; if there was none, of the cursor."""
    scanned: int
    entries: list[Logged]
    """Those of the organisation; of tasks that were deleted since, only the deletion."""


def entry(task: str, id_: bytes, raw: Sequence[bytes]) -> Entry:
    """An entry of a task's own stream."""
    fields = dict(zip(raw[::2], raw[1::2], strict=True))
    event = fields[b"event"]
    return Entry(
        id=id_.decode(),
        task=task,
        seq=int(fields[b"seq"]),
        at=int(fields[b"at"]),
        fence=int(fields[b"fence"]),
        attempt=int(fields[b"attempt"]),
        n=int(fields[b"worker-n"] or 0),
        event=events.decode(event),
        size=len(event),
    )


def _submitted(task: Submission, actor: str) -> events.Submitted:
    return events.Submitted(actor=actor, message="Task submitted.", task=task)


def _check_child(org: str, task: str, event: events.ChildSubmitted) -> None:
    """What could not be made later must not be promised now. Raises Invalid, TooLarge."""
    if (event.task.org, event.task.parent) != (org, task):
        raise Invalid("A sub-task is of its parent's organisation, and names its parent.")
    if event.task.id == task:
        raise Invalid("A sub-task is not its own parent.")
    events.encode(_submitted(event.task, event.actor))


def _appended(answer: Sequence[bytes], *, duplicate: bool = False, cached: bool = False) -> Appended:
    return Appended(
        seq=int(answer[1]),
        id=answer[2].decode(),
        at=int(answer[3]),
        status=Status(answer[4].decode()),
        attempt=int(answer[5]),
        duplicate=duplicate,
        cached=cached,
    )


def refusal(code: str, event: AnyEvent, status: str) -> TaskcastError:
    """The script's word for why not, as the error that callers know."""
    name = events.tag(event).replace("_", " ")
    match code:
        case "not_found":
            return NotFound("Task not found")
        case "stale":
            return Stale("This attempt is over: the task was taken from this worker.", status)
        case "out_of_order":
            return OutOfOrder("An earlier event of this attempt is missing.", status)
        case "sum_full":
            return TooLarge("The task's or its session's usage would exceed what can be counted (2^53 - 1).")
        case "guarded":
            return Conflict(_moved_on(event), status)
        case "text_full":
            return TooLarge(f"The task's text would exceed {events.TEXT_BYTES_MAX} bytes.")
        case "thread_full":
            return TooLarge(
                f"The task's conversation would exceed {THREAD_BYTES_MAX} bytes, or {THREAD_MESSAGES_MAX} messages."
            )
        case _:
            return Conflict(f"A task that is {status.replace('_', ' ')} cannot be {name}.", status)


def _moved_on(event: AnyEvent) -> str:
    """Why an event came too late, or to the wrong address, although the task's status would allow it."""
    match event:
        case events.Resumed():
            return "The task waits for a decision and goes on with it: decide instead of resuming."
        case events.ApprovalDecided():
            return "This approval is not pending."
        case events.ReviewRequested():
            return "The version and the round of a plan are one more than those of the task's last one."
        case events.Restated():
            return "What was stated of the task has changed meanwhile."
        case events.Reviewed():
            return "The plan has been updated, or was reviewed already: look at its latest version."
        case _:
            return f"The task has moved on: it cannot be {events.tag(event).replace('_', ' ')}."


def task_id_of(secret: bytes, *parts: str) -> str:
    """26 characters from an idempotency key, unguessable without the deployment's secret."""
    digest = hashlib.blake2b("\0".join(parts).encode(), key=secret, digest_size=16).digest()
    return base32(int.from_bytes(digest, "big"))


_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
"""Crockford's: without I, L, O and U, as in the seed's ids."""


def base32(number: int) -> str:
    """128 bits as 26 characters."""
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def random_id() -> str:
    return base32(secrets.randbits(128))


def once() -> str:
    """A name for an operation that only this call may repeat, when an answer is lost."""
    return f"once:{random_id()}"


def canonical_hash(body: Any) -> str:
    """Of a JSON body, independent of the order of its keys."""
    return hashlib.sha256(msgspec.json.encode(body, order="sorted")).hexdigest()
