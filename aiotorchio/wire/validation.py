"""Checks of the numbers of a header (SPEC.md section 5.5).

In: a header from ``decode_header``, whose fields have the right types. Out: its ``Layout``, or an
error, before memory for the message is allocated. The parser calls it; all other packages rely on
its checks.
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

# The flags that only floating-point and complex dtypes may have; and, by kind of dtype, those of
# them that it may not have.
_NUMBER_FLAGS = REQUIRES_GRAD | NEGATIVE | CONJUGATE
_WRONG_FLAGS = {"complex": 0, "float": CONJUGATE}

_encoder = msgspec.msgpack.Encoder()


def validate(header: Header, limits: Limits, *, offset: int = 0) -> Layout:
    """Check all numbers of a decoded header (SPEC.md section 5.5).

    Args:
        header: A header from ``decode_header``.
        limits: The limits of the receiver.
        offset: Byte of the message where the header begins, for errors.

    Returns:
        The layout of the payload.

    Raises:
        ProtocolError: A number refers to no entry of its table, or a value is unknown.
        LimitExceeded: The message has more than ``limits`` allow.
        InvalidObjectError: A tensor does not fit its storage or its dtype.
    """
    try:
        return _validate(header, limits)
    except (ProtocolError, LimitExceeded, InvalidObjectError) as error:
        error.offset = offset
        raise


def _validate(header: Header, limits: Limits) -> Layout:
    if header.chunk_size % ALIGNMENT:
        raise ProtocolError(
            f"the chunk size must be a multiple of {ALIGNMENT}, not {header.chunk_size}",
            entry="header",
        )
    if header.chunk_size > limits.chunk_nbytes:
        raise LimitExceeded(
            f"the message has chunks of {header.chunk_size} bytes, but Limits.chunk_nbytes is "
            f"{limits.chunk_nbytes}",
            entry="header",
        )
    keys = [key for key, _ in header.metadata]
    if len(set(keys)) != len(keys):
        raise ProtocolError("the metadata have a duplicate key", entry="header")
    for index, storage in interruptible(enumerate(header.storages)):
        if storage.location >= len(header.locations):
            raise ProtocolError(
                f"the storage refers to location {storage.location}, but the message has "
                f"{len(header.locations)} locations",
                entry=f"storage {index}",
            )
        if storage.unit not in (MIXED_UNITS, 1, 2, 4, 8):
            raise ProtocolError(
                f"the unit of the storage must be 0, 1, 2, 4 or 8 bytes, not {storage.unit}",
                entry=f"storage {index}",
            )
    layout = Layout(header)
    if layout.total > limits.total_nbytes:
        raise LimitExceeded(
            f"the payload has {layout.total} bytes, but Limits.total_nbytes is "
            f"{limits.total_nbytes}",
            entry="header",
        )
    if layout.chunks > CHUNKS_MAX:
        raise ProtocolError(
            f"the payload has {layout.chunks} chunks, but the format allows {CHUNKS_MAX}",
            entry="header",
        )
    storages, dense_max = header.storages, min(limits.dense_nbytes, INT64_MAX)
    # Models repeat few layouts: of a known valid layout, only the place is checked. The keys are
    # bytes, because a peer can find any number of tuples of numbers that have one hash.
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
    """The requirements of a tensor's layout on its storage."""

    unit: int
    itemsize: int
    # Extent of the tensor, in elements.
    elements: int
    # Bytes of the tensor if it were contiguous.
    dense: int


def _validate_row(row: TensorRow, index: int, header: Header, limits: Limits) -> _Reach:
    """Check a row whose layout is not known, and return the requirements of that layout."""
    if row.storage >= len(header.storages):
        raise ProtocolError(
            f"the tensor refers to storage {row.storage}, but the message has "
            f"{len(header.storages)} storages",
            entry=describe(row, index),
        )
    dtype = DTYPES[row.dtype]
    if dtype.kind == "quantized":
        raise InvalidObjectError(
            f"the tensor has the quantized dtype {row.dtype}, which needs a scale",
            entry=describe(row, index),
        )
    storage = header.storages[row.storage]
    if storage.unit not in (MIXED_UNITS, dtype.unit):
        raise ProtocolError(
            f"the tensor has dtype {row.dtype}, but storage {row.storage} has "
            f"{storage.unit}-byte numbers",
            entry=describe(row, index),
        )
    if len(row.shape) != len(row.stride):
        raise InvalidObjectError(
            f"the tensor has {len(row.shape)} dimensions but {len(row.stride)} strides",
            entry=describe(row, index),
        )
    if len(row.shape) > limits.dims:
        raise LimitExceeded(
            f"the tensor has {len(row.shape)} dimensions, but Limits.dims is {limits.dims}",
            entry=describe(row, index),
        )
    if row.flags & _WRONG_FLAGS.get(dtype.kind, _NUMBER_FLAGS):
        raise _flags_misfit(row, index)
    count = math.prod(row.shape)
    dense = count * dtype.itemsize
    is_meta = header.locations[storage.location] == META_LOCATION
    limit = INT64_MAX if is_meta else limits.dense_nbytes
    if dense > limit:
        bound = "the format allows at most" if is_meta else "Limits.expanded_nbytes allows"
        raise LimitExceeded(
            f"the tensor would have {dense} bytes if it were contiguous, but {bound} {limit}",
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
                f"the tensor reaches byte {end} of storage {row.storage}, which has "
                f"{storage.nbytes} bytes",
                entry=describe(row, index),
            )
    return _Reach(dtype.unit, dtype.itemsize, elements, dense)


def _flags_misfit(row: TensorRow, index: int) -> InvalidObjectError:
    """Make the error for a row with a flag that its dtype does not allow."""
    if DTYPES[row.dtype].kind != "float" and row.flags & (REQUIRES_GRAD | NEGATIVE):
        text = f"a tensor of dtype {row.dtype} can neither require gradients nor be a negative view"
    else:
        text = f"a tensor of dtype {row.dtype} cannot be a conjugate view"
    return InvalidObjectError(text, entry=describe(row, index))
