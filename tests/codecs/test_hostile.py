"""Every hostile skeleton gets its one error, for its own reason, and leaves nothing behind."""

from __future__ import annotations

import re

import pytest
import torch
from torch import _utils

import aiotorchio
from aiotorchio import Limits
from tests.support import craft, hostile
from tests.support.lowered import lowered

CASES = {f"tree-{key}": case for key, case in hostile.trees().items()} | {
    f"pickle-{key}": case for key, case in hostile.pickles().items()
}
# Nothing that a peer sends is shown at any length.
TEXT_MAX = 500
# Long enough for every shape, too short for any harm.
SKELETON_MAX = 5000


@pytest.fixture(scope="module")
def tensors() -> list[torch.Tensor]:
    return hostile.tensors()


@pytest.mark.parametrize("key", CASES)
def test_hostile(key: str, tensors: list[torch.Tensor]) -> None:
    case = CASES[key]
    message = craft.message(case.skeleton, key.split("-")[0], tensors)
    with lowered(case.bounds), pytest.raises(aiotorchio.AiotorchioError) as caught:
        craft.load(message, limits=Limits(**case.limits))
    error = caught.value
    assert type(error).__name__ == case.wanted, error
    assert re.search(case.reason, error.message), error
    # torch's own words are long at times, and show nothing of the object.
    if "doubled" in key or "cannot be rebuilt" not in error.message:
        assert len(error.message) <= TEXT_MAX, error
    assert error.entry is not None and error.offset is not None
    assert not _utils._sparse_tensors_to_validate
    assert not torch.sparse.check_sparse_tensor_invariants.is_enabled()


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if case.limits or case.bounds])
def test_low_limits_are_the_reason(key: str, tensors: list[torch.Tensor]) -> None:
    """Under the default ones such an input is as harmless as it is small."""
    case = CASES[key]
    message = craft.message(case.skeleton, key.split("-")[0], tensors)
    try:
        craft.load(message)
    except aiotorchio.AiotorchioError as error:
        # A class that nobody trusts, a map: refused for more than one reason.
        assert not isinstance(error, aiotorchio.LimitExceeded)


def test_every_case_is_small() -> None:
    assert max(len(case.skeleton) for case in CASES.values()) <= SKELETON_MAX
