"""``snapshot``: a state that is copied once, and sent to many receivers.

In: any object that a save accepts. Out: a ``Snapshot``, which saves accept in place of the state.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from aiotorchio.common.torch_private import real_tensors, skipped_data
from aiotorchio.engine.thresholds import INLINE_ROWS
from aiotorchio.graph.copies import copied
from aiotorchio.graph.flatten import Flattened, flatten
from aiotorchio.memory.device_copy import DeviceCopier
from aiotorchio.wire.header import CHUNK_SIZE_MIN

__all__ = ["Snapshot", "snapshot"]


class Snapshot:
    """A state as it was at one moment; ``snapshot`` makes it.

    Any number of saves can send it, at once or one after the other: ``save_to_stream``, ``save``
    and ``iter_bytes`` accept it in place of the state. None of them copies or takes apart anything.
    Each message has a different id.

    Attributes:
        nbytes: Memory of the copies.
        copier: The copier that brings copies from their devices to the host, for all saves.
    """

    def __init__(self, flattened: Flattened, copier: DeviceCopier) -> None:
        self._flattened = flattened
        self.copier = copier
        self.nbytes = sum(row.nbytes for row in flattened.header.storages)

    @property
    def codec(self) -> str:
        """``"tree"`` or ``"pickle"``, as in ``Summary``."""
        return self._flattened.header.codec

    @property
    def is_small(self) -> bool:
        """Whether a save of it is prepared faster than a worker thread starts."""
        header = self._flattened.header
        return max(len(header.tensors), len(header.storages)) <= INLINE_ROWS

    def for_message(
        self, *, chunk_size: int, metadata: Mapping[str, str], producer: str
    ) -> Flattened:
        """Return the parts for one more message; see ``flatten`` for the arguments."""
        return self._flattened.for_message(
            chunk_size=chunk_size, metadata=metadata, producer=producer
        )

    def __repr__(self) -> str:
        tensors = len(self._flattened.header.tensors)
        return f"<Snapshot of {tensors} tensors, {self.nbytes} bytes>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Snapshot must be saved by itself, not as a part of another object")


def snapshot(
    state: object,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    pickle_module: Any = pickle,
    pickle_protocol: int = 2,
) -> Snapshot:
    """Copy a state once, to send it to many receivers while it changes.

    The copy is made before this returns, and no other thread may change the state until then: on
    the host at the speed of a copy into fresh memory (some 0.6 s a GiB), on a device in the order
    of its current stream. Call it in another thread if an event loop must go on:
    ``await asyncio.to_thread(aiotorchio.snapshot, state)``. Tensors that share memory share it in
    the copy, too, so tied weights stay tied. The copies are freed together with the snapshot.

    Args:
        state: Any object that ``save_to_stream`` accepts.
        dtype: A floating-point dtype. Floating-point tensors are converted to it, if they have a
            name (``Message.tensors``) and their storage is not shown under other dtypes; all else
            is copied unchanged. None: as in the state.
        device: The device of the copies, to which receivers move them by default. None: the
            devices of the tensors.
        pickle_module: As in ``save_to_stream``.
        pickle_protocol: As in ``save_to_stream``.

    Returns:
        The snapshot.

    Raises:
        TypeError: Not a dtype, or not a device.
        ValueError: Not a floating-point dtype; or a call inside ``skip_data``.
        RuntimeError: A tensor was changed while it was copied; or the device does not exist.
        Exception: The error of ``pickle_module`` for an object that it cannot pickle.

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
        raise TypeError(f"dtype must be a torch.dtype, not {dtype!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, not {dtype}")
    if device is not None and not isinstance(device, torch.device | str):
        raise TypeError(f"device must be a torch.device or its name, not {device!r}")
    if skipped_data() is not None:
        raise ValueError("snapshot cannot copy tensors inside skip_data, which skips numbers")
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
        # Later copies from a device must wait for the work that is queued there now.
        return Snapshot(copies, DeviceCopier(until_now=True))
