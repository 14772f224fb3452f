"""``save_to_stream`` and ``load_from_stream``: one message on an async stream.

Both check their options when they are called, and return a coroutine that drives the message. The
options that all functions have in common are documented here.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import (
    Coroutine,
    Generator,
    Iterable,
    Mapping,
)
from typing import Any

import torch

from aiotorchio.engine.commit import apply_commit
from aiotorchio.engine.drivers import drive, load_time_budget, save_time_budget
from aiotorchio.engine.load import Loaded, receive_message
from aiotorchio.engine.load_options import LoadOptions, check_lock
from aiotorchio.engine.requests import Progress, Request
from aiotorchio.engine.save_options import DEFAULT_CHUNK_SIZE, SaveOptions
from aiotorchio.engine.selection import LoadTarget
from aiotorchio.engine.send import outgoing_message
from aiotorchio.engine.summary import Summary
from aiotorchio.graph.devices import MapLocation
from aiotorchio.graph.select import Select
from aiotorchio.limits import Limits, checked_limits
from aiotorchio.streams.detect import (
    open_sink,
    open_source,
)
from aiotorchio.streams.guard import exclusive
from aiotorchio.table.names import TensorSpec

__all__ = [
    "load_from_stream",
    "save_to_stream",
]


def save_to_stream(
    obj: object,
    stream: Any,
    *,
    checksum: bool = True,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    metadata: Mapping[str, str] | None = None,
    specs: Mapping[str, TensorSpec | torch.Tensor] | None = None,
    snapshot: bool = False,
    compact: bool = False,
    allow_pickle: bool = True,
    limits: Limits | None = None,
    progress: Progress | None = None,
    pickle_module: Any = pickle,
    pickle_protocol: int = 2,
) -> Coroutine[Any, Any, Summary]:
    """Send an object as one message.

    Tensors are sent unchanged: a storage that several tensors share is sent once and shared again
    by the receiver, and strides and unused parts of a storage are kept. Storages of
    64 KiB and more on the CPU are sent from their own memory; smaller ones, views with gaps and
    tensors on a device are copied in two chunks of memory. Do not change the tensors before the
    coroutine has returned, unless ``snapshot`` is True. A change is noticed at the end if it
    advances a tensor's version counter: most operations of torch in place do, fused optimizers,
    batch norms, ``.data`` and numpy do not.

    This is a plain function that returns a coroutine: options are checked, and a snapshot is
    taken, when it is called, not when the coroutine runs. Work that is queued on a device at the
    time of the call is completed first, and its result is sent.

    Args:
        obj: Any object, or a ``Snapshot``. State dicts and other plain containers need no pickle on
            either side.
        stream: An ``asyncio.StreamWriter``, an anyio byte stream, a non-blocking
            ``socket.socket``, or an object with ``write(data)`` and ``async drain()``. It stays
            open after the message.
        checksum: Send an xxh3_64 digest with each chunk. Without it, damage to tensors goes
            unnoticed; structure and completeness are still proven.
        chunk_size: Bytes of a chunk: a multiple of 64, from 4096 on. Receivers accept up to
            ``Limits.chunk_nbytes``.
        metadata: Texts for the header of the message (SPEC.md section 5.1), which the receiver
            can read before the payload: ``Message.metadata``.
        specs: The tensors of a dict that is made while it is sent: shape and dtype of each, by
            name, or a tensor that has them (on ``meta``, for example). ``obj`` is then an iterable,
            plain or async, of (name, tensor) in the same order. The header is sent at once; each
            tensor is taken from the iterable after the one before was sent, and not kept. They
            arrive on the CPU, unless ``map_location`` says otherwise. A plain iterable runs on the
            event loop. If the save fails, a generator is not closed.
        snapshot: Send the state at the moment of this call, while the caller goes on changing it.
            It is copied before this returns, and no other thread may change it until then: on the
            host, which blocks for about 0.6 seconds a GiB; on a device in the order of its current
            stream, which does not block. Each chunk of the copy is freed when it was sent, so the
            peak is once the size of the state.
        compact: Leave out the bytes of a storage that no tensor shows; ``Summary.left_out_nbytes``
            has their number. Tensors keep sharing memory, and tensors of one storage arrive in one
            storage; strides become those among the elements that are sent. Of tensors that have
            elements in common, the smallest box around them is sent (a row and a column of a
            matrix: all of it). Storages that the object refers to directly, such as those of
            quantized tensors, stay whole.
        allow_pickle: False refuses an object that needs pickle before anything is sent, with the
            reason: receivers may load with ``allow_pickle=False``.
        limits: How slow the receiver may be: the ``write_timeout`` and ``least_rate``. The default
            is ``Limits()``.
        progress: Called as ``progress(done, total)`` with bytes of the payload, after each chunk.
        pickle_module: A module with a ``Pickler``, for objects beyond plain containers.
        pickle_protocol: The protocol of that pickle. Receivers load only 2 with
            ``weights_only=True``.

    Returns:
        The summary of the message.

    Raises:
        TypeError: Not a stream that can be saved to, or an option of another type.
        ValueError: An option out of its range, or a blocking socket.
        RuntimeError: A tensor was changed, or its storage resized, while the snapshot was taken
            (nothing was sent), or while it was sent. Then the receiver gets a ``RemoteAbort``, and
            the stream can be used again; or a ``ChecksumError``, if the bytes of a chunk changed on
            their way, and the connection is broken.
        ValueError: The object needs pickle, and ``allow_pickle`` is False; nothing was sent.
        TruncatedError: The peer closed the connection, or it broke.
        TransferTimeout: The peer received nothing, or too little, for too long (``limits``).
        StreamBusy: Another save is using the stream.
        StreamPoisoned: An earlier save was stopped inside its message.
        ValueError: The tensors of the iterable are not those of ``specs``. After this, and after an
            error of the iterable itself, the receiver gets a ``RemoteAbort``, and the stream can be
            used again.
        Exception: The error of ``pickle_module`` for an object that it cannot pickle; the stream is
            untouched then.

    The format is in SPEC.md.

    Example:
        >>> import asyncio, io, torch, aiotorchio
        >>> async def main():
        ...     async def serve(reader, writer):
        ...         await aiotorchio.save_to_stream({"w": torch.ones(2)}, writer)
        ...         writer.close()
        ...     server = await asyncio.start_server(serve, "127.0.0.1", 0)
        ...     reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        ...     state = await aiotorchio.load_from_stream(reader)
        ...     writer.close()
        ...     server.close()
        ...     return state
        >>> asyncio.run(main())
        {'w': tensor([1., 1.])}
    """
    options = SaveOptions.of_call(locals())
    return _save_to_stream(outgoing_message(obj, options), stream, checked_limits(limits))


# Python names this coroutine where a call is never awaited.
async def _save_to_stream(
    message: Generator[Request, Any, Summary], stream: Any, limits: Limits
) -> Summary:
    with exclusive(stream, "save", open_sink) as sink:
        sink.time_budget = save_time_budget(limits)
        return await drive(message, sink)


def load_from_stream(
    stream: Any,
    *,
    map_location: MapLocation = None,
    weights_only: bool | None = True,
    allow_pickle: bool = True,
    safe_globals: Iterable[Any] = (),
    limits: Limits | None = None,
    into: LoadTarget | None = None,
    strict: bool = True,
    cast: bool = False,
    staged: bool = False,
    lock: Any = None,
    select: Select | None = None,
    progress: Progress | None = None,
    pickle_module: Any = None,
    encoding: str = "utf-8",
) -> Coroutine[Any, Any, Any]:
    """Receive one message and rebuild its object.

    A plain function that returns a coroutine, as ``save_to_stream``: options, and the modes of the
    thread (``skip_data``, a ``FakeTensorMode``), count as they are when it is called.

    Takes exactly the bytes of the message off the stream. Every storage is received into the
    memory that it will have; host memory grows only as bytes arrive.

    Args:
        stream: An ``asyncio.StreamReader``, an anyio byte stream, a non-blocking
            ``socket.socket``, an object with ``async read(size)``, such as aiohttp's
            ``response.content``, or an async iterable of bytes-like pieces (one that is its own
            iterator, such as an async generator, keeps what follows for the next load;
            ``StreamReader`` keeps it for all others).
        map_location: As in ``torch.load``: a device or its string for all tensors, a dict from
            locations at the sender to locations here, or a callable that gets every storage, on
            the CPU, with its location at the sender, and returns a storage or None. By default
            tensors go where they were at the sender.
        weights_only: Rebuild pickled objects from an allowlist only. **False runs whatever code
            the sender put into the message.** None means True, as in ``torch.load``.
        allow_pickle: False accepts only objects that were sent without pickle.
        safe_globals: Classes and functions that pickled objects may use in this call, in addition
            to those of ``torch.serialization.add_safe_globals``; or pairs of one and its path.
        limits: Upper bounds for the message; the default is ``Limits()``.
        into: Existing tensors to receive into (targets): a mapping from names (see
            ``Message.tensors``) to tensors and modules, which may be nested like a state dict; or a
            ``torch.nn.Module``, which is filled as by its ``load_state_dict``, with hooks, extra
            state and entries that ``state_dict()`` makes; or a ``DoubleBuffer``. Sparse, quantized
            and nested tensors, DTensors and wrapper subclasses are received as a part of the
            object, and copied at the end (docs/guide/receiving.md). Names, shapes and dtypes are
            compared before a byte is written. Bytes go straight into a target that has the dtype
            and layout of the sender, else through a chunk of scratch. The targets must not be
            resized, nor used by other code, until this returns; if it fails, they are partly
            overwritten, unless ``staged``.
            Several tensors of the message for one target (tied weights) are compared as they
            arrive. Targets that share memory in another way need a message whose tensors share it
            in the same way. Another load into the same memory is refused until this one ends,
            staged or not.
        strict: As in ``load_state_dict``: whether the names must be the same on both sides. If
            not, tensors without a target arrive in new memory. A target whose memory other names
            of the message fill is not missing.
        cast: Convert to the dtype of the target, as far as ``torch.can_cast`` allows.
        staged: Receive and verify everything in separate memory, as much as the targets have, and
            then exchange the bytes. If this call raises anything, a cancellation too, all targets
            are unchanged. A ``DoubleBuffer`` is always staged, and exchanges memory instead of
            bytes.
        lock: An async context manager, such as ``asyncio.Lock``, that is held while staged
            targets change, so that no code under the same lock sees some of them changed and
            others not. If its release raises, or is cancelled natively (``asyncio.timeout``), the
            targets are changed back without the lock: it may be free by then. A release that
            swallows errors does not swallow those of this call. Cancel scopes of anyio and trio do
            not interrupt the release after a change. It is not held while a message arrives, so it
            does not make room for two loads at once.
        select: Only these tensors: names, shell patterns (``"encoder.*"``), or a function of a
            name. Others are received and dropped, without memory for them. They are left out of
            dicts; elsewhere in the object they are on ``meta``. A sparse, quantized or nested
            tensor, or a wrapper subclass, is received and left out of dicts. With ``into``,
            targets that are not selected stay unchanged.
        progress: Called as ``progress(done, total)`` with bytes of the payload, after each chunk.
        pickle_module: With ``weights_only=False``: has an ``Unpickler``.
        encoding: For the 8-bit strings in pickles of Python 2.

    Returns:
        The object; with ``into``, with the targets in it.

    Raises:
        TypeError: Not a stream that can be loaded from, or an option of another type.
        ValueError: A blocking socket, an option that would have no effect, or ``into`` with an
            FSDP1 module or two tensors of one name.
        MismatchError: ``into`` or ``select`` does not fit the message; the error has all
            misfits. Nothing was written, but the message was not read either: inside the block
            of ``StreamReader.open``, the stream can still be used. Later, the error means that a
            target was resized meanwhile, that tied weights differ in the message, that a pickled
            object itself holds a storage whose tensors have targets or are not selected, or that a
            module did not load its entries: its previous state is loaded back.
        RuntimeError: Another load is receiving into the same memory, or using the
            ``DoubleBuffer``; nothing was read but the header.
        ProtocolError: The bytes are not a message, or the stream gave something else than bytes.
        TruncatedError: The stream ended or broke; also an ``EOFError``. Its ``offset`` is 0 if
            the stream ended before a message began.
        ChecksumError: The bytes are not those that were sent.
        LimitExceeded: The message needs more than ``limits`` accepts.
        UnsafeObjectError: The object needs a class or function that is not allowed; also a
            ``pickle.UnpicklingError``.
        InvalidObjectError: The object contradicts itself, or needs a device that this machine does
            not have.
        RemoteAbort: The sender stopped the message, and gave a reason.
        TransferTimeout: The sender was silent, or slow, for too long (``limits``). If no byte came
            at all (``start_timeout``), the stream is unchanged, unless it is an async generator,
            which Python ends; its ``offset`` is 0.
        StreamBusy: Another load is using the stream.
        StreamPoisoned: An earlier load was stopped inside its message.

    The format is in SPEC.md.

    Example:
        See ``save_to_stream``.
    """
    options = LoadOptions.of_call(locals())
    check_lock(lock, "async")
    checked = checked_limits(limits)
    message = receive_message(checked, options)
    return _load_from_stream(message, stream, checked, lock)


async def _load_from_stream(
    message: Generator[Request, Any, Loaded], stream: Any, limits: Limits, lock: Any
) -> Any:
    with contextlib.ExitStack() as unfinished:
        with exclusive(stream, "load", open_source) as source:
            source.time_budget = load_time_budget(limits)
            async with contextlib.aclosing(source):
                loaded = await drive(message, source)
                unfinished.callback(loaded.close)
        # After all that can fail, since an error must leave the targets unchanged.
        if loaded.commit is not None:
            await apply_commit(loaded.commit, lock)
        return loaded.obj
