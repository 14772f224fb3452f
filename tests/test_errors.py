"""The error classes: their tree, their texts, and their behaviour with pickle and copy."""

from __future__ import annotations

import copy
import pickle

import pytest

import aiotorchio
from aiotorchio import errors
from aiotorchio.errors import AiotorchioError

ALL = [getattr(errors, name) for name in errors.__all__]
ALSO = {
    "TruncatedError": EOFError,
    "UnsafeObjectError": pickle.UnpicklingError,
    "TransferTimeout": TimeoutError,
}


def test_every_error_of_the_module_is_listed_and_public() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined == set(errors.__all__)
    for name in errors.__all__:
        assert name in aiotorchio.__all__
        assert getattr(aiotorchio, name) is getattr(errors, name)


@pytest.mark.parametrize("kind", ALL)
def test_the_tree(kind: type[AiotorchioError]) -> None:
    bases: list[type] = [] if kind is AiotorchioError else [AiotorchioError]
    if kind.__name__ in ALSO:
        bases.append(ALSO[kind.__name__])
    assert list(kind.__bases__) == (bases or [Exception])
    assert kind.__doc__
    line = next(
        (line for line in str(errors.__doc__).splitlines() if f" {kind.__name__} " in f"{line} "),
        "",
    )
    assert line, "the tree in the docstring does not have it"
    assert ("also" in line) == (kind.__name__ in ALSO)


@pytest.mark.parametrize("kind", ALL)
def test_what_they_say(kind: type[AiotorchioError]) -> None:
    assert str(kind("wrong")) == "wrong"
    assert str(kind("wrong", entry="tensor 3")) == "wrong (at tensor 3)"
    assert str(kind("wrong", offset=0)) == "wrong (at byte 0)"
    error = kind("wrong", entry="tensor 3", offset=17)
    assert str(error) == "wrong (at tensor 3, byte 17)"
    assert (error.message, error.entry, error.offset) == ("wrong", "tensor 3", 17)


@pytest.mark.parametrize("kind", ALL)
def test_what_a_peer_wrote_moves_no_cursor(kind: type[AiotorchioError]) -> None:
    text = str(kind("device '\x1b[2Jcpu\r\u202e'"))
    assert text == "device '\\x1b[2Jcpu\\r\\u202e'"
    # A MismatchError has one line for each misfit.
    assert ("\n" in str(kind("one\ntwo"))) == (kind is aiotorchio.MismatchError)


@pytest.mark.parametrize("letter", ["a", "\n", "\U000e0001"])
@pytest.mark.parametrize("kind", ALL)
def test_no_message_is_longer_than_a_person_reads(kind: type[AiotorchioError], letter: str) -> None:
    assert len(kind(letter * 10_000).message) <= 10_003
    assert len(kind(letter * 20_000).message) == 10_003


@pytest.mark.parametrize("kind", ALL)
def test_they_cross_processes(kind: type[AiotorchioError]) -> None:
    error = kind("wrong", entry="tensor 3", offset=17)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        same = pickle.loads(pickle.dumps(error, protocol))
        assert type(same) is kind
        assert str(same) == str(error)
        assert vars(same) == vars(error)
    assert str(copy.copy(error)) == str(error)
