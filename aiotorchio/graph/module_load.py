"""What a module loads beside its tensors: the last part of a commit.

In: a ``ModuleDestination`` whose tensors have their new numbers, and the object that was received.
Out: its submodules have loaded what belongs to them, or ``undo`` lets them load what they had.
``transfer`` makes it a part of the commit of a message.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from aiotorchio.errors import MismatchError
from aiotorchio.graph import _torch
from aiotorchio.graph.metadata import without_mark
from aiotorchio.graph.modules import EXTRA_STATE, ModuleDestination, beginnings
from aiotorchio.interrupt import interruptible
from aiotorchio.wire.header import shortened

__all__ = ["ModuleLoad"]


class ModuleLoad:
    """Gives one module what was received for it; the last part of a commit.

    Args:
        destination: Whose ``tensors`` have their new numbers when this is used.
        received: The object that was received.
        names: Those of its tensors, as far as they are wanted.
        wanted: Whether a name counts.
        strict: Whether an entry may be missing, or unexpected.
        staged: Whether the tensors can be had back.
    """

    def __init__(
        self,
        destination: ModuleDestination,
        received: Any,
        names: Iterable[str],
        wanted: Container[str],
        *,
        strict: bool,
        staged: bool,
    ) -> None:
        self._destination = destination
        self._wanted, self._strict, self._staged = wanted, strict, staged
        prefix = destination.prefix
        find = _Find()
        root = find(received, prefix[:-1]) if prefix else received
        # Full pickle may have brought the mark.
        self._metadata: Mapping[str, Any] = without_mark(getattr(root, "_metadata", None)) or {}
        # The submodules that have something to do.
        self._paths: set[str] = set()
        self._called: list[str] = []
        self._before: dict[str, Any] = {}
        self._visited: set[str] = set()
        keys = [
            name.removeprefix(prefix) for name in interruptible(names) if name.startswith(prefix)
        ]
        others = [key for key in keys if key not in destination.tensors]
        # Those of the tensors are taken when they have their new numbers, and maybe other memory.
        self._state: dict[str, Any] = dict.fromkeys(
            key for key in keys if key in destination.tensors
        )
        # Extra state that nobody takes is to be found out, too.
        entries = [*destination.others, *_extra_states(root)]
        others = [key for key in interruptible(others) if destination.entry(key) is None]
        for key in interruptible([*others, *(key for key in entries if prefix + key in wanted)]):
            value = find(root, key)
            if value is not _NOTHING:
                self._state[key] = value
                self._paths.add(destination.owner(key))
        owners = {destination.owner(key) for key in interruptible(self._state)}
        self._paths |= destination.active & destination.with_those_above(owners)
        if strict:
            self._paths |= {
                destination.owner(key)
                for key in destination.tensors
                if key not in self._state and prefix + key in wanted
            }

    @property
    def has_steps(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._paths)

    def steps(self) -> Iterator[None]:
        """Load; between two steps, other tasks may run.

        Raises:
            MismatchError: A submodule refuses what was received, or raises an error.
        """
        self._before = self._current()
        self._visited = self._destination.with_those_above(self._paths)
        missing: list[str] = []
        unexpected: list[str] = []
        errors: list[str] = []
        tensors = self._destination.tensors
        state: OrderedDict[str, Any] = OrderedDict(
            (key, tensors[key].detach() if key in tensors else value)
            for key, value in self._state.items()
        )
        for _ in self._load("", state, missing, unexpected, errors):
            yield
        prefix = self._destination.prefix
        missing = [prefix + key for key in missing if prefix + key in self._wanted]
        others = self._destination.others
        unexpected = [prefix + key for key in unexpected if self._strict or key in others]
        missing = missing if self._strict else []
        if missing or unexpected or errors:
            lines = [
                *errors,
                *(f"not in the message: {shortened(name)}" for name in missing),
                *(f"not in the destination: {shortened(name)}" for name in unexpected),
            ]
            raise self._refused("", "\n    ".join(["", *lines]), missing, unexpected)

    def _load(
        self,
        path: str,
        state: OrderedDict[str, Any],
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> Iterator[None]:
        """As the function of that name in ``torch.nn.Module.load_state_dict``."""
        submodule = self._destination.submodule(path)
        called = path in self._paths
        if called:
            before = dict(state)
            self._call(path, state, missing, unexpected, errors)
            changed = [key for key in {**before, **state} if before.get(key) is not state.get(key)]
            self._paths |= {self._destination.owner(key) for key in changed} - {path}
            self._visited = self._destination.with_those_above(self._paths)
            yield
        for name, child in submodule._modules.items():
            below = f"{path}.{name}" if path else name
            if child is not None and below in self._visited:
                part = OrderedDict(
                    (key, value) for key, value in state.items() if key.startswith(below + ".")
                )
                yield from self._load(below, part, missing, unexpected, errors)
        if called:
            with self._refusing(path):
                _torch.run_load_post_hooks(submodule, missing, unexpected)

    def _call(
        self,
        path: str,
        state: OrderedDict[str, Any],
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        self._called.append(path)
        with self._refusing(path):
            _torch.load_from_state_dict(
                self._destination.submodule(path),
                state,
                path + "." if path else "",
                self._metadata.get(path, {}),
                missing,
                unexpected,
                errors,
            )

    @contextmanager
    def _refusing(self, path: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise self._refused(path, f": {type(error).__name__}: {error}") from error

    def _refused(
        self, path: str, why: str, missing: Sequence[str] = (), unexpected: Sequence[str] = ()
    ) -> MismatchError:
        where = shortened(self._destination.prefix + path).removesuffix(".")
        kind = type(self._destination.submodule(path)).__name__
        kept = "" if self._staged else " (its tensors are written to: staged=True keeps them)"
        return MismatchError(
            f"{where or 'the module'} ({kind}) did not load what was received{kept}{why}",
            entry=where or None,
            missing=list(missing),
            unexpected=list(unexpected),
        )

    def _current(self) -> dict[str, Any]:
        """The state of the module, with nothing for the tensors that are received into."""
        destination = self._destination
        state: dict[str, Any] = {}
        for key, value in destination.module.state_dict(keep_vars=True).items():
            if key in destination.tensors:
                state[key] = None
            elif destination.owner(key) in self._paths and not _is_lazy(value):
                state[key] = _copied(value)
        return state

    def undo(self) -> None:
        """Load what was there before, as far as something was loaded; without effect otherwise.

        Raises:
            MismatchError: A submodule does not take back what it had: names all that are neither
                as before nor as in the message.
        """
        called, self._called = dict.fromkeys(self._called), []
        failed: list[str] = []
        tensors = self._destination.tensors
        for path in called:
            errors: list[str] = []
            # Tensors as they are now: they may have been swapped back to other memory.
            state = OrderedDict(
                (key, tensors[key].detach() if key in tensors else value)
                for key, value in self._before.items()
                if _is_below(key, path)
            )
            try:
                self._call(path, state, [], [], errors)
                _torch.run_load_post_hooks(self._destination.submodule(path), [], [])
            except MismatchError as error:
                errors.append(str(error))
            failed += [f"{self._destination.prefix}{path}: {why}" for why in errors[:1]]
        self._called = []
        if failed:
            raise MismatchError(
                "half applied: these modules did not take back what they had"
                + "".join(f"\n    {line}" for line in failed)
            )


class _Nothing:
    pass


_NOTHING = _Nothing()


class _Find:
    """Looks things up in nested dicts, lists and tuples by their names."""

    def __init__(self) -> None:
        # Lengths of the keys of each dict. A peer chooses keys and names: with any number of dots.
        self._lengths: dict[int, list[int]] = {}

    def __call__(self, value: Any, name: str) -> Any:
        """What is under a name; _NOTHING if nothing is."""
        while name:
            if isinstance(value, list | tuple):
                key, _, name = name.partition(".")
                if not key.isdecimal() or len(key) > 9 or int(key) >= len(value):
                    return _NOTHING
                value = value[int(key)]
                continue
            if not isinstance(value, Mapping):
                return _NOTHING
            if name in value:
                return value[name]
            lengths = self._lengths_of(value)
            first = next((each for each in beginnings(name, lengths) if each in value), None)
            if first is None:
                return _NOTHING
            value, name = value[first], name[len(first) + 1 :]
        return value

    def _lengths_of(self, value: Mapping[Any, Any]) -> list[int]:
        lengths = self._lengths.get(id(value))
        if lengths is None:
            lengths = sorted({len(key) for key in value if isinstance(key, str)})
            self._lengths[id(value)] = lengths
        return lengths


def _extra_states(root: Any) -> list[str]:
    """Entries that are extra state for somebody, whether or not there is one who takes it."""
    if not isinstance(root, Mapping):
        return []
    return [key for key in root if isinstance(key, str) and key.rpartition(".")[2] == EXTRA_STATE]


def _is_below(path: str, other: str) -> bool:
    return not other or path == other or path.startswith(other + ".")


def _is_lazy(value: object) -> bool:
    return isinstance(value, torch.Tensor) and torch.nn.parameter.is_lazy(value)


def _copied(value: Any) -> Any:
    # Not by deepcopy alone: torch warns of its own copies of quantized tensors.
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return copy.deepcopy(value)
