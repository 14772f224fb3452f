"""One driver per I/O world: each fills buffers and sends buffers, and knows nothing of messages."""
