"""Routes from any layout to any layout, compared with a copy by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aiotorchio.errors import MismatchError
from aiotorchio.memory.device_copy import Copier, DeviceCopier, bytes_of
from aiotorchio.memory.host import view_of
from aiotorchio.memory.memory_state import memory_state
from aiotorchio.memory.routes import Route, alias, copy_elements
from aiotorchio.table.torch_dtypes import TORCH_DTYPES
from tests.support.payload_layouts import (
    META,
    CountingCopier,
    View,
    bytes_of_storage,
    copy_of,
    raw,
    shapes,
    views,
    with_elements_of,
)
from tests.support.tiers import examples

# Quantized tensors are sent as their parts.
DTYPES = [dtype for name, dtype in TORCH_DTYPES.items() if not name.startswith("q")]
COMPLEX = [torch.complex32, torch.complex64, torch.complex128]
REAL = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]
COUNTS = [
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.bool),
]

starts = st.integers(0, 3).map(lambda n: 64 * n)
# Small chunks can end anywhere in a tensor, but never inside an element.
chunks = st.sampled_from([64, 128, 192, 448, 1024, 65536])
copiers = st.sampled_from([None, CountingCopier()])


def through(
    route: Route, start: int, source: torch.Tensor, chunk: int, copier: Copier | None = None
) -> None:
    """Send the storage of the source as a payload through a route, chunk by chunk."""
    payload = bytes(start) + bytes_of_storage(source)
    slab = torch.UntypedStorage(chunk)
    for at in range(0, len(payload), chunk):
        part = payload[at : at + chunk]
        # Stale bytes at the end of the staging buffer must not be taken.
        view_of(slab)[:] = part + b"\xee" * (chunk - len(part))
        if at < route.end and at + len(part) > route.start:
            route.take(bytes_of(slab)[: len(part)], at, copier)


def on_meta(source: torch.Tensor) -> torch.Tensor:
    view = View(tuple(source.shape), source.stride(), int(source.storage_offset()))
    nbytes = source.untyped_storage().nbytes()
    meta = view.over(torch.UntypedStorage(nbytes, device=META), source.dtype)
    meta = meta.conj() if source.is_conj() else meta
    return torch._neg_view(meta) if source.is_neg() else meta


def with_numbers(view: View, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of numbers that every dtype has; without zeros, whose sign some dtypes lose."""
    numbers = torch.arange(view.extent) % 7 + 1
    if dtype in COMPLEX:
        numbers = torch.complex(numbers.double(), (2 * numbers - 7).double())
    elif dtype is torch.bool:
        numbers = numbers % 2
    return view.over(numbers.to(dtype).untyped_storage(), dtype)


@settings(max_examples=examples(200))
@given(shapes, st.sampled_from(DTYPES), starts, chunks, copiers, st.data())
def test_any_layout_is_taken_into_any_other(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    start: int,
    chunk: int,
    copier: Copier | None,
    data: st.DataObject,
) -> None:
    source = data.draw(views(shape, expanded=True)).random(dtype)
    tensor = data.draw(views(shape)).random(dtype)
    expected = with_elements_of(tensor, source)
    through(Route(start, on_meta(source), tensor), start, source, chunk, copier)
    assert bytes_of_storage(tensor) == expected


@settings(max_examples=examples(100))
@given(shapes, st.sampled_from(DTYPES), starts, chunks, copiers, st.data())
def test_the_same_layout_is_taken_as_it_lies(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    start: int,
    chunk: int,
    copier: Copier | None,
    data: st.DataObject,
) -> None:
    view = data.draw(views(shape))
    source, other = view.random(dtype), data.draw(views(shape))
    tensor = View(shape, view.stride, other.offset, other.behind).random(dtype)
    expected = with_elements_of(tensor, source)
    route = Route(start, on_meta(source), tensor)
    gaps = (route.end - route.start) // dtype.itemsize - source.numel()
    assert route.is_contiguous == (gaps == 0)
    through(route, start, source, chunk, copier)
    assert bytes_of_storage(tensor) == expected


@settings(max_examples=examples(150))
@given(
    shapes,
    st.sampled_from([(COUNTS, COUNTS), (COUNTS, REAL), (REAL, REAL), (REAL + COUNTS, COMPLEX)]),
    starts,
    chunks,
    copiers,
    st.data(),
)
def test_numbers_are_converted_as_torch_does(
    shape: tuple[int, ...],
    kinds: tuple[list[torch.dtype], list[torch.dtype]],
    start: int,
    chunk: int,
    copier: Copier | None,
    data: st.DataObject,
) -> None:
    dtype, other = (data.draw(st.sampled_from(kind)) for kind in kinds)
    source = with_numbers(data.draw(views(shape, expanded=True)), dtype)
    tensor = data.draw(views(shape)).random(other)
    expected = copy_of(tensor)
    expected.copy_(source)
    through(Route(start, on_meta(source), tensor), start, source, chunk, copier)
    assert bytes_of_storage(tensor) == bytes_of_storage(expected)


@settings(max_examples=examples(100))
@given(
    shapes,
    st.sampled_from(COMPLEX),
    st.sampled_from([*COMPLEX, torch.float32]),
    st.sampled_from([(True, False), (False, True), (True, True)]),
    chunks,
    st.data(),
)
def test_conjugate_and_negative_views_arrive_as_what_they_show(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    other: torch.dtype,
    bits: tuple[bool, bool],
    chunk: int,
    data: st.DataObject,
) -> None:
    conjugate, negative = bits
    if other is torch.float32:
        # A real tensor has only the negative bit, as the imaginary part of a conjugate view has.
        dtype, conjugate, negative = other, False, True
    source = with_numbers(data.draw(views(shape, expanded=True)), dtype)
    # In the widest dtype, because torch lacks some operations for the narrowest complex one.
    shown = source.to(torch.float64 if other is torch.float32 else torch.complex128)
    if conjugate:
        source, shown = source.conj(), shown.conj().resolve_conj()
    if negative:
        source, shown = torch._neg_view(source), -shown
    tensor = data.draw(views(shape)).random(other)
    expected = copy_of(tensor)
    expected.copy_(shown)
    through(Route(0, on_meta(source), tensor), 0, source, chunk)
    assert bytes_of_storage(tensor) == bytes_of_storage(expected)


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": lambda: torch.zeros(4, 6, 2, 3),
    "transposed": lambda: torch.zeros(3, 2, 6, 4).permute(3, 2, 1, 0),
    "channels last": lambda: torch.zeros(4, 6, 2, 3).to(memory_format=torch.channels_last),
    "every third": lambda: torch.zeros(4, 6, 2, 9)[..., ::3],
    "slice": lambda: torch.zeros(9, 6, 4, 3)[3:7, :, 1:3],
    "part of a flat buffer": lambda: torch.zeros(200)[7:151].view(4, 6, 2, 3),
    "windows side by side": lambda: torch.zeros(4, 6, 6).unfold(2, 3, 3),
}


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("origin", [*LAYOUTS, "expanded"])
def test_layouts_of_models(origin: str, to: str) -> None:
    if origin == "expanded":
        source = torch.randn(1, 6, 1, 3).expand(4, 6, 2, 3)
    else:
        source = LAYOUTS[origin]().copy_(torch.randn(4, 6, 2, 3))
    tensor = LAYOUTS[to]()
    through(Route(64, on_meta(source), tensor), 64, source, 192)
    assert torch.equal(tensor, source)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_without_dimensions(dtype: torch.dtype) -> None:
    source, tensor = View((), (), 3).random(dtype), View((), (), 5, 5).random(dtype)
    expected = with_elements_of(tensor, source)
    through(Route(0, on_meta(source), tensor), 0, source, 64)
    assert bytes_of_storage(tensor) == expected


def test_dimensions_of_one_element_do_not_matter() -> None:
    source = View((1, 5, 1), (77, 1, 0)).random(torch.int32)
    assert Route(0, on_meta(source), torch.zeros(1, 5, 1, dtype=torch.int32)).is_contiguous


@pytest.mark.parametrize("stride", [1, 2], ids=["plain", "strided"])
def test_tensors_of_inference_mode_and_parameters_are_written_to(stride: int) -> None:
    source = torch.randn(100)
    with torch.inference_mode():
        inference = torch.zeros(100 * stride)[::stride]
    parameter = torch.nn.Parameter(torch.zeros(100 * stride)[::stride])
    computed = torch.zeros(100 * stride, requires_grad=True)[::stride] * 1
    for tensor in (inference, parameter, computed):
        for inside in (False, True):
            tensor.data.zero_()
            route = Route(0, on_meta(source), tensor)
            with torch.inference_mode(inside):
                through(route, 0, source, 64)
            assert torch.equal(tensor, source)
    assert inference.is_inference()
    assert (parameter.is_leaf, parameter.requires_grad) == (True, True)
    assert computed.grad_fn is not None


def test_an_alias_is_a_plain_tensor() -> None:
    with torch.inference_mode():
        storage = torch.nn.Parameter(torch.arange(6.0)).untyped_storage()
        tensor = alias(storage, torch.float32, 1, (2, 2), (1, 2))
    assert not tensor.is_inference()
    assert not tensor.requires_grad
    assert tensor.tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_an_alias_does_not_let_a_storage_grow() -> None:
    storage = torch.UntypedStorage(24)
    assert alias(storage, torch.float32, 1, (2, 2), (3, 1)).shape == (2, 2)
    assert alias(storage, torch.float32, 6, (0, 5), (1, 1)).shape == (0, 5)
    for offset, shape, stride in ((2, (2, 2), (3, 1)), (6, (), ()), (0, (7,), (1,))):
        with pytest.raises(ValueError, match="beyond a storage of 24 bytes"):
            alias(storage, torch.float32, offset, shape, stride)
    assert storage.nbytes() == 24


# Without a route: copies after the whole storage has arrived


@settings(max_examples=examples(100))
@given(shapes, st.sampled_from(DTYPES), st.data())
def test_elements_are_copied_as_they_are(
    shape: tuple[int, ...], dtype: torch.dtype, data: st.DataObject
) -> None:
    source = data.draw(views(shape, expanded=True)).random(dtype)
    tensor = data.draw(views(shape)).random(dtype)
    expected = with_elements_of(tensor, source)
    copy_elements(tensor, source, DeviceCopier())
    assert bytes_of_storage(tensor) == expected


def test_elements_are_copied_as_what_they_mean() -> None:
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    for source, means in (
        (torch.tensor([1, 2]), [1, 2]),
        (numbers.conj(), [1 - 2j, 3 + 4j]),
        (torch._neg_view(numbers), [-1 - 2j, -3 + 4j]),
        (torch._neg_view(numbers.conj()), [-1 + 2j, -3 - 4j]),
        (numbers.conj().imag, [-2, 4]),
    ):
        for dtype in (torch.complex64, torch.complex128):
            tensor = torch.zeros(2, dtype=dtype)
            copy_elements(tensor, source, DeviceCopier())
            assert tensor.tolist() == means


@pytest.mark.parametrize("inside", [False, True])
def test_elements_are_copied_in_any_mode(inside: bool) -> None:
    with torch.inference_mode():
        inference = torch.zeros(3)
    with torch.inference_mode(inside):
        for tensor in (inference, torch.nn.Parameter(torch.zeros(3)), torch.zeros(3)):
            for source in (torch.ones(3), torch.tensor([True, True, True])):
                tensor.detach().zero_()
                copy_elements(tensor, source, DeviceCopier())
                assert tensor.tolist() == [1, 1, 1]


# Changes of targets that a route notices


def resize(tensor: torch.Tensor) -> None:
    tensor.resize_(3)


def resize_storage(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def set_memory(tensor: torch.Tensor) -> None:
    tensor.set_(torch.zeros(4).untyped_storage(), 0, (4,), (1,))


def set_data(tensor: torch.Tensor) -> None:
    tensor.data = torch.zeros(4)


def set_dtype(tensor: torch.Tensor) -> None:
    tensor.data = tensor.view(torch.int32)


def reshape(tensor: torch.Tensor) -> None:
    tensor.data = tensor.view(2, 2)


@pytest.mark.parametrize(
    "change", [resize, resize_storage, set_memory, set_data, set_dtype, reshape]
)
@pytest.mark.parametrize("step", [1, 2], ids=["plain", "strided"])
def test_changes_of_shape_and_memory_are_noticed(
    change: Callable[[torch.Tensor], None], step: int
) -> None:
    tensor = torch.zeros(4)
    route = Route(0, on_meta(torch.zeros(4 * step)[::step]), tensor)
    route.check()
    tensor += 1
    route.check()
    change(tensor)
    with pytest.raises(MismatchError, match="changed its shape or its memory"):
        route.check()


def test_one_route_is_enough_for_what_is_tied_at_both_ends() -> None:
    source, tensor = on_meta(torch.zeros(4, 4)), torch.zeros(4, 4)
    key = Route(64, source, tensor).key
    assert Route(64, on_meta(torch.zeros(4, 4)), tensor.detach()).key == key
    bits = torch.zeros(4, 4, dtype=torch.complex64)
    different: list[tuple[int, torch.Tensor, torch.Tensor]] = [
        (0, source, tensor),
        (64, source.t(), tensor),
        (64, source.view(torch.int32), tensor),
        (64, source, torch.zeros(4, 4)),
        (64, source, tensor.t()),
        *((64, each, bits) for each in (on_meta(bits), on_meta(bits.conj()))),
        (64, on_meta(torch._neg_view(bits)), bits),
    ]
    keys = {key, *(Route(*args).key for args in different)}
    assert len(keys) == 1 + len(different)


def test_the_memory_of_a_plain_tensor_is_shown_by_the_range_of_the_payload() -> None:
    tensor = torch.arange(10, dtype=torch.int16)[2:8]
    route = Route(64, on_meta(torch.zeros(9, dtype=torch.int16)[3:]), tensor)
    assert (route.start, route.end) == (70, 82)
    route.checked_view(72, 74)[:] = b"\xff\xff"
    assert tensor.tolist() == [2, -1, 4, 5, 6, 7]
    assert bytes(route.checked_view(70, 82)) == bytes(raw(tensor).flatten().tolist())


def test_place_is_all_that_must_stay() -> None:
    tensor: Any = torch.nn.Parameter(torch.zeros(4))
    state = memory_state(tensor)
    with torch.no_grad():
        tensor.fill_(3)
    assert memory_state(tensor) == memory_state(tensor.detach()) == state
    assert memory_state(torch.zeros(4)) != state
