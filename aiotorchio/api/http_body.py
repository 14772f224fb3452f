"""``iter_bytes``: the bytes of a message, for the body of an HTTP request or response.

The call takes an object and the options of a save, and raises the errors that ``save_to_stream``
raises before it sends. The async generator yields the bytes; it raises later errors, after an abort
frame for the receiver.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Unpack

from aiotorchio.api.options import SaveKeywords, check_keywords, outgoing_message
from aiotorchio.engine.drivers import drive_to_pieces

__all__ = ["iter_bytes"]


def iter_bytes(
    obj: object, **options: Unpack[SaveKeywords]
) -> AsyncGenerator[bytes | memoryview, None]:
    """Yield the bytes of a message, for the body of an HTTP request or response.

    Args:
        obj: As in ``save_to_stream``.
        options: The keyword arguments of ``save_to_stream``.

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
    check_keywords("iter_bytes", options, SaveKeywords)
    return drive_to_pieces(outgoing_message(obj, **options))
