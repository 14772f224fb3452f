"""The pickle codec: objects that the tree codec cannot carry (SPEC.md section 6.2).

In: an object, or a pickle as a peer sent it. Out: the pickle, or the object. Tensors and storages
leave the pickle as persistent ids. ``graph`` calls these functions. An error of a load means that
the pickle is not allowed or not valid, and has the offset of the skeleton.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from aiotorchio.codecs.pickled.allowlist import Allowlist
from aiotorchio.codecs.pickled.persistent_ids import (
    STORAGE,
    checked_row,
    resolver,
    storage_for,
    storage_reference,
)
from aiotorchio.codecs.pickled.reduced import over_origin, plain_origin
from aiotorchio.common.interrupt import check_interrupt
from aiotorchio.common.torch_private import (
    WeightsOnlyUnpickler,
    is_fake,
    untyped_storage_of,
)
from aiotorchio.errors import (
    AiotorchioError,
    InvalidObjectError,
    LimitExceeded,
    ProtocolError,
    UnsafeObjectError,
)
from aiotorchio.table.mapped_files import may_be_mapped, plain_of, without_files
from aiotorchio.table.state_metadata import without_mark
from aiotorchio.table.table import Table
from aiotorchio.table.torch_dtypes import DTYPE_NAMES
from aiotorchio.wire import bounds
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import MIXED_UNITS

__all__ = [
    "STORAGE",
    "checked_row",
    "dump",
    "load",
    "load_trusted",
    "load_with",
    "replay",
    "storage_for",
    "storage_reference",
    "translated",
]


def dump(obj: object, table: Table, *, pickle_module: Any, pickle_protocol: int) -> bytes:
    """Pickle an object, and add its tensors and storages to the table.

    Args:
        obj: Any object that ``pickle_module`` can pickle.
        table: Receives the tensors and storages.
        pickle_module: A module with a ``Pickler`` like that of ``pickle``.
        pickle_protocol: Protocol of the pickle; receivers that do not trust it load only 2.

    Returns:
        The skeleton.
    """
    # Persistent ids of protocol 0 are lines of text; those of 1 are objects, with the same opcodes.
    protocol = pickle_protocol or 1

    class Pickler(pickle_module.Pickler):  # type: ignore[misc]
        def persistent_id(self, obj: Any) -> Any:
            # Pickle calls this for each object.
            check_interrupt()
            if isinstance(obj, torch.Tensor):
                return table.add_tensor(obj)
            if isinstance(obj, torch.TypedStorage):
                name = DTYPE_NAMES[obj.dtype]
                row = table.add_storage(untyped_storage_of(obj), DTYPES[name].unit)
                return (STORAGE, row, name)
            if isinstance(obj, torch.UntypedStorage):
                # torch has the dtype of the numbers elsewhere, or nowhere.
                return (STORAGE, table.add_storage(obj, MIXED_UNITS), None)
            return None

        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is OrderedDict and "_metadata" in vars(obj):
                reduced: Any = obj.__reduce_ex__(2)
                make, args, state, *items = reduced
                return make, args, state | {"_metadata": without_mark(state["_metadata"])}, *items
            override = getattr(super(), "reducer_override", None)
            reduced = NotImplemented if override is None else override(obj)
            if reduced is not NotImplemented:
                return reduced
            reducers = getattr(self, "dispatch_table", None) or copyreg.dispatch_table
            if may_be_mapped(obj):
                reducer = reducers.get(type(obj))
                return without_files(reducer(obj) if reducer else obj.__reduce_ex__(protocol))
            if isinstance(obj, torch.Tensor) and type(obj) not in reducers:
                return _over_row(obj, plain_of(obj).__reduce_ex__(protocol), table)
            return NotImplemented

    file = io.BytesIO()
    Pickler(file, protocol=protocol).dump(obj)
    return file.getvalue()


def _over_row(tensor: torch.Tensor, reduced: Any, table: Table) -> Any:
    """Pickle a tensor over a tensor that has a row, instead of over a storage.

    Args:
        tensor: A tensor that its row does not describe in full: it has attributes or another class.
        reduced: The result of ``__reduce_ex__`` of the tensor.
        table: Receives the tensor that this one is made of.

    Returns:
        The value to pickle; ``reduced`` itself if the tensor is not made of another one.
    """
    origin = None if is_fake(tensor) else plain_origin(reduced)
    if origin is None or table.add_tensor(origin) is None:
        return reduced
    table.make_of(tensor, origin)
    return over_origin(reduced, origin)


def load(
    skeleton: bytes,
    tensors: Sequence[Any],
    storages: Sequence[torch.UntypedStorage | None],
    *,
    allowlist: Allowlist,
    encoding: str,
    depth_limit: int,
    offset: int = 0,
) -> Any:
    """Rebuild an object without running code that is not on the allowlist.

    Args:
        skeleton: A pickle that ``scan_pickle`` accepted with the same allowlist.
        tensors: The tensor of each row.
        storages: The storage of each row; None if it was not received.
        allowlist: The globals that the pickle may name.
        encoding: Encoding of the strings of Python 2.
        depth_limit: ``Limits.depth``, here for lists, tuples and dicts.
        offset: Byte of the message where the skeleton begins, for errors.

    Returns:
        The object.

    Raises:
        UnsafeObjectError: The pickle calls a global that is not on the allowlist, or calls one
            with arguments that are not allowed.
        InvalidObjectError: The object contradicts itself.
        ProtocolError: The pickle refers to a row that the table does not have.
        LimitExceeded: The object is nested too deep.
    """
    return load_with(
        skeleton,
        resolver(tensors, storages),
        allowed=allowlist.globals,
        allowlist=allowlist,
        encoding=encoding,
        depth_limit=depth_limit,
        offset=offset,
    )


def load_with(
    skeleton: bytes,
    resolve: Callable[[Any], Any],
    *,
    allowed: dict[str, Any],
    allowlist: Allowlist,
    encoding: str,
    depth_limit: int,
    offset: int,
) -> Any:
    """Rebuild an object like ``load``, with other functions for its ids and its globals.

    Args:
        skeleton: As in ``load``.
        resolve: Returns the object for a persistent id.
        allowed: Path of a global -> the object that the pickle gets for it.
        allowlist: As in ``load``.
        encoding: As in ``load``.
        depth_limit: As in ``load``.
        offset: As in ``load``.
    """

    def read() -> Any:
        unpickler = WeightsOnlyUnpickler(
            _file_of(skeleton), allowed=allowed, persistent_load=resolve, encoding=encoding
        )
        loaded = unpickler.load()
        allowlist.check_result()
        _check_shape(loaded, depth_limit)
        return loaded

    return translated(read, offset)


# Opcodes that load a function, its arguments, and the state of its result by persistent ids.
_CALL, _NEW, _STATE, _STOP = b"K\x00QK\x01QR", b"K\x00QK\x01Q\x81", b"K\x02Qb", b"."


def replay(
    function: Any,
    args: tuple[Any, ...],
    state: Sequence[Any],
    *,
    new: bool,
    allowlist: Allowlist,
    encoding: str,
    offset: int,
) -> Any:
    """Make one recorded call of a pickle, with the checks and the errors of ``load``.

    Args:
        function: The function or class to call.
        args: The arguments of the call.
        state: The state of the result, or an empty sequence.
        new: Whether to make an instance with ``__new__`` alone, as NEWOBJ does.
        allowlist: As in ``load``.
        encoding: As in ``load``.
        offset: As in ``load``.

    Returns:
        The result of the call, with its state.
    """
    opcodes = (_NEW if new else _CALL) + (_STATE if state else b"") + _STOP
    unpickler = WeightsOnlyUnpickler(
        io.BytesIO(opcodes),
        allowed=allowlist.globals,
        persistent_load=[function, args, *state].__getitem__,
        encoding=encoding,
    )
    return translated(unpickler.load, offset)


def load_trusted(
    skeleton: bytes,
    tensors: Sequence[Any],
    storages: Sequence[torch.UntypedStorage | None],
    *,
    allowlist: Allowlist,
    pickle_module: Any,
    encoding: str,
    offset: int = 0,
) -> Any:
    """Rebuild an object with full pickle, which **runs any code that the sender put in**.

    Args:
        skeleton: A pickle of a sender that the caller trusts.
        tensors: The tensor of each row.
        storages: The storage of each row; None if it was not received.
        allowlist: Has the checked rebuild functions that replace those of torch.
        pickle_module: A module with an ``Unpickler`` like that of ``pickle``.
        encoding: Encoding of the strings of Python 2.
        offset: Byte of the message where the skeleton begins, for errors.

    Returns:
        The object.

    Raises:
        InvalidObjectError: The object cannot be unpickled; the cause is the error of pickle.
        ProtocolError: The pickle has bytes left over, or refers to a row that the table does not
            have.
    """
    rebuilds = allowlist.rebuild_functions()

    class Unpickler(pickle_module.Unpickler):  # type: ignore[misc]
        def find_class(self, module: str, name: str) -> Any:
            return rebuilds.get((module, name)) or super().find_class(module, name)

    def read() -> Any:
        file = io.BytesIO(skeleton)
        unpickler = Unpickler(file, encoding=encoding)
        unpickler.persistent_load = resolver(tensors, storages)
        loaded = unpickler.load()
        if file.tell() != len(skeleton):
            raise ProtocolError(
                f"the pickle has {len(skeleton) - file.tell()} bytes left over after its last "
                "opcode"
            )
        return loaded

    return translated(read, offset)


# Pickles up to this size take some 50 ms, and are loaded without checks for an interrupt, which
# would take a tenth of the time.
_AT_ONCE_NBYTES = 64 * 2**10
# A pickle that may have more calls is checked at any size: a call of five bytes can take up to a
# millisecond.
_CALLS_AT_ONCE = 32


class _CheckedFile(io.BytesIO):
    """A file that checks for an interrupt at each opcode, which an unpickler reads one by one."""

    def read(self, size: int | None = -1, /) -> bytes:
        check_interrupt()
        return super().read(size)


def _file_of(skeleton: bytes) -> io.BytesIO:
    checked = len(skeleton) > _AT_ONCE_NBYTES or skeleton.count(b"R") > _CALLS_AT_ONCE
    return _CheckedFile(skeleton) if checked else io.BytesIO(skeleton)


def _check_shape(loaded: Any, limit: int) -> None:
    """Refuse an object that is nested too deep, or has too many values, counted at each place.

    The scan cannot see this if containers are filled after the tuples around them were made. A list
    that contains itself is accepted.
    """
    # Container by id() -> number of values in it, each counted as often as it occurs.
    sizes: dict[int, int] = {}
    path: list[tuple[int, Iterator[Any]]] = [(0, iter([loaded]))]
    totals, most = [0], bounds.BOUNDS.values
    while path:
        check_interrupt()
        key, values = path[-1]
        value = next(values, path)
        if value is path:
            path.pop()
            total = sizes[key] = totals.pop()
            if total > most:
                raise LimitExceeded(
                    f"the object has more than {most} values, counted wherever they occur"
                )
            if totals:
                totals[-1] += total
        elif not isinstance(value, dict | list | tuple):
            totals[-1] += 1
        elif id(value) in sizes:
            totals[-1] += sizes[id(value)]
        else:
            sizes[id(value)] = 1
            path.append((id(value), iter(value.values() if isinstance(value, dict) else value)))
            totals.append(1)
            if len(path) > limit + 1:
                raise LimitExceeded(
                    f"the object is nested deeper than {limit} levels (Limits.depth)"
                )


def translated(read: Callable[[], Any], offset: int) -> Any:
    """Call a function, and turn errors of an unpickler into those of ``errors``."""
    try:
        return read()
    except AiotorchioError as error:
        error.entry, error.offset = "skeleton", offset
        raise
    except RecursionError as error:
        raise LimitExceeded(
            "the object is nested too deep", entry="skeleton", offset=offset
        ) from error
    except pickle.UnpicklingError as error:
        raise UnsafeObjectError(_words(error), entry="skeleton", offset=offset) from error
    except Exception as error:
        raise InvalidObjectError(
            f"the object cannot be rebuilt: {_words(error)}", entry="skeleton", offset=offset
        ) from error


def _words(error: Exception) -> str:
    """Return the text of an error, or its class if it has objects: their repr can be endless."""
    kind = type(error).__name__
    texts = all(type(argument) in (str, int) for argument in error.args)
    if texts or isinstance(error, UnicodeError):
        return f"{kind}: {error}"
    return kind
