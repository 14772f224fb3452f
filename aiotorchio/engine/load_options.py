"""The options of a load, checked in one place and handed down whole.

Each public function that loads makes a ``LoadOptions`` or ``IterateOptions`` from its arguments, in
the caller's thread, before anything is received: then ``skip_data``, a ``FakeTensorMode`` and
torch's list of safe globals count. After that, the engine reads the fields, those of ``into`` from
``selection.Targets``. A ``TypeError`` or
``ValueError`` from here is a mistake of the caller. ``limits`` is no field: a message is opened
with them, before its load has options.

A new option is one field here (with a check in ``__post_init__``, unless it is a bool) and the same
parameter of each public function: ``load_from_stream``, which documents it, ``load``,
``Message.load`` and ``StreamReader.load``; of ``IterateOptions`` also ``Message.iterate`` and
``tensors_sync``. docs/guide/reference.md has a row for it. Three modules of ``graph`` decide what a
missing or unexpected name does: ``targets`` for rows, ``tensor_load`` for composite targets,
``module_load`` for entries of modules.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from aiotorchio.codecs.pickled.allowlist import paths_of
from aiotorchio.engine.call_options import CallOptions, switches
from aiotorchio.engine.requests import Progress
from aiotorchio.engine.selection import DoubleBuffer, LoadTarget, Targets
from aiotorchio.graph.data_free import DataFree, data_free
from aiotorchio.graph.devices import MapLocation
from aiotorchio.graph.select import Select

__all__ = ["IterateOptions", "LoadOptions", "check_lock", "trusted"]

# Sets a field of a frozen dataclass while it is made.
_set = object.__setattr__


@dataclass(frozen=True, slots=True, kw_only=True)
class IterateOptions(CallOptions):
    """The options of ``Message.iterate``, which every load has, too.

    ``load_from_stream`` documents them.

    Attributes:
        allowed_globals: ``safe_globals`` with those of ``torch.serialization.add_safe_globals``.
        data_free: The kind of tensors without numbers that this thread asks for; None: numbers.

    Raises:
        TypeError: An option of another type.
        ValueError: A callable ``map_location`` inside a ``FakeTensorMode``.
    """

    map_location: MapLocation = None
    select: Select | None = None
    progress: Progress | None = None
    safe_globals: Iterable[Any] = ()
    allowed_globals: tuple[Any, ...] = field(init=False)
    data_free: DataFree | None = field(init=False)

    def __post_init__(self) -> None:
        _set(self, "select", _reusable(self.select))
        _set(self, "allowed_globals", trusted(self.safe_globals))
        without_numbers = data_free()
        _set(self, "data_free", without_numbers)
        is_fake = without_numbers is not None and without_numbers.fake_mode is not None
        if is_fake and callable(self.map_location):
            raise ValueError(
                "map_location cannot be a callable inside FakeTensorMode, whose storages have "
                "no memory: pass a device or a dict"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions(IterateOptions):
    """The options of a load, which ``load_from_stream`` documents.

    Attributes:
        pickle_module: None becomes ``pickle``.
        restricted: Whether pickles are rebuilt from the allowlist only: ``weights_only``, or True
            if the environment forces it.
        targets: The tensors and modules of ``into``.

    Raises:
        TypeError: An option of another type.
        ValueError: An option that would have no effect, or ``into`` with two tensors of one name.
    """

    weights_only: bool | None = True
    allow_pickle: bool = True
    into: LoadTarget | None = None
    strict: bool = True
    cast: bool = False
    staged: bool = False
    lock: Any = None
    pickle_module: Any = None
    encoding: str = "utf-8"
    restricted: bool = field(init=False)
    targets: Targets | None = field(init=False)

    def __post_init__(self) -> None:
        # None is the default of torch.load, and means True.
        weights_only = True if self.weights_only is None else self.weights_only
        switches = [(name, getattr(self, name)) for name in _SWITCHES]
        for option, value in [("weights_only", weights_only), *switches]:
            if not isinstance(value, bool):
                raise TypeError(f"{option} must be True or False, not {value!r}")
        _set(self, "restricted", weights_only or _weights_only_is_forced())
        if self.restricted and self.pickle_module is not None:
            raise ValueError(
                "Can not safely load weights when explicit pickle_module is specified: "
                + (
                    "weights_only=True, the default, does not use a pickle_module"
                    if weights_only
                    else "the environment variable TORCH_FORCE_WEIGHTS_ONLY_LOAD forces "
                    "weights_only=True, which does not use a pickle_module"
                )
            )
        if self.pickle_module is None:
            _set(self, "pickle_module", pickle)
        if self.into is None:
            if not self.strict or self.cast or self.staged or self.lock is not None:
                raise ValueError("strict, cast, staged and lock have no effect without into")
        elif self.lock is not None and not self.staged and not isinstance(self.into, DoubleBuffer):
            raise ValueError("lock has no effect without staged=True or a DoubleBuffer")
        # Slots and zero-argument super() exclude each other in Python 3.11 to 3.13.
        IterateOptions.__post_init__(self)
        if self.data_free is not None and self.into is not None:
            raise ValueError(
                "into cannot be used inside skip_data or FakeTensorMode, where tensors get no "
                "numbers"
            )
        targets = None
        if self.into is not None:
            targets = Targets.of(self.into, strict=self.strict, cast=self.cast, staged=self.staged)
        _set(self, "targets", targets)


_SWITCHES = switches(LoadOptions)


def check_lock(lock: Any, kind: Literal["async", "blocking"]) -> None:
    """Check that a call can hold a lock.

    Raises:
        TypeError: A lock of the other kind of call.
    """
    if kind == "blocking" and lock is not None and not hasattr(type(lock), "__enter__"):
        raise TypeError(
            "lock of a blocking load must be a context manager, such as threading.Lock(), not "
            f"{lock!r}"
        )
    if kind == "async" and lock is not None and not hasattr(type(lock), "__aenter__"):
        raise TypeError(
            "lock of an async load must be an async context manager, such as asyncio.Lock(), not "
            f"{lock!r}"
        )


def _reusable(select: Select | None) -> Select | None:
    """A selection that can be read several times: an iterable becomes a tuple of patterns."""
    if select is None or isinstance(select, str) or callable(select):
        return select
    patterns = tuple(select) if isinstance(select, Iterable) else ()
    if not isinstance(select, Iterable) or not all(isinstance(each, str) for each in patterns):
        raise TypeError(
            f"select must be names, patterns or a predicate (a function of a name), not {select!r}"
        )
    return patterns


def trusted(safe_globals: Iterable[Any]) -> tuple[Any, ...]:
    """List the classes and functions that a pickle may name beyond the built-in allowlist.

    The list is that of torch as it is now, with the caller's own entries at the end.

    Raises:
        TypeError: Not a list of classes, functions, and pairs of one and its path.
    """
    if isinstance(safe_globals, type) or not isinstance(safe_globals, Iterable):
        raise TypeError(
            f"safe_globals must be a list of classes and functions, not {safe_globals!r}"
        )
    given = tuple(safe_globals)
    paths_of(given)
    return *torch.serialization.get_safe_globals(), *given


def _weights_only_is_forced() -> bool:
    """Whether the environment forbids this process to run code of pickles, as in ``torch.load``.

    The other variable that ``torch.load`` reads, which turns ``weights_only`` off, has no effect.
    """
    forced = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    return forced.lower() in ("1", "y", "yes", "true")
