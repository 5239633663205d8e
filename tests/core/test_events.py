"""Events: what is written is what is read, and what is wrong is refused before it is written."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import events
from app.errors import Invalid, TooLarge

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT, TEXT, st.dictionaries(TEXT, st.integers(-(2**53), 2**53) | TEXT | st.none()))
def test_what_is_encoded_decodes_to_itself(message: str, agent: str, payload: dict[str, object]) -> None:
    for event in (
        events.TextDelta(text=message, agent=agent),
        events.Noted(name="X", message=message, payload=payload),
        events.Completed(result=message, usage=events.Usage(input_tokens=2)),
    ):
        assert events.decode(events.encode(event)) == event


def test_each_event_type_has_its_own_tag() -> None:
    kinds = [kind for union in (events.Lifecycle, events.Activity) for kind in union.__args__]
    tags = [events.tag(kind) for kind in kinds]
    assert len(set(tags)) == len(tags) == 31


@pytest.mark.parametrize(
    "event",
    [
        events.Thinking(payload={"a": json.loads("[" * 120 + "]" * 120)}),
        events.Progressed(fraction=1.5),
        events.Progressed(fraction=math.nan),
        events.Noted(name="STREAM_END"),
        events.Noted(name="lower"),
        events.Noted(name="X" * 65),
        events.TextDelta(text="\ud800"),
        events.ApprovalRequested(approval="", reason="?"),
        events.ApprovalDecided(approval="", approved=True),
        events.ApprovalRequested(approval="a", reason="?" * 4001),
        events.ReviewRequested(plan="p", version=0),
        events.ReviewRequested(plan="p", version=10**25),
        events.Completed(usage=events.Usage(input_tokens=-1)),
        events.Completed(usage=events.Usage(cost_nano=2**53)),
    ],
)
def test_values_out_of_bounds_are_refused(event: events.AnyEvent) -> None:
    with pytest.raises(Invalid):
        events.encode(event)


def test_an_event_of_256_kib_is_accepted_and_one_byte_more_is_not() -> None:
    room = events.EVENT_BYTES_MAX - len(events.encode(events.TextDelta(text="")))
    assert len(events.encode(events.TextDelta(text="a" * room))) == events.EVENT_BYTES_MAX
    with pytest.raises(TooLarge, match="at most 262144"):
        events.encode(events.TextDelta(text="a" * (room + 1)))


def test_an_event_is_frozen_and_keyword_only() -> None:
    with pytest.raises(AttributeError):
        events.TextDelta(text="a").text = "b"  # type: ignore[misc]
    with pytest.raises(TypeError):
        events.TextDelta("a")  # type: ignore[call-arg]
