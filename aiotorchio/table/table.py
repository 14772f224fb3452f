"""The tables of the header: one row for each distinct tensor and each distinct storage.

In: the tensors and storages of an object, as a codec meets them. Out: the rows of a message's
header, and the tensors and storages in the order of their rows. A tensor that a row cannot describe
gets none, and its codec writes it in another way. A ``TypeError`` names a tensor that no message
can carry. ``graph.flatten`` makes a table, and both codecs add to it.
"""

from __future__ import annotations

import torch

from aiotorchio.common.torch_private import (
    has_names,
    is_fake,
    location_tags,
    storage_key,
)
from aiotorchio.table.mapped_files import plain_of
from aiotorchio.table.torch_dtypes import DTYPE_NAMES
from aiotorchio.wire.dtypes import DTYPES
from aiotorchio.wire.header import (
    CONJUGATE,
    META_LOCATION,
    MIXED_UNITS,
    NEGATIVE,
    PARAMETER,
    REQUIRES_GRAD,
    StorageRow,
    TensorRow,
)

__all__ = ["Table"]

# The name and unit of each dtype, in one lookup instead of two.
_DTYPES = {dtype: (name, DTYPES[name].unit) for dtype, name in DTYPE_NAMES.items()}


class Table:
    """The rows of an object that is being flattened.

    Args:
        skip: The active ``torch.serialization.skip_data``: storages are sent without their bytes,
            and fake tensors like others if its ``materialize_fake_tensors`` is set.

    Attributes:
        tensors: One row for each distinct tensor object.
        storages: One row for each distinct storage.
        sources: The storages themselves, in the order of their rows.
        locations: Location tags that the storages refer to.
        direct_storages: Storages that the object refers to directly, not only through tensors.
        kept: The tensors themselves, in the order of their rows.
        without_row: Tensors that have no row, and are in the pickle.
    """

    def __init__(self, skip: torch.serialization.skip_data | None = None) -> None:
        self._skips = skip is not None
        self._takes_fakes = skip is not None and skip.materialize_fake_tensors
        self.tensors: list[TensorRow] = []
        self.storages: list[StorageRow] = []
        self.sources: list[torch.UntypedStorage] = []
        self.locations: list[str] = []
        self.direct_storages: set[int] = set()
        # Rows are found by id(), so every tensor must live as long as the table.
        self.kept: list[torch.Tensor] = []
        self.without_row: list[torch.Tensor] = []
        self._row_of: dict[int, int] = {}
        # id() of a tensor with attributes, or of another class -> the tensor it is made of.
        self._origin_of: dict[int, torch.Tensor] = {}
        self._index_of: dict[int, int] = {}
        self._tag, self._device_is_enough = location_tags()
        self._index_of_device: dict[torch.device, int] = {}
        self._index_of_tag: dict[str, int] = {}

    def add_tensor(self, tensor: torch.Tensor, name: str | None = None) -> int | None:
        """Give a tensor a row, or find the row that it has.

        Args:
            tensor: Any tensor.
            name: Its path in the object, added to the names of the row.

        Returns:
            The number of its row; None if a row cannot describe the tensor (subclasses, tensors
            with attributes, quantized, sparse and nested ones, and those without storage). See
            ``make_of`` for a tensor that is made of one with a row.
        """
        row = self._row_of.get(id(tensor))
        if row is None:
            # Most tensors are plain, and there are many.
            plain = tensor if type(tensor) is torch.Tensor else plain_of(tensor)
            described = self._describe(plain)
            if described is None:
                self.without_row.append(tensor)
                return None
            row = len(self.tensors)
            self._row_of[id(tensor)] = row
            self.kept.append(tensor)
            self.tensors.append(described)
        if name is not None:
            self.tensors[row].names.append(name)
        return row

    def name(self, tensor: torch.Tensor, name: str) -> None:
        """Add a name to the row of a tensor, or to the row of the tensor that it is made of."""
        row = self._row_of.get(id(self._origin_of.get(id(tensor), tensor)))
        if row is not None:
            self.tensors[row].names.append(name)

    def make_of(self, tensor: torch.Tensor, origin: torch.Tensor) -> None:
        """Note that a tensor without a row is made of another one, whose row gets its names.

        Args:
            tensor: One for which ``add_tensor`` returned None.
            origin: A tensor that a row can describe; it gets the row when it is added.
        """
        self._origin_of[id(tensor)] = origin

    def add_storage(self, storage: torch.UntypedStorage, unit: int) -> int:
        """Give a storage that the object refers to directly a row, or find the row that it has.

        Args:
            storage: Any storage.
            unit: Bytes of the elements that it is viewed with.

        Returns:
            The number of its row.
        """
        index = self._storage_row(storage, unit)
        self.direct_storages.add(index)
        return index

    def _storage_row(self, storage: torch.UntypedStorage, unit: int) -> int:
        key = storage_key(storage)
        index = self._index_of.get(key)
        if index is None:
            index = self._index_of[key] = len(self.storages)
            location = self._index_of_device.get(storage.device)
            if location is None or not self._device_is_enough:
                location = self._location(storage)
            self.sources.append(storage)
            self.storages.append(StorageRow(storage.nbytes(), unit, location))
        elif self.storages[index].unit != unit:
            self.storages[index].unit = MIXED_UNITS
        return index

    def _location(self, storage: torch.UntypedStorage) -> int:
        device = storage.device
        # As in torch: no tagger is called for storages without bytes.
        no_bytes = self._skips or device.type == META_LOCATION
        tag = META_LOCATION if no_bytes else self._tag(storage)
        index = self._index_of_tag.setdefault(tag, len(self.locations))
        if index == len(self.locations):
            self.locations.append(tag)
        self._index_of_device[device] = index
        return index

    def _describe(self, tensor: torch.Tensor) -> TensorRow | None:
        kind = type(tensor)
        if (
            (
                (kind is not torch.Tensor and kind is not torch.nn.Parameter)
                and not (self._takes_fakes and is_fake(tensor))
            )
            or tensor.layout is not torch.strided
            or tensor.is_quantized
            or tensor.is_nested
            or (object.__getstate__(tensor) and not is_fake(tensor))
            or has_names(tensor)
        ):
            return None
        described = _DTYPES.get(tensor.dtype)
        if described is None:
            return None
        dtype, unit = described
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # devices such as xla have no storages
            return None
        flags = (
            (REQUIRES_GRAD if tensor.requires_grad else 0)
            | (PARAMETER if kind is torch.nn.Parameter else 0)
            | (CONJUGATE if tensor.is_conj() else 0)
            | (NEGATIVE if tensor.is_neg() else 0)
        )
        if flags & NEGATIVE and DTYPES[dtype].kind not in ("float", "complex"):
            raise TypeError(
                f"a negative view of dtype {dtype} cannot be sent: make a copy with resolve_neg()"
            )
        index = self._storage_row(storage, unit)
        offset, shape = int(tensor.storage_offset()), tuple(tensor.shape)
        return TensorRow(index, dtype, offset, shape, tensor.stride(), flags, [])
