"""One version of a model, from its load to its end.

::

    loading ──► warming ──► serving ──► draining ──► stopped
       └───────────┴──► failed

A version of a file is loaded by a llama.cpp of its own, which ends with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import Any, Literal

from pyserve.config import Config
from pyserve.errors import ApiError, ConfigError, MissingExtraError
from pyserve.model_config import ModelConfig
from pyserve.producers.sources import running_upstream
from pyserve.producers.upstream import Upstream
from pyserve.scheduling.health import Health

log = logging.getLogger("pyserve")

VersionState = Literal["loading", "warming", "serving", "draining", "stopped", "failed"]

# How often a server elsewhere that is loading its model is looked at.
_LOAD_POLL_S = 0.2


class ModelVersion:
    """One version: its upstream, how it is, and what runs on it."""

    def __init__(
        self, config: ModelConfig, settings: Config, on_change: Callable[[], None]
    ) -> None:
        self.config = config
        self.state: VersionState = "loading"
        #: The share of the load that is done, 0 to 1.
        self.progress = 0.0
        #: Why it failed, in words for the administrator.
        self.error = ""
        self.upstream: Upstream
        self.health: Health
        #: Whether its time to drain is over: what ran then was cut off.
        self.is_cut_off = False
        self._settings = settings
        self._on_change = on_change
        self._parts = AsyncExitStack()
        self._running: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def __repr__(self) -> str:
        return f"<ModelVersion {self.config.name} {self.config.version} {self.state}>"

    @property
    def slots(self) -> int | None:
        """How many generations it runs at once; None: any number."""
        return self.config.slots or self.health.total_slots

    @property
    def running(self) -> int:
        """How many run now."""
        return len(self._running)

    def begin(self, deadline: asyncio.Timeout) -> None:
        """A generation runs here; `deadline` is what ends it."""
        self._running.add(deadline)
        self._idle.clear()

    def end(self, deadline: asyncio.Timeout) -> None:
        """It is over."""
        self._running.discard(deadline)
        if not self._running:
            self._idle.set()

    async def load(self, on_progress: Callable[[], None], *, must_be_well: bool) -> None:
        """Start it, and warm it up. A server elsewhere that need not be well is only watched.

        Raises:
            ConfigError, MissingExtraError: it cannot serve, and is stopped.
        """

        def note_progress(share: float) -> None:
            self.progress = share
            on_progress()

        try:
            async with asyncio.timeout(self._settings.model_load_timeout_s):
                await self._start(note_progress)
                if self.config.file is not None or must_be_well:
                    await self._prove(note_progress)
        except TimeoutError:
            await self.fail("it did not load in time")
            raise ConfigError(f"{self.config.name}: {self.error}") from None
        except (ConfigError, MissingExtraError) as error:
            await self.fail(str(error))
            raise
        except OSError as error:
            await self.fail(f"it could not be started: {error.strerror}")
            raise ConfigError(f"{self.config.name}: {self.error}") from error
        except BaseException:
            await self.stop()
            raise
        note_progress(1.0)

    async def _start(self, note_progress: Callable[[float], None]) -> None:
        self.upstream = await self._parts.enter_async_context(
            running_upstream(self.config, self._settings, note_progress)
        )
        name = f"{self.config.name} {self.config.version}"
        interval_s = self._settings.health_interval_s
        self.health = Health(name, self.upstream, interval_s, self._on_change)
        self.upstream.on_loss = self.health.suspect
        if interval_s:
            watching = asyncio.create_task(self.health.run(), name=f"health of {name}")
            self._parts.push_async_callback(_end_task, watching)

    async def _prove(self, note_progress: Callable[[float], None]) -> None:
        """Wait until it says that it is well, and have it generate a token."""
        while ailment := await self.upstream.ask_health():
            if ailment.reason != "model_loading":
                raise ConfigError(f"{self.config.source} is not healthy: {ailment.message}")
            await asyncio.sleep(_LOAD_POLL_S)
        if not await self.health.look():
            raise ConfigError(f"{self.config.source} is not healthy")
        if not self.health.is_polled:
            self.health.total_slots = await self.upstream.read_total_slots()
        if not self.config.warm_up:
            return
        self.state = "warming"
        note_progress(self.progress)
        try:
            await self.upstream.warm_up(
                self.config.upstream_model or self.config.name, self.config.warm_up
            )
        except ApiError as error:
            raise ConfigError(
                f"{self.config.source} failed its warm-up: {error.message}"
            ) from error

    async def drain(self, timeout_s: float) -> None:
        """Let what runs here finish, at most `timeout_s`; cut off what is left, and stop."""
        self.state = "draining"
        self._on_change()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
            self.is_cut_off = True
            now = asyncio.get_running_loop().time()
            for deadline in list(self._running):
                if not deadline.expired():  # or it is about to end by itself
                    deadline.reschedule(now)
            await self._idle.wait()
        finally:
            await self.stop()

    async def fail(self, error: str) -> None:
        """It cannot serve."""
        self.error = error
        await self.stop()
        self.state = "failed"

    async def stop(self) -> None:
        """End its upstream, if it was started here, and the connections to it."""
        await self._parts.aclose()
        self.state = "stopped"
        self._on_change()

    def describe(self) -> dict[str, Any]:
        """For people and programs that administer models."""
        told: dict[str, Any] = {
            "version": self.config.version,
            "state": self.state,
            "source": self.config.source,
            "progress": round(self.progress, 3),
            "running": self.running,
        }
        if self.state in ("serving", "draining"):
            told |= {"slots": self.slots, "health": self.health.state}
            told |= {"ailment": self.health.ailment} if self.health.ailment else {}
        return told | ({"error": self.error} if self.error else {})


async def _end_task(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
