"""The grammar of a position in a stream: ``from=`` and ``Last-Event-ID``.

::

    position = offset | event-id | "earliest"
    event-id = epoch "-" offset
    offset   = 1*DIGIT            ; ASCII, at most 2^63-1
    epoch    = 1*(DIGIT / a-z)    ; base 36

Nothing else is a position: ``int()`` would also take ``+1``, ``1_0`` and other scripts' digits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pyserve.errors import ApiError

#: The largest offset that is taken, so that it fits a signed 64-bit integer in any client.
MAX_OFFSET = 2**63 - 1

# An epoch counts milliseconds: 13 digits of base 36 last for 5 million years. 19 digits hold 2^63.
_POSITION = re.compile(r"(?:(?P<epoch>[0-9a-z]{1,13})-)?(?P<offset>0*[0-9]{1,19})")
# Beyond this a number of leading zeros is no slip any more.
_MAX_TEXT_CHARS = 64


@dataclass(frozen=True)
class Position:
    """Where to read from. ``offset`` None: the oldest byte that is kept; ``epoch`` None: any."""

    offset: int | None
    epoch: str | None = None


START = Position(0)
EARLIEST = Position(None)


def parse_position(text: str) -> Position:
    """Parse the value of ``from``.

    Raises:
        ApiError: reason ``invalid_offset``.
    """
    if text == "earliest":
        return EARLIEST
    match = _POSITION.fullmatch(text) if len(text) <= _MAX_TEXT_CHARS else None
    if match is None or (offset := int(match["offset"])) > MAX_OFFSET:
        raise ApiError("invalid_offset")
    return Position(offset, match["epoch"])


def parse_event_id(text: str) -> Position:
    """Parse the value of ``Last-Event-ID``, which always names an epoch.

    Raises:
        ApiError: reason ``invalid_offset``.
    """
    position = parse_position(text)
    if position.epoch is None:
        raise ApiError("invalid_offset")
    return position
