"""`vlm train consensus`: an adapter learns what captions of a picture will say, which guides its own.

    vlm train consensus ADAPTER SRC        a minute or two; SRC is anything that holds captions

The frozen features of every picture are looked up or computed, and the network of `vlm.consensus` learns to
point where the captions' mean tf-idf vector points. A tenth of the pictures is set aside first: if their
captions are not foretold better than by one guess for all, nothing is written.
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

from vlm.checkpoint import save_consensus
from vlm.consensus import ORDER, Consensus, Gram, word_groups
from vlm.data.remember import TOGETHER, Progress, adapter_features, captions_by_picture
from vlm.errors import DataError, WeightsError
from vlm.features import Features
from vlm.images import open_picture
from vlm.options import add_common, apply_common, make_parser
from vlm.train.screen import Screen
from vlm.weights_cache import cache_root

VIEWS = ("whole", "flip")
STEPS, BATCH, RATE, DECAY, DROPOUT = 3000, 128, 2e-3, 0.02, 0.3
MIXED = 3
"""Pictures whose features and captions are mixed into one example: of few pictures come many mixtures."""
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
            weights = {group: count * self.rarity(group) for group, count in word_groups(text).items()}
            squares = [0.0] * (ORDER + 1)
            for group, weight in weights.items():
                squares[len(group)] += weight * weight
            for group, weight in weights.items():
                if weight:
                    mean[group] += weight / math.sqrt(squares[len(group)]) / len(captions)
        return mean


def fit(data: Captioned, seed: int = 0) -> tuple[Consensus, Targets]:
    """A consensus of some pictures' captions, and what it was taught.

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
    _train(made, data.pooled, [_placed(vector, made) for vector in vectors])
    return made, targets


def _placed(vector: Vector, consensus: Consensus) -> dict[int, float]:
    """A vector, brought to length one, by the places of the consensus' groups and without the others."""
    length = math.sqrt(sum(weight * weight for weight in vector.values())) or 1.0
    places = consensus.groups
    return {places[group]: weight / length for group, weight in vector.items() if group in places}


def _dense(placed: Sequence[dict[int, float]], groups: int) -> Tensor:
    target = torch.zeros(len(placed), groups)
    for row, weights in enumerate(placed):
        target[row, list(weights)] = torch.tensor(list(weights.values()))
    return target


def _train(made: Consensus, pooled: Tensor, placed: Sequence[dict[int, float]]) -> None:
    """Turns its vectors towards the captions': the loss is one minus the mean cosine."""
    with torch.no_grad():
        made.say.bias.copy_(_guess(placed, len(made.groups)) / 2)
        made.say.weight.mul_(0.2)
    made.dropout = DROPOUT
    made.train()
    steps = min(STEPS, len(placed) // 2)
    optimizer = torch.optim.AdamW(made.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.1)
    mixtures = torch.distributions.Dirichlet(torch.ones(MIXED))
    for _ in range(steps):
        shares = mixtures.sample((BATCH,)).T[..., None]  # type: ignore[no-untyped-call]
        seen, target = torch.zeros(()), torch.zeros(())
        for share in shares:
            places = torch.randint(len(placed), (BATCH,))
            views = torch.randint(pooled.shape[1], (BATCH,))
            seen = seen + share * pooled[places, views]
            target = target + share * _dense([placed[i] for i in places.tolist()], len(made.groups))
        said = made(seen)
        loss = 1 - ((said * target).sum(dim=1) / said.norm(dim=1).clamp(min=1e-3)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    made.eval()


def _guess(placed: Sequence[dict[int, float]], groups: int) -> Tensor:
    """(G,) of length one: the best single guess for all pictures."""
    total = torch.zeros(groups)
    for part in range(0, len(placed), BATCH):
        total += _dense(placed[part : part + BATCH], groups).sum(dim=0)
    return F.normalize(total, dim=0)


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
    first, targets = fit(taught, seed)
    vectors = [targets.vector(texts) for texts in held.captions]
    true = _dense([_placed(vector, first) for vector in vectors], len(first.groups))
    guess = _guess([_placed(targets.vector(texts), first) for texts in taught.captions], len(first.groups))
    with torch.inference_mode():
        cosines = (F.normalize(first(held.pooled[:, 0]), dim=1) * true).sum(dim=1)
    lengths = torch.tensor([math.sqrt(sum(w * w for w in vector.values())) for vector in vectors])
    cosine, single = float(cosines.mean()), float((true @ guess).mean())
    if cosine <= single:
        raise DataError(
            f"captions of pictures set aside are foretold no better ({cosine:.3f}) than by one guess for all "
            f"({single:.3f}): nothing is written"
        )
    whole, _ = fit(data, seed)
    whole.scale.copy_((cosines * lengths).mean())
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
        screen.say(
            f"{len(data.captions)} captioned pictures; two fits, of about half a minute for 6,000 each"
        )
        learnt = learn(data)
    save_consensus(args.adapter, learnt.consensus)
    print(
        f"cosine of expected and true captions of pictures set aside: {learnt.cosine:.3f} "
        f"(one guess for all: {learnt.guess:.3f}); the captions of {args.adapter} are guided now"
    )
    return 0
