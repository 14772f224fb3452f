"""Checks of the indices of sparse tensors, without torch's threads.

In: received indices, and the shape of the tensor. Out: nothing, or a ``RuntimeError`` in the cases
in which torch's check raises one, too. ``torch_private`` calls the checks, and
``codecs/pickled/safe_nested.py`` uses ``steps``.

torch's checks share their work among its threads even for three numbers: they reduce over one
dimension of two, or search for each number separately. Here every operation has fewer than the
32,768 elements for which torch starts its threads, none reduces over one dimension, and few numbers
are compared in Python. A check of many numbers ends soon after the cancellation of its load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from aiotorchio.common.interrupt import check_interrupt

__all__ = ["IN_PYTHON", "check_compressed_indices", "check_coo_indices", "steps"]

STEP = 16_384
"""Elements of one operation: so few that torch uses one thread."""

IN_PYTHON = 512
"""The most numbers that are checked in Python, which is then faster than torch."""

_INT64_MAX = 2**63 - 1
_BY_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_OF_BLOCKS = (torch.sparse_bsr, torch.sparse_bsc)


def steps(count: int, overlap: int = 0, *, width: int = 1) -> Iterator[slice]:
    """Slices of at most ``STEP`` elements, or of one item.

    Args:
        count: Number of items.
        overlap: Number of items of the next slice that each slice has, too.
        width: Elements of each item.

    Raises:
        Interrupted: The load was cancelled.
    """
    length = max(STEP // width, 1)
    for start in range(0, max(count - overlap, min(count, 1)), length):
        check_interrupt()
        yield slice(start, min(start + length + overlap, count))


def check_coo_indices(indices: torch.Tensor, size: Sequence[int], *, distinct: bool) -> None:
    """Refuse indices beyond the size; with ``distinct``, also those not sorted, or repeated.

    Args:
        indices: An int64 tensor of two dimensions, with a row for each sparse dimension.
        size: The shape of the tensor, with at least these dimensions.
        distinct: Whether the tensor claims to be coalesced.
    """
    dims, count = indices.shape
    if not dims or not count:
        return
    if math.prod(size[:dims]) > _INT64_MAX:
        raise RuntimeError(
            f"a sparse tensor of shape {tuple(size)} has too many elements: at most 2**63 - 1 are "
            "possible"
        )
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


def check_compressed_indices(
    compressed: torch.Tensor,
    plain: torch.Tensor,
    values: torch.Tensor,
    size: Sequence[int],
    layout: torch.layout,
) -> None:
    """Refuse parts that do not make a tensor of the layout CSR, CSC, BSR or BSC.

    The compressed indices say where the plain ones of each row begin, from 0 to their count: as
    many rows as the tensor has (columns in CSC and BSC; of blocks in BSR and BSC), for each of its
    batches. The plain ones are in range, sorted and distinct within each row. On ``meta``, only the
    shapes are checked.
    """
    _check_parts(compressed, plain, values, layout)
    rows, limit = _check_shapes(compressed, plain, values, size, layout)
    if compressed.is_meta:
        return
    nnz = plain.shape[-1]
    if max(rows, limit, nnz) > torch.iinfo(plain.dtype).max:
        raise RuntimeError(
            f"a {layout} tensor of shape {tuple(size)} is too large for indices of {plain.dtype}"
        )
    batches, check = (_batches(compressed), _batches(plain)), _Rows(layout, nnz, limit)
    if compressed.numel() + plain.numel() <= IN_PYTHON:
        check.few(*(each.tolist() for each in batches))
    else:
        check.many(*batches)


def _check_parts(
    compressed: torch.Tensor, plain: torch.Tensor, values: torch.Tensor, layout: torch.layout
) -> None:
    """Refuse parts that no tensor can have, whatever their shapes are."""
    parts = (compressed, plain, values)
    if any(each.layout is not torch.strided or each.is_nested for each in parts):
        raise RuntimeError(f"a {layout} tensor has parts that are not strided")
    if compressed.dtype != plain.dtype or plain.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(
            f"a {layout} tensor has indices of {compressed.dtype} and {plain.dtype}, but both "
            "must be of int32, or both of int64"
        )
    lines = (compressed, plain) if plain.numel() else (compressed,)
    if any(each.dim() and each.stride(-1) != 1 for each in lines):
        raise RuntimeError(f"a {layout} tensor has indices that are not contiguous in each batch")
    if any(each.device != values.device for each in parts):
        raise RuntimeError(f"a {layout} tensor has parts on several devices")
    if len({each.is_pinned() for each in parts}) > 1:
        raise RuntimeError(f"a {layout} tensor has some parts in pinned memory and others not")


def _check_shapes(
    compressed: torch.Tensor,
    plain: torch.Tensor,
    values: torch.Tensor,
    size: Sequence[int],
    layout: torch.layout,
) -> tuple[int, int]:
    """Refuse parts that do not fit together; returns the number of rows and of columns."""
    batch_dims = compressed.dim() - 1
    block_dims = 2 if layout in _OF_BLOCKS else 0
    dense_dims = values.dim() - 1 - batch_dims - block_dims
    batch = tuple(size[: max(batch_dims, 0)])
    if (
        batch_dims < 0
        or plain.dim() != compressed.dim()
        or dense_dims < 0
        or len(size) != batch_dims + 2 + dense_dims
        or any(each.shape[:batch_dims] != batch for each in (compressed, plain, values))
        or plain.shape[-1] != values.shape[batch_dims]
    ):
        raise RuntimeError(
            f"a {layout} tensor of shape {tuple(size)} has compressed indices of shape "
            f"{tuple(compressed.shape)}, plain indices of shape {tuple(plain.shape)} and values of "
            f"shape {tuple(values.shape)}, which do not fit together"
        )
    blocks = [max(n, 1) for n in values.shape[batch_dims + 1 :][:block_dims]] or [1, 1]
    if any(length % block for length, block in zip(size[batch_dims:], blocks, strict=False)):
        raise RuntimeError(
            f"a {layout} tensor of shape {tuple(size)} cannot be divided into blocks of shape "
            f"{tuple(blocks)}"
        )
    rows, columns = size[batch_dims] // blocks[0], size[batch_dims + 1] // blocks[1]
    if layout not in _BY_ROWS:
        rows, columns = columns, rows
    if compressed.shape[-1] != rows + 1:
        raise RuntimeError(
            f"a {layout} tensor has {compressed.shape[-1]} compressed indices, but needs "
            f"{rows + 1} for its shape {tuple(size)}"
        )
    return rows, columns


def _batches(indices: torch.Tensor) -> torch.Tensor:
    """Return the indices in two dimensions: a row for each batch."""
    if indices.dim() == 1:
        return indices.unsqueeze(0)
    if indices.dim() > 2 and not indices.is_contiguous():
        copy = torch.empty(indices.shape, dtype=indices.dtype)
        _copy(copy, indices)
        indices = copy
    return indices.flatten(0, -2)


def _copy(to: torch.Tensor, indices: torch.Tensor) -> None:
    """Copy as ``copy_`` does, in steps."""
    if not indices.numel():
        return
    width = indices.numel() // len(indices)
    if width > STEP:
        for one, other in zip(to, indices, strict=True):
            _copy(one, other)
    else:
        for each in steps(len(indices), width=width):
            to[each].copy_(indices[each])


class _Rows:
    """The check of the rows of one tensor, which the compressed indices of each batch divide.

    Args:
        layout: The layout of the tensor.
        nnz: Number of plain indices in each batch.
        limit: Upper bound of the plain indices, and of their number in a row.
    """

    def __init__(self, layout: torch.layout, nnz: int, limit: int) -> None:
        self._layout = layout
        self._nnz = nnz
        self._limit = limit

    def few(self, compressed: list[list[int]], plain: list[list[int]]) -> None:
        """Check all batches in Python."""
        for starts, indices in zip(compressed, plain, strict=True):
            self._expect_ends(starts[0] == 0 and starts[-1] == self._nnz)
            lengths = [end - start for start, end in pairwise(starts)]
            if lengths:
                self._expect_lengths(min(lengths), max(lengths))
            if indices:
                self._expect_indices(min(indices), max(indices))
            for start, end in pairwise(starts):
                row = indices[start:end]
                self._expect_rising(all(one < other for one, other in pairwise(row)))

    def many(self, compressed: torch.Tensor, plain: torch.Tensor) -> None:
        """Check all batches in steps: several batches at a time, or a part of one."""
        width = max(compressed.shape[1], self._nnz)
        if width > STEP or len(compressed) == 1:
            for starts, indices in zip(compressed, plain, strict=True):
                self._check_batch(starts, indices)
            return
        for each in steps(len(compressed), width=width):
            part = compressed[each].cpu()
            ends = bool((part[:, 0] == 0).all()) and bool((part[:, -1] == self._nnz).all())
            self._expect_ends(ends)
            self._check_starts(part)
            # The rows of all of them are checked like the rows of one batch.
            before = torch.arange(len(part)).unsqueeze(1) * self._nnz
            self._check_plain((part + before).reshape(-1), plain[each].cpu().reshape(-1))

    def _check_batch(self, compressed: torch.Tensor, plain: torch.Tensor) -> None:
        end = 0
        for each in steps(len(compressed), 1):
            part = compressed[each].cpu()
            low, high = self._check_starts(part)
            # The starts do not decrease: the lowest is the first, and the highest is the last.
            self._expect_ends(low == end)
            self._check_plain(part - low, plain[low:high])
            end = high
        self._expect_ends(end == self._nnz)

    def _check_starts(self, starts: torch.Tensor) -> tuple[int, int]:
        low, high = map(int, torch.aminmax(starts))
        # The bounds are checked first, so that no difference can overflow.
        self._expect_ends(low >= 0 and high <= self._nnz)
        if starts.shape[-1] > 1:
            lengths = starts[..., 1:] - starts[..., :-1]
            self._expect_lengths(*map(int, torch.aminmax(lengths)))
        return low, high

    def _check_plain(self, starts: torch.Tensor, indices: torch.Tensor) -> None:
        for each in steps(len(indices), 1):
            part = indices[each].cpu()
            self._expect_indices(*map(int, torch.aminmax(part)))
            # Indices need not rise from one row to the next. scatter_ finds the first of each row,
            # since indexing starts torch's threads however few the elements are.
            begins = (starts.clamp(each.start, each.stop) - each.start).long()
            rising = torch.zeros(len(part) + 1, dtype=torch.bool)
            rising.scatter_(0, begins, torch.ones(len(begins), dtype=torch.bool))
            rising = rising[1:-1].logical_or_(part[1:] > part[:-1])
            self._expect_rising(bool(rising.all()))

    def _expect_ends(self, right: bool) -> None:
        if not right:
            raise RuntimeError(
                f"a {self._layout} tensor has compressed indices that do not go from 0 to "
                f"{self._nnz}, the number of its plain indices"
            )

    def _expect_lengths(self, shortest: int, longest: int) -> None:
        if shortest < 0 or longest > self._limit:
            raise RuntimeError(
                f"a {self._layout} tensor has compressed indices that decrease, or grow by more "
                f"than {self._limit} at once"
            )

    def _expect_indices(self, lowest: int, highest: int) -> None:
        if lowest < 0 or highest >= self._limit:
            raise RuntimeError(
                f"a {self._layout} tensor has plain index {lowest if lowest < 0 else highest}, "
                f"but each must be at least 0 and less than {self._limit}"
            )

    def _expect_rising(self, right: bool) -> None:
        if not right:
            raise RuntimeError(
                f"a {self._layout} tensor has plain indices that are not sorted and distinct "
                "between two compressed ones"
            )
