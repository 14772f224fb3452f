"""The golden vectors: parsed and composed byte by byte, and loaded and saved as objects."""

from __future__ import annotations

import io
import json
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

import aiotorchio
from aiotorchio.common.torch_private import typed_storage
from aiotorchio.errors import RemoteAbort
from aiotorchio.graph.flatten import flatten
from aiotorchio.table.torch_dtypes import TORCH_DTYPES
from aiotorchio.wire.composer import Composer
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import Header
from aiotorchio.wire.layout import Layout
from aiotorchio.wire.parser import (
    ChunkReceived,
    ChunkStarted,
    MessageEnded,
    SkeletonReceived,
)
from tests.support.corpus import assert_same
from tests.support.frames import LIMITS, parse_three_ways, refused
from tests.vectors.generate import BIG_INTEGERS, FOLDER, NONCE, PRODUCER, RULE, files, pattern

NAMES = sorted(path.stem for path in FOLDER.glob("*.bin"))
ABORTED = [name for name in NAMES if name.startswith("aborted")]
WHOLE = [name for name in NAMES if name not in ABORTED]


def message(name: str) -> bytes:
    return (FOLDER / f"{name}.bin").read_bytes()


def description(name: str) -> dict[str, Any]:
    described: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return described


def header_of(described: dict[str, Any]) -> Header:
    fields = described["header"]
    return msgspec.convert(
        [
            *(fields["byteorder"], bytes.fromhex(fields["nonce"]), fields["producer"]),
            *(fields["metadata"], fields["codec"], fields["chunk_size"], fields["locations"]),
            [list(row.values()) for row in fields["storages"]],
            [list(row.values()) for row in fields["tensors"]],
        ],
        Header,
    )


def payload_of(described: dict[str, Any]) -> bytes:
    payload = bytearray(described["payload"]["nbytes"])
    rows, places = described["header"]["storages"], described["payload"]
    for row, offset, content in zip(rows, places["offsets"], places["storages"], strict=True):
        if offset is not None:
            assert content.get("rule", RULE) == RULE
            data = bytes.fromhex(content["hex"]) if "hex" in content else pattern(row["nbytes"])
            assert len(data) == row["nbytes"]
            payload[offset : offset + len(data)] = data
    return bytes(payload)


def test_the_files_are_those_that_the_script_writes() -> None:
    expected = dict(files())
    assert {path.name for path in FOLDER.glob("*.*") if path.suffix != ".py"} == expected.keys()
    for name, content in expected.items():
        assert (FOLDER / name).read_bytes() == content, name


@pytest.mark.parametrize("name", WHOLE)
def test_parse(name: str) -> None:
    described = description(name)
    parsed = parse_three_ways(message(name))
    assert parsed.header.header == header_of(described)
    assert parsed.header.message_id.hex() == described["message_id"]
    layout = parsed.header.layout
    assert layout.total == described["payload"]["nbytes"]
    for offset, expected in zip(layout.offsets, described["payload"]["offsets"], strict=True):
        assert expected in (offset, None)
    skeleton, *chunks = parsed.events[1:]
    assert isinstance(skeleton, SkeletonReceived)
    assert skeleton.skeleton.hex() == described["skeleton"]
    assert chunks == [
        event(*place)
        for place in described["payload"]["chunks"]
        for event in (ChunkStarted, ChunkReceived)
    ] + [MessageEnded()]
    assert parsed.payload == payload_of(described)
    assert parsed.consumed == described["nbytes"]


@pytest.mark.parametrize("name", ABORTED)
def test_parse_aborted(name: str) -> None:
    described = description(name)
    reason = described["abort"]["reason"]
    start = described["nbytes"] - len(reason.encode())
    error = refused(RemoteAbort, message(name), offset=start)
    assert error.message == f"the sender gave up: {reason}"


@pytest.mark.parametrize("name", NAMES)
def test_compose(name: str) -> None:
    described = description(name)
    header = header_of(described)
    payload = memoryview(payload_of(described))
    composer = Composer(header, Layout(header), checksum=bool(described["preface"]["flags"]))
    buffers = composer.opening(bytes.fromhex(described["skeleton"]))
    abort = described["abort"]
    for start, length in described["payload"]["chunks"][: abort and abort["after_chunks"]]:
        buffers += composer.chunk_frame([payload[start : start + length]])
    buffers += composer.abort(abort["reason"]) if abort else composer.end()
    assert b"".join(buffers) == message(name)


def test_the_example_of_the_specification() -> None:
    text = (FOLDER.parents[1] / "SPEC.md").read_text(encoding="utf-8").split("\n## 10.")[1]
    lines = re.findall(r"^    ((?:[0-9A-F]{2} ?)+)", text, re.MULTILINE)
    parsed = parse_three_ways(bytes.fromhex("".join(lines)))
    assert f"a message of {parsed.consumed} bytes" in text
    assert f"`{parsed.header.message_id.hex(' ').upper()}`" in text
    assert parsed.header.header.producer == "example"
    assert parsed.header.header.nonce == NONCE
    assert [type(event) for event in parsed.events[1:]] == [SkeletonReceived, MessageEnded]


# As objects


def views() -> object:
    base = torch.arange(14, dtype=torch.float32)
    tensors: dict[str, torch.Tensor] = {
        "base": base[:12].view(3, 4),
        "transposed": base[:12].view(3, 4).t(),
        "offset": base.as_strided((2, 3), (4, 1), 5),
        "step": base[1:11:2],
        "expanded": base.as_strided((2, 3, 2), (0, 1, 0), 9),
        "scalar": base[11],
        "empty": base.as_strided((0, 4), (4, 1)),
        "bits": base.view(torch.int16)[6:8],
    }
    return tensors | {"again": tensors["base"]}


def flags() -> object:
    numbers = torch.tensor([1 + 2j, -3 + 4.5j])
    return {
        "grad": torch.tensor([1.0, 2.0], requires_grad=True),
        "parameter": torch.nn.Parameter(torch.tensor([3.0])),
        "frozen": torch.nn.Parameter(torch.tensor([4]), requires_grad=False),
        "conj": numbers.conj(),
        "neg": torch._neg_view(numbers),
        "both": torch._neg_view(numbers.conj()),
    }


def patterns(*sizes: int) -> object:
    return [torch.arange(size).remainder(251).to(torch.uint8) for size in sizes]


def every_dtype() -> object:
    described = description("every_dtype")
    rows = zip(described["header"]["tensors"], described["payload"]["storages"], strict=True)
    tensors = {}
    for row, content in rows:
        data = bytearray.fromhex(content["hex"])
        storage = torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
        empty = torch.empty((0,), dtype=TORCH_DTYPES[row["dtype"]])
        tensors[row["dtype"]] = empty.set_(storage, 0, (2,), (1,))
    return tensors


def every_tag() -> object:
    ordered: OrderedDict[Any, Any] = OrderedDict(z=torch.tensor([2.0]), a=[])
    ordered[1] = None
    ordered._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return {
        "list": [None, True, False, 0, -1, 2**64 - 1, -(2**63), 1.5, "", "é", b"", b"\xff"],
        "tuple": ((), (1, (2, [3]))),
        7: {},
        -1: {"a": {0: torch.tensor([1.0])}},
        "ordered": ordered,
        "bare": OrderedDict(),
        "set": {1, "a", (1, 2)},
        "empty": set(),
        "complex": complex(1.5, -0.0),
        "big": [number for number, _ in BIG_INTEGERS],
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "quantized": torch.quint8,
        "device": torch.device("cuda", 1),
    }


def meta() -> object:
    return [
        torch.empty(2**20, 2**29, dtype=torch.bfloat16, device="meta"),
        torch.ones(1),
        torch.empty(3, dtype=torch.float64, device="meta", requires_grad=True),
    ]


def pickled() -> object:
    tensor = torch.tensor([1.0, 2.0])
    shared = [tensor, None]
    storage = tensor.untyped_storage()
    typed = typed_storage(storage, torch.float32)
    return {"a": shared, "b": shared, "untyped": storage, "typed": typed}


def big_endian() -> object:
    return {
        "f": torch.tensor([1.5, -2.0]),
        "c": torch.tensor([1 - 1j], dtype=torch.complex128),
        "i": torch.tensor([1, -2, 300], dtype=torch.int16),
        "b": torch.tensor([1, 2, 3], dtype=torch.uint8),
    }


OBJECTS: dict[str, Callable[[], object]] = {
    "big_endian": big_endian,
    "checksum_off": lambda: patterns(5000, 4000, 3),
    "empty_dict": dict,
    "every_dtype": every_dtype,
    "every_tag": every_tag,
    "flags": flags,
    "meta": meta,
    "metadata": lambda: torch.tensor(7),
    "one_float32": lambda: {"weight": torch.tensor([[1.5, -2.0], [0.0, 3.25]])},
    "pickle": pickled,
    "several_chunks": lambda: patterns(5000, 4000, 3),
    "small_and_large": lambda: patterns(1, 63, 64, 65, 0, 70_000, 2, 128, 0),
    "views": views,
}
NEEDS_EVERY_DTYPE = pytest.mark.skipif(
    len(TORCH_DTYPES) < len(DTYPES), reason="this torch does not have every dtype of the format"
)


def with_marks(names: list[str]) -> list[Any]:
    return [
        pytest.param(name, marks=NEEDS_EVERY_DTYPE if name == "every_dtype" else ())
        for name in names
    ]


def test_every_whole_vector_is_an_object() -> None:
    assert sorted(OBJECTS) == WHOLE


@pytest.mark.parametrize("name", with_marks(WHOLE))
def test_load(name: str) -> None:
    file = io.BytesIO(message(name) + b"next")
    assert_same(aiotorchio.load(file, limits=LIMITS), OBJECTS[name]())
    assert file.read() == b"next"


# A set has no fixed order, and a sender writes only its native byte order.
WRITTEN = [name for name in WHOLE if name not in ("big_endian", "every_tag")]


@pytest.mark.skipif(
    sys.byteorder == "big", reason="the vectors come from the other kind of machine"
)
@pytest.mark.parametrize("name", with_marks(WRITTEN))
def test_flatten(name: str) -> None:
    described = description(name)
    flattened = flatten(
        OBJECTS[name](),
        chunk_size=described["header"]["chunk_size"],
        metadata=dict(described["header"]["metadata"]),
        producer=PRODUCER,
    )
    flattened.header.nonce = NONCE
    assert flattened.header == header_of(described)
    assert flattened.skeleton.hex() == described["skeleton"]


@pytest.mark.parametrize("name", WHOLE)
def test_values(name: str) -> None:
    """The values in the description are those of the tensors."""
    described = description(name)
    rows = described["header"]["tensors"]
    loaded = tensors_of(OBJECTS[name]() if name != "every_dtype" else {})
    for row, expected in zip(rows, described["values"], strict=True):
        for path in row["names"] if expected is not None and loaded else ():
            tensor = loaded[path]
            if tensor.is_complex():
                tensor = torch.view_as_real(tensor.resolve_conj().resolve_neg())
            assert tensor.detach().reshape(-1).tolist() == flat(expected), path


def flat(values: list[Any]) -> list[Any]:
    return [n for value in values for n in (value if isinstance(value, list) else [value])]


def tensors_of(value: object, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {path: value}
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    found: dict[str, torch.Tensor] = {}
    for key, item in items:
        found |= tensors_of(item, f"{path}.{key}" if path else str(key))
    return found
