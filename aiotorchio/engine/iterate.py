"""Receiving the tensors of a message one after the other, as the wire has them."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Generator
from typing import Any

import torch

from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.engine.load_options import IterateOptions
from aiotorchio.engine.receive import IncomingMessage
from aiotorchio.engine.requests import Request, in_turns, work
from aiotorchio.engine.thresholds import INLINE_NBYTES, INLINE_SKELETON
from aiotorchio.errors import MismatchError
from aiotorchio.graph.composites import Composites
from aiotorchio.graph.rebuild import build_tensor, check_tree
from aiotorchio.memory.incoming import IncomingPayload
from aiotorchio.table.names import count_unnamed
from aiotorchio.wire.parser import Work

__all__ = ["NamedTensors", "TensorStream"]

NamedTensors = list[tuple[str, torch.Tensor]]


class TensorStream:
    """The tensors of a message, each when the chunk with its last byte is in and verified.

    Nothing is kept of what was given out.

    Args:
        message: Untouched.
        options: Which tensors, and where to.
    """

    def __init__(self, message: IncomingMessage, options: IterateOptions) -> None:
        self._message = message
        self._options = options
        self._progress = options.progress
        self._place = message.placement(message.header, message.layout, options, named_only=True)
        self._inline = message.decides_inline(self._place)
        self._payload: IncomingPayload
        # Byte of the payload behind each storage, its number, and the rows that show it.
        self._waiting: deque[tuple[int, int, list[int]]] = deque()

    def more(self) -> Generator[Request, Any, NamedTensors]:
        """Receive until there is a tensor.

        Yields:
            What it waits for.

        Returns:
            The tensors that are whole now, under each of their names; none behind the last.

        Raises:
            MismatchError: Names that can't be told apart; tensors that have none, if all are
                wanted; a selection that the message does not have. The message is untouched.
        """
        message = self._message
        with message.located():
            if message.skipped:
                raise RuntimeError("the rest of this message was skipped")
            if message.untouched:
                yield from self._begin()
            while True:
                while message.chunks_left and not self._ready():
                    move = yield from message.chunk(self._payload, self._progress)
                    if move is not None:
                        yield Work(move)
                if not self._ready():
                    break
                tensors = yield from self._take()
                if tensors:
                    return tensors
                # Nothing but parts of tensors whose other parts are not in yet.
            if not message.ended:
                yield from message.end()
                yield from message.release(*self._place.tables, *self._payload.tables)
            return []

    def _begin(self) -> Generator[Request, Any, None]:
        message = self._message
        composites = yield from message.composites(self._options)
        prepare = functools.partial(self._prepare, composites)
        yield from work(prepare, inline=self._inline and composites is None)
        received = yield from message.skeleton()
        if message.header.codec == "tree":
            # Of a pickle, only the tensors of several rows are used: it was looked at for those.
            def check() -> None:
                check_tree(
                    received.skeleton,
                    message.header.tensors,
                    names=True,
                    limits=message.limits,
                    offset=received.offset,
                )

            small = self._inline and len(received.skeleton) <= INLINE_SKELETON
            yield from work(check, inline=small)
        self._payload = yield from work(self._place.payload, inline=self._inline)

    def _prepare(self, composites: Composites | None) -> None:
        self._place.decide(composites)
        composites = self._place.composites
        # An earlier attempt may have been cancelled in the middle.
        self._waiting.clear()
        header, layout, selection = (
            self._message.header,
            self._message.layout,
            self._place.selection,
        )
        unnamed = 0
        if selection.all:
            unnamed = count_unnamed(header, composites.rows, composites.storages)
        if unnamed:
            reason = f" ({composites.refused})" if composites.refused else ""
            raise MismatchError(
                f"{unnamed} tensors of this message have no name{reason}: load the whole object "
                "with load, or select the names that you want",
                entry="header",
            )
        rows_of: dict[int, list[int]] = {}
        for index, row in interruptible(enumerate(header.tensors)):
            if any(name in selection for name in row.names):
                rows_of.setdefault(row.storage, []).append(index)
        # What has no bytes comes right behind what came before it.
        end = 0
        if composites.without_storages:
            self._waiting.append((0, -1, []))
        for storage in interruptible(range(len(header.storages))):
            if storage not in rows_of and storage not in composites.storages:
                continue
            if layout.nbytes[storage]:
                end = layout.offsets[storage] + layout.nbytes[storage]
            self._waiting.append((end, storage, rows_of.get(storage, [])))

    def _ready(self) -> bool:
        message = self._message
        received = (message.layout.chunks - message.chunks_left) * message.layout.chunk_size
        return bool(self._waiting) and self._waiting[0][0] <= received

    def _take(self) -> Generator[Request, Any, NamedTensors]:
        place, payload, header = self._place, self._payload, self._message.header
        selection = place.selection

        def gather() -> tuple[list[tuple[int, list[int]]], list[torch.UntypedStorage | None]]:
            ready, found = [], []
            while self._ready():
                check_interrupt()
                _, index, rows = self._waiting.popleft()
                storage = None
                if index >= 0:
                    storage = payload.storage(index)
                    payload.release(index)
                    place.put_one_in_order(index, storage)
                ready.append((index, rows))
                found.append(storage)
            return ready, found

        composites = place.composites

        def tensor_of(row: int, storage: torch.UntypedStorage) -> torch.Tensor:
            return build_tensor(header.tensors[row], row, storage)

        def build() -> NamedTensors:
            tensors: NamedTensors = []
            if composites.storages:
                composites.distrust(place.unreliable(found))
            with torch.inference_mode(False), place.building():
                for (index, rows), storage in interruptible(zip(ready, found, strict=True), 100):
                    for row in rows:
                        tensor = tensor_of(row, storage)
                        names = dict.fromkeys(header.tensors[row].names)
                        tensors += [(name, tensor) for name in names if name in selection]
                    if composites.names:
                        composites.hold(index, storage)
                        tensors += composites.made(index, tensor_of)
            return tensors

        # Swapping bytes takes long, and thousands of storages without bytes can be ready at once.
        few = self._inline and not composites.names
        inline = few and place.finish_nbytes <= INLINE_NBYTES
        ready, found = yield from work(gather, inline=inline)
        if place.relocates:
            # Not in a worker thread: a callable map_location is the caller's code.
            numbers = (index for index, _ in ready)
            items = zip(numbers, found, strict=True)
            found = yield from in_turns(lambda item: place.relocated(*item), items)
        tensors: NamedTensors = yield from work(build, inline=few)
        return tensors
