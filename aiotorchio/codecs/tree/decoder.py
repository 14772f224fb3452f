"""Decoder of the tree codec: a skeleton becomes an object over the tensors of its rows."""

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

__all__ = ["decode", "decoder"]

# Values of a container between two checks of the interrupt; even, for keys with values.
_CHECKED_EVERY = 2000


def decode(
    skeleton: bytes,
    tensors: Sequence[Any],
    *,
    depth_limit: int,
    wide_keys: int = Limits().wide_keys,
    offset: int = 0,
) -> Any:
    """Read an object.

    Args:
        skeleton: What ``encode`` wrote, or a peer claims so.
        tensors: What stands for each row of the tensor table.
        depth_limit: Nesting of containers to accept.
        wide_keys: As of ``Limits``.
        offset: Byte of the message where the skeleton begins, for errors.

    Returns:
        The object.

    Raises:
        ProtocolError: Not MessagePack, left-over bytes, an unknown tag or a node that breaks
            its rules, a repeated key, a row that is not there.
        LimitExceeded: Nested too deep.
        InvalidObjectError: A set of unhashable items, a device that torch does not know.
    """
    with decoder(skeleton, depth_limit=depth_limit, wide_keys=wide_keys, offset=offset) as decoded:
        return decoded(tensors)


@contextmanager
def decoder(
    skeleton: bytes, *, depth_limit: int, wide_keys: int, offset: int
) -> Iterator[Callable[[Sequence[Any]], Any]]:
    """Give a function that reads the object over the tensors that it gets; see ``decode``.

    Of an object that is let go of within the block, only its containers are freed at once.
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
    """Whatever a skeleton does, as an error of ours that says where it is."""
    try:
        yield
    except RecursionError:
        raise LimitExceeded(
            f"nested deeper than {depth_limit} levels (Limits.depth)",
            entry="skeleton",
            offset=offset,
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"malformed skeleton: {error}", entry="skeleton", offset=offset
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
            raise ProtocolError("a node that is neither a plain value nor a tagged array")
        if depth >= self._depth_limit:
            raise LimitExceeded(f"nested deeper than {self._depth_limit} levels (Limits.depth)")
        read = _READERS.get(node[0])
        if read is None:
            raise ProtocolError(f"unknown tag {node[0]}")
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
            # Whatever it is: freed all at once, the items would hold other threads up.
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
            raise ProtocolError("a key without a value")
        value, wide, count = self.value, 0, (len(node) - start) // 2
        try:
            for first in range(start, len(node), _CHECKED_EVERY):
                check_interrupt()
                for n in range(first, min(first + _CHECKED_EVERY, len(node)), 2):
                    key = node[n]
                    if type(key) is not str:
                        if type(key) is not int:
                            raise ProtocolError("a key that is neither str nor int")
                        if not 0 <= key < count:
                            wide += 1
                            self._find_places(2 * wide - 1)
                    into[key] = value(node[n + 1], depth)
            if len(into) != count:
                raise ProtocolError("duplicate key")
        except BaseException:
            # As those of a list.
            drop(into)
            raise
        return into

    def ordered(self, node: list[Any], depth: int) -> Any:
        if len(node) < 2 or type(node[1]) is not list or len(node[1]) > 1:
            raise ProtocolError("an ordered dict without its place for metadata")
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
            raise InvalidObjectError(f"a set of {error}") from error
        if len(members) != len(items):
            raise ProtocolError("duplicate item in a set")
        return members

    def _find_places(self, steps: int) -> None:
        """Take the time to find places for keys that may have been chosen to have none left."""
        self._probes_left -= steps
        if self._probes_left < 0:
            raise too_many_colliders(self._wide_keys)

    def tensor(self, node: list[Any], depth: int) -> Any:
        # Not by _payload: this is the node that there may be 100,000 of.
        if len(node) != 2 or type(node[1]) is not int:
            raise _other_contents(node)
        row = node[1]
        if not 0 <= row < len(self._tensors):
            raise ProtocolError(f"tensor {row} of {len(self._tensors)}")
        return self._tensors[row]

    def integer(self, node: list[Any], depth: int) -> int:
        (data,) = _payload(node, bytes)
        value = int.from_bytes(data, "little", signed=True)
        if INTEGER_MIN <= value <= INTEGER_MAX or value.bit_length() // 8 + 1 != len(data):
            raise ProtocolError("an integer that is not in its shortest form")
        return value

    def size(self, node: list[Any], depth: int) -> torch.Size:
        if len(node) > SIZE_MAX + 1:
            raise LimitExceeded(f"a size of more than {SIZE_MAX} dimensions")
        dims = _payload(node, *[int] * (len(node) - 1))
        if any(dim > 2**63 - 1 or dim < -(2**63) for dim in dims):
            raise ProtocolError("a size beyond 64 bits")
        return torch.Size(dims)

    def device(self, node: list[Any], depth: int) -> torch.device:
        (name,) = _payload(node, str)
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise InvalidObjectError(f"device {name!r}: {error}") from error
        # torch keeps eight bits of the index: 300 would become 44.
        if str(device) != name:
            raise InvalidObjectError(f"device {name!r} is {device} to torch")
        return device


def _payload(node: list[Any], *kinds: type) -> list[Any]:
    """What follows the tag: exactly these types."""
    if [type(item) for item in node[1:]] != list(kinds):
        raise _other_contents(node)
    return node[1:]


def _other_contents(node: list[Any]) -> ProtocolError:
    return ProtocolError(f"tag {node[0]} with other contents than it has")


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
