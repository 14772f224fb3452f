"""The same object through torch and through aiotorchio, for tests that compare both."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch.distributed import _serialization as streaming

import aiotorchio


def torch_file(obj: object, **options: Any) -> io.BytesIO:
    """Save an object with ``torch.save``."""
    file = io.BytesIO()
    torch.save(obj, file, **options)
    file.seek(0)
    return file


def stream_file(obj: object, **options: Any) -> io.BytesIO:
    """Save an object with ``_streaming_save``."""
    file = io.BytesIO()
    streaming._streaming_save(obj, file, **options)
    file.seek(0)
    return file


def by_stream(obj: object, **options: Any) -> Any:
    """Save and load with ``torch.distributed._serialization``."""
    file = stream_file(obj)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        return streaming._streaming_load(file, **options)


def our_file(obj: object, **options: Any) -> io.BytesIO:
    """Save an object with ``aiotorchio.save``."""
    file = io.BytesIO()
    aiotorchio.save(obj, file, **options)
    file.seek(0)
    return file


def by_torch(obj: object, **options: Any) -> Any:
    """Save and load with torch; the options are those of ``torch.load``."""
    with warnings.catch_warnings():
        # torch warns of typed storages, which it uses itself.
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        return torch.load(torch_file(obj), **options)


def by_us(obj: object, **options: Any) -> Any:
    """Save and load with aiotorchio; the options are those of ``aiotorchio.load``."""
    return aiotorchio.load(our_file(obj), **options)


def error_of_torch(obj: object, **options: Any) -> Exception:
    """The error of ``torch.load``."""
    file = torch_file(obj)
    try:
        torch.load(file, **options)
    except Exception as error:
        return error
    raise AssertionError("torch did not refuse")
