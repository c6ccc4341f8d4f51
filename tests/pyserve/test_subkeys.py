"""Sessions that stand beside a conversation's own, and dialects that tell how a session ended."""

from __future__ import annotations

import pytest

from pyserve import ApiError, StreamSession, StreamSessionManager, _core
from pyserve.sessions import Ending


def log_of(session: StreamSession) -> bytes:
    reader = session.read_from("earliest")
    log = b""
    while block := reader.read_ready():
        log += block
    return log


def test_a_subkey_is_no_part_of_the_conversations_name(manager: StreamSessionManager) -> None:
    own = manager.create_or_replace("c")
    beside = manager.create_or_replace("c", subkey="1")
    assert own.is_live  # not replaced
    assert (own.conversation_id, beside.conversation_id) == ("c", "c")
    assert (manager.get(own.key), manager.get(beside.key)) == (own, beside)
    assert manager.get("c") == own


def test_the_newest_of_a_conversation_is_found(manager: StreamSessionManager) -> None:
    assert manager.newest("c") is None
    manager.create_or_replace("c")
    first = manager.create_or_replace("c", subkey="1")
    assert manager.newest("c") == first
    again = manager.create_or_replace("c")
    assert manager.newest("c") == again
    assert manager.newest("c", owner="another") is None


def test_the_sessions_of_a_conversation_are_its_own_alone(manager: StreamSessionManager) -> None:
    made = [manager.create_or_replace("c", subkey=key) for key in ("", "1", "2")]
    manager.create_or_replace("c::model", subkey="1")
    manager.create_or_replace("cc", subkey="1")
    manager.create_or_replace("c", owner="another", subkey="1")
    assert manager.sessions_of("c") == made


def test_a_session_knows_for_how_long_it_was_not_read(
    manager: StreamSessionManager, clock: _core.ManualClock
) -> None:
    session = manager.create_or_replace("c")
    clock.advance(2)
    assert session.snapshot().unread_s == 2
    reader = session.read_from()
    clock.advance(2)
    assert session.snapshot().unread_s == 0
    reader.close()
    clock.advance(3)
    assert session.snapshot().unread_s == 3


def test_a_dialect_tells_every_ending(manager: StreamSessionManager) -> None:
    told: list[Ending] = []

    def tell(session: StreamSession, ending: Ending) -> bytes:
        assert session.is_live
        told.append(ending)
        return f"event: over\ndata: {ending.state} {ending.reason}\n\n".encode()

    manager.dialects["test"] = tell
    error = ApiError("shutdown")
    for name in "abc":
        manager.create_or_replace(name, dialect="test")
    sessions = [session for name in "abc" if (session := manager.get(name))]
    sessions[0].finalize("completed", "stop")
    sessions[1].cancel("abandoned")
    manager.fail_live(error)
    assert told == [
        Ending("completed", "stop"),
        Ending("cancelled", "abandoned"),
        Ending("failed", "shutdown", error),
    ]
    for session, ending in zip(sessions, told, strict=True):
        assert f"data: {ending.state} {ending.reason}\n".encode() in log_of(session)
        assert not session.cancel()  # and nobody is asked again
    assert len(told) == 3


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_what_is_no_error_is_told_by_the_last_line_alone(
    manager: StreamSessionManager, dialect: str
) -> None:
    for end, line in ((StreamSession.cancel, b"cancelled"), (StreamSession.finalize, b"completed")):
        session = manager.create_or_replace("c", dialect=dialect)
        end(session)
        assert log_of(session) == b": end " + line + b"\n"
