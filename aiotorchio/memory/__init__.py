"""Memory for payloads: storages, arenas and staging buffers. It uses torch, and does no I/O."""
