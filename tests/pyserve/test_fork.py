"""After fork() the child is refused, with a message, and the parent goes on."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable

import pytest

from pyserve import ForkedProcessError, StreamSession, StreamSessionManager, _core
from pyserve.sessions import SessionReader

Use = Callable[[StreamSessionManager, StreamSession, SessionReader], object]

USES: dict[str, Use] = {
    "create_or_replace": lambda m, s, r: m.create_or_replace("c"),
    "get": lambda m, s, r: m.get("c"),
    "lookup": lambda m, s, r: m.lookup(["c"]),
    "evict": lambda m, s, r: m.evict("c"),
    "evict_and_cancel": lambda m, s, r: m.evict_and_cancel("c"),
    "len": lambda m, s, r: len(m),
    "tick": lambda m, s, r: m._core.tick(),
    "live_sessions": lambda m, s, r: m._core.live_sessions(),
    "append": lambda m, s, r: s.append("data: a\n\n"),
    "append_event": lambda m, s, r: s.append_event("a"),
    "start": lambda m, s, r: s.start(),
    "end_input": lambda m, s, r: s.end_input(),
    "finalize": lambda m, s, r: s.finalize(),
    "fail": lambda m, s, r: s.finalize("failed"),
    "cancel": lambda m, s, r: s.cancel(),
    "snapshot": lambda m, s, r: s.snapshot(),
    "read_from": lambda m, s, r: s.read_from(),
    "attach": lambda m, s, r: s._core.attach(0),
    "read": lambda m, s, r: r.read_ready(),
    "notify": lambda m, s, r: r._core_reader.notify_when_readable(_core.Wakeup(), 1),
}


def in_child(run: Callable[[], object]) -> str:
    """What a forked child told: its exit and its words."""
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        # Python warns of a fork while threads run; that is the point here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        told = "nothing"
        try:
            told = str(run())
        except BaseException:
            told = traceback.format_exc()
        finally:
            os.write(write_end, told.encode()[-4000:])
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return f"exit {os.waitstatus_to_exitcode(status)}: {told}"


def test_every_use_of_a_parents_session_is_refused_in_the_child(
    manager: StreamSessionManager,
) -> None:
    session = manager.create_or_replace("c")
    session.append_event("before")
    reader = session.read_from()

    def use_all() -> str:
        refused = []
        for name, use in USES.items():
            try:
                use(manager, session, reader)
            except ForkedProcessError as error:
                assert "was made before fork()" in str(error)  # noqa: PT017
                assert "make one in the child" in str(error)  # noqa: PT017
                refused.append(name)
        return " ".join(refused)

    assert in_child(use_all) == "exit 0: " + " ".join(USES)
    # The parent goes on.
    session.append_event("after")
    session.finalize()
    log = reader.read_ready() or b""
    assert b"data: before\n" in log
    assert b"data: after\n" in log
    assert manager.get("c") == session


def test_a_child_makes_a_manager_of_its_own(manager: StreamSessionManager) -> None:
    manager.create_or_replace("c")

    def work() -> str:
        own = StreamSessionManager(manager.config).create_or_replace("c")
        own.append_event("a")
        own.finalize()
        return (own.read_from().read_ready() or b"").decode()

    told = in_child(work)
    assert told.startswith("exit 0: data: a\n")
    assert told.endswith(": end completed\n")


def test_a_child_lets_go_of_everything_without_harm() -> None:
    held: list[object] = []
    manager = StreamSessionManager()
    session = manager.create_or_replace("c", on_end=lambda _session: held.append("called"))
    session.append_event("x" * 100_000)
    reader = session.read_from()
    wakeup = _core.Wakeup()
    reader._core_reader.notify_when_readable(wakeup, 1)
    held += [manager, session, reader, wakeup]
    del manager, session, reader, wakeup

    def let_go() -> str:
        held.clear()
        return "done"

    assert in_child(let_go) == "exit 0: done"
    assert len(held) == 4
    kept = held[1]
    assert isinstance(kept, StreamSession)
    kept.append_event("the parent goes on")
    kept.finalize()
    assert held[-1] == "called"


def test_the_message_is_an_error_of_the_public_names() -> None:
    assert issubclass(ForkedProcessError, RuntimeError)
    with pytest.raises(ForkedProcessError):
        raise _core.ForkedProcessError
