"""Every hostile skeleton gets its one error, without a crash, a hang or a flood."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import _utils

import aiotorchio
from tests.graph import forge, hostile

CASES = {f"tree-{key}": case for key, case in hostile.trees().items()} | {
    f"pickle-{key}": case for key, case in hostile.pickles().items()
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    if not sys.platform.startswith("linux"):
        pytest.skip("limits of memory are set as Linux has them")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.graph.hostile"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    # After a crash the cases that follow have no outcome, and the first of them is the culprit.
    lines = [line.split("\t") for line in run.stdout.splitlines()]
    return {line[0]: line[1] for line in lines} | {"": run.stderr[-2000:]}


@pytest.mark.parametrize("key", CASES)
def test_hostile(key: str, outcomes: dict[str, str]) -> None:
    outcome = outcomes.get(key, f"crashed: {outcomes['']}")
    skeleton, wanted = CASES[key]
    assert outcome.split()[0] == wanted, outcome
    if len(skeleton) > 2**16:
        return
    # It is known to be harmless now.
    with pytest.raises(aiotorchio.AiotorchioError) as caught:
        forge.load(forge.message(skeleton, key.split("-")[0], hostile.tensors()))
    assert type(caught.value).__name__ == wanted
    assert not _utils._sparse_tensors_to_validate
    assert not torch.sparse.check_sparse_tensor_invariants.is_enabled()
