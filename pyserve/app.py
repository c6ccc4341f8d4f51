"""Put the rooms together: an aiohttp application, by itself or inside somebody else's."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress

import orjson
from aiohttp import web
from aiohttp.typedefs import Middleware

from pyserve.config import NO_PAGE, Config
from pyserve.errors import ApiError, ConfigError, MemoryBudgetError
from pyserve.jobs.registry import JobRegistry
from pyserve.model_config import ModelConfig
from pyserve.producers.demo import MODEL as DEMO_MODEL
from pyserve.producers.generation import Generations
from pyserve.producers.sources import read_key
from pyserve.routes.context import CONTEXT, Authenticate, Context, single_owner
from pyserve.routes.generate import add_generation_routes
from pyserve.routes.health import add_health_routes
from pyserve.routes.jobs import add_job_routes
from pyserve.routes.models import add_model_routes
from pyserve.routes.page import add_client_routes, add_page_routes
from pyserve.routes.proxy import add_proxy_routes
from pyserve.routes.streams import add_stream_routes
from pyserve.routes.upstream_page import add_upstream_page_routes
from pyserve.scheduling.models import ModelRegistry
from pyserve.scheduling.scheduler import Scheduler
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
    models: Sequence[ModelConfig] | None = None,
    authenticate: Authenticate = single_owner,
    on_load_progress: Progress = lambda _share: None,
) -> web.Application:
    """An aiohttp application with all of pyserve's routes; for ``add_subapp`` or to run by itself.

    `models` are found by their names, the first one by requests that name none; an empty list is of
    models that come later. The one source of `config`, if it names one, takes any name.
    `authenticate` names the owner of a request, who alone can read and stop what he starts.
    `on_load_progress` hears the share, 0 to 1, of the local models' load that is done.
    """
    config = config or Config()
    manager = StreamSessionManager(config)
    registry = ModelRegistry(config, on_load_progress)
    scheduler = Scheduler(config, registry)
    generations = Generations(manager)
    jobs = JobRegistry(manager, generations, scheduler)
    context = Context(
        config, manager, generations, registry, scheduler, jobs, authenticate=authenticate
    )
    app = web.Application(
        middlewares=[_bound_connections(config), _answer_every_error, error_middleware],
        client_max_size=config.max_body_bytes,
    )
    app[CONTEXT] = context
    admin_key = _read_admin_key(config)
    _register_models(registry, config, models or ())
    add_stream_routes(app)
    add_health_routes(app)
    add_client_routes(app)
    if registry.known or models is not None or admin_key:
        add_generation_routes(app)
        add_job_routes(app)
        add_model_routes(app, admin_key)
        add_proxy_routes(app)
        (add_page_routes if config.ui == "pyserve" else add_upstream_page_routes)(app)
    elif config.ui == "upstream":
        raise ConfigError(NO_PAGE)

    # Not a generator in cleanup_ctx, within which there would be another: a loop that ends without
    # the application's cleanup closes them in any order, and an outer one complains of its inner.
    running = AsyncExitStack()

    async def start(_app: web.Application) -> None:
        await _start_parts(running, context)

    async def stop(_app: web.Application) -> None:
        await running.aclose()

    async def shut_down(_app: web.Application) -> None:
        await _end_streams(context)

    app.on_startup.append(start)
    app.on_shutdown.append(shut_down)
    app.on_cleanup.append(stop)
    app.on_response_prepare.append(_name_request)
    return app


def setup(
    app: web.Application,
    config: Config | None = None,
    *,
    prefix: str,
    models: Sequence[ModelConfig] | None = None,
    authenticate: Authenticate = single_owner,
) -> StreamSessionManager:
    """Add pyserve's routes to an application of one's own, under `prefix` such as ``"/llm"``.

    Returns:
        The manager, to create sessions that are read, looked up and stopped through those routes.
    """
    subapp = create_app(config, models=models, authenticate=authenticate)
    app.add_subapp(prefix, subapp)
    app.middlewares.append(error_middleware)
    return subapp[CONTEXT].manager


async def _start_parts(running: AsyncExitStack, context: Context) -> None:
    """Start what runs beside the requests; closing `running` stops it."""
    await running.enter_async_context(context.models.running())
    running.callback(deliveries_of(context.manager).close)
    for work, name in ((context.manager.run(), "heartbeats"), (context.jobs.run(), "jobs")):
        running.push_async_callback(_stop, asyncio.create_task(work, name=f"pyserve {name}"))


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _register_models(
    registry: ModelRegistry, config: Config, models: Sequence[ModelConfig]
) -> None:
    sole = _sole_source(config)
    if sole is not None and models:
        raise ConfigError("give each source of generations a name, or have only one")
    if sole is not None:
        registry.register(sole, takes_any_name=True)
    for model in models:
        if registry.get(model.name) is not None:
            raise ConfigError(f"there are two models of the name {model.name}")
        registry.register(model)


def _sole_source(config: Config) -> ModelConfig | None:
    """The source that a Config names as one that takes any model's name."""
    if config.demo:
        return ModelConfig(DEMO_MODEL, demo=True)
    if config.model is not None:
        return ModelConfig(
            re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._:/+@-]+", "-", config.model.stem).strip("-")
            or "model",
            file=config.model,
            slots=config.model_slots,
            context_tokens=config.model_context_tokens,
        )
    if config.upstream is not None:
        return ModelConfig("default", upstream=config.upstream, key=upstream_key(config))
    return None


def upstream_key(config: Config) -> str | None:
    """The key for the upstreams of options and environment variables.

    Raises:
        ConfigError: it cannot be read, or cannot stand in a header.
    """
    given = os.environ.get("PYSERVE_UPSTREAM_KEY", "")
    return read_key(config.upstream_key_file, given, "upstream_key_file")


def _read_admin_key(config: Config) -> str | None:
    return read_key(
        config.admin_key_file, os.environ.get("PYSERVE_ADMIN_KEY", ""), "admin_key_file"
    )


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


def _bound_connections(config: Config) -> Middleware:
    answering = 0

    @web.middleware
    async def bound(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer at most so many requests at once."""
        nonlocal answering
        if config.max_connections and answering >= config.max_connections:
            return _error_response(ApiError("too_many_connections", retry_after_s=1))
        answering += 1
        try:
            return await handler(request)
        finally:
            answering -= 1

    return bound


def _error_response(error: ApiError) -> web.Response:
    response = web.Response(
        status=error.status, body=orjson.dumps(error.to_dict()), content_type="application/json"
    )
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
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
