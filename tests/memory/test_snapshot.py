"""A snapshot keeps the payload as it was, and its memory is freed chunk by chunk."""

from __future__ import annotations

import gc
import io
import mmap
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import aiotorchio
from aiotorchio.common.strides import Part
from aiotorchio.engine import prepared_save
from aiotorchio.engine.drivers import drive_blocking
from aiotorchio.engine.prepared_save import PreparedSave
from aiotorchio.engine.save_options import SaveOptions
from aiotorchio.engine.send import send_message
from aiotorchio.memory.device_copy import Here
from aiotorchio.memory.host import view_of
from aiotorchio.memory.outgoing import SMALL_STORAGE as SMALL
from aiotorchio.memory.outgoing import OutgoingPayload
from aiotorchio.memory.snapshot import SnapshotPayload
from aiotorchio.streams.blocking import BlockingStream
from tests.support.corpus import assert_same
from tests.support.payload_layouts import (
    CHUNK,
    CopierOnCpu,
    filled,
    joined,
    layout,
    staged,
    staging,
)


class Maps:
    """Counts the memory maps that exist."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        maps = self

        class Counted(mmap.mmap):
            def __init__(self, *args: Any, **options: Any) -> None:
                maps.made += 1
                maps.alive.add(self)

        monkeypatch.setattr(mmap, "mmap", Counted)


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Maps]:
    gc.collect()
    gc.disable()
    try:
        yield Maps(monkeypatch)
    finally:
        gc.enable()


def chunks_of(end: int, chunk: int) -> list[tuple[int, int]]:
    return [(start, min(chunk, end - start)) for start in range(0, end, chunk)]


SIZES = [100, 0, 3 * SMALL, 5, SMALL, 4096, 63, 2 * SMALL + 1]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("chunk", [4096, 100_032, 2**22])
def test_what_was_there_is_sent(chunk: int, on_device: bool, maps: Maps) -> None:
    storages = filled(SIZES)
    offsets, end = layout(SIZES)
    expected = joined(SIZES, storages)
    copier = CopierOnCpu() if on_device else None
    payload = OutgoingPayload(storages, offsets, SIZES, chunk, **staging(copier))
    chunks = chunks_of(end, chunk)
    snapshot = SnapshotPayload(
        payload, chunks, chunk, CopierOnCpu if copier is None else lambda: copier
    )
    for storage in storages:
        if storage.nbytes():
            view_of(storage)[:] = b"\xee" * storage.nbytes()
    storages[2].resize_(0)
    data = b"".join(b"".join(snapshot.chunk_views(*place)) for place in chunks)
    assert data == expected
    assert not snapshot.borrows and snapshot.has_device_copies == on_device
    if copier is not None:
        assert len(copier.slabs) <= 2


def test_each_chunk_is_free_when_it_was_sent(maps: Maps) -> None:
    sizes = [10 * CHUNK]
    payload = OutgoingPayload(filled(sizes), [0], sizes, CHUNK)
    chunks = chunks_of(sizes[0], CHUNK)
    snapshot = SnapshotPayload(payload, chunks, CHUNK, Here)
    assert len(maps.alive) == maps.made == 10
    for left, place in zip(reversed(range(10)), chunks, strict=True):
        views = snapshot.chunk_views(*place)
        assert len(maps.alive) == left + 1
        del views
        assert len(maps.alive) == left


def test_a_view_that_is_kept_keeps_its_chunk_alone(maps: Maps) -> None:
    sizes = [10 * CHUNK]
    storages = filled(sizes)
    payload = OutgoingPayload(storages, [0], sizes, CHUNK)
    chunks = chunks_of(sizes[0], CHUNK)
    snapshot = SnapshotPayload(payload, chunks, CHUNK, Here)
    kept = snapshot.chunk_views(*chunks[0])[0][5:10].toreadonly()
    for place in chunks[1:]:
        snapshot.chunk_views(*place)
    assert len(maps.alive) == 1
    del snapshot
    assert bytes(kept) == bytes(view_of(storages[0])[5:10])
    del kept
    assert not maps.alive


def test_one_that_is_dropped_frees_all(maps: Maps) -> None:
    sizes = [10 * CHUNK, 77]
    payload = OutgoingPayload(filled(sizes), layout(sizes)[0], sizes, CHUNK)
    snapshot = SnapshotPayload(payload, chunks_of(layout(sizes)[1], CHUNK), CHUNK, Here)
    snapshot.chunk_views(0, CHUNK)
    del snapshot
    assert not maps.alive


def test_a_copy_that_fails_frees_all(maps: Maps) -> None:
    sizes = [10 * CHUNK] * 2
    storages = filled(sizes)
    payload = OutgoingPayload(storages, layout(sizes)[0], sizes, CHUNK)
    storages[1].resize_(1)
    with pytest.raises(RuntimeError, match="resized"):
        SnapshotPayload(payload, chunks_of(layout(sizes)[1], CHUNK), CHUNK, Here)
    assert maps.made == 10 and not maps.alive


def test_of_parts() -> None:
    matrix = torch.arange(100 * 200).to(torch.int16).view(100, 200)
    part = Part(0, 20, 2, (100, 50), (200, 1))
    payload = OutgoingPayload(
        [matrix.untyped_storage()], [0], [part.nbytes], CHUNK, parts={0: [part]}
    )
    chunks = chunks_of(part.nbytes, CHUNK)
    snapshot = SnapshotPayload(payload, chunks, CHUNK, Here)
    expected = matrix[:, 10:60].contiguous().view(-1).clone()
    matrix.zero_()
    data = b"".join(b"".join(snapshot.chunk_views(*place)) for place in chunks)
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.int16), expected)


def test_nothing_to_copy(maps: Maps) -> None:
    snapshot = SnapshotPayload(OutgoingPayload([], [], [], CHUNK), [], CHUNK, Here)
    assert not maps.made and not snapshot.has_device_copies


# ------------------------------------------------------------------------------ devices


STATE = {
    "a": torch.arange(5000.0),
    "b": torch.ones(3),
    "c": torch.arange(20_000).view(100, 200).t(),
}


@pytest.mark.parametrize("compact", [False, True])
def test_state_on_a_device(compact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot stays in memory of the device until it is sent through two staging buffers."""
    state = {name: tensor.clone() for name, tensor in STATE.items()} | {
        "d": torch.arange(3000.0).view(50, 60)[:, 7:30]
    }
    copiers: list[CopierOnCpu] = []

    def copier(*, until_now: bool) -> CopierOnCpu:
        assert until_now
        copiers.append(CopierOnCpu())
        return copiers[-1]

    def outgoing(*args: Any, **options: Any) -> OutgoingPayload:
        return OutgoingPayload(*args, **options | {"needs_copy": staged})

    monkeypatch.setattr(prepared_save, "OutgoingPayload", outgoing)
    monkeypatch.setattr(prepared_save, "DeviceCopier", copier)
    options = SaveOptions(chunk_size=CHUNK, compact=compact, snapshot=True)
    save = PreparedSave(state, options)
    expected = {name: tensor.clone() for name, tensor in state.items()}
    for tensor in state.values():
        tensor.zero_()
    file = io.BytesIO()
    drive_blocking(send_message(save), BlockingStream(file))
    file.seek(0)
    loaded = aiotorchio.load(file)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert_same({name: loaded[name].stride() for name in "abc"},
                {name: state[name].stride() for name in "abc"})  # fmt: skip
    assert [[slab.nbytes() for slab in copier.slabs] for copier in copiers] == [[CHUNK, CHUNK]]


def test_memory_of_a_device_is_free_when_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    real = torch.empty

    def noting(*args: Any, **options: Any) -> torch.Tensor:
        tensor: torch.Tensor = real(*args, **options)
        if args == (CHUNK,):
            alive.add(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", noting)
    sizes, copier = [8 * CHUNK], CopierOnCpu()
    payload = OutgoingPayload(filled(sizes), [0], sizes, CHUNK, **staging(copier))
    snapshot = SnapshotPayload(payload, chunks_of(sizes[0], CHUNK), CHUNK, lambda: copier)
    assert len(alive) == 8
    for left, place in zip(reversed(range(8)), chunks_of(sizes[0], CHUNK), strict=True):
        snapshot.chunk_views(*place)
        assert len(alive) == left
