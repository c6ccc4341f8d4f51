"""Whether the process lives, and whether it can work."""

from __future__ import annotations

import asyncio

import orjson
from aiohttp import web

from pyserve.errors import ApiError
from pyserve.routes.context import Context, context_of


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
    context.refuse_if_draining()
    if not await _has_healthy_model(context):
        raise ApiError("upstream_unreachable", status=503, retry_after_s=1)
    return _ok()


async def _has_healthy_model(context: Context) -> bool:
    """As far as is known; who isn't known to be well is asked. Without any model at all there are
    an embedder's own producers, which are ready."""
    models = list(context.models)
    if not models or any(model.is_healthy and model.is_polled for model in models):
        return True
    versions = [model.serving for model in models if model.serving is not None]
    looks = await asyncio.gather(*(version.health.look() for version in versions))
    return any(looks)
