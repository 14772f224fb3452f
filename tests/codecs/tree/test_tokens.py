"""The walk over MessagePack; the msgpack package says what the values are."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given

from aiotorchio.codecs.tree.tokens import (
    ARRAY,
    CONSTANT,
    NUMBER,
    TEXT,
    skip_short_values,
    token,
)
from aiotorchio.errors import ProtocolError
from tests.codecs.tree.test_precheck import REFUSED, VALUES


def kinds_of(value: Any) -> list[tuple[int, int | None]]:
    """Return the kind of a value and of all values in it, with the length where it is known."""
    if isinstance(value, list):
        return [(ARRAY, len(value)), *(kind for item in value for kind in kinds_of(item))]
    if isinstance(value, str | bytes):
        return [(TEXT, len(value.encode() if isinstance(value, str) else value))]
    if isinstance(value, float) or (isinstance(value, int) and not -5 <= value <= 127):
        return [(NUMBER, None)]
    return [(CONSTANT, 0)]


@given(VALUES)
def test_a_walk_meets_every_value_once(value: Any) -> None:
    data, position, found = msgpack.packb(value), 0, []
    while position < len(data):
        kind, length, position = token(data, position)
        position += 0 if kind == ARRAY else length
        found.append((kind, None if kind == NUMBER else length))
    assert position == len(data)
    assert found == kinds_of(value)


@pytest.mark.parametrize("head", REFUSED)
def test_maps_and_extensions_are_refused(head: int) -> None:
    with pytest.raises(ProtocolError, match="a map or an extension"):
        token(bytes([head]), 0)


def test_a_head_may_be_cut() -> None:
    assert token(b"\xdd\x01", 0) == (ARRAY, 1, 5)
    assert token(b"\xc1", 0) == (CONSTANT, 0, 1)


def test_short_values_are_skipped_up_to_an_array_or_a_long_text() -> None:
    short = msgpack.packb(1) + msgpack.packb("a" * 127) + b"\x92\x05\x01" + msgpack.packb(2.5)
    for last in (msgpack.packb([1, 2]), msgpack.packb("a" * 128), msgpack.packb(b"a"), b"\x80"):
        assert skip_short_values(b"\x90" + short + last, 1) == 1 + len(short)
    assert skip_short_values(short, 0) == len(short)
