"""Where the storages of a message go: ``map_location``, as ``torch.load`` has it."""

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
# Each takes about 50 us to look up.
_LOCATIONS_MAX = 256

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Destination:
    """Of all storages with one location.

    Attributes:
        device: Where their bytes are received, or the error that says why they can't be.
        restore: Takes each storage, once it was received, where it belongs; None: it is there.
    """

    device: torch.device | InvalidObjectError
    restore: Callable[[torch.UntypedStorage], torch.UntypedStorage] | None = None


class DeviceMap:
    """Where each storage of a message goes.

    To be made in the caller's thread: there, ``"cuda"`` is the device that is current.

    Args:
        header: A valid header.
        map_location: A callable gets every storage after it was received on the CPU, and so do
            restorers that were registered with ``torch.serialization.register_package``. Anything
            else is known now, and the bytes go there straight away.
        fake: Only name the devices: this machine need not have them.

    Attributes:
        relocates: Whether ``relocate`` may have anything to do.

    Raises:
        TypeError: ``map_location`` is none of the types that it may be.
        LimitExceeded: More locations than any machine has.
    """

    def __init__(self, header: Header, map_location: MapLocation, *, fake: bool = False) -> None:
        known = torch.device if fake else known_location
        tags = set(header.locations)
        if len(tags) > _LOCATIONS_MAX:
            raise LimitExceeded(
                f"{len(tags)} different locations, {_LOCATIONS_MAX} allowed", entry="header"
            )
        of_tag = {tag: _destination(tag, map_location, known) for tag in tags}
        self._rows = header.storages
        self._of_location = [of_tag[tag] for tag in header.locations]
        self.relocates = any(place.restore is not None for place in self._of_location)

    def device(self, index: int) -> torch.device:
        """Where the bytes of a storage are received.

        Raises:
            InvalidObjectError: This machine does not have its location; in torch's words.
        """
        device = self._of_location[self._rows[index].location].device
        if isinstance(device, InvalidObjectError):
            raise device
        return device

    def relocate(self, index: int, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Take a storage that was received where it belongs; runs code of the caller's.

        Raises:
            InvalidObjectError: A location that this machine does not have, in torch's words.
            ValueError: The caller's code returned a storage of another size.
        """
        restore = self._of_location[self._rows[index].location].restore
        return storage if restore is None else restore(storage)


def _destination(
    tag: str, map_location: MapLocation, known: Callable[[str], torch.device | None]
) -> _Destination:
    if tag == META_LOCATION:
        # Without bytes there is nothing to put elsewhere: as in torch, meta stays meta.
        return _Destination(torch.device(META_LOCATION))
    if callable(map_location):
        place = map_location
        return _Destination(_CPU, lambda storage: _placed(storage, tag, place(storage, tag)))
    if map_location is None:
        location = tag
    elif isinstance(map_location, str | torch.device):
        location = str(map_location)
    elif isinstance(map_location, Mapping):
        location = str(map_location.get(tag, tag))
    else:
        raise TypeError(f"map_location is a device, str, dict or callable, not {map_location!r}")
    try:
        device = _in_torchs_words(location, lambda: known(location))
    except InvalidObjectError as error:
        # To be raised if a storage is needed there.
        return _Destination(error)
    if device is not None:
        return _Destination(device)
    return _Destination(_CPU, lambda storage: _restored(storage, location))


def _placed(
    storage: torch.UntypedStorage,
    tag: str,
    placed: torch.UntypedStorage | torch.TypedStorage | None,
) -> torch.UntypedStorage:
    """What a callable ``map_location`` has returned."""
    if placed is None:
        return _restored(storage, tag)
    # torch.load takes typed storages too, such as storage.cuda() of older code.
    untyped = untyped_storage_of(placed) if isinstance(placed, torch.TypedStorage) else placed
    if not isinstance(untyped, torch.UntypedStorage):
        raise TypeError(f"map_location returned {type(placed).__name__}, not a storage")
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
        raise TypeError(f"{type(restored).__name__}, not a storage, restored at {location!r}")
    if restored.nbytes() != storage.nbytes():
        raise ValueError(
            f"{restored.nbytes()} bytes were restored at {location!r} from a storage of "
            f"{storage.nbytes()}"
        )
    return restored


def _in_torchs_words(location: str, restore: Callable[[], T]) -> T:
    """Run a restorer; what it raises becomes one of our errors, with torch's text."""
    try:
        return restore()
    except (RuntimeError, ValueError, AttributeError, AssertionError) as error:
        raise InvalidObjectError(
            f"location {location!r} is not on this machine (map_location can say another one); "
            f"torch says: {error}",
            entry="header",
        ) from error
