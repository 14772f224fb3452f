"""Checks of objects that came from hostile bytes: they can be used, saved, and loaded again."""

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

# The offset of the skeleton in its message, for errors.
OFFSET = 1000
_PARTS = craft.flattened(hostile.tensors())
HEADER: Header = _PARTS.header
"""Of a message with the rows that every skeleton here can refer to."""
STORAGES: list[torch.UntypedStorage] = _PARTS.storages
_BYTES = [bytes(s.tolist()) if s.device.type == "cpu" else b"" for s in STORAGES]
_DEEP = 20_000
# Small enough that copies of any accepted object are no flood.
LIMITS = Limits(total_nbytes=2**22)
_USED_MAX = 20
_PLAIN = (type(None), bool, int, str, bytes)
_NAMED = (*_PLAIN, float, complex, torch.dtype)


def rebuilder(skeleton: bytes, codec: Codec) -> Rebuilder:
    """Return the rebuilder of a load with default options."""
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
    """Check that no skeleton has changed the storages."""
    for storage, expected in zip(STORAGES, _BYTES, strict=True):
        if storage.device.type == "cpu" and bytes(storage.tolist()) != expected:
            raise Find("a skeleton has changed a storage")


def round_trip(obj: Any) -> None:
    """Save and load an object, and compare, if torch could save it."""
    with _recursion():
        try:
            parts = craft.flattened(obj)
        except Exception:
            # An object that torch cannot save either may fail with any error.
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
    except Exception:  # torch raises errors of any kind for an object that it cannot save
        return False
    return True


def _check_names(parts: Flattened) -> None:
    """Check that the header's names are accepted as the paths of the object, and no others are."""
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
    """Raise the recursion limit, so that an object as deep as a load allows can be compared."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(_DEEP)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def leave_out(obj: Any) -> None:
    """Remove every other tensor from an object by its name, as a selection does."""
    names = {name for name, _ in walk(obj)} | {name for row in HEADER.tensors for name in row.names}
    turns = itertools.count()
    with contextlib.suppress(AiotorchioError):
        revise(obj, names, lambda name, tensor: tensor if next(turns) % 2 else None)


def use(obj: Any) -> None:
    """Use the tensors of an object in ways that crash if a tensor's metadata is wrong."""
    tensors = [value for value in _parts(obj) if isinstance(value, torch.Tensor)]
    for tensor in tensors[:_USED_MAX]:
        # Not all kinds of tensors support all of this.
        with torch.no_grad(), contextlib.suppress(RuntimeError):
            tensor.detach().clone()
            if tensor.device.type == "meta" or tensor.is_nested:
                continue
            if tensor.layout is not torch.strided and tensor.numel() <= 2**16:
                tensor.to_dense()
            if tensor.is_quantized:
                tensor.dequantize()


def _comparable(obj: Any) -> bool:
    """Whether an object has order and short names everywhere, which the comparison needs.

    In sets, tensors, nan and other sets have no order. Keys are turned into text.
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
    """Yield every part of an object, once."""
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
