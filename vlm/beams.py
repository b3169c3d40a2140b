"""Beam search over a batch of prompts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm.config import GenerationConfig
from vlm.decoder import DecoderState, finite
from vlm.generation import DecodeRequest, Writer

if TYPE_CHECKING:
    from vlm.model import VLM

Guide = Callable[[list[int], bool], float]
Ended = tuple[float, list[int], list[float]]
Candidate = tuple[float, int, int, float]
"""A way to go on: the log-probability of all, the beam, the token and its own log-probability."""
WIDE = 8
"""Tokens of each beam that are weighed where beams are guided: the expected one may not be the likeliest."""
WHOLE, TOKEN = 2.0, 0.03
"""Between guided captions that have ended, what is expected counts so many times as much as while they grow,
as it tells less of a beginning; and every token costs so much: words that nobody expects count for nothing
otherwise, and lengthen."""


class _Beams:
    """One prompt's beams: those that go on, and those that have ended.

    Args:
        guide: what a beginning, or (True) a whole, is expected to reach; None leaves it at log-probabilities.
        weight: what that counts beside the mean log-probability.

    Attributes:
        margin: the smallest gap so far between what was kept and what was dropped (`Answer.margin`).
    """

    def __init__(self, size: int, penalty: float, guide: Guide | None = None, weight: float = 0.0) -> None:
        self.size, self.penalty, self.guide, self.weight = size, penalty, guide, weight
        self.ids: list[list[int]] = [[] for _ in range(size)]
        self.logprobs: list[list[float]] = [[] for _ in range(size)]
        self.ended: list[Ended] = []
        self.done = False
        self.margin = math.inf

    def _expected(self, ids: list[int], whole: bool) -> float:
        return 0.0 if self.guide is None else self.guide(ids, whole)

    def _worth(self, total: float, expected: float, length: int) -> float:
        """What orders beams of one length: their log-probability, and what the guide makes of them."""
        return total + self.weight * expected * length**self.penalty

    def _score(self, total: float, expected: float, length: int) -> float:
        """What orders answers that have ended, of any length."""
        score = float(total / length**self.penalty)
        return score if self.guide is None else score + WHOLE * self.weight * expected - TOKEN * length

    def take(self, candidates: Sequence[Candidate], end: int) -> list[tuple[int, int, float]]:
        """Chooses among candidates, the likeliest first: (beam, token, total) that go on."""
        length = len(self.ids[0]) + 1
        if self.guide is None:
            candidates = candidates[: 2 * self.size + 1]
        found = []
        for total, beam, token, logprob in candidates:
            if total > float("-inf"):
                ids = self.ids[beam] if token == end else [*self.ids[beam], token]
                expected = self._expected(ids, token == end)
                worth = self._worth(total, expected, length)
                found.append((worth, expected, total, beam, token, logprob, ids))
        found.sort(key=lambda candidate: -candidate[0])
        self._measure([(worth, token == end) for worth, _, _, _, token, _, _ in found])
        going: list[tuple[int, int, float]] = []
        scores: list[float] = []
        paths: list[list[int]] = []
        logprobs = []
        for rank, (_, expected, total, beam, token, logprob, ids) in enumerate(found):
            if token == end:
                if rank < self.size:
                    path = [*self.logprobs[beam], logprob]
                    self.ended.append((self._score(total, expected, length), [*ids, end], path))
            elif len(going) < self.size:
                going.append((beam, token, total))
                scores.append(self._score(total, expected, length))
                paths.append(ids)
                logprobs.append([*self.logprobs[beam], logprob])
        self.ids, self.logprobs = paths, logprobs
        self.ended = sorted(self.ended, key=lambda e: -e[0])[: self.size]
        best = max(scores, default=float("-inf"))
        self.done = not going or (len(self.ended) == self.size and self.ended[-1][0] >= best)
        if going and len(self.ended) == self.size:
            self.margin = min(self.margin, abs(self.ended[-1][0] - best))
        return going

    def _measure(self, found: Sequence[tuple[float, bool]]) -> None:
        """Takes the gaps at this step's two borders into `margin`: who goes on, and which ends count.

        Args:
            found: what each candidate is worth, and whether it ends, the best first.
        """
        on = [worth for worth, ends in found if not ends]
        gaps = [on[self.size - 1] - on[self.size]] if len(on) > self.size else []
        if len(found) > self.size:
            (last, _), (first, _) = found[self.size - 1 : self.size + 1]
            gaps += [
                worth - first if rank < self.size else last - worth
                for rank, (worth, ends) in enumerate(found)
                if ends
            ]
        self.margin = min([self.margin, *gaps])

    def best(self, totals: list[float]) -> Ended:
        """The best beam, ended or (when the length ran out) not; the second's gap goes into `margin`."""
        cut = [
            (self._score(total, self._expected(ids, True), len(ids)), ids, logprobs)
            for total, ids, logprobs in zip(totals, self.ids, self.logprobs, strict=False)
        ]
        ranked = sorted(self.ended or cut, key=lambda e: -e[0])
        if len(ranked) > 1:
            self.margin = min(self.margin, ranked[0][0] - ranked[1][0])
        return ranked[0]


@torch.inference_mode()
def beam_search(model: VLM, requests: Sequence[DecodeRequest], config: GenerationConfig) -> list[Writer]:
    """The best of `num_beams` beams for each prompt, by log-probability over length ** length_penalty.

    A caption's tokens are chosen by the language model and the captioner together, where there is one; to its
    score comes by how much it is expected to agree with what people say of the picture.
    """
    count, size, end = len(requests), config.num_beams, model.language.frame.end
    features = torch.cat([request.features for request in requests])
    state, logits = DecoderState.prefill(model, [request.row for request in requests], features)
    banned = model.language.never_said().nonzero()[:, 0].to(logits.device)
    # A prompt that leaves little room in the context ends early, whatever it is searched together with.
    limits = [
        max(1, min(config.max_new_tokens, model.language.max_positions - read))
        for read in state.positions[:, 0].tolist()
    ]
    beams = [_Beams(size, config.length_penalty, *_guide(model, request, config)) for request in requests]
    totals = logits.new_zeros(count, 1)  # one beam a prompt at first; after a token as many as were asked for
    active = list(range(count))
    left: dict[int, list[float]] = {}
    for length in itertools.count(1):
        for row, i in enumerate(active):
            if (speaker := requests[i].speaker) is not None:
                said = beams[i].ids[: logits.shape[1]]
                logits[row, : len(said)] = speaker.join(logits[row, : len(said)], said, config.captioner)
        parents, tokens, totals = _extend(logits, totals, [beams[i] for i in active], banned, end)
        left.update(zip(active, totals.tolist(), strict=True))
        staying = [not beams[p].done and length < limits[p] for p in active]
        if not any(staying):
            break
        active = [p for p, stays in zip(active, staying, strict=True) if stays]
        going = [kept if stays else [] for kept, stays in zip(parents, staying, strict=True)]
        state, rows, _ = state.keep(going)
        totals = totals[rows]
        logits = state.advance(tokens[rows])
    writers = []
    for number, prompt in enumerate(beams):
        _, ids, logprobs = prompt.best(left[number])
        writer = Writer(model, config)
        for token, logprob in zip(ids, logprobs, strict=True):
            writer.push(token, logprob)
            if writer.finish_reason:
                break
        writer.margin = prompt.margin
        writers.append(writer)
    return writers


def _guide(model: VLM, request: DecodeRequest, config: GenerationConfig) -> tuple[Guide | None, float]:
    """What beams are guided by, and its weight.

    It makes good for what the language model does not know of captions: the less of it speaks, the less that
    counts.
    """
    expected = request.expected
    weight = config.consensus * (1.0 if request.speaker is None else 1.0 - config.captioner)
    if expected is None or not weight:
        return None, 0.0
    return lambda ids, whole: expected(model.language.decode(ids), whole), weight


def _extend(
    logits: Tensor, totals: Tensor, beams: list[_Beams], banned: Tensor, end: int
) -> tuple[list[list[int]], Tensor, Tensor]:
    """One step of every prompt: P lists of K beams to go on from, (P, K) tokens, (P, K) new totals.

    Args:
        logits: (P, K', V) of the next token, for the beams so far; overwritten.
        totals: (P, K') log-probability of each beam so far.
        banned: ids that are never said.
    """
    size, vocabulary = beams[0].size, logits.shape[-1]
    guided = any(beam.guide for beam in beams)
    normalisers = finite(logits.logsumexp(dim=-1))
    logits[..., banned] = float("-inf")
    # Half of the candidates stand by for ended beams; one more shows by how much the first dropped is behind.
    count = min(max(WIDE, 2 * size + 1) if guided else 2 * size + 1, vocabulary)
    likely, ids = logits.topk(count, dim=-1)
    likely = likely - normalisers[..., None]
    summed = (totals[..., None] + likely).flatten(1)
    best, where = summed.topk(summed.shape[-1] if guided else min(2 * size + 1, summed.shape[-1]), dim=-1)
    columns = (best, where // count, ids.flatten(1).gather(1, where), likely.flatten(1).gather(1, where))
    candidates = zip(*(column.tolist() for column in columns), strict=True)
    parents, tokens = [[0] * size for _ in beams], where.new_full((len(beams), size), end)
    fresh = totals.new_full((len(beams), size), float("-inf"))
    for p, (beam, found) in enumerate(zip(beams, candidates, strict=True)):
        for k, (parent, token, total) in enumerate(beam.take(list(zip(*found, strict=True)), end)):
            parents[p][k], tokens[p, k], fresh[p, k] = parent, token, total
    return parents, tokens, fresh
