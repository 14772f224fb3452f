#!/usr/bin/env bash
# torch 2.13.0, tensordict 0.15.3: torch.save of a memory-mapped TensorDict writes the names of its
# files, not its numbers. torch.load maps the same files again: it gives the numbers of the moment
# of the load, not those of the save, in memory that it shares with the original; and once the
# folder is gone it fails. So a saved copy on another machine has no numbers at all. The tensors of
# state_dict() are plain ones, and are saved with their numbers. Seen (sizes vary with the path):
#   saved: 4000 bytes of numbers in 1709 bytes; of state_dict(): in 5673
#   loaded after the original was zeroed: MemoryMappedTensor([0., 0., 0.]) of state_dict(): tensor([1., 1., 1.])
#   a change of what was loaded is a change of the original: tensor([7., 7., 7.])
#   loaded without the folder: RuntimeError unable to open file
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 tensordict==0.15.3
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import io
import shutil

import tensordict
import torch

print("torch", torch.__version__, "tensordict", tensordict.__version__)
original = tensordict.TensorDict({"w": torch.ones(1000)}, batch_size=[]).memmap_("numbers")


def saved(obj):
    file = io.BytesIO()
    torch.save(obj, file)
    return file.getvalue()


def load(data):
    return torch.load(io.BytesIO(data), weights_only=False)


whole, state = saved(original), saved(original.state_dict())
print("saved: 4000 bytes of numbers in", len(whole), "bytes; of state_dict(): in", len(state))

original["w"].zero_()
late, then = load(whole)["w"], load(state)["w"]
print("loaded after the original was zeroed:", late[:3], "of state_dict():", then[:3])

assert late.sum() == 0 and then.sum() == 1000

late.fill_(7)
shared = torch.Tensor(original["w"]).clone()
print("a change of what was loaded is a change of the original:", shared[:3])

shutil.rmtree("numbers")
try:
    load(whole)
except RuntimeError as error:
    failed = error
print("loaded without the folder:", type(failed).__name__, str(failed).split(" <")[0])

assert len(whole) < 4000 < len(state)
assert shared[0] == 7
PY
