"""Approvals over HTTP (contract §1.10): which tasks wait for a human, and the human's decision.

Upstream has no list, and its event does not say the approval's id, so that its own clients cannot learn what to decide;
here both do. Who may steer a task decides about it; to all others it is unknown.

A decision is said once. Repeated, it is answered as the first time; a different one comes too late.
"""

from typing import Any

import msgspec
import structlog
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app import events
from app.api.shannon.history import open_history
from app.api.shannon.spelling import waiting_item
from app.api.shannon.tasks import idempotency_key, may_steer, number, operation_of, said_before
from app.errors import Conflict, Invalid, NotFound
from app.events import Json
from app.identity import caller
from app.log import canonical_hash
from app.requests import actor, json_of, read_body, reply, store_of
from app.snapshots import LISTED
from app.store import Store

logger = structlog.get_logger()

DECISION_BYTES_MAX = 64 * 1024
APPROVAL_CHARACTERS_MAX = 256
"""Of an approval's id (`events.Short`): a longer one cannot have been asked for."""
UNKNOWN = "Workflow or approval not found"


class Decision(Struct):
    """`null` is as good as absent, as in Go: then `approved` is false."""

    workflow_id: str | None = None
    approval_id: str | None = None
    run_id: str | None = None
    approved: bool | None = None
    feedback: str | None = None
    modified_action: Any = None
    """Upstream's is a text; whatever JSON it is reaches the worker in the payload."""
    approved_by: str | None = None


async def decide(request: Request) -> Response:
    """200, and no other 2xx: the SDK takes all else for an error."""
    who, store, key = caller(request), store_of(request), idempotency_key(request)
    raw = json_of(await read_body(request, DECISION_BYTES_MAX))
    asked = _decision(raw)
    id_, approval, approved = asked.workflow_id or "", asked.approval_id or "", bool(asked.approved)
    task = await store.get(who.org, id_) if events.ID.fullmatch(id_) else None
    if task is None or not may_steer(who, task):
        raise NotFound(UNKNOWN)
    payload: Json = {"modified_action": asked.modified_action} if asked.modified_action else {}
    if asked.approved_by and asked.approved_by != who.user:
        payload["approved_by"] = asked.approved_by  # what the key's user says; `actor` is who it was
    event = events.ApprovalDecided(
        actor=actor(who), approval=approval, approved=approved, feedback=asked.feedback or "", payload=payload
    )
    operation = operation_of(store, who, "decide", key, canonical_hash(raw))
    headers: dict[str, str] = {}
    try:
        appended = await store.append(who.org, id_, event, operation=operation)
        headers = said_before(key) if key and appended.duplicate else {}
        logger.info("approval.decided", task_id=id_, org=who.org, approval=approval, approved=approved)
    except Conflict as error:
        await _decided(store, who.org, id_, approval, error, approved=approved)
    body = {
        "status": "sent",
        "success": True,
        "message": f"Approval {approval} processed successfully",
        "workflow_id": id_,
        "run_id": asked.run_id or "",
        "approval_id": approval,
    }
    return reply(body, 200, headers)


def _decision(raw: Any) -> Decision:
    """Raises Invalid."""
    try:
        asked = msgspec.convert(raw, Decision)
    except msgspec.ValidationError as error:
        raise Invalid(f"Invalid request body: {error}") from error
    if not asked.workflow_id or not asked.approval_id:
        raise Invalid("workflow_id and approval_id are required")
    if len(asked.approval_id) > APPROVAL_CHARACTERS_MAX:
        raise NotFound(UNKNOWN)
    return asked


async def _decided(store: Store, org: str, task: str, approval: str, error: Conflict, *, approved: bool) -> None:
    """Returns when this decision was the one that was taken. Raises Conflict, or NotFound: nobody ever asked for it."""
    said: events.AnyEvent | None = None
    async for entry in (await open_history(store, org, task)).entries:
        match entry.event:
            case events.ApprovalRequested() | events.ApprovalDecided() if entry.event.approval == approval:
                said = entry.event
            case _:
                pass
    match said:
        case None:
            raise NotFound(UNKNOWN)
        case events.ApprovalDecided():
            if said.approved != approved:
                word = "approved" if said.approved else "denied"
                raise Conflict(f"Approval {approval} was already {word}", error.status)
        case _:
            raise Conflict(f"Approval {approval} is no longer pending", error.status)


async def waiting(request: Request) -> Response:
    """Ours: what the caller's tasks, and nobody's, wait for, in the order of the task list."""
    who = caller(request)
    limit = number(request, "limit", 20, least=1, most=100)
    offset = number(request, "offset", 0)
    sources = [("waiting", "owner", owner) for owner in dict.fromkeys(("", who.user))]
    found = await store_of(request).list(who.org, sources, offset=offset, limit=limit, fields=(*LISTED, "request"))
    headers = {"X-Total-Capped": "true"} if found.capped else {}
    items = [waiting_item(task) for task in found.tasks]
    return reply({"approvals": items, "total_count": found.total}, 200, headers)


routes = [
    Route("/api/v1/approvals", waiting, methods=["GET"]),
    Route("/api/v1/approvals/decision", decide, methods=["POST"]),
]
