"""Staged loads: the payload is received into shadows, and the targets change after its end.

In: the targets of a load. Out: a shadow for each target (one for all tied targets), and ``apply``
and ``undo`` for the commit, which calls them. A ``MismatchError`` means that the caller changed a
target during the load.

``Exchange`` allocates shadows for one message and exchanges their bytes with those of the targets,
which keep their memory. ``BufferSwap`` uses memory that exists from message to message
(``BackMemory``) and exchanges the memory: only bytes that the message does not have are copied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.common.strides import boxes, order_of
from aiotorchio.memory.device_copy import Copier, bytes_of
from aiotorchio.memory.host import first_byte
from aiotorchio.memory.memory_state import has_state, memory_state, moved, tie_key
from aiotorchio.memory.routes import CARRIERS, alias, copy_elements

__all__ = ["BackMemory", "BufferSwap", "Exchange", "note_change"]

# Bytes that are exchanged at a time.
_STEP = 4 * 2**20


def note_change(tensors: Iterable[torch.Tensor]) -> None:
    """Note a change for autograd, which would otherwise compute with the wrong numbers."""
    torch.autograd.graph.increment_version(
        [tensor for tensor in tensors if not tensor.is_inference()]
    )


class _MemoryStates:
    """The memory of tensors at one moment, to find out later whether it is still theirs."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self.each = [memory_state(tensor) for tensor in tensors]

    def check(self) -> None:
        if not all(map(has_state, self._tensors, self.each)):
            raise moved()


class Exchange:
    """A commit that exchanges bytes; its shadows take as much new memory as the targets have.

    Args:
        tensors: The targets: strided, of elements that do not overlap.
        copier: Copies bytes on the device of a tensor.
    """

    needs_prepare = is_instant = False

    def __init__(self, tensors: Sequence[torch.Tensor], copier: Copier) -> None:
        self._tensors = tensors
        self._copier = copier
        self._memory_states = _MemoryStates(tensors)
        made: dict[object, torch.Tensor] = {}
        # Aliases of each target and its shadow, for the exchange. They are made here, because the
        # commit holds the caller's lock.
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.shadows = []
        for tensor in interruptible(tensors, 100):
            memory = tie_key(tensor)
            if memory not in made:
                made[memory] = _like(tensor)
                if tensor.numel():
                    self._pairs.append(_aligned(tensor, made[memory]))
            self.shadows.append(made[memory])
        # The pairs that were exchanged, and the one half-exchanged target with its old bytes.
        self._done: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._half: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def tables(self) -> list[list[Any]]:
        """Lists with an entry for each target, which can be released after the commit."""
        return [self.shadows, self._pairs, self._done, self._memory_states.each]

    def prepare(self) -> None:
        """Do nothing: an exchange needs no preparation."""

    def apply(self) -> None:
        """Exchange the bytes of each target with those of its shadow."""
        self._memory_states.check()
        note_change(self._tensors)
        copy = self._copier.copy
        for destination, shadow in (piece for pair in self._pairs for piece in _pieces(*pair)):
            check_interrupt()
            before = torch.empty_like(destination)
            copy(before, destination)
            self._half = (destination, before)
            copy(destination, shadow)
            copy(shadow, before)
            self._done.append((destination, shadow))
            self._half = None

    def keep_state(self) -> None:
        """Do nothing: ``restore`` needs no state."""

    def finish(self) -> Iterator[None]:
        """Do nothing: ``apply`` has done all of the work."""
        return iter(())

    def restore(self) -> None:
        """Do nothing: ``undo`` restores everything."""

    def undo(self) -> None:
        """Copy the old bytes back, which are now in the shadows.

        It has no effect if nothing was exchanged. After an interrupt, it can be called again.
        """
        if self._half is None and not self._done:
            return
        copy = self._copier.copy
        if self._half is not None:
            copy(*self._half)
        for destination, shadow in reversed(self._done):
            copy(destination, shadow)
        # Since the release of the lock, the caller may have computed with the new bytes.
        note_change(self._tensors)
        self._done, self._half = [], None


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Make a tensor of the same layout if that has no gaps, otherwise a contiguous one."""
    dense = order_of(tensor.shape, tensor.stride()).dense
    stride = tensor.stride() if dense else torch.empty(tensor.shape, device="meta").stride()
    with torch.inference_mode(False):
        return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)


def _aligned(tensor: torch.Tensor, shadow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make aliases of two tensors of one shape, in the address order of the first one."""
    order = order_of(tensor.shape, tensor.stride())
    destination, source = (
        alias(
            each.untyped_storage(),
            CARRIERS[each.element_size()],
            int(each.storage_offset()),
            order.shape,
            [each.stride(dim) for dim in order.dims],
        )
        for each in (tensor, shadow)
    )
    return destination, source


def _pieces(
    destination: torch.Tensor, source: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut two tensors of one shape into pieces of at most ``_STEP`` bytes."""
    count, step = destination.numel(), _STEP // destination.element_size()
    if count <= step:
        yield destination, source
        return
    for start in range(0, count, step):
        for box in boxes(destination.shape, start, min(start + step, count)):
            yield destination[box], source[box]


class BackMemory:
    """The second set of memory of double-buffered tensors.

    It is allocated for the first message. One message at a time uses it, from ``claim`` to
    ``release``.
    """

    def __init__(self) -> None:
        # The load that uses it, by process: in a forked process, no load does.
        self._users: dict[int, object] = {}
        # Key of the storage of a tensor -> the storage that will replace it.
        self._back: dict[object, torch.UntypedStorage] = {}

    def claim(self) -> None:
        """Reserve this memory for one message.

        Raises:
            RuntimeError: Another message is using this memory.
        """
        user = object()
        if self._users.setdefault(os.getpid(), user) is not user:
            raise RuntimeError(
                "another load is using this DoubleBuffer: one load at a time may use it"
            )

    def release(self) -> None:
        """Free this memory for the next message."""
        self._users.pop(os.getpid(), None)

    def swap(
        self, tensors: Sequence[torch.Tensor], received: Sequence[torch.Tensor], copier: Copier
    ) -> BufferSwap:
        """Make the commit of the message that has claimed this memory.

        Args:
            tensors: All double-buffered tensors.
            received: The tensors that the message has.
            copier: Copies bytes on the device of a tensor.
        """
        storages = {_key(each.untyped_storage()): each.untyped_storage() for each in tensors}
        moving = {_key(each.untyped_storage()) for each in received}
        back = {
            key: storage
            for key, storage in self._back.items()
            # A storage that a tensor shows is not used: a swap may have missed a view.
            if key in storages and _key(storage) not in storages
        }
        for key in moving - back.keys():
            front = storages[key]
            back[key] = torch.UntypedStorage(front.nbytes(), device=front.device)
        self._back = back
        return BufferSwap(tensors, received, back, self._note, copier)

    def _note(self, moved: Iterable[tuple[torch.UntypedStorage, torch.UntypedStorage]]) -> None:
        """Note pairs of a storage that tensors show now and the storage that they showed before."""
        for front, back in moved:
            self._back.pop(_key(back), None)
            self._back[_key(front)] = back


def _key(storage: torch.UntypedStorage) -> object:
    return storage.device, storage.data_ptr(), storage.nbytes()


class BufferSwap:
    """A commit that points tensors to other memory: microseconds for a tensor of any size.

    All tensors over a storage move. So the bytes of the storage that the message does not have are
    copied.

    Args:
        tensors: All tensors that may be over the storages of received tensors.
        received: The tensors that the message has.
        back: Key of a storage -> the storage that replaces it.
        note: Called with the pairs of storages that were exchanged.
        copier: Copies bytes on the device of a tensor.
    """

    is_instant = True

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        received: Sequence[torch.Tensor],
        back: dict[object, torch.UntypedStorage],
        note: Callable[[Iterable[tuple[torch.UntypedStorage, torch.UntypedStorage]]], None],
        copier: Copier,
    ) -> None:
        covered: dict[object, list[tuple[int, int]]] = {}
        for tensor in received:
            covered.setdefault(_key(tensor.untyped_storage()), []).extend(_range(tensor))
        self._tensors = [each for each in tensors if _key(each.untyped_storage()) in covered]
        self._memory_states = _MemoryStates(self._tensors)
        fronts = {_key(each.untyped_storage()): each.untyped_storage() for each in self._tensors}
        self._pairs = [(front, back[key]) for key, front in fronts.items()]
        self._before = [_shown(each, each.untyped_storage()) for each in self._tensors]
        self._after = [_shown(each, back[_key(each.untyped_storage())]) for each in self._tensors]
        self.shadows = []
        # The storages of tensors with gaps. Tensors over them get separate shadows, since the gaps
        # hold other bytes.
        gapped = {_key(each.untyped_storage()) for each in received if not _range(each)}
        scattered: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}
        for each in received:
            key, memory = _key(each.untyped_storage()), tie_key(each)
            view = _over(each, back[key])
            if key in gapped:
                # One pair for tied tensors, at the place of the last one, as if each were copied.
                pair = scattered.pop(memory) if memory in scattered else (view, _like(each))
                scattered[memory], view = pair, pair[1]
            self.shadows.append(view)
        self._scattered = list(scattered.values())
        # The bytes that the message does not have. They are copied after its end, because the
        # caller may change them until then.
        self._rest = [
            (bytes_of(back[key])[start:end], bytes_of(front)[start:end])
            for key, front in fronts.items()
            for start, end in _missing_ranges(covered[key], front.nbytes())
        ]
        self.needs_prepare = bool(self._rest or self._scattered)
        self._note, self._copier = note, copier
        self._changing = False

    @property
    def tables(self) -> list[list[Any]]:
        """Lists with an entry for each target, which can be released after the commit."""
        lists: list[list[Any]] = [
            self.shadows,
            self._before,
            self._after,
            self._rest,
            self._scattered,
        ]
        return [*lists, self._pairs, self._memory_states.each]

    def prepare(self) -> None:
        """Copy the bytes that the message does not have into the new memory."""
        self._memory_states.check()
        for destination, source in self._rest:
            check_interrupt()
            self._copier.copy(destination, source)
        for destination, source in self._scattered:
            copy_elements(destination, source, self._copier)

    def apply(self) -> None:
        """Point each tensor to its new memory."""
        self._memory_states.check()
        self._changing = True
        self._show(self._after)
        self._note(self._pairs_now())

    def _pairs_now(self) -> list[tuple[torch.UntypedStorage, torch.UntypedStorage]]:
        return [(other, front) for front, other in self._pairs]

    def keep_state(self) -> None:
        """Do nothing: ``restore`` needs no state."""

    def finish(self) -> Iterator[None]:
        """Do nothing: ``apply`` has done all of the work."""
        return iter(())

    def restore(self) -> None:
        """Do nothing: ``undo`` restores everything."""

    def undo(self) -> None:
        """Point each tensor to its old memory again.

        It has no effect if nothing was swapped. After an interrupt, it can be called again.
        """
        if self._changing:
            self._show(self._before)
            self._note(self._pairs)
            self._changing = False

    def _show(self, memory: list[Callable[[], None]]) -> None:
        for show in memory:
            show()
        note_change(self._tensors)


def _over(tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    """Return the same view of another storage."""
    offset = int(tensor.storage_offset())
    return alias(storage, tensor.dtype, offset, tensor.shape, tensor.stride())


def _shown(tensor: torch.Tensor, storage: torch.UntypedStorage) -> Callable[[], None]:
    """Make a function that points a tensor to another storage; the slow part is done here."""
    offset, shape, stride = int(tensor.storage_offset()), tensor.shape, tensor.stride()
    if not (tensor.is_inference() or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized):
        other = alias(storage, tensor.dtype, offset, shape, stride)

        def show() -> None:
            tensor.data = other

    else:
        # This is slower, but keeps properties that an alias does not have.
        def show() -> None:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.set_(storage, offset, shape, stride)

    return show


def _range(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Return the range of bytes that a tensor fills, or nothing if it has gaps."""
    order = order_of(tensor.shape, tensor.stride())
    start = first_byte(tensor)
    return [(start, start + order.extent * tensor.element_size())] if order.dense else []


def _missing_ranges(ranges: list[tuple[int, int]], nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of the first ``nbytes`` bytes that are in none of the given ranges."""
    reached = 0
    for start, end in [*sorted(ranges), (nbytes, nbytes)]:
        if start > reached:
            yield reached, start
        reached = max(reached, end)
