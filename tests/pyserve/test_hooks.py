"""on_cancel and on_end: called once, in order, outside every lock, and let go of afterwards."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable

import pytest

from pyserve import ApiError, SessionEndedError, StreamSession, StreamSessionManager

End = Callable[[StreamSession], object]


class Calls:
    """Two hooks that write down their calls."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def on_cancel(self) -> None:
        self.made.append("on_cancel")

    def on_end(self, session: StreamSession) -> None:
        self.made.append(f"on_end {session.conversation_id} {session.state}")

    def session(self, manager: StreamSessionManager, name: str = "c") -> StreamSession:
        return manager.create_or_replace(name, on_cancel=self.on_cancel, on_end=self.on_end)


CANCELS = [
    StreamSession.cancel,
    lambda s: s.manager.evict_and_cancel("c"),
    lambda s: s.manager.create_or_replace("c"),
]


@pytest.mark.parametrize("cancel", CANCELS, ids=["cancel", "evict", "replace"])
def test_a_cancel_calls_on_cancel_and_then_on_end(
    manager: StreamSessionManager, cancel: End
) -> None:
    calls = Calls()
    session = calls.session(manager)
    cancel(session)
    assert calls.made == ["on_cancel", "on_end c cancelled"]


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (StreamSession.finalize, "completed"),
        (lambda s: s.finalize("failed", "upstream_lost"), "failed"),
        (lambda s: s.fail(ApiError("shutdown")), "failed"),
        (lambda s: s.manager.fail_live(ApiError("shutdown")), "failed"),
    ],
)
def test_any_other_ending_calls_only_on_end(
    manager: StreamSessionManager, end: End, state: str
) -> None:
    calls = Calls()
    end(calls.session(manager))
    assert calls.made == [f"on_end c {state}"]


def test_an_event_that_is_too_large_calls_on_end(manager: StreamSessionManager) -> None:
    calls = Calls()
    session = calls.session(manager)
    with pytest.raises(ValueError, match="larger"):
        session.append_event("x" * 5000)
    assert calls.made == ["on_end c failed"]


def test_no_hook_is_called_twice(manager: StreamSessionManager) -> None:
    calls = Calls()
    session = calls.session(manager)
    session.cancel()
    session.cancel()
    session.finalize()
    manager.evict_and_cancel("c")
    manager.fail_live(ApiError("shutdown"))
    assert calls.made == ["on_cancel", "on_end c cancelled"]


def test_of_many_threads_that_end_a_session_one_calls_the_hooks(
    manager: StreamSessionManager,
) -> None:
    for _ in range(50):
        calls = Calls()
        session = calls.session(manager)
        together = threading.Barrier(4)

        def cancel(
            session: StreamSession = session, together: threading.Barrier = together
        ) -> None:
            together.wait()
            session.cancel()

        threads = [threading.Thread(target=cancel) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert calls.made == ["on_cancel", "on_end c cancelled"]


def test_the_replacement_is_in_place_when_the_hooks_run(manager: StreamSessionManager) -> None:
    seen: list[StreamSession | None] = []
    manager.create_or_replace("c", on_cancel=lambda: seen.append(manager.get("c")))
    replacement = manager.create_or_replace("c")
    assert seen == [replacement]


def test_on_end_reads_the_whole_log_and_finds_the_session_over(
    manager: StreamSessionManager,
) -> None:
    logs: list[bytes | None] = []

    def on_end(session: StreamSession) -> None:
        with pytest.raises(SessionEndedError):
            session.append_event("too late")
        logs.append(session.read_from().read_ready())

    session = manager.create_or_replace("c", on_end=on_end)
    session.append_event("a")
    session.finalize()
    assert logs[0] is not None
    assert logs[0].startswith(b"data: a\n")
    assert logs[0].endswith(b": end completed\n")


def test_a_hook_may_use_the_manager_freely(manager: StreamSessionManager) -> None:
    made: list[StreamSession] = []

    def on_cancel() -> None:
        manager.evict("c")
        made.append(manager.create_or_replace("c"))
        manager.lookup(["c"])
        assert len(manager) == 1

    manager.create_or_replace("c", on_cancel=on_cancel).cancel()
    assert manager.get("c") == made[0]


def test_a_session_that_is_stopped_while_it_is_made_still_calls_on_end(
    manager: StreamSessionManager, caplog: pytest.LogCaptureFixture
) -> None:
    # The first one's on_cancel runs inside the second create_or_replace().
    manager.create_or_replace("c", on_cancel=lambda: manager.evict_and_cancel("c"))
    calls = Calls()
    session = calls.session(manager)
    assert session.state == "cancelled"
    assert calls.made == ["on_cancel", "on_end c cancelled"]
    assert caplog.records == []


def test_a_hook_that_raises_is_logged_and_undoes_nothing(
    manager: StreamSessionManager, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[str] = []

    def fail() -> None:
        raise RuntimeError("the application's bug")

    def fail_too(session: StreamSession) -> None:
        ended.append(session.state)
        raise ValueError("another")

    session = manager.create_or_replace("c", on_cancel=fail, on_end=fail_too)
    with caplog.at_level(logging.ERROR, logger="pyserve"):
        assert session.cancel() is True
    assert (session.state, ended) == ("cancelled", ["cancelled"])
    told = [str(record.exc_info[1]) for record in caplog.records if record.exc_info]
    assert told == ["the application's bug", "another"]


def test_a_replacement_is_made_although_the_old_ones_hook_raises(
    manager: StreamSessionManager, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError

    manager.create_or_replace("c", on_cancel=fail)
    with caplog.at_level(logging.CRITICAL, logger="pyserve"):
        replacement = manager.create_or_replace("c")
    assert manager.get("c") == replacement
    assert replacement.is_live


@pytest.mark.parametrize("end", [*CANCELS, StreamSession.finalize])
def test_hooks_are_let_go_of_with_the_ending(manager: StreamSessionManager, end: End) -> None:
    class Held:
        """Knows its session, whose hooks know it: a cycle through C++, where gc sees nothing."""

        def __init__(self) -> None:
            self.session = manager.create_or_replace(
                "c", on_cancel=self.on_cancel, on_end=self.on_end
            )

        def on_cancel(self) -> None:
            pass

        def on_end(self, session: StreamSession) -> None:
            pass

    held = Held()
    gone = weakref.ref(held)
    end(held.session)
    del held
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("end", [*CANCELS, StreamSession.finalize])
def test_nothing_of_a_session_is_left_in_memory(manager: StreamSessionManager, end: End) -> None:
    calls = Calls()
    session = calls.session(manager)
    session.append_event("x" * 3000)
    session.append("data: unfinished")
    end(session)
    manager.evict_and_cancel("c")
    del session
    gc.collect()
    assert manager.used_bytes == 0


def test_a_manager_goes_with_its_last_reference(manager: StreamSessionManager) -> None:
    calls = Calls()
    other = StreamSessionManager(manager.config)
    calls.session(other, "ended").finalize()
    other.create_or_replace("live, without hooks").append_event("a")
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
