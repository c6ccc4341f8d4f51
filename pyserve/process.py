"""What a server asks of the process that it has to itself."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable


def fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed (``pyserve[speed]``), else None: asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def raise_descriptor_limit() -> int:
    """As many open files as the system lets this user have; a reader takes two. Returns how many.

    The soft limit is 1024 on most systems, for the sake of programs that use select().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS refuses its own "unlimited"
        return soft
    return hard
