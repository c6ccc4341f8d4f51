"""When the next try comes, and when there is none."""

from __future__ import annotations

import asyncio

import pytest

from pyserve.client import UnavailableError, UnreachableError
from pyserve.client.transport import Backoff, Limits

LIMITS = Limits(
    stall_timeout_s=None,
    answer_timeout_s=10.0,
    give_up_after_s=60.0,
    first_delay_s=0.25,
    max_delay_s=10.0,
)


class Clock:
    """The loop's, which a test turns on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now_s)


def busy(retry_after_s: float | None = None) -> UnavailableError:
    error = UnavailableError(503, "model_loading", "The model is loading")
    error.retry_after_s = retry_after_s
    return error


def delays_s(clock: Clock, error: UnavailableError | UnreachableError) -> list[float]:
    """The pauses until it gives up, each slept through."""
    backoff = Backoff(LIMITS)
    delays = []
    while True:
        try:
            delays.append(backoff.next_delay_s(error, "reattach"))
        except type(error):
            return delays
        clock.now_s += delays[-1]


async def test_pauses_double_up_to_their_bound_until_patience_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        delays = delays_s(Clock(patch), UnreachableError("away"))
    assert 45 < sum(delays) <= 60
    for number, delay in enumerate(delays):
        bound = min(10.0, 0.25 * 2**number)
        assert bound / 2 <= delay <= bound


@pytest.mark.parametrize(
    ("retry_after_s", "tries"),
    [(60.0, 1), (110.0, 1), (121.0, 0), (45.0, 2)],
)
async def test_what_the_server_asks_for_is_waited_for_up_to_as_much_again(
    monkeypatch: pytest.MonkeyPatch, retry_after_s: float, tries: int
) -> None:
    with monkeypatch.context() as patch:
        delays = delays_s(Clock(patch), busy(retry_after_s))
    assert len(delays) == tries
    assert all(delay > retry_after_s for delay in delays)


async def test_who_has_no_patience_does_not_wait_for_the_server_either() -> None:
    with pytest.raises(UnavailableError):
        Backoff(Limits(None, 10.0, 0.0, 0.25, 10.0)).next_delay_s(busy(1.0), "attach")
