"""Harness of the tree codec: skeletons are decoded over a fixed table of tensors.

An accepted object has the right names, and arrives as the same object when it is sent again.
"""

from __future__ import annotations

from datetime import datetime
from random import Random

import msgspec

from aiotorchio.codecs.tree import chunked_decode
from aiotorchio.codecs.tree.precheck import check_size
from aiotorchio.errors import AiotorchioError
from aiotorchio.graph.rebuild import build_tensors
from fuzz.messages import vary
from fuzz.objects import (
    HEADER,
    LIMITS,
    OFFSET,
    STORAGES,
    check_untouched,
    leave_out,
    rebuilder,
    round_trip,
    use,
)
from fuzz.oracle import Find, MutateBytes, check_refusal, no_flood

__all__ = ["MAX_LEN", "mutate", "test_one_input"]

MAX_LEN = 4096
_REFUSED = (dict, msgspec.msgpack.Ext, datetime)
# The contents of tags, and values that make trouble in any MessagePack.
_LEAVES = [
    *range(11),
    *([0], [1], [2], [3, []], [4], [5, 0], [5, 9], [6, 0.0, -0.0], [7, b"\xff" * 9], [8]),
    *([8, 2, 3], [9, "float32"], [10, "cpu"], [10, "cuda:1"], [10, "meta:0"], [3, [[5, 1]]]),
    *([0, 1, 2], [1, "a", [5, 2]], [2, "a", [5, 3]], [2, 0, 1, "0", 2], [4, 1, 2.5], [4, [1]]),
    *([4, [5, 0]], [3, [[2]], "w", [5, 0]], [7, b"\x00" * 8 + b"\x01"], "a.b", "", "\udcff"),
]


def test_one_input(data: bytes) -> None:
    """Judge one input."""
    with no_flood():
        _check_growth(data)
        refused: list[AiotorchioError | None] = [_refusal(data, names) for names in (False, True)]
        if refused[0] is not None:
            if type(refused[1]) is not type(refused[0]):
                raise Find(f"{refused[0]!r}, and with names {refused[1]!r}")
            return
        tensors = build_tensors(HEADER, STORAGES)
        obj = rebuilder(data, "tree").build(tensors, STORAGES)
        use(obj)
        round_trip(obj)
        leave_out(obj)
        check_untouched()


def mutate(data: bytes, max_size: int, random: Random, mutate_bytes: MutateBytes) -> bytes:
    """Change a skeleton: a value in it, or its bytes as they are."""
    changed = vary(data, random, _LEAVES) if random.random() < 0.8 else None
    return mutate_bytes(data, max_size) if changed is None else changed[:max_size]


def _check_growth(data: bytes) -> None:
    """Compare the check of the size, which only reads the bytes, with the decoder."""
    try:
        check_size(data, LIMITS.depth)
        passed = True
    except AiotorchioError:
        passed = False
    try:
        value = msgspec.msgpack.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeError, TypeError):
        return
    waiting, depth, plain = [value], 0, True
    while waiting:
        plain = plain and not any(isinstance(each, _REFUSED) for each in waiting)
        waiting = [item for each in waiting if type(each) is list for item in each]
        depth += 1
    if passed:
        lists: list[list[object]] = [[]]
        chunked_decode._unpack(data, lists)
        if msgspec.msgpack.encode(lists[0][0]) != msgspec.msgpack.encode(value):
            raise Find("in parts it is another value")
    if passed and not plain:
        raise Find("a map or an extension passed")
    if passed and depth > 2 * LIMITS.depth + 2:
        raise Find(f"{depth} levels passed")
    if plain and depth <= LIMITS.depth and not passed:
        raise Find("an honest skeleton did not pass")


def _refusal(data: bytes, names: bool) -> AiotorchioError | None:
    """Return why a skeleton is refused before its payload is received; None if it is accepted."""
    try:
        rebuilder(data, "tree").check(HEADER.tensors, names=names)
    except AiotorchioError as error:
        # Wrong names are found in the rows of the header.
        check_refusal(error, OFFSET, 0)
        return error
    return None
