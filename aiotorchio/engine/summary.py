"""``Summary``: the result of every save."""

from __future__ import annotations

from dataclasses import dataclass

from aiotorchio.graph.flatten import Flattened
from aiotorchio.wire.composer import Composer
from aiotorchio.wire.layout import Layout

__all__ = ["Summary", "summary"]


@dataclass(frozen=True, slots=True)
class Summary:
    """The numbers of a message that was sent.

    Attributes:
        nbytes: Bytes on the wire.
        payload_nbytes: Bytes of the payload: of the storages, with their alignment.
        tensors: Distinct tensors.
        storages: Distinct storages.
        chunks: Chunks of the payload.
        codec: ``"tree"`` or ``"pickle"``: how the skeleton was written.
        message_id: 32 hexadecimal digits, which no other message has.
        left_out_nbytes: Bytes of the storages that were not sent, since no tensor shows them
            (``compact=True``).
    """

    nbytes: int
    payload_nbytes: int
    tensors: int
    storages: int
    chunks: int
    codec: str
    message_id: str
    left_out_nbytes: int = 0


def summary(flattened: Flattened, layout: Layout, composer: Composer, nbytes: int) -> Summary:
    """Return the summary of a message with ``nbytes`` bytes on the wire."""
    header = flattened.header
    return Summary(
        nbytes=nbytes,
        payload_nbytes=layout.total,
        tensors=len(header.tensors),
        storages=len(header.storages),
        chunks=layout.chunks,
        codec=header.codec,
        message_id=composer.message_id.hex(),
        left_out_nbytes=flattened.left_out,
    )
