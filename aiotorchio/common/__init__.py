"""Ground floor: private names of torch, strides, the garbage collector, cancellation of threads."""
