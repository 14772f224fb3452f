"""Conversion of tensors and storages to rows of the header and back, without I/O."""
