"""Measures the floor: the operations on this machine that no transfer can avoid.

    python benchmarks/floor.py

One process, medians of seven; memory is warmed before each measurement, as in the suite. The socket
is measured with the raw loop of the suite. Linux with glibc only.
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable

import torch
import xxhash
from common import MIB, bytes_of, warm_memory

GIB = 1024 * MIB


def seconds(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    times = []
    for _ in range(7):
        before()
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
        del result
    return statistics.median(times)


def touched(huge: bool) -> float:
    """Return the seconds for the first touch of 1 GiB by a plain write."""

    def touch() -> mmap.mmap:
        memory = mmap.mmap(-1, GIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge:
            memory.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.c_char.from_buffer(memory)
        ctypes.memset(ctypes.addressof(first), 1, GIB)
        del first
        return memory

    return seconds(touch, lambda: warm_memory(GIB))


def main() -> None:
    torch.set_num_threads(1)
    source, copy = torch.ones(GIB, dtype=torch.uint8), torch.ones(GIB, dtype=torch.uint8)
    chunk, whole = bytes_of(source[: 4 * MIB]), bytes_of(source)

    def hash_chunks() -> None:
        for start in range(0, GIB, 4 * MIB):
            xxhash.xxh3_64_intdigest(whole[start : start + 4 * MIB])

    def hash_again() -> None:
        for _ in range(GIB // len(chunk)):
            xxhash.xxh3_64_intdigest(chunk)

    rows = {
        "write to memory that is there": seconds(lambda: copy.fill_(2)),
        "copy to memory that is there": seconds(lambda: copy.copy_(source)),
        "xxh3_64, chunk by chunk": seconds(hash_chunks),
        "xxh3_64 of one chunk again and again": seconds(hash_again),
    }
    rows["first write to fresh memory, pages of 4 KiB"] = touched(huge=False)
    rows["first write to fresh memory, huge pages"] = touched(huge=True)
    print("| 1 GiB | seconds | GB/s |\n| --- | ---: | ---: |")
    for what, taken in rows.items():
        print(f"| {what} | {taken:.3f} | {GIB / taken / 1e9:.1f} |")


if __name__ == "__main__":
    main()
