"""What a skeleton takes once it is decoded, and its object is built; told without doing either.

Slow, in Python: for what looks as if it took too much. Whoever is in a hurry looks first.
"""

from __future__ import annotations

from aiotorchio.codecs.tree.tags import Tag
from aiotorchio.common.interrupt import check_interrupt
from aiotorchio.errors import ProtocolError

__all__ = ["ARRAYS", "EXTENSIONS", "MAPS", "TEXTS", "container_nbytes", "estimate_size"]

# What values take, with their places in the list that is decoded, and in the object. UTF-8 can
# become four times as long.
_TEXT_NBYTES, _LETTER_NBYTES, _NUMBER_NBYTES, _CONSTANT_NBYTES = 80, 4, 48, 16
# What an array takes, as a list and as what it is in the object; and, by its tag, how much more
# that is, and how much each of its items takes more.
_NESTED_NBYTES = 160
_BY_TAG = {Tag.DICT: (160, 32), Tag.ORDERED_DICT: (500, 64), Tag.SET: (160, 150)}

MAPS = frozenset([*range(0x80, 0x90), 0xDE, 0xDF])
EXTENSIONS = frozenset([*range(0xC7, 0xCA), *range(0xD4, 0xD9)])
# Head -> bytes that follow it, for numbers; -> bytes of a length, for what has one.
_NUMBERS = dict(zip(range(0xCA, 0xD4), (4, 8, 1, 2, 4, 8, 1, 2, 4, 8), strict=True))
TEXTS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
ARRAYS = {0xDC: 2, 0xDD: 4}


def container_nbytes(data: bytes, position: int, items: int) -> int:
    """The memory that an array takes, and what it becomes, without its items.

    Args:
        data: The skeleton.
        position: Where the items begin, and so the tag.
        items: How many there are; or fewer, if the array says so only.
    """
    if not items or position >= len(data):
        return _NESTED_NBYTES
    itself, each = _BY_TAG.get(data[position], (0, 0))
    return _NESTED_NBYTES + itself + each * (min(items, len(data) - position) - 1)


def estimate_size(data: bytes) -> tuple[int, int]:
    """The memory that values take, and how deep they are nested.

    Raises:
        ProtocolError: A map or an extension, which no message has, or it ends inside a value.
    """
    memory = position = depth = 0
    # Items that each open array still misses.
    missing: list[int] = []
    size = len(data)
    steps = 0
    while position < size:
        steps += 1
        if not steps % 4096:
            check_interrupt()
        head = data[position]
        position += 1
        items = 0
        if head < 0x80 or head >= 0xE0:
            # Python keeps the numbers from -5 on.
            memory += _NUMBER_NBYTES if 0xE0 <= head < 0xFB else _CONSTANT_NBYTES
        elif 0x90 <= head < 0xA0:
            items = head - 0x90
            memory += container_nbytes(data, position, items)
        elif 0xA0 <= head < 0xC0:
            memory += _TEXT_NBYTES + _LETTER_NBYTES * (head - 0xA0)
            position += head - 0xA0
        elif head in TEXTS:
            width = TEXTS[head]
            length = int.from_bytes(data[position : position + width], "big")
            memory += _TEXT_NBYTES + _LETTER_NBYTES * length
            position += width + length
        elif head in _NUMBERS:
            memory += _NUMBER_NBYTES
            position += _NUMBERS[head]
        elif head in ARRAYS:
            width = ARRAYS[head]
            items = int.from_bytes(data[position : position + width], "big")
            position += width
            memory += container_nbytes(data, position, items)
        elif head in MAPS or head in EXTENSIONS:
            raise ProtocolError("a map or an extension, which messages do not have")
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
        raise ProtocolError("the bytes end inside a value")
    return memory, depth
