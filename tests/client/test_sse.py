"""The decoder: WHATWG HTML, section 9.2.6, and comments."""

from __future__ import annotations

import time

import pytest

from pyserve.client.sse import Comment, Decoder, Event

STREAM = (
    b"\xef\xbb\xbfretry: 1000\ndata: first\nid: m3x9-42\n\n"
    b": ping\n"
    b"event: delta\r\ndata: W\xc3\xb6rter \xf0\x9f\x99\x82\r\ndata:  two\r\nid: m3x9-99\r\n\r\n"
    b"data\rdata\r\r"
    b"event: no data, no event\n\n"
    b"id: with\0nul\nunknown: field\ndata: \xff\n: within an event\n\n"
    b": end completed\n"
)
ITEMS = [
    Event("first", "message", "m3x9-42"),
    Comment("ping"),
    Event("Wörter 🙂\n two", "delta", "m3x9-99"),
    Event("\n", "message", "m3x9-99"),
    Comment("within an event"),
    Event("\N{REPLACEMENT CHARACTER}", "message", "m3x9-99"),
    Comment("end completed"),
]


def test_every_split_gives_the_same_events() -> None:
    for at in range(len(STREAM) + 1):
        decoder = Decoder()
        assert decoder.feed(STREAM[:at]) + decoder.feed(STREAM[at:]) == ITEMS, f"split at {at}"
    decoder = Decoder()
    assert [
        item for at in range(len(STREAM)) for item in decoder.feed(STREAM[at : at + 1])
    ] == ITEMS


@pytest.mark.parametrize(
    ("begun", "between"),
    [
        (b"", True),
        (b": ping\n", True),
        (b"data: x\n\n", True),
        (b": pi", False),
        (b"data: x\n", False),
    ],
)
def test_it_knows_whether_something_has_begun(begun: bytes, between: bool) -> None:
    decoder = Decoder()
    decoder.feed(begun)
    assert decoder.between_events is between


@pytest.mark.parametrize(
    ("event_id", "offset"),
    [("m3x9-42", 42), ("", None), ("42", None), ("m-4-2", None), ("M-1", None)],
)
def test_an_event_id_names_the_offset_behind_the_event(event_id: str, offset: int | None) -> None:
    assert Event("x", id=event_id).offset == offset


def test_a_long_line_in_small_pieces_costs_no_more_than_its_length() -> None:
    decoder = Decoder()
    piece = b"x" * 1000
    began = time.process_time()
    decoder.feed(b"data: ")
    for _ in range(30_000):
        decoder.feed(piece)
    (event,) = decoder.feed(b"\n\n")
    assert isinstance(event, Event)
    assert len(event.data) == 30_000_000
    assert time.process_time() - began < 2.0  # a copy of all for each piece would take minutes
