"""Every field of the header at and beyond its bounds, and every rule of section 5.5 of SPEC.md.

Headers are packed from lists, so that each test changes one item of a valid header.
"""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from aiotorchio.errors import AiotorchioError, InvalidObjectError, LimitExceeded, ProtocolError
from aiotorchio.limits import Limits
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import (
    Header,
    StorageRow,
    TensorRow,
    decode_header,
    describe,
    encode_header,
)
from aiotorchio.wire.layout import Layout
from aiotorchio.wire.validation import validate
from tests.support.frames import LIMITS, NONCE, fields, pack

INT64_MAX = 2**63 - 1
# Levels of nesting: more than any header has, but too few to harm a recursive decoder.
DEEP = 300
AT = 48  # where the header begins in a message


def check(items: Any, limits: Limits = LIMITS) -> tuple[Header, Layout]:
    data = items if isinstance(items, bytes) else pack(items)
    header = decode_header(data, limits, offset=AT)
    return header, validate(header, limits, offset=AT)


def refuse(
    kind: type[AiotorchioError], items: Any, entry: str | None = "header", limits: Limits = LIMITS
) -> AiotorchioError:
    with pytest.raises(AiotorchioError) as caught:
        check(items, limits)
    assert type(caught.value) is kind, caught.value
    assert caught.value.offset == AT
    assert caught.value.entry == entry
    return caught.value


def replace(items: Any, path: tuple[int, ...], value: Any) -> list[Any]:
    """Return a copy with one item replaced."""
    copy: list[Any] = list(items)
    first, *rest = path
    copy[first] = replace(copy[first], tuple(rest), value) if rest else value
    return copy


def storage(row: list[Any]) -> list[Any]:
    return fields(storages=[row], tensors=[])


def tensor(
    dtype: str = "float32",
    shape: Any = (2,),
    stride: Any = (1,),
    *,
    offset: Any = 0,
    flags: Any = 0,
    nbytes: int = 8,
    unit: int = 0,
    location: str = "cpu",
    index: int = 0,
) -> list[Any]:
    return fields(
        locations=[location],
        storages=[[nbytes, unit, 0]],
        tensors=[[index, dtype, offset, list(shape), list(stride), flags, ["w"]]],
    )


TENSOR = "tensor 0 ('w')"


# Valid headers


def test_round_trip() -> None:
    header = Header(
        byteorder="big",
        nonce=NONCE,
        producer="p" * 256,
        metadata=[("a", "b"), ("", "é")],
        codec="pickle",
        chunk_size=4096,
        locations=["cpu", "meta"],
        storages=[StorageRow(3, 1, 0), StorageRow(INT64_MAX, 8, 1)],
        tensors=[TensorRow(0, "uint8", 1, (2,), (1,), 0, ["x", "y"])],
    )
    assert decode_header(encode_header(header), LIMITS) == header
    assert validate(header, LIMITS).total == 3


def test_it_is_an_array_of_nine_in_the_order_of_the_specification() -> None:
    items = fields()
    header, _ = check(items)
    assert msgspec.msgpack.decode(encode_header(header)) == items


def test_wide_integers_are_accepted() -> None:
    wide = pack(fields(storages=[], tensors=[], chunk_size=2**32)).replace(
        pack(2**32), b"\xcf" + (4096).to_bytes(8, "big")
    )
    assert check(wide)[0].chunk_size == 4096


@pytest.mark.parametrize("count", [15, 16, 2**16])
def test_every_width_of_an_array_head(count: int) -> None:
    items = fields(storages=[[0, 1, 0]] * count, tensors=[])
    assert len(check(items, Limits(entries=count))[0].storages) == count
    error = refuse(LimitExceeded, items, limits=Limits(entries=count - 1))
    assert error.message == f"the header has more than {count - 1} storages (Limits.entries)"


@pytest.mark.parametrize("name", ["metadata", "locations"])
def test_the_error_names_the_bound_in_force(name: str) -> None:
    items = fields(**{name: [0] * (2**16 + 1)})
    error = refuse(LimitExceeded, items)
    assert error.message == f"the header has too many {name}: the format allows at most 65536"
    error = refuse(LimitExceeded, items, limits=Limits(entries=2**16))
    assert error.message == f"the header has more than 65536 {name} (Limits.entries)"


# Types and fixed bounds of every field

SIZES = [(7, 0, 0), (7, 0, 2), (8, 0, 0), (8, 0, 2), (8, 0, 3, 0), (8, 0, 4, 0)]
INTEGERS = [(5,), (7, 0, 1), (8, 0, 5), *SIZES]
TEXTS = [(0,), (2,), (3, 0, 0), (3, 0, 1), (4,), (6, 0), (8, 0, 1), (8, 0, 6, 0)]
ARRAYS = [(3,), (3, 0), (6,), (7,), (7, 0), (8,), (8, 0), (8, 0, 3), (8, 0, 4), (8, 0, 6)]
NO_INTEGERS = [
    *(-1, -33, -(2**15) - 1, -(2**31) - 1, -(2**63), 2**63, 2**64 - 1, 1.0, 0.5, float("nan")),
    *(True, None, "1", b"1", [], [1], {}, {0: 0}, msgspec.msgpack.Ext(1, b"")),
]
NO_TEXTS: list[Any] = [
    0,
    -1,
    1.0,
    True,
    None,
    b"little",
    [],
    ["little"],
    {},
    msgspec.msgpack.Ext(1, b""),
]
NO_ARRAYS = [0, 1.0, True, None, "", "little", b"", {}, {0: 0}, msgspec.msgpack.Ext(1, b"")]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *itertools.product(INTEGERS, NO_INTEGERS),
        *itertools.product(TEXTS, NO_TEXTS),
        *itertools.product(ARRAYS, NO_ARRAYS),
        *itertools.product([(1,)], [*NO_TEXTS[:5], "0" * 16, b"", bytes(15), bytes(17), [], {}]),
    ],
    # The same id in every process, because pytest-xdist compares the ids of its workers.
    ids=lambda value: "Ext" if isinstance(value, msgspec.msgpack.Ext) else repr(value),
)
def test_type(path: tuple[int, ...], value: Any) -> None:
    refuse(ProtocolError, replace(fields(), path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((0,), ""),
        ((0,), "Little"),
        ((0,), "middle"),
        ((2,), "x" * 257),
        ((3,), [["a"]]),
        ((3,), [["a", "b", "c"]]),
        ((3,), [[]]),
        ((4,), "Tree"),
        ((4,), "json"),
        ((5,), 0),
        ((5,), 4095),
        ((6,), ["x" * 257]),
        ((7, 0), [8, 4]),
        ((7, 0), [8, 4, 0, 0]),
        ((7, 0), []),
        ((7, 0, 1), 9),
        ((8, 0), [0, "float32", 0, [2], [1], 0]),
        ((8, 0), [0, "float32", 0, [2], [1], 0, [], None]),
        ((8, 0, 1), "x" * 257),
        ((8, 0, 5), 16),
    ],
    ids=repr,
)
def test_bounds(path: tuple[int, ...], value: Any) -> None:
    refuse(ProtocolError, replace(fields(), path, value))


@pytest.mark.parametrize("count", range(9))
def test_missing_fields(count: int) -> None:
    refuse(ProtocolError, fields()[:count])


def test_extra_field() -> None:
    refuse(ProtocolError, [*fields(), 0])


def test_map_for_the_array() -> None:
    names = ["byteorder", "nonce", "producer", "metadata", "codec", "chunk_size"]
    names += ["locations", "storages", "tensors"]
    refuse(ProtocolError, dict(zip(names, fields(), strict=True)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\xc1",
        b"\x90",
        b"\xdd\xff\xff\xff\xff",
        pack(fields()) + b"\0",
        pack(fields()) * 2,
        pack(fields())[:-1],
        pack(fields()).replace(b"\xa5tests", b"\xa5test\xff"),
        pack(fields()).replace(b"\xa5tests", b"\xa5te\xed\xa0\x80"),
        pack(fields()).replace(b"\xa1w", b"\xa1\x80"),
        b"\x91" * DEEP,
        b"\x99" + b"\x91" * DEEP,
        pack(fields()[:-1]).replace(b"\x98", b"\x99", 1) + b"\x91" * DEEP,
        pack(fields()[:-1]).replace(b"\x98", b"\x99", 1) + b"\x81\x00" * DEEP,
    ],
    ids=lambda data: f"{data[:8].hex()}...{len(data)}",
)
def test_not_messagepack(data: bytes) -> None:
    refuse(ProtocolError, data)


def test_no_memory_is_taken_for_the_claim_of_an_array() -> None:
    data = pack(fields())
    # The arrays of locations and of a shape.
    for claimed, most in ((b"\x91\xa3cpu", 2**16), (b"\x91\x02", 4096)):
        assert data.count(claimed) == 1
        for count, kind in ((most, ProtocolError), (most + 1, LimitExceeded)):
            head = b"\xdd" + count.to_bytes(4, "big")
            refuse(kind, data.replace(claimed, head + claimed[1:]))


@pytest.mark.parametrize(
    ("name", "item"),
    [("metadata", 0), ("locations", 0), ("storages", 0), ("tensors", 0)],
)
def test_tables_are_counted_before_their_items_are_looked_at(name: str, item: Any) -> None:
    limits = Limits(entries=9)
    refuse(LimitExceeded, fields(**{name: [item] * 10}), limits=limits)
    refuse(ProtocolError, fields(**{name: [item] * 9}), limits=limits)


# The header as a whole


@pytest.mark.parametrize("size", [4097, 4160 + 32, INT64_MAX])
def test_chunk_size_is_a_multiple_of_64(size: int) -> None:
    refuse(ProtocolError, fields(chunk_size=size))


def test_chunk_size_has_a_limit() -> None:
    assert check(fields(chunk_size=8192), Limits(chunk_nbytes=8192))
    refuse(LimitExceeded, fields(chunk_size=8256), limits=Limits(chunk_nbytes=8192))
    refuse(LimitExceeded, fields(chunk_size=2**63 - 64))


def test_duplicate_key() -> None:
    assert check(fields(metadata=[["a", "x"], ["b", "x"]]))
    refuse(ProtocolError, fields(metadata=[["a", "x"], ["b", "x"], ["a", "x"]]))


@pytest.mark.parametrize("location", [1, 2**32, INT64_MAX])
def test_location_out_of_the_table(location: int) -> None:
    refuse(ProtocolError, storage([8, 4, location]), "storage 0")


@pytest.mark.parametrize("unit", [3, 5, 6, 7])
def test_unit(unit: int) -> None:
    refuse(ProtocolError, storage([8, unit, 0]), "storage 0")


@pytest.mark.parametrize("unit", [0, 1, 2, 4, 8])
def test_good_units(unit: int) -> None:
    assert check(storage([7, unit, 0]))


def test_total() -> None:
    limits = Limits(total_nbytes=128)
    assert check(fields(storages=[[64, 1, 0], [64, 1, 0]], tensors=[]), limits)[1].total == 128
    # Padding counts.
    refuse(LimitExceeded, fields(storages=[[1, 1, 0]] * 3, tensors=[]), limits=limits)
    refuse(LimitExceeded, storage([129, 1, 0]), limits=limits)
    refuse(LimitExceeded, storage([2**40 + 1, 1, 0]))
    refuse(LimitExceeded, storage([INT64_MAX, 1, 0]))
    refuse(LimitExceeded, fields(storages=[[INT64_MAX, 1, 0]] * 1000, tensors=[]))


def test_chunks_fit_their_field() -> None:
    limits = Limits(total_nbytes=INT64_MAX)
    largest = (2**32 - 1) * 4096
    assert check(storage([largest, 1, 0]), limits)[1].chunks == 2**32 - 1
    refuse(ProtocolError, storage([largest + 1, 1, 0]), limits=limits)


def test_meta_takes_no_room() -> None:
    items = fields(
        locations=["meta", "cpu"],
        storages=[[INT64_MAX, 1, 0], [3, 1, 1], [INT64_MAX, 1, 0], [2, 1, 1]],
        tensors=[],
    )
    layout = check(items)[1]
    assert layout.nbytes == [0, 3, 0, 2]
    assert layout.total == 66


# Tensor rows


@pytest.mark.parametrize(
    ("kind", "items"),
    [
        (ProtocolError, tensor(index=1)),
        (ProtocolError, tensor(index=INT64_MAX)),
        (ProtocolError, tensor("float33")),
        (ProtocolError, tensor("")),
        (ProtocolError, tensor("torch.float32")),
        (ProtocolError, tensor(unit=8)),
        (ProtocolError, tensor("complex64", [1], unit=8)),
        (InvalidObjectError, tensor("qint8")),
        (InvalidObjectError, tensor("quint4x2")),
        (InvalidObjectError, tensor(shape=[2], stride=[])),
        (InvalidObjectError, tensor(shape=[], stride=[1])),
        (InvalidObjectError, tensor(shape=[0], stride=[1, 1])),
        (LimitExceeded, tensor(shape=[1] * 65, stride=[1] * 65)),
        (LimitExceeded, tensor(shape=[1] * 5000, stride=[0] * 5000)),
        (LimitExceeded, tensor(shape=[0] * 65, stride=[0] * 65)),
        (InvalidObjectError, tensor("int32", flags=1)),
        (InvalidObjectError, tensor("bool", flags=1)),
        (InvalidObjectError, tensor("bits8", flags=3)),
        (InvalidObjectError, tensor("int32", flags=8)),
        (InvalidObjectError, tensor("float32", flags=4)),
        (InvalidObjectError, tensor("int64", [1], flags=4)),
        # Stride 0 with sizes whose product wraps around in 64 bits, to 0 or to 1.
        (LimitExceeded, tensor("uint8", [2**40 + 1], [0], nbytes=1)),
        (LimitExceeded, tensor(shape=[2**38 + 1], stride=[0])),
        (LimitExceeded, tensor(shape=[2**32, 2**32], stride=[0, 0])),
        (LimitExceeded, tensor(shape=[INT64_MAX, INT64_MAX], stride=[0, 0])),
        (LimitExceeded, tensor("uint8", [2**62, 4], [0, 0])),
        (LimitExceeded, tensor(shape=[2**62, 2**62], stride=[0, 0], location="meta")),
        (LimitExceeded, tensor("float16", [2**62], [0], location="meta")),
        # One element too many, for every field that can cause it.
        (InvalidObjectError, tensor(shape=[3])),
        (InvalidObjectError, tensor(offset=1)),
        (InvalidObjectError, tensor(stride=[2])),
        (InvalidObjectError, tensor(shape=[], stride=[], offset=2)),
        (InvalidObjectError, tensor(nbytes=7)),
        (InvalidObjectError, tensor(nbytes=0)),
        (InvalidObjectError, tensor("float64", [2])),
        (InvalidObjectError, tensor(shape=[2, 2], stride=[1, 1])),
        (InvalidObjectError, tensor(offset=INT64_MAX)),
        (InvalidObjectError, tensor(stride=[INT64_MAX])),
        (InvalidObjectError, tensor("uint8", [2, 2, 2], [INT64_MAX] * 3, offset=INT64_MAX)),
        # 2**62 * 4 wraps around to 0.
        (InvalidObjectError, tensor(stride=[2**62])),
        (InvalidObjectError, tensor(offset=2**62)),
        (InvalidObjectError, tensor(location="meta", nbytes=7)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value[8])[:60],
)
def test_bad_row(kind: type[AiotorchioError], items: Any) -> None:
    _, dtype, _, shape, *_ = items[8][0]
    # The decoder refuses these two faults before there are rows to name.
    decoded = dtype in DTYPES and len(shape) <= 4096
    refuse(kind, items, TENSOR if decoded else "header")


@pytest.mark.parametrize(
    "items",
    [
        tensor(),
        tensor(unit=4),
        tensor("complex64", [1], unit=4),
        tensor(offset=1, shape=[1]),
        tensor(shape=[], stride=[], offset=1),
        tensor(shape=[2**38], stride=[0]),
        tensor("uint8", [2**40], [0], nbytes=1),
        tensor(shape=[1] * 64, stride=[INT64_MAX] * 64),
        tensor(shape=[2, 2], stride=[0, 1]),
        tensor("uint8", [INT64_MAX], [0], location="meta"),
        tensor("uint8", [2**62], [1], location="meta", nbytes=2**62),
        tensor(nbytes=9),
        # Without elements, offset and strides reach no byte.
        tensor(shape=[0], offset=INT64_MAX, stride=[INT64_MAX], nbytes=0),
        tensor(shape=[INT64_MAX, INT64_MAX, 0], stride=[0, 0, 0]),
        tensor(flags=1),
        tensor(flags=3 | 8),
        tensor("int32", flags=2),
        tensor("complex64", [1], flags=15),
    ],
    ids=lambda items: str(items[8])[:60],
)
def test_good_row(items: Any) -> None:
    assert check(items)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(name: str) -> None:
    dtype = DTYPES[name]
    items = tensor(name, [3], nbytes=3 * dtype.itemsize, unit=dtype.unit)
    if dtype.kind == "quantized":
        refuse(InvalidObjectError, items, TENSOR)
        return
    assert check(items)
    refuse(InvalidObjectError, replace(items, (7, 0, 0), 3 * dtype.itemsize - 1), TENSOR)
    flags = {1: ("float", "complex"), 2: (dtype.kind,), 4: ("complex",), 8: ("float", "complex")}
    for flag, kinds in flags.items():
        flagged = replace(items, (8, 0, 5), flag)
        if dtype.kind in kinds:
            assert check(flagged)
        else:
            refuse(InvalidObjectError, flagged, TENSOR)


def test_dims_limit() -> None:
    items = tensor(shape=[1, 2, 1], stride=[0, 1, 0])
    assert check(items, Limits(dims=3))
    refuse(LimitExceeded, items, TENSOR, Limits(dims=2))


def test_contiguous_size_is_bounded_by_the_total() -> None:
    items = tensor(shape=[4], stride=[0])
    assert check(items, Limits(total_nbytes=16))
    error = refuse(LimitExceeded, items, TENSOR, Limits(total_nbytes=15))
    assert "Limits.expanded_nbytes allows 15" in error.message


def test_texts_that_take_far_more_memory_than_bytes() -> None:
    """A short text takes one byte in the header, but 64 bytes in memory."""
    row = [0, "uint8", 0, [8], [1], 0, [""] * 2**18]
    # Each row is within its bounds; only the sum of both rows is too large.
    assert check(fields(storages=[[8, 1, 0]], tensors=[row]))
    items = fields(storages=[[8, 1, 0]], tensors=[row, row])
    assert "short texts" in refuse(LimitExceeded, items).message


def test_the_first_bad_row_is_named() -> None:
    good, bad = [0, "uint8", 0, [1], [1], 0, ["good"]], [0, "uint8", 0, [9], [1], 0, []]
    items = fields(storages=[[8, 1, 0]], tensors=[good, bad, [9, *bad[1:]]])
    error = refuse(InvalidObjectError, items, "tensor 1")
    assert (
        str(error)
        == f"the tensor reaches byte 9 of storage 0, which has 8 bytes (at tensor 1, byte {AT})"
    )


# The order of the checks when several fail


def test_order_of_several_faults() -> None:
    """Each fault is added to those before it, and the error names the newest."""
    limits = Limits(chunk_nbytes=2**16, total_nbytes=2**20, dims=2, entries=4)
    items = fields(storages=[[8, 1, 0]], tensors=[[0, "uint8", 0, [1, 8], [0, 1], 0, ["w"]]])
    faults: list[tuple[tuple[int, ...], Any, type[AiotorchioError], str]] = [
        ((8, 0, 2), 9, InvalidObjectError, "reaches"),
        ((8, 0, 3), [2**62, 1], LimitExceeded, "contiguous"),
        ((8, 0, 5), 4, InvalidObjectError, "conjugate"),
        ((8, 0, 5), 9, InvalidObjectError, "gradients"),
        ((8, 0), [0, "uint8", 9, [1, 1, 2**62], [1] * 3, 9, ["w"]], LimitExceeded, "3 dimensions"),
        ((8, 0, 4), [1], InvalidObjectError, "strides"),
        ((7, 0, 1), 2, ProtocolError, "2-byte numbers"),
        ((8, 0, 1), "quint8", InvalidObjectError, "scale"),
        ((8, 0, 0), 1, ProtocolError, "storage 1, but the message has 1"),
        ((7, 0, 0), 2**60, LimitExceeded, "payload"),
        ((7, 0, 1), 3, ProtocolError, "unit .* not 3"),
        ((7, 0, 2), 1, ProtocolError, "location 1, but the message has 1"),
        ((3,), [["a", ""], ["a", ""]], ProtocolError, "duplicate key"),
        ((5,), 2**20, LimitExceeded, "chunks of"),
        ((5,), 2**20 + 1, ProtocolError, "multiple"),
        # Faults that are found in the order of the bytes.
        ((8, 0, 1), "?", ProtocolError, "the header is malformed: Invalid enum value '?'"),
        ((7,), [0] * 5, LimitExceeded, "more than 4 storages"),
        ((4,), "json", ProtocolError, "the header is malformed: Invalid enum value 'json'"),
        ((3,), [0] * 5, LimitExceeded, "more than 4 metadata"),
        ((2,), None, ProtocolError, "malformed"),
    ]
    for path, value, kind, words in faults:
        items = replace(items, path, value)
        with pytest.raises(AiotorchioError, match=words) as caught:
            check(items, limits)
        assert type(caught.value) is kind


# The layout


def layout_of(*sizes: int, chunk_size: int = 4096) -> Layout:
    return check(fields(storages=[[n, 1, 0] for n in sizes], tensors=[], chunk_size=chunk_size))[1]


@pytest.mark.parametrize(
    ("sizes", "offsets", "total"),
    [
        ((), [], 0),
        ((0,), [0], 0),
        ((0, 0, 0), [0, 0, 0], 0),
        ((1,), [0], 1),
        ((64, 1), [0, 64], 65),
        ((65, 63, 1), [0, 128, 192], 193),
        ((1, 0, 1), [0, 64, 64], 65),
        ((0, 1), [0, 0], 1),
        ((1, 0), [0, 64], 1),
        ((4096, 0, 0), [0, 4096, 4096], 4096),
    ],
)
def test_layout(sizes: tuple[int, ...], offsets: list[int], total: int) -> None:
    layout = layout_of(*sizes)
    assert layout.offsets == offsets
    assert layout.nbytes == list(sizes)
    assert layout.total == total


@pytest.mark.parametrize(
    ("total", "chunks"),
    [
        (0, []),
        (1, [(0, 1)]),
        (4096, [(0, 4096)]),
        (4097, [(0, 4096), (4096, 1)]),
        (8192, [(0, 4096), (4096, 4096)]),
        (8200, [(0, 4096), (4096, 4096), (8192, 8)]),
    ],
)
def test_chunks(total: int, chunks: list[tuple[int, int]]) -> None:
    layout = layout_of(total)
    assert layout.chunks == len(chunks)
    assert [layout.chunk_range(n) for n in range(layout.chunks)] == chunks


def test_entry_at() -> None:
    tensors = [
        [0, "uint8", 0, [1], [1], 0, []],
        [3, "uint8", 0, [1], [1], 0, ["w", "again"]],
        [3, "uint8", 0, [1], [1], 0, ["other"]],
    ]
    sizes = (65, 10, 0, 3)
    layout = check(fields(storages=[[n, 1, 0] for n in sizes], tensors=tensors))[1]
    assert layout.entry_at(0) == layout.entry_at(64) == "storage 0, tensor 0"
    assert layout.entry_at(128) == "storage 1"
    # Not the empty storage at the same offset.
    assert layout.entry_at(192) == layout.entry_at(194) == "storage 3, tensor 1 ('w')"


def test_describe() -> None:
    row = TensorRow(0, "uint8", 0, (), (), 0, [])
    assert describe(row, 3) == "tensor 3"
    row.names.append("a'b")
    assert describe(row, 3) == 'tensor 3 ("a\'b")'


def test_layouts_are_looked_up_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of numbers are predictable: a sender could choose many layouts with equal hashes."""
    period = 2**61 - 1
    strides = [[1, 1], [1, 1 + period], [1 + period, 1], [1 + period, 1 + period]]
    assert len({hash(tuple(stride)) for stride in strides}) == 1
    encoded: list[bytes] = []

    class Encoder:
        def encode(self, layout: Any) -> bytes:
            encoded.append(msgspec.msgpack.encode(layout))
            return encoded[-1]

    rows = [[0, "uint8", 0, [0, 1], stride, 0, []] for stride in strides]
    sent = pack(fields(storages=[[0, 1, 0]], tensors=rows))
    monkeypatch.setattr("aiotorchio.wire.validation._encoder", Encoder())
    check(sent, Limits())
    assert len({hash(key) for key in encoded}) == len(strides)


def test_more_layouts_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotorchio.wire.validation._REACHES_MAX", 3)
    rows = [[0, "uint8", 0, [n % 10], [1], 0, []] for n in range(100)]
    check(fields(storages=[[9, 1, 0]], tensors=rows), Limits())
    rows[55] = [0, "uint8", 5, [5], [1], 0, []]
    refuse(
        InvalidObjectError,
        fields(storages=[[9, 1, 0]], tensors=rows),
        entry="tensor 55",
        limits=Limits(),
    )


@pytest.mark.parametrize(
    ("known", "row", "reason"),
    [
        ([0, "uint8", 0, [4], [1], 0, []], [1, "uint8", 0, [4], [1], 0, []], "refers to storage 1"),
        ([0, "uint8", 0, [4], [1], 0, []], [0, "uint8", 6, [4], [1], 0, []], "reaches byte 10"),
        ([0, "uint8", 0, [0], [1], 0, []], [0, "int8", 0, [10], [1], 0, []], "reaches byte 10"),
    ],
)
def test_the_place_of_a_known_layout_is_looked_at(
    known: list[Any], row: list[Any], reason: str
) -> None:
    rows = [known, known, row]
    with pytest.raises(AiotorchioError, match=reason):
        check(fields(storages=[[9, 1, 0]], tensors=rows))


def test_a_known_layout_on_meta_has_the_limit_of_64_bits() -> None:
    rows = [[n, "uint8", 0, [2**62, 2], [0, 0], 0, []] for n in (0, 1)]
    header = fields(locations=["cpu", "meta"], storages=[[1, 1, 0], [1, 1, 1]], tensors=rows)
    error = refuse(LimitExceeded, header, entry="tensor 1", limits=Limits(total_nbytes=2**70))
    assert f"the format allows at most {2**63 - 1}" in error.message
