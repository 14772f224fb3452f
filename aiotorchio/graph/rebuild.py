"""The receiver's half: the rows of a header, storages and a skeleton, made into the object.

In: a valid header, its storages, and the skeleton as received. Out: the tensor of each row, and the
object with these tensors. ``Rebuilder.check`` runs before the payload is received, and ``build``
after it. An ``UnsafeObjectError`` or ``LimitExceeded`` means that the options of the load do not
accept the skeleton; an ``InvalidObjectError`` means that it describes no possible object.
``engine.load`` calls it for loads, ``iterate`` and ``composite_names`` for tensors by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from aiotorchio.codecs.pickled import codec as pickle_codec
from aiotorchio.codecs.pickled.allowlist import Allowlist
from aiotorchio.codecs.pickled.opcodes import globals_of
from aiotorchio.codecs.pickled.reduced import without_class
from aiotorchio.codecs.pickled.scan import scan_pickle
from aiotorchio.codecs.tree import codec as tree_codec
from aiotorchio.codecs.tree.chunked_decode import AT_ONCE_NBYTES, drop
from aiotorchio.common.gc_pause import gc_paused
from aiotorchio.common.interrupt import interruptible
from aiotorchio.common.torch_private import (
    Blanks,
    make_parameter,
    over_storage,
    real_tensors,
    set_view_bits,
)
from aiotorchio.errors import InvalidObjectError, LimitExceeded, ProtocolError, UnsafeObjectError
from aiotorchio.graph.composites import Composites
from aiotorchio.limits import Limits
from aiotorchio.table.names import Placeholder, check_names
from aiotorchio.table.torch_dtypes import torch_dtype
from aiotorchio.wire.header import (
    CONJUGATE,
    META_LOCATION,
    NEGATIVE,
    PARAMETER,
    REQUIRES_GRAD,
    Codec,
    Header,
    TensorRow,
    describe,
)

__all__ = ["Rebuilder", "build_tensor", "build_tensors", "check_tree"]


def build_tensors(
    header: Header,
    storages: Sequence[torch.UntypedStorage | None],
    given: Mapping[int, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Make the tensor of each row over its storage.

    Args:
        header: A valid header, whose rows do not reach beyond their storages.
        storages: A storage of the right size for each storage row. None: its tensors are on
            ``meta``.
        given: Existing tensors, by row.

    Returns:
        A tensor for each tensor row.

    Raises:
        InvalidObjectError: torch refuses a row.
        ProtocolError: The installed torch lacks a dtype.
    """
    tensors = []
    given = given or {}
    blanks: Blanks = {}
    with gc_paused():
        for index, row in interruptible(enumerate(header.tensors)):
            tensor = given.get(index)
            if tensor is None:
                storage = storages[row.storage]
                if storage is None:
                    nbytes = header.storages[row.storage].nbytes
                    storage = torch.UntypedStorage(nbytes, device=META_LOCATION)
                tensor = build_tensor(row, index, storage, blanks)
            tensors.append(tensor)
    return tensors


def build_tensor(
    row: TensorRow, index: int, storage: torch.UntypedStorage, blanks: Blanks | None = None
) -> torch.Tensor:
    """Make the tensor of one row; ``index`` is for errors. Raises as ``build_tensors``."""
    try:
        return _build_tensor(row, storage, blanks)
    except (RuntimeError, AttributeError) as error:
        # AttributeError comes from devices that this torch knows by name only.
        raise InvalidObjectError(
            f"torch cannot make this tensor: {error}", entry=describe(row, index)
        ) from error


def _build_tensor(
    row: TensorRow, storage: torch.UntypedStorage, blanks: Blanks | None
) -> torch.Tensor:
    dtype = torch_dtype(row.dtype)
    tensor = over_storage(storage, dtype, row.offset, row.shape, row.stride, blanks)
    flags = row.flags
    if not flags:
        return tensor
    if flags & (CONJUGATE | NEGATIVE):
        set_view_bits(tensor, conjugate=bool(flags & CONJUGATE), negative=bool(flags & NEGATIVE))
    requires_grad = bool(flags & REQUIRES_GRAD)
    if flags & PARAMETER:
        return make_parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


def check_tree(
    skeleton: bytes,
    rows: Sequence[TensorRow],
    *,
    names: bool,
    limits: Limits,
    offset: int,
    inspect: Callable[[Any], None] | None = None,
) -> None:
    """Refuse a bad skeleton of the tree codec.

    See ``Rebuilder.check`` for the arguments, and ``codecs.tree.codec.decode`` for the errors.
    """
    depth, wide_keys = limits.depth, limits.wide_keys
    with tree_codec.decoder(
        skeleton, depth_limit=depth, wide_keys=wide_keys, offset=offset
    ) as decoded:
        obj = decoded([Placeholder(index) for index in interruptible(range(len(rows)))])
        try:
            if names:
                check_names(obj, rows)
            if inspect is not None:
                inspect(obj)
        except RecursionError:
            raise LimitExceeded(
                "the object is nested too deep for Python's recursion limit",
                entry="skeleton",
                offset=offset,
            ) from None
        except ProtocolError as error:
            error.offset = offset
            raise
        if len(skeleton) > AT_ONCE_NBYTES:
            held = [obj]
            del obj
            drop(held)


class Rebuilder:
    """A skeleton, and the options to make its object.

    Args:
        skeleton: The skeleton as received.
        codec: The codec of the skeleton.
        allow_pickle: Whether the pickle codec is accepted.
        weights_only: Whether a pickle is loaded with an allowlist.
        pickle_module: The module that loads a pickle if ``weights_only`` is False.
        encoding: The encoding of strings of Python 2 in a pickle.
        safe_globals: Classes and functions that the caller adds to the built-in allowlist.
        map_location: Devices of tensor subclasses without a storage.
        limits: The limits of the receiver.
        offset: Byte of the message at which the skeleton begins, for errors.
    """

    def __init__(
        self,
        skeleton: bytes,
        codec: Codec,
        *,
        allow_pickle: bool,
        weights_only: bool,
        pickle_module: Any,
        encoding: str,
        safe_globals: Sequence[Any],
        map_location: Any,
        limits: Limits,
        offset: int,
    ) -> None:
        if codec == "pickle" and not allow_pickle:
            raise UnsafeObjectError(
                "the skeleton is a pickle, and allow_pickle is False",
                entry="skeleton",
                offset=offset,
            )
        self._skeleton = skeleton
        self.nbytes = len(skeleton)
        self._codec = codec
        self._weights_only = weights_only
        self._pickle_module = pickle_module
        self._encoding = encoding
        self._limits = limits
        self._offset = offset
        self._safe_globals = safe_globals
        self._given_state: Mapping[str, bool] = {}
        # The tree codec has no allowlist.
        if codec == "pickle":
            self._allowlist = Allowlist(safe_globals, limits, map_location)

    def check(
        self,
        rows: Sequence[TensorRow],
        *,
        names: bool,
        inspect: Callable[[Any], None] | None = None,
    ) -> None:
        """Refuse a bad skeleton before its payload is received; raises the errors of ``build``.

        Args:
            rows: The table of tensors.
            names: Whether the caller uses names: then those of a tree are compared with its paths.
                It has no effect on a pickle, whose names cannot be checked before it is built.
            inspect: Called with the object of a tree, in which a ``Placeholder`` stands for each
                tensor.
        """
        if self._codec == "tree":
            check_tree(
                self._skeleton,
                rows,
                names=names,
                limits=self._limits,
                offset=self._offset,
                inspect=inspect,
            )
        elif self._weights_only:
            self._given_state = scan_pickle(
                self._skeleton,
                self._allowlist.globals,
                self._allowlist.stateful,
                depth_limit=self._limits.depth,
                wide_keys=self._limits.wide_keys,
                offset=self._offset,
            )
            self._allowlist.guard_state(self._given_state)

    def build_on_meta(self, header: Header) -> list[Any]:
        """Build the object over tensors on ``meta``, after ``check`` and before the payload.

        Returns:
            A list with the object. It is empty if the object cannot be built without its numbers
            (quantized and nested tensors), or if that would run code of the caller or of the sender
            twice.
        """
        if self._codec == "pickle" and not (self._weights_only and self._is_of_torch()):
            return []
        other = copy.copy(self)
        if self._codec == "pickle":
            other._allowlist = Allowlist(self._safe_globals, self._limits, META_LOCATION)
            other._allowlist.guard_state(self._given_state)
        try:
            with torch.inference_mode(False), real_tensors():
                storages = [
                    torch.UntypedStorage(row.nbytes, device=META_LOCATION)
                    for row in interruptible(header.storages)
                ]
                return [other.build(build_tensors(header, storages), storages)]
        except MemoryError:
            raise
        except Exception:
            # torch lacks some kinds of tensors on meta. An error of the object itself is raised
            # again when it is built.
            return []

    def _is_of_torch(self) -> bool:
        """Whether the pickle names only parts of torch, and trusted classes that are tensors."""
        if not self._safe_globals:
            return True
        named = globals_of(self._skeleton)
        return all(
            (
                isinstance(value, type)
                and issubclass(value, torch.Tensor)
                and value.__setstate__ is torch.Tensor.__setstate__
            )
            or str(getattr(value, "__module__", "")).startswith("torch.")
            for path, value in self._allowlist.trusted()
            if path in named
        )

    @property
    def may_have_composites(self) -> bool:
        """Whether the object may have tensors that are not those of rows."""
        if self._codec != "pickle":
            return False
        return not self._weights_only or self._allowlist.may_make_tensors(self._skeleton)

    def composites(self, header: Header) -> Composites:
        """Find the composite tensors of the object; checks the skeleton as well.

        Args:
            header: The header of a message whose codec is pickle; ``weights_only`` is True.

        Raises:
            MismatchError: Two tensors have the same name.
            AiotorchioError: The errors of ``check``, and those of ``build`` for contradictions.
        """
        self.check(header.tensors, names=True)
        return Composites(
            self._skeleton,
            header.tensors,
            len(header.storages),
            allowlist=self._allowlist,
            encoding=self._encoding,
            depth_limit=self._limits.depth,
            offset=self._offset,
        )

    def build(
        self,
        tensors: Sequence[torch.Tensor],
        storages: Sequence[torch.UntypedStorage | None],
        unreliable: Iterable[torch.UntypedStorage | None] = (),
    ) -> Any:
        """Return the object; ``check`` must have passed before.

        Args:
            tensors: The tensor of each row.
            storages: The storage of each row; None if it was not received.
            unreliable: Storages whose numbers may change, or were never written.
        """
        if self._codec == "tree":
            return self._build_tree(tensors)
        self._allowlist.distrust(unreliable)
        # A target can be of any class; the pickle makes its tensors from plain ones.
        tensors = [without_class(tensor) for tensor in interruptible(tensors)]
        if self._weights_only:
            return pickle_codec.load(
                self._skeleton,
                tensors,
                storages,
                allowlist=self._allowlist,
                encoding=self._encoding,
                depth_limit=self._limits.depth,
                offset=self._offset,
            )
        return pickle_codec.load_trusted(
            self._skeleton,
            tensors,
            storages,
            allowlist=self._allowlist,
            pickle_module=self._pickle_module,
            encoding=self._encoding,
            offset=self._offset,
        )

    def _build_tree(self, tensors: Sequence[Any]) -> Any:
        return tree_codec.decode(
            self._skeleton,
            tensors,
            depth_limit=self._limits.depth,
            wide_keys=self._limits.wide_keys,
            offset=self._offset,
        )
