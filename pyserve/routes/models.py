"""The models: what there is for everybody, and their administration for who has the key.

The administration waits for what it asks for: a POST answers when the new version serves, or says
why it cannot. ``GET /admin/models/<name>`` tells meanwhile how far it is. Who leaves while he waits
stops nothing.
"""

from __future__ import annotations

import functools
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from pyserve.errors import ApiError, ConfigError, MissingExtraError
from pyserve.model_config import ModelConfig, model_from_dict
from pyserve.requests import parse_json_object, read_body
from pyserve.routes.context import Context, context_of
from pyserve.routes.proxy import forward
from pyserve.scheduling.models import Model

MAX_ADMIN_BODY_BYTES = 1024 * 1024

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add_model_routes(app: web.Application, admin_key: str | None) -> None:
    """``/v1/models``; and ``/admin/models``, if there is a key for it."""
    for path in ("/v1/models", "/models"):
        app.router.add_get(path, functools.partial(_list_models, path), allow_head=False)
    if admin_key is None:
        return

    def guarded(handler: _Handler) -> _Handler:
        return functools.partial(_check_key, admin_key.encode(), handler)

    app.router.add_get("/admin/models", guarded(_status_of_all), allow_head=False)
    app.router.add_post("/admin/models", guarded(_register))
    # A model's name may hold slashes.
    app.router.add_get("/admin/models/{name:.+}", guarded(_status), allow_head=False)
    app.router.add_post("/admin/models/{name:.+}/swap", guarded(_swap))
    app.router.add_delete("/admin/models/{name:.+}", guarded(_remove))


async def _list_models(path: str, request: web.Request) -> web.StreamResponse:
    context = context_of(request)
    await context.owner_of(request)
    sole = context.models.sole
    if sole is not None and sole.serving is not None:
        return await forward(request, sole.serving.upstream, path)
    listed = [_describe(context, model) for model in context.models.known]
    return web.Response(
        body=orjson.dumps({"object": "list", "data": listed}), content_type="application/json"
    )


def _describe(context: Context, model: Model) -> dict[str, Any]:
    """In OpenAI's form, and how it is."""
    serving = model.serving
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at),
        "owned_by": "pyserve",
        "version": serving.config.version if serving else None,
        "status": _status_word(model),
        "slots": serving.slots if serving else None,
        "running": serving.running if serving else 0,
        "waiting": context.scheduler.waiting_for(model),
    }


def _status_word(model: Model) -> str:
    if model.serving is None:
        return "loading"
    return "unhealthy" if model.serving.health.state == "ill" else "serving"


# --- for who has the key


async def _check_key(key: bytes, handler: _Handler, request: web.Request) -> web.StreamResponse:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    given_bytes = given.strip().encode(errors="surrogateescape")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given_bytes, key):
        raise ApiError("admin_key_required")
    return await handler(request)


async def _status_of_all(request: web.Request) -> web.Response:
    context = context_of(request)
    return _answer({"models": [_admin_view(context, model) for model in context.models]})


async def _status(request: web.Request) -> web.Response:
    context = context_of(request)
    return _answer(_admin_view(context, _model_named(request)))


async def _register(request: web.Request) -> web.Response:
    context = context_of(request)
    config = await _read_config(request)
    model = context.models.register(config)
    try:
        await context.models.loaded(model)
    except (ConfigError, MissingExtraError):
        raise _load_error(model) from None
    return _answer(_admin_view(context, model), status=201)


async def _swap(request: web.Request) -> web.Response:
    context = context_of(request)
    model = _model_named(request)
    if model.serving is None:
        raise ApiError("model_busy" if model.is_changing else "model_not_found")
    config = await _read_config(request, beside=model)
    try:
        await context.models.swap(model.name, config)
    except (ConfigError, MissingExtraError):
        raise _load_error(model) from None
    return _answer(_admin_view(context, model))


async def _remove(request: web.Request) -> web.Response:
    context = context_of(request)
    model = _model_named(request)
    await context.models.unregister(model.name)
    return _answer(_admin_view(context, model))


def _model_named(request: web.Request) -> Model:
    models = context_of(request).models
    model = models.get(request.match_info["name"])
    if model is None:
        raise ApiError("model_not_found", models=[each.name for each in models])
    return model


async def _read_config(request: web.Request, beside: Model | None = None) -> ModelConfig:
    body = await read_body(request, context_of(request).config, MAX_ADMIN_BODY_BYTES)
    given = parse_json_object(body or b"{}")
    try:
        if beside is None or beside.serving is None:
            return model_from_dict(given)
        if given.get("name", beside.name) != beside.name:
            raise ConfigError(f"{beside.name}: a swap cannot change the name")
        serving = beside.serving.config
        return model_from_dict(given, beside=serving, version=beside.next_version)
    except ConfigError as error:
        raise ApiError("invalid_model", detail=error.args[0]) from None  # for who has the key


def _load_error(model: Model) -> ApiError:
    """What llama.cpp or the upstream said is for who has the key, who may read it in the status."""
    failed = [version for version in model.versions if version.state == "failed"]
    return ApiError("model_load_failed", detail=failed[-1].error if failed else "")


def _admin_view(context: Context, model: Model) -> dict[str, Any]:
    return {**model.describe(), "waiting": context.scheduler.waiting_for(model)}


def _answer(told: dict[str, Any], status: int = 200) -> web.Response:
    body = orjson.dumps(told, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    return web.Response(status=status, body=body, content_type="application/json")
