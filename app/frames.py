"""Frames: what a dialect says of an item, as the bytes of Server-Sent Events; for all who want the same."""

import json
import random
from collections.abc import Callable, Sequence
from functools import lru_cache

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from app import metrics
from app.events import Entry, Json
from app.log import Logged
from app.seam import Began, Ended, Gap, Item, Placed, Reached

PING = b": ping\n"
RETRY_MS = (2000, 5000)
"""Jitter, so that the readers of a stopping server do not come back all at once."""


class Frame(Struct, frozen=True, gc=False):
    """One SSE event, as a dialect spells it."""

    event: str
    """Empty: the frame has no such line."""
    data: Json | Struct | str
    """An object, or a text that is written as it is (`[DONE]`)."""
    id: str = ""
    type: str = ""
    """The dialect's own name for it, where it has one beside the event's."""

    @property
    def types(self) -> frozenset[str]:
        """All names by which a `types` filter may ask for it."""
        return frozenset({self.event, self.type} - {""})


_json = msgspec.json.Encoder().encode


FRAME = b"id: %b\nevent: %b\ndata: %b\n\n"
"""One with an id, as `encode` makes it."""


def encode(frame: Frame) -> bytes:
    """ASCII: httpx splits lines on U+0085 and U+2028 too, and would tear a frame there (tried)."""
    data = frame.data
    text = data.encode() if isinstance(data, str) else _json(data)
    if not (text.isascii() or isinstance(data, str)):  # ten times slower
        text = json.dumps(json.loads(text), separators=(",", ":")).encode()
    id_ = f"id: {frame.id}\n" if frame.id else ""
    event = f"event: {frame.event}\n" if frame.event else ""
    return f"{id_}{event}data: ".encode() + text + b"\n\n"


Spliced = tuple[str, str, bytes]
"""A frame's event, its type, and all of it as bytes."""


class Spelling:
    """What readers who want the same get, as bytes. One for each dialect, filter and framing (`spelling`)."""

    def __init__(
        self,
        frames: Callable[[Entry], list[Frame]],
        control: Callable[[Gap | Began | Reached | Ended], Frame | None],
        types: frozenset[str],
        chunk: Callable[[bytes], bytes],
        live: Callable[[Logged], Spliced | None] = lambda _: None,
    ) -> None:
        """`control`'s frames pass every filter; `types` empty: so does all else. `chunk` frames a piece of a body.

        `frames` gets entries with the state after them if their reader folds. `live` says the same as `frames`, of an
        entry that nobody has parsed yet; None: it needs to be.
        """
        self._frames, self._control, self._types, self._live = frames, control, types, live
        self.chunk = chunk

    def live(self, one: Logged) -> tuple[bytes, int]:
        """Of an entry whose cursor is its id, chunked, and how many frames that is; empty: the filter leaves nothing."""
        if spliced := self._live(one):
            event, type_, data = spliced
            frames = 1 if not self._types or event in self._types or type_ in self._types else 0
        else:
            said = self._told(one.entry)
            frames, data = len(said), b"".join(map(encode, said))
        return (self.chunk(data) if frames else b""), frames

    def body(self, items: Sequence[Item]) -> bytes:
        """Not chunked."""
        return b"".join(encode(frame) for item in items for frame in self._told(item))

    def _told(self, item: Item) -> list[Frame]:
        if not isinstance(item, Entry | Placed):
            if isinstance(item, Gap):
                metrics.GAPS.labels(item.reason).inc()
            told = self._control(item)
            return [told] if told else []
        frames = self._frames(item if isinstance(item, Entry) else item.entry)
        if isinstance(item, Placed):
            frames = [replace(frame, id=item.cursor) if frame.id else frame for frame in frames]
        return [frame for frame in frames if not self._types or self._types & frame.types]


spelling = lru_cache(maxsize=256)(Spelling)
"""The same one for the same wishes, so that its bytes are shared."""


def frames_in(body: bytes) -> int:
    """Each ends with the only blank line in it."""
    return body.count(b"\n\n")


def whole(data: bytes) -> bytes:
    """As it is: the server frames what it is sent."""
    return data


def retry() -> bytes:
    """Without a blank line, as PING."""
    return b"retry: %d\n" % random.randint(*RETRY_MS)
