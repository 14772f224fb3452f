"""What stands first in every array of the tree codec (SPEC.md section 6.1)."""

from __future__ import annotations

from typing import Final

__all__ = ["Tag"]


class Tag:
    """Says what an array is."""

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
