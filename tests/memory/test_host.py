"""Host memory: views keep their storage alive, and large storages get huge pages."""

from __future__ import annotations

import gc
import io
import mmap
import sys
import weakref

import pytest
import torch

from aiotorchio.memory import host
from aiotorchio.memory.host import use_huge_pages, view_of


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


def test_huge_pages_change_nothing_but_the_pages() -> None:
    # Several huge pages, parts of one, and less than one page.
    for nbytes in (5 * 2**20 + 100, 2**20, 4096, 1):
        storage = torch.UntypedStorage(nbytes)
        view_of(storage)[:] = b"\7" * nbytes
        use_huge_pages(storage)
        assert bytes(view_of(storage)) == b"\7" * nbytes


@pytest.mark.skipif(not host.HUGE_PAGE, reason="this system gives no huge pages of 2 MiB")
def test_huge_pages_are_asked_for_behind_a_large_storage() -> None:
    storage = torch.UntypedStorage(8 * 2**20)
    use_huge_pages(storage)
    # "hg" in /proc: huge pages were requested for this range.
    assert "hg" in flags_of_mapping(storage.data_ptr() + 4 * 2**20)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc lists mappings on Linux")
def test_small_storages_make_no_mappings() -> None:
    """A process may have 65,530 mappings, and advice on part of a mapping splits it."""

    def mappings() -> int:
        with open("/proc/self/maps") as file:
            return sum(1 for _ in file)

    kept = []
    before = mappings()
    for _ in range(200):
        storage = torch.UntypedStorage(100_000)
        use_huge_pages(storage)
        # Another storage, without advice, lies between two of them.
        kept.append((storage, torch.UntypedStorage(50_000)))
    assert mappings() - before < 50


def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_libc", None)
    use_huge_pages(torch.UntypedStorage(8 * 2**20))


@pytest.mark.parametrize(
    ("said", "size"), [("2097152", 2**21), ("536870912", 0), ("", 0), (None, 0)]
)
def test_size_of_a_huge_page(said: str | None, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_(path: str) -> io.StringIO:
        assert path.startswith("/sys/")
        if said is None:
            raise FileNotFoundError(path)
        return io.StringIO(said)

    monkeypatch.setattr(host, "open", open_, raising=False)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    assert host._huge_page() == size


def flags_of_mapping(address: int) -> list[str]:
    with open("/proc/self/smaps") as file:
        inside = False
        for line in file:
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                start, end = (int(part, 16) for part in words[0].split("-"))
                inside = start <= address < end
            elif inside and words[0] == "VmFlags:":
                return words[1:]
    raise AssertionError("no such mapping")
