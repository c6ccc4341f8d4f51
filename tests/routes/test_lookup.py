"""POST /v1/streams/lookup: what the caller's conversations are doing."""

import asyncio
import time
from typing import Any

from fake_upstream import DONE, SSE_HEAD, STALL, FakeUpstream, answer, chunk, stream, token
from serving import Serve, Server


async def lookup(server: Server, *ids: str) -> list[dict[str, Any]]:
    response = await server.fetch(
        "POST", "/v1/streams/lookup", json={"conversation_ids": list(ids)}
    )
    assert response.status == 200
    assert response.headers["content-type"] == "application/json"
    return response.json()


async def test_nothing_is_an_empty_array(server: Server) -> None:
    assert await lookup(server) == []
    assert await lookup(server, "unknown") == []


async def test_a_live_stream_is_described(server: Server, upstream: FakeUpstream) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    before = int(time.time())
    posted = await server.post("c")
    body = await posted.read_until(b"\n\n")
    (found,) = await lookup(server, "c")
    assert before <= found.pop("started_at") <= time.time()
    assert found == {
        "conversation_id": "c",
        "is_done": False,
        "total_bytes": len(body),
        "completed_at": 0,
        "state": "streaming",
        "epoch": posted.headers["x-stream-epoch"],
        "first_offset": 0,
        "readers": 1,
        "reason": None,
    }


async def test_a_finished_stream_is_described(server: Server, upstream: FakeUpstream) -> None:
    upstream.play(stream(token("a"), DONE))
    posted = await (await server.post("c")).whole()
    (found,) = await lookup(server, "c")
    started_at, completed_at = found.pop("started_at"), found.pop("completed_at")
    assert isinstance(started_at, int)
    assert isinstance(completed_at, int)
    assert started_at <= completed_at <= time.time()
    assert found == {
        "conversation_id": "c",
        "is_done": True,
        "total_bytes": len(posted.body),
        "state": "completed",
        "epoch": posted.headers["x-stream-epoch"],
        "first_offset": 0,
        "readers": 0,
        "reason": None,
    }


async def test_states_and_reasons_are_told(serve: Serve, upstream: FakeUpstream) -> None:
    server = await serve(status_grace_s=0.0, max_session_bytes=4096)
    upstream.play((STALL,), answer(500), (SSE_HEAD, STALL), stream(token("a")), stream(DONE))
    for name in ("queued", "failed", "cancelled", "unterminated", "completed"):
        posted = await server.post(name)
        if name == "cancelled":
            await server.fetch("DELETE", "/v1/stream/cancelled?keep=true")
        if name != "queued":
            await posted.read_to_end()
    long = server.manager.create_or_replace("long")
    for number in range(100):
        long.append(token(str(number)))
    described = {
        found["conversation_id"]: (found["state"], found["is_done"], found["reason"])
        for found in await lookup(
            server, "queued", "failed", "cancelled", "unterminated", "completed", "long"
        )
    }
    assert described == {
        "queued": ("queued", False, None),
        "failed": ("failed", True, "upstream_error"),
        "cancelled": ("cancelled", True, "cancelled"),
        "unterminated": ("completed", True, "unterminated"),
        "completed": ("completed", True, None),
        "long": ("streaming", False, None),
    }
    (found,) = await lookup(server, "long")
    assert found["first_offset"] == long.dropped_prefix > 0
    assert found["total_bytes"] == long.total_size


async def test_an_id_finds_itself_and_those_with_a_model_behind_it(server: Server) -> None:
    for name in ("a", "a::m", "a::m::n", "a::", "a:m", "ab", "ab::m", "b::a", "A", "a\u0300::m"):
        server.manager.create_or_replace(name)

    async def names(*ids: str) -> list[str]:
        return sorted(found["conversation_id"] for found in await lookup(server, *ids))

    assert await names("a") == ["a", "a::", "a::m", "a::m::n"]
    assert await names("a::m") == ["a::m", "a::m::n"]
    assert await names("a::") == ["a::"]
    assert await names("ab") == ["ab", "ab::m"]
    assert await names("b") == ["b::a"]
    assert await names("a:") == []
    assert await names("a\u0300") == ["a\u0300::m"]
    assert await names("a", "a", "a::m", "ab") == ["a", "a::", "a::m", "a::m::n", "ab", "ab::m"]


async def test_what_is_no_wellformed_id_matches_nothing(server: Server) -> None:
    server.manager.create_or_replace("c")
    for odd in ("", ".", "..", "c\n", "c\u0000", "\u0085", "c" * 256, "ü" * 128):
        assert await lookup(server, odd) == []
        assert [found["conversation_id"] for found in await lookup(server, odd, "c")] == ["c"]


async def test_ten_thousand_ids_are_looked_up_at_once(server: Server) -> None:
    names = [f"conversation {number:05}" for number in range(10_000)]
    for name in names[::100]:
        server.manager.create_or_replace(name)
    found = await lookup(server, *names)
    assert [each["conversation_id"] for each in found] == names[::100]


async def test_the_cost_does_not_grow_with_the_number_of_sessions(server: Server) -> None:
    async def best_s() -> float:
        times = []
        for _ in range(20):
            begun = time.perf_counter()
            await lookup(server, "c")
            times.append(time.perf_counter() - begun)
        return min(times)

    server.manager.create_or_replace("c")
    few_s = await best_s()
    for number in range(20_000):
        server.manager.create_or_replace(f"other {number}")
    assert await best_s() < 10 * few_s + 0.01


async def test_there_is_no_route_that_lists_streams(server: Server) -> None:
    server.manager.create_or_replace("secret")
    for method in ("GET", "POST", "HEAD"):
        for target in ("/v1/stream", "/v1/streams", "/v1/stream/", "/v1/streams/", "/v1/streams/*"):
            response = await server.fetch(method, target)
            if (method, target) == ("POST", "/v1/streams"):
                assert response.status == 201  # which makes one
            else:
                assert response.status in (400, 404, 405)
            assert b"secret" not in response.body


async def test_streams_that_expired_or_were_stopped_are_not_found(serve: Serve) -> None:
    server = await serve(session_ttl_s=0.05)
    for name in ("c::expired", "c::stopped", "c::live"):
        server.manager.create_or_replace(name).append(token("a"))
    server.session("c::expired").finalize()
    await server.fetch("DELETE", "/v1/stream/c::stopped")
    await asyncio.sleep(0.06)
    assert [found["conversation_id"] for found in await lookup(server, "c")] == ["c::live"]
