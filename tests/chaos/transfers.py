"""Random transfers by a seed: object, peers, damage by the network, and rules that must hold."""

from __future__ import annotations

import dataclasses
import functools
import io
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import trustme

import aiotorchio
from aiotorchio import AiotorchioError, Limits, TransferTimeout, tls
from tests.chaos.ends import TLS_WORLDS, Contexts, tls_world
from tests.chaos.proxy import ENDINGS, Fault, FaultKind, Link, Schedule
from tests.support.backends import WORLDS, End, World
from tests.support.corpus import assert_same
from tests.support.tensor_layouts import assert_same_bits

__all__ = ["KINDS", "Message", "Progress", "Transfer", "Transfers"]

Kind = Literal["calm", "fragment", "delay"] | FaultKind
Way = Literal["new", "into", "staged", "double"]

# The number of each kind in a hundred transfers.
KINDS: dict[Kind, int] = {
    "calm": 12,
    "fragment": 14,
    "delay": 10,
    "corrupt": 20,
    "swap": 12,
    "duplicate": 10,
    "truncate": 12,
    "reset": 8,
    "silence": 2,
}
HARMLESS: tuple[Kind, ...] = ("calm", "fragment", "delay")

# A sender of damaged bytes may keep a receiver waiting for more. An honest sender gets all the time
# that it may need on a busy machine.
_HARMED = Limits(start_timeout=1, handshake_timeout=1, idle_timeout=1)
_HONEST = Limits()

_DTYPES = [torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.complex64]
_CHUNK_SIZES = [4096, 16384, 65536, 2**20]


# ------------------------------------------------------------------------------ objects


def _tensor(draw: random.Random, nbytes_max: int) -> torch.Tensor:
    dtype = draw.choice(_DTYPES)
    count = int(nbytes_max * draw.random()) // dtype.itemsize
    bits = torch.frombuffer(
        bytearray(draw.randbytes(count * dtype.itemsize + 1)), dtype=torch.uint8
    )
    # A new storage, of just that size.
    return bits[:-1].clone().view(dtype)


def _object(draw: random.Random) -> dict[str, Any]:
    """A flat state dict."""
    nbytes_max = int(100 * 10_000 ** draw.random())
    count = draw.choice([1, 2, 5, 20])
    tensors = {f"layer.{n}": _tensor(draw, nbytes_max // count) for n in range(count)}
    return {**tensors, "step": draw.randrange(10**6)}


def _structured(draw: random.Random) -> Any:
    """Tensors that share storages in containers of several kinds, some of which need pickle."""
    state = _object(draw)
    tensors = [each for each in state.values() if isinstance(each, torch.Tensor)]
    views = [each[len(each) // 3 :: 2] for each in tensors]
    shared = ["a list", draw.randbytes(draw.choice([10, 1000, 50_000]))]
    if draw.random() < 0.5:
        return [state, views, (shared, shared), None]
    return {"state": state, "views": tuple(views), "shared": shared}


def _objects(seed: int) -> list[Any]:
    draw = random.Random(seed)
    return [_object(draw) if n % 3 else _structured(draw) for n in range(60)]


# ------------------------------------------------------------------------------ messages


@dataclass(frozen=True)
class Message:
    """An object, and the options with which it is sent and received."""

    obj: Any = field(repr=False)
    nbytes: int
    options: dict[str, Any]
    way: Way

    async def receive(self, end: End, limits: Limits) -> None:
        """Load the message.

        Raises:
            AssertionError: The object differs, or targets are neither old nor new.
            AiotorchioError: The message did not arrive.
        """
        if self.way == "new":
            assert_same(await end.load(limits=limits), self.obj)
            return
        tensors = {name: each for name, each in self.obj.items() if name != "step"}
        places = {name: torch.ones_like(each) for name, each in tensors.items()}
        into = aiotorchio.DoubleBuffer(places) if self.way == "double" else places
        try:
            result = await end.load(into=into, staged=self.way == "staged", limits=limits)
        except AiotorchioError:
            if self.way != "into":
                for place in places.values():
                    assert_same_bits(place, torch.ones_like(place))
            raise
        assert result.keys() == self.obj.keys()
        assert result["step"] == self.obj["step"]
        for name, tensor in tensors.items():
            assert result[name] is places[name]
            assert_same_bits(places[name], tensor)


# ------------------------------------------------------------------------------ transfers


@dataclass
class Progress:
    """The progress of a sender or a receiver: finished messages, and the error that stopped it."""

    done: int = 0
    error: AiotorchioError | None = None


@dataclass(frozen=True)
class Transfer:
    """Messages over one connection.

    Attributes:
        serves: Whether the sender is the TLS server.
    """

    index: int
    kind: Kind
    sender: World
    receiver: World
    serves: bool
    messages: Sequence[Message]
    schedule: Schedule

    async def send(self, end: End, link: Link, progress: Progress) -> None:
        # The receiver is connected, and all bytes so far have arrived: the TLS handshake is
        # complete.
        assert await end.receive(1) == b"!"
        link.begin()
        for message in self.messages:
            await end.save(message.obj, **message.options)
            progress.done += 1

    async def receive(self, end: End, progress: Progress) -> None:
        await end.send(b"!")
        for message in self.messages:
            await message.receive(end, _HONEST if self.kind in HARMLESS else _HARMED)
            progress.done += 1

    def complaints(self, sent: Progress, received: Progress, *, harmed: bool) -> list[str]:
        """Violated rules, in addition to the errors that were raised."""
        both = f" (sender: {sent.error!r}, receiver: {received.error!r})"
        found = []
        if harmed and received.error is None:
            found.append("the harm went unnoticed")
        if not harmed and received.error is not None and not self._impatient(received):
            found.append("the receiver failed without a cause" + both)
        # No call reads the bytes after the last message: they may reset a sender that has just sent
        # all.
        if not self.schedule.faults and sent.error is not None:
            found.append("the sender failed without a cause" + both)
        if received.done < self._whole() and not self._impatient(received):
            found.append("a whole message was lost" + both)
        return found

    def _impatient(self, received: Progress) -> bool:
        """Whether a receiver gave up early, as it may have on a machine that stood still."""
        return self.kind not in HARMLESS and isinstance(received.error, TransferTimeout)

    def _whole(self) -> int:
        """The number of messages that have passed before the first fault."""
        # A reset discards unread bytes. TLS needs more bytes for the same messages.
        if not self.schedule.faults or self.kind == "reset" or self.sender.link == "tls":
            return 0
        end, count = 0, 0
        for message in self.messages:
            end += message.nbytes
            count += end <= self.schedule.faults[0].offset
        return count


def _contexts() -> Contexts:
    authority = trustme.CA()
    with tempfile.TemporaryDirectory() as folder:
        ca, server, client = (Path(folder) / name for name in ("ca", "server", "client"))
        authority.cert_pem.write_to_path(str(ca))
        for path in (server, client):
            issued = authority.issue_cert("localhost")
            issued.private_key_and_cert_chain_pem.write_to_path(str(path))
        return Contexts(tls.server_context(server, client_ca=ca), tls.client_context(ca, client))


class Transfers(Sequence[Transfer]):
    """All transfers of a seed.

    Args:
        count: The number of transfers.
        seed: The first transfers are the same for every count.
        reckless: Send messages that will be changed without checksums, to show that wrong objects
            would be noticed.
    """

    def __init__(self, count: int, seed: int, *, reckless: bool = False) -> None:
        self._count = count
        self._seed = seed
        self._reckless = reckless
        self._objects = _objects(seed)
        contexts = _contexts()
        self._tls = [tls_world(kind, loop, contexts) for kind, loop in TLS_WORLDS]
        self._plain = [world for world in WORLDS if world.link == "tcp"]
        self._iterables = [world for world in WORLDS if world.kind == "iterable"]
        self._nbytes = functools.cache(self._nbytes_of)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        draw = random.Random(f"{self._seed} {index}")
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        worlds = self._tls if draw.random() < 0.3 and not self._reckless else self._plain
        sender, receiver = draw.choice(worlds), draw.choice(worlds)
        if worlds is self._plain and draw.random() < 0.15:
            receiver = draw.choice(self._iterables)
        encrypted = worlds is self._tls
        messages = [
            self._message(draw, checksum=encrypted or kind in ("corrupt", "swap", "duplicate"))
            for _ in range(draw.choice([1, 1, 2, 5]))
        ]
        schedule = _schedule(draw, kind, [message.nbytes for message in messages])
        if encrypted:
            schedule = dataclasses.replace(schedule, count=None)
        return Transfer(index, kind, sender, receiver, draw.random() < 0.5, messages, schedule)

    def _message(self, draw: random.Random, *, checksum: bool) -> Message:
        index = draw.randrange(len(self._objects))
        obj, chunk_size = self._objects[index], draw.choice(_CHUNK_SIZES)
        checksum = not self._reckless and (checksum or draw.random() < 0.7)
        flat = isinstance(obj, dict) and "step" in obj
        ways: list[Way] = ["new", "into", "staged", "double"]
        return Message(
            obj,
            self._nbytes(index, chunk_size, checksum),
            {"chunk_size": chunk_size, "checksum": checksum, "snapshot": draw.random() < 0.1},
            draw.choice(ways) if flat and draw.random() < 0.6 else "new",
        )

    def _nbytes_of(self, index: int, chunk_size: int, checksum: bool) -> int:
        file = io.BytesIO()
        obj = self._objects[index]
        return aiotorchio.save(obj, file, chunk_size=chunk_size, checksum=checksum).nbytes


def _schedule(draw: random.Random, kind: Kind, sizes: Sequence[int]) -> Schedule:
    count = 0 if kind in HARMLESS else 1 if kind in ENDINGS else draw.choice([1, 1, 1, 3])
    faults: list[Fault] = []
    for offset in sorted(_offset(draw, sizes) for _ in range(count)):
        begin = max(offset, faults[-1].offset + faults[-1].length if faults else 0)
        # Within the messages, so that the whole fault takes effect.
        length = min(_length(draw, kind), sum(sizes) - begin)
        if kind in ENDINGS or length:
            # Harmless kinds have a count of 0 above, which mypy cannot see.
            faults.append(Fault(kind, begin, length, draw.getrandbits(32)))  # type: ignore[arg-type]
    return Schedule(
        tuple(faults),
        sum(sizes),
        fragments=kind == "fragment" or (kind != "calm" and draw.random() < 0.3),
        pauses=0.2 if kind == "delay" or (kind != "calm" and draw.random() < 0.2) else 0,
        narrow=draw.random() < 0.5,
        tells_sender=draw.random() < 0.5,
        seed=draw.getrandbits(32),
    )


def _offset(draw: random.Random, sizes: Sequence[int]) -> int:
    """A random offset, often in the header or the end of a message."""
    n = draw.randrange(len(sizes))
    begin, end = sum(sizes[:n]), sum(sizes[: n + 1])
    match draw.randrange(4):
        case 0:
            return draw.randrange(begin, min(begin + 500, end))
        case 1:
            return draw.randrange(max(end - 100, begin), end)
    return draw.randrange(sum(sizes))


def _length(draw: random.Random, kind: Kind) -> int:
    if kind in ENDINGS:
        return 0
    if kind == "corrupt":
        return draw.choice([1, 1, 2, 8])
    return int(8192 ** draw.random()) + 1
