"""The pickle codec and its sandbox (SPEC.md section 6.2)."""
