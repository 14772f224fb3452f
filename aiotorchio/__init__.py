"""Moves PyTorch state between processes from async Python.

``save_to_stream`` and ``load_from_stream`` carry one object over an async stream;
``StreamWriter`` and ``StreamReader`` carry many, of which ``StreamReader.open`` shows the header
first, as a ``Message`` with a ``TensorSpec`` for each tensor; ``iter_bytes`` gives a message to an
HTTP library; ``save`` and ``load`` are the blocking twins. ``snapshot`` copies a state once, to be
sent to many receivers, as a ``Snapshot``. ``Limits`` says what a load accepts,
``DoubleBuffer`` is to load into, ``Summary`` says what a save has sent, and every error is an
``AiotorchioError``. ``aiotorchio.tls`` has contexts for connections between machines.
"""

from importlib.metadata import version

from aiotorchio import tls
from aiotorchio.api.blocking import get_unsafe_globals, load, save
from aiotorchio.api.connection import StreamReader, StreamWriter
from aiotorchio.api.message import Message
from aiotorchio.api.streams import iter_bytes, load_from_stream, save_to_stream
from aiotorchio.engine.selection import DoubleBuffer
from aiotorchio.engine.send import Summary
from aiotorchio.engine.snapshot import Snapshot, snapshot
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
from aiotorchio.limits import Limits
from aiotorchio.table.names import TensorSpec

__version__ = version("aiotorchio")

__all__ = [
    "AiotorchioError",
    "ChecksumError",
    "DoubleBuffer",
    "InvalidObjectError",
    "LimitExceeded",
    "Limits",
    "Message",
    "MismatchError",
    "ProtocolError",
    "RemoteAbort",
    "Snapshot",
    "StreamBusy",
    "StreamPoisoned",
    "StreamReader",
    "StreamWriter",
    "Summary",
    "TensorSpec",
    "TransferTimeout",
    "TruncatedError",
    "UnsafeObjectError",
    "__version__",
    "get_unsafe_globals",
    "iter_bytes",
    "load",
    "load_from_stream",
    "save",
    "save_to_stream",
    "snapshot",
    "tls",
]
