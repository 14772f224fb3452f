"""What the benchmarks share: two processes that move state over loopback, and peaks of memory.

Linux with glibc only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import mmap
import multiprocessing
import os
import pickle
import platform
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
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
    return state_of(*CASES[case])


def state_of(count: int, nbytes: int) -> State:
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


def warm_memory(nbytes: int) -> None:
    """Touch fresh memory, and give it back.

    A virtual machine whose host has taken back what it did not use pays for the first touch, once
    and many times over. Behind this, fresh memory costs what it costs the system itself.
    """
    # The system gets it back at once, and keeps it for whoever asks next.
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.c_char.from_buffer(memory)
        ctypes.memset(ctypes.addressof(first), 1, nbytes)
        del first


class Link:
    """What a method finds between its two processes.

    Args:
        control: Connected to the other process, blocking.
        listens: Whether this is the end that new connections are made to.
    """

    def __init__(self, control: socket.socket, *, listens: bool) -> None:
        self._control = control
        self._listens = listens

    def tell(self, what: Any = None) -> None:
        """Give the other process an object."""
        data = pickle.dumps(what)
        self._control.sendall(struct.pack("<I", len(data)) + data)

    def hear(self) -> Any:
        """Wait for the next object from the other process."""
        (size,) = struct.unpack("<I", self._take(4))
        return pickle.loads(self._take(size))

    def meet(self) -> None:
        """Wait until the other process is here, too."""
        self.tell()
        self.hear()

    def sockets(self, count: int = 1, family: int = socket.AF_INET) -> list[socket.socket]:
        """New connections to the other process, which calls this, too; blocking sockets.

        Args:
            count: How many.
            family: ``AF_INET`` or ``AF_UNIX``.
        """
        if not self._listens:
            address = self.hear()
            made = []
            for _ in range(count):
                sock = socket.socket(family)
                sock.connect(address)
                made.append(sock)
        else:
            with tempfile.TemporaryDirectory() as folder, socket.socket(family) as listener:
                unix = family == socket.AF_UNIX
                listener.bind(os.path.join(folder, "socket") if unix else (HOST, 0))
                listener.listen(count)
                self.tell(listener.getsockname())
                made = [listener.accept()[0] for _ in range(count)]
        if family == socket.AF_INET:
            for sock in made:
                # As transports of asyncio do by themselves.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def socket(self, family: int = socket.AF_INET) -> socket.socket:
        """One new connection; see ``sockets``."""
        return self.sockets(1, family)[0]

    def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._control.recv(size - len(data))
            if not piece:
                raise RuntimeError("the other process has failed")
            data += piece
        return data


@dataclass(frozen=True)
class Method:
    """A way to move a state.

    Attributes:
        send: A context manager that connects, and gives what is timed: a call that sends.
        receive: Likewise; the call returns the state, or None if the method does not make one.
    """

    send: Callable[[State, Link], AbstractContextManager[Callable[[], Any]]]
    receive: Callable[[Link], AbstractContextManager[Callable[[], Any]]]


@contextlib.contextmanager
def two_processes(
    make_sender: Callable[[], Handler],
    make_receiver: Callable[[], Handler],
    *,
    timeout: float | None = None,
) -> Iterator[Callable[[Any], tuple[Any, Any]]]:
    """Start a sender and a receiver that live until the end of the block.

    Args:
        make_sender: Called in the first process; its result carries out the orders there.
        make_receiver: Likewise in the second.
        timeout: After so many seconds without an answer an order has failed.

    Yields:
        A function that gives both an order, with a new connection between them, and returns the
        two answers. It raises a RuntimeError if a process has failed; both have to end then.
    """
    # Large blocks are mappings of their own, whatever was freed before: glibc would raise this with
    # every large block that is freed, and a method would find what another one has left.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)
    context = multiprocessing.get_context("spawn")
    ends: list[Connection] = []
    processes: list[SpawnProcess] = []
    with socket.create_server((HOST, 0)) as listener:
        for make, meet in ((make_sender, listener.getsockname()[1]), (make_receiver, listener)):
            ours, theirs = context.Pipe()
            # Not daemons: some methods start processes of their own.
            process = context.Process(target=_obey, args=(theirs, make, meet))
            process.start()
            theirs.close()
            ends.append(ours)
            processes.append(process)

        def order(what: Any) -> tuple[Any, Any]:
            answers: dict[Any, Any] = {}
            try:
                for end in ends:
                    end.send(what)
                while waited_for := [end for end in ends if end not in answers]:
                    ready = wait(waited_for, timeout)
                    if not ready:
                        raise RuntimeError(f"no answer within {timeout:g} s")
                    answers |= {end: end.recv() for end in waited_for if end in ready}
            except (EOFError, OSError):
                raise RuntimeError("a process has failed: see what it has written") from None
            return answers[ends[0]], answers[ends[1]]

        patience = None
        try:
            yield order
        except BaseException:
            # The other process may wait for the one that has failed.
            for process in processes:
                process.terminate()
            # One that is deep in native code does not see this.
            patience = 10
            raise
        finally:
            for end in ends:
                with contextlib.suppress(OSError):
                    end.send(None)
            for process in processes:
                process.join(patience)
                process.kill()
                process.join()


def _obey(orders: Connection, make: Callable[[], Handler], meet: socket.socket | int) -> None:
    torch.set_num_threads(1)
    # So that temporary files go, and what a method has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    handle = make()
    with contextlib.suppress(EOFError):
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
