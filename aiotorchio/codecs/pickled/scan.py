"""Reads a pickle without building anything: what it would do, and how much it would take.

torch's weights-only unpickler runs no foreign code, and promises no more: a pickle of a few
bytes can still take all memory, all time or the interpreter's stack. This scan walks the same
opcodes over a stack of *measures* instead of objects and refuses what grows too far:

- every opcode is one of those that torch's unpickler knows, complete, and finds its operands;
- every global is allowed, only globals are called and only classes instantiated, only lists and
  dicts get items (a tensor would be written to), and only objects that take a state get one;
- depth of nesting is bounded: hashing or freeing a deep tuple overflows the C stack;
- memory of the objects is bounded by the size of the pickle, in which an empty container is
  hundreds of times smaller;
- work of hashing is bounded, since an object that is used in many places is small in memory and
  hashed once for each of them; and so is the number of keys of a dict with the same hash.

A list can be filled after a tuple was made around it, so what is known of a tuple with a list in
it may be too little. Such a tuple cannot be hashed; where it holds arguments, the measures of
the arguments themselves count.
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

# What an empty container takes.
_CONTAINER_NBYTES = 216
_SETS = ("builtins.set", "builtins.frozenset")
# How many times the memory of the list or dict that it is made from something can take.
_COPIES = {**dict.fromkeys(_SETS, 8), "collections.Counter": 4}
_DICTS = ("collections.OrderedDict", "collections.Counter")

# What stands for objects that are all alike. Tensors and storages are hashed by their addresses,
# which the sender does not choose.
_CONSTANT = AbstractValue(16, hash=0)
_BYTES = [AbstractValue(32, hash=value, number=True) for value in range(256)]
_EMPTY_TUPLE = AbstractValue(40, hash=hash(()), forgeable=True, items=())
_REFERENCE = AbstractValue(0, kind="reference")

# The modules whose functions stand for those of torch on the allowlist.
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
        allowed: Path of each global that may be used -> what stands for it.
        stateful: Paths of those whose instances may be given a state.
        depth_limit: Nesting of containers to accept.
        wide_keys: As of ``Limits``.
        offset: Byte of the message where the pickle begins, for errors.

    Returns:
        Paths of the globals to whose instances it gives a state, and whether all of those are
        attributes.

    Raises:
        UnsafeObjectError: A global that is not allowed, an opcode that torch does not know, a
            call of something that is not a global, items for something that has none.
        LimitExceeded: Too deep, too large in memory, too long to hash.
        ProtocolError: Cut short, left-over bytes, operands that are not there.
    """
    scan = _Scan(data, allowed, stateful, depth_limit, wide_keys)
    try:
        with gc_paused():
            try:
                scan.run()
            finally:
                # Or the collector would look through all of it.
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
            raise ProtocolError("the pickle ends with objects left over")

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
        # Not its hash in Python, yet as much of a secret to the sender, and the same for the same.
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
        # A tuple in a tuple counts with all 64 bits of its hash, which a number here does not have.
        hashes = tuple(None if item.items or item.made_by else item.hash for item in items)
        self.push(
            AbstractValue(
                # With the list of its items, which the scan keeps.
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
            raise ProtocolError("a call whose arguments are no tuple")
        if not function.name.startswith("torch._"):  # which hash nothing
            for item in items:
                self.budget.hash(item)
                if function.name in _SETS:
                    self.budget.compare_members(item)
                    self.budget.find_places(item.wide)
        # What is made can be a copy of an argument that is used many times, and the call itself is
        # kept with its arguments in iteration (see ``noted``). So many are not looked at often.
        memory = 256 + 16 * len(items)
        memory += sum(item.memory for item in items) * _COPIES.get(function.name, 1)
        same = function.name == "torch.Size" and len(items) == 1
        # To compare two sets takes more for members that can have one hash.
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
        # A state given to a tensor would point it anywhere: torch passes it on to Tensor.set_.
        maker = self.top().made_by
        if maker is None or maker not in self.stateful:
            raise refusals.state_refused(maker)
        if self.top().has_state:
            raise UnsafeObjectError(f"a second state for an object of {maker}")
        attributes = _is_attributes(state)
        if not attributes and self.takes_attributes(maker):
            raise UnsafeObjectError(f"a state for an object of {maker} that is no dict")
        # Its keys are hashed again, for each object that gets it.
        self.budget.hash(state)
        self.top().has_state = True
        self.given_state[maker] = attributes and self.given_state.get(maker, True)
        # It is copied into the object, item by item, and may be that of many objects.
        self.budget.charge(state.memory)
        self.adopt([state])

    def takes_attributes(self, maker: str) -> bool:
        """Whether what it makes is bound to have no way of its own to take a state."""
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
        # A set may be made of it.
        self.count(items)
        self.adopt(items)

    def count(self, items: Sequence[AbstractValue]) -> None:
        """Note which of the items or keys of the container on top could be chosen to collide."""
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
            raise ProtocolError("a key without a value")
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
        """Items go into the container on top of the stack."""
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
        """Refuse, as part of the object, what only stands for one of Python's or torch's names."""
        for item in items:
            if item.proxy is not None:
                raise UnsafeObjectError(f"{item.proxy!r} itself as a part of the object")

    def persistent_id(self, _: bytes) -> None:
        self.pop()
        self.push_shared(_REFERENCE)


def _is_attributes(state: AbstractValue) -> bool:
    """Whether a state is what pickle writes: update() of a dict takes pairs, too, unscanned."""
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
