"""Duplicates: several tensors of a message for one target.

The names of the target are tied; in a gathered copy of the model, each name has its own tensor. One
of these is copied, as soon as its bytes arrive. The others come later, and are compared with it bit
by bit and chunk by chunk, so that they need no memory. If they are interleaved in one storage, or
the storage is made for another reason, they are compared when the message is whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aiotorchio.common.interrupt import interruptible
from aiotorchio.common.strides import order_of
from aiotorchio.errors import MismatchError
from aiotorchio.graph.sharing import view_of_row
from aiotorchio.overlap.extents import Extents
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import Header, TensorRow, shortened
from aiotorchio.wire.layout import Layout

__all__ = ["Duplicates", "differ"]


class Duplicates:
    """Divides duplicates into those that are copied and those that are compared.

    Args:
        header: The header of the message.
        layout: The layout of the payload.
        duplicates: The names of each target for which the message has several tensors.
        row_of_name: The row of each name.

    Attributes:
        mixed: Storages in which tensors of one target are interleaved.
    """

    def __init__(
        self,
        header: Header,
        layout: Layout,
        duplicates: Sequence[Sequence[str]],
        row_of_name: Mapping[str, int],
    ) -> None:
        self._header, self._layout = header, layout
        self._duplicates, self._row_of_name = duplicates, row_of_name
        self.mixed: set[int] = set()
        for names in interruptible(duplicates, 100):
            views = {view_of_row(self._row(name)): name for name in names}
            extents = Extents((*self._extent(name), name) for name in views.values())
            self.mixed |= {
                self._row(name).storage for together in extents.together() for name in together
            }

    def choose(self, devices: Sequence[object]) -> dict[str, str]:
        """Choose the tensors that are copied: the first that arrive.

        Args:
            devices: The device of each storage; None: bytes go into targets while they arrive, not
                after the payload.

        Returns:
            The names of the tensors that are compared, each with that of the one that is copied.
        """
        compared_with: dict[str, str] = {}
        for names in interruptible(self._duplicates, 100):
            first = min(names, key=lambda name: self._arrival(name, devices))
            copied = view_of_row(self._row(first))
            for name in names:
                if view_of_row(self._row(name)) != copied:
                    compared_with[name] = first
        return compared_with

    def _arrival(self, name: str, devices: Sequence[object]) -> tuple[bool, tuple[int, int]]:
        """Return a key that sorts tensors by the moment when they can be copied."""
        return devices[self._row(name).storage] is not None, self._extent(name)

    def _row(self, name: str) -> TensorRow:
        return self._header.tensors[self._row_of_name[name]]

    def _extent(self, name: str) -> tuple[int, int]:
        """Return the first byte of a tensor in the payload, and the first one after it."""
        row = self._row(name)
        itemsize = DTYPES[row.dtype].itemsize
        start = self._layout.offsets[row.storage] + row.offset * itemsize
        return start, start + order_of(row.shape, row.stride).extent * itemsize


def differ(name: str, copied: str, *, staged: bool) -> MismatchError:
    """Make the error for two different tensors of a message that have one target."""
    one, other = shortened(copied), shortened(name)
    return MismatchError(
        f"{other} and {one} are one tensor in the target, but differ in the message: "
        + (
            "nothing was changed"
            if staged
            else "the target was written to (staged=True would leave it unchanged)"
        ),
        misfits={name: f"tied to {one} in the target, but with other numbers in the message"},
    )
