#!/usr/bin/env bash
# torchmetrics 1.9.0: load_state_dict keeps the tensors of the dict that it is given, and update()
# adds to them in place. Two metrics that loaded one dict then count into each other, and the dict
# changes, too. And compute() after load_state_dict returns the result that was computed before it.
# The parameters and buffers of any nn.Module are copied into instead. Seen:
#   sent: OrderedDict([('sum_squared_error', tensor([4.])), ('total', tensor(4))])
#   second computes after load_state_dict: tensor(0.) instead of tensor(1.)
#   after first.update, the dict is OrderedDict([('sum_squared_error', tensor([40.])), ('total', tensor(8))])
#   and second has tensor([40.]) tensor(8)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 torchmetrics==1.9.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch, torchmetrics

print("torch", torch.__version__, "torchmetrics", torchmetrics.__version__)


def metric():
    made = torchmetrics.MeanSquaredError()
    made.persistent(True)
    return made


sender, first, second = metric(), metric(), metric()
sender.update(torch.ones(4), torch.zeros(4))
state = sender.state_dict()
print("sent:", state)

second.update(torch.zeros(2), torch.zeros(2))
print("second before:", second.compute())
for each in (first, second):
    each.load_state_dict(state)
stale = second.compute()
print("second computes after load_state_dict:", stale, "instead of", sender.compute())

first.update(torch.full((4,), 3.0), torch.zeros(4))
print("after first.update, the dict is", state)
print("and second has", second.sum_squared_error, second.total)

assert stale.item() == 0.0
assert state["sum_squared_error"].item() == second.sum_squared_error.item() == 40.0
PY
