"""Tests of ``aiotorchio.graph``."""
