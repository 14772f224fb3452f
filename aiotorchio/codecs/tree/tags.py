"""Constants of the tree codec that its encoder and its decoder share (SPEC.md section 6.1)."""

from __future__ import annotations

from typing import Final

__all__ = ["INTEGER_MAX", "INTEGER_MIN", "PLAIN_TYPES", "SIZE_MAX", "Tag"]

PLAIN_TYPES = frozenset({type(None), bool, int, float, str, bytes})
"""Types of the values that are written without a tag."""
INTEGER_MIN, INTEGER_MAX = -(2**63), 2**64 - 1
"""The integers that are written without a tag; larger ones get ``Tag.INTEGER``."""
SIZE_MAX = 4096
"""Dimensions that a ``torch.Size`` may have: as many as the shape of a tensor."""


class Tag:
    """The first item of an array: which type of object the array describes."""

    LIST: Final = 0
    TUPLE: Final = 1
    DICT: Final = 2
    ORDERED_DICT: Final = 3
    SET: Final = 4
    TENSOR: Final = 5
    COMPLEX: Final = 6
    INTEGER: Final = 7
    SIZE: Final = 8
    DTYPE: Final = 9
    DEVICE: Final = 10
