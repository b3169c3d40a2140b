"""`vlm train consensus`: an adapter learns what captions of a picture will say, which guides its own.

    vlm train consensus ADAPTER SRC        minutes; SRC is anything that holds captions

The frozen features of every picture are looked up or computed. Kernel ridge regression of the captions' mean
tf-idf vectors on them is the teacher: of few pictures it learns most, but it would have to keep them all. The
small network of `vlm.consensus` learns to say what the teacher says of mixtures of pictures, of which there
are many. A tenth of the pictures is set aside first: if their captions are not foretold better than by one
guess for all, nothing is written.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.adapter_file import save_consensus
from vlm.consensus import Consensus, word_groups
from vlm.data.remember import TOGETHER, Progress, adapter_features, captions_by_picture
from vlm.errors import DataError, WeightsError
from vlm.features import Features
from vlm.grams import Gram, unit
from vlm.images import open_picture
from vlm.options import add_common, apply_common, make_parser
from vlm.train.screen import Screen
from vlm.weights_cache import cache_root

VIEWS = ("whole", "flip")
STEPS, BATCH, RATE, DECAY = 3000, 128, 2e-3, 0.02
MIXED, EVENNESS = 3, 0.7
"""Pictures that an example mixes, and the parameter of the Dirichlet distribution of their shares."""
SHARPNESS, RIDGE, TAUGHT, DIRECTIONS = 4.0, 0.3, 6000, 256
"""Of the teacher: exp(SHARPNESS (cosine - 1)) is its kernel; pictures that it keeps; rank of what it says."""
GROUPS = 4400
"""Word groups that are told apart: those that weigh most in the captions."""
LEAST = 5
"""Pictures whose captions must hold a group."""
PICTURES = 500
"""Of fewer, nothing is learnt."""

Vector = dict[Gram, float]


@dataclass
class Captioned:
    """What is learnt from.

    Attributes:
        pooled: (M, V, D_v) mean features of M pictures in each view.
        captions: of each picture.
    """

    pooled: Tensor
    captions: list[list[str]]

    def part(self, places: Sequence[int]) -> Captioned:
        """Some of the pictures."""
        return Captioned(self.pooled[list(places)], [self.captions[i] for i in places])


class Targets:
    """Mean unit tf-idf vectors of pictures' captions, over the word groups of a training part.

    Attributes:
        frequency: by group, pictures whose captions hold it.
        pictures: of the training part.
    """

    def __init__(self, captions: Sequence[Sequence[str]]) -> None:
        held = [{group for text in texts for group in word_groups(text)} for texts in captions]
        self.frequency = Counter(group for groups in held for group in groups)
        self.pictures = len(captions)

    def rarity(self, group: Gram) -> float:
        """ln(pictures / pictures whose captions hold the group)."""
        return math.log(self.pictures / max(1, self.frequency[group]))

    def vector(self, captions: Sequence[str]) -> Vector:
        """The mean of the captions' vectors, each of whose four parts (by group size) has length one."""
        mean: Vector = defaultdict(float)
        for text in captions:
            for group, weight in unit(word_groups(text), self.rarity).items():
                mean[group] += weight / len(captions)
        return mean


def fit(data: Captioned, seed: int = 0) -> tuple[Consensus, Targets, Tensor]:
    """A consensus of some pictures' captions, their vectors' maker, and (G,) the vectors' mean.

    Raises:
        DataError: the captions share too few words.
    """
    targets = Targets(data.captions)
    vectors = [targets.vector(texts) for texts in data.captions]
    energy: Vector = defaultdict(float)
    for vector in vectors:
        for group, weight in vector.items():
            if targets.frequency[group] >= LEAST:
                energy[group] += weight * weight
    kept = sorted(energy, key=lambda group: -energy[group])[:GROUPS]
    if not kept:
        raise DataError(f"no word stands in the captions of {LEAST} pictures: there is nothing to expect")
    torch.manual_seed(seed)
    made = Consensus(kept, torch.tensor([targets.rarity(group) for group in kept]), data.pooled.shape[2])
    made.mean.copy_(data.pooled[:, 0].mean(dim=0))
    made.spread.copy_(data.pooled[:, 0].std(dim=0) + 1e-6)
    dense = _dense(vectors, made)
    _train(made, data.pooled, dense)
    return made, targets, dense.mean(dim=0, dtype=torch.float32)


class Teacher:
    """Kernel ridge regression of captions' vectors on features.

    Args:
        consensus: says how features are centred and scaled.
        pooled: (M, V, D_v) mean features of pictures.
        targets: (M, G) their captions' vectors.
    """

    def __init__(self, consensus: Consensus, pooled: Tensor, targets: Tensor) -> None:
        some = torch.randperm(len(pooled))[:TAUGHT]
        self.consensus, self.mean = consensus, targets.mean(dim=0, dtype=torch.float32)
        self.seen = self._unit(pooled[some].mean(dim=1))
        kernel = self._kernel(self.seen) + RIDGE * torch.eye(len(some))
        said = torch.linalg.solve(kernel, targets[some].float() - self.mean)
        left, middle, right = torch.svd_lowrank(said, min(DIRECTIONS, *said.shape))
        self.inner, self.outer = left * middle, right.T

    def _unit(self, pooled: Tensor) -> Tensor:
        return F.normalize((pooled - self.consensus.mean) / self.consensus.spread, dim=1)

    def _kernel(self, unit: Tensor) -> Tensor:
        return (SHARPNESS * (unit @ self.seen.T - 1)).exp()

    def __call__(self, pooled: Tensor) -> Tensor:
        """(B, D_v) mean features -> (B, G) the expected vectors."""
        return self._kernel(self._unit(pooled)) @ self.inner @ self.outer + self.mean


def _dense(vectors: Sequence[Vector], consensus: Consensus) -> Tensor:
    """(M, G) float16: vectors by the consensus' groups, without the others."""
    target = torch.zeros(len(vectors), len(consensus.groups), dtype=torch.float16)
    for row, vector in enumerate(vectors):
        held = {consensus.groups[g]: weight for g, weight in vector.items() if g in consensus.groups}
        target[row, list(held)] = torch.tensor(list(held.values()), dtype=torch.float16)
    return target


def _train(made: Consensus, pooled: Tensor, targets: Tensor) -> None:
    """Turns its vectors towards the teacher's: the loss is one minus the mean cosine."""
    teacher = Teacher(made, pooled, targets)
    with torch.no_grad():
        made.say.bias.copy_(teacher.mean)
        made.say.weight.mul_(0.2)
    steps = min(STEPS, len(targets) // 2)
    optimizer = torch.optim.AdamW(made.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.1)
    mixtures = torch.distributions.Dirichlet(torch.full((MIXED,), EVENNESS))
    for _ in range(steps):
        shares = mixtures.sample((BATCH,))
        places = torch.randint(len(pooled), (BATCH, MIXED))
        views = torch.randint(pooled.shape[1], (BATCH, MIXED))
        seen = (shares[..., None] * pooled[places, views]).sum(dim=1)
        loss = 1 - F.cosine_similarity(made(seen), teacher(seen)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    made.eval()


@dataclass(frozen=True)
class Learnt:
    """A consensus of all pictures, and how well one of nine tenths foretold the last tenth.

    Attributes:
        cosine: of the expected with the true vectors, the mean.
        guess: the same of the best single guess for all pictures.
    """

    consensus: Consensus
    cosine: float
    guess: float


def learn(data: Captioned, seed: int = 0) -> Learnt:
    """Fits, after a tenth that was set aside has shown that it is worth it.

    Raises:
        DataError: too few pictures, or their captions cannot be foretold.
    """
    count = len(data.captions)
    if count < PICTURES:
        raise DataError(f"{count} captioned pictures are too few to learn from: {PICTURES} are needed")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held, taught = data.part(order[::10]), data.part([i for k, i in enumerate(order) if k % 10])
    first, targets, guess = fit(taught, seed)
    vectors = [targets.vector(texts) for texts in held.captions]
    lengths = torch.tensor([math.sqrt(sum(w * w for w in vector.values())) for vector in vectors])
    true = _dense(vectors, first).float()
    with torch.inference_mode():
        products = (F.normalize(first(held.pooled[:, 0]), dim=1) * true).sum(dim=1)
    cosine, single = (
        float((product / lengths).mean()) for product in (products, true @ F.normalize(guess, dim=0))
    )
    if cosine <= single:
        raise DataError(
            f"captions of pictures set aside are foretold no better ({cosine:.3f}) than by one guess for all "
            f"({single:.3f}): nothing is written"
        )
    whole, *_ = fit(data, seed)
    whole.scale.copy_(products.mean())
    return Learnt(whole, cosine, single)


def captioned(source: str | Path, features: Features, split: str, progress: Progress) -> Captioned:
    """The mean features and the captions of a source's pictures.

    Raises:
        DataError: the part cannot be read or holds no captions.
        ImageError: a picture cannot be read.
    """
    found = list(captions_by_picture(source, split).values())
    pooled = []
    for begin in range(0, len(found), TOGETHER):
        pictures = [open_picture(image) for image, _ in found[begin : begin + TOGETHER]]
        pooled.append(torch.stack([features(pictures, view).mean(dim=1) for view in VIEWS], dim=1).cpu())
        progress("looking at pictures", begin + len(pictures), len(found))
    return Captioned(torch.cat(pooled), [captions for _, captions in found])


def main(argv: list[str]) -> int:
    """Entry of `vlm train consensus`."""
    parser = make_parser(
        "vlm train consensus", "Learn what captions of a picture will say; it guides an adapter's."
    )
    parser.add_argument("adapter", type=Path, help="the adapter's folder; it is written there")
    parser.add_argument("source", metavar="SRC", help="captioned pictures: a folder, table, public set")
    parser.add_argument("--split", default="train", help="part of the source (default: train)")
    add_common(parser)
    args = parser.parse_args(argv)
    apply_common(args)
    if not (args.adapter / "adapter.safetensors").is_file():
        raise WeightsError(
            f"{args.adapter} is no adapter's folder: the adapter is changed, so name your own copy"
        )
    cache = cache_root() / "features"
    features = adapter_features(str(args.adapter), offline=args.offline, device=args.device, cache=cache)
    with Screen() as screen:
        data = captioned(args.source, features, args.split, screen.progress)
        screen.say(f"{len(data.captions)} captioned pictures; two fits, of about two minutes for 6,000 each")
        learnt = learn(data)
    save_consensus(args.adapter, learnt.consensus)
    print(
        f"cosine of expected and true captions of pictures set aside: {learnt.cosine:.3f} "
        f"(one guess for all: {learnt.guess:.3f}); the captions of {args.adapter} are guided now"
    )
    return 0
