"""Pickles and messages made by hand, as a hostile sender makes them."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import aiotorchio
from aiotorchio.graph.flatten import Flattened, flatten
from aiotorchio.memory.outgoing import OutgoingPayload
from aiotorchio.wire.composer import Composer
from aiotorchio.wire.header import Header
from aiotorchio.wire.layout import Layout

CHUNK_SIZE = 4096


class Code(bytes):
    """Opcodes that leave one object on the stack."""


def assemble(value: Any) -> bytes:
    """Assemble the opcodes that make a value of plain types and of ``Code``."""
    if isinstance(value, Code):
        return value
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        data = pickle.encode_long(value)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, tuple):
        return b"(" + b"".join(map(assemble, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(assemble, value)) + b"e"
    if isinstance(value, dict):
        items = b"".join(assemble(key) + assemble(item) for key, item in value.items())
        return b"}(" + items + b"u"
    raise AssertionError(value)


def name(module: str, attribute: str) -> Code:
    return Code(f"c{module}\n{attribute}\n".encode())


def call(module: str, attribute: str, *args: Any) -> Code:
    return Code(name(module, attribute) + assemble(args) + b"R")


def new(module: str, attribute: str, *args: Any) -> Code:
    return Code(name(module, attribute) + assemble(args) + b"\x81")


def build(value: Any, state: Any) -> Code:
    return Code(assemble(value) + assemble(state) + b"b")


def tensor(row: int) -> Code:
    return Code(assemble(row) + b"Q")


def storage(row: int, dtype: str | None = None) -> Code:
    return Code(assemble(("storage", row, dtype)) + b"Q")


def put(slot: int) -> bytes:
    return b"r" + struct.pack("<I", slot)


def get(slot: int) -> Code:
    return Code(b"j" + struct.pack("<I", slot))


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + assemble(value) + b"."


def ordered_dict() -> Code:
    return call("collections", "OrderedDict")


def rebuild(function: str, *args: Any) -> Code:
    return call("torch._utils", function, *args)


def strided(row: int, dtype: str, offset: Any, size: Any, stride: Any, *more: Any) -> Code:
    source = storage(row, dtype)
    return rebuild("_rebuild_tensor_v2", source, offset, size, stride, False, ordered_dict(), *more)


def subclassed(function: Code, kind: Code, args: Any, state: Any) -> Code:
    return call("torch._tensor", "_rebuild_from_type_v2", function, kind, args, state)


def flattened(obj: object) -> Flattened:
    return flatten(obj, chunk_size=CHUNK_SIZE, metadata={}, producer="tests")


def message(
    skeleton: bytes,
    codec: str = "pickle",
    tensors: Sequence[torch.Tensor] = (),
    change: Callable[[Header], None] = lambda header: None,
) -> bytes:
    """A whole message; its tensors have the rows 0, 1, 2 and so on."""
    parts = flattened(list(tensors))
    header = parts.header
    header.codec = codec  # type: ignore[assignment]
    change(header)
    return compose(replace(parts, skeleton=skeleton))


def compose(parts: Flattened) -> bytes:
    layout = Layout(parts.header)
    composer = Composer(parts.header, layout, checksum=True)
    payload = OutgoingPayload(parts.storages, layout.offsets, layout.nbytes, layout.chunk_size)
    buffers = composer.opening(parts.skeleton)
    for index in range(layout.chunks):
        buffers += composer.chunk_frame(payload.chunk_views(*layout.chunk_range(index)))
    return b"".join([*buffers, *composer.end()])


def load(data: bytes, **options: Any) -> Any:
    return aiotorchio.load(io.BytesIO(data), **options)


def load_pickle(skeleton: bytes, tensors: Sequence[torch.Tensor] = (), **options: Any) -> Any:
    return load(message(skeleton, "pickle", tensors), **options)


def load_tree(skeleton: bytes, tensors: Sequence[torch.Tensor] = (), **options: Any) -> Any:
    return load(message(skeleton, "tree", tensors), **options)


def round_trip(obj: object, **options: Any) -> Any:
    """Save and load an object."""
    file = io.BytesIO()
    aiotorchio.save(obj, file, chunk_size=CHUNK_SIZE)
    file.seek(0)
    return aiotorchio.load(file, **options)
