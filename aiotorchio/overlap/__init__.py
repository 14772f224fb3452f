"""The search for strided tensors that share bytes of memory, without I/O."""
