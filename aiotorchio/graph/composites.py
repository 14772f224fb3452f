"""The composite tensors of a pickle, made one by one, without the rest of its object.

In: the skeleton of a pickle, before the payload. Out: the names of its composite tensors, the
storages that each needs, and each tensor itself as soon as its storages have arrived. A
``MismatchError`` means that the tensors cannot be used by name; an ``InvalidObjectError`` means
that the rows of a tensor do not fit together. ``engine`` calls it for iteration and selections.

The weights-only unpickler runs over the skeleton once, as in a load. A proxy replaces every
function that makes a tensor, and everything in ``safe_globals``: it only records the call. When all
storages that a recorded call needs have arrived, the same unpickler with the same allowlist carries
it out (``codecs.pickled.codec.replay``). So nothing runs here that a load would not run, and
tensors outside the selection are not built.
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
    """The composite tensors of an object, by name.

    Args:
        skeleton: A pickle that was scanned with this allowlist.
        rows: The table of tensors.
        storages: The number of storages.
        allowlist: The allowlist of the load.
        encoding: The encoding of strings of Python 2.
        depth_limit: The nesting that the receiver accepts.
        offset: Byte of the message at which the skeleton begins, for errors.

    Attributes:
        names: The names of all composite tensors.
        unknown_reason: The reason why the names are unknown; "" if they are known.
        rows: Indices of the rows of the chosen tensors.
        storages: Indices of the storages that the chosen tensors need.

    Raises:
        UnsafeObjectError: The pickle names a global outside the allowlist. Other errors of
            ``codecs.pickled.codec.load`` are raised as well.
        MismatchError: Two tensors have the same name, because keys contain dots or have the same
            text, as 1 and "1" have.
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

        # No code of the caller runs here: proxies record its calls.
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
                self.unknown_reason = "the pickle changes a container after a call has used it"
            else:
                self._name(obj, rows)

    @classmethod
    def none(cls, unknown_reason: str = "") -> Composites:
        """Return the value for an object without composite tensors, or without known names."""
        none = object.__new__(cls)
        none._clear()
        none.unknown_reason = unknown_reason
        return none

    def _clear(self) -> None:
        self.names: dict[str, Any] = {}
        self.unknown_reason = ""
        self.rows: set[int] = set()
        self.storages: set[int] = set()
        # The number of further uses of each call, container and reference, and of each storage.
        self._uses: Counter[int] = Counter()
        self._storage_uses: Counter[int] = Counter()
        # The results of ``_survey`` for calls, containers and references.
        self._last: dict[int, int | None] = {}
        self._open: set[int] = set()
        # Results of calls, containers and references that are used again.
        self._results: dict[int, Any] = {}
        # The chosen calls with their names, by the last storage that they need.
        self._chosen: dict[int, list[tuple[Any, list[str]]]] = {}
        self._held: dict[int, torch.UntypedStorage | None] = {}

    def _name(self, obj: Any, rows: Sequence[TensorRow]) -> None:
        row_of = {name: n for n, row in interruptible(enumerate(rows)) for name in row.names}
        for name, call in calls_in(obj):
            if not self._makes_tensor(call):
                continue
            row = row_of.get(name)
            if row is not None and origin_of(call) == row:
                # A tensor with attributes, or of a subclass: its row has its name.
                continue
            if row is not None or self.names.setdefault(name, call) is not call:
                raise MismatchError(
                    f"two tensors have the same name {shortened(name)!r} (their keys contain dots, "
                    "or have the same text), so they cannot be used by name: load the whole "
                    "object, without select",
                    entry="skeleton",
                )

    def _makes_tensor(self, call: Call) -> bool:
        function = call.function
        if isinstance(function, type):
            return issubclass(function, torch.Tensor)
        return self._allowlist.makes_tensors(function)

    def choose(self, selection: Iterable[str]) -> None:
        """Prepare for the composite tensors with these names, once; forget all others.

        Raises:
            MismatchError: A tensor is made of itself.
            LimitExceeded: The object is nested deeper than Python's recursion limit allows.
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
                raise LimitExceeded(
                    "the object is nested too deep for Python's recursion limit", entry="skeleton"
                ) from None
            except _MadeOfItselfError:
                raise MismatchError(
                    f"the tensor {shortened(called[0])!r} is made of itself, so it cannot be "
                    "received by name: load the whole object, without select",
                    entry="skeleton",
                ) from None
            self._uses[id(call)] += 1
            self._chosen.setdefault(-1 if last is None else last, []).append((call, called))
        # Drop the values now, in this thread: freeing them on an event loop could take long.
        self.names = dict.fromkeys(self.names)

    @property
    def tables(self) -> list[dict[Any, Any]]:
        """Tables that can be as long as the object, which the caller frees in parts."""
        counts = [self._uses, self._storage_uses]
        return [self.names, self._last, self._results, self._chosen, self._held, *counts]

    @property
    def without_storages(self) -> bool:
        """Whether there is a tensor that needs no storage."""
        return -1 in self._chosen

    def _survey(self, value: Any) -> int | None:
        """Count the uses of values below a value, once, and return the last storage it needs.

        Returns:
            The index of the storage; -1 if the value must be made, but needs no storage; None if it
            is used as it is: it has no call, reference or proxy in it.
        """
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
        """Keep a storage that arrived until its last use, if it has any."""
        if index in self.storages:
            self._held[index] = storage

    def distrust(self, storages: Iterable[torch.UntypedStorage | None]) -> None:
        """Declare the values in these storages unreliable; see ``Allowlist.distrust``."""
        self._allowlist.distrust(storages)

    def ready_tensors(
        self, index: int, tensor_of: Callable[[int, torch.UntypedStorage], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Make the tensors whose last storage is this one, and yield them with each name.

        Args:
            index: The index of the storage; -1 for the tensors that need no storage.
            tensor_of: Makes the tensor of a row over its storage.

        Raises:
            InvalidObjectError: The rows of a tensor do not fit together.
            Exception: The errors of ``codecs.pickled.codec.load``.
        """
        for call, names in self._chosen.pop(index, ()):
            check_interrupt()
            try:
                tensor = self._result_of(call, tensor_of)
            except AiotorchioError as error:
                error.entry = shortened(names[0])
                raise
            except RecursionError:
                raise LimitExceeded(
                    "the tensor is nested too deep for Python's recursion limit",
                    entry=shortened(names[0]),
                ) from None
            if not isinstance(tensor, torch.Tensor):
                raise InvalidObjectError(
                    f"the skeleton must make a tensor here, not a {type(tensor).__name__}",
                    entry=shortened(names[0]),
                )
            for name in names:
                yield name, tensor

    def _result_of(self, value: Any, tensor_of: Callable[..., torch.Tensor]) -> Any:
        """Return the value with results instead of calls, references and proxies."""
        if isinstance(value, Proxy):
            return value.held[0]
        key = id(value)
        if self._last.get(key) is None:
            return value
        self._uses[key] -= 1
        if key in self._results:
            return self._results[key] if self._uses[key] else self._results.pop(key)
        result = self._build(value, tensor_of)
        if self._uses[key]:
            self._results[key] = result
        return result

    def _build(self, value: Any, tensor_of: Callable[..., torch.Tensor]) -> Any:
        if isinstance(value, Reference):
            return self._resolve(value, tensor_of)
        # The order of the parts is that of ``parts_of``.
        parts = (self._result_of(part, tensor_of) for part in interruptible(parts_of(value)))
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
                    # The placeholders had other hashes than these members.
                    check_hashes(ready)
                return type(value)(ready)
            made, attributes = type(value)(), ready[0]
            for name, item in zip(ready[1::2], ready[2::2], strict=True):
                made[name] = item
            if attributes:
                vars(made).update(attributes)
            return made

        # This hashes and compares objects of classes that the caller trusts.
        return pickle_codec.translated(fill, self._offset)

    def _resolve(self, reference: Reference, tensor_of: Callable[..., torch.Tensor]) -> Any:
        index = reference.storage
        storage = self._held[index]
        self._storage_uses[index] -= 1
        if not self._storage_uses[index]:
            del self._held[index]
        if storage is None:
            raise AssertionError("a storage of this tensor was not received")
        if type(reference.pid) is int:
            return tensor_of(reference.pid, storage)
        return pickle_codec.storage_for(reference.pid, storage)


class _MadeOfItselfError(Exception):
    """A recorded call has its own result as an argument."""
