"""Loads whole messages that are damaged in many ways, and checks the outcomes.

``python -m fuzz.mutate`` tries every cut and every flipped bit of several small messages, then
random damage of larger ones, by a network and by a hostile sender, whose digests are right. It
prints how often each outcome came, and keeps the finds in ``finds``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import io
import itertools
import time
import zlib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

import aiotorchio
from aiotorchio.errors import AiotorchioError, TruncatedError
from aiotorchio.wire.frames import CHUNK, FLAG_CHECKSUM, HEADER, SKELETON
from aiotorchio.wire.header import decode_header
from aiotorchio.wire.layout import Layout
from fuzz.messages import Draft, dissect, vary, vary_frames
from fuzz.objects import LIMITS, use
from fuzz.oracle import Find, check_refusal, choose, no_flood
from tests.support import craft
from tests.support.corpus import assert_same

__all__ = [
    "Sample",
    "bits",
    "cuts",
    "damaged",
    "judge",
    "judge_cut",
    "judge_hostile",
    "larger",
    "repaired",
    "small",
    "tally",
]

FINDS = Path(__file__).parent / "finds" / "message"
_SECONDS_MAX = 10
_EQUAL, _UNNOTICED, _OBJECT = "equal", "other numbers (no checksum)", "object"


@dataclass(frozen=True)
class Sample:
    """A good message, and the object in it."""

    data: bytes
    obj: Any

    @property
    def checksum(self) -> bool:
        """Whether its chunks carry checksums."""
        return bool(dissect(self.data).preface[10] & FLAG_CHECKSUM)


def _sample(obj: Any, **options: Any) -> Sample:
    file = io.BytesIO()
    aiotorchio.save(obj, file, metadata={"k": "v"}, **options)
    return Sample(file.getvalue(), obj)


def small() -> dict[str, Sample]:
    """Return messages of each kind, as small as they can be."""
    state = OrderedDict(w=torch.arange(5.0), b=torch.tensor([1, 2], dtype=torch.int8))
    shared = [torch.arange(3)]
    return {
        "tree": _sample({"s": state, "n": [1, -2.5, None, "x", b"y", (2**70,), {3}]}),
        "pickle": _sample([shared, shared, frozenset([1])]),
        "sparse": _sample({"e": torch.eye(3).to_sparse(), "t": torch.ones(2).bool()}),
        "unchecked": _sample({"s": state}, checksum=False),
        "chunks": _sample({"w": torch.arange(4170).to(torch.uint8)}, chunk_size=4096),
        "empty": _sample({}),
    }


def larger() -> dict[str, Sample]:
    """Return messages of several chunks."""
    generator = torch.Generator().manual_seed(0)
    state = {f"layer.{n}.weight": torch.rand(16, 16, generator=generator) for n in range(8)}
    state["many"] = torch.rand(2000, generator=generator)
    state["few"] = torch.arange(3)
    optimizer = {"state": state, "lr": 0.1, "betas": (0.9, 0.99), "steps": [1, 2, 3]}
    pickled = [optimizer, optimizer["state"], torch.eye(4).to_sparse()]
    return {
        "tree": _sample(optimizer, chunk_size=4096),
        "pickle": _sample(pickled, chunk_size=4096),
        "unchecked": _sample(optimizer, chunk_size=4096, checksum=False),
    }


# ------------------------------------------------------------------------------ judging


def judge(data: bytes, whole: Sequence[Sample]) -> str:
    """Load a message that was made of one or two good ones.

    Returns:
        The name of the outcome.

    Raises:
        Find: The loaded object is in none of the good messages.
    """
    outcome = _load(data)
    if isinstance(outcome, str):
        return outcome
    for sample in whole:
        if data.startswith(sample.data):
            assert_same(outcome[0], sample.obj)
            return _EQUAL
    for sample in whole:
        if not sample.checksum and _structure(outcome[0]) == _structure(sample.obj):
            return _UNNOTICED
    raise Find("a damaged message was accepted")


def judge_cut(data: bytes) -> str:
    """Load a message whose end is missing."""
    try:
        with no_flood():
            aiotorchio.load(io.BytesIO(data))
    except TruncatedError as error:
        if error.offset == len(data):
            return type(error).__name__
        raise Find(f"{len(data)} bytes arrived: {error!r}") from error
    raise Find("a message without its end was accepted")


def judge_hostile(data: bytes) -> str:
    """Load a hostile sender's message with many options; any object that can be used is fine."""
    for options in _OPTIONS:
        outcome = _load(data, placed=False, **options)
        if not isinstance(outcome, str):
            use(outcome[0])
    # A loop takes longer than all of the calls above.
    if zlib.crc32(data) % 8 == 0:
        asyncio.run(_open(data))
    outcome = _load(data)
    if isinstance(outcome, str):
        return outcome
    use(outcome[0])
    return _OBJECT


def _destination() -> dict[str, torch.Tensor]:
    return {"s.w": torch.zeros(5), "state.few": torch.zeros(3), "t": torch.zeros(2)}


_OPTIONS: tuple[dict[str, Any], ...] = (
    {"select": "*"},
    {"select": lambda name: name.endswith("w")},
    {"into": _destination(), "strict": False, "cast": True},
    {"into": _destination(), "strict": False, "cast": True, "staged": True},
    {"map_location": "meta"},
)


async def _open(data: bytes) -> None:
    """Read all properties of a message before it is loaded, and iterate over it."""

    class Pieces:
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield data

    with no_flood(), contextlib.suppress(AiotorchioError):
        async with aiotorchio.StreamReader(Pieces()).open(limits=LIMITS) as message:
            with contextlib.suppress(AiotorchioError):
                await message.get_unsafe_globals()
            assert message.unnamed >= 0
            assert len(message.tensors) >= 0
            async for _, tensor in message:
                use(tensor)


def _load(data: bytes, *, placed: bool = True, **options: Any) -> str | tuple[Any]:
    start = time.perf_counter()
    try:
        with no_flood():
            return (aiotorchio.load(io.BytesIO(data), limits=LIMITS, **options),)
    except AiotorchioError as error:
        # An error about the caller's own objects names no place in the message.
        if placed:
            check_refusal(error, 0, len(data))
        return type(error).__name__
    finally:
        if time.perf_counter() - start > _SECONDS_MAX:
            raise Find(f"it took {time.perf_counter() - start} seconds")


def _structure(obj: Any) -> tuple[Any, ...]:
    parts = craft.flattened(obj)
    return parts.skeleton, parts.header.tensors, parts.header.storages


# ------------------------------------------------------------------------------ damage


def cuts(data: bytes) -> Iterator[bytes]:
    """Yield every beginning but the whole."""
    return (data[:size] for size in range(len(data)))


def bits(data: bytes) -> Iterator[bytes]:
    """Yield the message with each bit flipped in turn."""
    for at, bit in itertools.product(range(len(data)), range(8)):
        yield data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def damaged(random: Random, sample: Sample, other: Sample) -> bytes:
    """Damage a message as a bad network does, with parts of another message."""
    data = sample.data
    start, end = sorted(random.randrange(len(data) + 1) for _ in range(2))
    if random.random() < 0.5:
        end = min(end, start + random.randrange(1, 100))
    piece = data[start:end]

    def bytes_flipped() -> bytes:
        changed = bytearray(data)
        for _ in range(random.choice([1, 1, 2, 5, 50])):
            changed[random.randrange(len(data))] ^= random.randrange(1, 256)
        return bytes(changed)

    def ranges_swapped() -> bytes:
        size = min(len(piece), len(data) - end)
        there = random.randrange(end, len(data) - size + 1)
        return b"".join(
            [
                *(data[:start], data[there : there + size], data[start + size : there]),
                *(data[start : start + size], data[there + size :]),
            ]
        )

    def spliced() -> bytes:
        return data[:start] + other.data[random.randrange(len(other.data)) :]

    made: bytes = choose(
        random,
        (4, bytes_flipped),
        (2, ranges_swapped),
        (1, lambda: data[:end] + piece + data[end:]),
        (1, lambda: data[:start] + data[end:]),
        (1, lambda: data[:start] + random.randbytes(random.randrange(1, 100)) + data[start:]),
        (1, lambda: data[:start] + bytes(len(piece)) + data[end:]),
        (1, spliced),
        (1, lambda: data[:start] + other.data[start:]),
        (2, lambda: _frames_swapped(random, data, other.data)),
        (2, lambda: _storages_swapped(random, data)),
    )
    return made


def _frames_swapped(random: Random, data: bytes, other: bytes) -> bytes:
    frames, there = _frames(data), _frames(other)
    at = random.randrange(len(frames))
    match random.randrange(3):
        case 0:
            frames[at] = random.choice(there)
        case 1:
            frames[at : at + 2] = frames[at : at + 2][::-1]
        case _:
            to = random.randrange(len(frames))
            frames[at], frames[to] = frames[to], frames[at]
    return data[:16] + b"".join(frames)


def _frames(data: bytes) -> list[bytes]:
    frames, position = [], 16
    for frame in dissect(data).frames:
        size = 32 + len(frame.body)
        frames.append(data[position : position + size])
        position += size
    return frames


def _storages_swapped(random: Random, data: bytes) -> bytes:
    """Exchange the bytes of two storages of one size, and leave the frames as they were."""
    draft = dissect(data)
    header = draft.find(HEADER)
    assert header is not None
    layout = Layout(decode_header(header.body, LIMITS))
    payload = bytearray().join(frame.body for frame in draft.frames if frame.kind == CHUNK)
    ranges = [
        (start, size) for start, size in zip(layout.offsets, layout.nbytes, strict=True) if size
    ]
    one, two = random.choice(
        [pair for pair in itertools.combinations(ranges, 2) if pair[0][1] == pair[1][1]]
    )
    size = one[1]
    first, second = payload[one[0] : one[0] + size], payload[two[0] : two[0] + size]
    payload[one[0] : one[0] + size], payload[two[0] : two[0] + size] = second, first
    position, joined = 16, bytearray(data)
    for frame in draft.frames:
        position += 32
        if frame.kind == CHUNK:
            joined[position : position + len(frame.body)] = payload[: len(frame.body)]
            del payload[: len(frame.body)]
        position += len(frame.body)
    return bytes(joined)


def repaired(random: Random, sample: Sample) -> bytes:
    """Make every digest of a damaged message right, as a hostile sender does."""
    draft = dissect(sample.data)
    for _ in range(random.choice([1, 1, 2, 3])):
        kind = random.choice([HEADER, HEADER, SKELETON])
        if random.random() < 0.1:
            vary_frames(draft, random)
        else:
            _vary_body(random, draft, kind)
    if random.random() < 0.7:
        draft.fit()
    return bytes(draft)


def _vary_body(random: Random, draft: Draft, kind: bytes) -> None:
    frame = draft.find(kind)
    if frame is None or not frame.body:
        return
    changed = vary(frame.body, random) if random.random() < 0.8 else None
    if changed is None:
        # The body is a pickle, or the result need not be well-formed.
        body = bytearray(frame.body)
        at = random.randrange(len(body))
        match random.randrange(4):
            case 0:
                body[at] ^= 1 << random.randrange(8)
            case 1:
                body[at] = random.randrange(256)
            case 2:
                del body[at : at + random.randrange(1, 9)]
            case _:
                body[at:at] = random.choice([random.randbytes(3), body[at : at + 20]])
        changed = bytes(body)
    frame.body = changed


# ------------------------------------------------------------------------------ the program


def tally(
    inputs: Iterable[bytes], judged: Any, *arguments: Any, keep: Path | None = None
) -> Counter[str]:
    """Judge many inputs, and count the outcomes.

    Args:
        inputs: The inputs to judge.
        judged: Judges one of them.
        arguments: More arguments of ``judged``.
        keep: The folder for finds; without one a find is raised.
    """
    counts: Counter[str] = Counter()
    for data in inputs:
        try:
            outcome = judged(data, *arguments)
        except Exception as error:
            # Any exception is a find; the other inputs are still to be judged.
            if keep is None:
                raise
            outcome = f"FIND {type(error).__name__}"
            keep.mkdir(parents=True, exist_ok=True)
            (keep / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        counts[outcome] += 1
    return counts


def main() -> None:
    """Run all of it, and print the counts."""
    options = argparse.ArgumentParser(prog="python -m fuzz.mutate", description=__doc__)
    options.add_argument("--count", type=int, default=100_000, help="random damages of each kind")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    for name, sample in small().items():
        _print(f"every cut: {name}", tally(cuts(sample.data), judge_cut, keep=FINDS))
        _print(f"every bit: {name}", tally(bits(sample.data), judge, [sample], keep=FINDS))
    random = Random(chosen.seed)
    samples = list(larger().values())
    damage = (
        damaged(random, random.choice(samples), random.choice(samples)) for _ in range(chosen.count)
    )
    _print("random damage", tally(damage, judge, samples, keep=FINDS))
    samples += small().values()
    hostile = (repaired(random, random.choice(samples)) for _ in range(chosen.count))
    _print("damage, and right digests", tally(hostile, judge_hostile, keep=FINDS))


def _print(title: str, counts: Counter[str]) -> None:
    print(f"{title}: {counts.total()} messages", flush=True)
    for outcome, count in counts.most_common():
        print(f"  {count:>9,}  {outcome}", flush=True)


if __name__ == "__main__":
    main()
