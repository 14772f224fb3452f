"""The sections of the suite: the states, the methods, and the goals for aiotorchio."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from typing import Any

import fair
import gpu
import lag
import torch
from common import MIB, Method
from curves import curve_count, curve_size, memory
from goals import RECEIVER, SENDER, SIDES, Goal, at_most, last_to_mean, peak, speed, times
from goals import lag as lag_of
from methods import (
    blocking_sockets,
    files,
    raw_blocking_sockets,
    raw_files,
    raw_sockets,
    raw_streams,
    raw_trio,
    streams,
    trio_streams,
)
from peers import PEERS
from rounds import Run
from section import KIB, LARGE, Section, installed

# The raw loop into memory with huge pages, as in aiotorchio.
HUGE = "raw, huge pages"

LARGER = (256, 16 * MIB)
SMALL = (10_000, 4 * KIB)


def with_huge_pages(what: str, target: float, run: str = "ours") -> Goal:
    return speed(what, "the raw loop with huge pages", target, run=run, base=HUGE)


def large() -> Section:
    peers, missing = installed(PEERS)
    return Section(
        "1 GiB in 64 storages, asyncio streams over TCP",
        [
            Run("raw", raw_sockets, *LARGE),
            Run("ours", streams, *LARGE),
            Run("ours, no checksum", functools.partial(streams, checksum=False), *LARGE),
            Run(HUGE, functools.partial(raw_sockets, huge_pages=True), *LARGE),
            *(Run(name, make, *LARGE) for name, make in peers.items()),
        ],
        [
            speed("1 GiB, 64 storages", "the raw loop", 0.90),
            with_huge_pages("1 GiB, 64 storages", 0.90),
            speed("the same without checksum", "the raw loop", 0.97, run="ours, no checksum"),
            with_huge_pages("the same without checksum", 0.97, run="ours, no checksum"),
            speed("1 GiB, 64 storages", "torch's `_streaming_*`", 3, base="streaming"),
        ],
        missing,
        spare=6,
    )


def uvloop() -> Section:
    return Section(
        "1 GiB in 64 storages, asyncio streams over TCP, on uvloop",
        [
            Run("raw", functools.partial(raw_sockets, uv=True), *LARGE),
            Run(HUGE, functools.partial(raw_sockets, uv=True, huge_pages=True), *LARGE),
            Run("ours", functools.partial(streams, uv=True), *LARGE),
        ],
        [
            speed("1 GiB on uvloop", "the raw loop on uvloop", 0.90),
            with_huge_pages("1 GiB on uvloop", 0.90),
        ],
    )


def unix() -> Section:
    return Section(
        "1 GiB in 64 storages, asyncio streams over UNIX sockets",
        [
            Run("raw", functools.partial(raw_sockets, family=socket.AF_UNIX), *LARGE),
            Run(
                HUGE,
                functools.partial(raw_sockets, family=socket.AF_UNIX, huge_pages=True),
                *LARGE,
            ),
            Run("ours", functools.partial(streams, family=socket.AF_UNIX), *LARGE),
        ],
        [
            speed("1 GiB over a UNIX socket", "the raw loop", 0.90),
            with_huge_pages("1 GiB over a UNIX socket", 0.90),
        ],
    )


def small() -> Section:
    peers, missing = installed(PEERS)
    what = "10,000 tensors of 4 KiB"
    return Section(
        f"{what}, asyncio streams over TCP",
        [
            Run("raw", raw_sockets, *SMALL),
            Run("ours", streams, *SMALL),
            *(Run(name, make, *SMALL) for name, make in peers.items()),
        ],
        [
            speed(what, "the raw loop", 0.5),
            speed(what, "torch's `_streaming_*`", 10, base="streaming"),
            speed(what, "safetensors, asyncio streams", 3, base="safetensors + asyncio"),
        ],
        missing,
        spare=6,
    )


def count() -> Section:
    many, fewer = "100,000 tensors", "10,000 tensors"
    return Section(
        "Tensors of 1 KiB, asyncio streams over TCP",
        [
            Run("ours", streams, 10_000, KIB, fewer, base=""),
            Run("ours", streams, 100_000, KIB, many, base=""),
        ],
        [at_most(f"time for {many}", f"time for {fewer}", "x", 11, times(fewer, many))],
    )


def size() -> Section:
    nbytes = LARGER[0] * LARGER[1]
    return Section(
        "Storages of 16 MiB, asyncio streams over TCP",
        [
            Run("ours", streams, *LARGE, "1 GiB", base=""),
            Run("ours", streams, *LARGER, "4 GiB", base=""),
        ],
        [
            at_most("time for 4 GiB", "time for 1 GiB", "x", 4.2, times("1 GiB", "4 GiB")),
            at_most("sender's peak, 4 GiB", "what it sends", "MiB", 32, peak("4 GiB", SENDER)),
            at_most(
                "receiver's peak, 4 GiB",
                "what it receives",
                "MiB",
                0.02 * nbytes / MIB + 32,
                peak("4 GiB", RECEIVER, nbytes),
            ),
        ],
    )


def tls() -> Section:
    size = (16, 16 * MIB)
    return Section(
        "256 MiB in 16 storages, asyncio streams over TLS 1.3",
        [
            Run("raw", functools.partial(raw_streams, tls=True), *size),
            Run(HUGE, functools.partial(raw_streams, tls=True, huge_pages=True), *size),
            Run("ours", functools.partial(streams, tls=True), *size),
        ],
        [
            speed("256 MiB over TLS 1.3", "`write` and `read` of the streams", 1.0),
            with_huge_pages("256 MiB over TLS 1.3", 1.0),
        ],
    )


def trio() -> Section:
    return Section(
        "1 GiB in 64 storages, anyio's TCP streams on trio",
        [
            Run("raw", raw_trio, *LARGE),
            Run(HUGE, functools.partial(raw_trio, huge_pages=True), *LARGE),
            Run("ours", trio_streams, *LARGE),
        ],
        [
            speed("1 GiB on trio", "`send` and `receive` of the streams", 0.9),
            with_huge_pages("1 GiB on trio", 0.9),
        ],
    )


def blocking() -> Section:
    pairs: list[tuple[str, Callable[..., Method], Callable[[], Method]]] = [
        ("socket", raw_blocking_sockets, blocking_sockets),
        *(
            (
                f"file, {timed}",
                functools.partial(raw_files, timed=timed),
                functools.partial(files, timed=timed),
            )
            for timed in ("write", "read")
        ),
    ]
    runs, goals = [], []
    for what, raw, ours in pairs:
        runs.append(Run("raw", raw, *LARGE, f"raw {what}", f"raw {what}"))
        huge = functools.partial(raw, huge_pages=True)
        runs.append(Run(HUGE, huge, *LARGE, f"raw {what}, huge pages", f"raw {what}"))
        runs.append(Run("ours", ours, *LARGE, f"our {what}", f"raw {what}"))
        goals.append(
            speed(
                f"1 GiB, blocking {what}",
                "the raw loop",
                0.9,
                run=f"our {what}",
                base=f"raw {what}",
            )
        )
        if what != "file, write":
            against = "the raw loop with huge pages"
            base = f"raw {what}, huge pages"
            goal = speed(f"1 GiB, blocking {what}", against, 0.9, run=f"our {what}", base=base)
            goals.append(goal)
    return Section(
        "1 GiB in 64 storages, blocking sockets and files in memory", runs, goals, spare=2.5
    )


def lag_beside() -> Section:
    few, many = "4 GiB", "20,000 tensors"
    large, small = LARGER, (20_000, 4 * KIB)
    runs = [
        Run("raw", lag.raw, *large, f"raw, {few}", f"raw, {few}", noted=True),
        Run("ours", lag.ours, *large, f"ours, {few}", f"raw, {few}", noted=True),
        Run("ours", lag.ours, *small, f"ours, {many}", "", noted=True),
        Run("torch.save", lag.torch_save, *small, f"torch.save, {many}", "", noted=True),
    ]
    goals = [
        at_most(
            f"lag at the {SIDES[side]}, {what}",
            against,
            "ms",
            target,
            lag_of(f"ours, {what}", side, share),
        )
        for what in (few, many)
        for side in (SENDER, RECEIVER)
        for against, target, share in (("99th percentile", 10, 0.99), ("maximum", 50, 1.0))
    ]
    return Section("A heartbeat of 1 ms beside a transfer, asyncio streams over TCP", runs, goals)


def fairness() -> Section:
    state = (4, MIB)
    at_once, one_by_one = "at once", "one after the other"
    options: dict[str, Any] = {"base": one_by_one, "copies": fair.CONNECTIONS, "noted": True}
    return Section(
        "4 MiB over each of 200 connections between two processes, asyncio streams over TCP",
        [
            Run("ours", fair.in_turn, *state, one_by_one, **options),
            Run("ours", fair.together, *state, at_once, **options),
        ],
        [
            speed("200 connections at once", one_by_one, 0.8, run=at_once, base=one_by_one),
            at_most("the last of 200 at once", "their mean", "x", 3, last_to_mean(at_once)),
        ],
        # Limits of the chunks that arrive: the state itself is small.
        spare=1.5,
    )


def cuda() -> Section:
    state = (512, 16 * MIB)
    return Section(
        "8 GiB in 512 storages, from CUDA to CUDA, asyncio streams over TCP",
        [
            # aiotorchio receives into staging buffers that it has touched before.
            Run("raw", functools.partial(raw_sockets, huge_pages=True), *state),
            Run("pinned copies", gpu.pinned_copies, *state, device="cuda"),
            Run("ours", gpu.ours, *state, device="cuda"),
            Run(
                "streaming",
                functools.partial(gpu.synchronized, PEERS["streaming"]),
                *state,
                device="cuda",
            ),
        ],
        [
            Goal(
                "8 GiB, CUDA to CUDA",
                "the slower of pinned copies and raw loop",
                "x",
                0.9,
                times("ours", "raw", "pinned copies"),
            ),
            speed("8 GiB, CUDA to CUDA", "torch's `_streaming_*`", 3, base="streaming"),
        ],
        reason="" if torch.cuda.is_available() else "there is no CUDA device",
        spare=3,
    )


SECTIONS: dict[str, Callable[[], Section]] = {
    "large": large,
    "uvloop": uvloop,
    "unix": unix,
    "small": small,
    "count": count,
    "size": size,
    "tls": tls,
    "trio": trio,
    "blocking": blocking,
    "lag": lag_beside,
    "fair": fairness,
    "gpu": cuda,
    "curve-size": curve_size,
    "curve-count": curve_count,
    "memory": memory,
}
