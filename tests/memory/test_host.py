"""Views show the bytes of a storage, and keep them."""

from __future__ import annotations

import gc
import weakref

import torch

from aiotorchio.memory.host import view_of


def test_view_shows_and_changes_the_storage() -> None:
    tensor = torch.tensor([1, 2, 3], dtype=torch.uint8)
    view = view_of(tensor.untyped_storage())
    assert (view.tolist(), view.format, view.readonly) == ([1, 2, 3], "B", False)
    view[1] = 9
    assert tensor.tolist() == [1, 9, 3]


def test_view_of_nothing_is_empty() -> None:
    assert len(view_of(torch.UntypedStorage(0))) == 0


def test_part_of_a_view_keeps_the_storage_alive() -> None:
    storage = torch.UntypedStorage(4096)
    view_of(storage)[:] = b"\7" * 4096
    gone = weakref.ref(storage)
    part = view_of(storage)[10:20]
    del storage
    gc.collect()
    assert gone() is not None
    assert bytes(part) == b"\7" * 10
    del part
    gc.collect()
    assert gone() is None
