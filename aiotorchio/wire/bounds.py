"""Fixed bounds of the checks; the bounds that a user can choose are in ``Limits``.

Each bound is higher than any honest message needs, and low enough that reaching it costs little.
Tests replace all of them by lower ones, so that small inputs are refused for the same reasons.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BOUNDS", "Bounds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Upper bounds for reading one message, independent of ``Limits``.

    Args:
        texts_floor: Memory that the short texts of any header may take, in bytes.
        memory_floor: Memory that the object of any skeleton may take, in bytes.
        hash_steps: Steps of hashing the keys and members in a pickle; they take half a second.
        compare_steps: Steps of comparing those whose hashes may be equal; they take as long.
        equal_hashes: Keys or members with the same hash. Two are rare, and 20 integers of up to 64
            bits can have the same at most.
        unknown_hashes: Keys in a pickle whose hash the scan cannot compute: complex numbers,
            frozensets, instances. If all of them collide, that takes a second.
        values: Values in an object, each counted at every place where it occurs. To print, compare
            or walk over more takes minutes.
        globals: Different globals that one pickle may name.
        global_nbytes: Length of the name of one global. The longest known names have a tenth of
            it.
    """

    texts_floor: int = 16 * 2**20
    memory_floor: int = 64 * 2**20
    hash_steps: int = 10**7
    compare_steps: int = 4 * 10**7
    equal_hashes: int = 64
    unknown_hashes: int = 4096
    values: int = 10**8
    globals: int = 10_000
    global_nbytes: int = 2000


BOUNDS = Bounds()
"""The bounds in force; each check reads them as ``bounds.BOUNDS``."""
