"""Sizes up to which a message does its work on the event loop, and not in a worker thread.

A worker thread takes 0.1 ms to start, and an event loop must not be held for long.
"""

from __future__ import annotations

__all__ = ["INLINE_HEADER", "INLINE_NBYTES", "INLINE_ROWS", "INLINE_SKELETON"]

# Tensors that are built on the event loop: building takes 5 us a tensor.
INLINE_ROWS = 200
# Bytes of a skeleton, and of a header, in which a row may have any number of names.
INLINE_SKELETON, INLINE_HEADER = 8 * 2**10, 32 * 2**10
# Bytes that are copied, or whose byte order is changed: 1 MiB takes up to 8 ms.
INLINE_NBYTES = 256 * 2**10
