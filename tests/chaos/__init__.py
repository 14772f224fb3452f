"""Objects through a network that does its worst, by a seed."""
