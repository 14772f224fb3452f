"""The type of the byte buffers that messages are composed of and streams send."""

from __future__ import annotations

__all__ = ["Buffer"]

Buffer = bytes | bytearray | memoryview
