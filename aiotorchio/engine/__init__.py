"""Sending and receiving of messages, where all other packages meet."""
