"""Words before sentences: the image side of an adapter learns which words are said of a picture.

A language model of ten times the cost need not be there for that. What it has learnt, the latents show at
once when sentences begin, as BLIP-2's Q-Former is taught before it meets its language model (Li et al.
2023). A word is in the picture if any latent says so (Fang et al. 2015 do the same with regions).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.config import CAPTION_PROMPT
from vlm.data.collate import Group
from vlm.errors import DataError
from vlm.train import mup
from vlm.train.loop import Part, Trainer
from vlm.train.mup import Scale

_SMALL = (
    "a an and are as at be by for from has have her his in into is it its of on or that the their them there "
    "these they this to up while who with yes no left right"
)
SMALL = frozenset(_SMALL.split())
"""Words that say nothing of a picture, or (left, right) not the same of its mirror image."""
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


class WordHead(nn.Module):
    """(I, L, W) latents -> (I, V) logits of V words; it is thrown away when they are learnt."""

    def __init__(self, width: int, latents: int, frequency: Tensor) -> None:
        super().__init__()
        self.words = nn.Linear(width, len(frequency))
        nn.init.normal_(self.words.weight, std=0.02)
        with torch.no_grad():
            # At the start every word is as likely as it is in all the pictures.
            self.words.bias.copy_(torch.logit(frequency) - math.log(latents))

    def forward(self, latents: Tensor) -> Tensor:
        said: Tensor = self.words(latents)
        return said.float().logsumexp(dim=1)


class WordTargets:
    """How many of a picture's captions hold each word, as a share; 1 for what a question is answered with.

    Raises:
        DataError: the pictures share no words.
    """

    def __init__(self, groups: Sequence[Group], rarest: int) -> None:
        shares = {group.id: said for group in groups if (said := word_shares(group))}
        found = Counter(word for said in shares.values() for word in said)
        self.words = sorted(word for word, count in found.items() if count >= rarest)
        if not self.words:
            raise DataError(f"no word is said of {rarest} pictures: leave words.steps at 0")
        number = {word: i for i, word in enumerate(self.words)}
        self._of: dict[str, tuple[list[int], list[float]]] = {}
        for name, said in shares.items():
            known = {number[word]: share for word, share in said.items() if word in number}
            self._of[name] = list(known), list(known.values())
        total = sum((self(name) for name in self._of), torch.zeros(len(self.words)))
        self.frequency = (total / len(self._of)).clamp(1e-4, 1 - 1e-4)

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def __call__(self, name: str) -> Tensor:
        """(V,) how much each word is said of a group."""
        places, shares = self._of[name]
        target = torch.zeros(len(self.words))
        target[places] = torch.tensor(shares)
        return target


def word_shares(group: Group) -> dict[str, float]:
    """The words said of a group, each with the share of its captions that hold it."""
    captions: list[set[str]] = []
    answers: set[str] = set()
    for pairs in group.by_source:
        for pair in pairs:
            words = set(_WORD.findall(pair.answer.lower())) - SMALL
            if pair.example.turns[-1].text == CAPTION_PROMPT:
                captions.append(words)
            else:
                answers |= words
    counts = Counter(word for words in captions for word in words)
    return {word: count / len(captions) for word, count in counts.items()} | dict.fromkeys(answers, 1.0)


class WordTrainer(Trainer):
    """Trains the adapter's image side alone; the loss of a picture is the sum over all words."""

    def trained_part(self) -> nn.Module:
        single = [group for group in self.groups if len(group.images) == 1]
        self.targets = WordTargets(single, self.config.words.rarest)
        self.groups = [group for group in single if group.id in self.targets]
        with torch.no_grad():
            latents = self.adapter.encode(self.store(self.groups[0], "whole").to(self.accelerator.device))
        self.head = WordHead(latents.shape[2], latents.shape[1], self.targets.frequency)
        scale = mup.latents_scale(self.model, self.config.optim.mup_base)
        mup.initialise(self.head, {"words.weight": scale})
        self.head.to(self.accelerator.device)
        return nn.ModuleDict({"adapter": self.adapter, "head": self.head})

    def scales(self) -> dict[str, Scale]:
        found = {f"adapter.{name}": scale for name, scale in super().scales().items()}
        return found | {"head.words.weight": mup.latents_scale(self.model, self.config.optim.mup_base)}

    def prepare(self, groups: Sequence[Group], epoch: int) -> Part:
        features = torch.cat([self.store(group, self.view(group, epoch)) for group in groups])
        return Part([], features, targets=torch.stack([self.targets(group.id) for group in groups]))

    def weight(self, part: Part) -> float:
        return len(part.features)

    def backward(self, part: Part, weight: float) -> tuple[float, int]:
        device = self.accelerator.device
        assert part.targets is not None
        with self.autocast():
            said = self.head(self.adapter.encode(part.features.to(device)))
        loss = F.binary_cross_entropy_with_logits(said, part.targets.to(device), reduction="sum")
        (loss / weight).backward()
        return float(loss.detach()), part.features.shape[0] * part.features.shape[1]
