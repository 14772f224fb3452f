"""Blocking calls: files, pipes, sockets, paths."""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections.abc import AsyncIterable, Generator, Iterable, Mapping
from typing import Any

import torch

from aiotorchio.api.replaced_file import open_to_replace
from aiotorchio.engine.commit import apply_commit_blocking
from aiotorchio.engine.drivers import drive_blocking, load_time_budget, save_time_budget
from aiotorchio.engine.load import Loaded, receive_message
from aiotorchio.engine.load_options import LoadOptions, check_lock, trusted
from aiotorchio.engine.receive import IncomingMessage
from aiotorchio.engine.requests import Progress, Request
from aiotorchio.engine.save_options import DEFAULT_CHUNK_SIZE, SaveOptions
from aiotorchio.engine.selection import LoadTarget
from aiotorchio.engine.send import outgoing_message
from aiotorchio.engine.summary import Summary
from aiotorchio.graph.devices import MapLocation
from aiotorchio.graph.select import Select
from aiotorchio.limits import Limits, checked_limits
from aiotorchio.streams.detect import open_blocking_sink, open_blocking_source
from aiotorchio.streams.guard import exclusive
from aiotorchio.table.names import TensorSpec

__all__ = ["get_unsafe_globals", "load", "save"]

_PATHS = (str, bytes, os.PathLike)


def save(  # noqa: D417 - save_to_stream documents the options
    obj: object,
    file: Any,
    pickle_module: Any = pickle,
    pickle_protocol: int = 2,
    *,
    checksum: bool = True,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    metadata: Mapping[str, str] | None = None,
    specs: Mapping[str, TensorSpec | torch.Tensor] | None = None,
    snapshot: bool = False,
    compact: bool = False,
    allow_pickle: bool = True,
    limits: Limits | None = None,
    progress: Progress | None = None,
    durable: bool = True,
) -> Summary:
    """The blocking twin of ``save_to_stream``, with the arguments of ``torch.save`` by position.

    Args:
        obj: As in ``save_to_stream``.
        file: A binary file, a pipe, a ``BytesIO``, a blocking ``socket.socket``, or a path. An
            existing file is replaced once the new one is whole, which needs room for both in its
            directory; other names of it (hard links) keep the old one. Devices, pipes and paths of
            descriptors (``/dev/stdout``, ``/dev/fd/3``) are written to as by ``open(file, "wb")``.
        pickle_module: As in ``save_to_stream``.
        pickle_protocol: As in ``save_to_stream``.
        limits: As in ``save_to_stream``. If a socket has a timeout, the shorter of the two counts.
        durable: With a path, sync the new file before it replaces the old one, and the directory
            after that, so that a crash of the system leaves one of the two whole. Devices, pipes
            and descriptors are not synced.

    All other arguments are those of ``save_to_stream``.

    Returns:
        The summary of the message.

    Raises:
        TypeError: ``durable`` is no bool.
        OSError: The file cannot be opened, written, synced or replaced. The file at a path is then
            the old one, unless the sync of its directory failed; ``filename`` is the path.
        Exception: As ``save_to_stream``.

    Example:
        >>> import io, torch, aiotorchio
        >>> file = io.BytesIO()
        >>> aiotorchio.save({"w": torch.ones(2)}, file).tensors
        1
        >>> _ = file.seek(0)
        >>> aiotorchio.load(file)
        {'w': tensor([1., 1.])}
    """
    options = SaveOptions.of_call(locals())
    checked = checked_limits(limits)
    message = outgoing_message(obj, options)
    if isinstance(obj, AsyncIterable) and options.specs is not None:
        raise TypeError("save needs a plain iterable of tensors; save_to_stream takes an async one")
    if durable is not True and durable is not False:
        raise TypeError(f"durable must be True or False, not {durable!r}")
    if not isinstance(file, _PATHS):
        return _save(message, file, checked)
    with open_to_replace(file, durable=durable) as opened:
        return _save(message, opened, checked)


def _save(message: Generator[Request, Any, Summary], file: Any, limits: Limits) -> Summary:
    with exclusive(file, "save", open_blocking_sink) as stream:
        stream.time_budget = save_time_budget(limits, time.monotonic)
        return drive_blocking(message, stream)


def load(  # noqa: D417 - load_from_stream documents the options
    file: Any,
    map_location: MapLocation = None,
    pickle_module: Any = None,
    *,
    weights_only: bool | None = True,
    allow_pickle: bool = True,
    safe_globals: Iterable[Any] = (),
    limits: Limits | None = None,
    into: LoadTarget | None = None,
    strict: bool = True,
    cast: bool = False,
    staged: bool = False,
    lock: Any = None,
    select: Select | None = None,
    progress: Progress | None = None,
    encoding: str = "utf-8",
) -> Any:
    """Load as ``load_from_stream`` does, but blocking.

    The first three arguments are those of ``torch.load``, by position.

    Args:
        file: A binary file, a pipe, a ``BytesIO``, a blocking ``socket.socket``, or a path.
        map_location: As in ``load_from_stream``.
        pickle_module: As in ``load_from_stream``.
        limits: Upper bounds for the message; the default is ``Limits()``.
        lock: As in ``load_from_stream``, but a plain context manager, such as ``threading.Lock``.

    All other arguments are those of ``load_from_stream``.

    Returns:
        The object.

    Raises:
        Exception: As ``load_from_stream``, and ``OSError`` of a file.

    Example:
        See ``save``.
    """
    options = LoadOptions.of_call(locals())
    check_lock(lock, "blocking")
    checked = checked_limits(limits)
    return _load(file, receive_message(checked, options), checked, lock)


def get_unsafe_globals(
    file: Any, *, safe_globals: Iterable[Any] = (), limits: Limits | None = None
) -> list[str]:
    """List the names in a message in a file that a load would refuse; nothing is built.

    The counterpart of ``torch.serialization.get_unsafe_globals_in_checkpoint``. For messages on
    streams there is ``Message.get_unsafe_globals``.

    Args:
        file: A path, or a seekable binary file, whose position does not change.
        safe_globals: As in ``load``: classes and functions that are trusted.
        limits: Upper bounds for the message; the default is ``Limits()``.

    Returns:
        Paths of the classes and functions that the object needs and that would be refused unless
        they are in ``safe_globals``; none of an object that was saved without pickle.

    Raises:
        ValueError: The file cannot seek, and is no path.
        UnsafeObjectError: A pickle that only ``weights_only=False`` can load, since it was
            written with another protocol than 2.
        Exception: As ``load``.

    Example:
        >>> import fractions, io, aiotorchio
        >>> file = io.BytesIO()
        >>> _ = aiotorchio.save(fractions.Fraction(1, 2), file), file.seek(0)
        >>> aiotorchio.get_unsafe_globals(file)
        ['fractions.Fraction']
        >>> aiotorchio.load(file, safe_globals=[fractions.Fraction])
        Fraction(1, 2)
    """
    checked = trusted(safe_globals)
    if isinstance(file, _PATHS):
        with open(file, "rb") as opened:
            return get_unsafe_globals(opened, safe_globals=checked, limits=limits)
    if not (hasattr(file, "seekable") and file.seekable()):
        raise ValueError(
            "the file cannot seek, which this needs: use StreamReader.open and "
            "Message.get_unsafe_globals instead"
        )
    incoming = IncomingMessage(checked_limits(limits))
    with exclusive(file, "load", open_blocking_source) as stream:
        start = file.tell()
        try:
            drive_blocking(incoming.open(), stream)
            return drive_blocking(incoming.unsafe_globals(checked), stream)
        finally:
            file.seek(start)


def _load(file: Any, message: Generator[Request, Any, Loaded], limits: Limits, lock: Any) -> Any:
    is_path = isinstance(file, _PATHS)
    with contextlib.ExitStack() as unfinished:
        with (
            open(file, "rb") if is_path else contextlib.nullcontext(file) as opened,
            exclusive(opened, "load", open_blocking_source) as stream,
        ):
            stream.time_budget = load_time_budget(limits, time.monotonic)
            loaded = drive_blocking(message, stream)
            unfinished.callback(loaded.close)
        # After all that can fail, such as closing the file, since an error must leave the targets
        # unchanged.
        if loaded.commit is not None:
            apply_commit_blocking(loaded.commit, lock)
        return loaded.obj
