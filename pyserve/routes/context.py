"""What the routes of one pyserve share, and how they get at it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from pyserve.config import Config
from pyserve.errors import ApiError
from pyserve.jobs.registry import JobRegistry
from pyserve.producers.generation import Generations
from pyserve.scheduling.models import ModelRegistry
from pyserve.scheduling.scheduler import Scheduler
from pyserve.scheduling.versions import ModelVersion
from pyserve.sessions import SINGLE_OWNER, StreamSessionManager

#: Names the owner of a request; raises a web.HTTPException or ApiError for who may not come in.
Authenticate = Callable[[web.Request], Awaitable[str] | str]


def single_owner(_request: web.Request) -> str:
    """Everybody is the same owner."""
    return SINGLE_OWNER


@dataclass
class Context:
    """One per application."""

    config: Config
    manager: StreamSessionManager
    generations: Generations
    models: ModelRegistry
    scheduler: Scheduler
    jobs: JobRegistry
    authenticate: Authenticate = single_owner
    draining: bool = False

    async def owner_of(self, request: web.Request) -> str:
        """Who asks."""
        owner = self.authenticate(request)
        return await owner if inspect.isawaitable(owner) else owner

    def refuse_if_draining(self) -> None:
        """Raise ApiError, reason ``shutdown``, when nothing new is to begin."""
        if self.draining:
            raise ApiError("shutdown", retry_after_s=1)

    def serving_version(self, model: str | None = None) -> ModelVersion:
        """The version that serves a model, by default the first one, for what needs no slot.

        Raises:
            ApiError: reason ``model_not_found``, ``model_loading``.
        """
        version = self.models.find(model).serving
        if version is None:
            raise ApiError("model_loading", retry_after_s=1)
        return version


CONTEXT = web.AppKey("pyserve.context", Context)


def context_of(request: web.Request) -> Context:
    """The context of the application that the request is for."""
    return request.config_dict[CONTEXT]
