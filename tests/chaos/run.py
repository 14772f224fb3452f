"""Runs transfers through bad networks, and counts their outcomes.

``python -m tests.chaos.run --transfers 20000 --seed 1`` takes minutes; a failed transfer can be run
again alone, with ``--only`` and its number.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import torch
from anyio.from_thread import BlockingPortal

from aiotorchio import AiotorchioError
from aiotorchio.streams import guard
from tests.chaos.proxy import Link
from tests.chaos.transfers import Progress, Transfer, Transfers
from tests.support.backends import ANYIO_BACKENDS, End, Script, World, descriptors, run_blocking
from tests.support.speed import patience

__all__ = ["Outcome", "Report", "run"]

# A longer transfer hangs.
DEADLINE = patience(20)
_AT_ONCE = 12
_MEMORY_MAX = 64 * 2**20


@dataclass(frozen=True)
class Outcome:
    """The outcome of a transfer.

    Attributes:
        sender: "all sent", or the class of its error.
        receiver: "all arrived", or the class of its error.
        complaints: Violated rules.
    """

    transfer: Transfer
    sender: str
    receiver: str
    complaints: Sequence[str] = ()


@dataclass
class Report:
    """The outcome of a run.

    Attributes:
        outcomes: The outcome of each transfer.
        leaks: Things that exist after the run and did not exist before.
        seconds: The duration.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    seconds: float = 0

    @property
    def failures(self) -> list[str]:
        """The complaints, with the transfers that they belong to."""
        return [
            f"transfer {each.transfer.index} ({each.transfer.kind}, {each.transfer.sender.name} to "
            f"{each.transfer.receiver.name}): {complaint}"
            for each in self.outcomes
            for complaint in each.complaints
        ]

    def lines(self) -> Iterator[str]:
        """The lines of a table."""
        counts = Counter((each.transfer.kind, each.receiver) for each in self.outcomes)
        senders = Counter((each.transfer.kind, each.sender) for each in self.outcomes)
        for kind in dict.fromkeys(each.transfer.kind for each in self.outcomes):
            yield f"{kind}: {sum(n for (of, _), n in counts.items() if of == kind)}"
            for title, counter in (("receiver", counts), ("sender", senders)):
                found = [(n, what) for (of, what), n in counter.items() if of == kind]
                text = ", ".join(f"{n} {what}" for n, what in sorted(found, reverse=True))
                yield f"    {title}: {text}"
        yield f"{len(self.outcomes)} transfers in {self.seconds:.1f} s"
        yield f"{len(self.failures)} failures, {len(self.leaks)} leaks"


class Laboratory(contextlib.ExitStack):
    """An event loop of each kind, a network, and threads for blocking ends."""

    def __enter__(self) -> Laboratory:
        super().__enter__()
        self._blocking = self.enter_context(ThreadPoolExecutor(2 * _AT_ONCE, "chaos"))
        self._network = self._portal("asyncio", {})
        self._portals = {name: self._portal(*each) for name, each in ANYIO_BACKENDS.items()}
        self._idle = self.tasks()
        return self

    def _portal(self, backend: str, options: dict[str, Any]) -> BlockingPortal:
        portal = anyio.from_thread.start_blocking_portal(backend, options)
        return self.enter_context(portal)

    def tasks(self) -> Counter[str]:
        """The tasks of all loops."""
        portals = {"network": self._network, **self._portals}

        async def count() -> int:
            return len(anyio.get_running_tasks())

        return Counter({name: portal.call(count) for name, portal in portals.items()})

    def new_tasks(self) -> list[str]:
        """The loops with tasks that did not exist before."""
        return [f"{count} tasks on {name}" for name, count in (self.tasks() - self._idle).items()]

    def carry_out(self, transfer: Transfer) -> Outcome:
        """Run a transfer in the calling thread."""
        link = Link(transfer.schedule)
        sent, received = Progress(), Progress()
        began = time.monotonic()

        async def send(end: End) -> None:
            await transfer.send(end, link, sent)

        async def receive(end: End) -> None:
            await transfer.receive(end, received)

        futures = [
            self._network.start_task_soon(link.carry),
            self._start(transfer.receiver, link.far, not transfer.serves, receive, received),
            self._start(transfer.sender, link.near, transfer.serves, send, sent),
        ]
        found = [_complaint(future, began) for future in futures]
        complaints = [text for text in found if text] or transfer.complaints(
            sent, received, harmed=link.harmed
        )
        return Outcome(
            transfer, _describe(sent, "all sent"), _describe(received, "all arrived"), complaints
        )

    def _start(
        self, world: World, sock: socket.socket, serves: bool, script: Script[None], to: Progress
    ) -> Future[None]:
        async def main() -> None:
            try:
                async with world.opener(sock, serves) as end:
                    await script(end)
            except AiotorchioError as error:
                to.error = error.with_traceback(None)

        async def impatient() -> None:
            with anyio.fail_after(DEADLINE):
                await main()

        if world.loop == "none":
            return self._blocking.submit(lambda: run_blocking(main()))
        return self._portals[world.loop].start_task_soon(impatient)


def _complaint(future: Future[None], began: float) -> str | None:
    try:
        future.result(began + DEADLINE + 5 - time.monotonic())
    except (TimeoutError, CancelledError):
        # The transfer may wait for anything.
        future.cancel()
        return "it hangs"
    except BaseException as error:
        # The report shows every error to its reader.
        return "".join(traceback.format_exception(error))
    return "it hangs" if time.monotonic() - began > DEADLINE else None


def _describe(progress: Progress, whole: str) -> str:
    return whole if progress.error is None else type(progress.error).__name__


class _Complaints(logging.Handler):
    """Collects log records of event loops, such as errors that were never retrieved."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # asyncio loses a connection twice if a write fails while it resumes its TLS protocol.
        if "_call_connection_lost" not in record.getMessage():
            self.texts.append(self.format(record))


def _threads() -> Counter[str]:
    """Threads that do not wait for work in the pool of the library or of trio."""
    names = [each.name for each in threading.enumerate()]
    return Counter(name for name in names if not name.startswith(("aiotorchio", "Trio thread")))


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def _resident_nbytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


@contextlib.contextmanager
def _watched(leaks: list[str]) -> Iterator[None]:
    """Find leaks of the block."""
    gc.collect()
    files, threads, states = descriptors(), _threads(), len(guard._states)
    heard, logger = _Complaints(), logging.getLogger("asyncio")
    logger.addHandler(heard)
    try:
        yield
    finally:
        logger.removeHandler(heard)
    gc.collect()
    if more := descriptors() - files:
        leaks.append(f"descriptors: {sorted(more)}")
    if left := _threads() - threads:
        leaks.append(f"threads: {dict(left)}")
    if len(guard._states) > states:
        leaks.append(f"{len(guard._states) - states} states of streams")
    leaks += [f"an event loop complains: {text}" for text in heard.texts]


def run(transfers: Transfers, indices: Iterable[int] | None = None) -> Report:
    """Run transfers, several at once.

    Args:
        transfers: The transfers.
        indices: The indices of those to run; by default all.
    """
    report, began = Report(), time.monotonic()
    todo = list(range(len(transfers)) if indices is None else indices)
    # Things that are kept after the first use are no leaks.
    warm, rest = todo[: len(todo) // 4], todo[len(todo) // 4 :]
    with Laboratory():
        pass
    with _watched(report.leaks), Laboratory() as laboratory:

        def carry_out(index: int) -> Outcome:
            return laboratory.carry_out(transfers[index])

        with ThreadPoolExecutor(_AT_ONCE, "transfer") as executor:
            report.outcomes += executor.map(carry_out, warm)
            tensors, memory = _tensors(), _resident_nbytes()
            report.outcomes += executor.map(carry_out, rest)
        report.leaks += laboratory.new_tasks()
        if (more := _tensors() - tensors) > 0:
            report.leaks.append(f"{more} tensors")
        if (grown := _resident_nbytes() - memory) > _MEMORY_MAX:
            report.leaks.append(f"{grown / 2**20:.0f} MiB of memory")
    report.seconds = time.monotonic() - began
    return report


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transfers", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of single transfers")
    options = parser.parse_args()
    report = run(Transfers(options.transfers, options.seed), options.only)
    print("\n".join([*report.lines(), *report.failures, *report.leaks]))
    sys.exit(bool(report.failures or report.leaks))


if __name__ == "__main__":
    main()
