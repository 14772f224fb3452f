"""The dtypes of the format (SPEC.md section 5.3), in one table for sender and receiver."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["DTYPES", "Dtype"]

Kind = Literal["float", "complex", "integer", "bool", "quantized", "bits"]


class Dtype(NamedTuple):
    """The properties of a dtype.

    Attributes:
        itemsize: Bytes of one element.
        unit: Bytes of each number inside an element, in which the byte order counts.
        kind: Kind of the element; only float and complex tensors can require gradients.
    """

    itemsize: int
    unit: int
    kind: Kind


def _same(kind: Kind, sizes: dict[str, int]) -> dict[str, Dtype]:
    return {name: Dtype(size, size, kind) for name, size in sizes.items()}


DTYPES: dict[str, Dtype] = {
    **_same("float", {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}),
    **_same("float", {"float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1}),
    **_same("float", {"float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float4_e2m1fn_x2": 1}),
    "complex128": Dtype(16, 8, "complex"),
    "complex64": Dtype(8, 4, "complex"),
    "complex32": Dtype(4, 2, "complex"),
    **_same("integer", {"int64": 8, "int32": 4, "int16": 2, "int8": 1}),
    **_same("integer", {"uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1}),
    **_same("integer", {f"int{bits}": 1 for bits in range(1, 8)}),
    **_same("integer", {f"uint{bits}": 1 for bits in range(1, 8)}),
    **_same("bool", {"bool": 1}),
    **_same("quantized", {"qint32": 4, "qint8": 1, "quint8": 1, "quint4x2": 1, "quint2x4": 1}),
    **_same("bits", {"bits16": 2, "bits8": 1, "bits1x8": 1, "bits2x4": 1, "bits4x2": 1}),
}
