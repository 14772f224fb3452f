"""A long skeleton that is decoded in parts gives the same value as msgspec gives at once."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotorchio.codecs.tree import chunked_decode
from aiotorchio.codecs.tree.chunked_decode import drop, unpacked
from aiotorchio.codecs.tree.precheck import check_size
from aiotorchio.errors import LimitExceeded, ProtocolError
from tests.support.corpus import assert_same

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
    | st.binary(max_size=400) | st.text(min_size=28, max_size=300)
    | st.tuples(st.just(5), st.integers(0, 2**32)).map(list),
    lambda values: st.lists(values, max_size=20) | st.lists(values, min_size=16, max_size=17),
    max_leaves=60,
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every skeleton count as long."""
    monkeypatch.setattr(chunked_decode, "AT_ONCE_NBYTES", -1)


def value_of(data: bytes) -> Any:
    """Decode a skeleton; return a copy, because the decoder frees the value afterwards."""
    with unpacked(data, 256) as value:
        return copied(value)


def copied(value: Any) -> Any:
    return [copied(item) for item in value] if type(value) is list else value


@given(VALUES)
def test_any_value(value: Any) -> None:
    assert_same(value_of(msgpack.packb(value)), value)


@given(st.binary(max_size=60) | VALUES.map(msgpack.packb), st.data())
def test_any_bytes(data: bytes, drawn: st.DataObject) -> None:
    changed = bytearray(data)
    for _ in range(drawn.draw(st.integers(0, 3)) if data else 0):
        changed[drawn.draw(st.integers(0, len(data) - 1))] = drawn.draw(st.integers(0, 255))
    try:
        check_size(bytes(changed), 256)
    except (ProtocolError, LimitExceeded):
        return
    try:
        expected = msgspec.msgpack.decode(bytes(changed))
    except (msgspec.DecodeError, UnicodeDecodeError):
        with pytest.raises((msgspec.DecodeError, UnicodeDecodeError, ProtocolError)):
            value_of(bytes(changed))
    else:
        assert_same(value_of(bytes(changed)), expected)


@given(VALUES)
def test_cut_anywhere_and_with_bytes_behind(value: Any) -> None:
    data = msgpack.packb(value)
    for size in range(len(data)):
        with pytest.raises((msgspec.DecodeError, UnicodeDecodeError, ProtocolError)):
            value_of(data[:size])
    for behind in (b"\x00", b"\x90", b"\xda\x00\x00", data):
        with pytest.raises(ProtocolError, match="left over"):
            value_of(data + behind)


@pytest.mark.parametrize("head", [b"\x91", b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01"])
def test_every_head_of_an_array(head: bytes) -> None:
    assert value_of(head + head + b"\x07") == [[7]]
    with pytest.raises(ProtocolError, match="ends inside an array"):
        value_of(head)


@pytest.mark.parametrize("count", [0, 1, 9_999, 10_000, 10_001, 20_000, 65_537])
def test_runs_of_any_length(count: int) -> None:
    value = [count, list(range(count)), [0] * count, [5, count], ["a"] * count]
    assert value_of(msgpack.packb(value)) == value


def test_no_memory_is_taken_for_the_claim_of_an_array() -> None:
    with pytest.raises(ProtocolError, match="ends inside an array"):
        value_of(b"\xdd\xff\xff\xff\xff\x00")


def test_what_is_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []

    def decode(data: bytes) -> Any:
        calls.append(data)
        return msgspec.msgpack.decode(data)

    monkeypatch.setattr(chunked_decode, "_decode", decode)
    data = msgpack.packb([[0]] * 100)
    for nbytes, arrays, whole in ((len(data), 101, True), (len(data) - 1, 101, False),
                                  (len(data), 100, False)):  # fmt: skip
        monkeypatch.setattr(chunked_decode, "AT_ONCE_NBYTES", nbytes)
        monkeypatch.setattr(chunked_decode, "_ARRAYS_MAX", arrays)
        calls.clear()
        assert value_of(data) == [[0]] * 100
        assert (calls == [data]) == whole


def test_lists_are_freed_in_parts() -> None:
    with unpacked(msgpack.packb([[1, 2], [[3] * 30_000]]), 256) as value:
        inner, deep = value[0], value[1][0]
    assert value == inner == deep == []


def test_whoever_counts_arrays_says_how_many() -> None:
    assert check_size(msgpack.packb([[0], [[1]], [5, 0]]), 256) == 5


def test_lists_do_not_all_live_until_the_end() -> None:
    """A chain of references would keep every list alive until the last one is freed."""
    lists: list[list[Any]] = [[]]
    chunked_decode._unpack(msgpack.packb([[n] for n in range(1000)]), lists)
    with unpacked(msgpack.packb([[n] for n in range(1000)]), 256) as value:
        assert len(value) == 1000
        alive = sum(type(each) is list for each in gc.get_objects())
    assert sum(type(each) is list for each in gc.get_objects()) <= alive - 1000
    assert len(lists) == 1002


class Weak(list[Any]):
    """A list that supports weak references, so that a test sees when it is freed."""


@pytest.mark.parametrize("count", [0, 1, 9_999, 10_000, 25_000])
def test_what_nobody_needs_is_freed(count: int) -> None:
    weak = Weak([1])
    gone = ref(weak)
    inner = [(weak, {"a": [weak]})]
    items: list[Any] = [0] * count + [{n: n for n in range(count)}, inner, {1, 2}, "abc", ()]
    del weak
    drop(items)
    assert items == [] == inner
    assert gone() is None
    mapping = {"a": [1], "b": {"c": 2}}
    drop(mapping)
    assert mapping == {}
