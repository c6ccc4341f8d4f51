"""A whole server in one process, for a program of one's own: what ``pyserve serve`` runs.

::

    server = pyserve.InferenceServer(max_connections=1000, request_timeout_s=600)
    server.register_model(pyserve.ModelConfig("qwen", "1", file="qwen3-4b.gguf", slots=4))
    async with server:                       # or: await server.start("127.0.0.1", 8000)
        print(server.url)
        await server.swap_model(pyserve.ModelConfig("qwen", "2", file="qwen3-4b-v2.gguf", slots=4))
        await server.unregister_model("qwen")
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

from aiohttp import web

from pyserve.app import Progress, create_app, drain
from pyserve.config import Config
from pyserve.errors import ApiError, ConfigError
from pyserve.model_config import ModelConfig, check_keys
from pyserve.routes.context import CONTEXT, Authenticate, single_owner
from pyserve.scheduling.models import ModelRegistry

_ACCESS_LOG_FORMAT = '%a "%r" %s %b %Tf s %{X-Request-Id}o'

# Responses end within SHUTDOWN_DRAIN_S or are reset; this is for what else a handler does then.
_HANDLER_TIMEOUT_S = 1.0

# Longer than the 60 s that proxies keep an idle connection; aiohttp's own default is an hour.
_KEEPALIVE_TIMEOUT_S = 75.0


class InferenceServer:
    """pyserve with models that come and go."""

    def __init__(
        self,
        config: Config | None = None,
        *,
        models: Sequence[ModelConfig] = (),
        authenticate: Authenticate = single_owner,
        on_load_progress: Progress = lambda _share: None,
        **settings: Any,
    ) -> None:
        """`settings` are fields of :class:`pyserve.Config`, beside or instead of a whole one.

        Raises:
            ConfigError: a setting that cannot work.
        """
        self.config = replace(config or Config(), **_known(settings))
        self._models = list(models)
        self._authenticate = authenticate
        self._on_load_progress = on_load_progress
        self._runner: web.AppRunner | None = None
        self._sites: list[web.TCPSite] = []

    # --- models

    def register_model(self, config: ModelConfig) -> None:
        """A model more. Before the start it is loaded by that; later it is loaded from now on,
        and :meth:`wait_model` tells how that went.

        Raises:
            ConfigError: there is one of this name.
        """
        if self._runner is None:
            if any(model.name == config.name for model in self._models):
                raise ConfigError(f"there are two models of the name {config.name}")
            self._models.append(config)
            return
        try:
            self._registry.register(config)
        except ApiError as error:
            raise ConfigError(f"{config.name}: {error.message}") from error

    async def wait_model(self, name: str) -> None:
        """Wait until a model that was registered while the server ran is loaded.

        Raises:
            ConfigError: it cannot be, or there is none of this name.
        """
        model = self._registry.get(name)
        if model is None:
            raise ConfigError(f"there is no model of the name {name}")
        await self._registry.loaded(model)

    async def swap_model(self, config: ModelConfig) -> None:
        """Load a new version of the model of this name and put it in the old one's place, whose
        generations finish there.

        Raises:
            ConfigError: it cannot be loaded or warmed up, and the old version goes on serving; or
                there is no such model, or it is being swapped already.
        """
        try:
            await self._registry.swap(config.name, config)
        except ApiError as error:
            raise ConfigError(f"{config.name}: {error.message}") from error

    async def unregister_model(self, name: str) -> None:
        """Take a model away. Returns when its generations are over.

        Raises:
            ConfigError: there is none of this name.
        """
        try:
            await self._registry.unregister(name)
        except ApiError as error:
            raise ConfigError(f"{name}: {error.message}") from error

    @property
    def _registry(self) -> ModelRegistry:
        return self.app[CONTEXT].models

    # --- its life

    @property
    def app(self) -> web.Application:
        """The application that is served.

        Raises:
            RuntimeError: it is not running.
        """
        return self._started.app

    @property
    def _started(self) -> web.AppRunner:
        if self._runner is None:
            raise RuntimeError("the server is not running")
        return self._runner

    @property
    def url(self) -> str:
        """Where it listens.

        Raises:
            RuntimeError: it is not running.
        """
        host, port = self._started.addresses[0][:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def start(self, host: str | None = None, port: int | None = None) -> None:
        """Load the models, then listen: on ``config.host`` and ``config.port`` unless told
        otherwise.

        Raises:
            ConfigError, MissingExtraError: a model cannot be loaded, or nobody can listen there.
        """
        if self._runner is not None:
            raise RuntimeError("the server is running already")
        host = self.config.host if host is None else host
        port = self.config.port if port is None else port
        app = create_app(
            self.config,
            models=self._models,
            authenticate=self._authenticate,
            on_load_progress=self._on_load_progress,
        )
        self._runner = web.AppRunner(
            app,
            access_log_format=_ACCESS_LOG_FORMAT,
            keepalive_timeout=_KEEPALIVE_TIMEOUT_S,
            shutdown_timeout=_HANDLER_TIMEOUT_S,
        )
        try:
            await self._runner.setup()
            site = web.TCPSite(self._runner, host, port)
            try:
                await site.start()
            except OSError as error:
                raise ConfigError(f"cannot listen on {host}:{port}: {_words(error)}") from error
        except BaseException:
            await self.stop(drain_timeout_s=0)
            raise
        self._sites.append(site)

    async def stop_listening(self) -> None:
        """Take no new connections."""
        while self._sites:
            await self._sites.pop().stop()

    async def drain(self, timeout_s: float) -> None:
        """Take no new generations, and wait for the running ones, at most `timeout_s`."""
        await drain(self.app, timeout_s)

    async def stop(self, drain_timeout_s: float | None = None) -> None:
        """Stop: running generations have ``config.drain_timeout_s``, unless told otherwise, to
        finish. Stopping twice does nothing."""
        if self._runner is None:
            return
        if drain_timeout_s is None:
            drain_timeout_s = self.config.drain_timeout_s
        await self.stop_listening()
        if drain_timeout_s > 0:
            await self.drain(drain_timeout_s)
        runner, self._runner = self._runner, None
        await runner.cleanup()

    async def __aenter__(self) -> Self:
        if self._runner is None:
            await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    check_keys(settings, Config.__dataclass_fields__, "settings")
    return settings


def _words(error: OSError) -> str:
    """The system's words; asyncio puts its own around them."""
    if error.errno is None or isinstance(error, socket.gaierror):
        return str(error.strerror)
    return os.strerror(error.errno)
