"""The options of a load, and the limits of every call: checked here for all public functions."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import torch

from aiotorchio.codecs.pickled.allowlist import paths_of
from aiotorchio.engine.receive import LoadOptions
from aiotorchio.engine.requests import Progress
from aiotorchio.engine.selection import DoubleBuffer, Into, TensorOptions
from aiotorchio.graph.data_free import DataFree, data_free
from aiotorchio.graph.devices import MapLocation
from aiotorchio.graph.select import Select
from aiotorchio.graph.targets import examined
from aiotorchio.limits import Limits

__all__ = [
    "LoadKeywords",
    "LoadTarget",
    "MessageKeywords",
    "OtherLoadKeywords",
    "TensorKeywords",
    "check_keywords",
    "check_lock",
    "checked_limits",
    "load_options",
    "tensor_options",
    "trusted",
]


LoadTarget = Mapping[str, Any] | torch.nn.Module | DoubleBuffer


class TensorKeywords(TypedDict, total=False):
    """The keyword arguments of ``Message.iterate``, which documents them."""

    map_location: MapLocation
    select: Select | None
    progress: Progress | None
    safe_globals: Iterable[Any]


class OtherLoadKeywords(TypedDict, total=False):
    """Those of ``load_from_stream``, which documents them, but what ``load`` takes by position."""

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


class MessageKeywords(OtherLoadKeywords, total=False):
    """The keyword arguments of ``Message.load``; ``load_from_stream`` documents them."""

    map_location: MapLocation
    pickle_module: Any


class LoadKeywords(MessageKeywords, total=False):
    """The keyword arguments of ``load_from_stream``, which documents them."""

    limits: Limits | None


def check_keywords(function: str, given: Mapping[str, object], known: type) -> None:
    """Refuse keyword arguments as Python does, in the name of a public function.

    Args:
        function: Its name.
        given: The arguments.
        known: The ``TypedDict`` of those that there are.

    Raises:
        TypeError: One that there is not.
    """
    for name in given:
        if name not in known.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def tensor_options(
    *,
    map_location: MapLocation = None,
    select: Select | None = None,
    progress: Progress | None = None,
    safe_globals: Iterable[Any] = (),
) -> TensorOptions:
    """Gather the options."""
    return TensorOptions(
        map_location=map_location,
        select=_reusable(select),
        progress=progress,
        data_free=_data_free(map_location),
        safe_globals=trusted(safe_globals),
    )


def load_options(
    *,
    map_location: MapLocation = None,
    weights_only: bool | None = True,
    allow_pickle: bool = True,
    safe_globals: Iterable[Any] = (),
    into: LoadTarget | None = None,
    strict: bool = True,
    cast: bool = False,
    staged: bool = False,
    lock: Any = None,
    select: Select | None = None,
    progress: Progress | None = None,
    pickle_module: Any = None,
    encoding: str = "utf-8",
) -> LoadOptions:
    """Check the options.

    Raises:
        TypeError: An option of another type.
        ValueError: An option that would have no effect, or ``into`` with two tensors of one name.
    """
    # None is the default of torch.load, and means the same.
    weights_only = True if weights_only is None else weights_only
    for option, value in (
        ("weights_only", weights_only),
        ("allow_pickle", allow_pickle),
        ("strict", strict),
        ("cast", cast),
        ("staged", staged),
    ):
        if not isinstance(value, bool):
            raise TypeError(f"{option} is True or False, not {value!r}")
    weights_only = weights_only or _weights_only_is_forced()
    if weights_only and pickle_module is not None:
        raise ValueError(
            "Can not safely load weights when explicit pickle_module is specified: "
            "weights_only=True would not use it"
        )
    if into is None and (not strict or staged or cast or lock is not None):
        raise ValueError("strict, cast, staged and lock have no meaning without into")
    if lock is not None and not staged and not isinstance(into, DoubleBuffer):
        raise ValueError("lock has no meaning without staged=True or a DoubleBuffer")
    without_numbers = _data_free(map_location)
    if without_numbers is not None and into is not None:
        raise ValueError("into has no meaning inside of skip_data or FakeTensorMode")
    return LoadOptions(
        map_location=map_location,
        weights_only=weights_only,
        allow_pickle=allow_pickle,
        safe_globals=trusted(safe_globals),
        into=None if into is None else _into(into, strict=strict, cast=cast, staged=staged),
        lock=lock,
        select=_reusable(select),
        progress=progress,
        data_free=without_numbers,
        pickle_module=pickle if pickle_module is None else pickle_module,
        encoding=encoding,
    )


def check_lock(lock: Any, *, blocking: bool) -> None:
    """Check what is to be held while destinations change.

    Raises:
        TypeError: A lock of the other world.
    """
    if blocking and lock is not None and not hasattr(lock, "__enter__"):
        raise TypeError(
            f"lock is a context manager, such as threading.Lock(), not {type(lock).__name__}"
        )
    if not blocking and lock is not None and not hasattr(lock, "__aenter__"):
        raise TypeError(
            f"lock is an async context manager, such as asyncio.Lock(), not {type(lock).__name__}"
        )


def checked_limits(limits: Limits | None) -> Limits:
    """The limits to go by.

    Raises:
        TypeError: Not ``Limits``.
    """
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"limits must be Limits, not {limits!r}")
    return _default_limits() if limits is None else limits


# Each call has them, and they are checked field by field when they are made.
_default_limits = functools.cache(Limits)


def _into(into: LoadTarget, *, strict: bool, cast: bool, staged: bool) -> Into:
    back = into.memory if isinstance(into, DoubleBuffer) else None
    destination = into.destination if isinstance(into, DoubleBuffer) else into
    tensors, modules = examined(destination)
    return Into(tensors, modules, strict, cast, staged, back)


def _reusable(select: Select | None) -> Select | None:
    """Checked in part, and no iterator that can be gone through only once."""
    if select is None or isinstance(select, str) or callable(select):
        return select
    if not isinstance(select, Iterable):
        raise TypeError(f"select is names, patterns or a predicate, not {select!r}")
    patterns = tuple(select)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"select is names, patterns or a predicate, not {select!r}")
    return patterns


def trusted(safe_globals: Iterable[Any]) -> tuple[Any, ...]:
    """What pickles may name beyond the built-in allowlist: as of now, whoever changes it later.

    Raises:
        TypeError: Not a list of classes, functions, and pairs of one and its path.
    """
    if isinstance(safe_globals, type) or not isinstance(safe_globals, Iterable):
        raise TypeError(f"safe_globals is a list of classes and functions, not {safe_globals!r}")
    given = tuple(safe_globals)
    paths_of(given)
    return *torch.serialization.get_safe_globals(), *given


def _data_free(map_location: MapLocation) -> DataFree | None:
    wanted = data_free()
    if wanted is not None and wanted.fake_mode is not None and callable(map_location):
        raise ValueError("a callable map_location has nothing to place inside of FakeTensorMode")
    return wanted


def _weights_only_is_forced() -> bool:
    """As in ``torch.load``: whoever runs a process can forbid it to run what is in pickles.

    The other variable that ``torch.load`` knows is not for us: it turns that on.
    """
    forced = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    return forced.lower() in ("1", "y", "yes", "true")
