"""Checks that several public functions have in common."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from aiotorchio.limits import Limits

__all__ = ["check_keywords", "checked_limits"]


def check_keywords(function: str, given: Mapping[str, object], known: type) -> None:
    """Refuse keyword arguments as Python does, in the name of a public function.

    Args:
        function: Its name.
        given: The arguments.
        known: The ``TypedDict`` of those that there are.

    Raises:
        TypeError: One that there is not.
    """
    for name in given:
        if name not in known.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def checked_limits(limits: Limits | None) -> Limits:
    """The limits to go by.

    Raises:
        TypeError: Not ``Limits``.
    """
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"limits must be Limits, not {limits!r}")
    return _default_limits() if limits is None else limits


# Each call has them, and they are checked field by field when they are made.
_default_limits = functools.cache(Limits)
