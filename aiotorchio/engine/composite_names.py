"""The names of a message's tensors that are made of several rows, before its payload."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Generator
from typing import Any

from aiotorchio.codecs.pickled.codec import STORAGE
from aiotorchio.engine.load_options import IterateOptions
from aiotorchio.engine.receive import IncomingMessage
from aiotorchio.engine.requests import Request, work
from aiotorchio.engine.thresholds import INLINE_HEADER, INLINE_SKELETON
from aiotorchio.errors import AiotorchioError
from aiotorchio.graph.composites import Composites
from aiotorchio.graph.rebuild import Rebuilder
from aiotorchio.wire.parser import Work

__all__ = ["find_composites"]


def find_composites(
    message: IncomingMessage, options: IterateOptions, *, encoding: str = "utf-8"
) -> Generator[Request, Any, Composites | None]:
    """Receive the skeleton of a pickle, and find composite tensors in it, in a worker thread.

    The message keeps the skeleton, so that it can still be loaded.

    Returns:
        None if the message cannot have any. A skeleton that cannot be searched in this way is no
        error, since it may be loaded in another: then no composite tensor is known by name, and
        ``Composites.refused`` has the reason.
    """
    if message.header.codec != "pickle":
        return None
    received = yield from message.skeleton()
    message.keep(received)
    skeleton = received.skeleton

    def may_have_some() -> bool:
        # Their rows have no names, or the skeleton refers to storages.
        return STORAGE.encode() in skeleton or message.unnamed > 0

    small = message.opened.nbytes <= INLINE_HEADER and len(skeleton) <= INLINE_SKELETON
    if not (yield from work(may_have_some, inline=small)):
        return None
    rebuilder = Rebuilder(
        skeleton,
        message.header.codec,
        allow_pickle=True,
        weights_only=True,
        pickle_module=pickle,
        encoding=encoding,
        safe_globals=options.allowed_globals,
        map_location=options.map_location,
        limits=message.limits,
        offset=received.offset,
    )
    try:
        found: Composites = yield Work(functools.partial(rebuilder.composites, message.header))
    except AiotorchioError as error:
        return Composites.none(error.message)
    return found
