"""The options of a save, checked in one place and handed down whole.

Each public function that saves makes a ``SaveOptions`` from its arguments in the caller's thread,
when the call is made; after that, the engine reads the fields. A ``TypeError`` or ``ValueError``
from here is a mistake of the caller, and nothing was sent yet. ``limits`` is no field: it concerns
the stream, not the message.

A new option is one field here, and one parameter of each public function: ``save_to_stream``, which
documents it, ``save``, ``StreamWriter.save`` and ``iter_bytes``.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from aiotorchio.common.torch_private import skipped_data
from aiotorchio.engine.call_options import CallOptions, switches
from aiotorchio.engine.requests import Progress
from aiotorchio.table.names import TensorSpec
from aiotorchio.wire.header import ALIGNMENT, CHUNK_SIZE_MIN

__all__ = ["DEFAULT_CHUNK_SIZE", "SaveOptions"]

DEFAULT_CHUNK_SIZE = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions(CallOptions):
    """The options of a save, which ``save_to_stream`` documents.

    Attributes:
        header_metadata: A copy of ``metadata``.
        tensor_specs: A copy of ``specs``, without tensors.
        skip: The ``skip_data`` that the caller's thread is in.

    Raises:
        TypeError: An option of another type.
        ValueError: An option out of its range, or two that exclude each other.
    """

    checksum: bool = True
    chunk_size: int = DEFAULT_CHUNK_SIZE
    metadata: Mapping[str, str] | None = None
    specs: Mapping[str, TensorSpec | torch.Tensor] | None = None
    snapshot: bool = False
    compact: bool = False
    allow_pickle: bool = True
    progress: Progress | None = None
    pickle_module: Any = pickle
    pickle_protocol: int = 2
    header_metadata: dict[str, str] = field(init=False)
    tensor_specs: dict[str, TensorSpec] | None = field(init=False)
    skip: torch.serialization.skip_data | None = field(init=False)

    def __post_init__(self) -> None:
        for option in _SWITCHES:
            value = getattr(self, option)
            if value is not True and value is not False:
                raise TypeError(f"{option} must be True or False, not {value!r}")
        if not isinstance(self.chunk_size, int) or isinstance(self.chunk_size, bool):
            raise TypeError(f"chunk_size must be a number of bytes, not {self.chunk_size!r}")
        if self.chunk_size < CHUNK_SIZE_MIN or self.chunk_size % ALIGNMENT:
            raise ValueError(
                f"chunk_size must be a multiple of {ALIGNMENT} and at least {CHUNK_SIZE_MIN}, "
                f"not {self.chunk_size}"
            )
        skip = skipped_data()
        specs = None if self.specs is None else _checked_specs(self.specs)
        object.__setattr__(self, "header_metadata", _checked_metadata(self.metadata))
        object.__setattr__(self, "tensor_specs", specs)
        object.__setattr__(self, "skip", skip)
        if self.specs is not None and (self.snapshot or self.compact or skip is not None):
            raise ValueError("snapshot, compact and skip_data cannot be combined with specs")


_SWITCHES = switches(SaveOptions)


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping of str to str, not {metadata!r}")
    checked = dict(metadata)
    for pair in checked.items():
        if not all(isinstance(text, str) for text in pair):
            raise TypeError(f"an entry of metadata must be a pair of str, not {pair!r}")
    return checked


def _checked_specs(specs: Mapping[str, TensorSpec | torch.Tensor]) -> dict[str, TensorSpec]:
    if not isinstance(specs, Mapping):
        raise TypeError(
            f"specs must be a mapping of names to TensorSpec or tensors, not {type(specs).__name__}"
        )
    checked = {}
    for name, spec in specs.items():
        if not isinstance(name, str) or not isinstance(spec, TensorSpec | torch.Tensor):
            raise TypeError(
                "an entry of specs must be a name and a TensorSpec or tensor, not "
                f"{name!r} and {spec!r}"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(
                f"specs has the name {name!r}, which UTF-8, the encoding of the header, cannot "
                "express"
            )
        # A plain str: subclasses, such as numpy's, would need pickle.
        checked[str(name)] = TensorSpec.of(spec) if isinstance(spec, torch.Tensor) else spec
    return checked
