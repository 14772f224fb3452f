"""The test suite itself: its tiers, its deadlines, and one error for one fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import speed, tiers

pytest_plugins = "pytester"

ROOT = Path(__file__).parents[1]
HOOKS = """
from tests.conftest import (
    pytest_collection_modifyitems,
    pytest_fixture_setup,
    pytest_generate_tests,
)
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """An empty suite with the hooks of this one."""
    pytester.makeconftest(HOOKS)
    pytester.makeini("[pytest]\nmarkers = full\nasyncio_default_fixture_loop_scope = function")
    return pytester


# ------------------------------------------------------------------------------ tiers

GRID = """
import pytest

@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", range(5))
def test_grid(a, b):
    print("grid", a, b)

@pytest.mark.parametrize("world", "xyz")
def test_worlds(world):
    print("world")

@pytest.mark.parametrize("world", "xyz")
@pytest.mark.parametrize("obj", range(4))
def test_objects_of_worlds(obj, world):
    print("object", obj)

@pytest.mark.parametrize("kind", ["anyio", "socket"])
def test_streams(kind):
    print("stream")

@pytest.mark.parametrize("kind", ["open", "closed"])
def test_other_kinds(kind):
    print("kind", kind)

@pytest.mark.parametrize("n", range(100))
def test_many(n):
    print("many")

def test_single():
    print("single")

@pytest.mark.full
def test_slow():
    print("slow")
"""


def printed(suite: pytest.Pytester, *options: str) -> list[str]:
    result = suite.runpytest_inprocess("-q", "-s", *options)
    assert result.ret == 0
    words = ("grid", "world", "object", "stream", "kind", "many", "single", "slow")
    lines = [line.lstrip(".") for line in result.outlines]
    return [line for line in lines if line.startswith(words)]


def test_the_fast_tier_shows_each_value_once_in_one_way(suite: pytest.Pytester) -> None:
    suite.makepyfile(GRID)
    lines = printed(suite, "-m", tiers.FAST)
    for count in range(3):
        assert any(line.startswith(f"grid {count}") for line in lines)
    for count in range(5):
        assert any(line.startswith("grid") and line.endswith(f"{count}") for line in lines)
    assert sum(line.startswith("grid") for line in lines) < 10
    assert lines.count("world") == lines.count("stream") == lines.count("single") == 1
    assert [line for line in lines if line.startswith("object")] == [f"object {n}" for n in "0123"]
    assert [line for line in lines if line.startswith("kind")] == ["kind open", "kind closed"]
    assert 1 < lines.count("many") < 50
    assert "slow" not in lines


def test_the_tiers_are_the_whole(suite: pytest.Pytester) -> None:
    suite.makepyfile(GRID)
    fast, full = printed(suite, "-m", tiers.FAST), printed(suite, "-m", "full")
    everything = printed(suite, "-m", "full or not full")
    assert sorted(fast + full) == sorted(everything)
    assert len(everything) == 15 + 3 + 12 + 2 + 2 + 100 + 1 + 1


def test_a_case_that_is_asked_for_runs(suite: pytest.Pytester) -> None:
    path = suite.makepyfile(GRID)
    for world in "xyz":
        assert printed(suite, "-m", tiers.FAST, f"{path}::test_worlds[{world}]") == ["world"]


@pytest.mark.parametrize("name", [*tiers._SLOW, *tiers._CASES_MAX_OF])
def test_what_the_rules_name_is_there(name: str) -> None:
    path, _, function = name.partition("::")
    assert (ROOT / path).exists()
    assert not function or f"def {function}(" in (ROOT / path).read_text(encoding="utf-8")


def test_there_are_fewer_random_inputs_in_the_fast_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "_fast", False)
    assert tiers.examples(100) == 100
    assert tiers.some(range(100)) == range(100)
    tiers.set_tier(tiers.FAST)
    assert tiers.examples(100) == 20
    assert tiers.some(range(100)) == range(0, 100, 5)
    tiers.set_tier("full or not full")
    assert tiers.examples(100) == 100


# ------------------------------------------------------------------------------ deadlines


def test_patience_grows_with_the_time_that_work_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0

    def work() -> None:
        nonlocal now
        now += 3 * speed._REFERENCE

    monkeypatch.setattr("tests.support.speed.time.monotonic", lambda: now)
    monkeypatch.setattr(speed, "_work", work)
    monkeypatch.setattr(speed, "_measured", None)
    assert speed.slowdown() == pytest.approx(3)
    assert speed.patience(10) == pytest.approx(30 * speed._MARGIN, abs=1 / 8)
    # The measured slowdown stays valid for a while.
    now += speed._HOLDS / 2
    before = now
    assert speed.slowdown() == pytest.approx(3)
    assert now == before
    now += speed._HOLDS
    assert speed.slowdown() == pytest.approx(3)
    assert now > before + speed._HOLDS


@pytest.mark.parametrize(("factor", "expected"), [(0.1, 1), (1000, speed._SLOWDOWN_MAX)])
def test_patience_has_bounds(
    factor: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, factor * speed._REFERENCE])
    monkeypatch.setattr("tests.support.speed.time.monotonic", lambda: next(times))
    monkeypatch.setattr(speed, "_work", lambda: 0)
    monkeypatch.setattr(speed, "_measured", None)
    assert speed.slowdown() == expected


# ------------------------------------------------------------------------------ one error


@pytest.mark.parametrize("scope", ["module", "session", "class", "package"])
def test_a_shared_fixture_that_breaks_is_one_error(suite: pytest.Pytester, scope: str) -> None:
    suite.makepyfile(
        f"""
        import pytest

        @pytest.fixture(scope="{scope}")
        def broken():
            raise OSError("no room\\nfor two lines")

        class TestAll:
            @pytest.mark.parametrize("n", range(9))
            def test_all(self, n, broken):
                pass

            def test_other(self):
                pass
        """
    )
    result = suite.runpytest_inprocess("-rs", "-m", "full or not full")
    result.assert_outcomes(errors=1, skipped=8, passed=1)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*'broken' is broken, *: OSError: no room"])


def test_a_fixture_of_one_test_is_an_error_of_each(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import pytest

        @pytest.fixture
        def broken():
            raise OSError

        @pytest.mark.parametrize("n", range(3))
        def test_all(n, broken):
            pass
        """
    )
    suite.runpytest_inprocess("-m", "full or not full").assert_outcomes(errors=3)
