"""Put the rooms together: an aiohttp application, by itself or inside somebody else's."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import orjson
from aiohttp import web

from pyserve.config import Config
from pyserve.errors import ApiError, ConfigError, MemoryBudgetError
from pyserve.producers.demo import demo_server
from pyserve.producers.generation import Generations
from pyserve.producers.local import local_model
from pyserve.producers.upstream import Upstream
from pyserve.routes.context import CONTEXT, Authenticate, Context, single_owner
from pyserve.routes.generate import add_generation_routes
from pyserve.routes.health import add_health_routes
from pyserve.routes.page import add_client_routes, add_page_routes
from pyserve.routes.proxy import add_proxy_routes
from pyserve.routes.streams import add_stream_routes
from pyserve.routes.upstream_page import add_upstream_page_routes
from pyserve.sender import deliveries_of
from pyserve.sessions import StreamSessionManager

log = logging.getLogger("pyserve")

#: How long readers may take to read the last events when the server stops.
SHUTDOWN_DRAIN_S = 2.0

_REQUEST_ID = "X-Request-Id"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Progress = Callable[[float], None]


def create_app(
    config: Config | None = None,
    *,
    authenticate: Authenticate = single_owner,
    on_load_progress: Progress = lambda _share: None,
) -> web.Application:
    """An aiohttp application with all of pyserve's routes; for ``add_subapp`` or to run by itself.

    `authenticate` names the owner of a request, who alone can read and stop what he starts.
    `on_load_progress` hears the share, 0 to 1, of a local model's load that is done.
    """
    config = config or Config()
    manager = StreamSessionManager(config)
    context = Context(config, manager, Generations(manager), authenticate)
    app = web.Application(
        middlewares=[_answer_every_error, error_middleware], client_max_size=config.max_body_bytes
    )
    app[CONTEXT] = context
    add_stream_routes(app)
    add_health_routes(app)
    add_client_routes(app)
    if config.upstream or config.model or config.demo:
        add_generation_routes(app)
        add_proxy_routes(app)
        (add_page_routes if config.ui == "pyserve" else add_upstream_page_routes)(app)

    async def run_parts(_app: web.Application) -> AsyncIterator[None]:
        async with _running_parts(context, on_load_progress):
            yield

    async def shut_down(_app: web.Application) -> None:
        await _end_streams(context)

    app.cleanup_ctx.append(run_parts)
    app.on_shutdown.append(shut_down)
    app.on_response_prepare.append(_name_request)
    return app


def setup(
    app: web.Application,
    config: Config | None = None,
    *,
    prefix: str,
    authenticate: Authenticate = single_owner,
) -> StreamSessionManager:
    """Add pyserve's routes to an application of one's own, under `prefix` such as ``"/llm"``.

    Returns:
        The manager, to create sessions that are read, looked up and stopped through those routes.
    """
    subapp = create_app(config, authenticate=authenticate)
    app.add_subapp(prefix, subapp)
    app.middlewares.append(error_middleware)
    return subapp[CONTEXT].manager


@asynccontextmanager
async def _running_parts(context: Context, on_load_progress: Progress) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        upstream = await _enter_upstream(stack, context.config, on_load_progress)
        if upstream is not None:
            await upstream.open()
            stack.push_async_callback(upstream.close)
            context.upstream = upstream
        stack.callback(deliveries_of(context.manager).close)
        ticking = asyncio.create_task(context.manager.run(), name="pyserve heartbeats")
        try:
            yield
        finally:
            ticking.cancel()
            with suppress(asyncio.CancelledError):
                await ticking


async def _enter_upstream(
    stack: AsyncExitStack, config: Config, on_load_progress: Progress
) -> Upstream | None:
    if config.demo:
        demo_url = await stack.enter_async_context(demo_server())
        return Upstream(lambda: demo_url, config)
    if config.model is not None:
        model = await stack.enter_async_context(local_model(config, on_load_progress))
        return Upstream(lambda: model.url, config, model.key)
    if config.upstream is not None:
        return Upstream(lambda: config.upstream, config, _read_upstream_key(config))
    return None


def _read_upstream_key(config: Config) -> str | None:
    key = os.environ.get("PYSERVE_UPSTREAM_KEY", "")
    if config.upstream_key_file is not None:
        try:
            key = config.upstream_key_file.read_text()
        except OSError as error:
            raise ConfigError(f"upstream_key_file cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:
            raise ConfigError("upstream_key_file is not a text file") from None
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("the upstream's key holds characters that a header cannot carry")
    return key or None


async def drain(app: web.Application, timeout_s: float) -> None:
    """Take no new generations and wait until the running ones are over, at most `timeout_s`."""
    context = app[CONTEXT]
    context.draining = True
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await context.generations.wait_idle()


async def _end_streams(context: Context) -> None:
    """Fail what still runs; give readers a moment to read that; reset who doesn't."""
    context.draining = True
    context.generations.fail_all(ApiError("shutdown"))
    context.manager.fail_live(ApiError("shutdown"))
    await deliveries_of(context.manager).drain(SHUTDOWN_DRAIN_S)


async def _name_request(request: web.Request, response: web.StreamResponse) -> None:
    """Put a request id on every answer; the client's own if it is one."""
    given = request.headers.get(_REQUEST_ID, "")
    sane = _SANE_REQUEST_ID.fullmatch(given) is not None
    response.headers[_REQUEST_ID] = given if sane else secrets.token_hex(8)


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn pyserve's own errors into answers, and nothing else, so that an embedding application
    can use pyserve's parts in its own handlers. :func:`setup` adds it."""
    try:
        return await handler(request)
    except ApiError as error:
        return _error_response(error)
    except MemoryBudgetError:
        return _error_response(ApiError("memory_budget", retry_after_s=1))


@web.middleware
async def _answer_every_error(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _translated(error)
    except Exception:
        log.exception("%s %s failed", request.method, request.rel_url.raw_path)
        return _error_response(ApiError("internal_error"))


def _error_response(error: ApiError) -> web.Response:
    response = web.Response(
        status=error.status, body=orjson.dumps(error.to_dict()), content_type="application/json"
    )
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response


def _translated(error: web.HTTPException) -> web.StreamResponse:
    """aiohttp's own answers in pyserve's shape."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        response = _error_response(ApiError("method_not_allowed"))
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        return response
    known = {404: "not_found", 413: "body_too_large"}
    if error.status in known:
        return _error_response(ApiError(known[error.status]))
    raise error  # an authenticate() that answers in its own words
