"""Refuses a skeleton that would take too much memory or stack, before msgspec decodes it.

In: a skeleton as a peer sent it. Out: the number of its arrays. ``chunked_decode`` calls
``check_size`` before everything else; an error means that the skeleton must not be decoded.

An empty array is one byte in a message and 80 in memory. msgspec would build maps, which the format
does not have, before anything could refuse them, however long their keys take to hash. It also
decodes nested arrays by recursion, with 320 bytes of the C stack a level, up to Python's recursion
limit, which programs raise; and threads may have small stacks.
"""

from __future__ import annotations

from aiotorchio.codecs.tree.size_estimate import container_nbytes, estimate_size
from aiotorchio.codecs.tree.tokens import ARRAY, TEXT, skip_short_values, token
from aiotorchio.common.interrupt import check_interrupt
from aiotorchio.errors import LimitExceeded, ProtocolError
from aiotorchio.wire import bounds

__all__ = ["check_size"]

# Memory that each byte of a skeleton may take once the object is built, in addition to the
# memory_floor of every skeleton. Only arrays can take more for each of their bytes.
_MEMORY_PER_BYTE = 48

_TENSOR = b"\x92\x05"


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
        end = skip_short_values(skeleton, position)
        if end > position:
            position = end
            continue
        kind, length, position = token(skeleton, position)
        if kind == ARRAY:
            arrays += 1
            nbytes += container_nbytes(skeleton, position, length)
        elif kind == TEXT:
            position += length
        else:
            raise ProtocolError("the skeleton has a value that is not whole, or of no known type")
    if position > size:
        raise ProtocolError("the skeleton ends inside a value")
    return arrays, nbytes
