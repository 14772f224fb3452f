"""Tensors of a received object that nothing names, or that no destination takes.

In: an object that was just built. Out: the path of each of its tensors, or of the place that has it
somewhere without a name. The header does not know all of them: sparse and quantized tensors,
DTensors and others have rows for their parts only. ``transfer`` compares them under ``strict``.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.errors import LimitExceeded, MismatchError
from aiotorchio.graph.module_load import is_extra_state
from aiotorchio.graph.modules import ModuleDestination
from aiotorchio.table.containers import TEXT_MAX, Path, items_of, key_text, leaves_of, utf8
from aiotorchio.wire.header import shortened

__all__ = ["check_strays", "does_not_fit", "named_tensors", "refused_extra_states"]

_SHOWN = 20
# What has attributes that are not a part of the object.
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch.Tensor)
_PLAIN = (str, bytes, int, float, complex, type(None))


def named_tensors(obj: Any) -> dict[str, torch.Tensor]:
    """The tensors of an object by name; of several with one name, the first."""
    found: dict[str, torch.Tensor] = {}
    # Those of the header, and others.
    for name, tensor in leaves_of(obj, torch.Tensor, text_max=3 * TEXT_MAX):
        found.setdefault(name, tensor)
    return found


def check_strays(
    obj: Any, named: Mapping[str, torch.Tensor], takes: Callable[[str], bool], *, kept: bool
) -> None:
    """Refuse an object that has tensors for which there is no destination.

    Args:
        obj: As it was built.
        named: Its tensors by name.
        takes: Whether something receives the tensor of a name, or all that is at a path.
        kept: Whether the destinations are as they were.

    Raises:
        MismatchError: With all of them.
    """
    unexpected = [name for name in named if not takes(name)]
    known = {id(tensor) for tensor in named.values()}
    hidden, length = [], 0
    for path, tensor in _hidden(obj):
        length += path.length if path else 0
        if length > TEXT_MAX:
            raise LimitExceeded(
                f"the places of tensors have more than {TEXT_MAX} characters", entry="skeleton"
            )
        place = path.joined() if path else ""
        if id(tensor) not in known and not takes(place):
            hidden.append(place)
    if not unexpected and not hidden:
        return
    lines = []
    if hidden:
        places = ", ".join(repr(shortened(path)) for path in list(dict.fromkeys(hidden))[:3])
        lines.append(
            f"{len(hidden)} tensors or storages of the message have no name (in what is at "
            f"{places}): load the object without into, or select the names that you want"
        )
    raise does_not_fit(unexpected, lines, kept=kept)


def refused_extra_states(destinations: Sequence[ModuleDestination], received: Any) -> Iterator[str]:
    """The names of extra state that an object has for modules, and that nobody there takes.

    Args:
        destinations: The modules.
        received: An object of mappings, which may be nested, with keys that may have dots.

    Raises:
        LimitExceeded: Names that are far too long, all in all.
    """
    if not destinations:
        return
    modules = {module.prefix: module for module in destinations}
    # Whatever the peer's names are, no more is tried than the caller has.
    lengths = sorted(set(map(len, modules)), reverse=True)
    for name in _extra_states(received):
        nearest = next((modules[name[:n]] for n in lengths if name[:n] in modules), None)
        if nearest is not None and nearest.refuses(name.removeprefix(nearest.prefix)):
            yield name


def _extra_states(received: Any) -> Iterator[str]:
    seen: dict[int, Any] = {}
    waiting: list[tuple[Path | None, Any]] = [(None, received)]
    length = 0
    while waiting:
        check_interrupt()
        path, value = waiting.pop()
        if not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen[id(value)] = value
        for key, item in interruptible(value.items()):
            if is_extra_state(key):
                place = Path.below(path, key)
                length += place.length if place else 0
                if length > TEXT_MAX:
                    raise LimitExceeded(
                        f"the names of extra state have more than {TEXT_MAX} characters",
                        entry="skeleton",
                    )
                yield place.joined() if place else ""
            elif isinstance(item, Mapping):
                waiting.append((Path.below(path, utf8(key_text(key))), item))


def does_not_fit(
    unexpected: Sequence[str], lines: Iterable[str] = (), *, kept: bool
) -> MismatchError:
    """The error for an object that has too much.

    Args:
        unexpected: Names for which there is no destination.
        lines: More that does not fit.
        kept: Whether the destinations are as they were.
    """
    named = [f"not in the destination: {shortened(name)}" for name in unexpected[:_SHOWN]]
    if len(unexpected) > _SHOWN:
        named.append(f"not in the destination: {len(unexpected) - _SHOWN} more")
    written = "" if kept else " (its tensors are written to: staged=True keeps them)"
    return MismatchError(
        "\n    ".join(["the object does not fit the destination" + written, *named, *lines]),
        unexpected=unexpected,
    )


def _hidden(obj: Any) -> Iterator[tuple[Path | None, Any]]:
    """Storages, and tensors in sets, keys and attributes, each with the nearest path."""
    seen: dict[int, Any] = {}
    waiting: list[tuple[Path | None, Any, bool]] = [(None, obj, False)]
    while waiting:
        check_interrupt()
        path, value, hidden = waiting.pop()
        if isinstance(value, torch.Tensor):
            if hidden:
                yield path, value
            continue
        if isinstance(value, torch.UntypedStorage | torch.TypedStorage):
            # It has no name wherever it is.
            yield path, value
            continue
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen[id(value)] = value
        items = items_of(value)
        if items is not None and not hidden:
            for key, item in interruptible(items):
                # The path is written out where it is needed.
                if not isinstance(item, (*_PLAIN, torch.Tensor)):
                    waiting.append((Path.below(path, utf8(key_text(key))), item, False))
                if not isinstance(key, _PLAIN):
                    waiting.append((path, key, True))
            continue
        waiting += [(path, item, True) for item in _parts(value, items)]


def _parts(value: Any, items: Any) -> Iterator[Any]:
    """What is in an object, or in a container without names."""
    if items is not None:
        for pair in items:
            yield from pair
    elif isinstance(value, set | frozenset):
        yield from value
    elif not isinstance(value, _OPAQUE):
        yield from getattr(value, "__dict__", {}).values()
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                yield getattr(value, slot, None)
