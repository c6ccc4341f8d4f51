"""The one way to a slot, for everything that generates: proxied requests and jobs.

Each model has a queue of its own (:mod:`fair_queue` decides who is next); what an owner may have
waiting or running is counted over all of them. This file only connects the queue to the event loop
and to the versions that have the slots.

When the version that serves falls ill, nobody new is taken in, and who waits already goes on
waiting for ``unhealthy_wait_s``: a llama.cpp that is started again is back sooner.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from pyserve.config import Config
from pyserve.errors import ApiError
from pyserve.producers.upstream import Upstream
from pyserve.scheduling.fair_queue import (
    FairQueue,
    Limits,
    OwnerLoad,
    Priority,
    QueueFullError,
    Ticket,
)
from pyserve.scheduling.models import Model, ModelRegistry
from pyserve.scheduling.versions import ModelVersion

OnPosition = Callable[[int], None]

# Slots of an upstream that doesn't tell how many it has.
_ANY_NUMBER = 10**9

# An ill upstream is looked at once a second.
_UNHEALTHY_RETRY_AFTER_S = 2

# Places in a long queue change with every slot that is freed: told no more often than this.
_POSITION_INTERVAL_S = 0.1


@dataclass(frozen=True)
class Slot:
    """A place at a version of a model."""

    upstream: Upstream
    model: str
    version: str
    #: Parameters for requests that don't give them.
    defaults: Mapping[str, Any]
    #: What the upstream calls the model, where that is not the name in the request.
    renamed: str | None
    #: What a request that is made here names as its model; None: nothing need be named.
    upstream_model: str | None

    def adapt(self, body: bytes) -> bytes:
        """A client's body as the upstream is to see it: unchanged, unless the model's own
        configuration says otherwise."""
        return adapt_body(body, self.renamed, self.defaults)


class _Request:
    """Somebody who waits for a slot, or has one."""

    def __init__(self, deadline: asyncio.Timeout, on_position: OnPosition | None) -> None:
        self.deadline = deadline
        self.on_position = on_position
        self.position = 0
        self.version: ModelVersion | None = None
        self.granted: asyncio.Future[ModelVersion] = asyncio.get_running_loop().create_future()

    def begin(self, version: ModelVersion) -> None:
        """It has a slot. (Or its task was cancelled a moment ago, and is about to leave.)"""
        self.version = version
        version.begin(self.deadline)
        if not self.granted.done():
            self.granted.set_result(version)

    def refuse(self, error: ApiError) -> None:
        """It will get none."""
        if not self.granted.done():
            self.granted.set_exception(error)

    def tell(self, position: int) -> None:
        """It has this place in the queue."""
        if self.on_position is not None and position != self.position:
            self.position = position
            self.on_position(position)


class _Lane:
    """The queue of one model, and who waits in it or runs."""

    def __init__(self, model: Model, queue: FairQueue) -> None:
        self.model = model
        self.queue = queue
        self.waiting: dict[Ticket, _Request] = {}
        self.running: dict[Ticket, _Request] = {}
        self.watching = 0  # of those who wait, how many want to know their place
        self.giving_up: asyncio.TimerHandle | None = None

    def enter(self, ticket: Ticket, request: _Request) -> None:
        """`ticket` waits."""
        self.waiting[ticket] = request
        self.watching += request.on_position is not None

    def _wait_no_more(self, ticket: Ticket) -> _Request | None:
        request = self.waiting.pop(ticket, None)
        self.watching -= request is not None and request.on_position is not None
        return request

    def update_slots(self) -> None:
        """Tell the queue how many there are now."""
        version = self.model.serving
        if version is not None:
            # What runs on versions that drain takes nothing from the slots of the new one.
            elsewhere = len(self.running) - version.running
            self.queue.set_slots((version.slots or _ANY_NUMBER) + elsewhere)

    def grant(self) -> None:
        """Give slots to whoever is next."""
        version = self.model.serving
        if version is None or version.health.state != "well":
            return
        self.update_slots()
        for ticket in self.queue.admit():
            if request := self._wait_no_more(ticket):
                self.running[ticket] = request
                request.begin(version)

    def refuse_all(self, error: Callable[[], ApiError]) -> None:
        """Send everybody away who waits."""
        for ticket, request in list(self.waiting.items()):
            self.leave(ticket)
            request.refuse(error())

    def leave(self, ticket: Ticket) -> None:
        """`ticket` waits or runs no more."""
        self._wait_no_more(ticket)
        request = self.running.pop(ticket, None)
        if request is not None and request.version is not None:
            request.version.end(request.deadline)
        self.queue.release(ticket)


class Scheduler:
    """One admission path for everything that generates, proxied or job."""

    def __init__(self, config: Config, registry: ModelRegistry) -> None:
        self._config = config
        self._registry = registry
        self._max_priority = Priority[config.max_priority.upper()]
        self._limits = Limits(
            max_waiting_per_owner=config.max_waiting_per_owner or None,
            max_running_per_owner=config.max_running_per_owner or None,
        )
        self._load = OwnerLoad()
        self._lanes: dict[Model, _Lane] = {}
        self._telling: asyncio.TimerHandle | None = None
        registry.on_change = self._changed

    @property
    def waiting(self) -> int:
        """How many wait, over all models."""
        return sum(len(lane.waiting) for lane in self._lanes.values())

    def check(self, model: str | None) -> None:
        """What :meth:`admit` would say at once to a request for `model`, before anything is done
        for it.

        Raises:
            ApiError: reason ``model_not_found``, ``model_unhealthy``, ``model_loading``.
        """
        _refuse_if_ill(self._registry.find(model))

    def waiting_for(self, model: Model) -> int:
        """How many wait for this one."""
        lane = self._lanes.get(model)
        return len(lane.waiting) if lane is not None else 0

    @asynccontextmanager
    async def admit(
        self,
        model: str | None,
        owner: str,
        priority: Priority = Priority.NORMAL,
        *,
        on_position: OnPosition | None = None,
    ) -> AsyncIterator[Slot]:
        """Wait for a slot; leaving gives it back. `on_position` hears the place in the queue, from
        1, at once and when it changes, while waiting. Cancelling the waiting task leaves the queue
        at once.

        Raises:
            ApiError: before it waits ``model_not_found``, ``priority_too_high``, ``queue_full``,
                ``owner_limit``, ``model_unhealthy``, ``model_loading``; the latter two also when
                the model stays ill; ``request_timeout`` and ``model_unloaded`` within the block.
        """
        found = self._registry.find(model)
        if priority < self._max_priority:
            raise ApiError("priority_too_high", max_priority=self._config.max_priority)
        _refuse_if_ill(found)
        lane = self._lane_of(found)
        ticket = self._submit(lane, owner, priority)
        request: _Request | None = None
        try:
            async with asyncio.timeout(self._config.request_timeout_s or None) as deadline:
                request = _Request(deadline, on_position)
                self._enqueue(lane, ticket, request)
                version = await request.granted
                yield _slot(found, version, model)
        except TimeoutError:
            if request is None or not request.deadline.expired():
                raise
            raise _out_of_time(request.version) from None
        finally:
            lane.leave(ticket)
            self._dispatch()

    def _submit(self, lane: _Lane, owner: str, priority: Priority) -> Ticket:
        lane.update_slots()
        try:
            return lane.queue.submit(owner, priority)
        except QueueFullError as error:
            raise ApiError("owner_limit", retry_after_s=error.retry_after_s) from error

    def _enqueue(self, lane: _Lane, ticket: Ticket, request: _Request) -> None:
        lane.enter(ticket, request)
        self._dispatch()
        if ticket not in lane.waiting:
            return
        if self.waiting > self._config.max_queue:  # one limit for all queues: none knows the others
            raise ApiError("queue_full", retry_after_s=lane.queue.retry_after_s())
        if request.on_position is not None and (position := lane.queue.position(ticket)):
            request.tell(position)

    def _lane_of(self, model: Model) -> _Lane:
        if model not in self._lanes:
            queue = FairQueue(0, self._limits, self._load, time.monotonic, self._config.ageing_s)
            self._lanes[model] = _Lane(model, queue)
        return self._lanes[model]

    def _dispatch(self) -> None:
        """Give free slots away, in every lane: an owner may have come below his limit."""
        for lane in list(self._lanes.values()):
            lane.grant()
        if self._telling is None and any(lane.watching for lane in self._lanes.values()):
            loop = asyncio.get_running_loop()
            self._telling = loop.call_later(_POSITION_INTERVAL_S, self._tell_positions)

    def _tell_positions(self) -> None:
        self._telling = None
        for lane in self._lanes.values():
            if lane.watching:
                for ticket, position in lane.queue.positions().items():
                    if request := lane.waiting.get(ticket):  # or a listener sent it away
                        request.tell(position)

    # --- what happens to models

    def _changed(self, model: Model) -> None:
        lane = self._lanes.get(model)
        if lane is None:
            return
        if not model.is_known:
            lane.refuse_all(lambda: ApiError("model_not_found"))
            self._stop_giving_up(lane)
            del self._lanes[model]
            return
        version = model.serving
        if version is None or version.health.state != "ill":
            self._stop_giving_up(lane)
            self._dispatch()
        elif not version.health.was_well:
            lane.refuse_all(lambda: _illness(version))
        elif lane.giving_up is None:
            loop = asyncio.get_running_loop()
            lane.giving_up = loop.call_later(
                self._config.unhealthy_wait_s, lane.refuse_all, lambda: _illness(version)
            )

    def _stop_giving_up(self, lane: _Lane) -> None:
        if lane.giving_up is not None:
            lane.giving_up.cancel()
            lane.giving_up = None


def _refuse_if_ill(model: Model) -> None:
    if model.serving is None:
        raise ApiError("model_loading", retry_after_s=_UNHEALTHY_RETRY_AFTER_S)
    if model.serving.health.state == "ill":
        raise _illness(model.serving)


def _illness(version: ModelVersion) -> ApiError:
    if version.health.ailment == "model_loading":
        return ApiError("model_loading", retry_after_s=_UNHEALTHY_RETRY_AFTER_S)
    return ApiError(
        "model_unhealthy", retry_after_s=_UNHEALTHY_RETRY_AFTER_S, cause=version.health.ailment
    )


def _out_of_time(version: ModelVersion | None) -> ApiError:
    if version is not None and version.is_cut_off:
        return ApiError("model_unloaded", retry_after_s=1)
    return ApiError("request_timeout")


def _slot(model: Model, version: ModelVersion, asked: str | None) -> Slot:
    config = version.config
    return Slot(
        upstream=version.upstream,
        model=config.name,
        version=config.version,
        defaults=config.params,
        renamed=config.upstream_model,
        upstream_model=config.upstream_model or (asked if model.takes_any_name else config.name),
    )


def adapt_body(
    body: bytes, upstream_model: str | None, defaults: Mapping[str, Any] | None = None
) -> bytes:
    """`body`, a JSON object, with the upstream's name for the model and with defaults."""
    if upstream_model is None and not defaults:
        return body
    question = {**(defaults or {}), **orjson.loads(body)}
    if upstream_model is not None:
        question["model"] = upstream_model
    return orjson.dumps(question)
