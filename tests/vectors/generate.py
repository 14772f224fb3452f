"""Write the golden vectors: ``NAME.bin``, a message, and ``NAME.json``, a description of it.

Run it from the root of the repository: ``python -m tests.vectors.generate``. It uses no torch, and
writes the same bytes every time. A change of a committed vector is a change of the format.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from aiotorchio.wire.composer import Composer
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import (
    CONJUGATE,
    NEGATIVE,
    PARAMETER,
    REQUIRES_GRAD,
    Header,
    StorageRow,
    TensorRow,
)
from aiotorchio.wire.layout import Layout

FOLDER = Path(__file__).parent
NONCE = bytes(range(16))
PRODUCER = "vectors/1"
RULE = "byte i is i modulo 251"
HEX_MAX = 256  # Longer storages follow RULE and are not written out.
VALUES_MAX = 64

FORMATS = {
    "float64": "d", "float32": "f", "float16": "e",
    "complex128": "dd", "complex64": "ff", "complex32": "ee",
    "int64": "q", "int32": "i", "int16": "h", "int8": "b",
    "uint64": "Q", "uint32": "I", "uint16": "H", "uint8": "B", "bool": "?",
}  # fmt: skip


@dataclass
class Vector:
    """The parts of one message."""

    name: str
    about: str
    object: str
    skeleton: bytes
    storages: list[bytes] = field(default_factory=list)
    header: Header = field(
        default_factory=lambda: Header(
            byteorder="little",
            nonce=NONCE,
            producer=PRODUCER,
            metadata=[],
            codec="tree",
            chunk_size=4096,
            locations=["cpu"],
            storages=[],
            tensors=[],
        )
    )
    checksum: bool = True
    abort_after: int | None = None
    abort_reason: str = ""

    def add(self, data: bytes, unit: int, location: int = 0) -> int:
        """Append a storage; return its row."""
        self.storages.append(data)
        self.header.storages.append(StorageRow(len(data), unit, location))
        return len(self.storages) - 1

    def view(
        self,
        storage: int,
        dtype: str,
        shape: list[int],
        *names: str,
        stride: list[int] | None = None,
        offset: int = 0,
        flags: int = 0,
    ) -> None:
        """Append a tensor; contiguous unless a stride is given."""
        if stride is None:
            stride = [1] * len(shape)
            for n in reversed(range(len(shape) - 1)):
                stride[n] = stride[n + 1] * max(shape[n + 1], 1)
        row = TensorRow(storage, dtype, offset, tuple(shape), tuple(stride), flags, list(names))
        self.header.tensors.append(row)

    def flat(self, values: list[Any], dtype: str, name: str, flags: int = 0) -> None:
        """Append a storage of numbers and a tensor that covers all of it."""
        data = pack(values, dtype, self.header.byteorder)
        row = self.add(data, DTYPES[dtype].unit)
        self.view(row, dtype, [len(data) // DTYPES[dtype].itemsize], name, flags=flags)


def pack(values: list[Any], dtype: str, byteorder: str = "little") -> bytes:
    order = "<" if byteorder == "little" else ">"
    numbers = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return struct.pack(f"{order}{len(numbers)}{FORMATS[dtype][0]}", *numbers)


def pattern(nbytes: int) -> bytes:
    return bytes(n % 251 for n in range(nbytes))


def tree(node: Any) -> bytes:
    return msgspec.msgpack.encode(node)


def named(*names: str) -> bytes:
    """The skeleton of a dict of tensors: rows 0, 1, 2..."""
    return tree([2, *itertools.chain(*((name, [5, n]) for n, name in enumerate(names)))])


# The vectors


def vectors() -> Iterator[Vector]:
    """Every vector."""
    vector = Vector("empty_dict", "An empty dict: no tensors, no chunks.", "{}", tree([2]))
    vector.header.locations = []
    yield vector

    vector = Vector("one_float32", "One tensor.", "{'weight': tensor 0}", named("weight"))
    row = vector.add(pack([1.5, -2.0, 0.0, 3.25], "float32"), 4)
    vector.view(row, "float32", [2, 2], "weight")
    yield vector

    yield views()
    yield flags()

    vector = Vector(
        "metadata",
        "Two entries of metadata, one of them not ASCII, and a tensor without dimensions.",
        "tensor 0",
        tree([5, 0]),
    )
    vector.header.metadata = [("step", "1000"), ("étape", "")]
    vector.view(vector.add(pack([7], "int64"), 8), "int64", [], "")
    yield vector

    yield several_chunks("several_chunks", "Storages of 5000, 4000 and 3 bytes in three chunks.")
    yield small_and_large()
    yield several_chunks(
        "checksum_off", "As several_chunks, without digests of the chunks.", checksum=False
    )
    yield every_dtype()
    yield every_tag()
    yield meta()
    yield pickled()
    yield several_chunks(
        "aborted",
        "As several_chunks, but the sender gives up after one chunk.",
        abort_after=1,
        abort_reason="RuntimeError: la mémoire manque",
    )
    yield several_chunks(
        "aborted_early",
        "As several_chunks, but the sender gives up before the first chunk, without a reason.",
        abort_after=0,
    )

    vector = Vector(
        "big_endian",
        "The payload as a big-endian sender writes it; framing is little-endian all the same.",
        "{'f': tensor 0, 'c': tensor 1, 'i': tensor 2, 'b': tensor 3}",
        named("f", "c", "i", "b"),
    )
    vector.header.byteorder = "big"
    vector.flat([1.5, -2.0], "float32", "f")
    vector.flat([[1.0, -1.0]], "complex128", "c")
    vector.flat([1, -2, 300], "int16", "i")
    vector.flat([1, 2, 3], "uint8", "b")
    yield vector


def views() -> Vector:
    names = ("base", "transposed", "offset", "step", "expanded", "scalar", "empty", "bits")
    items = [part for n, name in enumerate(names) for part in (name, [5, n])]
    items += ["again", [5, 0]]
    vector = Vector(
        "views",
        "Eight tensors over one storage: transposed, with an offset, with a step, expanded, "
        "without dimensions, without elements, and of numbers of another size, so that its unit "
        "is 0. The first one is in the object twice, and the storage ends behind its last view.",
        "{'base': tensor 0, ..., 'bits': tensor 7, 'again': tensor 0}",
        tree([2, *items]),
    )
    row = vector.add(pack([float(n) for n in range(14)], "float32"), 0)
    vector.view(row, "float32", [3, 4], "base", "again")
    vector.view(row, "float32", [4, 3], "transposed", stride=[1, 4])
    vector.view(row, "float32", [2, 3], "offset", stride=[4, 1], offset=5)
    vector.view(row, "float32", [5], "step", stride=[2], offset=1)
    vector.view(row, "float32", [2, 3, 2], "expanded", stride=[0, 1, 0], offset=9)
    vector.view(row, "float32", [], "scalar", offset=11)
    vector.view(row, "float32", [0, 4], "empty", stride=[4, 1])
    vector.view(row, "int16", [2], "bits", offset=6)
    return vector


def flags() -> Vector:
    names = ("grad", "parameter", "frozen", "conj", "neg", "both")
    vector = Vector(
        "flags",
        "Tensors that require gradients, parameters, and lazy views of one storage of complex "
        "numbers.",
        "{'grad': tensor 0, ..., 'both': tensor 5}",
        named(*names),
    )
    vector.flat([1.0, 2.0], "float32", "grad", REQUIRES_GRAD)
    vector.flat([3.0], "float32", "parameter", PARAMETER | REQUIRES_GRAD)
    vector.flat([4], "int64", "frozen", PARAMETER)
    row = vector.add(pack([[1.0, 2.0], [-3.0, 4.5]], "complex64"), 4)
    for name, bits in (("conj", CONJUGATE), ("neg", NEGATIVE), ("both", CONJUGATE | NEGATIVE)):
        vector.view(row, "complex64", [2], name, flags=bits)
    return vector


def several_chunks(name: str, about: str, **options: Any) -> Vector:
    vector = Vector(
        name, about, "[tensor 0, tensor 1, tensor 2]", tree([0, [5, 0], [5, 1], [5, 2]])
    )
    for number, size in enumerate((5000, 4000, 3)):
        vector.view(vector.add(pattern(size), 1), "uint8", [size], str(number))
    for option, value in options.items():
        setattr(vector, option, value)
    return vector


def small_and_large() -> Vector:
    sizes = (1, 63, 64, 65, 0, 70_000, 2, 128, 0)
    vector = Vector(
        "small_and_large",
        "Small storages before and behind one of 70,000 bytes. Those without bytes, one of them "
        "the last, take no room in the payload.",
        "[tensor 0, ..., tensor 8]",
        tree([0, *([5, n] for n in range(len(sizes)))]),
    )
    vector.header.chunk_size = 65_536
    for number, size in enumerate(sizes):
        vector.view(vector.add(pattern(size), 1), "uint8", [size], str(number))
    return vector


def every_dtype() -> Vector:
    plain = [name for name, dtype in DTYPES.items() if dtype.kind != "quantized"]
    vector = Vector(
        "every_dtype",
        "A tensor of each dtype but the quantized ones, which a row cannot carry.",
        "{name of the dtype: its tensor}",
        named(*plain),
    )
    numbers: dict[str, list[Any]] = {
        "float": [1.5, -2.0],
        "complex": [[1.5, -2.0], [0.25, 4.0]],
        "integer": [1, 127],
        "bool": [True, False],
    }
    for name in plain:
        dtype = DTYPES[name]
        if name in FORMATS:
            data = pack(numbers[dtype.kind], name)
        elif name == "bfloat16":
            data = struct.pack("<f", 1.5)[2:] + struct.pack("<f", -2.0)[2:]
        else:
            data = bytes(range(2 * dtype.itemsize))
        vector.view(vector.add(data, dtype.unit), name, [2], name)
    return vector


def every_tag() -> Vector:
    vector = Vector(
        "every_tag",
        "Nested containers with every tag and every plain value of the tree codec. Integers "
        "beyond 64 bits are 2**64, -2**63 - 1 and -2**127.",
        "{'list': [None, True, False, 0, -1, 2**64 - 1, -2**63, 1.5, '', 'é', b'', b'\\xff'], "
        "'tuple': ((), (1, (2, [3]))), 7: {}, -1: {'a': {0: tensor 0}}, "
        "'ordered': OrderedDict with 'z', 'a', 1 -> tensor 1, [], None and with _metadata "
        "OrderedDict('': {'version': 1}), 'bare': OrderedDict(), "
        "'set': {1, 'a', (1, 2)}, 'empty': set(), 'complex': complex(1.5, -0.0), "
        "'big': [2**64, -2**63 - 1, -2**127], 'size': torch.Size([2, 3]), 'dtype': torch.bfloat16, "
        "'quantized': torch.quint8, 'device': torch.device('cuda', 1)}",
        b"",
    )
    plain = [None, True, False, 0, -1, 2**64 - 1, -(2**63), 1.5, "", "é", b"", b"\xff"]
    big = [[7, n.to_bytes(size, "little", signed=True)] for n, size in BIG_INTEGERS]
    items: dict[str | int, Any] = {
        "list": [0, *plain],
        "tuple": [1, [1], [1, 1, [1, 2, [0, 3]]]],
        7: [2],
        -1: [2, "a", [2, 0, [5, 0]]],
        "ordered": [3, [[3, [], "", [2, "version", 1]]], "z", [5, 1], "a", [0], 1, None],
        "bare": [3, []],
        "set": [4, 1, "a", [1, 1, 2]],
        "empty": [4],
        "complex": [6, 1.5, -0.0],
        "big": [0, *big],
        "size": [8, 2, 3],
        "dtype": [9, "bfloat16"],
        "quantized": [9, "quint8"],
        "device": [10, "cuda:1"],
    }
    vector.skeleton = tree([2, *itertools.chain(*items.items())])
    vector.flat([1.0], "float32", "-1.a.0")
    vector.flat([2.0], "float32", "ordered.z")
    return vector


BIG_INTEGERS = ((2**64, 9), (-(2**63) - 1, 9), (-(2**127), 17))


def meta() -> Vector:
    vector = Vector(
        "meta",
        "Tensors on meta, of which one is very large, around one with bytes. Storages on meta "
        "have a size and no bytes.",
        "[tensor 0, tensor 1, tensor 2]",
        tree([0, [5, 0], [5, 1], [5, 2]]),
    )
    vector.header.locations = ["meta", "cpu"]
    vector.storages += [b"", b"", b""]
    vector.header.storages += [StorageRow(2**50, 2, 0), StorageRow(4, 4, 1), StorageRow(24, 8, 0)]
    vector.storages[1] = pack([1.0], "float32")
    vector.view(0, "bfloat16", [2**20, 2**29], "0")
    vector.view(1, "float32", [1], "1")
    vector.view(2, "float64", [3], "2", flags=REQUIRES_GRAD)
    return vector


def pickled() -> Vector:
    vector = Vector(
        "pickle",
        "The pickle codec, for a list that is in two places. The tensor, its storage as it is, "
        "and its storage with a dtype are persistent ids.",
        "{'a': shared, 'b': shared, 'untyped': storage 0, 'typed': storage 0 as float32} "
        "where shared = [tensor 0, None]",
        b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01]q\x02(K\x00QNeX\x01\x00\x00\x00bq\x03h\x02"
        b"X\x07\x00\x00\x00untypedq\x04X\x07\x00\x00\x00storageq\x05K\x00N\x87q\x06Q"
        b"X\x05\x00\x00\x00typedq\x07h\x05K\x00X\x07\x00\x00\x00float32q\x08\x87q\tQu.",
    )
    vector.header.codec = "pickle"
    row = vector.add(pack([1.0, 2.0], "float32"), 0)
    vector.view(row, "float32", [2], "a.0", "b.0")
    return vector


# Descriptions


def compose(vector: Vector) -> bytes:
    """The bytes of the message."""
    layout = Layout(vector.header)
    payload = bytearray(layout.total)
    for offset, data in zip(layout.offsets, vector.storages, strict=True):
        payload[offset : offset + len(data)] = data
    composer = Composer(vector.header, layout, checksum=vector.checksum)
    buffers = composer.opening(vector.skeleton)
    chunks = layout.chunks if vector.abort_after is None else vector.abort_after
    for index in range(chunks):
        start, length = layout.chunk_range(index)
        buffers += composer.chunk_frame([memoryview(payload)[start : start + length]])
    if vector.abort_after is None:
        buffers += composer.end()
    else:
        buffers += composer.abort(vector.abort_reason)
    return b"".join(buffers)


def describe(vector: Vector) -> dict[str, Any]:
    """The whole content of the message, for JSON."""
    header, layout = vector.header, Layout(vector.header)
    message = compose(vector)
    aborted = vector.abort_after is not None
    return {
        "name": vector.name,
        "about": vector.about,
        "object": vector.object,
        "nbytes": len(message),
        "preface": {"version": 1, "flags": int(vector.checksum)},
        "message_id": Composer(header, layout, checksum=vector.checksum).message_id.hex(),
        "header": {
            "byteorder": header.byteorder,
            "nonce": header.nonce.hex(),
            "producer": header.producer,
            "metadata": header.metadata,
            "codec": header.codec,
            "chunk_size": header.chunk_size,
            "locations": header.locations,
            "storages": [fields(row) for row in header.storages],
            "tensors": [fields(row) for row in header.tensors],
        },
        "skeleton": vector.skeleton.hex(),
        "payload": {
            "nbytes": layout.total,
            "offsets": [
                offset if nbytes else None
                for offset, nbytes in zip(layout.offsets, layout.nbytes, strict=True)
            ],
            "chunks": [list(layout.chunk_range(n)) for n in range(layout.chunks)],
            "storages": [
                {"hex": data.hex()} if len(data) <= HEX_MAX else {"rule": RULE}
                for data in vector.storages
            ],
        },
        "values": [values(vector, row) for row in header.tensors],
        "end": None if aborted else message[-8:].hex(),
        "abort": {"after_chunks": vector.abort_after, "reason": vector.abort_reason}
        if aborted
        else None,
    }


def fields(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__struct_fields__}


def values(vector: Vector, row: TensorRow) -> list[Any] | None:
    """Elements in row-major order, complex ones as pairs; None if many or of other dtypes."""
    counts = [range(size) for size in row.shape]
    data = vector.storages[row.storage]
    code = FORMATS.get(row.dtype)
    if code is None or not data or len(data) > HEX_MAX:
        return None
    order = "<" if vector.header.byteorder == "little" else ">"
    size = DTYPES[row.dtype].itemsize
    elements: list[Any] = []
    for index in itertools.product(*counts):
        at = row.offset + sum(n * step for n, step in zip(index, row.stride, strict=True))
        parts = list(struct.unpack_from(order + code, data, at * size))
        if row.flags & CONJUGATE:
            parts[1] = -parts[1]
        if row.flags & NEGATIVE:
            parts = [-part for part in parts]
        elements.append(parts if len(parts) == 2 else parts[0])
    return elements if len(elements) <= VALUES_MAX else None


def files() -> Iterator[tuple[str, bytes]]:
    """The name and the content of every file."""
    for vector in vectors():
        yield f"{vector.name}.bin", compose(vector)
        yield f"{vector.name}.json", pretty(describe(vector)).encode() + b"\n"


def pretty(value: Any, indent: str = "") -> str:
    """JSON with each value on one line where it fits."""
    line = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(line) <= 100 or not isinstance(value, list | dict):
        return line
    inner = indent + "  "
    if isinstance(value, list):
        items = [inner + pretty(item, inner) for item in value]
        return "[\n" + ",\n".join(items) + f"\n{indent}]"
    items = [f"{inner}{json.dumps(key)}: {pretty(item, inner)}" for key, item in value.items()]
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


if __name__ == "__main__":
    for filename, content in files():
        (FOLDER / filename).write_bytes(content)
