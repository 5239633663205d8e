"""What must hold when the chaos is over: every promise of the README, looked at in the logs, the store and the notes.

The checks trust nothing that the store says about itself where somebody else knows better: who spoke is in the words of
the attempts (`chaos_handlers.py`), what was promised in the files of those to whom it was promised.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec
from chaos_clients import FAILING, LATE, ORG, QUEUES, Ack, Fact, Plan, lines, plan
from chaos_handlers import Note
from chaos_readers import Control, Reader

from app import events, keys
from app.api.shannon import frame
from app.events import Entry
from app.store import Store
from app.task import MAX_ATTEMPTS, Status, Task

EVIDENCE_MAX = 5
"""Of each promise, in print."""
WORD = re.compile(r"«(\d+)\.(\d+)»")
ENDS = (events.Completed, events.Failed, events.Errored, events.Cancelled, events.TimedOut)
GIVEN_UP = (events.Requeued, events.LeaseLost)
NEW_TURN = (events.Continued, events.Retried)
LATE_SECONDS = 30.0
"""A deadline is kept so late at most: Valkey and all who tick may have been away."""


class Findings:
    """Promise → at how many it was looked, and where it broke."""

    def __init__(self) -> None:
        self.looked: Counter[str] = Counter()
        self.broken: dict[str, list[str]] = defaultdict(list)

    def check(self, promise: str, holds: object, evidence: str) -> bool:
        self.looked[promise] += 1
        if not holds:
            self.broken[promise].append(evidence)
        return bool(holds)


class Log:
    """One task: its snapshot and all its entries."""

    def __init__(self, task: Task, entries: list[Entry], base_seq: int) -> None:
        self.task, self.entries, self.base_seq = task, entries, base_seq

    def where(self, entry: Entry) -> str:
        said = events.encode(entry.event).decode()
        return f"{self.task.id} entry {entry.seq} ({entry.id}, fence {entry.fence}, n {entry.n}): {said[:200]}"


async def logs_of(store: Store) -> dict[str, Log]:
    """Of all tasks that are there, by whatever list names them."""
    found: dict[str, Log] = {}
    for tag in store.partitions.tags:
        for raw in await store.door.read("ZRANGE", keys.index(tag, ORG), 0, -1):
            id_, entries, base = raw.decode(), list[Entry](), 0
            while page := await store.events(ORG, id_, entries[-1].id if entries else ""):
                base = page.base_seq
                if not page.entries:
                    break
                entries += page.entries
            task = await store.get(ORG, id_)
            assert task, f"{id_} is in a list, and not there"
            found[id_] = Log(task, entries, base)
    return found


class Checks:
    def __init__(self, findings: Findings, logs: dict[str, Log], folder: Path, seed: int, lease_seconds: float) -> None:
        self.findings, self.logs, self.lease_seconds = findings, logs, lease_seconds
        self.acks: list[Ack] = lines(folder, "*.acks", Ack)
        self.facts: list[Fact] = lines(folder, "*.facts", Fact)
        self.notes: list[Note] = lines(folder, "*.notes", Note)
        self.notes_of: dict[str, list[Note]] = defaultdict(list)
        for note in self.notes:
            self.notes_of[note.task].append(note)
        self.plans: dict[str, Plan] = {ack.task: plan(seed, ack.number) for ack in self.acks}
        self.run_at = {fact.task: datetime.fromisoformat(fact.name) for fact in self.facts if fact.what == "run_at"}
        self.counts: Counter[str] = Counter()
        """What the logs tell of what was done."""

    def all(self, controls: Sequence[Control], tasks: int) -> None:
        self.submissions(tasks)
        for log in self.logs.values():
            self.life(log)
            self.attempts(log)
            self.words(log)
            self.times(log)
            self.outcome(log)
            self.children(log)
            self.decisions(log)
        self.noted()
        self.steered(controls)

    def entries(self, task: str) -> list[Entry]:
        """None of a task that is missing, which `submissions` says."""
        return self.logs[task].entries if task in self.logs else []

    def submissions(self, tasks: int) -> None:
        check = self.findings.check
        promise = "What was acknowledged is there, once"
        ids: dict[int, set[str]] = defaultdict(set)
        for ack in self.acks:
            ids[ack.number].add(ack.task)
            check(promise, ack.task in self.logs, f"{ack} is not in the store")
        for number in range(tasks):
            check(promise, len(ids[number]) == 1, f"submission {number} became {sorted(ids[number]) or 'nothing'}")
        children = {id_ for id_, log in self.logs.items() if log.task.parent}
        for id_ in self.logs.keys() - children - self.plans.keys():
            check(promise, False, f"{id_} is a task that nobody submitted")
        for id_, one in self.plans.items():
            if log := self.logs.get(id_):
                task = log.task
                check(promise, (task.query, task.context) == (one.query, one.context), f"{id_} is not {one}")
        self.counts["submissions repeated"] = sum(ack.tries > 1 for ack in self.acks)

    def life(self, log: Log) -> None:
        """Numbers without a hole, one end per turn, and nothing behind it."""
        check, entries, id_ = self.findings.check, log.entries, log.task.id
        seqs = [entry.seq for entry in entries]
        dense = seqs == [*range(1, len(seqs) + 1)] and log.base_seq == 0
        check("Entries are numbered 1, 2, 3 …", dense, f"{id_}: {seqs}")
        promise = "Each task ends exactly once (per turn), and nothing follows"
        turns: list[list[Entry]] = [[]]
        for entry in entries:
            if isinstance(entry.event, NEW_TURN):
                turns.append([])
            turns[-1].append(entry)
        for turn in turns:
            ends = [entry for entry in turn if isinstance(entry.event, ENDS)]
            seen = ", ".join(f"{entry.seq}: {events.tag(entry.event)}" for entry in ends) or "no end"
            check(promise, ends == turn[-1:], f"{id_}, {len(turn)} entries: {seen}; last is {log.where(turn[-1])}")
        self.counts["turns"] += len(turns)
        check(promise, log.task.terminal, f"{id_} is {log.task.status}")
        self.counts["entries"] += len(entries)
        self.counts[f"ended {log.task.status}"] += 1

    def attempts(self, log: Log) -> None:
        """One at a time, by the log alone: fences rise by one, producer numbers are dense, an attempt is closed before
        the next begins, and only the open one speaks.
        """
        check = self.findings.check
        promise = "No two attempts at the same moment"
        fence, n, open_, began, lease_seconds = 0, 0, False, 0, 0.0
        for entry in log.entries:
            event, where = entry.event, log.where(entry)
            if isinstance(event, events.Started):
                check(promise, not open_, f"begun while attempt {fence} is open: {where}")
                check(promise, entry.fence == fence + 1, f"fence {fence} is followed by: {where}")
                fence, n, open_, began = entry.fence, 0, True, entry.at
                lease_seconds = event.lease_seconds or self.lease_seconds
                self.counts["attempts"] += 1
                self.counts[f"attempts of {log.task.queue}"] += 1
                continue
            check(promise, entry.fence == fence, f"attempt {fence} is the latest, not that of: {where}")
            if entry.n:
                check(promise, open_, f"a worker speaks without an attempt: {where}")
                check("An attempt's events are numbered 1, 2, 3 …", entry.n == n + 1, f"behind number {n}: {where}")
                n = entry.n
            if isinstance(event, events.LeaseLost):
                held = (entry.at - began) / 1e6
                check("No lease ends early", held >= lease_seconds - 0.01, f"after {held:.3f} s: {where}")
            if isinstance(event, (*ENDS, *GIVEN_UP)):
                open_ = False
            self.counts[events.tag(event)] += 1
            if isinstance(event, events.Noted) and event.name == "WARNING":
                self.counts["warnings of refused words"] += 1

    def words(self, log: Log) -> None:
        """By what the attempts themselves said."""
        promise = "A worker that was given up writes nothing"
        fence, last = 0, 0
        said: dict[int, int] = defaultdict(int)
        for entry in log.entries:
            if isinstance(entry.event, events.Started):
                fence, last = entry.fence, 0
            if isinstance(entry.event, (events.Submitted, events.ChildSubmitted)):
                continue
            text = events.encode(entry.event).decode()
            self.findings.check(promise, LATE not in text, f"a zombie speaks: {log.where(entry)}")
            for whose, number in WORD.findall(text):
                self.findings.check(promise, int(whose) == fence, f"attempt {whose} speaks: {log.where(entry)}")
                whole = int(number) == last + 1
                self.findings.check(
                    "No word of an attempt is lost", whole, f"{last} is followed by: {log.where(entry)}"
                )
                last = int(number)
                said[int(whose)] = last
        for note in self.notes_of[log.task.id]:
            if note.what == "said":
                has = said[note.fence] >= note.word
                lost = f"{note}, but the log has {said[note.fence]} words of that attempt"
                self.findings.check("What the store acknowledged to a worker is in the log", has, lost)

    def times(self, log: Log) -> None:
        task, promise = log.task, "Delays, deadlines and times to live are kept"
        first = next((entry for entry in log.entries if isinstance(entry.event, events.Started)), None)
        one = self.plans.get(task.id)
        delay = self._delay(task, one) if one else 0
        if delay and first:
            waited = (first.at - task.created_at) / 1e6
            early = f"{task.id} began after {waited:.3f} s, not {delay:.3f} s"
            self.findings.check(promise, waited >= delay - 0.001, early)
        if not one or task.turn > 1 or log.task.status is not Status.TIMED_OUT:
            return
        end = (task.finished_at - task.created_at) / 1e6
        limits = [delay + seconds for seconds in (one.timeout_seconds, 0 if first else one.ttl_seconds) if seconds]
        kept = limits and min(limits) - 0.001 <= end <= min(limits) + LATE_SECONDS
        self.findings.check(promise, kept, f"{task.id} timed out after {end:.3f} s; its limits are {limits}")

    def _delay(self, task: Task, one: Plan) -> float:
        """From its acceptance, which may come so late that none is left."""
        if one.native or not one.delay_seconds:
            return one.delay_seconds
        return max(0, self.run_at[one.name].timestamp() - task.created_at / 1e6)

    def outcome(self, log: Log) -> None:
        """The result is there, and is its own; every other end has a reason that was planned, asked for, or suffered."""
        task, one = log.task, self.plans.get(log.task.id)
        kind = one.kind if one else "stream"
        promise = "Each end is the right one, with its result"
        seen = f"{task.id} ({kind}) is {task.status}: {task.error}"
        began = [place for place, entry in enumerate(log.entries) if isinstance(entry.event, NEW_TURN)]
        turn = log.entries[began[-1] if began else 0 :]
        count = sum(isinstance(entry.event, events.Started) for entry in turn)
        refunds = sum(getattr(entry.event, "refund", False) for entry in turn)
        attempts_max = (one.max_attempts if one else 0) or MAX_ATTEMPTS
        many = f"{task.id} had {count} attempts, of which {refunds} do not count, and not {attempts_max}"
        self.findings.check("No task has more attempts than it may", count - refunds <= attempts_max, many)
        match task.status:
            case Status.COMPLETED if kind == "parent":
                children = json.loads(task.result)["children"]
                stand = {id_: self.logs[id_].task.status.value for id_ in children if id_ in self.logs}
                holds = children == stand and len(children) == 2
                seen += f"; it says {children}, and the store {stand}"
            case Status.COMPLETED:
                holds = task.result == f"{task.query} is done" and kind not in {*FAILING, "raise"}
                seen += f"; its result: {task.result[:200]}"
            case Status.FAILED:
                holds = kind in FAILING
            case Status.ERRORED:
                holds = kind == "raise" or count - refunds >= attempts_max
                self.counts["lost too often"] += kind != "raise"
                seen += f", after {count} attempts, of which {refunds} do not count"
            case Status.TIMED_OUT:
                holds = one is not None and bool(one.timeout_seconds or one.ttl_seconds)
            case _:
                holds = bool(task.cancel_reason)
        self.findings.check(promise, holds, seen)

    def children(self, log: Log) -> None:
        promise = "Sub-tasks exist, belong to their parents, and end"
        made = [entry.event.task for entry in log.entries if isinstance(entry.event, events.ChildSubmitted)]
        for child in made:
            found = self.logs.get(child.id)
            if not self.findings.check(promise, found, f"{child.id} of {log.task.id} does not exist"):
                continue
            assert found
            whole = found.task.terminal and found.task.parent == log.task.id
            self.findings.check(promise, whole, f"{child.id} of {log.task.id} is {found.task}")
        if log.task.parent:
            parent = self.logs.get(log.task.parent)
            asked = parent and any(
                isinstance(entry.event, events.ChildSubmitted) and entry.event.task.id == log.task.id
                for entry in parent.entries
            )
            self.findings.check(promise, asked, f"nobody asked for {log.task.id} of {log.task.parent}")
            self.counts["sub-tasks"] += 1
        once = len({child.query for child in made}) == len({child.id for child in made})
        self.findings.check(promise, once, f"{log.task.id} made one of them twice: {[child.id for child in made]}")

    def decisions(self, log: Log) -> None:
        decided = Counter(e.event.approval for e in log.entries if isinstance(e.event, events.ApprovalDecided))
        asked = Counter(e.event.approval for e in log.entries if isinstance(e.event, events.ApprovalRequested))
        for name, times in decided.items():
            many = f"{log.task.id}: {name} was asked {asked[name]} times and decided {times} times"
            self.findings.check("A human decides once", times == 1 and asked[name] >= 1, many)

    def noted(self) -> None:
        check = self.findings.check
        begun = Counter((note.task, note.fence) for note in self.notes if note.what == "began")
        starts = {
            (id_, entry.fence)
            for id_, log in self.logs.items()
            for entry in log.entries
            if isinstance(entry.event, events.Started)
        }
        for one, times in begun.items():
            check(
                "A claim is given to one worker, once", times == 1 and one in starts, f"{one} was begun {times} times"
            )
        for note in self.notes:
            if note.what in {"refused", "accepted"}:
                self.counts["zombies refused"] += note.what == "refused"
                check("A zombie's late writes are refused", note.what == "refused", f"{note}")
        self.counts["beside"] = self._beside()
        for fact in self.facts:
            if fact.what == "answer":
                check("Requests are answered as promised", False, fact.name)
            elif fact.what in {"repeated", "cancelled"}:
                self.counts[f"{fact.what} over HTTP"] += 1
            elif fact.what == "decided":
                self.counts["decided"] += 1
                has = any(
                    (isinstance(entry.event, events.ApprovalDecided) and entry.event.approval == fact.name)
                    or (isinstance(entry.event, events.Reviewed) and str(entry.event.version) == fact.name)
                    for entry in self.entries(fact.task)
                )
                check("Acknowledged controls are in the log, once", has, f"{fact} is not in the log")

    def _beside(self) -> int:
        """By the workers' own clocks: what fences are for."""
        count = 0
        for id_ in self.logs:
            alive: dict[int, float] = {}
            for note in sorted(self.notes_of[id_], key=lambda note: note.at):
                if note.what == "began":
                    count += sum(fence < note.fence for fence in alive)
                    alive = {note.fence: note.at}
                elif note.what == "ended":
                    alive.pop(note.fence, None)
        return count

    def steered(self, controls: Sequence[Control]) -> None:
        promise = "Acknowledged controls are in the log, once"
        verbs = {"cancel": events.Cancelled, "pause": events.PauseAsked, "resume": events.Resumed}
        for one in controls:
            found = [entry for entry in self.entries(one.task) if isinstance(entry.event, verbs[one.verb])]
            count = sum(getattr(entry.event, "reason", "") == one.reason for entry in found)
            self.findings.check(promise, count == one.accepted, f"{one} is {count} times in the log of {one.task}")
            if one.verb == "cancel" and one.accepted and one.task in self.logs:
                status = self.logs[one.task].task.status
                self.findings.check(promise, status is Status.CANCELLED, f"{one}, but it is {status}")
            self.counts[f"{one.verb} accepted"] += one.accepted
            self.counts[f"{one.verb} refused"] += not one.accepted

    # Readers

    def read(self, reader: Reader) -> None:
        """A stream ends at an end of its task; if the task was tried once more before the reader had come to its first
        end, at the next one.
        """
        promise = "A reader of one task has its log: no gap, nothing twice"
        log = self.logs.get(reader.task)
        if not self.findings.check(promise, log, f"{reader.task} is not there") or log is None:
            return
        for one in reader.wrong:
            self.findings.check("Requests are answered as promised", False, f"a reader of {reader.task} got {one}")
        frames = [one for one in reader.frames if one.id or one.event != "workflow.cancelling"]
        end = frames.pop() if frames else None
        ends = {f"{entry.id}.end": place for place, entry in enumerate(log.entries) if isinstance(entry.event, ENDS)}
        done = end is not None and end.event == "done" and end.id in ends
        if not self.findings.check(promise, done, f"{reader.task}: {end} is not `done` at one of {[*ends]}") or not end:
            return
        wanted = [
            (one.event, one.id, plain(one.data))
            for entry in log.entries[: ends[end.id] + 1]
            for one in frame(entry)
            if one.id
        ]
        heard = [(one.event, one.id, plain(one.data)) for one in frames]
        first = next((pair for pair in zip(heard, wanted, strict=False) if pair[0] != pair[1]), "only its length")
        differs = f"{reader.task}: {len(heard)} frames of {len(wanted)}; {first} differs"
        self.findings.check(promise, heard == wanted, differs)

    def missing(self, reader: Reader) -> int:
        """How many entries a reader of everything has not heard of yet."""
        heard = sum(bool(one.id) and one.event not in {"cursor", "snapshot", "gap"} for one in reader.frames)
        return sum(len(log.entries) for log in self.logs.values()) - heard

    def read_all(self, reader: Reader) -> None:
        promise = "A reader of all tasks has every log: no gap, nothing twice"
        told: dict[str, list[tuple[str, dict[str, object]]]] = defaultdict(list)
        for one in reader.frames:
            if one.event == "gap":
                self.findings.check(promise, False, f"a gap: {one}")
            elif one.id and one.event not in {"cursor", "snapshot"}:
                data = plain(one.data)
                told[str(data["workflow_id"])].append((one.event, data))
        for id_, log in self.logs.items():
            wanted = [(one.event, plain(one.data)) for entry in log.entries for one in frame(entry) if one.id]
            first = next(
                (pair for pair in zip(told[id_], wanted, strict=False) if pair[0] != pair[1]), "only its length"
            )
            seen = f"{id_}: {len(told[id_])} frames of {len(wanted)}; {first} differs"
            self.findings.check(promise, told[id_] == wanted, seen)
        for one_ in reader.wrong:
            self.findings.check("Requests are answered as promised", False, f"the reader of all got {one_}")


def plain(data: object) -> dict[str, object]:
    """As JSON tells it. A frame's place is its id, which on a stream of many tasks is another one."""
    raw = data if isinstance(data, str) else msgspec.json.encode(data).decode()
    try:
        found = json.loads(raw)
    except ValueError:
        found = raw
    return found if isinstance(found, dict) else {"data": found}


async def stored(store: Store, findings: Findings) -> None:
    """Nothing is left in a queue, and the store is the fold of its logs."""
    promise = "Nothing is left in a ready, lease or due set"
    door = store.door
    for tag in store.partitions.tags:
        names = [keys.key(tag, "leases"), keys.key(tag, "due")]
        for pattern in ("ready:*", "ready-of:*"):
            names += [name async for name in store.snapshots._scan(keys.prefix(tag) + pattern)]  # noqa: SLF001 (the only scan)
        for name in names:
            left = await door.read("ZRANGE", name, 0, 4)
            findings.check(promise, not left, f"{name} holds {left}")
        left = await door.read("LRANGE", keys.key(tag, "followups"), 0, 4)
        findings.check("No follow-up is left", not left, f"{left}")
        for queue in {"default", *QUEUES.values()}:
            tokens = await door.read("LLEN", keys.key(tag, "wake", queue))
            findings.check(promise, tokens <= 64, f"{tokens} wake-up calls for {queue}")
        async for name in store.snapshots._scan(f"{keys.prefix(tag)}*"):  # noqa: SLF001
            findings.check("Every key is declared", keys.declared(name.encode()), name)
    promise = "Snapshots, lists and queues are the fold of the log (verify)"
    findings.looked[promise] += await store.snapshots.count()
    findings.broken[promise] += [f"{one}" async for one in store.snapshots.verify()]
    promise = "… and still are when they are made again (rebuild)"
    count, damaged = await store.snapshots.rebuild()
    findings.looked[promise] += count
    findings.broken[promise] += damaged + [f"{one}" async for one in store.snapshots.verify()]
