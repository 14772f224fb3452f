"""Helpers of the payload tests: payloads made by hand, strided views, copiers that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st

from aiotorchio.memory.device_copy import Copier
from aiotorchio.memory.host import view_of
from aiotorchio.memory.incoming import IncomingPayload

CPU, META = torch.device("cpu"), torch.device("meta")
CHUNK = 4096


# Payloads


def filled(sizes: Sequence[int]) -> list[torch.UntypedStorage]:
    storages = []
    for n, size in enumerate(sizes):
        storage = torch.UntypedStorage(size)
        # Not a power of two, so that a shift by a chunk changes the bytes.
        view_of(storage)[:] = (bytes(range(251)) * (size // 251 + 2))[n % 251 :][:size]
        storages.append(storage)
    return storages


def layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return the offsets, multiples of 64, and the size of the whole."""
    offsets, end = [], 0
    for size in sizes:
        start = -(-end // 64) * 64
        offsets.append(start)
        end = start + size if size else end
    return offsets, end


def joined(sizes: Sequence[int], storages: Sequence[torch.UntypedStorage]) -> bytes:
    """The payload as SPEC.md section 4.1 describes it, made in the simplest way."""
    offsets, end = layout(sizes)
    data = bytearray(end)
    for offset, storage in zip(offsets, storages, strict=True):
        if storage.nbytes():
            data[offset : offset + storage.nbytes()] = view_of(storage)
    return bytes(data)


def incoming_for(sizes: Sequence[int], chunk: int, **options: Any) -> IncomingPayload:
    offsets, _ = layout(sizes)
    devices = options.pop("devices", [CPU] * len(sizes))
    return IncomingPayload(offsets, sizes, sizes, devices, chunk, **options)


def received(incoming: IncomingPayload, data: bytes, chunk: int) -> IncomingPayload:
    """Give a payload all of its chunks, as a driver does."""
    for start in range(0, len(data), chunk):
        part = data[start : start + chunk]
        views, move = incoming.buffers_for(start, len(part))
        position = 0
        for view in views:
            view[:] = part[position : position + len(view)]
            position += len(view)
        # The views of a chunk may not overlap: the chunk is verified as a whole.
        assert b"".join(views) == part
        if move:
            move()
    return incoming


def storages_made(monkeypatch: pytest.MonkeyPatch) -> list[torch.UntypedStorage]:
    """Collect every storage that is made from now on, while the test runs."""
    storages: list[torch.UntypedStorage] = []
    real: Callable[..., torch.UntypedStorage] = torch.UntypedStorage

    def noting(nbytes: int, **options: Any) -> torch.UntypedStorage:
        storages.append(real(nbytes, **options))
        return storages[-1]

    monkeypatch.setattr(torch, "UntypedStorage", noting)
    return storages


def bytes_at(incoming: IncomingPayload, row: int) -> bytes:
    storage = incoming.storage(row)
    assert storage is not None
    return bytes(view_of(storage))


# Copiers


class CopierOnCpu:
    """A copier of a fake device: counts its staging buffers, and refuses copies between two of
    them.
    """

    pins = False

    def __init__(self) -> None:
        self.slabs: list[torch.UntypedStorage] = []
        self.copied = 0

    def staging_buffer(self, nbytes: int) -> torch.UntypedStorage:
        self.slabs.append(torch.UntypedStorage(nbytes))
        return self.slabs[-1]

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        assert destination.shape == source.shape
        assert destination.dtype == source.dtype
        addresses = {slab.data_ptr() for slab in self.slabs}
        ends = [
            tensor.untyped_storage().data_ptr() in addresses for tensor in (destination, source)
        ]
        assert sum(ends) == 1
        destination.copy_(source)
        self.copied += source.numel() * source.element_size()


class CountingCopier:
    """A copier that counts its copies, and fails half-way in one of them."""

    pins = False

    def __init__(self, fails_at: int = 0) -> None:
        self.copies = self.largest = 0
        self._fails_at = fails_at

    def staging_buffer(self, nbytes: int) -> torch.UntypedStorage:
        return torch.UntypedStorage(nbytes)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self.copies += 1
        self.largest = max(self.largest, source.numel() * source.element_size())
        if self.copies == self._fails_at:
            raw(destination)[..., ::2].copy_(raw(source)[..., ::2])
            raise RuntimeError("device lost")
        destination.copy_(source)


def staged(_: torch.device) -> bool:
    return True


def staging(copier: Copier | None) -> dict[str, Any]:
    """The options of a payload that takes the CPU for a device; None: it does not."""
    return {} if copier is None else {"copier": copier, "needs_copy": staged}


# Strided views


class View(NamedTuple):
    """A view of a storage, counted in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    behind: int = 0

    @property
    def extent(self) -> int:
        """Return the elements of a storage that has this view, and some before and after it."""
        if 0 in self.shape:
            return self.offset + self.behind
        steps = zip(self.shape, self.stride, strict=True)
        return self.offset + sum((size - 1) * step for size, step in steps) + 1 + self.behind

    def over(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty((0,), dtype=dtype, device=storage.device)
        return tensor.set_(storage, self.offset, self.shape, self.stride)

    def random(self, dtype: torch.dtype) -> torch.Tensor:
        """Make the view over a new storage of random bytes."""
        return self.over(random_storage(self.extent * dtype.itemsize), dtype)

    def on_meta(self, dtype: torch.dtype) -> torch.Tensor:
        nbytes = self.extent * dtype.itemsize
        return self.over(torch.UntypedStorage(nbytes, device=META), dtype)


def nested(
    draw: Callable[[Any], Any], shape: Sequence[int], *, expanded: bool
) -> tuple[tuple[int, ...], list[int]]:
    """Strides under which each dimension steps over all inner ones, in some order of them.

    Returns:
        The strides, and the dimensions of more than one element and address, from the widest to
        the narrowest.
    """
    stride = [0] * len(shape)
    dims: list[int] = []
    extent = 1
    for dim in draw(st.permutations(range(len(shape)))):
        if shape[dim] == 1:
            # Any stride will do: there is no second element.
            stride[dim] = draw(st.integers(0, 9))
        elif not expanded or draw(st.integers(0, 3)):
            stride[dim] = extent + draw(st.sampled_from([0, 0, 0, 1, 2, 5]))
            extent += (shape[dim] - 1) * stride[dim]
            dims.insert(0, dim)
    return tuple(stride), dims


shapes = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@st.composite
def views(draw: Callable[[Any], Any], shape: tuple[int, ...], *, expanded: bool = False) -> View:
    """Draw views of elements with distinct addresses, anywhere in a larger storage."""
    stride, _ = nested(draw, shape, expanded=expanded)
    return View(shape, stride, draw(st.integers(0, 40)), draw(st.integers(0, 40)))


def random_storage(nbytes: int) -> torch.UntypedStorage:
    return torch.randint(256, (nbytes,), dtype=torch.uint8).untyped_storage()


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same view of a copy of its whole storage."""
    view = View(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
    return view.over(tensor.untyped_storage().clone(), tensor.dtype)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of each element, in one more dimension: any dtype can be copied and compared so."""
    size = tensor.element_size()
    stride = [step * size for step in tensor.stride()]
    view = View((*tensor.shape, size), (*stride, 1), int(tensor.storage_offset()) * size)
    return view.over(tensor.untyped_storage(), torch.uint8)


def bytes_of_storage(tensor: torch.Tensor) -> bytes:
    """All bytes of a storage: those of the tensor, those around it, and those in its gaps."""
    return bytes(view_of(tensor.untyped_storage()))


def with_elements_of(tensor: torch.Tensor, source: torch.Tensor) -> bytes:
    """The bytes of the storage of a tensor, when it has the elements of another one."""
    expected = copy_of(tensor)
    raw(expected).copy_(raw(source))
    return bytes_of_storage(expected)
