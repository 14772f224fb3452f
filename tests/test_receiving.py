"""The table in docs/guide/receiving.md: memory, results and side effects of each way to receive.

Each row is checked with a real load.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import aiotorchio
from aiotorchio import ChecksumError
from tests.support.tensor_layouts import Pieces, encoded

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[1]
WAYS = ["load", "into", "staged", "double", "iterate"]
NAMES = {
    "load_from_stream(stream)": "load",
    "into=model": "into",
    "into=model, staged=True": "staged",
    "into=DoubleBuffer(model)": "double",
    "message.iterate()": "iterate",
}
every_way = pytest.mark.parametrize("way", WAYS)


def table() -> dict[str, list[str]]:
    """The rows of the table, by the name of the test's way to receive."""
    text = (ROOT / "docs" / "guide" / "receiving.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {NAMES[row[0].strip("`")]: row[1:] for row in rows}


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(30, 400), nn.Linear(400, 20))


class Receiver:
    """Receives a message in one of the ways, and records changes of a model."""

    def __init__(self, way: str) -> None:
        self.way, self.model = way, make_model()
        self.hooks: list[str] = []
        self.model.register_load_state_dict_post_hook(lambda *_: self.hooks.append("ran"))
        self.before = self.state()
        self.changed_early = False
        self.taken: dict[str, torch.Tensor] = {}

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def same(self, state: dict[str, torch.Tensor]) -> bool:
        now = self.model.state_dict()
        return all(torch.equal(now[name], tensor) for name, tensor in state.items())

    def progress(self, done: int, total: int) -> None:
        if done < total:
            self.changed_early = self.changed_early or not self.same(self.before)

    async def receive(self, data: bytes) -> None:
        stream, into = Pieces(data, 1000), None
        options: dict[str, Any] = {"progress": self.progress}
        if self.way == "iterate":
            async with aiotorchio.StreamReader(stream).open() as message:
                async for name, tensor in message.iterate(**options):
                    self.taken[name] = tensor
            return
        if self.way != "load":
            into = aiotorchio.DoubleBuffer(self.model) if self.way == "double" else self.model
            options |= {"into": into, "staged": self.way == "staged"}
        self.taken = await aiotorchio.load_from_stream(stream, **options)


def message_of(model: nn.Module) -> bytes:
    return encoded(model.state_dict(), chunk_size=2**14)


def test_every_row_has_a_test() -> None:
    assert list(table()) == WAYS


@every_way
async def test_when_tensors_change_and_which_hooks_run(way: str) -> None:
    sent, receiver = make_model(), Receiver(way)
    await receiver.receive(message_of(sent))
    _, change, _, hooks = table()[way]
    assert receiver.changed_early == (change == "while bytes arrive")
    assert receiver.same(sent.state_dict()) != change.startswith("never")
    assert receiver.same(receiver.before) == change.startswith("never")
    assert receiver.hooks == ([] if hooks.startswith("none") else ["ran"])
    for name, tensor in sent.state_dict().items():
        assert torch.equal(receiver.taken[name], tensor)


@every_way
async def test_what_an_error_leaves_behind(way: str) -> None:
    sent, receiver = make_model(), Receiver(way)
    data = bytearray(message_of(sent))
    # A byte in the last chunk.
    data[-200] ^= 1
    with pytest.raises(ChecksumError):
        await receiver.receive(bytes(data))
    left = table()[way][2]
    assert receiver.same(receiver.before) == (left != "partly overwritten")
    assert not receiver.hooks
    assert bool(receiver.taken) == (left == "tensors that it gave out are intact")
    for name, tensor in receiver.taken.items():
        assert torch.equal(sent.state_dict()[name], tensor)


# Run in a new process, because the peak of this one includes all earlier tests.
_PEAKS = """
import asyncio, io, sys, torch, aiotorchio

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

COUNT = 16
state = {f"w{n}": torch.full((2**20,), float(n)) for n in range(COUNT)}
aiotorchio.save(state, sys.argv[1], chunk_size=2**21)
there = {name: torch.full((2**20,), -1.0) for name in state}
buffers = aiotorchio.DoubleBuffer({name: torch.full((2**20,), -1.0) for name in state})
del state

async def receive(way):
    if way == "iterate":
        async def pieces():
            with open(sys.argv[1], "rb") as file:
                while piece := file.read(2**16):
                    yield piece
        async with aiotorchio.StreamReader(pieces()).open() as message:
            async for name, tensor in message:
                del tensor
        return
    options = {"load": {}, "into": {"into": there}, "staged": {"into": there, "staged": True}}
    return aiotorchio.load(sys.argv[1], **options.get(way, {"into": buffers}))

asyncio.run(receive("iterate"))
for way in ["load", "into", "staged", "double", "iterate"]:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    result = asyncio.run(receive(way))
    print(way, (status("VmHWM") - before) / (COUNT * 2**22))
    del result
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks as Linux has them")
def test_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PEAKS, str(tmp_path / "state.aio")]
    # Otherwise malloc keeps freed memory, and the next way reuses it.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    peaks = {way: float(peak) for way, peak in map(str.split, ran.stdout.splitlines())}
    for way, (memory, *_) in table().items():
        # In multiples of the state: once, or a few chunks.
        least, most = (0.9, 1.4) if way == "load" or memory.startswith("once") else (0, 0.25)
        assert least <= peaks[way] < most, (way, peaks)
