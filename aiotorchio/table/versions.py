"""Whether tensors were changed in place while they were sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aiotorchio.common.torch_private import versions_of
from aiotorchio.wire.header import TensorRow, describe

__all__ = ["Versions"]


class Versions:
    """The version counters of tensors, which torch advances at each change in place.

    All tensors over the same memory share one, but those that ``.data`` and ``from_numpy`` make.
    So it is seen whether an operation of torch has changed the tensor, or any other view of what it
    is a view of. It is not seen what is done through ``.data``, numpy, or by other processes, nor
    what torch does not count itself: the steps of fused optimizers, and the running statistics of
    batch norms. Tensors of inference mode have no counter, nor have storages themselves.

    Args:
        tensors: As they are now.
        rows: Of the first of them, for errors; the others have none.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor] = (), rows: Sequence[TensorRow] = ()
    ) -> None:
        self._tensors = tensors
        self._rows = rows
        self._versions = versions_of(tensors)

    def check(self, when: str) -> None:
        """Make sure that they still are as they were; arguments as of ``changed``.

        Raises:
            RuntimeError: One was changed.
        """
        error = self.changed(when)
        if error is not None:
            raise error

    def changed(self, when: str) -> RuntimeError | None:
        """The error that says which of them was changed.

        Args:
            when: The end of its sentence: when nobody should have changed them.

        Returns:
            The error; None if all are as they were.
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
