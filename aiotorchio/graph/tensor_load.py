"""Destinations that are no view of a memory: sparse, quantized, nested, wrapper subclasses.

In: such tensors of the caller's, and what the object has under their names. They are received as
parts of the object, and copied by torch: the last part of a commit, as what modules load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from aiotorchio.errors import MismatchError
from aiotorchio.graph.modules import has_memory
from aiotorchio.wire.header import META_LOCATION, shortened

# What torch and the code of subclasses raise if they cannot copy (NotImplementedError among them).
_REFUSALS = (RuntimeError, TypeError, ValueError, AssertionError)

# What to do with whole tensors for a model of shards.
_WHOLE = (
    ": load the message without into, and give the dict to torch.distributed.checkpoint.state_dict."
    "set_model_state_dict"
)

__all__ = ["TensorLoad", "is_copied_whole", "kind_of", "spread_misfit"]


def is_copied_whole(tensor: torch.Tensor) -> bool:
    """Whether it takes a whole tensor instead of bytes."""
    if torch.nn.parameter.is_lazy(tensor):
        return False
    return not has_memory(tensor) or tensor.is_quantized


def kind_of(tensor: torch.Tensor) -> str:
    """What a person calls it."""
    name = _class_of(tensor).__name__
    if tensor.is_quantized:
        return f"a quantized {name} ({tensor.dtype}, {tensor.qscheme()})"
    if tensor.layout is not torch.strided:
        return f"a {name} of layout {tensor.layout}"
    if tensor.is_nested:
        return f"a nested {name}"
    mesh, placements, shard = _spread(tensor)
    if mesh is not None:
        where = f" at {shard} of the mesh" if shard else ""
        return f"a {name} on {mesh} with placements {placements}{where}"
    return f"a {name}"


def spread_misfit(received: torch.Tensor | None, destination: torch.Tensor) -> str | None:
    """Why a shard cannot be copied into another one; None if it can, and if neither is a DTensor.

    torch would redistribute one with other placements, in which every rank has to take part, and
    take the shard of another rank for its own.

    Args:
        received: None for a dense tensor of which only the row is known.
        destination: Of any kind.
    """
    one = (None, None, ()) if received is None else _spread(received)
    other = _spread(destination)
    if one == other:
        return None
    kind = "a dense Tensor" if received is None else kind_of(received)
    hint = _WHOLE if one[0] is None or other[0] is None else ""
    return f"{kind} in the message, {kind_of(destination)} in the destination{hint}"


class TensorLoad:
    """Copies what was received into such destinations.

    Args:
        destinations: By name.
        received: By name, as far as the object has them.
        strict: Whether one may be missing.
        staged: Whether the other tensors can be had back.
        rehearsal: Whether the tensors are all on ``meta``, since they have not been received yet.

    Raises:
        MismatchError: One that is missing, or cannot be copied; nothing was changed here.
    """

    def __init__(
        self,
        destinations: Mapping[str, torch.Tensor],
        received: Mapping[str, torch.Tensor],
        *,
        strict: bool,
        staged: bool,
        rehearsal: bool = False,
    ) -> None:
        self._pairs = [(name, destinations[name], each) for name, each in received.items()]
        self._staged = staged
        self._before: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        reasons = {name: _misfit(each, destination) for name, destination, each in self._pairs}
        if not rehearsal:
            on_meta = (name for name, _, each in self._pairs if each.device.type == META_LOCATION)
            reasons |= dict.fromkeys(on_meta, "on meta in the message, without bytes")
        misfits = {name: reason for name, reason in reasons.items() if reason is not None}
        missing = [name for name in destinations if strict and name not in received]
        if misfits or missing:
            lines = [f"does not fit: {shortened(name)}: {why}" for name, why in misfits.items()]
            lines += [f"not in the message: {shortened(name)}" for name in missing]
            raise MismatchError(
                "the object does not fit the destination"
                + self._kept
                + "".join(f"\n    {line}" for line in lines),
                missing=missing,
                misfits=misfits,
            )

    @property
    def has_steps(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._pairs)

    @property
    def _kept(self) -> str:
        return "" if self._staged else " (its tensors are written to: staged=True keeps them)"

    def steps(self) -> Iterator[None]:
        """Copy; between two steps, other tasks may run.

        Raises:
            MismatchError: torch cannot copy one.
        """
        for name, destination, received in self._pairs:
            try:
                with torch.no_grad():
                    self._before.append((name, destination, destination.detach().clone()))
                    destination.copy_(received)
            except _REFUSALS as error:
                raise MismatchError(
                    f"{kind_of(received)} could not be copied into the destination{self._kept}: "
                    f"{type(error).__name__}: {error}",
                    entry=shortened(name),
                ) from error
            yield

    def note(self) -> None:
        """Nothing: what is there before is copied when it changes."""

    def restore(self) -> None:
        """Copy back what was there before; without effect otherwise.

        Raises:
            MismatchError: torch cannot; names all that are neither as before nor as in the message.
        """
        failed = []
        for name, destination, value in reversed(self._before):
            try:
                with torch.no_grad():
                    destination.copy_(value)
            except _REFUSALS as error:
                failed.append(f"{shortened(name)}: {type(error).__name__}: {error}")
        # Not before: after an interrupt all of it is done again.
        self._before = []
        if failed:
            raise MismatchError(
                "half applied: these tensors did not take back what they had"
                + "".join(f"\n    {line}" for line in failed)
            )


def _misfit(received: torch.Tensor, destination: torch.Tensor) -> str | None:
    """Why a tensor cannot be copied into another one; None if it can."""
    one, other = kind_of(received), kind_of(destination)
    reason = spread_misfit(received, destination)
    if reason is not None or one != other:
        return reason or f"{one} in the message, {other} in the destination"
    if received.shape != destination.shape:
        return (
            f"shape {list(received.shape)} in the message, {list(destination.shape)} in the "
            "destination"
        )
    if received.dtype != destination.dtype:
        return (
            f"{received.dtype} in the message, {destination.dtype} in the destination (cast=True "
            "is for dense tensors)"
        )
    return None


def _class_of(tensor: torch.Tensor) -> type[torch.Tensor]:
    # Not isinstance, which says yes to parameters of every class.
    return torch.Tensor if issubclass(type(tensor), torch.nn.Parameter) else type(tensor)


def _spread(tensor: torch.Tensor) -> tuple[object, object, object]:
    """Over which devices a DTensor is spread, how, and which part of it is here."""
    # Of other classes, a peer sets the attributes.
    if not type(tensor).__module__.startswith("torch.distributed."):
        return None, None, ()
    mesh: Any = getattr(tensor, "device_mesh", None)
    placements: Any = getattr(tensor, "placements", None)
    if mesh is None or placements is None:
        return None, None, ()
    # A peer's mesh says where the peer is.
    place = mesh.get_coordinate() or ()
    parts = [n for n, each in zip(place, placements, strict=False) if not each.is_replicate()]
    return mesh, placements, tuple(parts)
