"""Makes the nested tensors of a pickle, of both layouts, with parts that lie within their values.

In: the arguments of a call in a pickle, which torch does not check. Out: the tensor. ``allowlist``
names these functions. An ``InvalidObjectError`` means that the parts do not fit together, a
``LimitExceeded`` that they are more than ``Limits`` allow.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from aiotorchio.codecs.pickled.checks import Checks, boolean, expect, part
from aiotorchio.common import torch_private
from aiotorchio.common.sparse_indices import IN_PYTHON, steps
from aiotorchio.errors import InvalidObjectError, LimitExceeded

__all__ = ["NestedMaker"]

# A check of one part takes as long as a copy of about this many bytes.
_PART_WORK = 64 * 2**10


class NestedMaker:
    """Makes the nested tensors of one load.

    Args:
        checks: The checks of the load.
    """

    def __init__(self, checks: Checks) -> None:
        self._checks = checks

    def strided(self, buffer: Any, sizes: Any, strides: Any, offsets: Any) -> torch.Tensor:
        """Make a nested tensor of the strided layout: many tensors in one buffer."""
        part(buffer)
        for numbers in (sizes, strides, offsets):
            self._checks.charge(numbers)
        if (
            buffer.dim() != 1
            # torch reads all four tensors as if they were contiguous.
            or not all(each.is_contiguous() for each in (buffer, sizes, strides, offsets))
            or sizes.dim() != 2
            or strides.shape != sizes.shape
            or offsets.shape != sizes.shape[:1]
            or any(each.dtype != torch.int64 for each in (sizes, strides, offsets))
            or any(each.device.type != "cpu" for each in (sizes, strides, offsets))
        ):
            raise InvalidObjectError(
                "a nested tensor has sizes, strides and offsets whose parts do not fit together"
            )
        self._checks.charge_sparse(len(offsets))
        # Each part is checked by a loop in Python.
        self._checks.charge_work(len(offsets) * _PART_WORK)
        if len(offsets) and sizes.shape[1] > self._checks.limits.dims:
            raise LimitExceeded(
                f"a nested tensor has {sizes.shape[1]} dimensions, but at most "
                f"{self._checks.limits.dims} are allowed (Limits.dims)"
            )
        most, elements = len(buffer), 0
        # The steps are smaller than for numbers that torch checks.
        for each in steps(len(offsets), width=64 * max(sizes.shape[1], 1)):
            for offset, size, stride in zip(
                *(numbers[each].tolist() for numbers in (offsets, sizes, strides)), strict=True
            ):
                elements += self._part(most, offset, size, stride)
        if elements * buffer.dtype.itemsize > self._checks.limits.dense_nbytes:
            raise LimitExceeded(
                f"a nested tensor has {elements} elements, more than Limits.expanded_nbytes allows"
            )
        return torch_private.nested_view(buffer, sizes, strides, offsets)

    def _part(self, most: int, offset: int, size: list[int], stride: list[int]) -> int:
        """Return the elements of a part, which must lie within the first ``most`` of the buffer."""
        # The same check as ``Checks.extent``, which takes much longer.
        count = end = 1
        for length, step in zip(size, stride, strict=True):
            if length < 0 or step < 0:
                self._checks.check_shape(size)
                self._checks.check_shape(stride)
            count *= length
            end += (length - 1) * step
        if offset < 0 or offset + (end if count else 0) > most:
            raise InvalidObjectError("a nested tensor has a part that lies beyond its buffer")
        return count

    def jagged(self, arguments: Any) -> torch.Tensor:
        """Make a nested tensor of the jagged layout: parts of one tensor, between offsets."""
        given = dict(expect(arguments, dict))
        values, offsets = part(given.pop("values", None)), given.pop("offsets", None)
        lengths, ragged = given.pop("lengths", None), given.pop(torch_private.RAGGED_DIM, 1)
        # A copy, since the pickle can still change the dict.
        cache = dict(expect(given.pop(torch_private.NOTED_LENGTHS, {}), dict))
        requires_grad = boolean(given.pop("requires_grad", False))
        if given or values.layout is not torch.strided or values.is_nested:
            raise InvalidObjectError("a jagged tensor has other parts than its layout requires")
        if type(ragged) is not int or not 1 <= ragged <= values.dim():
            raise InvalidObjectError(
                f"a jagged tensor must be ragged in a dimension from 1 to {values.dim()}"
            )
        for numbers in (offsets,) if lengths is None else (offsets, lengths):
            self._checks.charge(numbers)
            if numbers.dim() != 1 or numbers.dtype not in (torch.int32, torch.int64):
                raise InvalidObjectError(
                    "a jagged tensor has offsets or lengths that are not one-dimensional integers"
                )
        count = len(offsets) - 1
        if count < 0 or (lengths is not None and len(lengths) != count):
            raise InvalidObjectError("a jagged tensor lacks an offset or a length for each part")
        self._checks.charge_sparse(count)
        # Tensors on meta have no numbers, and torch reads nothing by them.
        if offsets.device.type != "meta" and not torch_private.is_fake(offsets):
            self._check_parts(values, ragged - 1, offsets, lengths, cache)
        return torch_private.JaggedTensor(
            values,
            offsets,
            lengths=lengths,
            requires_grad=requires_grad,
            **{torch_private.RAGGED_DIM: ragged, torch_private.NOTED_LENGTHS: cache},
        )

    def _check_parts(
        self,
        values: torch.Tensor,
        dim: int,
        offsets: torch.Tensor,
        lengths: torch.Tensor | None,
        cache: dict[Any, Any],
    ) -> None:
        """Refuse a jagged tensor whose parts, or their cached lengths, lie beyond its values."""
        total, shortest, longest = _lengths_within(offsets, lengths, values.shape[dim])
        count, width = len(offsets) - 1, math.prod([*values.shape[:dim], *values.shape[dim + 1 :]])
        # Parts with lengths may overlap.
        elements = total * width
        noted = {name: _noted_length(value) for name, value in cache.items()}
        if not noted.keys() <= {"min_seqlen", "max_seqlen"}:
            raise InvalidObjectError(
                "a jagged tensor caches lengths other than min_seqlen and max_seqlen"
            )
        least, highest = noted.get("min_seqlen", shortest), noted.get("max_seqlen", longest)
        if not 0 <= least <= shortest or highest < longest:
            raise InvalidObjectError(
                f"a jagged tensor caches lengths of {least} to {highest}, but has parts of "
                f"{shortest} to {longest}"
            )
        # The cached maximum may be above the real one; a padded tensor then takes as much memory.
        if highest > longest:
            elements = max(elements, count * highest * width)
        if elements * values.element_size() > self._checks.limits.dense_nbytes:
            raise LimitExceeded(
                f"a jagged tensor has {elements} elements, more than Limits.expanded_nbytes allows"
            )


def _lengths_within(
    offsets: torch.Tensor, lengths: torch.Tensor | None, most: int
) -> tuple[int, int, int]:
    """Refuse parts that lie beyond ``most`` values.

    Returns:
        The sum of the lengths of all parts, the least and the greatest of them; 0 without parts.
    """
    if len(offsets) <= IN_PYTHON:
        begins = offsets.tolist()
        sizes = [end - begin for begin, end in pairwise(begins)]
        rising = all(size >= 0 for size in sizes)
        if lengths is not None:
            sizes = lengths.tolist()
        if (
            not rising
            or min(begins) < 0
            or max(begins) > most
            or any(
                not 0 <= size <= most - begin for begin, size in zip(begins, sizes, strict=False)
            )
        ):
            raise InvalidObjectError("a jagged tensor has a part that lies beyond its values")
        return sum(sizes), min(sizes, default=0), max(sizes, default=0)
    # The offsets are read in steps, like the indices of sparse tensors: torch starts no threads.
    found = [
        _step_within(
            offsets[each].cpu().long(),
            None if lengths is None else lengths[each.start : each.stop - 1].cpu().long(),
            most,
        )
        for each in steps(len(offsets), 1)
    ]
    totals, shortest, longest = zip(*found, strict=True)
    return sum(totals), min(shortest), max(longest)


def _step_within(
    begins: torch.Tensor, sizes: torch.Tensor | None, most: int
) -> tuple[int, int, int]:
    """Do the same as ``_lengths_within`` for one step, with a fixed number of operations."""
    low, high = map(int, torch.aminmax(begins))
    # The bounds are checked first, so that no difference can overflow unnoticed.
    if low >= 0 and high <= most:
        between = begins.diff()
        sizes = between if sizes is None else sizes
        if not len(sizes):
            return 0, 0, 0
        shortest, longest = map(int, torch.aminmax(sizes))
        if (
            shortest >= 0
            and bool((between >= 0).all())
            and bool((sizes <= most - begins[:-1]).all())
        ):
            return int(sizes.double().sum()), shortest, longest
    raise InvalidObjectError("a jagged tensor has a part that lies beyond its values")


def _noted_length(value: Any) -> int:
    """Return a cached length: the size of a tensor without elements; -1 if it is not valid."""
    return part(value).shape[0] if part(value).dim() == 2 else -1
