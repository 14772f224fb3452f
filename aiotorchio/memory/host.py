"""Storages on the host: views of their bytes, copies by address, and huge pages.

In: storages and addresses on the CPU, which the caller has checked. Out: views and copies. The
other modules of this package call it.
"""

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
    """Return the offset in bytes of the first element of a tensor in its storage."""
    return int(tensor.storage_offset()) * tensor.element_size()


# Making a ctypes array type takes 18 us, a view of a known size 0.7 us; models repeat few sizes.
@lru_cache(maxsize=4096)
def _array_type(nbytes: int) -> type[ctypes.Array[ctypes.c_char]]:
    return ctypes.c_char * nbytes


def view_of(storage: torch.UntypedStorage) -> memoryview:
    """Return a writable view of a storage on the CPU; the view keeps the storage alive.

    Args:
        storage: A storage on the CPU; it must not be resized while the view is in use.

    Returns:
        A view of its bytes.
    """
    nbytes = storage.nbytes()
    if nbytes == 0:
        return memoryview(bytearray())
    array = _array_type(nbytes).from_address(storage.data_ptr())
    # A view in a transport's queue, or with a caller of iter_bytes, outlives the message: its array
    # keeps the storage alive.
    array.storage = storage  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


_COPIED_AT_ONCE = 2**18
# PYFUNCTYPE keeps the interpreter's lock. ctypes.memmove releases it: a thread that copies
# thousands of small pieces would wait 5 ms for each while another thread computes.
copy_small = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


def copy_bytes(destination: int, source: int, nbytes: int) -> None:
    """Copy memory from one address to another; other threads can run during large copies."""
    move = ctypes.memmove if nbytes > _COPIED_AT_ONCE else copy_small
    move(destination, source, nbytes)


def scratch(nbytes: int) -> memoryview:
    """Allocate at least one byte of memory, which takes room only as it is written to."""
    return memoryview(mmap.mmap(-1, nbytes))


def _huge_page() -> int:
    """Return the size of the huge pages that madvise can request; 0 if there are none."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size") as file:
            size = int(file.read())
    except (OSError, ValueError):
        return 0
    # Systems with pages of 64 KiB have huge ones of 512 MiB: too much memory for one byte.
    return size if size <= 2 * 2**20 and hasattr(mmap, "MADV_HUGEPAGE") else 0


HUGE_PAGE = _huge_page()
_libc = ctypes.CDLL(None) if HUGE_PAGE else None


def use_huge_pages(storage: torch.UntypedStorage) -> None:
    """Request huge pages for a large new storage, before the first write to it.

    The first write to new memory takes longer than the copy from a socket into it: 0.44 s a GiB
    with pages of 4 KiB, 0.1 s with huge ones. The request is for all pages that the storage has a
    part of, so that a huge page can reach over two neighbouring storages; without the neighbours, a
    storage of 16 MiB would have 2 MiB in small pages. Small storages get no request: each separate
    range is one of the 65,530 mappings that a process may have. The request stays in force for the
    memory after the storage is freed.

    Args:
        storage: A storage on the CPU.
    """
    if _libc is None or storage.nbytes() < HUGE_PAGE:
        return
    start = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - start
    # If the kernel refuses, the pages are small: no error.
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
