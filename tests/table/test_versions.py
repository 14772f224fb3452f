"""Changes of tensors in place during a save: which of them the version counters show."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import aiotorchio
from aiotorchio.graph.flatten import flatten
from aiotorchio.memory.device_copy import bytes_of
from aiotorchio.table.versions import Versions
from tests.support.corpus import assert_same

WHEN = "while it was sent"
CHANGED = f"was changed {WHEN}"


def versions_of(obj: object, **options: Any) -> Versions:
    return flatten(obj, chunk_size=4096, metadata={}, producer="tests", **options).versions


def step(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Any:
    """A parameter after one step, its optimizer, and a function that takes another step."""
    parameter = nn.Parameter(torch.ones(10))
    optimizer = make([parameter])

    def again() -> None:
        parameter.grad = torch.ones(10)
        optimizer.step()

    again()
    return parameter, optimizer, again


def into(tensor: torch.Tensor, **options: Any) -> None:
    file = io.BytesIO()
    aiotorchio.save({"w": torch.full_like(tensor, 7)}, file)
    file.seek(0)
    aiotorchio.load(file, into={"w": tensor}, **options)


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "an operation": lambda t: t.add_(1),
    "an element": lambda t: t.__setitem__(3, 7.0),
    "a view": lambda t: t[2:5].zero_(),
    "another view": lambda t: t.view(2, 5).t()[0].mul_(2),
    "detached": lambda t: t.detach().mul_(2),
    "out=": lambda t: torch.add(t, 1, out=t),
    "foreach": lambda t: torch._foreach_add_([t], 1.0),
    "random": lambda t: t.normal_(),
    "copied to": lambda t: t.copy_(torch.ones(10)),
    "into": into,
    "staged": lambda t: into(t, staged=True),
    "set_": lambda t: t.set_(torch.ones(10).untyped_storage(), 0, (10,), (1,)),
    "init": nn.init.ones_,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_a_tensor_are_noticed(name: str) -> None:
    layer = {"layer": {"x": torch.ones(3), "weight": torch.rand(10)}}
    versions = versions_of(layer)
    versions.check(WHEN)
    CHANGES[name](layer["layer"]["weight"])
    with pytest.raises(RuntimeError, match=rf"^tensor 1 \('layer.weight'\) {CHANGED}"):
        versions.check(WHEN)


def test_changes_of_the_base_of_a_view_are_noticed() -> None:
    base = torch.rand(10)
    versions = versions_of([base[2:4]])
    base[3] = 1
    with pytest.raises(RuntimeError, match=CHANGED):
        versions.check(WHEN)


def test_changes_through_a_double_buffer_are_noticed_or_leave_what_is_sent() -> None:
    model = nn.Linear(3, 3)
    buffers = aiotorchio.DoubleBuffer(model)
    parts = flatten(model.state_dict(), chunk_size=4096, metadata={}, producer="tests")
    before = [bytes(storage) for storage in parts.storages]
    file = io.BytesIO()
    aiotorchio.save({"weight": torch.ones(3, 3), "bias": torch.ones(3)}, file)
    file.seek(0)
    aiotorchio.load(file, into=buffers)
    try:
        parts.versions.check(WHEN)
    except RuntimeError as error:
        assert CHANGED[:20] in str(error)
    else:
        assert [bytes(storage) for storage in parts.storages] == before


UNNOTICED: dict[str, Callable[[torch.Tensor], object]] = {
    ".data": lambda t: t.data.add_(1),
    "numpy": lambda t: np.add(t.numpy(), 1, out=t.numpy()),
    "dlpack": lambda t: torch.utils.dlpack.from_dlpack(t).add_(1),
    "storage": lambda t: bytes_of(t.untyped_storage()).fill_(1),
}


@pytest.mark.parametrize("name", UNNOTICED)
def test_changes_behind_the_back_of_torch_are_not_noticed(name: str) -> None:
    tensor = torch.rand(10)
    versions = versions_of([tensor])
    UNNOTICED[name](tensor)
    versions.check(WHEN)


def test_what_changes_nothing_is_no_change() -> None:
    tensor = torch.rand(10, 10)
    versions = versions_of([tensor, nn.Parameter(tensor)])
    tensor.requires_grad_()
    assert tensor.sum().backward() is None
    assert not (tensor + 1).t().is_contiguous()
    tensor.share_memory_()
    aiotorchio.save([tensor], io.BytesIO(), compact=True, snapshot=True)
    versions.check(WHEN)


def test_another_memory_is_no_change() -> None:
    """The message has the old memory, which does not change."""
    parameter = nn.Parameter(torch.zeros(10))
    parts = flatten([parameter], chunk_size=4096, metadata={}, producer="tests")
    parameter.data = torch.ones(10)
    parts.versions.check(WHEN)
    assert not any(bytes(parts.storages[0]))


def test_tensors_of_inference_mode_have_no_versions() -> None:
    with torch.inference_mode():
        tensor = torch.rand(10)
        versions = versions_of({"a": tensor, "b": torch.rand(2)})
        tensor.add_(1)
        versions.check(WHEN)
    versions.check(WHEN)
    ordinary = torch.rand(3)
    versions = versions_of({"a": tensor, "b": ordinary})
    ordinary.add_(1)
    with pytest.raises(RuntimeError, match=r"tensor 1 \('b'\)"):
        versions.check(WHEN)


def test_meta_and_empty_tensors() -> None:
    tensors = [torch.empty(3, device="meta"), torch.empty(0), torch.tensor(1.0)]
    versions = versions_of(tensors)
    versions.check(WHEN)
    tensors[2].add_(1)
    with pytest.raises(RuntimeError, match=r"tensor 2 \('2'\)"):
        versions.check(WHEN)


def test_a_tensor_without_a_name() -> None:
    tensor = torch.rand(3)
    obj = {frozenset([1]): tensor}
    versions = versions_of(obj)
    tensor.add_(1)
    with pytest.raises(RuntimeError, match=f"^tensor 0.* {CHANGED}"):
        versions.check(WHEN)


def test_within_skip_data() -> None:
    tensor = torch.rand(3)
    versions = versions_of([tensor], skip=torch.serialization.skip_data())
    versions.check(WHEN)


# ------------------------------------------------------------------------------ optimizers

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
}
FUSED: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_noticed(name: str) -> None:
    parameter, optimizer, again = step(OPTIMIZERS[name])
    of_parameter = versions_of([parameter])
    of_state = versions_of(
        [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    )
    again()
    for versions in (of_parameter, of_state):
        with pytest.raises(RuntimeError, match=CHANGED):
            versions.check(WHEN)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.xfail(reason="the fused kernels of torch do not advance the counters", strict=False)
def test_a_fused_step_is_noticed(name: str) -> None:
    parameter, _, again = step(FUSED[name])
    versions, before = versions_of([parameter]), parameter.detach().clone()
    again()
    assert not torch.equal(parameter, before)
    with pytest.raises(RuntimeError, match=CHANGED):
        versions.check(WHEN)


def test_a_forward_pass_of_batch_norm_is_noticed_by_its_count() -> None:
    module = nn.BatchNorm1d(3)
    versions = versions_of(module.state_dict())
    module(torch.rand(5, 3))
    with pytest.raises(RuntimeError, match=r"'num_batches_tracked'"):
        versions.check(WHEN)


@pytest.mark.xfail(
    reason="batch_norm does not advance the counters of its statistics", strict=False
)
def test_running_statistics_of_batch_norm_are_noticed() -> None:
    module = nn.BatchNorm1d(3)
    versions = versions_of({"mean": module.running_mean, "var": module.running_var})
    module(torch.rand(5, 3))
    with pytest.raises(RuntimeError, match=CHANGED):
        versions.check(WHEN)


# ------------------------------------------------------------------------------ without a row


def tagged() -> torch.Tensor:
    tensor = torch.rand(10)
    tensor.tag = 1  # type: ignore[attr-defined]
    return tensor


WITHOUT_ROW: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "with attributes": (tagged, lambda t: t.add_(1)),
    "buffer": (lambda: nn.Buffer(torch.rand(10)), lambda t: t.add_(1)),
    "sparse": (lambda: torch.eye(5).to_sparse(), lambda t: t.mul_(2)),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.rand(10), 0.1, 0, torch.qint8),
        lambda t: t.copy_(torch.ones(10)),
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]),
        lambda t: t.mul_(2),
    ),
}


@pytest.mark.parametrize("name", WITHOUT_ROW)
def test_changes_of_tensors_that_are_taken_apart_are_noticed(name: str) -> None:
    make, change = WITHOUT_ROW[name]
    tensor = make()
    before = tensor._version
    versions = versions_of([tensor])
    change(tensor)
    assert tensor._version > before
    with pytest.raises(RuntimeError, match=CHANGED):
        versions.check(WHEN)


def test_the_check_changes_nothing() -> None:
    obj = {"a": torch.rand(3), "b": [torch.ones(2)]}
    versions = versions_of(obj)
    for _ in range(3):
        versions.check(WHEN)
    file = io.BytesIO()
    aiotorchio.save(obj, file)
    file.seek(0)
    assert_same(aiotorchio.load(file), obj)
