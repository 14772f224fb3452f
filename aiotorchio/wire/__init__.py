"""Bytes <-> frames, as SPEC.md describes them: no torch, no I/O."""
