"""Bounds of the checks themselves, which no user has to choose: ``Limits`` has those that one may.

Each is above what any honest message needs and low enough that reaching it costs little. They are
one value, so that tests can put a lower one in its place and refuse small inputs for the same
reasons.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BOUNDS", "Bounds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What reading one message may cost at most, whatever ``Limits`` allow.

    Args:
        texts_floor: Memory that the short texts of any header may take, in bytes.
        memory_floor: Memory that the object of any skeleton may take, in bytes.
        hash_steps: Steps of hashing the keys and members in a pickle; they take half a second.
        compare_steps: Steps of comparing those whose hashes may be equal; they take as long.
        equal_hashes: Keys or members with the same hash. Two are rare, and 20 integers of up to 64
            bits can have the same at most.
        unknown_hashes: Keys in a pickle whose hash the scan does not know: complex numbers,
            frozensets, instances. If all of them collide, that takes a second.
        values: Values in an object, counted wherever they occur. To show, compare or walk over
            more takes minutes.
        globals: Different globals that one pickle may name.
        global_nbytes: Length of the name of one global. The longest names that there are have a
            tenth of it.
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
"""Those that hold; read as ``bounds.BOUNDS`` at the time of a check."""
