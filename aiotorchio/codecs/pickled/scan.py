"""The scan of a pickle: reads it without building anything, and refuses it if it is not safe.

In: a pickle as a peer sent it, and the allowlist. Out: the globals to whose instances it gives a
state. ``graph`` calls ``scan_pickle`` before the unpickler runs; an error means that the unpickler
must not see the pickle.

torch's weights-only unpickler runs no foreign code, and promises no more: a pickle of a few bytes
can still take all memory, all time or the interpreter's stack. The scan follows the same opcodes,
with a stack of *abstract values* instead of objects, and makes sure that

- every opcode is one of those that torch's unpickler knows, complete, and finds its operands;
- every global is allowed, only globals are called and only classes instantiated, only lists and
  dicts get items (a tensor would be written to), and only objects that may have a state get one;
- depth of nesting is bounded: hashing or freeing a deep tuple overflows the C stack;
- memory of the objects is bounded by the size of the pickle: an empty container is hundreds of
  times larger than its opcode;
- steps of hashing are bounded, since an object that is used in many places is small in memory and
  hashed once for each place; so is the number of keys of a dict with the same hash.

A list can be filled after a tuple was made around it, so the abstract value of a tuple with a list
in it may be too low. Such a tuple cannot be hashed; if it holds the arguments of a call, the
abstract values of the arguments themselves count.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container, Mapping, Sequence

from aiotorchio.codecs.pickled import refusals
from aiotorchio.codecs.pickled.abstract_stack import AbstractStack
from aiotorchio.codecs.pickled.budget import AbstractValue, Budget
from aiotorchio.codecs.pickled.opcodes import is_blocked, opcodes, path_of
from aiotorchio.common.gc_pause import gc_paused
from aiotorchio.common.interrupt import interruptible
from aiotorchio.errors import AiotorchioError, ProtocolError, UnsafeObjectError

__all__ = ["scan_pickle"]

# Memory of an empty container.
_CONTAINER_NBYTES = 216
_SETS = ("builtins.set", "builtins.frozenset")
# Path of a container -> its memory at most, in multiples of that of the list or dict it is made of.
_COPIES = {**dict.fromkeys(_SETS, 8), "collections.Counter": 4}
_DICTS = ("collections.OrderedDict", "collections.Counter")

# Shared abstract values of equal objects. Tensors and storages are hashed by their addresses, which
# the sender does not choose.
_CONSTANT = AbstractValue(16, hash=0)
_BYTES = [AbstractValue(32, hash=value, number=True) for value in range(256)]
_EMPTY_TUPLE = AbstractValue(40, hash=hash(()), forgeable=True, items=())
_REFERENCE = AbstractValue(0, kind="reference")

# The package whose functions replace those of Python and torch on the allowlist.
_PACKAGE = __name__.rpartition(".")[0] + "."


def scan_pickle(
    data: bytes,
    allowed: Mapping[str, object],
    stateful: Container[str],
    *,
    depth_limit: int,
    wide_keys: int,
    offset: int = 0,
) -> dict[str, bool]:
    """Refuse a pickle that torch's weights-only unpickler must not see.

    Args:
        data: The pickle.
        allowed: Path of each allowed global -> the object that the unpickler uses for it.
        stateful: Paths of the globals whose instances may be given a state.
        depth_limit: ``Limits.depth``.
        wide_keys: ``Limits.wide_keys``.
        offset: Byte of the message where the pickle begins, for errors.

    Returns:
        Paths of the globals to whose instances the pickle gives a state -> whether all these
        states are attributes.

    Raises:
        UnsafeObjectError: The pickle has a global that is not allowed or an opcode that torch
            does not know, calls an object that is not a global, or gives items or a state to an
            object that may not have them.
        LimitExceeded: It is nested too deep, takes too much memory, or too long to hash.
        ProtocolError: It is cut short, has left-over bytes, or an opcode without its operands.
    """
    scan = _Scan(data, allowed, stateful, depth_limit, wide_keys)
    try:
        with gc_paused():
            try:
                scan.run()
            finally:
                # Freed before the garbage collector runs again and scans the abstract values.
                scan.drop()
    except AiotorchioError as error:
        error.entry = "skeleton"
        error.offset = offset + (scan.at if error.offset is None else error.offset)
        raise
    return scan.given_state


class _Scan(AbstractStack):
    def __init__(
        self,
        data: bytes,
        allowed: Mapping[str, object],
        stateful: Container[str],
        depth_limit: int,
        wide_keys: int,
    ) -> None:
        super().__init__(Budget(len(data), depth_limit, wide_keys))
        self.data = data
        self.at = 0
        self.allowed = allowed
        self.stateful = stateful
        self.given_state: dict[str, bool] = {}
        self.globals: dict[str, AbstractValue] = {}

    def run(self) -> None:
        for at, code, argument in interruptible(opcodes(self.data)):
            self.at = at
            _ACTIONS[code](self, argument)

    def proto(self, _: bytes) -> None:
        pass

    def stop(self, _: bytes) -> None:
        self.check_contents([self.pop()])
        if not self.is_empty:
            raise ProtocolError("the pickle ends with objects left over on its stack")

    def constant(self, argument: bytes) -> None:
        self.push_shared(_CONSTANT)

    def integer(self, argument: bytes) -> None:
        if len(argument) == 1:
            self.push_shared(_BYTES[argument[0]])
            return
        signed = len(argument) == 4
        value = int.from_bytes(argument, "little", signed=signed)
        self.push(AbstractValue(32, hash=hash(value), number=True))

    def float_(self, argument: bytes) -> None:
        self.push(AbstractValue(32, hash=hash(struct.unpack(">d", argument)[0]), number=True))

    def text(self, argument: bytes) -> None:
        # This is not the hash of the str, but also secret to the sender and equal for equal texts.
        self.push(AbstractValue(64 + 4 * len(argument), hash=hash(argument)))

    def long(self, argument: bytes) -> None:
        value = int.from_bytes(argument, "little", signed=True)
        forgeable = len(argument) > 8
        nbytes = 32 + len(argument)
        self.push(AbstractValue(nbytes, hash=hash(value), forgeable=forgeable, number=True))

    def list_(self, _: bytes) -> None:
        self.push(AbstractValue(_CONTAINER_NBYTES, depth=1, kind="list"))

    def dict_(self, _: bytes) -> None:
        self.push(AbstractValue(_CONTAINER_NBYTES, depth=1, kind="dict"))

    def empty_set(self, _: bytes) -> None:
        self.push(AbstractValue(_CONTAINER_NBYTES, depth=1))

    def tuple_(self, items: Sequence[AbstractValue]) -> None:
        if not items:
            self.push_shared(_EMPTY_TUPLE)
            return
        # An inner tuple, also an empty one, counts with all 64 bits of its hash, an int in its
        # place would not. So the outer hash is unknown, which ``collide`` charges for.
        hashes = tuple(
            None if item.items is not None or item.made_by else item.hash for item in items
        )
        self.push(
            AbstractValue(
                # Includes the list of its items, which the scan keeps.
                104 + 16 * len(items),
                depth=self.budget.nest(items),
                hash_steps=1 + sum(item.hash_steps for item in items),
                hash=None if None in hashes else hash(hashes),
                forgeable=True,
                items=items,
                proxy=next((item.proxy for item in items if item.proxy), None),
            )
        )

    def global_(self, argument: bytes) -> None:
        path = path_of(argument)
        if is_blocked(path):
            raise refusals.blocked_global(path)
        if path not in self.allowed:
            raise refusals.unknown_global(path)
        if path not in self.globals:
            ours = getattr(self.allowed[path], "__module__", "").startswith(_PACKAGE)
            proxy = path if ours else None
            self.globals[path] = AbstractValue(0, hash=hash(path), name=path, proxy=proxy)
        self.push_shared(self.globals[path])

    def instantiate(self, argument: bytes) -> None:
        function, arguments = self.pop_several(2)
        name = function.name
        if name is None or not isinstance(self.allowed[name], type):
            raise refusals.instance_of_no_class(name)
        self.make(function, arguments)

    def call(self, _: bytes) -> None:
        self.make(*self.pop_several(2))

    def make(self, function: AbstractValue, arguments: AbstractValue) -> None:
        if function.name is None:
            raise refusals.call_of_no_global()
        items = arguments.items
        if items is None:
            raise ProtocolError("the pickle makes a call whose arguments are no tuple")
        if not function.name.startswith("torch._"):  # These functions hash nothing.
            for item in items:
                self.budget.hash(item)
                if function.name in _SETS:
                    self.budget.compare_members(item)
                    self.budget.find_places(item.wide)
        # The result can be a copy of an argument that is used many times, and iteration keeps the
        # call itself with its arguments (see ``recorded_calls``).
        memory = 256 + 16 * len(items)
        memory += sum(item.memory for item in items) * _COPIES.get(function.name, 1)
        same = function.name == "torch.Size" and len(items) == 1
        # Comparing two sets takes longer if their members can have the same hash.
        often = 1
        if function.name in _SETS:
            often = min(64, 1 + max((item.wide for item in items), default=0))
        self.push(
            AbstractValue(
                memory,
                depth=self.budget.nest([arguments]),
                hash_steps=1 + often * sum(item.hash_steps for item in items),
                hash=items[0].hash if same else None,
                forgeable=same,
                made_by=function.name,
            )
        )

    def build(self, _: bytes) -> None:
        state = self.pop()
        # torch passes the state of a tensor to Tensor.set_, which could give it any memory.
        maker = self.top().made_by
        if maker is None or maker not in self.stateful:
            raise refusals.state_refused(maker)
        if self.top().has_state:
            raise UnsafeObjectError(
                f"the pickle gives an object of {maker} a second state, but only one is allowed"
            )
        attributes = _is_attributes(state)
        if not attributes and self.takes_attributes(maker):
            raise UnsafeObjectError(
                f"the pickle gives an object of {maker} a state that is no dict"
            )
        # Each object that is given this state hashes its keys again.
        self.budget.hash(state)
        self.top().has_state = True
        self.given_state[maker] = attributes and self.given_state.get(maker, True)
        # Each object that is given this state has a copy of its items.
        self.budget.charge(state.memory)
        self.adopt([state])

    def takes_attributes(self, maker: str) -> bool:
        """Whether all objects that this global makes surely have no ``__setstate__``."""
        made_by = self.allowed[maker]
        return maker in _DICTS or (
            isinstance(made_by, type) and not hasattr(made_by, "__setstate__")
        )

    def append(self, _: bytes) -> None:
        self.extend([self.pop()], "APPEND")

    def appends(self, _: bytes) -> None:
        self.extend(self.pop_mark(), "APPENDS")

    def extend(self, items: Sequence[AbstractValue], opcode: str) -> None:
        if self.top().kind != "list":
            raise refusals.items_of_no_list(opcode, self.top().made_by)
        # A set may be made of the list.
        self.count(items)
        self.adopt(items)

    def count(self, items: Sequence[AbstractValue]) -> None:
        """Count the items or keys of the container on top, and those that may collide."""
        container = self.top()
        for item in items:
            known = item.number or item.forgeable or (item.hash is None and not item.kind)
            if known and not (
                item.number and item.hash is not None and 0 <= item.hash <= container.count
            ):
                container.wide += 1
            container.count += 1

    def set_item(self, _: bytes) -> None:
        value, key = self.pop(), self.pop()
        self.put_items([key, value], "SETITEM")

    def set_items(self, _: bytes) -> None:
        items = self.pop_mark()
        if len(items) % 2:
            raise ProtocolError("the pickle has a key without a value")
        self.put_items(items, "SETITEMS")

    def put_items(self, items: list[AbstractValue], opcode: str) -> None:
        container = self.top()
        if container.kind != "dict" and container.made_by not in _DICTS:
            raise refusals.items_of_no_dict(opcode, container.made_by)
        for key in items[::2]:
            self.budget.hash(key)
            if key.forgeable or (key.hash is None and key.kind != "reference"):
                self.budget.collide(key, container)
        found = container.wide
        self.count(items[::2])
        self.budget.find_places(container.wide, found)
        self.budget.charge(96 * (len(items) // 2))
        self.adopt(items)

    def adopt(self, items: Sequence[AbstractValue]) -> None:
        """Charge and check items that go into the container on top of the stack."""
        self.check_contents(items)
        self.budget.charge(16 * len(items))
        container = self.top()
        container.memory += 16 * len(items)
        if items:
            container.depth = max(container.depth, self.budget.nest(items))
            container.hash_steps += sum(item.hash_steps for item in items)
            container.most_steps = max(container.most_steps, max(item.hash_steps for item in items))
        self.release(items)

    def check_contents(self, items: Sequence[AbstractValue]) -> None:
        """Refuse, as a part of the object, a function that replaces one of Python or torch."""
        for item in items:
            if item.proxy is not None:
                raise UnsafeObjectError(
                    f"{item.proxy!r} is a part of the object itself, which weights_only=True does "
                    "not allow"
                )

    def persistent_id(self, _: bytes) -> None:
        self.pop()
        self.push_shared(_REFERENCE)


def _is_attributes(state: AbstractValue) -> bool:
    """Whether a state has dicts only: update() would take pairs, too, which are not scanned."""
    parts = state.items if state.items is not None and len(state.items) == 2 else (state,)
    return all(part.kind == "dict" or part.is_plain for part in parts)


def _index(argument: bytes) -> int:
    return int.from_bytes(argument, "little")


_ACTIONS: dict[int, Callable[[_Scan, bytes], None]] = {
    code[0]: action
    for code, action in (
        (b"\x80", _Scan.proto),
        (b".", _Scan.stop),
        (b"c", _Scan.global_),
        (b"\x81", _Scan.instantiate),  # NEWOBJ
        (b"R", _Scan.call),  # REDUCE
        (b"b", _Scan.build),
        (b"a", _Scan.append),
        (b"e", _Scan.appends),
        (b"s", _Scan.set_item),
        (b"u", _Scan.set_items),
        (b"(", lambda scan, _: scan.mark()),
        (b"t", lambda scan, _: scan.tuple_(scan.pop_mark())),
        (b"\x85", lambda scan, _: scan.tuple_(scan.pop_several(1))),
        (b"\x86", lambda scan, _: scan.tuple_(scan.pop_several(2))),
        (b"\x87", lambda scan, _: scan.tuple_(scan.pop_several(3))),
        (b"N", _Scan.constant),
        (b"\x88", _Scan.constant),  # NEWTRUE
        (b"\x89", _Scan.constant),  # NEWFALSE
        (b")", lambda scan, _: scan.tuple_(())),  # EMPTY_TUPLE
        (b"]", _Scan.list_),
        (b"}", _Scan.dict_),
        (b"\x8f", _Scan.empty_set),
        (b"J", _Scan.integer),
        (b"K", _Scan.integer),
        (b"M", _Scan.integer),
        (b"G", _Scan.float_),
        (b"\x8a", _Scan.long),
        (b"X", _Scan.text),
        (b"U", _Scan.text),
        (b"Q", _Scan.persistent_id),
        (b"h", lambda scan, index: scan.get(_index(index))),
        (b"j", lambda scan, index: scan.get(_index(index))),
        (b"q", lambda scan, index: scan.put(_index(index))),
        (b"r", lambda scan, index: scan.put(_index(index))),
    )
}
