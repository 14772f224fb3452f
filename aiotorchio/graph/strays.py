"""Stray tensors: those of a received object that no target takes.

In: an object that was just built, and the names that targets take. Out: nothing, or a
``MismatchError`` that lists the strays: by name, or by the nearest path if they have none. The
header does not show all of them, since composite tensors have rows for their parts only.
``engine.fit`` calls it.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from aiotorchio.common.interrupt import check_interrupt, interruptible
from aiotorchio.errors import LimitExceeded, MismatchError
from aiotorchio.graph.module_load import is_extra_state
from aiotorchio.graph.modules import ModuleTarget
from aiotorchio.graph.tensor_load import WRITTEN
from aiotorchio.table.containers import TEXT_MAX, Path, items_of, key_text, leaves_of, utf8
from aiotorchio.wire.header import shortened

__all__ = ["does_not_fit", "named_tensors", "refuse_untargeted", "refused_extra_states"]

_SHOWN = 20
# Objects whose attributes are not parts of the received object.
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch.Tensor)
_PLAIN = (str, bytes, int, float, complex, type(None))


def named_tensors(obj: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of an object by name; of several with one name, the first."""
    found: dict[str, torch.Tensor] = {}
    # The limit leaves room for the names of the header, and for those of other tensors.
    for name, tensor in leaves_of(obj, torch.Tensor, text_max=3 * TEXT_MAX):
        found.setdefault(name, tensor)
    return found


def refuse_untargeted(
    obj: Any,
    named: Mapping[str, torch.Tensor],
    has_target: Callable[[str], bool],
    *,
    unchanged: bool,
) -> None:
    """Refuse an object that has tensors without a target.

    Args:
        obj: The object as it was built.
        named: Its tensors by name.
        has_target: Whether a target receives the tensor of a name, or everything at a path.
        unchanged: Whether the targets are as before the load.

    Raises:
        MismatchError: The object has such tensors; lists all of them.
        LimitExceeded: The paths to tensors without a name are too long in total.
    """
    unexpected = [name for name in named if not has_target(name)]
    known = {id(tensor) for tensor in named.values()}
    hidden, length = [], 0
    for path, tensor in _hidden(obj):
        length += path.length if path else 0
        if length > TEXT_MAX:
            raise LimitExceeded(
                f"the paths to tensors without a name have more than {TEXT_MAX} characters in "
                "total",
                entry="skeleton",
            )
        name = path.joined() if path else ""
        if id(tensor) not in known and not has_target(name):
            hidden.append(name)
    if not unexpected and not hidden:
        return
    lines = []
    if hidden:
        nearest = ", ".join(repr(shortened(path)) for path in list(dict.fromkeys(hidden))[:3])
        lines.append(
            f"{len(hidden)} tensors or storages of the message have no name (they are inside "
            f"{nearest}): load the object without into, or select the names that you need"
        )
    raise does_not_fit(unexpected, lines, unchanged=unchanged)


def refused_extra_states(targets: Sequence[ModuleTarget], received: Any) -> Iterator[str]:
    """Yield the names of extra state in an object that no module takes.

    Args:
        targets: The modules.
        received: A mapping, which may contain others, with keys that may have dots.

    Raises:
        LimitExceeded: The names of extra state are far too long in total.
    """
    if not targets:
        return
    modules = {module.prefix: module for module in targets}
    # Only the prefixes of these modules are tried, for any names that a peer chose.
    lengths = sorted(set(map(len, modules)), reverse=True)
    for name in _extra_states(received):
        nearest = next((modules[name[:n]] for n in lengths if name[:n] in modules), None)
        if nearest is not None and nearest.refuses_extra_state(name.removeprefix(nearest.prefix)):
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
                below = Path.below(path, key)
                length += below.length if below else 0
                if length > TEXT_MAX:
                    raise LimitExceeded(
                        f"the names of extra state have more than {TEXT_MAX} characters in total",
                        entry="skeleton",
                    )
                yield below.joined() if below else ""
            elif isinstance(item, Mapping):
                waiting.append((Path.below(path, utf8(key_text(key))), item))


def does_not_fit(
    unexpected: Sequence[str],
    lines: Iterable[str] = (),
    *,
    misfits: Mapping[str, str] = MappingProxyType({}),
    unchanged: bool,
) -> MismatchError:
    """Return the error for an object that has more than the targets, or other tensors.

    Args:
        unexpected: Names without a target.
        lines: Further lines for the text of the error.
        misfits: The reasons why targets do not fit, by name.
        unchanged: Whether the targets are as before the load.
    """
    named = [f"not in the target: {shortened(name)}" for name in unexpected[:_SHOWN]]
    if len(unexpected) > _SHOWN:
        named.append(f"not in the target: {len(unexpected) - _SHOWN} more")
    named += [
        f"does not fit: {shortened(name)}: {why}"
        for name, why in itertools.islice(misfits.items(), _SHOWN)
    ]
    if len(misfits) > _SHOWN:
        named.append(f"does not fit: {len(misfits) - _SHOWN} more")
    written = "" if unchanged else WRITTEN
    return MismatchError(
        "\n    ".join(["the object does not fit the target" + written, *named, *lines]),
        unexpected=unexpected,
        misfits=misfits,
    )


def _hidden(obj: Any) -> Iterator[tuple[Path | None, Any]]:
    """Yield storages, and tensors in sets, keys and attributes, each with the nearest path."""
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
            # A storage never has a name.
            yield path, value
            continue
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen[id(value)] = value
        items = items_of(value)
        if items is not None and not hidden:
            for key, item in interruptible(items):
                # A path is joined only where it is used.
                if not isinstance(item, (*_PLAIN, torch.Tensor)):
                    waiting.append((Path.below(path, utf8(key_text(key))), item, False))
                if not isinstance(key, _PLAIN):
                    waiting.append((path, key, True))
            continue
        waiting += [(path, item, True) for item in _parts(value, items)]


def _parts(value: Any, items: Any) -> Iterator[Any]:
    """Yield the contents of an object, or of a container without names."""
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
