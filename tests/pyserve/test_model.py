"""The manager and its sessions, driven at random, against plain bytes.

Whatever is appended, dropped, ended, replaced or evicted in whatever order: what a reader gets is
exactly the model's bytes, or an explicit loss.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sse_model import EventTooLarge, LogModel

from pyserve import (
    ApiError,
    Config,
    EventTooLargeError,
    EventUnfinishedError,
    MemoryBudgetError,
    SessionEndedError,
    SessionReader,
    StreamSession,
    StreamSessionManager,
    _core,
)
from pyserve.errors import REASONS

SOAK = bool(os.environ.get("PYSERVE_SOAK"))

NAMES = st.sampled_from(["a", "a::b", "c/d", "ü"])
PICK = st.integers(0, 7)

# Fragments that join to anything: whole events, broken ones, every line end, fields that are ours.
FRAGMENTS = st.sampled_from(
    [
        b"data: x\n\n",
        b"data: ",
        b"data",
        b"data:\n",
        b"event: delta\n",
        b"id: 7\n",
        b"id\r\n",
        b"retry: 5\r",
        b"retrying: no\n",
        b": ping\ndata: z\n\n",
        b": ping\n: ping\n",
        b":\n\n",
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"\r\r",
        b"\xef\xbb\xbf",
        "grüße \u2028\x85".encode(),
        b"\0",
    ]
)


class Tracked:
    """A session, what it must be, and its readers."""

    def __init__(self, session: StreamSession, max_session_bytes: int, now_s: float) -> None:
        self.session = session
        self.model = LogModel(session.epoch, max_session_bytes)
        self.state = "queued"
        self.reason = ""
        self.last_append_s = now_s
        self.ended_at_s = 0.0
        self.readers: list[tuple[SessionReader, int]] = []

    @property
    def is_live(self) -> bool:
        return self.state in ("queued", "streaming")

    def check(self) -> None:
        now, model = self.session.snapshot(), self.model
        assert (now.state, now.reason, now.is_live) == (self.state, self.reason, self.is_live)
        assert (now.first_offset, now.end_offset) == (model.first_offset, model.end_offset)
        assert (now.last_event_start, now.last_event_end) == model.last_event
        assert now.pending_bytes == model.framer.pending_bytes
        assert now.readers == len(self.readers)
        assert now.first_offset in model.borders

    def check_log(self) -> None:
        reader = self.session.read_from("earliest")
        log = b""
        while block := reader.read_ready():
            log += block
        reader.close()
        assert block == (None if self.is_live else b"")
        assert log == self.model.bytes[self.model.first_offset :]
        if not self.is_live:
            words = f"failed {self.reason}" if self.state == "failed" else self.state
            assert log.endswith(f": end {words}\n".encode())


class SessionMachine(RuleBasedStateMachine):
    """With room for all: what is kept is known to the byte."""

    config: ClassVar = Config(
        max_session_bytes=4096,
        max_total_bytes=64 * 1024 * 1024,
        session_ttl_s=2.0,
        heartbeat_interval_s=1.0,
    )
    scale: ClassVar = 60  # bytes of filling for each step of a size

    @initialize()
    def make_manager(self) -> None:
        self.clock = _core.ManualClock()
        self.now_s = 0.0
        self.manager = StreamSessionManager(self.config, clock=self.clock)
        self.kept: dict[str, Tracked] = {}  # by name, as a client can find them
        self.tracked: list[Tracked] = []  # those that were evicted too
        self.ended: list[Tracked] = []  # of the kept ones, oldest ending first
        self.calls: list[tuple[str, StreamSession]] = []

    def pick(self, number: int) -> Tracked:
        """Any session at 0, else one of the live ones if there are any."""
        among = [t for t in self.tracked if t.is_live or not number] or self.tracked
        return among[number % len(among)]

    # --- making, finding, evicting

    @rule(name=NAMES)
    def create_or_replace(self, name: str) -> None:
        replaced = self.kept.get(name)
        try:
            session = self.manager.create_or_replace(
                name,
                on_cancel=lambda: self.calls.append(("on_cancel", session)),
                on_end=lambda ended: self.calls.append(("on_end", ended)),
            )
        except MemoryBudgetError:
            self.after_refusal()
            return
        tracked = Tracked(session, self.config.max_session_bytes, self.now_s)
        if replaced is not None:
            self.take_out(replaced)
            self.note_cancel(replaced, "replaced")
        self.kept[name] = tracked
        self.tracked.append(tracked)

    def after_refusal(self) -> None:
        raise AssertionError("there was room")

    @rule(name=NAMES)
    def get(self, name: str) -> None:
        self.collect_expired()
        tracked = self.kept.get(name)
        assert self.manager.get(name) == (tracked.session if tracked else None)

        expected = [self.kept[name].session for name in ("a", "a::b") if name in self.kept]
        assert self.manager.lookup(["a"]) == expected

    @rule(name=NAMES, by_epoch=st.booleans(), stop=st.booleans())
    def evict(self, name: str, by_epoch: bool, stop: bool) -> None:
        tracked = self.kept.get(name)
        evict = self.manager.evict_and_cancel if stop else self.manager.evict
        assert evict(name, epoch="0") is None
        epoch = tracked.session.epoch if tracked and by_epoch else ""
        assert evict(name, epoch=epoch) == (tracked.session if tracked else None)
        if tracked is not None:
            self.take_out(tracked)
            if stop:
                self.note_cancel(tracked, "cancelled")

    def take_out(self, tracked: Tracked) -> None:
        del self.kept[tracked.session.conversation_id]
        if tracked in self.ended:
            self.ended.remove(tracked)

    # --- producing

    @precondition(lambda self: self.tracked)
    @rule(which=PICK, fragments=st.lists(FRAGMENTS, min_size=1, max_size=8), size=PICK, cut=PICK)
    def append(self, which: int, fragments: list[bytes], size: int, cut: int) -> None:
        fragments.insert(size % len(fragments), b"x" * (size * self.scale))
        text = b"".join(fragments)
        after_cr = text.find(b"\r") + 1
        for piece in (text[:after_cr], text[after_cr : after_cr + cut], text[after_cr + cut :]):
            self.append_text(self.pick(which), piece)

    @precondition(lambda self: self.tracked)
    @rule(which=PICK, count=st.integers(1, 12), size=st.integers(1, 10))
    def append_many(self, which: int, count: int, size: int) -> None:
        event = b"data: " + b"y" * (size * self.scale) + b"\n\n"
        self.append_text(self.pick(which), event * count)

    @precondition(lambda self: self.tracked)
    @rule(
        which=PICK,
        missing=st.integers(-2, 60),
        line_end=st.sampled_from([b"", b"\n", b"\n\n"]),
        then=st.sampled_from(["complete", "end_input", "check"]),
    )
    def append_nearly_too_large(self, which: int, missing: int, line_end: bytes, then: str) -> None:
        tracked = self.pick(which)
        room = self.config.max_session_bytes - tracked.model.framer.pending_bytes - missing
        self.append_text(tracked, (b"\ndata: " + b"z" * room)[: max(room, 0)] + line_end)
        if then != "check":
            getattr(self, then)(tracked, "my_own")

    def append_text(self, tracked: Tracked, text: bytes) -> None:
        if not tracked.is_live:
            with pytest.raises(SessionEndedError):
                tracked.session.append(text)
            return
        tracked.state = "streaming"
        try:
            published = tracked.model.append(text)
        except EventTooLarge:
            with pytest.raises(EventTooLargeError):
                tracked.session.append(text)
            self.note_fail(tracked, "event_too_large")
        else:
            self.really_append(tracked, published, lambda: tracked.session.append(text))
        self.after_append(tracked)

    @precondition(lambda self: self.tracked)
    @rule(which=PICK, data=st.text(max_size=20), name=st.sampled_from([None, "", "delta"]))
    def append_event(self, which: int, data: str, name: str | None) -> None:
        tracked = self.pick(which)
        if tracked.is_live and tracked.model.framer.pending_bytes:
            with pytest.raises(EventUnfinishedError):
                tracked.session.append_event(data, name)
            return
        if not tracked.is_live:
            with pytest.raises(SessionEndedError):
                tracked.session.append_event(data, name)
            return
        lines = data.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        text = (f"event: {name}\n" if name else "") + "".join(f"data: {line}\n" for line in lines)
        tracked.state = "streaming"
        published = tracked.model.append(text.encode() + b"\n")
        self.really_append(tracked, published, lambda: tracked.session.append_event(data, name))
        self.after_append(tracked)

    def end_input(self, tracked: Tracked, _reason: str) -> None:
        if tracked.is_live:
            self.end_input_of(tracked, tracked.session.end_input)
        else:
            tracked.session.end_input()

    def end_input_of(self, tracked: Tracked, end: object) -> None:
        """`end` is end_input() or a finalize() that does it."""
        assert callable(end)
        try:
            published = tracked.model.end_input()
        except EventTooLarge:
            with pytest.raises(EventTooLargeError):
                end()
            self.note_fail(tracked, "event_too_large")
        else:
            end()
            self.note_append(tracked, published)

    def after_append(self, tracked: Tracked) -> None:
        """Room for what a small budget takes."""

    def really_append(self, tracked: Tracked, published: bool, append: Callable[[], None]) -> None:
        try:
            append()
        except MemoryBudgetError:
            self.after_budget_failure()
            self.note_append(tracked, published)
            self.note_fail(tracked, "memory_budget")
        else:
            self.note_append(tracked, published)

    def after_budget_failure(self) -> None:
        raise AssertionError("there was room")

    def note_append(self, tracked: Tracked, published: bool) -> None:
        if published:
            tracked.last_append_s = self.now_s

    # --- ending

    @precondition(lambda self: self.tracked)
    @rule(which=PICK, how=st.sampled_from(["complete", "fail", "cancel", "end_input"]))
    def end(self, which: int, how: str) -> None:
        # One rule for all, so that most steps make sessions longer.
        getattr(self, how)(self.pick(which), "my_own" if which % 2 else "upstream_lost")

    def complete(self, tracked: Tracked, reason: str) -> None:
        if not tracked.is_live:
            assert tracked.session.finalize("completed", reason) is False
            return
        self.end_input_of(tracked, lambda: tracked.session.finalize("completed", reason))
        if tracked.is_live:
            self.note_end(tracked, "completed", reason, b": end completed\n")
            self.expect_calls(("on_end", tracked.session))

    def fail(self, tracked: Tracked, reason: str) -> None:
        assert tracked.session.finalize("failed", reason) is tracked.is_live
        if tracked.is_live:
            self.note_fail(tracked, reason)

    def cancel(self, tracked: Tracked, _reason: str) -> None:
        assert tracked.session.cancel() is tracked.is_live
        self.note_cancel(tracked, "cancelled")

    def note_cancel(self, tracked: Tracked, reason: str) -> None:
        if tracked.is_live:
            self.note_end(tracked, "cancelled", reason, b": end cancelled\n")
            self.expect_calls(("on_cancel", tracked.session), ("on_end", tracked.session))

    def note_fail(self, tracked: Tracked, reason: str) -> None:
        known = reason if reason in REASONS else "generation_failed"
        error = ApiError(known)
        error.reason = reason
        tracked.model.framer.discard()
        tracked.model.append(error.to_event("openai"))
        self.note_end(tracked, "failed", reason, f": end failed {reason}\n".encode())
        self.expect_calls(("on_end", tracked.session))

    def note_end(self, tracked: Tracked, state: str, reason: str, line: bytes) -> None:
        tracked.model.end(line)
        tracked.state, tracked.reason, tracked.ended_at_s = state, reason, self.now_s
        if tracked in self.kept.values():
            self.ended.append(tracked)

    def expect_calls(self, *calls: tuple[str, StreamSession]) -> None:
        assert self.calls == list(calls)
        self.calls.clear()

    # --- time

    @rule(quarters=st.sampled_from([1, 2, 3, 4, 5, 9, 20]))
    def advance(self, quarters: int) -> None:
        self.clock.advance(quarters / 4)
        self.now_s += quarters / 4

    @rule()
    def tick(self) -> None:
        due_in_s = self.manager._core.tick()
        self.collect_expired()
        for tracked in self.tracked:
            silence_s = self.now_s - tracked.last_append_s
            if tracked.is_live and silence_s >= self.config.heartbeat_interval_s:
                tracked.model.heartbeat()
                tracked.last_append_s = self.now_s
        if any(tracked.is_live for tracked in self.kept.values()):
            assert due_in_s is not None
            assert 0 < due_in_s <= self.config.heartbeat_interval_s

    def collect_expired(self) -> None:
        for tracked in list(self.ended):
            if tracked.ended_at_s + self.config.session_ttl_s <= self.now_s:
                self.take_out(tracked)

    # --- reading

    @precondition(lambda self: self.tracked)
    @rule(which=PICK, share=st.floats(0, 1), by=st.sampled_from(["offset", "id", "earliest", "0"]))
    def attach(self, which: int, share: float, by: str) -> None:
        tracked = self.pick(which)
        model, session = tracked.model, tracked.session
        offset = {"earliest": model.first_offset, "0": 0}.get(by, int(share * model.end_offset))
        texts = {"earliest": "earliest", "id": f"{session.epoch}-{offset}"}
        position = texts.get(by, str(offset))
        if offset < model.first_offset:
            with pytest.raises(ApiError) as raised:
                session.read_from(position)
            assert raised.value.reason == "offset_lost"
            return
        tracked.readers.append((session.read_from(position), offset))

    @precondition(lambda self: self.tracked)
    @rule(which=PICK, ahead=st.integers(1, 2**62))
    def attach_ahead(self, which: int, ahead: int) -> None:
        tracked = self.pick(which)
        with pytest.raises(ApiError) as raised:
            tracked.session.read_from(tracked.model.end_offset + ahead)
        assert raised.value.reason == "offset_ahead"
        with pytest.raises(ApiError) as raised:
            tracked.session.read_from(f"0-{tracked.model.end_offset}")
        assert raised.value.reason == "stream_replaced"

    @precondition(lambda self: self.read_count)
    @rule(which=PICK, place=PICK, at_most=st.none() | st.integers(1, 3000))
    def read(self, which: int, place: int, at_most: int | None) -> None:
        tracked = [tracked for tracked in self.tracked if tracked.readers][which % self.read_count]
        reader, offset = tracked.readers.pop(place % len(tracked.readers))
        assert reader.offset == offset
        if offset < tracked.model.first_offset:
            with pytest.raises(ApiError) as raised:
                reader.read_ready()
            assert raised.value.reason == "offset_lost"
            reader.close()
            return
        block = reader._core_reader.read(at_most) if at_most else reader.read_ready()
        left = tracked.model.bytes[offset:]
        if not left:
            assert block == (None if tracked.is_live else b"")
        else:
            assert block
            assert left.startswith(block)
            assert len(block) <= (at_most or len(left))
        tracked.readers.append((reader, offset + len(block or b"")))

    @property
    def read_count(self) -> int:
        return sum(bool(tracked.readers) for tracked in self.tracked)

    @precondition(lambda self: self.read_count > 1)
    @rule(which=PICK)
    def close_reader(self, which: int) -> None:
        tracked = [tracked for tracked in self.tracked if tracked.readers][which % self.read_count]
        tracked.readers.pop(0)[0].close()

    # --- what always holds

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        if not hasattr(self, "manager"):
            return
        assert self.calls == []
        for tracked in self.tracked:
            tracked.check()
            tracked.check_log()
        assert len(self.manager) == len(self.kept)
        held = sum(t.model.end_offset - t.model.first_offset for t in self.tracked)
        assert self.manager.used_bytes >= held
        # Who is over, evicted and read by nobody is gone from here too.
        kept = self.kept.values()
        self.tracked = [t for t in self.tracked if t in kept or t.is_live or t.readers]

    def teardown(self) -> None:
        if not hasattr(self, "manager") or sys.exc_info()[0] is not None:
            return  # a step failed: its traceback holds sessions, and is what counts
        while self.tracked:
            self.tracked.pop().session.cancel()
        self.calls.clear()
        for name in self.kept:
            self.manager.evict(name)
        assert len(self.manager) == 0
        self.kept, self.ended = {}, []
        gc.collect()
        assert self.manager.used_bytes == 0


class TightMachine(SessionMachine):
    """A budget that large sessions exceed: finished ones go, then the oldest bytes of the growing
    one. What goes is up to the core, but it goes in order and by whole events."""

    config: ClassVar = Config(
        max_session_bytes=256 * 1024,
        max_total_bytes=256 * 1024,
        session_ttl_s=2.0,
        heartbeat_interval_s=1.0,
    )
    scale: ClassVar = 1000

    @rule(name=NAMES)
    def create_or_replace(self, name: str) -> None:
        super().create_or_replace(name)
        self.note_reclaimed()

    def after_refusal(self) -> None:
        self.note_reclaimed()
        assert self.ended == []
        assert self.manager.used_bytes + 1024 > self.config.max_total_bytes

    def after_budget_failure(self) -> None:
        self.note_reclaimed()
        assert self.ended == []  # finished ones went first

    def after_append(self, tracked: Tracked) -> None:
        now = tracked.session.snapshot()
        if now.first_offset > tracked.model.first_offset:
            tracked.model.drop_to(now.first_offset)
        self.note_reclaimed()
        full_chunk_bytes = 64 * 1024
        over = self.manager.used_bytes > self.config.max_total_bytes + full_chunk_bytes
        if over and tracked.is_live:  # one that failed by it ended after that
            assert self.ended == []
            assert now.end_offset - now.first_offset <= full_chunk_bytes

    def note_reclaimed(self) -> None:
        """Finished sessions may have gone: the oldest endings first."""
        found = {session.epoch for session in self.manager.lookup(self.kept)}
        self.collect_expired()
        gone = [t.session.epoch not in found for t in self.ended]
        assert gone == sorted(gone, reverse=True)
        for tracked in self.ended[: sum(gone)]:
            self.take_out(tracked)


for _machine, _examples in ((SessionMachine, 40), (TightMachine, 20)):
    _machine.TestCase.settings = settings(
        max_examples=_examples * (100 if SOAK else 1),
        stateful_step_count=50,
        deadline=None,
        derandomize=not SOAK,
        suppress_health_check=list(HealthCheck),
    )


class TestWithRoom(SessionMachine.TestCase):  # type: ignore[name-defined,misc]
    pass


class TestTightBudget(TightMachine.TestCase):  # type: ignore[name-defined,misc]
    pass
