#!/usr/bin/env bash
# torch 2.13.0: a DTensor that one rank saved can be loaded by another rank of the same mesh. Its
# device mesh then equals the mesh of the rank that loads it, and so do its placements, although
# get_coordinate() of that mesh still gives the place of the rank that saved it. copy_ from it into
# the loading rank's own DTensor succeeds, and full_tensor() has one shard twice and the other one
# not at all: no comparison of meshes and placements shows that. Seen, with two ranks:
#   saved by the rank at (1,), loaded by the rank at (0,); equal meshes: True, equal placements: True
#   the whole tensor before: [0.0, 0.0, 1.0, 1.0]
#   the whole tensor after copy_ by rank 0: [1.0, 1.0, 1.0, 1.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy
cd "$folder"
cat > rank.py <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
mine = DTensor.from_local(torch.full((2,), float(rank)), mesh, [Shard(0)], run_check=False)
before = mine.full_tensor().tolist()
if rank == 1:
    torch.save(mine, "shard.pt")
dist.barrier()
if rank == 0:
    theirs = torch.load("shard.pt", weights_only=False)
    places = theirs.device_mesh.get_coordinate(), mesh.get_coordinate()
    equal = theirs.device_mesh == mesh, theirs.placements == mine.placements
    print("torch", torch.__version__)
    print(
        f"saved by the rank at {tuple(places[0])}, loaded by the rank at {tuple(places[1])}; "
        f"equal meshes: {equal[0]}, equal placements: {equal[1]}"
    )
    mine.copy_(theirs)
    assert [tuple(place) for place in places] == [(1,), (0,)] and equal == (True, True)
after = mine.full_tensor().tolist()
if rank == 0:
    print("the whole tensor before:", before)
    print("the whole tensor after copy_ by rank 0:", after)
    assert before == [0, 0, 1, 1] and after == [1, 1, 1, 1]
dist.barrier()
dist.destroy_process_group()
PY
"$folder/venv/bin/python" -W ignore rank.py 1 "$folder/store" & other=$!
"$folder/venv/bin/python" -W ignore rank.py 0 "$folder/store"
wait "$other"
