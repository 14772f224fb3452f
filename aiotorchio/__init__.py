"""Moves PyTorch state between processes from async Python.

``save_to_stream`` and ``load_from_stream`` carry one object over an async stream;
``StreamWriter`` and ``StreamReader`` carry many; ``iter_bytes`` gives a message to an HTTP library;
``save`` and ``load`` are the blocking twins. ``Limits`` says what a load accepts, ``Summary`` what
a save has sent, and every error is an ``AiotorchioError``.
"""

from importlib.metadata import version

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

__version__ = version("aiotorchio")

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
    "__version__",
    "iter_bytes",
    "load",
    "load_from_stream",
    "save",
    "save_to_stream",
]
