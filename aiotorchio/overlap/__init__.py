"""Which strided tensors share bytes of memory: arithmetic, no I/O."""
