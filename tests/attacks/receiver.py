"""Runs all cases over one way, each in sight of a clock, and says what came of them.

    python -m tests.attacks.receiver DIRECTORY

Each way has a process of its own, forked off this one, which has imported torch for all of them.
It writes two lines for each case: its name, and then what came of it, as JSON. So it is known which
case it died in; then it is replaced by another one, for the cases that are left.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import anyio
import anyio.abc
import torch
import trio
from torch import _utils

import aiotorchio
from aiotorchio import Limits
from aiotorchio.streams import guard
from aiotorchio.streams.base import asyncio_loop
from tests import worlds
from tests.attacks.cases import MIB, Case, read_cases
from tests.attacks.corpus import AUTHORITY_FILE, HONEST, WARM_UP, behind
from tests.corpus import assert_same
from tests.worlds import ANYIO_BACKENDS, BlockingEnd, End, World, descriptors, run_blocking

__all__ = ["WANTED_FILE", "WAYS", "Outcome"]

WANTED_FILE = "wanted.json"

# What the process may take beside what it has when it begins: more than any case should need,
# less than a machine has.
ROOM = 6 * 2**30
# Worker threads live with as little on some systems.
STACK_SIZE = 256 * 2**10
LAG_MAX, STALL_MAX = 0.05, 1.0
ATTEMPTS = 3
# In seconds; of one case, with all that is done around it.
HANGS_AFTER = 90
# In seconds; until a connection is torn down, and for what follows a case.
PATIENCE = 2.0
# More than the kernel holds between two sockets.
LARGE_NBYTES = 32 * MIB


@contextlib.asynccontextmanager
async def blocking_tls_end(sock: socket.socket, serves: bool) -> AsyncIterator[End]:
    with worlds.CLIENT_TLS.wrap_socket(sock, server_hostname="localhost") as wrapped:
        wrapped.settimeout(worlds.PATIENCE)
        yield BlockingEnd(wrapped)


WAYS = {world.name: world for world in worlds.WORLDS} | {
    "blocking-none-tls": World("blocking", "tls", "none", blocking_tls_end)
}


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        errors: How many messages were refused with each class of error; with none: empty.
        text: Of the last error.
        located: Whether all errors that can say where they were found do.
        after: See ``Case.after``.
        seconds: The longest that a call took.
        grown: Bytes that the peak of memory lies above what was taken before.
        lag: Seconds of processor time for which the event loop did not turn.
        stall: Seconds on the clock for which it did not.
        left: What the case left behind.
    """

    name: str = ""
    errors: dict[str, int] = field(default_factory=dict)
    text: str = ""
    located: bool = True
    after: str = ""
    seconds: float = 0
    grown: int = 0
    lag: float = 0
    stall: float = 0
    left: str = ""

    def note(self, error: Exception | None, nbytes: int) -> None:
        name = type(error).__name__ if error else ""
        self.errors[name] = self.errors.get(name, 0) + 1
        self.text = str(error) if error else self.text
        if isinstance(error, aiotorchio.AiotorchioError):
            place = error.offset
            self.located &= error.entry is not None and place is not None and 0 <= place <= nbytes


# ------------------------------------------------------------------------------ measuring

_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)


def peak_nbytes() -> int:
    """The most memory that was resident since the last ``reset_peak``."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    # What was freed is given back first: it would take part of the growth.
    gc.collect()
    _trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_nbytes()


class Meter:
    """Time, memory and lag of what runs inside of its block.

    The lag is processor time of this process between two beats of a task that sleeps for a
    millisecond: what a call of ours or of torch that does not let go of the interpreter takes.
    Time on the wall is that of whoever else uses the machine, too; a call that waits on the loop
    for the peer takes more of it than they do.
    """

    def __init__(self, outcome: Outcome, *, beats: bool) -> None:
        self._outcome = outcome
        self._beats = beats

    async def beat(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        self._beat_at = time.process_time(), time.monotonic()
        task_status.started()
        while True:
            await anyio.sleep(0.001)
            self._note_beat()

    def _note_beat(self) -> None:
        now = time.process_time(), time.monotonic()
        self._outcome.lag = max(self._outcome.lag, now[0] - self._beat_at[0])
        self._outcome.stall = max(self._outcome.stall, now[1] - self._beat_at[1])
        self._beat_at = now

    def __enter__(self) -> None:
        self._peak = reset_peak()
        self._started = time.monotonic()
        self._beat_at = time.process_time(), time.monotonic()

    def __exit__(self, *_: object) -> None:
        seconds = time.monotonic() - self._started
        if self._beats:
            self._note_beat()
        outcome = self._outcome
        outcome.seconds = max(outcome.seconds, seconds)
        outcome.grown = max(outcome.grown, peak_nbytes() - self._peak)


def surroundings(loop: str) -> dict[str, Any]:
    """What a case may not change."""
    return {
        "descriptors": len(descriptors()),
        # Those of the library's pool stay; trio keeps idle ones for all who use it.
        "threads": sorted(
            thread.name
            for thread in threading.enumerate()
            if not thread.name.lower().startswith(("aiotorchio", "trio"))
        ),
        "tasks": 0 if loop == "none" else _tasks(),
        "streams": len(guard._states),
        "sparse tensors": len(_utils._sparse_tensors_to_validate),
        "sparse checks": torch.sparse.check_sparse_tensor_invariants.is_enabled(),
        "safe globals": list(map(str, torch.serialization.get_safe_globals())),
        "collector": [gc.isenabled(), *gc.get_threshold()],
    }


def _tasks() -> int:
    if asyncio_loop() is None:
        return trio.lowlevel.current_statistics().tasks_living
    return len(asyncio.all_tasks())


# ------------------------------------------------------------------------------ the other end


class Sender:
    """The process of ``sender``, and what is said to it."""

    def __init__(self, directory: Path, link: str) -> None:
        self._sock, theirs = socket.socketpair()
        descriptor = theirs.fileno()
        arguments = [str(descriptor), link, str(directory)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.attacks.sender", *arguments],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._link = link
        self._plays = False
        self._address = run_blocking(self.receive(waits=False))
        if isinstance(self._address, list):
            self._address = tuple(self._address)

    def connect(self) -> socket.socket:
        if self._link == "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self._address.encode("latin1"))
            return sock
        return socket.create_connection(self._address)

    def send(self, value: Any) -> None:
        self._sock.sendall(json.dumps(value).encode() + b"\n")

    def begin(self, case: Case) -> None:
        self.send(case.name)
        self._plays = True

    def finish(self) -> None:
        """The case is over: it closes its connection."""
        if self._plays:
            self.send("over")
            self._plays = False

    async def ended(self, *, waits: bool) -> bool:
        """Whether it saw its connection end, which is still open here; the case is over, too."""
        self.send("ended?")
        self._plays = False
        return bool(await self.receive(waits=waits))

    async def receive(self, *, waits: bool = True) -> Any:
        """What it says; ``waits``: on an event loop."""
        line = b""
        while not line.endswith(b"\n"):
            if waits:
                await anyio.wait_readable(self._sock)
            # What comes is short, and comes at once.
            line += self._sock.recv(4096) or b"null\n"
        return json.loads(line)

    def close(self) -> None:
        self._sock.close()
        self._process.wait(10)


# ------------------------------------------------------------------------------ scenarios


class Visit:
    """One connection to the sender."""

    def __init__(self, case: Case, end: End, sender: Sender, outcome: Outcome) -> None:
        self.case = case
        self.end = end
        self.sender = sender
        self.outcome = outcome
        self.waits = not isinstance(end, BlockingEnd)
        self.limits = Limits(**case.limits)

    async def watched(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Run a call under the eyes of a meter; what it returned, if it did."""
        meter = Meter(self.outcome, beats=self.waits)
        if not self.waits:
            with meter:
                return await self._noted(call)
        async with anyio.create_task_group() as group:
            await group.start(meter.beat)
            with meter:
                result = await self._noted(call)
            group.cancel_scope.cancel()
        return result

    async def _noted(self, call: Callable[[], Awaitable[Any]]) -> Any:
        error, result = await caught(call)
        self.outcome.note(error, self.case.nbytes)
        return result

    async def load(self) -> Any:
        return await self.end.load(limits=self.limits, **self.case.options)

    async def load_next(self) -> Any:
        # Whatever comes: it is there already, or never will be.
        return await self.end.load(limits=Limits(start_timeout=PATIENCE, idle_timeout=PATIENCE))

    async def save(self) -> Any:
        return await self.end.save(_large, limits=self.limits)

    async def see_after(self, call: Callable[[], Awaitable[Any]]) -> None:
        """See what became of the stream, by another call."""
        error, result = await caught(call)
        if isinstance(error, aiotorchio.StreamPoisoned):
            ended = await self.sender.ended(waits=self.waits)
            self.outcome.after = "ended" if ended else "poisoned, not ended"
        elif error is not None:
            self.outcome.after = type(error).__name__
        else:
            assert_same(result, behind())
            self.outcome.after = "clean"

    async def both(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Two calls at once, until the first of them is over."""
        results: list[tuple[Exception | None, Any]] = []
        if self.waits:

            async def run() -> None:
                results.append(await caught(call))
                group.cancel_scope.cancel()

            async with anyio.create_task_group() as group:
                group.start_soon(run)
                group.start_soon(run)
        else:

            def run_in_thread() -> None:
                results.append(run_blocking(caught(call)))
                self.end.sink.shutdown(socket.SHUT_RDWR)

            threads = [threading.Thread(target=run_in_thread) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        error, result = results[0]
        if error is not None:
            raise error
        return result


async def caught(call: Callable[[], Awaitable[Any]]) -> tuple[Exception | None, Any]:
    try:
        return None, await call()
    except Exception as error:
        # Of which class it is, is what is tested. Its traceback leads to all that was being loaded.
        return error.with_traceback(None), None


# Made before any process is forked off: autograd does not work in one that was.
_honest: dict[str, object] = {}
_large = torch.zeros(LARGE_NBYTES, dtype=torch.uint8)


async def load(visit: Visit) -> None:
    """Load what the peer sends."""
    await visit.watched(visit.load)
    await visit.see_after(visit.load_next)


async def load_when_open(visit: Visit) -> None:
    """Load what the peer does not send before the stream is open: it could not be opened then."""
    visit.sender.send("now")
    await load(visit)


async def load_late(visit: Visit) -> None:
    """Load what the peer does not send in time, and what it sends then."""
    await visit.watched(visit.load)
    visit.sender.send("now")
    await visit.see_after(visit.load_next)


async def load_cancelled(visit: Visit) -> None:
    """A load that is cancelled before a byte has come does no harm."""
    async with anyio.create_task_group() as group:
        group.start_soon(visit.load)
        await worlds.all_blocked()
        group.cancel_scope.cancel()
    visit.sender.send("now")
    visit.outcome.note(None, 0)
    await visit.see_after(visit.load_next)


async def load_http(visit: Visit) -> None:
    """Load the body of an answer of HTTP."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = visit.end.source
    connection.request("GET", "/")
    with connection.getresponse() as response:

        async def body() -> Any:
            return aiotorchio.load(response, limits=visit.limits)

        await visit.watched(body)


async def load_twice(visit: Visit) -> None:
    await visit.watched(lambda: visit.both(visit.load))


async def load_after_error(visit: Visit) -> None:
    await caught(visit.load)
    await visit.watched(visit.load)
    await visit.see_after(visit.load_next)


async def load_after_cancel(visit: Visit) -> None:
    """Cancelled when a part of it is there."""
    async with anyio.create_task_group() as group:

        def cancel(*_: object) -> None:
            group.cancel_scope.cancel()

        await visit.end.load(progress=cancel)
    await visit.watched(visit.load)
    await visit.see_after(visit.load_next)


async def save(visit: Visit) -> None:
    """Save to a peer that does not take it."""
    await visit.watched(visit.save)
    await visit.see_after(visit.save)


async def save_twice(visit: Visit) -> None:
    await visit.watched(lambda: visit.both(visit.save))


async def save_after_error(visit: Visit) -> None:
    await caught(visit.save)
    await visit.watched(visit.save)
    await visit.see_after(visit.save)


async def save_after_cancel(visit: Visit) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(visit.save)
        assert await visit.sender.receive() == "tasted"
        group.cancel_scope.cancel()
    await visit.watched(visit.save)
    await visit.see_after(visit.save)


async def echo(visit: Visit) -> None:
    """Save an honest object, and load it back."""
    obj = _honest[visit.case.honest]
    await visit.watched(lambda: visit.end.save(obj))
    loaded = await visit.watched(visit.load)
    # An error says all, if there is one.
    if visit.outcome.errors == {"": 2}:
        assert_same(loaded, obj)
        visit.outcome.after = "echoed"


SCENARIOS: dict[str, Callable[[Visit], Awaitable[None]]] = {
    scenario.__name__: scenario
    for scenario in (
        *(load, load_when_open, load_late, load_cancelled, load_http),
        *(load_twice, load_after_error, load_after_cancel),
        *(save, save_twice, save_after_error, save_after_cancel, echo),
    )
}

# ------------------------------------------------------------------------------ running


class Runner:
    """Runs cases over one way."""

    def __init__(self, way: World, sender: Sender) -> None:
        self._way = way
        self._sender = sender

    async def run(self, case: Case) -> Outcome:
        outcome = await self._attempt(case)
        for _ in range(ATTEMPTS - 1):
            if outcome.lag <= LAG_MAX and outcome.stall <= STALL_MAX:
                break
            # What the machine adds, it does not always add; what the case takes, it always takes.
            again = await self._attempt(case)
            again.lag = min(again.lag, outcome.lag)
            again.stall = min(again.stall, outcome.stall)
            outcome = again
        return outcome

    async def _attempt(self, case: Case) -> Outcome:
        outcome = Outcome(case.name)
        before = surroundings(self._way.loop)
        recursion_limit = sys.getrecursionlimit()
        sys.setrecursionlimit(case.recursion_limit or recursion_limit)
        self._sender.begin(case)
        try:
            if len(case.messages) > 1:
                await self._load_each(case, outcome)
            else:
                await self._visit(case, outcome)
        except Exception as error:
            # An outcome like others: the test says what is wrong with it.
            outcome.errors[f"{type(error).__name__} in the test"] = 1
            outcome.text = "".join(traceback.format_exception(error))[-1000:]
            self._sender.finish()
        sys.setrecursionlimit(recursion_limit)
        outcome.left = await self._left(before)
        return outcome

    async def _visit(self, case: Case, outcome: Outcome) -> None:
        async with self._way.opener(self._sender.connect(), False) as end:
            await SCENARIOS[case.scenario](Visit(case, end, self._sender, outcome))
            self._sender.finish()

    async def _load_each(self, case: Case, outcome: Outcome) -> None:
        """All messages of a case, each over a connection of its own, under one meter."""

        async def each() -> None:
            for message in case.messages:
                async with self._way.opener(self._sender.connect(), False) as end:
                    call = Visit(case, end, self._sender, outcome).load
                    outcome.note((await caught(call))[0], len(message))

        waits = self._way.loop != "none"
        meter = Meter(outcome, beats=waits)
        if not waits:
            with meter:
                await each()
        else:
            async with anyio.create_task_group() as group:
                await group.start(meter.beat)
                with meter:
                    await each()
                group.cancel_scope.cancel()
        outcome.seconds /= len(case.messages)
        self._sender.finish()

    async def _left(self, before: dict[str, Any]) -> str:
        """What is there that was not there before, once all that was closed is torn down."""
        end = time.monotonic() + PATIENCE
        while True:
            gc.collect()
            after = surroundings(self._way.loop)
            if after == before or time.monotonic() > end:
                break
            if self._way.loop != "none":
                await anyio.sleep(0.001)
        return ", ".join(
            f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]
        )


class Supervisor:
    """Runs each way in processes of its own, several ways at once.

    Args:
        directory: Has the cases, takes the outcomes: of each way in a file with its name.
        wanted: Names of cases, by way.
    """

    def __init__(self, directory: Path, wanted: dict[str, list[str]]) -> None:
        self._directory = directory
        self._wanted = wanted
        self._cases = {case.name: case for case in read_cases(directory)}
        self._running: dict[int, str] = {}
        self._waiting = list(wanted)

    def run(self) -> None:
        while self._waiting or self._running:
            # More than there are cores: some cases wait for a clock.
            while self._waiting and len(self._running) <= (os.cpu_count() or 1):
                self._start(self._waiting.pop(0))
            process, status = os.wait()
            way = self._running.pop(process)
            if status:
                self._blame(way, os.waitstatus_to_exitcode(status))

    def _start(self, way: str) -> None:
        first = len(self._lines(way)) // 2
        process = os.fork()
        if process:
            self._running[process] = way
            return
        code = 1
        try:
            with self._path(way).open("a") as file:
                names = [WARM_UP, *self._wanted[way][first:]]
                cases = [self._cases[name] for name in names]
                run_way(WAYS[way], cases, self._directory, file)
            code = 0
        except BaseException:
            # Nothing may go on into the copy of the parent's stack.
            traceback.print_exc()
        finally:
            os._exit(code)

    def _path(self, way: str) -> Path:
        return self._directory / f"{way}.outcomes"

    def _lines(self, way: str) -> list[str]:
        return self._path(way).read_text().splitlines() if self._path(way).exists() else []

    def _blame(self, way: str, code: int) -> None:
        """Say which case a process died in, and go on with the next."""
        lines = self._lines(way)
        assert len(lines) % 2, f"{way} died outside of a case"
        how = signal.Signals(-code).name if code < 0 else str(code)
        with self._path(way).open("a") as file:
            tell(file, asdict(Outcome(json.loads(lines[-1]), {f"died of {how}": 1})))
        self._waiting.append(way)


def run_way(way: World, cases: list[Case], directory: Path, file: TextIO) -> None:
    """Run cases in this process, with bounds to its memory and time; the first is a warm-up."""
    threading.stack_size(STACK_SIZE)
    limit_memory()
    sender = Sender(directory, way.link)
    if way.loop == "none":
        script = run_all(cases, way, sender, file)
        done: list[None] = []
        thread = threading.Thread(target=lambda: done.append(run_blocking(script)))
        thread.start()
        thread.join()
        assert done
    else:
        backend, options = ANYIO_BACKENDS[way.loop]
        anyio.run(run_all, cases, way, sender, file, backend=backend, backend_options=options)
    sender.close()


async def run_all(cases: list[Case], way: World, sender: Sender, file: TextIO) -> None:
    runner = Runner(way, sender)
    # It makes what is made only once: modules, threads, buffers.
    await runner.run(cases.pop(0))
    for case in cases:
        # Whatever holds the process up then, this ends it.
        signal.alarm(HANGS_AFTER)
        tell(file, case.name)
        tell(file, asdict(await runner.run(case)))
    signal.alarm(0)


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
    worlds.CLIENT_TLS.load_verify_locations(directory / AUTHORITY_FILE)
    torch.set_num_threads(1)
    _honest.update((name, make()) for name, make in HONEST.items())
    gc.collect()
    # What is there now is not looked through again and again.
    gc.freeze()
    supervisor.run()


if __name__ == "__main__":
    main()
