"""Tensors that are made of several rows: sparse, quantized, nested, wrapper subclasses, DTensors.

In: the skeleton of a pickle, before the payload. Out: the names of such tensors, the storages that
each is made of, and the tensors themselves, each as soon as its storages are there.

The weights-only unpickler runs over the skeleton once, as in a load, but every function that makes
a tensor, and everything that the caller trusts, has a stand-in that only notes the call. A noted
call is carried out by the same unpickler and the same allowlist (``pickled.replay``), when all
that it needs has arrived. So nothing runs here that a load would not run, and nothing is built of a
tensor that is not wanted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from aiotorchio.codecs.pickled import codec as pickle_codec
from aiotorchio.codecs.pickled.allowlist import Allowlist
from aiotorchio.codecs.pickled.recorded_calls import (
    CONTAINERS,
    DICTS,
    Call,
    Proxy,
    Reference,
    Seals,
    calls_in,
    origin_of,
    parts_of,
    proxies,
)
from aiotorchio.codecs.pickled.safe_builtins import check_hashes
from aiotorchio.common.gc_pause import gc_paused
from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.errors import AiotorchioError, InvalidObjectError, LimitExceeded, MismatchError
from aiotorchio.wire.header import TensorRow, shortened

__all__ = ["Composites"]


class Composites:
    """The tensors of an object that are made of several rows, by name.

    Args:
        skeleton: A pickle that was scanned with this allowlist.
        rows: The table of tensors.
        storages: How many storages there are.
        allowlist: Of the load.
        encoding: Of the strings of Python 2.
        depth_limit: Nesting to accept.
        offset: Byte of the message where the skeleton begins, for errors.

    Attributes:
        names: All names that there are.
        refused: Why the names are not known; "" if they are.
        rows: What those that were chosen are made of.
        storages: Numbers of the storages that those need.

    Raises:
        UnsafeObjectError: As ``pickled.load``, and so are other errors of it.
        MismatchError: Two tensors have the same name, because keys contain dots.
    """

    def __init__(
        self,
        skeleton: bytes,
        rows: Sequence[TensorRow],
        storages: int,
        *,
        allowlist: Allowlist,
        encoding: str,
        depth_limit: int,
        offset: int,
    ) -> None:
        self._allowlist, self._encoding, self._offset = allowlist, encoding, offset
        self._clear()
        references: dict[Any, Reference] = {}

        def refer(pid: Any) -> Reference:
            if type(pid) is int:
                row = pickle_codec.checked_row(pid, len(rows), "tensor")
                return references.setdefault(pid, Reference(pid, rows[row].storage))
            index, name = pickle_codec.storage_reference(pid)
            pickle_codec.checked_row(index, storages, "storage")
            return references.setdefault((index, name), Reference(pid, index))

        # Nothing of the caller's runs: its code has stand-ins.
        seals = Seals()
        with gc_paused():
            obj = pickle_codec.load_with(
                skeleton,
                refer,
                allowed=proxies(allowlist, seals),
                allowlist=allowlist,
                encoding=encoding,
                depth_limit=depth_limit,
                offset=offset,
            )
            if seals.broken():
                self.refused = "a container is changed after a call has used it"
            else:
                self._name(obj, rows)

    @classmethod
    def none(cls, refused: str = "") -> Composites:
        """Of an object without any, or one whose names are not known."""
        made = object.__new__(cls)
        made._clear()
        made.refused = refused
        return made

    def _clear(self) -> None:
        self.names: dict[str, Any] = {}
        self.refused = ""
        self.rows: set[int] = set()
        self.storages: set[int] = set()
        # How often each call, container and reference is still needed, and each storage.
        self._uses: Counter[int] = Counter()
        self._storage_uses: Counter[int] = Counter()
        # The last storage that a call, container or reference needs; None if nothing has to be
        # made anew in it.
        self._last: dict[int, int | None] = {}
        self._open: set[int] = set()
        # What was made, and is needed again.
        self._made: dict[int, Any] = {}
        # By the last storage that they need.
        self._chosen: dict[int, list[tuple[Any, list[str]]]] = {}
        self._held: dict[int, torch.UntypedStorage | None] = {}

    def _name(self, obj: Any, rows: Sequence[TensorRow]) -> None:
        row_of = {name: n for n, row in interruptible(enumerate(rows)) for name in row.names}
        for name, call in calls_in(obj):
            if not self._makes_tensor(call):
                continue
            row = row_of.get(name)
            if row is not None and origin_of(call) == row:
                # A tensor with attributes, or of a subclass: it is known by its row.
                continue
            if row is not None or self.names.setdefault(name, call) is not call:
                raise MismatchError(
                    f"two tensors have the same name {shortened(name)!r}: without names, a load of "
                    "the whole object works",
                    entry="skeleton",
                )

    def _makes_tensor(self, call: Call) -> bool:
        function = call.function
        if isinstance(function, type):
            return issubclass(function, torch.Tensor)
        return self._allowlist.makes_tensors(function)

    def choose(self, selection: Iterable[str]) -> None:
        """Prepare for those of these names, once; all else is not made, and forgotten here.

        Raises:
            MismatchError: A tensor that is made of itself.
            LimitExceeded: Nested deeper than Python can follow.
        """
        with gc_paused():
            self._choose(selection)

    def _choose(self, selection: Iterable[str]) -> None:
        names: dict[int, tuple[Any, list[str]]] = {}
        for name in interruptible(selection):
            call = self.names[name]
            names.setdefault(id(call), (call, []))[1].append(name)
        for call, called in interruptible(names.values(), 100):
            try:
                last = self._survey(call)
            except RecursionError:
                raise LimitExceeded("nested too deep", entry="skeleton") from None
            except _MadeOfItselfError:
                raise MismatchError(
                    f"the tensor {shortened(called[0])!r} is made of itself, and can't be received "
                    "by name: a load of the whole object works",
                    entry="skeleton",
                ) from None
            self._uses[id(call)] += 1
            self._chosen.setdefault(-1 if last is None else last, []).append((call, called))
        # Not to be freed at the end, on an event loop: what belongs to a name can be long.
        self.names = dict.fromkeys(self.names)

    @property
    def tables(self) -> list[dict[Any, Any]]:
        """What may be as long as the object."""
        counts = [self._uses, self._storage_uses]
        return [self.names, self._last, self._made, self._chosen, self._held, *counts]

    @property
    def without_storages(self) -> bool:
        """Whether there is any that needs no storage."""
        return -1 in self._chosen

    def _survey(self, value: Any) -> int | None:
        """Count who needs what below a value, once, and return the last storage that it needs."""
        if isinstance(value, Proxy):
            return -1
        key = id(value)
        if key in self._last:
            return self._last[key]
        if isinstance(value, Reference):
            self._storage_uses[value.storage] += 1
            self.storages.add(value.storage)
            if type(value.pid) is int:
                self.rows.add(value.pid)
            self._last[key] = value.storage
            return value.storage
        if not isinstance(value, Call) and type(value) not in CONTAINERS:
            return None
        check_interrupt()
        if key in self._open:
            raise _MadeOfItselfError
        self._open.add(key)
        last: int | None = -1 if isinstance(value, Call) else None
        for part in interruptible(parts_of(value)):
            needed = self._survey(part)
            if needed is not None:
                if not isinstance(part, Proxy):
                    self._uses[id(part)] += 1
                last = needed if last is None else max(last, needed)
        self._open.discard(key)
        self._last[key] = last
        return last

    def hold(self, index: int, storage: torch.UntypedStorage | None) -> None:
        """Take a storage that arrived, if it is needed; it is kept until the last use of it."""
        if index in self.storages:
            self._held[index] = storage

    def distrust(self, storages: Iterable[torch.UntypedStorage | None]) -> None:
        """As of ``Allowlist``."""
        self._allowlist.distrust(storages)

    def made(
        self, index: int, tensor_of: Callable[[int, torch.UntypedStorage], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Make the tensors whose last storage is this one; -1: those that need none.

        Args:
            index: Of the storage.
            tensor_of: Makes the tensor of a row over its storage.

        Raises:
            InvalidObjectError: Parts that do not fit together.
            Exception: As ``pickled.load``.
        """
        for call, names in self._chosen.pop(index, ()):
            check_interrupt()
            try:
                tensor = self._make(call, tensor_of)
            except AiotorchioError as error:
                error.entry = shortened(names[0])
                raise
            except RecursionError:
                raise LimitExceeded("nested too deep", entry=shortened(names[0])) from None
            if not isinstance(tensor, torch.Tensor):
                raise InvalidObjectError(
                    f"a {type(tensor).__name__} where a tensor must be", entry=shortened(names[0])
                )
            for name in names:
                yield name, tensor

    def _make(self, value: Any, tensor_of: Callable[..., torch.Tensor]) -> Any:
        if isinstance(value, Proxy):
            return value.held[0]
        key = id(value)
        if self._last.get(key) is None:
            return value
        self._uses[key] -= 1
        if key in self._made:
            return self._made[key] if self._uses[key] else self._made.pop(key)
        made = self._made_of_parts(value, tensor_of)
        if self._uses[key]:
            self._made[key] = made
        return made

    def _made_of_parts(self, value: Any, tensor_of: Callable[..., torch.Tensor]) -> Any:
        if isinstance(value, Reference):
            return self._resolved(value, tensor_of)
        # In the order of ``parts_of``.
        parts = (self._make(part, tensor_of) for part in interruptible(parts_of(value)))
        if isinstance(value, Call):
            args, *state = parts
            return pickle_codec.replay(
                value.function,
                args,
                state,
                new=value.new,
                allowlist=self._allowlist,
                encoding=self._encoding,
                offset=self._offset,
            )
        ready = list(parts)

        def fill() -> Any:
            if not isinstance(value, DICTS):
                if isinstance(value, set | frozenset):
                    # The hashes of what stood for the members were others.
                    check_hashes(ready)
                return type(value)(ready)
            made, attributes = type(value)(), ready[0]
            for name, item in zip(ready[1::2], ready[2::2], strict=True):
                made[name] = item
            if attributes:
                vars(made).update(attributes)
            return made

        # Classes that the caller trusts are hashed and compared.
        return pickle_codec.translated(fill, self._offset)

    def _resolved(self, reference: Reference, tensor_of: Callable[..., torch.Tensor]) -> Any:
        index = reference.storage
        storage = self._held[index]
        self._storage_uses[index] -= 1
        if not self._storage_uses[index]:
            del self._held[index]
        if storage is None:
            raise AssertionError("a part of a tensor that was not received")
        if type(reference.pid) is int:
            return tensor_of(reference.pid, storage)
        return pickle_codec.storage_for(reference.pid, storage)


class _MadeOfItselfError(Exception):
    """A noted call has its own result as an argument."""
