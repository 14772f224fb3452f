"""Each hostile skeleton of ``support/hostile.py`` is refused with the expected error and reason.

A refusal has an entry and an offset, a short message, and leaves no global state of torch changed.
"""

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
# The longest error message: an error repeats only a short excerpt of text from the peer.
TEXT_MAX = 500
# Enough for every case; too short to do harm.
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
    # A message that repeats torch's own words may be longer; it shows nothing of the object.
    if "doubled" in key or "cannot be rebuilt" not in error.message:
        assert len(error.message) <= TEXT_MAX, error
    assert error.entry is not None and error.offset is not None
    assert not _utils._sparse_tensors_to_validate
    assert not torch.sparse.check_sparse_tensor_invariants.is_enabled()


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if case.limits or case.bounds])
def test_low_limits_are_the_reason(key: str, tensors: list[torch.Tensor]) -> None:
    """With the default limits, these small inputs raise no ``LimitExceeded``."""
    case = CASES[key]
    message = craft.message(case.skeleton, key.split("-")[0], tensors)
    try:
        craft.load(message)
    except aiotorchio.AiotorchioError as error:
        # Some cases are also refused for another reason: a class outside the allowlist, or a map.
        assert not isinstance(error, aiotorchio.LimitExceeded)


def test_every_case_is_small() -> None:
    assert max(len(case.skeleton) for case in CASES.values()) <= SKELETON_MAX
