"""All or nothing: a staged load that fails leaves every bit of its targets as it was."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import io
import itertools
import threading
import types
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any, ClassVar

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
import torch
import uvloop

import aiotorchio
from aiotorchio import (
    AiotorchioError,
    ChecksumError,
    DoubleBuffer,
    InvalidObjectError,
    MismatchError,
    ProtocolError,
    RemoteAbort,
    StreamPoisoned,
    TruncatedError,
)
from aiotorchio.common import gc_pause
from aiotorchio.common.interrupt import check_interrupt
from aiotorchio.engine.threads import run_in_thread
from aiotorchio.memory import atomic
from aiotorchio.memory.device_copy import DeviceCopier
from aiotorchio.memory.routes import Route
from tests.support import corpus
from tests.support.backends import ANYIO_BACKENDS, IN_ONE_LOOP, both_ends, until
from tests.support.tensor_layouts import (
    LAYOUTS,
    Pieces,
    Watched,
    encoded,
    into_options,
    load,
    place,
    places_for,
    safe_modes,
)
from tests.support.tiers import some

pytestmark = pytest.mark.anyio

in_one_loop = pytest.mark.parametrize(("anyio_backend", "kind"), IN_ONE_LOOP)
on_asyncio = pytest.mark.parametrize(
    "anyio_backend", [pytest.param(ANYIO_BACKENDS[name], id=name) for name in ("asyncio", "uvloop")]
)

SMALL = {"a": torch.arange(2.0), "s": torch.arange(3, dtype=torch.int16), "e": torch.tensor(1.5)}
CHUNKED = {
    "a": torch.arange(5.0),
    "m": torch.arange(2000.0).view(40, 50),
    "t": torch.arange(600).view(20, 30).t(),
    "large": torch.arange(30_000.0),
}
SMALL_MESSAGE = encoded(SMALL)
MESSAGE = encoded(CHUNKED, chunk_size=2**15)
CHUNKS = 5


class Stopped(BaseException):
    """Like KeyboardInterrupt, no subclass of Exception."""


class Target:
    """Targets of many layouts, and the options to receive into them."""

    def __init__(self, mode: str, state: dict[str, torch.Tensor]) -> None:
        self._state = state
        self.tensors = places_for(state)
        self.options = into_options(mode, self.tensors)
        self._watched = Watched(self.tensors)

    def assert_old(self) -> None:
        self._watched.assert_untouched()

    def assert_new(self) -> None:
        self._watched.assert_filled(self._state)


# ------------------------------------------------------------------------------ errors of a peer


@safe_modes
def test_cut_at_every_byte(mode: str) -> None:
    target = Target(mode, SMALL)
    for cut in some(range(len(SMALL_MESSAGE))):
        with pytest.raises(TruncatedError):
            load(SMALL_MESSAGE[:cut], **target.options)
        target.assert_old()
    load(SMALL_MESSAGE, **target.options)
    target.assert_new()


@safe_modes
async def test_cut_at_every_byte_of_a_stream(mode: str) -> None:
    target = Target(mode, SMALL)
    for cut in some(range(len(SMALL_MESSAGE))):
        with pytest.raises(TruncatedError):
            await aiotorchio.load_from_stream(Pieces(SMALL_MESSAGE[:cut], 50), **target.options)
        target.assert_old()
    await aiotorchio.load_from_stream(Pieces(SMALL_MESSAGE, 50), **target.options)
    target.assert_new()


@safe_modes
def test_every_byte_flipped(mode: str) -> None:
    target = Target(mode, SMALL)
    seen = set()
    for at, flip in itertools.product(some(range(len(SMALL_MESSAGE))), (0x01, 0x80, 0xFF)):
        damaged = bytearray(SMALL_MESSAGE)
        damaged[at] ^= flip
        with pytest.raises(AiotorchioError) as caught:
            load(bytes(damaged), **target.options)
        seen.add(type(caught.value))
        target.assert_old()
    assert {ChecksumError, ProtocolError} <= seen
    load(SMALL_MESSAGE, **target.options)
    target.assert_new()


@safe_modes
def test_damage_in_every_chunk(mode: str) -> None:
    target = Target(mode, CHUNKED)
    for at in range(0, len(MESSAGE), 1999):
        damaged = bytearray(MESSAGE)
        damaged[at] ^= 0xFF
        with pytest.raises(AiotorchioError):
            load(bytes(damaged), **target.options)
        target.assert_old()
    load(MESSAGE, **target.options)
    target.assert_new()


@in_one_loop
@safe_modes
async def test_a_sender_that_gives_up(kind: str, mode: str) -> None:
    target = Target(mode, CHUNKED)
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            for chunk in range(1, CHUNKS):
                with pytest.raises(ZeroDivisionError):
                    await near.save(CHUNKED, chunk_size=2**15, progress=failing_at(chunk))
            await near.save(CHUNKED, chunk_size=2**15)

        group.start_soon(push)
        for _ in range(1, CHUNKS):
            with pytest.raises(RemoteAbort, match="ZeroDivisionError"):
                await far.load(**target.options)
            target.assert_old()
        await far.load(**target.options)
    target.assert_new()


def failing_at(chunk: int) -> Callable[[int, int], None]:
    calls = itertools.count(1)

    def progress(done: int, total: int) -> None:
        if next(calls) == chunk:
            raise ZeroDivisionError

    return progress


@safe_modes
def test_an_object_that_cannot_be_rebuilt(mode: str) -> None:
    """The error is found when all bytes have arrived."""
    coo = torch.sparse_coo_tensor(
        torch.tensor([[0, 1]]), torch.ones(2), (2,), check_invariants=True
    )
    data = encoded({"w": torch.ones(3), "s": coo})
    indices = torch.tensor([0, 1]).numpy().tobytes()
    broken = bytearray(encoded({"w": torch.ones(3), "s": coo}, checksum=False))
    at = broken.index(indices)
    broken[at : at + 8] = b"\x07" * 8
    tensor = place((3,), torch.float32)
    watched, options = Watched({"w": tensor}), into_options(mode, {"w": tensor})
    with pytest.raises(InvalidObjectError):
        load(bytes(broken), **options, strict=False)
    watched.assert_untouched()
    load(data, **options, strict=False)
    watched.assert_filled({"w": torch.ones(3)})


# ------------------------------------------------------------------------------ errors of callers


@in_one_loop
@safe_modes
async def test_a_progress_that_fails(kind: str, mode: str) -> None:
    target = Target(mode, CHUNKED)
    for chunk in range(1, CHUNKS + 1):
        async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
            group.start_soon(near.save, CHUNKED)
            with pytest.raises(ZeroDivisionError):
                await far.load(**target.options, progress=failing_at(1))
            with pytest.raises(StreamPoisoned):
                await far.load(**target.options)
            group.cancel_scope.cancel()
        with pytest.raises(ZeroDivisionError):
            load(MESSAGE, **target.options, progress=failing_at(chunk))
        target.assert_old()
    load(MESSAGE, **target.options)
    target.assert_new()


@safe_modes
def test_a_map_location_that_fails(mode: str) -> None:
    target = Target(mode, SMALL)

    def fail(storage: torch.UntypedStorage, location: str) -> Any:
        raise KeyError("mine")

    data = encoded(SMALL | {"other": torch.ones(3)})
    with pytest.raises(KeyError, match="mine"):
        load(data, **target.options, strict=False, map_location=fail)
    target.assert_old()


class Failing:
    """An iterable whose iterator fails at one of its pieces, or when it is closed."""

    def __init__(self, data: bytes, at: int) -> None:
        self._pieces = [data[start : start + 100] for start in range(0, len(data), 100)]
        self._at = at

    def __aiter__(self) -> AsyncIterator[bytes]:
        return FailingIterator(self._pieces, self._at)


class FailingIterator:
    def __init__(self, pieces: list[bytes], at: int) -> None:
        self._pieces, self._at, self._given = pieces, at, 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await anyio.lowlevel.checkpoint()
        if self._given == self._at:
            raise ZeroDivisionError
        self._given += 1
        return self._pieces[self._given - 1]

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()
        raise ZeroDivisionError


@safe_modes
async def test_a_stream_that_fails_even_when_it_is_closed(mode: str) -> None:
    target = Target(mode, SMALL)
    for at in range(len(SMALL_MESSAGE) // 100 + 2):
        with pytest.raises(ZeroDivisionError):
            await aiotorchio.load_from_stream(Failing(SMALL_MESSAGE, at), **target.options)
        target.assert_old()
    load(SMALL_MESSAGE, **target.options)
    target.assert_new()


# ------------------------------------------------------------------------------ cancellation


@types.coroutine
def stepped(
    call: Coroutine[Any, Any, Any], waits: Callable[[int, Any], None]
) -> Generator[Any, Any, Any]:
    """Run a coroutine; call ``waits`` with the number of each wait, and its future."""
    resume = functools.partial(call.send, None)
    for count in itertools.count(1):
        try:
            trap = resume()
        except StopIteration as stop:
            return stop.value
        waits(count, trap)
        try:
            resume = functools.partial(call.send, (yield trap))
        except BaseException as error:
            resume = functools.partial(call.throw, error)
    raise AssertionError


class Attempt:
    """A call that is cancelled when it waits for the n-th time.

    Attributes:
        reached: Whether it has waited that often.
        cancelled: Whether it raised the cancellation.
    """

    def __init__(self, how: str, count: int) -> None:
        self._how, self._count = how, count
        self.reached = self.cancelled = False

    async def make(self, call: Coroutine[Any, Any, Any]) -> None:
        if self._how == "scope":
            await self._in_scope(call)
        else:
            await self._natively(call)

    async def _in_scope(self, call: Coroutine[Any, Any, Any]) -> None:
        def waits(count: int, trap: object) -> None:
            if count == self._count:
                self.reached = True
                scope.cancel()

        self.cancelled = True
        with anyio.CancelScope() as scope:
            await stepped(call, waits)
            self.cancelled = False

    async def _natively(self, call: Coroutine[Any, Any, Any]) -> None:
        """Cancel the task, as ``asyncio.timeout`` does."""

        def waits(count: int, trap: object) -> None:
            if count == self._count:
                self.reached = True
                if self._how == "late" and asyncio.isfuture(trap):
                    # The future is done, but the task has not run yet.
                    trap.add_done_callback(lambda _: task.cancel())
                else:
                    task.cancel()
            elif self._how == "again" and count > self._count:
                task.cancel()

        async def run() -> None:
            await stepped(call, waits)

        task = asyncio.ensure_future(run())
        await asyncio.wait([task])
        self.cancelled = task.cancelled()
        if not self.cancelled:
            task.result()


class Waiting:
    """A lock that is free after a while."""

    def __init__(self) -> None:
        self.held = False

    async def __aenter__(self) -> None:
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        self.held = True

    async def __aexit__(self, *error: object) -> None:
        self.held = False


async def cancel_everywhere(
    how: str, mode: str, make_lock: Callable[[], Any] | None = None
) -> tuple[int, int]:
    """Cancel loads of one message at every wait; count the loads and the cancellations."""
    target = Target(mode, CHUNKED)
    cancelled = 0
    for count in itertools.count(1):
        attempt = Attempt(how, count)
        lock = make_lock() if make_lock else None
        await attempt.make(
            aiotorchio.load_from_stream(Pieces(MESSAGE, 20_000), **target.options, lock=lock)
        )
        if attempt.cancelled:
            target.assert_old()
            cancelled += 1
        else:
            target.assert_new()
            target = Target(mode, CHUNKED)
        assert lock is None or not lock.held
        if not attempt.reached:
            return count, cancelled
    raise AssertionError


@safe_modes
@pytest.mark.parametrize("make_lock", [None, Waiting], ids=["free", "locked"])
async def test_cancelled_at_every_await(mode: str, make_lock: Callable[[], Any] | None) -> None:
    count, cancelled = await cancel_everywhere("scope", mode, make_lock)
    assert count > 20 and cancelled > 15


@on_asyncio
@pytest.mark.parametrize("how", ["early", "late", "again"])
@safe_modes
@pytest.mark.parametrize("make_lock", [None, Waiting], ids=["free", "locked"])
async def test_cancelled_natively_at_every_await(
    how: str, mode: str, make_lock: Callable[[], Any] | None
) -> None:
    count, cancelled = await cancel_everywhere(how, mode, make_lock)
    # A natively cancelled call must raise the cancellation.
    assert count > 20 and cancelled == count - 1


class Leaving(Waiting):
    """A lock whose release takes a while, too."""

    async def __aexit__(self, *error: object) -> None:
        try:
            await anyio.lowlevel.checkpoint()
        finally:
            self.held = False


@safe_modes
async def test_cancelled_while_the_lock_is_released(mode: str) -> None:
    await cancel_everywhere("scope", mode, Leaving)


@safe_modes
async def test_cancelled_while_a_lock_is_waited_for(mode: str) -> None:
    target, lock = Target(mode, SMALL), anyio.Lock()
    async with lock:
        async with anyio.create_task_group() as group:
            stream = Pieces(SMALL_MESSAGE, 1000)
            group.start_soon(
                functools.partial(aiotorchio.load_from_stream, stream, lock=lock, **target.options)
            )
            await until(lambda: lock.statistics().tasks_waiting == 1)
            # The whole message has arrived, and the load waits for the lock.
            assert stream.taken == len(SMALL_MESSAGE)
            target.assert_old()
            group.cancel_scope.cancel()
        target.assert_old()
    assert not lock.locked()
    await aiotorchio.load_from_stream(Pieces(SMALL_MESSAGE, 1000), lock=lock, **target.options)
    target.assert_new()
    assert not lock.locked()


# ------------------------------------------------------------------------------ locks


class Broken:
    """A lock that cannot be acquired."""

    async def __aenter__(self) -> None:
        raise ZeroDivisionError

    async def __aexit__(self, *error: object) -> None:
        raise AssertionError("it was not entered")

    __enter__, __exit__ = (
        lambda self: (_ for _ in ()).throw(ZeroDivisionError),
        lambda self, *error: None,
    )


@safe_modes
async def test_a_lock_that_cannot_be_had(mode: str) -> None:
    target = Target(mode, SMALL)
    with pytest.raises(ZeroDivisionError):
        await aiotorchio.load_from_stream(
            Pieces(SMALL_MESSAGE, 1000), lock=Broken(), **target.options
        )
    target.assert_old()
    with pytest.raises(ZeroDivisionError):
        load(SMALL_MESSAGE, lock=Broken(), **target.options)
    target.assert_old()
    load(SMALL_MESSAGE, **target.options)
    target.assert_new()


class Noted:
    """A lock that notes the numbers at its acquisition; like an empty collection, it is false."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.seen: list[list[float]] = []

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> None:
        self.seen.append(self._tensor.tolist())

    def __exit__(self, *error: object) -> None:
        self.seen.append(self._tensor.tolist())

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, *error: object) -> None:
        self.__exit__()


@safe_modes
async def test_the_lock_is_held_around_the_change(mode: str) -> None:
    for blocking in (False, True):
        tensor = torch.zeros(2)
        lock, options = Noted(tensor), into_options(mode, {"w": tensor})
        data = encoded({"w": torch.ones(2)})
        if blocking:
            load(data, lock=lock, **options)
        else:
            await aiotorchio.load_from_stream(Pieces(data, 1000), lock=lock, **options)
        assert lock.seen == [[0, 0], [1, 1]]


@safe_modes
async def test_the_locks_of_every_world(mode: str) -> None:
    target = Target(mode, SMALL)
    locks: list[Any] = [anyio.Lock(), anyio.Semaphore(1), contextlib.nullcontext()]
    for lock in locks:
        await aiotorchio.load_from_stream(Pieces(SMALL_MESSAGE, 99), lock=lock, **target.options)
    target.assert_new()
    load(SMALL_MESSAGE, lock=threading.Lock(), **target.options)
    load(SMALL_MESSAGE, lock=threading.RLock(), **target.options)
    target.assert_new()


@safe_modes
async def test_a_destination_that_changes_while_the_lock_is_waited_for(mode: str) -> None:
    class Meddling(Waiting):
        async def __aenter__(self) -> None:
            tensors["w"].data = torch.zeros(3)

    tensors = {"x": place((3,), torch.float32), "w": place((3,), torch.float32)}
    watched = Watched({"x": tensors["x"]})
    data = encoded({"x": torch.ones(3), "w": torch.ones(3)})
    options = into_options(mode, tensors)
    with pytest.raises(MismatchError, match="changed its shape or its memory"):
        await aiotorchio.load_from_stream(Pieces(data, 1000), lock=Meddling(), **options)
    watched.assert_untouched()
    assert not tensors["w"].any()
    load(data, **options)
    watched.assert_filled({"x": torch.ones(3)})
    assert tensors["w"].eq(1).all()


class Released:
    """A lock whose release runs a function, in each backend; notes the numbers at that time.

    Attributes:
        seen: Whether the targets had changed when it was released.
    """

    def __init__(self, tensor: torch.Tensor, leave: Callable[[], Any]) -> None:
        self._tensor, self._leave = tensor, leave
        self._before = tensor.clone()
        self.seen: list[bool] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> Any:
        self.seen.append(not torch.equal(self._tensor, self._before))
        return self._leave()

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *error: object) -> Any:
        result = self.__exit__(*error)
        return await result if inspect.isawaitable(result) else result


def raising(error: type[BaseException]) -> Callable[[], Any]:
    def leave() -> None:
        raise error("no longer held")

    return leave


async def load_in(
    way: str, data: bytes, lock: Any, options: dict[str, Any], tmp_path: Any = None
) -> Any:
    """Load with one of the public calls."""
    match way:
        case "stream":
            return await aiotorchio.load_from_stream(Pieces(data, 1000), lock=lock, **options)
        case "message":
            async with aiotorchio.StreamReader(Pieces(data, 1000)).open() as message:
                return await message.load(lock=lock, **options)
        case "blocking":
            return load(data, lock=lock, **options)
        case "path":
            (tmp_path / "message").write_bytes(data)
            return aiotorchio.load(tmp_path / "message", lock=lock, **options)
    raise AssertionError(way)


ways = pytest.mark.parametrize("way", ["stream", "message", "blocking", "path"])


@safe_modes
@ways
@pytest.mark.parametrize("error", [RuntimeError, Stopped, KeyboardInterrupt, GeneratorExit])
async def test_a_release_that_fails(
    error: type[BaseException], way: str, mode: str, tmp_path: Any
) -> None:
    target = Target(mode, SMALL)
    versions = [tensor._version for tensor in target.tensors.values()]
    for _ in range(2):
        lock = Released(target.tensors["a"], raising(error))
        with pytest.raises(error, match="no longer held"):
            await load_in(way, SMALL_MESSAGE, lock, target.options, tmp_path)
        assert lock.seen == [True]
        target.assert_old()
    # Both changes raise autograd's version counters.
    after = [tensor._version for tensor in target.tensors.values()]
    assert all(new >= old + 4 for old, new in zip(versions, after, strict=True))
    # The memory of a DoubleBuffer is in the right places.
    for sent in (SMALL, {name: tensor + 1 for name, tensor in SMALL.items()}):
        watched = Watched(target.tensors)
        await load_in(way, encoded(sent), None, target.options, tmp_path)
        watched.assert_filled(sent)


@safe_modes
@ways
async def test_a_release_that_swallows_what_failed(
    way: str, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    target = Target(mode, SMALL)
    fail = raising(ZeroDivisionError)
    for kind in (atomic.Exchange, atomic.BufferSwap):

        def fail_at_the_end(self: Any, apply: Any = kind.apply) -> None:
            apply(self)
            fail()

        monkeypatch.setattr(kind, "apply", fail_at_the_end)
    lock = Released(target.tensors["a"], lambda: True)
    with pytest.raises(ZeroDivisionError):
        await load_in(way, SMALL_MESSAGE, lock, target.options, tmp_path)
    # The change was undone while the lock was held.
    assert lock.seen == [False]
    target.assert_old()
    with pytest.raises(ZeroDivisionError):
        suppressing: Any = contextlib.ExitStack() if way in ("blocking", "path") else None
        suppressing = suppressing or contextlib.AsyncExitStack()
        suppressing.push(lambda *error: True)
        await load_in(way, SMALL_MESSAGE, suppressing, target.options, tmp_path)
    target.assert_old()
    monkeypatch.undo()
    await load_in(way, SMALL_MESSAGE, lock, target.options, tmp_path)
    target.assert_new()


@safe_modes
@ways
async def test_a_swallowed_error_leaves_nothing_for_the_collector(
    way: str, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """The traceback of the error reaches the staged tensors."""
    target = Target(mode, SMALL)
    lock = Released(target.tensors["a"], raising(ZeroDivisionError))
    made: list[weakref.ref[Any]] = []
    apply = {kind: kind.apply for kind in (atomic.Exchange, atomic.BufferSwap)}
    for kind in apply:

        def note(self: Any, kind: Any = kind) -> None:
            made.append(weakref.ref(self))
            apply[kind](self)

        monkeypatch.setattr(kind, "apply", note)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(ZeroDivisionError):
            await load_in(way, SMALL_MESSAGE, lock, target.options, tmp_path)
        assert made and made[0]() is None
    finally:
        gc.enable()


async def test_a_release_that_swallows_a_cancellation() -> None:
    target, held = Target("staged", SMALL), False

    class Swallowing:
        async def __aenter__(self) -> None:
            nonlocal held
            held = True
            # The commit waits for its thread, and is cancelled there.
            scope.cancel()

        async def __aexit__(self, *error: object) -> bool:
            nonlocal held
            held = False
            return True

    stream = Pieces(SMALL_MESSAGE, 1000)
    with anyio.CancelScope() as scope:
        await aiotorchio.load_from_stream(stream, lock=Swallowing(), **target.options)
        raise AssertionError("a cancelled load returned")
    assert scope.cancelled_caught and not held
    target.assert_old()


@in_one_loop
@safe_modes
async def test_a_scope_that_is_cancelled_during_the_release(kind: str, mode: str) -> None:
    """No error is raised: the release goes on, and so does the change."""
    target, going, free = Target(mode, SMALL), anyio.Event(), anyio.Event()

    async def leave() -> None:
        going.set()
        await free.wait()

    async def cancel() -> None:
        await going.wait()
        scope.cancel()
        await some_time()
        free.set()

    lock = Released(target.tensors["a"], leave)
    returned = False
    async with both_ends(kind) as (near, far), anyio.create_task_group() as group:
        await near.save(SMALL)
        group.start_soon(cancel)
        with anyio.CancelScope() as scope:
            await far.load(lock=lock, **target.options)
            returned = True
        assert returned and not scope.cancelled_caught
    target.assert_new()


@on_asyncio
@safe_modes
@pytest.mark.parametrize("how", ["cancel", "timeout", "wait_for", "twice"])
@pytest.mark.parametrize("way", ["stream", "message"])
async def test_a_native_cancellation_during_the_release(way: str, how: str, mode: str) -> None:
    target, going = Target(mode, SMALL), asyncio.Event()

    async def leave() -> None:
        going.set()
        try:
            await asyncio.Event().wait()
        finally:
            if how == "twice":
                going.clear()
                going.set()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()

    lock = Released(target.tensors["a"], leave)

    async def attempt() -> None:
        call = load_in(way, SMALL_MESSAGE, lock, target.options)
        match how:
            case "timeout":
                async with asyncio.timeout(None) as timeout:
                    watch = asyncio.ensure_future(going.wait())
                    watch.add_done_callback(lambda _: timeout.reschedule(0))
                    await call
            case "wait_for":
                inner = asyncio.ensure_future(call)
                watch = asyncio.ensure_future(going.wait())
                watch.add_done_callback(lambda _: inner.cancel())
                await asyncio.wait_for(inner, None)
            case _:
                await call

    task = asyncio.ensure_future(attempt())
    await going.wait()
    if how in ("cancel", "twice"):
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
    await asyncio.wait([task])
    assert task.cancelled() or isinstance(task.exception(), TimeoutError)
    assert lock.seen == [True]
    target.assert_old()
    await load_in(way, SMALL_MESSAGE, None, target.options)
    target.assert_new()


@on_asyncio
@pytest.mark.parametrize("way", ["stream", "message"])
async def test_an_undo_goes_on_without_a_thread(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are unavailable when the interpreter is shutting down, or has no memory for one."""
    target = Target("staged", SMALL)

    def leave() -> None:
        monkeypatch.setattr("aiotorchio.engine.commit.run_in_thread", no_thread)
        raise ZeroDivisionError

    async def no_thread(task: object, **_: Any) -> None:
        raise RuntimeError("can't start new thread")

    lock = Released(target.tensors["a"], leave)
    with pytest.raises(RuntimeError, match="new thread") as caught:
        await load_in(way, SMALL_MESSAGE, lock, target.options)
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    target.assert_old()


@safe_modes
def test_interrupts_while_it_is_undone(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes again, and again."""
    target = Target(mode, SMALL)
    left = [2]
    for kind in (atomic.Exchange, atomic.BufferSwap):

        def undo(self: Any, undo: Any = kind.undo) -> None:
            if left[0]:
                left[0] -= 1
                raise KeyboardInterrupt
            undo(self)

        monkeypatch.setattr(kind, "undo", undo)
    lock = Released(target.tensors["a"], raising(ZeroDivisionError))
    with pytest.raises(KeyboardInterrupt):
        load(SMALL_MESSAGE, lock=lock, **target.options)
    assert left == [0]
    target.assert_old()


def test_a_file_that_cannot_be_closed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is closed before the change: an error has changed nothing."""
    (tmp_path / "message").write_bytes(SMALL_MESSAGE)
    target = Target("staged", SMALL)

    class Failing(io.BytesIO):
        def close(self) -> None:
            raise OSError("not closed")

    monkeypatch.setattr("builtins.open", lambda path, mode: Failing(SMALL_MESSAGE))
    with pytest.raises(OSError, match="not closed"):
        aiotorchio.load(tmp_path / "message", **target.options)
    target.assert_old()


VERSIONS = 25


def version(number: int) -> dict[str, torch.Tensor]:
    return {f"w{n}": torch.full((n * 40 + 1,), float(number)) for n in range(30)}


async def follow(
    mode: str, tensors: dict[str, torch.Tensor], lock: Any, reader: Callable[[], Any]
) -> None:
    async with both_ends("socket") as (near, far), anyio.create_task_group() as group:

        async def push() -> None:
            for number in range(1, VERSIONS):
                await near.save(version(number))

        group.start_soon(push)
        group.start_soon(reader)
        options = into_options(mode, tensors)
        for _ in range(1, VERSIONS):
            await far.load(**options, lock=lock)
            await anyio.lowlevel.checkpoint()


def versions_in(tensors: dict[str, torch.Tensor]) -> set[float]:
    return {value for tensor in tensors.values() for value in tensor.unique().tolist()}


@pytest.mark.parametrize(
    ("mode", "locked"), [("staged", True), ("double", True), ("double", False)]
)
async def test_nobody_sees_a_mixture(mode: str, locked: bool) -> None:
    """The exchange of a double buffer does not even need the lock: no other code runs during it."""
    lock = anyio.Lock() if locked else None
    tensors = {name: torch.zeros_like(tensor) for name, tensor in version(0).items()}
    seen: set[float] = set()

    async def read() -> None:
        while VERSIONS - 1 not in seen:
            async with lock or contextlib.nullcontext():
                found = versions_in(tensors)
            assert len(found) == 1
            seen.update(found)
            await anyio.lowlevel.checkpoint()

    await follow(mode, tensors, lock, read)
    assert len(seen) > VERSIONS // 2


async def test_the_lock_is_held_while_half_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = anyio.Lock()
    tensors = {name: torch.zeros_like(tensor) for name, tensor in version(0).items()}
    seen: list[tuple[bool, int]] = []
    token = anyio.lowlevel.current_token()

    def look() -> None:
        seen.append((lock.locked(), len(versions_in(tensors))))

    def copy(self: DeviceCopier, destination: torch.Tensor, source: torch.Tensor) -> None:
        destination.copy_(source)
        anyio.from_thread.run_sync(look, token=token)

    monkeypatch.setattr(DeviceCopier, "copy", copy)
    await aiotorchio.load_from_stream(
        Pieces(encoded(version(1)), 10_000), into=tensors, staged=True, lock=lock
    )
    assert {locked for locked, _ in seen} == {True}
    assert {count for _, count in seen} == {1, 2}
    assert versions_in(tensors) == {1} and not lock.locked()


# ------------------------------------------------------------------------------ failing changes


class FailingCopy:
    """A proxy of ``DeviceCopier.copy`` that fails half-way in one of its copies."""

    def __init__(self, fails_at: int, error: type[BaseException]) -> None:
        self._left, self._error = fails_at, error

    def __call__(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            if destination.dim():
                destination[: len(destination) // 2].copy_(source[: len(destination) // 2])
            raise self._error("half-way")
        destination.copy_(source)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, Stopped])
def test_an_exchange_that_fails_is_undone(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_STEP", 4096)
    for count in itertools.count(1):
        target = Target("staged", CHUNKED)
        copy = FailingCopy(count, error)
        monkeypatch.setattr(DeviceCopier, "copy", lambda self, *args, copy=copy: copy(*args))
        try:
            load(MESSAGE, **target.options)
        except error:
            target.assert_old()
        else:
            break
    target.assert_new()
    assert count > 30


async def test_an_exchange_that_fails_in_its_thread_is_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for count in itertools.count(1):
        target, lock = Target("staged", CHUNKED), anyio.Lock()
        copy = FailingCopy(count, RuntimeError)
        monkeypatch.setattr(DeviceCopier, "copy", lambda self, *args, copy=copy: copy(*args))
        try:
            await aiotorchio.load_from_stream(Pieces(MESSAGE, 2**16), lock=lock, **target.options)
        except RuntimeError:
            target.assert_old()
        else:
            break
        assert not lock.locked()
    target.assert_new()
    assert count > 10


DATA: Any = inspect.getattr_static(torch.Tensor, "data")


class Stubborn(torch.Tensor):
    """A tensor of a subclass that can refuse to take other memory."""

    refuses = False

    def _show(self, other: torch.Tensor) -> None:
        if Stubborn.refuses:
            raise RuntimeError("no")
        DATA.__set__(self, other)

    data = property(DATA.__get__, _show)


@pytest.mark.parametrize("position", range(4))
async def test_a_swap_that_fails_is_undone(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("double", CHUNKED)
    names = list(CHUNKED)
    target.tensors[names[position]] = target.tensors[names[position]].as_subclass(Stubborn)
    target.options["into"] = DoubleBuffer(target.tensors)
    for _ in range(2):
        monkeypatch.setattr(Stubborn, "refuses", True)
        with pytest.raises(RuntimeError, match="no"):
            load(MESSAGE, **target.options)
        with pytest.raises(RuntimeError, match="no"):
            await aiotorchio.load_from_stream(Pieces(MESSAGE, 2**16), **target.options)
        monkeypatch.setattr(Stubborn, "refuses", False)
        watched = Watched(target.tensors)
        load(MESSAGE, **target.options)
        watched.assert_filled(CHUNKED)


def test_a_swap_that_fails_at_its_end_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("double", CHUNKED)
    failures = iter([True])

    def fail_once(tensors: Any) -> None:
        if next(failures, False):
            raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "note_change", fail_once)
        with pytest.raises(RuntimeError, match="no"):
            load(MESSAGE, **target.options)
    target.assert_old()
    load(MESSAGE, **target.options)
    target.assert_new()


# ------------------------------------------------------------------------------ worker threads


class Gate:
    """Blocks a worker thread."""

    def __init__(self) -> None:
        self.entered, self.open, self.passed = (threading.Event() for _ in range(3))

    def wait(self) -> None:
        self.entered.set()
        assert self.open.wait(30)
        self.passed.set()

    def hold(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function, so that it waits for the gate first."""

        def held(*args: Any) -> Any:
            self.wait()
            return function(*args)

        return held


async def some_time() -> None:
    for _ in range(50):
        await anyio.lowlevel.checkpoint()


async def test_a_cancellation_waits_for_the_thread() -> None:
    gate = Gate()
    async with anyio.create_task_group() as group:
        group.start_soon(run_in_thread, gate.wait)
        await until(gate.entered.is_set)
        group.cancel_scope.cancel()
        gate.open.set()
    assert gate.passed.is_set()


def cancel_once(task: asyncio.Task[Any]) -> None:
    task.cancel()


def cancel_all(task: asyncio.Task[Any]) -> None:
    """Cancel all tasks, as ``asyncio.run`` does at its end, and many signal handlers."""
    for each in asyncio.all_tasks() - {asyncio.current_task()}:
        each.cancel()


async def cancelled_in_its_thread(
    call: Coroutine[Any, Any, Any], gate: Gate, cancel: Callable[[asyncio.Task[Any]], None]
) -> None:
    """Cancel a call whose thread is blocked; it must not return before its thread."""
    task = asyncio.ensure_future(call)
    await until(gate.entered.is_set)
    try:
        for _ in range(3):
            cancel(task)
            await some_time()
            assert not task.done(), "its thread still runs"
    finally:
        gate.open.set()
        await asyncio.wait([task])
        await until(gate.passed.is_set)
    assert task.cancelled()


def natively(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on a loop where it may cancel every other task, with each way of cancelling."""

    def run(loop: Any, cancel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(test(cancel, monkeypatch))

    loops = pytest.mark.parametrize(
        "loop", [None, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
    )
    ways = pytest.mark.parametrize("cancel", [cancel_once, cancel_all])
    marked: Callable[..., None] = loops(ways(run))
    return marked


Cancel = Callable[[asyncio.Task[Any]], None]


@natively
async def test_a_native_cancellation_waits_for_the_thread(
    cancel: Cancel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    await cancelled_in_its_thread(run_in_thread(gate.wait), gate, cancel)


@natively
async def test_the_error_of_a_task_that_was_cancelled_is_not_complained_about(
    cancel: Cancel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    complaints: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: complaints.append(context))

    def fail() -> None:
        gate.wait()
        raise ZeroDivisionError

    await cancelled_in_its_thread(run_in_thread(fail), gate, cancel)
    gc.collect()
    await some_time()
    assert not complaints


@natively
async def test_a_change_that_is_cancelled_natively_is_undone_when_it_is_whole(
    cancel: Cancel, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, gate = Target("staged", CHUNKED), Gate()
    monkeypatch.setattr(atomic.Exchange, "apply", gate.hold(atomic.Exchange.apply))
    call = aiotorchio.load_from_stream(Pieces(MESSAGE, 2**16), **target.options)
    await cancelled_in_its_thread(call, gate, cancel)
    target.assert_old()


@natively
async def test_a_change_that_is_cancelled_natively_while_it_is_undone(
    cancel: Cancel, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, gate = Target("staged", CHUNKED), Gate()

    def fail(self: atomic.Exchange) -> None:
        apply(self)
        raise ZeroDivisionError

    apply = atomic.Exchange.apply
    monkeypatch.setattr(atomic.Exchange, "apply", fail)
    monkeypatch.setattr(atomic.Exchange, "undo", gate.hold(atomic.Exchange.undo))
    call = aiotorchio.load_from_stream(Pieces(MESSAGE, 2**16), **target.options)
    await cancelled_in_its_thread(call, gate, cancel)
    target.assert_old()


@natively
async def test_a_plain_load_that_is_cancelled_leaves_no_thread_that_writes(
    cancel: Cancel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr(Route, "take", gate.hold(Route.take))
    call = aiotorchio.load_from_stream(Pieces(MESSAGE, 2**16), into=places_for(CHUNKED))
    await cancelled_in_its_thread(call, gate, cancel)


class ClosedWhen:
    """Runs a coroutine until an event is set, and closes it then, as a dropped loop does.

    It is awaited on asyncio.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], event: threading.Event) -> None:
        self._coroutine, self._event = coroutine, event

    def __await__(self) -> Generator[None, None, None]:
        awaited = self._coroutine.send(None)
        while not self._event.is_set():
            if awaited is None or awaited.done():
                awaited = self._coroutine.send(None)
            yield
        self._coroutine.close()


@on_asyncio
@pytest.mark.parametrize("fails_at", [1, 2, 3, 8])
async def test_a_change_whose_coroutine_is_closed_is_undone_behind_its_thread(
    fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, entered, done = Target("staged", CHUNKED), threading.Event(), threading.Event()
    calls = itertools.count(1)

    def copy(self: DeviceCopier, destination: torch.Tensor, source: torch.Tensor) -> None:
        if next(calls) != fails_at:
            destination.copy_(source)
            return
        destination.zero_()
        entered.set()
        try:
            while True:
                check_interrupt()
        finally:
            done.set()

    monkeypatch.setattr(DeviceCopier, "copy", copy)
    lock = asyncio.Lock()
    call = aiotorchio.load_from_stream(Pieces(MESSAGE, 2**16), lock=lock, **target.options)
    await ClosedWhen(call, entered)
    assert done.is_set() and not lock.locked()
    target.assert_old()


@safe_modes
@pytest.mark.parametrize("end", ["whole", "cut", "lock"])
async def test_what_is_left_of_a_large_load_is_freed_in_a_thread(
    mode: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty thousand shadows took a tenth of a second on the event loop."""
    monkeypatch.setattr("aiotorchio.engine.commit._FREED_AT_ONCE", 0)
    monkeypatch.setattr("aiotorchio.engine.receive._RELEASED_ROWS", 0)
    target, freed = Target(mode, CHUNKED), Counter[bool]()
    here = threading.current_thread()

    def release(*tables: Any) -> None:
        freed[threading.current_thread() is here] += sum(map(len, tables))
        gc_pause.release(*tables)

    monkeypatch.setattr("aiotorchio.engine.commit.release", release)
    monkeypatch.setattr("aiotorchio.engine.receive.release", release)
    swaps: list[Any] = []
    for kind in (atomic.Exchange, atomic.BufferSwap):
        made = kind.__init__

        def init(self: Any, *args: Any, made: Any = made) -> None:
            swaps.append(self)
            made(self, *args)

        monkeypatch.setattr(kind, "__init__", init)
    data = MESSAGE[:-40] if end == "cut" else MESSAGE
    lock = Released(target.tensors["a"], fail) if end == "lock" else None
    call = aiotorchio.load_from_stream(Pieces(data, 2**16), lock=lock, **target.options)
    if end == "whole":
        await call
        target.assert_new()
    else:
        with pytest.raises((TruncatedError, ZeroDivisionError)):
            await call
        target.assert_old()
    (change,) = swaps
    await until(lambda: not any(change.tables))
    assert freed[False] and not freed[True]


async def test_a_change_stays_if_no_thread_can_free_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = []
    start = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if thread.name == "aiotorchio_free":
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        # The load before the commit may need a thread.
        start(thread)

    monkeypatch.setattr("aiotorchio.engine.commit._FREED_AT_ONCE", 0)
    monkeypatch.setattr(threading.Thread, "start", start_others)
    target = Target("staged", SMALL)
    await aiotorchio.load_from_stream(Pieces(SMALL_MESSAGE, 2**16), **target.options)
    assert len(refused) == 1
    target.assert_new()


def fail() -> None:
    raise ZeroDivisionError


async def test_a_change_in_a_scope_that_is_cancelled_is_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, gate = Target("staged", CHUNKED), Gate()
    monkeypatch.setattr(atomic.Exchange, "apply", gate.hold(atomic.Exchange.apply))

    async def cancel() -> None:
        await until(gate.entered.is_set)
        scope.cancel()
        gate.open.set()

    async with anyio.create_task_group() as group:
        group.start_soon(cancel)
        with anyio.CancelScope() as scope:
            await aiotorchio.load_from_stream(Pieces(MESSAGE, 2**16), **target.options)
        assert scope.cancelled_caught
    target.assert_old()


# ------------------------------------------------------------------------------ double buffers


def test_two_sets_of_memory_take_turns() -> None:
    tensors = places_for(CHUNKED)
    buffers = DoubleBuffer(tensors)
    addresses = []
    for _ in range(4):
        addresses.append([each.data_ptr() for each in tensors.values()])
        load(MESSAGE, into=buffers)
    assert addresses[0] == addresses[2] and addresses[1] == addresses[3]
    assert not set(addresses[0]) & set(addresses[1])


def test_views_that_are_not_in_the_destination_keep_the_memory_of_before() -> None:
    tensor = torch.zeros(3)
    view = tensor[:]
    load(encoded({"w": torch.ones(3)}), into=DoubleBuffer({"w": tensor}))
    assert tensor.eq(1).all() and view.eq(0).all()


@safe_modes
def test_what_a_message_does_not_have_stays(mode: str) -> None:
    base = place((100,), torch.float32)
    tensors = {
        "base": base,
        "w": base[10:20],
        "rows": base[40:70].view(5, 6)[:, 1:3],
        "empty": base[:0].view(0, 5),
        "other": place((5,), torch.int64),
    }
    options = into_options(mode, tensors)
    state = {"w": torch.ones(10), "rows": torch.ones(5, 2)}
    for number in (1, 2, 3):
        state = {name: torch.full_like(tensor, number) for name, tensor in state.items()}
        watched = Watched(tensors)
        load(encoded(state), **options, strict=False)
        watched.assert_filled(state)
        assert len({each.untyped_storage().data_ptr() for each in tensors.values()}) == 2


@safe_modes
def test_what_a_message_does_not_have_may_change_meanwhile(mode: str) -> None:
    base = torch.zeros(30_000)
    tensors = {"base": base, "w": base[100:29_000], "rows": base[29_000:].view(10, 100)[:, 1:5]}
    state = {"w": torch.ones(28_900), "rows": torch.ones(10, 4)}

    def change(done: int, total: int) -> None:
        base[:100] = base[29_000] = float(done)

    load(
        encoded(state, chunk_size=2**15),
        **into_options(mode, tensors),
        strict=False,
        progress=change,
    )
    last = float(encoded_size(state))
    assert base[:100].eq(last).all() and base[29_000] == last
    assert base[100:29_000].eq(1).all() and base[29_000:].sum() == last + 40


def encoded_size(state: dict[str, torch.Tensor]) -> int:
    return aiotorchio.save(state, "/dev/null").payload_nbytes


class Noting(torch.Tensor):
    """A tensor that notes the thread in which it got other memory."""

    threads: ClassVar[set[int]] = set()

    def _show(self, other: torch.Tensor) -> None:
        Noting.threads.add(threading.get_ident())
        DATA.__set__(self, other)

    data = property(DATA.__get__, _show)


@pytest.mark.parametrize("layout", ["whole", "gaps"])
async def test_memory_is_swapped_between_two_steps_of_the_event_loop(layout: str) -> None:
    """No other code on the loop can see some tensors changed and others not."""
    Noting.threads.clear()
    state = {f"w{n}": torch.ones(9, 10) for n in range(5)}
    tensors = {name: LAYOUTS[layout](each).as_subclass(Noting) for name, each in state.items()}
    watched = Watched(tensors)
    await aiotorchio.load_from_stream(Pieces(encoded(state), 999), into=DoubleBuffer(tensors))
    watched.assert_filled(state)
    assert Noting.threads == {threading.get_ident()}


@safe_modes
def test_a_tensor_without_elements_brings_none(mode: str) -> None:
    """It has no bytes, in any of its sizes; its neighbours in memory are not its own."""
    base = place((5,), torch.float32)
    tensors = {"empty": base[:0].view(0, 5), "base": base, "own": place((0, 3), torch.int16)}
    watched, options = Watched(tensors), into_options(mode, tensors)
    for _ in range(3):
        data = encoded({"empty": torch.empty(0, 5), "own": torch.empty(0, 3, dtype=torch.int16)})
        load(data, **options, strict=False)
        watched.assert_filled({})


def test_views_of_one_storage_keep_what_they_are() -> None:
    base = torch.zeros(4, dtype=torch.complex64)
    tensors = {
        "w": base,
        "conj": base.conj(),
        "neg": base.conj().imag,
        "ints": base.view(torch.int32),
    }
    tensors["parameter"] = torch.nn.Parameter(base)
    sent = torch.arange(4).to(torch.complex64) * (1 + 2j)
    load(encoded({"w": sent}), into=DoubleBuffer(tensors), strict=False)
    for name, expected in {
        "w": sent,
        "conj": sent.conj(),
        "neg": sent.conj().imag,
        "ints": sent.view(torch.int32),
    }.items():
        assert torch.equal(tensors[name], expected), name
    assert torch.equal(tensors["parameter"], sent)
    assert isinstance(tensors["parameter"], torch.nn.Parameter)
    assert tensors["conj"].is_conj() and tensors["neg"].is_neg()


async def test_one_message_at_a_time() -> None:
    target = Target("double", SMALL)
    lock = anyio.Lock()
    first = functools.partial(aiotorchio.load_from_stream, Pieces(SMALL_MESSAGE, 1000), lock=lock)
    async with anyio.create_task_group() as group, lock:
        group.start_soon(functools.partial(first, **target.options))
        await until(lambda: lock.statistics().tasks_waiting == 1)
        with pytest.raises(RuntimeError, match="another load is using this DoubleBuffer"):
            await aiotorchio.load_from_stream(Pieces(SMALL_MESSAGE, 1000), **target.options)
        with pytest.raises(RuntimeError, match="another load is using this DoubleBuffer"):
            load(SMALL_MESSAGE, **target.options)
        target.assert_old()
    target.assert_new()
    load(SMALL_MESSAGE, **target.options)


def test_a_message_that_does_not_fit_leaves_a_double_buffer_free() -> None:
    target = Target("double", SMALL)
    for _ in range(2):
        with pytest.raises(MismatchError):
            load(encoded({"a": torch.ones(9)}), **target.options)
    target.assert_old()
    load(SMALL_MESSAGE, **target.options)
    target.assert_new()


def test_a_destination_is_looked_through_anew_for_each_message() -> None:
    model = torch.nn.Linear(2, 2)
    buffers = DoubleBuffer(model)
    assert buffers.destination is model
    for _ in range(3):
        sent = torch.nn.Linear(2, 2)
        load(encoded(sent.state_dict()), into=buffers)
        corpus.assert_same(model.state_dict(), sent.state_dict())
        model.weight = torch.nn.Parameter(torch.zeros(2, 2))
        model.bias.data = torch.zeros(2)


def test_tensors_that_were_given_the_memory_of_before_again() -> None:
    """A caller that restores the last version by hand must not see the next one too early."""
    own = torch.zeros(3)
    tied = own[:]
    buffers = DoubleBuffer({"a": own, "b": tied})
    before = own.data
    load(encoded({"a": (sent := torch.ones(3)), "b": sent}), into=buffers)
    own.data = before
    with pytest.raises(TruncatedError):
        data = encoded({"a": torch.full((3,), 2.0), "b": torch.full((3,), 3.0)})
        load(data[:-1], into=buffers)
    assert own.eq(0).all() and tied.eq(1).all()


def test_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        own = torch.zeros(3)
    parameter = torch.nn.Parameter(torch.zeros(3))
    data = encoded({"i": torch.ones(3), "p": torch.ones(3)})
    for mode, inference in itertools.product(["plain", "staged", "double"], [True, False]):
        with torch.inference_mode():
            own.zero_()
        parameter.data.zero_()
        with torch.inference_mode(inference):
            load(data, **into_options(mode, {"i": own, "p": parameter}))
        assert own.eq(1).all() and own.is_inference()
        assert parameter.eq(1).all() and not parameter.is_inference()
        assert parameter.requires_grad and parameter.is_leaf


async def test_a_load_leaves_the_stream_free_before_it_waits_for_the_lock() -> None:
    lock, target = anyio.Lock(), Target("staged", SMALL)
    async with both_ends("socket") as (near, far), anyio.create_task_group() as group, lock:
        await near.save(SMALL)
        await near.save("next")
        group.start_soon(functools.partial(far.load, **target.options, lock=lock))
        await until(lambda: lock.statistics().tasks_waiting == 1)
        assert await far.load() == "next"
        target.assert_old()
    target.assert_new()


def test_paths(tmp_path: Any) -> None:
    target = Target("staged", SMALL)
    (tmp_path / "message").write_bytes(SMALL_MESSAGE)
    with pytest.raises(FileNotFoundError):
        aiotorchio.load(tmp_path / "none", **target.options)
    target.assert_old()
    lock = threading.Lock()
    aiotorchio.load(tmp_path / "message", **target.options, lock=lock)
    target.assert_new()
    assert not lock.locked()
