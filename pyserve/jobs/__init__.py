"""Jobs: generations with a place in a queue, a status, and a stream of named events."""
