"""Transfers through networks that damage, delay and cut the bytes, by a seed."""
