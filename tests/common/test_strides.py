"""Order, extent and density of strided views, compared with a list of all addresses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiotorchio.common.strides import Order, boxes
from tests.support.payload_layouts import nested, shapes


def addresses(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """The address of each index, in row-major order of the indices."""
    return [
        sum(at * step for at, step in zip(index, stride, strict=True))
        for index in itertools.product(*map(range, shape))
    ]


@given(shapes, st.data())
def test_nested_views_are_in_the_order_of_their_addresses(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    stride, dims = nested(data.draw, shape, expanded=True)
    order = Order(shape, stride)
    here = addresses(order.shape, order.stride)
    assert order.distinct
    assert here == sorted(set(addresses(shape, stride)))
    assert (order.count, order.extent) == (len(here), here[-1] + 1)
    assert order.dims == dims
    assert [order.shape, order.stride] == [[each[dim] for dim in dims] for each in (shape, stride)]
    wide = {dim for dim, size in enumerate(shape) if size > 1}
    assert set(order.expanded) == wide - set(dims)
    assert all(stride[dim] == 0 for dim in order.expanded)
    for address in range(order.extent + 2):
        assert order.before(address) == sum(each < address for each in here)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=4).map(
        lambda dims: ([size for size, _ in dims], [step for _, step in dims])
    )
)
def test_any_view_is_judged_as_if_it_were_counted(view: tuple[list[int], list[int]]) -> None:
    shape, stride = view
    order = Order(shape, stride)
    everywhere = addresses(shape, stride)
    if not everywhere:
        assert (order.dims, order.expanded, order.count, order.extent) == ([], [], 0, 0)
        return
    here = addresses(order.shape, order.stride)
    assert order.distinct == (here == sorted(set(here)))
    assert order.extent == max(everywhere) + 1
    # Dense: each byte of the extent exactly once.
    assert order.dense == (sorted(everywhere) == list(range(order.extent)))


@pytest.mark.parametrize(
    ("tensor", "distinct", "dense"),
    [
        (torch.empty(()), True, True),
        (torch.empty(5, 3), True, True),
        (torch.empty(5, 3).T, True, True),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), True, True),
        (torch.empty(9)[::3], True, False),
        (torch.empty(5, 4)[:, 1:3], True, False),
        (torch.empty(5, 4)[2:4], True, True),
        (torch.empty(3, 1).expand(3, 4), True, False),
        (torch.empty(9).unfold(0, 3, 3), True, True),
        (torch.empty(9).unfold(0, 3, 1), False, False),
        (torch.empty(4, 4).diagonal(), True, False),
        # All addresses differ, but the dimensions are not nested.
        (torch.empty(8).as_strided((2, 3), (3, 2)), False, False),
    ],
)
def test_views_that_torch_makes(tensor: torch.Tensor, distinct: bool, dense: bool) -> None:
    order = Order(tensor.shape, tensor.stride())
    assert (order.distinct, order.dense) == (distinct, dense)


@given(shapes, st.data())
def test_boxes_are_the_run_in_its_order_and_few(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    numbers = torch.arange(count).reshape(shape)
    found = list(boxes(shape, start, stop))
    assert [at for box in found for at in numbers[box].flatten().tolist()] == [*range(start, stop)]
    assert all(len(box) == len(shape) for box in found)
    assert all(numbers[box].numel() for box in found)
    assert len(found) <= max(2 * len(shape), 1)


def test_no_run_has_no_boxes() -> None:
    assert list(boxes((2, 3), 4, 4)) == list(boxes((2, 3), 4, 2)) == list(boxes((), 0, 0)) == []
    assert list(boxes((), 0, 1)) == [()]
    assert list(boxes((0, 3), 0, 0)) == []
