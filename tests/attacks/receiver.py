"""Runs all cases over one backend, each under a clock, and writes their outcomes.

    python -m tests.attacks.receiver DIRECTORY

Each backend has a process, forked from this one, which has imported torch for all of them. It
writes two lines for each case: its name, and then its outcome, as JSON. So the case in which a
process dies is known; another process then runs the remaining cases.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import anyio
import anyio.abc
import torch
import torch._dynamo  # jagged tensors need it

from tests.attacks.cases import Case, Cases
from tests.attacks.corpus import AUTHORITY_FILE, HONEST, WARM_UP
from tests.attacks.resource_probe import Outcome, ResourceProbe, surroundings
from tests.attacks.scenarios import HONEST_OBJECTS, PATIENCE, SCENARIOS, Sender, Visit, caught
from tests.support import backends
from tests.support.backends import ANYIO_BACKENDS, BlockingEnd, End, World, run_blocking
from tests.support.lowered import lowered
from tests.support.speed import patience, slowdown

__all__ = ["WANTED_FILE", "WAYS"]

WANTED_FILE = "wanted.json"

# Memory that the process may take in addition to its memory at the start: more than any case should
# need, less than a machine has.
ROOM = 6 * 2**30
# Worker threads have stacks as small as this on some systems.
STACK_SIZE = 256 * 2**10
ATTEMPTS = 3
# Seconds for one attempt at a case with all that is done around it: processor time of the process,
# and time on the clock, for waits without end. Both on a machine that is fast and free.
HANGS_AFTER, WAITS_AT_MOST = 90, 25


@contextlib.asynccontextmanager
async def blocking_tls_end(sock: socket.socket, serves: bool) -> AsyncIterator[End]:
    with backends.CLIENT_TLS.wrap_socket(sock, server_hostname="localhost") as wrapped:
        wrapped.settimeout(backends.PATIENCE)
        yield BlockingEnd(wrapped)


WAYS = {world.name: world for world in backends.WORLDS} | {
    "blocking-none-tls": World("blocking", "tls", "none", blocking_tls_end)
}


class Runner:
    """Runs cases over one backend."""

    def __init__(self, way: World, sender: Sender) -> None:
        self._way = way
        self._sender = sender
        self.slowness = slowdown()

    async def run(self, case: Case) -> Outcome:
        outcome = await self._attempt(case)
        for _ in range(ATTEMPTS - 1):
            if outcome.turns and outcome.seconds <= case.deadline + 1:
                break
            self.slowness = max(self.slowness, slowdown(again=True))
            # A delay by the machine does not occur in every attempt; a delay by the case does.
            again = await self._attempt(case)
            for name in ("held", "busy", "stall", "ending", "ending_stall"):
                setattr(again, name, min(getattr(again, name), getattr(outcome, name)))
            outcome = again
        return outcome

    async def warm_up(self, case: Case) -> None:
        """Run a case only to make the things that are made once: modules, threads, buffers."""
        before = surroundings(self._way.loop)
        # uvloop keeps one descriptor open.
        del before["descriptors"]
        with time_limited(self.slowness):
            await self._play(case, Outcome(case.name))
            await self._left(before)

    async def _attempt(self, case: Case) -> Outcome:
        outcome = Outcome(case.name, slowness=self.slowness)
        before = surroundings(self._way.loop)
        with time_limited(self.slowness):
            await self._play(case, outcome)
            outcome.left = await self._left(before)
        return outcome

    async def _play(self, case: Case, outcome: Outcome) -> None:
        recursion_limit = sys.getrecursionlimit()
        sys.setrecursionlimit(case.recursion_limit or recursion_limit)
        self._sender.begin(case)
        try:
            with lowered(case.bounds):
                if len(case.messages) > 1 and not case.connections:
                    await self._load_each(case, outcome)
                else:
                    await self._visit(case, outcome)
        except Exception as error:
            # A failure is an outcome like others: the test reports it.
            outcome.errors[f"{type(error).__name__} in the test"] = 1
            outcome.text = "".join(traceback.format_exception(error))[-1000:]
            self._sender.finish()
        sys.setrecursionlimit(recursion_limit)

    async def _visit(self, case: Case, outcome: Outcome) -> None:
        async with self._visits(case, outcome) as visit:
            await SCENARIOS[case.scenario](visit)
            self._sender.finish()

    @contextlib.asynccontextmanager
    async def _visits(self, case: Case, outcome: Outcome) -> AsyncIterator[Visit]:
        async with self._way.opener(self._sender.connect(), False) as end:
            another = functools.partial(self._visits, case, outcome)
            yield Visit(case, end, self._sender, outcome, another)

    async def _load_each(self, case: Case, outcome: Outcome) -> None:
        """Load all messages of a case, each over a new connection, under one probe."""

        async def each() -> None:
            for message in case.messages:
                async with self._visits(case, outcome) as visit:
                    outcome.note((await caught(visit.load))[0], len(message))

        waits = self._way.loop != "none"
        probe = ResourceProbe(outcome, beats=waits)
        if not waits:
            with probe:
                await each()
        else:
            async with anyio.create_task_group() as group:
                await group.start(probe.beat)
                with probe:
                    await each()
                group.cancel_scope.cancel()
        outcome.seconds /= len(case.messages)
        self._sender.finish()

    async def _left(self, before: dict[str, Any]) -> str:
        """The leaks: everything new that still exists once all closed things are torn down."""
        end = time.monotonic() + PATIENCE
        while True:
            gc.collect()
            now = surroundings(self._way.loop)
            after = {key: now[key] for key in before}
            if after == before or time.monotonic() > end:
                break
            if self._way.loop != "none":
                await anyio.sleep(0.001)
        return ", ".join(
            f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]
        )


class Supervisor:
    """Runs each backend in new processes, several backends at once.

    Args:
        directory: The folder with the cases; the outcomes of each backend go to a file with its
            name.
        wanted: Names of cases, by backend.
    """

    def __init__(self, directory: Path, wanted: dict[str, list[str]]) -> None:
        self._directory = directory
        self._wanted = wanted
        self._cases = Cases(directory)
        self._running: dict[int, str] = {}
        self._waiting = list(wanted)

    def run(self) -> None:
        try:
            while self._waiting or self._running:
                # More than there are cores: some cases wait for a clock.
                while self._waiting and len(self._running) <= (os.cpu_count() or 1):
                    self._start(self._waiting.pop(0))
                process, status = os.wait()
                way = self._running.pop(process)
                if status:
                    self._blame(way, os.waitstatus_to_exitcode(status))
        finally:
            # If this breaks, the whole run ends.
            for process in self._running:
                os.kill(process, signal.SIGKILL)

    def _start(self, way: str) -> None:
        first = len(self._lines(way)) // 2
        process = os.fork()
        if process:
            self._running[process] = way
            return
        code = 1
        try:
            with self._path(way).open("a") as file:
                names = self._wanted[way][first:]
                run_way(WAYS[way], names, self._cases, self._directory, file)
            code = 0
        except BaseException:
            # The child must never return into the copy of the parent's stack.
            traceback.print_exc()
        finally:
            os._exit(code)

    def _path(self, way: str) -> Path:
        return self._directory / f"{way}.outcomes"

    def _lines(self, way: str) -> list[str]:
        return self._path(way).read_text().splitlines() if self._path(way).exists() else []

    def _blame(self, way: str, code: int) -> None:
        """Report the case in which a process died, and go on with the next."""
        lines = self._lines(way)
        assert len(lines) % 2, f"{way} died outside a case"
        how = signal.Signals(-code).name if code < 0 else str(code)
        with self._path(way).open("a") as file:
            tell(file, asdict(Outcome(json.loads(lines[-1]), {f"died of {how}": 1})))
        self._waiting.append(way)


def run_way(way: World, names: list[str], cases: Cases, directory: Path, file: TextIO) -> None:
    """Run cases in this process, with bounds on its memory and time."""
    threading.stack_size(STACK_SIZE)
    limit_memory()
    sender = Sender(directory, way.link)
    if way.loop == "none":
        script = run_all(names, cases, way, sender, file)
        done: list[None] = []
        thread = threading.Thread(target=lambda: done.append(run_blocking(script)))
        thread.start()
        thread.join()
        assert done
    else:
        backend, options = ANYIO_BACKENDS[way.loop]
        run = functools.partial(run_all, names, cases, way, sender, file)
        anyio.run(run, backend=backend, backend_options=options)
    sender.close()


async def run_all(names: list[str], cases: Cases, way: World, sender: Sender, file: TextIO) -> None:
    runner = Runner(way, sender)
    await runner.warm_up(cases[WARM_UP])
    for name in names:
        tell(file, name)
        tell(file, asdict(await runner.run(cases[name])))


@contextlib.contextmanager
def time_limited(slowness: float) -> Iterator[None]:
    """End this process if it computes or waits for too long within the block.

    Signals with their default action do it: they need no code of the process to run.
    """
    signal.setitimer(signal.ITIMER_PROF, HANGS_AFTER * slowness)
    signal.setitimer(signal.ITIMER_REAL, patience(WAITS_AT_MOST))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def tell(file: TextIO, value: Any) -> None:
    file.write(json.dumps(value) + "\n")
    file.flush()


def limit_memory() -> None:
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    directory = Path(sys.argv[1])
    supervisor = Supervisor(directory, json.loads((directory / WANTED_FILE).read_text()))
    backends.CLIENT_TLS.load_verify_locations(directory / AUTHORITY_FILE)
    torch.set_num_threads(1)
    needed = Cases(directory).objects
    HONEST_OBJECTS.update((name, make()) for name, make in HONEST.items() if name in needed)
    gc.collect()
    # Objects that exist now are not searched again and again.
    gc.freeze()
    supervisor.run()


if __name__ == "__main__":
    main()
