"""TLS between machines that know each other by certificates of an authority of their own.

The contexts are those of the standard library, for whatever takes one (asyncio, anyio, ``ssl``),
with nothing left to forget: TLS 1.3, and every certificate that there is gets verified.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator

__all__ = ["client_context", "server_context"]

Path = str | os.PathLike[str]


def server_context(
    cert: Path, key: Path | None = None, client_ca: Path | None = None
) -> ssl.SSLContext:
    """A context for the side that accepts connections.

    Args:
        cert: PEM file with the server's certificate, and with those of the authorities between it
            and the one that its clients trust, if there are any.
        key: PEM file with the private key, which must not be encrypted. None: it is in ``cert``.
        client_ca: PEM file with the authorities that clients must have a certificate of; those of
            the system do not count. None: clients stay anonymous, and anyone may connect.

    Returns:
        For TLS 1.3 and nothing older.

    Raises:
        OSError: A file can't be read; a note says which.
        ssl.SSLError: A file is not PEM, has nothing of what it is for, or the key is not that of
            the certificate. (Also an ``OSError``.)
        ValueError: The key is encrypted.

    Example:
        >>> import asyncio, aiotorchio
        >>> from aiotorchio import tls
        >>> async def serve(reader, writer):
        ...     await aiotorchio.save_to_stream({"step": 1}, writer)
        ...     writer.close()
        >>> async def main():
        ...     context = tls.server_context("server.pem", "server.key", client_ca="ca.pem")
        ...     server = await asyncio.start_server(serve, port=8765, ssl=context)
        ...     await server.serve_forever()
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    # Nobody resumes a session here. And a client that only sends and closes would do so before it
    # has read the tickets: its system then resets the connection, and the end of a message is lost.
    context.num_tickets = 0
    _identify(context, cert, key)
    if client_ca is not None:
        _trust(context, client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(
    ca: Path | None = None, cert: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """A context for the side that connects, which must say to whom: the name is verified, too.

    Args:
        ca: PEM file with the authorities to trust, and no others. None: those that the system
            trusts, which are many.
        cert: PEM file with the client's own certificate, for servers that ask for one. They tell a
            client who has none only after the handshake: its first load, or one of its first
            saves, raises ``TruncatedError``.
        key: PEM file with its private key, which must not be encrypted. None: it is in ``cert``.

    Returns:
        For TLS 1.3 and nothing older.

    Raises:
        OSError: A file can't be read; a note says which.
        ssl.SSLError: A file is not PEM, has nothing of what it is for, or the key is not that of
            the certificate. (Also an ``OSError``.)
        ValueError: A key without a certificate, or the key is encrypted.

    Example:
        >>> import asyncio, aiotorchio
        >>> from aiotorchio import tls
        >>> async def main():
        ...     context = tls.client_context("ca.pem", "client.pem", "client.key")
        ...     reader, writer = await asyncio.open_connection("peer.example", 8765, ssl=context)
        ...     return await aiotorchio.load_from_stream(reader, allow_pickle=False)
    """
    if cert is None and key is not None:
        raise ValueError("a key without a certificate is of no use: pass cert, too")
    # Verifies certificates and names from the start.
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _trust(context, ca)
    if cert is not None:
        _identify(context, cert, key)
    return context


# Both leave it to the standard library's default that an end of the connection without a farewell
# of TLS is an end like others (OP_IGNORE_UNEXPECTED_EOF): many peers never say farewell, an error
# would cost what asyncio has buffered, and whether a message is whole is proven by its end frame.


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.sslobject_class, context.sslsocket_class = _Object, _Socket
    return context


def _identify(context: ssl.SSLContext, cert: Path, key: Path | None) -> None:
    with _named(cert, key):
        context.load_cert_chain(cert, key, password=_no_password)


def _trust(context: ssl.SSLContext, ca: Path) -> None:
    with _named(ca):
        context.load_verify_locations(ca)


@contextlib.contextmanager
def _named(*files: Path | None) -> Iterator[None]:
    """OpenSSL does not say which file it could not read, or use."""
    try:
        yield
    except (OSError, ValueError) as error:
        error.add_note(f"in {' or '.join(str(file) for file in files if file is not None)}")
        raise


def _no_password() -> str:
    # Without this, OpenSSL asks for it on the terminal, and the event loop waits.
    raise ValueError("the private key is encrypted: decrypt it first (openssl pkey)")


# If the peer has broken off with an alert, unwrap() leaves it in a queue of errors that OpenSSL has
# for the whole thread, and another connection there fails of it: a peer could end those of others.


class _Object(ssl.SSLObject):
    def unwrap(self) -> None:
        try:
            super().unwrap()
        finally:
            _forget_errors()


class _Socket(ssl.SSLSocket):
    def unwrap(self) -> socket.socket:
        try:
            return super().unwrap()
        finally:
            _forget_errors()


def _forget_errors() -> None:
    # There is no call for it, but this one clears the queue when it fails.
    with contextlib.suppress(ssl.SSLError):
        _SCRATCH.set_ciphers("none of this name")


_SCRATCH = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
