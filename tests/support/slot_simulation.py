"""A model's slots on a virtual clock: generations of known length run through a `FairQueue`."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from itertools import count

from pyserve.scheduling.fair_queue import FairQueue, Limits, OwnerLoad, Priority, Ticket


class VirtualClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SlotSimulation:
    """Every ticket is submitted with its length; `run` lets them start and end."""

    def __init__(
        self,
        slots: int = 1,
        limits: Limits | None = None,
        *,
        ageing_s: float = math.inf,
        load: OwnerLoad | None = None,
        clock: VirtualClock | None = None,
    ) -> None:
        self.clock = clock or VirtualClock()
        self.load = load or OwnerLoad()
        self.queue = FairQueue(slots, limits or Limits(), self.load, self.clock, ageing_s)
        self.started: list[Ticket] = []
        self.slot_s: defaultdict[str, float] = defaultdict(float)  # by owner, of those that ended
        self.length_s: dict[Ticket, float] = {}
        self.ends: list[tuple[float, int, Ticket]] = []
        self._numbers = count()

    def submit(
        self,
        owner: str,
        many: int = 1,
        *,
        length_s: float = 1.0,
        priority: Priority = Priority.NORMAL,
    ) -> list[Ticket]:
        tickets = [self.queue.submit(owner, priority) for _ in range(many)]
        self.length_s.update(dict.fromkeys(tickets, length_s))
        return tickets

    def admit(self) -> list[Ticket]:
        admitted = self.queue.admit()
        for ticket in admitted:
            end = self.clock.now + self.length_s[ticket]
            heapq.heappush(self.ends, (end, next(self._numbers), ticket))
        self.started += admitted
        return admitted

    def end_next(self) -> Ticket:
        """The generation that is done first ends, and the next ones start."""
        end, _, ticket = heapq.heappop(self.ends)
        self.clock.now = max(end, self.clock.now)
        self.slot_s[ticket.owner] += self.length_s.pop(ticket)
        self.queue.release(ticket)
        self.admit()
        return ticket

    def run(self, until_s: float = math.inf) -> None:
        self.admit()
        while self.ends and self.ends[0][0] <= until_s:
            self.end_next()
        if until_s < math.inf:
            self.clock.now = until_s

    def owners_started(self) -> str:
        return "".join(ticket.owner for ticket in self.started)
