"""Tensor classes of the kinds that libraries write, one for each way in which torch saves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Packed(torch.Tensor):
    """A class that defines its state, and how it is restored."""

    note: Any

    def __getstate__(self) -> dict[str, Any]:
        return {"packed": (self.note,)}

    def __setstate__(self, state: Any) -> None:
        self.note = ("unpacked", *state["packed"])


class Restored(torch.Tensor):
    """A class that restores the state that Python makes by default."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state, restored=True)


class Odd(torch.Tensor):
    """A class whose state has a form that torch cannot set."""

    def __getstate__(self) -> Any:
        return ({}, {}, {})


class Slotted(torch.Tensor):
    __slots__ = ("free", "slot", "unset")
    free: Any
    slot: Any
    unset: Any


class WithDefault(torch.Tensor):
    """A class whose instances may have their own level."""

    level = 0


class WithProperty(torch.Tensor):
    @property
    def extra(self) -> Any:
        return self.__dict__["_extra"]

    @extra.setter
    def extra(self, value: Any) -> None:
        self.__dict__["_extra"] = value


class Reduced(torch.Tensor):
    """A class that is rebuilt by a special function."""

    number: int

    def __reduce_ex__(self, protocol: Any) -> Any:
        return make_reduced, (self.as_subclass(torch.Tensor), self.number + 1)


def make_reduced(tensor: torch.Tensor, number: int) -> Reduced:
    made = tensor.as_subclass(Reduced)
    made.number = number
    return made


class Marked(nn.Parameter):
    """A class of parameters; torch makes plain parameters of them."""


class Dispatching(torch.Tensor):
    """A class with ``__torch_dispatch__`` and yet a storage."""

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> Dispatching:
        made: Dispatching = torch.Tensor._make_subclass(cls, tensor)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


class Sized(torch.Tensor):
    """A wrapper that computes its sizes: torch caches them where pickle cannot see them."""

    wrapped: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Sized:
        made: Sized = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            dtype=inner.dtype,
            device=inner.device,
            dispatch_sizes_strides_policy="sizes",
        )
        made.wrapped = inner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return Sized(args[0].wrapped)
        plain = [arg.wrapped if isinstance(arg, Sized) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


class Elsewhere(torch.Tensor):
    """A wrapper on a device that this machine need not have."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: str) -> Elsewhere:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=torch.device(device)
        )
        made.around = inner
        wrapper: Elsewhere = made
        return wrapper

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


class ByCpu:
    """A class pickled like torch's tensors on xla, maia or mtia: on the CPU, with the device."""

    def __init__(self, tensor: torch.Tensor, device: str) -> None:
        self.tensor, self.device = tensor, device

    def __reduce__(self) -> Any:
        data = self.tensor.detach()
        rebuild = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return rebuild, (data, data.dtype, self.device, self.tensor.requires_grad)
