"""Runs the examples as they are; their exit status tells whether all went well."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.speed import patience

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# The arguments with which they run here.
ARGUMENTS = {
    "tcp_echo.py": "--mib 4",
    "peer_recovery.py": "--steps 2 --width 32 --depth 1",
    "weight_sync.py": "--workers 2 --mib 8 --versions 3 --interval 0.2",
    "stream_larger_than_memory.py": "--gib 0.75",
}

Run = Callable[[str], subprocess.CompletedProcess[str]]


def run_example(name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *ARGUMENTS[name].split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=patience(120))


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """The outcome of an example; the examples run in parallel, which takes half as long.

    Runs only the examples of the selected tests, the slow ones in the full tier.
    """
    sources = [
        inspect.getsource(item.function)
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == Path(__file__)
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = {
            name: pool.submit(run_example, name)
            for name in ARGUMENTS
            if any(f'run("{name}")' in source for source in sources)
        }
        yield lambda name: runs[name].result()


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


def test_what_is_echoed_is_the_same(run: Run) -> None:
    done = run("tcp_echo.py")
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


def test_a_recovered_peer_takes_the_same_steps(run: Run) -> None:
    done = run("peer_recovery.py")
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


def test_workers_answer_while_they_take_new_weights(run: Run) -> None:
    done = run("weight_sync.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    row = r"^ +(\d+) +(\d+) +3 +1 +\d+\.\d\d ms +\d+ ms +\d+ ms +0$"
    rows = re.findall(row, done.stdout, re.MULTILINE)
    assert [worker for worker, _ in rows] == ["1", "2"], done.stdout
    assert all(int(requests) > 0 for _, requests in rows)
    assert done.stdout.endswith("every answer came from one version\n")


@pytest.mark.parametrize(
    ("wrong", "good"),
    [({}, True), ({"half_applied": 1}, False), ({"versions": 4}, False), ({"refused": 0}, False)],
)
def test_what_a_worker_did_wrong_is_told(wrong: dict[str, int], good: bool) -> None:
    example = module("weight_sync")
    right = {"requests": 9, "versions": 3, "refused": 1}
    reports = [example.Report(**right), example.Report(**(right | wrong))]
    assert example.show(reports, versions=3) is good


def test_an_answer_tells_of_every_weight() -> None:
    model = module("weight_sync").Model(mib=1)
    for layer in model.layers:
        torch.nn.init.constant_(layer, 7)
    question = torch.ones(512)
    assert model(question).unique().tolist() == [7]
    with torch.no_grad():
        model.layers[1][20, 300] = 6
    assert len(model(question).unique()) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the limit works on Linux only")
def test_a_state_larger_than_memory_passes(run: Run) -> None:
    done = run("stream_larger_than_memory.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    for who in ("sender", "receiver"):
        assert f"{who:10}the system refuses a tensor of 512 MiB" in lines
        (peak,) = re.findall(rf"^{who} +peak of resident memory (\d+) MiB$", done.stdout, re.M)
        assert int(peak) < 512
    assert "received  24 of 24 shards are right" in lines
    assert re.fullmatch(r"0\.75 GiB in \d+\.\d s: \d+\.\d\d GiB/s", lines[-1])


def test_a_wrong_shard_is_seen() -> None:
    example = module("stream_larger_than_memory")
    shard = example.make_shard(3)
    assert example.is_right(shard, 3)
    assert not example.is_right(shard, 2)
    shard[-1] += 1
    assert not example.is_right(shard, 3)
