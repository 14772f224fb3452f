"""Decodes a skeleton into nested lists, in parts between which other threads can run.

In: a skeleton as a peer sent it. Out: its value, with a list for each array, from which ``decoder``
builds the object. An error means that ``precheck`` refuses the skeleton, or that it is not one
MessagePack value.

One call of msgspec keeps all other threads waiting: 40 ms for 1 MiB of empty arrays. So a long
skeleton is cut into arrays, whose lists are made here, and runs of short values, which msgspec
decodes run by run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from aiotorchio.codecs.tree.precheck import check_size
from aiotorchio.codecs.tree.tokens import ARRAY, SHORT_VALUE, token
from aiotorchio.common.interrupt import check_interrupt
from aiotorchio.errors import ProtocolError

__all__ = ["AT_ONCE_NBYTES", "drop", "unpacked"]

AT_ONCE_NBYTES = 2**20
"""Skeletons up to this size are decoded, and their objects freed, at once: it takes some 10 ms."""

# Arrays that a skeleton decoded at once may have, and values that a run of a longer one may have.
_ARRAYS_MAX, _RUN = 100_000, 10_000

_VALUE = re.compile(SHORT_VALUE)
_VALUES = re.compile(b"(?:%b){1,%d}+" % (SHORT_VALUE, _RUN))
_decode = msgspec.msgpack.decode


@contextmanager
def unpacked(skeleton: bytes, depth_limit: int) -> Iterator[Any]:
    """Yield the value of a skeleton, whose lists may be emptied at the end of the block.

    Args:
        skeleton: A skeleton as a peer sent it.
        depth_limit: ``Limits.depth``.

    Raises:
        LimitExceeded: ``check_size`` refuses the skeleton.
        ProtocolError: ``check_size`` refuses the skeleton, or it ends inside an array or goes on
            after its value.
        msgspec.DecodeError: The skeleton is not MessagePack.
        UnicodeDecodeError: A str is not UTF-8.
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
        # The last list is emptied first: an inner list is empty before its outer one.
        while lists:
            last = lists.pop()
            while last:
                del last[-_RUN:]


def drop(items: list[Any] | dict[Any, Any]) -> None:
    """Empty a list or dict, and its containers, in parts between which other threads can run."""
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
    """Append the value of a skeleton to the first list, and each list that it has to ``lists``."""
    # The innermost open array with the number of its missing values, and the arrays around it.
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
            raise ProtocolError("the skeleton ends inside an array")
        elif (run := _VALUES.match(skeleton, position)) is not None:
            # Among them are the arrays of tensors.
            count = len(_VALUE.findall(skeleton, position, run.end()))
            values, position = _decode(b"\xdd" + count.to_bytes(4, "big") + run[0]), run.end()
            taken = 0
        else:
            kind, length, after = token(skeleton, position)
            if kind == ARRAY:
                nested: list[Any] = []
                items.append(nested)
                lists.append(nested)
                outer.append((items, missing - 1))
                items, missing, position = nested, length, after
            else:
                # A long str, a bin, or a value that msgspec refuses.
                values, position = [_decode(skeleton[position : after + length])], after + length
                taken = 0
    if position < size or taken < len(values):
        raise ProtocolError("the skeleton has bytes left over after its value")
