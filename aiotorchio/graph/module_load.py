"""The load of a module's other entries, after its tensors: the last part of a commit.

In: a ``ModuleTarget`` whose tensors have their new numbers, and the received object. Out: its
submodules have loaded their entries, or ``restore`` has loaded the earlier ones again.
``engine.module_commit`` makes it a part of the commit. A ``MismatchError`` means that a submodule
refused an entry or raised an error; its text has the class and the error.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from aiotorchio.common import torch_private_modules
from aiotorchio.common.interrupt import interruptible
from aiotorchio.errors import MismatchError
from aiotorchio.graph.module_state import IN_PLACE, NOTHING, Entries, StateDict, find
from aiotorchio.graph.modules import EXTRA_STATE, UNKNOWN_MAX, ModuleTarget
from aiotorchio.graph.tensor_load import WRITTEN, spread_misfit
from aiotorchio.table.state_metadata import without_mark
from aiotorchio.wire.header import shortened

__all__ = ["ModuleLoad", "is_extra_state"]


class ModuleLoad:
    """The load of one module from a received object.

    Args:
        target: The module; its ``tensors`` have their new numbers when ``steps`` is called.
        received: The object that was received.
        names: The names of its tensors in the selection.
        wanted: The selection: contains the names that count.
        strict: Whether missing and unexpected entries are errors.
        staged: Whether the load is staged, so that tensors are restored after an error.
    """

    def __init__(
        self,
        target: ModuleTarget,
        received: Any,
        names: Iterable[str],
        wanted: Container[str],
        *,
        strict: bool,
        staged: bool,
    ) -> None:
        self._target = target
        self._wanted, self._strict, self._staged = wanted, strict, staged
        prefix, tensors = target.prefix, target.tensors
        lengths: dict[int, list[int]] = {}
        root = find(received, prefix[:-1], lengths)
        # A pickle that was loaded with weights_only=False can have the mark.
        self._metadata: Mapping[str, Any] = without_mark(getattr(root, "_metadata", None)) or {}
        self._called: list[str] = []
        self._before: dict[str, Any] = {}
        self._versions: Mapping[str, Any] = {}
        self._lazy: list[str] = []
        self._first_error = ""

        entries = self._collected(received, root, names, lengths)
        missing = [
            key
            for key in (*tensors, *target.other_entries)
            if key not in entries and prefix + key in wanted
        ]
        self._check(entries, missing)

        owner = target.owner
        self._entries = Entries(entries, owner)
        # The submodules to load: of a selection, those with a part of it.
        reached = target.with_those_above({owner(key) for key in interruptible(entries)})
        everything = all(prefix + key in wanted for key in (*tensors, *target.other_entries))
        self._paths = target.active if everything else target.active & reached
        self._paths = self._paths | {owner(key) for key in entries if key not in tensors}
        if strict:
            self._paths |= {owner(key) for key in missing}
        # Submodules that are loaded report their missing entries themselves.
        self._missing = [key for key in missing if owner(key) not in self._paths]
        self._visited = target.with_those_above(self._paths)

    def _collected(
        self, received: Any, root: Any, names: Iterable[str], lengths: dict[int, list[int]]
    ) -> dict[str, Any]:
        """Return the received entries of the module; ``IN_PLACE`` stands for its tensors.

        Args:
            received: The object that was received.
            root: The part of it at the path of the module.
            names: The names of its tensors in the selection.
            lengths: See ``find``.
        """
        target, wanted = self._target, self._wanted
        prefix, tensors = target.prefix, target.tensors
        keys = [
            name.removeprefix(prefix) for name in interruptible(names) if name.startswith(prefix)
        ]
        entries: dict[str, Any] = {key: IN_PLACE for key in keys if key in tensors}
        # A hook can know such names: old ones, for example.
        unknown = [
            key
            for key in interruptible(keys)
            if key not in tensors and target.entry_of(key) is None
        ][:UNKNOWN_MAX]
        # Extra state that no submodule takes is included, so that it is found and reported.
        shown = root if isinstance(root, Mapping) else ()
        others = [*target.other_entries, *filter(is_extra_state, interruptible(shown))]
        others = [key for key in others if prefix + key in wanted]
        for key in interruptible([*unknown, *others], 1):
            value = find(root, key, lengths)
            if value is NOTHING:
                # The keys of the message may begin with the path of the module.
                value = find(received, prefix + key, lengths)
            if value is not NOTHING:
                entries[key] = value
        return entries

    def _check(self, entries: Mapping[str, Any], absent: Iterable[str]) -> None:
        """Refuse entries that would be refused later, and shards of another rank."""
        target, prefix = self._target, self._target.prefix
        misfits: dict[str, str] = {}
        for key in target.other_entries:
            received, tensor = entries.get(key), target.loaded_by_torch(key)
            if tensor is not None and isinstance(received, torch.Tensor):
                reason = spread_misfit(received, tensor)
                if reason is not None:
                    misfits[prefix + key] = reason
        missing, unexpected = list[str](), list[str]()
        if self._strict:
            other_entries = target.other_entries
            missing = [
                prefix + key for key in absent if key in other_entries and target.is_required(key)
            ]
            unexpected = [prefix + key for key in entries if target.refuses_extra_state(key)]
        if misfits or missing or unexpected:
            lines = [f"{shortened(name)}: {why}" for name, why in misfits.items()]
            raise self._refused(
                "",
                "\n    ".join(["", *lines, *_absent(missing, unexpected)]),
                missing,
                unexpected,
                misfits,
                verb="cannot load the entries of the message",
            )

    @property
    def has_steps(self) -> bool:
        """Whether there are submodules to load."""
        return bool(self._paths)

    def keep_state(self) -> None:
        """Keep the entries of submodules other than tensors; call it before these change."""
        with self._refusing(""):
            self._before, self._versions = self._current()
        self._lazy = self._lazy_ones()

    def steps(self) -> Iterator[None]:
        """Load the entries; between two steps, other tasks may run.

        Raises:
            MismatchError: A submodule refuses an entry, or raises an error.
        """
        missing, unexpected, errors = list(self._missing), list[str](), list[str]()
        yield from self._load("", missing, unexpected, errors)
        prefix = self._target.prefix
        other_entries = self._target.other_entries
        missing = [prefix + key for key in missing if prefix + key in self._wanted]
        missing = missing if self._strict else []
        unexpected = [prefix + key for key in unexpected if self._strict or key in other_entries]
        if missing or unexpected or errors:
            lines = [
                *errors,
                *_absent(missing, unexpected),
            ]
            raise self._refused("", "\n    ".join(["", *lines]), missing, unexpected)

    def _load(
        self, path: str, missing: list[str], unexpected: list[str], errors: list[str]
    ) -> Iterator[None]:
        """Load a submodule and those in it, as ``load`` in torch's ``load_state_dict`` does."""
        target = self._target
        submodule, called = target.submodule(path), path in self._paths
        if called:
            self._called.append(path)
            state = self._state_of(path, self._entries)
            with self._refusing(path):
                self._call(path, state, self._metadata, missing, unexpected, errors)
            if state.touched:
                owners = self._entries.take_over(path, state) - {path}
                self._paths = self._paths | owners
                self._visited |= target.with_those_above(owners)
            yield
        for name, _ in torch_private_modules.children_of(submodule):
            below = f"{path}.{name}" if path else name
            if below in self._visited:
                yield from self._load(below, missing, unexpected, errors)
        if called:
            with self._refusing(path):
                torch_private_modules.run_load_post_hooks(submodule, missing, unexpected)

    def _state_of(self, path: str, entries: Entries) -> StateDict:
        copies = torch_private_modules.reads_copies(self._target.submodule(path))
        return StateDict(entries.below(path), self._target.tensors, copies=copies)

    def _call(
        self, path: str, state: StateDict, versions: Mapping[str, Any], *found: list[str]
    ) -> None:
        submodule = self._target.submodule(path)
        tensors = torch_private_modules.persistent_tensors(submodule).values()
        inference = any(not _is_lazy(each) and each.is_inference() for each in tensors)
        with torch.inference_mode() if inference else contextlib.nullcontext():
            prefix = path + "." if path else ""
            version = versions.get(path, {})
            torch_private_modules.load_from_state_dict(submodule, state, prefix, version, *found)

    @contextmanager
    def _refusing(self, path: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # The caller's code can raise anything; the error here names the submodule.
            raise self._refused(path, f": {type(error).__name__}: {error}") from error

    def _refused(
        self,
        path: str,
        why: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misfits: Mapping[str, str] | None = None,
        *,
        verb: str = "did not load the received entries",
    ) -> MismatchError:
        where = shortened(self._target.prefix + path).removesuffix(".")
        kind = type(self._target.submodule(path)).__name__
        written = "" if self._staged else WRITTEN
        self._first_error = f"{where or 'the module'} ({kind}) {verb}"
        self._first_error += written + why
        return MismatchError(
            self._first_error,
            entry=where or None,
            missing=list(missing),
            unexpected=list(unexpected),
            misfits=misfits,
        )

    def _current(self) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Return the entries of the module, and the versions of its submodules."""
        target = self._target
        shown: Any = target.module.state_dict(keep_vars=True)
        state: dict[str, Any] = {}
        for key, value in shown.items():
            if key in target.tensors:
                state[key] = IN_PLACE
            elif not _is_lazy(value):
                state[key] = _copied(value)
        return state, without_mark(getattr(shown, "_metadata", None)) or {}

    def _lazy_ones(self) -> list[str]:
        target = self._target
        return [
            f"{path}.{name}".lstrip(".")
            for path in self._paths
            for name, tensor in torch_private_modules.persistent_tensors(
                target.submodule(path)
            ).items()
            if _is_lazy(tensor)
        ]

    def restore(self) -> None:
        """Load the earlier entries again; nothing happens if no submodule was loaded.

        It runs in the caller's thread, after the tensors were restored, if the load is staged.

        Raises:
            MismatchError: A submodule did not load its earlier entries; the error names all entries
                that are neither as before nor as in the message.
        """
        called = list(dict.fromkeys(self._called))
        if not called:
            return
        target = self._target
        before = Entries(self._before, target.owner)
        failed: dict[str, str] = {}
        for path in called:
            state, errors = self._state_of(path, before), list[str]()
            try:
                self._call(path, state, self._versions, [], [], errors)
                torch_private_modules.run_load_post_hooks(target.submodule(path), [], [])
            except Exception as error:
                # The caller's code can raise anything. The other submodules are restored all the
                # same, and the error is reported if an entry is not as before.
                errors.append(f"{type(error).__name__}: {error}")
            if errors:
                failed[path] = errors[0]
        # Cleared last, so that all of it is repeated after an interrupt.
        self._called = []
        lines = self._not_as_before(failed)
        if lines:
            raise MismatchError(
                "half applied: these entries are not as they were before the load"
                + "".join(f"\n    {line}" for line in lines)
                + f"\nThe load failed with: {self._first_error}"
            )

    def _not_as_before(self, failed: Mapping[str, str]) -> list[str]:
        """Return lines for the entries that are not as before, with the errors of their owners."""
        target, prefix = self._target, self._target.prefix
        try:
            now, _ = self._current()
        except Exception as error:
            # The caller's code failed again, so the state is unknown, and the error says so.
            return [f"{prefix[:-1]}: {type(error).__name__}: {error}"]
        still = set(self._lazy_ones())
        lines = [f"{prefix}{key}: it has memory now" for key in self._lazy if key not in still]
        for key, value in self._before.items():
            why = failed.get(target.owner(key), "")
            same = value is IN_PLACE or _same(value, now.get(key, NOTHING))
            # A value that cannot be compared counts as restored, unless its owner failed.
            if same is False or (same is None and why):
                lines.append(f"{prefix}{key}: {why or 'another value'}")
        return lines


def _absent(missing: Iterable[str], unexpected: Iterable[str]) -> Iterator[str]:
    """Yield lines of an error."""
    yield from (f"not in the message: {shortened(name)}" for name in missing)
    yield from (f"not in the target: {shortened(name)}" for name in unexpected)


def is_extra_state(key: object) -> bool:
    """Whether an entry has the name of extra state, for an existing submodule or not."""
    # There can be half a million keys, so the fastest test comes first.
    return (
        isinstance(key, str) and key.endswith(EXTRA_STATE) and key.rpartition(".")[2] == EXTRA_STATE
    )


def _is_lazy(value: object) -> bool:
    return isinstance(value, torch.Tensor) and torch.nn.parameter.is_lazy(value)


def _copied(value: Any) -> Any:
    # deepcopy would make torch warn of the copies that it makes of quantized tensors.
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return copy.deepcopy(value)


def _same(one: Any, other: Any) -> bool | None:
    """Whether two values are the same; None if they cannot be compared."""
    if type(one) is not type(other):
        return False
    if type(one) is dict:
        if one.keys() != other.keys():
            return False
        one, other = list(one.values()), list(other.values())
    if type(one) in (list, tuple):
        if len(one) != len(other):
            return False
        found = [_same(*pair) for pair in zip(one, other, strict=True)]
        return False if False in found else None if None in found else True
    try:
        if isinstance(one, torch.Tensor):
            if (one.shape, one.dtype, one.layout) != (other.shape, other.dtype, other.layout):
                return False
            return bool(((one == other) | ((one != one) & (other != other))).all())
        return bool(one == other)
    except Exception:
        # Comparisons in code of the caller can raise anything.
        return None
