"""What the benchmarks share: two processes that move state over loopback, and peaks of memory.

Linux with glibc only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import multiprocessing
import platform
import socket
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

HOST = "127.0.0.1"
MIB = 2**20

State = dict[str, torch.Tensor]
# What a process does with an order and a new connection to the other process; its answer.
Handler = Callable[[Any, socket.socket], Any]

CASES: dict[str, tuple[int, int]] = {
    # name: (tensors, bytes each)
    "1 GiB in 64 storages": (64, 16 * MIB),
    "10,000 tensors of 4 KiB": (10_000, 4096),
}


def make_state(case: str) -> State:
    count, nbytes = CASES[case]
    return {f"layer.{n}.weight": torch.full((nbytes // 4,), float(n)) for n in range(count)}


def bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")


def heading(rounds: int) -> str:
    return (
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"medians (minimum - maximum) of {rounds} rounds"
    )


async def finished(writer: asyncio.StreamWriter) -> None:
    """Close once all is sent; the dup that the caller holds keeps the connection open."""
    writer.close()
    await writer.wait_closed()


class PeakMemory:
    """The most resident memory since ``__enter__`` above what was resident then, in bytes."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        # What the rounds before have freed goes back to the system: memory is fresh for all.
        ctypes.CDLL(None).malloc_trim(0)
        # Linux: 5 sets the high-water mark back to what is resident now.
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self._before = self.resident()
        return self

    def __exit__(self, *_: object) -> None:
        self.nbytes = self._read("VmHWM") - self._before

    @classmethod
    def resident(cls) -> int:
        """What is resident now."""
        return cls._read("VmRSS")

    @staticmethod
    def _read(key: str) -> int:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith(key))
        return int(line.split()[1]) * 1024


@contextlib.contextmanager
def two_processes(
    make_sender: Callable[[], Handler], make_receiver: Callable[[], Handler]
) -> Iterator[Callable[[Any], tuple[Any, Any]]]:
    """Start a sender and a receiver that live until the end of the block.

    Args:
        make_sender: Called in the first process; its result carries out the orders there.
        make_receiver: Likewise in the second.

    Yields:
        A function that gives both an order, with a new connection between them, and returns the
        two answers.
    """
    context = multiprocessing.get_context("spawn")
    ends: list[Connection] = []
    processes = []
    with socket.create_server((HOST, 0)) as listener:
        for make, meet in ((make_sender, listener.getsockname()[1]), (make_receiver, listener)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_obey, args=(theirs, make, meet), daemon=True)
            process.start()
            theirs.close()
            ends.append(ours)
            processes.append(process)

        def order(what: Any) -> tuple[Any, Any]:
            for end in ends:
                end.send(what)
            return ends[0].recv(), ends[1].recv()

        yield order
        for end in ends:
            end.send(None)
        for process in processes:
            process.join()


def _obey(orders: Connection, make: Callable[[], Handler], meet: socket.socket | int) -> None:
    torch.set_num_threads(1)
    handle = make()
    while (order := orders.recv()) is not None:
        if isinstance(meet, int):
            sock = socket.create_connection((HOST, meet))
        else:
            sock, _ = meet.accept()
        with sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            orders.send(handle(order, sock))


@contextlib.contextmanager
def nonblocking(sock: socket.socket) -> Iterator[socket.socket]:
    """A second handle on a socket, for a method to use and to close; the first blocks again after.

    Blocking or not is a property of what both handles share.
    """
    with sock.dup() as used:
        used.setblocking(False)
        yield used
    sock.setblocking(True)
