"""The way from an object to its rows, storages and skeleton, and back, without I/O."""
