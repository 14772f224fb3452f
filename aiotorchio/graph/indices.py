"""The check of the indices of sparse COO tensors, without torch's threads.

In: indices as they were received, and the shape that they must lie in. Out: nothing, or the
``RuntimeError`` that torch's own check would raise, too. ``_torch`` calls it.

torch's check reduces over one dimension of two: it shares the rows among its threads, even if
there are three numbers in each. Here no operation has as many as the 32,768 elements from which on
torch starts its threads, and the fewest numbers are compared in Python.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

__all__ = ["check_coo_indices"]

STEP = 16_384
"""Elements of one operation: below what torch shares among its threads."""

IN_PYTHON = 256
"""Numbers that are checked in Python, where so few take less time than operations of torch."""

_INT64_MAX = 2**63 - 1


def steps(count: int, overlap: int = 0) -> Iterator[slice]:
    """Slices of at most ``STEP`` elements; each reaches ``overlap`` elements into the next."""
    for start in range(0, count - overlap, STEP):
        yield slice(start, min(start + STEP + overlap, count))


def check_coo_indices(indices: torch.Tensor, size: Sequence[int], *, distinct: bool) -> None:
    """Refuse indices beyond the size; with ``distinct``, also those not sorted, or repeated.

    Args:
        indices: Of two dimensions, int64: one row for each sparse dimension.
        size: Of at least these dimensions.
        distinct: Whether the tensor claims to be coalesced.
    """
    dims, count = indices.shape
    if not dims or not count:
        return
    if math.prod(size[:dims]) > _INT64_MAX:
        raise RuntimeError(f"a sparse tensor of shape {tuple(size)}: too many elements")
    if dims * count <= IN_PYTHON:
        rows = indices.tolist()
        bounds: Iterator[tuple[int, int]] = ((min(row), max(row)) for row in rows)
    else:
        bounds = (_bounds(row) for row in indices)
    for dim, (lowest, highest) in enumerate(bounds):
        if lowest < 0 or highest >= size[dim]:
            wrong = lowest if lowest < 0 else highest
            raise RuntimeError(
                f"a sparse tensor has index {wrong} in dimension {dim}, whose size is {size[dim]}"
            )
    if not distinct:
        return
    if dims * count <= IN_PYTHON:
        rising = all(one < other for one, other in pairwise(zip(*rows, strict=True)))
    else:
        rising = all(_rising(indices[:, each], size) for each in steps(count, 1))
    if not rising:
        raise RuntimeError(
            "a sparse tensor claims to be coalesced, but its indices are not sorted and distinct"
        )


def _bounds(row: torch.Tensor) -> tuple[int, int]:
    found = [torch.aminmax(row[each]) for each in steps(len(row))]
    return min(int(low) for low, _ in found), max(int(high) for _, high in found)


def _rising(columns: torch.Tensor, size: Sequence[int]) -> bool:
    keys = columns[0]
    for row, length in zip(columns[1:], size[1:], strict=False):
        keys = keys * length + row
    return bool((keys[1:] > keys[:-1]).all())
