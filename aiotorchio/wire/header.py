"""The header: who sends what, and the tables of storages and tensors (SPEC.md section 5).

``decode_header`` checks the types; ``validate`` checks everything that the numbers promise,
before anything is allocated for them. What both accept, memory/ and graph/ can rely on.
"""

from __future__ import annotations

import functools
import math
import re
from bisect import bisect_right
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec

from aiotorchio.common.gc_pause import gc_paused
from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.errors import InvalidObjectError, LimitExceeded, ProtocolError, printable
from aiotorchio.limits import Limits
from aiotorchio.wire import bounds
from aiotorchio.wire.dtypes import DTYPES

__all__ = [
    "ALIGNMENT",
    "CHUNK_SIZE_MIN",
    "CONJUGATE",
    "META_LOCATION",
    "MIXED_UNITS",
    "NEGATIVE",
    "PARAMETER",
    "REQUIRES_GRAD",
    "Codec",
    "Header",
    "Layout",
    "StorageRow",
    "TensorRow",
    "decode_header",
    "encode_header",
    "shortened",
    "validate",
]

ALIGNMENT = 64
CHUNK_SIZE_MIN = 4096
CHUNKS_MAX = 2**32 - 1
INT64_MAX = 2**63 - 1
META_LOCATION = "meta"
"""Storages with this location have a size and no bytes."""

MIXED_UNITS = 0
"""Unit of a storage that is viewed with numbers of different sizes: it cannot be swapped."""

REQUIRES_GRAD, PARAMETER, CONJUGATE, NEGATIVE = 1, 2, 4, 8
_NAME_SHOWN = 200
# Items that are decoded in one go, during which no other thread has its turn.
_DIMS_MAX, _NAMES_MAX, _TEXTS_MAX = 4096, 2**18, 2**16
# A text of three letters takes 64 bytes. Others, numbers and rows take up to 17 times what they are
# in a message, and honest headers 10 times; few of their bytes look like the heads of such texts.
_TEXT_NBYTES, _TEXTS_PER_BYTE = 64, 8
# More than any model has; a peer may send a million.
_REACHES_MAX = 1000

Codec = Literal["tree", "pickle"]
Size = Annotated[int, msgspec.Meta(ge=0, le=INT64_MAX)]
Text = Annotated[str, msgspec.Meta(max_length=256)]
if TYPE_CHECKING:
    Dtype = str
else:
    Dtype = Literal[*DTYPES]


class StorageRow(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """One range of memory."""

    nbytes: Size
    unit: Annotated[int, msgspec.Meta(ge=0, le=8)]
    location: Size

    # Code in Python lets other threads run: decoding a million rows takes half a second. (A method
    # that calls it would take twice as long, for each row.)
    __post_init__ = check_interrupt  # type: ignore[misc]


# gc=False, and tuples of numbers: with 10,000 rows the collector otherwise takes half of the time.
class TensorRow(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """One strided view of a storage; offset, shape and stride count elements."""

    storage: Size
    # A value that is listed is not made anew for each row.
    dtype: Dtype
    offset: Size
    shape: Annotated[tuple[Size, ...], msgspec.Meta(max_length=_DIMS_MAX)]
    stride: Annotated[tuple[Size, ...], msgspec.Meta(max_length=_DIMS_MAX)]
    flags: Annotated[int, msgspec.Meta(ge=0, le=15)]
    names: Annotated[list[str], msgspec.Meta(max_length=_NAMES_MAX)]

    __post_init__ = check_interrupt  # type: ignore[misc]


class Header(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """All that is known about a message before its payload."""

    byteorder: Literal["little", "big"]
    nonce: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    producer: Text
    metadata: list[tuple[str, str]]
    codec: Codec
    chunk_size: Annotated[int, msgspec.Meta(ge=CHUNK_SIZE_MIN, le=INT64_MAX)]
    locations: list[Text]
    storages: list[StorageRow]
    tensors: list[TensorRow]


_encoder = msgspec.msgpack.Encoder()


def encode_header(header: Header) -> bytes:
    """The header as MessagePack."""
    return _encoder.encode(header)


@functools.cache
def _decoder(entries: int) -> msgspec.msgpack.Decoder[tuple[Any, ...]]:
    """Reads a header whose tables have no more entries; says so before it builds any."""
    most = {
        "metadata": min(entries, _TEXTS_MAX),
        "locations": min(entries, _TEXTS_MAX),
        "storages": entries,
        "tensors": entries,
    }
    kinds = [
        Annotated[field.type, msgspec.Meta(max_length=most[field.name])]
        if field.name in most
        else field.type
        for field in msgspec.structs.fields(Header)
    ]
    # A tuple that mypy can't know.
    header: Any = tuple.__class_getitem__(tuple(kinds))
    return msgspec.msgpack.Decoder(header)


def decode_header(data: bytes, limits: Limits, *, offset: int = 0) -> Header:
    """Read a header; ``validate`` must follow.

    Args:
        data: The body of a header frame.
        limits: What the receiver accepts; here, how many entries a table has.
        offset: Byte of the message where the header begins, for errors.

    Raises:
        ProtocolError: Not MessagePack, other types or fields than SPEC.md has, left-over bytes.
        LimitExceeded: A table of more entries than ``limits`` allow, or so many texts of so few
            letters that they take more than any honest header.
    """
    floor = bounds.BOUNDS.texts_floor
    if _short_texts(data) * _TEXT_NBYTES > floor + _TEXTS_PER_BYTE * len(data):
        raise LimitExceeded(
            f"short texts that take more than {floor} bytes of memory and "
            f"{_TEXTS_PER_BYTE} for each byte of the header",
            entry="header",
            offset=offset,
        )
    try:
        with gc_paused():
            return Header(*_decoder(limits.entries).decode(data))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        many = _TOO_MANY.match(str(error))
        if many:
            raise LimitExceeded(_too_many(*many.groups()), entry="header", offset=offset) from error
        raise ProtocolError(f"malformed header: {error}", entry="header", offset=offset) from error


# What msgspec says of an array that is too long: how long it may be, and which one it is.
_TOO_MANY = re.compile(
    r"Expected `array` of length <= (\d+) - at `\$\[(\d)\](?:\[[\d.]+\]\[(\d)\])?`"
)


def _too_many(most: str, field: str, column: str | None) -> str:
    if column is not None:
        return f"a tensor with more than {most} items of {TensorRow.__struct_fields__[int(column)]}"
    return f"more than {most} {Header.__struct_fields__[int(field)]} (Limits.entries)"


def _short_texts(data: bytes) -> int:
    """Texts of up to three bytes, or more: other bytes can look like the heads of such texts."""
    return len(data) - len(data.translate(None, b"\xa0\xa1\xa2\xa3"))


class Layout:
    """Where each storage lies in the payload, one after the other at multiples of 64 bytes.

    Attributes:
        offsets: First byte of every storage in the payload; without meaning for one without bytes.
        nbytes: Bytes that every storage has in the payload: its size, or 0 on ``meta``.
        total: Size of the payload in bytes.
    """

    def __init__(self, header: Header) -> None:
        self.offsets: list[int] = []
        self.nbytes: list[int] = []
        self.chunk_size = header.chunk_size
        self._tensors = header.tensors
        end = 0
        for row in interruptible(header.storages):
            start = -(-end // ALIGNMENT) * ALIGNMENT
            nbytes = 0 if header.locations[row.location] == META_LOCATION else row.nbytes
            self.offsets.append(start)
            self.nbytes.append(nbytes)
            # A storage without bytes takes no room, not even that which aligns it.
            end = start + nbytes if nbytes else end
        self.total = end

    @property
    def chunks(self) -> int:
        """Number of chunks of the payload."""
        return -(-self.total // self.chunk_size)

    def chunk(self, index: int) -> tuple[int, int]:
        """First byte and length of one chunk."""
        start = index * self.chunk_size
        return start, min(self.chunk_size, self.total - start)

    def entry_at(self, offset: int) -> str:
        """Words for the storage that holds a byte of the payload, and for its first tensor."""
        index = bisect_right(self.offsets, offset) - 1
        row = next((n for n, row in enumerate(self._tensors) if row.storage == index), None)
        if row is None:
            return f"storage {index}"
        return f"storage {index}, {describe(self._tensors[row], row)}"


def describe(row: TensorRow, index: int) -> str:
    """Words for one tensor in an error."""
    return f"tensor {index} ({shortened(row.names[0])!r})" if row.names else f"tensor {index}"


def shortened(name: str) -> str:
    """As much of a name as a person reads: a peer may have sent megabytes, or anything else."""
    return printable(name if len(name) <= _NAME_SHOWN else name[:_NAME_SHOWN] + "...")


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
