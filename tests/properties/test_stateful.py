"""A stream keeps its promises under saves, loads, cancellations, silence and ends in any order.

A Hypothesis state machine controls a stream in memory. The clock of its event loop advances when no
task can run, so minutes of silence take no time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable
from typing import Any
from unittest import mock

import anyio
import anyio.lowlevel
import pytest
import torch
from anyio.abc import ByteReceiveStream, ByteSendStream
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import aiotorchio
from aiotorchio import (
    AiotorchioError,
    Limits,
    StreamBusy,
    StreamPoisoned,
    TransferTimeout,
    TruncatedError,
)
from aiotorchio.engine import threads
from aiotorchio.streams import guard
from aiotorchio.streams.guard import Direction
from tests.support.backends import run_blocking
from tests.support.corpus import assert_same
from tests.support.tiers import examples

PATIENCE = 10.0
LIMITS = Limits(idle_timeout=PATIENCE, write_timeout=PATIENCE, handshake_timeout=None, least_rate=0)
ROOM = st.sampled_from([1, 100, 1000, 10**6])
SHARED = [torch.ones(2)]
OBJECTS: tuple[Any, ...] = (
    {},
    {"w": torch.arange(3)},
    {"chunks": torch.arange(2000)},
    # The precheck and the rebuilding of this object run in a worker thread.
    [SHARED, SHARED],
)


class Clock(selectors.DefaultSelector):
    """A selector that advances its clock instead of sleeping."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(timeout and 0)
        if timeout and not ready:
            self.now += timeout
        return ready


class Loop(asyncio.SelectorEventLoop):
    """An event loop with a clock that needs no real time."""

    def __init__(self) -> None:
        self._clock = Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


class Inline:
    """Replaces worker threads, whose order would differ between runs."""

    def __init__(self, *_: Any) -> None:
        pass

    def submit(self, work: Callable[..., None], *args: Any) -> None:
        work(*args)


class Pipe:
    """Holds a few bytes between a writer and a reader; a writer waits while it is full."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.held = bytearray()
        self.closed = False
        self.taken = 0  # since a load began
        self.given = False  # since a save began
        self.count = 0  # bytes moved
        self.changed = asyncio.Event()

    def notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Reader(ByteReceiveStream):
    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        pipe = self.pipe
        while not pipe.held:
            if pipe.closed:
                raise anyio.EndOfStream
            await pipe.changed.wait()
        piece = bytes(pipe.held[:max_bytes])
        del pipe.held[: len(piece)]
        pipe.count += len(piece)
        pipe.taken += len(piece)
        pipe.notify()
        return piece

    async def aclose(self) -> None:
        raise AssertionError("the stream is its owner's")


class Iterator:
    """The same as an async iterator; a piece may also hold bytes of the next message."""

    def __init__(self, pipe: Pipe) -> None:
        self._reader = Reader(pipe)

    def __aiter__(self) -> Iterator:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self._reader.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None


class Writer(ByteSendStream):
    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe

    async def send(self, item: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        pipe = self.pipe
        while item:
            if pipe.closed:
                raise anyio.BrokenResourceError
            count = max(pipe.room - len(pipe.held), 0)
            if not count:
                await pipe.changed.wait()
                continue
            pipe.held += item[:count]
            pipe.count += count
            pipe.given = True
            item = item[count:]
            pipe.notify()

    async def aclose(self) -> None:
        raise AssertionError("the stream is its owner's")


def is_poisoned(stream: Any, direction: Direction) -> bool:
    """Whether a stream is poisoned, without a call that would change its state."""
    return guard._states.setdefault(stream, {})[direction].poison is not None


class Streams(RuleBasedStateMachine):
    """One connection after the other, each with at most one save and one load at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.inline = mock.patch.object(threads, "ThreadPoolExecutor", Inline)
        self.inline.start()
        self.runner = asyncio.Runner(loop_factory=Loop)
        self.saving: asyncio.Task[Any] | None = None
        self.loading: asyncio.Task[Any] | None = None

    @initialize(iterates=st.booleans(), room=ROOM)
    def connect(self, iterates: bool, room: int) -> None:
        self.iterates = iterates

        async def main() -> None:
            self.pipe = Pipe(room)
            self.writer = Writer(self.pipe)
            self.reader: Any = Iterator(self.pipe) if iterates else Reader(self.pipe)

        self.runner.run(main())
        # The saved objects that may still arrive, and whether the last of them will never be
        # complete.
        self.sent: deque[Any] = deque()
        self.broken = False
        self.save_poisoned = self.load_poisoned = False

    @precondition(lambda self: self.saving is None and self.loading is None)
    @rule(iterates=st.booleans(), room=ROOM)
    def connect_anew(self, iterates: bool, room: int) -> None:
        self.connect(iterates, room)

    # Saves and loads

    @rule(obj=st.sampled_from(OBJECTS), checksum=st.booleans())
    def save(self, obj: Any, checksum: bool) -> None:
        saving = aiotorchio.save_to_stream(obj, self.writer, checksum=checksum, limits=LIMITS)
        if self.saving is not None:
            self.refused(saving, StreamBusy)
        elif self.save_poisoned:
            self.refused(saving, StreamPoisoned)
        else:
            self.pipe.given = False
            self.sent.append(obj)
            self.saving = self.started(saving)
            self.note_ends()

    @rule(start_timeout=st.sampled_from([None, PATIENCE]))
    def load(self, start_timeout: float | None) -> None:
        limits = Limits(
            idle_timeout=PATIENCE,
            start_timeout=start_timeout,
            handshake_timeout=2 * PATIENCE,
            least_rate=0,
        )
        loading = aiotorchio.load_from_stream(self.reader, limits=limits)
        if self.loading is not None:
            self.refused(loading, StreamBusy)
        elif self.load_poisoned:
            self.refused(loading, StreamPoisoned)
        else:
            # An iterator may hold bytes of an earlier piece; these do not count.
            self.pipe.taken = 0
            self.start_timeout = start_timeout
            self.loading = self.started(loading)
            self.note_ends()

    def started(self, call: Any) -> asyncio.Task[Any]:
        async def main() -> asyncio.Task[Any]:
            task = asyncio.get_running_loop().create_task(call)
            await asyncio.sleep(0)
            return task

        return self.runner.run(main())

    def refused(self, call: Any, kind: type[AiotorchioError]) -> None:
        """Run the call to its end at once, so that nothing else can happen in between."""
        with pytest.raises(kind):
            run_blocking(call)

    # Events during calls

    @rule(turns=st.integers(0, 30))
    def turns(self, turns: int) -> None:
        async def main() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.runner.run(main())
        self.note_ends()

    @rule()
    def quiet(self) -> None:
        """Let all tasks run until no byte moves."""

        async def main() -> None:
            still = 0
            while still < 20 and len(asyncio.all_tasks()) > 1:
                before = self.pipe.count
                await asyncio.sleep(0)
                still = still + 1 if self.pipe.count == before else 0

        self.runner.run(main())
        self.note_ends()

    @precondition(lambda self: self.saving is None and self.loading is None)
    @precondition(lambda self: not (self.save_poisoned or self.load_poisoned or self.pipe.closed))
    @rule(obj=st.sampled_from(OBJECTS), loads_first=st.booleans())
    def message(self, obj: Any, loads_first: bool) -> None:
        """On a clean stream, a message arrives."""
        if loads_first:
            self.load(None)
        self.save(obj, True)
        if not loads_first:
            self.load(None)
        for _ in range(len(self.sent)):
            if self.loading is None:
                self.load(None)
            self.quiet()
        assert not self.sent
        assert self.saving is None
        assert self.loading is None

    @rule(seconds=st.sampled_from([1.0, 9.0, 11.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.runner.run(asyncio.sleep(seconds))
        self.note_ends()
        if seconds > 2 * PATIENCE:
            # A call either waits for a peer that stopped, or for a message that was never sent.
            assert self.saving is None
            assert self.loading is None or (self.start_timeout is None and not self.pipe.taken)

    @precondition(lambda self: self.saving is not None)
    @rule()
    def cancel_save(self) -> None:
        assert self.saving is not None
        self.cancel(self.saving)

    @precondition(lambda self: self.loading is not None)
    @rule()
    def cancel_load(self) -> None:
        assert self.loading is not None
        self.cancel(self.loading)

    def cancel(self, task: asyncio.Task[Any]) -> None:
        async def main() -> None:
            task.cancel()
            await asyncio.wait([task])

        self.runner.run(main())
        self.note_ends()

    @precondition(lambda self: self.saving is not None or self.loading is not None)
    @rule()
    def close(self) -> None:
        async def main() -> None:
            self.pipe.closed = True
            self.pipe.notify()
            for _ in range(5):
                await asyncio.sleep(0)

        self.runner.run(main())
        self.note_ends()

    # Outcomes of calls

    def note_ends(self) -> None:
        if self.saving is not None and self.saving.done():
            task, self.saving = self.saving, None
            self.note_saved(task)
        if self.loading is not None and self.loading.done():
            task, self.loading = self.loading, None
            self.note_loaded(task)

    def note_saved(self, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if not task.cancelled() and error is None:
            return
        assert task.cancelled() or isinstance(error, TransferTimeout | TruncatedError), error
        if isinstance(error, TruncatedError):
            assert self.pipe.closed
        # A save that has begun poisons the stream, even if no byte is known to have been sent.
        self.save_poisoned = is_poisoned(self.writer, "save")
        if self.pipe.given:
            assert self.save_poisoned
            self.broken = True
            # The owner must close the stream, because the rest of that message never comes.
            self.close()
        else:
            self.sent.pop()

    def note_loaded(self, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if not task.cancelled() and error is None:
            assert_same(task.result(), self.sent.popleft())
            return
        assert task.cancelled() or isinstance(error, TransferTimeout | TruncatedError), error
        if isinstance(error, TruncatedError):
            assert self.pipe.closed
        inside = self.pipe.taken > 0
        if isinstance(error, AiotorchioError) and not self.iterates:
            assert error.offset == self.pipe.taken
        self.load_poisoned = is_poisoned(self.reader, "load")
        assert self.load_poisoned == inside or self.iterates

    @invariant()
    def nothing_is_left_behind(self) -> None:
        tasks = asyncio.all_tasks(self.runner.get_loop())
        assert tasks <= {self.saving, self.loading}

    def teardown(self) -> None:
        if self.saving is not None:
            self.cancel_save()
        if self.loading is not None:
            self.cancel_load()
        self.runner.close()
        self.inline.stop()


Streams.TestCase.settings = settings(max_examples=examples(70), stateful_step_count=40)
TestStreams = Streams.TestCase
