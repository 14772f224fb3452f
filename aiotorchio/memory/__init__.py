"""Where bytes live: storages, arenas and slabs. torch, no wire, no I/O."""
