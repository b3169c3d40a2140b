"""Words before sentences: the image side of an adapter learns which words a picture's captions hold.

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

from vlm.data.collate import Group
from vlm.errors import DataError
from vlm.train.loop import Part, Trainer
from vlm.train.selfcritical import caption_references

_SMALL = (
    "a an and are as at be by for from has have her his in into is it its of on or that the their them there "
    "these they this to up while who with"
)
SMALL = frozenset(_SMALL.split())
"""Words that say nothing of a picture."""
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
    """How many of a picture's captions hold each word, as a share.

    Raises:
        DataError: the captions share no words.
    """

    def __init__(self, groups: Sequence[Group], rarest: int) -> None:
        captions = {
            name: [set(_WORD.findall(text.lower())) - SMALL for text in texts]
            for name, texts in caption_references(groups).items()
        }
        found = Counter(word for sets in captions.values() for word in set().union(*sets))
        self.words = sorted(word for word, count in found.items() if count >= rarest)
        if not self.words:
            raise DataError(f"no word stands in the captions of {rarest} pictures: leave words.steps at 0")
        number = {word: i for i, word in enumerate(self.words)}
        self._of: dict[str, tuple[list[int], list[float]]] = {}
        for name, sets in captions.items():
            counts = Counter(number[word] for words in sets for word in words if word in number)
            self._of[name] = list(counts), [count / len(sets) for count in counts.values()]
        total = sum((self(name) for name in self._of), torch.zeros(len(self.words)))
        self.frequency = (total / len(self._of)).clamp(1e-4, 1 - 1e-4)

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def __call__(self, name: str) -> Tensor:
        """(V,) shares of the captions of a group."""
        places, shares = self._of[name]
        target = torch.zeros(len(self.words))
        target[places] = torch.tensor(shares)
        return target


class WordTrainer(Trainer):
    """Trains the adapter's image side alone; the loss of a picture is the sum over all words."""

    def trained_part(self) -> nn.Module:
        self.targets = WordTargets(self.groups, self.config.words.rarest)
        self.groups = [g for g in self.groups if g.id in self.targets and len(g.images) == 1]
        with torch.no_grad():
            latents = self.adapter.encode(self.store(self.groups[0], "whole").to(self.accelerator.device))
        self.head = WordHead(latents.shape[2], latents.shape[1], self.targets.frequency)
        self.head.to(self.accelerator.device)
        return nn.ModuleDict({"adapter": self.adapter, "head": self.head})

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
