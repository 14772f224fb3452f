"""Moves PyTorch state between processes from async Python: fast, safe, in constant memory."""

from aiotorchio.api import (
    StreamReader,
    StreamWriter,
    iter_bytes,
    load,
    load_from_stream,
    save,
    save_to_stream,
)
from aiotorchio.errors import (
    AiotorchioError,
    ChecksumError,
    InvalidObjectError,
    LimitExceeded,
    MismatchError,
    ProtocolError,
    RemoteAbort,
    StreamBusy,
    StreamPoisoned,
    TransferTimeout,
    TruncatedError,
    UnsafeObjectError,
)
from aiotorchio.transfer import Summary
from aiotorchio.wire.limits import Limits

__all__ = [
    "AiotorchioError",
    "ChecksumError",
    "InvalidObjectError",
    "LimitExceeded",
    "Limits",
    "MismatchError",
    "ProtocolError",
    "RemoteAbort",
    "StreamBusy",
    "StreamPoisoned",
    "StreamReader",
    "StreamWriter",
    "Summary",
    "TransferTimeout",
    "TruncatedError",
    "UnsafeObjectError",
    "iter_bytes",
    "load",
    "load_from_stream",
    "save",
    "save_to_stream",
]
