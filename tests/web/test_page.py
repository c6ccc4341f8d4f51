"""The page's files over HTTP: types, caching, and what keeps the page safe."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from pyserve import Config, setup

WEB = Path(__file__).parents[2] / "pyserve" / "web"
FILES = sorted(
    path.relative_to(WEB).as_posix()
    for path in WEB.rglob("*")
    if path.suffix in (".html", ".css", ".js", ".svg", ".ts")
)
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "ts": "text/plain; charset=utf-8",
    "svg": "image/svg+xml; charset=utf-8",
}


@pytest.fixture
async def page() -> AsyncIterator[aiohttp.ClientSession]:
    """Under a prefix of somebody else's application."""
    app = web.Application()
    setup(app, Config(demo=True), prefix="/some/llm")
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}/some/llm/") as session:
        yield session
    await runner.cleanup()


@pytest.mark.parametrize("name", FILES)
async def test_each_file_is_served_as_what_it_is(page: aiohttp.ClientSession, name: str) -> None:
    address = "" if name == "index.html" else name
    async with page.get(address) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == TYPES[name.rpartition(".")[2]]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-cache"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert await answer.read() == (WEB / name).read_bytes()
        etag = answer.headers["ETag"]
    async with page.get(address, headers={"If-None-Match": f'"other", W/{etag}'}) as answer:
        assert (answer.status, await answer.read()) == (304, b"")
        assert answer.headers["ETag"] == etag
    async with page.get(address, headers={"If-None-Match": '"other"'}) as answer:
        assert answer.status == 200
    async with page.head(address) as answer:
        assert (answer.status, answer.headers["ETag"]) == (200, etag)
        assert int(answer.headers["Content-Length"]) == (WEB / name).stat().st_size


@pytest.mark.parametrize(
    "name", ["no-such.js", "package.json", "vendor/", "vendor/README.md", "..%2Fapp.py"]
)
async def test_other_files_are_not_there(page: aiohttp.ClientSession, name: str) -> None:
    async with page.get(name) as answer:
        assert answer.status == 404
        assert (await answer.json())["error"]["reason"] == "not_found"


async def test_the_address_without_its_slash_leads_to_the_page(page: aiohttp.ClientSession) -> None:
    async with page.get("/some/llm", allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (308, "llm/")
    async with page.get("/some/llm") as answer:
        assert (answer.status, answer.url.path) == (200, "/some/llm/")


def test_the_page_uses_its_own_files_only_by_relative_addresses() -> None:
    index = (WEB / "index.html").read_text()
    addresses = re.findall(r'(?:href|src)="([^"#]+)"', index)
    assert addresses
    assert all((WEB / address).is_file() for address in addresses)
    for path in WEB.glob("*.js"):
        for address in re.findall(r'from "([^"]+)"', path.read_text()):
            assert address.startswith("./"), (path.name, address)
            assert (WEB / address).is_file(), (path.name, address)


def test_nothing_inline_that_the_policy_would_block() -> None:
    index = (WEB / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", index)


def test_what_is_vendored_has_its_licence_and_version() -> None:
    note = (WEB / "vendor" / "README.md").read_text()
    for folder in (WEB / "vendor").iterdir():
        if not folder.is_dir():
            continue
        assert (folder / "LICENSE").is_file()
        version = re.search(rf"`{folder.name}/`.*\| (\d+\.\d+\.\d+) \|", note)
        assert version is not None
        assert any(f"v{version[1]} " in path.read_text()[:300] for path in folder.glob("*.js"))
