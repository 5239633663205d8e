"""A task's history over HTTP: what a client's cursor means, how long it may wait, and its pages, read one by one."""

import re
from collections.abc import AsyncIterator

from starlette.requests import Request

from app.api.shannon.streams import of_task, parse_cursor
from app.errors import Gone, Invalid, NotFound
from app.events import Entry, Json
from app.log import PAGE_ENTRIES, Page
from app.seam import order
from app.store import Store
from app.task import TERMINAL

WAIT_SECONDS_MAX = 60.0
"""The usual proxies give up on a silent answer after as long: who sits behind one asks for less."""
_SECONDS = re.compile(r"[0-9]{1,18}(?:\.[0-9]{1,18})?(?:[eE][+-]?[0-9]{1,2})?")


# What a request asks for


def cursor(text: str, store: Store, org: str, task: str) -> str:
    """A client's cursor, from whatever stream, in the store's words. Raises Invalid."""
    found = parse_cursor(text)
    if found is None:
        raise Invalid("Invalid after parameter")
    return of_task(found, store, org, task).after


def wait_seconds(request: Request) -> float | None:
    """None: it says nothing of waiting. Raises Invalid."""
    text = request.query_params.get("wait", "")
    if not text:
        return None
    if not _SECONDS.fullmatch(text) or float(text) > WAIT_SECONDS_MAX:
        raise Invalid("Invalid wait parameter")
    return float(text)


# Reading


class History:
    """A task's retained events after a cursor, read page by page: what is held at a time is bounded, and the whole by
    the stream's own bound (10,000 events, 16 MiB).
    """

    def __init__(self, store: Store, org: str, task: str, after: str, first: Page, limit: int) -> None:
        self._store, self._org, self._task, self._after, self._limit = store, org, task, after, limit
        self._page = first
        """The latest: its bounds say where the history ends."""
        self.gap: Json | None = None
        """What the cursor asked for and cannot get; the entries begin behind it."""
        if first.gap:
            self.gap = {
                "reason": first.gap,
                "earliest_seq": first.base_seq + 1,
                "latest_seq": first.last_seq,
                "last_event_id": first.last_id,
            }

    @property
    def entries(self) -> AsyncIterator[Entry]:
        return self._entries()

    async def _entries(self) -> AsyncIterator[Entry]:
        page: Page | None = self._page
        seq = 0
        while page:
            self._page = page
            if page.gap == "trimmed":
                # Of a task so busy that its stream is cut while we read it, the numbers show the hole.
                page = await self._read(f"seq:{max(page.base_seq, seq)}")
                continue
            for entry in page.entries:
                yield entry
            if not page.entries or page.entries[-1].seq >= page.last_seq:
                return
            seq = page.entries[-1].seq
            page = await self._read(page.entries[-1].id)

    async def _read(self, after: str) -> Page | None:
        return await self._store.events(self._org, self._task, after, limit=self._limit)

    @property
    def end(self) -> str:
        """The cursor of a reader for whom there was no entry: its own, which may be another task's later place, or the
        last entry's, behind which a gap and a number go on.
        """
        return self._page.last_id if self.gap else max(self._after, self._page.last_id, key=order)

    def over(self, place: str) -> bool:
        """Nothing follows that cursor: the last entry is terminal, and not behind it."""
        return self._page.status in TERMINAL and order(place) >= order(self._page.last_id)


async def open_history(
    store: Store, org: str, task: str, after: str = "", *, page: int = PAGE_ENTRIES, strict: bool = False
) -> History:
    """`strict`: a gap is an error, Gone. Raises NotFound, Gone."""
    first = await store.events(org, task, after, limit=page, check=bool(after))
    if first is None:
        raise NotFound("Task not found")
    if first.gap and strict:
        raise Gone(first.gap, first.base_seq + 1, first.last_seq)
    return History(store, org, task, after, first, page)
