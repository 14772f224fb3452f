"""Receiving tensors one after the other: how soon the first is out, and what is held meanwhile.

    python benchmarks/iterate.py                # 7 rounds, 1 GiB in 64 tensors: 1 minute

A sender and a receiver process live through the whole run; every round moves the tensors by every
method once, each round beginning with another method. Both ends are connected and on their event
loops before the clock starts at the sender. The receiver drops each tensor before it takes the
next; peak memory is what it held at most above what it held before. The first round warms up and is
not counted; the table has the medians of the others. Linux with glibc only.

glibc keeps some of the memory of freed tensors of less than 32 MiB for later ones. What of the
peak is its doing is seen by running this once more with MALLOC_MMAP_THRESHOLD_=1048576 in the
environment, where it keeps nothing.

Methods:
    raw           non-blocking sock_sendall / sock_recv_into; the receiver takes as many bytes as a
                  tensor has into fresh memory, and then the rest, as many at a time, into the same
    async for     StreamReader.open() and ``async for`` over asyncio streams
    no checksum   the same, sent with checksum=False
    tensors_sync  the same in a worker thread, which takes the tensors by ``for``

In the end it is measured what a sender gets rid of while its receiver does not take the next
tensor: after the first one it does nothing for some seconds, in the first half of which buffers
fill.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
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

CASE = "1 GiB in 64 storages"
COUNT, NBYTES = CASES[CASE]
READY = b"?"


@dataclass
class Times:
    """When the receiver had the first tensor, and the last one, on the clock of both processes."""

    first: float = 0.0
    last: float = 0.0

    def note(self) -> None:
        """Another tensor is here."""
        self.last = time.perf_counter()
        self.first = self.first or self.last


# --- The sender: says when it started, and how much it was rid of at what time --------------------

Sent = list[tuple[float, int]]


async def _save(state: State, sock: socket.socket, **options: Any) -> tuple[float, Sent]:
    reader, writer = await asyncio.open_connection(sock=sock)
    sent: Sent = []
    await reader.readexactly(len(READY))
    start = time.perf_counter()
    await aiotorchio.save_to_stream(
        state,
        writer,
        progress=lambda done, _: sent.append((time.perf_counter(), done)),
        **options,
    )
    await finished(writer)
    return start, sent


async def _raw_send(state: State, sock: socket.socket, size: int) -> tuple[float, Sent]:
    loop = asyncio.get_running_loop()
    views = [bytes_of(tensor) for tensor in state.values()]
    sent: Sent = []
    await loop.sock_recv(sock, len(READY))
    start, done = time.perf_counter(), 0
    for view in views:
        for begin in range(0, len(view), size):
            await loop.sock_sendall(sock, view[begin : begin + size])
            done += size
            sent.append((time.perf_counter(), done))
    return start, sent


# --- The receiver: takes all tensors, pausing after the first one ---------------------------------


@asynccontextmanager
async def _opened(sock: socket.socket) -> AsyncIterator[Any]:
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(READY)
    async with aiotorchio.StreamReader(reader).open() as message:
        yield message
    await finished(writer)


async def _take_async(sock: socket.socket, times: Times, pause: float) -> None:
    async with _opened(sock) as message:
        async for _name, tensor in message:
            times.note()
            del tensor
            if times.first == times.last:
                await asyncio.sleep(pause)


async def _take_sync(sock: socket.socket, times: Times, pause: float) -> None:
    def take(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        for _name, tensor in tensors:
            times.note()
            del tensor
            if times.first == times.last:
                # A consumer in a thread that takes its time: what is sent meanwhile is measured.
                time.sleep(pause)

    async with _opened(sock) as message:
        await asyncio.to_thread(take, message.tensors_sync())


async def _raw_take(sock: socket.socket, times: Times, pause: float) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, READY)
    view = bytes_of(torch.empty(NBYTES, dtype=torch.uint8))
    for _ in range(COUNT):
        done = 0
        while done < NBYTES:
            received = await loop.sock_recv_into(sock, view[done:])
            if not received:
                raise EOFError
            done += received
        times.note()
        if times.first == times.last:
            await asyncio.sleep(pause)


METHODS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "raw": (functools.partial(_raw_send, size=NBYTES), _raw_take),
    "async for": (_save, _take_async),
    "no checksum": (functools.partial(_save, checksum=False), _take_async),
    "tensors_sync": (_save, _take_sync),
}


def sender() -> Handler:
    state = make_state(CASE)

    def handle(order: tuple[str, float], sock: socket.socket) -> tuple[float, Sent]:
        method, pause = order
        send = METHODS[method][0]
        if method == "raw" and pause:
            # What it is rid of is known after each piece only.
            send = functools.partial(_raw_send, size=64 * 2**10)
        with nonblocking(sock) as used:
            answer: tuple[float, Sent] = asyncio.run(send(state, used))
        if sock.recv(1) != b"!":
            raise RuntimeError("the receiver has failed")
        return answer

    return handle


def receiver() -> Handler:
    def handle(order: tuple[str, float], sock: socket.socket) -> tuple[float, float, int]:
        method, pause = order
        times = Times()
        with PeakMemory() as memory:
            with nonblocking(sock) as used:
                asyncio.run(METHODS[method][1](used, times, pause))
            sock.sendall(b"!")
        return times.first, times.last, memory.nbytes

    return handle


Order = Callable[[Any], tuple[Any, Any]]


def measure(order: Order, rounds: int, methods: list[str]) -> None:
    """How soon the first tensor is there, how soon the last, and the receiver's memory."""
    results: dict[str, list[tuple[float, float, int]]] = {method: [] for method in methods}
    for number in range(rounds + 1):
        turn = number % len(methods)
        for method in methods[turn:] + methods[:turn]:
            (start, _), (first, last, grown) = order((method, 0.0))
            if number:
                results[method].append((first - start, last - start, grown))
    print(heading(rounds))
    print(f"\n{CASE}, one after the other")
    print(f"{'':14}{'first, ms':>10}{'(min - max)':>18}{'ratio':>8}", end="")
    print(f"{'last, s':>10}{'(min - max)':>18}{'ratio':>8}{'receiver +MiB':>15}")
    base = [statistics.median(column) for column in zip(*results[methods[0]], strict=True)]
    for method in methods:
        line = f"{method:14}"
        columns = list(zip(*results[method], strict=True))
        for column, unit, width, digits in ((0, 1e3, 10, 1), (1, 1.0, 10, 3)):
            values = [value * unit for value in columns[column]]
            median = statistics.median(values)
            spread = f"({min(values):.{digits}f} - {max(values):.{digits}f})"
            line += f"{median:>{width}.{digits}f}{spread:>18}{median / unit / base[column]:>8.2f}"
        grown = [value / MIB for value in columns[2]]
        print(f"{line}{statistics.median(grown):>15.1f}{f'({max(grown):.1f})':>8}")
    print(f"ratio: median over that of {methods[0]}. A tensor is {NBYTES / MIB:.0f} MiB.")
    print("receiver +MiB: the median, and the most of all rounds.")


def hold(order: Order, methods: list[str], pause: float) -> None:
    """What the sender gets rid of while the receiver does not take the next tensor."""
    print(f"\nThe receiver takes one tensor ({NBYTES / MIB:.0f} MiB) and nothing for {pause:g} s")
    print(f"{'':14}{'MiB sent by the end':>20}{'of it in the second half':>26}")
    for method in methods:
        (_, sent), (first, _, _) = order((method, pause))
        # Sent with the last bit of the pause: not what the first byte after it has set free.
        half, end = (
            max((done for when, done in sent if when <= first + part * pause), default=0)
            for part in (0.5, 0.99)
        )
        print(f"{method:14}{end / MIB:>20.1f}{(end - half) / MIB:>26.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", default=";".join(METHODS), help="; between them")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds (%(default)s)")
    arguments = parser.parse_args()
    methods = arguments.methods.split(";")
    with two_processes(sender, receiver) as order:
        measure(order, arguments.rounds, methods)
        hold(order, methods, arguments.pause)


if __name__ == "__main__":
    main()
