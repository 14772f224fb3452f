#!/usr/bin/env bash
# torch 2.13.0, bitsandbytes 0.50.2, on a CPU: load_state_dict leaves quantized layers half loaded.
# Linear4bit refuses the state_dict() of an equal layer, whose scales it calls unexpected; with
# strict=False the packed weight is the new one, under the scales that the layer had before.
# Linear8bitLt takes a state until its first forward, which moves the scales away; after that
# load_state_dict raises (and advises module.cuda()), and has overwritten the weight by then: the
# outputs are neither those before nor those of the sender. Seen:
#   Linear4bit, strict: RuntimeError, 5 unexpected keys
#   Linear4bit, strict=False: weight new: True, absmax new: False, outputs new: False
#   Linear8bitLt before a forward: outputs new: True
#   Linear8bitLt after a forward: RuntimeError, weight new: True, outputs old: False, outputs new: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 bitsandbytes==0.50.2
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

print("torch", torch.__version__, "bitsandbytes", bitsandbytes.__version__)
torch.set_grad_enabled(False)
numbers = torch.linspace(-1, 1, 128).view(2, 64)


def layer(kind, seed, **options):
    torch.manual_seed(seed)
    # Which quantizes it.
    return kind(64, 32, **options).to("cpu")


def attempt(module, state):
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        return str(error)
    return ""


sender, receiver = (layer(Linear4bit, seed, quant_type="nf4") for seed in (1, 2))
state = sender.state_dict()
refused = attempt(receiver, state)
unexpected = [key for key in state if f'"{key}"' in refused]
print("Linear4bit, strict: RuntimeError,", len(unexpected), "unexpected keys")
receiver.load_state_dict(state, strict=False)
four = {
    "weight": torch.equal(receiver.weight.data, sender.weight.data),
    "absmax": torch.equal(receiver.weight.quant_state.absmax, sender.weight.quant_state.absmax),
    "outputs": torch.equal(receiver(numbers), sender(numbers)),
}
shown = ", ".join(f"{name} new: {new}" for name, new in four.items())
print("Linear4bit, strict=False:", shown)

options = {"has_fp16_weights": False}
state = layer(Linear8bitLt, 1, **options).state_dict()
wanted = layer(Linear8bitLt, 1, **options)(numbers)
fresh = layer(Linear8bitLt, 2, **options)
assert not attempt(fresh, state)
in_time = torch.equal(fresh(numbers), wanted)
print("Linear8bitLt before a forward: outputs new:", in_time)

used = layer(Linear8bitLt, 3, **options)
before = used(numbers)
raised = attempt(used, state)
outputs = used(numbers)
eight = (
    torch.equal(used.weight.data, state["weight"]),
    torch.equal(outputs, before),
    torch.equal(outputs, wanted),
)
print(
    f"Linear8bitLt after a forward: RuntimeError, weight new: {eight[0]}, "
    f"outputs old: {eight[1]}, outputs new: {eight[2]}"
)
assert len(unexpected) == 5 and four == {"weight": True, "absmax": False, "outputs": False}
assert in_time and "module.cuda()" in raised and eight == (True, False, False)
PY
