"""Runs every bad input over every backend: one class of error, in time, and no other effect.

All work that a peer can cause stays in bounds, with each loader.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attacks.harness import CASES, WAYS, Run, check_group, groups, only_where_measured, run_of

ROOT = Path(__file__).parents[2]
FAMILIES = tuple(dict.fromkeys(case.family for case in CASES.values()))
GROUPS = groups(FAMILIES)
pytestmark = only_where_measured


@pytest.fixture(scope="module")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The outcomes of all selected cases, by backend and name."""
    return run_of(request.session.items, test_attacks, tmp_path_factory.mktemp("attacks"))


@pytest.mark.parametrize(("way", "names"), GROUPS)
def test_attacks(way: str, names: tuple[str, ...], whole: Run) -> None:
    check_group(way, names, whole)


@pytest.mark.full
def test_the_document_has_their_numbers() -> None:
    text = " ".join((ROOT / "docs" / "security.md").read_text(encoding="utf-8").split())
    tried = sum(len(group.values[1]) for group in GROUPS)
    honest = sum(bool(case.honest) for case in CASES.values())
    assert f"and {honest} honest objects" in text
    assert f"{len(CASES)} cases, {tried:,} over {len(WAYS)} ways" in text
