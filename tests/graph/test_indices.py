"""The check of COO indices accepts and refuses what torch's own does, on both of its ways."""

from __future__ import annotations

import itertools

import pytest
import torch

from aiotorchio.graph import indices as indices_module
from aiotorchio.graph.indices import check_coo_indices


def refused_by_torch(indices: torch.Tensor, size: tuple[int, ...], distinct: bool) -> bool:
    values = torch.ones(indices.shape[1])
    try:
        torch._validate_sparse_coo_tensor_args(indices, values, size, distinct)
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("in_python", [0, 256])
@pytest.mark.parametrize("distinct", [False, True])
def test_as_torch(monkeypatch: pytest.MonkeyPatch, in_python: int, distinct: bool) -> None:
    monkeypatch.setattr(indices_module, "IN_PYTHON", in_python)
    monkeypatch.setattr(indices_module, "STEP", 2)
    for numbers in itertools.product((-1, 0, 1, 2), repeat=4):
        for shape, size in (((1, 4), (2,)), ((2, 2), (2, 1))):
            indices = torch.tensor(numbers).reshape(shape)
            try:
                check_coo_indices(indices, size, distinct=distinct)
                refused = False
            except RuntimeError:
                refused = True
            assert refused == refused_by_torch(indices, size, distinct), indices
