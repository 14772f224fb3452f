"""Rounds: every method once, in two processes; each round begins with another method.

Both ends connect and synchronize before the clock starts; the time runs from the start of the first
one until the end of the last one, on the clock that both share. CPU time and peaks of memory are
those of each process, until both are done; other processes that a method starts are not counted.
Both touch as much memory as will arrive, and return it, before they synchronize: no method is the
first to use it. A first round warms up: it is not counted, and its result is compared with the sent
state.
"""

from __future__ import annotations

import functools
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from common import Handler, Link, Method, PeakMemory, State, state_of, two_processes, warm_memory

# Longer than any order takes, if it works.
PATIENCE = 120.0

Notes = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run: a method, and the state that it sends.

    Attributes:
        method: The name of the method.
        make: Makes the method, in both processes; in each round anew.
        count: The number of tensors.
        nbytes: The size of each tensor.
        label: The name of the run, if it is not the method's.
        base: The label of the run that sends the same by a raw loop.
        copies: How often one transfer sends the state.
        repeat: Transfers in a round, each over a new connection. If there are several, the medians
            count, in warm memory, and peaks are not measured.
        noted: ``make`` takes a dict, for notes that go into the results.
        device: The device of the state.
    """

    method: str
    make: Callable[..., Method]
    count: int
    nbytes: int
    label: str = ""
    base: str = "raw"
    copies: int = 1
    repeat: int = 1
    noted: bool = False
    device: str = "cpu"

    @property
    def name(self) -> str:
        """The label, or the method."""
        return self.label or self.method

    @property
    def state_size(self) -> int:
        """The bytes of the state."""
        return self.count * self.nbytes

    def shrunk(self, scale: float) -> Run:
        """Return the run with fewer bytes: fewer tensors, or smaller ones if there are few."""
        values = dict(vars(self))
        if self.count * scale >= 1:
            values["count"] = int(self.count * scale)
        else:
            values["nbytes"] = max(1024, int(self.nbytes * scale) // 1024 * 1024)
        return Run(**values)


class Sample(TypedDict):
    """One round of a run; pairs are of the sender and the receiver."""

    seconds: float
    cpu: list[float]
    peak: list[int] | None
    notes: list[Notes]


# The values that one process measures of a transfer: start, end, seconds of CPU time, peak, notes.
Half = tuple[float, float, float, int, Notes]


def check(states: Any, run: Run) -> None:
    """Compare the received state with the sent one, bit by bit."""
    for state in states if isinstance(states, list) else [states]:
        if len(state) != run.count:
            raise RuntimeError(f"{run.name}: {len(state)} tensors have arrived, not {run.count}")
        for number in range(run.count):
            tensor = state[f"layer.{number}.weight"]
            sent = torch.full((run.nbytes // 4,), float(number), device=tensor.device)
            if tensor.device.type != run.device or tensor.dtype != sent.dtype:
                raise RuntimeError(f"{run.name}: {tensor.dtype} on {tensor.device} has arrived")
            if not torch.equal(tensor.view(torch.int32), sent.view(torch.int32)):
                raise RuntimeError(f"{run.name} has changed the state")


def transferred(
    end: AbstractContextManager[Callable[[], Any]], link: Link, run: Run, notes: Notes, first: bool
) -> Half:
    """Connect and transfer once; compare in the first round."""
    memory = PeakMemory()
    with end as transfer:
        if run.repeat == 1:
            # As much as arrives, and a quarter more.
            warm_memory(run.state_size * run.copies * 5 // 4)
            memory.__enter__()
        link.meet()
        cpu, start = time.process_time(), time.perf_counter()
        state = transfer()
        stop = time.perf_counter()
        # Threads may still be working.
        link.meet()
        cpu = time.process_time() - cpu
        if run.repeat == 1:
            memory.__exit__()
        if first and state is not None:
            check(state, run)
        # It may be in memory that the method takes back.
        del state
    return start, stop, cpu, memory.nbytes if run.repeat == 1 else 0, notes


def work(sends: bool) -> Handler:
    """Carry out the order of the sender, or of the receiver, for one run of a round."""
    states: dict[tuple[int, int, str], State] = {}

    def state_for(run: Run) -> State:
        key = run.count, run.nbytes, run.device
        if key not in states:
            tensors = state_of(run.count, run.nbytes)
            states[key] = {name: tensor.to(run.device) for name, tensor in tensors.items()}
        return states[key]

    def handle(order: tuple[Run, bool], sock: socket.socket) -> list[Half]:
        run, first = order
        link = Link(sock, listens=not sends)
        halves = []
        for _ in range(run.repeat):
            notes: Notes = {}
            method = run.make(notes) if run.noted else run.make()
            end = method.send(state_for(run), link) if sends else method.receive(link)
            # Only a receiver has a state to compare.
            halves.append(transferred(end, link, run, notes, first and not sends))
        return halves

    return handle


def sample_of(run: Run, sent: list[Half], received: list[Half]) -> Sample:
    pairs = list(zip(sent, received, strict=True))
    return {
        "seconds": statistics.median(
            max(one[1], other[1]) - min(one[0], other[0]) for one, other in pairs
        ),
        "cpu": [statistics.median(half[2] for half in side) for side in (sent, received)],
        "peak": [sent[0][3], received[0][3]] if run.repeat == 1 else None,
        "notes": [sent[-1][4], received[-1][4]],
    }


def measure(runs: Sequence[Run], rounds: int) -> tuple[dict[str, list[Sample]], str]:
    """Measure all runs in so many rounds, after the first one.

    Returns:
        The samples, and the error if there was one: a run has failed, or took longer than
        ``PATIENCE``. Whole rounds before that count.
    """
    samples: dict[str, list[Sample]] = {run.name: [] for run in runs}
    sender, receiver = functools.partial(work, True), functools.partial(work, False)
    with two_processes(sender, receiver, timeout=PATIENCE) as order:
        for number in range(rounds + 1):
            turn = number % len(runs)
            for run in [*runs[turn:], *runs[:turn]]:
                try:
                    sent, received = order((run, number == 0))
                except RuntimeError as error:
                    whole = max(0, number - 1)
                    kept = {name: each[:whole] for name, each in samples.items() if whole}
                    return kept, f"{run.name}, round {number}: {error}"
                if number:
                    samples[run.name].append(sample_of(run, sent, received))
    return samples, ""
