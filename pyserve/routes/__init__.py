"""The HTTP routes, one file for each group: parse, decide, call, answer."""
