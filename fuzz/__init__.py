"""Fuzzing of what a peer sends; see README.md."""
