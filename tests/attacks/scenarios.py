"""The actions of the receiver of a case, and the helpers that they use."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import torch

import aiotorchio
from aiotorchio import Limits, TensorSpec
from tests.attacks.cases import MIB, Case
from tests.attacks.corpus import behind
from tests.attacks.loaders import LOADERS, dressed
from tests.attacks.resource_probe import Outcome, ResourceProbe
from tests.support.backends import BlockingEnd, End, all_blocked, run_blocking
from tests.support.corpus import assert_same
from tests.support.speed import patience

__all__ = ["HONEST_OBJECTS", "PATIENCE", "PRODUCED", "SCENARIOS", "Sender", "Visit", "caught"]

# Seconds until a connection is torn down, and for the steps after a case.
PATIENCE = patience(2.5)
# More than the kernel holds between two sockets.
LARGE_NBYTES = 32 * MIB


class Sender:
    """The process of ``sender``, and the messages to it."""

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
        """Tell the sender that the case is over: it closes its connection."""
        if self._plays:
            self.send("over")
            self._plays = False

    async def ended(self, *, waits: bool) -> bool:
        """End the case; whether the sender saw its connection end, which is still open here."""
        self.send("ended?")
        self._plays = False
        return bool(await self.receive(waits=waits))

    async def receive(self, *, waits: bool = True) -> Any:
        """Receive an answer of the sender; ``waits``: on an event loop."""
        line = b""
        while not line.endswith(b"\n"):
            if waits:
                await anyio.wait_readable(self._sock)
            # The answer is short, and comes at once.
            line += self._sock.recv(4096) or b"null\n"
        return json.loads(line)

    def close(self) -> None:
        self._sock.close()
        self._process.wait(10)


class Visit:
    """One connection to the sender.

    Attributes:
        load: Takes the message off the stream with the loader of the case.
        another: Opens another connection.
    """

    def __init__(
        self,
        case: Case,
        end: End,
        sender: Sender,
        outcome: Outcome,
        another: Callable[[], AbstractAsyncContextManager[Visit]],
    ) -> None:
        self.case = case
        self.end = dressed(end, case.dress)
        self.sender = sender
        self.outcome = outcome
        self.another = another
        self.waits = not isinstance(end, BlockingEnd)
        self.limits = Limits(**case.limits)
        self.load = LOADERS[case.loader](self.end, self.limits, dict(case.options))

    async def watched(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Run a call under a probe; return its result, if it has one."""
        return (await self.all_watched([call]))[0]

    async def all_watched(self, calls: list[Callable[[], Awaitable[Any]]]) -> list[Any]:
        """Run several calls at once under a probe."""
        probe = ResourceProbe(self.outcome, beats=self.waits)
        if not self.waits:
            with probe:
                return self._noted_in_threads(calls)
        results: list[Any] = [None] * len(calls)

        async def run(number: int) -> None:
            results[number] = await self._noted(calls[number])

        async with anyio.create_task_group() as group:
            await group.start(probe.beat)
            with probe:
                async with anyio.create_task_group() as running:
                    for number in range(len(calls)):
                        running.start_soon(run, number)
                        # Without this, the first steps of all of them would be one turn of the
                        # loop.
                        await anyio.sleep(_BETWEEN)
            group.cancel_scope.cancel()
        return results

    def _noted_in_threads(self, calls: list[Callable[[], Awaitable[Any]]]) -> list[Any]:
        """Run blocking calls, the first of them in this thread."""
        results: list[Any] = [None] * len(calls)

        def run(number: int) -> None:
            results[number] = run_blocking(self._noted(calls[number]))

        threads = [threading.Thread(target=run, args=[n]) for n in range(1, len(calls))]
        for thread in threads:
            thread.start()
        run(0)
        for thread in threads:
            thread.join()
        return results

    async def watched_until(self, seconds: float, call: Callable[[], Awaitable[Any]]) -> None:
        """Run a call under a probe, and cancel it after some time, if it takes that long."""
        probe = ResourceProbe(self.outcome, beats=True)
        # A result that comes in time is freed outside the measurement.
        results: list[Any] = []

        async def run() -> None:
            results.append(await caught(call))

        async with anyio.create_task_group() as group:
            await group.start(probe.beat)
            with probe:
                async with anyio.create_task_group() as running:
                    running.start_soon(run)
                    await anyio.sleep(seconds)
                    probe.cancelled()
                    running.cancel_scope.cancel()
                probe.ended()
            group.cancel_scope.cancel()
        for error, _ in results:
            # The call may have ended before it was cancelled.
            self.outcome.note(error, self.case.nbytes)

    async def _noted(self, call: Callable[[], Awaitable[Any]]) -> Any:
        error, result = await caught(call)
        self.outcome.note(error, self.case.nbytes)
        return result

    async def load_next(self) -> Any:
        # Any byte or end of the stream is there by now, or never comes.
        return await self.end.load(limits=Limits(start_timeout=PATIENCE, idle_timeout=PATIENCE))

    async def save(self) -> Any:
        return await self.end.save(_large, limits=self.limits)

    async def see_after(self, call: Callable[[], Awaitable[Any]]) -> None:
        """Check the state of the stream with another call."""
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
        """Run two calls at once, until the first of them is over."""
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
        # The class of the error is tested. Its traceback would keep all that was being loaded.
        return error.with_traceback(None), None


# Seconds between the beginnings of two loads.
_BETWEEN = 0.002
# Made before any process is forked: autograd does not work in a forked process.
HONEST_OBJECTS: dict[str, object] = {}
_large = torch.zeros(LARGE_NBYTES, dtype=torch.uint8)

# Bytes that a generator may make after it was cancelled.
PRODUCED_AT_MOST = 6 * MIB
_SPECS = {f"t{n}": TensorSpec((n % 2, 512), torch.float32) for n in range(2000)}


def made() -> Iterator[tuple[str, torch.Tensor]]:
    one = torch.zeros(1, 512)
    return ((name, one[: spec.shape[0]]) for name, spec in _SPECS.items())


async def made_async() -> AsyncIterator[tuple[str, torch.Tensor]]:
    for item in made():
        yield item


# Objects with the options to make bytes of them.
PRODUCED: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "large": lambda: (_large, {}),
    "no_checksum": lambda: (_large, {"checksum": False}),
    "small_chunks": lambda: (_large[: 8 * MIB], {"chunk_size": 4096}),
    "many_tensors": lambda: (HONEST_OBJECTS["many_tensors"], {}),
    "made": lambda: (made(), {"specs": _SPECS}),
    "made_async": lambda: (made_async(), {"specs": _SPECS}),
}


async def load(visit: Visit) -> None:
    """Load the peer's message."""
    await visit.watched(visit.load)
    await visit.see_after(visit.load_next)


async def load_once(visit: Visit) -> None:
    """Load the peer's message, and nothing more."""
    await visit.watched(visit.load)


async def load_when_open(visit: Visit) -> None:
    """Load a message that the peer sends only after the stream is open."""
    visit.sender.send("now")
    await load(visit)


async def load_late(visit: Visit) -> None:
    """Load a message that the peer sends too late, and then one that arrives."""
    await visit.watched(visit.load)
    visit.sender.send("now")
    await visit.see_after(visit.load_next)


async def load_cancelled(visit: Visit) -> None:
    """Cancel a load before a byte has arrived: it does no harm."""
    async with anyio.create_task_group() as group:
        group.start_soon(visit.end.load)
        await all_blocked()
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
    """Cancel a load when a part of it has arrived."""
    async with anyio.create_task_group() as group:

        def cancel(*_: object) -> None:
            group.cancel_scope.cancel()

        await visit.end.load(progress=cancel)
    await visit.watched(visit.load)
    await visit.see_after(visit.load_next)


async def load_at_once(visit: Visit) -> None:
    """Load over all connections of the case; none of them may hold the others up."""
    async with AsyncExitStack() as opened:
        others = range(visit.case.connections - 1)
        visits = [visit, *[await opened.enter_async_context(visit.another()) for _ in others]]
        await visit.all_watched([each.load for each in visits])


async def load_and_cancel(visit: Visit) -> None:
    """Load over the first connection, and cancel loads at other times over the others."""
    await visit.watched(visit.load)
    took, count = visit.outcome.seconds, visit.case.connections
    for number in range(1, count):
        async with visit.another() as other:
            await other.watched_until(took * number / count, other.load)


async def load_beside_broken(visit: Visit) -> None:
    """Load from a stream that equals another one, which has broken before."""
    async with visit.another() as other:
        await visit.watched(visit.load)
        error, _ = await caught(other.load)
        visit.outcome.after = type(error).__name__ if error else "clean"


async def load_in_turns(visit: Visit) -> None:
    """Load from streams that equal each other, and have more than one message ready."""
    async with visit.another() as other:
        for each in (visit, other):
            await each.watched(each.load)
        # The streams arrived in this order; the bytes after the message are the same on each.
        for each in (visit, other):
            error, result = await caught(each.load_next)
            if error is not None:
                visit.outcome.after = type(error).__name__
                return
            assert_same(result, behind())
        visit.outcome.after = "clean"


async def produce(visit: Visit) -> None:
    """Make the bytes of a message for a consumer that has room for all of them."""
    made: list[int] = []

    async def run(scope: anyio.CancelScope | None = None) -> None:
        made.clear()
        obj, options = PRODUCED[visit.case.options["object"]]()
        async for piece in aiotorchio.iter_bytes(obj, **options):
            made.append(len(piece))
            if scope is not None:
                scope.cancel()

    await visit.watched(run)
    with anyio.CancelScope() as scope:
        await run(scope)
    visit.outcome.after = (
        "stopped" if sum(made) <= PRODUCED_AT_MOST else f"{sum(made)} bytes after a cancellation"
    )


async def save(visit: Visit) -> None:
    """Save to a peer that does not read the message."""
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
    obj = HONEST_OBJECTS[visit.case.honest]
    await visit.watched(lambda: visit.end.save(obj))
    loaded = await visit.watched(visit.load)
    # If there is an error, it is the only result.
    if visit.outcome.errors == {"": 2}:
        assert_same(loaded, obj)
        visit.outcome.after = "echoed"


SCENARIOS: dict[str, Callable[[Visit], Awaitable[None]]] = {
    scenario.__name__: scenario
    for scenario in (
        *(load, load_once, load_when_open, load_late, load_cancelled, load_http),
        *(load_twice, load_after_error, load_after_cancel),
        *(load_at_once, load_and_cancel, load_beside_broken, load_in_turns, produce),
        *(save, save_twice, save_after_error, save_after_cancel, echo),
    )
}
