"""TLS contexts for machines that have certificates of a private authority.

In: PEM files. Out: ``ssl.SSLContext`` objects for asyncio, anyio or ``ssl``, with TLS 1.3 only;
they verify every certificate of a peer. An error means that a file cannot be used; a note names it.
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
    """Make a context for the side that accepts connections.

    Args:
        cert: PEM file with the server's certificate, and with those of any authorities between it
            and the authority that its clients trust.
        key: PEM file with the private key, which must not be encrypted. None: it is in ``cert``.
        client_ca: PEM file with the authorities of which clients must have a certificate; those of
            the system do not count. None: clients are anonymous, and anyone may connect.

    Returns:
        A context for TLS 1.3 only.

    Raises:
        OSError: A file cannot be read; a note names it.
        ssl.SSLError: A file is not PEM, does not have the needed entry, or the key is not that of
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
    # Sessions are not resumed. And a client that only sends would close before it has read the
    # tickets: its system would then reset the connection, and the end of a message would be lost.
    context.num_tickets = 0
    _identify(context, cert, key)
    if client_ca is not None:
        _trust(context, client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(
    ca: Path | None = None, cert: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """Make a context for the side that connects; it must pass the name of the server to verify.

    Args:
        ca: PEM file with the only authorities to trust. None: the many authorities that the system
            trusts.
        cert: PEM file with the client's certificate, for servers that require one. They refuse a
            client without one only after the handshake: its first load, or one of its first saves,
            raises ``TruncatedError``.
        key: PEM file with its private key, which must not be encrypted. None: it is in ``cert``.

    Returns:
        A context for TLS 1.3 only.

    Raises:
        OSError: A file cannot be read; a note names it.
        ssl.SSLError: A file is not PEM, does not have the needed entry, or the key is not that of
            the certificate. (Also an ``OSError``.)
        ValueError: There is a key without a certificate, or the key is encrypted.

    Example:
        >>> import asyncio, aiotorchio
        >>> from aiotorchio import tls
        >>> async def main():
        ...     context = tls.client_context("ca.pem", "client.pem", "client.key")
        ...     reader, writer = await asyncio.open_connection("peer.example", 8765, ssl=context)
        ...     return await aiotorchio.load_from_stream(reader, allow_pickle=False)
    """
    if cert is None and key is not None:
        raise ValueError("key was given without cert: pass the certificate of the key, too")
    # This context verifies certificates and names from the start.
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    if ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _trust(context, ca)
    if cert is not None:
        _identify(context, cert, key)
    return context


# Both contexts keep the default of the standard library that a connection may end without the
# close_notify of TLS (OP_IGNORE_UNEXPECTED_EOF): many peers never send one, an error would lose the
# bytes that asyncio has buffered, and the end frame proves that a message is whole.


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
    """Add the names of files to an error, since OpenSSL does not name them."""
    try:
        yield
    except (OSError, ValueError) as error:
        error.add_note(f"in {' or '.join(str(file) for file in files if file is not None)}")
        raise


def _no_password() -> str:
    # Without this, OpenSSL asks for the password on the terminal and blocks the event loop.
    raise ValueError("the private key is encrypted: decrypt it first (openssl pkey)")


# If the peer has sent an alert, unwrap() leaves it in OpenSSL's error queue of the thread, and
# another connection of the thread fails: a peer could end connections of other peers.


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
    # ssl has no function for that, but this call clears the queue when it fails.
    with contextlib.suppress(ssl.SSLError):
        _SCRATCH.set_ciphers("none of this name")


_SCRATCH = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
