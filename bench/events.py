"""The event that every producer of the bench makes; stream_event.hpp explains and checks it."""

from __future__ import annotations

import time

EVENT_BYTES = 220
DONE = b"data: [DONE]\n\n"

_BEFORE_SEQ = b'data: {"choices":[{"index":0,"delta":{"content":" token"}}],"seq":"'
_LINE_TAIL = b'"}\n\n'
_FORMAT = _BEFORE_SEQ + b'%08d","t":"%019d","pad":"%b' + _LINE_TAIL
_LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_PAD_BYTES = EVENT_BYTES - len(_FORMAT % (0, 0, b""))
_PADS = [(_LETTERS * 4)[at : at + _PAD_BYTES] for at in range(len(_LETTERS))]


def make_event(seq: int) -> bytes:
    """Event number `seq` of a stream, appended now."""
    return _FORMAT % (seq, time.monotonic_ns(), _PADS[seq % len(_PADS)])


def with_id(event: bytes, epoch: bytes, offset: int) -> bytes:
    """`event` as a log has it that begins it at `offset`: its id names where it ends."""
    start = offset + len(event) + len(b"id: -\n") + len(epoch)
    end = start + 1
    while end != start + len(b"%d" % end):
        end += 1
    return event[:-1] + b"id: %b-%d\n\n" % (epoch, end)


def make_log(events: int) -> bytes:
    """The whole log of a stream, as a file server would serve it."""
    log = bytearray(b"retry: 1000\n")
    for seq in range(events):
        log += with_id(make_event(seq), b"m3x9k2ab", len(log))
    return bytes(log + with_id(DONE, b"m3x9k2ab", len(log)) + b": end completed\n")
