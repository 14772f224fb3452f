"""Skeletons of a hostile sender, each with the one class of error it gets, and the reason.

Every input here is harmless, to this package and to any other software. Where the size is the
attack, the case has low ``Limits`` or ``Bounds``, and a small input of the same shape that is
refused for the same reason.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import torch

from aiotorchio.codecs.pickled import scan
from tests.support.craft import (
    Code,
    assemble,
    build,
    call,
    get,
    name,
    new,
    ordered_dict,
    pickled,
    put,
    rebuild,
    storage,
    strided,
    subclassed,
    tensor,
)
from tests.support.reasons import LOW, REASONS

# Rows that the pickles refer to.
FLOATS, INDICES, BEYOND, WIDE, PAIR, SHORT = range(6)
QUANTA, EXPANDED, ODD, META, EXPANDED_INDICES, EQUAL_INDICES = range(6, 12)
ROWS, COLUMNS_BEYOND, BLOCKS, PLANES, META_INDICES = range(12, 17)
MODULUS = 2**61 - 1  # the modulus of hash(int)


@dataclass(frozen=True)
class Case:
    """A skeleton that is refused.

    Attributes:
        skeleton: The skeleton in the message.
        wanted: Name of the class of the error.
        reason: Words of the error, a regular expression.
        limits: The limits of the receiver, if not the default.
        bounds: The bounds of the checks, if not those of ``Bounds``.
    """

    skeleton: bytes
    wanted: str
    reason: str
    limits: dict[str, int] = field(default_factory=dict)
    bounds: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Marker:
    """A class that a caller trusts."""

    number: int


def tensors() -> list[torch.Tensor]:
    return [
        torch.arange(4.0),
        torch.tensor([[0, 1, 2, 3]]),
        torch.tensor([[0, 1, 2, 4]]),
        torch.tensor([[2]]),
        torch.tensor([0, 9, 0, 9])[::2],
        torch.tensor([1]),
        torch.zeros(4, dtype=torch.int8),
        torch.ones(1).expand(1000),
        torch.zeros(7, dtype=torch.uint8),
        torch.empty(4, device="meta"),
        torch.zeros(1, 1, dtype=torch.int64).expand(1, 4),
        torch.zeros(1, 4, dtype=torch.int64),
        torch.tensor([0, 4]),
        torch.tensor([0, 1, 2, 4]),
        torch.ones(4, 1, 1),
        torch.zeros(2, 4, dtype=torch.int64),
        torch.zeros(1, 4, dtype=torch.int64, device="meta"),
    ]


def unsafe() -> dict[str, Any]:
    tensor_name, parameter_name = name("torch", "Tensor"), name("torch.nn.parameter", "Parameter")
    rebuilt = name("torch._utils", "_rebuild_tensor_v2")
    args = (storage(FLOATS, "float32"), 0, (4,), (1,), False, ordered_dict())
    cases: dict[str, Any] = {
        # The call of any function is refused for its name: these would have no effect.
        "os": call("os", "getpid"),
        "posix": call("posix", "getpid"),
        "builtins": call("builtins", "print"),
        "builtins_of_python_2": call("__builtin__", "print"),
        "eval": call("builtins", "eval", "0"),
        "getattr": call("builtins", "getattr", "a", "upper"),
        "import": call("builtins", "__import__", "math"),
        "io": call("io", "StringIO"),
        "pickle": call("pickle", "encode_long", 1),
        "torch_function": call("torch", "is_grad_enabled"),
        "torch.hub": call("torch.hub", "get_dir"),
        "copyreg": call("copyreg", "clear_extension_cache"),
        "subprocess": call("subprocess", "list2cmdline", []),
        "sys": call("sys", "getrecursionlimit"),
        "class": call("fractions", "Fraction", 1),
        "long_name": call("x" + ".ab" * 20, "y"),
        "dotted": call("torch", "serialization.os.getpid"),
        "named_only": name("os", "system"),
        "numpy": call("numpy._core.multiarray", "_reconstruct", None, (0,), "b"),
        "numpy_1": call("numpy.core.multiarray", "_reconstruct", None, (0,), "b"),
        "FloatTensor": call("torch", "FloatTensor", 64),
        "FloatTensor_new": new("torch", "FloatTensor", 64),
        "FloatStorage": call("torch", "FloatStorage", 64),
        "UntypedStorage": call("torch", "UntypedStorage", 64),
        "UntypedStorage_new": new("torch.storage", "UntypedStorage", 64),
        "TypedStorage": call("torch.storage", "TypedStorage", 64),
        "Tensor": call("torch", "Tensor", 64),
        "Tensor_new": new("torch", "Tensor", 64),
        "Parameter": call("torch.nn.parameter", "Parameter", 64),
        "Parameter_new": new("torch.nn.parameter", "Parameter", tensor(FLOATS)),
        "new_of_function": new("torch._utils", "_rebuild_parameter", tensor(FLOATS)),
        "new_of_checked": new("builtins", "bytearray", 100),
        "bytearray": call("builtins", "bytearray", 100),
        "bytearray_of_list": call("builtins", "bytearray", [1, 2]),
        "bytes": call("builtins", "bytes", 100),
        "set_of_bytearray": call("builtins", "set", call("builtins", "bytearray", 100)),
        "set_of_bytes": call("builtins", "set", call("_codecs", "encode", "ab", "latin1")),
        "set_of_str": call("builtins", "set", "abc"),
        "set_of_tuple": call("builtins", "frozenset", (1, 2)),
        "set_of_dict": call("builtins", "set", {1: 2}),
        "set_of_set": call("builtins", "set", call("builtins", "set", [1])),
        "hex": call("_codecs", "encode", call("_codecs", "encode", "ab", "latin1"), "hex"),
        "punycode": call("_codecs", "encode", "\u00e4" * 10, "punycode"),
        "idna": call("_codecs", "encode", "abc", "idna"),
        "doubled_text_as_layout": call("torch.serialization", "_get_layout", texts_doubled(5)),
        "utf-16": call("_codecs", "encode", "abc", "utf-16"),
        "encode_errors": call("_codecs", "encode", "abc", "latin1", "ignore"),
        "codec_of_no_str": call("_codecs", "encode", "abc", ["latin1"]),
        "device_of_tuple": call("torch", "device", ("cpu", 0)),
        "size_of_list": call("torch", "Size", [1, 2]),
        "size_of_tensor": call("torch", "Size", tensor(INDICES)),
        "ordered_dict_of_items": call("collections", "OrderedDict", [("a", 1)]),
        "counter_of_list": call("collections", "Counter", [1, 1]),
        "counter_of_counter": call("collections", "Counter", call("collections", "Counter")),
        "cast": rebuild(
            "_rebuild_device_tensor_from_cpu_tensor",
            tensor(FLOATS),
            name("torch", "float64"),
            "cpu",
            False,
        ),
        "call_of_int": Code(b"K\x01)R"),
        "call_of_made": Code(assemble(ordered_dict()) + b")R"),
        "call_of_tensor": Code(assemble(tensor(0)) + b")R"),
        "new_of_int": Code(b"K\x01)\x81"),
        "state_of_tensor": build(tensor(FLOATS), (storage(INDICES), 0, (1,), (1,))),
        "state_of_rebuilt": build(strided(FLOATS, "float32", 0, (4,), (1,)), {"a": 1}),
        "state_of_parameter": build(
            rebuild("_rebuild_parameter", tensor(FLOATS), True, ordered_dict()), {"a": 1}
        ),
        "state_of_list": build([1], {"a": 1}),
        "state_of_counter": build(call("collections", "Counter"), {"most_common": 1}),
        "reference_of_str": Code(assemble("0") + b"Q"),
        "reference_of_none": Code(b"NQ"),
        "doubled_function": subclassed(Code(doubled(10)), tensor_name, args, {}),
        "doubled_class": subclassed(rebuilt, Code(doubled(10)), args, {}),
        "state_of_global": build(name("collections", "OrderedDict"), {"a": 1}),
        "state_of_pairs": build(ordered_dict(), [(Code(doubled(10)), None)]),
        "state_of_tuple_of_pairs": build(ordered_dict(), ([(Code(doubled(10)), None)], None)),
        "state_of_set": build(ordered_dict(), call("builtins", "set", [1])),
        "state_of_dict_made": build(ordered_dict(), ordered_dict()),
        "state_as_tensor": build(ordered_dict(), tensor(INDICES)),
        "state_of_size": build(call("torch", "Size", (1,)), {"a": 1}),
        "items_of_tensor": Code(assemble(tensor(INDICES)) + assemble(0) + assemble(9) + b"s"),
        "many_items_of_tensor": Code(assemble(tensor(INDICES)) + b"(K\x00K\x09u"),
        "append_to_tensor": Code(assemble(tensor(INDICES)) + b"K\x00a"),
        "append_to_int": Code(b"K\x01K\x01a"),
        "extend_dict": Code(b"}(K\x01K\x01e"),
        "items_of_list": Code(b"]K\x00K\x01s"),
        "from_type_of_call": subclassed(name("builtins", "complex"), tensor_name, (1.0,), {}),
        "from_type_of_none": subclassed(rebuilt, Code(b"N"), args, {}),
        "from_type_of_dtype": subclassed(rebuilt, name("torch", "float32"), args, {}),
        "from_type_args_list": subclassed(rebuilt, tensor_name, list(args), {}),
        "wrapper_of_tensor": rebuild(
            "_rebuild_wrapper_subclass",
            name("collections", "OrderedDict"),
            *(name("torch", "float32"), (4,), (1,), 0, name("torch", "float32"), "cpu", False),
        ),
    }
    for attribute in (
        *("data", "sum", "__class__", "__array_interface__", "__array_struct__", "grad", "shape"),
        *("__dict__", "_backward_hooks", "requires_grad", "__anything__", "_is_param"),
    ):
        cases[f"attribute_{attribute}"] = subclassed(rebuilt, tensor_name, args, {attribute: 1})
        cases[f"parameter_{attribute}"] = rebuild(
            "_rebuild_parameter_with_state", tensor(FLOATS), True, ordered_dict(), {attribute: 1}
        )
    cases["attribute_slots"] = subclassed(rebuilt, tensor_name, args, (None, {"data": 1}))
    cases["attribute_number"] = subclassed(rebuilt, parameter_name, args, {1: 2})
    return {key: pickled(value) for key, value in cases.items()} | unknown_opcodes()


def unknown_opcodes() -> dict[str, bytes]:
    known = scan._ACTIONS
    codes = {op.name: op.code.encode("latin-1") for op in pickletools.opcodes}
    cases = {
        f"opcode_{opcode}": b"\x80\x02" + code + b"\x00" * 16
        for opcode, code in codes.items()
        if code[0] not in known
    }
    cases |= {f"protocol_{n}": bytes([0x80, n]) + b"N." for n in (0, 1, 3, 4, 5, 255)}
    return cases | {"opcode_ff": b"\x80\x02\xff.", "zip": b"PK\x03\x04"}


def doubled(levels: int) -> Code:
    """A tuple of two of a tuple of two of ...: each level takes twice as long to hash."""
    return Code(b")" + (put(900) + get(900) + b"\x86") * levels)


def doubled_late(levels: int) -> Code:
    """The same of lists, which are empty until all others are made, the outermost filled first."""
    empty = b"".join(b"]" + put(1000 + level) for level in range(levels + 1))
    filled = b"".join(
        get(1000 + level) + b"(" + get(1000 + level - 1) * 2 + b"e"
        for level in range(levels, 0, -1)
    )
    return Code(b"](" + empty + filled + b"e")


def texts_doubled(levels: int) -> Code:
    """The same with a text: each level takes twice as long to show."""
    text = assemble(("x" * 100,))
    return Code(text + (put(901) + get(901) + b"\x86") * levels)


def equal_parts(count: int, levels: int) -> Code:
    """Keys of one hash that are equal, and not the same, up to their ends."""
    pairs = (
        doubled(levels) + assemble(number) + b"\x86" + b"N" for number in colliding_integers(count)
    )
    return Code(b"}(" + b"".join(pairs) + b"u")


def members_of_one_hash(count: int, levels: int) -> bytes:
    """A list of members of one hash."""
    return b"".join(
        doubled(levels) + assemble(number) + b"\x86" for number in colliding_integers(count)
    )


def filled_late(function: Code, items: Code) -> Code:
    """A call whose arguments were made of a list that got its items afterwards."""
    opening = b"](" + b"]" + put(1) + b"\x85" + put(2)
    fill = get(1) + b"(" + items + b"e"
    return Code(opening + fill + function + get(2) + b"R" + b"e")


def colliding_integers(count: int) -> list[int]:
    """A few integers of more than 64 bits with the same hash."""
    return [n * MODULUS + 1 for n in range(2**4, 2**4 + count)]


# Three with the same hash.
COLLIDING_TUPLES = ((1, 1), (5, 1678395250935405367), (25, -1526424474090560516))


def keys(values: Iterable[Any]) -> Code:
    """A dict with these keys, as opcodes: no dict of this process has to hold them."""
    return Code(b"}(" + b"".join(assemble(value) + b"N" for value in values) + b"u")


def limits() -> dict[str, bytes]:
    key = Code(doubled(12))
    text = "x" * 1000
    encode, encode_args = name("_codecs", "encode"), assemble((text, "latin1"))
    cases: dict[str, Any] = {
        "empty_sets": Code(b"](" + b"\x8f" * 200 + b"e"),
        "empty_lists": Code(b"](" + b"]" * 200 + b"e"),
        "marks": Code(b"(" * 200),
        "encoded_often": Code(b"](" + encode_args + put(1) + (encode + get(1) + b"R") * 60 + b"e"),
        "bytearrays": Code(
            b"]("
            + encode
            + encode_args
            + b"R\x85"
            + put(1)
            + (name("builtins", "bytearray") + get(1) + b"R") * 60
            + b"e"
        ),
        "sets_of_one_list": Code(
            b"]("
            + assemble(list(range(50)))
            + b"\x85"
            + put(1)
            + (name("builtins", "set") + get(1) + b"R") * 60
            + b"e"
        ),
        "deep_list": Code(b"]" * 12 + b"a" * 11),
        "deep_tuple": Code(b")" + b"\x85" * 12),
        "deep_tuple_key": Code(b"})" + b"\x85" * 12 + b"Ns"),
        "deep_tuple_300_key": Code(b"})" + b"\x85" * 300 + b"Ns"),
        "deep_dict": Code(b"}" + b"K\x01}" * 12 + b"s" * 12),
        "deep_calls": Code(b"K\x01" + (b"\x85" + put(1)) * 12),
        "doubled_key": {Code(key): 1},
        "doubled_set": call("builtins", "set", [key]),
        "doubled_frozenset": call("builtins", "frozenset", [key]),
        "doubled_codec": call("_codecs", "encode", "abc", key),
        "doubled_complex": call("builtins", "complex", key),
        "doubled_counter": call("collections", "Counter", {Code(key): 1}),
        "doubled_ordered": Code(assemble(ordered_dict()) + key + b"Ns"),
        "doubled_late_set": filled_late(name("builtins", "set"), key),
        "doubled_late_frozenset": filled_late(name("builtins", "frozenset"), key),
        "doubled_lists_late": doubled_late(10),
        "doubled_slowly": Code(b"](" + doubled(8) + put(1) + (b"}" + get(1) + b"Ns") * 3 + b"e"),
        "colliding_integers": keys(colliding_integers(6)),
        "wide_keys": keys(n * 1_000_003 for n in range(1, 13)),
        "wide_members": call("builtins", "set", [n * 1_000_003 for n in range(1, 13)]),
        "equal_parts_in_colliding_keys": equal_parts(6, 5),
        "equal_parts_in_a_set": Code(
            name("builtins", "set") + b"](" + members_of_one_hash(6, 5) + b"e\x85R"
        ),
        "colliding_tuples": keys(COLLIDING_TUPLES),
        "colliding_sizes": keys(call("torch", "Size", pair) for pair in COLLIDING_TUPLES),
        "complex_keys": keys(
            call("builtins", "complex", -1000003.0 * n, float(n)) for n in range(6)
        ),
        "colliding_set": call("builtins", "set", colliding_integers(6)),
        "colliding_frozenset": call("builtins", "frozenset", list(COLLIDING_TUPLES)),
        "expanded": strided(FLOATS, "float32", 0, (100,), (0,)),
        "copied_counters": [
            Code(assemble(dict.fromkeys(range(20), 0)) + put(0)),
            *[call("collections", "Counter", get(0))] * 100,
        ],
        "many_dims": strided(FLOATS, "float32", 0, (1,) * 6, (1,) * 6),
        "meta": rebuild(
            "_rebuild_meta_tensor_no_storage", name("torch", "float32"), (2**62,), (1,), False
        ),
        "quantized_huge": rebuild(
            "_rebuild_qtensor",
            *(storage(QUANTA, "qint8"), 0, (100,), (0,)),
            *((name("torch", "per_tensor_affine"), 1.0, 0), False, ordered_dict()),
        ),
        "coo_often": [sparse("sparse_coo", tensor(INDICES), tensor(FLOATS), (4,))] * 3,
        "coo_of_none_often": [
            sparse(
                "sparse_coo",
                strided(INDICES, "int64", 0, (1, 0), (1, 1)),
                strided(FLOATS, "float32", 0, (0,), (1,)),
                (4,),
            )
        ]
        * 12,
        "csr_often": [
            sparse(
                "sparse_csr",
                *(tensor(ROWS), strided(INDICES, "int64", 0, (4,), (1,)), tensor(FLOATS), (1, 4)),
            )
        ]
        * 2,
        "nested_often": [nested(FLOATS, WIDE, WIDE, SHORT)] * 12,
        "jagged_often": [
            call(
                "torch.nested._internal.nested_tensor",
                "_rebuild_njt",
                {"values": tensor(FLOATS), "offsets": tensor(ROWS)},
            )
        ]
        * 12,
    }
    return {key: pickled(value) for key, value in cases.items()}


def quantized(params: Any, size: Any = (4,), stride: Any = (1,), dtype: str = "qint8") -> Code:
    source = storage(QUANTA, dtype)
    return rebuild("_rebuild_qtensor", source, 0, size, stride, params, False, ordered_dict())


def sparse(layout: str, *parts: Any) -> Code:
    return rebuild(
        "_rebuild_sparse_tensor",
        call("torch.serialization", "_get_layout", f"torch.{layout}"),
        parts,
    )


def nested(buffer: int, sizes: int, strides: int, offsets: int) -> Code:
    return rebuild("_rebuild_nested_tensor", *map(tensor, (buffer, sizes, strides, offsets)))


def invalid() -> dict[str, bytes]:
    per_tensor, per_channel = (
        name("torch", "per_tensor_affine"),
        name("torch", "per_channel_affine"),
    )
    attributed = ordered_dict()
    float32 = name("torch", "float32")
    cases: dict[str, Any] = {
        "size": strided(FLOATS, "float32", 0, (5,), (1,)),
        "stride": strided(FLOATS, "float32", 0, (4,), (2,)),
        "offset": strided(FLOATS, "float32", 1, (4,), (1,)),
        "negative_size": strided(FLOATS, "float32", 0, (-1,), (1,)),
        "negative_stride": strided(FLOATS, "float32", 3, (4,), (-1,)),
        "negative_offset": strided(FLOATS, "float32", -1, (4,), (1,)),
        "huge_stride": strided(FLOATS, "float32", 0, (2,), (2**63,)),
        "huge_stride_of_one": strided(FLOATS, "float32", 0, (1,), (2**70,)),
        "bool_size": strided(FLOATS, "float32", 0, (True,), (1,)),
        "float_size": strided(FLOATS, "float32", 0, (2.0,), (1,)),
        "size_of_str": strided(FLOATS, "float32", 0, "abcd", (1,)),
        "dims": strided(FLOATS, "float32", 0, (2, 2), (1,)),
        "other_dtype": strided(FLOATS, "float64", 0, (4,), (1,)),
        "odd_storage": strided(ODD, "float32", 0, (1,), (1,)),
        "tensor_as_storage": rebuild(
            "_rebuild_tensor_v2", tensor(FLOATS), 0, (4,), (1,), False, ordered_dict()
        ),
        "requires_grad_of_int": rebuild(
            "_rebuild_tensor_v2", storage(INDICES, "int64"), 0, (1,), (1,), True, ordered_dict()
        ),
        "requires_grad_int": rebuild(
            "_rebuild_tensor_v2", storage(FLOATS, "float32"), 0, (4,), (1,), 1, ordered_dict()
        ),
        "conj_of_float": strided(FLOATS, "float32", 0, (4,), (1,), {"conj": True}),
        "neg_of_int": strided(INDICES, "int64", 0, (4,), (1,), {"neg": True}),
        "metadata": strided(FLOATS, "float32", 0, (4,), (1,), {"other": True}),
        "metadata_list": strided(FLOATS, "float32", 0, (4,), (1,), [1]),
        "quantized_without_scale": strided(QUANTA, "qint8", 0, (4,), (1,)),
        "arguments": rebuild("_rebuild_tensor_v2", storage(FLOATS, "float32")),
        "untyped_v3": rebuild(
            "_rebuild_tensor_v3", storage(FLOATS), 0, (5,), (1,), False, ordered_dict(), float32
        ),
        "meta_span": rebuild(
            "_rebuild_meta_tensor_no_storage", float32, (2, 2), (2**62, 2**62), False
        ),
        "meta_dtype": rebuild("_rebuild_meta_tensor_no_storage", "float32", (2,), (1,), False),
        "quantized_size": quantized((per_tensor, 1.0, 0), (5,)),
        "quantized_dtype": quantized((per_tensor, 1.0, 0), dtype="int8"),
        "quantized_params": quantized([per_tensor, 1.0, 0]),
        "size_of_70_bits": call("torch", "Size", (2**70,)),
        "device_wrapped": call("torch", "device", "cuda", 300),
        "quantized_zero_point": quantized((per_tensor, 1.0, 2**62)),
        "quantized_scheme": quantized(("nonsense", tensor(FLOATS), tensor(FLOATS), 0)),
        "quantized_short": quantized((per_tensor, 1.0)),
        "quantized_scale": quantized((per_tensor, "1", 0)),
        "quantized_channels": quantized((per_channel, tensor(SHORT), tensor(SHORT), 0)),
        "quantized_axis": quantized((per_channel, tensor(FLOATS), tensor(FLOATS), 1)),
        "quantized_axis_negative": quantized((per_channel, tensor(FLOATS), tensor(FLOATS), -1)),
        "quantized_meta": quantized((per_channel, tensor(META), tensor(META), 0)),
        "quantized_sparse": quantized(
            (per_channel, sparse("sparse_coo", tensor(INDICES), tensor(FLOATS), (4,)), 0, 0)
        ),
        "quantized_expanded": quantized((per_channel, tensor(EXPANDED), tensor(EXPANDED), 0)),
        "quantized_none": quantized((per_channel, None, None, 0)),
        "coo_index": sparse("sparse_coo", tensor(BEYOND), tensor(FLOATS), (4,)),
        "coo_size": sparse("sparse_coo", tensor(INDICES), tensor(FLOATS), (3,)),
        "coo_negative": sparse("sparse_coo", tensor(INDICES), tensor(FLOATS), (-4,)),
        "coo_overflow": sparse("sparse_coo", tensor(PLANES), tensor(FLOATS), (2**62, 2**62)),
        "coo_values": sparse("sparse_coo", tensor(INDICES), tensor(SHORT), (4,)),
        "coo_expanded": sparse("sparse_coo", tensor(EXPANDED_INDICES), tensor(FLOATS), (4,)),
        "coo_uncoalesced": sparse("sparse_coo", tensor(EQUAL_INDICES), tensor(FLOATS), (4,), True),
        "coo_coalesced": sparse("sparse_coo", tensor(INDICES), tensor(FLOATS), (4,), 1),
        "coo_meta": sparse("sparse_coo", tensor(META_INDICES), tensor(FLOATS), (4,)),
        "coo_floats": sparse("sparse_coo", tensor(FLOATS), tensor(FLOATS), (4,)),
        "coo_parts": sparse("sparse_coo", tensor(INDICES), tensor(FLOATS)),
        "coo_shape": sparse("sparse_coo", tensor(INDICES), tensor(FLOATS), tensor(INDICES)),
        "csr_index": sparse(
            "sparse_csr", tensor(ROWS), tensor(COLUMNS_BEYOND), tensor(FLOATS), (1, 4)
        ),
        "csr_crow": sparse("sparse_csr", tensor(PAIR), tensor(SHORT), tensor(FLOATS), (1, 4)),
        "csr_parts": sparse("sparse_csr", tensor(SHORT), tensor(SHORT), tensor(FLOATS)),
        "bsr_index": sparse(
            "sparse_bsr", tensor(ROWS), tensor(COLUMNS_BEYOND), tensor(BLOCKS), (1, 4)
        ),
        "sparse_layout": sparse("strided", tensor(SHORT), tensor(SHORT), (1,)),
        "doubled_layout": rebuild("_rebuild_sparse_tensor", doubled(10), (1, 2, 3)),
        "doubled_device": rebuild(
            "_rebuild_device_tensor_from_cpu_tensor", tensor(FLOATS), float32, doubled(10), False
        ),
        "doubled_size": strided(FLOATS, "float32", 0, doubled(10), (1,)),
        "doubled_offset": strided(FLOATS, "float32", doubled(10), (4,), (1,)),
        "doubled_metadata": strided(FLOATS, "float32", 0, (4,), (1,), doubled(10)),
        "doubled_params": quantized(doubled(10)),
        "doubled_scheme": quantized((doubled(10), 1.0, 0)),
        "doubled_cast": rebuild(
            "_rebuild_device_tensor_from_cpu_tensor", tensor(FLOATS), doubled(10), "cpu", False
        ),
        "sparse_list": rebuild("_rebuild_sparse_tensor", None, [1]),
        "nested_beyond": nested(SHORT, WIDE, WIDE, SHORT),
        "nested_offset": nested(FLOATS, WIDE, WIDE, PAIR),
        "nested_expanded": nested(EXPANDED, WIDE, WIDE, SHORT),
        "nested_float_sizes": nested(FLOATS, FLOATS, FLOATS, FLOATS),
        "nested_meta": nested(FLOATS, META, META, META),
        "nested_not_tensors": rebuild("_rebuild_nested_tensor", 1, 2, 3, 4),
        "hidden_method": build(attributed, {"items": 1}),
        "hidden_keys": build(attributed, {"keys": None}),
        "hidden_dunder": build(attributed, {"__array_interface__": {}}),
        "hidden_number": build(attributed, {1: 2}),
        "unhashable_set": call("builtins", "set", [[1]]),
        "unhashable_key": {Code(b"]"): 1},
        "encode_wide": call("_codecs", "encode", "\u20ac", "latin1"),
        "complex": call("builtins", "complex", "x"),
        "size_of_letters": call("torch", "Size", ("a",)),
        "device": call("torch", "device", "nowhere"),
        "parameter_of_none": rebuild("_rebuild_parameter", None, True, ordered_dict()),
        "storage_of_odd_size": storage(ODD, "float32"),
    }
    return {key: pickled(value) for key, value in cases.items()}


def protocol() -> dict[str, bytes]:
    good = pickled({"a": (1, [2, "x"]), "t": tensor(0)})
    return {
        "empty": b"",
        "trailing": good + b".",
        "two": good + good,
        "tensor_row": pickled(tensor(999)),
        "tensor_negative": pickled(tensor(-1)),
        "storage_row": pickled(storage(999)),
        "storage_negative": pickled(storage(-1)),
        "storage_dtype": pickled(storage(0, "float33")),
        "storage_parts": pickled(Code(assemble(("storage", 0)) + b"Q")),
        "doubled_dtype": pickled(Code(assemble(("storage", 0, Code(doubled(10)))) + b"Q")),
        "empty_reference": pickled(Code(b")Q")),
        "doubled_reference": pickled(Code(assemble(("storage", Code(doubled(10)), None)) + b"Q")),
        "memo": pickled(get(5)),
        "left_over": b"\x80\x02NN.",
        "left_mark": b"\x80\x02N(N.",
        "nothing": b"\x80\x02.",
        "no_mark": b"\x80\x02Nt.",
        "no_operands": b"\x80\x02N\x87.",
        "no_function": b"\x80\x02)R.",
        "no_class": b"\x80\x02)\x81.",
        "no_arguments": pickled(Code(name("collections", "OrderedDict") + b"NR")),
        "list_arguments": pickled(Code(name("collections", "OrderedDict") + b"]R")),
        "odd_items": b"\x80\x02}(NNNu.",
        "no_memo_target": b"\x80\x02q\x00N.",
        "no_list": b"\x80\x02Na.",
        "global_cut": b"\x80\x02cos",
        "global_not_utf8": b"\x80\x02c\xff\n\xff\n.",
        "length_beyond": b"\x80\x02X\xff\x00\x00\x00x.",
    }


def node(*items: Any) -> list[Any]:
    return list(items)


def trees() -> dict[str, Case]:
    """Skeletons of the tree codec."""
    pack: Callable[[Any], bytes] = msgpack.packb

    def integer(value: int) -> list[Any]:
        return [7, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)]

    good = pack([2, "a", [0, 1, [5, 0]], "b", [8, 1, 2]])
    cases: dict[str, tuple[bytes, str]] = {
        "trailing": (good + b"\xc0", "ProtocolError"),
        "empty": (b"", "ProtocolError"),
        "map": (pack({"a": 1}), "ProtocolError"),
        "map_inside": (pack([0, {"a": 1}]), "ProtocolError"),
        "extension": (pack(msgpack.ExtType(5, b"x")), "ProtocolError"),
        "timestamp": (pack(msgpack.Timestamp(1)), "ProtocolError"),
        "unknown_tag": (pack([11]), "ProtocolError"),
        "negative_tag": (pack([-1]), "ProtocolError"),
        "bool_tag": (pack([True]), "ProtocolError"),
        "str_tag": (pack(["a"]), "ProtocolError"),
        "no_tag": (pack([]), "ProtocolError"),
        "row": (pack([5, 99]), "ProtocolError"),
        "row_negative": (pack([5, -1]), "ProtocolError"),
        "row_bool": (pack([5, True]), "ProtocolError"),
        "row_none": (pack([5]), "ProtocolError"),
        "rows": (pack([5, 0, 0]), "ProtocolError"),
        "key_without_value": (pack([2, "a"]), "ProtocolError"),
        "duplicate_key": (pack([2, "a", 1, "a", 2]), "ProtocolError"),
        "duplicate_ordered": (pack([3, [], 1, 1, 1, 2]), "ProtocolError"),
        "bool_key": (pack([2, True, 1]), "ProtocolError"),
        "float_key": (pack([2, 1.0, 1]), "ProtocolError"),
        "bytes_key": (pack([2, b"a", 1]), "ProtocolError"),
        "node_key": (pack([2, [1], 1]), "ProtocolError"),
        "ordered_without_metadata": (pack([3]), "ProtocolError"),
        "ordered_none": (pack([3, None]), "ProtocolError"),
        "ordered_two": (pack([3, [1, 2]]), "ProtocolError"),
        "duplicate_item": (pack([4, 1, 1]), "ProtocolError"),
        "equal_items": (pack([4, 1, True]), "ProtocolError"),
        "unhashable": (pack([4, [0]]), "InvalidObjectError"),
        "complex_integers": (pack([6, 1, 2]), "ProtocolError"),
        "complex_short": (pack([6, 1.0]), "ProtocolError"),
        "short_integer": (pack(integer(5)), "ProtocolError"),
        "long_integer": (pack([7, b"\x00" * 20]), "ProtocolError"),
        "empty_integer": (pack([7, b""]), "ProtocolError"),
        "integer_of_str": (pack([7, "abcdefghijkl"]), "ProtocolError"),
        "size_beyond": (pack([8, 2**63]), "ProtocolError"),
        "wide_keys": (
            pack([2, *(x for n in range(1, 13) for x in (n * 1_000_003, 0))]),
            "LimitExceeded",
        ),
        "wide_members": (pack([4, *(n * 1_000_003 for n in range(1, 13))]), "LimitExceeded"),
        "wide_members_of_many": (
            pack([0, *([4, *(n * 1_000_003 for n in range(1, 5))] for _ in range(12))]),
            "LimitExceeded",
        ),
        "size_of_many": (pack([8, *[1] * 4097]), "LimitExceeded"),
        "size_of_str": (pack([8, "a"]), "ProtocolError"),
        "dtype": (pack([9, "float33"]), "ProtocolError"),
        "dtype_number": (pack([9, 1]), "ProtocolError"),
        "dtype_attribute": (pack([9, "Tensor"]), "ProtocolError"),
        "device": (pack([10, "nowhere"]), "InvalidObjectError"),
        "device_index": (pack([10, "cuda:99999999999999999999"]), "InvalidObjectError"),
        "device_wrapped": (pack([10, "cuda:300"]), "InvalidObjectError"),
        "device_empty": (pack([10, ""]), "InvalidObjectError"),
        "device_null": (pack([10, "cpu\x00"]), "InvalidObjectError"),
        "utf8": (b"\xa2\xff\xff", "ProtocolError"),
        "surrogate": (b"\xa3\xed\xa0\x80", "ProtocolError"),
        "length": (b"\xdd\x00\x00\x01\x00", "ProtocolError"),
        "bytes_length": (b"\xc6\x00\x00\x01\x00", "ProtocolError"),
        "reserved": (b"\xc1", "ProtocolError"),
        "depth": (b"\x92\x00" * 300 + b"\xc0", "LimitExceeded"),
        "depth_of_few": (b"\x92\x00" * 30 + b"\xc0", "LimitExceeded"),
        "depth_of_objects": (b"\x92\x00" * 12 + b"\xc0", "LimitExceeded"),
        "map_depth": (b"\x81\xa1a" * 12 + b"\xc0", "ProtocolError"),
        "empty_lists": (
            b"\xdc" + struct.pack(">H", 200) + b"\x90" * 200,
            "LimitExceeded",
        ),
        "colliding_integers": (
            pack([4, *map(integer, colliding_integers(6))]),
            "LimitExceeded",
        ),
        "colliding_tuples": (
            pack([4, *([1, *pair] for pair in COLLIDING_TUPLES)]),
            "LimitExceeded",
        ),
        "empty_sets": (pack([0, *[[4]] * 200]), "LimitExceeded"),
        "small_dicts": (pack([0, *[[2, 0, 0]] * 200]), "LimitExceeded"),
        "colliding_complex": (
            pack([4, *([6, -1000003.0 * n, float(n)] for n in range(6))]),
            "LimitExceeded",
        ),
    }
    refused = {key: case("tree", key, *parts) for key, parts in cases.items()}
    for n in range(len(good)):
        refused[f"cut_{n}"] = Case(good[:n], "ProtocolError", "truncated|ends inside|not whole")
    return refused


def case(codec: str, key: str, skeleton: bytes, wanted: str) -> Case:
    """A case with its reason, limits and bounds from ``reasons``."""
    reasons = [words for words, keys in REASONS[codec][wanted].items() if key in keys.split()]
    assert len(reasons) == 1, f"{codec} {wanted} {key}: {reasons}"
    limits, bounds = next(
        (low for *low, keys in LOW if f"{codec}-{key}" in keys.split()),
        ({}, {}),
    )
    return Case(skeleton, wanted, reasons[0], limits, bounds)


def pickles() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for wanted, family in (
        ("UnsafeObjectError", unsafe()),
        ("LimitExceeded", limits()),
        ("InvalidObjectError", invalid()),
        ("ProtocolError", protocol()),
    ):
        for key, skeleton in family.items():
            cases[f"{wanted}-{key}"] = case("pickle", key, skeleton, wanted)
    good = pickled({"a": (1, [2, "x", 2.5]), "t": tensor(0), "s": call("builtins", "set", [1])})
    for n in range(len(good)):
        cases[f"cut_{n}"] = Case(good[:n], "ProtocolError", "the pickle ends")
    return cases
