"""The scheduler: who gets a slot when, and what everybody else is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest

from pyserve import ApiError, Config, ModelConfig
from pyserve.scheduling.fair_queue import Priority
from pyserve.scheduling.models import Model, ModelRegistry
from pyserve.scheduling.scheduler import Scheduler
from pyserve.scheduling.versions import ModelVersion

PATIENCE_S = 10.0


class House:
    """A scheduler over models that only say how they are."""

    def __init__(self, **settings: Any) -> None:
        config = Config(**settings)
        self.registry = ModelRegistry(config, lambda _share: None)
        self.scheduler = Scheduler(config, self.registry)
        self.settings = config
        self.visits: list[Visit] = []

    def serve(self, name: str = "m", slots: int | None = 1, state: str = "well") -> Model:
        model = self.registry.register(ModelConfig(name, demo=True, slots=slots))
        model.is_changing = False
        self.switch(model, model.versions[0], state)
        return model

    def switch(self, model: Model, version: ModelVersion, state: str = "well") -> None:
        version.health = SimpleNamespace(  # type: ignore[assignment]
            state=state, was_well=state == "well", ailment=None, total_slots=None
        )
        version.upstream = None  # type: ignore[assignment]
        model.switch(version)

    def become(self, model: Model, state: str, ailment: str | None = None) -> None:
        assert model.serving is not None
        health = model.serving.health
        health.state, health.ailment = state, ailment  # type: ignore[assignment]
        health.was_well = health.was_well or state == "well"
        model.changed()

    async def visit(self, model: str | None = "m", owner: str = "", **more: Any) -> Visit:
        """Somebody who asks for a slot; returns when he has it, waits, or was refused."""
        visit = Visit(self.scheduler, model, owner, **more)
        self.visits.append(visit)
        await settle()
        return visit


class Visit:
    """Somebody who asks for a slot, and keeps it until he is told to leave."""

    def __init__(
        self,
        scheduler: Scheduler,
        model: str | None,
        owner: str,
        priority: Priority = Priority.NORMAL,
    ) -> None:
        self.owner = owner
        self.places: list[int] = []
        self.version = ""
        self.error: ApiError | None = None
        self.has_slot = False
        self._leave = asyncio.Event()
        self.task = asyncio.create_task(self._run(scheduler, model, priority))

    async def _run(self, scheduler: Scheduler, model: str | None, priority: Priority) -> None:
        try:
            async with scheduler.admit(
                model, self.owner, priority, on_position=self.places.append
            ) as slot:
                self.has_slot, self.version = True, slot.version
                await self._leave.wait()
        except ApiError as error:
            self.error = error
        finally:
            self.has_slot = False

    async def leave(self) -> None:
        self._leave.set()
        await self.end()

    async def cancel(self) -> None:
        self.task.cancel()
        await self.end()

    async def end(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            with suppress(asyncio.CancelledError):
                await self.task
        await settle()


async def settle() -> None:
    """Let everything happen that needs no time."""
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def house(**settings: Any) -> AsyncIterator[House]:
    the_house = House(**settings)
    yield the_house
    for visit in the_house.visits:
        await visit.cancel()
    assert the_house.scheduler.waiting == 0


def holding(visits: list[Visit]) -> list[bool]:
    return [visit.has_slot for visit in visits]


# --- slots


async def test_as_many_run_as_there_are_slots_and_the_rest_waits() -> None:
    async with house() as h:
        h.serve(slots=2)
        visits = [await h.visit() for _ in range(5)]
        assert holding(visits) == [True, True, False, False, False]
        assert h.scheduler.waiting == 3
        await visits[0].leave()
        assert holding(visits) == [False, True, True, False, False]


@pytest.mark.parametrize("how", [Visit.leave, Visit.cancel])
async def test_a_slot_is_given_back_however_its_holder_ends(how: Any) -> None:
    async with house() as h:
        h.serve()
        first, second = await h.visit(), await h.visit()
        await how(first)
        assert second.has_slot


async def test_who_is_cancelled_while_waiting_leaves_the_queue_at_once() -> None:
    async with house() as h:
        h.serve()
        first, second, third = [await h.visit() for _ in range(3)]
        await second.cancel()
        assert h.scheduler.waiting == 1
        await first.leave()
        assert third.has_slot


async def test_who_is_cancelled_in_the_moment_of_his_turn_passes_the_slot_on() -> None:
    async with house() as h:
        h.serve()
        first, second, third = [await h.visit() for _ in range(3)]
        second.task.cancel()
        await first.leave()
        assert not second.has_slot
        assert third.has_slot
        await third.leave()
        assert (await h.visit()).has_slot


async def test_without_a_number_of_slots_nobody_waits() -> None:
    async with house() as h:
        h.serve(slots=None)
        assert all([(await h.visit()).has_slot for _ in range(50)])


async def test_models_do_not_share_their_slots() -> None:
    async with house() as h:
        h.serve("a")
        h.serve("b")
        assert (await h.visit("a")).has_slot
        assert (await h.visit("b")).has_slot
        assert not (await h.visit("a")).has_slot


# --- between owners


async def test_an_owner_with_nothing_running_goes_before_one_who_came_earlier() -> None:
    async with house() as h:
        h.serve(slots=2)
        heavy = [await h.visit(owner="heavy") for _ in range(10)]
        light = await h.visit(owner="light")
        await heavy[0].leave()
        assert light.has_slot


async def test_a_higher_class_goes_first() -> None:
    async with house(max_priority="high") as h:
        h.serve()
        first = await h.visit()
        low = await h.visit(priority=Priority.LOW)
        normal = await h.visit()
        high = await h.visit(priority=Priority.HIGH)
        for leaving, next_one in ((first, high), (high, normal), (normal, low)):
            await leaving.leave()
            assert next_one.has_slot


async def test_nobody_may_ask_for_more_than_the_highest_priority() -> None:
    async with house() as h:
        h.serve()
        refused = (await h.visit(priority=Priority.HIGH)).error
        assert refused is not None
        assert (refused.reason, refused.status) == ("priority_too_high", 403)
        assert refused.figures == {"max_priority": "normal"}


async def test_what_an_owner_may_have_running_counts_over_all_models() -> None:
    async with house(max_running_per_owner=1) as h:
        h.serve("a", slots=5)
        h.serve("b", slots=5)
        on_a = await h.visit("a", "x")
        on_b = await h.visit("b", "x")
        assert not on_b.has_slot
        assert (await h.visit("b", "y")).has_slot
        await on_a.leave()
        assert on_b.has_slot


# --- a bounded queue


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    async with house(max_queue=2) as h:
        h.serve("a")
        h.serve("b")
        kept = [await h.visit(name) for name in ("a", "b", "a", "b")]
        refused = await h.visit("a")
        assert refused.error is not None
        assert (refused.error.reason, refused.error.status) == ("queue_full", 429)
        assert (refused.error.retry_after_s or 0) >= 1
        assert refused.places == []
        assert h.scheduler.waiting == 2
        await kept[0].leave()
        assert (await h.visit("a")).error is None


async def test_who_gets_a_slot_at_once_needs_no_place_in_the_queue() -> None:
    async with house(max_queue=0) as h:
        h.serve(slots=2)
        assert [(await h.visit()).has_slot for _ in range(3)] == [True, True, False]


async def test_one_owner_cannot_fill_the_queue() -> None:
    async with house(max_waiting_per_owner=2) as h:
        h.serve()
        for _ in range(3):
            await h.visit(owner="x")
        refused = (await h.visit(owner="x")).error
        assert refused is not None
        assert (refused.reason, refused.status) == ("owner_limit", 429)
        assert (await h.visit(owner="y")).error is None


# --- places


async def test_a_place_is_told_at_once_and_when_it_changes() -> None:
    async with house() as h:
        h.serve()
        first, second, third = [await h.visit() for _ in range(3)]
        assert (first.places, second.places, third.places) == ([], [1], [2])
        await first.leave()
        async with asyncio.timeout(PATIENCE_S):
            while third.places != [2, 1]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert second.places == [1]


# --- which model


async def test_an_unknown_model_is_404_with_the_known_ones() -> None:
    async with house() as h:
        h.serve("a")
        h.serve("b")
        refused = (await h.visit("c")).error
        assert refused is not None
        assert (refused.reason, refused.status) == ("model_not_found", 404)
        assert refused.figures == {"models": ["a", "b"]}
        assert "a, b" in refused.message


async def test_no_name_means_the_first_model() -> None:
    async with house() as h:
        h.serve("a")
        h.serve("b")
        assert (await h.visit(None)).has_slot
        assert not (await h.visit("a")).has_slot
        assert (await h.visit("b")).has_slot


# --- a swap


async def test_the_slots_of_a_new_version_are_free_although_the_old_one_still_runs() -> None:
    async with house() as h:
        model = h.serve(slots=2)
        old = [await h.visit() for _ in range(2)]
        waiting = [await h.visit() for _ in range(3)]
        config = ModelConfig("m", "2", demo=True, slots=2)
        h.switch(model, model.add(config, h.settings))
        await settle()
        assert [visit.version for visit in (*old, *waiting)] == ["1", "1", "2", "2", ""]
        await old[0].leave()  # its slot is no slot of the new version's
        assert not waiting[2].has_slot
        await waiting[0].leave()
        assert waiting[2].version == "2"


async def test_what_still_runs_when_the_drain_is_over_is_cut_off() -> None:
    async with house() as h:
        model = h.serve()
        visit = await h.visit()
        old = model.versions[0]
        h.switch(model, model.add(ModelConfig("m", "2", demo=True, slots=1), h.settings))
        await old.drain(timeout_s=0)
        await visit.end()
        assert visit.error is not None
        assert (visit.error.reason, visit.error.status) == ("model_unloaded", 503)
        assert old.state == "stopped"
        assert old.running == 0


async def test_who_waits_for_a_model_that_is_removed_is_told() -> None:
    async with house() as h:
        h.serve()
        running, waiting = await h.visit(), await h.visit()
        removing = asyncio.create_task(h.registry.unregister("m"))
        await settle()
        assert waiting.error is not None
        assert waiting.error.reason == "model_not_found"
        assert running.has_slot
        assert not removing.done()
        await running.leave()
        await removing


# --- illness


async def test_an_ill_model_takes_nobody_new_and_says_when_to_come_back() -> None:
    async with house() as h:
        model = h.serve(slots=5)
        running = await h.visit()
        h.become(model, "ill", "upstream_unreachable")
        refused = (await h.visit()).error
        assert refused is not None
        assert (refused.reason, refused.status) == ("model_unhealthy", 503)
        assert refused.figures == {"cause": "upstream_unreachable"}
        assert refused.retry_after_s
        assert running.has_slot
        h.become(model, "well")
        assert (await h.visit()).has_slot


async def test_a_model_that_loads_is_told_as_that() -> None:
    async with house() as h:
        model = h.serve()
        h.become(model, "ill", "model_loading")
        refused = (await h.visit()).error
        assert refused is not None
        assert (refused.reason, refused.status) == ("model_loading", 503)


async def test_who_waits_when_it_falls_ill_is_served_when_it_is_back() -> None:
    async with house() as h:
        model = h.serve()
        running, waiting = await h.visit(), await h.visit()
        h.become(model, "ill")
        await running.leave()
        assert not waiting.has_slot
        assert waiting.error is None
        h.become(model, "well")
        await settle()
        assert waiting.has_slot


async def test_who_waits_does_so_no_longer_than_the_bound() -> None:
    async with house(unhealthy_wait_s=0.05) as h:
        model = h.serve()
        running, waiting = await h.visit(), await h.visit()
        h.become(model, "ill")
        await waiting.end()
        assert waiting.error is not None
        assert waiting.error.reason == "model_unhealthy"
        assert running.has_slot


async def test_the_bound_begins_anew_with_each_illness() -> None:
    async with house(unhealthy_wait_s=0.2) as h:
        model = h.serve()
        _, waiting = await h.visit(), await h.visit()
        for _ in range(4):
            h.become(model, "ill")
            await asyncio.sleep(0.07)
            h.become(model, "well")
        assert waiting.error is None


async def test_while_it_is_suspect_everybody_waits_for_the_verdict() -> None:
    async with house() as h:
        model = h.serve(slots=5)
        h.become(model, "suspect")
        waiting = await h.visit()
        assert (waiting.has_slot, waiting.error) == (False, None)
        h.become(model, "well")
        await settle()
        assert waiting.has_slot


async def test_before_the_first_look_everybody_waits_and_nobody_for_long() -> None:
    async with house() as h:
        model = h.serve(state="unknown")
        waiting = await h.visit()
        assert (waiting.has_slot, waiting.error) == (False, None)
        h.become(model, "ill", "upstream_unreachable")
        await waiting.end()
        assert waiting.error is not None
        assert waiting.error.reason == "model_unhealthy"


# --- time


async def test_a_generation_that_takes_too_long_is_ended_waiting_or_running() -> None:
    async with house(request_timeout_s=0.05) as h:
        h.serve()
        running, waiting = await h.visit(), await h.visit()
        for visit in (running, waiting):
            await visit.end()
            assert visit.error is not None
            assert (visit.error.reason, visit.error.status) == ("request_timeout", 504)
        assert (await h.visit()).has_slot
