"""Measures snapshots of a changing state: how long it must hold still, and the memory.

    python benchmarks/snapshot.py               # 5 rounds, 1 GiB in 64 tensors: half a minute

A sender and a receiver process live through the whole run; every round sends the state by every
method once, and each round begins with another method. The receiver reads the bytes into one
buffer. "Held" is the time for which no code may change the state; peak memory is the sender's
highest use above its use before, and "after half" is its use when half of the payload was sent. The
first round warms up and is not counted. Linux with glibc only.

Methods:
    live          save_to_stream; the state holds still until it returns
    snapshot      snapshot=True; the state holds still until the call returns its coroutine
    deepcopy      copy.deepcopy, then save_to_stream of the copy
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import functools
import socket
import statistics
import time
from typing import Any

from common import (
    CASES,
    MIB,
    Handler,
    PeakMemory,
    State,
    finished,
    heading,
    make_state,
    nonblocking,
    two_processes,
)

import aiotorchio

METHODS = ("live", "snapshot", "deepcopy")


async def _save(method: str, state: State, sock: socket.socket) -> tuple[float, float, int]:
    """Return the seconds held, the seconds in all, and the memory when half is sent."""
    halves: list[int] = []

    def progress(done: int, total: int) -> None:
        if not halves and 2 * done >= total:
            halves.append(PeakMemory.resident())

    before = PeakMemory.resident()
    _, writer = await asyncio.open_connection(sock=sock)
    start = time.perf_counter()
    sent: Any = copy.deepcopy(state) if method == "deepcopy" else state
    sending = aiotorchio.save_to_stream(
        sent, writer, snapshot=method == "snapshot", progress=progress
    )
    held = time.perf_counter() - start
    await sending
    seconds = time.perf_counter() - start
    await finished(writer)
    return (seconds if method == "live" else held), seconds, halves[0] - before


def sender(case: str) -> Handler:
    state = make_state(case)

    def handle(method: str, sock: socket.socket) -> tuple[float, float, int, int]:
        with PeakMemory() as memory, nonblocking(sock) as used:
            answer = asyncio.run(_save(method, state, used))
        return *answer, memory.nbytes

    return handle


def receiver() -> Handler:
    buffer = bytearray(4 * MIB)

    def handle(_: str, sock: socket.socket) -> None:
        while sock.recv_into(buffer):
            pass

    return handle


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="that are counted")
    parser.add_argument("--case", default="1 GiB in 64 storages", choices=CASES)
    args = parser.parse_args()
    print(heading(args.rounds))
    results: dict[str, list[tuple[float, float, int, int]]] = {method: [] for method in METHODS}
    with two_processes(functools.partial(sender, args.case), receiver) as order:
        for number in range(args.rounds + 1):
            turn = number % len(METHODS)
            for method in METHODS[turn:] + METHODS[:turn]:
                answer, _ = order(method)
                if number:
                    results[method].append(answer)
    print(f"\n{args.case}")
    print(f"{'':10}{'held, s':>10}{'(min - max)':>18}{'sent, s':>10}", end="")
    print(f"{'peak +MiB':>12}{'after half':>12}")
    for method, answers in results.items():
        held = [answer[0] for answer in answers]
        seconds, half, peak = (
            statistics.median(answer[n] for answer in answers) for n in (1, 2, 3)
        )
        spread = f"({min(held):.3f} - {max(held):.3f})"
        print(f"{method:10}{statistics.median(held):>10.3f}{spread:>18}{seconds:>10.3f}", end="")
        print(f"{peak / MIB:>12.1f}{half / MIB:>12.1f}")


if __name__ == "__main__":
    main()
