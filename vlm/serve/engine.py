"""Continuous batching: one thread decodes, requests join and leave between its steps.

Event loop side: `admit` (bounded, or 429) gives a `Place`; `Place.submit` queues its answers and returns one
`Ticket` for each; leaving the place cancels what still runs. Thread side: take the cancelled out, let the
waiting in, read a slice of their prompts, one decoding step, hand the pieces over. Only this thread runs the
language model, and no turn of it reads more than `SLICE` tokens.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vlm.config import GenerationConfig
from vlm.serve.errors import APIError, overloaded
from vlm.serve.metrics import Metrics
from vlm.serve.pictures import Question
from vlm.serve.settings import Settings

if TYPE_CHECKING:
    from vlm.decoder import Prefill
    from vlm.generation import DecodeBatch, DecodeRequest, Event
    from vlm.model import VLM

T = TypeVar("T")
logger = logging.getLogger("vlm.serve")
SLICE = 128
"""Tokens of prompts, padding included, that are read between two steps: more would make the running answers
stutter, and whoever hangs up wait for what nobody wants."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one decoding step added to an answer: the text that became certain, and the token's own bytes
    (None for the end of the answer)."""

    text: str
    token: bytes | None
    logprob: float
    finish_reason: Literal["stop", "length"] | None


class Ticket:
    """One answer on its way: iterate over its pieces on the event loop that made it."""

    def __init__(self, question: Question, generation: GenerationConfig, deadline: float) -> None:
        self.question = question
        self.generation = generation
        self.deadline = deadline
        self.created = time.monotonic()
        self.cancelled = False
        self.started = False
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | APIError] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces as they come.

        Raises:
            APIError: the deadline passed, the server stops, or decoding failed.
        """
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, APIError):
                raise piece
            yield piece
            if piece.finish_reason:
                return

    def deliver(self, piece: Piece | APIError) -> None:
        """Hand over a piece; called from the engine's thread."""
        if not self.cancelled:
            try:
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
            except RuntimeError:  # the loop has closed: nobody waits any more
                self.cancelled = True


class Place(AbstractContextManager["Place"]):
    """Room for one request's answers, held from its admission to the end of its response."""

    def __init__(self, engine: Engine, count: int) -> None:
        self._engine = engine
        self._count = count
        self._tickets: list[Ticket] = []
        self.deadline = time.monotonic() + engine.settings.deadline

    def submit(self, question: Question, generations: Sequence[GenerationConfig]) -> list[Ticket]:
        """Queue one answer for each way of decoding."""
        self._tickets = [Ticket(question, generation, self.deadline) for generation in generations]
        self._engine.enqueue(self._tickets)
        return self._tickets

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for ticket in self._tickets:
            ticket.cancelled = True
        count, self._count = self._count, 0
        self._engine.leave(count)


class _Reading:
    """Prompts that are read together: some that fit into one slice, or a single longer one.

    So a prompt of which only a part has been read stands alone, and is dropped without harm to another.
    """

    def __init__(self, tickets: list[Ticket]) -> None:
        self.tickets = tickets
        self._requests: list[DecodeRequest] = []
        self._prompts: Prefill | None = None

    def fits(self, ticket: Ticket) -> bool:
        """Whether one more prompt may be read with these."""
        lengths = [one.question.prompt_tokens for one in (*self.tickets, ticket)]
        return len(lengths) * max(lengths) <= SLICE

    def read(self, batch: DecodeBatch) -> list[int]:
        """Read the next slice; after the last one the prompts join the batch, as these slots."""
        if self._prompts is None:
            from vlm.generation import DecodeRequest

            self._requests = [
                DecodeRequest(
                    t.question.row,
                    t.question.features,
                    t.generation,
                    t.question.latents,
                    guides=[t.question.guide],
                )
                for t in self.tickets
            ]
            self._prompts = batch.begin(self._requests)
        self._prompts.read(SLICE)
        return [] if self._prompts.left else batch.join(self._requests, self._prompts)


class Engine:
    """The decoding thread and its queue."""

    def __init__(
        self, model: VLM, settings: Settings, metrics: Metrics, make_batch: Callable[[VLM], DecodeBatch]
    ) -> None:
        self.model = model
        self.settings = settings
        self._metrics = metrics
        self._make_batch = make_batch
        self._waiting: deque[Ticket] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._reading: deque[_Reading] = deque()
        self._running: dict[int, Ticket] = {}
        self._wake = threading.Condition()
        self._admitted = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="vlm-engine", daemon=True)
        metrics.watch("vlm_answers_running", "Answers being decoded", lambda: self.running)
        metrics.watch("vlm_answers_waiting", "Answers waiting for a slot", lambda: len(self._waiting))

    @property
    def alive(self) -> bool:
        """Whether answers can be had."""
        return self._thread.is_alive() and not self._stopping

    @property
    def running(self) -> int:
        """Answers that hold a slot: their prompts are being read, or they are being decoded."""
        return len(self._running) + sum(len(reading.tickets) for reading in list(self._reading))

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """End; whoever still waits gets 503."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def admit(self, count: int) -> Place:
        """Room for `count` answers.

        Raises:
            APIError: 429 when the queue is full, 503 when the engine does not run.
        """
        if not self.alive:
            raise APIError(503, "The model is not running.")
        with self._wake:
            if self._admitted + count > self.settings.slots + self.settings.queue:
                raise overloaded(len(self._waiting), self.settings.slots)
            self._admitted += count
        return Place(self, count)

    def leave(self, count: int) -> None:
        """Give room back, and let the thread notice who is gone."""
        with self._wake:
            self._admitted -= count
            self._wake.notify()

    def enqueue(self, tickets: Sequence[Ticket]) -> None:
        """Put admitted answers into the queue."""
        with self._wake:
            self._waiting.extend(tickets)
            self._wake.notify()

    async def run(self, work: Callable[[], T]) -> T:
        """Do something else with the model, between two decoding steps.

        Raises:
            APIError: 500 when it fails, 503 when the server stops.
        """
        future: Future[T] = Future()
        with self._wake:
            self._jobs.append((work, future))
            self._wake.notify()
        return await asyncio.wrap_future(future)

    # --- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        import torch

        batch = self._make_batch(self.model)
        with torch.inference_mode():
            while self._wait_for_work():
                try:
                    self._turn(batch)
                except Exception:
                    # One bad request must not end the service for all: whoever was in the batch gets a 500,
                    # a fresh batch takes its place. Frames alone are logged; messages may quote a prompt.
                    logger.exception("a decoding step failed")
                    self._fail_all(_failed())
                    batch = self._make_batch(self.model)
        self._fail_all(APIError(503, "The server is stopping."))

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._stopping or self._waiting or self._reading or self._running or self._jobs):
                self._wake.wait()
            return not self._stopping

    def _turn(self, batch: DecodeBatch) -> None:
        self._drop(batch)
        self._let_in()
        self._do_one_job()
        self._read(batch)
        if self._running:
            for event in batch.step():
                self._hand_over(event)

    def _do_one_job(self) -> None:
        if not self._jobs:
            return
        work, future = self._jobs.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except Exception:
                logger.exception("a job between two steps failed")
                future.set_exception(_failed())

    def _drop(self, batch: DecodeBatch) -> None:
        """Take out who has gone and who is late."""
        now = time.monotonic()
        left: list[Ticket] = []

        def leaving(tickets: Iterable[Ticket]) -> list[Ticket]:
            gone = [ticket for ticket in tickets if ticket.cancelled or now > ticket.deadline]
            left.extend(gone)
            return gone

        slots = {ticket: slot for slot, ticket in self._running.items()}
        for ticket in leaving(slots):
            batch.remove(slots[ticket])
            del self._running[slots[ticket]]
        for reading in list(self._reading):
            for ticket in leaving(reading.tickets):
                reading.tickets.remove(ticket)
            if not reading.tickets:
                self._reading.remove(reading)
        with self._wake:
            for ticket in leaving(self._waiting):
                self._waiting.remove(ticket)
        late = APIError(504, "The answer was not ready before the server's deadline.")
        for ticket in left:
            self._end(ticket, "cancelled" if ticket.cancelled else "deadline", late)

    def _let_in(self) -> None:
        """Give the free slots to who waits; short prompts are read together."""
        with self._wake:
            for _ in range(min(self.settings.slots - self.running, len(self._waiting))):
                ticket = self._waiting.popleft()
                if self._reading and self._reading[-1].fits(ticket):
                    self._reading[-1].tickets.append(ticket)
                else:
                    self._reading.append(_Reading([ticket]))

    def _read(self, batch: DecodeBatch) -> None:
        """Read one slice. Long prompts take turns, so that a short one behind them is soon read."""
        if not self._reading:
            return
        reading = self._reading[0]
        try:
            slots = reading.read(batch)
        except Exception:
            # Reading failed before the batch changed, so only those who join are concerned; alone, the
            # others among them may still be read.
            logger.exception("reading %d prompts failed", len(reading.tickets))
            self._reading.popleft()
            if len(reading.tickets) > 1:
                self._reading.extendleft(_Reading([ticket]) for ticket in reversed(reading.tickets))
            else:
                self._end(reading.tickets[0], "error", _failed())
            return
        if not slots:
            self._reading.rotate(-1)
            return
        for slot, ticket in zip(slots, reading.tickets, strict=True):
            self._running[slot] = ticket
            self._metrics.tokens.labels("prompt").inc(ticket.question.prompt_tokens)
        self._reading.popleft()

    def _hand_over(self, event: Event) -> None:
        ticket = self._running[event.slot]
        if not ticket.started:
            ticket.started = True
            self._metrics.first_token.observe(time.monotonic() - ticket.created)
        self._metrics.tokens.labels("completion").inc()
        language = self.model.language
        token = None if event.token == language.frame.end else language.token_bytes(event.token)
        piece = Piece(event.text, token, event.logprob, event.finish_reason)
        if event.finish_reason:
            del self._running[event.slot]
            self._end(ticket, event.finish_reason, piece)
        else:
            ticket.deliver(piece)

    def _end(self, ticket: Ticket, reason: str, last: Piece | APIError) -> None:
        self._metrics.answers.labels(reason).inc()
        ticket.deliver(last)

    def _fail_all(self, error: APIError) -> None:
        with self._wake:
            tickets = list(self._running.values())
            self._running.clear()
            if self._stopping:
                tickets += [ticket for reading in self._reading for ticket in reading.tickets]
                tickets += self._waiting
                self._reading.clear()
                self._waiting.clear()
                for _, future in self._jobs:
                    if future.set_running_or_notify_cancel():
                        future.set_exception(error)
                self._jobs.clear()
        for ticket in tickets:
            self._end(ticket, "error", error)


def _failed() -> APIError:
    return APIError(500, "The model failed to answer; the error is logged.")
