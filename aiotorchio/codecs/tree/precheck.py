"""Refuses a skeleton that would take too much memory or stack, before msgspec decodes it.

In: a skeleton as a peer sent it. Out: the number of its arrays. ``chunked_decode`` calls
``check_size`` before everything else; an error means that the skeleton must not be decoded.

An empty array is one byte in a message and 80 in memory. msgspec would build maps, which the format
does not have, before anything could refuse them, however long their keys take to hash. It also
decodes nested arrays by recursion, with 320 bytes of the C stack a level, up to Python's recursion
limit, which programs raise; and threads may have small stacks.
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

# Memory that each byte of a skeleton may take once the object is built, in addition to the
# memory_floor of every skeleton. Only arrays can take more for each of their bytes.
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
"""Matches a number, a constant, a str of at most 127 bytes, or the array of a tensor, which holds a
tag and a row."""

# A loop over these values takes 0.3 us for each, which was a tenth of the time of a load of 10,000
# tensors. The count is bounded since no other thread runs during a match.
_COMMON = re.compile(rb"(?s:" + _ONE_BYTE + rb"{1,100000}+|" + _BYTES + rb"){0,100000}+")


def check_size(skeleton: bytes, depth_limit: int) -> int:
    """Refuse a skeleton that has maps, is far too deep, or takes far more memory than its size.

    Returns:
        The number of its arrays.

    Raises:
        LimitExceeded: It would take more memory than that of any honest object, or is nested so
            deep that decoding it could overflow the stack.
        ProtocolError: It has a map or an extension, or ends inside a value.
    """
    floor = bounds.BOUNDS.memory_floor
    allowed = floor + _MEMORY_PER_BYTE * len(skeleton)
    arrays, nbytes = _containers(skeleton, allowed)
    of_tensors = skeleton.count(_TENSOR)
    # The array for the metadata of an OrderedDict does not count as a level.
    depth_max = 2 * depth_limit + 1
    if arrays <= depth_max and nbytes <= floor:
        return arrays + of_tensors
    memory, depth = estimate_size(skeleton)
    if memory > allowed:
        raise _too_large()
    if depth > depth_max:
        raise LimitExceeded(f"the object is nested deeper than {depth_limit} levels (Limits.depth)")
    return arrays + of_tensors


def _too_large() -> LimitExceeded:
    return LimitExceeded(
        f"the object would take more than {bounds.BOUNDS.memory_floor} bytes of memory plus "
        f"{_MEMORY_PER_BYTE} for each byte of the skeleton"
    )


def _containers(skeleton: bytes, allowed: int) -> tuple[int, int]:
    """Return the number of arrays that are not tensors, and an estimate of their memory.

    The object is nested at most as deep as this number.
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
            raise ProtocolError(
                "the skeleton has a map or an extension, which the format does not allow"
            )
        else:
            raise ProtocolError("the skeleton has a value that is not whole, or of no known type")
    if position > size:
        raise ProtocolError("the skeleton ends inside a value")
    return arrays, nbytes


def _end_of_common(skeleton: bytes, position: int) -> int:
    common = _COMMON.match(skeleton, position)
    # The pattern matches the empty string, too, so this is never None.
    return common.end() if common else position
