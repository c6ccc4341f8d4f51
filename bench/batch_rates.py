"""Tokens a second of a model in Python that advances many sequences in one call.

python bench/batch_rates.py BATCH_SIZE DURATION_S    one measurement in a process of its own: JSON
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from processes import BENCH, Program

from pyserve.producers.batch import Batcher
from pyserve.producers.demo_text import NOTES, TOUR
from pyserve.producers.ngram import NgramModel, NgramRequest

if TYPE_CHECKING:
    from rich.progress import Progress

BATCH_SIZES = (1, 4, 16)
DURATION_S = 1.0
WARM_UP_S = 0.1
MAX_TOKENS = 200


async def tokens_per_second(model: NgramModel, batch_size: int, duration_s: float) -> float:
    """With as many readers as fit into the batch, each asking again as soon as it has its text."""
    seeds, counted = itertools.count(), 0

    async def read(batcher: Batcher[Any, Any], until: float) -> None:
        nonlocal counted
        while time.perf_counter() < until:
            async for _ in batcher.generate(NgramRequest("", next(seeds), max_tokens=MAX_TOKENS)):
                counted += 1

    async with Batcher(model, max_batch_size=batch_size, max_batch_wait_ms=0) as batcher:
        began = time.perf_counter()
        await asyncio.gather(*(read(batcher, began + duration_s) for _ in range(batch_size)))
        return counted / (time.perf_counter() - began)


async def main(batch_size: int, duration_s: float) -> None:
    model = NgramModel(TOUR + "\n" + NOTES)
    await tokens_per_second(model, batch_size, WARM_UP_S)
    print(json.dumps(await tokens_per_second(model, batch_size, duration_s)))


def measure(progress: Progress, rounds: int, share: float) -> list[dict[str, Any]]:
    """The sizes take turns."""
    rates: dict[int, list[float]] = {batch_size: [] for batch_size in BATCH_SIZES}
    task = progress.add_task("batch", total=rounds * len(BATCH_SIZES))
    for _ in range(rounds):
        for batch_size in BATCH_SIZES:
            progress.update(task, description=f"batch: {batch_size}")
            words = [BENCH / "batch_rates.py", batch_size, DURATION_S * share]
            with Program(*words, python=True) as program:
                rates[batch_size].append(json.loads(program.read_to_end()))
            progress.advance(task)
    progress.update(task, description="batch")
    return [
        {
            "name": f"batch_{batch_size}",
            "title": f"the n-gram model, {batch_size} at a time",
            "value": statistics.median(measured),
            "unit": "tokens/s",
            "runs": measured,
        }
        for batch_size, measured in rates.items()
    ]


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
