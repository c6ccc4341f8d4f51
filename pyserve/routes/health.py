"""Whether the process lives, and whether it can work."""

from __future__ import annotations

import orjson
from aiohttp import web

from pyserve.errors import ApiError
from pyserve.routes.context import context_of


def add_health_routes(app: web.Application) -> None:
    """``/health`` and ``/ready``."""
    app.router.add_get("/health", _health)
    app.router.add_get("/ready", _ready)


def _ok() -> web.Response:
    return web.Response(body=orjson.dumps({"status": "ok"}), content_type="application/json")


async def _health(_request: web.Request) -> web.Response:
    return _ok()


async def _ready(request: web.Request) -> web.Response:
    context = context_of(request)
    if context.draining:
        raise ApiError("shutdown", retry_after_s=1)
    if context.upstream is not None and not await context.upstream.is_healthy():
        raise ApiError("upstream_unreachable", status=503, retry_after_s=1)
    return _ok()
