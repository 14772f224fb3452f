"""A check whether tensors were changed in place while they were sent.

In: the tensors of an object, when it is taken apart. Out: an error, before the end frame, if torch
has counted a change of one of them since then. ``graph.flatten`` makes it; ``engine.send``,
``engine.prepared_save`` and ``graph.copies`` check it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aiotorchio.common.torch_private import versions_of
from aiotorchio.wire.header import TensorRow, describe

__all__ = ["Versions"]


class Versions:
    """The version counters of tensors, which torch advances at each change in place.

    Tensors over the same memory share one counter, except those that ``.data`` and ``from_numpy``
    make. So the check notices operations of torch on the tensor, or on another view of the same
    tensor. It does not notice changes through ``.data``, numpy or other processes, nor changes that
    torch does not count: the steps of fused optimizers, and the running statistics of batch norms.
    Tensors of inference mode have no counter, and neither have storages.

    Args:
        tensors: The tensors, as they are now.
        rows: The rows of the first tensors, for errors; the other tensors have no rows.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor] = (), rows: Sequence[TensorRow] = ()
    ) -> None:
        self._tensors = tensors
        self._rows = rows
        self._versions = versions_of(tensors)

    def check(self, when: str) -> None:
        """Make sure that no tensor was changed; see ``changed`` for the argument.

        Raises:
            RuntimeError: A tensor was changed.
        """
        error = self.changed(when)
        if error is not None:
            raise error

    def changed(self, when: str) -> RuntimeError | None:
        """Return the error that names a changed tensor.

        Args:
            when: The end of the error's sentence: the time in which changes are not allowed.

        Returns:
            The error; None if no tensor was changed.
        """
        now = versions_of(self._tensors)
        if now == self._versions:
            return None
        index = next(n for n, version in enumerate(now) if version != self._versions[n])
        if index < len(self._rows):
            what = describe(self._rows[index], index)
        else:
            what = f"a {type(self._tensors[index]).__name__}"
        return RuntimeError(f"{what} was changed {when}")
