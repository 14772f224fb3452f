"""The tree codec: ordinary objects <-> MessagePack, without pickle (SPEC.md section 6.1).

Every container is an array that starts with its tag, so types survive, and keys keep their order
and can be checked for repeats. ``graph`` calls these functions; ``encoder`` and ``decoder`` have
their contracts.
"""

from __future__ import annotations

from aiotorchio.codecs.tree.decoder import decode, decoder
from aiotorchio.codecs.tree.encoder import NotATreeError, encode

__all__ = ["NotATreeError", "decode", "decoder", "encode"]
