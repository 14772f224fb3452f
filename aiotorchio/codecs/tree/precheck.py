"""What a MessagePack skeleton takes once it is decoded: looked at before it is.

An empty array is one byte in a message and 80 in memory. Maps, which the format does not have,
would be built by the decoder before anyone could refuse them, however long their keys take to hash.
And the decoder goes into nested arrays by recursion, 320 bytes of the C stack a level, up to
Python's recursion limit: programs raise that, and run threads with small stacks. So the skeleton is
walked through first.
"""

from __future__ import annotations

import re

from aiotorchio.codecs.tree.size_estimate import (
    ARRAYS,
    EXTENSIONS,
    MAPS,
    TEXTS,
    container_nbytes,
    estimate_size,
)
from aiotorchio.common.interrupt import check_interrupt
from aiotorchio.errors import LimitExceeded, ProtocolError
from aiotorchio.wire import bounds

__all__ = ["SHORT_VALUE", "check_size"]

# What each byte of a skeleton may take, decoded and built, beyond what any skeleton may take.
# Nothing but arrays takes more for each byte of its own.
_MEMORY_PER_BYTE = 48

_TENSOR = b"\x92\x05"
_ONE_BYTE = rb"[\x00-\x7f\xc0\xc2\xc3\xe0-\xff]"
_BYTES = (
    rb"\x92\x05(?:[\x00-\x7f]|\xcc.|\xcd.{2}|\xce.{4})"
    rb"|[\xcc\xd0].|[\xcd\xd1].{2}|[\xca\xce\xd2].{4}|[\xcb\xcf\xd3].{8}|"
    + b"|".join(b"%c.{%d}" % (0xA0 + length, length) for length in range(32))
    + rb"|\xd9(?:"
    + b"|".join(b"%s.{%d}" % (re.escape(bytes([length])), length) for length in range(32, 128))
    + rb")"
)
SHORT_VALUE = rb"(?s:" + _ONE_BYTE + rb"|" + _BYTES + rb")"
"""Matches all values but texts above 127 bytes, arrays and what is refused; and of arrays those of
a tensor, which hold a tag and a row."""

# Walking over these value by value takes 0.3 us each, which was a tenth of the time of a load of
# 10,000 tensors. Not over all at once: no other thread has its turn meanwhile.
_COMMON = re.compile(rb"(?s:" + _ONE_BYTE + rb"{1,100000}+|" + _BYTES + rb"){0,100000}+")


def check_size(skeleton: bytes, depth_limit: int) -> int:
    """Refuse a skeleton that holds maps, takes far more memory than its size, or is far too deep.

    Returns:
        How many arrays it has.

    Raises:
        LimitExceeded: It would take more memory than any honest one, or too much of the stack.
        ProtocolError: A map or an extension, or it ends inside a value.
    """
    floor = bounds.BOUNDS.memory_floor
    allowed = floor + _MEMORY_PER_BYTE * len(skeleton)
    arrays, nbytes = _containers(skeleton, allowed)
    of_tensors = skeleton.count(_TENSOR)
    # An ordered dict has an array for its metadata, which is no level.
    depth_max = 2 * depth_limit + 1
    if arrays <= depth_max and nbytes <= floor:
        return arrays + of_tensors
    memory, depth = estimate_size(skeleton)
    if memory > allowed:
        raise _too_large()
    if depth > depth_max:
        raise LimitExceeded(f"nested deeper than {depth_limit} levels (Limits.depth)")
    return arrays + of_tensors


def _too_large() -> LimitExceeded:
    return LimitExceeded(
        f"the values take more than {bounds.BOUNDS.memory_floor} bytes of memory and "
        f"{_MEMORY_PER_BYTE} for each byte of the skeleton"
    )


def _containers(skeleton: bytes, allowed: int) -> tuple[int, int]:
    """How many arrays there are beside those of tensors, and the memory that those take.

    As many as can be nested, or more.
    """
    arrays = nbytes = position = 0
    size = len(skeleton)
    while position < size:
        check_interrupt()
        if nbytes > allowed:
            raise _too_large()
        end = _end_of_common(skeleton, position)
        if end > position:
            position = end
            continue
        head = skeleton[position]
        position += 1
        if 0x90 <= head < 0xA0:
            arrays += 1
            nbytes += container_nbytes(skeleton, position, head - 0x90)
        elif head in TEXTS:
            width = TEXTS[head]
            length = int.from_bytes(skeleton[position : position + width], "big")
            position += width + length
        elif head in ARRAYS:
            arrays += 1
            start, position = position, position + ARRAYS[head]
            items = int.from_bytes(skeleton[start:position], "big")
            nbytes += container_nbytes(skeleton, position, items)
        elif head in MAPS or head in EXTENSIONS:
            raise ProtocolError("a map or an extension, which messages do not have")
        else:
            raise ProtocolError("a value that is not whole, or of no kind")
    if position > size:
        raise ProtocolError("the bytes end inside a value")
    return arrays, nbytes


def _end_of_common(skeleton: bytes, position: int) -> int:
    common = _COMMON.match(skeleton, position)
    # It matches nothing at all, too.
    return common.end() if common else position
