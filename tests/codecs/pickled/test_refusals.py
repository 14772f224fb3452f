"""Refusals of a pickle have the words that torch's users match on in errors of ``torch.load``.

Each pickle goes to torch's weights-only unpickler and to this package. The pickles are harmless.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings

import pytest
import torch
from torch import _weights_only_unpickler

import aiotorchio
from tests.codecs.pickled.test_scan import scan

pytestmark = pytest.mark.usefixtures("no_safe_globals")

CASES = {
    "global": (
        b"\x80\x02cfractions\nFraction\n.",
        r"Unsupported global: GLOBAL fractions\.Fraction was not an allowed global by default",
    ),
    "global-in-two-parts": (
        b"\x80\x02cxml.dom\nNode\n.",
        r"GLOBAL xml\.dom\.Node was not an allowed global by default.*"
        r"torch\.serialization\.add_safe_globals",
    ),
    "blocked": (
        b"\x80\x02cposix\ngetpid\n.",
        r"Trying to load unsupported GLOBAL posix\.getpid whose module posix is blocked",
    ),
    "new-object": (
        b"\x80\x02K\x01)\x81.",
        r"Can only create new object for .*classes allowlisted via `add_safe_globals`",
    ),
    "reduce": (
        b"\x80\x02K\x01)R.",
        r"Trying to call reduce for unrecognized function",
    ),
    "build": (
        b"\x80\x02]}b.",
        r"Can only build .*OrderedDict or types allowlisted via `add_safe_globals`",
    ),
    "append": (b"\x80\x02}K\x01a.", r"Can only append to lists, but got"),
    "appends": (b"\x80\x02}(K\x01e.", r"Can only extend lists, but got"),
    "set-item": (
        b"\x80\x02]K\x01K\x02s.",
        r"Can only SETITEM for dict, collections\.OrderedDict, collections\.Counter, but got",
    ),
    "set-items": (
        b"\x80\x02](K\x01K\x02u.",
        r"Can only SETITEMS for dict, collections\.OrderedDict, collections\.Counter, but got",
    ),
    "operand": (b"\x80\x02K\x010.", r"Unsupported operand 48"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_words_of_torch(case: str) -> None:
    data, words = CASES[case]
    with pytest.raises(pickle.UnpicklingError, match=words):
        _weights_only_unpickler.load(io.BytesIO(data))
    with pytest.raises(aiotorchio.UnsafeObjectError, match=words):
        scan(data)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_the_words_of_another_protocol(protocol: int) -> None:
    data, words = pickle.dumps([1], protocol), f"Detected pickle protocol {protocol}"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with contextlib.suppress(pickle.UnpicklingError):
            _weights_only_unpickler.load(io.BytesIO(data))
    assert any(words in str(each.message) for each in warned)
    with pytest.raises(aiotorchio.UnsafeObjectError, match=f"{words}.* default pickle protocol"):
        scan(data)


def test_what_a_terminal_obeys_is_shown_as_text() -> None:
    with pytest.raises(aiotorchio.UnsafeObjectError) as caught:
        scan("\x80\x02c\x1b[2J\u202e\nx\n.".encode().replace(b"\xc2\x80", b"\x80", 1))
    assert r"\x1b[2J\u202e.x" in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_module_that_must_be_imported() -> None:
    for path, words in (
        ("torch.distributed.tensor\nX", "``torch.distributed.tensor`` must be imported to load DT"),
        ("torch._dynamo.decorators\nX", "``torch._dynamo`` must be imported to load nested jagged"),
    ):
        with pytest.raises(aiotorchio.UnsafeObjectError, match=words):
            scan(b"\x80\x02c" + path.encode() + b"\n.")


def test_an_explicit_pickle_module() -> None:
    file = io.BytesIO()
    aiotorchio.save(torch.ones(1), file)
    file.seek(0)
    with pytest.raises(ValueError, match="Can not safely load weights when explicit pickle_module"):
        aiotorchio.load(file, pickle_module=pickle)
