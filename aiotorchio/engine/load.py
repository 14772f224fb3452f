"""One load of a whole message, from the header to the object.

In: an ``IncomingMessage`` whose header has arrived, and the options of the call. The load is a
generator that yields requests to its driver. Out: a ``Loaded``, whose commit the public function
applies. A ``MismatchError`` that leaves the message ``untouched`` did no harm. After another error
the stream is usable only if the last byte of the message was read, and targets that are not staged
may have changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch

from aiotorchio.engine.claims import HeldClaims
from aiotorchio.engine.composite_names import find_composites
from aiotorchio.engine.finish import Finish, prepare
from aiotorchio.engine.load_options import LoadOptions
from aiotorchio.engine.matching import LoadContext, Match, match_names
from aiotorchio.engine.module_commit import WithModules
from aiotorchio.engine.placement import Placement, place
from aiotorchio.engine.receive import IncomingMessage
from aiotorchio.engine.requests import Request, in_turns, work
from aiotorchio.engine.threads import Task
from aiotorchio.engine.thresholds import INLINE_HEADER, INLINE_NBYTES, INLINE_ROWS, INLINE_SKELETON
from aiotorchio.errors import MismatchError, UnsafeObjectError
from aiotorchio.graph.composites import Composites
from aiotorchio.graph.rebuild import Rebuilder, build_tensors
from aiotorchio.limits import Limits
from aiotorchio.memory.atomic import BufferSwap, Exchange
from aiotorchio.memory.incoming import IncomingPayload
from aiotorchio.wire.header import META_LOCATION
from aiotorchio.wire.parser import Work

__all__ = ["Loaded", "load_message", "receive_message"]


@dataclass(slots=True)
class Loaded:
    """An object that has arrived whole.

    Attributes:
        obj: The object.
        commit: The change of its targets that remains; None if they have changed already.
        close: Releases the targets for other loads, after the commit or without it.
    """

    obj: Any
    commit: Exchange | BufferSwap | WithModules | None
    close: Callable[[], None]


def receive_message(limits: Limits, options: LoadOptions) -> Generator[Request, Any, Loaded]:
    """Receive a message from its first byte to its last, and rebuild its object."""
    message = IncomingMessage(limits)
    yield from message.open()
    try:
        return (yield from load_message(message, options))
    except Exception:
        yield from message.release()
        raise


def load_message(message: IncomingMessage, options: LoadOptions) -> Generator[Request, Any, Loaded]:
    """Receive the rest of a message whose header has arrived, and rebuild its object."""
    with message.located():
        load = _Load(message, options)
        try:
            return (yield from load.run())
        except BaseException as error:
            # After a cancellation or an interrupt, too, other loads may have the targets; but only
            # after an Exception can a driver still answer a request.
            load.claims.release()
            if isinstance(error, Exception):
                yield from message.free(*load.tables, *load.commit_tables)
            raise


class _Load:
    """One load.

    Attributes:
        claims: Keep other loads away from the targets.
    """

    def __init__(self, message: IncomingMessage, options: LoadOptions) -> None:
        self._message, self._options = message, options
        self._context = LoadContext.of(message.header, message.layout, options, options.targets)
        self._inline = message.decides_inline(self._context)
        self.claims = HeldClaims()
        self._long: list[Match | Placement | IncomingPayload] = []
        self._change: Exchange | BufferSwap | None = None

    @property
    def tables(self) -> list[list[Any] | dict[Any, Any]]:
        """Tables as long as those of the header, which are of no use after the load."""
        return [table for each in self._long for table in each.tables]

    @property
    def commit_tables(self) -> list[list[Any]]:
        """Tables of the commit, which are of no use if it is not made."""
        return [] if self._change is None else self._change.tables

    def run(self) -> Generator[Request, Any, Loaded]:
        """Receive everything, and rebuild the object."""
        message, options = self._message, self._options
        composites: Composites | None = None
        # A pickle that weights_only refuses is refused by the load itself, in its own words.
        if options.select is not None and options.allow_pickle and options.restricted:
            composites = yield from find_composites(message, options, encoding=options.encoding)
        decide = functools.partial(self._decide, composites)
        inline = self._inline and composites is None
        match, placement = yield from work(decide, inline=inline)
        rebuilder = yield from self._receive_skeleton(match)
        ready = functools.partial(self._prepare, match, placement)
        payload, finish = yield from work(ready, inline=self._inline)
        inline = self._inline and self._is_small(rebuilder)
        storages = yield from self._receive(payload, finish, inline=inline)
        return (yield from self._build(rebuilder, storages, finish, inline=inline))

    def _decide(self, composites: Composites | None) -> tuple[Match, Placement]:
        context, options = self._context, self._options
        if not options.restricted and context.header.codec == "pickle":
            composites = Composites.none("with weights_only=False, the pickle is not searched")
        match = match_names(context, composites)
        self._long.append(match)
        placement = place(context, match)
        self._long.append(placement)
        if context.targets is not None:
            self.claims.claim(
                context.targets.back, match.targets, match.memory_states, match.extents
            )
        return match, placement

    def _prepare(self, match: Match, placement: Placement) -> tuple[IncomingPayload, Finish]:
        payload, finish = prepare(self._context, match, placement)
        self._long.append(payload)
        self._change = finish.change
        return payload, finish

    def _receive_skeleton(self, match: Match) -> Generator[Request, Any, Rebuilder]:
        """Receive the skeleton, and check it before the first byte of the payload."""
        message, options, fit = self._message, self._options, match.fit
        received = yield from message.skeleton()
        try:
            rebuilder = Rebuilder(
                received.skeleton,
                message.header.codec,
                allow_pickle=options.allow_pickle,
                weights_only=options.restricted,
                pickle_module=options.pickle_module,
                encoding=options.encoding,
                safe_globals=options.allowed_globals,
                map_location=options.map_location,
                limits=message.limits,
                offset=received.offset,
            )

            def check() -> None:
                inspect = None if fit is None else fit.refuse_extra_state
                rebuilder.check(message.header.tensors, names=match.uses_names, inspect=inspect)
                if fit is not None:
                    fit.note_skeleton(received.skeleton, rebuilder.may_have_composites)

            yield from work(check, inline=self._is_small(rebuilder))
            if fit is not None and options.data_free is None and fit.compares_object:

                def check_on_meta() -> None:
                    for obj in rebuilder.build_on_meta(message.header):
                        fit.check_on_meta(obj)

                # The first tensor on meta imports what takes half a second.
                yield Work(check_on_meta)
        except (MismatchError, UnsafeObjectError):
            message.keep(received)
            raise
        return rebuilder

    def _receive(
        self, payload: IncomingPayload, finish: Finish, *, inline: bool
    ) -> Generator[Request, Any, list[torch.UntypedStorage | None]]:
        """Receive the payload and the end; returns the storages in their final places."""
        message, options = self._message, self._options
        yield from work(finish.note_change, inline=self._inline)
        move: Task | None = None
        for _ in range(message.layout.chunks):
            move = yield from message.receive_chunk(payload, options.progress, background=move)
        yield from message.end()
        if move is not None:
            yield Work(move)

        def complete() -> list[torch.UntypedStorage | None]:
            payload.check()
            # Again: code that read the targets meanwhile has old and new numbers.
            finish.note_change()
            storages = payload.storages()
            finish.put_in_order(storages)
            finish.copy_deferred(storages)
            return storages

        inline = inline and finish.nbytes <= INLINE_NBYTES
        storages: list[torch.UntypedStorage | None] = yield from work(complete, inline=inline)
        if finish.relocates:
            # Not in a worker thread: a callable map_location is the caller's code.
            items = enumerate(storages)
            storages = yield from in_turns(lambda item: finish.relocated(*item), items)
        return storages

    def _build(
        self,
        rebuilder: Rebuilder,
        storages: list[torch.UntypedStorage | None],
        finish: Finish,
        *,
        inline: bool,
    ) -> Generator[Request, Any, Loaded]:
        message, prebuilt = self._message, finish.placement.prebuilt

        def build() -> Any:
            # Tensors made in inference mode could not be trained on, wherever they go.
            with torch.inference_mode(False), finish.building():
                tensors = build_tensors(message.header, storages, prebuilt)
                obj = rebuilder.build(tensors, storages, finish.unreliable(storages))
            return finish.revised(obj)

        obj = yield from work(build, inline=inline)
        commit = yield from work(functools.partial(finish.commit, obj), inline=inline)
        yield from message.release(storages, *self.tables)
        return Loaded(obj, commit, self.claims.release)

    def _is_small(self, rebuilder: Rebuilder) -> bool:
        message = self._message
        header = message.header
        return (
            header.codec == "tree"
            # The first tensor there imports what takes half a second.
            and META_LOCATION not in header.locations
            and message.opened.nbytes <= INLINE_HEADER
            and max(len(header.tensors), len(header.storages)) <= INLINE_ROWS
            and rebuilder.nbytes <= INLINE_SKELETON
        )
