"""What the routes of one pyserve share, and how they get at it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from pyserve.config import Config
from pyserve.errors import ApiError
from pyserve.producers.generation import Generations
from pyserve.producers.upstream import Upstream
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
    authenticate: Authenticate = single_owner
    upstream: Upstream | None = None
    draining: bool = False

    async def owner_of(self, request: web.Request) -> str:
        """Who asks."""
        owner = self.authenticate(request)
        return await owner if inspect.isawaitable(owner) else owner

    def require_upstream(self) -> Upstream:
        """The upstream.

        Raises:
            ApiError: reason ``not_found``; the application has only its own producers.
        """
        if self.upstream is None:
            raise ApiError("not_found")
        return self.upstream


CONTEXT = web.AppKey("pyserve.context", Context)


def context_of(request: web.Request) -> Context:
    """The context of the application that the request is for."""
    return request.config_dict[CONTEXT]
