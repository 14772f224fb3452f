"""The stack, the marks and the memo of pickle's machine, with measures in place of objects."""

from __future__ import annotations

from collections.abc import Sequence

from aiotorchio.codecs.pickled.budget import AbstractValue, Budget
from aiotorchio.errors import ProtocolError

__all__ = ["AbstractStack"]

# What a mark of the scan's takes, a measure, an entry of the memo, and a place on the stack.
_MARK_NBYTES, _MEASURE_NBYTES, _MEMO_NBYTES, _PLACE_NBYTES = 176, 176, 104, 9


class AbstractStack:
    """Holds measures as an unpickler would hold objects; what that takes is charged like objects.

    Args:
        budget: What is left of the bounds.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._stack: list[AbstractValue] = []
        self._marks: list[list[AbstractValue]] = []
        self._memo: dict[int, AbstractValue] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing is on the stack, and no mark."""
        return not self._stack and not self._marks

    def push(self, measure: AbstractValue) -> None:
        """Push a measure of one object."""
        # The scan has bounds, too: until it is let go of, a measure takes more than most objects.
        self.budget.charge(measure.memory + _PLACE_NBYTES + _MEASURE_NBYTES)
        measure.charged = True
        self._stack.append(measure)

    def push_shared(self, measure: AbstractValue) -> None:
        """Push one that stands for many objects."""
        self.budget.charge(measure.memory + _PLACE_NBYTES)
        self._stack.append(measure)

    def pop(self) -> AbstractValue:
        """Take one off the stack."""
        if not self._stack:
            raise _no_operand()
        return self._stack.pop()

    def pop_several(self, count: int) -> list[AbstractValue]:
        """Take the last ones, of at least one, off the stack."""
        if len(self._stack) < count:
            raise _no_operand()
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def top(self) -> AbstractValue:
        """The last one on the stack."""
        if not self._stack:
            raise _no_operand()
        return self._stack[-1]

    def mark(self) -> None:
        """Begin a stack on the stack."""
        self.budget.charge(_MARK_NBYTES)
        self._marks.append(self._stack)
        self._stack = []

    def pop_mark(self) -> list[AbstractValue]:
        """Take all from the last mark on off the stack."""
        if not self._marks:
            raise ProtocolError("an opcode without its mark")
        items, self._stack = self._stack, self._marks.pop()
        return items

    def put(self, index: int) -> None:
        """Note the top of the stack in the memo."""
        self.budget.charge(_MEMO_NBYTES)
        # What it holds stays, and so does what was taken for it.
        self.top().charged = False
        self._memo[index] = self.top()

    def get(self, index: int) -> None:
        """Push what was noted in the memo."""
        if index not in self._memo:
            raise ProtocolError(f"memo {index} was never set")
        self.budget.charge(_PLACE_NBYTES)
        self._stack.append(self._memo[index])

    def release(self, items: Sequence[AbstractValue]) -> None:
        """Give back what was taken for measures that nothing refers to, unless the memo does."""
        for item in items:
            if item.charged:
                item.charged = False
                self.budget.charge(-_MEASURE_NBYTES)

    def drop(self) -> None:
        """Free what was measured, in parts: half a million at once hold all threads up."""
        for measures in (self._stack, self._marks):
            while measures:
                del measures[-10_000:]
        while len(self._memo) > 10_000:
            self._memo.popitem()


def _no_operand() -> ProtocolError:
    return ProtocolError("an opcode without its operand")
