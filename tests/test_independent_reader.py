"""The package and a reader written from SPEC.md alone agree on every message.

Both read golden vectors, messages of the package, damaged messages, and crafted ones.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import random
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import xxhash

import aiotorchio
from tests.support import independent_reader as independent
from tests.support.tiers import examples, some

VECTORS = Path(__file__).parent / "vectors"
NAMES = sorted(path.stem for path in VECTORS.glob("*.bin"))


def vector(name: str) -> tuple[bytes, dict[str, Any]]:
    description = json.loads((VECTORS / f"{name}.json").read_text("utf-8"))
    return (VECTORS / f"{name}.bin").read_bytes(), description


def by_independent(data: bytes, **limits: int) -> str:
    """The name of the error of the independent reader, or "" without an error."""
    try:
        independent.read(data, independent.Limits(**limits))
    except independent.AiotorchioError as error:
        return type(error).__name__
    return ""


def by_package(data: bytes, **limits: int) -> str:
    try:
        aiotorchio.load(io.BytesIO(data), limits=aiotorchio.Limits(**limits))
    except aiotorchio.AiotorchioError as error:
        return type(error).__name__
    except Exception as error:
        return f"not an AiotorchioError: {error!r}"
    return ""


# The golden vectors


def storage_bytes(description: dict[str, Any], nbytes: int) -> bytes:
    if "hex" in description:
        return bytes.fromhex(description["hex"])
    assert description["rule"] == "byte i is i modulo 251"
    return bytes(i % 251 for i in range(nbytes))


def plain_header(header: independent.Header) -> dict[str, Any]:
    return {
        "byteorder": header.byteorder,
        "nonce": header.nonce.hex(),
        "producer": header.producer,
        "metadata": [list(entry) for entry in header.metadata],
        "codec": header.codec,
        "chunk_size": header.chunk_size,
        "locations": header.locations,
        "storages": [vars(row) for row in header.storages],
        "tensors": [
            {**vars(row), **{key: list(getattr(row, key)) for key in ("shape", "stride", "names")}}
            for row in header.tensors
        ],
    }


def comparable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_vector(name: str) -> None:
    data, expected = vector(name)
    reader = independent.Reader(data + b"the next message")
    message = None
    if expected["abort"] is None:
        message = reader.read()
        consumed = message.consumed
    else:
        with pytest.raises(independent.RemoteAbort) as caught:
            reader.read()
        assert caught.value.reason == expected["abort"]["reason"]
        assert len(reader.chunks) == expected["abort"]["after_chunks"]
        consumed = caught.value.consumed
    assert consumed == len(data) == expected["nbytes"]
    assert {"version": 1, "flags": reader.flags} == expected["preface"]
    assert reader.message_id.hex() == expected["message_id"]
    assert reader.header is not None
    assert plain_header(reader.header) == expected["header"]
    assert reader.skeleton.hex() == expected["skeleton"]
    payload = expected["payload"]
    assert reader.header.layout() == (payload["offsets"], payload["nbytes"])
    assert [list(chunk) for chunk in reader.header.chunks()] == payload["chunks"]
    if message is None:
        return
    assert message.end.hex() == expected["end"]
    for row, got, want in zip(
        reader.header.storages, message.storages, payload["storages"], strict=True
    ):
        assert got == storage_bytes(want, row.nbytes)
    for number, values in enumerate(expected["values"]):
        if values is not None:
            found = message.values(number)
            assert found is not None
            assert [comparable(value) for value in found] == values


def test_every_tag() -> None:
    tree = independent.read(vector("every_tag")[0]).tree
    ordered = tree.pop("ordered")
    assert list(ordered.items()) == [("z", independent.Tensor(1)), ("a", []), (1, None)]
    assert ordered.metadata == [OrderedDict({"": {"version": 1}})]
    assert tree.pop("bare").metadata == []
    assert math.copysign(1, tree["complex"].imag) == -1
    size = tree.pop("size")
    assert type(size) is independent.Size and size == (2, 3)
    assert tree == {
        "list": [None, True, False, 0, -1, 2**64 - 1, -(2**63), 1.5, "", "é", b"", b"\xff"],
        "tuple": ((), (1, (2, [3]))),
        7: {},
        -1: {"a": {0: independent.Tensor(0)}},
        "set": {1, "a", (1, 2)},
        "empty": set(),
        "complex": complex(1.5, -0.0),
        "big": [2**64, -(2**63) - 1, -(2**127)],
        "dtype": independent.Dtype("bfloat16"),
        "quantized": independent.Dtype("quint8"),
        "device": independent.Device("cuda:1"),
    }


def test_persistent_ids() -> None:
    ids = independent.read(vector("pickle")[0]).persistent_ids
    assert ids == [0, independent.StorageId(0, None), independent.StorageId(0, "float32")]


# Messages of the package


def bytes_of(storage: torch.UntypedStorage) -> bytes:
    if storage.device.type == "meta":
        return b""
    return bytes(torch.empty(0, dtype=torch.uint8).set_(storage).tolist())


def flags_of(tensor: torch.Tensor) -> int:
    return (
        independent.REQUIRES_GRAD * tensor.requires_grad
        + independent.PARAMETER * isinstance(tensor, torch.nn.Parameter)
        + independent.CONJ * tensor.is_conj()
        + independent.NEG * tensor.is_neg()
    )


class Comparison:
    """Compares a message, as the independent reader parsed it, with the object that was sent."""

    def __init__(self, message: independent.Message) -> None:
        self.message = message
        self.rows: dict[int, int] = {}  # id of a tensor: its row
        self.storages: dict[int, int] = {}  # address of a storage object: its row

    def tensor(self, number: int, tensor: torch.Tensor) -> None:
        row = self.message.header.tensors[number]
        assert self.rows.setdefault(id(tensor), number) == number
        assert f"torch.{row.dtype}" == str(tensor.dtype)
        assert row.shape == tuple(tensor.shape)
        assert row.stride == tensor.stride()
        assert row.offset == tensor.storage_offset()
        assert row.flags == flags_of(tensor)
        storage = tensor.untyped_storage()
        assert self.storages.setdefault(storage._cdata, row.storage) == row.storage
        table = self.message.header.storages[row.storage]
        assert table.nbytes == storage.nbytes()
        assert self.message.header.locations[table.location] == str(tensor.device)
        assert table.unit in (0, independent.DTYPES[row.dtype][1])
        assert self.message.storages[row.storage] == bytes_of(storage)

    def node(self, got: Any, sent: Any) -> None:
        if isinstance(sent, torch.Tensor):
            assert type(got) is independent.Tensor
            self.tensor(got.row, sent)
        elif isinstance(sent, torch.Size):
            assert type(got) is independent.Size and tuple(got) == tuple(sent)
        elif isinstance(sent, torch.dtype):
            assert got == independent.Dtype(str(sent).removeprefix("torch."))
        elif isinstance(sent, torch.device):
            assert got == independent.Device(str(sent))
        elif isinstance(sent, dict):
            ordered = isinstance(sent, OrderedDict)
            assert [(type(key), key) for key in got] == [(type(key), key) for key in sent]
            for key, value in sent.items():
                self.node(got[key], value)
            if not ordered:
                assert type(got) is dict
            else:
                assert type(got) is independent.TorchOrderedDict
                metadata = [sent._metadata] if hasattr(sent, "_metadata") else []
                self.node(got.metadata, metadata)
        elif isinstance(sent, list | tuple):
            assert type(got) is type(sent) and len(got) == len(sent)
            for mine, theirs in zip(got, sent, strict=True):
                self.node(mine, theirs)
        else:
            assert type(got) is type(sent)
            assert got == sent or repr(got) == repr(sent) == "nan"


def model_state() -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    return model.state_dict()


def views() -> Any:
    base = torch.arange(24.0).reshape(4, 6)
    mixed = torch.arange(8, dtype=torch.int32)
    return {
        "base": base,
        "again": base,
        "transposed": base.T,
        "step": base[1::2, ::3],
        "expanded": base[0, :1].expand(5, 6),
        "scalar": base[2, 2],
        "empty": base[4:],
        "mixed": [mixed, mixed.view(torch.float32), mixed.view(torch.uint8)[3:]],
        "negative": torch.ones(2, dtype=torch.complex64).conj().imag,
        "conjugate": torch.full((3,), 1 + 2j, dtype=torch.complex128).conj(),
    }


def all_dtypes() -> Any:
    made: dict[str, torch.Tensor] = {}
    for name, (_, _, kind) in independent.DTYPES.items():
        if kind == "quantized" or not hasattr(torch, name):
            continue
        data = torch.tensor([0, 1] * 16, dtype=torch.uint8)
        try:
            made[name] = data.view(getattr(torch, name))
        except (RuntimeError, TypeError, NotImplementedError):
            continue
    assert len(made) > 15
    return made


def nested() -> Any:
    return [
        {"a": (1, [2.5, None, {"b": {1: b"x", -5: "é"}}]), 3: {(), (1, "2"), 2.0, None}},
        (torch.Size([2, 0]), torch.float16, torch.qint8, torch.device("cuda", 3)),
        [2**63, 2**64, -(2**63), -(2**63) - 1, -(2**200), 2**71, -(2**71)],
        [complex(math.inf, -0.0), math.nan, True, False, ""],
        OrderedDict([("x", torch.ones(1)), (9, OrderedDict())]),
    ]


def parameters() -> Any:
    return [
        torch.nn.Parameter(torch.ones(2)),
        torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False),
        torch.ones(3, requires_grad=True),
        torch.empty(5, 2**40, device="meta"),
    ]


OBJECTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "state dict": (model_state, {}),
    "views": (views, {}),
    "dtypes": (all_dtypes, {}),
    "nested": (nested, {}),
    "parameters": (parameters, {}),
    "tensor": (lambda: torch.arange(5), {"metadata": {"step": "1", "étape": ""}}),
    "none": (lambda: None, {}),
    "number": (lambda: 2**64 - 1, {"checksum": False}),
    "empty": (lambda: {}, {"chunk_size": 4096}),
    "no elements": (lambda: [torch.ones(0), torch.ones(1), torch.ones(0, 3)], {}),
    "chunks": (lambda: [torch.randn(n) for n in (1, 5000, 0, 1024, 1009)], {"chunk_size": 4096}),
    "exact chunks": (lambda: [torch.randn(1024), torch.randn(2048)], {"chunk_size": 4096}),
    "no digests": (
        lambda: {"a": torch.randn(3000), "b": torch.randn(7)},
        {"checksum": False, "chunk_size": 4160, "metadata": {"k": "v"}},
    ),
}


def saved(obj: object, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    aiotorchio.save(obj, file, **options)
    return file.getvalue()


async def iterated(obj: object, options: dict[str, Any]) -> bytes:
    return b"".join([bytes(piece) async for piece in aiotorchio.iter_bytes(obj, **options)])


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("how", ["save", "iter_bytes"])
def test_reads_what_the_package_writes(name: str, how: str) -> None:
    make, options = OBJECTS[name]
    obj = make()
    data = saved(obj, options) if how == "save" else asyncio.run(iterated(obj, options))
    message = independent.read(data)
    assert message.consumed == len(data)
    assert message.flags == options.get("checksum", True)
    assert message.header.codec == "tree"
    assert message.header.metadata == list(options.get("metadata", {}).items())
    if "chunk_size" in options:
        assert message.header.chunk_size == options["chunk_size"]
    comparison = Comparison(message)
    comparison.node(message.tree, obj)
    # Every row belongs to a tensor or storage of the object, and no row occurs twice.
    assert sorted(comparison.rows.values()) == list(range(len(message.header.tensors)))
    assert sorted(comparison.storages.values()) == list(range(len(message.header.storages)))


def test_names_of_tensors() -> None:
    inner = torch.ones(1)
    message = independent.read(saved({"a": [inner, {7: inner}], "b.c": (torch.ones(1),)}, {}))
    assert [row.names for row in message.header.tensors] == [("a.0", "a.1.7"), ("b.c.0",)]


def pickled_shared() -> tuple[Any, list[torch.Tensor]]:
    tensors = [torch.arange(3.0), torch.arange(4)]
    inner = [tensors[0], None]
    return {"a": inner, "b": inner, "c": tensors[1]}, tensors


def pickled_frozenset() -> tuple[Any, list[torch.Tensor]]:
    tensor = torch.randn(2, 3)
    return {"f": frozenset([1, 2]), "t": [tensor, tensor.T], "x": bytearray(b"xyz")}, [
        tensor,
        tensor.T,
    ]


@pytest.mark.parametrize("make", [pickled_shared, pickled_frozenset])
def test_reads_pickled_objects_of_the_package(
    make: Callable[[], tuple[Any, list[torch.Tensor]]],
) -> None:
    obj, tensors = make()
    message = independent.read(saved(obj, {"chunk_size": 4096}))
    assert message.header.codec == "pickle"
    assert message.persistent_ids == list(range(len(tensors)))
    assert message.skeleton.startswith(b"\x80\x02")
    for number, tensor in enumerate(tensors):
        row = message.header.tensors[number]
        assert row.shape == tuple(tensor.shape) and row.stride == tensor.stride()
        assert message.storages[row.storage] == bytes_of(tensor.untyped_storage())


@pytest.mark.parametrize("kind", ["quantized", "sparse", "storages"])
def test_reads_storages_in_pickles_of_the_package(kind: str) -> None:
    if kind == "quantized":
        tensor = torch.quantize_per_tensor(torch.ones(4), 0.5, 1, torch.qint8)
        obj: Any = [tensor]
        want = {"qint8": bytes_of(tensor.untyped_storage())}
    elif kind == "sparse":
        obj = torch.eye(3).to_sparse()
        want = {}
    else:
        untyped = torch.arange(3, dtype=torch.int16).untyped_storage()
        obj = [untyped]
        want = {"": bytes_of(untyped)}
    message = independent.read(saved(obj, {}))
    assert message.header.codec == "pickle"
    found = {
        pid.dtype or "": message.storages[pid.row]
        for pid in message.persistent_ids
        if isinstance(pid, independent.StorageId)
    }
    if kind == "sparse":
        values = [
            message.storages[message.header.tensors[pid].storage]
            for pid in message.persistent_ids
            if isinstance(pid, int)
        ] + list(found.values())
        assert struct.pack("<3f", 1, 1, 1) in values
        assert struct.pack("<6q", 0, 1, 2, 0, 1, 2) in values
    else:
        assert found == want


# Damage


def places(size: int) -> list[int]:
    if size < 1000:
        return list(some(range(size)))
    return sorted(random.Random(size).sample(range(size), examples(300)))


@pytest.mark.parametrize("name", NAMES)
def test_every_cut(name: str) -> None:
    data, _ = vector(name)
    for size in places(len(data)):
        with pytest.raises(independent.TruncatedError) as mine:
            independent.read(data[:size])
        with pytest.raises(aiotorchio.TruncatedError) as theirs:
            aiotorchio.load(io.BytesIO(data[:size]))
        if size == 0:
            assert mine.value.offset == theirs.value.offset == 0


def bodies_of_chunks(name: str) -> set[int]:
    """The offsets in the message of all bytes in bodies of chunks."""
    data, expected = vector(name)
    (header,) = struct.unpack_from("<Q", data, 16 + 16)
    at = 16 + 32 + header + 32 + len(expected["skeleton"]) // 2
    found: set[int] = set()
    for _, size in expected["payload"]["chunks"]:
        found.update(range(at + 32, at + 32 + size))
        at += 32 + size
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_change(name: str) -> None:
    data, expected = vector(name)
    rng = random.Random(name)
    # SPEC.md 3.7: without digests, bodies of chunks are not verified.
    unverified = set() if expected["preface"]["flags"] else bodies_of_chunks(name)
    for place in places(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= rng.randrange(1, 256)
        mine, theirs = by_independent(bytes(damaged)), by_package(bytes(damaged))
        assert mine == theirs, place
        assert (mine == "") == (place in unverified), place


# Messages with valid digests and invalid contents


def frame(
    key: bytes,
    kind: bytes,
    number: int,
    offset: int,
    body: bytes,
    *,
    length: int | None = None,
    digest: int | None = None,
) -> bytes:
    head = kind + struct.pack("<IQQ", number, offset, len(body) if length is None else length)
    if digest is None:
        digest = xxhash.xxh3_64_intdigest(key + head + body)
    return head + struct.pack("<Q", digest) + body


def preface(flags: int = 1) -> bytes:
    return independent.MAGIC + struct.pack("<HHI", 1, flags, 0)


def sealed(header: bytes, skeleton: bytes, total_nbytes: int = 1 << 20) -> bytes:
    """A message with this header and skeleton, and a payload of zeros."""
    front = preface()
    message_id = xxhash.xxh3_128_digest(front + header)
    chunks: list[tuple[int, int]] = []
    try:
        limits = independent.Limits(total_nbytes=total_nbytes)
        chunks = independent.parse_header(header, limits).chunks()
    except independent.AiotorchioError:
        pass
    frames = [
        frame(message_id, b"SKEL", 0, 0, skeleton),
        *(
            frame(message_id, b"CHNK", number, offset, bytes(size))
            for number, (offset, size) in enumerate(chunks)
        ),
    ]
    heads = b"".join(piece[:32] for piece in frames)
    end = struct.pack("<Q", xxhash.xxh3_64_intdigest(message_id + heads))
    frames.append(frame(message_id, b"DONE", len(chunks), sum(size for _, size in chunks), end))
    return front + frame(front, b"HEAD", 0, 0, header) + b"".join(frames)


def parts(data: bytes) -> tuple[bytes, bytes]:
    """The header and the skeleton of a message."""
    (size,) = struct.unpack_from("<Q", data, 32)
    header = data[48 : 48 + size]
    (length,) = struct.unpack_from("<Q", data, 48 + size + 16)
    return header, data[80 + size : 80 + size + length]


@pytest.mark.parametrize("name", ["metadata", "flags", "meta", "views", "big_endian", "every_tag"])
def test_every_change_under_sound_digests(name: str) -> None:
    header, skeleton = parts(vector(name)[0])
    before = independent.parse_header(header, independent.Limits())
    rng = random.Random(name)

    def changed() -> Iterator[tuple[bytes, bytes]]:
        for place in some(range(len(header))):
            other = bytearray(header)
            other[place] ^= rng.randrange(1, 256)
            yield bytes(other), skeleton
        for place in some(range(len(skeleton))):
            other = bytearray(skeleton)
            other[place] ^= rng.randrange(1, 256)
            yield header, bytes(other)

    limits = {"total_nbytes": 1 << 20}
    for head, tree in changed():
        data = sealed(head, tree)
        mine, theirs = by_independent(data, **limits), by_package(data, **limits)
        if mine != theirs:
            # SPEC.md 5.1: a receiver may have to use a location that does not exist on it.
            after = independent.parse_header(head, independent.Limits())
            assert after.locations != before.locations
            assert (mine, theirs) == ("", "InvalidObjectError")


LITTLE: dict[str, Any] = {
    "byteorder": "little",
    "nonce": bytes(16),
    "producer": "test",
    "metadata": [],
    "codec": "tree",
    "chunk_size": 4096,
    "locations": ["cpu"],
    "storages": [[8, 4, 0]],
    "tensors": [[0, "float32", 0, [2], [1], 0, ["a"]]],
}


def row(**fields: Any) -> dict[str, Any]:
    whole = {
        "storage": 0,
        "dtype": "float32",
        "offset": 0,
        "shape": [2],
        "stride": [1],
        "flags": 0,
        "names": ["a"],
    }
    return {"tensors": [list({**whole, **fields}.values())]}


TOO_MANY = {"locations": ["cpu"] * 101}
META = {"locations": ["meta"]}
# The error for each header, with entries = 100, total_nbytes = 2**20 and dims = 3.
HEADERS: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"byteorder": "middle"}, "ProtocolError"),
    ({"byteorder": b"little"}, "ProtocolError"),
    ({"nonce": bytes(15)}, "ProtocolError"),
    ({"nonce": "x" * 16}, "ProtocolError"),
    ({"producer": "é" * 256}, ""),
    ({"producer": "x" * 257}, "ProtocolError"),
    ({"metadata": [["a", "1"], ["a", "1"]]}, "ProtocolError"),
    ({"metadata": [["a", b"1"]]}, "ProtocolError"),
    ({"metadata": {}}, "ProtocolError"),
    ({"codec": "json"}, "ProtocolError"),
    ({"chunk_size": 4032}, "ProtocolError"),
    ({"chunk_size": 4100}, "ProtocolError"),
    ({"chunk_size": 4096.0}, "ProtocolError"),
    ({"chunk_size": 2**63 - 64}, "LimitExceeded"),
    ({"chunk_size": 2**63}, "ProtocolError"),
    (TOO_MANY, "LimitExceeded"),
    # Rules 1 to 3 apply in the order of the bytes.
    ({**TOO_MANY, "byteorder": "middle"}, "ProtocolError"),
    ({**TOO_MANY, "metadata": {}}, "ProtocolError"),
    ({**TOO_MANY, "storages": {}}, "LimitExceeded"),
    ({"metadata": [0] * 101}, "LimitExceeded"),
    ({"locations": ["x" * 257]}, "ProtocolError"),
    ({"storages": [[8, 3, 0]]}, "ProtocolError"),
    ({"storages": [[8, 3, 0]], "chunk_size": 1 << 40}, "LimitExceeded"),  # rule 5 before 7
    ({"storages": [[8, 9, 0]], "chunk_size": 1 << 40}, "ProtocolError"),  # rule 3 before 5
    ({"storages": [[8, 4, 1]]}, "ProtocolError"),
    ({"storages": [[8, True, 0]]}, "ProtocolError"),
    ({"storages": [[-1, 4, 0]]}, "ProtocolError"),
    ({"storages": [[8, 4]]}, "ProtocolError"),
    ({"storages": [[2**63 - 1, 4, 0]] * 5}, "LimitExceeded"),
    ({"storages": [[2**63 - 1, 4, 0]] * 5, **META}, ""),
    ({"storages": [[8, 4, 0], [1 << 20, 1, 0]]}, "LimitExceeded"),
    ({"storages": [[8, 4, 0], [(1 << 20) - 64, 1, 0]]}, ""),
    (row(storage=1), "ProtocolError"),
    (row(dtype="float33"), "ProtocolError"),
    (row(dtype="qint8"), "InvalidObjectError"),  # rule 12 before 13
    (row(dtype="float16"), "ProtocolError"),
    (row(dtype="complex64", shape=[1]), ""),
    (row(stride=[1, 1]), "InvalidObjectError"),
    (row(stride=[1] * 4), "InvalidObjectError"),  # rule 14 before 15
    (row(shape=[1] * 4, stride=[1] * 4), "LimitExceeded"),
    (row(flags=4), "InvalidObjectError"),
    (row(dtype="int32", flags=1), "InvalidObjectError"),
    (row(dtype="int32", flags=2), ""),
    (row(flags=16), "ProtocolError"),
    (row(shape=[1 << 20], stride=[0]), "LimitExceeded"),
    (row(shape=[1 << 18], stride=[0]), ""),
    (row(shape=[2**62, 2**62], stride=[0, 0]), "LimitExceeded"),
    ({**row(shape=[2**61], stride=[0]), **META}, "LimitExceeded"),
    ({**row(shape=[2**61 - 1], stride=[0]), **META}, ""),
    (row(offset=1), "InvalidObjectError"),
    (row(stride=[2]), "InvalidObjectError"),
    (row(stride=[2**63 - 1]), "InvalidObjectError"),
    (row(offset=2**63 - 1, shape=[0], stride=[2**63 - 1]), ""),
    (row(names="a"), "ProtocolError"),
    ({"byteorder": "big"}, ""),
    ({"byteorder": "big", "storages": [[0, 0, 0]], "tensors": []}, "InvalidObjectError"),
    # Storages on meta have no bytes to reverse.
    ({"byteorder": "big", "storages": [[2**63 - 1, 4, 0]], **META}, ""),
]


@pytest.mark.parametrize("number", range(len(HEADERS)))
def test_headers(number: int) -> None:
    fields, expected = HEADERS[number]
    header = msgpack.packb(list({**LITTLE, **fields}.values()))
    data = sealed(header, b"\x91\x00")
    limits = {"entries": 100, "total_nbytes": 1 << 20, "dims": 3}
    assert by_independent(data, **limits) == expected
    assert by_package(data, **limits) == expected


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (b"\x90\x90\x90\x00", "ProtocolError"),
        (b"\x90\x90", "ProtocolError"),
        (b"\x90\x90\xdd\x00\x00\xff\xff", "ProtocolError"),
        (b"\x90\x90\xdd\x00\x00\x00\x00", ""),
        (b"\x90\x90" + b"\x91" * 3000 + b"\x90", "ProtocolError"),
        (b"\x91\xa1\xff\x90\x90", "ProtocolError"),
        (b"\x90\x90\xc1", "ProtocolError"),
    ],
)
def test_ends_of_headers(end: bytes, expected: str) -> None:
    header = msgpack.packb(list(LITTLE.values())[:6])
    data = sealed(b"\x99" + header[1:] + end, b"\x91\x00")
    assert by_independent(data) == by_package(data) == expected


def nine(number: int) -> bytes:
    return number.to_bytes(9, "little", signed=True)


TREES: list[tuple[Any, str]] = [
    ([0, 1, [1, 2.5, [4]]], ""),
    ([11], "ProtocolError"),
    ([-1], "ProtocolError"),
    ([True], "ProtocolError"),
    ([0.0], "ProtocolError"),
    ([], "ProtocolError"),
    ({}, "ProtocolError"),
    (msgpack.ExtType(1, b"x"), "ProtocolError"),
    (msgpack.Timestamp(1, 1), "ProtocolError"),
    ([2, "a"], "ProtocolError"),
    ([2, True, 0], "ProtocolError"),
    ([2, [7, nine(2**64)], 0], "ProtocolError"),
    ([2, "a", 0, "a", 0], "ProtocolError"),
    ([3], "ProtocolError"),
    ([3, [0, 0]], "ProtocolError"),
    ([3, [], "a"], "ProtocolError"),
    ([3, [[2]], "a", 0], ""),
    ([4, 1, True], "ProtocolError"),
    ([4, 1, 1.0], "ProtocolError"),
    ([4, [6, 1.0, 0.0], 1], "ProtocolError"),
    ([4, [1, 1, 2], [8, 1, 2]], "ProtocolError"),
    ([4, 2.0**64, [7, nine(2**64)]], "ProtocolError"),
    ([4, [5, 0], [5, 0]], "ProtocolError"),
    ([4, [10, "cpu"], [10, "cpu:0"]], ""),
    ([4, math.nan, math.nan], ""),
    ([4, [0]], "InvalidObjectError"),
    ([4, [1, [2]]], "InvalidObjectError"),
    ([4, [3, []]], "InvalidObjectError"),
    ([4, [4]], "InvalidObjectError"),
    ([5, 1], "ProtocolError"),
    ([5, -1], "ProtocolError"),
    ([5, False], "ProtocolError"),
    ([5, 0, 0], "ProtocolError"),
    ([6, 1, 2.0], "ProtocolError"),
    ([6, 1.0], "ProtocolError"),
    ([7, nine(2**64)], ""),
    ([7, nine(2**64 - 1)], "ProtocolError"),
    ([7, nine(-(2**63) - 1)], ""),
    ([7, nine(-(2**63))], "ProtocolError"),
    ([7, (2**64).to_bytes(10, "little")], "ProtocolError"),
    ([7, (-(2**71)).to_bytes(10, "little", signed=True)], ""),
    ([7, nine(-(2**71))], "ProtocolError"),
    ([7, b""], "ProtocolError"),
    ([7, 2**63], "ProtocolError"),
    ([8, -(2**63), 2**63 - 1], ""),
    ([8, 2**63], "ProtocolError"),
    ([8, True], "ProtocolError"),
    ([9, "qint8"], ""),
    ([9, "float33"], "ProtocolError"),
    ([9, b"float32"], "ProtocolError"),
    ([10, "meta"], ""),
    ([10, "nowhere"], "InvalidObjectError"),
    ([10, "cuda:01"], "InvalidObjectError"),
    ([10, 0], "ProtocolError"),
]


@pytest.mark.parametrize("number", range(len(TREES)))
def test_trees(number: int) -> None:
    tree, expected = TREES[number]
    data = sealed(msgpack.packb(list(LITTLE.values())), msgpack.packb(tree))
    assert by_independent(data) == expected
    assert by_package(data) == expected


@pytest.mark.parametrize(
    ("skeleton", "expected"),
    [
        (b"", "ProtocolError"),
        (b"\xc0\xc0", "ProtocolError"),
        (b"\xa1\xff", "ProtocolError"),
        (b"\xa3\xed\xa0\x80", "ProtocolError"),
        (b"\x92\x00" * 255 + b"\x91\x00", ""),
        (b"\x92\x00" * 256 + b"\xc0", ""),
        (b"\x92\x00" * 256 + b"\x91\x00", "LimitExceeded"),
        (b"\x92\x03\x91" * 255 + b"\x91\x00", ""),
        (b"\x92\x03\x91" * 256 + b"\x91\x00", "LimitExceeded"),
        (b"\x92\x00" * 5000 + b"\x90", "LimitExceeded"),
        (b"\xdd\xff\xff\xff\xff\x00", "ProtocolError"),
    ],
)
def test_encodings_of_trees(skeleton: bytes, expected: str) -> None:
    data = sealed(msgpack.packb(list(LITTLE.values())), skeleton)
    assert by_independent(data) == by_package(data) == expected


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def storage_id(storage: bytes, name: bytes, kind: bytes = b"storage") -> bytes:
    return b"(" + text(kind) + storage + name + b"tQ."


PICKLES: list[tuple[bytes, str]] = [
    (b"\x80\x02N.", ""),
    (b"N.", ""),
    (b"", "ProtocolError"),
    (b"N", "ProtocolError"),
    (b"N.N", "ProtocolError"),
    (b".", "ProtocolError"),
    (b"h\x05.", "ProtocolError"),
    (b"X\x05\x00\x00\x00a", "ProtocolError"),
    (b"\x80\x03N.", "UnsafeObjectError"),
    (b"\xff.", "UnsafeObjectError"),
    (b"\x93.", "UnsafeObjectError"),
    (b"cos\nsystem\n.", "UnsafeObjectError"),
    (b"c__builtin__\neval\n.", "UnsafeObjectError"),
    (b"c__builtin__\ncomplex\nG" + bytes(8) + b"G" + bytes(8) + b"\x86R.", ""),
    (b"K\x00Q.", ""),
    (b"K\x01Q.", "ProtocolError"),
    (b"J\xff\xff\xff\xffQ.", "ProtocolError"),
    (storage_id(b"K\x00", b"N"), ""),
    (storage_id(b"K\x01", b"N"), "ProtocolError"),
    (storage_id(b"K\x00", text(b"float32")), ""),
    (storage_id(b"K\x00", text(b"complex128")), "InvalidObjectError"),
    (storage_id(b"K\x00", text(b"float33")), "ProtocolError"),
    # SPEC.md 6.2: another persistent id.
    (b"\x88Q.", "UnsafeObjectError"),
    (b"NQ.", "UnsafeObjectError"),
    (b")Q.", "ProtocolError"),
    (text(b"a") + b"Q.", "UnsafeObjectError"),
    (storage_id(b"K\x00", b"N", b"tensor"), "UnsafeObjectError"),
]


@pytest.mark.parametrize("number", range(len(PICKLES)))
def test_pickles(number: int) -> None:
    skeleton, expected = PICKLES[number]
    fields = {**LITTLE, "codec": "pickle", "storages": [[8, 0, 0]]}
    data = sealed(msgpack.packb(list(fields.values())), skeleton)
    assert by_independent(data) == expected
    assert by_package(data) == expected


def test_text_of_a_pickle_that_is_not_utf8() -> None:
    data = sealed(msgpack.packb(list({**LITTLE, "codec": "pickle"}.values())), text(b"\xff") + b".")
    # SPEC.md section 8 allows both errors for such a pickle.
    allowed = ("ProtocolError", "InvalidObjectError")
    assert by_independent(data) in allowed
    assert by_package(data) in allowed


@pytest.mark.parametrize("flags", [0, 1])
def test_frames(flags: int) -> None:
    front = preface(flags)
    header = msgpack.packb(list(LITTLE.values()))
    key = xxhash.xxh3_128_digest(front + header)
    head = front + frame(front, b"HEAD", 0, 0, header)
    skeleton = frame(key, b"SKEL", 0, 0, b"\x91\x00")
    body = b"12345678"
    chunk = frame(key, b"CHNK", 0, 0, body, digest=None if flags else 0)
    end = struct.pack("<Q", xxhash.xxh3_64_intdigest(key + skeleton[:32] + chunk[:32]))
    done = frame(key, b"DONE", 1, 8, end)
    upto = head + skeleton
    abort = (key, b"ABRT", 0, 0)
    huge = 2**64 - 1
    cases: list[tuple[bytes, str]] = [
        (upto + chunk + done, ""),
        (upto + chunk + done + frame(*abort, b"late"), ""),
        (front + frame(front, b"ABRT", 0, 0, b"why"), "RemoteAbort"),
        (head + frame(front, b"ABRT", 0, 0, b"why"), "ChecksumError"),
        (head + frame(*abort, b""), "RemoteAbort"),
        (upto + frame(*abort, b"x" * 4096), "RemoteAbort"),
        (upto + chunk + frame(*abort, b"why"), "RemoteAbort"),
        (upto + frame(*abort, b"x" * 4097), "ProtocolError"),
        (upto + frame(*abort, b"", length=4097), "ProtocolError"),
        (upto + frame(*abort, b"\xff"), "ProtocolError"),
        (upto + frame(*abort, b"\xff", digest=0), "ChecksumError"),
        (upto + frame(key, b"ABRT", 1, 0, b""), "ProtocolError"),
        (front + frame(front, b"HEAD", 0, 0, b"", length=huge), "LimitExceeded"),
        (front + frame(front, b"HEAD", 0, 1, b"", length=huge), "ProtocolError"),
        (front + frame(front, b"HEAD", 0, 0, b"\x90"), "ProtocolError"),
        (front + skeleton, "ProtocolError"),
        (head + frame(key, b"SKEL", 0, 0, b"", length=huge), "LimitExceeded"),
        (head + frame(key, b"SKEL", 0, 0, b"\x92\x05\x01"), "ProtocolError"),
        (head + chunk, "ProtocolError"),
        (upto + skeleton, "ProtocolError"),
        (upto + done, "ProtocolError"),
        (upto + chunk + chunk, "ProtocolError"),
        (upto + frame(key, b"CHNK", 1, 0, body), "ProtocolError"),
        (upto + frame(key, b"CHNK", 0, 8, body), "ProtocolError"),
        (upto + frame(key, b"CHNK", 0, 0, body[1:]), "ProtocolError"),
        (upto + frame(key, b"CHNK", 0, 0, body, length=huge), "ProtocolError"),
        (
            upto + frame(key, b"CHNK", 0, 0, body, digest=1),
            "ChecksumError" if flags else "ProtocolError",
        ),
        (
            upto + frame(key, b"CHNK", 0, 0, body, digest=0),
            "ChecksumError" if flags else "TruncatedError",
        ),
        (upto + chunk + frame(key, b"DONE", 2, 8, end), "ProtocolError"),
        (upto + chunk + frame(key, b"DONE", 1, 9, end), "ProtocolError"),
        (upto + chunk + frame(key, b"DONE", 1, 8, end[1:]), "ProtocolError"),
        (upto + chunk + frame(key, b"DONE", 1, 8, bytes(8)), "ChecksumError"),
        (upto + chunk + frame(front, b"DONE", 1, 8, end), "ChecksumError"),
    ]
    for number, (data, expected) in enumerate(cases):
        assert by_independent(data) == expected, number
        assert by_package(data) == expected, number


def test_what_follows_a_message_is_left_alone() -> None:
    first, second = saved([torch.ones(3)], {}), saved({"a": 1}, {})
    message = independent.read(first + second)
    assert message.consumed == len(first)
    assert independent.read((first + second)[message.consumed :]).tree == {"a": 1}
    file = io.BytesIO(first + second)
    aiotorchio.load(file)
    assert file.tell() == message.consumed
