"""Fuzzing of all input that a peer sends; see README.md."""
