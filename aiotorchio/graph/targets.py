"""The match of a message's tensors with the targets of a load.

In: ``into`` of the caller, and the header of a message. Out: the target of each tensor by name, and
the memory that targets share. A ``TypeError`` or ``ValueError`` means that ``into`` cannot be
received into; a ``MismatchError`` lists every difference between the message and the targets,
before the payload is received. ``engine.selection`` and ``engine.matching`` call it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from aiotorchio.common.interrupt import interruptible
from aiotorchio.common.strides import order_of
from aiotorchio.errors import MismatchError
from aiotorchio.graph.module_rules import ModuleRules
from aiotorchio.graph.modules import ModuleTarget, has_memory
from aiotorchio.graph.sharing import VIEW_BITS, filled_by_others, shared
from aiotorchio.graph.tensor_load import is_composite_target, kind_of, spread_misfit
from aiotorchio.overlap.extents import Extents
from aiotorchio.table.names import count_unnamed, rows_by_name, walk
from aiotorchio.table.torch_dtypes import torch_dtype
from aiotorchio.wire.header import CONJUGATE, META_LOCATION, NEGATIVE, Header, shortened

__all__ = ["MatchedTargets", "examined", "match_targets", "target_tensors"]

# The number of lines that an error has for each kind of difference.
_SHOWN = 20


def target_tensors(into: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that are received into, by name; see ``examined``."""
    return examined(into)[0]


def examined(into: Any) -> tuple[dict[str, torch.Tensor], list[ModuleTarget]]:
    """Return the tensors and modules of ``into``; a tied tensor is under each of its names.

    Args:
        into: A module, or a mapping from names to tensors and modules, which may be nested; other
            items are ignored.

    Returns:
        The tensors that are received into, by name, with those of the modules (see
        ``ModuleTarget.tensors``); and the modules.

    Raises:
        TypeError: ``into`` is neither a module nor a mapping.
        ValueError: Two tensors have the same name, or a module cannot be received into.
    """
    if not isinstance(into, Mapping | torch.nn.Module):
        raise TypeError(
            "into must be a mapping from names to tensors, a torch.nn.Module or a DoubleBuffer, "
            f"not {type(into).__name__}"
        )
    modules: list[ModuleTarget] = []

    def opened(path: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        modules.append(ModuleTarget(path, module))
        return modules[-1].tensors

    found: dict[str, torch.Tensor] = {}
    for name, tensor in walk(into, opened):
        if found.setdefault(name, tensor) is not tensor:
            raise ValueError(f"into has two tensors named {name!r}, but names must be unique")
    return found, modules


class MatchedTargets(NamedTuple):
    """The targets for which a message has tensors.

    Attributes:
        tensors: The targets by name.
        duplicates: Names of one target for which the message has several tensors, whose elements
            must be the same.
        extents: The memory of the targets, by device.
        filled_by_others: Names of targets that the message lacks, all of whose bytes others fill.
    """

    tensors: dict[str, torch.Tensor]
    duplicates: list[list[str]]
    extents: Mapping[torch.device, Extents[str]]
    filled_by_others: set[str]


def match_targets(
    header: Header,
    targets: Mapping[str, torch.Tensor],
    modules: Sequence[ModuleTarget] = (),
    *,
    composites: Collection[str] = (),
    selection: Container[str],
    all_selected: bool,
    strict: bool,
    cast: bool,
) -> MatchedTargets:
    """Match the tensors of a message with targets, by name.

    Args:
        header: The header of the message.
        targets: The targets by name.
        modules: Modules whose tensors are among the targets, and that can load other entries.
        composites: Names of the composite tensors found in the skeleton; empty without ``select``,
            or if the pickle was not searched.
        selection: Contains the names that count, on either side.
        all_selected: Whether tensors without a name count as well.
        strict: Whether both sides must have the same names.
        cast: Whether a target may have another dtype, if ``torch.can_cast`` allows it.

    Returns:
        The targets that are received into.

    Raises:
        MismatchError: The message does not fit the targets; lists all differences.
    """
    row_of_name = rows_by_name(header.tensors)
    found = {
        name: tensor
        for name, tensor in interruptible(targets.items())
        if name in row_of_name and name in selection
    }
    reasons = {
        name: _misfit(header, row_of_name[name], tensor, cast=cast)
        for name, tensor in interruptible(found.items(), 100)
    }
    misfits = {name: reason for name, reason in reasons.items() if reason is not None}
    misfits |= _refusals(header, row_of_name, modules, selection)
    misfits |= {
        name: "it is composite in the message, and the target receives the bytes of one row"
        for name in interruptible(composites)
        if name in selection and name in targets and not is_composite_target(targets[name])
    }
    misfits |= {
        name: "a nested tensor cannot be received into: leave it out of into"
        for name, tensor in targets.items()
        if tensor.is_nested and name in selection and name not in row_of_name
    }
    fitting = {name: each for name, each in found.items() if name not in misfits}
    sharing = shared(header, row_of_name, fitting)
    misfits |= sharing.misfits
    sides = (
        _one_sided(header, row_of_name, composites, targets, modules, selection, fitting)
        if strict
        else _OneSided([], [], set(), {}, 0, False)
    )
    misfits |= sides.refused
    nameless = sides.unnamed if all_selected and not sides.compared_later else 0
    if misfits or sides.missing or sides.unexpected or nameless:
        raise _mismatch(misfits, sides, nameless)
    return MatchedTargets(found, sharing.duplicates, sharing.extents, sides.filled_by_others)


class _OneSided(NamedTuple):
    """The names that only the message or only the targets have, under ``strict``.

    Attributes:
        missing: Names of targets that the message lacks.
        unexpected: Names of the message without a target.
        filled_by_others: Names of targets that the message lacks, all of whose bytes others fill.
        refused: Entries of modules that the message has parts of and no code loads, with reasons.
        unnamed: The number of tensors of the message without a name.
        compared_later: Whether these are compared with targets when the object has been built.
    """

    missing: list[str]
    unexpected: list[str]
    filled_by_others: set[str]
    refused: dict[str, str]
    unnamed: int
    compared_later: bool


def _one_sided(
    header: Header,
    row_of_name: Mapping[str, int],
    composites: Collection[str],
    targets: Mapping[str, torch.Tensor],
    modules: Sequence[ModuleTarget],
    selection: Container[str],
    fitting: Mapping[str, torch.Tensor],
) -> _OneSided:
    """Find the names that one side lacks.

    ``row_of_name`` has the row of each name of the message, and ``fitting`` the targets that fit
    theirs; see ``match_targets`` for the other arguments.
    """
    filled: set[str] = set()
    missing = [
        name
        for name in targets
        if name in selection and name not in row_of_name and name not in composites
    ]
    if missing:
        fillable = {name: targets[name] for name in missing if _can_be_filled(targets[name])}
        filled = set(filled_by_others(fillable, fitting))
    rules = ModuleRules(modules)
    missing = [
        name
        for name in missing
        if name not in filled
        and not rules.code_decides(name)
        # It is received as a part of the object, and compared when that has been built.
        and not (header.codec == "pickle" and is_composite_target(targets[name]))
    ]
    unexpected = [
        name
        for name in interruptible(itertools.chain(row_of_name, composites))
        if name in selection and name not in targets and not rules.may_load(name)
    ]
    unnamed = count_unnamed(header)
    compared_later = any(module.other_entries for module in modules) or any(
        name not in row_of_name and is_composite_target(tensor) for name, tensor in targets.items()
    )
    return _OneSided(missing, unexpected, filled, rules.refused, unnamed, compared_later)


def _mismatch(misfits: Mapping[str, str], sides: _OneSided, nameless: int) -> MismatchError:
    """Return the error that lists all differences between a message and the targets.

    Args:
        misfits: The reasons why targets do not fit, by name.
        sides: The names that one side lacks.
        nameless: The number of tensors that are refused since they have no name.
    """
    # A missing tensor may be one of those without a name.
    absent = "no tensor of this name" if sides.unnamed else "not in the message"
    lines = [
        *_lines(
            "does not fit",
            len(misfits),
            (f"{shortened(name)}: {why}" for name, why in misfits.items()),
        ),
        *_lines(absent, len(sides.missing), map(shortened, sides.missing)),
        *_lines("not in the target", len(sides.unexpected), map(shortened, sides.unexpected)),
    ]
    if nameless:
        lines.append(
            f"{nameless} tensors or parts of tensors in the message have no name: load the object "
            "without into, or select the names that you need (of a module, the sender should send "
            "its state_dict())"
        )
    return MismatchError(
        "the message does not fit the target" + "".join(f"\n    {line}" for line in lines),
        entry="header",
        missing=sides.missing,
        unexpected=sides.unexpected,
        misfits=misfits,
    )


def _can_be_filled(tensor: torch.Tensor) -> bool:
    """Whether the bytes of a message can fill all elements of a target."""
    return has_memory(tensor) and not tensor.is_meta and _memory_misfit(tensor) is None


def _refusals(
    header: Header,
    row_of_name: Mapping[str, int],
    modules: Iterable[ModuleTarget],
    selection: Container[str],
) -> dict[str, str]:
    """Return the entries of state dicts that both sides have and no code loads, with reasons."""
    refused = {}
    for module in modules:
        for entry in module.other_entries:
            name = module.prefix + entry
            if name not in selection or name not in row_of_name:
                continue
            reason = module.refusal(entry)
            if reason is None:
                reason = _unloadable(header, row_of_name[name], module.loaded_by_torch(entry))
            if reason is not None:
                refused[name] = reason
    return refused


def _unloadable(header: Header, index: int, tensor: torch.Tensor | None) -> str | None:
    """Return the reason why torch's code would not load a row.

    ``tensor`` is one that is not received in place; None: code of the module loads the entry.
    """
    if tensor is None or torch.nn.parameter.is_lazy(tensor):
        return None
    row = header.tensors[index]
    if header.locations[header.storages[row.storage].location] == META_LOCATION:
        return "the sender had it on meta, without bytes"
    # Early versions of torch saved scalars with one dimension, which load_state_dict accepts.
    if tensor.shape != row.shape and (tensor.dim() or len(row.shape) != 1):
        return f"shape {list(row.shape)} in the message, {list(tensor.shape)} in the target"
    return spread_misfit(None, tensor)


def _misfit(header: Header, index: int, tensor: torch.Tensor, *, cast: bool) -> str | None:
    """Return the reason why a row cannot be received into a target; None if it can."""
    row = header.tensors[index]
    if header.locations[header.storages[row.storage].location] == META_LOCATION:
        return "the sender had it on meta, without bytes"
    if not has_memory(tensor) or tensor.is_quantized:
        lazy = torch.nn.parameter.is_lazy(tensor)
        kind = f"a {type(tensor).__name__}" if lazy else kind_of(tensor)
        return f"it is dense in the message, but {kind} in the target"
    if tensor.device.type == META_LOCATION:
        return "the target is on meta, without memory"
    if tensor.shape != row.shape:
        return f"shape {list(row.shape)} in the message, {list(tensor.shape)} in the target"
    if tensor.is_conj() or tensor.is_neg():
        return "the target is a conjugate or negative view: resolve it first"
    reason = _memory_misfit(tensor)
    if reason is not None:
        return reason
    dtype = torch_dtype(row.dtype)
    flags = row.flags & VIEW_BITS
    if dtype != tensor.dtype and not (cast and torch.can_cast(dtype, tensor.dtype)):
        possible = torch.can_cast(dtype, tensor.dtype)
        hint = " (cast=True converts)" if possible else " (torch.can_cast says no)" if cast else ""
        return f"{dtype} in the message, {tensor.dtype} in the target{hint}"
    if (dtype != tensor.dtype or flags) and not _converts(dtype, flags, tensor.dtype):
        kind = "conjugate or negative views of " if flags else ""
        return f"torch cannot convert {kind}{dtype} to {tensor.dtype}"
    return None


def _memory_misfit(tensor: torch.Tensor) -> str | None:
    """Return the reason why elements of a strided tensor cannot be filled one by one."""
    order = order_of(tensor.shape, tensor.stride())
    end = int(tensor.storage_offset()) + order.extent
    if order.count and end * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "the memory of the target was freed"
    if order.expanded or not order.distinct:
        return "elements of the target overlap"
    return None


@lru_cache(maxsize=4096)
def _converts(dtype: torch.dtype, flags: int, target_dtype: torch.dtype) -> bool:
    """Whether torch has a conversion between dtypes; a copy of one element shows it."""
    try:
        source = torch.empty((0,), dtype=dtype).set_(torch.UntypedStorage(16), 0, (1,), (1,))
        source = source.conj() if flags & CONJUGATE else source
        source = source.neg() if flags & NEGATIVE else source
        target = torch.empty((0,), dtype=target_dtype).set_(torch.UntypedStorage(16), 0, (1,), (1,))
        target.copy_(source)
    except RuntimeError:
        return False
    return True


def _lines(what: str, count: int, texts: Iterable[str]) -> list[str]:
    """Return a line for each of the first texts, and one for the number of the others."""
    more = count - _SHOWN
    lines = [f"{what}: {text}" for text in itertools.islice(texts, _SHOWN)]
    return lines + [f"{what}: {more} more"] * (more > 0)
