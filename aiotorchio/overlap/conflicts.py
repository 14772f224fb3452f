"""The search for strided tensors that share bytes of memory.

In: the footprints of many tensors on one device. Out: two of them whose shared byte would be filled
differently (``conflict``), or the tensors whose bytes other tensors fill (``filled``). Both answers
are exact. Most cases need arithmetic only: it separates any number of columns, rows and blocks of
one matrix. The remaining tensors are drawn (see ``drawing``). ``graph.sharing`` calls it for the
targets of one load, and ``engine.claims`` for those of two.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.overlap.drawing import drawn_conflict, drawn_filled
from aiotorchio.overlap.extents import Extents, Footprint, Origin, runs_of

__all__ = ["conflict", "filled"]

Key = TypeVar("Key", bound=Hashable)

# The number of tensors up to which each pair is compared before they are drawn.
_PAIRED_MAX = 64
# The number of tensors, summed over all cuts of a dimension, up to which arithmetic compares them;
# further ones are drawn.
_STEPS_MAX = 100_000


def conflict(
    footprints: Mapping[Key, Footprint], origins: Mapping[Key, Origin]
) -> tuple[Key, Key] | None:
    """Find two tensors of one device that share a byte and take it from different origins.

    Args:
        footprints: The footprints by key. Of two tensors in conflict, the earlier one comes first.
        origins: The origins by the same keys.

    Returns:
        The keys of two tensors; None if there is no conflict.
    """
    groups: dict[object, int] = {}
    members = []
    for n, (key, each) in interruptible(enumerate(footprints.items()), 100):
        group = groups.setdefault(_copy_of(each, origins[key]), len(groups))
        members.append(_Member(each.start, runs_of(each), group, n))
    if len(groups) < 2:
        return None
    keys = list(footprints)
    numbers = sorted(set(_suspects(members, [_STEPS_MAX])))
    if len(numbers) <= _PAIRED_MAX:
        numbers = _in_step([members[n] for n in numbers])
    suspects = [keys[n] for n in numbers]
    if not suspects:
        return None
    return drawn_conflict([(key, footprints[key], origins[key]) for key in suspects])


def _in_step(members: Sequence[_Member]) -> list[int]:
    """Return the numbers of members whose steps allow a byte in common with another group.

    All bytes of ``t[::2]`` are at even elements, for example, and those of ``t[1::4]`` at odd ones.
    """
    return [
        member.number
        for member in members
        if any(other.group != member.group and not _out_of_step(member, other) for other in members)
    ]


def _out_of_step(one: _Member, other: _Member) -> bool:
    """Whether two members have no byte in common, however far they reach."""
    width, its = one.runs[-1][0], other.runs[-1][0]
    step = math.gcd(*(each for member in (one, other) for _, each in member.runs[:-1]))
    behind = other.start - one.start
    if not step:
        return behind >= width or behind <= -its
    return behind % step >= width and behind % step + its <= step


def filled(targets: Mapping[Key, Footprint], others: Sequence[Footprint]) -> set[Key]:
    """Return the targets of which each byte is also one of others.

    All tensors are on one device, and have elements.
    """
    dense = Extents((each.start, each.end, None) for each in others if len(runs_of(each)) == 1)
    ranges = Extents((start, end, (start, end)) for start, end in dense.ranges())
    found, waiting = set(), {}
    for key, each in interruptible(targets.items(), 100):
        if any(
            start <= each.start and each.end <= end
            for start, end in ranges.meeting(each.start, each.end)
        ):
            found.add(key)
        else:
            waiting[key] = each
    keys = list(waiting)
    both = [*waiting.values(), *others]
    members = [
        _Member(each.start, runs_of(each), int(n >= len(keys)), n)
        for n, each in interruptible(enumerate(both), 100)
    ]
    suspects = set(_suspects(members, [_STEPS_MAX]))
    waiting = {key: waiting[key] for n, key in enumerate(keys) if n in suspects}
    if waiting:
        near = [each for n, each in enumerate(others, len(keys)) if n in suspects]
        found |= drawn_filled(waiting, near)
    return found


def _copy_of(each: Footprint, origin: Origin) -> object:
    """Return a value that is equal for parts of one copy: tensors with the same source per byte."""
    if origin.offset is None:
        return origin
    moved = any(
        size > 1 and step != its
        for size, step, its in zip(each.shape, each.stride, origin.stride, strict=True)
    )
    if moved:
        return origin, each
    return origin.kind, origin.offset * each.itemsize - each.start


class _Member(NamedTuple):
    """Runs of bytes with constant distances in some dimensions.

    Attributes:
        start: Address of the first run.
        runs: Count and step, in bytes, of each dimension, from the widest; the last has step 1.
        group: Members of one group may share bytes.
        number: The tensor that it is, or is a part of.
    """

    start: int
    runs: tuple[tuple[int, int], ...]
    group: int
    number: int

    @property
    def extent(self) -> tuple[int, int, _Member]:
        """The first address, the one after the last, and the member."""
        end = self.start + 1 + sum((count - 1) * step for count, step in self.runs)
        return self.start, end, self


def _meeting(members: Iterable[_Member]) -> Iterator[list[_Member]]:
    """Yield members of several groups whose extents meet."""
    for found in Extents(member.extent for member in members).together():
        if len({member.group for member in found}) > 1:
            yield found


def _suspects(members: Iterable[_Member], steps: list[int]) -> Iterator[int]:
    """Yield the numbers of members that may share a byte with another group."""
    for found in _meeting(members):
        yield from _suspects_among(found, steps)


def _suspects_among(members: Sequence[_Member], steps: list[int]) -> Iterator[int]:
    """Cut off the widest dimension, and compare the rest of the blocks that share a row of it."""
    check_interrupt()
    steps[0] -= len(members)
    blocks = _without_widest(members) if steps[0] > 0 else None
    if blocks is None:
        yield from (member.number for member in members)
        return
    rows = {id(inner): (first, last) for first, last, inner in blocks}
    for found in _meeting(inner for _, _, inner in blocks):
        ranges = [rows[id(inner)] for inner in found]
        if max(first for first, _ in ranges) < min(last for _, last in ranges):
            yield from _suspects_among(found, steps)
            continue
        edges = sorted({edge for each in ranges for edge in each})
        for edge in interruptible(edges, 10):
            active = [
                inner
                for inner, (first, last) in zip(found, ranges, strict=True)
                if first <= edge < last
            ]
            steps[0] -= len(found)
            yield from _suspects(active, steps)


def _without_widest(members: Sequence[_Member]) -> list[tuple[int, int, _Member]] | None:
    """Return members as blocks of rows: first row, row after the last, and the runs in a row.

    Returns None if the members are not blocks in rows of one length.
    """
    width = max((member.runs[0][1] for member in members if len(member.runs) > 1), default=0)
    if not width:
        return None
    rows: list[tuple[int, int, int, _Member]] = []
    for member in members:
        cut = len(member.runs) > 1 and member.runs[0][1] == width
        count, runs = (member.runs[0][0], member.runs[1:]) if cut else (1, member.runs)
        inner = member._replace(start=member.start % width, runs=runs)
        start, end, _ = inner.extent
        if end - start > width:
            return None
        rows.append((start, end, count, member._replace(runs=runs)))
    # Find a start of the rows that cuts through no member.
    rows.sort(key=lambda row: row[:2])
    begin, reached = None, max(end for _, end, _, _ in rows) - width
    for start, end, _, _ in rows:
        if start >= reached:
            begin = start
            break
        reached = max(reached, end)
    if begin is None:
        return None
    blocks = []
    for _, _, count, member in rows:
        row, start = divmod(member.start - begin, width)
        blocks.append((row, row + count, member._replace(start=start)))
    return blocks
