"""Tests loads that are all or nothing: kills the sender at random moments, and checks the tensors.

    python benchmarks/kill_sender.py            # 200 kills for each kind of load: a minute
    python benchmarks/kill_sender.py --kills 1000 --seed 1

Each attempt forks a sender from a process that has imported torch, and loads its message into
existing tensors: with ``staged=True``, and into a ``DoubleBuffer``. The sender gets SIGKILL after a
random part of the message has arrived: from before the first byte until after the last, when the
receiver has all of it. Then every tensor must be, bit for bit, the old one or the sent one; all
tensors must be of the same version, and the sent one if and only if the load returned. The exit
status is 0 only if that was so each time. Linux and macOS.
"""

from __future__ import annotations

import argparse
import asyncio
import enum
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import anyio.lowlevel
import torch

import aiotorchio

HOST = "127.0.0.1"
PATIENCE = 60

# Small chunks and small buffers in the system, so that the sender is never far ahead of the
# receiver: killed after half of the message has arrived, it has not sent much more. Much smaller
# chunks would not be received straight into the memory of the tensors.
CHUNK_SIZE = 128 * 2**10
SYSTEM_BUFFER = 64 * 2**10

# Some that fill several chunks, and many that share one. None is so large that torch would use
# several threads for it, which is slower where all processors are busy.
LENGTHS = [32 * 2**10] * 32 + [10 * 2**10] * 16 + [100] * 200

State = dict[str, torch.Tensor]


def make_state(version: int) -> State:
    """Make a state in which every number tells its version and its position."""
    return {
        f"weights.{n}": torch.arange(length, dtype=torch.int32) + (1000 * version + n)
        for n, length in enumerate(LENGTHS)
    }


class Found(enum.Enum):
    """The contents of the tensors after a sender was killed."""

    OLD = "old"
    NEW = "new"
    HALF = "half-applied"
    # New although the load raised, or old although it returned.
    UNTRUE = "not as told"


@dataclass(frozen=True, slots=True)
class Kill:
    """One sender that was killed.

    Attributes:
        moment: The part of the payload after which it was killed: below 0 before the first byte,
        above 1 after the load.
        error: The error that the load raised, or "".
        found: The contents of the tensors after the load.
    """

    moment: float
    error: str
    found: Found


# --- The senders ----------------------------------------------------------------------------------


class Senders:
    """Senders one after the other, each in a new process.

    They are forked from a process that has imported everything, which takes a second, once.
    """

    def __enter__(self) -> Senders:
        spawn = multiprocessing.get_context("spawn")
        self._orders, theirs = spawn.Pipe()
        # A daemon: it ends with this process at the latest.
        self._parent = spawn.Process(target=_fork_senders, args=(theirs,), daemon=True)
        self._parent.start()
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._orders.close()
        self._parent.join()

    def start(self, port: int, version: int) -> None:
        """Start a sender, which connects to a port."""
        self._orders.send((port, version))
        self._pid: int | None = self._orders.recv()

    def kill(self) -> None:
        """Kill the sender, unless it was killed before."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            self._pid = None

    def wait(self) -> None:
        """Wait for the end of the sender that was killed."""
        status = self._orders.recv()
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise RuntimeError(f"the sender ended by itself, with status {status}")


def _fork_senders(orders: Connection) -> None:
    torch.set_num_threads(1)
    # Modules that are imported on first use.
    asyncio.run(anyio.lowlevel.checkpoint())
    while True:
        try:
            port, version = orders.recv()
        except EOFError:
            return
        pid = os.fork()
        if pid == 0:
            try:
                asyncio.run(_send(port, version))
            finally:
                os._exit(1)
        orders.send(pid)
        orders.send(os.waitpid(pid, 0)[1])


async def _send(port: int, version: int) -> None:
    sock = socket.create_connection((HOST, port))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SYSTEM_BUFFER)
    sock.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=sock)
    await aiotorchio.save_to_stream(make_state(version), writer, chunk_size=CHUNK_SIZE)
    # All is sent, and no bytes arrive: this process ends when it is killed.
    await reader.read()


# --- The receiver ---------------------------------------------------------------------------------


def kill_senders(kills: int, way: str, seed: int) -> Iterator[Kill]:
    """Load versions into the same tensors, from senders that are killed.

    Args:
        kills: The number of senders.
        way: ``"staged"`` or ``"double"``; or ``"in place"``, which is not all or nothing.
        seed: The seed of the moments.

    Yields:
        The result of each.
    """
    moments = random.Random(seed)
    tensors = make_state(0)
    ways: dict[str, dict[str, Any]] = {
        "staged": {"into": tensors, "staged": True},
        "double": {"into": aiotorchio.DoubleBuffer(tensors)},
        "in place": {"into": tensors},
    }
    version = 0
    with socket.create_server((HOST, 0)) as listener, Senders() as senders:
        listener.settimeout(PATIENCE)
        # Accepted sockets inherit it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SYSTEM_BUFFER)
        port = listener.getsockname()[1]
        for upcoming in range(1, kills + 1):
            # One in five at the critical moments: when nearly all, or just all, has arrived.
            low, high = (0.9, 1.001) if moments.random() < 0.2 else (-0.05, 1.1)
            moment = moments.uniform(low, high)
            senders.start(port, upcoming)
            connection, _ = listener.accept()
            error = asyncio.run(_load(connection, ways[way], senders.kill, moment))
            senders.wait()
            found = _look(tensors, version, upcoming, told=version if error else upcoming)
            if found is not Found.OLD:
                version = upcoming
            yield Kill(moment, error, found)


async def _load(
    connection: socket.socket, options: dict[str, Any], kill: Callable[[], None], moment: float
) -> str:
    """Kill the sender at its moment, and return the error that the load raised, or ""."""

    def progress(done: int, total: int) -> None:
        if done >= moment * total:
            kill()

    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        if moment < 0:
            kill()
        async with asyncio.timeout(PATIENCE):
            await aiotorchio.load_from_stream(reader, progress=progress, **options)
    except aiotorchio.TruncatedError as error:
        return type(error).__name__
    finally:
        # A sender that is killed after the load; otherwise it would end when the connection does.
        kill()
        writer.close()
    return ""


def _look(tensors: State, old: int, new: int, *, told: int) -> Found:
    """Compare the tensors with two versions and with the result of the load."""
    for version, found in ((old, Found.OLD), (new, Found.NEW)):
        expected = make_state(version)
        if all(torch.equal(tensors[name], expected[name]) for name in expected):
            return found if version == told else Found.UNTRUE
    return Found.HALF


def main() -> bool:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="for each way (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size = sum(LENGTHS) * 4 / 2**20
    print(f"{len(LENGTHS)} tensors, {size:.1f} MiB, sender killed {arguments.kills} times each\n")
    print(f"{'':8}{'killed at':>16}" + "".join(f"{found.value:>14}" for found in Found))
    good = True
    start = time.perf_counter()
    for way in ("staged", "double"):
        kills = list(kill_senders(arguments.kills, way, arguments.seed))
        for title, low, high in (
            ("before payload", -1.0, 0.0),
            ("0 - 25 %", 0.0, 0.25),
            ("25 - 50 %", 0.25, 0.5),
            ("50 - 75 %", 0.5, 0.75),
            ("75 - 90 %", 0.75, 0.9),
            ("90 - 100 %", 0.9, 1.0),
            ("after the load", 1.0, 2.0),
            ("all", -1.0, 2.0),
        ):
            counts = Counter(kill.found for kill in kills if low <= kill.moment < high)
            row = "".join(f"{counts[found]:>14}" for found in Found)
            print(f"{way:8}{title:>16}{row}")
        good = good and all(kill.found in (Found.OLD, Found.NEW) for kill in kills)
    print(f"\n{time.perf_counter() - start:.0f} s: ", end="")
    print("every tensor was of one version, each time" if good else "FAILED")
    return good


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
