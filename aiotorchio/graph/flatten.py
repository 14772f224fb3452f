"""The sender's half: an object, taken apart into header, skeleton and storages.

In: any object, or the specs of tensors that do not exist yet. Out: a ``Flattened``, which shares
its storages with the object. A ``ValueError`` means that the options do not allow to send the
object. ``engine.prepared_save``, ``send_streamed`` and ``snapshot`` call it.
"""

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

# The items up to which ``is_small`` is true: each takes about 4 us to take apart.
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
        skeleton: The object without its tensors.
        storages: The storage of each storage row of the header.
        parts: Index of a storage that is not sent whole -> its ranges to send.
        left_out: Bytes of storages that are not sent.
        direct_storages: Indices of storages that the object refers to directly.
        versions: The version counters of the tensors, as they are now.
    """

    header: Header
    skeleton: bytes
    storages: list[torch.UntypedStorage]
    parts: dict[int, list[Part]] = field(default_factory=dict)
    left_out: int = 0
    direct_storages: frozenset[int] = frozenset()
    versions: Versions = field(default_factory=Versions)

    def for_message(
        self, *, chunk_size: int, metadata: Mapping[str, str], producer: str
    ) -> Flattened:
        """Return the same parts for one more message; see ``flatten`` for the arguments."""
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

    The tree codec is tried first: it is faster, and every receiver accepts it.

    Args:
        obj: Any object.
        chunk_size: Bytes of a chunk of the payload.
        metadata: The texts for the header.
        producer: Name and version of the sender, for the header.
        pickle_module: The module that pickles objects beyond the tree codec.
        pickle_protocol: The pickle protocol for these objects.
        allow_pickle: Whether the pickle codec may be used.
        compact: Leave out bytes of a storage that no tensor shows.
        skip: The ``torch.serialization.skip_data`` that is active in the caller's thread. Storages
            are sent like those on ``meta``, since a stream has no gaps that could be filled later.

    Returns:
        The parts of the object.

    Raises:
        ValueError: The object needs the pickle codec, and ``allow_pickle`` is False.
    """
    codec, table, skeleton = _encode(obj, skip, allow_pickle, pickle_module, pickle_protocol)
    for tensor in table.kept:
        # When torch serializes, it drops backward hooks with this warning.
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
        without_gaps(table.tensors, table.storages, table.locations, table.direct_storages)
        if compact
        else ({}, 0)
    )
    versions = Versions([*table.kept, *table.without_row], table.tensors)
    direct_storages = frozenset(table.direct_storages)
    return Flattened(header, skeleton, table.sources, parts, left_out, direct_storages, versions)


def _encode(
    obj: object,
    skip: torch.serialization.skip_data | None,
    allow_pickle: bool,
    pickle_module: Any,
    pickle_protocol: int,
) -> tuple[Codec, Table, bytes]:
    """Write the skeleton with the tree codec or, if that cannot carry the object, as a pickle."""
    table = Table(skip)
    try:
        return "tree", table, tree_codec.encode(obj, table)
    except tree_codec.NotATreeError as reason:
        if not allow_pickle:
            raise ValueError(
                f"allow_pickle is False, and the object needs pickle: {reason}"
            ) from None
        table = Table(skip)
        # The mode is entered in this thread as well: in it, torch refuses objects that it cannot
        # send without their bytes.
        with contextlib.nullcontext() if skip is None else skip:
            skeleton = pickle_codec.dump(
                obj, table, pickle_module=pickle_module, pickle_protocol=pickle_protocol
            )
        _add_names(obj, table)
        return "pickle", table, skeleton


def flatten_specs(
    specs: Mapping[str, TensorSpec], *, chunk_size: int, metadata: Mapping[str, str], producer: str
) -> Flattened:
    """Take apart a dict of tensors that do not exist yet.

    Args:
        specs: Shape and dtype of each tensor, by name.
        chunk_size: Bytes of a chunk of the payload.
        metadata: The texts for the header.
        producer: Name and version of the sender, for the header.

    Returns:
        The parts, with storages on ``meta``.

    Raises:
        ValueError: A tensor of a quantized dtype, or of one that the format lacks.
    """
    tensors = {}
    for name, spec in specs.items():
        if spec.dtype not in DTYPE_NAMES or DTYPES[DTYPE_NAMES[spec.dtype]].kind == "quantized":
            raise ValueError(f"specs[{name!r}] has dtype {spec.dtype}, which specs cannot have")
        tensors[name] = torch.empty(spec.shape, dtype=spec.dtype, device=META_LOCATION)
    parts = flatten(tensors, chunk_size=chunk_size, metadata=metadata, producer=producer)
    # The devices of the tensors are not known yet; the receiver places them on the CPU by default.
    return Flattened(
        msgspec.structs.replace(parts.header, locations=["cpu"] * bool(specs)),
        parts.skeleton,
        parts.storages,
    )


def is_small(obj: object) -> bool:
    """Whether taking an object apart takes no longer than starting a worker thread.

    Only built-in containers are examined; an object of another class counts as large.
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
    """Add names to the rows: their paths in dicts, other mappings, lists and tuples.

    Unlike in the tree codec, tensors in a set, or in ``_metadata``, get no name (SPEC.md section
    5.4).
    """
    for path, tensor in walk(obj):
        table.name(tensor, path)
