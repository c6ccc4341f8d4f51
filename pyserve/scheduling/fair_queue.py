"""The order in which generations get a model's slots: pure rules, no event loop, no wall clock.

The rules, the strongest first:

1.  **Priority classes.** Whoever may run in a higher class goes before everyone in a lower one.
    *Ageing*: a ticket moves up one class for every ``ageing_s`` that it has waited, so that a
    low one stands in the highest class after twice that time.
2.  **First token first.** Inside a class the owner with the fewest running goes first: above all
    one with nothing running before one with something running. While there are fewer owners than
    slots, this alone gives all of them as much.
3.  **Deficit round robin** between owners with as many running (M. Shreedhar and G. Varghese,
    "Efficient fair queuing using deficit round robin", 1996). The cost of a generation is the
    slot-seconds it took, known only at its end, so it is charged afterwards, as in surplus round
    robin (H. Adiseshu, G. Parulkar and G. Varghese, 1996). A *turn*, the quantum, is the mean cost
    of late. The books are kept in virtual time (P. Goyal, H. Vin and H. Cheng, "Start-time fair
    queueing", 1996): instead of rounds over all owners, each owner is due at the slot-seconds that
    it has had, and the smallest goes next. ``now`` is the least that anybody active has had.
4.  **First in, first out** inside an owner and class, by the time of joining the class.

An owner at its running limit is passed over and keeps its turn. An owner without waiting tickets
saves nothing: at its return it is due half a turn from now, or later if it overdrew. So leaving and
coming back never pays, and coming for the first time is no worse than coming again.

How far somebody is overtaken. Owner X joins a class with nothing running and no debt: due at
``now`` + 1/2 turn. While it waits like that, each other owner Y gets before it, from X's class or a
lower one, less than **half a turn** of slot-seconds **and one generation**: just one generation if
that costs half the mean or more, and while the mean stays never more than **five**.

-   Lower classes get nothing, as X may run (rule 1; it has nothing running here, so it is at its
    limit only if other models' queues run it).
-   Y must have nothing running either (rule 2), so all that it took is charged; and a charge leaves
    Y due at ``now`` or later, and ``now`` never falls.
-   Y must be due no later than X. What it takes moves it on by as much, and by an eighth of a turn
    at least: after four it is past X. One more if ``now`` passed Y while it stood at its limit or
    was served from another class.

A debt of X comes on top of the half turn. Among owners of equal cost, who all have something
waiting, none goes twice before each has gone once.
"""

from __future__ import annotations

import enum
import heapq
import math
from bisect import bisect_left, insort
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from pyserve.errors import PyserveError

__all__ = [
    "FairQueue",
    "Limits",
    "OwnerLoad",
    "Priority",
    "QueueFullError",
    "Ticket",
    "TicketState",
]

#: How long after `now` a newcomer is due. At 1 it would queue behind those who were just served; at
#: 0 a stream of newcomers would keep those from ever coming again.
_NEWCOMER_TURNS = 0.5

#: The least that a slot costs: its prompt was worked on, even if it was cancelled at once. Without
#: it, an owner of free tickets would overtake without end.
_MIN_CHARGE_TURNS = 0.125

#: The mean cost is over about so many generations: a swapped model shows soon, an outlier little.
_MEAN_OVER = 32

#: What ``Retry-After`` may say, in seconds: HTTP counts whole ones, and nobody plans on more.
_RETRY_AFTER_S = (1, 300)


class Priority(enum.IntEnum):
    """The classes, by their rank."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class TicketState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    OVER = "over"


@dataclass(frozen=True)
class Limits:
    """The limits of one queue, and of each owner over all queues that share an `OwnerLoad`.

    None is no limit: for ``max_running`` the slots alone bound.
    """

    max_running: int | None = None
    max_waiting: int | None = None
    max_running_per_owner: int | None = None
    max_waiting_per_owner: int | None = None

    def __post_init__(self) -> None:
        for limit in (self.max_running, self.max_running_per_owner):
            if limit is not None and limit < 1:
                raise ValueError("a limit on running below 1 would let nothing run, ever")
        for limit in (self.max_waiting, self.max_waiting_per_owner):
            if limit is not None and limit < 0:
                raise ValueError("a limit on waiting is 0 or more")


class OwnerLoad:
    """How many tickets of each owner run and wait; an owner without any is not kept."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()

    def running(self, owner: str) -> int:
        return self._running[owner]

    def waiting(self, owner: str) -> int:
        return self._waiting[owner]

    @property
    def waiting_by_owner(self) -> Counter[str]:
        return self._waiting

    @property
    def owners(self) -> int:
        return len(self._running.keys() | self._waiting.keys())

    def add(self, owner: str, *, running: int = 0, waiting: int = 0) -> None:
        for counter, change in ((self._running, running), (self._waiting, waiting)):
            counter[owner] += change
            if not counter[owner]:
                del counter[owner]


class QueueFullError(PyserveError):
    """A ticket would have to wait, and the queue (or its owner's share of it) is full."""

    def __init__(self, limit: Literal["queue", "owner"], retry_after_s: int) -> None:
        super().__init__(f"The limit on waiting generations of the {limit} is reached")
        self.limit = limit
        self.retry_after_s = retry_after_s


@dataclass(eq=False, slots=True)
class Ticket:
    """One generation's place: waiting, then running, then over."""

    owner: str
    priority: Priority  # as asked for
    enqueued_at: float
    state: TicketState = TicketState.WAITING
    started_at: float | None = None
    rank: Priority = field(init=False)  # the class that it waits in now: ageing raises it
    rank_since: float = field(init=False)

    def __post_init__(self) -> None:
        self.rank, self.rank_since = self.priority, self.enqueued_at


class _Share:
    """One owner in one class: what waits, and when it is due."""

    __slots__ = ("due", "entry", "in_debt", "owner", "running", "seat", "waiting")

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.waiting: OrderedDict[Ticket, None] = OrderedDict()  # the first and any leave in O(1)
        self.running: set[Ticket] = set()  # those admitted from this class
        self.due = 0.0  # in slot-seconds
        self.seat = 0  # decides between equals: who sat down first
        self.entry: _Entry | None = None  # its place in the order, while it has something waiting
        self.in_debt = False


_Entry = tuple[int, float, int, _Share]  # running, due, seat: seats differ, shares aren't compared
_Queued = tuple[float, int, str, Iterator[Ticket]]  # due, seat, owner, its tickets


class _PriorityClass:
    """The owners of one class, in the order in which they are due.

    ``order`` is a sorted list: finding a place takes O(log n) comparisons, making room there moves
    pointers, for 10,000 owners about a microsecond.
    """

    def __init__(self) -> None:
        self.order: list[_Entry] = []
        self.waiting: OrderedDict[Ticket, None] = OrderedDict()  # of all owners, first joined first
        self.next_seat = 0
        self.turn_s = 0.0  # the mean cost
        self._now = 0.0  # in slot-seconds: nobody who runs, or might, has had less
        self._shares: dict[str, _Share] = {}
        self._served: set[_Share] = set()  # those with something running
        self._debtors: list[tuple[float, int, _Share]] = []  # a heap: gone, but not forgotten

    def join(self, ticket: Ticket, running: int) -> None:
        share = self._shares.get(ticket.owner)
        if share is None:
            share = self._shares[ticket.owner] = _Share(ticket.owner)
        if not share.waiting:
            share.due = max(share.due, self._newcomers_due)
            self._take_seat(share)
            self._place(share, running)
        share.waiting[ticket] = self.waiting[ticket] = None

    def leave(self, ticket: Ticket) -> None:
        share = self._shares[ticket.owner]
        del share.waiting[ticket], self.waiting[ticket]
        if not share.waiting:
            self._unplace(share)
            self._forget_if_square(share)

    def start_first_of(self, share: _Share, clock_s: float) -> Ticket:
        """Its caller tells `running_changed` afterwards."""
        ticket = next(iter(share.waiting))
        ticket.state, ticket.started_at = TicketState.RUNNING, clock_s
        share.running.add(ticket)
        self._served.add(share)
        self.leave(ticket)
        self._take_seat(share)
        self._now = max(self._now, min(self._had(served, clock_s) for served in self._served))
        while self._debtors and self._debtors[0][0] <= self._newcomers_due:
            *_, debtor = heapq.heappop(self._debtors)
            debtor.in_debt = False
            self._forget_if_square(debtor)
        return ticket

    def charge(self, ticket: Ticket, cost_s: float) -> None:
        """Its caller tells `running_changed` afterwards. Nobody saves up: due now or later."""
        share = self._shares[ticket.owner]
        share.running.remove(ticket)
        cost_s = max(cost_s, _MIN_CHARGE_TURNS * self.turn_s)
        share.due = max(share.due + cost_s, self._now)
        if not share.running:
            self._served.remove(share)
            self._forget_if_square(share)

    def running_changed(self, owner: str, running: int) -> None:
        share = self._shares.get(owner)
        if share and share.waiting:
            self._unplace(share)
            self._place(share, running)

    def queued(self) -> list[_Queued]:
        return [
            (share.due, share.seat, share.owner, iter(share.waiting)) for *_, share in self.order
        ]

    @property
    def _newcomers_due(self) -> float:
        return self._now + _NEWCOMER_TURNS * self.turn_s

    @staticmethod
    def _had(share: _Share, clock_s: float) -> float:
        """With what its running ones have cost until now."""
        return share.due + sum(clock_s - (ticket.started_at or 0.0) for ticket in share.running)

    def _take_seat(self, share: _Share) -> None:
        share.seat = self.next_seat
        self.next_seat += 1

    def _place(self, share: _Share, running: int) -> None:
        share.entry = (running, share.due, share.seat, share)
        insort(self.order, share.entry)

    def _unplace(self, share: _Share) -> None:
        assert share.entry is not None
        del self.order[bisect_left(self.order, share.entry)]
        share.entry = None

    def _forget_if_square(self, share: _Share) -> None:
        if not self.waiting and not self._served:
            self._shares.clear()  # nobody is left to be fair to
            self._debtors.clear()
        elif share.waiting or share.running or share.in_debt:
            return
        elif share.due <= self._newcomers_due:
            del self._shares[share.owner]
        else:
            share.in_debt = True
            heapq.heappush(self._debtors, (share.due, share.seat, share))


class FairQueue:
    """The generations of one model. ``clock`` gives seconds; ``load`` is shared by all queues.

    After every `submit`, `release` and `set_slots` the caller asks `admit` who may run now; after a
    `release` it asks every queue of the same load, as an owner's limit holds over all of them.
    """

    def __init__(
        self,
        slots: int,
        limits: Limits,
        load: OwnerLoad,
        clock: Callable[[], float],
        ageing_s: float,
    ) -> None:
        if ageing_s <= 0:
            raise ValueError("ageing_s is more than 0 (math.inf: no ageing)")
        self._limits = limits
        self._load = load
        self._here = OwnerLoad()  # of this queue alone
        self._clock = clock
        self._ageing_s = ageing_s
        self._running = 0
        self._waiting = 0
        self._mean_cost_s = 0.0
        self._costs_measured = 0
        self._classes = [_PriorityClass() for _ in Priority]
        self.set_slots(slots)

    @property
    def running(self) -> int:
        return self._running

    @property
    def waiting(self) -> int:
        return self._waiting

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def mean_cost_s(self) -> float:
        """The slot-seconds of one generation, over the latest; 0 before the first ended."""
        return self._mean_cost_s

    def set_slots(self, slots: int) -> None:
        """With fewer slots than run, the running ones go on, and nobody follows until they fit."""
        if slots < 0:
            raise ValueError("slots are 0 or more")
        self._slots = slots

    def submit(self, owner: str, priority: Priority = Priority.NORMAL) -> Ticket:
        """A place in the queue, which `admit` turns into a slot. `QueueFullError` if it would have
        to wait and may not: a ticket that runs at once needs no room to wait in."""
        self._age()
        if self._would_wait(owner):
            self._refuse_if_full(owner)
        ticket = Ticket(owner, priority, self._clock())
        self._count(owner, waiting=1)
        self._classes[priority].join(ticket, self._here.running(owner))
        return ticket

    def admit(self) -> list[Ticket]:
        """Those who run from now on, in order. While a slot is free, nobody waits who may run."""
        self._age()
        admitted = []
        while self._running < self._capacity and (ticket := self._start_next()):
            admitted.append(ticket)
        return admitted

    def release(self, ticket: Ticket) -> None:
        """The end of a ticket, however it comes: a waiting one leaves the queue, a running one
        frees its slot and is charged. Once over, it stays so."""
        if ticket.state is TicketState.WAITING:
            self._classes[ticket.rank].leave(ticket)
            self._count(ticket.owner, waiting=-1)
        elif ticket.state is TicketState.RUNNING:
            self._classes[ticket.rank].charge(ticket, self._measure(ticket))
            self._count(ticket.owner, running=-1)
        ticket.state = TicketState.OVER

    def positions(self) -> dict[Ticket, int]:
        """Every waiting ticket's place, from 1: the order in which they would be admitted if slots
        became free and nothing else changed. Who waits for its own owner's limit comes last."""
        return {ticket: place for place, ticket in enumerate(self._upcoming(), 1)}

    def position(self, ticket: Ticket) -> int | None:
        """One ticket's place, or None once it no longer waits. For many, ask for `positions`."""
        if ticket.state is not TicketState.WAITING:
            return None
        return next(place for place, other in enumerate(self._upcoming(), 1) if other is ticket)

    def retry_after_s(self) -> int:
        """When a place in a full queue will be free: with all slots busy, one generation ends every
        mean cost / slots (Little's law), and lets one ticket out of the queue."""
        return self._expected_s(completions=1)

    @property
    def _capacity(self) -> int:
        limit = self._limits.max_running
        return self._slots if limit is None else min(self._slots, limit)

    def _room(self, owner: str) -> float:
        """How many more of an owner may run, as far as its own limit goes."""
        limit = self._limits.max_running_per_owner
        return math.inf if limit is None else limit - self._load.running(owner)

    def _count(self, owner: str, *, running: int = 0, waiting: int = 0) -> None:
        self._running += running
        self._waiting += waiting
        for load in (self._load, self._here):
            load.add(owner, running=running, waiting=waiting)
        if running:
            for cls in self._classes:
                cls.running_changed(owner, self._here.running(owner))

    def _would_wait(self, owner: str) -> bool:
        free = self._capacity - self._running
        if free <= 0 or self._room(owner) <= self._here.waiting(owner):
            return True
        before_it = 0.0  # O(free + running): each owner counts for one, or is at its limit
        for other, waiting in self._here.waiting_by_owner.items():
            before_it += max(0, min(waiting, self._room(other)))
            if before_it >= free:
                return True
        return False

    def _refuse_if_full(self, owner: str) -> None:
        limits = self._limits
        if limits.max_waiting is not None and self._waiting >= limits.max_waiting:
            raise QueueFullError("queue", self.retry_after_s())
        most = limits.max_waiting_per_owner
        if most is not None and self._load.waiting(owner) >= most:
            # One of its own leaves the queue when its turn comes round.
            turns = max(1, len(self._here.waiting_by_owner))
            raise QueueFullError("owner", self._expected_s(completions=turns))

    def _start_next(self) -> Ticket | None:
        """The first in order whose owner may run. Few are passed over: who is at its limit runs."""
        for cls in self._classes:
            for *_, share in cls.order:
                if self._room(share.owner) > 0:
                    ticket = cls.start_first_of(share, self._clock())
                    self._count(share.owner, running=1, waiting=-1)
                    return ticket
        return None

    def _age(self) -> None:
        now = self._clock()
        for rank in (Priority.LOW, Priority.NORMAL):  # upwards: some may be due for two steps
            waiting = self._classes[rank].waiting
            while waiting:
                ticket = next(iter(waiting))
                if ticket.rank_since + self._ageing_s > now:
                    break
                self._classes[rank].leave(ticket)
                ticket.rank = Priority(rank - 1)
                ticket.rank_since += self._ageing_s  # not `now`: to be looked at late costs nothing
                self._classes[ticket.rank].join(ticket, self._here.running(ticket.owner))

    def _measure(self, ticket: Ticket) -> float:
        assert ticket.started_at is not None
        cost_s = max(0.0, self._clock() - ticket.started_at)
        self._costs_measured = min(self._costs_measured + 1, _MEAN_OVER)
        self._mean_cost_s += (cost_s - self._mean_cost_s) / self._costs_measured
        for cls in self._classes:
            cls.turn_s = self._mean_cost_s
        return cost_s

    def _expected_s(self, completions: int) -> int:
        least, most = _RETRY_AFTER_S
        if not self._capacity:
            return most
        return max(least, min(most, math.ceil(completions * self._mean_cost_s / self._capacity)))

    def _upcoming(self) -> Iterator[Ticket]:
        self._age()
        started: defaultdict[str, int] = defaultdict(int)
        lines = [cls.queued() for cls in self._classes]
        for minding_limits in (True, False):
            for rank, line in enumerate(lines):
                lines[rank] = yield from self._rehearse(rank, line, started, minding_limits)

    def _rehearse(
        self, rank: int, line: list[_Queued], started: defaultdict[str, int], minding_limits: bool
    ) -> Generator[Ticket, None, list[_Queued]]:
        """Goes through a class as `admit` would, on paper; what it held back is its value."""
        seats = count(self._classes[rank].next_seat)
        held_back = []
        heap = [(self._here.running(item[2]) + started[item[2]], *item) for item in line]
        heapq.heapify(heap)
        while heap:
            _, due, seat, owner, tickets = heapq.heappop(heap)
            if minding_limits and self._room(owner) <= started[owner]:
                held_back.append((due, seat, owner, tickets))
            elif ticket := next(tickets, None):
                yield ticket
                started[owner] += 1
                running = self._here.running(owner) + started[owner]
                heapq.heappush(heap, (running, due, next(seats), owner, tickets))
        return held_back
