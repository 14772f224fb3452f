"""Tensors of every layout to receive into, and a check of every byte around them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
import torch

import aiotorchio
from aiotorchio.memory.host import view_of

# The bytes of targets before a load: unlikely numbers in any dtype.
BEFORE = bytes(range(1, 252))

_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def encoded(obj: object, **options: Any) -> bytes:
    file = io.BytesIO()
    aiotorchio.save(obj, file, **options)
    return file.getvalue()


def load(data: bytes, **options: Any) -> Any:
    return aiotorchio.load(io.BytesIO(data), **options)


async def load_pieces(pieces: Any, **options: Any) -> Any:
    """Load from an async generator, and close it as trio requires."""
    async with aclosing(pieces):
        return await aiotorchio.load_from_stream(pieces, **options)


class Pieces(anyio.abc.ByteReceiveStream):
    """Yields bytes from memory; waits before every piece."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data, self._size, self.taken = data, size, 0

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        piece = self._data[self.taken :][: min(max_bytes, self._size)]
        self.taken += len(piece)
        if not piece:
            raise anyio.EndOfStream
        return piece

    async def aclose(self) -> None:
        raise AssertionError("the stream is its owner's to close")


# How tensors are received into

MODES = ["plain", "staged", "double"]
SAFE_MODES = ["staged", "double"]
all_modes = pytest.mark.parametrize("mode", MODES)
safe_modes = pytest.mark.parametrize("mode", SAFE_MODES)


def into_options(mode: str, into: Any) -> dict[str, Any]:
    if mode == "double":
        return {"into": aiotorchio.DoubleBuffer(into)}
    return {"into": into, "staged": mode == "staged"}


# Tensors in memory that is larger than they are


def place(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    order: Sequence[int] | None = None,
    step: int = 1,
    gap: int = 0,
    offset: int = 0,
    behind: int = 0,
) -> torch.Tensor:
    """Make a tensor over a storage full of other bytes.

    Args:
        shape: The shape of the tensor.
        dtype: The dtype of the tensor.
        order: The dimensions, the one with the widest stride first.
        step: Elements from one element to the next.
        gap: Elements that are left out after each row, matrix and so on.
        offset: Elements before the first one.
        behind: Elements after the last one.
    """
    stride, width = [0] * len(shape), step
    for dim in reversed(range(len(shape)) if order is None else order):
        stride[dim] = width
        width = width * max(shape[dim], 1) + gap
    count = offset + 1 + sum((size - 1) * each for size, each in zip(shape, stride, strict=True))
    count = max(count, 1) + behind if 0 not in shape else offset + behind
    nbytes = count * dtype.itemsize
    storage = storage_of((BEFORE * (nbytes // len(BEFORE) + 1))[:nbytes])
    return over(storage, dtype, offset, shape, stride)


def storage_of(data: bytes) -> torch.UntypedStorage:
    storage = torch.UntypedStorage(len(data))
    view_of(storage)[:] = data
    return storage


def over(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    shape: Sequence[int],
    stride: Sequence[int],
) -> torch.Tensor:
    return torch.empty((0,), dtype=dtype).set_(storage, offset, shape, stride)


def _backwards(tensor: torch.Tensor) -> list[int]:
    return list(reversed(range(tensor.dim())))


def _parameter(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(place(tensor.shape, tensor.dtype), requires_grad=False)


# Each function makes a target for a tensor of a message.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda t: place(t.shape, t.dtype),
    "part": lambda t: place(t.shape, t.dtype, offset=5, behind=7),
    "transposed": lambda t: place(t.shape, t.dtype, order=_backwards(t)),
    "every second": lambda t: place(t.shape, t.dtype, step=2, behind=1),
    "gaps": lambda t: place(t.shape, t.dtype, gap=3, offset=1),
    "transposed gaps": lambda t: place(t.shape, t.dtype, order=_backwards(t), step=3, gap=1),
    "parameter": _parameter,
}


def places_for(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make a target for each tensor, of one layout after the other."""
    layouts = list(LAYOUTS.values())
    return {name: layouts[n % len(layouts)](each) for n, (name, each) in enumerate(state.items())}


# The expected contents of their memory


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as integers, which can be copied and compared for any dtype."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    storage, dtype = tensor.untyped_storage(), _CARRIERS[tensor.element_size()]
    return over(storage, dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    copies = [raw(each).clone(memory_format=torch.contiguous_format) for each in (actual, expected)]
    one, two = (bytes(view_of(copy.untyped_storage())) for copy in copies)
    assert one == two


class Watched:
    """Knows the bytes of targets before a load, with every byte of their storages.

    Args:
        tensors: The targets by name.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self._storages = [each.untyped_storage() for each in tensors.values()]
        self._before = {each.data_ptr(): bytes(view_of(each)) for each in self._storages}
        self._places = self._where()

    def _where(self) -> list[Any]:
        return [
            (each.data_ptr(), each.dtype, each.shape, each.stride(), each.requires_grad)
            for each in self._tensors.values()
        ]

    def assert_untouched(self) -> None:
        """Check that every bit is as it was, at the same address."""
        assert self._where() == self._places
        for name, tensor in self._tensors.items():
            storage = tensor.untyped_storage()
            assert bytes(view_of(storage)) == self._before[storage.data_ptr()], name

    def assert_filled(self, values: Mapping[str, torch.Tensor]) -> None:
        """Check that these values are in the tensors of these names, and all other bytes are
        unchanged.
        """
        expected = {address: storage_of(data) for address, data in self._before.items()}
        for (name, tensor), storage in zip(self._tensors.items(), self._storages, strict=True):
            if name in values:
                own = expected[storage.data_ptr()]
                offset = int(tensor.storage_offset())
                same = over(own, tensor.dtype, offset, tensor.shape, tensor.stride())
                raw(same).copy_(raw(values[name].to(tensor.dtype)))
        for (name, tensor), storage in zip(self._tensors.items(), self._storages, strict=True):
            now = bytes(view_of(tensor.untyped_storage()))
            assert now == bytes(view_of(expected[storage.data_ptr()])), name
