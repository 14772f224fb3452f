"""The versions that ``nn.Module.state_dict()`` attaches to its result as ``_metadata``.

``load_state_dict(state, assign=True)`` leaves a mark in them, which makes every later load of the
same dict assign as well: models would share memory without the caller's intent. So senders leave
the mark out, and receivers ignore one in a message.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

__all__ = ["drop_mark", "without_mark"]

_MARK = "assign_to_params_buffers"


def without_mark(metadata: Any) -> Any:
    """Return the same versions, as a copy if they have the mark."""
    if not _has_mark(metadata):
        return metadata
    return OrderedDict(
        (path, {k: v for k, v in each.items() if k != _MARK} if isinstance(each, dict) else each)
        for path, each in metadata.items()
    )


def drop_mark(metadata: Any) -> None:
    """Remove the mark from versions that were just received."""
    if _has_mark(metadata):
        for each in metadata.values():
            if isinstance(each, dict):
                each.pop(_MARK, None)


def _has_mark(metadata: Any) -> bool:
    return isinstance(metadata, dict) and any(
        isinstance(each, dict) and _MARK in each for each in metadata.values()
    )
