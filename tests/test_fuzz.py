"""Faults that fuzzing has found stay fixed; a small part of the fuzzing runs without an engine.

The programs and their requirements are in ``fuzz``.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("resource", reason="peaks of memory are asked for as Unix has them")

from fuzz import mutate, parser, pickled, tree
from fuzz.seed import seeds
from tests.support.tiers import examples

# torch warns about new or rare kinds of tensors.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

HARNESSES: dict[str, Any] = {"parser": parser, "tree": tree, "pickled": pickled}
FINDS = Path(mutate.__file__).parent / "finds"
SMALL = mutate.small()
# Inputs in each test; the programs in ``fuzz`` run millions.
COUNT = examples(2000)


@pytest.fixture(scope="module")
def seeded_inputs() -> dict[str, list[bytes]]:
    return seeds()


def found(name: str) -> list[Any]:
    return [pytest.param(path, id=path.name) for path in sorted((FINDS / name).glob("*"))]


@pytest.mark.parametrize(
    ("harness", "path"),
    [(name, path) for name in HARNESSES for (path,) in (each.values for each in found(name))],
)
def test_finds(harness: str, path: Path) -> None:
    HARNESSES[harness].test_one_input(path.read_bytes())


@pytest.mark.parametrize("path", found("message"))
def test_messages_that_were_found(path: Path) -> None:
    mutate.judge_hostile(path.read_bytes())


@pytest.mark.parametrize("harness", HARNESSES)
def test_seeds(harness: str, seeded_inputs: dict[str, list[bytes]]) -> None:
    for data in seeded_inputs[harness]:
        HARNESSES[harness].test_one_input(data)


@pytest.mark.parametrize("harness", HARNESSES)
def test_seeds_that_are_changed(harness: str, seeded_inputs: dict[str, list[bytes]]) -> None:
    random = Random(0)

    def change_bytes(data: bytes, max_size: int) -> bytes:
        changed = bytearray(data[:max_size])
        if changed:
            changed[random.randrange(len(changed))] = random.randrange(256)
        return bytes(changed)

    target = HARNESSES[harness]
    for _ in range(COUNT):
        data = random.choice(seeded_inputs[harness])
        for _ in range(random.choice([1, 1, 2])):
            data = target.mutate(data, target.MAX_LEN, random, change_bytes)
        target.test_one_input(data)


@pytest.mark.parametrize("name", SMALL)
def test_every_cut(name: str) -> None:
    data = SMALL[name].data
    step = 1 + len(data) // COUNT
    cuts = itertools.islice(mutate.cuts(data), 0, None, step)
    assert mutate.tally(cuts, mutate.judge_cut).keys() == {"TruncatedError"}


@pytest.mark.parametrize("name", SMALL)
def test_every_bit(name: str) -> None:
    sample = SMALL[name]
    # An odd step, so that each bit of a byte is flipped equally often in the long message.
    step = 1 + len(sample.data) // 1000 * 2
    flipped = itertools.islice(mutate.bits(sample.data), 0, None, step)
    outcomes = mutate.tally(flipped, mutate.judge, [sample])
    expected = {"ChecksumError", "ProtocolError", "LimitExceeded", "TruncatedError"}
    if not sample.checksum:
        expected.add("other numbers (no checksum)")
    assert outcomes.keys() == expected


def test_damage_at_random() -> None:
    random = Random(0)
    samples = list(mutate.larger().values())
    inputs = (
        mutate.damaged(random, random.choice(samples), random.choice(samples)) for _ in range(COUNT)
    )
    outcomes = mutate.tally(inputs, mutate.judge, samples)
    assert outcomes.total() == COUNT
    assert outcomes["ChecksumError"] > COUNT // 4


def test_damage_with_right_digests() -> None:
    random = Random(0)
    samples = [*mutate.larger().values(), *SMALL.values()]
    # Half as many inputs, because each is loaded in several ways.
    count = COUNT // 2
    inputs = (mutate.repaired(random, random.choice(samples)) for _ in range(count))
    outcomes = mutate.tally(inputs, mutate.judge_hostile)
    assert outcomes.total() == count
    assert outcomes["object"] > count // 50
