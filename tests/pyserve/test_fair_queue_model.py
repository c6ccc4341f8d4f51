"""The fair queue under a thousand random arrival patterns, each step held against the rules.

The rules are written here a second time, in their plainest form: by looking at everybody who waits.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from slot_simulation import SlotSimulation, VirtualClock

from pyserve.scheduling.fair_queue import (
    Limits,
    OwnerLoad,
    Priority,
    QueueFullError,
    Ticket,
    TicketState,
)


@dataclass
class Newcomer:
    """The first ticket of an owner, and who went before it."""

    ticket: Ticket
    rank: Priority
    turn_s: float
    before_it: defaultdict[str, list[Ticket]] = field(default_factory=lambda: defaultdict(list))


class CheckedModel(SlotSimulation):
    """One of the models of a house. Everything is checked where slots are given away."""

    def __init__(self, house: House, slots: int) -> None:
        super().__init__(
            slots, house.limits, ageing_s=house.ageing_s, load=house.load, clock=house.clock
        )
        self.house = house
        self.submitted: list[Ticket] = []
        self.waits: list[Ticket] = []
        self.runs: list[Ticket] = []
        self.waits_of: Counter[str] = Counter()
        self.runs_of: Counter[str] = Counter()
        self.cancelled: list[Ticket] = []
        self.cost_s: dict[Ticket, float] = {}
        self.newcomers: list[Newcomer] = []
        self.seen: set[str] = set()

    def capacity(self) -> int:
        most = self.house.limits.max_running
        return self.queue.slots if most is None else min(self.queue.slots, most)

    def ask(self, owner: str, length_s: float, priority: Priority) -> None:
        limits = self.house.limits
        free = self.capacity() - len(self.runs)
        must_wait = free <= len(self.able()) or self.house.room(owner) <= 0
        full = (
            limits.max_waiting is not None and len(self.waits) >= limits.max_waiting
        ) or self.house.waiting(owner) >= (limits.max_waiting_per_owner or 10**9)
        if must_wait and full:
            with pytest.raises(QueueFullError):
                self.submit(owner, priority=priority)
            return
        (ticket,) = self.submit(owner, length_s=length_s, priority=priority)
        self.submitted.append(ticket)
        self.waits.append(ticket)
        self.waits_of[owner] += 1
        if owner not in self.seen:
            self.seen.add(owner)
            self.newcomers.append(Newcomer(ticket, ticket.rank, self.queue.mean_cost_s))

    def able(self) -> list[Ticket]:
        """Those who wait and may run, as far as their owners' limits go."""
        return [ticket for ticket in self.waits if self.house.room(ticket.owner) > 0]

    def admit(self) -> list[Ticket]:
        places = self.queue.positions()
        assert sorted(places.values()) == list(range(1, len(self.waits) + 1))
        assert places.keys() == set(self.waits)
        admitted = super().admit()
        assert admitted == list(places)[: len(admitted)], "the places told were not the order"
        for ticket in admitted:
            self.check_order(ticket)
            self.count_overtaking(ticket)
            self.left_the_queue(ticket)
            self.runs.append(ticket)
            self.runs_of[ticket.owner] += 1
        assert not admitted or len(self.runs) <= self.capacity()
        assert len(self.runs) >= self.capacity() or not self.able(), "a slot was left free"
        assert (self.queue.running, self.queue.waiting) == (len(self.runs), len(self.waits))
        return admitted

    def check_order(self, ticket: Ticket) -> None:
        able = self.able()
        assert ticket in able
        assert ticket.rank == min(other.rank for other in able)
        peers = [other for other in able if other.rank == ticket.rank]
        fewest = min(self.runs_of[other.owner] for other in peers)
        assert self.runs_of[ticket.owner] == fewest, "another's first token was due"
        own = [other for other in peers if other.owner == ticket.owner]
        assert ticket.rank_since == min(other.rank_since for other in own)

    def count_overtaking(self, admitted: Ticket) -> None:
        for newcomer in list(self.newcomers):
            waiting = newcomer.ticket
            if (
                waiting.state is not TicketState.WAITING
                or waiting.rank != newcomer.rank
                or self.runs_of[waiting.owner]
                or self.house.room(waiting.owner) <= 0
            ):
                self.newcomers.remove(newcomer)
            elif admitted.rank >= waiting.rank:
                newcomer.before_it[admitted.owner].append(admitted)
                self.check_bound(newcomer, admitted.owner)

    def check_bound(self, newcomer: Newcomer, owner: str) -> None:
        """Less than half a turn and one generation; one more where an owner may be held back."""
        before = newcomer.before_it[owner]
        held_back = 0 if self.house.plain else 1
        taken_s = sum(self.cost_s[ticket] for ticket in before[held_back:-1])
        assert taken_s <= newcomer.turn_s / 2 + 1e-9
        if self.house.plain:
            assert len(before) == 1

    def left_the_queue(self, ticket: Ticket) -> None:
        self.waits.remove(ticket)
        self.waits_of[ticket.owner] -= 1

    def end_next(self) -> Ticket:
        self.ended(self.ends[0][2], self.ends[0][0])
        return super().end_next()

    def ended(self, ticket: Ticket, now: float) -> None:
        if ticket in self.runs:
            assert ticket.started_at is not None
            self.runs.remove(ticket)
            self.runs_of[ticket.owner] -= 1
            self.cost_s[ticket] = now - ticket.started_at

    def cancel(self, ticket: Ticket) -> None:
        if ticket in self.waits:
            self.left_the_queue(ticket)
            self.cancelled.append(ticket)
        self.ended(ticket, self.clock.now)
        self.queue.release(ticket)


class House:
    """Two models, their shared owners, and a stream of random events.

    A plain one has a single class, no limits of owners, equal costs, and nothing is cancelled.
    """

    def __init__(self, seed: int) -> None:
        self.random = rnd = random.Random(seed)
        self.plain = seed % 3 == 0
        self.clock, self.load = VirtualClock(), OwnerLoad()
        self.ageing_s = 10.0**9 if self.plain else rnd.choice([2.0, 10.0, 10.0**9])
        self.limits = Limits(
            max_running=rnd.choice([None, 2]),
            max_waiting=rnd.choice([None, 5, 12]),
            max_running_per_owner=None if self.plain else rnd.choice([None, 1, 2]),
            max_waiting_per_owner=rnd.choice([None, 3]),
        )
        self.models = [CheckedModel(self, rnd.randint(1, 4)) for _ in range(2)]
        self.owners = "abcdefghij"[: rnd.randint(2, 10)]
        self.shares = [rnd.choice([1, 1, 5]) for _ in self.owners]
        self.mean_gap_s = rnd.choice([0.1, 0.3, 1.0])

    def running(self, owner: str) -> int:
        return sum(model.runs_of[owner] for model in self.models)

    def waiting(self, owner: str) -> int:
        return sum(model.waits_of[owner] for model in self.models)

    def room(self, owner: str) -> int:
        return (self.limits.max_running_per_owner or 10**9) - self.running(owner)

    def live(self, events: int) -> None:
        for _ in range(events):
            self.end_all_until(self.clock.now + self.random.expovariate(1 / self.mean_gap_s))
            model = self.random.choice(self.models)
            what = self.random.random()
            if what < 0.85 or self.plain:
                self.arrive(model)
            elif what < 0.95:
                if tickets := model.waits + model.runs:
                    model.cancel(self.random.choice(tickets))
            else:
                model.queue.set_slots(self.random.randint(0, 4))
            self.settle()
        for model in self.models:
            model.queue.set_slots(2)
        self.settle()
        self.end_all_until(10.0**6)

    def arrive(self, model: CheckedModel) -> None:
        (owner,) = self.random.choices(self.owners, self.shares)
        if self.plain:
            model.ask(owner, 1.0, Priority.NORMAL)
        else:
            length_s = self.random.choice([0.0, 0.05, 0.5, 1.0, self.random.random(), 6.0])
            model.ask(owner, length_s, self.random.choice(list(Priority)))

    def settle(self) -> None:
        for model in self.models:
            model.admit()
        most = self.limits.max_waiting_per_owner
        for owner in self.owners:
            assert self.room(owner) >= 0
            assert most is None or self.waiting(owner) <= most
            assert self.load.running(owner) == self.running(owner)
            assert self.load.waiting(owner) == self.waiting(owner)

    def end_all_until(self, until_s: float) -> None:
        while ending := [model for model in self.models if model.ends]:
            model = min(ending, key=lambda model: model.ends[0][0])
            if model.ends[0][0] > until_s:
                break
            model.end_next()
            self.settle()
        self.clock.now = max(self.clock.now, min(until_s, self.clock.now + 10.0))

    def check_end(self) -> None:
        assert self.load.owners == 0
        for model in self.models:
            assert (model.queue.running, model.queue.waiting) == (0, 0)
            assert set(Counter(model.started).values()) <= {1}, "admitted twice"
            assert set(model.submitted) == {*model.started, *model.cancelled}, "lost"
            assert not any(cls._shares or cls._debtors for cls in model.queue._classes)


@pytest.mark.parametrize("hundred", range(10))
def test_a_hundred_random_patterns_keep_every_rule(hundred: int) -> None:
    started = 0
    for seed in range(100 * hundred, 100 * (hundred + 1)):
        house = House(seed)
        try:
            house.live(events=30)
            house.check_end()
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
        started += sum(len(model.started) for model in house.models)
    assert started > 1500


@pytest.mark.parametrize("seed", range(20))
def test_low_priority_waits_for_ageing_and_one_round(seed: int) -> None:
    """The others are in the highest class, always wait, and never take more than a second."""
    rnd = random.Random(seed)
    others, slots, ageing_s = "abcdef"[: rnd.randint(1, 6)], rnd.randint(1, 4), 15.0
    sim = SlotSimulation(slots, ageing_s=ageing_s)
    for owner in others:
        sim.submit(owner, 300, length_s=rnd.uniform(0.5, 1.0), priority=Priority.HIGH)
    sim.run(until_s=10.0)
    tickets = sim.submit("z", 3, priority=Priority.LOW)
    sim.run(until_s=100.0)
    waits = [ticket.started_at - 10.0 for ticket in tickets if ticket.started_at]
    assert 2 * ageing_s <= waits[0] <= 2 * ageing_s + 1.0 + 2 * len(others) / slots
    for earlier, later in pairwise(waits):
        assert later - earlier <= 2.0 + 2 * len(others) / slots
