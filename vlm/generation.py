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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.answer import FinishReason, TokenLogprob
from vlm.captioner import Speaker
from vlm.config import GenerationConfig
from vlm.consensus import Expectation
from vlm.decoder import DecoderState, Prefill, finite
from vlm.known_answers import AnswerGuide
from vlm.processor import Row

if TYPE_CHECKING:
    from vlm.model import VLM


@dataclass(frozen=True)
class DecodeRequest:
    """A row of prompts, the (images, N, D_v) features of its pictures, and how to decode.

    Attributes:
        latents: (images, L, W) that the adapter makes of the features, where they are known already.
        expected: what the answer, a caption, is expected to say; beams are guided by it.
        speaker: who says the caption together with the language model.
        guides: of each prompt of the row, where answers to it are known: greedy decoding is guided by it.
    """

    row: Row
    features: Tensor
    config: GenerationConfig = field(default_factory=GenerationConfig)
    latents: Tensor | None = None
    expected: Expectation | None = None
    speaker: Speaker | None = None
    guides: Sequence[AnswerGuide | None] = ()


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
    guide: AnswerGuide | None


class DecodeBatch:
    """Prompts decoded together; each as it would be alone.

    `add` reads the prompts; each `step` gives every one a token. One that ends leaves by itself.
    """

    def __init__(self, model: VLM) -> None:
        self.model = model
        self._slots: list[list[_Slot]] = []  # of every row of the state, its branches
        self._state: DecoderState | None = None
        self._logits: Tensor | None = None
        self._numbers = itertools.count()
        self._banned = model.language.never_said().to(model.device)

    def __len__(self) -> int:
        return sum(map(len, self._slots))

    def add(self, requests: Sequence[DecodeRequest]) -> list[int]:
        """Reads the prompts at once and returns the numbers of their slots."""
        if not requests:
            return []
        prompts = self.begin(requests)
        prompts.read(prompts.left)
        return self.join(requests, prompts)

    def begin(self, requests: Sequence[DecodeRequest]) -> Prefill:
        """The prompts, to be read slice by slice between steps, and then to `join`."""
        features = torch.cat([request.features for request in requests])
        known = [request.latents for request in requests if request.latents is not None]
        latents = torch.cat(known) if len(known) == len(requests) else None
        return Prefill(self.model, [request.row for request in requests], features, latents)

    def join(self, requests: Sequence[DecodeRequest], prompts: Prefill) -> list[int]:
        """Takes in prompts that have been read and returns the numbers of their slots."""
        state, logits = prompts.state()
        if self._state is None or self._logits is None:
            self._state, self._logits = state, logits
        else:
            self._state = self._state.join(state)
            wide = self._state.positions.shape[1]
            both = [F.pad(x, (0, 0, 0, wide - x.shape[1])) for x in (self._logits, logits)]
            self._logits = torch.cat(both)
        added = [
            [self._slot(request.config, guide) for guide in request.guides or [None] * len(request.row.ends)]
            for request in requests
        ]
        self._slots += added
        return [slot.number for row in added for slot in row]

    def _slot(self, config: GenerationConfig, guide: AnswerGuide | None) -> _Slot:
        random = None
        if config.temperature > 0:
            guide = None
            random = torch.Generator()
            if config.seed is None:
                random.seed()
            else:
                random.manual_seed(config.seed)
        return _Slot(next(self._numbers), Writer(self.model, config), config, random, guide)

    def writer(self, slot: int) -> Writer:
        """What a slot has written so far."""
        return next(s.writer for row in self._slots for s in row if s.number == slot)

    def step(self) -> list[Event]:
        """One token for every prompt, in the order they were added."""
        if self._state is None or self._logits is None:
            return []
        chosen, logprobs, gaps = self._choose(self._logits)
        limit = self.model.language.max_positions
        room = (self._state.positions + 1 < limit).tolist()
        events = []
        staying: list[list[int]] = []
        for r, slots in enumerate(self._slots):
            staying.append([])
            for k, slot in enumerate(slots):
                token, logprob = int(chosen[r, k]), float(logprobs[r, k])
                text = slot.writer.push(token, logprob, room[r][k], float(gaps[r, k]))
                events.append(Event(slot.number, token, text, logprob, slot.writer.finish_reason))
                if slot.writer.finish_reason is None:
                    staying[-1].append(k)
        kept = self._keep(staying)
        if kept is not None:
            rows, branches = kept
            self._logits = self._state.advance(chosen[rows].gather(1, branches))
        return events

    def remove(self, slot: int) -> None:
        """Drops a prompt that is no longer wanted; a slot that has ended already is no error."""
        staying = [[k for k, s in enumerate(row) if s.number != slot] for row in self._slots]
        if sum(map(len, staying)) < len(self) and (kept := self._keep(staying)) and self._logits is not None:
            rows, branches = kept
            self._logits = self._logits[rows[:, None], branches]

    def _keep(self, branches: list[list[int]]) -> tuple[Tensor, Tensor] | None:
        """Goes on with these branches of every row: where they stood, or None where there are none."""
        self._slots = [
            [row[k] for k in kept] for row, kept in zip(self._slots, branches, strict=True) if kept
        ]
        if not self._slots or self._state is None:
            self._state = self._logits = None
            return None
        self._state, rows, parents = self._state.keep(branches)
        return rows, parents

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K, V) -> (B, K) tokens, their log-probabilities under the model (before any temperature), and
        how far the next likeliest token is behind each, guided (infinite where the token was drawn)."""
        likely = finite(logits).log_softmax(dim=-1)
        allowed = likely.masked_fill(self._banned, float("-inf"))
        for r, row in enumerate(self._slots):
            for k, slot in enumerate(row):
                if slot.guide is not None and (rises := slot.guide(slot.writer.ids)):
                    rise = slot.config.known_answers * allowed.new_tensor(list(rises.values()))
                    allowed[r, k].index_add_(0, torch.tensor(list(rises), device=allowed.device), rise)
        chosen = allowed.argmax(dim=-1)
        two = allowed.topk(2, dim=-1).values
        gaps = two[..., 0] - two[..., 1]
        for r, row in enumerate(self._slots):
            for k, slot in enumerate(row):
                if slot.random is not None:
                    chosen[r, k] = sample(allowed[r, k], slot.config, slot.random)
                    gaps[r, k] = math.inf
        return chosen, likely.gather(-1, chosen[..., None])[..., 0], gaps


def sample(logits: Tensor, config: GenerationConfig, random: torch.Generator) -> int:
    """Draws from the nucleus (Holtzman et al. 2020) of (V,) logits at the config's temperature."""
    scores = logits.cpu().double()
    # The highest becomes 0 first, so that no temperature, however small, takes all to minus infinity.
    probabilities = ((scores - scores.max()) / config.temperature).softmax(dim=-1)
    ordered, tokens = probabilities.sort(descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered[before >= config.top_p] = 0
    return int(tokens[torch.multinomial(ordered, 1, generator=random)])
