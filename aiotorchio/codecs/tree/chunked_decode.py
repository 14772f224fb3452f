"""A skeleton of MessagePack becomes nested lists, in parts, between which other threads go on.

One call of the decoder holds all of them up: for 40 ms a MiB, if that is full of empty arrays. So
a long skeleton is cut into runs of short values, which are decoded run by run, and arrays, which
are made here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from aiotorchio.codecs.tree.precheck import SHORT_VALUE, check_size
from aiotorchio.codecs.tree.size_estimate import ARRAYS, TEXTS
from aiotorchio.common.interrupt import check_interrupt
from aiotorchio.errors import ProtocolError

__all__ = ["AT_ONCE_NBYTES", "drop", "unpacked"]

AT_ONCE_NBYTES = 2**20
"""Size of the skeletons that are decoded, and freed, at once; it takes some 10 ms."""

# Likewise: as many arrays in one of that size, and values of longer ones.
_ARRAYS_MAX, _RUN = 100_000, 10_000

_VALUE = re.compile(SHORT_VALUE)
_VALUES = re.compile(b"(?:%b){1,%d}+" % (SHORT_VALUE, _RUN))
_decode = msgspec.msgpack.decode


@contextmanager
def unpacked(skeleton: bytes, depth_limit: int) -> Iterator[Any]:
    """What msgspec makes of a skeleton; its lists are of no use behind the block.

    Args:
        skeleton: As received.
        depth_limit: Nesting of containers to accept.

    Raises:
        LimitExceeded: As ``check_size``.
        ProtocolError: Likewise; it ends inside of an array, or goes on behind its value.
        msgspec.DecodeError: Not MessagePack.
        UnicodeDecodeError: A text that is not UTF-8.
    """
    arrays = check_size(skeleton, depth_limit)
    if len(skeleton) <= AT_ONCE_NBYTES and arrays <= _ARRAYS_MAX:
        yield _decode(skeleton)
        return
    lists: list[list[Any]] = [[]]
    try:
        _unpack(skeleton, lists)
        yield lists[0][0]
    finally:
        # The last ones are in those before them, and empty when those let go of them.
        while lists:
            last = lists.pop()
            while last:
                del last[-_RUN:]


def drop(items: list[Any] | dict[Any, Any]) -> None:
    """Empty a list or dict, and those that are in it, in parts: nobody needs them any more."""
    waiting = [items]
    while waiting:
        held = waiting[-1]
        if isinstance(held, dict):
            part = [held.popitem()[1] for _ in range(min(len(held), _RUN))]
        else:
            part = held[-_RUN:]
            del held[-_RUN:]
        if not held:
            waiting.pop()
        for item in part:
            if isinstance(item, list | dict):
                waiting.append(item)
            elif isinstance(item, tuple):
                waiting.append(list(item))


def _unpack(skeleton: bytes, lists: list[list[Any]]) -> None:
    """Put one value into the first list; all other lists that are made come behind it."""
    # The array that is open, and how many values it misses; and those around it.
    items, missing = lists[0], 1
    outer: list[tuple[list[Any], int]] = []
    values: Sequence[Any] = ()
    position, taken, size = 0, 0, len(skeleton)
    while True:
        check_interrupt()
        while not missing and outer:
            items, missing = outer.pop()
        if not missing:
            break
        if taken < len(values):
            count = min(missing, len(values) - taken)
            items += values[taken : taken + count]
            missing -= count
            taken += count
        elif position >= size:
            raise ProtocolError("the bytes end inside an array")
        elif _begins_array(skeleton, position):
            nested: list[Any] = []
            items.append(nested)
            lists.append(nested)
            outer.append((items, missing - 1))
            items = nested
            missing, position = _length(skeleton, position)
        else:
            values, position = _values(skeleton, position)
            taken = 0
    if position < size or taken < len(values):
        raise ProtocolError("bytes left over behind the value")


def _begins_array(skeleton: bytes, position: int) -> bool:
    head = skeleton[position]
    nests = 0x90 <= head < 0xA0 or head in ARRAYS
    # Those of tensors are among the short values.
    return nests and _VALUE.match(skeleton, position) is None


def _length(skeleton: bytes, position: int) -> tuple[int, int]:
    """How many values an array has, and where they begin."""
    head = skeleton[position]
    if head not in ARRAYS:
        return head - 0x90, position + 1
    end = position + 1 + ARRAYS[head]
    return int.from_bytes(skeleton[position + 1 : end], "big"), end


def _values(skeleton: bytes, position: int) -> tuple[list[Any], int]:
    """Values that are no arrays, and where the last of them ends."""
    run = _VALUES.match(skeleton, position)
    if run is not None:
        count = len(_VALUE.findall(skeleton, position, run.end()))
        return _decode(b"\xdd" + count.to_bytes(4, "big") + run[0]), run.end()
    # A long text, or nothing that there is.
    width = TEXTS.get(skeleton[position], 0)
    start = position + 1 + width
    end = start + int.from_bytes(skeleton[position + 1 : start], "big")
    return [_decode(skeleton[position:end])], end
