"""Every world that can send, with every world that can receive, carries every kind of object."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import aiotorchio
from tests.corpus import CASES, LOAD_OPTIONS, assert_same, make
from tests.worlds import PATIENCE, WORLDS, End, World, converse

PAIRS = [(near, far) for near in WORLDS for far in WORLDS if near.link == far.link]


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    return {name: make(name) for name in CASES}


@pytest.mark.parametrize(
    ("near", "far"), PAIRS, ids=[f"{near.name}--{far.name}" for near, far in PAIRS]
)
def test_every_pair_of_worlds_carries_every_object(
    near: World, far: World, objects: dict[str, Any]
) -> None:
    async def send(end: End) -> None:
        for obj in objects.values():
            await end.save(obj)

    async def receive(end: End) -> None:
        for name, obj in objects.items():
            assert_same(await end.load(**LOAD_OPTIONS.get(name, {})), obj)

    converse(near, send, far, receive)


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
