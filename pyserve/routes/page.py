"""The chat page and pyserve.js: a handful of files, read once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import ETag, hdrs, web

WEB = Path(__file__).parent.parent / "web"

_CLIENT_FILES = ("pyserve.js", "pyserve.d.ts")

_CONTENT_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".ts": "text/plain",
    ".svg": "image/svg+xml",
}

_CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)

_HEADERS = {
    hdrs.CACHE_CONTROL: "no-cache",  # kept, but asked about: the parts must fit together
    "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class _File:
    body: bytes
    content_type: str
    etag: str


def add_client_routes(app: web.Application) -> None:
    """``/pyserve.js`` and its types, for pages of one's own."""
    for name in _CLIENT_FILES:
        app.router.add_get(f"/{name}", _handler(WEB / name))


def add_page_routes(app: web.Application) -> None:
    """``GET /`` and the files it needs beside the client, all relative to it, so that any prefix
    will do."""
    for path in sorted(WEB.rglob("*")):
        name = path.relative_to(WEB).as_posix()
        if path.suffix in _CONTENT_TYPES and name not in _CLIENT_FILES:
            app.router.add_get("/" if name == "index.html" else f"/{name}", _handler(path))
    add_slash_route(app)


def add_slash_route(app: web.Application) -> None:
    """Under a prefix of an embedding application a page's relative addresses need its slash."""
    app.router.add_get("", _add_slash)


def _handler(path: Path) -> Callable[[web.Request], Awaitable[web.Response]]:
    return functools.partial(_serve, _load(path))


def _load(path: Path) -> _File:
    body = path.read_bytes()
    return _File(body, _CONTENT_TYPES[path.suffix], hashlib.sha256(body).hexdigest()[:32])


async def _serve(file: _File, request: web.Request) -> web.Response:
    known = request.if_none_match or ()
    is_known = any(tag.value in (file.etag, "*") for tag in known)
    response = web.Response(status=304 if is_known else 200, headers=_HEADERS)
    response.etag = ETag(file.etag)
    if not is_known:
        response.body = file.body
        response.content_type = file.content_type
        response.charset = "utf-8"
    return response


async def _add_slash(request: web.Request) -> web.Response:
    name = request.rel_url.raw_path.rpartition("/")[2]
    return web.Response(status=308, headers={hdrs.LOCATION: f"{name}/"})
