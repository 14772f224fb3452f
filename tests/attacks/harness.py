"""Runs cases over their backends, in new processes; groups of cases are tests.

The fast tier has each case not marked ``full`` over one backend on an event loop, and a part of
them over one blocking backend; the full tier has all cases over all backends.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.attacks.cases import Case, write_cases
from tests.attacks.corpus import AUTHORITY_FILE, WARM_UP, all_cases, behind_message
from tests.attacks.receiver import WANTED_FILE
from tests.attacks.resource_probe import BUSY_MAX, ENDING_MAX, HELD_MAX, STALL_MAX
from tests.attacks.sender import HONEST_FILE, TLS_FILE

__all__ = [
    "CASES",
    "WAYS",
    "Run",
    "check_group",
    "fast_ways",
    "groups",
    "only_where_measured",
    "run_of",
]

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
CASES = {case.name: case for case in all_cases()}
# Backends of the fast tier: those on an event loop, each for a part of the cases; and the blocking
# one, for one of so many of them.
FAST_WAITING = ("streams-asyncio-tcp", "streams-uvloop-tcp", "anyio-trio-tcp", "socket-trio-unix")
FAST_BLOCKING, BLOCKING_EVERY = "blocking-none-tcp", 4
# Families that need stacks as small as those of the threads of blocking backends.
IN_SMALL_STACKS = ("deep",)
# Cases of a test. pytest-xdist begins with the modules that have most tests: these take longest.
GROUP_MAX = 8
# Seconds beyond a deadline; both are longer on a machine that is slow or busy.
GRACE = 2
RECEIVER = ("-W", "ignore", "-m", "tests.attacks.receiver")

Outcomes = dict[tuple[str, str], dict[str, Any]]
Names = tuple[str, ...]

only_where_measured = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is measured as Linux has it"
)


@cache
def fast_ways(name: str) -> list[str]:
    """The backends of a case in the fast tier."""
    case = CASES[name]
    if case.full:
        return []
    ways = [way for way in WAYS if case.is_for(way)]
    number = zlib.crc32(name.encode())
    waiting = [way for way in ways if way in FAST_WAITING]
    waiting = waiting or [way for way in ways if not way.startswith("blocking")]
    chosen = [waiting[number % len(waiting)]] if waiting else []
    blocks = number % BLOCKING_EVERY == 0 or case.family in IN_SMALL_STACKS or not waiting
    if blocks and FAST_BLOCKING in ways:
        chosen.append(FAST_BLOCKING)
    return chosen or ways[:1]


def groups(families: Iterable[str]) -> list[Any]:
    """The parameters of a test: backend, and names of cases of one family, by tier."""
    return [
        pytest.param(way, names, id=identity, marks=marks)
        for identity, way, names, marks in _groups(families)
    ]


def _groups(families: Iterable[str]) -> Iterator[tuple[str, str, Names, list[Any]]]:
    for family in families:
        cases = [case for case in CASES.values() if case.family == family]
        for way in WAYS:
            names = [case.name for case in cases if case.is_for(way)]
            fast = [name for name in names if way in fast_ways(name)]
            rest = [name for name in names if way not in fast_ways(name)]
            for tier, chosen, marks in (("", fast, []), ("-full", rest, [pytest.mark.full])):
                for start in range(0, len(chosen), GROUP_MAX):
                    identity = f"{way}-{family}{tier}-{start // GROUP_MAX}"
                    yield identity, way, tuple(chosen[start : start + GROUP_MAX]), marks


class Run:
    """One run of all selected cases, in new processes.

    An error of the run itself is reported once: the tests after the first are skipped.
    """

    def __init__(self, wanted: dict[str, list[str]], directory: Path) -> None:
        self.outcomes: Outcomes = {}
        self._broken, self._told = "", False
        try:
            self.outcomes = run(wanted, directory)
        except Exception as error:
            # Any exception: the first test reports it, and the others are skipped.
            self._broken = f"{type(error).__name__}: {error}"

    def check(self) -> None:
        if not self._broken:
            return
        if self._told:
            pytest.skip("the run of the cases broke: the first of these tests says how")
        self._told = True
        pytest.fail(f"the run of the cases broke: {self._broken}", pytrace=False)


def run_of(items: Iterable[pytest.Item], test: Callable[..., None], directory: Path) -> Run:
    """Run the cases of all items of a test."""
    wanted: dict[str, list[str]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.function is test:
            way, names = item.callspec.params["way"], item.callspec.params["names"]
            assert isinstance(way, str) and isinstance(names, tuple)
            wanted.setdefault(way, []).extend(name for name in names if is_wanted(name))
    return Run(wanted, directory)


def is_wanted(name: str) -> bool:
    """Whether a case matches ``ATTACKS``, patterns between commas, if that is set."""
    patterns = os.environ.get("ATTACKS", "*").split(",")
    return any(fnmatch(name, pattern) for pattern in patterns)


def run(wanted: dict[str, list[str]], directory: Path) -> Outcomes:
    """Run cases in new processes."""
    names = {WARM_UP}.union(*wanted.values())
    write_cases([case for name, case in CASES.items() if name in names], directory)
    (directory / WANTED_FILE).write_text(json.dumps(wanted))
    (directory / HONEST_FILE).write_bytes(behind_message())
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / AUTHORITY_FILE)
    certificate = authority.issue_cert("localhost").private_key_and_cert_chain_pem
    certificate.write_to_path(directory / TLS_FILE)
    done = subprocess.run(
        [sys.executable, *RECEIVER, directory],
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


def check_group(way: str, names: Names, run: Run) -> None:
    """Fail if an outcome of a group of cases is wrong."""
    run.check()
    wrong = []
    for name in (name for name in names if is_wanted(name)):
        outcome = run.outcomes.get((way, name))
        faults = ["it has no outcome"] if outcome is None else faults_of(CASES[name], outcome)
        wrong += [f"{name}: {', '.join(faults)}: {outcome}"] if faults else []
    if wrong:
        shown = "\n".join(wrong)
        pytest.fail(f"{len(wrong)} of {len(names)} cases over {way}:\n{shown}", pytrace=False)


def faults_of(case: Case, outcome: dict[str, Any]) -> list[str]:
    """The faults of an outcome, in words."""
    slowness = outcome["slowness"]
    latest = (case.deadline + GRACE) * slowness
    received = case.nbytes * max(case.connections, 1)
    checks = {
        f"other than {case.wanted or 'an object'}": outcome["errors"].keys() == {case.wanted},
        f"the error does not match {case.reason!r}": bool(re.search(case.reason, outcome["text"])),
        "the error has no entry, or no valid offset": outcome["located"] or not case.located,
        "the stream is in another state afterwards": outcome["after"] in (case.after or ("",)),
        "too early or too late": case.earliest <= outcome["seconds"] <= latest,
        "too much memory": bool(case.honest) or outcome["grown"] <= received + case.memory,
        "the loop was held": outcome["held"] <= HELD_MAX,
        "other threads kept the loop waiting": outcome["busy"] <= BUSY_MAX * slowness,
        "the loop stood still": outcome["stall"] <= STALL_MAX * slowness,
        "a cancelled call went on": outcome["ending"] <= ENDING_MAX * slowness,
        "a cancelled call waited": outcome["ending_stall"] <= STALL_MAX * slowness,
        f"left behind: {outcome['left']}": not outcome["left"],
    }
    return [fault for fault, right in checks.items() if not right]
