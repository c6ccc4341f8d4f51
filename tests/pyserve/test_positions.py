"""The grammar of `from=` and `Last-Event-ID`: what is a position, and what only looks like one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyserve.errors import ApiError
from pyserve.positions import (
    EARLIEST,
    MAX_OFFSET,
    START,
    Position,
    parse_event_id,
    parse_position,
)

NOT_POSITIONS = [
    "",
    " ",
    "-1",
    "+1",
    "1_0",
    "1e3",
    "1.0",
    "0x10",
    " 1",
    "1 ",
    "1\n",
    "\n1",
    "1\0",
    "12abc",
    "\u0661\u0662",  # Arabic digits, which int() takes
    "\uff11\uff12",  # full-width digits
    "\u00b2",
    "\U0001d7d9",
    "\u22121",  # a minus sign that is none
    "nan",
    "inf",
    "None",
    "Earliest",
    "EARLIEST",
    "earliest ",
    "latest",
    "-",
    "abc",
    "abc-",
    "-abc-1",
    "abc--1",
    "abc-1-2",
    "abc-+1",
    "abc- 1",
    "abc -1",
    "ABC-1",
    "äbc-1",
    "abc-\u0661",
    "abc-earliest",
    "a" * 14 + "-1",  # longer than the largest epoch
    "abc\n-1",
    "1,2",
    "1;2",
    "1&from=2",
    "\ud800",
    str(MAX_OFFSET + 1),
    "abc-" + str(MAX_OFFSET + 1),
    str(2**64),
    str(2**64 + 1),
    "9" * 19,
    "9" * 5000,  # int() of it raises
    "0" * 5000,
]


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("0", START),
        ("4711", Position(4711)),
        ("007", Position(7)),
        (str(MAX_OFFSET), Position(MAX_OFFSET)),
        ("0" * 30 + str(MAX_OFFSET), Position(MAX_OFFSET)),
        ("earliest", EARLIEST),
        ("m3x9k2-0", Position(0, "m3x9k2")),
        ("0-0", Position(0, "0")),
        ("1y2p0ij32e8e7-9223372036854775807", Position(MAX_OFFSET, "1y2p0ij32e8e7")),
    ],
)
def test_a_number_an_event_id_and_earliest_are_positions(text: str, position: Position) -> None:
    assert parse_position(text) == position


@pytest.mark.parametrize("text", NOT_POSITIONS, ids=lambda text: ascii(text)[:40])
def test_nothing_else_is_a_position(text: str) -> None:
    for parse in (parse_position, parse_event_id):
        with pytest.raises(ApiError) as raised:
            parse(text)
        assert (raised.value.reason, raised.value.status) == ("invalid_offset", 400)


@pytest.mark.parametrize("text", ["0", "4711", "earliest"])
def test_a_last_event_id_always_names_an_epoch(text: str) -> None:
    with pytest.raises(ApiError) as raised:
        parse_event_id(text)
    assert raised.value.reason == "invalid_offset"


def test_a_last_event_id_is_an_epoch_and_an_offset() -> None:
    assert parse_event_id("m3x9k2-4711") == Position(4711, "m3x9k2")


@given(st.integers(0, MAX_OFFSET), st.none() | st.from_regex(r"[0-9a-z]{1,13}", fullmatch=True))
def test_every_position_that_is_written_down_is_read_back(offset: int, epoch: str | None) -> None:
    text = str(offset) if epoch is None else f"{epoch}-{offset}"
    assert parse_position(text) == Position(offset, epoch)


@given(st.text())
def test_any_text_is_a_position_or_an_invalid_offset(text: str) -> None:
    try:
        position = parse_position(text)
    except ApiError as error:
        assert error.reason == "invalid_offset"  # noqa: PT017
    else:
        assert position == EARLIEST or text.isascii()
