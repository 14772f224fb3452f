"""The errors with which the scan refuses a pickle, in the words of torch's weights-only unpickler.

Users of torch, and its tests, match parts of its sentences. An error here has the words of torch
for the same refusal, and adds how the receiver can load the object. ``scan`` and ``opcodes`` raise
these errors.
"""

from __future__ import annotations

from aiotorchio.errors import UnsafeObjectError

__all__ = [
    "blocked_global",
    "call_of_no_global",
    "instance_of_no_class",
    "items_of_no_dict",
    "items_of_no_list",
    "opcode_refused",
    "protocol_refused",
    "state_refused",
    "unknown_global",
]

# Globals that torch allows once a module of it is imported: beginning of their paths -> the module,
# and the tensors that need it.
_NEEDS = {
    "torch.nested.": ("torch._dynamo", "nested jagged tensors (NJTs)"),
    "torch._dynamo.": ("torch._dynamo", "nested jagged tensors (NJTs)"),
    "torch.distributed.tensor.": ("torch.distributed.tensor", "DTensors"),
    "torch.distributed.device_mesh.": ("torch.distributed.tensor", "DTensors"),
}


def blocked_global(path: str) -> UnsafeObjectError:
    """Refuse a global that torch allows in no pickle."""
    shown = _shown(path)
    return UnsafeObjectError(
        f"Trying to load unsupported GLOBAL {shown} whose module {shown.partition('.')[0]} is "
        "blocked; it is not an allowed global, even in safe_globals: only weights_only=False loads "
        "it, if you trust the sender"
    )


def unknown_global(path: str) -> UnsafeObjectError:
    """Refuse a global that is not on the allowlist."""
    needed = next((_NEEDS[part] for part in _NEEDS if path.startswith(part)), None)
    hint = f"``{needed[0]}`` must be imported to load {needed[1]}; " if needed else ""
    return UnsafeObjectError(
        f"Unsupported global: GLOBAL {_shown(path)} was not an allowed global by default; {hint}"
        "if you trust it, pass it in safe_globals or to torch.serialization.add_safe_globals; if "
        "you trust the sender, pass weights_only=False"
    )


def instance_of_no_class(path: str | None) -> UnsafeObjectError:
    """Refuse NEWOBJ of a function, a tensor class, or an object that the pickle made."""
    return UnsafeObjectError(
        "Can only create new object for classes allowlisted via `add_safe_globals` or "
        f"safe_globals, but got {_shown(path or 'something')}, which is not a class here"
    )


def call_of_no_global() -> UnsafeObjectError:
    """Refuse REDUCE with an object that is not a global."""
    return UnsafeObjectError(
        "Trying to call reduce for unrecognized function: the pickle calls something that is not a "
        "global"
    )


def state_refused(maker: str | None) -> UnsafeObjectError:
    """Refuse BUILD of an object that may not be given a state."""
    return UnsafeObjectError(
        "Can only build OrderedDict or types allowlisted via `add_safe_globals` or safe_globals, "
        f"but got {maker or 'another object'}, which was given a state with BUILD"
    )


def items_of_no_list(opcode: str, maker: str | None) -> UnsafeObjectError:
    """Refuse APPEND or APPENDS to an object that is not a list."""
    what = "append to" if opcode == "APPEND" else "extend"
    return UnsafeObjectError(
        f"Can only {what} lists, but got {maker or 'something'}, which is not a list: if you trust "
        "the sender, load with weights_only=False"
    )


def items_of_no_dict(opcode: str, maker: str | None) -> UnsafeObjectError:
    """Refuse SETITEM or SETITEMS of an object that is not a dict."""
    return UnsafeObjectError(
        f"Can only {opcode} for dict, collections.OrderedDict, collections.Counter, but got "
        f"{maker or 'something'}, which is not a dict: if you trust the sender, load with "
        "weights_only=False"
    )


def opcode_refused(code: int, name: str, offset: int) -> UnsafeObjectError:
    """Refuse an opcode that torch's unpickler does not know."""
    return UnsafeObjectError(
        f"Unsupported operand {code}: opcode {name} is not allowed with weights_only=True",
        offset=offset,
    )


def protocol_refused(protocol: int, offset: int) -> UnsafeObjectError:
    """Refuse a protocol other than 2; torch warns, and fails at the first new opcode."""
    return UnsafeObjectError(
        f"Detected pickle protocol {protocol}: with weights_only=True only 2 is loaded, which is "
        "the default pickle protocol of torch",
        offset=offset,
    )


def _shown(path: str) -> str:
    """Return a path as torch writes it, without quotes, but with control characters escaped."""
    return repr(path)[1:-1]
