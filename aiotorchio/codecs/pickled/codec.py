"""The pickle codec: whatever the tree codec cannot carry (SPEC.md section 6.2).

Tensors and storages leave the pickle as persistent ids: the number of a row for a tensor,
``("storage", row, dtype name or None)`` for a storage.
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
    """Pickle an object, its tensors and storages into the table.

    Args:
        obj: Anything that ``pickle_module`` can pickle.
        table: Takes the tensors and storages.
        pickle_module: Has a ``Pickler`` like that of ``pickle``.
        pickle_protocol: Of the pickle; receivers load only 2 without trusting it.

    Returns:
        The skeleton.
    """
    # In protocol 0 persistent ids are lines of text: 1 has the same opcodes, and objects as ids.
    protocol = pickle_protocol or 1

    class Pickler(pickle_module.Pickler):  # type: ignore[misc]
        def persistent_id(self, obj: Any) -> Any:
            # Pickle asks for each object that it meets.
            check_interrupt()
            if isinstance(obj, torch.Tensor):
                return table.add_tensor(obj)
            if isinstance(obj, torch.TypedStorage):
                name = DTYPE_NAMES[obj.dtype]
                row = table.add_storage(untyped_storage_of(obj), DTYPES[name].unit)
                return (STORAGE, row, name)
            if isinstance(obj, torch.UntypedStorage):
                # torch names the dtype of the numbers elsewhere, or nowhere.
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
    """How a tensor is pickled over a tensor that has a row, instead of over a storage.

    Args:
        tensor: One that a row alone does not tell: with attributes, or of another class.
        reduced: What torch's functions, or those of its class, would put into the pickle.
        table: Gets to know what the tensor is made of.

    Returns:
        What to put into the pickle: as given if it is not made so.
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
    """Rebuild an object without running anything that is not on the allowlist.

    Args:
        skeleton: A pickle that ``scan_pickle`` let through with the same allowlist.
        tensors: The tensor of each row.
        storages: The storage of each row; None if it was not received.
        allowlist: What the pickle may name.
        encoding: Of the strings of Python 2.
        depth_limit: Nesting of lists, tuples and dicts to accept.
        offset: Byte of the message where the skeleton begins, for errors.

    Returns:
        The object.

    Raises:
        UnsafeObjectError: Something that is not on the allowlist, or not with these arguments.
        InvalidObjectError: An object that contradicts itself.
        ProtocolError: A row that is not there.
        LimitExceeded: Nested too deep.
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
    """Do what ``load`` does, with what ``resolve`` gives for references, ``allowed`` for paths."""

    def read() -> Any:
        unpickler = WeightsOnlyUnpickler(
            _file_of(skeleton), allowed=allowed, persistent_load=resolve, encoding=encoding
        )
        loaded = unpickler.load()
        allowlist.check_result()
        _check_shape(loaded, depth_limit)
        return loaded

    return translated(read, offset)


# Opcodes that take a function, its arguments, and the state of the result from references.
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
    """Carry out one call of a pickle, as ``load`` does when it comes to it; raises as ``load``.

    Args:
        function: To be called.
        args: Of the call.
        state: The state of the result, if it gets one.
        new: Whether an instance is made of a class without calling it.
        allowlist: As of ``load``; so are the others.
        encoding: Of ``load``.
        offset: Of ``load``.
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
    """Rebuild an object with full pickle: **runs whatever code the sender put in**.

    Args:
        skeleton: A pickle.
        tensors: The tensor of each row.
        storages: The storage of each row; None if it was not received.
        allowlist: Its checked rebuild functions take the place of torch's.
        pickle_module: Has an ``Unpickler`` like that of ``pickle``.
        encoding: Of the strings of Python 2.
        offset: Byte of the message where the skeleton begins, for errors.

    Returns:
        The object.

    Raises:
        InvalidObjectError: It cannot be unpickled; the cause is the error that says why.
        ProtocolError: Bytes left over, or a row that is not there.
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
            raise ProtocolError(f"{len(skeleton) - file.tell()} bytes left over behind the pickle")
        return loaded

    return translated(read, offset)


# A pickle of this size takes some 50 ms. To check at each opcode takes a tenth of the time.
_AT_ONCE_NBYTES = 64 * 2**10
# A call that makes a tensor takes up to a millisecond, in five bytes.
_CALLS_AT_ONCE = 32


class _CheckedFile(io.BytesIO):
    """Ends an unpickler that nobody waits for any more: it reads each opcode on its own."""

    def read(self, size: int | None = -1, /) -> bytes:
        check_interrupt()
        return super().read(size)


def _file_of(skeleton: bytes) -> io.BytesIO:
    checked = len(skeleton) > _AT_ONCE_NBYTES or skeleton.count(b"R") > _CALLS_AT_ONCE
    return _CheckedFile(skeleton) if checked else io.BytesIO(skeleton)


def _check_shape(loaded: Any, limit: int) -> None:
    """Refuse what was nested after the scan had measured what holds it: too deep, or endless.

    A list in itself is neither.
    """
    # Of each container that was gone through: its values, each as often as it occurs.
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
                raise LimitExceeded(f"more than {most} values, counted wherever they occur")
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
                raise LimitExceeded(f"nested deeper than {limit} levels (Limits.depth)")


def translated(read: Callable[[], Any], offset: int) -> Any:
    """Whatever an unpickler raises, as one of our errors."""
    try:
        return read()
    except AiotorchioError as error:
        error.entry, error.offset = "skeleton", offset
        raise
    except RecursionError as error:
        raise LimitExceeded("nested too deep", entry="skeleton", offset=offset) from error
    except pickle.UnpicklingError as error:
        raise UnsafeObjectError(_words(error), entry="skeleton", offset=offset) from error
    except Exception as error:
        raise InvalidObjectError(
            f"the object cannot be rebuilt: {_words(error)}", entry="skeleton", offset=offset
        ) from error


def _words(error: Exception) -> str:
    """What an exception says, but not of what it holds: the repr of a doubled tuple never ends."""
    kind = type(error).__name__
    texts = all(type(argument) in (str, int) for argument in error.args)
    if texts or isinstance(error, UnicodeError):
        return f"{kind}: {error}"
    return kind
