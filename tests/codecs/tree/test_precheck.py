"""The precheck of a skeleton before it is decoded; see also ``test_tree_codec.py``.

Random MessagePack is compared with msgspec's decoder and with ``estimate_size``.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiotorchio.codecs.tree import precheck
from aiotorchio.codecs.tree.precheck import check_size
from aiotorchio.codecs.tree.size_estimate import estimate_size
from aiotorchio.errors import LimitExceeded, ProtocolError

HEADS = [bytes([head]) for head in range(256)]
# Maps and extensions, which the format does not have.
REFUSED = sorted([*range(0x80, 0x90), 0xDE, 0xDF, *range(0xC7, 0xCA), *range(0xD4, 0xD9)])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
    | st.binary(max_size=400) | st.text(min_size=28, max_size=300),
    lambda values: st.lists(values, max_size=20),
    max_leaves=40,
)  # fmt: skip


def has_maps(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(has_maps, value))
    return isinstance(value, dict | msgspec.msgpack.Ext)


def passes(data: bytes) -> bool:
    try:
        check_size(data, 256)
    except ProtocolError:
        return False
    return True


@given(VALUES)
def test_what_has_no_maps_passes_and_does_not_when_it_is_cut(value: Any) -> None:
    data = msgpack.packb(value)
    assert passes(data)
    # A cut between two values leaves whole values; only the decoder notices the missing ones.
    for size in range(1, len(data)):
        if passes(data[:size]):
            assert estimate_size(data[:size])[0] > 0


@given(VALUES, st.data())
def test_whatever_passes_has_no_maps(value: Any, drawn: st.DataObject) -> None:
    data = bytearray(msgpack.packb([value, value]))
    for _ in range(drawn.draw(st.integers(0, 5))):
        data[drawn.draw(st.integers(0, len(data) - 1))] = drawn.draw(st.integers(0, 255))
    if passes(bytes(data)):
        try:
            decoded = msgspec.msgpack.decode(bytes(data))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return
        assert not has_maps(decoded)


@given(st.lists(st.sampled_from(HEADS) | st.binary(max_size=40), max_size=30))
def test_both_walks_refuse_the_same(parts: list[bytes]) -> None:
    data = b"".join(parts)
    try:
        estimate_size(data)
    except ProtocolError:
        assert not passes(data)
    else:
        # The byte 0xc1 starts no value. ``estimate_size`` leaves it to the decoder.
        assert passes(data) or b"\xc1" in data


@pytest.mark.parametrize("before", [b"", b"\x01" * 100, b"\xa3abc", b"\xd9\x28" + b"x" * 40])
@pytest.mark.parametrize("head", REFUSED)
def test_maps_and_extensions_are_found_behind_anything(before: bytes, head: int) -> None:
    with pytest.raises(ProtocolError, match="a map or an extension"):
        check_size(before + bytes([head]) + bytes(32), 256)


@pytest.mark.parametrize("head", REFUSED)
@pytest.mark.parametrize("text", [b"\xbf%s", b"\xd9\x1f%s", b"\xda\x00\x1f%s", b"\xc4\x1f%s"])
def test_bytes_of_texts_are_no_heads(text: bytes, head: int) -> None:
    check_size(text.replace(b"%s", bytes([head]) * 31) + b"\x01", 256)


@given(VALUES)
def test_arrays_are_counted_as_many_as_are_nested_or_more(value: Any) -> None:
    data = msgpack.packb(value)
    # One array per tensor reference is not counted: it holds no other array.
    assert precheck._containers(data, 2**40)[0] + 1 >= estimate_size(data)[1]


@pytest.mark.parametrize(
    "value",
    [
        *(b"\xa0", b"\xa1a", b"\xa2ab", b"\xa3abc", b"\xa4abcd", b"\xa3\xe2\x82\xac"),
        *(b"\xa4\xf0\x9f\x98\x80", b"\xd9\x02ab", b"\xda\x00\x02ab", b"\xdb\0\0\0\x02ab"),
        *(
            b"\xc4\x00",
            b"\xc4\x02ab",
            b"\xc5\x00\x02ab",
            b"\xc6\0\0\0\x02ab",
            b"\xc4\x20" + b"x" * 32,
        ),
        *(b"\x00", b"\xe0", b"\xc0", b"\xcc\xff", b"\xcd\xff\xff", b"\xce\xff\xff\xff\xff"),
        *(
            b"\xcf" + b"\xff" * 8,
            b"\xd0\x80",
            b"\xd1\x80\x00",
            b"\xd2\x80\0\0\0",
            b"\xd3\x80" + bytes(7),
        ),
        *(
            b"\xca" + bytes(4),
            b"\xcb" + bytes(8),
            b"\x90",
            b"\x91\x00",
            b"\x91\x90",
            b"\x92\x05\x01",
        ),
        *(b"\xdc\x00\x00", b"\xdd\x00\x00\x00\x00", b"\x9f" + bytes(15)),
    ],
    ids=bytes.hex,
)
def test_the_quick_bound_of_memory_is_one(value: bytes) -> None:
    data = b"\xdd\x00\x00\x40\x00" + value * 0x4000
    tracemalloc.start()
    decoded = msgspec.msgpack.decode(data)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The outer list has a slot for each value, and the rebuilt object has another one.
    bound = precheck._MEMORY_PER_BYTE * len(data) + precheck._containers(data, 2**40)[1]
    assert taken + 8 * len(decoded) <= bound + 10_000


@pytest.mark.parametrize(
    "head", [b"\x91", b"\x92\x00", b"\x92\x05", b"\xdc\x00\x01", b"\xdd\0\0\0\x01"]
)
def test_what_is_too_deep(head: bytes) -> None:
    check_size(head * 9 + b"\xc0", 4)
    with pytest.raises(LimitExceeded, match="nested deeper than 4 levels"):
        check_size(head * 10 + b"\xc0", 4)


def test_many_arrays_beside_each_other_are_not_deep() -> None:
    check_size(msgpack.packb([[0, [1]]] * 1000), 4)
