"""Which strided tensors share bytes of memory, found by arithmetic, without I/O."""
