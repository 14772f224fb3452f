"""Targets that are not views of a storage: sparse, quantized, nested, wrapper subclasses.

In: such targets, and the received tensors with their names. They are received as parts of the
object, and copied by torch as the last step of a commit, like the entries that modules load. A
``MismatchError`` means that a tensor is missing, or cannot be copied into its target.
``engine.module_commit`` calls it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from aiotorchio.errors import MismatchError
from aiotorchio.graph.modules import has_memory
from aiotorchio.wire.header import META_LOCATION, shortened

# The errors of torch and of subclasses for impossible copies; NotImplementedError is one of them.
_REFUSALS = (RuntimeError, TypeError, ValueError, AssertionError)

# Advice for whole tensors in a message, and shards in the target.
_WHOLE = (
    ": load the message without into, and give the dict to torch.distributed.checkpoint.state_dict."
    "set_model_state_dict"
)

# The state of a target after an error of a load that is not staged.
WRITTEN = " (its tensors were written to; with staged=True they would be as before)"

__all__ = [
    "WRITTEN",
    "TensorLoad",
    "composite_misfit",
    "is_composite_target",
    "kind_of",
    "spread_misfit",
]


def is_composite_target(tensor: torch.Tensor) -> bool:
    """Whether a target takes a whole tensor instead of bytes."""
    if torch.nn.parameter.is_lazy(tensor):
        return False
    return not has_memory(tensor) or tensor.is_quantized


def kind_of(tensor: torch.Tensor) -> str:
    """Return words for the kind of a tensor, for errors."""
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


def spread_misfit(received: torch.Tensor | None, target: torch.Tensor) -> str | None:
    """Return the reason why shards do not match; None if they do, or if neither is a DTensor.

    torch would redistribute a shard with other placements, in which every rank has to take part,
    and would accept the shard of another rank.

    Args:
        received: The received tensor; None for a dense tensor of which only the row is known.
        target: A target of any kind.
    """
    one = (None, None, ()) if received is None else _spread(received)
    other = _spread(target)
    if one == other:
        return None
    kind = "a dense Tensor" if received is None else kind_of(received)
    hint = _WHOLE if one[0] is None or other[0] is None else ""
    return f"{kind} in the message, {kind_of(target)} in the target{hint}"


def composite_misfit(received: torch.Tensor, target: torch.Tensor) -> str:
    """Return the reason why a target that receives bytes has no use for a composite tensor."""
    one, other = kind_of(received), kind_of(target)
    if one != other:
        return f"{one} in the message, {other} in the target"
    return "it is composite in the message, and the target receives the bytes of one row"


class TensorLoad:
    """Copies of received tensors into such targets.

    Args:
        targets: The targets by name.
        received: The received tensors by name; targets without one are left alone.
        strict: Whether each target needs a received tensor.
        staged: Whether the load is staged, so that the other tensors are restored after an error.
        on_meta: Whether all received tensors are on ``meta``, before the payload.

    Raises:
        MismatchError: A tensor is missing, or cannot be copied; nothing was changed.
    """

    def __init__(
        self,
        targets: Mapping[str, torch.Tensor],
        received: Mapping[str, torch.Tensor],
        *,
        strict: bool,
        staged: bool,
        on_meta: bool = False,
    ) -> None:
        self._pairs = [(name, targets[name], each) for name, each in received.items()]
        self._staged = staged
        self._before: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        reasons = {name: _misfit(each, target) for name, target, each in self._pairs}
        if not on_meta:
            without_bytes = (
                name for name, _, each in self._pairs if each.device.type == META_LOCATION
            )
            reasons |= dict.fromkeys(without_bytes, "the sender had it on meta, without bytes")
        received_into: dict[int, tuple[str, torch.Tensor]] = {}
        for name, target, each in self._pairs:
            first, other = received_into.setdefault(id(target), (name, each))
            if other is not each:
                reasons[name] = f"the target is also {shortened(first)!r}, with another tensor"
        misfits = {name: reason for name, reason in reasons.items() if reason is not None}
        missing = [
            name
            for name, target in targets.items()
            if strict and name not in received and id(target) not in received_into
        ]
        if misfits or missing:
            lines = [f"does not fit: {shortened(name)}: {why}" for name, why in misfits.items()]
            lines += [f"not in the message: {shortened(name)}" for name in missing]
            raise MismatchError(
                "the object does not fit the target"
                + self._written
                + "".join(f"\n    {line}" for line in lines),
                missing=missing,
                misfits=misfits,
            )

    @property
    def has_steps(self) -> bool:
        """Whether there are tensors to copy."""
        return bool(self._pairs)

    @property
    def _written(self) -> str:
        return "" if self._staged else WRITTEN

    def steps(self) -> Iterator[None]:
        """Copy the tensors; between two steps, other tasks may run.

        Raises:
            MismatchError: torch cannot copy a tensor.
        """
        for name, target, received in self._pairs:
            try:
                with torch.no_grad():
                    self._before.append((name, target, target.detach().clone()))
                    target.copy_(received)
            except _REFUSALS as error:
                raise MismatchError(
                    f"{kind_of(received)} could not be copied into the target{self._written}: "
                    f"{type(error).__name__}: {error}",
                    entry=shortened(name),
                ) from error
            yield

    def keep_state(self) -> None:
        """Do nothing: ``steps`` keeps the earlier numbers when it copies."""

    def restore(self) -> None:
        """Copy the earlier numbers back; nothing happens if no tensor was changed.

        Raises:
            MismatchError: torch cannot copy them back; names the tensors that have neither their
                earlier numbers nor those of the message.
        """
        failed = []
        for name, target, value in reversed(self._before):
            try:
                with torch.no_grad():
                    target.copy_(value)
            except _REFUSALS as error:
                failed.append(f"{shortened(name)}: {type(error).__name__}: {error}")
        # Cleared last, so that all of it is repeated after an interrupt.
        self._before = []
        if failed:
            raise MismatchError(
                "half applied: these tensors could not be restored to their earlier numbers"
                + "".join(f"\n    {line}" for line in failed)
            )


def _misfit(received: torch.Tensor, target: torch.Tensor) -> str | None:
    """Return the reason why a tensor cannot be copied into a target; None if it can."""
    one, other = kind_of(received), kind_of(target)
    reason = spread_misfit(received, target)
    if reason is not None or one != other:
        return reason or f"{one} in the message, {other} in the target"
    if received.shape != target.shape:
        return f"shape {list(received.shape)} in the message, {list(target.shape)} in the target"
    if received.dtype != target.dtype:
        return (
            f"{received.dtype} in the message, {target.dtype} in the target (cast=True is for "
            "dense tensors only)"
        )
    return None


def _class_of(tensor: torch.Tensor) -> type[torch.Tensor]:
    # isinstance says yes for parameters of every class, so the class itself is compared.
    return torch.Tensor if issubclass(type(tensor), torch.nn.Parameter) else type(tensor)


def _spread(tensor: torch.Tensor) -> tuple[object, object, object]:
    """Return the mesh and placements of a DTensor, and the index of its shard on this rank."""
    # For other classes, a peer may have set these attributes.
    if not type(tensor).__module__.startswith("torch.distributed."):
        return None, None, ()
    mesh: Any = getattr(tensor, "device_mesh", None)
    placements: Any = getattr(tensor, "placements", None)
    if mesh is None or placements is None:
        return None, None, ()
    # In a received mesh, the coordinate is that of the sender.
    coordinate = mesh.get_coordinate() or ()
    parts = [n for n, each in zip(coordinate, placements, strict=False) if not each.is_replicate()]
    return mesh, placements, tuple(parts)
