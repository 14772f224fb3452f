"""Storages on the host: where their bytes are, views of them, memory that is quick to fill."""

from __future__ import annotations

import ctypes
import mmap
from functools import lru_cache

import torch

__all__ = [
    "HUGE_PAGE",
    "copy_bytes",
    "copy_small",
    "first_byte",
    "scratch",
    "use_huge_pages",
    "view_of",
]


def first_byte(tensor: torch.Tensor) -> int:
    """Where in its storage the first element of a tensor is."""
    return int(tensor.storage_offset()) * tensor.element_size()


# Making a ctypes array type takes 18 us, a view of a known size 0.7 us; models repeat few sizes.
@lru_cache(maxsize=4096)
def _array_type(nbytes: int) -> type[ctypes.Array[ctypes.c_char]]:
    return ctypes.c_char * nbytes


def view_of(storage: torch.UntypedStorage) -> memoryview:
    """A writable view of a storage on the CPU, which lives as long as anyone holds the view.

    Args:
        storage: On the CPU; must not be resized while the view is in use.

    Returns:
        Its bytes.
    """
    nbytes = storage.nbytes()
    if nbytes == 0:
        return memoryview(bytearray())
    array = _array_type(nbytes).from_address(storage.data_ptr())
    # A view that waits in a transport's queue or at a user of iter_bytes outlives the message:
    # through its array it keeps the storage alive.
    array.storage = storage  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


_COPIED_AT_ONCE = 2**18
# It keeps the interpreter's lock; ctypes.memmove gives it up, and a thread that copies thousands of
# small pieces then waits 5 ms for each while another one computes.
copy_small = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


def copy_bytes(destination: int, source: int, nbytes: int) -> None:
    """Copy memory from one address to another; large pieces let other threads run meanwhile."""
    move = ctypes.memmove if nbytes > _COPIED_AT_ONCE else copy_small
    move(destination, source, nbytes)


def scratch(nbytes: int) -> memoryview:
    """Memory that takes no more room than is written to it; at least one byte."""
    return memoryview(mmap.mmap(-1, nbytes))


def _huge_page() -> int:
    """Bytes of a huge page that the system gives to those who ask; 0 if it gives none."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size") as file:
            size = int(file.read())
    except (OSError, ValueError):
        return 0
    # Systems with pages of 64 KiB have huge ones of 512 MiB: too much for the first byte.
    return size if size <= 2 * 2**20 and hasattr(mmap, "MADV_HUGEPAGE") else 0


HUGE_PAGE = _huge_page()
_libc = ctypes.CDLL(None) if HUGE_PAGE else None


def use_huge_pages(storage: torch.UntypedStorage) -> None:
    """Ask for huge pages behind a large storage that nobody has written to yet.

    The first touch of fresh memory takes longer than the copy from a socket into it: 0.44 s a GiB
    with pages of 4 KiB, 0.1 s with huge ones. All pages that the storage has a part of are asked
    for, so that a huge page can reach over two storages that are neighbours; alone, a storage of
    16 MiB would have 2 MiB in small pages. Small storages do without: each range of its own is one
    of the 65,530 mappings that a process may have. What the allocator gives to others later keeps
    the advice.

    Args:
        storage: On the CPU.
    """
    if _libc is None or storage.nbytes() < HUGE_PAGE:
        return
    start = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - start
    # An advice: a kernel that refuses it loses nothing.
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
