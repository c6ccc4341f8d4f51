"""Sessions as a producer and an embedding application use them: append, end, find, position."""

from __future__ import annotations

import threading
from collections.abc import Callable

import orjson
import pytest

from pyserve import (
    EARLIEST,
    ApiError,
    Config,
    EventTooLargeError,
    EventUnfinishedError,
    MemoryBudgetError,
    Position,
    SessionEndedError,
    StreamSession,
    StreamSessionManager,
    _core,
)
from pyserve.errors import Dialect
from pyserve.sessions import is_conversation_id

Append = Callable[[StreamSession], None]


def read_ready(session: StreamSession, position: Position | str | int = EARLIEST) -> bytes:
    """All that can be read without waiting."""
    reader = session.read_from(position)
    blocks = []
    while block := reader.read_ready():
        blocks.append(block)
    reader.close()
    return b"".join(blocks)


def data_lines(session: StreamSession) -> list[bytes]:
    """The data lines of the log."""
    return [line for line in read_ready(session).split(b"\n") if line.startswith(b"data")]


def fill(session: StreamSession, events: int = 30) -> None:
    """More than the 4 KiB that are kept."""
    for number in range(events):
        session.append_event(f"{number:03} " + "x" * 200)


# --- appending


@pytest.mark.parametrize(
    "pieces",
    [
        ["data: grüße\n\n"],
        [b"data: gr\xc3", b"\xbc\xc3\x9fe\n\n"],
        ["data: gr", "üße\n", "\n"],
        [bytearray(b"data: gr\xc3\xbc\xc3\x9fe\n\n")],
        [memoryview(b"data: gr\xc3\xbc\xc3\x9fe\n\n")],
        ["", "data: grüße\r\n\r\n", b""],
    ],
)
def test_text_and_bytes_may_be_split_anywhere(session: StreamSession, pieces: list[str]) -> None:
    for piece in pieces:
        session.append(piece)
    tail = f"retry: 1000\nid: {session.epoch}-{session.total_size}\n\n".encode()
    assert read_ready(session) == "data: grüße\n".encode() + tail


def test_an_unfinished_event_is_not_published(session: StreamSession) -> None:
    session.append("data: a\n\ndata: b\n")
    assert data_lines(session) == [b"data: a"]
    assert session.snapshot().pending_bytes == len("data: b\n")


def test_appending_starts_the_session(session: StreamSession) -> None:
    assert (session.state, session.is_live) == ("queued", True)
    assert session.start() is True
    assert session.start() is False
    assert session.state == "streaming"


@pytest.mark.parametrize("append", [lambda s: s.append("\n"), lambda s: s.append_event("a")])
def test_both_appends_start_it(session: StreamSession, append: Append) -> None:
    append(session)
    assert session.state == "streaming"


@pytest.mark.parametrize(
    "append",
    [
        lambda s: s.append("data: \ud800\n\n"),
        lambda s: s.append_event("\ud800"),
        lambda s: s.append_event("a", event="\udfff"),
    ],
)
def test_a_lone_surrogate_is_refused_and_leaves_nothing(
    session: StreamSession, append: Append
) -> None:
    with pytest.raises(UnicodeEncodeError):
        append(session)
    assert (session.total_size, session.snapshot().pending_bytes) == (0, 0)
    session.append_event("goes on")
    assert data_lines(session) == [b"data: goes on"]


def test_each_line_of_an_events_data_is_a_data_line(session: StreamSession) -> None:
    session.append_event("one\ntwo\rthree\r\nfour\n", event="delta")
    assert read_ready(session).startswith(
        b"event: delta\ndata: one\ndata: two\ndata: three\ndata: four\ndata: \n"
    )


def test_empty_data_is_an_event_too(session: StreamSession) -> None:
    session.append_event("")
    assert data_lines(session) == [b"data: "]


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\0b", "\n", "\r\ndata: x"])
def test_an_events_name_holds_no_line_end_and_no_nul(session: StreamSession, name: str) -> None:
    with pytest.raises(ValueError, match="event's name"):
        session.append_event("data", event=name)
    assert session.total_size == 0


def test_no_event_is_put_into_the_middle_of_another(session: StreamSession) -> None:
    session.append("data: a\n")
    with pytest.raises(EventUnfinishedError):
        session.append_event("b")
    session.append("\n")
    session.append_event("b")
    assert data_lines(session) == [b"data: a", b"data: b"]


@pytest.mark.parametrize(
    "append", [lambda s: s.append("data: a\n\n"), lambda s: s.append_event("a")]
)
@pytest.mark.parametrize("end", [StreamSession.finalize, StreamSession.cancel])
def test_nothing_is_appended_after_the_end(
    session: StreamSession, append: Append, end: Callable[[StreamSession], bool]
) -> None:
    end(session)
    size = session.total_size
    with pytest.raises(SessionEndedError):
        append(session)
    assert session.total_size == size


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
@pytest.mark.parametrize(
    "append",
    [
        lambda s: s.append_event("x" * 4096),
        lambda s: s.append("data: " + "x" * 4096),
        lambda s: s.append(": " + "x" * 4096),
        lambda s: s.append("data: x\n" * 512 + "\n"),
    ],
)
def test_an_event_larger_than_the_log_fails_the_session_and_says_so(
    manager: StreamSessionManager, append: Append, dialect: Dialect
) -> None:
    session = manager.create_or_replace("c", dialect=dialect)
    session.append_event("before")
    with pytest.raises(EventTooLargeError):
        append(session)
    assert (session.state, session.snapshot().reason) == ("failed", "event_too_large")
    error_event = ApiError("event_too_large").to_event(dialect).removesuffix(b"\n\n")
    log = read_ready(session)
    assert b"data: before\n" in log
    assert error_event + b"\nid: " in log
    assert log.endswith(b"\n\n: end failed event_too_large\n")


def largest_event(session: StreamSession) -> str:
    """An unfinished block that fills the cap to the last byte once its id and a blank line come."""
    frame = len(f"data: \nretry: 1000\nid: {session.epoch}-4096\n\n")
    return "data: " + "x" * (4096 - frame) + "\n"


def test_the_largest_event_fits(session: StreamSession) -> None:
    session.append(largest_event(session) + "\n")
    assert (session.total_size, session.dropped_prefix) == (4096, 0)


@pytest.mark.parametrize("end", [StreamSession.finalize, StreamSession.end_input])
def test_an_event_that_the_end_of_the_input_completes_is_held_to_the_limit_too(
    session: StreamSession, end: Callable[[StreamSession], object]
) -> None:
    session.append("data: x" + largest_event(session).removeprefix("data: "))
    with pytest.raises(EventTooLargeError):
        end(session)
    assert (session.state, session.snapshot().reason) == ("failed", "event_too_large")
    assert b'"reason":"event_too_large"' in read_ready(session)


def test_several_threads_append_whole_events() -> None:
    manager = StreamSessionManager(Config())
    session = manager.create_or_replace("c")
    threads_count, events_each = 4, 500
    together = threading.Barrier(threads_count)

    def produce(thread: int) -> None:
        together.wait()
        for number in range(events_each):
            session.append_event(f"{thread} {number}")

    threads = [threading.Thread(target=produce, args=(n,)) for n in range(threads_count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [line.split()[1:] for line in data_lines(session)]
    assert len(seen) == threads_count * events_each
    for number in range(threads_count):
        mine = [int(event) for thread, event in seen if int(thread) == number]
        assert mine == list(range(events_each))


# --- ending


@pytest.mark.parametrize("reason", [None, "unterminated", "stop"])
def test_a_completed_log_ends_with_a_comment(session: StreamSession, reason: str | None) -> None:
    session.append("data: a\n\ndata: last\n")
    assert session.finalize("completed", reason) is True
    assert data_lines(session) == [b"data: a", b"data: last"]
    assert read_ready(session).endswith(b"\n\n: end completed\n")
    assert (session.state, session.snapshot().reason) == ("completed", reason or "")


def test_completing_is_what_finalize_does_by_itself(session: StreamSession) -> None:
    assert session.finalize() is True
    assert read_ready(session) == b": end completed\n"


def test_a_line_that_broke_off_is_not_published(session: StreamSession) -> None:
    session.append("data: a\n\ndata: b\ndata: brok")
    session.finalize()
    assert data_lines(session) == [b"data: a"]


@pytest.mark.parametrize("reason", ["upstream_lost", "shutdown", None, "a_reason_of_my_own"])
def test_a_failed_log_tells_its_reason_twice(session: StreamSession, reason: str | None) -> None:
    session.append("data: a\n\ndata: dropped\n")
    assert session.finalize("failed", reason) is True
    expected = reason or "generation_failed"
    log = read_ready(session)
    assert log.endswith(f"\n\n: end failed {expected}\n".encode())
    good, error = data_lines(session)
    assert good == b"data: a"
    assert orjson.loads(error.removeprefix(b"data: "))["error"]["reason"] == expected
    assert (session.state, session.snapshot().reason) == ("failed", expected)


@pytest.mark.parametrize("reason", ["", "Upper", "two words", "a\nb", "ä", "x" * 65, "a-b"])
@pytest.mark.parametrize("state", ["completed", "failed"])
def test_a_reason_is_a_word(session: StreamSession, state: str, reason: str) -> None:
    with pytest.raises(ValueError, match="a reason is"):
        session.finalize(state, reason)
    assert session.is_live


@pytest.mark.parametrize("state", ["cancelled", "streaming", "queued", "", "done"])
def test_finalize_knows_two_states(session: StreamSession, state: str) -> None:
    with pytest.raises(ValueError, match="state must be"):
        session.finalize(state)
    assert session.is_live


def test_a_cancelled_log_drops_what_is_unfinished(session: StreamSession) -> None:
    session.append("data: a\n\ndata: b\n")
    assert session.cancel() is True
    assert data_lines(session) == [b"data: a"]
    assert read_ready(session).endswith(b"\n\n: end cancelled\n")
    assert (session.state, session.snapshot().reason) == ("cancelled", "cancelled")


def test_a_session_ends_once(session: StreamSession) -> None:
    assert session.finalize() is True
    log = read_ready(session)
    assert session.finalize() is False
    assert session.finalize("failed", "upstream_lost") is False
    assert session.cancel() is False
    assert session.fail(ApiError("shutdown")) is False
    session.end_input()
    assert read_ready(session) == log
    assert session.state == "completed"


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_whatever_an_error_tells_it_fits_the_smallest_log(
    manager: StreamSessionManager, dialect: Dialect
) -> None:
    session = manager.create_or_replace("c", dialect=dialect)
    fill(session)
    error = ApiError("upstream_error", "\x00" * 2000, upstream_type="t" * 60_000)
    assert session.fail(error) is True
    assert session.snapshot().reason == "upstream_error"
    assert b'"reason":"upstream_error"' in session.last_event()


def test_a_with_block_ends_its_session(manager: StreamSessionManager) -> None:
    with manager.create_or_replace("good") as good:
        good.append_event("a")
    with pytest.raises(RuntimeError), manager.create_or_replace("bad") as bad:
        raise RuntimeError
    with manager.create_or_replace("stopped") as stopped:
        stopped.cancel()
        stopped.append_event("too late")
    with manager.create_or_replace("mine") as mine:
        mine.finalize("failed", "upstream_lost")
    assert [s.state for s in (good, bad, stopped, mine)] == [
        "completed",
        "failed",
        "cancelled",
        "failed",
    ]
    assert bad.snapshot().reason == "generation_failed"


def test_the_last_event_is_the_newest_that_is_kept(session: StreamSession) -> None:
    assert session.last_event() == b""
    session.append_event("a")
    session.append_event("b")
    id_line = f"id: {session.epoch}-{session.total_size}\n\n".encode()
    session.append("data: unfinished")
    assert session.last_event() == b"data: b\n" + id_line
    session.finalize("failed")
    assert b"generation_failed" in session.last_event()


# --- finding


def test_views_of_one_session_are_equal(manager: StreamSessionManager) -> None:
    session = manager.create_or_replace("c")
    again = manager.get("c")
    assert again == session
    assert hash(again) == hash(session)
    assert manager.create_or_replace("c") != session
    assert session != "c"
    assert "'c'" in repr(session)
    assert "cancelled" in repr(session)


def test_an_owner_sees_only_his_own(manager: StreamSessionManager) -> None:
    alices = manager.create_or_replace("c", owner="alice", tag=b"\0tag\xff")
    assert (alices.owner, alices.conversation_id, alices.tag) == ("alice", "c", b"\0tag\xff")
    assert manager.get("c") is None
    assert manager.get("c", owner="bob") is None
    assert manager.lookup(["c"], owner="bob") == []
    assert manager.evict("c", owner="bob") is None
    assert manager.evict_and_cancel("c", owner="bob") is None
    bobs = manager.create_or_replace("c", owner="bob")
    assert (alices.is_live, bobs.is_live, len(manager)) == (True, True, 2)


def test_lookup_takes_prefixes_and_passes_over_what_is_no_id(manager: StreamSessionManager) -> None:
    for name in ("a", "a::m1", "a::m2", "ab", "a:m"):
        manager.create_or_replace(name)
    found = manager.lookup(["a", "a::m1", "", ".", "\ud800", "x" * 256, "zzz"])
    assert [session.conversation_id for session in found] == ["a", "a::m1", "a::m2"]


def test_an_epoch_limits_what_is_evicted(manager: StreamSessionManager) -> None:
    first = manager.create_or_replace("c")
    second = manager.create_or_replace("c")
    assert (first.state, first.snapshot().reason) == ("cancelled", "replaced")
    assert manager.evict_and_cancel("c", epoch=first.epoch) is None
    assert second.is_live
    assert manager.evict_and_cancel("c", epoch=second.epoch) == second
    assert (second.state, manager.get("c"), len(manager)) == ("cancelled", None, 0)


def test_an_evicted_generation_goes_on(manager: StreamSessionManager) -> None:
    session = manager.create_or_replace("c")
    assert manager.evict("c") == session
    session.append_event("a")
    assert session.is_live
    assert data_lines(session) == [b"data: a"]
    session.finalize()


def test_a_log_is_kept_for_its_ttl(manager: StreamSessionManager, clock: _core.ManualClock) -> None:
    session = manager.create_or_replace("c")
    clock.advance(1000)
    assert manager.get("c") == session
    session.finalize()
    clock.advance(299.5)
    assert manager.get("c") == session
    clock.advance(0.5)
    assert manager.get("c") is None


def test_live_sessions_that_fill_the_budget_refuse_new_ones() -> None:
    manager = StreamSessionManager(Config(max_session_bytes=4096, max_total_bytes=64 * 1024))
    live = []
    while manager.used_bytes <= 63 * 1024:
        live.append(manager.create_or_replace(str(len(live))))
    with pytest.raises(MemoryBudgetError):
        manager.create_or_replace("one too many")
    assert manager.get("one too many") is None
    live.pop(0).finalize()
    manager.create_or_replace("now it fits")
    assert manager.get("0") is None


def test_a_live_session_that_outgrows_the_budget_fails() -> None:
    manager = StreamSessionManager(Config(max_session_bytes=4096, max_total_bytes=64 * 1024))
    others = [manager.create_or_replace(str(number)) for number in range(62)]
    session = manager.create_or_replace("grows")
    with pytest.raises(MemoryBudgetError):
        fill(session)
    assert (session.state, session.snapshot().reason) == ("failed", "memory_budget")
    assert b'"reason":"memory_budget"' in session.last_event()
    assert all(other.is_live for other in others)


@pytest.mark.parametrize(
    "text", ["a", "a/b::model", " ", "ä" * 127, "x" * 255, "...", "..a", "%2F", "?#&", "\u2028"]
)
def test_conversation_ids(manager: StreamSessionManager, text: str) -> None:
    assert is_conversation_id(text)
    session = manager.create_or_replace(text)
    assert session.conversation_id == text
    assert manager.get(text) == session


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "x" * 256,
        "ä" * 128,
        "a\0",
        "a\n",
        "a\x1f",
        "a\x7f",
        "a\x80",
        "a\x9f",
        "\ud800",
    ],
)
def test_what_is_no_conversation_id(manager: StreamSessionManager, text: str) -> None:
    assert not is_conversation_id(text)
    with pytest.raises(ApiError) as raised:
        manager.create_or_replace(text)
    assert raised.value.reason == "invalid_conversation_id"
    assert len(manager) == 0


# --- positions


def test_every_kind_of_position(session: StreamSession) -> None:
    session.append_event("a")
    border = session.total_size
    session.append_event("b")
    session.finalize()
    log = read_ready(session, 0)
    assert len(log) == session.total_size
    for position in (0, "0", Position(0), f"{session.epoch}-0", "earliest", EARLIEST):
        assert read_ready(session, position) == log
    for position in (border, str(border), Position(border), f"{session.epoch}-{border}"):
        assert read_ready(session, position) == log[border:]
    assert read_ready(session, 3) == log[3:]
    assert read_ready(session, len(log)) == b""


def test_after_a_loss_earliest_is_the_oldest_event(session: StreamSession) -> None:
    fill(session)
    now = session.snapshot()
    assert 0 < session.dropped_prefix == now.first_offset
    assert 0 <= 4096 - (now.end_offset - now.first_offset) < 250
    reader = session.read_from("earliest")
    assert reader.offset == now.first_offset
    assert (reader.read_ready() or b"").startswith(b"data: ")


@pytest.mark.parametrize(
    ("position", "reason", "status"),
    [
        (0, "offset_lost", 400),
        ("1", "offset_lost", 400),
        (Position(1), "offset_lost", 400),
        (10**9, "offset_ahead", 400),
        (Position(2**63 - 1), "offset_ahead", 400),
        ("m3x9k2-0", "stream_replaced", 409),
        ("m3x9k2-9999999", "stream_replaced", 409),
        (-1, "invalid_offset", 400),
        (2**63, "invalid_offset", 400),
        ("-1", "invalid_offset", 400),
        ("", "invalid_offset", 400),
    ],
)
def test_bad_positions_are_told_apart(
    session: StreamSession, position: Position | str | int, reason: str, status: int
) -> None:
    fill(session)
    with pytest.raises(ApiError) as raised:
        session.read_from(position)
    assert (raised.value.reason, raised.value.status) == (reason, status)
    now = session.snapshot()
    if reason in ("offset_lost", "offset_ahead"):
        figures = {"first_offset": now.first_offset, "end_offset": now.end_offset}
        assert raised.value.figures == {**figures, "epoch": session.epoch}
    elif reason == "stream_replaced":
        assert raised.value.figures == {"epoch": session.epoch}
    assert now.readers == 0


def test_one_byte_beyond_the_end_is_ahead(session: StreamSession) -> None:
    session.append_event("a")
    assert session.resolve(Position(session.total_size)) == session.total_size
    with pytest.raises(ApiError) as raised:
        session.resolve(Position(session.total_size + 1))
    assert raised.value.reason == "offset_ahead"


def test_a_reader_that_was_overtaken_is_told(session: StreamSession) -> None:
    reader = session.read_from()
    fill(session)
    with pytest.raises(ApiError) as raised:
        reader.read_ready()
    assert raised.value.reason == "offset_lost"
    assert raised.value.figures["first_offset"] == session.dropped_prefix


def test_every_view_of_a_session_tells_its_errors_alike(manager: StreamSessionManager) -> None:
    session = manager.create_or_replace("c", dialect="anthropic", tag=b"mine")
    view = manager.get("c")
    assert view is not None
    assert (view.dialect, view.tag) == ("anthropic", b"mine")
    view.finalize("failed")
    assert session.last_event().startswith(b"event: error\n")


def test_the_ending_of_another_session_is_no_ending_of_this_one(
    manager: StreamSessionManager,
) -> None:
    mine, other = manager.create_or_replace("mine"), manager.create_or_replace("other")
    other.cancel()
    with pytest.raises(SessionEndedError), mine:
        other.append_event("x")
    assert mine.state == "failed"


def test_a_ttl_may_be_for_ever(clock: _core.ManualClock) -> None:
    manager = StreamSessionManager(Config(session_ttl_s=1e300), clock=clock)
    session = manager.create_or_replace("c")
    session.finalize()
    clock.advance(1e6)
    assert manager.get("c") == session
