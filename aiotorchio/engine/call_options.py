"""The base of the options of a save and of a load: they are made from the arguments of a call.

In: the arguments of a public function. Out: a frozen dataclass with those that are its fields.
``save_options`` and ``load_options`` check the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

__all__ = ["CallOptions", "switches"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """Options whose fields have the names of parameters of the public functions."""

    @classmethod
    def of_call(cls, arguments: Mapping[str, Any]) -> Self:
        """Check the options among the arguments of a public function.

        Args:
            arguments: The function's ``locals()`` at its first line, so that a new option needs no
                further line there.
        """
        return cls(**{each.name: arguments[each.name] for each in fields(cls) if each.init})


def switches(options: type[CallOptions]) -> tuple[str, ...]:
    """Return the names of the options that are True or False."""
    return tuple(each.name for each in fields(options) if each.init and each.type == "bool")
