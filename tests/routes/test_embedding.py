"""pyserve inside somebody else's application, with owners of its own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import web
from fake_upstream import DONE, SSE_HEAD, STALL, FakeUpstream, chunk, stream, token
from serving import Response, Server, serving, texts_of

import pyserve
from pyserve.app import create_app, setup

pytestmark = pytest.mark.usefixtures("delivery_path")

Embed = Callable[..., Awaitable[Server]]


def by_header(request: web.Request) -> str:
    """Who asks, as this application knows them."""
    user = request.headers.get("X-User", "")
    if not user:
        raise web.HTTPUnauthorized(text="who are you?", headers={"WWW-Authenticate": "Custom"})
    return user


async def by_header_slowly(request: web.Request) -> str:
    await asyncio.sleep(0)
    return by_header(request)


@pytest.fixture
async def embed(upstream: FakeUpstream) -> AsyncIterator[Embed]:
    """Serves an application with a route of its own and pyserve under a prefix."""
    async with AsyncExitStack() as stack:

        async def start(prefix: str = "/llm", **keywords: Any) -> Server:
            app = web.Application(client_max_size=100)

            async def own(request: web.Request) -> web.Response:
                return web.Response(text=f"own {len(await request.read())}")

            app.router.add_route("*", "/own", own)
            manager = setup(
                app,
                pyserve.Config(upstream=upstream.url, health_interval_s=0),
                prefix=prefix,
                **keywords,
            )

            async def stream_own(request: web.Request) -> web.StreamResponse:
                session = manager.get(request.match_info["name"])
                assert session is not None
                return await pyserve.stream_response(request, session)

            app.router.add_get("/mine/{name}", stream_own)
            server = await stack.enter_async_context(serving(app))
            server.embedded = manager
            return server

        yield start


async def post(server: Server, user: str, **headers: str) -> Response:
    pairs = {name.replace("_", "-"): value for name, value in headers.items()}
    pairs |= {"X-User": user, "X-Conversation-Id": "c"}
    target = "/llm/v1/chat/completions"
    return await server.open("POST", target, pairs, b'{"stream": true}')


# --- beside an application's own routes


@pytest.mark.parametrize("prefix", ["/llm", "/a/b", "/v1/stream"])
async def test_every_route_lives_under_the_prefix(
    embed: Embed, upstream: FakeUpstream, prefix: str
) -> None:
    server = await embed(prefix)
    path = prefix
    upstream.play(stream(token("a"), DONE))
    posted = await server.fetch(
        "POST", path + "/v1/completions", {"X-Conversation-Id": "a/ü"}, json={"stream": True}
    )
    assert texts_of(posted.body) == ["a", "[DONE]"]
    for target in ("/v1/stream/a/%C3%BC", "/v1/stream?conv_id=a/%C3%BC"):
        assert (await server.fetch("GET", path + target)).body == posted.body
    found = await server.fetch(
        "POST", path + "/v1/streams/lookup", json={"conversation_ids": ["a/ü"]}
    )
    assert [each["conversation_id"] for each in found.json()] == ["a/ü"]
    assert (await server.fetch("GET", path + "/health")).status == 200
    assert (await server.fetch("DELETE", path + "/v1/stream/a/%C3%BC")).status == 204
    assert (await server.fetch("GET", path + "/v1/stream/a/%C3%BC")).status == 404


async def test_the_applications_own_routes_answers_and_limits_stay_as_they_were(
    embed: Embed, upstream: FakeUpstream
) -> None:
    server = await embed()
    own = await server.fetch("POST", "/own", (), b"x" * 100)
    assert (own.status, own.body) == (200, b"own 100")
    assert "x-request-id" not in own.headers
    assert (await server.fetch("POST", "/own", (), b"x" * 101)).status == 413
    missing = await server.fetch("GET", "/nothing")
    assert (missing.status, missing.headers["content-type"]) == (404, "text/plain; charset=utf-8")
    assert (await server.fetch("GET", "/v1/stream/c")).body == b"404: Not Found"
    # and pyserve's limits are not the application's
    upstream.play(stream(DONE))
    big = await server.fetch("POST", "/llm/v1/completions", json={"prompt": "x" * 5000})
    assert big.status == 200


async def test_errors_under_the_prefix_have_pyserves_shape(embed: Embed) -> None:
    server = await embed()
    for method, target, status in (
        ("GET", "/llm/nothing", 404),
        ("GET", "/llm/v1/stream/c", 404),
        ("PUT", "/llm/v1/stream/c", 405),
        ("GET", "/llm/v1/stream/c%00", 400),
    ):
        response = await server.fetch(method, target)
        assert (response.status, response.error["code"]) == (status, status)
        assert response.headers["x-request-id"]


async def test_create_app_can_be_added_by_hand_twice(upstream: FakeUpstream) -> None:
    app = web.Application()
    for prefix in ("/one", "/two"):
        app.add_subapp(
            prefix, create_app(pyserve.Config(upstream=upstream.url, health_interval_s=0))
        )
    async with serving(app) as server:
        upstream.play(stream(DONE))
        headers = {"X-Conversation-Id": "c"}
        await server.fetch("POST", "/one/v1/completions", headers, json={"stream": True})
        assert (await server.fetch("GET", "/one/v1/stream/c")).status == 200
        assert (await server.fetch("GET", "/two/v1/stream/c")).status == 404


async def test_a_producer_of_ones_own_is_read_and_stopped_through_the_routes(embed: Embed) -> None:
    server = await embed()
    stopped = asyncio.Event()
    session = server.embedded.create_or_replace("c", on_cancel=stopped.set)
    session.append_event("one\ntwo", "word")
    for target in ("/llm/v1/stream/c", "/mine/c"):
        reading = await server.open("GET", target)
        assert (await reading.read_until(b"\n\n")).startswith(
            b"event: word\ndata: one\ndata: two\nretry: 1000\nid: "
        )
    last = {"Last-Event-ID": f"{session.epoch}-{session.total_size}"}
    resumed = await server.open("GET", "/mine/c", last)
    assert resumed.headers["x-stream-offset"] == str(session.total_size)
    session.append_event("three")
    assert (await resumed.read_until(b"\n\n")).startswith(b"data: three\n")
    assert (await server.fetch("DELETE", "/llm/v1/stream/c")).status == 204
    assert stopped.is_set()
    with pytest.raises(pyserve.SessionEndedError):
        session.append_event("four")


async def test_without_an_upstream_there_is_nothing_to_post_to() -> None:
    app = web.Application()
    manager = setup(app, prefix="/llm")
    async with serving(app) as server:
        manager.create_or_replace("c").append(token("a"))
        response = await server.fetch("POST", "/llm/v1/completions", json={"stream": True})
        assert (response.status, response.error["reason"]) == (404, "not_found")
        assert (await server.fetch("GET", "/llm/ready")).status == 200
        reading = await server.open("GET", "/llm/v1/stream/c")
        assert texts_of(await reading.read_until(b"\n\n")) == ["a"]


async def test_shutdown_of_the_application_ends_the_streams(
    embed: Embed, upstream: FakeUpstream
) -> None:
    server = await embed()
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    posted = await post(server, "ann")
    await posted.read_until(b"\n\n")
    await server.runner.cleanup()
    assert texts_of(await posted.read_to_end()) == ["a", "shutdown"]
    assert posted.end == "clean"


# --- owners


AUTHENTICATE = [by_header, by_header_slowly]


@pytest.mark.parametrize("authenticate", AUTHENTICATE)
async def test_owners_cannot_read_see_stop_replace_or_detect_each_others_streams(
    embed: Embed, upstream: FakeUpstream, authenticate: Any
) -> None:
    server = await embed(authenticate=authenticate)
    upstream.play((SSE_HEAD, chunk(token("ann's")), STALL))
    anns = await post(server, "ann", Idempotency_Key="k")
    await anns.read_until(b"\n\n")
    epoch = anns.headers["x-stream-epoch"]
    bob = {"X-User": "bob"}
    lookup = {"conversation_ids": ["c", "ann", ""]}

    async def everything(name: str) -> list[tuple[int, bytes]]:
        """All that bob can ask about a stream, as far as he can tell."""
        requests: list[tuple[str, str, dict[str, str]]] = [
            *(("GET", f"/llm/v1/stream/{name}{query}", {}) for query in ("", "?from=999999")),
            ("GET", f"/llm/v1/stream/{name}?from={epoch}-0", {}),
            ("GET", f"/llm/v1/stream/{name}", {"Last-Event-ID": "abc-5"}),
            ("GET", f"/llm/v1/stream?conv_id={name}", {}),
            ("HEAD", f"/llm/v1/stream/{name}", {}),
            ("DELETE", f"/llm/v1/stream/{name}?keep=true", {}),
            ("DELETE", f"/llm/v1/stream/{name}", {"If-Match": '"abc"'}),
            ("DELETE", f"/llm/v1/stream/{name}", {}),
        ]
        answers = [await server.fetch(m, target, bob | extra) for m, target, extra in requests]
        return [(answer.status, bytes(answer.body)) for answer in answers]

    assert await everything("c") == await everything("never-was")
    found = await server.fetch("POST", "/llm/v1/streams/lookup", bob, json=lookup)
    assert found.json() == []

    session = server.embedded.get("c", owner="ann")
    assert session is not None
    assert session.is_live
    upstream.play((SSE_HEAD, chunk(token("bob's")), STALL))
    for mode in ("reject", "attach", "replace"):
        bobs = await post(server, "bob", X_Stream_Conflict=mode, Idempotency_Key="k")
        assert texts_of(await bobs.read_until(b"\n\n")) == ["bob's"]
        await server.fetch("DELETE", "/llm/v1/stream/c", bob)
    assert session.is_live
    anns_again = await server.open("GET", "/llm/v1/stream/c", {"X-User": "ann"})
    assert texts_of(await anns_again.read_until(b"\n\n")) == ["ann's"]


@pytest.mark.parametrize("authenticate", AUTHENTICATE)
async def test_the_applications_own_refusal_is_the_answer_on_every_route(
    embed: Embed, upstream: FakeUpstream, authenticate: Any
) -> None:
    server = await embed(authenticate=authenticate)
    for method, target in (
        ("GET", "/v1/stream/c"),
        ("HEAD", "/v1/stream/c"),
        ("GET", "/v1/stream"),
        ("DELETE", "/v1/stream/c"),
        ("POST", "/v1/streams/lookup"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("POST", "/tokenize"),
    ):
        response = await server.fetch(method, "/llm" + target, {"X-Conversation-Id": "c"})
        assert response.status == 401, target
        assert response.headers["www-authenticate"] == "Custom"
        if method != "HEAD":
            assert response.body == b"who are you?"
    assert not upstream.exchanges
    assert (await server.fetch("GET", "/llm/health")).status == 200


async def test_an_authenticator_that_breaks_is_a_500_that_tells_nothing(
    embed: Embed, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_request: web.Request) -> str:
        raise ConnectionError("secret database")

    server = await embed(authenticate=broken)
    response = await server.fetch("GET", "/llm/v1/stream/c")
    assert response.status == 500
    assert response.error == {
        "code": 500,
        "type": "server_error",
        "message": "Internal server error",
        "reason": "internal_error",
    }
    assert [record.name for record in caplog.records if record.exc_info] == ["pyserve"]
    caplog.clear()  # it has to be logged: it is the application's bug


async def test_an_authenticator_may_read_the_body(embed: Embed, upstream: FakeUpstream) -> None:
    async def by_body(request: web.Request) -> str:
        return str(len(await request.read()))

    server = await embed(authenticate=by_body)
    upstream.play(stream(DONE))
    posted = await (await post(server, "")).whole()
    assert texts_of(posted.body) == ["[DONE]"]
    assert upstream.exchanges[0].body == b'{"stream": true}'


@pytest.mark.parametrize("owner", ["", "ü", "a\nb", "x" * 10_000, "a\0b"])
async def test_an_owner_may_have_any_name(embed: Embed, upstream: FakeUpstream, owner: str) -> None:
    server = await embed(authenticate=lambda _request: owner)
    upstream.play(stream(DONE))
    posted = await (await post(server, "")).whole()
    assert (await server.fetch("GET", "/llm/v1/stream/c")).body == posted.body
    session = server.embedded.get("c", owner=owner)
    assert session is not None
    assert session.owner == owner
