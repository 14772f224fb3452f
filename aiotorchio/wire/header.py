"""The header: the tables of storages and tensors, and their encoding (SPEC.md section 5).

``decode_header`` checks the types of the fields; ``validation.validate`` must check the numbers.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from aiotorchio.common.gc_pause import gc_paused
from aiotorchio.common.interrupt import check_interrupt
from aiotorchio.errors import LimitExceeded, ProtocolError, printable
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
    "StorageRow",
    "TensorRow",
    "decode_header",
    "describe",
    "encode_header",
    "shortened",
]

ALIGNMENT = 64
CHUNK_SIZE_MIN = 4096
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


def describe(row: TensorRow, index: int) -> str:
    """Words for one tensor in an error."""
    return f"tensor {index} ({shortened(row.names[0])!r})" if row.names else f"tensor {index}"


def shortened(name: str) -> str:
    """As much of a name as a person reads: a peer may have sent megabytes, or anything else."""
    return printable(name if len(name) <= _NAME_SHOWN else name[:_NAME_SHOWN] + "...")
