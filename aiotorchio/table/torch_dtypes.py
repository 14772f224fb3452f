"""Names of the format <-> torch dtypes, derived from the one table in ``wire/dtypes.py``."""

from __future__ import annotations

import torch

from aiotorchio.errors import ProtocolError
from aiotorchio.wire.dtypes import DTYPES

__all__ = ["DTYPE_NAMES", "TORCH_DTYPES", "torch_dtype"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in DTYPES if hasattr(torch, name)
}
"""Dtypes of the format that the installed torch has."""

DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def torch_dtype(name: object) -> torch.dtype:
    """The dtype with this name.

    Raises:
        ProtocolError: No name of the format, or none that the installed torch has.
    """
    if not isinstance(name, str):
        raise ProtocolError(f"{type(name).__name__} instead of the name of a dtype")
    dtype = TORCH_DTYPES.get(name)
    if dtype is None:
        raise ProtocolError(f"dtype {name!r} is unknown to torch {torch.__version__}")
    return dtype
