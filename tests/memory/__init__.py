"""Tests of ``aiotorchio.memory``."""
