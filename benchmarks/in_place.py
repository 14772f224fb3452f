"""Measures loads into existing tensors, compared with the raw socket.

    python benchmarks/in_place.py               # both cases, 7 rounds: 3 minutes, 6 GiB
    python benchmarks/in_place.py --rounds 11 --methods "raw;into"

A sender and a receiver process live through the whole run; every round sends every case by every
method once, and each round begins with another method. A time runs from the sender's start until
the receiver reports that its tensors have the numbers. The memory of all tensors on both sides was
touched before, except where a method allocates. After each time the content is compared: every
round sends other numbers. Peak memory is the receiver's highest use above its use before, its
tensors included. The first round warms up and is not counted; the table has the medians of the
others. Linux with glibc only.

Methods:
    raw            non-blocking sock_sendall / sock_recv_into, one tensor after the other
    raw, one piece the same, between two pieces of memory that are as large as all tensors
    into           load_from_stream(into=tensors) over asyncio streams
    no checksum    the same, sent with checksum=False
    staged         the same with staged=True: all or nothing
    double         into a DoubleBuffer: all or nothing, by an exchange of pointers
    load, copy     load_from_stream, then copied into the tensors
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import (
    CASES,
    MIB,
    Handler,
    PeakMemory,
    State,
    bytes_of,
    finished,
    heading,
    make_state,
    nonblocking,
    two_processes,
)

import aiotorchio


class Tensors:
    """The memory of one side of a case: tensors, and for one method one piece of their size."""

    def __init__(self, case: str) -> None:
        self.state = make_state(case)
        self.piece = torch.zeros(sum(tensor.numel() for tensor in self.state.values()))
        self._case = case

    @functools.cached_property
    def doubled(self) -> State:
        """A second set of tensors for the receiver: a load changes which memory they have."""
        return make_state(self._case)

    @functools.cached_property
    def double(self) -> aiotorchio.DoubleBuffer:
        """A ``DoubleBuffer`` of the second set."""
        return aiotorchio.DoubleBuffer(self.doubled)

    def views(self, method: str) -> list[memoryview]:
        """The memory that the raw socket sends and receives."""
        tensors = [self.piece] if method == "raw, one piece" else list(self.state.values())
        return [bytes_of(tensor) for tensor in tensors]


# Each method: the calls of the sender and of the receiver with a connected socket.


async def _save(tensors: Tensors, sock: socket.socket, **options: Any) -> None:
    _, writer = await asyncio.open_connection(sock=sock)
    await aiotorchio.save_to_stream(tensors.state, writer, **options)
    await finished(writer)


async def _load(sock: socket.socket, **options: Any) -> State:
    reader, writer = await asyncio.open_connection(sock=sock)
    state: State = await aiotorchio.load_from_stream(reader, **options)
    await finished(writer)
    return state


async def _load_into(tensors: Tensors, sock: socket.socket, **options: Any) -> None:
    await _load(sock, into=tensors.state, **options)


async def _load_double(tensors: Tensors, sock: socket.socket) -> None:
    await _load(sock, into=tensors.double)


async def _load_and_copy(tensors: Tensors, sock: socket.socket) -> None:
    for name, tensor in (await _load(sock)).items():
        tensors.state[name].copy_(tensor)


async def _raw_send(views: Sequence[memoryview], sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    for view in views:
        await loop.sock_sendall(sock, view)


async def _raw_receive(views: Sequence[memoryview], sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    for view in views:
        done = 0
        while done < len(view):
            received = await loop.sock_recv_into(sock, view[done:])
            if not received:
                raise EOFError
            done += received


Side = Callable[[Tensors, socket.socket], Any]
METHODS: dict[str, tuple[Side, Side]] = {
    "into": (_save, _load_into),
    "no checksum": (functools.partial(_save, checksum=False), _load_into),
    "staged": (_save, functools.partial(_load_into, staged=True)),
    "double": (_save, _load_double),
    "load, copy": (_save, _load_and_copy),
}
RAW = ["raw", "raw, one piece"]


def move(method: str, side: int, tensors: Tensors, sock: socket.socket) -> Callable[[], None]:
    """Return the timed call of one side; a view of each tensor is made before the clock starts."""
    if method in RAW:
        raw = (_raw_send, _raw_receive)[side]
        views = tensors.views(method)
        return lambda: asyncio.run(raw(views, sock))
    work = METHODS[method][side]
    return lambda: asyncio.run(work(tensors, sock))


def sender() -> Handler:
    kept = {case: Tensors(case) for case in CASES}

    def handle(order: tuple[str, str, int], sock: socket.socket) -> float:
        case, method, number = order
        tensors = kept[case]
        if method == "raw, one piece":
            tensors.piece.fill_(number)
        else:
            for n, tensor in enumerate(tensors.state.values()):
                tensor.fill_(n + number)
        with nonblocking(sock) as used:
            work = move(method, 0, tensors, used)
            start = time.perf_counter()
            work()
        if sock.recv(1) != b"!":
            raise RuntimeError("the receiver has failed")
        return time.perf_counter() - start

    return handle


def receiver() -> Handler:
    kept = {case: Tensors(case) for case in CASES}

    def handle(order: tuple[str, str, int], sock: socket.socket) -> int:
        case, method, number = order
        tensors = kept[case]
        with nonblocking(sock) as used:
            work = move(method, 1, tensors, used)
            with PeakMemory() as memory:
                work()
        sock.sendall(b"!")
        if method == "raw, one piece":
            right = bool((tensors.piece == number).all())
        else:
            state = tensors.doubled if method == "double" else tensors.state
            right = all(bool((t == n + number).all()) for n, t in enumerate(state.values()))
        if not right:
            raise RuntimeError(f"{method} has changed the state")
        return memory.nbytes

    return handle


Results = dict[tuple[str, str], list[tuple[float, int]]]


def run(rounds: int, methods: list[str], cases: list[str]) -> Results:
    results: Results = {(case, method): [] for case in cases for method in methods}
    numbers = itertools.count(1)
    with two_processes(sender, receiver) as order:
        for number in range(rounds + 1):
            first = number % len(methods)
            for case, method in itertools.product(cases, methods[first:] + methods[:first]):
                measured = order((case, method, next(numbers)))
                if number:
                    results[case, method].append(measured)
    return results


def report(results: Results, cases: list[str], methods: list[str]) -> None:
    print(heading(len(next(iter(results.values())))))
    for case in cases:
        count, nbytes = CASES[case]
        print(f"\n{case}, {count * nbytes / MIB:.0f} MiB")
        print(
            f"{'':16}{'seconds':>9}{'(min - max)':>20}{'GB/s':>8}{'ratio':>8}{'receiver +MiB':>15}"
        )
        base = statistics.median(seconds for seconds, _ in results[case, methods[0]])
        for method in methods:
            seconds, grown = zip(*results[case, method], strict=True)
            median = statistics.median(seconds)
            spread = f"({min(seconds):.3f} - {max(seconds):.3f})"
            print(
                f"{method:16}{median:>9.3f}{spread:>20}{count * nbytes / median / 1e9:>8.2f}"
                f"{median / base:>8.2f}{max(grown) / MIB:>15.1f}"
            )
    print(f"\nratio: time over that of {methods[0]}. receiver +MiB: the most of all rounds.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", default=";".join([*RAW, *METHODS]), help="; between them")
    parser.add_argument("--cases", default=";".join(CASES), help="; between them")
    arguments = parser.parse_args()
    methods, cases = arguments.methods.split(";"), arguments.cases.split(";")
    report(run(arguments.rounds, methods, cases), cases, methods)


if __name__ == "__main__":
    main()
