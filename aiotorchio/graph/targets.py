"""Tensors that are there, to receive into: which of a message's tensors goes to which of them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import torch

from aiotorchio.common.interrupt import interruptible
from aiotorchio.common.strides import order_of
from aiotorchio.errors import MismatchError
from aiotorchio.graph.modules import UNKNOWN_MAX, ModuleDestination, has_memory
from aiotorchio.graph.sharing import VIEW_BITS, filled_by_others, shared
from aiotorchio.graph.tensor_load import is_copied_whole, kind_of, spread_misfit
from aiotorchio.overlap.extents import Extents
from aiotorchio.table.names import count_unnamed, rows_by_name, walk
from aiotorchio.table.torch_dtypes import torch_dtype
from aiotorchio.wire.header import CONJUGATE, META_LOCATION, NEGATIVE, Header, shortened

__all__ = ["Known", "Match", "examined", "match", "target_tensors"]

# Of each kind of misfit, as many as a person reads.
_SHOWN = 20


def target_tensors(into: Any) -> dict[str, torch.Tensor]:
    """The tensors of a destination that are received into, by name; see ``examined``."""
    return examined(into)[0]


def examined(into: Any) -> tuple[dict[str, torch.Tensor], list[ModuleDestination]]:
    """What a destination is made of: its tensors by name, tied ones under each, and its modules.

    Args:
        into: A module, or a mapping from names to tensors and modules, which may be nested; what
            is neither does not count.

    Returns:
        The tensors to be received into, those of the modules (see there) among them, and the
        modules.

    Raises:
        TypeError: Neither of them.
        ValueError: Two tensors with the same name, or a module that can't be received into.
    """
    if not isinstance(into, Mapping | torch.nn.Module):
        raise TypeError(
            "into is a mapping from names to tensors, a torch.nn.Module or a DoubleBuffer, not "
            f"{type(into).__name__}"
        )
    modules: list[ModuleDestination] = []

    def opened(path: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        modules.append(ModuleDestination(path, module))
        return modules[-1].tensors

    found: dict[str, torch.Tensor] = {}
    for name, tensor in walk(into, opened):
        if found.setdefault(name, tensor) is not tensor:
            raise ValueError(f"into has two tensors named {name!r}")
    return found, modules


class Match(NamedTuple):
    """Destinations for which a message has something.

    Attributes:
        tensors: By name.
        ties: Names of one destination, for which the message has several tensors: their numbers
            must be the same.
        extents: Where they are, by device.
        filled: Names of destinations that the message lacks, all of whose bytes others fill.
    """

    tensors: dict[str, torch.Tensor]
    ties: list[list[str]]
    extents: Mapping[torch.device, Extents[str]]
    filled: set[str]


def match(
    header: Header,
    destinations: Mapping[str, torch.Tensor],
    modules: Sequence[ModuleDestination] = (),
    *,
    selection: Container[str],
    all_selected: bool,
    strict: bool,
    cast: bool,
) -> Match:
    """The tensors that are received into, by their names in the message.

    Args:
        header: Of a message.
        destinations: By name.
        modules: Which may have more to do with the message than those of their tensors that are
            among the destinations.
        selection: Whether a name counts, at either side.
        all_selected: Whether tensors without a name count, too.
        strict: Whether both sides must have the same names.
        cast: Whether a destination may have another dtype, as far as ``torch.can_cast`` allows.

    Raises:
        MismatchError: With all that does not fit.
    """
    names = rows_by_name(header.tensors)
    found = {
        name: tensor
        for name, tensor in interruptible(destinations.items())
        if name in names and name in selection
    }
    reasons = {
        name: _misfit(header, names[name], tensor, cast=cast)
        for name, tensor in interruptible(found.items(), 100)
    }
    misfits = {name: reason for name, reason in reasons.items() if reason is not None}
    misfits |= _refusals(header, names, modules, selection)
    fitting = {name: each for name, each in found.items() if name not in misfits}
    sharing = shared(header, names, fitting)
    misfits |= sharing.misfits
    missing, unexpected, unnamed, compared = [], [], 0, False
    filled: set[str] = set()
    if strict:
        missing = [name for name in destinations if name in selection and name not in names]
        if missing:
            others = {
                name: destinations[name] for name in missing if _has_places(destinations[name])
            }
            filled = set(filled_by_others(others, fitting))
        known = Known(modules)
        missing = [
            name
            for name in missing
            if name not in filled
            and not known.judges(name)
            # That comes as a part of the object, and is compared when it is there.
            and not (header.codec == "pickle" and is_copied_whole(destinations[name]))
        ]
        unexpected = [
            name
            for name in interruptible(names)
            if name in selection and name not in destinations and not known.takes(name)
        ]
        misfits |= known.refused
        unnamed = count_unnamed(header)
        # These are compared when they are there: by modules, and with tensors of other kinds.
        compared = any(module.others for module in modules) or any(
            name not in names and is_copied_whole(tensor) for name, tensor in destinations.items()
        )
    refused = unnamed and all_selected and not compared
    if misfits or missing or unexpected or refused:
        # It may be among those that have no name.
        absent = "no tensor of this name" if unnamed else "not in the message"
        lines = [
            *_lines(
                "does not fit",
                len(misfits),
                (f"{shortened(name)}: {why}" for name, why in misfits.items()),
            ),
            *_lines(absent, len(missing), map(shortened, missing)),
            *_lines("not in the destination", len(unexpected), map(shortened, unexpected)),
        ]
        if refused:
            lines.append(
                f"{unnamed} tensors of the message have no name: load the object "
                "without into, or select the names that you want"
            )
        raise MismatchError(
            "the message does not fit the destination" + "".join(f"\n    {line}" for line in lines),
            entry="header",
            missing=missing,
            unexpected=unexpected,
            misfits=misfits,
        )
    return Match(found, sharing.ties, sharing.extents, filled)


def _has_places(tensor: torch.Tensor) -> bool:
    """Whether all elements of a destination could be filled."""
    return has_memory(tensor) and not tensor.is_meta and _no_place(tensor) is None


class Known:
    """What modules know that one of both sides lacks.

    Args:
        modules: Of the destination.

    Attributes:
        refused: Entries of which the message has parts, and that nobody would load, with reasons.
    """

    def __init__(self, modules: Sequence[ModuleDestination]) -> None:
        self._modules = {module.prefix: module for module in modules}
        # Not one after the other: there can be thousands, and half a million names.
        self._lengths = sorted({len(prefix) for prefix in self._modules}, reverse=True)
        self._unknown_left = UNKNOWN_MAX
        self.refused: dict[str, str] = {}

    def judges(self, name: str) -> bool:
        """Whether a module may do without a tensor of this name, or take it for another."""
        return any(module.judges(key) for module, key in self._of(name))

    def takes(self, name: str) -> bool:
        """Whether a module loads a tensor that is none of its own."""
        for module, key in self._of(name):
            entry = module.entry(key)
            if entry is not None:
                reason = module.refusal(entry)
                if reason is not None:
                    self.refused[module.prefix + entry] = reason
                return True
            if self._unknown_left and module.judges(key):
                self._unknown_left -= 1
                return True
        return False

    def _of(self, name: str) -> Iterator[tuple[ModuleDestination, str]]:
        for length in self._lengths:
            module = self._modules.get(name[:length])
            if module is not None:
                yield module, name[length:]


def _refusals(
    header: Header,
    names: Mapping[str, int],
    modules: Iterable[ModuleDestination],
    selection: Container[str],
) -> dict[str, str]:
    """Entries of state dicts that are there on both sides, and that nobody would load."""
    refused = {}
    for module in modules:
        for entry in module.others:
            name = module.prefix + entry
            if name not in selection or name not in names:
                continue
            reason = module.refusal(entry)
            if reason is None:
                reason = _unloadable(header, names[name], module.loaded_by_torch(entry))
            if reason is not None:
                refused[name] = reason
    return refused


def _unloadable(header: Header, index: int, tensor: torch.Tensor | None) -> str | None:
    """Why torch's own code would not load a row into a tensor that takes no bytes."""
    if tensor is None or torch.nn.parameter.is_lazy(tensor):
        return None
    row = header.tensors[index]
    if header.locations[header.storages[row.storage].location] == META_LOCATION:
        return "on meta at the sender, without bytes"
    # What had no dimension had one in early versions of torch, which load_state_dict accepts.
    if tensor.shape != row.shape and (tensor.dim() or len(row.shape) != 1):
        return f"shape {list(row.shape)} in the message, {list(tensor.shape)} in the destination"
    return spread_misfit(None, tensor)


def _misfit(header: Header, index: int, tensor: torch.Tensor, *, cast: bool) -> str | None:
    """Why a row cannot be received into a tensor."""
    row = header.tensors[index]
    if header.locations[header.storages[row.storage].location] == META_LOCATION:
        return "on meta at the sender, without bytes"
    if not has_memory(tensor) or tensor.is_quantized:
        lazy = torch.nn.parameter.is_lazy(tensor)
        kind = f"a {type(tensor).__name__}" if lazy else kind_of(tensor)
        return f"dense in the message; the destination is no plain strided tensor but {kind}"
    if tensor.device.type == META_LOCATION:
        return "the destination is on meta, without memory"
    if tensor.shape != row.shape:
        return f"shape {list(row.shape)} in the message, {list(tensor.shape)} in the destination"
    if tensor.is_conj() or tensor.is_neg():
        return "the destination is a conjugate or negative view: resolve it first"
    reason = _no_place(tensor)
    if reason is not None:
        return reason
    dtype = torch_dtype(row.dtype)
    flags = row.flags & VIEW_BITS
    if dtype != tensor.dtype and not (cast and torch.can_cast(dtype, tensor.dtype)):
        possible = torch.can_cast(dtype, tensor.dtype)
        hint = " (cast=True converts)" if possible else " (torch.can_cast says no)" if cast else ""
        return f"{dtype} in the message, {tensor.dtype} in the destination{hint}"
    if (dtype != tensor.dtype or flags) and not _converts(dtype, flags, tensor.dtype):
        kind = "conjugate or negative views of " if flags else ""
        return f"torch cannot convert {kind}{dtype} to {tensor.dtype}"
    return None


def _no_place(tensor: torch.Tensor) -> str | None:
    """Why the elements of a strided tensor are no places for so many numbers."""
    order = order_of(tensor.shape, tensor.stride())
    end = int(tensor.storage_offset()) + order.extent
    if order.count and end * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "the memory of the destination was freed"
    if order.expanded or not order.distinct:
        return "elements of the destination overlap"
    return None


@lru_cache(maxsize=4096)
def _converts(dtype: torch.dtype, flags: int, into: torch.dtype) -> bool:
    """Whether torch can: it has conversions for most pairs of dtypes, and says so when asked."""
    try:
        source = torch.empty((0,), dtype=dtype).set_(torch.UntypedStorage(16), 0, (1,), (1,))
        source = source.conj() if flags & CONJUGATE else source
        source = source.neg() if flags & NEGATIVE else source
        destination = torch.empty((0,), dtype=into).set_(torch.UntypedStorage(16), 0, (1,), (1,))
        destination.copy_(source)
    except RuntimeError:
        return False
    return True


def _lines(what: str, count: int, texts: Iterable[str]) -> list[str]:
    """A line for each of the first ones, and one for the rest."""
    more = count - _SHOWN
    lines = [f"{what}: {text}" for text in islice(texts, _SHOWN)]
    return lines + [f"{what}: {more} more"] * (more > 0)
