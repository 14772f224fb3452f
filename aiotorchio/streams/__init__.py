"""Sources and sinks: one adapter for each kind of stream, which fills or sends buffers."""
