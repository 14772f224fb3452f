"""Whether tensors were changed in place while they were sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aiotorchio.graph._torch import version_of
from aiotorchio.wire.header import TensorRow, describe

__all__ = ["Versions"]


class Versions:
    """The version counters of tensors, which torch advances at each change in place.

    All tensors over the same memory share one, but those that ``.data`` and ``from_numpy`` make.
    So it is seen whether an optimizer, or any other operation of torch on the tensor or a view of
    it, has changed it; not what is done through ``.data``, numpy, or by other processes. Tensors of
    inference mode have no counter.

    Args:
        tensors: As they are now.
        rows: Their rows, for errors.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor] = (), rows: Sequence[TensorRow] = ()
    ) -> None:
        self._tensors = tensors
        self._rows = rows
        self._versions = [version_of(tensor) for tensor in tensors]

    def check(self, when: str) -> None:
        """Make sure that they still are as they were.

        Args:
            when: The end of the sentence in an error: when nobody should have changed them.

        Raises:
            RuntimeError: One was changed.
        """
        for index, (tensor, version) in enumerate(zip(self._tensors, self._versions, strict=True)):
            if version_of(tensor) != version:
                raise RuntimeError(f"{describe(self._rows[index], index)} was changed {when}")
