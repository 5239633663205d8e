"""The one door to the store for everybody above: submit append extend delete, get list thread events follow, claim
renew watch.

Nobody above this file says Redis; nobody below it says HTTP.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress

import msgspec

from app import keys
from app.agents import Agents
from app.connect import Door
from app.embedded import Embedded
from app.errors import TaskcastError, TooLarge, Unavailable
from app.events import AnyEvent, Json
from app.hub import Hub, Pull
from app.log import Appended, Log, Partitions, Said, open_partitions
from app.queues import Queues
from app.registrations import Registrations
from app.settings import Settings
from app.snapshots import Snapshots
from app.task import FOLLOWED, Task

SECRETS_BYTES_MAX = 64 * 1024
SECRETS_SECONDS = 24 * 3600


class Store:
    """Its parts, each of which owns one noun; made by `open_store` only."""

    def __init__(self, door: Door, partitions: Partitions, settings: Settings) -> None:
        self.door = door
        self.partitions = partitions
        self.settings = settings
        self.log = Log(door, partitions, settings)
        self.snapshots = Snapshots(door, partitions, settings)
        self.agents = Agents(door, partitions)
        self.registrations = Registrations(door, partitions)
        self.queues = Queues(door, partitions, settings, self.log)
        self.hub = Hub(door, partitions, self.log, self.snapshots)
        self.submit = self.log.submit
        self.events = self.log.read
        self.get, self.list, self.thread = self.snapshots.get, self.snapshots.list, self.snapshots.thread
        self.claim, self.renew = self.queues.claim, self.queues.renew
        self.watch = self.hub.watch

    async def append(
        self,
        org: str,
        task: str,
        event: AnyEvent,
        *,
        fence: int | None = None,
        n: int | None = None,
        operation: str = "",
        status: str = "",
    ) -> Appended:
        """`Log.append`. What the event asks for in other tasks is done at once, as far as these can be reached; the
        ticker does the rest.
        """
        appended = await self.log.append(org, task, event, fence=fence, n=n, operation=operation, status=status)
        if isinstance(event, FOLLOWED):
            await self._follow_up(org, task)
        return appended

    async def extend(
        self, org: str, task: str, batch: Sequence[Said], *, fence: int, n: int
    ) -> list[Appended | TaskcastError]:
        """`Log.extend`, with what the events ask for as in `append`."""
        answers = await self.log.extend(org, task, batch, fence=fence, n=n)
        if any(isinstance(one.event, FOLLOWED) for one in batch[: len(answers)]):
            await self._follow_up(org, task)
        return answers

    async def delete(self, org: str, task: str, *, actor: str = "", children: bool = False) -> Appended:
        """`Log.delete`; `children`: with all its sub-tasks, as far as they can be reached at once."""
        deleted = await self.log.delete(org, task, actor=actor, children=children)
        if children:
            await self._follow_up(org, task)
        return deleted

    async def hide(self, org: str, task: str, submission: str, secrets: Json) -> None:
        """Keeps what a turn's worker needs and nobody else may read: in no event, snapshot or list, and for a day only.
        Said before the turn, so that no worker gets it without; nothing: forgets what was hidden. Raises TooLarge.
        """
        if not secrets:
            await self.door.call("DEL", self._secrets(org, task, submission), repeat=True)
            return
        raw = msgspec.json.encode(secrets)
        if len(raw) > SECRETS_BYTES_MAX:
            raise TooLarge(f"The secrets have {len(raw)} bytes; at most {SECRETS_BYTES_MAX} are allowed.")
        await self.door.call("SET", self._secrets(org, task, submission), raw, "EX", SECRETS_SECONDS, repeat=True)

    async def hidden(self, task: Task) -> Json:
        """What was hidden for its present turn."""
        raw = await self.door.read("GET", self._secrets(task.org, task.id, task.submission))
        return msgspec.json.decode(raw, type=Json) if raw else {}

    def _secrets(self, org: str, task: str, submission: str) -> str:
        return keys.key(self.partitions.tag(org, task), "secrets", org, task, submission)

    async def _follow_up(self, org: str, task: str) -> None:
        with suppress(Unavailable):
            await self.queues.follow_up(org, task)

    def follow(
        self, org: str, task: str, after: str, *, snapshot: bool = False, strict: bool = False
    ) -> AbstractAsyncContextManager[Pull]:
        """A task's items after a cursor, page by page (`hub.Hub.one`). Raises NotFound, Gone, Unavailable."""
        return self.hub.follow(self.hub.one(org, task, after, snapshot=snapshot, strict=strict))

    async def ping(self) -> None:
        """Raises Unavailable."""
        await self.door.call("PING")

    @property
    def embedded(self) -> bool:
        return not self.settings.redis_url


@asynccontextmanager
async def open_store(settings: Settings) -> AsyncIterator[Store]:
    """The store that the settings name: a URL, or the embedded server of the data folder.

    Raises Misconfigured, Unavailable.
    """
    async with AsyncExitStack() as stack:
        url = settings.redis_url
        if not url:
            url = (await stack.enter_async_context(Embedded(settings.data, fsync=settings.fsync))).url
        door = Door(url)
        stack.push_async_callback(door.aclose)
        store = Store(door, await open_partitions(door, settings.partitions), settings)
        stack.push_async_callback(store.hub.aclose)
        yield store
