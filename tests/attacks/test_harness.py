"""Tests the harness of the attacks: an error in it is one failure, and its tables have no holes."""

from __future__ import annotations

import pytest

from tests.attacks import costs
from tests.attacks.harness import CASES, WAYS, fast_ways
from tests.attacks.loaders import LOADERS

pytest_plugins = "pytester"

# Modules like those of the attacks, over a few of their cases.
MODULE = """
import pytest
from tests.attacks import harness

GROUPS = harness.groups(["deep", "deaf"])

@pytest.fixture(scope="module")
def whole(request, tmp_path_factory):
    return harness.run_of(request.session.items, test_attacks, tmp_path_factory.mktemp("attacks"))

@pytest.mark.parametrize(("way", "names"), GROUPS)
def test_attacks(way, names, whole):
    harness.check_group(way, names, whole)
"""


def outcomes(pytester: pytest.Pytester) -> pytest.RunResult:
    pytester.makepyfile(MODULE)
    pytester.makeini("[pytest]\nmarkers = full\nasyncio_default_fixture_loop_scope = function")
    return pytester.runpytest_inprocess("-m", "full or not full", "-p", "no:cacheprovider")


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit('no room')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        # The process ends with status 0, and prints nothing.
        "pass",
    ],
    ids=["fails", "killed", "silent"],
)
def test_a_run_that_breaks_is_one_failure(
    code: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.attacks.harness.RECEIVER", ("-c", code))
    result = outcomes(pytester)
    counts = result.parseoutcomes()
    assert counts["failed"] == 1 and counts["skipped"] > 10 and "errors" not in counts
    result.stdout.fnmatch_lines(["*the run of the cases broke: *"])


def test_files_that_cannot_be_written_are_one_failure(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("tests.attacks.harness.write_cases", refuse)
    assert outcomes(pytester).parseoutcomes()["failed"] == 1


def test_each_kind_of_work_meets_each_loader_or_says_why_not() -> None:
    for name, kind in costs.KINDS.items():
        assert set(costs.met(kind)) | set(kind.without) == set(LOADERS)
        assert all(kind.without.values())
        cases = {case.loader for case in CASES.values() if case.name.startswith(f"cost-{name}-")}
        assert cases == set(costs.met(kind))
        assert kind.fast and set(kind.fast) <= cases and kind.cancels in {*cases, ""}


@pytest.mark.parametrize("family", [family.__name__ for family in costs.FAMILIES])
def test_the_fast_tier_has_each_kind(family: str) -> None:
    def kinds(names: list[str]) -> set[str]:
        return {name.rpartition("-")[0] for name in names}

    names = [name for name, case in CASES.items() if case.family == family]
    fast = [name for name in names if fast_ways(name)]
    assert kinds(fast) == kinds(names)


def test_the_fast_tier_has_each_loader_and_each_loop() -> None:
    fast = {name: case for name, case in CASES.items() if fast_ways(name)}
    assert {case.loader for case in fast.values()} == set(LOADERS)
    assert {case.play for case in fast.values()} == {case.play for case in CASES.values()}
    assert {case.scenario for case in fast.values()} == {case.scenario for case in CASES.values()}
    ways = {way for name in fast for way in fast_ways(name)}
    assert {way.split("-")[1] for way in ways} == {way.split("-")[1] for way in WAYS}
    # Only a backend with an event loop shows that the loop is held.
    for name, case in fast.items():
        waits = any(case.is_for(way) for way in WAYS if not way.startswith("blocking"))
        assert not waits or any(not way.startswith("blocking") for way in fast_ways(name))
