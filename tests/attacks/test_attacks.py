"""Every bad input, over every way to receive it: one class of error, in time, and nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.attacks import corpus
from tests.attacks.cases import Case, write_cases
from tests.attacks.corpus import AUTHORITY_FILE, WARM_UP, behind_message
from tests.attacks.meter import BUSY_MAX, HELD_MAX, STALL_MAX
from tests.attacks.receiver import WANTED_FILE
from tests.attacks.sender import HONEST_FILE, TLS_FILE

ROOT = Path(__file__).parents[2]
WAYS = [
    "blocking-none-tcp",
    "blocking-none-tls",
    "streams-asyncio-tcp",
    "streams-asyncio-unix",
    "streams-asyncio-tls",
    "streams-uvloop-tcp",
    "anyio-trio-tcp",
    "anyio-trio-tls",
    "socket-trio-unix",
]
CASES = {case.name: case for case in corpus.all_cases()}
# What runs by default: one way that waits on an event loop, one that blocks. Cases that are for
# neither run over the first of their own.
DEFAULT_WAYS = ("streams-asyncio-tcp", "blocking-none-tcp")
# In seconds, beyond a deadline; both are longer on a machine that is slow or busy.
GRACE = 2

Outcomes = dict[tuple[str, str], dict[str, Any]]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is measured as Linux has it"
)


def is_default(way: str, case: Case) -> bool:
    """Whether a case runs over a way without ``-m full``."""
    ways = [way for way in WAYS if case.is_for(way)]
    return way in ([way for way in ways if way in DEFAULT_WAYS] or ways[:1])


def groups() -> Iterator[Any]:
    """Way, and names of the cases of one family that run over it by default, or only in full."""
    for way in WAYS:
        for family in dict.fromkeys(case.family for case in CASES.values()):
            cases = [case for case in CASES.values() if case.family == family and case.is_for(way)]
            for default in (True, False):
                names = tuple(case.name for case in cases if is_default(way, case) == default)
                if names:
                    marks = [] if default else [pytest.mark.full]
                    tier = "" if default else "-full"
                    yield pytest.param(way, names, id=f"{way}-{family}{tier}", marks=marks)


GROUPS = list(groups())
TRIED = sum(len(group.values[1]) for group in GROUPS)


class Run:
    """One run of all cases that are wanted, in processes of their own.

    What breaks the run itself is told once: the tests after the first are skipped.
    """

    def __init__(self, wanted: dict[str, list[str]], directory: Path) -> None:
        self.outcomes: Outcomes = {}
        self._broken, self._told = "", False
        try:
            self.outcomes = run(wanted, directory)
        except Exception as error:
            self._broken = f"{type(error).__name__}: {error}"

    def check(self) -> None:
        if not self._broken:
            return
        if self._told:
            pytest.skip("the run of the cases broke: the first of these tests says how")
        self._told = True
        pytest.fail(f"the run of the cases broke: {self._broken}", pytrace=False)


@pytest.fixture(scope="module")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What came of all cases that are to be tested, by way and name."""
    wanted: dict[str, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.function is test_attacks:
            way, names = item.callspec.params["way"], item.callspec.params["names"]
            assert isinstance(way, str) and isinstance(names, tuple)
            wanted.setdefault(way, []).extend(name for name in names if is_wanted(name))
    return Run(wanted, tmp_path_factory.mktemp("attacks"))


def is_wanted(name: str) -> bool:
    """Whether a case is among those that ``ATTACKS`` names, patterns between commas, if it does."""
    patterns = os.environ.get("ATTACKS", "*").split(",")
    return any(fnmatch(name, pattern) for pattern in patterns)


def run(wanted: dict[str, list[str]], directory: Path) -> Outcomes:
    """Run cases in processes of their own."""
    names = {WARM_UP}.union(*wanted.values())
    write_cases([case for name, case in CASES.items() if name in names], directory)
    (directory / WANTED_FILE).write_text(json.dumps(wanted))
    (directory / HONEST_FILE).write_bytes(behind_message())
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / AUTHORITY_FILE)
    certificate = authority.issue_cert("localhost").private_key_and_cert_chain_pem
    certificate.write_to_path(directory / TLS_FILE)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.attacks.receiver", directory],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert not done.returncode, done.stderr
    outcomes: Outcomes = {}
    for way in wanted:
        lines = (directory / f"{way}.outcomes").read_text().splitlines()
        for outcome in map(json.loads, lines[1::2]):
            outcomes[way, outcome["name"]] = outcome
    return outcomes


@pytest.mark.parametrize(("way", "names"), GROUPS)
def test_attacks(way: str, names: tuple[str, ...], whole: Run) -> None:
    whole.check()
    wrong = []
    for name in (name for name in names if is_wanted(name)):
        outcome = whole.outcomes.get((way, name))
        faults = ["it has no outcome"] if outcome is None else faults_of(CASES[name], outcome)
        wrong += [f"{name}: {', '.join(faults)}: {outcome}"] if faults else []
    if wrong:
        shown = "\n".join(wrong)
        pytest.fail(f"{len(wrong)} of {len(names)} cases over {way}:\n{shown}", pytrace=False)


def faults_of(case: Case, outcome: dict[str, Any]) -> list[str]:
    """In words, what is wrong with what came of a case."""
    slowness = outcome["slowness"]
    latest = (case.deadline + GRACE) * slowness
    grown_max = case.nbytes + case.memory
    checks = {
        f"not {case.wanted or 'an object'}": outcome["errors"].keys() == {case.wanted},
        f"not because of {case.reason!r}": bool(re.search(case.reason, outcome["text"])),
        "the error has no place": outcome["located"] or not case.located,
        "something else after it": outcome["after"] in (case.after or ("",)),
        "too early or too late": case.earliest <= outcome["seconds"] <= latest,
        "too much memory": bool(case.honest) or outcome["grown"] <= grown_max,
        "the loop was held": outcome["held"] <= HELD_MAX,
        "other threads kept the loop waiting": outcome["busy"] <= BUSY_MAX * slowness,
        "the loop stood still": outcome["stall"] <= STALL_MAX * slowness,
        f"left behind: {outcome['left']}": not outcome["left"],
    }
    return [fault for fault, right in checks.items() if not right]


@pytest.mark.full
def test_the_document_has_their_numbers() -> None:
    text = " ".join((ROOT / "docs" / "security.md").read_text(encoding="utf-8").split())
    honest = sum(bool(case.honest) for case in CASES.values())
    assert f"and {honest} honest objects" in text
    assert f"{len(CASES)} cases, {TRIED:,} over {len(WAYS)} ways" in text
