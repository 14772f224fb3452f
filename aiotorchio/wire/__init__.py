"""The wire format of SPEC.md: bytes to frames and back, without torch and without I/O."""
