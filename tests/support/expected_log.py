"""The log that the contract makes of a producer's events."""

from __future__ import annotations

from collections.abc import Iterable

END = b": end completed\n"


def expected_log(events: Iterable[bytes], epoch: str) -> bytes:
    """A completed log of `events`, given without ids and blank lines; no heartbeats."""
    log = bytearray()
    retry = b"retry: 1000\n"
    for event in events:
        log += event + retry + f"id: {epoch}-".encode()
        bare = len(log) + 2
        digits = len(str(bare))
        if len(str(bare + digits)) > digits:
            digits += 1
        log += f"{bare + digits}\n\n".encode()
        retry = b""
    return bytes(log) + END
