"""The upstream's own page in place of pyserve's: llama.cpp's web UI, unchanged.

Only files come through here. The page's requests meet pyserve's routes, so its streams are
pyserve's; what of the upstream's API is not a route of pyserve's stays out of reach. Who may not
come in gets no file either.
"""

from __future__ import annotations

from aiohttp import hdrs, web

from pyserve.config import MIB
from pyserve.errors import ApiError
from pyserve.routes.context import context_of
from pyserve.routes.page import add_slash_route

# By folder and by ending, since names change with each build. No route of an API looks like this:
# the two JSON files that the page asks for are named in full.
_NAME = "[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_FILES = (
    r"index\.html|build\.json|_app/version\.json|"
    rf"(_app/({_NAME}/)*|recommended-mcp/)?{_NAME}\.(js|css|svg|ico|png|webp|woff2?|webmanifest)"
)

# llama.cpp has its files only packed, and answers 415 to who doesn't take that: what the browser
# unpacks goes to it, and the bytes and all that tells about them come back as they are.
_PASSED_ON = (hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.IF_NONE_MATCH, hdrs.IF_MODIFIED_SINCE)
_PASSED_BACK = (
    hdrs.CACHE_CONTROL,
    hdrs.CONTENT_ENCODING,
    hdrs.CONTENT_TYPE,
    hdrs.ETAG,
    hdrs.LAST_MODIFIED,
    hdrs.VARY,
    "Content-Security-Policy",
    "Cross-Origin-Embedder-Policy",
    "Cross-Origin-Opener-Policy",
    "Cross-Origin-Resource-Policy",
    "Referrer-Policy",
)

#: A file is held in memory as a whole, so that it can be an error until its last byte is here: this
#: bounds what one request may hold. llama.cpp's largest, its one script, has 2.6 MB.
MAX_FILE_BYTES = 32 * MIB


def add_upstream_page_routes(app: web.Application) -> None:
    """``GET`` and ``HEAD`` of ``/`` and of the page's files."""
    app.router.add_get("/", _page)
    app.router.add_get(f"/{{file:{_FILES}}}", _file)
    add_slash_route(app)


async def _page(request: web.Request) -> web.Response:
    return await _fetch(request, "/")


async def _file(request: web.Request) -> web.Response:
    return await _fetch(request, f"/{request.match_info['file']}")


async def _fetch(request: web.Request, path: str) -> web.Response:
    """The file, read whole before it is answered: a loss on the way is an error, not half a page.

    Raises:
        ApiError: the upstream failed, or the file is too large.
    """
    context = context_of(request)
    await context.owner_of(request)
    upstream = context.serving_version().upstream
    asked = {str(name): request.headers[name] for name in _PASSED_ON if name in request.headers}
    async with upstream.exchange(request.method, path, asked, as_is=True) as answer:
        body = bytearray()
        while block := await answer.read_block():
            body += block
            if len(body) > MAX_FILE_BYTES:
                raise ApiError("upstream_invalid")
    headers = {hdrs.VARY: hdrs.ACCEPT_ENCODING, "X-Content-Type-Options": "nosniff"}
    headers |= {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
    if request.method == hdrs.METH_HEAD and hdrs.CONTENT_LENGTH in answer.headers:
        headers[hdrs.CONTENT_LENGTH] = answer.headers[hdrs.CONTENT_LENGTH]
    return web.Response(status=answer.status, headers=headers, body=body or None)
