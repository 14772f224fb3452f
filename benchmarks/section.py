"""Sections of the suite: runs that are compared with each other, and goals for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from common import MIB, Method
from goals import Goal
from peers import PEERS
from rounds import Run

KIB, GIB = 2**10, 2**30

# The number of tensors, and bytes of each.
LARGE = (64, 16 * MIB)


@dataclass(frozen=True)
class Section:
    """Runs that are compared with each other.

    Attributes:
        title: The heading.
        runs: The runs of each round.
        goals: The goals for these runs.
        missing: Methods that cannot run here, and why.
        reason: Why the whole section cannot run here.
        spare: Memory that is needed in addition to the states that are sent, in sizes of the
            largest.
    """

    title: str
    runs: Sequence[Run]
    goals: Sequence[Goal] = ()
    missing: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    spare: float = 1.25

    def needs(self) -> int:
        """Return the bytes of memory that should be available."""
        states = {(run.count, run.nbytes): run.state_size for run in self.runs}
        largest = max(run.state_size * run.copies for run in self.runs)
        return sum(states.values()) + int(self.spare * largest)

    def scaled(self, scale: float) -> Section:
        """Return the section with only this share of the bytes, for a trial."""
        if scale == 1:
            return self
        # A trial gives ratios and lags; the goals for memory are about objects of full size.
        goals = [goal for goal in self.goals if goal.unit != "MiB"]
        return replace(self, runs=[run.shrunk(scale) for run in self.runs], goals=goals)


def _peer(name: str) -> Method:
    return PEERS[name]()


def installed(names: Iterable[str]) -> tuple[dict[str, Callable[[], Method]], dict[str, str]]:
    """Return the peers that can run here, and why the others cannot."""
    makers: dict[str, Callable[[], Method]] = {}
    missing = {}
    for name in names:
        try:
            _peer(name)
        except ImportError as error:
            missing[name] = str(error)
        else:
            # By name: it is sent to other processes.
            makers[name] = functools.partial(_peer, name)
    return makers, missing


def readable(nbytes: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.4g} {name}"
    return f"{nbytes} B"
