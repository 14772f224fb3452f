"""The composite tensors of a message, found in its skeleton before the payload."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Generator
from typing import Any

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
        The composite tensors; None if the message cannot have any. A skeleton that cannot be
        searched is no error, since a load with other options may accept it: then no composite
        tensor has a known name, and ``Composites.unknown_reason`` has the reason.
    """
    if message.header.codec != "pickle":
        return None
    received = yield from message.skeleton()
    message.keep(received)
    skeleton = received.skeleton
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
    small = message.opened.nbytes <= INLINE_HEADER and len(skeleton) <= INLINE_SKELETON
    if not (yield from work(lambda: rebuilder.may_have_composites, inline=small)):
        return None
    try:
        found: Composites = yield Work(functools.partial(rebuilder.composites, message.header))
    except AiotorchioError as error:
        return Composites.none(error.message)
    return found
