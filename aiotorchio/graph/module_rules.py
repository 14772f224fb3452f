"""The names that modules load, or tolerate, although one side of a load lacks them.

In: the modules among the targets, and names of the message or of its object. Out: whether a module
loads such a name. ``graph.targets`` asks for the names of the header, ``engine.fit`` for those of
the object.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aiotorchio.graph.modules import UNKNOWN_MAX, ModuleTarget

__all__ = ["ModuleRules"]


class ModuleRules:
    """The names that modules load or excuse although one side lacks them.

    Args:
        modules: The modules among the targets.

    Attributes:
        refused: Entries that the message has parts of and no code loads, with reasons.
    """

    def __init__(self, modules: Sequence[ModuleTarget]) -> None:
        self._modules = {module.prefix: module for module in modules}
        # Modules are found by prefix: there can be thousands, and half a million names.
        self._lengths = sorted({len(prefix) for prefix in self._modules}, reverse=True)
        self._unknown_left = UNKNOWN_MAX
        self.refused: dict[str, str] = {}

    def code_decides(self, name: str) -> bool:
        """Whether code of a module decides about a missing tensor of this name."""
        return any(module.code_decides(key) for module, key in self.owners(name))

    def may_load(self, name: str) -> bool:
        """Whether a module loads a tensor of this name, although it has no such tensor.

        Call it once for each name: it adds an entry that nothing loads to ``refused``, and stops at
        ``UNKNOWN_MAX`` names that only code of a module can judge.
        """
        for module, key in self.owners(name):
            entry = module.entry_of(key)
            if entry is not None:
                reason = module.refusal(entry)
                if reason is not None:
                    self.refused[module.prefix + entry] = reason
                return True
            if self._unknown_left and module.code_decides(key):
                self._unknown_left -= 1
                return True
        return False

    def owners(self, name: str) -> Iterator[tuple[ModuleTarget, str]]:
        """Yield the modules whose prefix a name has, with the rest of the name."""
        for length in self._lengths:
            module = self._modules.get(name[:length])
            if module is not None:
                yield module, name[length:]
