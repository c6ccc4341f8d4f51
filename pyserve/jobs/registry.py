"""All jobs of one server: submitted, found, repeated, stopped, and forgotten with their logs."""

from __future__ import annotations

import asyncio
import io
import itertools
import secrets
from collections import OrderedDict
from dataclasses import dataclass

from pyserve.errors import ApiError, EventTooLargeError, MemoryBudgetError, SessionEndedError
from pyserve.jobs.job import IdempotencyScope, Job, JobLog
from pyserve.jobs.request import JobRequest
from pyserve.jobs.streams import JobStreams
from pyserve.jobs.translator import FINISH_REASONS, Translator
from pyserve.producers.generation import Begin, Generations
from pyserve.scheduling.scheduler import Scheduler, Slot, adapt_body
from pyserve.sessions import Ending, StreamSession, StreamSessionManager

_DIALECT = "job"

_UPSTREAM_HEADERS = {"Content-Type": "application/json"}

# Places that are told one by one.
_EACH_PLACE_UP_TO = 10

# How soon a job is forgotten after its log.
_COLLECT_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Idempotency:
    """A client's word that two submissions with one key are one."""

    key: str
    body_digest: bytes


class JobRegistry:
    """Every job that has a log. :meth:`run` must be running for what ends to be forgotten.

    What is kept of a job here goes with its log: at the end of its TTL, when it is deleted, or when
    the memory budget takes it.
    """

    def __init__(
        self, manager: StreamSessionManager, generations: Generations, scheduler: Scheduler
    ) -> None:
        self._manager = manager
        self._generations = generations
        self._scheduler = scheduler
        self.streams = JobStreams(manager)
        self._jobs: dict[str, Job] = {}
        # Oldest ending first, which is the order in which logs go.
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._repeats: dict[IdempotencyScope, tuple[bytes, Job]] = {}
        self._serial = itertools.count()
        manager.dialects[_DIALECT] = self._tell_ending

    def __len__(self) -> int:
        return len(self._jobs)

    def submit(
        self,
        owner: str,
        request: JobRequest,
        *,
        grace_until: float,
        idempotency: Idempotency | None = None,
    ) -> tuple[Job, bool]:
        """A job, and whether it was there before. Until `grace_until`, on the loop's clock, it
        may still be refused: see :meth:`settle`.

        Raises:
            ApiError: reason ``idempotency_mismatch``, ``stream_not_found``, ``memory_budget``.
        """
        scope = idempotency and (owner, idempotency.key, request.conversation_id)
        if scope and idempotency and (known := self._find_repeat(scope, idempotency.body_digest)):
            return known, True
        job = Job(
            f"job_{secrets.token_hex(12)}", owner, request, self._manager.config.max_session_bytes
        )
        stream = self.streams.get(request.stream_id, owner) if request.stream_id else None
        # Known before it starts, since it may be over at once.
        self._jobs[job.id] = job
        if scope and idempotency:
            job.scope = scope
            self._repeats[scope] = (idempotency.body_digest, job)
        if stream is not None:
            self.streams.join(stream, job.id)
        try:
            self._start(job, request, stream, grace_until)
        except ApiError:
            self.streams.leave(job.id)
            self._drop(job.id)
            raise
        return job, False

    async def settle(self, job: Job) -> StreamSession:
        """Wait until the job has its place; returns its log.

        Raises:
            ApiError: what the scheduler refuses it for; ``cancelled``: deleted meanwhile.
        """
        log = self.log_of(job)
        generation = None if log is None else self._generations.get(log)
        if generation is not None:
            await generation.wait_settled()
        log = self.log_of(job)
        if log is None:
            raise ApiError("cancelled")
        return log

    def get(self, job_id: str, owner: str) -> tuple[Job, StreamSession]:
        """A job and its log.

        Raises:
            ApiError: reason ``job_not_found``: unknown, expired, or somebody else's.
        """
        job = self._jobs.get(job_id)
        log = self.log_of(job) if job is not None and job.owner == owner else None
        if job is None or log is None:
            raise ApiError("job_not_found")
        return job, log

    def cancel(self, job: Job) -> None:
        """Stop it, if it is not over. Its log stays until its TTL."""
        log = self.log_of(job)
        if log is not None:
            log.cancel()

    def log_of(self, job: Job) -> StreamSession | None:
        """The job's log, None when it is gone."""
        log = self._manager.get(job.key, owner=job.owner)
        return log if log is not None and log.epoch == job.epoch else None

    def forget(self, log: StreamSession) -> None:
        """This log was taken out: what it was a job's is gone, too."""
        if log.dialect == _DIALECT:
            self._drop(log.tag.decode())

    async def run(self) -> None:
        """Forget jobs whose logs are gone, until cancelled."""
        while True:
            self._collect()
            await asyncio.sleep(_COLLECT_INTERVAL_S)

    def _collect(self) -> None:
        while self._ended and self.log_of(oldest := next(iter(self._ended.values()))) is None:
            self._drop(oldest.id)

    def _drop(self, job_id: str) -> None:
        self._ended.pop(job_id, None)
        job = self._jobs.pop(job_id, None)
        if job is not None and job.scope is not None:
            self._repeats.pop(job.scope, None)

    # --- idempotency

    def _find_repeat(self, scope: IdempotencyScope, body_digest: bytes) -> Job | None:
        if scope not in self._repeats:
            return None
        known_digest, job = self._repeats[scope]
        if self.log_of(job) is None:
            self._drop(job.id)
            return None
        if known_digest != body_digest:
            raise ApiError("idempotency_mismatch")
        return job

    # --- one job's life

    def _start(
        self, job: Job, request: JobRequest, stream: StreamSession | None, grace_until: float
    ) -> None:
        log = JobLog(job.id, stream)

        async def produce(session: StreamSession, begin: Begin) -> str | None:
            log.session = session
            return await self._produce(job, log, begin)

        generation = self._generations.start(
            job.conversation_id,
            produce,
            owner=job.owner,
            subkey=f"{next(self._serial):016x}",
            dialect=_DIALECT,
            tag=job.id.encode(),
            grace_until=grace_until,
            on_end=lambda session: self._end(job, log, session),
            abandon_after_s=request.abandon_after_s,
            also_read=stream,
        )
        job.key, job.epoch = generation.session.key, generation.session.epoch

    async def _produce(self, job: Job, log: JobLog, begin: Begin) -> str | None:
        assert job.request is not None
        max_runtime_s = job.request.max_runtime_s
        async with self._scheduler.admit(
            job.request.model,
            job.owner,
            job.request.priority,
            on_position=lambda position: self._place(job, log, position),
        ) as slot:
            if job.position is None:
                self._place(job, log, 1)  # it was the next one at once
            job.start(_model_name(slot))
            begin()
            log.emit("job_started", model=job.model)
            stopping = self._stop_after(max_runtime_s, log.session)
            try:
                return await _generate(job, log, slot)
            finally:
                if stopping is not None:
                    stopping.cancel()

    def _place(self, job: Job, log: JobLog, position: int) -> None:
        """It has this place in the queue. Nothing may come out of here: the scheduler calls."""
        generation = self._generations.get(log.session)
        if generation is None:
            return
        job.position = position
        generation.settle()
        if not _is_news(position, job.told_position):
            return
        job.told_position = position
        try:
            log.announce("job_queued", queue_position=position)
        except (SessionEndedError, EventTooLargeError, MemoryBudgetError):
            generation.stop()

    def _stop_after(
        self, max_runtime_s: float | None, session: StreamSession
    ) -> asyncio.TimerHandle | None:
        if max_runtime_s is None:
            return None
        return asyncio.get_running_loop().call_later(max_runtime_s, session.cancel, "max_runtime")

    def _tell_ending(self, session: StreamSession, ending: Ending) -> bytes:
        return self._jobs[session.tag.decode()].last_event(ending)

    def _end(self, job: Job, log: JobLog, session: StreamSession) -> None:
        """It is over, on whatever thread."""
        job.request = None
        generation = self._generations.get(session)
        if generation is None or generation.refused is None:
            log.copy_last(session.last_event())
        kept = self._manager.get(session.key, owner=session.owner)
        self.streams.leave(job.id)
        if kept is None:
            self._drop(job.id)
        else:
            self._ended[job.id] = job


def _is_news(position: int, told_position: int | None) -> bool:
    """Far back in a long queue a place changes with every slot that is freed, for everyone: it is
    told when it is a tenth better, so that all that is told grows with the queue's logarithm."""
    if told_position is None or position > told_position or position <= _EACH_PLACE_UP_TO:
        return position != told_position
    return position <= told_position * 0.9


def _model_name(slot: Slot) -> str:
    """What people call the model: the name that was asked for, where any is taken."""
    return slot.model if slot.renamed else slot.upstream_model or slot.model


async def _generate(job: Job, log: JobLog, slot: Slot) -> str | None:
    asked, job.request = job.request, None
    if asked is None:
        raise SessionEndedError
    route = asked.route
    body = io.BytesIO(adapt_body(asked.body, slot.upstream_model, slot.defaults))
    del asked  # it may be large
    translator = Translator(job, log)
    reason = await slot.upstream.generate(route, _UPSTREAM_HEADERS, body, translator, lambda: None)
    told = translator.finish_reason
    return reason or (told if told in FINISH_REASONS else None)
