"""The dtypes of the format in torch, by the names in ``wire/dtypes.py``, and back.

A ``ProtocolError`` means that a message names a dtype that the format or the installed torch lacks.
"""

from __future__ import annotations

import torch

from aiotorchio.errors import ProtocolError
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import shortened

__all__ = ["DTYPE_NAMES", "TORCH_DTYPES", "torch_dtype"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in DTYPES if hasattr(torch, name)
}
"""The dtypes of the format that the installed torch has, by name."""

DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def torch_dtype(name: object) -> torch.dtype:
    """Return the dtype with this name.

    Raises:
        ProtocolError: The name is not one of the format, or the installed torch lacks the dtype.
    """
    if not isinstance(name, str):
        raise ProtocolError(f"the name of a dtype must be a str, not {type(name).__name__}")
    dtype = TORCH_DTYPES.get(name)
    if dtype is None:
        raise ProtocolError(f"torch {torch.__version__} has no dtype {shortened(name)!r}")
    return dtype
