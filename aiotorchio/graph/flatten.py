"""An object -> its skeleton, the tables of tensors and storages, and the storages themselves."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import torch

from aiotorchio.codecs.pickled import codec as pickle_codec
from aiotorchio.codecs.tree import codec as tree_codec
from aiotorchio.common.strides import Part
from aiotorchio.common.torch_private import warn_if_has_hooks
from aiotorchio.table.compact import compact as without_gaps
from aiotorchio.table.names import TensorSpec, walk
from aiotorchio.table.table import Table
from aiotorchio.table.torch_dtypes import DTYPE_NAMES
from aiotorchio.table.versions import Versions
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import META_LOCATION, Codec, Header

__all__ = ["Flattened", "flatten", "flatten_specs", "is_small"]

# Taking an object apart takes about 4 us for each thing in it.
_SMALL_COUNT = 200
_SMALL_TEXT = 64 * 2**10


_SMALL_TYPES = frozenset(
    {type(None), bool, int, float, complex}
    | {torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device}
)


@dataclass(frozen=True, slots=True)
class Flattened:
    """An object, ready to be sent.

    Attributes:
        header: The header of its message.
        skeleton: The object around its tensors.
        storages: The storage of each row of the header.
        parts: What is sent of storages that are not sent as a whole, by number.
        left_out: Bytes of those that are not sent.
        whole: Storages that the object refers to itself, by number.
        versions: The tensors as they are now.
    """

    header: Header
    skeleton: bytes
    storages: list[torch.UntypedStorage]
    parts: dict[int, list[Part]] = field(default_factory=dict)
    left_out: int = 0
    whole: frozenset[int] = frozenset()
    versions: Versions = field(default_factory=Versions)

    def for_message(
        self, *, chunk_size: int, metadata: Mapping[str, str], producer: str
    ) -> Flattened:
        """The same parts for one more message; arguments as of ``flatten``."""
        header = msgspec.structs.replace(
            self.header,
            nonce=os.urandom(16),
            producer=producer,
            metadata=list(metadata.items()),
            chunk_size=chunk_size,
        )
        return replace(self, header=header)


def flatten(
    obj: object,
    *,
    chunk_size: int,
    metadata: Mapping[str, str],
    producer: str,
    pickle_module: Any = pickle,
    pickle_protocol: int = 2,
    allow_pickle: bool = True,
    compact: bool = False,
    skip: torch.serialization.skip_data | None = None,
) -> Flattened:
    """Take an object apart without copying a tensor.

    The tree codec is tried first: it is faster, and every receiver takes it.

    Args:
        obj: Any object.
        chunk_size: Bytes of a chunk of the payload.
        metadata: For the header.
        producer: Name and version of the sender, for the header.
        pickle_module: For what the tree codec cannot carry.
        pickle_protocol: Likewise.
        allow_pickle: Whether the pickle codec may be used.
        compact: Leave out what no tensor shows of its storage.
        skip: The ``torch.serialization.skip_data`` that the caller's thread is in: the storages
            are sent like those on ``meta``, since a stream has no holes to be filled later.

    Returns:
        The parts, which share their storages with the object.

    Raises:
        ValueError: The object needs pickle, and must not.
    """
    codec: Codec = "tree"
    table = Table(skip)
    try:
        skeleton = tree_codec.encode(obj, table)
    except tree_codec.NotATreeError as reason:
        if not allow_pickle:
            raise ValueError(
                f"allow_pickle is False, and the object needs pickle: {reason}"
            ) from None
        codec, table = "pickle", Table(skip)
        # For this thread, too: torch refuses there what it cannot send without its bytes.
        with contextlib.nullcontext() if skip is None else skip:
            skeleton = pickle_codec.dump(
                obj, table, pickle_module=pickle_module, pickle_protocol=pickle_protocol
            )
        _add_names(obj, table)
    for tensor in table.kept:
        # torch drops backward hooks when it serializes, with this warning; so do we.
        warn_if_has_hooks(tensor)
    header = Header(
        byteorder=sys.byteorder,
        nonce=os.urandom(16),
        producer=producer,
        metadata=list(metadata.items()),
        codec=codec,
        chunk_size=chunk_size,
        locations=table.locations,
        storages=table.storages,
        tensors=table.tensors,
    )
    parts, left_out = (
        without_gaps(table.tensors, table.storages, table.locations, table.whole)
        if compact
        else ({}, 0)
    )
    versions = Versions([*table.kept, *table.others], table.tensors)
    whole = frozenset(table.whole)
    return Flattened(header, skeleton, table.sources, parts, left_out, whole, versions)


def flatten_specs(
    specs: Mapping[str, TensorSpec], *, chunk_size: int, metadata: Mapping[str, str], producer: str
) -> Flattened:
    """The header and the skeleton of a dict of tensors that are not made yet.

    Args:
        specs: What the tensors will be, by name.
        chunk_size: Bytes of a chunk of the payload.
        metadata: For the header.
        producer: Name and version of the sender, for the header.

    Returns:
        The parts, with storages on ``meta``.

    Raises:
        ValueError: A dtype that cannot be sent so.
    """
    tensors = {}
    for name, spec in specs.items():
        if spec.dtype not in DTYPE_NAMES or DTYPES[DTYPE_NAMES[spec.dtype]].kind == "quantized":
            raise ValueError(f"{name!r}: tensors of {spec.dtype} can't be announced by specs")
        tensors[name] = torch.empty(spec.shape, dtype=spec.dtype, device=META_LOCATION)
    parts = flatten(tensors, chunk_size=chunk_size, metadata=metadata, producer=producer)
    # Nobody knows yet where they will be; the receiver's map_location says where they go.
    return Flattened(
        msgspec.structs.replace(parts.header, locations=["cpu"] * bool(specs)),
        parts.skeleton,
        parts.storages,
    )


def is_small(obj: object) -> bool:
    """Whether taking an object apart takes no longer than a worker thread takes to start.

    Only plain containers can be looked through; what else is in them may hold anything.
    """
    waiting, left = [obj], _SMALL_COUNT
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            left -= len(value)
            waiting += value.values() if left > 0 else ()
        elif isinstance(value, list | tuple | set):
            left -= len(value)
            waiting += value if left > 0 else ()
        elif isinstance(value, str | bytes):
            left -= len(value) * _SMALL_COUNT // _SMALL_TEXT
        elif type(value) not in _SMALL_TYPES:
            return False
        if left <= 0:
            return False
    return True


def _add_names(obj: object, table: Table) -> None:
    """Name the rows after their paths in dicts, lists and tuples, as the tree codec does."""
    for path, tensor in walk(obj):
        table.name(tensor, path)
