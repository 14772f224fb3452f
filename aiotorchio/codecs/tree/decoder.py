"""Decoder of the tree codec: a skeleton becomes an object that holds the tensors of its rows.

``graph.rebuild`` calls it through ``codecs.tree.codec``. A skeleton comes from a peer: an error
means that the skeleton breaks SPEC.md section 6.1, or takes more than the limits allow, and has the
offset of the skeleton.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import torch

from aiotorchio.codecs.pickled.budget import too_many_colliders
from aiotorchio.codecs.pickled.safe_builtins import check_hashes
from aiotorchio.codecs.tree.chunked_decode import drop, unpacked
from aiotorchio.codecs.tree.tags import INTEGER_MAX, INTEGER_MIN, PLAIN_TYPES, SIZE_MAX, Tag
from aiotorchio.common.gc_pause import gc_paused
from aiotorchio.common.interrupt import check_interrupt
from aiotorchio.errors import AiotorchioError, InvalidObjectError, LimitExceeded, ProtocolError
from aiotorchio.limits import Limits
from aiotorchio.table.state_metadata import drop_mark
from aiotorchio.table.torch_dtypes import torch_dtype
from aiotorchio.wire.header import shortened

__all__ = ["decode", "decoder"]

# Items of a container between two calls of check_interrupt; even, since a key has a value.
_CHECKED_EVERY = 2000


def decode(
    skeleton: bytes,
    tensors: Sequence[Any],
    *,
    depth_limit: int,
    wide_keys: int = Limits().wide_keys,
    offset: int = 0,
) -> Any:
    """Build the object of a skeleton.

    Args:
        skeleton: A skeleton as a peer sent it.
        tensors: The tensor, or a placeholder, of each row.
        depth_limit: ``Limits.depth``.
        wide_keys: ``Limits.wide_keys``.
        offset: Byte of the message where the skeleton begins, for errors.

    Returns:
        The object.

    Raises:
        ProtocolError: The skeleton is not one MessagePack value, has an unknown tag, a node that
            breaks the rules of its tag, a key twice, or a row that the table does not have.
        LimitExceeded: It is nested too deep, takes too much memory, or too long to hash.
        InvalidObjectError: It has a set of unhashable members, or a device unknown to torch.
    """
    with decoder(skeleton, depth_limit=depth_limit, wide_keys=wide_keys, offset=offset) as decoded:
        return decoded(tensors)


@contextmanager
def decoder(
    skeleton: bytes, *, depth_limit: int, wide_keys: int, offset: int
) -> Iterator[Callable[[Sequence[Any]], Any]]:
    """Yield a function from tensors to the object; arguments and errors are those of ``decode``.

    An object that is dropped inside the block frees its containers only: the skeleton's values
    live until the end of the block.
    """
    with gc_paused(), ExitStack() as stack:
        with _located(depth_limit, offset):
            node = stack.enter_context(unpacked(skeleton, depth_limit))

        def decoded(tensors: Sequence[Any]) -> Any:
            with _located(depth_limit, offset):
                return _Decoder(tensors, depth_limit, wide_keys).value(node, 0)

        yield decoded


@contextmanager
def _located(depth_limit: int, offset: int) -> Iterator[None]:
    """Turn all errors of a skeleton into those of ``errors``, with its entry and offset."""
    try:
        yield
    except RecursionError:
        raise LimitExceeded(
            f"the object is nested deeper than {depth_limit} levels (Limits.depth)",
            entry="skeleton",
            offset=offset,
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"the skeleton is not one MessagePack value: {error}", entry="skeleton", offset=offset
        ) from error
    except AiotorchioError as error:
        error.entry, error.offset = "skeleton", offset
        raise


class _Decoder:
    def __init__(self, tensors: Sequence[Any], depth_limit: int, wide_keys: int) -> None:
        self._tensors = tensors
        self._depth_limit = depth_limit
        self._wide_keys = wide_keys
        self._probes_left = wide_keys**2

    def value(self, node: Any, depth: int) -> Any:
        kind = type(node)
        if kind in PLAIN_TYPES:
            return node
        if kind is not list or not node or type(node[0]) is not int:
            raise ProtocolError(
                "a value of the skeleton is neither a plain value nor a tagged array"
            )
        if depth >= self._depth_limit:
            raise LimitExceeded(
                f"the object is nested deeper than {self._depth_limit} levels (Limits.depth)"
            )
        read = _READERS.get(node[0])
        if read is None:
            raise ProtocolError(f"an array of the skeleton has the unknown tag {node[0]}")
        return read(self, node, depth + 1)

    def items(self, node: list[Any], depth: int) -> list[Any]:
        value, items = self.value, []
        try:
            for start in range(1, len(node), _CHECKED_EVERY):
                check_interrupt()
                for n in range(start, min(start + _CHECKED_EVERY, len(node))):
                    # A comprehension would be the third frame of a level.
                    items.append(value(node[n], depth))  # noqa: PERF401
        except BaseException:
            # Items that are freed at once would keep other threads waiting.
            drop(items)
            raise
        return items

    def fixed(self, node: list[Any], depth: int) -> tuple[Any, ...]:
        return tuple(self.items(node, depth))

    def mapping(self, node: list[Any], depth: int) -> dict[Any, Any]:
        mapping: dict[Any, Any] = self.pairs(node, 1, {}, depth)
        return mapping

    def pairs(self, node: list[Any], start: int, into: Any, depth: int) -> Any:
        if (len(node) - start) % 2:
            raise ProtocolError("a dict has a key without a value")
        value, wide, count = self.value, 0, (len(node) - start) // 2
        try:
            for first in range(start, len(node), _CHECKED_EVERY):
                check_interrupt()
                for n in range(first, min(first + _CHECKED_EVERY, len(node)), 2):
                    key = node[n]
                    if type(key) is not str:
                        if type(key) is not int:
                            raise ProtocolError(
                                f"a key of a dict must be str or int, not {type(key).__name__}"
                            )
                        if not 0 <= key < count:
                            wide += 1
                            self._find_places(2 * wide - 1)
                    into[key] = value(node[n + 1], depth)
            if len(into) != count:
                raise ProtocolError("a dict has a duplicate key")
        except BaseException:
            # Values that are freed at once would keep other threads waiting.
            drop(into)
            raise
        return into

    def ordered(self, node: list[Any], depth: int) -> Any:
        if len(node) < 2 or type(node[1]) is not list or len(node[1]) > 1:
            raise ProtocolError(
                "an OrderedDict must begin with an array for its metadata, of at most one value"
            )
        ordered = self.pairs(node, 2, OrderedDict(), depth)
        if node[1]:
            ordered._metadata = self.value(node[1][0], depth)
            drop_mark(ordered._metadata)
        return ordered

    def members(self, node: list[Any], depth: int) -> set[Any]:
        items = self.items(node, depth)
        safe, count = (str, bytes, bool, type(None)), len(items)
        wide = sum(
            not (isinstance(item, safe) or (type(item) is int and 0 <= item < count))
            for item in items
        )
        self._find_places(wide**2)
        try:
            check_hashes(items)
            members = set(items)
        except TypeError as error:
            raise InvalidObjectError(
                f"a set has a member that cannot be hashed: {error}"
            ) from error
        if len(members) != len(items):
            raise ProtocolError("a set has a duplicate item")
        return members

    def _find_places(self, steps: int) -> None:
        """Count the steps that a hash table may need to place keys that were chosen to collide."""
        self._probes_left -= steps
        if self._probes_left < 0:
            raise too_many_colliders(self._wide_keys)

    def tensor(self, node: list[Any], depth: int) -> Any:
        # _payload would be slower, and an object may have 100,000 tensors.
        if len(node) != 2 or type(node[1]) is not int:
            raise _other_contents(node)
        row = node[1]
        if not 0 <= row < len(self._tensors):
            raise ProtocolError(
                f"the skeleton refers to tensor row {row}, but the message has "
                f"{len(self._tensors)} tensors"
            )
        return self._tensors[row]

    def integer(self, node: list[Any], depth: int) -> int:
        (data,) = _payload(node, bytes)
        value = int.from_bytes(data, "little", signed=True)
        if INTEGER_MIN <= value <= INTEGER_MAX or value.bit_length() // 8 + 1 != len(data):
            raise ProtocolError(
                "an integer with tag 7 must lie outside -2**63 to 2**64 - 1, and be in its "
                "shortest form"
            )
        return value

    def size(self, node: list[Any], depth: int) -> torch.Size:
        if len(node) > SIZE_MAX + 1:
            raise LimitExceeded(f"a torch.Size has more than {SIZE_MAX} dimensions")
        dims = _payload(node, *[int] * (len(node) - 1))
        if any(dim > 2**63 - 1 or dim < -(2**63) for dim in dims):
            raise ProtocolError("a torch.Size has a dimension beyond 64 bits")
        return torch.Size(dims)

    def device(self, node: list[Any], depth: int) -> torch.device:
        (name,) = _payload(node, str)
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise InvalidObjectError(
                f"torch does not know device {shortened(name)!r}: {error}"
            ) from error
        # torch keeps eight bits of the index: 300 would become 44.
        if str(device) != name:
            raise InvalidObjectError(f"torch reads device {shortened(name)!r} as {device}")
        return device


def _payload(node: list[Any], *kinds: type) -> list[Any]:
    """Return the items after the tag, which must have exactly these types."""
    if [type(item) for item in node[1:]] != list(kinds):
        raise _other_contents(node)
    return node[1:]


def _other_contents(node: list[Any]) -> ProtocolError:
    return ProtocolError(f"an array with tag {node[0]} has other contents than this tag needs")


_READERS: dict[int, Callable[[_Decoder, list[Any], int], Any]] = {
    Tag.LIST: _Decoder.items,
    Tag.TUPLE: _Decoder.fixed,
    Tag.DICT: _Decoder.mapping,
    Tag.ORDERED_DICT: _Decoder.ordered,
    Tag.SET: _Decoder.members,
    Tag.TENSOR: _Decoder.tensor,
    Tag.COMPLEX: lambda d, node, depth: complex(*_payload(node, float, float)),
    Tag.INTEGER: _Decoder.integer,
    Tag.SIZE: _Decoder.size,
    Tag.DTYPE: lambda d, node, depth: torch_dtype(*_payload(node, str)),
    Tag.DEVICE: _Decoder.device,
}
