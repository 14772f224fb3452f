"""Where the storages of a message go: ``map_location``, as ``torch.load`` has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from aiotorchio.errors import InvalidObjectError
from aiotorchio.graph._torch import untyped_storage_of
from aiotorchio.wire.header import META_LOCATION, Header

__all__ = ["MapLocation", "destinations", "relocate"]

MapLocation = (
    torch.device
    | str
    | Mapping[str, str]
    | Callable[[torch.UntypedStorage, str], torch.UntypedStorage | torch.TypedStorage | None]
    | None
)

_CPU = torch.device("cpu")


def destinations(
    header: Header, map_location: MapLocation
) -> list[torch.device | InvalidObjectError]:
    """Where the bytes of each storage are received.

    Args:
        header: A valid header.
        map_location: A callable gets every storage after it was received on the CPU; anything
            else is known now, and the bytes go there straight away.

    Returns:
        One device for each storage. If this machine does not have it, the error that says so: it
        is to be raised if the storage is needed there.

    Raises:
        TypeError: ``map_location`` is none of the types that it may be.
    """
    devices: list[torch.device | InvalidObjectError] = []
    for tag in header.locations:
        if tag == META_LOCATION:
            # Without bytes there is nothing to put elsewhere: as in torch, meta stays meta.
            devices.append(torch.device(META_LOCATION))
            continue
        try:
            devices.append(_destination(tag, map_location))
        except InvalidObjectError as error:
            devices.append(error)
    return [devices[row.location] for row in header.storages]


def relocate(
    storage: torch.UntypedStorage, tag: str, map_location: MapLocation
) -> torch.UntypedStorage:
    """Let a callable ``map_location`` place a storage that was received on the CPU.

    Args:
        storage: With its bytes, on the CPU.
        tag: Location that it had at the sender.
        map_location: If it returns None, the storage goes where it was at the sender.

    Returns:
        The storage in its place.

    Raises:
        InvalidObjectError: A location that this machine does not have, in torch's words.
        ValueError: The callable returned a storage of another size.
    """
    if not callable(map_location) or tag == META_LOCATION:
        return storage
    placed = map_location(storage, tag)
    if placed is None:
        return storage if tag == "cpu" else _restored(storage, tag)
    # torch.load takes typed storages too, such as storage.cuda() of older code.
    untyped = untyped_storage_of(placed) if isinstance(placed, torch.TypedStorage) else placed
    if untyped.nbytes() != storage.nbytes():
        raise ValueError(
            f"map_location returned {untyped.nbytes()} bytes for a storage of {storage.nbytes()}"
        )
    return untyped


def _destination(tag: str, map_location: MapLocation) -> torch.device:
    if callable(map_location):
        return _CPU
    if map_location is None:
        location = tag
    elif isinstance(map_location, str | torch.device):
        location = str(map_location)
    elif isinstance(map_location, Mapping):
        location = str(map_location.get(tag, tag))
    else:
        raise TypeError(f"map_location is a device, str, dict or callable, not {map_location!r}")
    # torch's own restorers decide, on a storage without bytes: they know every kind of location,
    # and say which device is missing.
    return _CPU if location == "cpu" else _restored(torch.UntypedStorage(0), location).device


def _restored(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
    try:
        restored = torch.serialization.default_restore_location(storage, location)
    except (RuntimeError, ValueError, AttributeError, AssertionError) as error:
        raise InvalidObjectError(
            f"location {location!r} is not on this machine: pass map_location; torch says: {error}",
            entry="header",
        ) from error
    untyped: torch.UntypedStorage = restored
    return untyped
