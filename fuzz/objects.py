"""What came out of hostile bytes is an object like any other: it can be saved, and loaded again."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import aiotorchio
from aiotorchio.errors import AiotorchioError, ProtocolError
from aiotorchio.graph.flatten import Flattened
from aiotorchio.graph.rebuild import Rebuilder, check_tree
from aiotorchio.graph.select import revise
from aiotorchio.limits import Limits
from aiotorchio.table.names import walk
from aiotorchio.wire.header import Codec, Header
from fuzz.oracle import Find, check_refusal
from tests.support import corpus, craft, hostile

__all__ = [
    "HEADER",
    "LIMITS",
    "OFFSET",
    "STORAGES",
    "check_untouched",
    "leave_out",
    "rebuilder",
    "round_trip",
    "use",
]

# Of the skeleton in its message, for errors.
OFFSET = 1000
_PARTS = craft.flattened(hostile.tensors())
HEADER: Header = _PARTS.header
"""Of a message with the rows that every skeleton here can refer to."""
STORAGES: list[torch.UntypedStorage] = _PARTS.storages
_BYTES = [bytes(s.tolist()) if s.device.type == "cpu" else b"" for s in STORAGES]
_DEEP = 20_000
# So little that a copy of whatever is accepted is no flood.
LIMITS = Limits(total_nbytes=2**22)
_USED_MAX = 20
_PLAIN = (type(None), bool, int, str, bytes)
_NAMED = (*_PLAIN, float, complex, torch.dtype)


def rebuilder(skeleton: bytes, codec: Codec) -> Rebuilder:
    """What a load with default options makes of a skeleton."""
    return Rebuilder(
        skeleton,
        codec,
        allow_pickle=True,
        weights_only=True,
        pickle_module=None,
        encoding="utf-8",
        safe_globals=(),
        map_location=None,
        limits=LIMITS,
        offset=OFFSET,
    )


def check_untouched() -> None:
    """Make sure that no skeleton has changed the storages."""
    for storage, expected in zip(STORAGES, _BYTES, strict=True):
        if storage.device.type == "cpu" and bytes(storage.tolist()) != expected:
            raise Find("a skeleton has changed a storage")


def round_trip(obj: Any) -> None:
    """Save and load an object, and compare; if torch could save it."""
    with _recursion():
        try:
            parts = craft.flattened(obj)
        except Exception:
            # What torch can't save either may fail in any way.
            if _torch_saves(obj):
                raise
            return
        if parts.header.codec == "tree":
            _check_names(parts)
        loaded = aiotorchio.load(io.BytesIO(craft.compose(parts)))
        if _comparable(obj):
            corpus.assert_same(loaded, obj)


def _torch_saves(obj: Any) -> bool:
    try:
        torch.save(obj, io.BytesIO())
    except Exception:  # of any kind: it says that it can't
        return False
    return True


def _check_names(parts: Flattened) -> None:
    """Make sure that the names of the header pass for the paths of the object, and no others."""
    rows = parts.header.tensors
    check_tree(parts.skeleton, rows, names=True, limits=Limits(), offset=OFFSET)
    for row in rows[:3]:
        right = row.names
        for wrong in (right[1:], [*right, right[0]], [right[0] + "x", *right[1:]]):
            row.names = wrong
            try:
                check_tree(parts.skeleton, rows, names=True, limits=Limits(), offset=OFFSET)
            except ProtocolError as error:
                check_refusal(error, OFFSET, 0)
            else:
                raise Find(f"names {wrong} pass for {right}")
        row.names = right


@contextmanager
def _recursion() -> Iterator[None]:
    """Let what is compared be as deep as what is loaded may be."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(_DEEP)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def leave_out(obj: Any) -> None:
    """Take every other tensor out of an object by its name, as a selection does; it is changed."""
    names = {name for name, _ in walk(obj)} | {name for row in HEADER.tensors for name in row.names}
    turns = itertools.count()
    with contextlib.suppress(AiotorchioError):
        revise(obj, names, lambda name, tensor: tensor if next(turns) % 2 else None)


def use(obj: Any) -> None:
    """Do with the tensors of an object what crashes if they are not what they claim to be."""
    tensors = [value for value in _parts(obj) if isinstance(value, torch.Tensor)]
    for tensor in tensors[:_USED_MAX]:
        # Not all kinds can do all of this.
        with torch.no_grad(), contextlib.suppress(RuntimeError):
            tensor.detach().clone()
            if tensor.device.type == "meta" or tensor.is_nested:
                continue
            if tensor.layout is not torch.strided and tensor.numel() <= 2**16:
                tensor.to_dense()
            if tensor.is_quantized:
                tensor.dequantize()


def _comparable(obj: Any) -> bool:
    """Whether it has order and short names everywhere, as comparing it takes.

    In sets, tensors, nan and other sets have no order. Of keys a text is made.
    """
    for value in _parts(obj):
        if isinstance(value, set | frozenset) and not all(type(item) in _PLAIN for item in value):
            return False
        if isinstance(value, dict) and not all(type(key) in _NAMED for key in value):
            return False
        # torch itself sends no storage for it.
        if isinstance(value, torch.Tensor) and value.is_meta and vars(value):
            return False
    return True


def _parts(obj: Any) -> Iterator[Any]:
    """Everything in an object, once."""
    waiting, seen = [obj], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        if hasattr(value, "__dict__"):
            waiting += vars(value).values()
