"""Goals: how each value is computed from samples of rounds, and whether it meets its target."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypedDict

from common import MIB
from rounds import Sample

SENDER, RECEIVER = 0, 1
SIDES = ("sender", "receiver")

Samples = dict[str, list[Sample]]
# The measured value, and its minimum and maximum over rounds.
Measured = tuple[float, float, float]


@dataclass(frozen=True)
class Goal:
    """A goal: a measured value, and the target that it should meet.

    Attributes:
        what: The run of aiotorchio.
        against: The run that it is compared with.
        unit: The unit of the target.
        target: The value that is good enough.
        measure: Returns the value; raises KeyError if there is no such run here.
        at_most: Whether less is better.
    """

    what: str
    against: str
    unit: str
    target: float
    measure: Callable[[Samples], Measured]
    at_most: bool = False


class Result(TypedDict):
    """A goal as it is stored; ``measured`` and ``met`` are None if it could not be measured."""

    what: str
    against: str
    unit: str
    target: float
    at_most: bool
    measured: float | None
    range: list[float] | None
    met: bool | None


def judge(goal: Goal, samples: Samples) -> Result:
    try:
        measured: Measured | None = goal.measure(samples)
    except KeyError:
        measured = None
    met = None
    if measured:
        met = measured[0] <= goal.target if goal.at_most else measured[0] >= goal.target
    return {
        "what": goal.what,
        "against": goal.against,
        "unit": goal.unit,
        "target": goal.target,
        "at_most": goal.at_most,
        "measured": measured[0] if measured else None,
        "range": list(measured[1:]) if measured else None,
        "met": met,
    }


def seconds(samples: list[Sample]) -> list[float]:
    return [sample["seconds"] for sample in samples]


def times(run: str, *others: str) -> Callable[[Samples], Measured]:
    """Compare times: the speed of the run relative to the slowest of the other runs."""

    def measure(samples: Samples) -> Measured:
        slowest = max(
            (seconds(samples[other]) for other in others),
            key=lambda other: statistics.median(other),
        )
        own = seconds(samples[run])
        ratios = [other / this for other, this in zip(slowest, own, strict=True)]
        value = statistics.median(slowest) / statistics.median(own)
        return value, min(ratios), max(ratios)

    return measure


def speed(what: str, against: str, target: float, *, run: str = "ours", base: str = "raw") -> Goal:
    """Compare speeds: how many times as fast as the other run."""
    return Goal(what, against, "x", target, times(run, base))


def at_most(
    what: str, against: str, unit: str, target: float, measure: Callable[[Samples], Measured]
) -> Goal:
    """Make a goal of which less is better."""
    return Goal(what, against, unit, target, measure, at_most=True)


def peak(run: str, side: int, held: int = 0) -> Callable[[Samples], Measured]:
    """Return the highest of all peaks, in MiB above the memory that is needed anyway."""

    def measure(samples: Samples) -> Measured:
        peaks = [(sample["peak"][side] - held) / MIB for sample in samples[run] if sample["peak"]]
        return max(peaks), min(peaks), max(peaks)

    return measure


def late(samples: Iterable[Sample], side: int) -> Counter[float]:
    """Return how many heartbeats came so many milliseconds late."""
    counts: Counter[float] = Counter()
    for sample in samples:
        notes: dict[str, int] = sample["notes"][side]["late"]
        counts.update({float(value): count for value, count in notes.items()})
    return counts


def percentile(counts: Counter[float], share: float) -> float:
    """Return the least value that at least such a share of the samples does not exceed."""
    wanted, seen = share * counts.total(), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    return max(counts)


def lag(run: str, side: int, share: float) -> Callable[[Samples], Measured]:
    """Return a percentile of the lag over all heartbeats of all rounds."""

    def measure(samples: Samples) -> Measured:
        each = [percentile(late([sample], side), share) for sample in samples[run]]
        return percentile(late(samples[run], side), share), min(each), max(each)

    return measure


def last_to_mean(run: str) -> Callable[[Samples], Measured]:
    """Return how much later than the mean the last of many loads is done."""

    def measure(samples: Samples) -> Measured:
        ratios = []
        for sample in samples[run]:
            done: list[float] = sample["notes"][RECEIVER]["done"]
            ratios.append(max(done) / statistics.mean(done))
        return statistics.median(ratios), min(ratios), max(ratios)

    return measure
