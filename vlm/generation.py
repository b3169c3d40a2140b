"""Decoding: greedy, sampled or by beams, in batches that rows may join and leave, with stop rules.

batch = DecodeBatch(model)
slots = batch.add([DecodeRequest(row, features, config)])
while len(batch):
    for event in batch.step():
        print(event.slot, event.text, event.finish_reason)
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm.answer import Answer, FinishReason, TokenLogprob, Usage
from vlm.config import GenerationConfig
from vlm.conversation import Conversation
from vlm.decoder import DecoderState, finite
from vlm.errors import ConfigError
from vlm.images import open_picture
from vlm.processor import Row

if TYPE_CHECKING:
    from vlm.model import VLM


@dataclass(frozen=True)
class DecodeRequest:
    """A prompt's row, the (images, N, D_v) features of its pictures, and how to decode.

    Attributes:
        latents: (images, L, W) that the adapter makes of the features, where they are known already.
    """

    row: Row
    features: Tensor
    config: GenerationConfig = field(default_factory=GenerationConfig)
    latents: Tensor | None = None


@dataclass(frozen=True)
class Event:
    """One token of one slot: the text it completes (often none yet), and the end, when it is one."""

    slot: int
    token: int
    text: str
    logprob: float
    finish_reason: FinishReason | None = None


class Writer:
    """Turns token ids into text as they come; space around the whole answer is no part of it.

    Text that may still change (half of a character) or vanish (the beginning of a stop text, space at
    the end) is held back until it is certain, so that the pieces together are exactly the answer.

    Attributes:
        ids: the tokens without the end.
        count: tokens taken, the end included.
        margin: the smallest gap to what was not chosen (`Answer.margin`); infinite where none was compared.
    """

    def __init__(self, model: VLM, config: GenerationConfig) -> None:
        self.model, self.config = model, config
        self.ids: list[int] = []
        self.count = 0
        self.logprob = 0.0
        self.margin = math.inf
        self.tokens: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self._written = ""
        self._shown = 0
        self._told = 0

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._written.strip()

    def push(self, token: int, logprob: float, room: bool = True, gap: float = math.inf) -> str:
        """Takes a token and returns the text that became certain.

        Args:
            room: whether the model can read a further token.
            gap: log-probability by which the token was likelier than any other.
        """
        self.count += 1
        self.logprob += logprob
        self.margin = min(self.margin, gap)
        if token == self.model.language.frame.end:
            self.finish_reason = "stop"
            if self.tokens:
                last = self.tokens[-1]
                self.tokens[-1] = TokenLogprob(last.text + self._tell(len(self._written)), last.logprob)
            return self._show(len(self._written))
        self.ids.append(token)
        self._written = self.model.language.decode(self.ids)
        sure = len(self._written.rstrip("\ufffd"))
        found = [at for at in (self._written.find(stop) for stop in self.config.stop if stop) if at >= 0]
        if found:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.config.max_new_tokens or not room:
            self.finish_reason = "length"
        whole = len(self._written) if self.finish_reason else sure
        self.tokens.append(TokenLogprob(self._tell(whole), logprob))
        if found:
            self._written = self._written[: min(found)]
        if self.finish_reason:
            return self._show(len(self._written))
        return self._show(sure - self._begun(sure))

    def _begun(self, end: int) -> int:
        """Characters before `end` that may be the beginning of a stop text."""
        held = [
            size
            for stop in self.config.stop
            for size in range(1, min(len(stop), end + 1))
            if self._written.endswith(stop[:size], 0, end)
        ]
        return max(held, default=0)

    def _show(self, end: int) -> str:
        """What of the first `end` characters, without the space around them, has not been shown yet."""
        certain = self._written[:end].strip()
        fresh = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        return fresh

    def _tell(self, end: int) -> str:
        """What of the first `end` characters no token has been credited with yet."""
        fresh = self._written[self._told : end]
        self._told = max(self._told, end)
        return fresh


@dataclass
class _Slot:
    number: int
    writer: Writer
    config: GenerationConfig
    random: torch.Generator | None


class DecodeBatch:
    """Rows decoded together; each as it would be alone.

    `add` reads the prompts; each `step` gives every row one token. A row that ends leaves by itself.
    """

    def __init__(self, model: VLM) -> None:
        self.model = model
        self._slots: list[_Slot] = []
        self._state: DecoderState | None = None
        self._logits: Tensor | None = None
        self._numbers = itertools.count()
        self._banned = model.language.never_said().to(model.device)

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, requests: Sequence[DecodeRequest]) -> list[int]:
        """Reads the prompts and returns the numbers of their slots."""
        if not requests:
            return []
        features = torch.cat([request.features for request in requests])
        known = [request.latents for request in requests if request.latents is not None]
        latents = torch.cat(known) if len(known) == len(requests) else None
        state, logits = DecoderState.prefill(self.model, [r.row for r in requests], features, latents)
        if self._state is None or self._logits is None:
            self._state, self._logits = state, logits
        else:
            self._state = self._state.join(state)
            self._logits = torch.cat([self._logits, logits])
        added = []
        for request in requests:
            random = None
            if request.config.temperature > 0:
                random = torch.Generator()
                if request.config.seed is None:
                    random.seed()
                else:
                    random.manual_seed(request.config.seed)
            writer = Writer(self.model, request.config)
            added.append(_Slot(next(self._numbers), writer, request.config, random))
        self._slots += added
        return [slot.number for slot in added]

    def writer(self, slot: int) -> Writer:
        """What a slot has written so far."""
        return next(s.writer for s in self._slots if s.number == slot)

    def step(self) -> list[Event]:
        """One token for every row, in the order they were added."""
        if self._state is None or self._logits is None:
            return []
        chosen, logprobs, gaps = self._choose(self._logits)
        limit = self.model.language.max_positions
        room = (self._state.positions[:, 0] + 1 < limit).tolist()
        events = []
        for index, slot in enumerate(self._slots):
            token, logprob = int(chosen[index]), float(logprobs[index])
            text = slot.writer.push(token, logprob, room[index], gaps[index])
            events.append(Event(slot.number, token, text, logprob, slot.writer.finish_reason))
        staying = [i for i, event in enumerate(events) if event.finish_reason is None]
        self._keep(staying)
        if staying:
            self._logits = self._state.advance(chosen[staying, None])[:, 0]
        return events

    def remove(self, slot: int) -> None:
        """Drops a row that is no longer wanted; a slot that has ended already is no error."""
        if any(s.number == slot for s in self._slots):
            self._keep([i for i, s in enumerate(self._slots) if s.number != slot])

    def _keep(self, rows: list[int]) -> None:
        if len(rows) == len(self._slots) or self._state is None or self._logits is None:
            return
        self._slots = [self._slots[i] for i in rows]
        if rows:
            index = torch.tensor(rows, device=self._logits.device)
            self._state, self._logits = self._state.select(index), self._logits[index]
        else:
            self._state = self._logits = None

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor, list[float]]:
        """(B, V) -> (B,) tokens, their log-probabilities under the model (before any temperature), and how
        far the next likeliest token is behind each (infinite where the token was drawn)."""
        likely = finite(logits).log_softmax(dim=-1)
        allowed = likely.masked_fill(self._banned, float("-inf"))
        chosen = allowed.argmax(dim=-1)
        two = allowed.topk(2, dim=-1).values
        gaps: list[float] = (two[:, 0] - two[:, 1]).tolist()
        for index, slot in enumerate(self._slots):
            if slot.random is not None:
                chosen[index] = sample(allowed[index], slot.config, slot.random)
                gaps[index] = math.inf
        return chosen, likely.gather(1, chosen[:, None])[:, 0], gaps


def sample(logits: Tensor, config: GenerationConfig, random: torch.Generator) -> int:
    """Draws from the nucleus (Holtzman et al. 2020) of (V,) logits at the config's temperature."""
    scores = logits.cpu().double()
    # The highest becomes 0 first, so that no temperature, however small, takes all to minus infinity.
    probabilities = ((scores - scores.max()) / config.temperature).softmax(dim=-1)
    ordered, tokens = probabilities.sort(descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered[before >= config.top_p] = 0
    return int(tokens[torch.multinomial(ordered, 1, generator=random)])


@torch.inference_mode()
def answer_all(model: VLM, conversations: Sequence[Conversation], config: GenerationConfig) -> list[Answer]:
    """Answers in the order asked; prompts of like length are decoded together."""
    from vlm.beams import beam_search

    lengths = [len(model.processor.tokens(conversation)) for conversation in conversations]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    answers: dict[int, Answer] = {}
    for begin in range(0, len(order), config.batch_size):
        part = order[begin : begin + config.batch_size]
        started = time.perf_counter()
        requests = [DecodeRequest(*shown(model, conversations[i]), config) for i in part]
        encoded = time.perf_counter()
        if config.num_beams > 1:
            writers = beam_search(model, requests, config)
        else:
            writers = _decode(model, requests)
        seconds = {"encode": encoded - started, "decode": time.perf_counter() - encoded}
        for i, request, writer in zip(part, requests, writers, strict=True):
            answers[i] = finished(model, request.row, writer, seconds)
    return [answers[i] for i in range(len(lengths))]


def shown(
    model: VLM, conversation: Conversation, answers: Sequence[str | None] = (None,)
) -> tuple[Row, Tensor]:
    """A conversation with its pictures opened: one row of all `answers`, and its images' features."""
    seen, hints = model.see([open_picture(image) for image in conversation.images])
    row = model.processor.row([model.processor.tokens(conversation, text, hints) for text in answers])
    return row, seen[row.tokens.images]


def finished(model: VLM, row: Row, writer: Writer, seconds: dict[str, float]) -> Answer:
    """The answer that a writer has written."""
    return Answer(
        text=writer.text,
        finish_reason=writer.finish_reason or "length",
        usage=Usage(len(row.tokens), writer.count, len(row.tokens.images)),
        seconds=seconds,
        logprob=writer.logprob,
        adapter=model.adapter_name,
        tokens=tuple(writer.tokens),
        margin=writer.margin if math.isfinite(writer.margin) else None,
    )


def _decode(model: VLM, requests: Sequence[DecodeRequest]) -> list[Writer]:
    batch = DecodeBatch(model)
    writers = [batch.writer(slot) for slot in batch.add(requests)]
    while len(batch):
        batch.step()
    return writers


@torch.inference_mode()
def stream(model: VLM, conversation: Conversation, config: GenerationConfig) -> Iterator[str]:
    """The answer, piece by piece; beams have no pieces, so they are refused by a `ConfigError`."""
    if config.num_beams > 1:
        raise ConfigError("beam search cannot stream: set num_beams=1")
    batch = DecodeBatch(model)
    batch.add([DecodeRequest(*shown(model, conversation), config)])
    while len(batch):
        for event in batch.step():
            if event.text:
                yield event.text


@torch.inference_mode()
def score_all(
    model: VLM, conversations: Sequence[Conversation], candidates: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Summed log-probability of each candidate and its end; a prompt's candidates share one row."""
    scores: list[list[float]] = []
    for conversation, texts in zip(conversations, candidates, strict=True):
        if not texts:
            scores.append([])
            continue
        row, features = shown(model, conversation, texts)
        batch = model.processor.batch([row]).to(model.device)
        likely = model.label_logprobs(batch, features)
        sizes = [len(model.language.encode_text(text)) + 1 for text in texts]  # each with its end
        scores.append([float(part.sum()) for part in likely.split(sizes)])
    return scores
