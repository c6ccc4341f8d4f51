"""What comes through ``--ui upstream``: the page's files as they are, and nothing else."""

from __future__ import annotations

import gzip
import re
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from fake_upstream import FakeUpstream, answer
from process import Server, pyserve
from serving import Server as InProcess
from serving import serving

from pyserve import Config, ConfigError, create_app
from pyserve.routes.upstream_page import MAX_FILE_BYTES

PAGE = gzip.compress(b"<!doctype html>a page")
HEADERS = {
    "Content-Encoding": "gzip",
    "ETag": '"an etag"',
    "Cache-Control": "no-cache",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self'",
}


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as fake:
        fake.play(
            answer(200, PAGE, kind="text/html; charset=utf-8", **HEADERS, **{"Set-Cookie": "a=b"})
        )
        yield fake


@pytest.fixture
async def site(upstream: FakeUpstream) -> AsyncIterator[InProcess]:
    async with serving(upstream=upstream.url, ui="upstream") as server:
        yield server


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/index.html",
        "/sw.js",
        "/workbox-b3c04f83.js",
        "/manifest.webmanifest",
        "/favicon.ico",
        "/build.json",
        "/_app/version.json",
        "/_app/immutable/bundle.CheKa0wg.js",
        "/_app/immutable/assets/bundle.DeU5_J36.css",
        "/recommended-mcp/exa.ico",
    ],
)
async def test_a_file_comes_back_as_the_upstream_sent_it(
    upstream: FakeUpstream, site: InProcess, path: str
) -> None:
    response = await site.fetch("GET", path, {"Accept-Encoding": "gzip, br"})
    assert (response.status, response.body) == (200, PAGE)
    for name, value in HEADERS.items():
        assert response.headers[name.lower()] == value
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["vary"] == "Accept-Encoding"
    assert "set-cookie" not in response.headers
    asked = await upstream.exchange()
    assert (asked.method, asked.target) == ("GET", path)
    assert asked.headers["accept-encoding"] == "gzip, br"


async def test_nothing_of_the_client_s_is_passed_on_but_what_a_file_needs(
    upstream: FakeUpstream, site: InProcess
) -> None:
    secrets = {"Authorization": "Bearer secret", "Cookie": "sid=secret", "X-Api-Key": "secret"}
    await site.fetch("GET", "/?key=secret", {**secrets, "Accept-Encoding": "gzip"})
    asked = await upstream.exchange()
    assert asked.target == "/"
    assert "secret" not in str(asked)


async def test_a_known_etag_is_304(upstream: FakeUpstream, site: InProcess) -> None:
    upstream.play(answer(304, ETag='"an etag"'))
    response = await site.fetch("GET", "/", {"If-None-Match": '"an etag"'})
    assert (response.status, response.body) == (304, b"")
    assert response.headers["etag"] == '"an etag"'
    assert (await upstream.exchange()).headers["if-none-match"] == '"an etag"'


async def test_a_redirect_is_not_followed(upstream: FakeUpstream, site: InProcess) -> None:
    upstream.play(answer(302, Location="http://127.0.0.1:9/"))
    response = await site.fetch("GET", "/")
    assert response.status == 502
    assert "location" not in response.headers


async def test_a_file_that_breaks_off_is_an_error_and_no_half_page(
    upstream: FakeUpstream, site: InProcess
) -> None:
    upstream.play(answer(200, PAGE, kind="text/html")[:-1])
    response = await site.fetch("GET", "/")
    assert (response.status, response.error["reason"]) == (502, "upstream_lost")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/", "/sw.js"])
async def test_who_may_not_come_in_gets_no_file(
    upstream: FakeUpstream, method: str, path: str
) -> None:
    async def authenticate(request: web.Request) -> str:
        if "X-Key" not in request.headers:
            raise web.HTTPUnauthorized
        return "ada"

    config = Config(upstream=upstream.url, ui="upstream", health_interval_s=0)
    app = create_app(config, authenticate=authenticate)
    async with serving(app) as site:
        assert (await site.fetch(method, path)).status == 401
        assert upstream.exchanges == []
        assert (await site.fetch("GET", path, {"X-Key": "hers"})).status == 200


async def test_a_file_has_a_bound(upstream: FakeUpstream, site: InProcess) -> None:
    upstream.play(answer(200, bytes(MAX_FILE_BYTES)), answer(200, bytes(MAX_FILE_BYTES + 1)))
    assert len((await site.fetch("GET", "/sw.js")).body) == MAX_FILE_BYTES == 32 * 1024 * 1024
    response = await site.fetch("GET", "/sw.js")
    assert (response.status, response.error["reason"]) == (502, "upstream_invalid")


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("POST", "/", 405),
        ("POST", "/index.html", 405),
        ("PUT", "/sw.js", 405),
        ("DELETE", "/_app/version.json", 405),
        ("POST", "/slots?action=erase", 405),
        ("POST", "/slots/0?action=erase", 404),
        ("POST", "/tools", 404),
        ("GET", "/tools", 404),
        ("GET", "/cors-proxy?url=http://127.0.0.1:9/x.js", 404),
        ("GET", "/metrics", 404),
        ("GET", "/models/load", 404),
        ("GET", "/docs.json", 404),
        ("GET", "/slots/x.js", 404),
        ("GET", "/v1/x.js", 404),
        ("GET", "/_app/../slots.js", 404),
        ("GET", "/_app/%2e%2e/slots.js", 404),
        ("GET", "/_app/..%2fslots.js", 404),
        ("GET", "//127.0.0.1:9/x.js", 404),
        ("GET", "/.env.js", 404),
    ],
)
async def test_nothing_else_of_the_upstream_can_be_reached(
    upstream: FakeUpstream, site: InProcess, method: str, target: str, status: int
) -> None:
    response = await site.fetch(method, target)
    assert response.status == status
    assert upstream.exchanges == []


async def test_head_is_asked_as_head(upstream: FakeUpstream, site: InProcess) -> None:
    upstream.play(b"HTTP/1.1 200 OK\r\nContent-Length: 1287\r\nContent-Type: text/html\r\n\r\n")
    response = await site.fetch("HEAD", "/")
    assert response.status == 200
    assert response.headers["content-length"] == "1287"
    assert (await upstream.exchange()).method == "HEAD"


async def test_llama_cpp_s_page_and_all_that_its_service_worker_keeps_can_be_had(
    llama: Server,
) -> None:
    async with (
        serving(upstream=llama.url, ui="upstream") as site,
        aiohttp.ClientSession(f"http://127.0.0.1:{site.runner.addresses[0][1]}") as http,
    ):
        async with http.get("/sw.js") as response:
            worker = await response.text()
        files = re.findall(r'url:"([^"]*)"', worker)
        assert len(files) > 50
        for file in files:
            async with http.get(f"/{file.removeprefix('./')}") as response:
                assert response.status == 200, file


async def test_the_option_serves_the_page_of_a_model_s_own_llama_cpp(tiny_model: Path) -> None:
    with pyserve("--model", tiny_model, "--ui", "upstream") as server:
        async with aiohttp.ClientSession(server.url) as http, http.get("/") as response:
            assert response.status == 200
            assert response.content_type == "text/html"
            assert "_app/immutable/bundle" in await response.text()


def test_it_needs_an_upstream_that_has_a_page() -> None:
    with pytest.raises(ConfigError, match="ui is 'upstream', which needs an upstream or a model"):
        Config(ui="upstream", demo=True)
    with pytest.raises(ConfigError, match="ui is 'mine', not one of pyserve, upstream"):
        Config(ui="mine")  # type: ignore[arg-type]
    create_app(Config(ui="upstream", upstream="http://127.0.0.1:9"))
