"""Every error that aiotorchio raises for what a peer, a stream or a message does.

The tree::

    AiotorchioError
    ├── ProtocolError                            the bytes are not a message of this format
    ├── TruncatedError     (also EOFError)       the stream ended inside a message
    ├── ChecksumError                            the bytes are not those that were sent
    ├── LimitExceeded                            the message asks for more than ``Limits`` allows
    ├── UnsafeObjectError  (also UnpicklingError)  the object wants code that was not allowed
    ├── InvalidObjectError                       the object cannot be what it claims to be
    ├── MismatchError                            the message does not fit the destination
    ├── TransferTimeout    (also TimeoutError)   the peer was too slow
    ├── RemoteAbort                              the sender gave up and said why
    ├── StreamPoisoned                           the stream was left in the middle of a message
    └── StreamBusy                               the stream is in use by another call

Misuse by the caller is a plain ``TypeError`` or ``ValueError``.
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
    """A text of a peer's for terminals and logs: what moves a cursor or ends a line is escaped."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


# Characters of a message: what a peer calls things can have megabytes.
_MESSAGE_MAX = 10_000


def _cut(message: str) -> str:
    return message if len(message) <= _MESSAGE_MAX else message[:_MESSAGE_MAX] + "..."


class AiotorchioError(Exception):
    """Base of every error in this module.

    Args:
        message: What was wrong; cut where it is longer than 10,000 characters, and printable: a
            peer may have written a part of it.
        entry: The part of the message it was found in, such as ``"tensor 3 ('layer.weight')"``.
        offset: Bytes between the first byte of the message and the place of the error.
    """

    def __init__(
        self, message: str, *, entry: str | None = None, offset: int | None = None
    ) -> None:
        # Before, too: there may be megabytes to escape.
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
    """The bytes are not a message as SPEC.md describes it."""


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
    """The message does not fit what the caller gave or asked for; the text says all of it.

    Args:
        message: As of every error.
        entry: Likewise.
        offset: Likewise.
        missing: Names of destinations that the message does not have.
        unexpected: Names in the message for which there is no destination.
        misfits: Why a tensor does not fit its destination, by name.
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
        # It has a line for each tensor, in which names are printable already.
        return "\n".join(map(printable, message.split("\n")))


class TransferTimeout(AiotorchioError, TimeoutError):
    """The peer did not send or take bytes in time."""


class RemoteAbort(AiotorchioError):
    """The sender gave up in the middle of the message; the message says why."""


class StreamPoisoned(AiotorchioError):
    """An earlier call was stopped inside a message, so the stream has no known border."""


class StreamBusy(AiotorchioError):
    """Another call is saving to, or loading from, the same stream."""
