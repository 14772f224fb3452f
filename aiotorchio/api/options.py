"""The options of saving and loading: checked once, for every public function that takes them."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import AsyncIterable, Generator, Iterable, Mapping
from importlib.metadata import version
from types import AsyncGeneratorType, GeneratorType
from typing import Any, TypedDict

import torch

from aiotorchio.codecs.pickled.allowlist import paths_of
from aiotorchio.common.torch_private import real_tensors, skipped_data
from aiotorchio.engine.receive import LoadOptions
from aiotorchio.engine.requests import Progress, Request
from aiotorchio.engine.selection import DoubleBuffer, Into, TensorOptions
from aiotorchio.engine.send import Summary, prepare, send_message, send_streamed
from aiotorchio.engine.snapshot import Snapshot
from aiotorchio.graph.data_free import DataFree, data_free
from aiotorchio.graph.devices import MapLocation
from aiotorchio.graph.flatten import flatten, flatten_specs, is_small
from aiotorchio.graph.select import Select
from aiotorchio.graph.targets import examined
from aiotorchio.limits import Limits
from aiotorchio.memory.device_copy import DeviceCopier
from aiotorchio.table.names import TensorSpec
from aiotorchio.wire.header import ALIGNMENT, CHUNK_SIZE_MIN

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "LoadKeywords",
    "LoadTarget",
    "MessageKeywords",
    "OtherLoadKeywords",
    "OtherSaveKeywords",
    "SaveKeywords",
    "StreamSaveKeywords",
    "TensorKeywords",
    "check_keywords",
    "check_lock",
    "checked_limits",
    "load_options",
    "outgoing_message",
    "tensor_options",
    "trusted",
]

DEFAULT_CHUNK_SIZE = 4 * 2**20

PRODUCER = f"aiotorchio/{version('aiotorchio')} torch/{torch.__version__}"


LoadTarget = Mapping[str, Any] | torch.nn.Module | DoubleBuffer


class OtherSaveKeywords(TypedDict, total=False):
    """The keyword arguments of ``save_to_stream``, which documents them, but those for pickle."""

    checksum: bool
    chunk_size: int
    metadata: Mapping[str, str] | None
    specs: Mapping[str, TensorSpec | torch.Tensor] | None
    snapshot: bool
    compact: bool
    allow_pickle: bool
    progress: Progress | None


class SaveKeywords(OtherSaveKeywords, total=False):
    """The keyword arguments of ``save_to_stream``."""

    pickle_module: Any
    pickle_protocol: int


class StreamSaveKeywords(SaveKeywords, total=False):
    """Those of a save to a stream of ours, not of an HTTP library."""

    limits: Limits | None


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


def outgoing_message(
    obj: object,
    *,
    checksum: bool = True,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    metadata: Mapping[str, str] | None = None,
    specs: Mapping[str, TensorSpec | torch.Tensor] | None = None,
    snapshot: bool = False,
    compact: bool = False,
    allow_pickle: bool = True,
    progress: Progress | None = None,
    pickle_module: Any = pickle,
    pickle_protocol: int = 2,
) -> Generator[Request, Any, Summary]:
    """Check the options, and return the message, of which nothing is done yet but a snapshot.

    To be called when the caller makes the call: the tensors are sent as what is queued for them on
    a device by then leaves them.

    Raises:
        TypeError: An option of another type.
        ValueError: An option out of its range.
    """
    for option, value in (
        ("checksum", checksum),
        ("snapshot", snapshot),
        ("compact", compact),
        ("allow_pickle", allow_pickle),
    ):
        if not isinstance(value, bool):
            raise TypeError(f"{option} is True or False, not {value!r}")
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
        raise TypeError(f"chunk_size is a number of bytes, not {chunk_size!r}")
    if chunk_size < CHUNK_SIZE_MIN or chunk_size % ALIGNMENT:
        raise ValueError(
            f"chunk_size must be a multiple of {ALIGNMENT} and at least {CHUNK_SIZE_MIN}, "
            f"not {chunk_size}"
        )
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"metadata maps str to str, not {metadata!r}")
    metadata = {} if metadata is None else dict(metadata)
    for pair in metadata.items():
        if not all(isinstance(text, str) for text in pair):
            raise TypeError(f"metadata maps str to str, not {pair!r}")
    if specs is not None:
        if snapshot or compact or skipped_data() is not None:
            raise ValueError("snapshot, compact and skip_data have no meaning with specs")
        header = functools.partial(
            flatten_specs,
            _checked_specs(specs),
            chunk_size=chunk_size,
            metadata=metadata,
            producer=PRODUCER,
        )
        return send_streamed(_iterator(obj), header, checksum=checksum, progress=progress)
    if isinstance(obj, Snapshot):
        if snapshot or compact:
            raise ValueError("snapshot and compact have no meaning for a Snapshot")
        if obj.codec == "pickle" and not allow_pickle:
            raise ValueError("allow_pickle is False, and the snapshot needs pickle")
        make_ready = functools.partial(
            obj.prepared, chunk_size=chunk_size, metadata=metadata, producer=PRODUCER
        )
        return send_message(make_ready, inline=obj.is_small, checksum=checksum, progress=progress)
    if isinstance(obj, GeneratorType | AsyncGeneratorType):
        raise TypeError("an iterator of tensors needs specs, which say what they will be")
    take_apart = functools.partial(
        flatten,
        obj,
        chunk_size=chunk_size,
        metadata=metadata,
        producer=PRODUCER,
        pickle_module=pickle_module,
        pickle_protocol=pickle_protocol,
        allow_pickle=allow_pickle,
        compact=compact,
        skip=skipped_data(),
    )
    if snapshot:
        with real_tensors():
            ready = prepare(take_apart(), _until_now, snapshot=True)
        return send_message(lambda: ready, inline=True, checksum=checksum, progress=progress)
    copier = _until_now()
    return send_message(
        lambda: prepare(take_apart(), lambda: copier),
        # Views of one storage are compared pair by pair.
        inline=is_small(obj) and not compact,
        checksum=checksum,
        progress=progress,
        # What was queued since the call has changed the tensors, and counts.
        start=copier.note,
    )


def _until_now() -> DeviceCopier:
    return DeviceCopier(until_now=True)


def _checked_specs(specs: Mapping[str, TensorSpec | torch.Tensor]) -> dict[str, TensorSpec]:
    if not isinstance(specs, Mapping):
        raise TypeError(
            f"specs maps names to TensorSpec or tensors; it is no {type(specs).__name__}"
        )
    checked = {}
    for name, spec in specs.items():
        if not isinstance(name, str) or not isinstance(spec, TensorSpec | torch.Tensor):
            raise TypeError(f"specs maps names to TensorSpec or tensors, not {name!r} to {spec!r}")
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"the header is UTF-8, which cannot carry the name {name!r}")
        # A plain str: subclasses, such as numpy's, would have to be pickled.
        checked[str(name)] = TensorSpec.of(spec) if isinstance(spec, torch.Tensor) else spec
    return checked


def _iterator(pairs: Any) -> Any:
    if isinstance(pairs, Mapping):
        pairs = pairs.items()
    if isinstance(pairs, AsyncIterable):
        return aiter(pairs)
    if isinstance(pairs, Iterable):
        return iter(pairs)
    raise TypeError(f"specs needs an iterable of names and tensors, not {type(pairs).__name__}")


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
