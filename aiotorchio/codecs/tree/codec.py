"""The pickle-free codec: ordinary objects <-> MessagePack (SPEC.md section 6.1).

Every container is an array that starts with its tag, so types survive, keys keep their order
and can be checked for repeats. What the codec does not know, such as a class, or cannot keep,
such as a list that is in two places, makes ``encode`` raise ``NotATreeError``: pickle's turn.
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
from aiotorchio.codecs.tree.tags import Tag
from aiotorchio.common.gc_pause import gc_paused
from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.errors import AiotorchioError, InvalidObjectError, LimitExceeded, ProtocolError
from aiotorchio.limits import Limits
from aiotorchio.table.state_metadata import drop_mark, without_mark
from aiotorchio.table.table import Table
from aiotorchio.table.torch_dtypes import DTYPE_NAMES, torch_dtype

__all__ = ["NotATreeError", "decode", "decoder", "encode"]

# Deeper objects go to pickle. Far below Python's recursion limit, above any state dict.
_ENCODE_DEPTH_MAX = 100
# As of the shape of a tensor.
_SIZE_MAX = 4096
_INTEGER_MIN, _INTEGER_MAX = -(2**63), 2**64 - 1
# Values of a container between two checks of the interrupt; even, for keys with values.
_CHECKED_EVERY = 2000


class NotATreeError(Exception):
    """The object needs the other codec.

    Args:
        what: Of it this one does not know.
        path: Where that is.
    """

    def __init__(self, what: str, path: str = "") -> None:
        super().__init__(f"{path.removesuffix('.')!r} is {what}" if path else what)


def encode(obj: object, table: Table) -> bytes:
    """Write an object, and its tensors into the table.

    Args:
        obj: Anything.
        table: Takes the tensors; of no use afterwards if this raises.

    Returns:
        The skeleton.

    Raises:
        NotATreeError: This codec cannot carry the object.
    """
    try:
        with gc_paused():
            return msgspec.msgpack.encode(_Encoder(table).node(obj, "", 0))
    except UnicodeEncodeError:
        raise NotATreeError("it has a text that UTF-8 cannot carry") from None


class _Encoder:
    def __init__(self, table: Table) -> None:
        self._table = table
        # Containers are told apart by id(): the caller's object keeps them alive.
        self._seen: set[int] = set()
        # So are copies.
        self._copies: list[Any] = []

    def node(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is int:
            if _INTEGER_MIN <= value <= _INTEGER_MAX:
                return value
            size = value.bit_length() // 8 + 1
            return (Tag.INTEGER, value.to_bytes(size, "little", signed=True))
        if isinstance(value, torch.Tensor):
            row = self._table.add_tensor(value, path)
            if row is None:
                raise NotATreeError(
                    f"a {kind.__name__} that is sparse, quantized or nested, of a subclass, or has "
                    "Python attributes",
                    path,
                )
            return (Tag.TENSOR, row)
        container = _CONTAINERS.get(kind)
        if container is not None:
            if depth == _ENCODE_DEPTH_MAX:
                raise NotATreeError(f"nested deeper than {depth} levels", path)
            self._enter(value, path)
            return container(self, value, path + "." if path else "", depth + 1)
        leaf = _LEAVES.get(kind)
        if leaf is None:
            raise NotATreeError(f"a {kind.__name__}", path)
        return leaf(value)

    def _enter(self, value: Any, path: str) -> None:
        """Refuse what is shared: this codec would make copies of it."""
        if id(value) in self._seen:
            # Sharing of a tuple of plain values can't be noticed (the betas of an optimizer).
            if type(value) is tuple and all(type(item) in _PLAIN for item in value):
                return
            raise NotATreeError(f"a {type(value).__name__} that is in another place, too", path)
        self._seen.add(id(value))

    def sequence(self, value: Sequence[Any], tag: int, path: str, depth: int) -> Any:
        node = self.node
        return [
            tag,
            *[node(item, f"{path}{n}", depth) for n, item in interruptible(enumerate(value))],
        ]

    def members(self, value: set[Any], path: str, depth: int) -> Any:
        return [Tag.SET, *[self.node(item, path.removesuffix("."), depth) for item in value]]

    def pairs(self, value: dict[Any, Any], head: list[Any], path: str, depth: int) -> Any:
        node = self.node
        for key, item in interruptible(value.items()):
            if type(key) is not str and (
                type(key) is not int or not _INTEGER_MIN <= key <= _INTEGER_MAX
            ):
                raise NotATreeError(f"a dict with a {type(key).__name__} as key", path)
            head.append(key)
            head.append(node(item, f"{path}{key}", depth))
        return head

    def ordered(self, value: OrderedDict[Any, Any], path: str, depth: int) -> Any:
        # nn.Module.state_dict() hangs its versions on the dict, as an attribute.
        attributes = vars(value)
        if attributes.keys() - {"_metadata"}:
            raise NotATreeError("an OrderedDict with attributes", path)
        has = "_metadata" in attributes
        metadata = []
        if has:
            versions = without_mark(attributes["_metadata"])
            self._copies.append(versions)
            metadata = [self.node(versions, "_metadata", depth)]
        return self.pairs(value, [Tag.ORDERED_DICT, metadata], path, depth)


_ATOMS = frozenset({type(None), bool, float, str, bytes})
_PLAIN = _ATOMS | {int}
_CONTAINERS: dict[type, Callable[[_Encoder, Any, str, int], Any]] = {
    list: lambda e, value, path, depth: e.sequence(value, Tag.LIST, path, depth),
    tuple: lambda e, value, path, depth: e.sequence(value, Tag.TUPLE, path, depth),
    dict: lambda e, value, path, depth: e.pairs(value, [Tag.DICT], path, depth),
    OrderedDict: lambda e, value, path, depth: e.ordered(value, path, depth),
    set: lambda e, value, path, depth: e.members(value, path, depth),
}


def _dtype_leaf(value: torch.dtype) -> Any:
    if value not in DTYPE_NAMES:
        raise NotATreeError(f"it has {value}, which has no name in the format")
    return (Tag.DTYPE, DTYPE_NAMES[value])


def _size_leaf(value: torch.Size) -> Any:
    if len(value) > _SIZE_MAX:
        raise NotATreeError(f"a size of more than {_SIZE_MAX} dimensions")
    return (Tag.SIZE, *value)


_LEAVES: dict[type, Callable[[Any], Any]] = {
    complex: lambda value: (Tag.COMPLEX, value.real, value.imag),
    torch.Size: _size_leaf,
    torch.dtype: _dtype_leaf,
    torch.device: lambda value: (Tag.DEVICE, str(value)),
}


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
        if kind in _PLAIN:
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
        if _INTEGER_MIN <= value <= _INTEGER_MAX or value.bit_length() // 8 + 1 != len(data):
            raise ProtocolError("an integer that is not in its shortest form")
        return value

    def size(self, node: list[Any], depth: int) -> torch.Size:
        if len(node) > _SIZE_MAX + 1:
            raise LimitExceeded(f"a size of more than {_SIZE_MAX} dimensions")
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
