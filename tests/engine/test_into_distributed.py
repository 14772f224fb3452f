"""Models of torch.distributed as targets: FSDP2, tensor parallel, DDP and FSDP1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from aiotorchio import MismatchError
from tests.support import corpus, distributed
from tests.support.speed import patience
from tests.support.tensor_layouts import MODES, all_modes, encoded, into_options

ROOT = Path(__file__).parents[2]
RANKS = 2
DEADLINE = patience(120)

# FSDP1 warns that one rank has nothing to shard, and that torch may remove it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:When using ``NO_SHARD``:UserWarning"),
    pytest.mark.filterwarnings("ignore:The `NO_SHARD` sharding strategy:FutureWarning"),
    pytest.mark.filterwarnings("ignore:FSDP.state_dict_type:FutureWarning"),
]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with corpus.process_group():
        yield


@pytest.mark.parametrize("kind", distributed.KINDS)
@pytest.mark.parametrize("mode", ["load", "state dict", *MODES])
def test_a_model_is_as_after_load_state_dict(kind: str, mode: str) -> None:
    distributed.is_as_after_load_state_dict(kind, mode)


# The parameters of an FSDP2 model that has computed are whole until it is resharded.
@pytest.mark.parametrize("kind", ["fsdp2", "tensor parallel", "ddp"])
def test_parameters_are_a_destination(kind: str) -> None:
    distributed.is_as_after_load_state_dict(kind, "parameters")


@all_modes
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2 used", "tensor parallel"])
def test_a_whole_state_is_refused_with_advice_that_works(kind: str, mode: str) -> None:
    module = distributed.KINDS[kind]()
    whole = {
        name: each.full_tensor() if isinstance(each, DTensor) else each
        for name, each in distributed.KINDS[kind]().state_dict().items()
    }
    said = distributed.is_refused(module, whole, mode, MismatchError)
    assert "0.weight: a dense Tensor in the message, a DTensor on DeviceMesh" in said
    assert "Shard(dim=0)" in said and "set_model_state_dict" in said
    received = distributed.decoded(encoded(whole))
    set_model_state_dict(module, received, options=StateDictOptions(full_state_dict=True))
    assert distributed.bits(module) == {name: each.tolist() for name, each in whole.items()}


@all_modes
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2 used"])
def test_a_dense_entry_that_is_missing_is_found_before_the_first_byte(kind: str, mode: str) -> None:
    module, state = distributed.KINDS[kind](), distributed.fsdp2().state_dict()
    del state["1.running_mean"]
    said = distributed.is_refused(module, state, mode, MismatchError)
    assert "no tensor of this name: 1.running_mean" in said


@all_modes
def test_shapes_are_compared_before_the_first_byte(mode: str) -> None:
    module, state = distributed.fsdp2(), distributed.plain().state_dict()
    state["0.weight"] = torch.ones(7, 5)
    said = distributed.is_refused(module, state, mode, MismatchError)
    assert "0.weight: shape [7, 5] in the message, [7, 4] in the target" in said


@all_modes
def test_other_placements_and_meshes_are_refused_with_both(mode: str) -> None:
    module, sent = distributed.fsdp2(), distributed.fsdp2()
    line = init_device_mesh("cpu", (1,))
    named = init_device_mesh("cpu", (1,), mesh_dim_names=("other",))
    for mesh, placement, words in [
        (
            line,
            Replicate(),
            r"\(Replicate\(\),\) in the message, a DTensor on .*\(Shard\(dim=0\),\)",
        ),
        (
            line,
            Shard(1),
            r"\(Shard\(dim=1\),\) .*in the message, a DTensor on .*\(Shard\(dim=0\),\)",
        ),
        (named, Shard(0), r"other.* in the message, a DTensor on DeviceMesh\(\(1,\)"),
    ]:
        state: dict[str, Any] = sent.state_dict()
        state["0.weight"] = distribute_tensor(torch.ones(7, 4), mesh, [placement])
        said = distributed.is_refused(module, state, mode, MismatchError)
        assert re.search(f"0.weight: a DTensor on .*{words}", said), said
        assert said.count(" in the message") == 1


@all_modes
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2 used", "tensor parallel"])
def test_a_shard_that_is_missing_is_found_before_the_first_byte(kind: str, mode: str) -> None:
    module, state = distributed.KINDS[kind](), distributed.KINDS[kind]().state_dict()
    del state["0.weight"]
    said = distributed.is_refused(module, state, mode, MismatchError)
    assert "not in the message: 0.weight" in said


@all_modes
def test_a_shard_too_many_is_found_before_the_first_byte(mode: str) -> None:
    module, state = distributed.fsdp2(), distributed.fsdp2().state_dict()
    state["more"] = state["0.weight"].clone()
    said = distributed.is_refused(module, state, mode, MismatchError)
    assert "not in the target: more" in said


@pytest.mark.parametrize("kind", distributed.FSDP1)
@all_modes
def test_fsdp1_is_refused_with_advice_that_works(kind: str, mode: str) -> None:
    sent, module = distributed.FSDP1[kind](), distributed.FSDP1[kind]()
    inner = nn.ModuleDict({"model": module})
    for into in (module, {"a": module}, inner):
        with pytest.raises(ValueError, match=r"FSDP1 module at .*set_model_state_dict"):
            distributed.decoded(b"", **into_options(mode, into))
    expected = distributed.FSDP1[kind]()
    expected.load_state_dict(sent.state_dict())
    received = distributed.decoded(encoded(sent.state_dict()))
    set_model_state_dict(module, received, options=StateDictOptions(full_state_dict=True))
    assert distributed.bits(module) == distributed.bits(expected) == distributed.bits(sent)
    assert distributed.outputs(module) == distributed.outputs(expected)


@pytest.mark.parametrize("kind", distributed.FSDP1)
@all_modes
def test_the_state_dict_of_fsdp1_is_a_destination(kind: str, mode: str) -> None:
    sent, module = distributed.FSDP1[kind](), distributed.FSDP1[kind]()
    state = module.state_dict()
    distributed.decoded(encoded(sent.state_dict()), **into_options(mode, state))
    module.load_state_dict(state)
    assert distributed.bits(module) == distributed.bits(sent)
    assert distributed.outputs(module) == distributed.outputs(sent)


@all_modes
def test_ddp_takes_the_names_that_load_state_dict_takes(mode: str) -> None:
    module = distributed.KINDS["ddp"]()
    said = distributed.is_refused(module, distributed.plain().state_dict(), mode, MismatchError)
    assert "not in the message: module.0.weight" in said
    assert "not in the target: 0.weight" in said


@pytest.mark.full
def test_several_ranks(tmp_path: Path) -> None:
    """Each rank receives its own shards, and refuses those of the other; see ``distributed``."""
    environment = os.environ | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(RANKS):
            arguments = map(str, (rank, RANKS, tmp_path / "store", tmp_path))
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", "tests.support.distributed", *arguments],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        end = time.monotonic() + DEADLINE
        outputs = [
            each.communicate(timeout=max(end - time.monotonic(), 0.1))[0] for each in processes
        ]
    finally:
        for each in processes:
            each.kill()
            each.wait()
            assert each.stdout is not None
            each.stdout.close()
    for rank, output in enumerate(outputs):
        assert f"done {rank}" in output, "\n".join(outputs)
