"""One process of several that exchange DTensors: ``python -m tests.parity.ranks``.

The arguments are the rank, the number of ranks, the file of their store, and the descriptors of two
sockets: to the next rank and from the one before.
"""

from __future__ import annotations

import socket
import sys
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import aiotorchio
from tests.parity.twins import by_torch, by_us
from tests.support import corpus

Named = dict[str, Any]


def made(rank: int, count: int) -> tuple[Named, Named]:
    """DTensors, and meshes; all ranks call this together."""
    line = init_device_mesh("cpu", (count,), mesh_dim_names=("dp",))
    grid = init_device_mesh("cpu", (count, 1), mesh_dim_names=("dp", "tp"))
    even, uneven = torch.arange(12.0).view(6, 2), torch.arange(14.0).view(7, 2)

    def shard(tensor: torch.Tensor, mesh: DeviceMesh, *placements: Any) -> DTensor:
        return distribute_tensor(tensor.clone(), mesh, placements)

    def partial(kind: str) -> DTensor:
        return DTensor.from_local(torch.full((2,), rank + 1.0), line, [Partial(kind)])

    tensors = {
        "shard": (one := shard(even, line, Shard(0))),
        "uneven": shard(uneven, line, Shard(0)),
        # Four columns for three ranks: two, two and none.
        "without_elements": shard(uneven.view(2, 7)[:, :4], line, Shard(1)),
        "replicate": shard(even, line, Replicate()),
        "partial_sum": partial("sum"),
        "partial_max": partial("max"),
        "partial_avg": partial("avg"),
        "grid_shard_shard": shard(uneven, grid, Shard(0), Shard(1)),
        "grid_shard_replicate": shard(uneven, grid, Shard(0), Replicate()),
        "part_of_grid": shard(even, grid["dp"], Shard(0)),
        "transposed": shard(uneven, grid, Shard(0), Shard(1)).t(),
        "parameter": nn.Parameter(shard(uneven, line, Shard(0))),
        "requires_grad": shard(even, line, Shard(0)).requires_grad_(),
        "again": one,
    }
    return tensors, {"line": line, "grid": grid, "part": grid["dp"], "single": grid["tp"]}


def described(value: Any) -> dict[str, str]:
    """Describe the properties that must be the same, as text; without calls to other ranks."""
    if isinstance(value, DeviceMesh):
        parts: Named = {"ranks": value.mesh.tolist(), "names": value.mesh_dim_names}
        return {name: repr(part) for name, part in parts.items()}
    local = value.to_local()
    parts = {
        "type": (type(value).__name__, isinstance(value, nn.Parameter)),
        "placements": value.placements,
        "mesh": described(value.device_mesh),
        "shape": (value.shape, value.stride(), value.dtype),
        "grad": (value.requires_grad, value.is_leaf),
        "local": (local.tolist(), local.shape, local.stride()),
    }
    return {name: repr(part) for name, part in parts.items()}


def own(objects: Named, meshes: Named) -> None:
    """Check that objects return to the rank that sent them as torch returns them, and work."""
    for weights_only in (True, False):
        theirs = by_torch([objects, meshes], weights_only=weights_only)
        ours = by_us([objects, meshes], weights_only=weights_only)
        for name, mesh in meshes.items():
            assert ours[1][name] == theirs[1][name] == mesh, name
            assert described(ours[1][name]) == described(mesh), name
            # The mesh finds the groups of this process.
            for dim in range(mesh.ndim):
                assert ours[1][name].get_group(dim) is mesh.get_group(dim), name
        for name, tensor in objects.items():
            assert described(ours[0][name]) == described(theirs[0][name]) == described(tensor), name
            assert ours[0][name].device_mesh == tensor.device_mesh, name
            corpus.assert_same(ours[0][name].to_local(), theirs[0][name].to_local())
            # All ranks run this in the same order: it is a collective call.
            full = tensor.full_tensor()
            assert torch.equal(ours[0][name].full_tensor(), full), name
            assert torch.equal((ours[0][name] + tensor).full_tensor(), full * 2), name
        assert ours[0]["again"] is ours[0]["shard"]
        # A shared mesh stays one mesh.
        assert len({id(one.device_mesh) for one in ours[0].values()}) == len(
            {id(one.device_mesh) for one in objects.values()}
        )


def others(objects: Named, outgoing: socket.socket, incoming: socket.socket) -> None:
    """Check that the objects of another rank are those that the rank had."""
    message = [objects, {name: described(value) for name, value in objects.items()}]
    for weights_only in (True, False):
        sender = threading.Thread(target=aiotorchio.save, args=(message, outgoing), daemon=True)
        sender.start()
        arrived, wanted = aiotorchio.load(incoming, weights_only=weights_only)
        sender.join()
        assert {name: described(value) for name, value in arrived.items()} == wanted
        replicated = arrived["replicate"]
        assert torch.equal(replicated.full_tensor(), torch.arange(12.0).view(6, 2))


def main(rank: int, count: int, store: str, outgoing: int, incoming: int) -> None:
    """Run one rank."""
    dist.init_process_group("gloo", store=FileStore(store, count), rank=rank, world_size=count)
    try:
        objects, meshes = made(rank, count)
        own(objects, meshes)
        with socket.socket(fileno=outgoing) as there, socket.socket(fileno=incoming) as here:
            others(objects, there, here)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    print("the same", rank)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
