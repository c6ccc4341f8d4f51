"""What every test of the routes has."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack

import pytest
from fake_upstream import FakeUpstream
from pump_spy import PumpSpy, spy_on_pump
from serving import Serve, Server, serving

from pyserve import _core
from pyserve.process import fastest_loop

Loops = Mapping[str, Callable[[], asyncio.AbstractEventLoop]]


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Loops:
    """asyncio's own loop, and for ``mark.asyncio(loop_factories=["asyncio", "uvloop"])`` both."""
    loops = {"asyncio": asyncio.new_event_loop}
    marker, uvloops = item.get_closest_marker("asyncio"), fastest_loop()
    if marker is not None and marker.kwargs and uvloops is not None:
        loops["uvloop"] = uvloops
    return loops


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as fake:
        yield fake


@pytest.fixture(params=["pump", "python"])
def delivery_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By whom a log's bytes are sent: a module that uses this runs twice."""
    if request.param == "python":
        monkeypatch.delattr(_core, "SocketPump", raising=False)
    elif not hasattr(_core, "SocketPump"):
        pytest.skip("there is no pump on this platform")
    return request.param


@pytest.fixture
def pump(monkeypatch: pytest.MonkeyPatch) -> PumpSpy:
    """What the pump is given."""
    return spy_on_pump(monkeypatch)


@pytest.fixture
async def serve(upstream: FakeUpstream) -> AsyncIterator[Serve]:
    """Starts a pyserve in front of the fake upstream, with settings of one's own."""
    async with AsyncExitStack() as stack:

        async def start(**settings: object) -> Server:
            return await stack.enter_async_context(serving(**{"upstream": upstream.url} | settings))

        yield start


@pytest.fixture
async def server(serve: Serve) -> Server:
    """pyserve in front of the fake upstream."""
    return await serve()


@pytest.fixture(autouse=True)
def _nothing_breaks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a client or an upstream does, nothing is logged as an error, no traceback least."""
    yield
    broken = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.levelno >= logging.ERROR or record.exc_info
    ]
    assert not broken
