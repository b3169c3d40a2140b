"""Self-critical training (Rennie et al. 2017): captions are sampled, scored by CIDEr, and made likelier
or less likely by how much better they are than the same picture's other samples (Luo 2020).

It needs nothing new of the loop: a sampled caption is an answer whose tokens weigh as much as its
advantage, which may be negative.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from vlm.config import CAPTION_PROMPT
from vlm.conversation import Conversation
from vlm.data.collate import Group
from vlm.decoder import DecoderState
from vlm.errors import DataError
from vlm.eval.metrics.ptb import tokenize
from vlm.grams import ORDER, Gram, grams
from vlm.model import VLM
from vlm.processor import Row, Tokens
from vlm.train.config import TrainConfig

SIGMA = 6.0

Vector = dict[Gram, float]


def caption_grams(caption: str) -> Counter[Gram]:
    """Counts of the caption's 1- to 4-grams, over the tokens that evaluation uses."""
    return grams(tokenize(caption).split())


def caption_references(groups: Sequence[Group]) -> dict[str, Sequence[str]]:
    """The captions of every group that has some, by its id."""
    captions = {
        group.id: [
            p.answer for ps in group.by_source for p in ps if p.example.turns[-1].text == CAPTION_PROMPT
        ]
        for group in groups
    }
    return {name: texts for name, texts in captions.items() if texts}


class CiderReward:
    """CIDEr-D (Vedantam et al. 2015) of single captions, with the document frequencies of a whole set.

    The same figure as pycocoevalcap's for the same set; its references' vectors are kept.

    Raises:
        DataError: fewer than two pictures have captions: no word would be rarer than another.
    """

    def __init__(self, references: dict[str, Sequence[str]]) -> None:
        if len(references) < 2:
            raise DataError(
                "the objective cider compares with captions of at least two pictures; "
                f"{len(references)} have some"
            )
        cooked = {name: [caption_grams(text) for text in texts] for name, texts in references.items()}
        self.frequency: Counter[Gram] = Counter()
        for texts in cooked.values():
            self.frequency.update({gram for text in texts for gram in text})
        self.log_count = math.log(len(cooked))
        self.vectors = {name: [self._vector(text) for text in texts] for name, texts in cooked.items()}

    def _vector(self, counts: Counter[Gram]) -> tuple[Vector, list[float], int]:
        vector = {
            gram: count * (self.log_count - math.log(max(1, self.frequency[gram])))
            for gram, count in counts.items()
        }
        norms = [0.0] * ORDER
        for gram, value in vector.items():
            norms[len(gram) - 1] += value * value
        length = sum(count for gram, count in counts.items() if len(gram) == 2)
        return vector, [math.sqrt(norm) for norm in norms], length

    def __call__(self, name: str, caption: str) -> float:
        """CIDEr-D of `caption` against the references of picture `name`, on the scale where 1 is 100 %."""
        vector, norms, length = self._vector(caption_grams(caption))
        total = 0.0
        for other, other_norms, other_length in self.vectors[name]:
            dots = [0.0] * ORDER
            for gram, value in vector.items():
                if gram in other:
                    dots[len(gram) - 1] += min(value, other[gram]) * other[gram]
            penalty = math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
            total += penalty * sum(
                dot / (a * b) for dot, a, b in zip(dots, norms, other_norms, strict=True) if a and b
            )
        return 10 * total / ORDER / len(self.vectors[name])


@torch.inference_mode()
def sample_captions(
    model: VLM, rows: Sequence[Row], features: Tensor, samples: int, temperature: float, longest: int
) -> list[list[list[int]]]:
    """`samples` sampled answers (token ids, with their end where they have one) for each prompt."""
    end = model.language.frame.end
    state, logits = DecoderState.prefill(model, rows, features)
    banned = model.language.never_said().to(logits.device)
    last = int((~banned).nonzero()[-1])
    said: list[list[list[int]]] = [[[] for _ in range(samples)] for _ in rows]
    state.follow(torch.zeros(len(rows), samples, dtype=torch.long, device=logits.device))
    logits = logits.expand(-1, samples, -1)
    going = said  # row after row, the samples that go on
    for _ in range(longest):
        likely = (logits / temperature).masked_fill(banned, -torch.inf).softmax(dim=-1)
        # By the cumulative distribution: `torch.multinomial` draws a number for every word of the vocabulary.
        reached = likely.cumsum(dim=-1)
        drawn = torch.rand_like(reached[..., -1:]) * reached[..., -1:]
        chosen = torch.searchsorted(reached, drawn, right=True)[..., 0].clamp(max=last)
        branches: list[list[int]] = []
        for texts, tokens in zip(going, chosen.tolist(), strict=True):
            for text, token in zip(texts, tokens, strict=False):  # what a row repeats is not listened to
                text.append(token)
            branches.append([k for k in range(len(texts)) if tokens[k] != end])
        if not any(branches):
            break
        going = [[texts[k] for k in kept] for texts, kept in zip(going, branches, strict=True) if kept]
        state, places, parents = state.keep(branches)
        logits = state.advance(chosen[places].gather(1, parents))
    return said


def rewarded(
    model: VLM,
    reward: CiderReward,
    groups: Sequence[Group],
    features: Tensor,
    hints: Sequence[Sequence[str]],
    config: TrainConfig,
    longest: int = 24,
) -> tuple[list[list[tuple[Tokens, float]]], float]:
    """Sampled captions of each group's picture with their advantages, and the mean reward.

    Every sample's baseline is the mean of the others. A group without captions gets none.

    Args:
        features: (I, N, D_v) of the groups' pictures, group after group.
        hints: of each group's pictures.
        config: says how many are sampled, and at which temperature.
    """
    processor = model.processor
    known = [index for index, group in enumerate(groups) if group.id in reward.vectors]
    result: list[list[tuple[Tokens, float]]] = [[] for _ in groups]
    if not known:
        return result, 0.0
    samples = config.samples
    shares = features.split([len(group.images) for group in groups])
    asked = [Conversation.ask(groups[index].images, CAPTION_PROMPT) for index in known]
    prompts = [processor.tokens(c, hints=hints[index]) for c, index in zip(asked, known, strict=True)]
    rows = [processor.row([prompt]) for prompt in prompts]
    shown = torch.cat([shares[index] for index in known])
    training = model.adapter.training
    model.adapter.eval()  # dropout would be part of what is said
    drawn = sample_captions(model, rows, shown, samples, config.temperature, longest)
    model.adapter.train(training)
    rewards: list[float] = []
    for index, prompt, answers in zip(known, prompts, drawn, strict=True):
        group = groups[index]
        scores = [reward(group.id, model.language.decode(ids)) for ids in answers]
        rewards += scores
        mean = sum(scores) / samples
        made = []
        for ids, score in zip(answers, scores, strict=True):
            tokens = deepcopy(prompt)
            tokens.add(ids, supervised=True)
            made.append((tokens, (score - mean) * samples / (samples - 1)))
        result[index] = made
    return result, sum(rewards) / len(rewards)
