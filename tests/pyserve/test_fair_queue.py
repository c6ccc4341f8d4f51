"""The rules of the fair queue, one by one, in plain examples on a virtual clock."""

from __future__ import annotations

import math

import pytest
from slot_simulation import SlotSimulation, VirtualClock

from pyserve.scheduling.fair_queue import (
    FairQueue,
    Limits,
    OwnerLoad,
    Priority,
    TicketState,
)

LOW, NORMAL, HIGH = Priority.LOW, Priority.NORMAL, Priority.HIGH


def test_who_finds_a_free_slot_runs_and_the_others_wait() -> None:
    sim = SlotSimulation(slots=2)
    sim.clock.now = 7.0
    first, second, third = (sim.submit(owner)[0] for owner in "abc")
    assert sim.queue.admit() == [first, second]
    assert (sim.queue.running, sim.queue.waiting) == (2, 1)
    assert (first.state, first.enqueued_at, first.started_at) == (TicketState.RUNNING, 7.0, 7.0)
    assert (third.state, third.started_at) == (TicketState.WAITING, None)
    sim.queue.release(first)
    assert first.state is TicketState.OVER
    assert sim.queue.admit() == [third]


def test_a_higher_class_goes_first() -> None:
    sim = SlotSimulation()
    for owner, priority in (("x", LOW), ("y", NORMAL), ("z", HIGH)):
        sim.submit(owner, 2, priority=priority)
    sim.run()
    assert sim.owners_started() == "zzyyxx"


def test_an_owners_own_go_in_the_order_of_their_coming() -> None:
    sim = SlotSimulation()
    tickets = sim.submit("a", 5)
    sim.run()
    assert sim.started == tickets


def test_owners_take_turns_however_much_each_has_waiting() -> None:
    sim = SlotSimulation()
    sim.submit("a", 6)
    sim.submit("b", 2)
    sim.submit("c", 3)
    sim.run()
    assert sim.owners_started() == "abcabcacaaa"


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_who_has_nothing_running_gets_the_next_slot_before_a_hundred_of_another(slots: int) -> None:
    sim = SlotSimulation(slots)
    sim.submit("h", 100)
    sim.run(until_s=10.0)
    sim.submit("x")
    already = len(sim.started)
    sim.end_next()
    assert sim.started[already].owner == "x"


def test_a_first_token_goes_before_a_second_even_of_one_who_took_less() -> None:
    sim = SlotSimulation(slots=2)
    sim.submit("h", 1, length_s=9.0)
    sim.submit("l", 1, length_s=100.0)
    sim.run(until_s=9.0)  # h took 9 s, l is charged nothing yet
    sim.submit("l", 3)
    sim.submit("b", 1, length_s=5.0)
    sim.run(until_s=9.0)
    sim.submit("h", 3)
    sim.run(until_s=14.0)
    assert sim.owners_started() == "hlbh"


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5])
def test_owners_get_the_same_slot_seconds_whatever_their_generations_cost(slots: int) -> None:
    sim = SlotSimulation(slots)
    lengths = {"a": 0.5, "b": 2.0, "c": 10.0, "d": 10.0}
    for owner, length_s in lengths.items():
        sim.submit(owner, int(3000 / length_s), length_s=length_s)
    sim.run(until_s=2000.0)
    fair = sum(sim.slot_s.values()) / len(lengths)
    for owner in lengths:
        assert sim.slot_s[owner] == pytest.approx(fair, abs=3 * max(lengths.values())), owner


def test_a_charge_is_the_time_measured_not_the_number_of_generations() -> None:
    sim = SlotSimulation()
    sim.submit("s", 40, length_s=1.0)
    sim.submit("l", 40, length_s=4.0)
    sim.run(until_s=80.0)
    assert sim.owners_started().count("s") == pytest.approx(40, abs=4)
    assert sim.owners_started().count("l") == pytest.approx(10, abs=1)


def test_being_away_saves_no_credit() -> None:
    sim = SlotSimulation()
    sim.submit("a", 60)
    sim.run(until_s=30.0)
    sim.submit("b", 20)
    already = len(sim.started)
    sim.run(until_s=40.0)
    assert sim.owners_started()[already:] == "bababababa"


def test_short_generations_save_no_credit_over_a_pause() -> None:
    sim = SlotSimulation()
    sim.submit("a", 200, length_s=4.0)
    sim.submit("b", 30, length_s=0.25)
    sim.run(until_s=200.0)
    assert sim.slot_s["b"] == 7.5  # all it had, in its share of the time
    sim.submit("b", 30, length_s=4.0)
    already = len(sim.started)
    sim.run(until_s=240.0)
    assert "bb" not in sim.owners_started()[already:]


@pytest.mark.parametrize("comes_back_after_s", [0.0, 0.5])
def test_leaving_and_coming_back_does_not_pay(comes_back_after_s: float) -> None:
    """The other three always wait; the leaver has one ticket at a time, of five times the cost."""
    sim = SlotSimulation()
    for owner in "abc":
        sim.submit(owner, 500)
    away_until = 0.0
    for _ in range(400):
        if sim.load.running("x") + sim.load.waiting("x") == 0 and sim.clock.now >= away_until:
            sim.submit("x", length_s=5.0)
        sim.admit()
        if sim.end_next().owner == "x":
            away_until = sim.clock.now + comes_back_after_s
    fair = sim.clock.now / 4
    assert fair - 20.0 < sim.slot_s["x"] < fair + 5.0


def test_giving_a_place_up_and_asking_again_does_not_shed_a_debt() -> None:
    sim = SlotSimulation()
    sim.submit("a", 20)
    sim.run(until_s=4.0)
    sim.submit("x", length_s=8.0)
    sim.run(until_s=12.0)
    already = len(sim.started)
    for _ in range(5):
        (ticket,) = sim.submit("x")
        sim.end_next()
        sim.queue.release(ticket)
    sim.run(until_s=16.0)
    assert "x" not in sim.owners_started()[already:]


def test_one_who_was_just_served_is_not_passed_by_newcomers_without_end() -> None:
    sim = SlotSimulation()
    sim.submit("a", 2)
    newcomers = (chr(number) for number in range(0x4E00, 0x4E00 + 200))
    for _ in range(40):
        sim.submit(next(newcomers), 2)
        sim.submit(next(newcomers), 2)
        sim.admit()
        sim.end_next()
    assert sim.owners_started().count("a") == 2


def test_a_newcomer_goes_before_whoever_had_half_a_turn_since() -> None:
    sim = SlotSimulation()
    sim.submit("a", 20)
    sim.run(until_s=20.0)  # a turn is a second
    sim.submit("h", 50, length_s=0.2)
    sim.admit()
    sim.submit("x")
    sim.run(until_s=22.0)
    assert sim.owners_started()[20:].startswith("hhhx")


def test_generations_cancelled_at_once_are_not_free() -> None:
    sim = SlotSimulation()
    sim.submit("a", 40)
    sim.run(until_s=20.0)
    sim.submit("h", 50, length_s=0.0)
    sim.end_next()
    assert sim.started[-1].owner == "h"
    sim.submit("x")
    already = len(sim.started)
    sim.run(until_s=22.0)
    assert sim.owners_started()[already:].index("x") in range(3, 6)


def test_an_owner_at_its_limit_is_passed_over() -> None:
    sim = SlotSimulation(slots=3, limits=Limits(max_running_per_owner=1))
    sim.submit("a", 3, priority=HIGH)
    sim.submit("b", 1, priority=LOW)
    sim.run(until_s=0.5)
    assert sim.owners_started() == "ab"
    assert sim.queue.running == 2  # a slot stays free: nobody may run
    sim.run()
    assert sim.owners_started() == "abaa"


def test_an_owners_limit_holds_over_all_models() -> None:
    load, clock, limits = OwnerLoad(), VirtualClock(), Limits(max_running_per_owner=2)
    one, two = (FairQueue(4, limits, load, clock, math.inf) for _ in range(2))
    first = one.submit("a")
    one.submit("a")
    one.admit()
    blocked, other = two.submit("a"), two.submit("b")
    assert two.admit() == [other]
    one.release(first)
    assert two.admit() == [blocked]
    assert load.running("a") == 2


def test_turns_missed_at_the_limit_are_not_made_up_for() -> None:
    """What kept it waiting ran in another model; here it is next, and soon again in turn."""
    load, clock, limits = OwnerLoad(), VirtualClock(), Limits(max_running_per_owner=1)
    other = FairQueue(1, limits, load, clock, math.inf)
    elsewhere = other.submit("x")
    other.admit()
    sim = SlotSimulation(limits=limits, load=load, clock=clock)
    sim.submit("x", 9)
    sim.submit("a", 30)
    sim.run(until_s=10.0)
    other.release(elsewhere)
    already = len(sim.started)
    sim.run(until_s=16.0)
    assert sim.owners_started()[already:] == "xxaxax"


def test_low_priority_is_in_the_highest_class_after_ageing_twice() -> None:
    sim = SlotSimulation(ageing_s=10.0)
    sim.submit("a", 100, priority=HIGH)
    (low,) = sim.submit("z", priority=LOW)
    sim.run(until_s=9.0)
    assert (low.rank, low.priority) == (LOW, LOW)
    sim.run(until_s=10.0)
    assert low.rank is NORMAL
    sim.run(until_s=19.0)
    assert low.state is TicketState.WAITING
    sim.run(until_s=40.0)
    assert low.started_at == 20.0
    assert low.priority is LOW


def test_who_ages_joins_behind_its_owners_own_and_keeps_the_order() -> None:
    sim = SlotSimulation(ageing_s=10.0)
    sim.submit("b", length_s=25.0, priority=HIGH)
    sim.admit()
    early = sim.submit("a", 2, priority=LOW)
    sim.clock.now = 1.0
    late = sim.submit("a", 2, priority=LOW)
    own = sim.submit("a", 2, priority=HIGH)
    sim.run()
    assert sim.started[1:] == own + early + late


def test_ageing_that_is_looked_at_late_loses_nothing() -> None:
    sim = SlotSimulation(ageing_s=10.0)
    sim.submit("a", length_s=35.0)
    sim.admit()
    (low,) = sim.submit("z", priority=LOW)
    sim.clock.now = 21.0
    assert sim.queue.position(low) == 1
    assert low.rank is HIGH
