"""Harness of pickles from hostile senders: the scan, then the weights-only unpickler.

The pickles go through the rebuilder of a message, as in a load, over a fixed table of tensors. An
accepted object can be used without a crash, and arrives as the same object when it is sent again.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import _utils

from aiotorchio.codecs.pickled.allowlist import Allowlist
from aiotorchio.codecs.pickled.opcodes import opcodes
from aiotorchio.errors import AiotorchioError
from aiotorchio.graph.rebuild import build_tensors
from aiotorchio.limits import Limits
from fuzz.objects import (
    HEADER,
    OFFSET,
    STORAGES,
    check_untouched,
    leave_out,
    rebuilder,
    round_trip,
    use,
)
from fuzz.oracle import Find, MutateBytes, check_refusal, choose, no_flood
from tests.support.craft import (
    Code,
    assemble,
    build,
    call,
    get,
    name,
    ordered_dict,
    pickled,
    put,
    rebuild,
    storage,
    subclassed,
    tensor,
)
from tests.support.lowered import lowered

__all__ = ["MAX_LEN", "mutate", "test_one_input"]

MAX_LEN = 4096
_PATHS = sorted(Allowlist((), Limits(), None).globals)
_ROWS = len(HEADER.tensors)
_DTYPES = ("float32", "int64", "uint8", "int8", "qint8", "quint4x2", "complex64", "bool")
_LAYOUTS = ("sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "strided")
_SCHEMES = ("per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams")
_NUMBERS = [0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 4, 4, 5, 8, 255, 2**31, 2**40, 2**62, 2**63 - 1]
# The bounds are low, so that the calls made here stay harmless even where a check is missing.
_LOW = {"hash_steps": 1000, "compare_steps": 4000, "values": 2000}
_NUMBERS += [2**63, -1, -2, -(2**63), 2**64]


def test_one_input(data: bytes) -> None:
    """Judge one input."""
    with no_flood():
        try:
            with lowered(_LOW):
                read = rebuilder(data, "pickle")
                read.check(HEADER.tensors, names=False)
                obj = read.build(build_tensors(HEADER, STORAGES), STORAGES)
        except AiotorchioError as error:
            check_refusal(error, OFFSET, len(data))
            return
        finally:
            _check_torch()
            check_untouched()
        use(obj)
        round_trip(obj)
        leave_out(obj)


def mutate(data: bytes, max_size: int, random: Random, mutate_bytes: MutateBytes) -> bytes:
    """Change a pickle, by its opcodes or its bytes; or make a new one."""
    changed: bytes = choose(
        random,
        (2, lambda: mutate_bytes(data, max_size)),
        (5, lambda: _vary(data, max_size, random, mutate_bytes)),
        (3, lambda: pickled(_Maker(random).value(0))),
    )
    return changed[:max_size]


def _check_torch() -> None:
    if (
        _utils._sparse_tensors_to_validate
        or torch.sparse.check_sparse_tensor_invariants.is_enabled()
    ):
        raise Find("a load has left something behind in torch")


def _vary(data: bytes, max_size: int, random: Random, mutate_bytes: MutateBytes) -> bytes:
    """Change, repeat, leave out, exchange or insert opcodes."""
    pieces, end = [], 0
    try:
        for at, *_ in opcodes(data):
            # An opcode ends where the next one begins; the end of the last one is not known.
            pieces.append(data[end:at])
            end = at
            if len(pieces) > 1000:
                break
    except AiotorchioError:
        pass
    pieces.append(data[end:])
    for _ in range(random.choice([1, 1, 2, 3])):
        at, other = random.randrange(len(pieces)), random.randrange(len(pieces))
        match random.randrange(6):
            case 0:
                pieces[at] = b""
            case 1:
                pieces.insert(at, pieces[other])
            case 2:
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case 3:
                pieces[at] = mutate_bytes(pieces[at], 64)
            case 4:
                first, last = sorted((at, other))
                pieces[at:at] = pieces[first:last]
            case _:
                pieces.insert(at, _Maker(random).value(1))
    return b"".join(pieces)[:max_size]


class _Maker:
    """Makes objects that are nearly right."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._slots = 0

    def value(self, depth: int) -> Code:
        """Make any object; deeper ones have fewer parts."""
        random = self._random
        if depth > 4 or random.random() < 0.1:
            return self.atom()
        made: Code = choose(
            random,
            (2, self.atom),
            (2, lambda: self.container(depth + 1)),
            (4, self.tensor_like),
            (1, lambda: self.any_call(depth + 1)),
            (1, lambda: build(ordered_dict(), self.state(depth + 1))),
            (1, lambda: self.kept(depth + 1)),
        )
        return made

    def atom(self) -> Code:
        random = self._random
        return Code(
            assemble(
                choose(
                    random,
                    (3, lambda: random.choice(_NUMBERS)),
                    (1, lambda: random.choice([None, True, False, 0.5, float("nan"), -0.0])),
                    (1, lambda: random.choice(["", "a", "cpu", "latin1", "\udc80", "meta"])),
                    (3, self.row),
                    (1, self.typed),
                    (1, self.any_name),
                    (1, self.remembered),
                    (1, self.doubled),
                )
            )
        )

    def container(self, depth: int) -> Code:
        items = [self.value(depth) for _ in range(self._random.randrange(4))]
        pairs = dict(zip(items, [self.value(depth) for _ in items], strict=True))
        set_of = name("builtins", self._random.choice(["set", "frozenset"]))
        made: Code = choose(
            self._random,
            (2, lambda: Code(assemble(items))),
            (2, lambda: Code(assemble(tuple(items)))),
            (2, lambda: Code(assemble(pairs))),
            (1, lambda: Code(assemble(ordered_dict()) + b"(" + assemble_items(pairs) + b"u")),
            (1, lambda: Code(set_of + assemble((items,)) + b"R")),
            (1, lambda: call("collections", "Counter", pairs)),
        )
        return made

    def kept(self, depth: int) -> Code:
        """Make an object that is used again."""
        self._slots += 1
        slot = self._slots
        again = get(slot)
        # It may contain itself, where its type allows that.
        return Code(b"](" + self.value(depth) + put(slot) + again + self.value(depth) + b"e")

    def doubled(self) -> Code:
        """Make a tuple that is short in a pickle, longer for a hash, and longer still as a text."""
        leaf = assemble("x" * self._random.choice([0, 10, 1000]))
        return Code(leaf + (put(900) + get(900) + b"\x86") * self._random.choice([1, 4, 8, 12]))

    def remembered(self) -> Code:
        return get(self._random.randint(1, self._slots)) if self._slots else Code(b"N")

    # Tensors

    def row(self) -> Code:
        return tensor(self._random.randrange(_ROWS))

    def typed(self) -> Code:
        return storage(self._random.randrange(_ROWS), self._random.choice([*_DTYPES, None]))

    def dtype(self) -> Code:
        return name("torch", self._random.choice(_DTYPES))

    def shape(self) -> Any:
        random = self._random
        return tuple(random.choice(_NUMBERS) for _ in range(random.choice([0, 1, 1, 1, 2, 2, 3])))

    def layout(self) -> Code:
        chosen = self._random.choice(_LAYOUTS)
        return call("torch.serialization", "_get_layout", f"torch.{chosen}")

    def params(self) -> tuple[Any, ...]:
        scheme = name("torch", self._random.choice(_SCHEMES))
        if self._random.random() < 0.5:
            return (scheme, 0.5, self._random.choice(_NUMBERS))
        return (scheme, self.row(), self.row(), self._random.choice([0, 1]))

    def state(self, depth: int) -> Any:
        names = ["a", "tag", "data", "grad", "_metadata", "__class__", "keys", "x.y"]
        return {self._random.choice(names): self.value(depth) for _ in range(2)}

    def tensor_like(self) -> Code:
        """Call a function of torch, with arguments of which one may be anything."""
        random = self._random
        flag = random.random() < 0.2
        shape = self.shape()
        makers: list[Callable[[], tuple[str, list[Any]]]] = [
            lambda: (
                "_rebuild_tensor_v2",
                [self.typed(), 0, shape, self._strides(shape), flag, ordered_dict()],
            ),
            lambda: (
                "_rebuild_tensor_v3",
                [self.typed(), 0, shape, self._strides(shape), flag, ordered_dict(), self.dtype()],
            ),
            lambda: (
                "_rebuild_sparse_tensor",
                [self.layout(), (self.row(), self.row(), shape, flag)],
            ),
            lambda: (
                "_rebuild_sparse_tensor",
                [self.layout(), (self.row(), self.row(), self.row(), shape)],
            ),
            lambda: (
                "_rebuild_qtensor",
                [
                    storage(6, random.choice(["qint8", "quint8", "quint4x2"])),
                    *(0, shape, self._strides(shape), self.params(), False, ordered_dict()),
                ],
            ),
            lambda: ("_rebuild_nested_tensor", [self.row() for _ in range(4)]),
            lambda: (
                "_rebuild_meta_tensor_no_storage",
                [self.dtype(), shape, self._strides(shape), flag],
            ),
            lambda: (
                "_rebuild_device_tensor_from_cpu_tensor",
                [self.row(), self.dtype(), random.choice(["cpu", "meta"]), flag],
            ),
            lambda: ("_rebuild_parameter", [self.row(), flag, ordered_dict()]),
            lambda: (
                "_rebuild_parameter_with_state",
                [self.row(), flag, ordered_dict(), self.state(4)],
            ),
        ]
        function, arguments = random.choice(makers)()
        if random.random() < 0.2:
            arguments[random.randrange(len(arguments))] = self.value(4)
        if random.random() < 0.1:
            kind = random.choice([name("torch", "Tensor"), self.any_name()])
            return subclassed(name("torch._utils", function), kind, tuple(arguments), self.state(4))
        return rebuild(function, *arguments)

    def _strides(self, shape: tuple[int, ...]) -> Any:
        if self._random.random() < 0.3:
            return tuple(self._random.choice(_NUMBERS) for _ in shape)
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= max(size, 1)
        return tuple(reversed(strides))

    # Anything

    def any_name(self) -> Code:
        module, _, attribute = self._random.choice(_PATHS).rpartition(".")
        return name(module, attribute)

    def any_call(self, depth: int) -> Code:
        arguments = tuple(self.value(depth) for _ in range(self._random.randrange(4)))
        code = self._random.choice([b"R", b"R", b"R", b"\x81"])
        return Code(self.any_name() + assemble(arguments) + code)


def assemble_items(pairs: dict[Code, Code]) -> bytes:
    """Return the opcodes of keys and values, one after the other."""
    return b"".join(key + value for key, value in pairs.items())
