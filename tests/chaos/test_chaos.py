"""Over any damaged network, the sent object arrives, or there is an error; and there are no leaks.

The long run is ``python -m tests.chaos.run``.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.chaos.proxy import ENDINGS, Fault, Mangler
from tests.chaos.run import Report, run
from tests.chaos.transfers import HARMLESS, KINDS, Transfers
from tests.support.backends import WORLDS
from tests.support.tiers import examples

TRANSFERS = examples(2000)


@pytest.fixture(scope="module")
def report() -> Report:
    return run(Transfers(TRANSFERS, seed=0))


def test_what_arrives_is_what_was_sent_or_there_is_an_error(report: Report) -> None:
    assert len(report.outcomes) == TRANSFERS
    assert not report.failures, "\n".join(report.failures)


def test_nothing_is_left_behind(report: Report) -> None:
    assert not report.leaks, "\n".join(report.leaks)


def test_every_kind_of_network_had_its_way(report: Report) -> None:
    assert {each.transfer.kind for each in report.outcomes} == set(KINDS)
    for kind in KINDS:
        found = Counter(each.receiver for each in report.outcomes if each.transfer.kind == kind)
        if kind in HARMLESS:
            assert set(found) == {"all arrived"}
        elif kind in ENDINGS:
            assert "all arrived" not in found
        else:
            assert found["ChecksumError"] > 10
            assert found["TruncatedError"] > 10
            assert found["ProtocolError"] > 0
    # Faults of the network have stopped senders, too.
    assert any(each.sender == "TruncatedError" for each in report.outcomes)


def test_every_world_took_part(report: Report) -> None:
    transfers = [each.transfer for each in report.outcomes]
    senders = {each.sender.name for each in transfers}
    receivers = {each.receiver.name for each in transfers}
    assert senders >= {world.name for world in WORLDS if world.link == "tcp"}
    assert receivers - senders == {world.name for world in WORLDS if world.kind == "iterable"}
    assert {each.sender.kind for each in transfers if each.sender.link == "tls"} == {
        "streams",
        "anyio",
        "blocking",
    }
    ways = {message.way for each in transfers for message in each.messages}
    assert ways == {"new", "into", "staged", "double"}


def test_wrong_objects_would_be_noticed() -> None:
    """Without checksums, changed bytes make other objects, and the tests notice it."""
    transfers = Transfers(examples(400), seed=0, reckless=True)
    changed = [n for n, each in enumerate(transfers) if each.kind in ("corrupt", "swap")]
    report = run(transfers, changed)
    assert sum("AssertionError" in failure for failure in report.failures) > len(changed) / 10
    assert not report.leaks


def test_a_seed_gives_the_same_transfers() -> None:
    def described(count: int, seed: int) -> list[str]:
        transfers = Transfers(count, seed)
        return [
            f"{each.kind} {each.sender.name} {each.receiver.name} {each.schedule} {each.messages}"
            for each in transfers
        ]

    assert described(50, 1) == described(100, 1)[:50]
    assert described(50, 1) != described(50, 2)


# ------------------------------------------------------------------------------ the mangler


def mangled(data: bytes, sizes: list[int], *faults: Fault) -> tuple[bytes, bool, str | None]:
    """Feed bytes in pieces; return the output, whether it is harmed, and the ending."""
    mangler = Mangler(faults, len(data))
    out = b""
    while data:
        size = sizes.pop(0) if sizes else len(data)
        for piece in mangler.feed(data[:size]):
            if isinstance(piece, Fault):
                return out, mangler.harmed, piece.kind
            out += piece
        data = data[size:]
    return out + mangler.end(), mangler.harmed, None


DATA = bytes(range(100))


@pytest.mark.parametrize(
    ("faults", "out", "harmed", "ending"),
    [
        ([], DATA, False, None),
        ([Fault("swap", 10, 4)], DATA[:10] + b"\x0c\x0d\x0a\x0b" + DATA[14:], True, None),
        ([Fault("duplicate", 10, 2)], DATA[:12] + DATA[10:], True, None),
        ([Fault("duplicate", 90, 10)], DATA + DATA[90:], False, None),
        ([Fault("truncate", 50)], DATA[:50], True, "truncate"),
        ([Fault("swap", 0, 2), Fault("reset", 2)], b"\x01\x00", True, "reset"),
        ([Fault("swap", 98, 4)], DATA, False, None),
    ],
)
def test_faults_are_where_they_should_be(
    faults: list[Fault], out: bytes, harmed: bool, ending: str | None
) -> None:
    for seed in range(20):
        draw = random.Random(seed)
        sizes = [draw.randint(1, 30) for _ in range(draw.randint(0, 50))]
        assert mangled(DATA, sizes, *faults) == (out, harmed, ending)


def test_corruption_changes_every_byte_of_its_stretch_and_no_other() -> None:
    for seed in range(20):
        out, harmed, _ = mangled(DATA, [], Fault("corrupt", 40, 8, seed))
        assert harmed
        assert {n for n in range(100) if out[n] != DATA[n]} == set(range(40, 48))


def test_what_looks_the_same_after_it_does_no_harm() -> None:
    assert mangled(bytes(100), [], Fault("swap", 40, 8)) == (bytes(100), False, None)
