"""The devices of a message's storages: ``map_location``, as ``torch.load`` has it.

In: a header and the caller's ``map_location``, before the payload. Out: for each storage, the
device that its bytes are received on, and after them the storage at its final location. An
``InvalidObjectError`` means that this machine lacks a location, and has torch's text; a
``TypeError`` or ``ValueError`` means that the caller's code returned something else than a storage
of the same size. ``engine.matching`` makes the map, and ``engine.placement`` and ``engine.finish``
use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from aiotorchio.common.torch_private import known_location, untyped_storage_of
from aiotorchio.errors import InvalidObjectError, LimitExceeded
from aiotorchio.wire.header import META_LOCATION, Header

__all__ = ["DeviceMap", "MapLocation"]

MapLocation = (
    torch.device
    | str
    | Mapping[str, str]
    | Callable[[torch.UntypedStorage, str], torch.UntypedStorage | torch.TypedStorage | None]
    | None
)

_CPU = torch.device("cpu")
# The number of locations that a header may have. Each takes about 50 us to look up.
_LOCATIONS_MAX = 256

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Location:
    """The device of all storages with one location.

    Attributes:
        device: The device that their bytes are received on, or the error if this machine lacks it.
        restore: Moves a received storage to its final location; None: it is there already.
    """

    device: torch.device | InvalidObjectError
    restore: Callable[[torch.UntypedStorage], torch.UntypedStorage] | None = None


class DeviceMap:
    """The device and the final location of each storage of a message.

    It must be made in the caller's thread: ``"cuda"`` is the current device of that thread.

    Args:
        header: A valid header.
        map_location: A callable gets every storage after it was received on the CPU, and so do
            restorers that were registered with ``torch.serialization.register_package``. In all
            other cases the device is known now, and bytes are received there directly.
        fake: Only name the devices: this machine need not have them.

    Attributes:
        relocates: Whether ``relocate`` may move a storage.

    Raises:
        TypeError: ``map_location`` has none of the accepted types.
        LimitExceeded: The header has more locations than any machine.
    """

    def __init__(self, header: Header, map_location: MapLocation, *, fake: bool = False) -> None:
        known = torch.device if fake else known_location
        tags = set(header.locations)
        if len(tags) > _LOCATIONS_MAX:
            raise LimitExceeded(
                f"the header has {len(tags)} different locations, but at most {_LOCATIONS_MAX} "
                "are allowed",
                entry="header",
            )
        of_tag = {tag: _location_of(tag, map_location, known) for tag in tags}
        self._rows = header.storages
        self._of_location = [of_tag[tag] for tag in header.locations]
        self.relocates = any(each.restore is not None for each in self._of_location)

    def device(self, index: int) -> torch.device:
        """Return the device that the bytes of a storage are received on.

        Raises:
            InvalidObjectError: This machine lacks the location; the error has torch's text.
        """
        device = self._of_location[self._rows[index].location].device
        if isinstance(device, InvalidObjectError):
            raise device
        return device

    def relocate(self, index: int, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Move a received storage to its final location; this can run code of the caller.

        Raises:
            InvalidObjectError: This machine lacks the location; the error has torch's text.
            ValueError: The caller's code returned a storage of another size.
        """
        restore = self._of_location[self._rows[index].location].restore
        return storage if restore is None else restore(storage)


def _location_of(
    tag: str, map_location: MapLocation, known: Callable[[str], torch.device | None]
) -> _Location:
    if tag == META_LOCATION:
        # As in torch: storages on meta have no bytes, so they stay on meta.
        return _Location(torch.device(META_LOCATION))
    if callable(map_location):
        relocate = map_location
        return _Location(_CPU, lambda storage: _placed(storage, tag, relocate(storage, tag)))
    if map_location is None:
        location = tag
    elif isinstance(map_location, str | torch.device):
        location = str(map_location)
    elif isinstance(map_location, Mapping):
        location = str(map_location.get(tag, tag))
    else:
        raise TypeError(
            "map_location must be a torch.device, a str, a dict, a callable or None, not "
            f"{map_location!r}"
        )
    try:
        device = _in_torchs_words(location, lambda: known(location))
    except InvalidObjectError as error:
        # Raised when the device of a storage is needed.
        return _Location(error)
    if device is not None:
        return _Location(device)
    return _Location(_CPU, lambda storage: _restored(storage, location))


def _placed(
    storage: torch.UntypedStorage,
    tag: str,
    placed: torch.UntypedStorage | torch.TypedStorage | None,
) -> torch.UntypedStorage:
    """Return the storage that a callable ``map_location`` has returned, after checks."""
    if placed is None:
        return _restored(storage, tag)
    # torch.load takes typed storages too, such as storage.cuda() of older code.
    untyped = untyped_storage_of(placed) if isinstance(placed, torch.TypedStorage) else placed
    if not isinstance(untyped, torch.UntypedStorage):
        raise TypeError(f"map_location returned a {type(placed).__name__}, not a storage")
    if untyped.nbytes() != storage.nbytes():
        raise ValueError(
            f"map_location returned {untyped.nbytes()} bytes for a storage of {storage.nbytes()}"
        )
    return untyped


def _restored(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
    restored = _in_torchs_words(
        location, lambda: torch.serialization.default_restore_location(storage, location)
    )
    if not isinstance(restored, torch.UntypedStorage):
        raise TypeError(
            "a restorer of torch.serialization.register_package returned a "
            f"{type(restored).__name__}, not a storage, for location {location!r}"
        )
    if restored.nbytes() != storage.nbytes():
        raise ValueError(
            "a restorer of torch.serialization.register_package returned "
            f"{restored.nbytes()} bytes for a storage of {storage.nbytes()}, for location "
            f"{location!r}"
        )
    return restored


def _in_torchs_words(location: str, restore: Callable[[], T]) -> T:
    """Run a restorer; its errors become an ``InvalidObjectError`` with torch's text."""
    try:
        return restore()
    except (RuntimeError, ValueError, AttributeError, AssertionError) as error:
        raise InvalidObjectError(
            f"this machine lacks the location {location!r}; map_location can map it to another "
            f"one. torch says: {error}",
            entry="header",
        ) from error
