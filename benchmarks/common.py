"""Shared helpers of the benchmarks: two processes that send a state over loopback, peak memory.

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
# The function with which a process carries out an order: it gets the order and a new connection to
# the other process, and returns its answer.
Handler = Callable[[Any, socket.socket], Any]

CASES: dict[str, tuple[int, int]] = {
    # name: (number of tensors, bytes of each)
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
    """Close once all is sent; the caller's duplicate keeps the connection open."""
    writer.close()
    await writer.wait_closed()


class PeakMemory:
    """The peak of resident memory since ``__enter__``, above the level at that time, in bytes."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        # Return the memory that earlier rounds freed to the system, so that all methods get fresh
        # memory.
        ctypes.CDLL(None).malloc_trim(0)
        # Linux: 5 resets the high-water mark to the resident memory of now.
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self._before = self.resident()
        return self

    def __exit__(self, *_: object) -> None:
        self.nbytes = self._read("VmHWM") - self._before

    @classmethod
    def resident(cls) -> int:
        """Return the resident memory of this process, in bytes."""
        return cls._read("VmRSS")

    @staticmethod
    def _read(key: str) -> int:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith(key))
        return int(line.split()[1]) * 1024


def warm_memory(nbytes: int) -> None:
    """Touch fresh memory, and return it to the system.

    On a virtual machine whose host has taken back unused memory, the first touch is many times
    slower, once. After this call, fresh memory costs what it costs the system itself.
    """
    # The system gets it back at once, and keeps it for the next process that needs memory.
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.c_char.from_buffer(memory)
        ctypes.memset(ctypes.addressof(first), 1, nbytes)
        del first


class Link:
    """The connection between the two processes of a method.

    Args:
        control: Connected to the other process, blocking.
        listens: Whether this process accepts new connections; the other one makes them.
    """

    def __init__(self, control: socket.socket, *, listens: bool) -> None:
        self._control = control
        self._listens = listens

    def tell(self, what: Any = None) -> None:
        """Send an object to the other process."""
        data = pickle.dumps(what)
        self._control.sendall(struct.pack("<I", len(data)) + data)

    def hear(self) -> Any:
        """Wait for the next object from the other process."""
        (size,) = struct.unpack("<I", self._take(4))
        return pickle.loads(self._take(size))

    def meet(self) -> None:
        """Wait until the other process calls this, too."""
        self.tell()
        self.hear()

    def sockets(self, count: int = 1, family: int = socket.AF_INET) -> list[socket.socket]:
        """Make new blocking sockets to the other process, which calls this, too.

        Args:
            count: How many sockets.
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
                # asyncio's transports set the same option.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def socket(self, family: int = socket.AF_INET) -> socket.socket:
        """Make one new connection; see ``sockets``."""
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
    """A method of sending a state.

    Attributes:
        send: A context manager that connects and yields the timed call, which sends.
        receive: The same for the receiver; the call returns the state, or None if the method makes
            none.
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
        make_sender: Called in the sender's process; its result carries out the orders there.
        make_receiver: Called in the receiver's process; its result carries out the orders there.
        timeout: Seconds after which an order without an answer has failed.

    Yields:
        A function that gives both an order, with a new connection between them, and returns the
        two answers. It raises a RuntimeError if a process has failed; both have to end then.
    """
    # Large blocks always get their own mappings. glibc would raise this threshold with every large
    # block that is freed, so that one method would change the memory of the next.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)
    context = multiprocessing.get_context("spawn")
    ends: list[Connection] = []
    processes: list[SpawnProcess] = []
    with socket.create_server((HOST, 0)) as listener:
        for make, meet in ((make_sender, listener.getsockname()[1]), (make_receiver, listener)):
            ours, theirs = context.Pipe()
            # Not daemons: some methods start their own processes.
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
            # A process deep in native code does not notice this.
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
    # Temporary files and processes that a method has started go away.
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
    """Yield a second handle on a socket, for a method to close; the first blocks again after.

    Both handles share one blocking mode.
    """
    with sock.dup() as used:
        used.setblocking(False)
        yield used
    sock.setblocking(True)
