"""Names of tensors: the path to each through dicts, other mappings, lists and tuples.

``{"layers": [{"weight": tensor}]}`` has a tensor ``layers.0.weight``; an object that is a tensor
itself has the name ``""``. The header carries the names (SPEC.md section 5.4).

``walk`` names the tensors of ``into``, and of an object that is sent as a pickle; the tree encoder
names its own. ``rows_by_name`` and ``specs_of`` read the names of a header; ``check_names``
compares them with the paths of a received skeleton. A ``MismatchError`` means that two tensors have
one name, a ``ProtocolError`` that the names of a header are not the paths of its skeleton.

The rule for paths is also applied by the tree encoder, ``_Check``, ``containers.leaves_of``,
``containers.SharedContainers`` and ``graph.select._Revision``: change all of them together.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch

from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.errors import MismatchError, ProtocolError
from aiotorchio.table.containers import Path, SharedContainers, items_of, key_text, utf8
from aiotorchio.table.torch_dtypes import torch_dtype
from aiotorchio.wire.header import Header, TensorRow, describe, shortened

__all__ = [
    "Placeholder",
    "TensorSpec",
    "check_names",
    "count_unnamed",
    "rows_by_name",
    "specs_of",
    "walk",
]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The shape and dtype of a tensor, known before its bytes.

    Args:
        shape: The number of elements in each dimension.
        dtype: The dtype of the elements.

    Raises:
        TypeError: The shape is not a tuple of int, or the dtype is not a ``torch.dtype``.
        ValueError: The shape has a negative size.

    Example:
        >>> import torch, aiotorchio
        >>> aiotorchio.TensorSpec((2, 3), torch.float32).nbytes
        24
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple) or not all(type(n) is int for n in self.shape):
            raise TypeError(f"shape must be a tuple of int, not {self.shape!r}")
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, not {self.dtype!r}")
        if any(n < 0 for n in self.shape):
            raise ValueError(f"the sizes of shape must be 0 or more, not {self.shape}")

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """Return the spec of a tensor, which may be on ``meta``."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @classmethod
    def of_row(cls, row: TensorRow) -> TensorSpec:
        """Return the spec of a row of the header.

        Raises:
            ProtocolError: The installed torch lacks the dtype.
        """
        return cls(row.shape, torch_dtype(row.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, each counted once for each index."""
        return math.prod(self.shape) * self.dtype.itemsize


def walk(
    obj: object, opened: Callable[[str, torch.nn.Module], Mapping[str, Any]] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of an object, each with every path to it; further places come last.

    There are two exceptions. A container that contains itself, or another one that does, counts
    only at its first place. If the further places of all containers would give far too many names
    (see ``SharedContainers``), every container counts only at its first place.

    Args:
        obj: An object of dicts, lists, tuples and other mappings; tensors inside other objects
            are not found.
        opened: Called with the path of a module, and the module; returns its tensors by name.

    Raises:
        TypeError: There is an optimizer, and ``opened`` was passed.
    """
    seen: dict[int, Any] = {}
    further: list[tuple[Path | None, Any]] = []
    waiting: list[tuple[str, Any]] = [("", obj)]
    # Long paths to many plain values would take much memory.
    plain = (str, bytes, int, float, complex, type(None))
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield utf8(path), value
            continue
        if opened is not None and isinstance(value, torch.nn.Module):
            value = opened(path, value)
        items = items_of(value)
        if items is None:
            if opened is not None and isinstance(value, torch.optim.Optimizer):
                raise TypeError(
                    f"into has an optimizer at {path!r}, which is not a mapping: receive into the "
                    "tensors of its state_dict()"
                )
            continue
        if id(value) in seen:
            further.append((Path.below(None, utf8(path)), value))
            continue
        # Some mappings make their items at each access: no id may be used again.
        seen[id(value)] = value
        prefix = path + "." if path else ""
        waiting += reversed(
            [(prefix + key_text(key), item) for key, item in items if not isinstance(item, plain)]
        )
    if not further:
        return
    leaves = (torch.Tensor,) if opened is None else (torch.Tensor, torch.nn.Module)
    for path, _, _, value in SharedContainers(further, leaves=leaves):
        if opened is None or not isinstance(value, torch.nn.Module):
            yield path, value
            continue
        prefix = path + "." if path else ""
        for name, tensor in opened(path, value).items():
            yield utf8(prefix + name), tensor


def count_unnamed(header: Header, rows: Container[int] = (), storages: Container[int] = ()) -> int:
    """Count the rows of a message without a name: tensors, or parts of composite tensors.

    In a pickle, the storages that no row shows count, too, since the pickle can make tensors over
    them.

    Args:
        header: The header of the message.
        rows: Indices of rows to leave out, since a tensor with a name is made of them.
        storages: Indices of storages to leave out for the same reason.
    """
    unnamed = sum(
        not row.names and index not in rows
        for index, row in interruptible(enumerate(header.tensors))
    )
    if header.codec == "pickle":
        shown = {row.storage for row in interruptible(header.tensors)}
        every = interruptible(range(len(header.storages)))
        unnamed += sum(index not in shown and index not in storages for index in every)
    return unnamed


def rows_by_name(rows: Sequence[TensorRow]) -> dict[str, int]:
    """Return the row of each name, in the order of the rows.

    Raises:
        MismatchError: Two tensors have the same name, because keys contain dots or have the same
            text (as 1 and "1" have), or because both tensors are in one set.
    """
    found: dict[str, int] = {}
    for index, row in enumerate(rows):
        if not index % 1000 or len(row.names) > 1000:
            check_interrupt()
        for name in row.names:
            if found.setdefault(name, index) != index:
                raise MismatchError(
                    f"tensors {found[name]} and {index} have the same name {shortened(name)!r}, "
                    "since keys contain dots or have the same text, or both are in one set. They "
                    "cannot be used by name: load the whole object, without select or into",
                    entry=describe(row, index),
                )
    return found


def specs_of(header: Header) -> dict[str, TensorSpec]:
    """Return the spec of each name, in the order in which the tensors' storages arrive.

    Raises:
        MismatchError: Two tensors have the same name.
        ProtocolError: The installed torch lacks a dtype.
    """
    rows = header.tensors
    # The layers of a model repeat few shapes.
    specs: dict[tuple[tuple[int, ...], str], TensorSpec] = {}
    found: dict[str, TensorSpec] = {}
    for name, index in interruptible(_in_order(rows_by_name(rows), header)):
        row = rows[index]
        layout = (row.shape, row.dtype)
        spec = specs.get(layout)
        if spec is None:
            spec = specs[layout] = TensorSpec.of_row(row)
        found[name] = spec
    return found


def _in_order(row_of_name: Mapping[str, int], header: Header) -> Iterable[tuple[str, int]]:
    """Return names with their rows, in the order of the storages of the rows."""
    storages = [row.storage for row in interruptible(header.tensors)]
    if all(one <= other for one, other in interruptible(pairwise(storages))):
        return row_of_name.items()
    # Sorting half a million names in one call would hold up all other threads.
    of_storage: list[list[tuple[str, int]] | None] = [None] * len(header.storages)
    for item in interruptible(row_of_name.items()):
        listed = of_storage[storages[item[1]]] = of_storage[storages[item[1]]] or []
        listed.append(item)
    return chain.from_iterable(filter(None, of_storage))


class Placeholder:
    """A mark for the tensor of a row, in an object that is checked before its bytes arrive."""

    __slots__ = ("row",)

    def __init__(self, row: int) -> None:
        self.row = row


def check_names(obj: Any, rows: Sequence[TensorRow]) -> None:
    """Make sure that the names of the header are the paths of the skeleton.

    Args:
        obj: The object as the tree codec made it, with placeholders for the tensors.
        rows: The tensor rows of the header.

    Raises:
        ProtocolError: The names of a row are not all paths of its tensor.
    """
    _Check(rows).check(obj)


class _Check:
    def __init__(self, rows: Sequence[TensorRow]) -> None:
        self._rows = rows
        # Names whose path was not met yet. They are counted, since a set has another order here.
        self._names = [Counter(row.names) for row in interruptible(rows)]
        self._lengths = [{len(name) for name in row.names} for row in interruptible(rows)]
        # A path is joined only if it is as long as a name of its tensor: keys of a megabyte above
        # many tensors cost nothing.
        self._parts: list[str] = []
        self._length = 0

    def check(self, obj: Any) -> None:
        self._visit(obj)
        for index, names in interruptible(enumerate(self._names)):
            if names:
                raise ProtocolError(
                    "the header has a name for this tensor that is no path to it in the object",
                    entry=describe(self._rows[index], index),
                )

    def _visit(self, value: Any) -> None:
        if isinstance(value, Placeholder):
            self._tensor(value.row)
        elif isinstance(value, dict):
            if isinstance(value, OrderedDict) and hasattr(value, "_metadata"):
                outer, self._parts, self._length = (self._parts, self._length), [], 0
                self._item("_metadata", value._metadata)
                self._parts, self._length = outer
            for key, item in interruptible(value.items()):
                if isinstance(item, _LOOKED_INTO):
                    self._item(str(key), item)
        elif isinstance(value, set):
            for item in value:
                self._visit(item)
        elif isinstance(value, list | tuple):
            for n, item in interruptible(enumerate(value)):
                if isinstance(item, _LOOKED_INTO):
                    self._item(str(n), item)

    def _item(self, key: str, value: Any) -> None:
        if not key and not self._parts:
            self._visit(value)
            return
        self._parts.append(key)
        self._length += len(key) + 1
        self._visit(value)
        self._parts.pop()
        self._length -= len(key) + 1

    def _tensor(self, index: int) -> None:
        names = self._names[index]
        length = max(self._length - 1, 0)
        if length in self._lengths[index]:
            path = ".".join(self._parts)
            if path in names:
                names[path] -= 1
                if not names[path]:
                    del names[path]
                return
        raise ProtocolError(
            "the object has this tensor at a path that is not among its names in the header",
            entry=describe(self._rows[index], index),
        )


_LOOKED_INTO = (Placeholder, dict, list, tuple, set)
