"""A state that was copied once, to be sent to many receivers."""

from __future__ import annotations

import pickle
from typing import Any, NoReturn

import torch

from aiotorchio.common.torch_private import real_tensors, skipped_data
from aiotorchio.engine.send import Prepared, prepare
from aiotorchio.engine.thresholds import INLINE_ROWS
from aiotorchio.graph.copies import copied
from aiotorchio.graph.flatten import Flattened, flatten
from aiotorchio.memory.device_copy import DeviceCopier
from aiotorchio.wire.header import CHUNK_SIZE_MIN

__all__ = ["Snapshot", "snapshot"]


class Snapshot:
    """A state as it was at one moment; ``snapshot`` takes it.

    Any number of saves can send it, at once or one after the other: ``save_to_stream``, ``save``
    and ``iter_bytes`` take it in the place of the state. None of them copies or takes apart
    anything. Each message has an id of its own.

    Attributes:
        nbytes: Memory of the copies.
    """

    def __init__(self, flattened: Flattened, copier: DeviceCopier) -> None:
        self._flattened = flattened
        self._copier = copier
        self.nbytes = sum(row.nbytes for row in flattened.header.storages)

    @property
    def codec(self) -> str:
        """``"tree"`` or ``"pickle"``, as in ``Summary``."""
        return self._flattened.header.codec

    @property
    def is_small(self) -> bool:
        """Whether it takes no longer to get ready than a worker thread takes to start."""
        header = self._flattened.header
        return max(len(header.tensors), len(header.storages)) <= INLINE_ROWS

    def prepared(self, **options: Any) -> Prepared:
        """What one save sends; the options are those of ``Flattened.for_message``."""
        return prepare(self._flattened.for_message(**options), lambda: self._copier)

    def __repr__(self) -> str:
        tensors = len(self._flattened.header.tensors)
        return f"<Snapshot of {tensors} tensors, {self.nbytes} bytes>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Snapshot is sent on its own, not as a part of another object")


def snapshot(
    state: object,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    pickle_module: Any = pickle,
    pickle_protocol: int = 2,
) -> Snapshot:
    """Copy a state once, to send it to many receivers while it changes.

    The copy is made before this returns, and nobody, such as another thread, may change the state
    until then: on the host at the speed of a copy into fresh memory (some 0.6 s a GiB), on a device
    in the order of its current stream. Call it in a thread of its own where an event loop must go
    on: ``await asyncio.to_thread(aiotorchio.snapshot, state)``. Tensors that share memory share it
    in the copy, too, so tied weights stay tied. The copies are free when the snapshot is.

    Args:
        state: Anything that ``save_to_stream`` takes.
        dtype: A dtype of floating-point numbers. Tensors of such numbers become it, if they have a
            name (``Message.tensors``) and their storage is not shown under other dtypes; all else
            stays as it is. None: as in the state.
        device: Where the copies are, and where receivers put them by default. None: where the
            tensors are.
        pickle_module: As in ``save_to_stream``.
        pickle_protocol: As in ``save_to_stream``.

    Returns:
        The snapshot.

    Raises:
        TypeError: Not a dtype, or not a device.
        ValueError: A dtype that is not of floating-point numbers; or inside of ``skip_data``.
        RuntimeError: A tensor was changed while it was copied; or a device that is not there.
        Exception: What ``pickle_module`` raises for an object it cannot pickle.

    Example:
        >>> import io, torch, aiotorchio
        >>> weight = torch.ones(2)
        >>> taken = aiotorchio.snapshot({"w": weight}, dtype=torch.bfloat16)
        >>> _ = weight.zero_()
        >>> for file in (io.BytesIO(), io.BytesIO()):
        ...     _ = aiotorchio.save(taken, file), file.seek(0)
        ...     print(aiotorchio.load(file))
        {'w': tensor([1., 1.], dtype=torch.bfloat16)}
        {'w': tensor([1., 1.], dtype=torch.bfloat16)}
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is a torch.dtype, not {dtype!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is one of floating-point numbers, not {dtype}")
    if device is not None and not isinstance(device, torch.device | str):
        raise TypeError(f"device is a torch.device or its name, not {device!r}")
    if skipped_data() is not None:
        raise ValueError("a snapshot has no meaning inside of skip_data")
    with real_tensors():
        flattened = flatten(
            state,
            chunk_size=CHUNK_SIZE_MIN,
            metadata={},
            producer="",
            pickle_module=pickle_module,
            pickle_protocol=pickle_protocol,
        )
        copies = copied(
            flattened, dtype=dtype, device=None if device is None else torch.device(device)
        )
        # What copies them from a device later waits for what is queued there now.
        return Snapshot(copies, DeviceCopier(until_now=True))
