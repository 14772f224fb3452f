"""The names of a message's tensors that are made of several rows, before its payload."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Generator
from typing import Any

from aiotorchio.engine.load_options import IterateOptions
from aiotorchio.engine.requests import Request
from aiotorchio.errors import AiotorchioError
from aiotorchio.graph.composites import Composites
from aiotorchio.graph.rebuild import Rebuilder
from aiotorchio.limits import Limits
from aiotorchio.wire.header import Header
from aiotorchio.wire.parser import SkeletonReceived, Work

__all__ = ["find_composites"]


def find_composites(
    header: Header,
    received: SkeletonReceived,
    options: IterateOptions,
    limits: Limits,
    *,
    encoding: str,
) -> Generator[Request, Any, Composites]:
    """Find them in the skeleton of a pickle, in a worker thread.

    A skeleton that cannot be looked at in this way is no error, since it may be loaded in another:
    then none of them is known by name, and ``Composites.refused`` says why.
    """
    rebuilder = Rebuilder(
        received.skeleton,
        header.codec,
        allow_pickle=True,
        weights_only=True,
        pickle_module=pickle,
        encoding=encoding,
        safe_globals=options.allowed_globals,
        map_location=options.map_location,
        limits=limits,
        offset=received.offset,
    )
    try:
        composites: Composites = yield Work(functools.partial(rebuilder.composites, header))
    except AiotorchioError as error:
        return Composites.none(error.message)
    return composites
