"""Sections for pictures: time by size and by the number of tensors, and memory over time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import resident
from common import MIB, Method
from methods import raw_sockets, streams
from rounds import Run
from section import GIB, KIB, LARGE, Section, installed, readable

# The number of copies of the state that a peer may make, on both sides together.
SPARE = 6


def _curve(points: Sequence[tuple[str, int, int, int]], title: str) -> Section:
    """Compare some methods at each (label, tensors, bytes of each, transfers in a round)."""
    peers, missing = installed(["streaming", "torch.save + asyncio", "safetensors + asyncio"])
    makers: dict[str, Callable[[], Method]] = {"raw": raw_sockets, "ours": streams, **peers}
    runs = [
        Run(method, make, count, nbytes, f"{method}, {label}", f"raw, {label}", repeat=repeat)
        for label, count, nbytes, repeat in points
        for method, make in makers.items()
    ]
    return Section(title, runs, missing=missing, spare=SPARE)


def curve_size() -> Section:
    sizes = [KIB * 8**step for step in range(7)] + [GIB]
    return _curve(
        [(readable(size), 1, size, 1 if size >= MIB else 20) for size in sizes],
        "One tensor; below 1 MiB a round has 20 transfers, each over a new connection",
    )


def curve_count() -> Section:
    counts = [4**step for step in range(8)]
    return _curve(
        [(f"{count:,}", count, 64 * MIB // count, 1) for count in counts],
        "64 MiB in so many tensors",
    )


def memory() -> Section:
    peers, missing = installed(["torch.save + asyncio"])
    makers: dict[str, Callable[[], Method]] = {"ours": streams, **peers}
    runs = [
        Run(name, functools.partial(resident.watched, make), *LARGE, base="", noted=True)
        for name, make in makers.items()
    ]
    return Section(
        "Resident memory while 1 GiB in 64 storages moves", runs, missing=missing, spare=SPARE
    )
