"""Cuts a pickle into opcodes, only those that torch's weights-only unpickler knows.

In: a pickle as a peer sent it. Out: its opcodes with their arguments, for ``scan``, or the paths of
its globals. An error means that the pickle is cut short, or that torch would not load it.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator

from aiotorchio.codecs.pickled.refusals import opcode_refused, protocol_refused
from aiotorchio.common.interrupt import interruptible
from aiotorchio.common.torch_private import BLOCKED_MODULES, python_name
from aiotorchio.errors import LimitExceeded, ProtocolError, UnsafeObjectError
from aiotorchio.wire import bounds

__all__ = ["globals_of", "is_blocked", "opcodes", "path_of"]

# Layout of an argument, and the opcodes that have it. A layout is a number of bytes, "2 lines", or
# "count1" or "count4": a count of 1 or 4 bytes, and as many bytes as it says.
_LAYOUTS: tuple[tuple[int | str, bytes], ...] = (
    # STOP, NEWOBJ, REDUCE, BUILD, APPEND, APPENDS, SETITEM, SETITEMS, MARK, TUPLE, TUPLE1,
    # TUPLE2, TUPLE3, NONE, NEWTRUE, NEWFALSE, EMPTY_TUPLE, EMPTY_LIST, EMPTY_DICT, EMPTY_SET,
    # BINPERSID
    (0, b".\x81Rbaesu(t\x85\x86\x87N\x88\x89)]}\x8fQ"),
    (1, b"\x80Khq"),  # PROTO, BININT1, BINGET, BINPUT
    (2, b"M"),  # BININT2
    (4, b"Jjr"),  # BININT, LONG_BINGET, LONG_BINPUT
    (8, b"G"),  # BINFLOAT
    ("2 lines", b"c"),  # GLOBAL
    ("count1", b"\x8aU"),  # LONG1, SHORT_BINSTRING
    ("count4", b"X"),  # BINUNICODE
)
_LAYOUT_OF: dict[int, int | str] = {code: layout for layout, codes in _LAYOUTS for code in codes}
_STOP, _GLOBAL, _PROTO = b"."[0], b"c"[0], b"\x80"[0]


def opcodes(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Cut a pickle into its opcodes.

    Args:
        data: The pickle.

    Yields:
        Of each opcode, its position, its code, and the bytes of its argument.

    Raises:
        UnsafeObjectError: The pickle has a protocol other than 2, an opcode that torch does not
            know, or a global whose name is too long.
        ProtocolError: The pickle is cut short, or has bytes left over.
    """
    position = 0
    while True:
        if position >= len(data):
            raise ProtocolError("the pickle ends before its last opcode", offset=position)
        code = data[position]
        layout = _LAYOUT_OF.get(code)
        if layout is None:
            raise opcode_refused(code, _name(code), position)
        try:
            start, end = _argument(data, layout, position + 1)
        except ProtocolError as error:
            error.offset = position
            raise
        if code == _PROTO and data[start] != 2:
            raise protocol_refused(data[start], position)
        yield position, code, data[start:end]
        position = end
        if code == _STOP:
            break
    if position != len(data):
        raise ProtocolError(
            f"the pickle has {len(data) - position} bytes left over after its last opcode",
            offset=position,
        )


def _argument(data: bytes, layout: int | str, start: int) -> tuple[int, int]:
    """Return the positions at which an argument begins and ends."""
    if isinstance(layout, int):
        end = start + layout
    elif layout == "2 lines":
        first = data.find(b"\n", start)
        end = data.find(b"\n", first + 1) + 1 if first >= 0 else 0
        if not end:
            raise ProtocolError("the pickle ends inside the name of a global")
        most = bounds.BOUNDS.global_nbytes
        if end - start > most:
            raise UnsafeObjectError(
                f"the pickle has a global whose name has {end - start} bytes; at most {most} are "
                "allowed"
            )
    else:
        width = 1 if layout == "count1" else 4
        size = data[start : start + width]
        start += width
        end = start + int.from_bytes(size, "little")
    if end > len(data):
        raise ProtocolError("the pickle ends inside an argument")
    return start, end


def path_of(argument: bytes) -> str:
    """Return the path of the argument of GLOBAL, with Python 2 names mapped as torch does.

    Raises:
        ProtocolError: The argument is not UTF-8.
    """
    try:
        module, name = argument.decode().split("\n")[:2]
    except UnicodeDecodeError:
        raise ProtocolError("the pickle has a global whose name is not UTF-8") from None
    return python_name(module, name)


def globals_of(data: bytes) -> set[str]:
    """Return the paths of all globals in a pickle; nothing is built, and nothing else checked.

    Raises:
        UnsafeObjectError: ``opcodes`` refuses the pickle.
        ProtocolError: ``opcodes`` refuses the pickle, or the name of a global is not UTF-8.
        LimitExceeded: The pickle has more globals than any honest object needs.
    """
    found: set[str] = set()
    for position, code, argument in interruptible(opcodes(data)):
        if code == _GLOBAL:
            found.add(path_of(argument))
            if len(found) > bounds.BOUNDS.globals:
                raise LimitExceeded(
                    f"the pickle has more than {bounds.BOUNDS.globals} globals", offset=position
                )
    return found


def is_blocked(path: str) -> bool:
    """Whether torch refuses a global even if it is in safe_globals."""
    return path.partition(".")[0] in BLOCKED_MODULES


def _name(code: int) -> str:
    """Return the name of an opcode for an error."""
    return next((op.name for op in pickletools.opcodes if op.code == chr(code)), f"{code:#04x}")
