"""Submit and append: one atomic step, guards before writes, and a repeat is never a second write."""

import asyncio
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import pytest

from app import events, keys
from app.errors import (
    Conflict,
    Full,
    Invalid,
    Misconfigured,
    NotFound,
    OutOfOrder,
    Stale,
    TaskcastError,
    TooLarge,
    Unavailable,
)
from app.events import AnyEvent, Submission, TextDelta
from app.log import BATCH_EVENTS_MAX, Appended, open_partitions, said
from app.settings import Settings
from app.store import Store, open_store
from app.task import THREAD_BYTES_MAX, THREAD_MESSAGES_MAX, Status, Task


def submission(id_: str = "t", **more: Any) -> Submission:
    return Submission(**({"id": id_, "org": "o", "owner": "u", "query": "why?", "submission": f"r-{id_}"} | more))


async def started(store: Store, id_: str = "t", **more: Any) -> int:
    """A running task; answers its fence."""
    await store.submit(submission(id_, **more))
    (claimed,) = await store.claim([more.get("queue", "default")], "w", 1)
    assert claimed.task == id_
    return claimed.fence


async def extend(
    store: Store, id_: str, batch: Sequence[AnyEvent], *, fence: int, n: int
) -> list[Appended | TaskcastError]:
    return await store.extend("o", id_, [*map(said, batch)], fence=fence, n=n)


async def test_a_submitted_task_is_queued_and_its_first_event_is_number_one(store: Store) -> None:
    appended = await store.submit(submission(context={"a": 1}))
    task = await store.get("o", "t")
    assert task is not None
    assert (task.status, task.last_seq, task.last_event_id) == (Status.QUEUED, 1, appended.id)
    assert task.created_at == task.updated_at == appended.at
    assert task.context == {"a": 1}


async def test_the_same_submission_twice_is_one_task(store: Store) -> None:
    first = await store.submit(submission())
    again = await store.submit(submission())
    assert again.duplicate
    assert again.id == first.id
    with pytest.raises(Conflict, match="exists"):
        await store.submit(submission(submission="another"))


async def test_racing_submissions_with_one_idempotency_key_make_one_task(store: Store) -> None:
    racing = [submission(submission=f"r{i}", body_hash="h") for i in range(50)]
    answers = await asyncio.gather(*(store.submit(one) for one in racing))
    assert sum(not one.cached for one in answers) == 1
    assert {one.id for one in answers} == {answers[0].id}
    with pytest.raises(Conflict, match="another request body"):
        await store.submit(submission(submission="r99", body_hash="other"))


async def test_a_producer_number_is_accepted_once_and_only_in_order(store: Store) -> None:
    fence = await started(store)
    first = await store.append("o", "t", TextDelta(text="a"), fence=fence, n=1)
    again = await store.append("o", "t", TextDelta(text="a"), fence=fence, n=1)
    assert (first.duplicate, again.duplicate) == (False, True)
    with pytest.raises(OutOfOrder):
        await store.append("o", "t", TextDelta(text="c"), fence=fence, n=3)
    await store.append("o", "t", TextDelta(text="b"), fence=fence, n=2)
    snapshot = await store.snapshots.snapshot("o", "t")
    assert snapshot is not None
    assert snapshot.texts == {"": "ab"}


def told(answers: list[Appended | TaskcastError]) -> list[str]:
    """`ok`, `duplicate`, or the error's code."""
    return [
        answer.code if isinstance(answer, TaskcastError) else "duplicate" if answer.duplicate else "ok"
        for answer in answers
    ]


async def texts(store: Store) -> dict[str, str]:
    snapshot = await store.snapshots.snapshot("o", "t")
    assert snapshot is not None
    return snapshot.texts


async def test_a_batch_is_appended_in_its_order_as_if_said_one_by_one(store: Store) -> None:
    fence = await started(store)
    batch: list[AnyEvent] = [TextDelta(text=text, agent="a") for text in "abc"]
    batch += [events.TextCompleted(text="abc", agent="a"), TextDelta(text="d"), events.Completed(result="abc")]
    answers = await extend(store, "t", batch, fence=fence, n=1)
    assert told(answers) == ["ok"] * 6
    page = await store.events("o", "t", "")
    assert page is not None
    assert [(entry.n, entry.event) for entry in page.entries[2:]] == list(enumerate(batch, 1))
    assert [(entry.seq, entry.id, entry.at) for entry in page.entries[2:]] == [
        (answer.seq, answer.id, answer.at) for answer in answers if isinstance(answer, Appended)
    ]
    assert await texts(store) == {"": "d"}
    assert [d async for d in store.snapshots.verify()] == []


async def test_a_batch_ends_at_its_first_refusal_and_what_follows_may_be_said_again(store: Store) -> None:
    fence = await started(store)
    large = TextDelta(text="x" * (events.TEXT_BYTES_MAX - 1))
    batch: list[AnyEvent] = [TextDelta(text="a"), large, TextDelta(text="b")]
    first = await extend(store, "t", batch, fence=fence, n=1)
    assert told(first) == ["ok", "too_large"]
    assert await texts(store) == {"": "a"}
    assert told(await extend(store, "t", batch, fence=fence, n=1)) == ["duplicate", "too_large"]
    assert told(await extend(store, "t", [TextDelta(text="b")], fence=fence, n=2)) == ["ok"]
    assert await texts(store) == {"": "ab"}
    assert told(await extend(store, "t", batch[:1], fence=fence, n=4)) == ["out_of_order"]
    assert told(await extend(store, "t", batch[:1], fence=fence + 1, n=3)) == ["stale"]
    assert told(await extend(store, "nobody", batch, fence=1, n=1)) == ["not_found"]
    assert await extend(store, "t", [], fence=fence, n=3) == []


async def test_a_batch_goes_no_further_than_the_end_of_its_attempt(store: Store) -> None:
    fence = await started(store)
    batch: list[AnyEvent] = [TextDelta(text="a"), events.Requeued(), TextDelta(text="late")]
    assert told(await extend(store, "t", batch, fence=fence, n=1)) == ["ok", "ok", "stale"]
    assert told(await extend(store, "t", batch, fence=fence, n=1)) == ["duplicate", "duplicate", "stale"]
    await store.claim(["default"], "w2", 1)
    assert told(await extend(store, "t", batch, fence=fence, n=1)) == ["stale"]


async def test_a_batch_whose_reply_was_lost_is_stored_once_and_answers_where_it_stands(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fence = await started(store)
    lane, answers = store.door._fast, list[Any]()
    ask = lane.ask

    async def lossy(command: Any) -> Any:
        answer = await ask(command)
        if not answers:
            answers.append(answer)
            # Meanwhile others speak of the task, too.
            await store.append("o", "t", events.Noted(name="X"))
            raise Unavailable("the reply is lost")
        return answer

    monkeypatch.setattr(lane, "ask", lossy)
    batch = [TextDelta(text=str(n % 10)) for n in range(BATCH_EVENTS_MAX)]
    again = await extend(store, "t", batch, fence=fence, n=1)
    assert told(again) == ["duplicate"] * BATCH_EVENTS_MAX
    assert [(one.seq, one.id.encode(), one.at) for one in again if isinstance(one, Appended)] == [
        (int(seq), id_, int(at)) for _, seq, id_, at, *_ in answers[0]
    ]
    assert await texts(store) == {"": "0123456789" * (BATCH_EVENTS_MAX // 10)}
    more = await extend(store, "t", [*batch[-1:], TextDelta(text="!")], fence=fence, n=BATCH_EVENTS_MAX)
    assert told(more) == ["duplicate", "ok"]


async def test_a_batch_that_was_stored_in_part_goes_on_where_it_ended(store: Store) -> None:
    fence = await started(store)
    ask = events.ApprovalRequested(approval="a", reason="May I?")
    batch: list[AnyEvent] = [TextDelta(text="a"), ask, TextDelta(text="b")]
    await store.append("o", "t", events.PauseAsked())
    assert told(await extend(store, "t", batch, fence=fence, n=1)) == ["ok", "conflict"]
    await store.append("o", "t", events.Resumed())
    answers = await extend(store, "t", batch, fence=fence, n=1)
    assert told(answers) == ["duplicate", "ok", "ok"]
    assert [one.status for one in answers if isinstance(one, Appended)][1:] == [Status.PAUSED] * 2
    assert await texts(store) == {"": "ab"}


async def test_a_repeat_from_too_far_back_is_a_duplicate_without_a_place(store: Store) -> None:
    fence = await started(store)
    await store.append("o", "t", TextDelta(text="a"), fence=fence, n=1)
    for first in range(2, 1402, BATCH_EVENTS_MAX):
        await extend(store, "t", [events.Thinking()] * BATCH_EVENTS_MAX, fence=fence, n=first)
    again = await store.append("o", "t", TextDelta(text="a"), fence=fence, n=1)
    assert (again.duplicate, again.seq) == (True, 0)
    assert (await store.append("o", "t", events.Thinking(), fence=fence, n=900)).seq == 902


async def test_a_batch_is_bounded_and_checked_in_full_before_anything_is_sent(store: Store) -> None:
    fence = await started(store)
    fine = TextDelta(text="a")
    batches: list[list[AnyEvent]] = [
        [fine, events.Progressed(fraction=2)],
        [fine] * (BATCH_EVENTS_MAX + 1),
        [fine, *[events.Noted(name="X", message="x" * 200_000)] * 6],
    ]
    for batch in batches:
        with pytest.raises(Invalid):
            await extend(store, "t", batch, fence=fence, n=1)
    for n in (0, -1):
        with pytest.raises(Invalid, match="from 1"):
            await extend(store, "t", [fine], fence=fence, n=n)
        with pytest.raises(Invalid, match="from 1"):
            await store.append("o", "t", fine, fence=fence, n=n)
    assert await texts(store) == {}


async def test_a_decision_is_taken_once_and_only_on_what_is_asked(store: Store) -> None:
    fence = await started(store)
    await store.append("o", "t", events.ApprovalRequested(approval="a", reason="May I?"), fence=fence, n=1)
    assert [task.id for task in (await store.list("o", [("waiting",)])).tasks] == ["t"]
    before = await store.snapshots.snapshot("o", "t")
    wrong: list[AnyEvent] = [
        events.Resumed(),
        events.ApprovalDecided(approval="b", approved=True),
        events.Reviewed(version=1, approved=True),
    ]
    for event in wrong:
        with pytest.raises(Conflict) as refused:
            await store.append("o", "t", event, operation="op")
        assert refused.value.status == "paused"
    assert await store.snapshots.snapshot("o", "t") == before
    yes, no = (events.ApprovalDecided(approval="a", approved=approved) for approved in (True, False))
    racing = [store.append("o", "t", event, operation=f"{i}") for i, event in enumerate([yes, no] * 5)]
    answers = await asyncio.gather(*racing, return_exceptions=True)
    assert sum(isinstance(one, Appended) for one in answers) == 1
    assert (await store.list("o", [("waiting",)])).total == 0
    assert [d async for d in store.snapshots.verify()] == []


async def test_an_opinion_of_an_older_plan_is_refused(store: Store) -> None:
    fence = await started(store)
    for n, version in ((1, 1), (2, 2)):
        review = events.ReviewRequested(plan=f"plan {version}", version=version, round=version)
        await store.append("o", "t", review, fence=fence, n=n)
        if version == 1:
            await store.append("o", "t", events.Reviewed(version=1, approved=False, feedback="shorter"))
    with pytest.raises(Conflict, match="latest version"):
        await store.append("o", "t", events.Reviewed(version=1, approved=True))
    await store.append("o", "t", events.Reviewed(version=2, approved=True))
    task = await store.get("o", "t")
    assert task is not None
    assert (task.status, task.plan, task.review, task.review_version) == (Status.RUNNING, "plan 2", "approved", 2)


async def test_a_stale_fence_is_refused_and_writes_nothing(store: Store) -> None:
    fence = await started(store)
    await store.append("o", "t", events.Requeued(), fence=fence, n=1)
    await store.claim(["default"], "w2", 1)
    before = await store.snapshots.snapshot("o", "t")
    with pytest.raises(Stale):
        await store.append("o", "t", TextDelta(text="late"), fence=fence, n=2)
    assert await store.snapshots.snapshot("o", "t") == before


async def test_an_illegal_move_is_a_conflict_that_names_the_status(store: Store) -> None:
    await store.submit(submission())
    with pytest.raises(Conflict, match="queued") as refused:
        await store.append("o", "t", events.Resumed())
    assert refused.value.status == "queued"
    with pytest.raises(NotFound):
        await store.append("o", "nobody", events.Cancelled())
    with pytest.raises(NotFound):
        await store.append("another-org", "t", events.Cancelled())


async def test_a_repeated_control_call_answers_as_the_first_time(store: Store) -> None:
    await store.submit(submission())
    first = await store.append("o", "t", events.Cancelled(reason="x"), operation="op")
    again = await store.append("o", "t", events.Cancelled(reason="x"), operation="op")
    assert (again.seq, again.id, again.duplicate) == (first.seq, first.id, True)
    with pytest.raises(Conflict):
        await store.append("o", "t", events.Cancelled(reason="x"), operation="other")


async def test_text_beyond_192_kib_is_refused_and_the_text_so_far_stays(store: Store) -> None:
    fence = await started(store)
    half = "a" * (events.TEXT_BYTES_MAX // 2)
    await store.append("o", "t", TextDelta(text=half), fence=fence, n=1)
    with pytest.raises(TooLarge):
        await store.append("o", "t", TextDelta(text=half), fence=fence, n=2)
    await store.append("o", "t", TextDelta(text="b"), fence=fence, n=2)  # the refused number was not used up
    snapshot = await store.snapshots.snapshot("o", "t")
    assert snapshot is not None
    assert snapshot.texts == {"": half + "b"}


async def test_values_that_look_like_lua_or_placeholders_stay_what_they_are(store: Store) -> None:
    odd = "@at '\"\\ \x00\x1e\x7f\u2028 ]] %d 🎈"
    await store.submit(submission(query=odd, title="@id", user="@seq", agent="a:b/c\x00", context={"@at": odd}))
    task = await store.get("o", "t")
    assert task is not None
    assert (task.query, task.title, task.user, task.context) == (odd, "@id", "@seq", {"@at": odd})
    assert [d async for d in store.snapshots.verify()] == []


async def test_a_deleted_task_leaves_nothing_but_a_tombstone_and_its_id_goes_on(store: Store) -> None:
    fence = await started(store, session="s", deadline_seconds=60)
    await store.append("o", "t", events.TextDelta(text="a"), fence=fence, n=1)
    usage = events.Usage(input_tokens=5)
    await store.append("o", "t", events.TextCompleted(text="a", usage=usage), fence=fence, n=2)
    gone = await store.delete("o", "t")
    assert await store.get("o", "t") is None
    left = [key async for key in store.snapshots._scan("*")]
    kinds = {kind.name for kind in map(keys.declared, (name.encode() for name in left)) if kind}
    assert kinds <= {"log", "count", "queues", "wake", "claim", "tombstone"}
    again = await store.submit(submission(submission="r2"))
    assert again.seq == gone.seq + 1
    (claimed,) = await store.claim(["default"], "w", 1)
    assert claimed.fence == fence + 1
    assert [d async for d in store.snapshots.verify()] == []


async def test_every_key_of_a_used_store_is_declared_with_its_type(store: Store) -> None:
    fence = await started(store, session="s", user="x", parent="p", trigger="a2", deadline_seconds=60)
    await store.append("o", "t", TextDelta(text="a", agent="b"), fence=fence, n=1)
    await store.append("o", "t", events.Restated(internal_status="deep"), operation="op")
    await store.append("o", "t", events.Requeued(), fence=fence, n=2)
    await store.submit(submission("t2"))
    await store.delete("o", "t2")
    await store.snapshots.retitle_session("o", "u", "s", "Title")
    await store.agents.used("o", "a")
    await store.hide("o", "t", "s", {"user_tokens": {}})
    await store.registrations.add("o", "a")
    passing = {"claim", "outcome", "tombstone", "wake", "secrets", "worker"}
    seen = set()
    async for name in store.snapshots._scan("*"):
        if name == keys.DEPLOYMENT:
            continue
        kind = keys.declared(name.encode())
        assert kind is not None, f"{name} is not declared in keys.py"
        assert (await store.door.read("TYPE", name)).decode() == kind.type, name
        expires = await store.door.read("TTL", name) >= 0
        assert expires == (kind.name in passing), name
        seen.add(kind.name)
    assert seen >= {"log", "count", "task", "events", "index", "sessions", "session", "ready", "queues", "wake", "due"}
    assert passing <= seen


async def test_a_store_that_is_full_says_so_and_goes_on_reading_and_deleting(store: Store) -> None:
    await store.submit(submission())
    await store.door.call("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(Full):
        await store.submit(submission("t2"))
    with pytest.raises(Full):
        await store.append("o", "t", events.Cancelled())
    assert await store.get("o", "t2") is None
    assert (await store.events("o", "t", "")) is not None
    await store.delete("o", "t")
    await store.door.call("CONFIG", "SET", "maxmemory", "0")
    assert [d async for d in store.snapshots.verify()] == []


async def test_a_wrong_type_under_a_key_stops_the_step_before_its_first_write(store: Store) -> None:
    await store.submit(submission())
    tag = store.partitions.tag("o", "t")
    await store.door.call("DEL", keys.key(tag, "leases"))
    await store.door.call("SET", keys.key(tag, "leases"), "x")
    before = await store.log.end(tag)
    with pytest.raises(Exception, match="WRONGTYPE"):
        await store.claim(["default"], "w", 1)
    assert await store.log.end(tag) == before
    await store.door.call("DEL", keys.key(tag, "leases"))
    assert [d async for d in store.snapshots.verify()] == []


async def test_another_data_format_number_of_partitions_or_an_evicting_server_is_refused(
    store: Store, settings: Settings
) -> None:
    with pytest.raises(Misconfigured, match="1 partitions, not 4"):
        await open_partitions(store.door, 4)
    await store.door.call("HSET", keys.DEPLOYMENT, "format", "0")
    with pytest.raises(Misconfigured, match="format 0"):
        await open_partitions(store.door, 0)
    await store.door.call("HSET", keys.DEPLOYMENT, "format", keys.FORMAT)
    await store.door.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with pytest.raises(Misconfigured, match="noeviction"):
        await open_partitions(store.door, 0)


async def test_several_partitions_behave_as_one_store(settings: Settings) -> None:
    async with open_store(settings.model_copy(update={"partitions": 5})) as store:
        for i in range(40):
            await store.submit(submission(f"t{i}", session=f"s{i % 3}"))
        assert len({store.partitions.tag("o", f"t{i}") for i in range(40)}) == 5
        page = await store.list("o", [("owner", "u")], offset=10, limit=10)
        assert page.total == 40
        assert [task.id for task in page.tasks] == [f"t{i}" for i in range(29, 19, -1)]
        sessions, total = await store.snapshots.sessions("o", "u", offset=0, limit=10)
        assert (total, sorted(one.tasks for one in sessions)) == (3, [13, 13, 14])
        claimed = await store.claim(["default"], "w", 100)
        assert len(claimed) == 40
        assert set((await store.renew(claimed)).values()) == {"running"}
        assert [d async for d in store.snapshots.verify()] == []
        await store.snapshots.rebuild()
        assert [d async for d in store.snapshots.verify()] == []


async def test_a_wrong_type_stops_a_deletion_before_its_first_write(store: Store) -> None:
    await started(store, session="s")
    (tag,) = store.partitions.tags
    before = await store.log.end(tag)
    names = [("ready", "default"), ("ready-of", "o:default"), ("ended",), ("due",), ("tombstone", "o", "t")]
    for name in names:
        await store.door.call("SET", keys.key(tag, *name), "x")
        with pytest.raises(Exception, match="WRONGTYPE"):
            await store.delete("o", "t")
        await store.door.call("DEL", keys.key(tag, *name))
    for name in (("index", "o"), ("totals", "o", "u", "s"), ("sessions", "o", "u")):
        await store.door.call("DEL", keys.key(tag, *name))
        await store.door.call("SET", keys.key(tag, *name), "x")
        with pytest.raises(Exception, match="WRONGTYPE"):
            await store.delete("o", "t")
        await store.door.call("DEL", keys.key(tag, *name))
    assert await store.log.end(tag) == before
    await store.snapshots.rebuild()
    assert [d async for d in store.snapshots.verify()] == []


# Turns, and what an owner states


async def ended(store: Store, id_: str = "t", **more: Any) -> None:
    await store.submit(submission(id_, **more))
    await store.append("o", id_, events.Completed(result="a"))


async def now(store: Store, id_: str = "t") -> Task:
    found = await store.get("o", id_)
    assert found is not None
    return found


async def test_a_new_turn_begins_where_the_last_one_has_ended_and_keeps_what_it_does_not_name(store: Store) -> None:
    schema = {"type": "object"}
    asked: dict[str, Any] = {
        "llm_provider": "p",
        "llm_model": "m",
        "llm_effort": "high",
        "output_schema": schema,
        "title": "One",
    }
    await store.submit(submission(**asked, context={"a": 1}, user="x", agent="a1"))
    again = events.Continued(query="more", submission="r2", llm_model="m2")
    for end in (None, events.PauseAsked()):
        if end:
            await store.append("o", "t", end)
        with pytest.raises(Conflict, match="cannot be continued"):
            await store.append("o", "t", again)
    await store.append("o", "t", events.Resumed())
    await store.append("o", "t", events.Completed(result="a"))
    before = await now(store)
    assert (before.llm_provider, before.llm_effort, before.output_schema) == ("p", "high", schema)
    assert (before.turn, before.turn_seq) == (1, 0)
    appended = await store.append("o", "t", again)
    found = await now(store)
    assert (found.turn, found.turn_seq, found.status) == (2, appended.seq, Status.QUEUED)
    assert (found.query, found.llm_provider, found.llm_model, found.llm_effort) == ("more", "", "m2", "")
    assert (found.title, found.context, found.output_schema, found.result) == ("", {}, {}, "")
    assert (found.id, found.user, found.agent, found.created_at) == ("t", "x", "a1", before.created_at)
    assert [one.task for one in await store.claim(["default"], "w", 1)] == ["t"]


async def test_a_new_turn_may_wait_in_another_queue_which_is_then_known(store: Store) -> None:
    await ended(store)
    await store.append("o", "t", events.Continued(query="more", submission="r2", queue="agent:other"))
    assert await store.claim(["default"], "w", 1) == []
    (tag,) = store.partitions.tags
    assert {*await store.door.read("ZRANGE", keys.key(tag, "queues"), 0, -1)} == {b"default", b"agent:other"}
    assert [d async for d in store.snapshots.verify()] == []
    (claimed,) = await store.claim(["agent:other"], "w", 1)
    assert claimed.found.queue == "agent:other"
    await store.append("o", "t", events.Completed(result="b"))
    await store.append("o", "t", events.Continued(query="and more", submission="r3"))
    assert (await now(store)).queue == "agent:other"


async def test_the_same_turn_twice_is_one_turn(store: Store) -> None:
    await ended(store)
    again = events.Continued(query="more", submission="r2")
    first = await store.append("o", "t", again)
    repeated = await store.append("o", "t", again)
    assert (first.duplicate, repeated.duplicate) == (False, True)
    await store.claim(["default"], "w", 1)
    assert (await store.append("o", "t", again)).duplicate
    assert (await now(store)).turn == 2
    assert len(await store.thread("o", "t")) == 3


async def test_of_racing_new_turns_one_wins(store: Store) -> None:
    await ended(store)
    racing = [events.Continued(query=f"{i}", submission=f"r{i}") for i in range(20)]
    answers = await asyncio.gather(
        *(store.append("o", "t", one) for one in racing for _ in range(2)), return_exceptions=True
    )
    stood = [answer for answer in answers if isinstance(answer, Appended)]
    assert sorted(one.duplicate for one in stood) == [False, True]
    assert sum(isinstance(answer, Conflict) for answer in answers) == 38
    found = await now(store)
    assert found.turn == 2
    assert [one.event for one in await store.thread("o", "t")][2:] == [racing[int(found.query)]]


async def test_what_is_stated_is_replaced_only_by_who_saw_the_last_of_it(store: Store) -> None:
    await store.submit(submission())

    async def state(version: int, who: int) -> Appended:
        return await store.append("o", "t", events.Restated(stated={"by": who}, version=version))

    for wrong in (0, 2):
        with pytest.raises(Conflict, match="has changed meanwhile"):
            await state(wrong, 0)
    for version in (1, 2, 3):
        answers = await asyncio.gather(*(state(version, who) for who in range(10)), return_exceptions=True)
        assert sum(isinstance(answer, Appended) for answer in answers) == 1
        assert sum(isinstance(answer, Conflict) for answer in answers) == 9
        assert (await now(store)).stated_version == version
    before = (await now(store)).stated
    await store.append("o", "t", events.Restated(internal_status="deep"))  # states nothing of that
    assert (await now(store)).stated == before
    await store.append("o", "t", events.Completed(result="a"))
    await store.append("o", "t", events.Continued(query="more", submission="r2"))
    assert ((await now(store)).stated, (await now(store)).stated_version) == ({}, 0)
    await state(1, 7)
    assert (await now(store)).stated == {"by": 7}
    assert [d async for d in store.snapshots.verify()] == []


async def test_writers_that_read_and_state_in_a_loop_lose_nothing(store: Store) -> None:
    await store.submit(submission())

    async def add(who: int) -> None:
        while True:
            found = await now(store)
            stated = found.stated | {str(who): 1}
            try:
                await store.append("o", "t", events.Restated(stated=stated, version=found.stated_version + 1))
            except Conflict:
                continue
            return

    await asyncio.gather(*(add(who) for who in range(10)))
    assert (await now(store)).stated == {str(who): 1 for who in range(10)}
    assert (await now(store)).stated_version == 10


async def test_usage_that_an_owner_states_counts_once_when_it_ends_the_task(store: Store) -> None:
    await started(store, session="s")
    usage = events.Usage(model="m", provider="p", input_tokens=3, output_tokens=4, cost_nano=5)
    end = events.Restated(to="completed", result="a", stated={"events": 1}, version=1, usage=usage)
    half = events.Restated(to="running", result="half", usage=usage)
    await store.append("o", "t", half)
    assert (await now(store)).total_tokens == 0
    await store.append("o", "t", end)
    with pytest.raises(Conflict):  # a repeat, by version
        await store.append("o", "t", end)
    await store.append("o", "t", events.Restated(to="completed", usage=usage))
    await store.append("o", "t", events.Restated(to="completed", stated={"events": 2}, version=2))
    found = await now(store)
    assert (found.status, found.result, found.stated) == (Status.COMPLETED, "a", {"events": 2})
    assert (found.input_tokens, found.output_tokens, found.cost_nano, found.model) == (3, 4, 5, "m")
    session = await store.snapshots.session("o", "u", "s")
    assert session is not None
    assert (session.input_tokens, session.output_tokens, session.cost_nano) == (3, 4, 5)
    assert [d async for d in store.snapshots.verify()] == []


# The conversation's bound

CALL = events.ToolCalled(tool="t", params={"q": "x" * 200_000})


async def test_a_conversation_of_very_many_messages_is_full(store: Store) -> None:
    fence = await started(store)
    small = events.ToolCalled(tool="t")
    for i in range(0, THREAD_MESSAGES_MAX, 200):
        answers = await extend(store, "t", [small] * 200, fence=fence, n=i + 1)
    assert told(answers[:-1]) == ["ok"] * 199
    assert isinstance(answers[-1], TooLarge)  # the question is the first of them
    assert len(await store.thread("o", "t")) == THREAD_MESSAGES_MAX


async def test_a_full_conversation_refuses_calls_and_questions_but_no_result(store: Store) -> None:
    fence = await started(store)
    n = 0
    while True:
        outcome = (await extend(store, "t", [CALL], fence=fence, n=n + 1))[0]
        if isinstance(outcome, TaskcastError):
            break
        n += 1
    assert isinstance(outcome, TooLarge)
    limits = f"{THREAD_BYTES_MAX} bytes, or {THREAD_MESSAGES_MAX} messages"
    assert str(outcome) == f"The task's conversation would exceed {limits}."
    full = (await now(store)).thread_size
    assert full <= THREAD_BYTES_MAX < full + len(events.encode(CALL))
    before = await store.snapshots.snapshot("o", "t")
    with pytest.raises(TooLarge, match="conversation"):
        await store.append("o", "t", events.ToolReturned(tool="t", output="x" * 200_000), fence=fence, n=n + 1)
    assert await store.snapshots.snapshot("o", "t") == before
    # The refused number was not used up, and all else goes on.
    result = "r" * events.RESULT_BYTES_MAX
    batch: list[AnyEvent] = [TextDelta(text="a"), events.Noted(name="X"), events.Completed(result=result)]
    assert told(await extend(store, "t", batch, fence=fence, n=n + 1)) == ["ok"] * 3
    found = await now(store)
    assert found.result == result
    assert found.thread_size > THREAD_BYTES_MAX
    for event in (events.Continued(query="more", submission="r2"), events.Restated(to="held")):
        with pytest.raises(TooLarge, match="conversation"):
            await store.append("o", "t", event)
    assert (await now(store)).turn == 1
    thread = await store.thread("o", "t")
    assert len(thread) == n + 2
    assert thread[-1].event == events.Completed(result=result)
    assert [d async for d in store.snapshots.verify()] == []
    await store.delete("o", "t")
    assert await store.thread("o", "t") == []


async def test_a_full_conversation_refuses_no_result_that_an_owner_states(store: Store) -> None:
    fence = await started(store)
    for first in range(1, 42):
        await extend(store, "t", [CALL], fence=fence, n=first)
    with pytest.raises(TooLarge):
        await store.append("o", "t", CALL, fence=fence, n=42)
    await store.append("o", "t", events.Restated(to="completed", result="r" * events.RESULT_BYTES_MAX))
    assert (await now(store)).thread_size > THREAD_BYTES_MAX


def test_the_script_knows_the_bound_of_a_conversation() -> None:
    lua = (files("app") / "lua" / "commit.lua").read_text()
    assert f"local THREAD_BYTES = {THREAD_BYTES_MAX}\nlocal THREAD_MESSAGES = {THREAD_MESSAGES_MAX}\n" in lua


async def test_a_wrong_type_under_a_conversation_stops_the_step_before_its_first_write(store: Store) -> None:
    await ended(store)
    (tag,) = store.partitions.tags
    name = keys.key(tag, "thread", "o", "t")
    await store.door.call("DEL", name)
    await store.door.call("SET", name, "x")
    before = await store.log.end(tag)
    with pytest.raises(Exception, match="WRONGTYPE"):
        await store.append("o", "t", events.Continued(query="more", submission="r2"))
    assert await store.log.end(tag) == before


# Steps of many tasks that share a call


async def evaluations(store: Store) -> int:
    return int((await store.door.read("INFO", "commandstats"))["cmdstat_evalsha"]["calls"])


async def test_steps_asked_for_at_once_share_calls_and_each_task_has_its_own_answer(store: Store) -> None:
    fences = [await started(store, f"t{i}") for i in range(40)]
    await store.submit(submission("waits"))
    before = await evaluations(store)
    async with asyncio.TaskGroup() as group:
        told = [
            group.create_task(store.append("o", f"t{i}", events.Completed(result=f"r{i}"), fence=fence, n=1))
            for i, fence in enumerate(fences)
        ]
        new = [group.create_task(store.submit(submission(f"n{i}"))) for i in range(40)]
    assert await evaluations(store) - before <= 4
    assert [(one.result().seq, one.result().status) for one in told] == [(3, Status.COMPLETED)] * 40
    assert [one.result().seq for one in new] == [1] * 40
    assert len({one.result().id for one in (*told, *new)}) == 80
    results = [task.result for i in range(40) if (task := await store.get("o", f"t{i}"))]
    assert results == [f"r{i}" for i in range(40)]
    assert [d async for d in store.snapshots.verify()] == []


async def test_a_refused_or_damaged_task_stops_none_of_those_that_share_its_call(store: Store) -> None:
    fences = {name: await started(store, name) for name in ("good", "stale", "damaged", "last")}
    (tag,) = store.partitions.tags
    damaged = keys.key(tag, "events", "o", "damaged")
    await store.door.call("DEL", damaged)
    await store.door.call("SET", damaged, "x")
    fences["stale"] += 7
    outcomes = await asyncio.gather(
        *(
            store.append("o", name, events.Completed(result="r"), fence=fences.get(name, 1), n=1)
            for name in ("good", "stale", "damaged", "nowhere", "last")
        ),
        return_exceptions=True,
    )
    good, stale, broken, nowhere, last = outcomes
    assert isinstance(good, Appended)
    assert isinstance(last, Appended)
    assert isinstance(stale, Stale)
    assert isinstance(nowhere, NotFound)
    assert isinstance(broken, Exception)
    assert "WRONGTYPE" in str(broken)
    task = await store.get("o", "damaged")
    assert task is not None
    assert (task.status, task.last_seq) == (Status.RUNNING, 2)


async def test_what_a_call_has_done_to_a_task_counts_for_its_next_step_in_that_call(store: Store) -> None:
    """The end of an attempt, and what the same worker says after it: the second is too late."""
    fence = await started(store)
    ended, late = await asyncio.gather(
        store.append("o", "t", events.Completed(result="r"), fence=fence, n=1),
        store.append("o", "t", events.Noted(name="NOTE", actor="w"), fence=fence, n=2),
        return_exceptions=True,
    )
    assert isinstance(ended, Appended)
    assert isinstance(late, Stale)
    first, second = await asyncio.gather(
        store.submit(submission("u")),
        store.append("o", "u", events.Cancelled()),
        return_exceptions=True,
    )
    assert isinstance(first, Appended)
    assert isinstance(second, Appended)
    assert [d async for d in store.snapshots.verify()] == []


async def test_whoever_has_an_answer_goes_on_before_the_others_of_its_trip_have_theirs(store: Store) -> None:
    door = store.door
    quick = [asyncio.create_task(door.call("PING")) for _ in range(2)]
    slow = asyncio.create_task(door.call("BLPOP", "{p0}:test", 9))
    assert await asyncio.gather(*quick) == [True, True]
    late = asyncio.create_task(door.call("PING"))  # leaves with the next trip
    done, _ = await asyncio.wait([slow, late], timeout=0.01)
    assert not done
    await door.read("RPUSH", "{p0}:test", "x")
    assert await slow == (b"{p0}:test", b"x")
    assert await late


async def test_a_trip_that_fails_in_its_middle_fails_those_alone_that_have_no_answer(store: Store) -> None:
    door = store.door
    quick = asyncio.create_task(door.call("PING"))
    slow = asyncio.create_task(door.call("BLPOP", "{p0}:test", 9))
    last = asyncio.create_task(door.call("PING"))
    assert await quick
    told = await door.read("CLIENT", "LIST")
    clients = [dict(word.split("=", 1) for word in line.split()) for line in told.decode().splitlines()]
    (blocked,) = [client for client in clients if client["cmd"] == "blpop"]
    await door.read("CLIENT", "KILL", "ID", blocked["id"])
    for one in (slow, last):
        with pytest.raises(Unavailable):
            await one
    assert await door.call("PING")
