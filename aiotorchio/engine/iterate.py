"""Receiving the tensors of a message one after the other, in the order of the wire."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.engine.composite_names import find_composites
from aiotorchio.engine.finish import Finish, prepare
from aiotorchio.engine.load_options import IterateOptions
from aiotorchio.engine.matching import LoadContext, Match, match_names
from aiotorchio.engine.placement import Placement, place
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


class _Waiting(NamedTuple):
    """A storage that was not received yet, and the tensors that are made of it.

    Attributes:
        end: The first byte of the payload after it. A storage without bytes has the end of the
            storage before it.
        storage: Its number; -1 stands for composite tensors that need no storage.
        rows: The selected rows that show it.
    """

    end: int
    storage: int
    rows: list[int]


@dataclass(frozen=True, slots=True)
class _Begun:
    """A message whose skeleton has arrived, and whose payload has a place.

    Attributes:
        payload: Takes the chunks.
        finish: The steps after each storage.
        waiting: The storages that are needed, in the order of the wire.
    """

    payload: IncomingPayload
    finish: Finish
    waiting: deque[_Waiting]


class TensorStream:
    """The tensors of a message, each as soon as the chunk with its last byte was verified.

    It keeps no tensor that it has returned.

    Args:
        message: A message whose payload was not received yet.
        options: The selection, and the devices.
    """

    def __init__(self, message: IncomingMessage, options: IterateOptions) -> None:
        self._message = message
        self._options = options
        self._context = LoadContext.of(message.header, message.layout, options, named_only=True)
        self._inline = message.decides_inline(self._context)
        self._begun: _Begun | None = None

    def more(self) -> Generator[Request, Any, NamedTensors]:
        """Receive until there is a tensor.

        Yields:
            Requests to the driver.

        Returns:
            The tensors that are whole now, under each of their names; none after the last.

        Raises:
            MismatchError: Two tensors of one name; tensors without names, if all are selected; a
                selection that the message does not have. The message is untouched.
        """
        message = self._message
        with message.located():
            if message.skipped:
                raise RuntimeError(
                    "the rest of this message was skipped, so it has no more tensors"
                )
            begun = self._begun
            if begun is None:
                begun = self._begun = yield from self._begin()
            while True:
                while message.chunks_left and not self._ready(begun.waiting):
                    move = yield from message.receive_chunk(begun.payload, self._options.progress)
                    if move is not None:
                        yield Work(move)
                if not self._ready(begun.waiting):
                    break
                tensors = yield from self._take(begun)
                if tensors:
                    return tensors
                # Only parts of composite tensors have arrived, and all of none.
            if not message.ended:
                yield from message.end()
                finish = begun.finish
                tables = [*finish.match.tables, *finish.placement.tables]
                yield from message.release(*tables, *begun.payload.tables)
            return []

    def _begin(self) -> Generator[Request, Any, _Begun]:
        message = self._message
        composites = yield from find_composites(message, self._options)
        decide = functools.partial(self._decide, composites)
        inline = self._inline and composites is None
        match, placement, waiting = yield from work(decide, inline=inline)
        received = yield from message.skeleton()
        if message.header.codec == "tree":
            # The names in a pickle cannot be checked; ``find_composites`` has read the rest of it.
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
        ready = functools.partial(prepare, self._context, match, placement)
        payload, finish = yield from work(ready, inline=self._inline)
        return _Begun(payload, finish, waiting)

    def _decide(self, composites: Composites | None) -> tuple[Match, Placement, deque[_Waiting]]:
        match = match_names(self._context, composites)
        placement = place(self._context, match)
        return match, placement, self._waiting(match)

    def _waiting(self, match: Match) -> deque[_Waiting]:
        """Sort the needed storages by the byte that completes them."""
        header, layout = self._context.header, self._context.layout
        selection, composites = match.selection, match.composites
        unnamed = 0
        if selection.all:
            unnamed = count_unnamed(header, composites.rows, composites.storages)
        if unnamed:
            reason = f" ({composites.unknown_reason})" if composites.unknown_reason else ""
            raise MismatchError(
                f"{unnamed} tensors or parts of tensors in this message have no name{reason}: load "
                "the whole object with load, or select the names that you want",
                entry="header",
            )
        rows_of: dict[int, list[int]] = {}
        for index, row in interruptible(enumerate(header.tensors)):
            if any(name in selection for name in row.names):
                rows_of.setdefault(row.storage, []).append(index)
        waiting: deque[_Waiting] = deque()
        end = 0
        if composites.without_storages:
            # These need no byte of the payload.
            waiting.append(_Waiting(end, -1, []))
        for storage in interruptible(range(len(header.storages))):
            if storage not in rows_of and storage not in composites.storages:
                continue
            if layout.nbytes[storage]:
                end = layout.offsets[storage] + layout.nbytes[storage]
            waiting.append(_Waiting(end, storage, rows_of.get(storage, [])))
        return waiting

    def _ready(self, waiting: deque[_Waiting]) -> bool:
        message = self._message
        received = (message.layout.chunks - message.chunks_left) * message.layout.chunk_size
        return bool(waiting) and waiting[0].end <= received

    def _take(self, begun: _Begun) -> Generator[Request, Any, NamedTensors]:
        payload, finish, header = begun.payload, begun.finish, self._message.header
        selection, composites = finish.match.selection, finish.match.composites

        def take_ready() -> tuple[list[tuple[int, list[int]]], list[torch.UntypedStorage | None]]:
            ready, found = [], []
            while self._ready(begun.waiting):
                check_interrupt()
                _, index, rows = begun.waiting.popleft()
                storage = None
                if index >= 0:
                    storage = payload.storage(index)
                    payload.release(index)
                    finish.put_one_in_order(index, storage)
                ready.append((index, rows))
                found.append(storage)
            return ready, found

        def tensor_of(row: int, storage: torch.UntypedStorage) -> torch.Tensor:
            return build_tensor(header.tensors[row], row, storage)

        def build() -> NamedTensors:
            tensors: NamedTensors = []
            if composites.storages:
                composites.distrust(finish.unreliable(found))
            with torch.inference_mode(False), finish.building():
                for (index, rows), storage in interruptible(zip(ready, found, strict=True), 100):
                    for row in rows:
                        tensor = tensor_of(row, storage)
                        names = dict.fromkeys(header.tensors[row].names)
                        tensors += [(name, tensor) for name in names if name in selection]
                    if composites.names:
                        composites.hold(index, storage)
                        tensors += composites.ready_tensors(index, tensor_of)
            return tensors

        # Converting the byte order takes long, and thousands of storages without bytes can be
        # ready at once.
        small = self._inline and not composites.names
        inline = small and finish.nbytes <= INLINE_NBYTES
        ready, found = yield from work(take_ready, inline=inline)
        if finish.relocates:
            # Not in a worker thread: a callable map_location is the caller's code.
            numbers = (index for index, _ in ready)
            items = zip(numbers, found, strict=True)
            found = yield from in_turns(lambda item: finish.relocated(*item), items)
        tensors: NamedTensors = yield from work(build, inline=small)
        return tensors
