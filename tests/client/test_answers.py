"""Starting, stopping, looking up; and what the client makes of the answers it gets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from aiohttp import web
from cutting_proxy import Cut, cutting_proxy
from fake_upstream import LAST_CHUNK, SSE_HEAD, STALL, FakeUpstream, answer, chunk, stream, token
from serving import Server, serving, until

import pyserve
from pyserve.client import (
    ActiveError,
    AnswerError,
    Client,
    ClientError,
    EventStream,
    GoneError,
    NotAllowedError,
    NotPyserveError,
    ReplacedError,
    UnavailableError,
    UnreachableError,
)
from pyserve.client.deltas import read_delta

MakeClient = Callable[..., Client]
DONE = b"data: [DONE]\n\n"
HELLO = [token("Hello"), token(", "), token("wörld"), DONE]
QUESTION = {"messages": [{"role": "user", "content": "Hi"}]}


def url_of(server: Server) -> str:
    host, port = server.runner.addresses[0][:2]
    return f"http://{host}:{port}"


async def text_of(events: EventStream) -> str:
    return "".join([read_delta(event).text async for event in events])


# --- starting


async def test_submit_starts_a_generation_and_reads_its_own_answer(
    generating: Server, upstream: FakeUpstream, make_client: MakeClient
) -> None:
    upstream.play(stream(*HELLO))
    answered = make_client(url_of(generating)).submit(QUESTION)
    assert await text_of(answered) == "Hello, wörld"
    assert answered.state == "completed"
    assert generating.session(answered.conversation_id).epoch == answered.epoch
    asked = await upstream.exchange()
    assert asked.target == "/v1/chat/completions"
    assert b'"stream":true' in asked.body


async def test_a_post_that_is_repeated_after_a_loss_starts_nothing_twice(
    generating: Server, upstream: FakeUpstream, make_client: MakeClient
) -> None:
    upstream.play(stream(*HELLO))
    async with cutting_proxy(generating.runner.addresses[0][:2]) as proxy:
        proxy.cuts += [Cut(0), Cut(0, "close"), Cut(b"Hel"), Cut(b"w\xc3")]
        answered = make_client(proxy.url).submit(QUESTION, "an id/with ü&?::model")
        assert await text_of(answered) == "Hello, wörld"
    assert answered.conversation_id == "an id/with ü&?::model"
    assert len(upstream.exchanges) == 1


async def test_a_post_whose_answer_was_never_seen_is_sent_again_and_attaches(
    generating: Server, upstream: FakeUpstream, make_client: MakeClient
) -> None:
    going_on = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(HELLO[0]), going_on, *map(chunk, HELLO[1:]), LAST_CHUNK))
    async with cutting_proxy(generating.runner.addresses[0][:2]) as proxy:
        client = make_client(proxy.url)
        reading = asyncio.create_task(text_of(client.submit(QUESTION, "chat")))
        await upstream.exchange()
        await proxy.refuse()
        going_on.set()
        await until(lambda: not generating.session("chat").is_live)
        await proxy.listen()
        assert await reading == "Hello, wörld"
    assert len(upstream.exchanges) == 1


async def test_a_live_stream_is_replaced_refused_or_joined_as_asked(
    generating: Server, upstream: FakeUpstream, make_client: MakeClient
) -> None:
    upstream.play((SSE_HEAD, chunk(HELLO[0]), STALL), stream(*HELLO))
    client = make_client(url_of(generating))
    first = client.submit(QUESTION, "chat")
    await anext(first)
    with pytest.raises(ActiveError) as caught:
        await text_of(client.submit(QUESTION, "chat", on_conflict="reject"))
    assert caught.value.status == 409
    joined = client.submit(QUESTION, "chat", on_conflict="attach")
    assert read_delta(await anext(joined)).text == "Hello"
    assert await text_of(client.submit(QUESTION, "chat")) == "Hello, wörld"
    assert await text_of(first) == ""
    assert first.state == "cancelled"


async def test_an_upstreams_early_error_is_raised_with_its_own_status(
    generating: Server, upstream: FakeUpstream, make_client: MakeClient
) -> None:
    upstream.play(answer(400, {"error": {"code": 400, "message": "no such sampler"}}))
    with pytest.raises(AnswerError, match="no such sampler") as caught:
        await text_of(make_client(url_of(generating)).submit(QUESTION))
    assert (caught.value.status, caught.value.reason) == (400, "upstream_error")
    assert len(upstream.exchanges) == 1


async def test_a_model_that_is_still_loading_is_waited_for(
    generating: Server, upstream: FakeUpstream, make_client: MakeClient
) -> None:
    loading = {"error": {"code": 503, "message": "Loading", "type": "unavailable_error"}}
    upstream.play(answer(503, loading, Retry_After="0"), stream(*HELLO))
    told: list[ClientError | None] = []
    client = make_client(url_of(generating))
    answered = client.submit(QUESTION, on_connection=lambda news: told.append(news.error))
    assert await text_of(answered) == "Hello, wörld"
    assert isinstance(told[0], UnavailableError)
    assert told[1] is None


async def test_a_generation_that_is_stopped_before_it_began_ends_as_cancelled(
    generating: Server, upstream: FakeUpstream, make_client: MakeClient
) -> None:
    upstream.play((STALL,))
    client = make_client(url_of(generating))
    answered = client.submit(QUESTION, "chat")
    reading = asyncio.create_task(text_of(answered))
    await upstream.exchange()
    await client.stop("chat")
    assert await reading == ""
    assert answered.state == "cancelled"


# --- stopping and looking up


async def test_stop_names_the_stream_it_means(server: Server, client: Client) -> None:
    older = server.manager.create_or_replace("chat")
    newer = server.manager.create_or_replace("chat")
    with pytest.raises(ReplacedError) as caught:
        await client.stop("chat", epoch=older.epoch)
    assert caught.value.status == 412
    assert newer.is_live
    await client.stop("chat", epoch=newer.epoch)
    assert newer.state == "cancelled"
    await client.stop("chat")  # as often as one likes


async def test_lookup_tells_what_there_is(server: Server, client: Client) -> None:
    server.manager.create_or_replace("a::model").append_event("hello")
    over = server.manager.create_or_replace("b")
    over.finalize("failed", "upstream_lost")
    first, second = await client.lookup(["a", "b", "unknown"])
    assert (first.conversation_id, first.state, first.is_live) == ("a::model", "streaming", True)
    assert first.completed_at is None
    assert (second.reason, second.epoch) == ("upstream_lost", over.epoch)
    assert (second.end_offset, second.is_live) == (over.total_size, False)
    assert second.completed_at is not None


async def test_a_lookup_survives_a_lost_connection(server: Server, make_client: MakeClient) -> None:
    server.manager.create_or_replace("chat")
    async with cutting_proxy(server.runner.addresses[0][:2]) as proxy:
        proxy.cuts += [Cut(0), Cut(5, "close")]
        assert [info.conversation_id for info in await make_client(proxy.url).lookup(["chat"])] == [
            "chat"
        ]
        assert not proxy.cuts


async def test_a_server_under_a_path_is_reached_there(make_client: MakeClient) -> None:
    app = web.Application()
    manager = pyserve.setup(app, prefix="/llm")
    with manager.create_or_replace("chat") as session:
        session.append_event("hello")
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        root = f"http://127.0.0.1:{runner.addresses[0][1]}"
        for url in (f"{root}/llm", f"{root}/llm/", f"{root}/llm/v1"):
            assert [event.data async for event in make_client(url).attach("chat")] == ["hello"]
        with pytest.raises(NotPyserveError):
            await make_client(root).lookup(["chat"])
    finally:
        await runner.cleanup()


# --- answers that are none


async def test_a_passing_trouble_is_followed_at_the_pace_that_the_server_asks_for(
    server: Server, upstream: FakeUpstream, make_client: MakeClient
) -> None:
    # The scripted server stands where pyserve, or a proxy in front of it, would.
    upstream.play(
        answer(502, b"<html>Bad Gateway</html>", kind="text/html"),
        answer(503, {"error": {"reason": "shutdown", "message": "going"}}, Retry_After="0"),
        answer(429, b"", Retry_After="4"),
        answer(403, b""),
    )
    waits: list[float] = []
    client = make_client(upstream.url, give_up_after_s=1.5)
    reading = client.attach("chat", on_connection=lambda news: waits.append(news.retry_in_s))
    with pytest.raises(UnavailableError) as caught:  # 4 s are more than twice what it has
        await anext(reading)
    assert caught.value.status == 429
    assert caught.value.retry_after_s == 4
    assert len(waits) == 2
    assert max(waits) <= 0.05


@pytest.mark.parametrize(
    ("told", "error"),
    [
        (answer(401, b"who are you"), NotAllowedError),
        (answer(403, {"error": {"reason": "forbidden", "message": "no"}}), NotAllowedError),
        (answer(404, b"<html>nginx</html>"), NotPyserveError),
        (answer(302, b"", Location="http://elsewhere/"), NotPyserveError),
        (answer(200, b"<html>hello</html>", kind="text/html"), NotPyserveError),
        (b"".join(stream(*HELLO)), NotPyserveError),  # an event stream without an epoch
        (answer(404, {"error": {"reason": "stream_not_found", "message": "no"}}), GoneError),
        (answer(409, {"error": {"reason": "replaced", "message": "no"}}), ReplacedError),
    ],
)
async def test_a_refusal_is_final_and_says_what_it_is(
    upstream: FakeUpstream, make_client: MakeClient, told: bytes, error: type[ClientError]
) -> None:
    upstream.play(told)
    client = make_client(upstream.url)
    for refused in (client.attach("chat"), client.submit(QUESTION)):
        with pytest.raises(ClientError) as caught:
            await anext(refused)
        assert type(caught.value) is error
    assert len(upstream.exchanges) == 2


async def test_a_refusal_that_breaks_off_is_a_loss(
    upstream: FakeUpstream, make_client: MakeClient
) -> None:
    gone = answer(404, {"error": {"reason": "stream_not_found", "message": "no"}})
    upstream.play(gone[:-1], gone)
    with pytest.raises(GoneError):
        await anext(make_client(upstream.url).attach("chat"))
    assert len(upstream.exchanges) == 2


@pytest.mark.parametrize(
    ("status", "reason"),
    [(500, "internal_error"), (502, "upstream_auth"), (503, "upstream_invalid")],
)
async def test_a_generation_that_fails_at_once_is_not_taken_for_an_outage(
    upstream: FakeUpstream, make_client: MakeClient, status: int, reason: str
) -> None:
    upstream.play(answer(status, {"error": {"reason": reason, "message": "no"}}))
    with pytest.raises(AnswerError) as caught:
        await anext(make_client(upstream.url).submit(QUESTION))
    assert type(caught.value) is AnswerError
    assert len(upstream.exchanges) == 1


async def test_an_answer_from_an_earlier_byte_than_asked_for_is_not_read(
    upstream: FakeUpstream, make_client: MakeClient
) -> None:
    headers = {"X_Stream_Epoch": "e1", "X_Stream_Offset": "0"}
    log = b"data: one\nid: e1-21\n\n"
    upstream.play(answer(200, log, kind="text/event-stream", **headers))
    reading = make_client(upstream.url, give_up_after_s=0.1).attach("chat")
    assert (await anext(reading)).data == "one"
    with pytest.raises(NotPyserveError, match="ignores where to read from"):  # when it stays so
        await anext(reading)


async def test_a_server_that_never_answers_is_given_up(
    upstream: FakeUpstream, make_client: MakeClient
) -> None:
    upstream.play((STALL,))
    client = make_client(upstream.url, answer_timeout_s=0.05, give_up_after_s=0.1)
    with pytest.raises(UnreachableError, match="no answer in time"):
        await anext(client.attach("chat"))


async def test_each_request_carries_headers_and_a_fresh_authorization(
    upstream: FakeUpstream, make_client: MakeClient
) -> None:
    upstream.play(answer(503, b""), answer(401, b""))
    asked_for: list[str | None] = []

    async def authorize(conversation_id: str | None) -> dict[str, str]:
        asked_for.append(conversation_id)
        return {"X-Stream-Token": f"token-{len(asked_for)}"}

    client = make_client(upstream.url, headers={"X-App": "mine"}, authorize=authorize)
    with pytest.raises(NotAllowedError):
        await anext(client.attach("chat"))
    with pytest.raises(NotAllowedError):
        await client.lookup(["chat"])
    assert asked_for == ["chat", "chat", None]
    sent = [exchange.headers for exchange in upstream.exchanges]
    assert [headers["x-stream-token"] for headers in sent] == ["token-1", "token-2", "token-3"]
    assert all(headers["x-app"] == "mine" for headers in sent)


@pytest.mark.parametrize(
    "url",
    [
        *("127.0.0.1:8000", "ftp://host", "http://", "http://u@h", "http://h?q", "http://h:x"),
        *("http://h:65536", "http://h:0", "http://[::1", "http://a..b", "http://\udcff"),
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        Client(url)


async def test_a_stream_that_fails_at_shutdown_says_so(make_client: MakeClient) -> None:
    async with serving() as server:
        server.manager.create_or_replace("chat").append_event("hello")
        reading = make_client(url_of(server)).attach("chat")
        await anext(reading)
    assert [event.json()["error"]["reason"] async for event in reading] == ["shutdown"]
    assert (reading.state, reading.reason) == ("failed", "shutdown")
