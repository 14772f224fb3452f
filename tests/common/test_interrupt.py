"""Long work ends soon after its caller was cancelled; other work goes on.

``After`` requests an interrupt at a chosen check, so that every place of a task is tested.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch

import aiotorchio
from aiotorchio import Limits, MismatchError
from aiotorchio.codecs.pickled import codec as pickle_codec
from aiotorchio.codecs.pickled.allowlist import Allowlist
from aiotorchio.codecs.pickled.checks import Checks
from aiotorchio.codecs.pickled.opcodes import globals_of
from aiotorchio.codecs.pickled.safe_nested import NestedMaker
from aiotorchio.codecs.pickled.scan import scan_pickle
from aiotorchio.codecs.tree import codec as tree_codec
from aiotorchio.common.interrupt import Interrupt, Interrupted, check_interrupt, interruptible
from aiotorchio.common.sparse_indices import check_compressed_indices, check_coo_indices
from aiotorchio.engine import threads
from aiotorchio.engine.threads import run_in_thread
from aiotorchio.graph.rebuild import build_tensors, check_tree
from aiotorchio.graph.select import revise, selected
from aiotorchio.graph.targets import match_targets
from aiotorchio.memory.byteorder import swap_bytes
from aiotorchio.memory.device_copy import Here
from aiotorchio.memory.routes import copy_elements
from aiotorchio.streams.base import asyncio_loop
from aiotorchio.table.names import Placeholder, check_names, rows_by_name, specs_of
from aiotorchio.table.table import Table
from aiotorchio.wire.header import decode_header, encode_header
from aiotorchio.wire.validation import validate
from tests.support import craft

COUNT = 20_000
NAMES = [f"layers.{n}.weight" for n in range(COUNT)]
ALLOWLIST = Allowlist((), Limits(), None)


class After(Interrupt):
    """An interrupt that is requested from a given check on."""

    def __init__(self, checks: int) -> None:
        self.checks = 0
        self._last = checks
        super().__init__()

    @property
    def requested(self) -> bool:
        self.checks += 1
        return self.checks > self._last

    @requested.setter
    def requested(self, value: bool) -> None:
        assert not value


def test_a_check_ends_the_task_it_is_in_and_no_other() -> None:
    interrupt = Interrupt()

    def task() -> None:
        check_interrupt()
        assert interrupt.request()
        # A nested task, such as a load that a predicate of the caller runs.
        Interrupt().run(check_interrupt)
        other = threading.Thread(target=check_interrupt)
        other.start()
        other.join()
        check_interrupt()
        raise AssertionError("it went on")

    with pytest.raises(Interrupted):
        interrupt.run(task)
    check_interrupt()


def test_a_task_that_was_interrupted_before_it_began_does_not_begin() -> None:
    interrupt = Interrupt()
    assert not interrupt.request()
    with pytest.raises(Interrupted):
        interrupt.run(lambda: pytest.fail("it began"))


def test_items_are_taken_one_by_one() -> None:
    taken = []
    items = interruptible((taken.append(n) or n for n in range(10)), 3)  # type: ignore[func-returns-value]
    assert [(next(items), len(taken)) for _ in range(8)] == [(n, n + 1) for n in range(8)]
    assert list(items) == [8, 9]
    assert list(interruptible([])) == []


def test_items_are_checked_before_each_so_many() -> None:
    got: list[int] = []

    def task() -> None:
        got.extend(interruptible(range(100), 10))

    with pytest.raises(Interrupted):
        # The first check is before the task begins.
        After(4).run(task)
    assert len(got) in (0, 30)


def names_in_rows(count: int) -> Any:
    header = craft.flattened({"w": torch.zeros(1)}).header
    row = header.tensors[0]
    header.tensors = [
        type(row)(0, row.dtype, 0, row.shape, row.stride, 0, [name]) for name in NAMES[:count]
    ]
    return header


HEADER = names_in_rows(COUNT)
ENCODED = encode_header(HEADER)
TREE = tree_codec.encode([n % 2 == 0 for n in range(COUNT)], Table())
TENSORS = tree_codec.encode({name: n for n, name in enumerate(NAMES)}, Table())
LISTS = tree_codec.encode([[n] for n in range(COUNT)], Table())
CALLS = craft.pickled([craft.ordered_dict()] * 200)
PICKLE = pickle.dumps([(n, str(n)) for n in range(COUNT)], 2)
MATRIX = torch.zeros(3000, 2000)


def load_pickled(skeleton: bytes) -> Any:
    return pickle_codec.load(
        skeleton, [], [], allowlist=ALLOWLIST, encoding="utf-8", depth_limit=256
    )


def load_tree(skeleton: bytes) -> Callable[[], Any]:
    return functools.partial(tree_codec.decode, skeleton, [], depth_limit=256)


def match_nothing() -> None:
    with contextlib.suppress(MismatchError):
        match_targets(HEADER, {}, selection=NAMES_SET, all_selected=False, strict=True, cast=False)


NAMES_SET = set(NAMES)
STORAGE = torch.UntypedStorage(4)
COUNT_OF_MANY = 200_000
MANY = torch.arange(COUNT_OF_MANY)
ONES = torch.ones(2000, 1, dtype=torch.int64)
NESTED = NestedMaker(Checks(Limits(total_nbytes=2**50)))
LONG_WORK: dict[str, Callable[[], Any]] = {
    "decode_header": lambda: decode_header(ENCODED, Limits()),
    "validate": lambda: validate(HEADER, Limits()),
    "rows_by_name": lambda: rows_by_name(HEADER.tensors),
    "specs_of": lambda: specs_of(HEADER),
    "match": match_nothing,
    "names": lambda: selected(NAMES, NAMES),
    "patterns": lambda: selected([f"{name[:-1]}*" for name in NAMES[:500]], NAMES),
    "one pattern": lambda: selected("*weight", NAMES),
    "predicate": lambda: selected(lambda name: True, NAMES),
    "check_tree": lambda: check_tree(LISTS, HEADER.tensors, names=False, limits=Limits(), offset=0),
    "check_names": lambda: check_names(
        {name: Placeholder(n) for n, name in enumerate(NAMES)}, HEADER.tensors
    ),
    "flat list": load_tree(TREE),
    "flat dict": load_tree(TENSORS),
    "nested lists": load_tree(LISTS),
    "scan": lambda: scan_pickle(PICKLE, ALLOWLIST.globals, (), depth_limit=256, wide_keys=10**6),
    "globals_of": lambda: globals_of(PICKLE),
    "unpickler": lambda: load_pickled(PICKLE),
    "unpickler, calls": lambda: load_pickled(CALLS),
    "build_tensors": lambda: build_tensors(HEADER, [STORAGE]),
    "revise": lambda: revise(
        {name: STORAGE for name in NAMES}, NAMES_SET, lambda name, tensor: tensor
    ),
    "coo indices": lambda: check_coo_indices(MANY[None], (2 * COUNT_OF_MANY,), distinct=True),
    "compressed indices": lambda: check_compressed_indices(
        MANY, MANY[:-1], MANY[:-1], (COUNT_OF_MANY - 1,) * 2, torch.sparse_csr
    ),
    "batches of indices": lambda: check_compressed_indices(
        torch.zeros_like(MANY)[:, None],
        MANY[:, None][:, :0],
        MANY[:, None][:, :0],
        (COUNT_OF_MANY, 0, 1),
        torch.sparse_csr,
    ),
    "jagged offsets": lambda: NESTED.jagged({"values": MANY, "offsets": MANY}),
    "nested parts": lambda: NESTED.strided(MANY, ONES, ONES, ONES[:, 0].contiguous()),
    "encode": lambda: tree_codec.encode(dict.fromkeys(NAMES, 1), Table()),
    "dump": lambda: pickle_codec.dump(
        [(n, str(n)) for n in range(COUNT)], Table(), pickle_module=pickle, pickle_protocol=2
    ),
    "swap_bytes": lambda: swap_bytes(torch.UntypedStorage(32 * 2**20), 4),
    "copy_elements": lambda: copy_elements(MATRIX, torch.ones(2000, 3000).t(), Here()),
    "copy_elements, cast": lambda: copy_elements(
        MATRIX, torch.ones(3000, 2000, dtype=torch.float16), Here()
    ),
}


@pytest.mark.parametrize("name", LONG_WORK)
def test_long_work_looks_for_an_interrupt_again_and_again(name: str) -> None:
    never = After(10**9)
    never.run(LONG_WORK[name])
    # One check comes before the work; its length is up to the peer, so there must be several more.
    assert never.checks > 5
    for checks in (1, never.checks // 2, never.checks - 1):
        with pytest.raises(Interrupted):
            After(checks).run(LONG_WORK[name])
    # The interrupted calls left no damage.
    LONG_WORK[name]()


class Endless:
    """A task that ends only when it is interrupted.

    Attributes:
        ended: Set at its end.
    """

    def __init__(self) -> None:
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self) -> None:
        try:
            self.begun.set()
            while True:
                check_interrupt()
        finally:
            self.ended.set()

    async def wait_begun(self) -> None:
        await anyio.to_thread.run_sync(self.begun.wait)


@pytest.mark.anyio
async def test_a_cancellation_ends_a_task_and_comes_after_its_end() -> None:
    task = Endless()
    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(run_in_thread, task)
            await task.wait_begun()
            group.cancel_scope.cancel()
        assert task.ended.is_set()
    # The same thread takes the next task.
    assert await run_in_thread(lambda: 7) == 7


@pytest.mark.anyio
async def test_a_native_cancellation_ends_a_task() -> None:
    if asyncio_loop() is None:
        pytest.skip("trio has no other than that of scopes")
    task = Endless()
    running = asyncio.create_task(run_in_thread(task))
    await task.wait_begun()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert task.ended.is_set()


@pytest.mark.anyio
async def test_a_task_that_does_not_look_is_waited_for() -> None:
    begun, go_on, results = threading.Event(), threading.Event(), []

    def task() -> None:
        begun.set()
        go_on.wait()
        results.append("written")

    async def release() -> None:
        await anyio.to_thread.run_sync(begun.wait)
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.wait_all_tasks_blocked()
            assert not results
            go_on.set()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(run_in_thread, task)
            group.start_soon(release)
    assert results == ["written"]


@pytest.mark.anyio
async def test_what_waits_for_a_thread_is_cancelled_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The only thread is busy; the cancelled call leaves no task in the queue."""
    monkeypatch.setattr(threads, "_THREADS", 1)
    first = Endless()
    ran: list[int] = []
    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(run_in_thread, first)
            await first.wait_begun()
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as waiting:
                    waiting.start_soon(run_in_thread, functools.partial(ran.append, 1))
                    await anyio.wait_all_tasks_blocked()
                    group.cancel_scope.cancel()
                    scope.cancel()
    assert not ran


@pytest.mark.anyio
async def test_a_task_that_must_run_to_its_end() -> None:
    """For example the undo of a commit, which a second cancellation must not stop."""
    done = []

    def task() -> None:
        check_interrupt()
        done.append("to its end")
        check_interrupt()

    with anyio.CancelScope() as scope:
        scope.cancel()
        # With asyncio, anyio raises the cancellation after the task has ended.
        await run_in_thread(task, to_its_end=True)
    assert done == ["to its end"]
    if asyncio_loop() is not None:
        running = asyncio.create_task(run_in_thread(task, to_its_end=True))
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert len(done) == 2


class Pieces:
    """An async iterable without ``aclose``."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> bytes:
        if not self._pieces:
            raise StopAsyncIteration
        return self._pieces.pop()


@pytest.mark.anyio
async def test_a_load_that_is_cancelled_at_its_longest_work() -> None:
    """The whole path of a cancellation, from the task to its work in a thread."""
    begun, gave_up = threading.Event(), []

    class Predicate:
        def __call__(self, name: str) -> bool:
            begun.set()
            try:
                while True:
                    check_interrupt()
            except Interrupted:
                gave_up.append(name)
                raise

    message = craft.compose(craft.flattened({name: torch.zeros(1) for name in NAMES[:1000]}))

    async def load() -> None:
        await aiotorchio.load_from_stream(Pieces([message]), select=Predicate())

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(load)
            await anyio.to_thread.run_sync(begun.wait)
            group.cancel_scope.cancel()
    assert len(gave_up) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("way", ["load", "iterate"])
async def test_a_message_that_was_cancelled_before_it_was_read_can_still_be_read(way: str) -> None:
    begun = threading.Event()

    def predicate(name: str) -> bool:
        begun.set()
        while True:
            check_interrupt()

    state = {name: torch.full((1,), float(n)) for n, name in enumerate(NAMES[:1000])}
    pieces = Pieces([craft.compose(craft.flattened(state))])

    async def read() -> None:
        if way == "load":
            await message.load(select=predicate)
        else:
            async for _ in message.iterate(select=predicate):
                pass

    with anyio.fail_after(60):
        async with aiotorchio.StreamReader(pieces).open() as message:
            async with anyio.create_task_group() as group:
                group.start_soon(read)
                await anyio.to_thread.run_sync(begun.wait)
                group.cancel_scope.cancel()
            loaded = await message.load()
    assert [float(tensor) for tensor in loaded.values()] == list(map(float, range(1000)))
