"""How much memory a MessagePack skeleton takes once it is decoded: bounded before it is.

An empty array is one byte in a message and 64 in memory. In a large skeleton such bytes are
counted first, which is fast and may count too many: bytes inside of texts look the same. Only if
that is too much, the skeleton is walked through.
"""

from __future__ import annotations

from aiotorchio.errors import LimitExceeded, ProtocolError

__all__ = ["check_growth"]

# What any skeleton may take, and what each of its bytes may take beyond.
_MEMORY_FLOOR = 64 * 2**20
_MEMORY_PER_BYTE = 16
_CONTAINER_NBYTES = 64

_MAPS_AND_ARRAYS = bytes([*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF])
_OTHERS = bytes(set(range(256)) - set(_MAPS_AND_ARRAYS))
# Head -> bytes that follow it, for numbers; -> bytes of a length, for what has one.
_FIXED = dict(zip(range(0xCA, 0xD4), (4, 8, 1, 2, 4, 8, 1, 2, 4, 8), strict=True)) | {
    0xD4 + n: 1 + 2**n for n in range(5)
}
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_COUNTED = {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}


def check_growth(skeleton: bytes) -> None:
    """Refuse a skeleton of far more containers than contents.

    Raises:
        LimitExceeded: It would take more memory than any honest one.
        ProtocolError: It ends inside a value.
    """
    allowed = _MEMORY_FLOOR + _MEMORY_PER_BYTE * len(skeleton)
    candidates = len(skeleton.translate(None, _OTHERS))
    if candidates * _CONTAINER_NBYTES > allowed and (
        _containers(skeleton) * _CONTAINER_NBYTES > allowed
    ):
        raise LimitExceeded(
            f"the containers take more than {_MEMORY_FLOOR} bytes of memory and "
            f"{_MEMORY_PER_BYTE} for each byte of the skeleton"
        )


def _containers(skeleton: bytes) -> int:
    count = position = 0
    size = len(skeleton)
    while position < size:
        head = skeleton[position]
        position += 1
        if 0x80 <= head < 0xA0:
            count += 1
        elif 0xA0 <= head < 0xC0:
            position += head - 0xA0
        elif head in _COUNTED:
            count += 1
            position += _COUNTED[head]
        elif head in _SIZED:
            width = _SIZED[head]
            position += width + int.from_bytes(skeleton[position : position + width], "big")
        elif head in _EXTENSIONS:
            width = _EXTENSIONS[head]
            position += width + 1 + int.from_bytes(skeleton[position : position + width], "big")
        else:
            position += _FIXED.get(head, 0)
    if position > size:
        raise ProtocolError("the skeleton ends inside a value")
    return count
