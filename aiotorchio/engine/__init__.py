"""The junction: a message between wire, graph, memory and a stream."""
