"""Drop-in names for ``torch.distributed._serialization``: change the import, on both sides.

``streaming_save`` and ``streaming_load`` take the arguments of torch's ``_streaming_save`` and
``_streaming_load``, and raise errors that handlers of theirs catch. The format is aiotorchio's: a
peer that still has torch's functions gets, and causes, an error. ``aiotorchio.save`` and
``aiotorchio.load`` can do more.

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
        obj: As in ``aiotorchio.save``.
        f: Anything with ``write`` for bytes, which may write fewer than it was given. Nothing is
            flushed: whoever made ``f`` knows when.
        pickle_module: Pickles what cannot be sent without pickle.
        pickle_protocol: Likewise; 4 and 5 can only be loaded with ``weights_only=False``.

    Raises:
        TypeError: ``f`` has no ``write``, or not for bytes; likewise of the other arguments.
        ValueError: A protocol that ``pickle_module`` does not have.
        AiotorchioError: The connection broke or timed out; also the ``OSError`` that said so.
        Exception: What pickling ``obj`` or writing to ``f`` raises.

    Example:
        See the module.
    """
    if not hasattr(f, "write"):
        raise TypeError("file must have a 'write' attribute")
    # Complains about what this object may have no use for.
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
    """Load one object from a file-like object, and leave ``f`` right behind it.

    Refused here, while torch gives a wrong object, or fails in one of many ways: bytes that were
    changed or lost on their way (``ChecksumError``, ``ProtocolError``, ``TruncatedError``), what
    exceeds ``Limits()`` (``LimitExceeded``), and a connection after an error inside a message
    (``StreamPoisoned``, as in a save) or during another load (``StreamBusy``).

    Args:
        f: Anything with ``readinto`` or ``read``, which may give fewer bytes than asked for.
        map_location: As in ``torch.load``, ``"meta"`` included.
        pickle_module: Unpickles what was pickled; only with ``weights_only=False``.
        weights_only: False **runs whatever code the sender sent**.
        pickle_load_args: Of the ``Unpickler``: ``encoding``, and with ``weights_only=False``
            ``errors``, ``fix_imports``, ``buffers`` and what else that of ``pickle_module`` takes.

    Returns:
        The object.

    Raises:
        RuntimeError: ``pickle_module`` with ``weights_only=True``.
        AttributeError: ``f`` can't be read from.
        TypeError: Another argument that the ``Unpickler`` does not take.
        AiotorchioError: What is wrong with the message, the object or the connection. If there is
            an error behind it, it is of that one's type, too: a ``RuntimeError`` of torch for a
            device that is not here, an ``OSError``, or whatever unpickling raised. ``EOFError``
            and ``pickle.UnpicklingError`` are as in the tree of ``aiotorchio.errors``.

    Example:
        See the module.
    """
    if weights_only and pickle_module is not None:
        raise RuntimeError("Can not safely load weights when explicit pickle_module is specified")
    if not hasattr(f, "read") and not hasattr(f, "readinto"):
        raise AttributeError(f"{type(f).__name__!r} object has no attribute 'read'")
    others = pickle_load_args.keys() - {"encoding"}
    if weights_only and others:
        raise TypeError(
            f"only with weights_only=False: {', '.join(sorted(others))} (what you trust goes to "
            "torch.serialization.safe_globals)"
        )
    if not weights_only:
        taking = _taking(pickle_load_args, pickle if pickle_module is None else pickle_module)
        # None where nobody asked for one: TORCH_FORCE_WEIGHTS_ONLY_LOAD would refuse it.
        pickle_module = taking if pickle_module is not None or others else None
    with _errors_of_both():
        return load(
            f,
            map_location=map_location,
            pickle_module=pickle_module,
            weights_only=weights_only,
            encoding=pickle_load_args.get("encoding", "utf-8"),
        )


def _taking(arguments: dict[str, Any], pickle_module: Any) -> Any:
    """A pickle module whose ``Unpickler`` gets these arguments, besides the usual ones."""

    # Which class it is, is known at run time only.
    class Unpickler(pickle_module.Unpickler):  # type: ignore[misc]
        def __init__(self, file: Any, **usual: Any) -> None:
            super().__init__(file, **(usual | arguments))

    Unpickler(io.BytesIO())  # complains before a byte was read
    return SimpleNamespace(Unpickler=Unpickler)


@contextmanager
def _errors_of_both() -> Iterator[None]:
    """Let an error of ours with another one behind it be of that one's type, too."""
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
        # Not to be made from its args, as errors should be. Nobody could pickle it, either.
        return error
    return both.with_traceback(error.__traceback__)


def _made(
    ours: type[AiotorchioError], theirs: type[Exception], args: Any, state: Mapping[str, Any]
) -> AiotorchioError:
    """An error with the text and place of ours, and all else of theirs, such as ``errno``."""
    own = {
        "__init__": theirs.__init__,
        "__reduce__": lambda self: (_made, (ours, theirs, self.args, vars(self))),
        "__module__": ours.__module__,
        "__doc__": ours.__doc__,
    }
    error: AiotorchioError = type(ours.__name__, (ours, theirs), own)(*args)
    vars(error).update(state)
    return error
