"""What a hostile sender puts into a skeleton, each with the one class of error it gets.

Several of these crash, hang or fill the memory of a process that is not protected, so this module
is also a program: ``python -m tests.graph.hostile`` loads all of them, one line of output each,
under a limit of memory. ``tests/graph/test_hostile.py`` runs it once.
"""

from __future__ import annotations

import pickletools
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgpack
import torch

import aiotorchio
from aiotorchio.graph import prescan
from tests.graph import forge
from tests.graph.forge import (
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

Case = tuple[bytes, str]  # a message, and the name of the class it is refused with

# Rows that the pickles refer to.
FLOATS, INDICES, BEYOND, WIDE, PAIR, SHORT = range(6)
QUANTA, EXPANDED, ODD, META, EXPANDED_INDICES, EQUAL_INDICES = range(6, 12)
MODULUS = 2**61 - 1  # of hash(int)


@dataclass(frozen=True)
class Marker:
    """A class that a caller trusts."""

    number: int


def tensors() -> list[torch.Tensor]:
    return [
        torch.arange(4.0),
        torch.tensor([[0, 1, 2, 3]]),
        torch.tensor([[0, 1, 2, 9]]),
        torch.tensor([[2]]),
        torch.tensor([0, 2**40, 0, 2**40])[::2],
        torch.tensor([1]),
        torch.zeros(4, dtype=torch.int8),
        torch.ones(1).expand(1000),
        torch.zeros(7, dtype=torch.uint8),
        torch.empty(4, device="meta"),
        torch.zeros(1, 1, dtype=torch.int64).expand(1, 4),
        torch.zeros(1, 4, dtype=torch.int64),
    ]


def unsafe() -> dict[str, Any]:
    tensor_name, parameter_name = name("torch", "Tensor"), name("torch.nn.parameter", "Parameter")
    rebuilt = name("torch._utils", "_rebuild_tensor_v2")
    args = (storage(FLOATS, "float32"), 0, (4,), (1,), False, ordered_dict())
    cases: dict[str, Any] = {
        "os.system": call("os", "system", "exit 7"),
        "posix.system": call("posix", "system", "exit 7"),
        "eval": call("builtins", "eval", "1/0"),
        "eval_of_python_2": call("__builtin__", "eval", "1/0"),
        "exec": call("builtins", "exec", "1/0"),
        "getattr": call("builtins", "getattr", "a", "upper"),
        "import": call("builtins", "__import__", "os"),
        "open": call("io", "open", "/dev/null"),
        "pickle.loads": call("pickle", "loads", "N."),
        "torch.load": call("torch", "load", "/dev/null"),
        "torch.hub": call("torch.hub", "load", "x"),
        "copyreg": call("copyreg", "_reconstructor", None, None, None),
        "subprocess": call("subprocess", "Popen", "true"),
        "sys.exit": call("sys", "exit", 7),
        "name_of_megabytes": call("x" + ".ab" * 10**6, "y"),
        "dotted": call("torch", "serialization.os.system", "exit 7"),
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
        "new_of_checked": new("builtins", "bytearray", 2**31),
        "bytearray": call("builtins", "bytearray", 2**31),
        "bytearray_of_list": call("builtins", "bytearray", [1, 2]),
        "bytes": call("builtins", "bytes", 2**31),
        "set_of_bytearray": call("builtins", "set", call("builtins", "bytearray", 10**9)),
        "set_of_bytes": call("builtins", "set", call("_codecs", "encode", "ab", "latin1")),
        "set_of_str": call("builtins", "set", "abc"),
        "set_of_tuple": call("builtins", "frozenset", (1, 2)),
        "set_of_dict": call("builtins", "set", {1: 2}),
        "set_of_set": call("builtins", "set", call("builtins", "set", [1])),
        "hex": call("_codecs", "encode", call("_codecs", "encode", "ab", "latin1"), "hex"),
        "punycode": call("_codecs", "encode", "\u00e4" * 1000, "punycode"),
        "idna": call("_codecs", "encode", "abc", "idna"),
        "doubled_text_as_layout": call("torch.serialization", "_get_layout", texts_doubled(20)),
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
        "doubled_function": subclassed(Code(doubled(60)), tensor_name, args, {}),
        "doubled_class": subclassed(rebuilt, Code(doubled(60)), args, {}),
        "state_of_global": build(name("collections", "OrderedDict"), {"a": 1}),
        "state_of_pairs": build(ordered_dict(), [(Code(doubled(60)), None)]),
        "state_of_tuple_of_pairs": build(ordered_dict(), ([(Code(doubled(60)), None)], None)),
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
    known = prescan._ACTIONS
    codes = {op.name: op.code.encode("latin-1") for op in pickletools.opcodes}
    cases = {
        f"opcode_{opcode}": b"\x80\x02" + code + b"\x00" * 16
        for opcode, code in codes.items()
        if code[0] not in known
    }
    cases |= {f"protocol_{n}": bytes([0x80, n]) + b"N." for n in (0, 1, 3, 4, 5, 255)}
    return cases | {"opcode_ff": b"\x80\x02\xff.", "zip": b"PK\x03\x04"}


def doubled(levels: int) -> Code:
    """A tuple of two of a tuple of two of ...: small in memory, endless to hash."""
    return Code(b")" + (put(900) + get(900) + b"\x86") * levels)


def doubled_late(levels: int) -> Code:
    """Likewise of lists, which are empty until all others are made, the outermost filled first."""
    empty = b"".join(b"]" + put(1000 + level) for level in range(levels + 1))
    filled = b"".join(
        get(1000 + level) + b"(" + get(1000 + level - 1) * 2 + b"e"
        for level in range(levels, 0, -1)
    )
    return Code(b"](" + empty + filled + b"e")


def texts_doubled(levels: int) -> Code:
    """Likewise, endless to show."""
    text = assemble(("x" * 1000,))
    return Code(text + (put(901) + get(901) + b"\x86") * levels)


def equal_parts(count: int, levels: int = 10) -> Code:
    """Keys of one hash that are equal, and not the same, up to their ends."""
    pairs = (
        doubled(levels) + assemble(number) + b"\x86" + b"N" for number in colliding_integers(count)
    )
    return Code(b"}(" + b"".join(pairs) + b"u")


def members_of_one_hash(count: int, levels: int) -> bytes:
    """Likewise, for a list."""
    return b"".join(
        doubled(levels) + assemble(number) + b"\x86" for number in colliding_integers(count)
    )


def filled_late(function: Code, items: Code) -> Code:
    """A call whose arguments were made of a list that got its items afterwards."""
    opening = b"](" + b"]" + put(1) + b"\x85" + put(2)
    fill = get(1) + b"(" + items + b"e"
    return Code(opening + fill + function + get(2) + b"R" + b"e")


def colliding_integers(count: int) -> list[int]:
    return [n * MODULUS + 1 for n in range(count)]


def colliding_tuples(count: int) -> list[tuple[int, int]]:
    """Pairs of 64-bit integers with the same hash: the steps of xxHash, run backwards."""
    prime1, prime2, prime5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
    mask = 2**64 - 1

    def rotated(value: int, bits: int) -> int:
        return (value << bits | value >> (64 - bits)) & mask

    def step(state: int, lane: int) -> int:
        return rotated((state + lane * prime2) & mask, 31) * prime1 & mask

    inverse1, inverse2 = pow(prime1, -1, 2**64), pow(prime2, -1, 2**64)
    target = step(step(prime5, 1), 1)
    pairs: list[tuple[int, int]] = []
    first = 0
    while len(pairs) < count:
        first += 1
        before = rotated(target * inverse1 & mask, 33)
        second = (before - step(prime5, first)) * inverse2 & mask
        second -= 2**64 if second >= 2**63 else 0
        if abs(second) < MODULUS and second != -1:
            pairs.append((first, second))
    return pairs


def keys(values: Iterable[Any]) -> Code:
    """A dict with these keys, which no dict of this process has to hold."""
    return Code(b"}(" + b"".join(assemble(value) + b"N" for value in values) + b"u")


def limits() -> dict[str, bytes]:
    key = Code(doubled(60))
    text = "x" * 2**20
    encode, encode_args = name("_codecs", "encode"), assemble((text, "latin1"))
    cases: dict[str, Any] = {
        "empty_sets": Code(b"](" + b"\x8f" * 2_000_000 + b"e"),
        "empty_lists": Code(b"](" + b"]" * 4_000_000 + b"e"),
        "marks": Code(b"(" * 4_000_000),
        "encoded_often": Code(
            b"](" + encode_args + put(1) + (encode + get(1) + b"R") * 2000 + b"e"
        ),
        "bytearrays": Code(
            b"]("
            + encode
            + encode_args
            + b"R\x85"
            + put(1)
            + (name("builtins", "bytearray") + get(1) + b"R") * 2000
            + b"e"
        ),
        "sets_of_one_list": Code(
            b"]("
            + assemble(list(range(5000)))
            + b"\x85"
            + put(1)
            + (name("builtins", "set") + get(1) + b"R") * 2000
            + b"e"
        ),
        "deep_list": Code(b"]" * 10**6 + b"a" * (10**6 - 1)),
        "deep_tuple": Code(b")" + b"\x85" * 10**6),
        "deep_tuple_key": Code(b"})" + b"\x85" * 10**6 + b"Ns"),
        "deep_tuple_300_key": Code(b"})" + b"\x85" * 300 + b"Ns"),
        "deep_dict": Code(b"}" + b"K\x01}" * 10**5 + b"s" * 10**5),
        "deep_calls": Code(b"K\x01" + (b"\x85" + put(1)) * 300),
        "doubled_key": {Code(key): 1},
        "doubled_set": call("builtins", "set", [key]),
        "doubled_frozenset": call("builtins", "frozenset", [key]),
        "doubled_codec": call("_codecs", "encode", "abc", key),
        "doubled_complex": call("builtins", "complex", key),
        "doubled_counter": call("collections", "Counter", {Code(key): 1}),
        "doubled_ordered": Code(assemble(ordered_dict()) + key + b"Ns"),
        "doubled_late_set": filled_late(name("builtins", "set"), key),
        "doubled_late_frozenset": filled_late(name("builtins", "frozenset"), key),
        "doubled_lists_late": doubled_late(40),
        "doubled_slowly": Code(b"](" + doubled(22) + put(1) + (b"}" + get(1) + b"Ns") * 3 + b"e"),
        "colliding_integers": keys(colliding_integers(50_000)),
        "wide_keys": keys(n * 1_000_003 for n in range(31_000)),
        "wide_members": call("builtins", "set", [n * 1_000_003 for n in range(31_000)]),
        "equal_parts_in_colliding_keys": equal_parts(2000),
        "equal_parts_in_a_set": Code(
            name("builtins", "set") + b"](" + members_of_one_hash(60, 15) + b"e\x85R"
        ),
        "colliding_tuples": keys(colliding_tuples(20_000)),
        "colliding_sizes": keys(call("torch", "Size", pair) for pair in colliding_tuples(200)),
        "complex_keys": keys(
            call("builtins", "complex", -1000003.0 * n, float(n)) for n in range(5000)
        ),
        "colliding_set": call("builtins", "set", colliding_integers(1000)),
        "colliding_frozenset": call("builtins", "frozenset", colliding_tuples(1000)),
        "expanded": strided(FLOATS, "float32", 0, (2**40,), (0,)),
        "copied_counters": [
            Code(assemble(dict.fromkeys(range(20_000), 0)) + put(0)),
            *[call("collections", "Counter", get(0))] * 100,
        ],
        "dims": strided(FLOATS, "float32", 0, (1,) * 10_000, (1,) * 10_000),
        "meta": rebuild(
            "_rebuild_meta_tensor_no_storage", name("torch", "float32"), (2**62,), (1,), False
        ),
        "quantized_huge": rebuild(
            "_rebuild_qtensor",
            *(storage(QUANTA, "qint8"), 0, (2**50,), (0,)),
            *((name("torch", "per_tensor_affine"), 1.0, 0), False, ordered_dict()),
        ),
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
        "coo_overflow": sparse("sparse_coo", tensor(INDICES), tensor(FLOATS), (2**62, 2**62)),
        "coo_values": sparse("sparse_coo", tensor(INDICES), tensor(SHORT), (4,)),
        "coo_expanded": sparse("sparse_coo", tensor(EXPANDED_INDICES), tensor(FLOATS), (4,)),
        "coo_uncoalesced": sparse("sparse_coo", tensor(EQUAL_INDICES), tensor(FLOATS), (4,), True),
        "coo_coalesced": sparse("sparse_coo", tensor(INDICES), tensor(FLOATS), (4,), 1),
        "coo_meta": sparse("sparse_coo", tensor(META), tensor(FLOATS), (4,)),
        "coo_floats": sparse("sparse_coo", tensor(FLOATS), tensor(FLOATS), (4,)),
        "coo_parts": sparse("sparse_coo", tensor(INDICES), tensor(FLOATS)),
        "coo_shape": sparse("sparse_coo", tensor(INDICES), tensor(FLOATS), tensor(INDICES)),
        "csr_index": sparse("sparse_csr", tensor(SHORT), tensor(BEYOND), tensor(FLOATS), (1, 4)),
        "csr_crow": sparse("sparse_csr", tensor(PAIR), tensor(SHORT), tensor(FLOATS), (1, 4)),
        "csr_parts": sparse("sparse_csr", tensor(SHORT), tensor(SHORT), tensor(FLOATS)),
        "bsr_index": sparse("sparse_bsr", tensor(SHORT), tensor(BEYOND), tensor(FLOATS), (4, 4)),
        "sparse_layout": sparse("strided", tensor(SHORT), tensor(SHORT), (1,)),
        "doubled_layout": rebuild("_rebuild_sparse_tensor", doubled(60), (1, 2, 3)),
        "doubled_device": rebuild(
            "_rebuild_device_tensor_from_cpu_tensor", tensor(FLOATS), float32, doubled(60), False
        ),
        "doubled_size": strided(FLOATS, "float32", 0, doubled(60), (1,)),
        "doubled_offset": strided(FLOATS, "float32", doubled(60), (4,), (1,)),
        "doubled_metadata": strided(FLOATS, "float32", 0, (4,), (1,), doubled(60)),
        "doubled_params": quantized(doubled(60)),
        "doubled_scheme": quantized((doubled(60), 1.0, 0)),
        "doubled_cast": rebuild(
            "_rebuild_device_tensor_from_cpu_tensor", tensor(FLOATS), doubled(60), "cpu", False
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
        "doubled_dtype": pickled(Code(assemble(("storage", 0, Code(doubled(60)))) + b"Q")),
        "empty_reference": pickled(Code(b")Q")),
        "doubled_reference": pickled(Code(assemble(("storage", Code(doubled(60)), None)) + b"Q")),
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
        "length_beyond": b"\x80\x02X\xff\xff\xff\xffx.",
    }


def node(*items: Any) -> list[Any]:
    return list(items)


def trees() -> dict[str, Case]:
    """Skeletons of the other codec."""
    pack: Callable[[Any], bytes] = msgpack.packb

    def integer(value: int) -> list[Any]:
        return [7, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)]

    good = pack([2, "a", [0, 1, [5, 0]], "b", [8, 1, 2]])
    cases = {
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
            pack([2, *(x for n in range(31_000) for x in (n * 1_000_003, 0))]),
            "LimitExceeded",
        ),
        "wide_members": (pack([4, *(n * 1_000_003 for n in range(31_000))]), "LimitExceeded"),
        "wide_members_of_many": (
            pack([0, *([4, *(n * 1_000_003 for n in range(9_000))] for _ in range(12))]),
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
        "length": (b"\xdd\xff\xff\xff\xff", "ProtocolError"),
        "bytes_length": (b"\xc6\xff\xff\xff\xff", "ProtocolError"),
        "reserved": (b"\xc1", "ProtocolError"),
        "depth": (b"\x92\x00" * 300 + b"\xc0", "LimitExceeded"),
        "depth_million": (b"\x92\x00" * 10**6 + b"\xc0", "LimitExceeded"),
        "map_depth": (b"\x81\xa1a" * 10**6 + b"\xc0", "ProtocolError"),
        "empty_lists": (
            b"\xdd" + struct.pack(">I", 8_000_000) + b"\x90" * 8_000_000,
            "LimitExceeded",
        ),
        "colliding_integers": (
            pack([4, *map(integer, colliding_integers(50_000)[2**4 :])]),
            "LimitExceeded",
        ),
        "colliding_tuples": (
            pack([4, *([1, *pair] for pair in colliding_tuples(20_000))]),
            "LimitExceeded",
        ),
        "empty_sets": (pack([0, *[[4]] * 520_000]), "LimitExceeded"),
        "small_dicts": (pack([0, *[[2, 0, 0]] * 520_000]), "LimitExceeded"),
        "colliding_complex": (
            pack([4, *([6, -1000003.0 * n, float(n)] for n in range(20_000))]),
            "LimitExceeded",
        ),
    }
    cases |= {f"cut_{n}": (good[:n], "ProtocolError") for n in range(len(good))}
    return cases


def pickles() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for wanted, family in (
        ("UnsafeObjectError", unsafe()),
        ("LimitExceeded", limits()),
        ("InvalidObjectError", invalid()),
        ("ProtocolError", protocol()),
    ):
        cases |= {f"{wanted}-{key}": (skeleton, wanted) for key, skeleton in family.items()}
    good = pickled({"a": (1, [2, "x", 2.5]), "t": tensor(0), "s": call("builtins", "set", [1])})
    cases |= {f"cut_{n}": (good[:n], "ProtocolError") for n in range(len(good))}
    return cases


def main() -> None:
    """Load every case; print its name and the class of the error it got."""
    import resource

    rows = tensors()
    for codec, cases in (("tree", trees()), ("pickle", pickles())):
        for key, (skeleton, _) in cases.items():
            data = forge.message(skeleton, codec, rows)
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[0])
            # What the messages may take is 64 MiB and 24 times their skeleton.
            room = 512 * 2**20 + 32 * len(skeleton)
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, hard))
            try:
                forge.load(data)
                outcome = "accepted"
            except aiotorchio.AiotorchioError as error:
                outcome = f"{type(error).__name__} {error.message[:120]!a}"
            except BaseException as error:
                outcome = f"{type(error).__name__} {str(error)[:120]!a}"
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            sys.stdout.write(f"{codec}-{key}\t{outcome}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
