"""Keys: tags are spread evenly, names never meet, and only what is declared is a key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import keys


@pytest.mark.parametrize(("tag", "slot"), [("123456789", 12739), ("foo", 12182), ("", 0)])
def test_slots_are_redis_clusters(tag: str, slot: int) -> None:
    """The first value is the specification's own; the second what CLUSTER KEYSLOT answers."""
    assert keys.slot(tag) == slot


@pytest.mark.parametrize("count", [1, 2, 3, 16, 64])
def test_partitions_fall_evenly_over_primaries(count: int) -> None:
    tags = keys.tags(count)
    assert len(set(tags)) == count
    for primaries in {1, 2, 3, 4, 8} & {n for n in range(1, count + 1) if count % n == 0 or n == 3}:
        shares = [0] * primaries
        for tag in tags:
            shares[keys.slot(tag) * primaries // keys.SLOTS] += 1
        assert max(shares) - min(shares) <= 1


def test_tags_are_always_the_same() -> None:
    assert keys.tags(16) == keys.tags(16)


@given(st.text(min_size=1, max_size=20), st.text(max_size=20))
def test_a_tasks_partition_is_in_range_and_stable(org: str, task: str) -> None:
    assert keys.partition(org, task, 16) == keys.partition(org, task, 16) < 16


def test_only_declared_keys_are_ours() -> None:
    found = keys.declared(b"tc:{p0}:events:o:t:with:colons\n")
    assert found is not None
    assert found.name == "events"
    assert keys.declared(b"tc:{p0}:surprise:o") is None
    assert keys.declared(b"other") is None
    assert keys.declared(b"tc:{p0}:log") is not None


def test_members_are_read_back() -> None:
    assert keys.of_members([keys.member("o-1", "a:b.c").encode()]) == [("o-1", "a:b.c")]
