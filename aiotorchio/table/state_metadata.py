"""The versions that ``nn.Module.state_dict()`` hangs on its result, as an attribute.

``load_state_dict(state, assign=True)`` leaves a mark in them, which makes every later load of the
same dict assign, too: models would share memory without anybody having asked for it. So the mark
does not travel, and none that was received counts.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

__all__ = ["drop_mark", "without_mark"]

_MARK = "assign_to_params_buffers"


def without_mark(metadata: Any) -> Any:
    """The same versions, in a copy if they have the mark."""
    if not _has_mark(metadata):
        return metadata
    return OrderedDict(
        (path, {k: v for k, v in each.items() if k != _MARK} if isinstance(each, dict) else each)
        for path, each in metadata.items()
    )


def drop_mark(metadata: Any) -> None:
    """Take the mark out of versions that were just received."""
    if _has_mark(metadata):
        for each in metadata.values():
            if isinstance(each, dict):
                each.pop(_MARK, None)


def _has_mark(metadata: Any) -> bool:
    return isinstance(metadata, dict) and any(
        isinstance(each, dict) and _MARK in each for each in metadata.values()
    )
