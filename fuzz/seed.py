"""Writes the seeds of every harness to ``fuzz/seeds``: honest messages, and those of attackers."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

from aiotorchio.codecs.pickled import codec as pickle_codec
from aiotorchio.codecs.tree import codec as tree_codec
from aiotorchio.table.table import Table
from fuzz.messages import dissect
from tests.support import corpus, craft, hostile
from tests.support.frames import Message, fields, pack, two_chunks
from tests.vectors.generate import FOLDER

__all__ = ["SEEDS", "seeds"]

SEEDS = Path(__file__).parent / "seeds"
_SIZE_MAX = 4096
# The chunk size of the messages.
_MESSAGE_MAX = 10_000
# Values that every process makes anew; with fixed ones the seeds are the same each time.
_RANDOM = {"pretrained", "generator_states"}


def main() -> None:
    """Write all seeds."""
    for harness, found in seeds().items():
        folder = SEEDS / harness
        folder.mkdir(parents=True, exist_ok=True)
        for data in found:
            (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def seeds() -> dict[str, list[bytes]]:
    """Return the seeds of each harness by its name, small ones only."""
    sizes = {"parser": _MESSAGE_MAX, "tree": _SIZE_MAX, "pickled": _SIZE_MAX}
    every = {"parser": _messages(), "tree": _trees(), "pickled": _pickles()}
    return {
        harness: sorted({data for data in found if len(data) <= sizes[harness]})
        for harness, found in every.items()
    }


def _messages() -> Iterator[bytes]:
    yield from _vectors()
    good = Message()
    for whole in (good, Message(checksum=False), two_chunks(), two_chunks(checksum=False)):
        yield bytes(whole)
    for offset, shape, stride, flags in ((0, [2, 0], [7, 1], 0), (1, [], [], 3), (0, [2], [0], 8)):
        row = [0, "complex64", offset, shape, stride, flags, ["a.b", "c"]]
        yield bytes(Message(pack(fields(storages=[[16, 4, 0], [3, 1, 0]], tensors=[row]))))
    for locations in (["meta", "cuda:0"], ["cpu", "meta"]):
        yield bytes(Message(pack(fields(locations=locations)), payload=b""))


def _vectors() -> Iterator[bytes]:
    for path in sorted(FOLDER.glob("*.bin")):
        yield path.read_bytes()


def _skeletons() -> Iterator[bytes]:
    for data in _vectors():
        yield from (frame.body for frame in dissect(data).frames if frame.kind == b"SKEL")


def _trees() -> Iterator[bytes]:
    yield from _skeletons()
    for key, case in hostile.trees().items():
        if not key.startswith("cut_"):
            yield case.skeleton
    for obj in _objects():
        try:
            yield tree_codec.encode(obj, Table())
        except tree_codec.NotATreeError:
            continue


def _pickles() -> Iterator[bytes]:
    for key, case in hostile.pickles().items():
        if not key.startswith("cut_"):
            yield case.skeleton
    for obj in _objects():
        yield pickle_codec.dump(obj, Table(), pickle_module=pickle, pickle_protocol=2)
    # Honest skeletons for the kinds that have none, with the rows of the harness's table.
    for honest in (
        hostile.sparse("sparse_coo", craft.tensor(1), craft.tensor(0), (4,)),
        hostile.sparse("sparse_coo", craft.tensor(1), craft.tensor(0), (4,), True),
        hostile.quantized((craft.name("torch", "per_tensor_affine"), 0.5, 1)),
        craft.strided(0, "float32", 1, (3,), (1,)),
        craft.rebuild("_rebuild_parameter", craft.tensor(0), True, craft.ordered_dict()),
        craft.rebuild(
            "_rebuild_parameter_with_state", craft.tensor(0), True, craft.ordered_dict(), {"a": 1}
        ),
    ):
        yield craft.pickled(honest)


def _objects() -> Iterator[object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(corpus.CASES.keys() - _RANDOM):
            yield corpus.make(name)


if __name__ == "__main__":
    main()
