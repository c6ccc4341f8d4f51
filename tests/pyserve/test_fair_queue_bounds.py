"""What the fair queue bounds, tells and forgets: limits, slots, places, Retry-After, memory."""

from __future__ import annotations

import gc
import math
import time
import weakref

import pytest
from slot_simulation import SlotSimulation, VirtualClock

from pyserve.scheduling.fair_queue import (
    FairQueue,
    Limits,
    OwnerLoad,
    Priority,
    QueueFullError,
)

LOW, HIGH = Priority.LOW, Priority.HIGH


def test_a_full_queue_refuses_and_an_owners_full_share_too() -> None:
    limits = Limits(max_waiting=3, max_waiting_per_owner=2)
    sim = SlotSimulation(slots=1, limits=limits)
    sim.submit("a")
    sim.admit()
    sim.submit("a", 2)
    with pytest.raises(QueueFullError, match="owner") as owner_full:
        sim.submit("a")
    sim.submit("b")
    with pytest.raises(QueueFullError, match="queue") as queue_full:
        sim.submit("c")
    assert (owner_full.value.limit, queue_full.value.limit) == ("owner", "queue")
    assert sim.queue.waiting == 3
    sim.end_next()
    sim.submit("c")


def test_who_runs_at_once_needs_no_room_to_wait() -> None:
    sim = SlotSimulation(slots=2, limits=Limits(max_waiting=0))
    for owner in "ab":
        sim.submit(owner)
        sim.admit()
    with pytest.raises(QueueFullError):
        sim.submit("c")


def test_a_slot_promised_to_one_who_waits_is_not_free_for_the_next() -> None:
    sim = SlotSimulation(slots=1, limits=Limits(max_waiting=0))
    sim.submit("a")  # not admitted yet
    with pytest.raises(QueueFullError):
        sim.submit("b")


def test_a_queue_full_of_those_at_their_limit_lets_another_run() -> None:
    sim = SlotSimulation(slots=3, limits=Limits(max_waiting=2, max_running_per_owner=1))
    sim.submit("a")
    sim.admit()
    sim.submit("a", 2)
    sim.submit("b")
    assert [ticket.owner for ticket in sim.admit()] == ["b"]
    with pytest.raises(QueueFullError):
        sim.submit("b")


def test_a_waiting_limit_holds_over_all_models() -> None:
    load, clock, limits = OwnerLoad(), VirtualClock(), Limits(max_waiting_per_owner=1)
    one, two = (FairQueue(0, limits, load, clock, math.inf) for _ in range(2))
    one.submit("a")
    with pytest.raises(QueueFullError):
        two.submit("a")
    two.submit("b")


@pytest.mark.parametrize("which", ["max_running", "max_running_per_owner"])
def test_limits_that_cannot_work_are_refused(which: str) -> None:
    with pytest.raises(ValueError, match="running"):
        Limits(**{which: 0})
    with pytest.raises(ValueError, match="waiting"):
        Limits(max_waiting=-1)
    with pytest.raises(ValueError, match="ageing"):
        SlotSimulation(ageing_s=0.0)
    with pytest.raises(ValueError, match="slots"):
        SlotSimulation(slots=-1)


def test_a_ticket_ends_once_however_often_it_is_released() -> None:
    sim = SlotSimulation(slots=1)
    running, waiting = sim.submit("a", 2)
    sim.queue.admit()
    for ticket in (waiting, waiting, running, running):
        sim.queue.release(ticket)
    assert (sim.queue.running, sim.queue.waiting, sim.load.owners) == (0, 0, 0)
    assert sim.queue.admit() == []
    assert sim.queue.position(waiting) is None


def test_running_ones_go_on_when_slots_are_taken_away() -> None:
    sim = SlotSimulation(slots=3)
    tickets = sim.submit("a", 5)
    sim.queue.admit()
    sim.queue.set_slots(1)
    assert sim.queue.running == 3
    for ticket in tickets[:2]:
        sim.queue.release(ticket)
        assert sim.queue.admit() == []
    sim.queue.release(tickets[2])
    assert sim.queue.admit() == [tickets[3]]
    sim.queue.set_slots(2)
    assert sim.queue.admit() == [tickets[4]]


def test_fewer_may_run_than_there_are_slots() -> None:
    sim = SlotSimulation(slots=4, limits=Limits(max_running=2))
    sim.submit("a", 3)
    assert len(sim.queue.admit()) == 2


def test_a_place_counts_from_one_and_moves_up() -> None:
    sim = SlotSimulation(slots=1)
    sim.submit("a", length_s=5.0)
    sim.admit()
    a2, a3 = sim.submit("a", 2)
    (b1,) = sim.submit("b")
    (c1,) = sim.submit("c", priority=HIGH)
    assert sim.queue.positions() == {c1: 1, b1: 2, a2: 3, a3: 4}
    sim.queue.release(b1)
    assert [sim.queue.position(ticket) for ticket in (c1, a2, a3, b1)] == [1, 2, 3, None]


def test_the_places_of_equals_alternate() -> None:
    sim = SlotSimulation(slots=1)
    _, a2, a3 = sim.submit("a", 3)
    b1, b2 = sim.submit("b", 2)
    sim.admit()
    assert list(sim.queue.positions()) == [b1, a2, b2, a3]


def test_who_waits_for_its_own_limit_has_the_last_place() -> None:
    sim = SlotSimulation(slots=1, limits=Limits(max_running_per_owner=1))
    sim.submit("a", priority=HIGH)
    sim.admit()
    a2, a3 = sim.submit("a", 2, priority=HIGH)
    b1, b2 = sim.submit("b", 2, priority=LOW)
    assert sim.queue.positions() == {b1: 1, a2: 2, a3: 3, b2: 4}


def test_retry_after_is_the_time_in_which_the_slots_end_one() -> None:
    sim = SlotSimulation(slots=2)
    assert sim.queue.retry_after_s() == 1  # nothing measured yet
    sim.submit("a", 100, length_s=31.0)
    sim.run(until_s=310.0)
    assert sim.queue.retry_after_s() == 16
    already = sim.queue.waiting
    sim.run(until_s=310.0 + 10 * 31.0)
    assert (already - sim.queue.waiting) * 15.5 == pytest.approx(10 * 31.0)
    sim.queue.set_slots(31)
    assert sim.queue.retry_after_s() == 1
    sim.queue.set_slots(0)
    assert sim.queue.retry_after_s() == 300


def test_retry_after_follows_a_model_that_became_slower() -> None:
    sim = SlotSimulation(slots=1)
    sim.submit("a", 100, length_s=2.0)
    sim.run()
    sim.submit("a", 100, length_s=20.0)
    sim.run()
    assert 19 <= sim.queue.retry_after_s() <= 20


def test_an_owner_whose_own_share_is_full_is_told_of_a_whole_round() -> None:
    sim = SlotSimulation(slots=1, limits=Limits(max_waiting_per_owner=1))
    sim.submit("a", length_s=10.0)
    sim.run()
    for owner in "abcd":
        sim.submit(owner, length_s=10.0)
        sim.admit()
    sim.submit("a")
    with pytest.raises(QueueFullError) as refused:
        sim.submit("a")
    assert refused.value.retry_after_s == 40
    assert sim.queue.retry_after_s() == 10


class Owner(str):  # a plain str cannot be watched
    pass


def test_nothing_is_remembered_of_anybody_at_the_end() -> None:
    sim = SlotSimulation(slots=2, ageing_s=5.0)
    owners = [Owner(number) for number in range(50)]
    watched = [weakref.ref(owner) for owner in owners]
    for number, owner in enumerate(owners):
        sim.submit(owner, length_s=1.0 + number % 7, priority=Priority(number % 3))
    cancelled = [sim.submit(owner)[0] for owner in owners]
    for ticket in cancelled:
        sim.queue.release(ticket)
    sim.run()
    assert sim.load.owners == 0
    sim.started.clear()
    sim.slot_s.clear()
    sim.length_s.clear()
    del owners, owner, cancelled, ticket
    gc.collect()
    assert [ref for ref in watched if ref() is not None] == []


def test_owners_that_are_gone_are_forgotten_even_if_the_model_is_never_idle() -> None:
    queue = FairQueue(2, Limits(), OwnerLoad(), clock := VirtualClock(), math.inf)
    queue.submit("always there")
    queue.admit()
    watched = []
    for number in range(1000):
        owner = Owner(number)
        watched.append(weakref.ref(owner))
        ticket = queue.submit(owner)
        queue.admit()
        clock.now += 1.0 + 9.0 * (number % 10 == 0)  # every tenth leaves with a debt
        queue.release(ticket)
    del owner, ticket
    gc.collect()
    assert sum(ref() is not None for ref in watched) < 20


@pytest.mark.parametrize("owners", [1, 10_000])
def test_ten_thousand_waiting_cost_no_more_than_few(owners: int) -> None:
    sim = SlotSimulation(slots=4, ageing_s=1000.0)
    began = time.process_time()
    for number in range(10_000):
        sim.submit(str(number % owners), priority=Priority(number % 3))
    sim.run()
    assert len(sim.started) == 10_000
    assert time.process_time() - began < 4.0  # if each step looked at all: minutes
