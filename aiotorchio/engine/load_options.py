"""The options of a load, checked in one place and handed down whole.

Public functions make a ``LoadOptions`` or ``IterateOptions`` in the caller's thread, when the call
is made (``Message.load`` and ``tensors_sync``: when it first runs): then ``skip_data``, a
``FakeTensorMode`` and torch's own list of safe globals count. After that, every part of the engine
reads the fields. A ``TypeError`` or ``ValueError`` from here is a mistake of the caller, and
nothing was received yet.

A new option is one field here, one line in ``LoadKeywords``, and one parameter of
``load_from_stream``, which documents it and hands it on in its last lines. A switch also joins the
list in ``__post_init__``.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import torch

from aiotorchio.codecs.pickled.allowlist import paths_of
from aiotorchio.engine.requests import Progress
from aiotorchio.engine.selection import DoubleBuffer, LoadTarget, Targets
from aiotorchio.graph.data_free import DataFree, data_free
from aiotorchio.graph.devices import MapLocation
from aiotorchio.graph.select import Select

__all__ = ["IterateOptions", "LoadKeywords", "LoadOptions", "trusted"]


class LoadKeywords(TypedDict, total=False):
    """Types of the options that ``load``, ``Message.load`` and ``StreamReader.load`` pass on.

    ``map_location`` and ``pickle_module`` are parameters of these functions.
    """

    select: Select | None
    progress: Progress | None
    weights_only: bool | None
    allow_pickle: bool
    safe_globals: Iterable[Any]
    into: LoadTarget | None
    strict: bool
    cast: bool
    staged: bool
    lock: Any
    encoding: str


# Sets a field of a frozen dataclass while it is made.
_set = object.__setattr__


@dataclass(frozen=True, slots=True, kw_only=True)
class IterateOptions:
    """The options of ``Message.iterate``, which every load has, too.

    ``load_from_stream`` documents them.

    Attributes:
        allowed_globals: ``safe_globals`` with those of ``torch.serialization.add_safe_globals``.
        data_free: The kind of tensors without numbers that this thread asks for; None: numbers.

    Raises:
        TypeError: An option of another type.
        ValueError: A callable ``map_location`` inside of a ``FakeTensorMode``.
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
                "map_location cannot be a callable inside of FakeTensorMode, whose storages have "
                "no memory: pass a device or a dict"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions(IterateOptions):
    """The options of a load, but ``limits``, which belongs to the message.

    Attributes:
        weights_only: None is the default of ``torch.load``, and becomes True.
        pickle_module: None becomes ``pickle``.
        targets: The tensors and modules of ``into``.

    Raises:
        TypeError: An option of another type.
        ValueError: An option that would have no effect, or ``into`` with two tensors of one name.
    """

    weights_only: bool = True
    allow_pickle: bool = True
    into: LoadTarget | None = None
    strict: bool = True
    cast: bool = False
    staged: bool = False
    lock: Any = None
    pickle_module: Any = None
    encoding: str = "utf-8"
    targets: Targets | None = field(init=False)

    def __post_init__(self) -> None:
        weights_only: bool | None = self.weights_only
        if weights_only is None:
            _set(self, "weights_only", True)
        for option in ("weights_only", "allow_pickle", "strict", "cast", "staged"):
            value = getattr(self, option)
            if not isinstance(value, bool):
                raise TypeError(f"{option} must be True or False, not {value!r}")
        if not self.weights_only and _weights_only_is_forced():
            _set(self, "weights_only", True)
        if self.weights_only and self.pickle_module is not None:
            raise ValueError(
                "Can not safely load weights when explicit pickle_module is specified: "
                "weights_only=True would not use it"
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
                "into cannot be used inside of skip_data or FakeTensorMode, where tensors get no "
                "numbers"
            )
        targets = None
        if self.into is not None:
            targets = Targets.of(self.into, strict=self.strict, cast=self.cast, staged=self.staged)
        _set(self, "targets", targets)

    @classmethod
    def of_call(
        cls, function: str, kind: Literal["async", "blocking"], /, **options: Any
    ) -> LoadOptions:
        """Check the options of a call of a public function.

        Args:
            function: Its name, for the error.
            kind: Whether it is a coroutine, which decides what ``lock`` must be.
            options: As the caller gave them.

        Raises:
            TypeError: An option that does not exist, or of another type.
            ValueError: As ``LoadOptions``.
        """
        for name in options:
            if name not in _NAMES:
                raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        checked = cls(**options)
        _check_lock(checked.lock, kind)
        return checked


_NAMES = {name for name, each in LoadOptions.__dataclass_fields__.items() if each.init}


def _check_lock(lock: Any, kind: Literal["async", "blocking"]) -> None:
    if lock is None:
        return
    if kind == "blocking" and not hasattr(lock, "__enter__"):
        raise TypeError(
            "lock of a blocking load must be a context manager, such as threading.Lock(), not "
            f"{type(lock).__name__}"
        )
    if kind == "async" and not hasattr(lock, "__aenter__"):
        raise TypeError(
            "lock of an async load must be an async context manager, such as asyncio.Lock(), not "
            f"{type(lock).__name__}"
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
