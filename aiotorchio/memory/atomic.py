"""All or nothing: what arrives waits in memory of its own until it is whole.

``Exchange`` makes that memory for one message, and exchanges its bytes with those of the
destinations, which stay where they are. ``BufferSwap`` takes memory that is kept from message to
message (``BackMemory``), and exchanges the memory itself: nothing is copied. Both have ``shadows``,
which take the bytes until then: one for each destination, tied ones in common.
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
from aiotorchio.memory.routes import CARRIERS, alias, copy_elements, memory_of, moved, placement_of

__all__ = ["BackMemory", "BufferSwap", "Exchange", "note_change"]

# Bytes that are exchanged at a time.
_STEP = 4 * 2**20


def note_change(tensors: Iterable[torch.Tensor]) -> None:
    """Tell autograd of a change behind its back: else it would compute with the wrong numbers."""
    torch.autograd.graph.increment_version(
        [tensor for tensor in tensors if not tensor.is_inference()]
    )


class _Places:
    """Where tensors are, to see whether they still are."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self.each: list[Any] = [placement_of(tensor) for tensor in tensors]

    def check(self) -> None:
        if [placement_of(tensor) for tensor in self._tensors] != self.each:
            raise moved()


class Exchange:
    """Takes as much fresh memory as the destinations have.

    Args:
        tensors: The destinations: strided, of elements that do not overlap.
        copier: Moves bytes on the device of a tensor.
    """

    needs_prepare = is_instant = False

    def __init__(self, tensors: Sequence[torch.Tensor], copier: Copier) -> None:
        self._tensors = tensors
        self._copier = copier
        self._places = _Places(tensors)
        made: dict[object, torch.Tensor] = {}
        # Each destination and its shadow, as their bytes are exchanged. Made here, not at the
        # change, which others wait for.
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.shadows = []
        for tensor in interruptible(tensors, 100):
            memory = memory_of(tensor)
            if memory not in made:
                made[memory] = _like(tensor)
                if tensor.numel():
                    self._pairs.append(_aligned(tensor, made[memory]))
            self.shadows.append(made[memory])
        # What was exchanged, and what is on its way with the bytes that were there before.
        self._done: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._half: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def tables(self) -> list[list[Any]]:
        """What is as long as the destinations are many, and of no use behind the change."""
        return [self.shadows, self._pairs, self._done, self._places.each]

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def apply(self) -> None:
        """Exchange the bytes of each destination with those of its shadow."""
        self._places.check()
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

    def note(self) -> None:
        """There is nothing to note."""

    def finish(self) -> Iterator[None]:
        """There is nothing more to do."""
        return iter(())

    def restore(self) -> None:
        """There is nothing more to undo."""

    def undo(self) -> None:
        """Put the bytes back that were there, which are in the shadows now.

        Without effect if nothing was exchanged. If it is interrupted, it can be called again.
        """
        if self._half is None and not self._done:
            return
        copy = self._copier.copy
        if self._half is not None:
            copy(*self._half)
        for destination, shadow in reversed(self._done):
            copy(destination, shadow)
        # The new bytes may have been read since the release of the lock.
        note_change(self._tensors)
        self._done, self._half = [], None


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same layout, if that has no gaps, else a contiguous one."""
    dense = order_of(tensor.shape, tensor.stride()).dense
    stride = tensor.stride() if dense else torch.empty(tensor.shape, device="meta").stride()
    with torch.inference_mode(False):
        return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)


def _aligned(tensor: torch.Tensor, shadow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain tensors over the memory of two tensors of one shape, in the first one's order."""
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
    """Two tensors of one shape in pieces that are small enough to be set aside."""
    count, step = destination.numel(), _STEP // destination.element_size()
    if count <= step:
        yield destination, source
        return
    for start in range(0, count, step):
        for box in boxes(destination.shape, start, min(start + step, count)):
            yield destination[box], source[box]


class BackMemory:
    """The second set of memory of tensors that are double-buffered.

    It is made when the first message comes, and used by one message at a time: between ``claim``
    and ``release``.
    """

    def __init__(self) -> None:
        # The load that uses it, by process: in one that was forked meanwhile, none does.
        self._users: dict[int, object] = {}
        # Where the storage of a tensor is -> the storage that will take its place.
        self._behind: dict[object, torch.UntypedStorage] = {}

    def claim(self) -> None:
        """Begin with a message.

        Raises:
            RuntimeError: Another message is using this memory.
        """
        user = object()
        if self._users.setdefault(os.getpid(), user) is not user:
            raise RuntimeError("another load is using this DoubleBuffer")

    def release(self) -> None:
        """The end of a message."""
        self._users.pop(os.getpid(), None)

    def swap(
        self, tensors: Sequence[torch.Tensor], received: Sequence[torch.Tensor], copier: Copier
    ) -> BufferSwap:
        """Get the memory ready for the message that has claimed it.

        Args:
            tensors: All that are double-buffered.
            received: Those of them that the message has.
            copier: Moves bytes on the device of a tensor.
        """
        storages = {_key(each.untyped_storage()): each.untyped_storage() for each in tensors}
        moving = {_key(each.untyped_storage()) for each in received}
        behind = {
            key: storage
            for key, storage in self._behind.items()
            # Not what one of them shows: a view may have been left behind by a swap.
            if key in storages and _key(storage) not in storages
        }
        for key in moving - behind.keys():
            front = storages[key]
            behind[key] = torch.UntypedStorage(front.nbytes(), device=front.device)
        self._behind = behind
        return BufferSwap(tensors, received, behind, self._note, copier)

    def _note(self, moved: Iterable[tuple[torch.UntypedStorage, torch.UntypedStorage]]) -> None:
        """Note pairs of storages that are in front now, and behind."""
        for front, behind in moved:
            self._behind.pop(_key(behind), None)
            self._behind[_key(front)] = behind


def _key(storage: torch.UntypedStorage) -> object:
    return storage.device, storage.data_ptr(), storage.nbytes()


class BufferSwap:
    """Lets tensors show other memory: takes microseconds a tensor, whatever its size.

    What is in a storage beside the tensors that are received is copied: all tensors over it move.

    Args:
        tensors: All that may show the storages of those that are received.
        received: Those whose bytes arrive.
        behind: For the key of each storage the one to put in its place.
        note: Is told which storages have changed places.
        copier: Moves bytes on the device of a tensor.
    """

    is_instant = True

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        received: Sequence[torch.Tensor],
        behind: dict[object, torch.UntypedStorage],
        note: Callable[[Iterable[tuple[torch.UntypedStorage, torch.UntypedStorage]]], None],
        copier: Copier,
    ) -> None:
        covered: dict[object, list[tuple[int, int]]] = {}
        for tensor in received:
            covered.setdefault(_key(tensor.untyped_storage()), []).extend(_range(tensor))
        self._tensors = [each for each in tensors if _key(each.untyped_storage()) in covered]
        self._places = _Places(self._tensors)
        fronts = {_key(each.untyped_storage()): each.untyped_storage() for each in self._tensors}
        self._pairs = [(front, behind[key]) for key, front in fronts.items()]
        self._before = [_shown(each, each.untyped_storage()) for each in self._tensors]
        self._after = [_shown(each, behind[_key(each.untyped_storage())]) for each in self._tensors]
        self.shadows = []
        # What leaves gaps in its storage waits elsewhere, until the gaps are filled around it.
        gaps = {_key(each.untyped_storage()) for each in received if not _range(each)}
        scattered: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}
        for each in received:
            key, memory = _key(each.untyped_storage()), memory_of(each)
            view = _over(each, behind[key])
            if key in gaps:
                # One for tied tensors, where the last of them is.
                pair = scattered.pop(memory) if memory in scattered else (view, _like(each))
                scattered[memory], view = pair, pair[1]
            self.shadows.append(view)
        self._scattered = list(scattered.values())
        # What the message does not have: copied when it is whole, because its owner may change it
        # until then.
        self._rest = [
            (bytes_of(behind[key])[start:end], bytes_of(front)[start:end])
            for key, front in fronts.items()
            for start, end in _gaps(covered[key], front.nbytes())
        ]
        self.needs_prepare = bool(self._rest or self._scattered)
        self._note, self._copier = note, copier
        self._changing = False

    @property
    def tables(self) -> list[list[Any]]:
        """What is as long as the destinations are many, and of no use behind the change."""
        lists: list[list[Any]] = [
            self.shadows,
            self._before,
            self._after,
            self._rest,
            self._scattered,
        ]
        return [*lists, self._pairs, self._places.each]

    def prepare(self) -> None:
        """Complete the memory behind the tensors with what the message does not have."""
        self._places.check()
        for destination, source in self._rest:
            check_interrupt()
            self._copier.copy(destination, source)
        for destination, source in self._scattered:
            copy_elements(destination, source, self._copier)

    def apply(self) -> None:
        """Let each tensor show the memory behind it."""
        self._places.check()
        self._changing = True
        self._show(self._after)
        self._note(self._pairs_now())

    def _pairs_now(self) -> list[tuple[torch.UntypedStorage, torch.UntypedStorage]]:
        return [(other, front) for front, other in self._pairs]

    def note(self) -> None:
        """There is nothing to note."""

    def finish(self) -> Iterator[None]:
        """There is nothing more to do."""
        return iter(())

    def restore(self) -> None:
        """There is nothing more to undo."""

    def undo(self) -> None:
        """Let each tensor show the memory again that it had.

        Without effect if nothing was swapped. If it is interrupted, it can be called again.
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
    """The same view of another storage."""
    offset = int(tensor.storage_offset())
    return alias(storage, tensor.dtype, offset, tensor.shape, tensor.stride())


def _shown(tensor: torch.Tensor, storage: torch.UntypedStorage) -> Callable[[], None]:
    """What lets a tensor show another storage; all that takes long is done before."""
    offset, shape, stride = int(tensor.storage_offset()), tensor.shape, tensor.stride()
    if not (tensor.is_inference() or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized):
        other = alias(storage, tensor.dtype, offset, shape, stride)

        def show() -> None:
            tensor.data = other

    else:
        # Slower, but keeps all that is not in a plain alias.
        def show() -> None:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.set_(storage, offset, shape, stride)

    return show


def _range(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """The bytes of a storage that a tensor fills, if it leaves no gaps between them."""
    order = order_of(tensor.shape, tensor.stride())
    start = first_byte(tensor)
    return [(start, start + order.extent * tensor.element_size())] if order.dense else []


def _gaps(ranges: list[tuple[int, int]], nbytes: int) -> Iterator[tuple[int, int]]:
    """What of so many bytes is in none of the ranges."""
    reached = 0
    for start, end in [*sorted(ranges), (nbytes, nbytes)]:
        if start > reached:
            yield reached, start
        reached = max(reached, end)
