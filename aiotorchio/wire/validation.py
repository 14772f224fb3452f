"""Checks of everything that the numbers of a header promise (SPEC.md section 5.5).

In: a header from ``decode_header``, whose types are right. Out: its ``Layout``, or an error, before
any memory is allocated for the message. All other packages rely on these checks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from aiotorchio.common.interrupt import interruptible
from aiotorchio.errors import InvalidObjectError, LimitExceeded, ProtocolError
from aiotorchio.limits import Limits
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import (
    ALIGNMENT,
    CONJUGATE,
    INT64_MAX,
    META_LOCATION,
    MIXED_UNITS,
    NEGATIVE,
    REQUIRES_GRAD,
    Header,
    TensorRow,
    describe,
)
from aiotorchio.wire.layout import Layout

__all__ = ["validate"]

CHUNKS_MAX = 2**32 - 1
# More than any model has; a peer may send a million.
_REACHES_MAX = 1000

_encoder = msgspec.msgpack.Encoder()


def validate(header: Header, limits: Limits, *, offset: int = 0) -> Layout:
    """Check everything that a decoded header claims (SPEC.md section 5.5).

    Args:
        header: As ``decode_header`` returned it.
        limits: What the receiver accepts.
        offset: Byte of the message where the header begins, for errors.

    Returns:
        Where each storage lies in the payload.

    Raises:
        ProtocolError: A number points outside its table, or a value is unknown.
        LimitExceeded: More than ``limits`` allow.
        InvalidObjectError: A tensor that its storage or its dtype cannot carry.
    """
    try:
        return _validate(header, limits)
    except (ProtocolError, LimitExceeded, InvalidObjectError) as error:
        error.offset = offset
        raise


def _validate(header: Header, limits: Limits) -> Layout:
    if header.chunk_size % ALIGNMENT:
        raise ProtocolError(
            f"chunk size {header.chunk_size} is not a multiple of {ALIGNMENT}", entry="header"
        )
    if header.chunk_size > limits.chunk_nbytes:
        raise LimitExceeded(
            f"chunks of {header.chunk_size} bytes, {limits.chunk_nbytes} allowed "
            "(Limits.chunk_nbytes)",
            entry="header",
        )
    keys = [key for key, _ in header.metadata]
    if len(set(keys)) != len(keys):
        raise ProtocolError("duplicate key in the metadata", entry="header")
    for index, storage in interruptible(enumerate(header.storages)):
        if storage.location >= len(header.locations):
            raise ProtocolError(
                f"location {storage.location} of {len(header.locations)}", entry=f"storage {index}"
            )
        if storage.unit not in (MIXED_UNITS, 1, 2, 4, 8):
            raise ProtocolError(f"unit of {storage.unit} bytes", entry=f"storage {index}")
    layout = Layout(header)
    if layout.total > limits.total_nbytes:
        raise LimitExceeded(
            f"payload of {layout.total} bytes, {limits.total_nbytes} allowed (Limits.total_nbytes)",
            entry="header",
        )
    if layout.chunks > CHUNKS_MAX:
        raise ProtocolError(f"{layout.chunks} chunks, {CHUNKS_MAX} possible", entry="header")
    storages, dense_max = header.storages, min(limits.dense_nbytes, INT64_MAX)
    # Models repeat few layouts: of one that was found valid, only its place is looked at. By its
    # bytes: a peer can find any number of tuples of numbers that have one hash.
    reaches: dict[bytes, _Reach] = {}
    for index, row in interruptible(enumerate(header.tensors)):
        key = _encoder.encode((row.dtype, row.flags, row.shape, row.stride))
        reach = reaches.get(key)
        if reach is not None and row.storage < len(storages):
            storage = storages[row.storage]
            if (
                (storage.unit == reach.unit or storage.unit == MIXED_UNITS)
                and reach.dense <= dense_max
                and (row.offset + reach.elements) * reach.itemsize <= storage.nbytes
            ):
                continue
        reach = _validate_row(row, index, header, limits)
        if len(reaches) < _REACHES_MAX:
            reaches[key] = reach
    return layout


class _Reach(NamedTuple):
    """What a layout needs of its storage."""

    unit: int
    itemsize: int
    # From its first element to behind its last.
    elements: int
    # Bytes when it is contiguous.
    dense: int


def _validate_row(row: TensorRow, index: int, header: Header, limits: Limits) -> _Reach:
    if row.storage >= len(header.storages):
        raise ProtocolError(
            f"storage {row.storage} of {len(header.storages)}", entry=describe(row, index)
        )
    dtype = DTYPES[row.dtype]
    if dtype.kind == "quantized":
        raise InvalidObjectError(f"{row.dtype} without a scale", entry=describe(row, index))
    storage = header.storages[row.storage]
    if storage.unit not in (MIXED_UNITS, dtype.unit):
        raise ProtocolError(
            f"{row.dtype} in storage {row.storage} of {storage.unit}-byte numbers",
            entry=describe(row, index),
        )
    if len(row.shape) != len(row.stride):
        raise InvalidObjectError(
            f"{len(row.shape)} dimensions and {len(row.stride)} strides",
            entry=describe(row, index),
        )
    if len(row.shape) > limits.dims:
        raise LimitExceeded(
            f"{len(row.shape)} dimensions, {limits.dims} allowed (Limits.dims)",
            entry=describe(row, index),
        )
    if row.flags & (REQUIRES_GRAD | NEGATIVE) and dtype.kind not in ("float", "complex"):
        raise InvalidObjectError(
            f"{row.dtype} can neither require gradients nor be a negative view",
            entry=describe(row, index),
        )
    if row.flags & CONJUGATE and dtype.kind != "complex":
        raise InvalidObjectError(f"conjugate view of {row.dtype}", entry=describe(row, index))
    count = math.prod(row.shape)
    dense = count * dtype.itemsize
    if header.locations[storage.location] == META_LOCATION:
        limit = INT64_MAX
    else:
        limit = limits.dense_nbytes
    if dense > limit:
        raise LimitExceeded(
            f"{dense} bytes when contiguous, {limit} allowed (Limits.expanded_nbytes)",
            entry=describe(row, index),
        )
    elements = 0
    if count:
        elements = 1 + sum(
            (size - 1) * step for size, step in zip(row.shape, row.stride, strict=True)
        )
        end = (row.offset + elements) * dtype.itemsize
        if end > storage.nbytes:
            raise InvalidObjectError(
                f"reaches byte {end} of a storage of {storage.nbytes}", entry=describe(row, index)
            )
    return _Reach(dtype.unit, dtype.itemsize, elements, dense)
