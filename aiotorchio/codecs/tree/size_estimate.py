"""Estimates the memory and the depth of the object of a skeleton, without decoding it.

In: a skeleton as a peer sent it. Out: bytes and levels. An error means that the skeleton is not
valid. ``precheck`` calls it only for a skeleton that may take too much, since a loop in Python over
each value is slow.
"""

from __future__ import annotations

from aiotorchio.codecs.tree.tags import Tag
from aiotorchio.codecs.tree.tokens import ARRAY, NUMBER, TEXT, token
from aiotorchio.common.interrupt import check_interrupt
from aiotorchio.errors import ProtocolError

__all__ = ["container_nbytes", "estimate_size"]

# Memory of a value, with its slots in the decoded list and in the object. A str can take four times
# the bytes of its UTF-8.
_TEXT_NBYTES, _LETTER_NBYTES, _NUMBER_NBYTES, _CONSTANT_NBYTES = 80, 4, 48, 16
# Memory of an array, as a list and as the container of the object. By its tag: memory that this
# container takes in addition, and memory that each of its items takes in addition.
_NESTED_NBYTES = 160
_BY_TAG = {Tag.DICT: (160, 32), Tag.ORDERED_DICT: (500, 64), Tag.SET: (160, 150)}


def container_nbytes(data: bytes, position: int, items: int) -> int:
    """Estimate the memory of an array and of its container in the object, without the items.

    Args:
        data: The skeleton.
        position: Position of the first item, which is the tag.
        items: Number of items that the array claims; the skeleton may have fewer.
    """
    if not items or position >= len(data):
        return _NESTED_NBYTES
    itself, each = _BY_TAG.get(data[position], (0, 0))
    return _NESTED_NBYTES + itself + each * (min(items, len(data) - position) - 1)


def estimate_size(data: bytes) -> tuple[int, int]:
    """Return the memory of the values of a skeleton, and how deep they are nested.

    Raises:
        ProtocolError: The skeleton has a map or an extension, or ends inside a value.
    """
    memory = position = depth = 0
    # Number of missing items of each open array.
    missing: list[int] = []
    size = len(data)
    steps = 0
    while position < size:
        steps += 1
        if not steps % 4096:
            check_interrupt()
        kind, length, position = token(data, position)
        items = 0
        if kind == ARRAY:
            items = length
            memory += container_nbytes(data, position, items)
        elif kind == TEXT:
            memory += _TEXT_NBYTES + _LETTER_NBYTES * length
            position += length
        elif kind == NUMBER:
            memory += _NUMBER_NBYTES
            position += length
        else:
            memory += _CONSTANT_NBYTES
        if items:
            missing.append(items)
            depth = max(depth, len(missing))
            continue
        while missing:
            missing[-1] -= 1
            if missing[-1]:
                break
            missing.pop()
    if position > size:
        raise ProtocolError("the skeleton ends inside a value")
    return memory, depth
