"""Time and peak memory of moving state over loopback, side by side in one run.

    python benchmarks/compare.py            # both cases, 5 rounds
    python benchmarks/compare.py --rounds 7 --methods aiotorchio,raw

A sender and a receiver process live through the whole run; every round moves every case by every
method once, in turn. A time runs from the sender's start to the receiver's word that it has the
object. Peak memory is what a process held at most above what it held before: for the sender above
its object, for the receiver above nothing, so that the object itself is in the figure. The first
round warms up and is not counted; the table has the medians of the others. Linux with glibc only.

Methods:
    aiotorchio    save_to_stream / load_from_stream over asyncio streams, default settings
    no checksum   the same with checksum=False
    streaming     torch.distributed._serialization over a socket file, in blocking processes
    torch.save    torch.save to BytesIO, its bytes over asyncio streams, torch.load from BytesIO
    raw           non-blocking sock_sendall / sock_recv_into of the same bytes into fresh memory
                  that is allocated in one piece: what the socket itself takes
"""

from __future__ import annotations

import argparse
import asyncio
import io
import socket
import statistics
import time
from collections.abc import Callable
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
from torch.distributed._serialization import _streaming_load, _streaming_save

import aiotorchio

# Each method: what the sender does with a connected socket, and what the receiver does.


async def _aiotorchio_send(state: State, sock: socket.socket, checksum: bool) -> None:
    _, writer = await asyncio.open_connection(sock=sock)
    await aiotorchio.save_to_stream(state, writer, checksum=checksum)
    await finished(writer)


async def _aiotorchio_receive(sock: socket.socket) -> Any:
    reader, writer = await asyncio.open_connection(sock=sock)
    state = await aiotorchio.load_from_stream(reader)
    await finished(writer)
    return state


def _streaming_send(state: State, sock: socket.socket) -> None:
    sock.setblocking(True)
    with sock.makefile("wb") as file:
        _streaming_save(state, file)


def _streaming_receive(sock: socket.socket) -> Any:
    sock.setblocking(True)
    with sock.makefile("rb") as file:
        return _streaming_load(file)


async def _torch_save_send(state: State, sock: socket.socket) -> None:
    _, writer = await asyncio.open_connection(sock=sock)
    file = io.BytesIO()
    torch.save(state, file)
    data = file.getbuffer()
    writer.write(len(data).to_bytes(8, "little"))
    writer.write(data)
    await writer.drain()
    await finished(writer)


async def _torch_save_receive(sock: socket.socket) -> Any:
    reader, writer = await asyncio.open_connection(sock=sock)
    size = int.from_bytes(await reader.readexactly(8), "little")
    state = torch.load(io.BytesIO(await reader.readexactly(size)))
    await finished(writer)
    return state


async def _raw_send(state: State, sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    views = [bytes_of(tensor) for tensor in state.values()]
    await loop.sock_sendall(sock, sum(map(len, views)).to_bytes(8, "little"))
    for view in views:
        await loop.sock_sendall(sock, view)


async def _raw_receive(sock: socket.socket) -> Any:
    loop = asyncio.get_running_loop()
    size = int.from_bytes(await loop.sock_recv(sock, 8), "little")
    data = torch.empty(size, dtype=torch.uint8)
    view = bytes_of(data)
    done = 0
    while done < size:
        done += await loop.sock_recv_into(sock, view[done:])
    return data


METHODS: dict[str, tuple[Callable[[State, socket.socket], Any], Callable[[socket.socket], Any]]] = {
    "aiotorchio": (
        lambda state, sock: asyncio.run(_aiotorchio_send(state, sock, True)),
        lambda sock: asyncio.run(_aiotorchio_receive(sock)),
    ),
    "no checksum": (
        lambda state, sock: asyncio.run(_aiotorchio_send(state, sock, False)),
        lambda sock: asyncio.run(_aiotorchio_receive(sock)),
    ),
    "streaming": (_streaming_send, _streaming_receive),
    "torch.save": (
        lambda state, sock: asyncio.run(_torch_save_send(state, sock)),
        lambda sock: asyncio.run(_torch_save_receive(sock)),
    ),
    "raw": (
        lambda state, sock: asyncio.run(_raw_send(state, sock)),
        lambda sock: asyncio.run(_raw_receive(sock)),
    ),
}


def sender() -> Handler:
    states = {case: make_state(case) for case in CASES}

    def handle(order: tuple[str, str], sock: socket.socket) -> tuple[float, int]:
        case, method = order
        with PeakMemory() as memory:
            start = time.perf_counter()
            with nonblocking(sock) as used:
                METHODS[method][0](states[case], used)
            if sock.recv(1) != b"!":
                raise RuntimeError("the receiver has failed")
            seconds = time.perf_counter() - start
        return seconds, memory.nbytes

    return handle


def receiver() -> Handler:
    def handle(order: tuple[str, str], sock: socket.socket) -> int:
        case, method = order
        with PeakMemory() as memory:
            with nonblocking(sock) as used:
                state = METHODS[method][1](used)
            sock.sendall(b"!")
        if method != "raw":
            expected = make_state(case)
            if not all(torch.equal(state[key], expected[key]) for key in expected):
                raise RuntimeError(f"{method} has changed the state")
        return memory.nbytes

    return handle


def run(rounds: int, methods: list[str], cases: list[str]) -> dict[Any, list[Any]]:
    results: dict[Any, list[Any]] = {}
    with two_processes(sender, receiver) as order:
        for number in range(rounds + 1):
            for case in cases:
                for method in methods:
                    (seconds, sent), received = order((case, method))
                    if number:
                        results.setdefault((case, method), []).append((seconds, sent, received))
    return results


def report(results: dict[Any, list[Any]], cases: list[str], methods: list[str]) -> None:
    print(heading(len(next(iter(results.values())))))
    for case in cases:
        count, nbytes = CASES[case]
        print(f"\n{case}")
        print(f"{'':14}{'seconds':>9}{'(min - max)':>20}{'GB/s':>8}{'ratio':>8}", end="")
        print(f"{'sender +MiB':>13}{'receiver +MiB':>15}")
        ours = statistics.median(row[0] for row in results[case, methods[0]])
        for method in methods:
            seconds, sent, received = zip(*results[case, method], strict=True)
            median = statistics.median(seconds)
            spread = f"({min(seconds):.3f} - {max(seconds):.3f})"
            print(
                f"{method:14}{median:>9.3f}{spread:>20}{count * nbytes / median / 1e9:>8.2f}"
                f"{median / ours:>8.2f}{statistics.median(sent) / MIB:>13.1f}"
                f"{statistics.median(received) / MIB:>15.1f}"
            )
    print(f"\nratio: time over that of {methods[0]}. An object is 1024 MiB and 39 MiB.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS), help="a comma between them")
    parser.add_argument("--cases", default=";".join(CASES), help="a semicolon between them")
    arguments = parser.parse_args()
    methods, cases = arguments.methods.split(","), arguments.cases.split(";")
    report(run(arguments.rounds, methods, cases), cases, methods)


if __name__ == "__main__":
    main()
