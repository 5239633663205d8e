"""Server-Sent Events: one frame → bytes."""

from msgspec import Struct

from app.events import Json


class Frame(Struct, frozen=True):
    """One SSE event, as a dialect spells it."""

    event: str
    data: Json | str
    """An object, or a text that is written as it is (`[DONE]`)."""
    id: str = ""
    types: frozenset[str] = frozenset()
    """All names by which a `types` filter may ask for it."""
