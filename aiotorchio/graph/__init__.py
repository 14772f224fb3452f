"""Objects <-> (skeleton, tensor table, storages): torch, no I/O."""
