"""What is measured, as data: each point is one situation, with the servers that meet it in turn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Way = Literal["live", "replay", "reattach", "generate", "owners"]

IN_PROCESS = ("pyserve", "aiohttp", "bare")
AGAINST_LLAMA = ("pyserve+llama.cpp", "llama.cpp")
QUEUES = ("fair queue", "common queue", "llama.cpp's queue")
WITH_UPSTREAM = ("pyserve+upstream", "aiohttp+upstream", "pyserve", "aiohttp")

#: Groups that are no situations of readers: each is measured its own way, figure by figure.
OWN_GROUPS = {
    "batch": "tokens a second of a model in Python, 1, 4 and 16 sequences at a time",
    "core": "the core itself: append, frame, read, bindings, memory, growth",
}

#: Events between a reader that reattaches and the end of the stream.
LEFT_BEHIND = 10


@dataclass(frozen=True, kw_only=True)
class Point:
    """One situation."""

    name: str
    group: str
    title: str
    servers: tuple[str, ...] = IN_PROCESS
    #: live: all readers attach, then the events come. replay: the streams are over before anyone
    #: reads. reattach: readers come near the end of a stream, one by one, and leave again.
    #: generate: llama.cpp generates for those who ask. owners: it generates for two, of which one
    #: asks for all of its generations at once, and the other one `rate` times a second beside it.
    way: Way = "live"
    streams: int = 1
    readers: int = 1
    #: Events a second on each stream; 0 is a burst, as fast as the producer can.
    rate: float = 0.0
    #: Events of each stream.
    events: int = 400
    #: How often all readers come within one round.
    batches: int = 1
    stalled_share: float = 0.0
    #: Rounds are fewer where one takes long.
    most_rounds: int = 1000

    @property
    def has_delivery_alone(self) -> bool:
        """Whether the same producer with one reader is measured, too: what the other readers cost
        beyond that is delivery alone, without the producer and its timer."""
        return bool(self.way == "live" and self.rate and self.readers > 1 and self.pays_producer)

    @property
    def pays_producer(self) -> bool:
        """Whether the events are made in the process that is measured."""
        return not any("upstream" in server for server in self.servers)

    def shortened(self, share: float) -> Point:
        """The same with fewer events, readers and batches."""
        return replace(
            self,
            events=min(self.events, max(2 * LEFT_BEHIND, int(self.events * share))),
            batches=max(1, int(self.batches * share)),
            streams=max(1, int(self.streams * share)),
            readers=max(1, int(self.readers * share)),
        )


def _count(number: int, thing: str) -> str:
    return f"one {thing}" if number == 1 else f"{number:,} {thing}s"


def _fan_out() -> list[Point]:
    return [
        Point(
            name=f"fan-out-{readers}",
            group="fan-out",
            title=f"{_count(readers, 'reader')} of one stream, 200 events/s",
            readers=readers,
            rate=200,
            events=400,
        )
        for readers in (1, 10, 100, 1000)
    ]


def _burst() -> list[Point]:
    events = {1: 20_000, 10: 10_000, 100: 5_000, 1000: 500}
    return [
        Point(
            name=f"burst-{readers}",
            group="burst",
            title=f"{_count(readers, 'reader')} of one stream, {events[readers]:,} events at once",
            readers=readers,
            events=events[readers],
        )
        for readers in (1, 10, 100, 1000)
    ]


def _streams() -> list[Point]:
    return [
        Point(
            name=f"streams-{streams}",
            group="streams",
            title=f"{streams:,} streams, one reader each, 50 events/s",
            streams=streams,
            readers=streams,
            rate=50,
            events=200,
        )
        for streams in (100, 1000)
    ]


LOG_EVENTS = 17_400
"""They fill 4 MiB."""


def _replay() -> list[Point]:
    return [
        Point(
            name=f"replay-{readers}",
            group="replay",
            title=f"a finished log of 4 MiB, read by {readers} at a time",
            servers=("pyserve", "nginx", "aiohttp", "bare"),
            way="replay",
            readers=readers,
            events=LOG_EVENTS,
            batches=batches,
        )
        for readers, batches in ((1, 24), (16, 4))
    ]


def _proxy() -> list[Point]:
    """Is a generation slower through pyserve?"""
    again = Point(
        name="proxy-first-token",
        group="proxy",
        title="a generation of 16 tokens, again and again",
        servers=AGAINST_LLAMA,
        way="generate",
        events=16,
        batches=100,
    )
    return [again] + [
        Point(
            name=f"proxy-{streams}",
            group="proxy",
            title=f"{_count(streams, 'generation')} of llama.cpp, {tokens:,} tokens each",
            servers=AGAINST_LLAMA,
            way="generate",
            streams=streams,
            readers=streams,
            events=tokens,
        )
        for streams, tokens in ((1, 4000), (8, 1000))
    ]


def _ancestor() -> list[Point]:
    """The same streams through llama.cpp's own resumable routes."""
    base = Point(name="", group="ancestor", title="", servers=AGAINST_LLAMA, events=8000)
    replay = replace(base, way="replay")
    return [
        replace(
            replay,
            name="ancestor-replay-1",
            title="a finished generation of 8,000 tokens, read by one at a time",
            batches=24,
        ),
        replace(
            replay,
            name="ancestor-replay-8",
            title="a finished generation of 8,000 tokens, read by 8 at a time",
            readers=8,
            batches=4,
        ),
        replace(
            base,
            name="ancestor-reattach",
            title="back to a finished generation, some ten events before its end",
            way="reattach",
            batches=300,
        ),
        replace(
            base,
            name="ancestor-fan-out",
            title="8 readers of one generation of 4,000 tokens",
            way="generate",
            readers=8,
            events=4000,
        ),
    ]


def _fairness() -> Point:
    requests, tokens, rate = 100, 200, 10
    return Point(
        name="fairness",
        group="fairness",
        title=f"a light owner asks {rate} times a second, beside a heavy one that"
        f" asked for {requests} generations of {tokens} tokens at once",
        servers=QUEUES,
        way="owners",
        readers=requests,
        rate=rate,
        events=tokens,
    )


def _event_loop() -> list[Point]:
    """What another event loop under pyserve changes."""
    streams = Point(name="", group="event-loop", title="", streams=100, readers=100, rate=50)
    return [
        replace(
            streams,
            name="uvloop-streams",
            title="100 streams, one reader each, 50 events/s",
            servers=("pyserve", "pyserve+uvloop"),
            events=100,
        ),
        replace(
            streams,
            name="uvloop-upstream",
            title="100 streams, one reader each, 50 events/s from an HTTP upstream",
            servers=("pyserve+upstream", "pyserve+upstream+uvloop"),
            events=100,
        ),
        replace(
            streams,
            name="uvloop-reattach",
            title="back to a live stream of 4 MiB, ten events behind its end",
            servers=("pyserve", "pyserve+uvloop"),
            way="reattach",
            streams=1,
            readers=1,
            events=LOG_EVENTS,
            batches=300,
        ),
    ]


POINTS = [
    *_fan_out(),
    *_burst(),
    *_streams(),
    Point(
        name="stalled-20%",
        group="stalled",
        title="100 readers of one stream, 200 events/s, 20 of them read nothing",
        readers=100,
        rate=200,
        events=1_600,
        stalled_share=0.2,
    ),
    Point(
        name="stalled-burst",
        group="stalled",
        title="100 readers of one stream, 20,000 events at once, 20 of them read nothing",
        readers=100,
        events=20_000,
        servers=("pyserve", "bare"),
        stalled_share=0.2,
    ),
    *_replay(),
    Point(
        name="reattach",
        group="reattach",
        title="back to a live stream of 4 MiB, ten events behind its end",
        way="reattach",
        events=LOG_EVENTS,
        batches=300,
    ),
    Point(
        name="upstream-fan-out",
        group="upstream",
        title="100 readers of one stream, 200 events/s from an HTTP upstream",
        servers=WITH_UPSTREAM,
        readers=100,
        rate=200,
    ),
    Point(
        name="upstream-streams",
        group="upstream",
        title="100 streams, one reader each, 50 events/s from an HTTP upstream",
        servers=WITH_UPSTREAM,
        streams=100,
        readers=100,
        rate=50,
        events=100,
    ),
    Point(
        name="upstream-burst",
        group="upstream",
        title="100 readers of one stream, 5,000 events at once from an HTTP upstream",
        servers=WITH_UPSTREAM,
        readers=100,
        events=5_000,
    ),
    Point(
        name="crowd",
        group="crowd",
        title="10,000 readers of one stream, 2,000 events at once, 1,000 of them read nothing",
        servers=("pyserve", "bare"),
        readers=10_000,
        events=2_000,
        stalled_share=0.1,
        most_rounds=1,
    ),
    *_event_loop(),
    *_proxy(),
    *_ancestor(),
    _fairness(),
]
