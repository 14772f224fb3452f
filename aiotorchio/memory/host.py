"""Storages on the host: where their bytes are, views of them, memory that is quick to fill."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import lru_cache

import torch

__all__ = ["first_byte", "use_huge_pages", "view_of"]


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


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def use_huge_pages(storage: torch.UntypedStorage) -> None:
    """Ask for huge pages behind a storage that nobody has written to yet.

    The first touch of fresh memory takes longer than the copy from a socket into it: 0.44 s a GiB
    with pages of 4 KiB, 0.1 s with huge ones. The system gives them where 2 MiB that it can take
    as one are asked for, by one storage or by neighbours: never for more than was asked for.

    Args:
        storage: On the CPU.
    """
    if _libc is None:
        return
    page = mmap.PAGESIZE
    start = storage.data_ptr() // page * page
    end = -(-(storage.data_ptr() + storage.nbytes()) // page) * page
    # An advice: a kernel without huge pages refuses it, and nothing is lost.
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
