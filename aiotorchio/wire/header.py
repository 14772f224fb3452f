"""The header: the tables of storages and tensors, and their encoding (SPEC.md section 5).

In: a ``Header``, or the body of a header frame. Out: bytes, or a ``Header`` whose fields have the
right types; ``validation.validate`` must check the numbers. An error means that the bytes are no
header, or that they would take too much memory.
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
"""Unit of a storage with numbers of different sizes: its byte order cannot be converted."""

REQUIRES_GRAD, PARAMETER, CONJUGATE, NEGATIVE = 1, 2, 4, 8
_NAME_SHOWN = 200
# The most items that are decoded at once: during that time no other thread can run.
_DIMS_MAX, _NAMES_MAX, _TEXTS_MAX = 4096, 2**18, 2**16
# A text of three letters takes 64 bytes of memory. Other items take up to 17 times their size in a
# message, and honest headers 10 times; few of their bytes look like the heads of such texts.
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

    # Decoding a million rows takes half a second; this call of a Python function lets other threads
    # run. (A method that calls the function would take twice as long for each row.)
    __post_init__ = check_interrupt  # type: ignore[misc]


# gc=False, and tuples of numbers: with 10,000 rows the collector otherwise takes half of the time.
class TensorRow(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """One strided view of a storage; offset, shape and stride count elements."""

    storage: Size
    # The text of a Literal is not allocated again for each row.
    dtype: Dtype
    offset: Size
    shape: Annotated[tuple[Size, ...], msgspec.Meta(max_length=_DIMS_MAX)]
    stride: Annotated[tuple[Size, ...], msgspec.Meta(max_length=_DIMS_MAX)]
    flags: Annotated[int, msgspec.Meta(ge=0, le=15)]
    names: Annotated[list[str], msgspec.Meta(max_length=_NAMES_MAX)]

    __post_init__ = check_interrupt  # type: ignore[misc]


class Header(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The description of a message, which the receiver has before the payload."""

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
    """Return the header as MessagePack."""
    return _encoder.encode(header)


@functools.cache
def _decoder(entries: int) -> msgspec.msgpack.Decoder[tuple[Any, ...]]:
    """Make a decoder that refuses a table with more entries before it builds one of them."""
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
    # mypy cannot know this tuple.
    header: Any = tuple.__class_getitem__(tuple(kinds))
    return msgspec.msgpack.Decoder(header)


def decode_header(data: bytes, limits: Limits, *, offset: int = 0) -> Header:
    """Read a header; ``validate`` must follow.

    Args:
        data: The body of a header frame.
        limits: The limits of the receiver; here, ``entries`` counts.
        offset: Byte of the message where the header begins, for errors.

    Raises:
        ProtocolError: The bytes are not MessagePack, have other types or fields than SPEC.md
            allows, or go on after the header.
        LimitExceeded: A table has more entries than ``limits`` allow, or there are so many short
            texts that they take more memory than any honest header.
    """
    floor = bounds.BOUNDS.texts_floor
    if _short_texts(data) * _TEXT_NBYTES > floor + _TEXTS_PER_BYTE * len(data):
        raise LimitExceeded(
            f"the header has short texts that take more than {floor} bytes of memory and "
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
            text = _too_many(*many.groups(), entries=limits.entries)
            raise LimitExceeded(text, entry="header", offset=offset) from error
        raise ProtocolError(
            f"the header is malformed: {error}", entry="header", offset=offset
        ) from error


# The error of msgspec for an array that is too long, with its greatest length and its path.
_TOO_MANY = re.compile(
    r"Expected `array` of length <= (\d+) - at `\$\[(\d)\](?:\[[\d.]+\]\[(\d)\])?`"
)


def _too_many(most: str, field: str, column: str | None, *, entries: int) -> str:
    if column is not None:
        items = TensorRow.__struct_fields__[int(column)]
        return f"the header has a tensor with more than {most} items of {items}"
    items = Header.__struct_fields__[int(field)]
    if int(most) < entries:
        return f"the header has too many {items}: the format allows at most {most}"
    return f"the header has more than {most} {items} (Limits.entries)"


def _short_texts(data: bytes) -> int:
    """Count texts of up to three bytes; other bytes that look like their heads count, too."""
    return len(data) - len(data.translate(None, b"\xa0\xa1\xa2\xa3"))


def describe(row: TensorRow, index: int) -> str:
    """Return the name of a tensor for an error."""
    return f"tensor {index} ({shortened(row.names[0])!r})" if row.names else f"tensor {index}"


def shortened(name: str) -> str:
    """Return a printable name of bounded length: a peer may have sent megabytes of anything."""
    return printable(name if len(name) <= _NAME_SHOWN else name[:_NAME_SHOWN] + "...")
