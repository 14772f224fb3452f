"""The options of saving and loading: checked once, for every public function that takes them."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Generator, Iterable, Mapping
from importlib.metadata import version
from typing import Any, TypedDict

import torch

from aiotorchio.drive import Request
from aiotorchio.graph.flatten import flatten, is_small
from aiotorchio.graph.location import MapLocation
from aiotorchio.transfer import LoadOptions, Progress, Summary, send_message
from aiotorchio.wire.header import ALIGNMENT, CHUNK_SIZE_MIN
from aiotorchio.wire.limits import Limits

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "LoadKeywords",
    "SaveKeywords",
    "load_options",
    "outgoing_message",
]

DEFAULT_CHUNK_SIZE = 4 * 2**20

PRODUCER = f"aiotorchio/{version('aiotorchio')} torch/{torch.__version__}"


class SaveKeywords(TypedDict, total=False):
    """The keyword arguments of ``save_to_stream``, which documents them."""

    checksum: bool
    chunk_size: int
    metadata: Mapping[str, str] | None
    progress: Progress | None
    pickle_module: Any
    pickle_protocol: int


class LoadKeywords(TypedDict, total=False):
    """The keyword arguments of ``load_from_stream``, which documents them."""

    map_location: MapLocation
    weights_only: bool
    allow_pickle: bool
    safe_globals: Iterable[Any]
    limits: Limits
    progress: Progress | None
    pickle_module: Any
    encoding: str


def outgoing_message(
    obj: object,
    *,
    checksum: bool = True,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    pickle_module: Any = pickle,
    pickle_protocol: int = 2,
) -> Generator[Request, Any, Summary]:
    """Check the options, and return the message, of which nothing is done yet.

    Raises:
        TypeError: An option of another type.
        ValueError: An option out of its range.
    """
    if not isinstance(checksum, bool):
        raise TypeError(f"checksum is True or False, not {checksum!r}")
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
        raise TypeError(f"chunk_size is a number of bytes, not {chunk_size!r}")
    if chunk_size < CHUNK_SIZE_MIN or chunk_size % ALIGNMENT:
        raise ValueError(
            f"chunk_size must be a multiple of {ALIGNMENT} and at least {CHUNK_SIZE_MIN}, "
            f"not {chunk_size}"
        )
    metadata = {} if metadata is None else dict(metadata)
    for pair in metadata.items():
        if not all(isinstance(text, str) for text in pair):
            raise TypeError(f"metadata maps str to str, not {pair!r}")
    take_apart = functools.partial(
        flatten,
        obj,
        chunk_size=chunk_size,
        metadata=metadata,
        producer=PRODUCER,
        pickle_module=pickle_module,
        pickle_protocol=pickle_protocol,
    )
    return send_message(take_apart, inline=is_small(obj), checksum=checksum, progress=progress)


def load_options(
    *,
    map_location: MapLocation = None,
    weights_only: bool = True,
    allow_pickle: bool = True,
    safe_globals: Iterable[Any] = (),
    limits: Limits | None = None,
    progress: Progress | None = None,
    pickle_module: Any = None,
    encoding: str = "utf-8",
) -> LoadOptions:
    """Check the options.

    Raises:
        TypeError: An option of another type.
        ValueError: A ``pickle_module`` where nothing is trusted to it.
    """
    if weights_only and pickle_module is not None:
        raise ValueError(
            "pickle_module has no meaning with weights_only=True: nothing would use it"
        )
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"limits must be Limits, not {limits!r}")
    return LoadOptions(
        map_location=map_location,
        weights_only=weights_only,
        allow_pickle=allow_pickle,
        safe_globals=_trusted(safe_globals),
        limits=Limits() if limits is None else limits,
        progress=progress,
        pickle_module=pickle if pickle_module is None else pickle_module,
        encoding=encoding,
    )


def _trusted(safe_globals: Iterable[Any]) -> tuple[Any, ...]:
    if isinstance(safe_globals, type) or not isinstance(safe_globals, Iterable):
        raise TypeError(f"safe_globals is a list of classes and functions, not {safe_globals!r}")
    return tuple(safe_globals)
