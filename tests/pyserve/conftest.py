"""Fixtures of the unit tests: a manager whose time moves only when a test says so."""

from __future__ import annotations

import pytest

from pyserve import Config, StreamSession, StreamSessionManager, _core

CONFIG = Config(
    max_session_bytes=4096,
    max_total_bytes=1024 * 1024,
    session_ttl_s=300.0,
    heartbeat_interval_s=1.0,
)


@pytest.fixture
def clock() -> _core.ManualClock:
    return _core.ManualClock()


@pytest.fixture
def manager(clock: _core.ManualClock) -> StreamSessionManager:
    """Keeps 4 KiB of each session."""
    return StreamSessionManager(CONFIG, clock=clock)


@pytest.fixture
def session(manager: StreamSessionManager) -> StreamSession:
    return manager.create_or_replace("conversation")
