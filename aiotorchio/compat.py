"""Drop-in names for ``torch.distributed._serialization``: change the import, on both sides.

``streaming_save`` and ``streaming_load`` take the arguments of torch's ``_streaming_save`` and
``_streaming_load``, and raise errors that handlers for torch's functions catch. The format is that
of aiotorchio: with a peer that still uses torch's functions, both sides get an error.
``aiotorchio.save`` and ``aiotorchio.load`` can do more.

Example:
    >>> import io, torch
    >>> from aiotorchio.compat import streaming_load, streaming_save
    >>> file = io.BytesIO()  # or socket.makefile("wb"), or the wfile of an http.server
    >>> streaming_save({"step": 7, "w": torch.ones(2)}, file)
    >>> streaming_save([1, 2], file)
    >>> _ = file.seek(0)
    >>> streaming_load(file)
    {'step': 7, 'w': tensor([1., 1.])}
    >>> streaming_load(file)
    [1, 2]
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from aiotorchio.api.blocking import load, save
from aiotorchio.errors import AiotorchioError
from aiotorchio.graph.devices import MapLocation

__all__ = ["streaming_load", "streaming_save"]


def streaming_save(
    obj: object, f: Any, pickle_module: Any = pickle, pickle_protocol: int = 2
) -> None:
    """Save an object to a file-like object that need not be seekable.

    Args:
        obj: The object, as in ``aiotorchio.save``.
        f: Any object with ``write`` for bytes, which may write only a part of them. It is not
            flushed: the caller must do that.
        pickle_module: Pickles objects that cannot be sent without pickle.
        pickle_protocol: Protocol for that; all but 2 need ``weights_only=False`` in the load.

    Raises:
        TypeError: ``f`` has no ``write`` for bytes, or another argument has a wrong type.
        ValueError: ``pickle_module`` does not have the protocol.
        AiotorchioError: The connection broke or timed out; it is also the ``OSError`` of the cause.
        Exception: Pickling ``obj`` or writing to ``f`` has raised it.

    Example:
        See the module.
    """
    if not hasattr(f, "write"):
        raise TypeError("file must have a 'write' attribute")
    # Checks the two arguments even if this object needs no pickle.
    pickle_module.Pickler(io.BytesIO(), protocol=pickle_protocol)
    with _errors_of_both():
        save(obj, f, pickle_module=pickle_module, pickle_protocol=pickle_protocol)


def streaming_load(
    f: Any,
    map_location: MapLocation = None,
    pickle_module: Any = None,
    *,
    weights_only: bool = True,
    **pickle_load_args: Any,
) -> object:
    """Load one object from a file-like object, and stop right after it.

    These cases raise errors here, while torch returns a wrong object or fails in one of many ways:
    bytes that were changed or lost (``ChecksumError``, ``ProtocolError``, ``TruncatedError``), a
    message that exceeds ``Limits()`` (``LimitExceeded``), and a connection after an error inside a
    message (``StreamPoisoned``, as in a save) or during another load (``StreamBusy``).

    Args:
        f: Any object with ``readinto`` or ``read``, which may return fewer bytes than requested.
        map_location: As in ``torch.load``, ``"meta"`` included.
        pickle_module: Unpickles pickled objects; only with ``weights_only=False``.
        weights_only: False **runs any code that the sender has sent**.
        pickle_load_args: Arguments of the ``Unpickler``: ``encoding``, and with
            ``weights_only=False`` ``errors``, ``fix_imports``, ``buffers`` and all others of the
            ``Unpickler`` of ``pickle_module``.

    Returns:
        The object.

    Raises:
        RuntimeError: ``pickle_module`` with ``weights_only=True``.
        AttributeError: ``f`` has neither ``read`` nor ``readinto``.
        TypeError: The ``Unpickler`` does not have the argument.
        AiotorchioError: The message, the object or the connection has an error. If it has a cause,
            it is also of the type of the cause: a ``RuntimeError`` of torch for a missing device,
            an ``OSError``, or an error of unpickling. ``EOFError`` and ``pickle.UnpicklingError``
            are as in the tree of ``aiotorchio.errors``.

    Example:
        See the module.
    """
    if weights_only and pickle_module is not None:
        raise RuntimeError("Can not safely load weights when explicit pickle_module is specified")
    if not hasattr(f, "read") and not hasattr(f, "readinto"):
        raise AttributeError(f"{type(f).__name__!r} object has no attribute 'read'")
    unpickler = _unpickler_module(pickle_load_args, pickle_module, weights_only=weights_only)
    with _errors_of_both():
        return load(
            f,
            map_location=map_location,
            pickle_module=unpickler,
            weights_only=weights_only,
            encoding=pickle_load_args.get("encoding", "utf-8"),
        )


def _unpickler_module(
    pickle_load_args: dict[str, Any], pickle_module: Any, *, weights_only: bool
) -> Any:
    """Return the pickle module for a load; None if no argument of ``streaming_load`` needs one.

    Raises:
        TypeError: ``weights_only=True`` or the ``Unpickler`` excludes an argument.
    """
    others = pickle_load_args.keys() - {"encoding"}
    if weights_only:
        if others:
            raise TypeError(
                f"{', '.join(sorted(others))}: only possible with weights_only=False (to allow "
                "classes that you trust, use torch.serialization.safe_globals)"
            )
        return None
    taking = _taking(pickle_load_args, pickle if pickle_module is None else pickle_module)
    # None if no argument needs it: TORCH_FORCE_WEIGHTS_ONLY_LOAD would refuse it.
    return taking if pickle_module is not None or others else None


def _taking(arguments: dict[str, Any], pickle_module: Any) -> Any:
    """Make a pickle module whose ``Unpickler`` gets these arguments, too."""

    # The base class is known only at run time.
    class Unpickler(pickle_module.Unpickler):  # type: ignore[misc]
        def __init__(self, file: Any, **usual: Any) -> None:
            super().__init__(file, **(usual | arguments))

    Unpickler(io.BytesIO())  # raises its errors before a byte is read
    return SimpleNamespace(Unpickler=Unpickler)


@contextmanager
def _errors_of_both() -> Iterator[None]:
    """Give an ``AiotorchioError`` with a cause the type of the cause, too."""
    try:
        yield
    except AiotorchioError as error:
        behind = error.__cause__
        if not isinstance(behind, Exception) or isinstance(error, type(behind)):
            raise
        raise _of_both(error, behind) from behind


def _of_both(error: AiotorchioError, behind: Exception) -> AiotorchioError:
    state = vars(behind) | vars(error)
    try:
        both = _made(type(error), type(behind), behind.args, state)
    except Exception:
        # The cause cannot be made from its args, so it is not picklable either.
        return error
    return both.with_traceback(error.__traceback__)


def _made(
    ours: type[AiotorchioError], theirs: type[Exception], args: Any, state: Mapping[str, Any]
) -> AiotorchioError:
    """Make an error with the text of the first type and the attributes (``errno``) of the other."""
    own = {
        "__init__": theirs.__init__,
        "__reduce__": lambda self: (_made, (ours, theirs, self.args, vars(self))),
        "__module__": ours.__module__,
        "__doc__": ours.__doc__,
    }
    error: AiotorchioError = type(ours.__name__, (ours, theirs), own)(*args)
    vars(error).update(state)
    return error
