"""Tensors and storages <-> rows of the header: torch, no I/O."""
