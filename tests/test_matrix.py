"""Messages between every pair of backends, and every object through every backend.

Flatten and rebuild do not depend on the backend, but the path of the bytes does. So every pair of
backends carries a selection of messages that differ on a stream. The whole corpus goes once from
each backend and once to each backend, always to or from a different kind.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import aiotorchio
from tests.support.backends import PATIENCE, WORLDS, End, World, converse
from tests.support.corpus import CASES, LOAD_OPTIONS, assert_same, make

KIB, MIB = 2**10, 2**20


def pair_parameters(pairs: list[tuple[World, World]]) -> pytest.MarkDecorator:
    names = [f"{near.name}--{far.name}" for near, far in pairs]
    return pytest.mark.parametrize(("near", "far"), pairs, ids=names)


# ------------------------------------------------------------------------------ every pair

PAIRS = [(near, far) for near in WORLDS for far in WORLDS if near.link == far.link]

# Objects without storages, with small and large ones, in either codec, with a small and a large
# skeleton.
SELECTED = [
    "none",
    "empty_tensor",
    "contiguous",
    "chunk_border",
    "shared_storage",
    "bytes_values",
    "parameter_with_attributes",
    "checkpoint",
    "large",
]
# Sizes at which drivers and memory change their method: storages with a separate buffer, direct use
# of the socket, merged pieces, turns of the loop, chunks and arenas.
BORDERS = [64 * KIB, 128 * KIB, 256 * KIB, MIB, 4 * MIB]


class Message(NamedTuple):
    obj: Any
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


def _bytes(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8)


def _messages() -> dict[str, Message]:
    """The messages that every pair carries, one after the other on the same stream."""
    messages = {name: Message(make(name)) for name in SELECTED}
    borders = [_bytes(border + more) for border in BORDERS for more in (-1, 0, 1)]
    messages |= {f"alone_{len(tensor)}": Message(tensor) for tensor in borders[1:9:2]}
    chunks = [_bytes(4096 * count + more) for count in (1, 2, 24) for more in (-1, 0, 1)]
    return messages | {
        "several_chunks": Message(borders),
        "many_chunks": Message(chunks, {"chunk_size": 4096}),
        "unchecked": Message(borders[:6], {"checksum": False}),
        "long_header": Message({"w": torch.ones(3)}, {"metadata": {"note": "x" * 40_000}}),
        "last": Message({"w": torch.ones(3)}),
    }


@pytest.fixture(scope="module")
def messages() -> dict[str, Message]:
    return _messages()


@pair_parameters(PAIRS)
def test_every_pair_of_worlds_carries_every_kind_of_message(
    near: World, far: World, messages: Mapping[str, Message]
) -> None:
    async def send(end: End) -> None:
        for obj, options in messages.values():
            await end.save(obj, **options)

    async def receive(end: End) -> None:
        for name, (obj, _) in messages.items():
            assert_same(await end.load(**LOAD_OPTIONS.get(name, {})), obj)

    converse(near, send, far, receive)


def test_the_messages_are_of_every_kind(messages: Mapping[str, Message]) -> None:
    sent = {
        name: aiotorchio.save(obj, io.BytesIO(), **options)
        for name, (obj, options) in messages.items()
    }
    assert {summary.codec for summary in sent.values() if summary.storages} == {"tree", "pickle"}
    assert {0, 1, 5} <= {summary.chunks for summary in sent.values()}
    assert sent["many_chunks"].chunks > 64
    assert {0, 1} <= {summary.storages for summary in sent.values()}
    assert sent["checkpoint"].storages > 64
    assert (sent["empty_tensor"].storages, sent["empty_tensor"].payload_nbytes) == (1, 0)
    # A large header or skeleton.
    assert any(m.nbytes - m.payload_nbytes > 64 * KIB and not m.tensors for m in sent.values())
    # Chunks with several storages that are not copied, and storages in several chunks.
    assert (sent["several_chunks"].chunks, sent["several_chunks"].storages) == (5, 15)
    # More than a connection buffers: the sender waits for the receiver.
    assert sent["several_chunks"].nbytes > 16 * MIB


# ------------------------------------------------------------------------------ every object


def _opposites() -> list[tuple[World, World]]:
    """Pairs in which every backend is once the sender and once the receiver."""
    pairs = []
    for link in dict.fromkeys(world.link for world in WORLDS):
        worlds = [world for world in WORLDS if world.link == link]
        half = len(worlds) // 2
        pairs += list(zip(worlds, worlds[half:] + worlds[:half], strict=True))
    return pairs


OPPOSITES = _opposites()


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    return {name: make(name) for name in CASES}


@pair_parameters(OPPOSITES)
def test_every_world_sends_and_receives_every_object(
    near: World, far: World, objects: dict[str, Any]
) -> None:
    async def send(end: End) -> None:
        for obj in objects.values():
            await end.save(obj)

    async def receive(end: End) -> None:
        for name, obj in objects.items():
            assert_same(await end.load(**LOAD_OPTIONS.get(name, {})), obj)

    converse(near, send, far, receive)


def test_no_world_is_left_out() -> None:
    assert set(OPPOSITES) <= set(PAIRS)
    for worlds in zip(*OPPOSITES, strict=True):
        assert sorted(world.name for world in worlds) == sorted(world.name for world in WORLDS)
    # Between equal kinds, an error of the sender could cancel out an error of the receiver.
    assert all((near.kind, near.loop) != (far.kind, far.loop) for near, far in OPPOSITES)
    for worlds in zip(*PAIRS, strict=True):
        assert set(worlds) == set(WORLDS)


def test_memory_carries_every_object(objects: dict[str, Any]) -> None:
    file = io.BytesIO()
    for obj in objects.values():
        aiotorchio.save(obj, file)
    file.seek(0)
    for name, obj in objects.items():
        assert_same(aiotorchio.load(file, **LOAD_OPTIONS.get(name, {})), obj)
    assert not file.read()


@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "raw"])
def test_files_carry_every_object(tmp_path: Path, objects: dict[str, Any], buffering: int) -> None:
    with open(tmp_path / "messages", "wb", buffering) as file:
        for obj in objects.values():
            aiotorchio.save(obj, file)
    with open(tmp_path / "messages", "rb", buffering) as file:
        for name, obj in objects.items():
            assert_same(aiotorchio.load(file, **LOAD_OPTIONS.get(name, {})), obj)
        assert not file.read()


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_carry_every_object(tmp_path: Path, objects: dict[str, Any], kind: Any) -> None:
    path = kind(tmp_path / "message")
    for name, obj in objects.items():
        aiotorchio.save(obj, path)
        assert_same(aiotorchio.load(path, **LOAD_OPTIONS.get(name, {})), obj)


def test_pipes_carry_every_object(objects: dict[str, Any]) -> None:
    reading, writing = os.pipe()

    def send() -> None:
        with open(writing, "wb", 0) as file:
            for obj in objects.values():
                aiotorchio.save(obj, file)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    with open(reading, "rb", 0) as file:
        for name, obj in objects.items():
            assert_same(aiotorchio.load(file, **LOAD_OPTIONS.get(name, {})), obj)
        assert not file.read()
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.mark.anyio
async def test_iterables_carry_every_object(objects: dict[str, Any]) -> None:
    async def pieces() -> AsyncIterator[bytes | memoryview]:
        for obj in objects.values():
            async for piece in aiotorchio.iter_bytes(obj):
                yield piece

    reader = aiotorchio.StreamReader(pieces())
    for name, obj in objects.items():
        assert_same(await reader.load(**LOAD_OPTIONS.get(name, {})), obj)
    with pytest.raises(aiotorchio.TruncatedError):
        await reader.load()
