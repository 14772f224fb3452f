"""Every private name of torch that aiotorchio uses, but for those of ``torch.nn.Module``.

The latter are in ``torch_private_modules``; no other module uses private names of torch.

Checked with torch 2.6.0, 2.11.0 and 2.13.0. Whatever changes in another version changes here.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import _weights_only_unpickler as unpickler_module
from torch._utils import IMPORT_MAPPING, NAME_MAPPING
from torch.nested._internal.nested_tensor import NestedTensor as JaggedTensor
from torch.utils.hooks import warn_if_has_hooks

from aiotorchio.common.sparse_indices import check_compressed_indices, check_coo_indices

__all__ = [
    "BLOCKED_MODULES",
    "JAGGED_PARTS",
    "NOTED_LENGTHS",
    "PARAMETER_MARK",
    "RAGGED_DIM",
    "REBUILD_FROM_TYPE",
    "REBUILD_JAGGED",
    "REBUILD_META",
    "REBUILD_PARAMETER",
    "REBUILD_STRIDED",
    "Blanks",
    "JaggedTensor",
    "WeightsOnlyUnpickler",
    "active_fake_mode",
    "empty_affine_quantized",
    "empty_per_channel_quantized",
    "fake_storage",
    "get_layout",
    "has_names",
    "is_fake",
    "known_location",
    "location_tags",
    "make_compressed",
    "make_coo",
    "make_parameter",
    "make_wrapper_subclass",
    "nested_view",
    "over_storage",
    "python_name",
    "real_tensors",
    "set_view_bits",
    "skipped_data",
    "storage_key",
    "typed_storage",
    "untyped_storage_of",
    "versions_of",
    "warn_if_has_hooks",
]

BLOCKED_MODULES = frozenset(unpickler_module._blocklisted_modules)
_TORCH_HAS_NAMES = hasattr(torch.Tensor, "has_names")
make_wrapper_subclass: Callable[..., torch.Tensor] = torch.Tensor._make_wrapper_subclass
nested_view: Callable[..., torch.Tensor] = torch._nested_view_from_buffer
PARAMETER_MARK = "_is_param"
"""Attribute of subclasses that are parameters, though not of that class."""

REBUILD_JAGGED = f"{JaggedTensor.__module__}._rebuild_njt"
"""Path of the function that rebuilds a nested tensor of the jagged layout."""

RAGGED_DIM, NOTED_LENGTHS = "_ragged_idx", "_metadata_cache"
"""Two arguments of that function."""

JAGGED_PARTS = frozenset(
    ("_values", "_offsets", "_lengths", RAGGED_DIM, NOTED_LENGTHS, "_size", "_strides")
)
"""The attributes that it sets from its arguments."""

REBUILD_FROM_TYPE: Callable[..., Any] = torch._tensor._rebuild_from_type_v2
REBUILD_META = torch._utils._rebuild_meta_tensor_no_storage
REBUILD_PARAMETER = torch._utils._rebuild_parameter, torch._utils._rebuild_parameter_with_state
REBUILD_STRIDED = torch._utils._rebuild_tensor_v2, torch._utils._rebuild_tensor_v3
get_layout: Callable[[str], torch.layout] = torch.serialization._get_layout
empty_affine_quantized: Callable[..., torch.Tensor] = torch._empty_affine_quantized
empty_per_channel_quantized: Callable[..., torch.Tensor] = torch._empty_per_channel_affine_quantized


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return the address of the storage object, which all views of one storage share."""
    return int(storage._cdata)


def typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.TypedStorage:
    """Make a typed storage without the deprecation warning of the public constructor."""
    return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def untyped_storage_of(storage: torch.TypedStorage) -> torch.UntypedStorage:
    """Return the untyped storage in a typed one, without the deprecation warning."""
    untyped: torch.UntypedStorage = storage._untyped_storage
    return untyped


def versions_of(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    """Return the version counters of tensors; None for a tensor of inference mode."""
    # Some subclasses raise an error for every attribute.
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return [tensor._version for tensor in tensors]
        except RuntimeError:  # one of inference mode
            return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def set_view_bits(tensor: torch.Tensor, *, conjugate: bool, negative: bool) -> None:
    """Set the bits that mark a lazy conjugate or negative view."""
    # torch sets a bit when its key is in the dict, for any value.
    bits = {key: True for key, on in (("conj", conjugate), ("neg", negative)) if on}
    torch._C._set_tensor_metadata(tensor, bits)  # type: ignore[attr-defined]


# Tensors without elements, by dtype and device.
Blanks = dict[tuple[torch.dtype, torch.device], torch.Tensor]


def over_storage(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    size: Any,
    stride: Any,
    blanks: Blanks | None = None,
) -> torch.Tensor:
    """Make a tensor over a storage, which must be large enough: torch would resize it.

    Args:
        storage: The storage.
        dtype: Dtype of the elements.
        offset: Offset of the first element, in elements.
        size: Size of each dimension.
        stride: Stride of each dimension, in elements.
        blanks: A cache for callers that make many: ``empty_like`` of a blank takes 0.7 us, and
            ``empty`` 1.6.
    """
    device = storage.device
    if blanks is None:
        tensor = torch.empty((0,), dtype=dtype, device=device)
    else:
        blank = blanks.get((dtype, device))
        if blank is None:
            blank = blanks[dtype, device] = torch.empty((0,), dtype=dtype, device=device)
        tensor = torch.empty_like(blank)
    tensor.set_(storage, offset, size, stride)
    # Only storages of fake_storage have this attribute.
    fake_device = getattr(storage, "_fake_device", None)
    if fake_device is not None:
        tensor.fake_device = fake_device  # type: ignore[attr-defined]
    return tensor


def make_parameter(tensor: torch.Tensor, requires_grad: bool) -> torch.nn.Parameter:
    """Make a parameter as ``nn.Parameter`` does, without its checks in Python."""
    if type(tensor) is not torch.Tensor:  # fake
        return torch.nn.Parameter(tensor, requires_grad)
    parameter: torch.nn.Parameter = torch.Tensor._make_subclass(
        torch.nn.Parameter, tensor, requires_grad
    )
    return parameter


# The public constructors of sparse tensors check their parts under a flag of the whole process,
# which they set and restore: if two threads use them, one may check nothing, and the flag can stay
# set.


def make_coo(
    indices: torch.Tensor, values: torch.Tensor, size: Any, is_coalesced: bool | None
) -> torch.Tensor:
    """Make a sparse COO tensor; a RuntimeError if its parts do not fit together."""
    if _has_numbers(indices):
        if _is_usual(indices, values, size):
            distinct = bool(is_coalesced) and values.numel() > 1
            check_coo_indices(indices, size, distinct=distinct)
        else:
            torch._validate_sparse_coo_tensor_args(indices, values, size, is_coalesced)
    tensor: torch.Tensor = torch.ops.aten._sparse_coo_tensor_unsafe(
        indices, values, size, is_coalesced=is_coalesced
    )
    return tensor


def _is_usual(indices: torch.Tensor, values: torch.Tensor, size: Any) -> bool:
    """Whether only the numbers of the indices must be checked, and are on the CPU."""
    return (
        indices.device.type == values.device.type == "cpu"
        and indices.dim() == 2
        and indices.dtype == torch.int64
        and len(size) == len(indices) + max(values.dim(), 1) - 1
        and indices.is_pinned() == values.is_pinned()
    )


def make_compressed(
    compressed: torch.Tensor, plain: torch.Tensor, values: torch.Tensor, size: Any, layout: Any
) -> torch.Tensor:
    """Make a CSR, CSC, BSR or BSC tensor; a RuntimeError if its parts do not fit together."""
    if is_fake(compressed):
        raise RuntimeError("FakeTensorMode supports no compressed sparse tensors")
    check_compressed_indices(compressed, plain, values, size, layout)
    tensor: torch.Tensor = torch.ops.aten._sparse_compressed_tensor_unsafe(
        compressed, plain, values, size, dtype=values.dtype, layout=layout, device=values.device
    )
    return tensor.requires_grad_(values.requires_grad)


def _has_numbers(tensor: torch.Tensor) -> bool:
    """Whether a tensor has numbers: on ``meta``, or fake, it cannot cause reads out of bounds."""
    return tensor.untyped_storage().device.type != "meta"


def has_names(tensor: torch.Tensor) -> bool:
    """Whether a tensor has named dimensions, a prototype that torch 2.13 removed."""
    return _TORCH_HAS_NAMES and bool(tensor.has_names())  # type: ignore[attr-defined]


def skipped_data() -> torch.serialization.skip_data | None:
    """Return a copy of the ``torch.serialization.skip_data`` that is active in this thread."""
    local = torch.serialization._serialization_tls
    return (
        torch.serialization.skip_data(local.materialize_fake_tensors) if local.skip_data else None
    )


def active_fake_mode() -> AbstractContextManager[Any] | None:
    """Return the ``FakeTensorMode`` that is active in this thread."""
    # This takes 0.1 us, and ``detect_fake_mode`` 4.
    if not torch._C._len_torch_dispatch_stack():
        return None
    mode: AbstractContextManager[Any] | None = torch._guards.detect_fake_mode(None)
    return mode


def real_tensors() -> AbstractContextManager[Any]:
    """Return a context without the ``FakeTensorMode`` that may be active in this thread."""
    if active_fake_mode() is None:
        return nullcontext()
    mode: AbstractContextManager[Any] = torch._subclasses.fake_tensor.unset_fake_temporarily()
    return mode


def fake_storage(nbytes: int, device: torch.device) -> torch.UntypedStorage:
    """Make a storage for fake tensors, on ``meta`` as if it were on a device."""
    storage = torch.UntypedStorage(nbytes, device="meta")
    storage._fake_device = device
    return storage


def is_fake(tensor: object) -> bool:
    """Whether a tensor is a ``FakeTensor``: it has a shape and a device, but no numbers."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and type(tensor) is module.FakeTensor


def location_tags() -> tuple[Callable[[torch.UntypedStorage], str], bool]:
    """Return the function for location tags, and whether a tag depends on the device only.

    It does unless ``torch.serialization.register_package`` has registered another tagger.
    """
    taggers = (tagger for _, tagger, _ in torch.serialization._package_registry)
    return torch.serialization.location_tag, all(map(_is_of_torch, taggers))


def known_location(location: str) -> torch.device | None:
    """Return the device on which torch restores storages with this location.

    Returns:
        The device; None if a restorer from ``register_package`` must restore the bytes.

    Raises:
        RuntimeError: This machine does not have it; torch's restorers raise other errors, too.
    """
    empty = torch.UntypedStorage(0)
    for _, _, restorer in torch.serialization._package_registry:
        if not _is_of_torch(restorer):
            return None
        restored = restorer(empty, location)
        if restored is not None:
            return cast(torch.device, restored.device)
    # Called for its error.
    return cast(torch.device, torch.serialization.default_restore_location(empty, location).device)


def _is_of_torch(function: Any) -> bool:
    module: str = getattr(function, "func", function).__module__
    return module == torch.serialization.__name__


def python_name(module: str, name: str) -> str:
    """Return the path of a pickled global in Python 3, as torch's unpickler maps it."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[(module, name)]
    elif module in IMPORT_MAPPING:
        module = IMPORT_MAPPING[module]
    return f"{module}.{name}"


class WeightsOnlyUnpickler(unpickler_module.Unpickler):
    """torch's weights-only unpickler with a separate allowlist for each object.

    torch keeps the allowlist in its module, for the whole process. Here ``load`` runs the same
    code over a copy of that module's names, in which both lists are the ones given, so that
    neither another load nor another thread sees them.

    Args:
        file: A binary file with the pickle.
        allowed: Path of each allowed global -> its value.
        persistent_load: Function that resolves references to tensors and storages.
        encoding: Encoding of the strings of Python 2.
    """

    def __init__(
        self,
        file: Any,
        *,
        allowed: dict[str, Any],
        persistent_load: Callable[[Any], Any],
        encoding: str,
    ) -> None:
        super().__init__(file, encoding=encoding)
        self.persistent_load = persistent_load  # type: ignore[method-assign]
        code = unpickler_module.Unpickler.load
        names = code.__globals__ | {
            "_get_allowed_globals": lambda: allowed,
            "_get_user_allowed_globals": dict,
            "_sparse_tensors_to_validate": [],
        }
        self._load = types.FunctionType(code.__code__, names, code.__name__)

    def load(self) -> Any:
        """Return the object."""
        return self._load(self)
