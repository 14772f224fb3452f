"""The stack, marks and memo of an unpickler, with abstract values in place of objects.

In: abstract values from ``scan``. Out: the operands of opcodes. A ``ProtocolError`` means that an
opcode has no operand, no mark, or no entry of the memo. A ``LimitExceeded`` means that the budget
is used up.
"""

from __future__ import annotations

from collections.abc import Sequence

from aiotorchio.codecs.pickled.budget import AbstractValue, Budget
from aiotorchio.errors import ProtocolError

__all__ = ["AbstractStack"]

# Memory of a mark, an abstract value, an entry of the memo, and a slot of the stack.
_MARK_NBYTES, _VALUE_NBYTES, _MEMO_NBYTES, _PLACE_NBYTES = 176, 176, 104, 9


class AbstractStack:
    """Holds abstract values as an unpickler holds objects, and charges their memory to the budget.

    Args:
        budget: The budget of the pickle.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._stack: list[AbstractValue] = []
        self._marks: list[list[AbstractValue]] = []
        self._memo: dict[int, AbstractValue] = {}

    @property
    def is_empty(self) -> bool:
        """Whether the stack has neither values nor marks."""
        return not self._stack and not self._marks

    def push(self, value: AbstractValue) -> None:
        """Push the abstract value of one object."""
        # An abstract value takes more memory than most objects; ``release`` refunds it.
        self.budget.charge(value.memory + _PLACE_NBYTES + _VALUE_NBYTES)
        value.charged = True
        self._stack.append(value)

    def push_shared(self, value: AbstractValue) -> None:
        """Push a value that stands for many objects."""
        self.budget.charge(value.memory + _PLACE_NBYTES)
        self._stack.append(value)

    def pop(self) -> AbstractValue:
        """Remove the top of the stack, and return it."""
        if not self._stack:
            raise _no_operand()
        return self._stack.pop()

    def pop_several(self, count: int) -> list[AbstractValue]:
        """Remove the last ``count`` values, at least one, and return them."""
        if len(self._stack) < count:
            raise _no_operand()
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def top(self) -> AbstractValue:
        """Return the top of the stack."""
        if not self._stack:
            raise _no_operand()
        return self._stack[-1]

    def mark(self) -> None:
        """Push a mark: begin a new stack above the current one."""
        self.budget.charge(_MARK_NBYTES)
        self._marks.append(self._stack)
        self._stack = []

    def pop_mark(self) -> list[AbstractValue]:
        """Remove the last mark and all values above it, and return these."""
        if not self._marks:
            raise ProtocolError("the pickle has an opcode without its mark")
        items, self._stack = self._stack, self._marks.pop()
        return items

    def put(self, index: int) -> None:
        """Store the top of the stack in the memo."""
        self.budget.charge(_MEMO_NBYTES)
        # The memo keeps it until the end, so its memory is never refunded.
        self.top().charged = False
        self._memo[index] = self.top()

    def get(self, index: int) -> None:
        """Push an entry of the memo."""
        if index not in self._memo:
            raise ProtocolError(f"the pickle reads entry {index} of the memo, which was never set")
        self.budget.charge(_PLACE_NBYTES)
        self._stack.append(self._memo[index])

    def release(self, items: Sequence[AbstractValue]) -> None:
        """Refund the memory of abstract values that nothing refers to any more."""
        for item in items:
            if item.charged:
                item.charged = False
                self.budget.charge(-_VALUE_NBYTES)

    def drop(self) -> None:
        """Free all abstract values in parts: half a million at once would keep threads waiting."""
        for table in (self._stack, self._marks):
            while table:
                del table[-10_000:]
        while len(self._memo) > 10_000:
            self._memo.popitem()


def _no_operand() -> ProtocolError:
    return ProtocolError("the pickle has an opcode without its operand")
