"""An object with the options of one save, from the call until its bytes can be composed.

In: any object but the iterable of ``specs`` (see ``send_streamed``). Out: a ``ReadyMessage``, from
which ``send`` composes frames.

A save is prepared in two steps. ``PreparedSave`` is made in the caller's thread, when the caller
makes the call: it takes the snapshot, and notes the work that the caller has queued on devices.
``PreparedSave.ready`` takes the object apart, which may take long, when the save runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from types import AsyncGeneratorType, GeneratorType

import torch

from aiotorchio.common.torch_private import real_tensors
from aiotorchio.engine.save_options import SaveOptions
from aiotorchio.engine.snapshot import Snapshot
from aiotorchio.graph.flatten import Flattened, flatten, is_small
from aiotorchio.memory.device_copy import Copier, DeviceCopier, Here
from aiotorchio.memory.outgoing import OutgoingPayload
from aiotorchio.memory.snapshot import SnapshotPayload
from aiotorchio.table.versions import Versions
from aiotorchio.wire.layout import Layout

__all__ = ["PRODUCER", "PreparedSave", "ReadyMessage"]

PRODUCER = f"aiotorchio/{version('aiotorchio')} torch/{torch.__version__}"


@dataclass(frozen=True, slots=True)
class ReadyMessage:
    """A message of which every byte is determined; its chunks can be taken once.

    Attributes:
        flattened: The header, the skeleton and the storages.
        layout: The layout of the payload.
        payload: The source of the chunks.
        watched: Whether version counters are compared before the end frame, because the bytes come
            from the storages themselves, and not from a copy.
    """

    flattened: Flattened
    layout: Layout
    payload: OutgoingPayload | SnapshotPayload
    watched: bool

    @classmethod
    def of(cls, flattened: Flattened, copier: Copier) -> ReadyMessage:
        """Return a message that takes its chunks from the storages themselves."""
        layout = Layout(flattened.header)
        return cls(flattened, layout, _payload(flattened, layout, copier), watched=True)

    @classmethod
    def of_copies(cls, flattened: Flattened, copier: Callable[[], Copier]) -> ReadyMessage:
        """Copy all storages now, and return a message that takes its chunks from the copies.

        Args:
            flattened: The parts of an object.
            copier: Makes the copier of the copies, after all of them were queued on their devices.

        Raises:
            RuntimeError: A tensor was changed by another thread.
        """
        layout = Layout(flattened.header)
        payload = _payload(flattened, layout, Here())
        chunks = map(layout.chunk_range, range(layout.chunks))
        copies = SnapshotPayload(payload, chunks, layout.chunk_size, copier)
        flattened.versions.check(
            "while the snapshot was taken: no other thread may change it during the call"
        )
        # Only the copies are needed from here on; the memory of the originals is the caller's.
        parts = dataclasses.replace(flattened, storages=[], parts={}, versions=Versions())
        return cls(parts, layout, copies, watched=False)


def _payload(flattened: Flattened, layout: Layout, copier: Copier) -> OutgoingPayload:
    return OutgoingPayload(
        flattened.storages,
        layout.offsets,
        layout.nbytes,
        layout.chunk_size,
        parts=flattened.parts,
        copier=copier,
    )


class PreparedSave:
    """An object and the options of its save; make it when the caller makes the call.

    Args:
        obj: Any object, or a ``Snapshot``.
        options: The options.

    Attributes:
        options: The options.
        is_small: Whether ``ready`` takes no longer than a worker thread takes to start.

    Raises:
        TypeError: The object is a generator, which only ``specs`` can send.
        ValueError: Options that a ``Snapshot`` excludes, or a snapshot of an object that needs
            pickle with ``allow_pickle=False``.
        RuntimeError: The object was changed while it was copied.
    """

    def __init__(self, obj: object, options: SaveOptions) -> None:
        self.options = options
        self.is_small = True
        self._obj: object = obj
        self._copies: ReadyMessage | None = None
        self._copier: DeviceCopier | None = None
        if isinstance(obj, Snapshot):
            _check_snapshot(obj, options)
            self.is_small = obj.is_small
        elif isinstance(obj, GeneratorType | AsyncGeneratorType):
            raise TypeError("a generator of tensors needs specs, with their names and shapes")
        elif options.snapshot:
            with real_tensors():
                self._copies = ReadyMessage.of_copies(self._flatten(), _copier_until_now)
            self._obj = None
        else:
            # Views of one storage are compared pair by pair.
            self.is_small = is_small(obj) and not options.compact
            self._copier = _copier_until_now()

    def begin(self) -> None:
        """Note the work that was queued on devices since the call: it has changed the tensors.

        Call it in the thread of the driver, before ``ready``.
        """
        if self._copier is not None:
            self._copier.note()

    def ready(self) -> ReadyMessage:
        """Take the object apart, if that was not done yet. May run in a worker thread.

        Raises:
            ValueError: The object needs pickle, and ``allow_pickle`` is False.
            Exception: An error of ``pickle_module``.
        """
        if self._copies is not None:
            return self._copies
        if isinstance(self._obj, Snapshot):
            flattened = self._obj.for_message(
                chunk_size=self.options.chunk_size,
                metadata=self.options.header_metadata,
                producer=PRODUCER,
            )
            return ReadyMessage.of(flattened, self._obj.copier)
        assert self._copier is not None
        return ReadyMessage.of(self._flatten(), self._copier)

    def _flatten(self) -> Flattened:
        options = self.options
        return flatten(
            self._obj,
            chunk_size=options.chunk_size,
            metadata=options.header_metadata,
            producer=PRODUCER,
            pickle_module=options.pickle_module,
            pickle_protocol=options.pickle_protocol,
            allow_pickle=options.allow_pickle,
            compact=options.compact,
            skip=options.skip,
        )


def _check_snapshot(snapshot: Snapshot, options: SaveOptions) -> None:
    if options.snapshot or options.compact:
        raise ValueError("snapshot and compact cannot be combined with a Snapshot")
    if snapshot.codec == "pickle" and not options.allow_pickle:
        raise ValueError("allow_pickle is False, and the Snapshot needs pickle")


def _copier_until_now() -> DeviceCopier:
    return DeviceCopier(until_now=True)
