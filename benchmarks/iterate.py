"""Measures iteration: when the first tensor is ready, and the receiver's memory during the load.

    python benchmarks/iterate.py                # 7 rounds, 1 GiB in 64 tensors: 1 minute

A sender and a receiver process live through the whole run; every round sends the tensors by every
method once, and each round begins with another method. Both ends are connected and on their event
loops before the clock starts at the sender. The receiver drops each tensor before it takes the
next; peak memory is its highest use above its use before. The first round warms up and is not
counted; the table has the medians of the others. Linux with glibc only.

glibc keeps some of the memory of freed tensors of less than 32 MiB for later ones. To see its share
of the peak, run this again with MALLOC_MMAP_THRESHOLD_=1048576 in the environment, where glibc
keeps nothing.

Methods:
    raw           non-blocking sock_sendall / sock_recv_into; the receiver reads one tensor's bytes
                  into fresh memory, and all other bytes, in pieces of that size, into the same
    async for     StreamReader.open() and ``async for`` over asyncio streams
    no checksum   the same, sent with checksum=False
    tensors_sync  the same in a worker thread, which takes the tensors by ``for``

At the end, backpressure is measured: the bytes that a sender gets rid of while its receiver does
not take the next tensor. After the first tensor the receiver does nothing for some seconds; buffers
fill in the first half of them.
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
    """The times of the first and of the last tensor, on the clock that both processes share."""

    first: float = 0.0
    last: float = 0.0

    def note(self) -> None:
        """Note that another tensor has arrived."""
        self.last = time.perf_counter()
        self.first = self.first or self.last


# --- The sender: reports when it started, and the bytes it had sent at each time ------------------

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
                # A slow consumer in a thread: the bytes that are sent during its pause are
                # measured.
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
            # The number of sent bytes is known after each piece only.
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
    """Measure when the first and the last tensor are ready, and the receiver's memory."""
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
    """Measure the bytes that the sender gets rid of while the receiver pauses."""
    print(f"\nThe receiver takes one tensor ({NBYTES / MIB:.0f} MiB) and nothing for {pause:g} s")
    print(f"{'':14}{'MiB sent by the end':>20}{'of it in the second half':>26}")
    for method in methods:
        (_, sent), (first, _, _) = order((method, pause))
        # Count up to the end of the pause, without the bytes that the next read makes room for.
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
