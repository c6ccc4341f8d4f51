"""What can go wrong between the pump, a handler and a client: no loss looks like an end, nothing is
kept, on every kind of loop."""

import asyncio
import gc
import socket
from collections.abc import Callable

import pytest
from aiohttp import web
from fake_upstream import token
from pump_spy import PumpSpy, open_descriptors, pump_threads, until_blocked, wait_until_over
from serving import (
    Connection,
    Response,
    Serve,
    Server,
    log_of,
    request_bytes,
    serving,
    texts_of,
    until,
)

import pyserve
import pyserve.app
from pyserve import _core
from pyserve.app import create_app
from pyserve.delivery import stream_response
from pyserve.sender import deliveries_of

pytestmark = [
    pytest.mark.skipif(not hasattr(_core, "SocketPump"), reason="there is no pump here"),
    pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"]),
]

READ = "/v1/stream/c"


def filled(server: Server, size_bytes: int = 3_000_000) -> pyserve.StreamSession:
    """A live session with numbered events."""
    session = server.manager.create_or_replace("c")
    while session.total_size < size_bytes:
        session.append(token(f"{session.total_size} " + "x" * 900))
    return session


async def stalled(server: Server, pump: PumpSpy, target: str = READ) -> Response:
    """A reader whose pump can send no more, in the middle of a frame."""
    count = len(pump.deliveries) + 1
    connection = await server.connect(receive_buffer_bytes=4096)
    await connection.send(request_bytes("GET", target))
    response = await connection.response()
    await until_blocked(await pump.attached(count))
    return response


async def read_broken(response: Response, session: pyserve.StreamSession) -> None:
    """It ends with a reset, and what came before it is what the log begins with."""
    body = await response.read_to_end()
    assert response.end == "reset"
    assert 0 < len(body) < session.total_size
    assert log_of(session).startswith(body)


def half_close(connection: Connection) -> None:
    connection.socket.shutdown(socket.SHUT_WR)


LEAVINGS: dict[str, Callable[[Connection], None]] = {
    "closes": Connection.close,
    "resets": Connection.reset,
    "half-closes": half_close,
}


# --- clients that leave


@pytest.mark.parametrize("way", LEAVINGS)
async def test_a_client_that_left_before_its_answer_began_is_not_attached(
    pump: PumpSpy, way: str
) -> None:
    app = create_app()
    left = asyncio.Event()

    async def wait_for_the_end(request: web.Request, _response: web.StreamResponse) -> None:
        await left.wait()
        await until(lambda: request.transport is None or request.transport.is_closing())

    app.on_response_prepare.append(wait_for_the_end)
    async with serving(app) as server:
        session = filled(server)
        connection = await server.connect()
        await connection.send(request_bytes("GET", READ))
        await until(lambda: session.snapshot().readers == 1)
        LEAVINGS[way](connection)
        left.set()
        await until(lambda: session.snapshot().readers == 0)
        assert not pump.deliveries
        await until(lambda: not server.runner.server.connections)


@pytest.mark.parametrize("way", LEAVINGS)
async def test_a_client_that_leaves_while_its_head_is_unsent_is_not_attached(
    pump: PumpSpy, way: str
) -> None:
    app = create_app()
    value = "v" * 8_000

    async def grow(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update({f"X-Large-{n}": value for n in range(500)})

    app.on_response_prepare.append(grow)
    async with serving(app) as server:
        session = filled(server)
        connection = await server.connect(receive_buffer_bytes=4096)
        await connection.send(request_bytes("GET", READ))
        await connection.fill()
        LEAVINGS[way](connection)
        if way == "half-closes":
            while await connection.fill():
                pass
            assert not connection.buffer.endswith(b"0\r\n\r\n")
        await until(lambda: session.snapshot().readers == 0)
        assert not pump.deliveries


@pytest.mark.parametrize("way", LEAVINGS)
@pytest.mark.parametrize("busy", [True, False], ids=["blocked", "idle"])
async def test_a_client_that_leaves_while_it_is_pumped_is_noticed_at_once(
    serve: Serve, pump: PumpSpy, way: str, busy: bool
) -> None:
    server = await serve(heartbeat_interval_s=300.0)
    session = filled(server, 3_000_000 if busy else 1)
    if busy:
        reading = await stalled(server, pump)
    else:
        reading = await server.open("GET", READ)
        await reading.read_until(b"\n\n")
    LEAVINGS[way](reading.connection)
    await until(lambda: session.snapshot().readers == 0)
    assert pump.outcomes == ["gone"]
    assert session.is_live
    if way == "half-closes":
        await reading.read_to_end()
        assert reading.end in ("closed", "reset")


@pytest.mark.parametrize("way", LEAVINGS)
async def test_a_client_that_leaves_with_the_last_byte_breaks_nothing(
    server: Server, pump: PumpSpy, way: str
) -> None:
    session = filled(server, 400_000)
    session.finalize()
    connection = await server.connect(receive_buffer_bytes=1 << 20)

    def leave_at_the_end(delivery: _core.Delivery) -> None:
        wait_until_over(delivery)
        LEAVINGS[way](connection)

    pump.on_attached = leave_at_the_end
    await connection.send(request_bytes("GET", READ))
    await until(lambda: len(pump.deliveries) == 1 and not session.snapshot().readers)
    await until(lambda: not server.runner.server.connections)
    pump.on_attached = lambda _delivery: None
    assert (await server.fetch("GET", READ)).body == log_of(session)


# --- handlers that are cancelled


async def test_a_cancelled_handler_resets_its_connection_in_the_middle_of_a_frame(
    pump: PumpSpy,
) -> None:
    app = create_app()
    handlers: list[asyncio.Task[object] | None] = []

    @web.middleware
    async def note(request: web.Request, handler: pyserve.app.Handler) -> web.StreamResponse:
        handlers.append(asyncio.current_task())
        return await handler(request)

    app.middlewares.append(note)
    async with serving(app) as server:
        session = filled(server)
        reading = await stalled(server, pump)
        await reading.connection.send(request_bytes("GET", "/health"))
        (handler,) = handlers
        assert handler is not None
        handler.cancel()
        await until(lambda: session.snapshot().readers == 0)
        await read_broken(reading, session)
        await until(lambda: pump.outcomes == ["detached"])
        assert len(handlers) == 1  # the next request was not begun


@pytest.mark.parametrize("blocked", [True, False], ids=["half a frame", "whole frames"])
async def test_a_handler_that_gives_up_on_a_stream_cannot_answer_anything_else(
    pump: PumpSpy, blocked: bool
) -> None:
    app = create_app()
    give_up = asyncio.Event()

    async def limited(request: web.Request) -> web.StreamResponse:
        streaming = asyncio.create_task(stream_response(request, server.session("c")))
        await give_up.wait()
        streaming.cancel()
        await asyncio.gather(streaming, return_exceptions=True)
        return web.Response(text="something else")

    app.router.add_get("/limited", limited)
    async with serving(app) as server:
        session = filled(server, 3_000_000 if blocked else 1000)
        if blocked:
            reading = await stalled(server, pump, "/limited")
        else:
            reading = await server.open("GET", "/limited")
            await reading.read_until(log_of(session))
        give_up.set()
        await until(lambda: not server.runner.server.connections)
        body = await reading.read_to_end()
        assert reading.end == "reset"
        assert log_of(session).startswith(body)
        await until(lambda: pump.outcomes == ["detached"])


# --- the pump is quicker, or slower, than the handler


async def test_a_delivery_that_is_over_before_anyone_waits_for_it_is_not_missed(
    server: Server, pump: PumpSpy
) -> None:
    session = filled(server, 400_000)
    session.finalize()
    pump.on_attached = wait_until_over
    connection = await server.connect(receive_buffer_bytes=1 << 20)
    for _ in range(3):
        await connection.send(request_bytes("GET", READ))
        reading = await connection.response()
        assert (await reading.read_to_end(), reading.end) == (log_of(session), "clean")
    assert pump.outcomes == ["end"] * 3


async def test_a_blocked_reader_whose_next_bytes_are_dropped_keeps_what_is_on_its_way(
    serve: Serve, pump: PumpSpy
) -> None:
    server = await serve(max_session_bytes=1_000_000)
    session = filled(server, 900_000)
    before = log_of(session)
    reading = await stalled(server, pump)
    while session.dropped_prefix < 5_000_000:
        session.append(token("y" * 900))
    body = await reading.read_to_end()
    assert reading.end == "reset"
    assert before.startswith(body)
    assert pump.outcomes == ["lost"]
    await until(lambda: session.snapshot().readers == 0)


async def test_a_position_beyond_the_end_never_waits(server: Server, pump: PumpSpy) -> None:
    session = filled(server, 1)
    beyond = session.total_size + 1
    refused = await server.fetch("GET", f"{READ}?from={beyond}")
    assert (refused.status, refused.error["reason"]) == (400, "offset_ahead")
    lonely = _core.SocketPump(write_timeout_s=1, coalesce_s=0)
    with pytest.raises(_core.OffsetAheadError):
        lonely.attach(session._core, beyond, 0, _core.Wakeup(), 1)
    assert not pump.outcomes


# --- the end of a server


async def test_a_shutdown_tells_who_reads_and_resets_who_does_not(
    server: Server, pump: PumpSpy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyserve.app, "SHUTDOWN_DRAIN_S", 0.3)
    session = filled(server)
    blocked = await stalled(server, pump)
    readers = [await server.open("GET", f"{READ}?from={session.total_size}") for _ in range(20)]
    await pump.attached(21)
    await server.runner.cleanup()
    for reader in readers:
        await reader.read_to_end()
        assert reader.end == "clean"
        assert reader.body.endswith(b": end failed shutdown\n")
    await read_broken(blocked, session)
    assert pump.outcomes == ["detached"] + ["end"] * 20


async def read_in_all_ways(server: Server) -> None:
    """Readers that stay, leave and stall."""
    session = filled(server, 2_000_000)
    for _ in range(3):
        connection = await server.connect(receive_buffer_bytes=4096)
        await connection.send(request_bytes("GET", READ))
    readers = [await server.open("GET", f"{READ}?from={session.total_size}") for _ in range(60)]
    for index, reader in enumerate(readers[:30]):
        list(LEAVINGS.values())[index % 3](reader.connection)
    await until(lambda: session.snapshot().readers == 30)  # the stalled have had their time
    session.finalize()
    for reader in readers[30:]:
        assert (await reader.read_to_end(), reader.end) == (b": end completed\n", "clean")


async def serve_all_kinds_of_readers(serve: Serve) -> None:
    """A server's life."""
    server = await serve(write_timeout_s=0.2)
    await read_in_all_ways(server)
    server.manager.evict("c")
    await until(lambda: server.manager.used_bytes == 0)
    for connection in server.connections:
        connection.close()
    await server.runner.cleanup()


async def test_when_all_have_left_nothing_is_kept(serve: Serve) -> None:
    await serve_all_kinds_of_readers(serve)
    before = open_descriptors()
    await serve_all_kinds_of_readers(serve)
    await until(lambda: pump_threads() == 0)
    await until(lambda: len(open_descriptors()) <= len(before))


async def test_a_log_that_was_dropped_goes_with_its_last_reader(server: Server) -> None:
    filled(server, 500_000).finalize()
    for _ in range(3):
        connection = await server.connect(receive_buffer_bytes=4096)
        await connection.send(request_bytes("GET", READ))
    await until(lambda: server.session("c").snapshot().readers == 3)
    server.manager.evict("c")
    gc.collect()
    assert server.manager.used_bytes > 400_000
    for connection in server.connections:
        connection.close()
    await until(lambda: server.manager.used_bytes == 0)


# --- several loops


async def serve_a_few(name: str) -> None:
    """A server of this loop's own, with readers."""
    async with serving() as server:
        for round_ in range(5):
            session = server.manager.create_or_replace("c")
            session.append(token(f"{name} {round_}"))
            readers = [await server.open("GET", READ) for _ in range(10)]
            for reader in readers:
                await reader.read_until(b"\n\n")
            session.finalize()
            for reader in readers:
                assert texts_of(await reader.read_to_end()) == [f"{name} {round_}"]
                assert reader.end == "clean"


async def test_two_loops_in_two_threads_have_a_pump_each() -> None:
    await asyncio.gather(
        serve_a_few("here"), asyncio.to_thread(lambda: asyncio.run(serve_a_few("there")))
    )
    await until(lambda: pump_threads() == 0)


async def test_when_the_pump_is_closed_under_a_reader_he_is_reset(server: Server) -> None:
    session = server.manager.create_or_replace("c")
    session.append(token("a"))
    response = await server.open("GET", READ)
    await response.read_until(b"\n\n")
    deliveries_of(server.manager).close()
    await response.read_to_end()
    assert response.end == "reset"
    session.append(token("b"))
    again = await server.open("GET", READ)  # with a pump of its own
    session.finalize()
    assert texts_of(await again.read_to_end()) == ["a", "b"]


async def test_settings_at_their_largest_serve(serve: Serve) -> None:
    server = await serve(send_buffer_bytes=2**40, write_timeout_s=1e306, coalesce_ms=0)
    session = server.manager.create_or_replace("c")
    session.append(token("a"))
    response = await server.open("GET", READ)
    await response.read_until(b"\n\n")
    session.finalize()
    assert texts_of(await response.read_to_end()) == ["a"]


async def test_readers_that_block_hold_no_memory_of_the_log(serve: Serve) -> None:
    server = await serve(max_session_bytes=200_000, send_buffer_bytes=4096)
    session = server.manager.create_or_replace("c")
    for _ in range(20):
        for _ in range(80):
            session.append(token("x" * 900))
        connection = await server.connect(receive_buffer_bytes=4096)
        await connection.send(request_bytes("GET", READ + "?from=earliest"))
        await connection.response()
    await until(lambda: server.manager.used_bytes < 200_000 + 3 * 65536)
    assert session.snapshot().readers > 10  # some were overtaken before they blocked
    session.finalize()
