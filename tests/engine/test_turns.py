"""Generators with a consumer that never waits: other tasks get turns, and can cancel."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch

import aiotorchio
from aiotorchio import StreamBusy, TensorSpec
from tests.engine.test_staged import on_asyncio
from tests.support.tensor_layouts import encoded

pytestmark = pytest.mark.anyio

MIB = 2**20
# How many sections of work may pass between two turns of another task: the other starts late, and
# trio runs ready tasks in any order.
SECTIONS = 3
EMPTY = {f"e{n}": TensorSpec((0,), torch.float32) for n in range(2000)}


def empty() -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, torch.empty(0)) for name in EMPTY)


async def empty_async() -> AsyncIterator[tuple[str, torch.Tensor]]:
    for item in empty():
        yield item


BODIES: dict[str, Callable[[], Any]] = {
    "large": lambda: aiotorchio.iter_bytes({"w": torch.zeros(8 * MIB)}),
    "no-checksum": lambda: aiotorchio.iter_bytes(torch.zeros(8 * MIB), checksum=False),
    "small-chunks": lambda: aiotorchio.iter_bytes(torch.zeros(MIB), chunk_size=4096),
    "snapshot": lambda: aiotorchio.iter_bytes(torch.zeros(8 * MIB), snapshot=True),
    "made": lambda: aiotorchio.iter_bytes(empty(), specs=EMPTY),
    "made-async": lambda: aiotorchio.iter_bytes(empty_async(), specs=EMPTY),
}
bodies = pytest.mark.parametrize("body", BODIES)


class Turns:
    """Another task, and counts of the work between two of its turns."""

    def __init__(self) -> None:
        self.count = self.since = self.most = 0

    def note(self, amount: int) -> None:
        self.since += amount
        self.most = max(self.most, self.since)

    async def run(self) -> None:
        while True:
            await anyio.lowlevel.checkpoint()
            self.count += 1
            self.since = 0

    async def during(self, consume: Callable[[], Awaitable[Any]]) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self.run)
            await consume()
            group.cancel_scope.cancel()


@bodies
async def test_a_body_that_nobody_waits_for_gives_turns(body: str) -> None:
    turns, pieces = Turns(), 0

    async def consume() -> None:
        nonlocal pieces
        async for piece in BODIES[body]():
            # Each piece counts as work, so that many small ones do.
            turns.note(len(piece) + 2**16)
            pieces += 1

    await turns.during(consume)
    assert turns.most <= SECTIONS * (4 * MIB + 2**18 + 2**17)
    assert turns.count >= (pieces + 1) // 64


@bodies
async def test_a_body_that_nobody_waits_for_can_be_cancelled(body: str) -> None:
    if body.startswith("made"):
        pytest.skip("its bytes are too few for a cancellation among them")
    made = bytearray()
    with anyio.CancelScope() as scope:
        async with contextlib.aclosing(BODIES[body]()) as pieces:
            async for piece in pieces:
                made += piece
                scope.cancel()
    assert scope.cancelled_caught and len(made) <= 4 * MIB + 2**18


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_tensors_that_are_made_can_be_cancelled(kind: str) -> None:
    """The tensors have no bytes: nothing is sent until the last of them."""
    taken = 0

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal taken
        for item in empty():
            taken += 1
            scope.cancel()
            yield item

    source: Any = made() if kind == "plain" else Iterated(made())
    with anyio.CancelScope() as scope:
        async with contextlib.aclosing(aiotorchio.iter_bytes(source, specs=EMPTY)) as pieces:
            async for _ in pieces:
                pass
    assert scope.cancelled_caught and 0 < taken <= 64


@on_asyncio
@bodies
async def test_a_body_whose_task_is_cancelled(body: str) -> None:
    """starlette cancels it when a client has left."""
    state = torch.arange(4.0 * MIB)
    made = 0

    async def consume() -> None:
        nonlocal made
        async for piece in aiotorchio.iter_bytes(state):
            made += len(piece)

    task = asyncio.ensure_future(consume())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled() and made <= 5 * MIB
    # Nothing of it remains: the same can be sent again, whole or in part.
    pieces = aiotorchio.iter_bytes(state)
    await anext(pieces)
    await pieces.aclose()
    assert torch.equal(await aiotorchio.load_from_stream(aiotorchio.iter_bytes(state)), state)


# ------------------------------------------------------------------------------ messages

NAMES = [f"t{n}" for n in range(1000)]
MANY = encoded({name: torch.tensor(float(n)) for n, name in enumerate(NAMES)})


class Iterated:
    """An async iterator over a plain one; no generator, since trio requires those to be closed."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        try:
            return next(self._items)
        except StopIteration:
            raise StopAsyncIteration from None


def whole(data: bytes) -> AsyncIterator[bytes]:
    return Iterated(iter([data]))


async def test_tensors_that_are_ready_give_turns() -> None:
    turns, names = Turns(), []

    async def consume() -> None:
        async with aiotorchio.StreamReader(whole(MANY)).open() as message:
            async for name, _ in message:
                turns.note(1)
                names.append(name)

    await turns.during(consume)
    assert names == NAMES
    assert turns.most <= SECTIONS * 64


async def test_a_cancellation_loses_no_tensor_that_is_ready() -> None:
    found, cancellations = [], 0
    async with aiotorchio.StreamReader(whole(MANY)).open() as message:
        tensors = message.iterate()
        # The first tensor waits for its bytes: from then on all are ready.
        found.append(await anext(tensors))
        while len(found) < len(NAMES):
            with anyio.CancelScope() as scope:
                async for item in tensors:
                    found.append(item)
                    scope.cancel()
            cancellations += scope.cancelled_caught
    assert [name for name, _ in found] == NAMES
    assert [tensor.item() for _, tensor in found] == list(map(float, range(len(NAMES))))
    assert cancellations >= len(NAMES) // 64 - 1


@on_asyncio
async def test_a_native_cancellation_loses_no_tensor_that_is_ready() -> None:
    found: list[str] = []
    async with aiotorchio.StreamReader(whole(MANY)).open() as message:
        tensors = message.iterate()
        found.append((await anext(tensors))[0])

        async def consume() -> None:
            async for name, _ in tensors:
                found.append(name)

        cancelled = 0
        while len(found) < len(NAMES):
            task = asyncio.ensure_future(consume())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            cancelled += task.cancelled()
    assert found == NAMES and cancelled > 3


async def test_two_tasks_share_tensors_that_are_ready() -> None:
    """One may take the last tensor while the other gives a turn."""
    found: list[str] = []
    async with aiotorchio.StreamReader(whole(MANY)).open() as message:
        tensors = message.iterate()
        found.append((await anext(tensors))[0])

        async def consume() -> None:
            with contextlib.suppress(StreamBusy):
                async for name, _ in tensors:
                    found.append(name)

        async with anyio.create_task_group() as group:
            group.start_soon(consume)
            group.start_soon(consume)
    assert sorted(found) == sorted(NAMES)


# ------------------------------------------------------------------------------ sources


@pytest.mark.parametrize("start", [0, 3, 40, len(MANY) - 1])
async def test_an_iterable_of_nothing_can_be_cancelled(start: int) -> None:
    """Its pieces are ready, and it never ends."""
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        yield MANY[:start]
        while True:
            taken += 1
            scope.cancel()
            yield b""

    with anyio.CancelScope() as scope:
        await aiotorchio.load_from_stream(Iterated(endless()))
    assert scope.cancelled_caught and taken <= 64


async def test_an_iterable_of_single_bytes_gives_turns() -> None:
    turns = Turns()

    def bytewise() -> Iterator[bytes]:
        for n in range(len(MANY)):
            turns.note(1)
            yield MANY[n : n + 1]

    async def consume() -> None:
        assert list(await aiotorchio.load_from_stream(Iterated(bytewise()))) == NAMES

    await turns.during(consume)
    assert turns.most <= SECTIONS * 64
