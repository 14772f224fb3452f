"""The pickle codec: references to tensors and storages, and errors.

Round trips are in ``graph/test_flatten.py``.
"""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

import aiotorchio
from aiotorchio.codecs.pickled import codec as pickle_codec
from aiotorchio.codecs.pickled.allowlist import Allowlist
from aiotorchio.limits import Limits
from aiotorchio.table.table import Table
from aiotorchio.wire.header import MIXED_UNITS
from tests.support import corpus, craft


def read(skeleton: bytes, *, trusted: bool = False, allowlist: Any = None) -> Any:
    tensors, storages = [torch.ones(1)], [torch.UntypedStorage(8)]
    allowlist = allowlist or Allowlist((), Limits(), None)
    if trusted:
        return pickle_codec.load_trusted(
            skeleton,
            tensors,
            storages,
            allowlist=allowlist,
            pickle_module=pickle,
            encoding="utf-8",
            offset=7,
        )
    return pickle_codec.load(
        skeleton,
        tensors,
        storages,
        allowlist=allowlist,
        encoding="utf-8",
        depth_limit=256,
        offset=7,
    )


def test_references() -> None:
    table = Table()
    tensor = torch.arange(3)
    typed = torch.TypedStorage(
        wrap_storage=tensor.untyped_storage(), dtype=torch.int64, _internal=True
    )
    bare = torch.UntypedStorage(5)
    skeleton = pickle_codec.dump(
        [tensor, typed, bare, bare], table, pickle_module=pickle, pickle_protocol=2
    )
    assert len(table.tensors) == 1
    assert [(row.nbytes, row.unit) for row in table.storages] == [(24, 8), (5, MIXED_UNITS)]
    assert skeleton.count(b"storage") == 1  # later references use the memo
    loaded = pickle_codec.load(
        skeleton,
        [tensor],
        table.sources,
        allowlist=Allowlist((), Limits(), None),
        encoding="utf-8",
        depth_limit=256,
    )
    corpus.assert_same(loaded, [tensor, typed, bare, bare])


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    ("reference", "error"),
    [
        (1, aiotorchio.ProtocolError),
        (-1, aiotorchio.ProtocolError),
        (("storage", 1, None), aiotorchio.ProtocolError),
        (("storage", None, None), aiotorchio.ProtocolError),
        (("storage", 0, "nothing"), aiotorchio.ProtocolError),
        (("storage", 0), aiotorchio.ProtocolError),
        (("storage", 0, "complex128"), aiotorchio.InvalidObjectError),
    ],
)
def test_bad_references(
    reference: Any, error: type[aiotorchio.AiotorchioError], trusted: bool
) -> None:
    with pytest.raises(error) as caught:
        read(craft.pickled(craft.Code(craft.assemble(reference) + b"Q")), trusted=trusted)
    assert (caught.value.entry, caught.value.offset) == ("skeleton", 7)


def test_errors_of_an_unpickler() -> None:
    with pytest.raises(aiotorchio.UnsafeObjectError, match=r"os\.system") as caught:
        read(craft.pickled(craft.name("os", "system")))
    assert isinstance(caught.value, pickle.UnpicklingError)
    with pytest.raises(aiotorchio.InvalidObjectError, match="ZeroDivisionError") as invalid:
        read(
            craft.pickled(craft.call("tests.codecs.pickled.test_pickle_codec", "divide", 1, 0)),
            trusted=True,
        )
    assert isinstance(invalid.value.__cause__, ZeroDivisionError)
    with pytest.raises(aiotorchio.LimitExceeded, match="deep"):
        read(
            craft.pickled(craft.call("tests.codecs.pickled.test_pickle_codec", "recurse")),
            trusted=True,
        )


def divide(one: int, other: int) -> float:
    return one / other


def recurse() -> None:
    recurse()
