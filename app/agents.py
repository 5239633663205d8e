"""Agents: what is known of who does a task, and what its tasks are done with unless their requests say otherwise.

A record belongs to no task, so it lives in the partition of its own name. A task needs none: it keeps the provider, model
and effort that were in force when it was accepted (`Submission.llm_*`), and no later change here moves it.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from msgspec import Struct
from msgspec.structs import replace

from app import events, keys
from app.connect import Door
from app.errors import Invalid, NotFound
from app.events import Continued, Submission
from app.line import Arg
from app.log import Partitions

AGENTS_MAX = 10_000
"""Records of one organisation that are made on first use, in even shares of the partitions: callers choose the names.
Whoever saves one makes it beyond that, too."""
CHARACTERS_MAX = 256
"""Of each text but the id; as of what a task keeps of them."""
Effort = Literal["", "low", "medium", "high", "xhigh"]
EFFORTS = get_args(Effort)
DEFAULT = "default"
"""Whose tasks are those that name no agent; they wait in the queue of the same name."""

Asked = TypeVar("Asked", Submission, Continued)


class Agent(Struct, frozen=True, kw_only=True):
    id: str
    org: str
    name: str
    provider: str = ""
    model: str = ""
    effort: Effort = ""
    """Of these three: empty says nothing, and the worker chooses."""
    queue: str
    """Where its tasks wait."""
    version: int = 0
    """One more with each change; 0: there is no record."""
    created_at: int = 0
    updated_at: int = 0
    """µs since 1970."""


class Agents:
    def __init__(self, door: Door, partitions: Partitions) -> None:
        self._door, self._partitions = door, partitions
        self._share = max(1, AGENTS_MAX // len(partitions.tags))

    async def get(self, org: str, id_: str) -> Agent | None:
        if not (events.NAME.fullmatch(org) and events.ID.fullmatch(id_)):
            return None
        record, _ = self._places(org, id_)
        raw = await self._door.call("HGETALL", record, repeat=True)
        return _agent(org, id_, raw) if raw else None

    async def used(self, org: str, id_: str) -> Agent:
        """The agent; made now, when nobody has spoken of it before. Where there is no room for another record it is
        answered without one. Raises Invalid for what is no id.
        """
        return await self.get(org, id_) or await self._write(org, id_, self._share, {})

    async def save(
        self,
        org: str,
        id_: str,
        *,
        name: str | None = None,
        provider: str | None = None,
        model: str | None = None,
        effort: str | None = None,
        queue: str | None = None,
    ) -> Agent:
        """Changes what is given, or makes the agent with it. None: unchanged; empty: as of a new one. What says the same
        as before is no change. Raises Invalid.
        """
        given = {"name": name, "provider": provider, "model": model, "effort": effort, "queue": queue}
        fields = {what: value for what, value in given.items() if value is not None}
        for what, value in fields.items():
            if len(value) > CHARACTERS_MAX or not value.isprintable():
                raise Invalid(f"An agent's {what} has at most {CHARACTERS_MAX} printable characters.")
        if effort and effort not in EFFORTS:
            raise Invalid(f"An agent's effort is one of {', '.join(EFFORTS[1:])}.")
        if "," in (queue or ""):  # lists of queues are written with commas
            raise Invalid("An agent's queue has no comma in its name.")
        return await self._write(org, id_, 0, fields)

    async def _write(self, org: str, id_: str, most: int, fields: Mapping[str, str]) -> Agent:
        if not events.NAME.fullmatch(org):  # an organisation a:b with an agent c were that of a, with an agent b:c
            raise Invalid("An organisation has 1 to 64 of the characters A-Z a-z 0-9 _ . -")
        if not events.ID.fullmatch(id_):
            raise Invalid("An agent's id has 1 to 128 of the characters A-Z a-z 0-9 : _ . -")
        args: list[Arg] = [id_, most, *(word for pair in fields.items() for word in pair)]
        return _agent(org, id_, await self._door.run("agent", self._places(org, id_), args, repeat=True))

    async def delete(self, org: str, id_: str) -> None:
        """The record only: the agent's tasks stay, and its next use makes a new one. Raises NotFound."""
        if await self.get(org, id_) is None or not await self._door.run("delete-agent", self._places(org, id_), [id_]):
            raise NotFound("Agent not found")

    def _places(self, org: str, id_: str) -> tuple[str, str]:
        tag = self._partitions.home(org, "agent", id_)
        return keys.key(tag, "agent", org, id_), keys.key(tag, "agents", org)

    # Last, for its name hides the built-in type from annotations.

    async def list(self, org: str, *, offset: int = 0, limit: int = 20) -> tuple[list[Agent], int]:
        """A page, oldest first, ties by id; and how many there are."""
        names = [keys.key(tag, "agents", org) for tag in self._partitions.tags]
        # Each partition answers with all that may stand on the page.
        sets = [self._door.read("ZRANGE", name, 0, offset + limit - 1, "WITHSCORES") for name in names if limit]
        counts = [self._door.read("ZCARD", name) for name in names]
        found = await asyncio.gather(*sets, *counts)
        pairs = [pair for flat in found[: len(sets)] for pair in zip(flat[1::2], flat[::2], strict=True)]
        merged = sorted((int(score), member.decode()) for score, member in pairs)
        page = await asyncio.gather(*(self.get(org, id_) for _, id_ in merged[offset : offset + limit]))
        # One may have been deleted since.
        return [agent for agent in page if agent], sum(found[len(sets) :])


def effective(asked: Asked, agent: Agent) -> Asked:
    """With the agent's provider, model and effort where the request says none."""
    return replace(
        asked,
        llm_provider=asked.llm_provider or agent.provider,
        llm_model=asked.llm_model or agent.model,
        llm_effort=asked.llm_effort or agent.effort,
    )


def queue_of(id_: str) -> str:
    """Where an agent's tasks wait when its record says nothing, or it has none."""
    return id_ if id_ == DEFAULT else f"agent:{id_}"


def _agent(org: str, id_: str, raw: Any) -> Agent:
    pairs = raw.items() if isinstance(raw, Mapping) else zip(raw[::2], raw[1::2], strict=True)
    fields: dict[str, Any] = {name.decode(): value.decode() for name, value in pairs}
    fields |= {"name": fields.get("name") or id_, "queue": fields.get("queue") or queue_of(id_)}
    numbers = {name: int(fields.get(name, "0")) for name in ("version", "created_at", "updated_at")}
    return Agent(**{**fields, **numbers, "id": id_, "org": org})
