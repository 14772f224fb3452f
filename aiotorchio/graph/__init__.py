"""Conversion of objects to rows, storages and skeletons, and back, without I/O."""
