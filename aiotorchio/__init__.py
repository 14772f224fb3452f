"""Transfer of PyTorch state between processes from async Python.

``save_to_stream`` and ``load_from_stream`` transfer one object over an async stream;
``StreamWriter`` and ``StreamReader`` transfer many; ``StreamReader.open`` returns the header
first, as a ``Message`` with a ``TensorSpec`` for each tensor; ``iter_bytes`` yields the bytes of a
message for an HTTP library; ``save`` and ``load`` are the blocking calls. ``snapshot`` copies a
state once for many receivers, as a ``Snapshot``. ``Limits`` bounds a load, ``DoubleBuffer`` is a
target with a second set of memory, ``Summary`` describes a finished save, and every error is an
``AiotorchioError``. ``aiotorchio.tls`` has contexts for connections between machines.
"""

from importlib.metadata import version

from aiotorchio import tls
from aiotorchio.api.blocking import get_unsafe_globals, load, save
from aiotorchio.api.connection import StreamReader, StreamWriter
from aiotorchio.api.http_body import iter_bytes
from aiotorchio.api.message import Message
from aiotorchio.api.streams import load_from_stream, save_to_stream
from aiotorchio.engine.selection import DoubleBuffer
from aiotorchio.engine.snapshot import Snapshot, snapshot
from aiotorchio.engine.summary import Summary
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
