"""``iter_bytes``: the bytes of a message, for the body of an HTTP request or response.

The call takes an object and the options of a save, and raises the errors that ``save_to_stream``
raises before it sends. The async generator yields the bytes; it raises later errors, after an abort
frame for the receiver.
"""

from __future__ import annotations

import pickle
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import torch

from aiotorchio.engine.drivers import drive_to_pieces
from aiotorchio.engine.requests import Progress
from aiotorchio.engine.save_options import DEFAULT_CHUNK_SIZE, SaveOptions
from aiotorchio.engine.send import outgoing_message
from aiotorchio.table.names import TensorSpec

__all__ = ["iter_bytes"]


def iter_bytes(  # noqa: D417 - save_to_stream documents the options
    obj: object,
    *,
    checksum: bool = True,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    metadata: Mapping[str, str] | None = None,
    specs: Mapping[str, TensorSpec | torch.Tensor] | None = None,
    snapshot: bool = False,
    compact: bool = False,
    allow_pickle: bool = True,
    progress: Progress | None = None,
    pickle_module: Any = pickle,
    pickle_protocol: int = 2,
) -> AsyncGenerator[bytes | memoryview, None]:
    """Yield the bytes of a message, for the body of an HTTP request or response.

    Args:
        obj: As in ``save_to_stream``, like all options.

    Returns:
        An async generator of pieces of up to 256 KiB. Those of tensors on the CPU are read-only
        views of the tensors themselves, not copies: use them before the tensors change, or pass
        ``snapshot=True``. At least once in 4 MiB, other tasks run and a cancellation is taken, even
        if the consumer never suspends.

    Raises:
        Exception: As ``save_to_stream``.

    Example:
        >>> import asyncio, torch, aiotorchio
        >>> async def main():
        ...     return await aiotorchio.load_from_stream(aiotorchio.iter_bytes([torch.ones(2)]))
        >>> asyncio.run(main())
        [tensor([1., 1.])]
    """
    options = SaveOptions.of_call(locals())
    return drive_to_pieces(outgoing_message(obj, options))
