"""Every hostile skeleton gets its one error, without a crash, a hang or a flood."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.graph import hostile

CASES = {f"tree-{key}": wanted for key, (_, wanted) in hostile.trees().items()} | {
    f"pickle-{key}": wanted for key, (_, wanted) in hostile.pickles().items()
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
    assert outcome.split()[0] == CASES[key], outcome
