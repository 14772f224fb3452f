"""The errors of aiotorchio that are caused by a peer, a stream or a message.

The tree::

    AiotorchioError
    ├── ProtocolError                            the bytes are not a message of this format
    ├── TruncatedError     (also EOFError)       the stream ended inside a message
    ├── ChecksumError                            the bytes are not those that were sent
    ├── LimitExceeded                            the message asks for more than ``Limits`` allows
    ├── UnsafeObjectError  (also UnpicklingError)  the object needs code that is not allowed
    ├── InvalidObjectError                       the object cannot be what it claims to be
    ├── MismatchError                            the message does not fit the target
    ├── TransferTimeout    (also TimeoutError)   the peer was too slow
    ├── RemoteAbort                              the sender gave up and said why
    ├── StreamPoisoned                           the stream was left in the middle of a message
    └── StreamBusy                               the stream is in use by another call

Misuse by the caller is a plain ``TypeError`` or ``ValueError`` for arguments, and a plain
``RuntimeError`` for a call at a wrong moment.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping

__all__ = [
    "AiotorchioError",
    "ChecksumError",
    "InvalidObjectError",
    "LimitExceeded",
    "MismatchError",
    "ProtocolError",
    "RemoteAbort",
    "StreamBusy",
    "StreamPoisoned",
    "TransferTimeout",
    "TruncatedError",
    "UnsafeObjectError",
]


def printable(text: str) -> str:
    """Escape all characters of a text that could move a cursor or end a line."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


# Characters of a message: the names in it come from a peer and can have megabytes.
_MESSAGE_MAX = 10_000


def _cut(message: str) -> str:
    return message if len(message) <= _MESSAGE_MAX else message[:_MESSAGE_MAX] + "..."


class AiotorchioError(Exception):
    """Base of every error in this module.

    Args:
        message: The cause. It is escaped and cut to 10,000 characters, because parts of it may come
            from a peer.
        entry: The part of the message with the error, such as ``"tensor 3 ('layer.weight')"``.
        offset: Bytes between the first byte of the message and the place of the error.
    """

    def __init__(
        self, message: str, *, entry: str | None = None, offset: int | None = None
    ) -> None:
        # The text is cut before it is escaped, too: there may be megabytes.
        message = _cut(self._printable(_cut(message)))
        super().__init__(message)
        self.message = message
        self.entry = entry
        self.offset = offset

    def _printable(self, message: str) -> str:
        return printable(message)

    def __str__(self) -> str:
        where = [] if self.entry is None else [self.entry]
        if self.offset is not None:
            where.append(f"byte {self.offset}")
        return f"{self.message} (at {', '.join(where)})" if where else self.message


class ProtocolError(AiotorchioError):
    """The bytes are not a message as SPEC.md describes it, or the stream gave something else."""


class TruncatedError(AiotorchioError, EOFError):
    """The stream ended, or its connection broke, before the message was whole."""


class ChecksumError(AiotorchioError):
    """A checksum does not match: bytes were changed, lost, repeated or moved."""


class LimitExceeded(AiotorchioError):
    """The message asks for more than the receiver's ``Limits`` allow."""


class UnsafeObjectError(AiotorchioError, pickle.UnpicklingError):
    """The object needs a global or an operation that the receiver does not allow."""


class InvalidObjectError(AiotorchioError):
    """The object contradicts itself, such as a tensor that reaches beyond its storage."""


class MismatchError(AiotorchioError):
    """The message does not fit the targets or the options of the call.

    The text lists up to 20 misfits of each kind, the attributes have all.

    Args:
        message: As in ``AiotorchioError``.
        entry: As in ``AiotorchioError``.
        offset: As in ``AiotorchioError``.
        missing: Names of targets that the message does not have.
        unexpected: Names in the message without a target.
        misfits: Name of a tensor -> the reason why it does not fit its target.
    """

    def __init__(
        self,
        message: str,
        *,
        entry: str | None = None,
        offset: int | None = None,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misfits: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, entry=entry, offset=offset)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.misfits = dict(misfits or {})

    def _printable(self, message: str) -> str:
        # The text has a line for each tensor; the names in it are escaped already.
        return "\n".join(map(printable, message.split("\n")))


class TransferTimeout(AiotorchioError, TimeoutError):
    """The peer did not send or take bytes in time."""


class RemoteAbort(AiotorchioError):
    """The sender gave up in the middle of the message; the message says why."""


class StreamPoisoned(AiotorchioError):
    """An earlier call stopped inside a message, so the next byte has no meaning."""


class StreamBusy(AiotorchioError):
    """Another call is saving to, or loading from, the same stream."""
