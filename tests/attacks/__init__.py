"""Attacks of a hostile peer, over every backend that receives."""
