"""A second reader of the format, written from SPEC.md alone: slow, simple, and without torch.

It reads a message from bytes. It shares no code with the package, so where both of them agree about
a message, SPEC.md defines it. Section numbers in comments are those of SPEC.md.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import pickletools
import re
import struct
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgpack
import xxhash

MAGIC = bytes.fromhex("894154430d0a1a0a")
INT64_MAX = 2**63 - 1
DIGESTS = 1  # the only flag of the preface (3.1)
REQUIRES_GRAD, PARAMETER, CONJ, NEG = 1, 2, 4, 8  # flags of a tensor row (5.4)


class AiotorchioError(Exception):
    """An error, and its place: an offset of the message."""

    def __init__(self, message: str, offset: int | None = None) -> None:
        super().__init__(message)
        self.offset = offset


class ProtocolError(AiotorchioError):
    pass


class TruncatedError(AiotorchioError):
    pass


class ChecksumError(AiotorchioError):
    pass


class LimitExceeded(AiotorchioError):
    pass


class InvalidObjectError(AiotorchioError):
    pass


class UnsafeObjectError(AiotorchioError):
    pass


class RemoteAbort(AiotorchioError):
    """The sender gave up; ``consumed`` is where the next message may begin (3.6)."""

    def __init__(self, reason: str, consumed: int) -> None:
        super().__init__(reason, consumed)
        self.reason = reason
        self.consumed = consumed


@dataclass(frozen=True)
class Limits:
    """Section 7."""

    header_nbytes: int = 32 << 20
    skeleton_nbytes: int = 32 << 20
    chunk_nbytes: int = 64 << 20
    total_nbytes: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    entries: int = 500_000
    depth: int = 256
    dims: int = 64


# 5.3: itemsize, unit, kind.
DTYPES: dict[str, tuple[int, int, str]] = {
    "float64": (8, 8, "float"),
    "float32": (4, 4, "float"),
    "float16": (2, 2, "float"),
    "bfloat16": (2, 2, "float"),
    "float8_e4m3fn": (1, 1, "float"),
    "float8_e5m2": (1, 1, "float"),
    "float8_e8m0fnu": (1, 1, "float"),
    "float8_e4m3fnuz": (1, 1, "float"),
    "float8_e5m2fnuz": (1, 1, "float"),
    "float4_e2m1fn_x2": (1, 1, "float"),
    "complex128": (16, 8, "complex"),
    "complex64": (8, 4, "complex"),
    "complex32": (4, 2, "complex"),
    **{f"{u}int{8 * n}": (n, n, "integer") for u in ("", "u") for n in (8, 4, 2, 1)},
    **{f"{u}int{n}": (1, 1, "integer") for u in ("", "u") for n in range(1, 8)},
    "bool": (1, 1, "bool"),
    "qint32": (4, 4, "quantized"),
    "qint8": (1, 1, "quantized"),
    "quint8": (1, 1, "quantized"),
    "quint4x2": (1, 1, "quantized"),
    "quint2x4": (1, 1, "quantized"),
    "bits16": (2, 2, "bits"),
    "bits8": (1, 1, "bits"),
    "bits1x8": (1, 1, "bits"),
    "bits2x4": (1, 1, "bits"),
    "bits4x2": (1, 1, "bits"),
}


@dataclass(frozen=True)
class Storage:
    """5.2."""

    nbytes: int
    unit: int
    location: int


@dataclass(frozen=True)
class Row:
    """5.4."""

    storage: int
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    flags: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Header:
    """5.1."""

    byteorder: str
    nonce: bytes
    producer: str
    metadata: list[tuple[str, str]]
    codec: str
    chunk_size: int
    locations: list[str]
    storages: list[Storage]
    tensors: list[Row]

    def layout(self) -> tuple[list[int | None], int]:
        """The offset of each storage in the payload (None: it has no bytes there); size. 4.1."""
        end = 0
        offsets: list[int | None] = []
        for storage in self.storages:
            on_meta = self.locations[storage.location] == "meta"
            nbytes = 0 if on_meta else storage.nbytes
            offset = -(-end // 64) * 64
            if nbytes > 0:
                end = offset + nbytes
                offsets.append(offset)
            else:
                offsets.append(None)
        return offsets, end

    def chunks(self) -> list[tuple[int, int]]:
        """Offset in the payload and size of each chunk. 4.2."""
        total = self.layout()[1]
        size = self.chunk_size
        return [(at, min(size, total - at)) for at in range(0, total, size)]


# Proxies for torch's own classes. Each compares as torch's class does.


@dataclass(frozen=True)
class Tensor:
    row: int


class Size(tuple[int, ...]):
    pass


@dataclass(frozen=True)
class Dtype:
    name: str


@dataclass(frozen=True)
class Device:
    name: str


class TorchOrderedDict(OrderedDict[Any, Any]):
    """An OrderedDict, with ``[]`` or ``[the attribute _metadata]``."""

    metadata: list[Any]


@dataclass(frozen=True)
class StorageId:
    """A persistent id of a storage; no dtype: untyped. 6.2."""

    row: int
    dtype: str | None


@dataclass(frozen=True)
class Message:
    flags: int
    message_id: bytes
    header: Header
    skeleton: bytes
    tree: Any  # of the tree codec
    persistent_ids: list[int | StorageId]  # of the pickle codec, in order, with repetitions
    storages: list[bytes]  # as in the payload; empty on meta
    end: bytes  # the body of the DONE frame
    consumed: int

    def values(self, number: int) -> list[Any] | None:
        """Return the elements of a tensor in row-major order; None for an unknown dtype."""
        row = self.header.tensors[number]
        itemsize, unit, kind = DTYPES[row.dtype]
        code = {
            ("float", 8): "d",
            ("float", 4): "f",
            ("float", 2): "e",
            ("integer", 8): "q",
            ("integer", 4): "i",
            ("integer", 2): "h",
            ("integer", 1): "b",
            ("bool", 1): "?",
        }.get((kind.replace("complex", "float"), unit))
        if code is None or not re.fullmatch(
            r"b?float\d+|complex\d+|u?int(8|16|32|64)|bool", row.dtype
        ):
            return None
        if row.dtype.startswith("uint"):
            code = code.upper()
        if self.header.locations[self.header.storages[row.storage].location] == "meta":
            return None
        order = "<" if self.header.byteorder == "little" else ">"
        data = self.storages[row.storage]
        values: list[Any] = []
        for index in itertools.product(*map(range, row.shape)):
            steps = sum(i * s for i, s in zip(index, row.stride, strict=True))
            at = (row.offset + steps) * itemsize
            item = data[at : at + itemsize]
            if row.dtype == "bfloat16":  # the upper half of a binary32
                half = item if order == "<" else item[::-1]
                numbers = struct.unpack("<f", b"\0\0" + half)
            else:
                numbers = struct.unpack(f"{order}{itemsize // unit}{code}", item)
            if kind == "complex":
                real, imag = numbers
                imag = -imag if row.flags & CONJ else imag
                values.append((-real, -imag) if row.flags & NEG else (real, imag))
            else:
                values.append(-numbers[0] if row.flags & NEG else numbers[0])
        return values


# MessagePack (2)


def _unpacker(data: bytes) -> Any:
    unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=max(len(data), 1))
    unpacker.feed(data)
    return unpacker


def _decode(data: bytes, what: str) -> Any:
    """Decode one value that must fill all of the bytes."""
    unpacker = _unpacker(data)
    try:
        value = unpacker.unpack()
    except msgpack.exceptions.StackError:
        raise LimitExceeded(f"{what}: nested far too deep") from None
    except (msgpack.exceptions.UnpackException, ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"{what}: {error!r}") from None
    if unpacker.tell() != len(data):
        raise ProtocolError(f"{what}: bytes behind the value")
    return value


def _array_length(data: bytes, at: int) -> int | None:
    """Return how many items the head of an array announces; None: it is no array."""
    first = data[at] if at < len(data) else 0
    if 0x90 <= first <= 0x9F:
        return first & 15
    if first == 0xDC:
        return int.from_bytes(data[at + 1 : at + 3], "big")
    if first == 0xDD:
        return int.from_bytes(data[at + 1 : at + 5], "big")
    return None


# The header (5)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ProtocolError(what)


def _int(value: Any, what: str, lowest: int = 0, highest: int = INT64_MAX) -> int:
    _require(type(value) is int and lowest <= value <= highest, f"{what}: {value!r}")
    return int(value)


def _str(value: Any, what: str, longest: int | None = None) -> str:
    _require(type(value) is str and (longest is None or len(value) <= longest), what)
    return str(value)


def _list(value: Any, what: str, length: int | None = None) -> list[Any]:
    _require(type(value) is list and (length is None or len(value) == length), what)
    return list(value)


def _dtype(value: Any) -> str:
    name = _str(value, "dtype", 256)
    _require(name in DTYPES, "tensor: dtype")
    return name


def parse_header(body: bytes, limits: Limits) -> Header:
    """Rules 1 to 18 of 5.5, in their order."""
    # 1 to 3, in the order of the bytes
    _require(_array_length(body, 0) == 9, "header: not an array of 9")
    walk = _unpacker(body)
    try:
        walk.read_array_header()
    except (msgpack.exceptions.UnpackException, ValueError) as error:
        raise ProtocolError(f"header: {error!r}") from None

    def field() -> Any:
        """Return the next field."""
        start = walk.tell()
        try:
            walk.skip()
        except (msgpack.exceptions.UnpackException, ValueError) as error:
            raise ProtocolError(f"header: {error!r}") from None
        try:
            return _decode(body[start : walk.tell()], "header")
        except LimitExceeded as error:
            raise ProtocolError(str(error)) from None

    def table(what: str) -> list[Any]:
        """Return the next field, a table, whose items are counted first."""
        if (_array_length(body, walk.tell()) or 0) > limits.entries:
            raise LimitExceeded(f"header: too many {what}")
        return _list(field(), what)

    byteorder = _str(field(), "byteorder")
    _require(byteorder in ("little", "big"), "byteorder")
    nonce = field()
    _require(type(nonce) is bytes and len(nonce) == 16, "nonce")
    producer = _str(field(), "producer", 256)
    metadata = []
    for entry in table("metadata"):
        key, value = _list(entry, "metadata", 2)
        metadata.append((_str(key, "key of metadata"), _str(value, "value of metadata")))
    codec = _str(field(), "codec")
    _require(codec in ("tree", "pickle"), "codec")
    chunk_size = _int(field(), "chunk_size", 4096)
    locations = [_str(item, "location", 256) for item in table("locations")]
    storages = []
    for item in table("storages"):
        nbytes, unit, location = _list(item, "storage row", 3)
        storages.append(
            Storage(_int(nbytes, "nbytes"), _int(unit, "unit", 0, 8), _int(location, "location"))
        )
    tensors = []
    for item in table("tensors"):
        storage, dtype, offset, shape, stride, flags, names = _list(item, "tensor row", 7)
        tensors.append(
            Row(
                _int(storage, "storage"),
                _dtype(dtype),
                _int(offset, "offset"),
                tuple(_int(size, "shape") for size in _list(shape, "shape")),
                tuple(_int(step, "stride") for step in _list(stride, "stride")),
                _int(flags, "flags", 0, 15),
                tuple(_str(name, "name") for name in _list(names, "names")),
            )
        )
    _require(walk.tell() == len(body), "header: bytes behind it")
    header = Header(
        byteorder, nonce, producer, metadata, codec, chunk_size, locations, storages, tensors
    )
    # 4 to 9
    _require(chunk_size % 64 == 0, "chunk_size is not a multiple of 64")
    if chunk_size > limits.chunk_nbytes:
        raise LimitExceeded("chunk_size")
    _require(len({key for key, _ in metadata}) == len(metadata), "keys of metadata repeat")
    for entry_ in storages:
        _require(entry_.location < len(locations), "storage: location")
        _require(entry_.unit in (0, 1, 2, 4, 8), "storage: unit")
    payload = header.layout()[1]
    if payload > limits.total_nbytes:
        raise LimitExceeded("payload")
    _require(-(-payload // chunk_size) < 2**32, "number of chunks")
    # 10 to 18
    for row in tensors:
        _check_row(row, header, limits)
    # 5.1
    if byteorder != sys.byteorder and any(entry_.unit == 0 for entry_ in storages):
        raise InvalidObjectError("byte order cannot be swapped")
    return header


def _check_row(row: Row, header: Header, limits: Limits) -> None:
    _require(row.storage < len(header.storages), "tensor: storage")  # 10
    itemsize, unit, kind = DTYPES[row.dtype]
    if kind == "quantized":  # 12
        raise InvalidObjectError("tensor: quantized")
    storage = header.storages[row.storage]
    _require(storage.unit in (0, unit), "tensor: unit of its storage")  # 13
    if len(row.shape) != len(row.stride):  # 14
        raise InvalidObjectError("tensor: shape and stride differ in length")
    if len(row.shape) > limits.dims:  # 15
        raise LimitExceeded("tensor: dimensions")
    allowed = {"float": REQUIRES_GRAD | NEG, "complex": REQUIRES_GRAD | NEG | CONJ}.get(kind, 0)
    if row.flags & ~(allowed | PARAMETER):  # 16
        raise InvalidObjectError("tensor: flags")
    on_meta = header.locations[storage.location] == "meta"
    count = math.prod(row.shape)
    if count * itemsize > (INT64_MAX if on_meta else limits.total_nbytes):  # 17
        raise LimitExceeded("tensor: too large")
    reach = sum((size - 1) * step for size, step in zip(row.shape, row.stride, strict=True))
    if count and (row.offset + reach + 1) * itemsize > storage.nbytes:  # 18
        raise InvalidObjectError("tensor: beyond its storage")


# The tree codec (6.1)

_PLAIN = (type(None), bool, int, float, str, bytes)
# SPEC.md does not list the kinds of devices; these are those of torch 2.
_DEVICE = re.compile(
    r"(cpu|cuda|ipu|xpu|mkldnn|opengl|opencl|ideep|hip|ve|fpga|maia|xla|lazy|vulkan|mps|meta|hpu|mtia"
    r"|privateuseone)(:(0|[1-9][0-9]*))?",
    re.ASCII,
)


def parse_tree(body: bytes, rows: int, limits: Limits) -> Any:
    return _node(_decode(body, "skeleton"), rows, limits.depth)


def _node(value: Any, rows: int, depth: int) -> Any:
    if type(value) in _PLAIN:
        return value
    _require(
        type(value) is list and len(value) > 0, "node: not a value and not an array with a tag"
    )
    tag, *items = value
    _require(type(tag) is int and 0 <= tag <= 10, "node: tag")
    if depth < 1:
        raise LimitExceeded("skeleton: too deep")

    def nodes(values: list[Any]) -> list[Any]:
        return [_node(item, rows, depth - 1) for item in values]

    def pairs(values: list[Any]) -> list[tuple[Any, Any]]:
        _require(len(values) % 2 == 0, "dict: a key without a value")
        found = []
        seen: set[Any] = set()
        for key, item in zip(values[::2], values[1::2], strict=True):
            _require(type(key) in (str, int) and key not in seen, "dict: key")
            seen.add(key)
            found.append((key, _node(item, rows, depth - 1)))
        return found

    if tag == 0:
        return nodes(items)
    if tag == 1:
        return tuple(nodes(items))
    if tag == 2:
        return dict(pairs(items))
    if tag == 3:
        _require(len(items) > 0 and type(items[0]) is list and len(items[0]) <= 1, "OrderedDict")
        metadata = nodes(items[0])
        ordered = TorchOrderedDict(pairs(items[1:]))
        ordered.metadata = metadata
        return ordered
    if tag == 4:
        members: set[Any] = set()
        for member in nodes(items):
            try:
                hash(member)
            except TypeError:
                raise InvalidObjectError("set: unhashable member") from None
            _require(member not in members, "set: members repeat")
            members.add(member)
        return members
    return _leaf(tag, items, rows)


def _leaf(tag: int, items: list[Any], rows: int) -> Any:
    if tag == 6:
        _require(len(items) == 2 and all(type(item) is float for item in items), "complex")
        return complex(*items)
    if tag == 8:
        return Size(_int(item, "Size", -(2**63)) for item in items)
    _require(len(items) == 1, f"tag {tag}: number of items")
    item = items[0]
    if tag == 5:
        return Tensor(_int(item, "tensor", 0, rows - 1))
    if tag == 7:
        _require(type(item) is bytes, "big integer")
        number = int.from_bytes(item, "little", signed=True)
        _require(not -(2**63) <= number < 2**64, "big integer: it is small")
        _require(len(item) == abs(number).bit_length() // 8 + 1, "big integer: length")
        return number
    name = _str(item, f"tag {tag}: name")
    if tag == 9:
        _require(name in DTYPES, "dtype")
        return Dtype(name)
    if not _DEVICE.fullmatch(name):
        raise InvalidObjectError(f"unknown device {name!r}")
    return Device(name)


# The pickle codec (6.2)

_OPCODES = re.findall(
    r"\w+",
    """PROTO STOP GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1
    TUPLE2 TUPLE3 NONE NEWTRUE NEWFALSE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1
    BININT2 BINFLOAT LONG1 BINUNICODE SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT
    LONG_BINPUT""",
)
_OPERATIONS = {opcode.code: opcode for opcode in pickletools.opcodes}
_QSCHEMES = (
    "per_tensor_affine",
    "per_channel_affine",
    "per_tensor_symmetric",
    "per_channel_symmetric",
    "per_channel_affine_float_qparams",
)
_REBUILD = re.findall(
    r"\w+",
    """tensor_v2 tensor_v3 parameter parameter_with_state qtensor sparse_tensor nested_tensor
    meta_tensor_no_storage device_tensor_from_cpu_tensor wrapper_subclass""",
)
_GLOBALS = frozenset(
    [
        *(f"builtins.{name}" for name in ("bytearray", "bytes", "complex", "frozenset", "set")),
        "_codecs.encode",
        "collections.Counter",
        "collections.OrderedDict",
        *(f"torch.{name}" for name in ("Size", "Tensor", "device", *DTYPES, *_QSCHEMES)),
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch._tensor._rebuild_from_type_v2",
        *(f"torch._utils._rebuild_{name}" for name in _REBUILD),
    ]
)


class _StandIn(dict[Any, Any]):
    """A proxy for a global, and for all objects that it makes. It does nothing."""

    def __new__(cls, *args: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        super().__init__()

    def __call__(self, *args: object) -> _StandIn:
        return _StandIn()

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __setstate__(self, state: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, header: Header) -> None:
        super().__init__(file)
        self.header = header
        self.found: list[int | StorageId] = []

    def find_class(self, module: str, name: str) -> Any:
        # Names of Python 2, as pickle does.
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[(module, name)]
        else:
            module = IMPORT_MAPPING.get(module, module)
        if f"{module}.{name}" not in _GLOBALS:
            raise UnsafeObjectError(f"global {module}.{name}")
        return _StandIn

    def persistent_load(self, pid: Any) -> Any:
        if type(pid) is int:
            _require(0 <= pid < len(self.header.tensors), "persistent id: row of a tensor")
            self.found.append(pid)
            return _StandIn()
        if type(pid) is not tuple or (pid and pid[0] != "storage"):
            raise UnsafeObjectError("persistent id")
        _require(len(pid) == 3, "persistent id")
        _, row, name = pid
        rows = len(self.header.storages)
        _require(type(row) is int and 0 <= row < rows, "persistent id: row of a storage")
        _require(name is None or (type(name) is str and name in DTYPES), "persistent id: dtype")
        if name is not None and self.header.storages[row].nbytes % DTYPES[name][0]:
            raise InvalidObjectError("storage: not a multiple of the itemsize")
        self.found.append(StorageId(row, name))
        return _StandIn()


def parse_pickle(body: bytes, header: Header) -> list[int | StorageId]:
    """The persistent ids, in order; protocol, opcodes and globals as without trust in the sender.

    The arguments of calls and the appended items are not checked.
    """
    operations = io.BytesIO(body)
    try:
        name = ""
        while name != "STOP":
            code = operations.read(1)
            _require(len(code) == 1, "pickle: no STOP")
            opcode = _OPERATIONS.get(code.decode("latin1"))
            name = opcode.name if opcode else f"{code!r}"
            if opcode is None or name not in _OPCODES:
                raise UnsafeObjectError(f"opcode {name}")
            argument = opcode.arg.reader(operations) if opcode.arg else None
            if name == "PROTO" and argument != 2:
                raise UnsafeObjectError(f"protocol {argument}")
        _require(operations.tell() == len(body), "pickle: bytes behind STOP")
        unpickler = _Unpickler(io.BytesIO(body), header)
        unpickler.load()
    except AiotorchioError:
        raise
    except Exception as error:
        raise ProtocolError(f"pickle: {error!r}") from None
    return unpickler.found


# Frames (3)


@dataclass
class Reader:
    """Reads one message from the front of ``data``. Its attributes have the results so far."""

    data: bytes
    limits: Limits = field(default_factory=Limits)
    at: int = 0
    flags: int = 0
    message_id: bytes = b""
    header: Header | None = None
    skeleton: bytes = b""
    tree: Any = None
    persistent_ids: list[int | StorageId] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    _key: bytes = b""  # the first input of each digest (3.3)
    _heads: list[bytes] = field(default_factory=list)

    def _take(self, size: int) -> bytes:
        piece = self.data[self.at : self.at + size]
        if len(piece) < size:
            raise TruncatedError("the stream ends inside the message", len(self.data))
        self.at += size
        return piece

    def _preface(self) -> None:
        preface = self._take(16)
        magic, version, flags, reserved = struct.unpack("<8sHHI", preface)
        _require(magic == MAGIC, "magic")
        _require(version == 1, "version")
        _require(flags & ~DIGESTS == 0, "flags")
        _require(reserved == 0, "reserved")
        self.flags = flags
        self._key = preface

    def _frame(
        self, kind: bytes, number: int, offset: int, *, length: int | None = None, limit: int = 0
    ) -> bytes:
        """Read the body of the next frame: of exactly ``length``, or within ``limit``."""
        head = self._take(32)
        got_kind, got_number, got_offset, got_length, digest = struct.unpack("<4sIQQQ", head)
        # 3.4, rule 1
        _require(got_kind in (b"ABRT", kind), f"kind {got_kind!r}")
        abort = got_kind == b"ABRT"
        # 2
        expected = (0, 0) if abort else (number, offset)
        _require((got_number, got_offset) == expected, "number or offset")
        # 3
        if abort:
            _require(got_length <= 4096, "length of ABRT")
        elif length is None:
            if got_length > limit:
                raise LimitExceeded(f"length of {kind!r}")
        else:
            _require(got_length == length, f"length of {kind!r}")
        # 4
        unchecked = got_kind == b"CHNK" and not self.flags & DIGESTS
        if unchecked:
            _require(digest == 0, "digest in a message without")
        body = self._take(got_length)
        if not unchecked and xxhash.xxh3_64_intdigest(self._key + head[:24] + body) != digest:
            raise ChecksumError(f"digest of {got_kind!r}")
        if abort:  # 3.6
            try:
                reason = body.decode()
            except UnicodeDecodeError:
                raise ProtocolError("reason of an abort") from None
            raise RemoteAbort(reason, self.at)
        self._heads.append(head)
        return body

    def _body(self) -> Iterator[bytes]:
        self._preface()
        body = self._frame(b"HEAD", 0, 0, limit=self.limits.header_nbytes)
        self.message_id = xxhash.xxh3_128_digest(self._key + body)
        self._key = self.message_id
        self._heads.clear()  # 3.5 begins with SKEL
        header = self.header = parse_header(body, self.limits)
        self.skeleton = self._frame(b"SKEL", 0, 0, limit=self.limits.skeleton_nbytes)
        if header.codec == "tree":
            self.tree = parse_tree(self.skeleton, len(header.tensors), self.limits)
        else:
            self.persistent_ids = parse_pickle(self.skeleton, header)
        for number, (offset, size) in enumerate(header.chunks()):
            yield self._frame(b"CHNK", number, offset, length=size)

    def read(self) -> Message:
        self.chunks.extend(self._body())
        header = self.header
        assert header is not None
        offsets, size = header.layout()
        heads = b"".join(self._heads)
        end = self._frame(b"DONE", len(self.chunks), size, length=8)
        if end != struct.pack("<Q", xxhash.xxh3_64_intdigest(self.message_id + heads)):
            raise ChecksumError("digest of all heads")
        payload = b"".join(self.chunks)
        return Message(
            self.flags,
            self.message_id,
            header,
            self.skeleton,
            self.tree,
            self.persistent_ids,
            [
                b"" if offset is None else payload[offset : offset + row.nbytes]
                for offset, row in zip(offsets, header.storages, strict=True)
            ],
            end,
            self.at,
        )


def read(data: bytes, limits: Limits | None = None) -> Message:
    """Read the message at the front of ``data``; bytes after it are ignored."""
    return Reader(data, limits or Limits()).read()
