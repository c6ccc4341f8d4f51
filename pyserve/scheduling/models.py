"""The models that are served: one name each, and the version that serves it now.

A request finds its model by name and is given to the version that serves at the moment it gets a
slot; it stays there to its end. A swap loads the new version beside the old one. When it has
answered its warm-up it serves, from one step of the event loop to the next, and the old one drains.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

from pyserve.config import Config
from pyserve.errors import ApiError, ConfigError, MissingExtraError
from pyserve.model_config import ModelConfig
from pyserve.scheduling.versions import ModelVersion

log = logging.getLogger("pyserve")

# Versions that are over stay in the status, for who wants to know why: so many of each model.
_ENDED_VERSIONS_KEPT = 5


class Model:
    """One name, the version that serves it, and others that come or go."""

    def __init__(
        self, name: str, *, takes_any_name: bool, on_change: Callable[[Model], None]
    ) -> None:
        self.name = name
        #: The one source of a server that has only that: whatever a request names is this.
        self.takes_any_name = takes_any_name
        self.serving: ModelVersion | None = None
        self.versions: list[ModelVersion] = []
        self.created_at = time.time()
        self.is_changing = False
        self.is_removed = False
        self.loading: asyncio.Task[None] | None = None
        self._on_change = on_change
        self._count = 0

    def __repr__(self) -> str:
        return f"<Model {self.name}>"

    @property
    def is_known(self) -> bool:
        """Whether requests find it: it serves, or will soon."""
        return not self.is_removed and (self.serving is not None or self.is_changing)

    @property
    def is_healthy(self) -> bool:
        """Whether it takes new work, as far as is known."""
        return self.serving is not None and self.serving.health.state == "well"

    @property
    def is_polled(self) -> bool:
        """Whether its health is more than a guess."""
        return self.serving is not None and self.serving.health.is_polled

    @property
    def next_version(self) -> str:
        """The version of who names none."""
        return str(self._count + 1)

    def changed(self) -> None:
        """Tell who waits."""
        self._on_change(self)

    def add(self, config: ModelConfig, settings: Config) -> ModelVersion:
        """A version that is to be loaded."""
        version = ModelVersion(config, settings, self.changed)
        self._count += 1
        ended = [each for each in self.versions if each.state in ("stopped", "failed")]
        for each in ended[: max(0, len(ended) - _ENDED_VERSIONS_KEPT + 1)]:
            self.versions.remove(each)
        self.versions.append(version)
        return version

    def switch(self, version: ModelVersion) -> ModelVersion | None:
        """`version` serves from now on; returns the one that did."""
        replaced, self.serving = self.serving, version
        version.state = "serving"
        self.changed()
        return replaced

    def describe(self) -> dict[str, Any]:
        """For people and programs that administer models."""
        serving = self.serving
        return {
            "name": self.name,
            "version": serving.config.version if serving else None,
            "healthy": self.is_healthy,
            "versions": [version.describe() for version in reversed(self.versions)],
        }


class ModelRegistry:
    """All models by name; the first one is what requests get that name none."""

    def __init__(self, settings: Config, on_load_progress: Callable[[float], None]) -> None:
        """`on_load_progress` hears how much of the first loads is done, 0 to 1."""
        #: Called whenever a model came, went, or may take more or less than before.
        self.on_change: Callable[[Model], None] = lambda _model: None
        self._settings = settings
        self._on_load_progress = on_load_progress
        self._models: dict[str, Model] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_running = False
        self._is_loading = False

    def __iter__(self) -> Iterator[Model]:
        return iter(list(self._models.values()))

    @property
    def known(self) -> list[Model]:
        """What requests can name."""
        return [model for model in self._models.values() if model.is_known]

    @property
    def sole(self) -> Model | None:
        """The one model that takes any name, if there is no other."""
        known = self.known
        return known[0] if len(known) == 1 and known[0].takes_any_name else None

    def get(self, name: str) -> Model | None:
        """The model of this name, whether it serves or not."""
        return self._models.get(name)

    def find(self, name: str | None) -> Model:
        """The model that a request means.

        Raises:
            ApiError: reason ``model_not_found``, with the names that there are.
        """
        known = self.known
        if name is None and known:
            return known[0]
        for model in known:
            if model.name == name:
                return model
        for model in known:
            if model.takes_any_name:
                return model
        names = [model.name for model in known]
        raise ApiError(
            "model_not_found",
            f"There is no such model; there are: {', '.join(names)}" if names else None,
            models=names,
        )

    # --- changes

    def register(self, config: ModelConfig, *, takes_any_name: bool = False) -> Model:
        """A new model. It is loaded when the registry begins to run, or now if it does: wait for
        that with :meth:`loaded`.

        Raises:
            ApiError: reason ``model_exists``.
        """
        present = self._models.get(config.name)
        if present is not None and present.is_known:
            raise ApiError("model_exists")
        model = Model(config.name, takes_any_name=takes_any_name, on_change=self._changed)
        model.add(config, self._settings)
        model.is_changing = True
        self._models[config.name] = model
        if self._is_running:
            model.loading = self._start(self._load_first(model, must_be_well=True))
        return model

    async def loaded(self, model: Model) -> None:
        """Wait until a model that was registered serves.

        Raises:
            ConfigError, MissingExtraError: it cannot, with the reason in words.
        """
        if model.loading is not None:
            await asyncio.shield(model.loading)

    async def _load_first(self, model: Model, *, must_be_well: bool) -> None:
        (version,) = model.versions
        await self._bring_up(model, version, must_be_well=must_be_well)

    async def swap(self, name: str, config: ModelConfig) -> ModelVersion:
        """Replace the serving version by a new one; returns it when it serves. The old one's
        generations go on. Who stops waiting doesn't stop the swap.

        Raises:
            ApiError: reason ``model_not_found``, ``model_busy``.
            ConfigError, MissingExtraError: the new version cannot serve. Nothing has changed.
        """
        model = self._require(name)
        if model.is_changing:
            raise ApiError("model_busy")
        model.is_changing = True
        version = model.add(config, self._settings)
        swapping = self._bring_up(model, version, must_be_well=True)
        await asyncio.shield(self._start(swapping))
        return version

    async def _bring_up(self, model: Model, version: ModelVersion, *, must_be_well: bool) -> None:
        try:
            await version.load(self._note_progress, must_be_well=must_be_well)
        except (ConfigError, MissingExtraError) as error:
            if self._is_running:  # else it is told by who could not start
                log.warning("%s: version %s failed: %s", model.name, version.config.version, error)
            raise
        else:
            if model.is_removed:
                await version.stop()
                raise ApiError("model_not_found")
            replaced = model.switch(version)
            if self._is_running:
                log.info("%s: version %s serves", model.name, version.config.version)
            if replaced is not None:
                self._start(replaced.drain(self._settings.model_drain_timeout_s))
        finally:
            model.is_changing = False
            model.changed()

    async def unregister(self, name: str) -> None:
        """Take a model away: nothing new finds it, its generations finish. Who stops waiting
        doesn't stop that.

        Raises:
            ApiError: reason ``model_not_found``.
        """
        model = self._require(name)
        del self._models[name]
        model.is_removed = True
        serving, model.serving = model.serving, None
        model.changed()
        if serving is not None:
            draining = serving.drain(self._settings.model_drain_timeout_s)
            await asyncio.shield(self._start(draining))

    def _require(self, name: str) -> Model:
        model = self._models.get(name)
        if model is None:
            raise ApiError("model_not_found", models=list(self._models))
        return model

    # --- its life

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load what is registered; stop all at the end.

        Raises:
            ConfigError, MissingExtraError: a model cannot be loaded.
        """
        models = list(self)
        try:
            self._is_loading = any(model.versions[0].config.file for model in models)
            loads = [self._start(self._load_first(model, must_be_well=False)) for model in models]
            for load in loads:
                await load
            self._is_loading = False
            self._is_running = True
            yield
        finally:
            self._is_running = self._is_loading = False
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for model in self:
                for version in model.versions:
                    if version.state not in ("stopped", "failed"):
                        await version.stop()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name="a model's change")
        self._tasks.add(task)

        def forget(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled():
                task.exception()  # was logged, and is in the version's status

        task.add_done_callback(forget)
        return task

    def _note_progress(self) -> None:
        """Of the first loads together, files only: the rest is there or not."""
        if self._is_loading:
            first = [model.versions[0] for model in self]
            shares = [version.progress for version in first if version.config.file is not None]
            self._on_load_progress(sum(shares) / len(shares))

    def _changed(self, model: Model) -> None:
        self.on_change(model)
