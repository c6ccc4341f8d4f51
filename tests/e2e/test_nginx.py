"""Behind Debian's nginx with nothing but ``proxy_pass``: all of its proxy settings are defaults.

So nginx speaks HTTP/1.0 to pyserve, where the end of the connection ends a body: only a reset can
tell it that a body is not whole.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import quote

import aiohttp
import pytest
from fake_upstream import DONE, LAST_CHUNK, SSE_HEAD, FakeUpstream, chunk, stream, token
from llama import chat, new_conversation
from process import Process, Server, pyserve
from yarl import URL

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")

pytestmark = pytest.mark.skipif(NGINX is None and "CI" not in os.environ, reason="needs nginx")

CONFIG = """\
daemon off;
master_process off;
pid nginx.pid;
error_log stderr notice;
events {{}}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass {upstream};
        }}
    }}
}}
"""


@contextmanager
def nginx(prefix: Path, upstream_url: str) -> Iterator[str]:
    """nginx in front of `upstream_url`; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (prefix / "nginx.conf").write_text(CONFIG.format(port=port, upstream=upstream_url))
    with Process([NGINX, "-p", prefix, "-c", "nginx.conf", "-e", "stderr"]) as process:
        process.wait_for("event method")
        yield f"http://127.0.0.1:{port}"
        assert process.stop(signal.SIGTERM) == 0


@asynccontextmanager
async def site(tmp_path: Path, *arguments: str) -> AsyncIterator[tuple[FakeUpstream, Server, str]]:
    """A scripted upstream, pyserve in front of it, and the URL of an nginx in front of both."""
    async with FakeUpstream() as upstream:
        command = ("--upstream", upstream.url, "--drain-timeout", "0", *arguments)
        with pyserve(*command) as server, nginx(tmp_path, server.url) as url:
            yield upstream, server, url


def post(
    http: aiohttp.ClientSession, url: str, conversation_id: str
) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
    headers = {"X-Conversation-Id": conversation_id}
    return http.post(f"{url}/v1/chat/completions", json=chat(100), headers=headers)


async def look_up(
    http: aiohttp.ClientSession, url: str, conversation_id: str
) -> list[dict[str, object]]:
    body = {"conversation_ids": [conversation_id]}
    async with http.post(f"{url}/v1/streams/lookup", json=body) as answer:
        return await answer.json()


async def test_tokens_and_heartbeats_come_through_as_they_are_made(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    read = asyncio.Event()
    async with site(tmp_path, "--heartbeat-interval", "0.05") as (upstream, _, url):
        # The second token is not sent before the reader has the first one and a heartbeat.
        upstream.play(
            (SSE_HEAD, chunk(token("one")), read, chunk(token("two")), chunk(DONE), LAST_CHUNK)
        )
        async with post(http, url, "conversation") as answer:
            assert b'"one"' in await answer.content.readuntil(b"\n\n")
            assert await answer.content.readline() == b": ping\n"
            read.set()
            rest = await answer.read()
    assert b'"two"' in rest
    assert rest.endswith(b"\n\n: end completed\n")


async def test_a_generation_of_llama_cpp_is_resumed_looked_up_and_stopped(
    tmp_path: Path, served_llama: Server, http: aiohttp.ClientSession
) -> None:
    conversation_id = new_conversation()
    with nginx(tmp_path, served_llama.url) as url:
        path = quote(conversation_id, safe="")
        stream_url = URL(f"{url}/v1/stream/{path}", encoded=True)
        async with post(http, url, conversation_id) as answer:
            received = await answer.content.readexactly(1000)
            answer.close()
        async with http.get(stream_url.with_query({"from": "1000"})) as answer:
            received += await answer.read()
        async with http.get(stream_url) as answer:
            assert await answer.read() == received
        (found,) = await look_up(http, url, conversation_id)
        assert found["total_bytes"] == len(received)
        async with http.delete(stream_url) as answer:
            assert answer.status == 204
        assert await look_up(http, url, conversation_id) == []
        async with http.get(stream_url) as answer:
            assert answer.status == 404
            assert (await answer.json())["error"]["reason"] == "stream_not_found"


# More than all buffers on the way hold when the reader takes nothing, in events of 64 KB.
FLOOD = stream(*[token("x" * 65_000)] * 500, DONE)
FLOOD_BYTES = 65_000 * 500


@asynccontextmanager
async def stalled_reader(url: str, conversation_id: str) -> AsyncIterator[aiohttp.ClientResponse]:
    """A response whose body isn't read yet, with as little buffer as the system allows."""

    def small_socket(address: aiohttp.AddrInfoType) -> socket.socket:
        client = socket.socket(*address[:3])
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return client

    connector = aiohttp.TCPConnector(socket_factory=small_socket, force_close=True)
    async with (
        aiohttp.ClientSession(connector=connector, read_bufsize=1024) as http,
        post(http, url, conversation_id) as answer,
    ):
        yield answer


async def test_a_reader_whose_next_byte_was_dropped_sees_a_failure(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with site(tmp_path, "--max-session-bytes", "256KiB") as (upstream, _, url):
        upstream.play(FLOOD)
        async with stalled_reader(url, "conversation") as answer:
            while not (await look_up(http, url, "conversation"))[0]["is_done"]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()


async def test_at_a_shutdown_a_reader_who_follows_sees_the_end_and_one_who_stalls_a_failure(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    never = asyncio.Event()
    async with site(tmp_path, "--max-session-bytes", "64MiB") as (upstream, server, url):
        upstream.play((*FLOOD[:-2], never))
        async with stalled_reader(url, "conversation") as stalled:
            follower_url = f"{url}/v1/stream/conversation"
            async with http.get(follower_url) as follower:
                await follower.content.readexactly(FLOOD_BYTES)
                server.send(signal.SIGTERM)
                log = await follower.read()
            assert b'"reason":"shutdown"' in log
            assert log.endswith(b"\n\n: end failed shutdown\n")
            assert server.wait() == 0
            with pytest.raises(aiohttp.ClientPayloadError):
                await stalled.read()
