"""Models of torch.distributed in a process group, and each way to receive one.

In: a kind of model and a mode. Out: the model as after ``load_state_dict``, or one error before the
first byte with the model unchanged. ``python -m tests.support.distributed RANK COUNT STORE FOLDER``
runs one process of several.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import aiotorchio
from aiotorchio import MismatchError
from tests.support import corpus
from tests.support.tensor_layouts import MODES, encoded, into_options

CPU = torch.device("cpu")


def plain() -> nn.Sequential:
    """A model with buffers, a size that ranks cannot share evenly, and new random numbers."""
    model = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    norm: Any = model[1]
    norm.running_mean.normal_()
    return model


def fsdp2(*, used: bool = False) -> nn.Module:
    """A usual FSDP2 model: each large layer is sharded, and then the rest.

    Args:
        used: Whether it has computed something: its root has whole parameters then.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = plain()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    if used:
        model(torch.ones(3, 4))
    return model


def tensor_parallel() -> nn.Module:
    """A model sharded by columns and rows."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def fsdp1(*, use_orig_params: bool) -> nn.Module:
    with warnings.catch_warnings():
        # Warnings that FSDP1 may be removed, and that one rank has nothing to shard.
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(plain(), use_orig_params=use_orig_params, device_id=CPU)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "fsdp2": fsdp2,
    "fsdp2 used": lambda: fsdp2(used=True),
    "ddp": lambda: DistributedDataParallel(plain()),
    "tensor parallel": tensor_parallel,
}
FSDP1: dict[str, Callable[[], nn.Module]] = {
    "flat": lambda: fsdp1(use_orig_params=False),
    "original": lambda: fsdp1(use_orig_params=True),
}


def decoded(data: bytes, **options: Any) -> Any:
    return aiotorchio.load(io.BytesIO(data), safe_globals=corpus.dtensor_globals(), **options)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def bits(module: nn.Module) -> dict[str, Any]:
    """The numbers that this rank has."""
    return {name: local(each).tolist() for name, each in module.state_dict().items()}


def outputs(module: nn.Module) -> Any:
    """The outputs for a fixed input; all ranks compute together."""
    module.eval()
    result = local(module(torch.arange(12.0).view(3, 4)))
    module.train()
    return result.tolist()


def is_as_after_load_state_dict(kind: str, mode: str) -> None:
    """Receive the shards of a rank into those of the same rank, in place."""
    sent, module, expected = KINDS[kind](), KINDS[kind](), KINDS[kind]()
    data = encoded(sent.state_dict())
    expected.load_state_dict(sent.state_dict())
    module.state_dict()
    places = [local(each).data_ptr() for each in module.parameters()]
    if mode == "load":
        module.load_state_dict(decoded(data))
    elif mode == "state dict":
        state = module.state_dict()
        decoded(data, into=state)
        module.load_state_dict(state)
    elif mode == "parameters":
        into = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        decoded(data, into=into)
    else:
        decoded(data, **into_options(mode, module))
    assert bits(module) == bits(expected) == bits(sent)
    assert mode == "double" or [local(each).data_ptr() for each in module.parameters()] == places
    assert outputs(module) == outputs(expected) == outputs(sent)


def is_refused(module: nn.Module, state: Any, mode: str, error: type[Exception]) -> str:
    """Check that a load is refused before the first byte and changes nothing; return the error."""
    before = bits(module)
    done: list[int] = []
    try:
        options = into_options(mode, module)
        decoded(encoded(state), progress=lambda n, _: done.append(n), **options)
    except error as caught:
        assert not done and bits(module) == before
        return str(caught)
    raise AssertionError("not refused")


def main(rank: int, count: int, store: str, folder: str) -> None:
    """Run one rank."""
    dist.init_process_group("gloo", store=FileStore(store, count), rank=rank, world_size=count)
    try:
        # Different numbers on each rank: a shard of another rank is noticed.
        for kind in KINDS:
            for mode in ["load", *MODES]:
                torch.manual_seed(0)
                is_as_after_load_state_dict(kind, mode)
        sent = fsdp2()
        mine, theirs = (Path(folder, str((rank + n) % count)) for n in (0, 1))
        mine.write_bytes(encoded(sent.state_dict()))
        dist.barrier()
        for mode in MODES:
            module = fsdp2()
            before = bits(module)
            for into in (module, module.state_dict()):
                try:
                    decoded(theirs.read_bytes(), **into_options(mode, into))
                except MismatchError as error:
                    # Both ranks may have as many rows, but other positions in the mesh.
                    assert "at (0,) of the mesh in the" in str(error), error
                    assert "at (1,) of the mesh in the" in str(error), error
                else:
                    raise AssertionError("the shards of another rank")
                assert bits(module) == before
        dist.barrier()
    finally:
        dist.destroy_process_group()
    print("done", rank)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
