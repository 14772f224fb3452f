"""``Limits.sparse_nnz``: the count of each kind of tensor, and that checks stop at the limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aiotorchio import InvalidObjectError, LimitExceeded, Limits
from aiotorchio.codecs.pickled import safe_nested
from aiotorchio.common import sparse_indices
from tests.support import craft, hostile
from tests.support.corpus import assert_same

Make = Callable[[], torch.Tensor]
# How to make a tensor, and its count.
COUNTS: dict[str, tuple[Make, int]] = {
    "coo": (lambda: torch.eye(3).to_sparse(), 3),
    "coo_of_three_dimensions": (lambda: torch.ones(2, 2, 2).to_sparse(), 8),
    "coo_hybrid": (lambda: torch.ones(2, 3).to_sparse(1), 2),
    "coo_of_none": (lambda: torch.zeros(2, 3).to_sparse(), 1),
    "coo_without_dimensions": (lambda: torch.tensor(7.0).to_sparse(), 1),
    "csr": (lambda: torch.eye(4).to_sparse_csr(), 5 + 4),
    "csc": (lambda: torch.ones(2, 3).to_sparse_csc(), 4 + 6),
    "bsr": (lambda: torch.eye(4).to_sparse_bsr((2, 2)), 3 + 2),
    "bsc": (lambda: torch.eye(4).to_sparse_bsc((2, 2)), 3 + 2),
    "csr_batched": (lambda: torch.ones(2, 3, 3).to_sparse_csr(), 2 * (4 + 9)),
    "csr_of_none": (lambda: torch.zeros(0, 3).to_sparse_csr(), 1),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), 2),
    "jagged": (
        lambda: torch.nested.nested_tensor(
            [torch.ones(2), torch.ones(3), torch.ones(1)], layout=torch.jagged
        ),
        3,
    ),
    "jagged_of_none": (
        lambda: torch.nested.nested_tensor_from_jagged(torch.ones(0, 2), torch.tensor([0])),
        1,
    ),
}


@pytest.mark.parametrize("key", COUNTS)
def test_what_counts(key: str) -> None:
    make, count = COUNTS[key]
    # Two tensors in one load; the first one twice.
    first, second = make(), make()
    obj = [first, second, first, torch.ones(100)]
    loaded = craft.round_trip(obj, limits=Limits(sparse_nnz=2 * count))
    assert_same(loaded[:2], [first, second])
    with pytest.raises(
        LimitExceeded,
        match=rf"have {2 * count} indices and parts, but at most {2 * count - 1} are "
        r"allowed \(Limits.sparse_nnz\)",
    ) as caught:
        craft.round_trip(obj, limits=Limits(sparse_nnz=2 * count - 1))
    assert caught.value.entry == "skeleton" and caught.value.offset is not None


def test_each_load_has_its_own_count() -> None:
    for _ in range(3):
        craft.round_trip(torch.eye(3).to_sparse(), limits=Limits(sparse_nnz=3))


def test_none_at_all() -> None:
    with pytest.raises(LimitExceeded, match="sparse_nnz"):
        craft.round_trip(torch.zeros(2).to_sparse(), limits=Limits(sparse_nnz=0))
    craft.round_trip(torch.zeros(2), limits=Limits(sparse_nnz=0))


@pytest.mark.parametrize(
    ("key", "count"), [("coo_index", 4), ("csr_index", 6), ("bsr_index", 6), ("nested_beyond", 1)]
)
def test_nothing_is_checked_beyond_the_limit(
    monkeypatch: pytest.MonkeyPatch, key: str, count: int
) -> None:
    skeleton, tensors = hostile.invalid()[key], hostile.tensors()
    with pytest.raises(InvalidObjectError):
        craft.load_pickle(skeleton, tensors, limits=Limits(sparse_nnz=count))

    def steps(*args: Any, **options: Any) -> None:
        pytest.fail("indices are checked")

    monkeypatch.setattr(sparse_indices, "IN_PYTHON", 0)
    monkeypatch.setattr(sparse_indices, "steps", steps)
    monkeypatch.setattr(safe_nested, "steps", steps)
    with pytest.raises(LimitExceeded, match="sparse_nnz"):
        craft.load_pickle(skeleton, tensors, limits=Limits(sparse_nnz=count - 1))
