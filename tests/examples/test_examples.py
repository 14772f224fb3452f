"""The examples run as they are, and tell by their exit status whether all went well."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = ("--steps", "2", "--width", "32", "--depth", "1")


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    # Dataclasses look up the module of their annotations.
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_the_echo_fits_on_a_page() -> None:
    assert len((EXAMPLES / "tcp_echo.py").read_text().splitlines()) < 80


def test_what_is_echoed_is_the_same() -> None:
    done = run("tcp_echo.py", "--mib", "4")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    sent, received, verdict = done.stdout.splitlines()
    assert re.fullmatch(r"sent +4 tensors, 4,194,304 bytes, \d+\.\d\d GB/s", sent)
    assert re.fullmatch(r"received +4 tensors, 4,194,304 bytes, \d+\.\d\d GB/s", received)
    assert verdict == "the same, bit for bit"


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([1.0]), torch.tensor([1]), False),
        (torch.ones(2, 1), torch.ones(1, 2), False),
        (torch.ones(2), torch.ones(2), True),
    ],
)
def test_the_echo_compares_bits(a: torch.Tensor, b: torch.Tensor, same: bool) -> None:
    assert module("tcp_echo").same_bits(a, b) is same


def test_a_recovered_peer_takes_the_same_steps() -> None:
    done = run("peer_recovery.py", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(r"^moved +\d+ tensors, \d+\.\d MB, codec tree, ", done.stdout, re.MULTILINE)
    assert re.search(r"^memory +peak grew by ", done.stdout, re.MULTILINE)
    losses = re.findall(r"^ *(\d+)  \d+\.\d{4}  (\S+) +(\S+) +=$", done.stdout, re.MULTILINE)
    assert len(losses) == 10
    assert len({here for _, here, _ in losses}) == 10
    assert all(here == there for _, here, there in losses)
    assert done.stdout.endswith("10 of 10 losses are the same to the last bit\n")


def test_the_last_bit_of_a_loss_counts(capsys: pytest.CaptureFixture[str]) -> None:
    compare = module("peer_recovery").compare
    ours = {step: 1 / step for step in range(1, 20)}
    theirs = {step: ours[step] for step in range(5, 15)}
    assert compare(ours, theirs)
    assert not compare(ours, theirs | {7: 1 / 7 + 2**-55})
    assert "9 of 10" in capsys.readouterr().out
    assert not compare(ours, {5: ours[5]})


def test_a_peer_without_anyone_to_ask_fails() -> None:
    with pytest.raises(ConnectionRefusedError):
        asyncio.run(module("peer_recovery").join(1))
