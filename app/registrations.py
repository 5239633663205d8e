"""Registrations: workers that wait on a stream for their tasks, and what they said of themselves last.

The process that has a worker's stream reads here what the worker told any other process. A registration is its stream's:
it is never renewed, and a worker that comes back is another one. Nothing here says what a worker does; its tasks' leases
do.
"""

from uuid import uuid4

from msgspec import Struct

from app import keys
from app.connect import Door
from app.line import Arg
from app.log import Partitions

KEPT_SECONDS = 60
"""After the last word. Longer than any silence for which a worker is given up, so that a store that was away for some
seconds still knows all of them."""


class Registration(Struct, frozen=True, kw_only=True):
    id: str
    org: str
    agent: str
    heartbeat_at: int
    """µs since 1970."""
    freed: int | None = None
    """How often it has said that a task is out of its hands; None: it says nothing of that."""


class Registrations:
    def __init__(self, door: Door, partitions: Partitions) -> None:
        self._door, self._partitions = door, partitions

    async def add(self, org: str, agent: str) -> Registration:
        id_ = str(uuid4())
        at = await self._say(org, id_, "", ["agent", agent])
        return Registration(id=id_, org=org, agent=agent, heartbeat_at=at)

    async def heard(self, org: str, id_: str, *, freed: int | None = None) -> bool:
        """The worker lives; `freed`: and so many more tasks are out of its hands. False: nobody knows it."""
        return bool(await self._say(org, id_, "" if freed is None else freed, []))

    async def _say(self, org: str, id_: str, freed: int | str, fields: list[Arg]) -> int:
        # Counted twice, a slot would be given away that is not free.
        repeat = not freed
        at = await self._door.run("heartbeat", [self._place(org, id_)], [KEPT_SECONDS, freed, *fields], repeat=repeat)
        return int(at)

    async def get(self, org: str, id_: str) -> Registration | None:
        raw = await self._door.call("HMGET", self._place(org, id_), "agent", "heartbeat_at", "freed", repeat=True)
        agent, at, freed = raw
        if agent is None:
            return None
        told = None if freed is None else int(freed)
        return Registration(id=id_, org=org, agent=agent.decode(), heartbeat_at=int(at), freed=told)

    async def remove(self, org: str, id_: str) -> None:
        await self._door.call("DEL", self._place(org, id_))

    def _place(self, org: str, id_: str) -> str:
        return keys.key(self._partitions.home(org, "worker", id_), "worker", org, id_)
