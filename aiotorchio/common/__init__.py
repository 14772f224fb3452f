"""Code for all packages: private names of torch, strides, garbage collection, interrupts."""
