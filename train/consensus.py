"""`vlm train consensus`: an adapter learns what captions of a picture will say, which guides its own.

    vlm train consensus ADAPTER SRC [--out DIR]    two minutes; SRC is anything that holds captions

The frozen features and labels of every picture are looked up or computed, and the captions' mean tf-idf
vectors are regressed on them (kernel ridge regression; `vlm.consensus` keeps it in a few bits a number). A
tenth of the pictures is set aside first: if their captions are not foretold better than by one guess for all,
nothing is written.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.checkpoint import save_guide
from vlm.consensus import LONGEST, Consensus, likeness, portrait, word_count, word_groups
from vlm.data.remember import TOGETHER, Progress, adapter_features, captions_by_picture
from vlm.errors import DataError
from vlm.features import Features
from vlm.grams import Gram, unit
from vlm.guide import usable
from vlm.images import open_picture
from vlm.options import add_common, apply_common, keep_memory, make_parser
from vlm.train.place import add_place, place
from vlm.train.screen import Screen
from vlm.weights_cache import cache_root

VIEWS = ("whole", "flip")
RIDGE, MOST = 0.3, 8000
"""Of the regression; pictures that are kept, a random part where there are more."""
GROUPS, DIRECTIONS, RANK = 18_000, 512, 512
"""Word groups that are told apart, those that weigh most in the captions; directions in which pictures are
compared; rank of what is said of them. More is better by little, and an adapter must not grow."""
LEAST = 5
"""Pictures whose captions must hold a group."""
PICTURES, HELD = 500, 1000
"""Of fewer pictures nothing is learnt; set aside are a tenth of them, or so many."""

Vector = dict[Gram, float]


@dataclass
class Captioned:
    """What is learnt from.

    Attributes:
        pooled: (M, V, D_v) mean features of M pictures in each view.
        scores: (M, C) probabilities of the encoder's labels, of the first view; C is 0 where it has none.
        captions: of each picture.
    """

    pooled: Tensor
    scores: Tensor
    captions: list[list[str]]

    def part(self, places: Sequence[int]) -> Captioned:
        """Some of the pictures."""
        picked = list(places)
        return Captioned(self.pooled[picked], self.scores[picked], [self.captions[i] for i in picked])


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
    total: Vector = defaultdict(float)
    for vector in vectors:
        for group, weight in vector.items():
            if targets.frequency[group] >= LEAST:
                energy[group] += weight * weight
                total[group] += weight
    kept = sorted(energy, key=lambda group: -energy[group])[:GROUPS]
    if not kept:
        raise DataError(f"no word stands in the captions of {LEAST} pictures: there is nothing to expect")
    torch.manual_seed(seed)
    usual = torch.tensor([total[group] / len(vectors) for group in kept])
    some = torch.randperm(len(vectors))[:MOST].tolist()
    said = _dense([vectors[i] for i in some], {group: i for i, group in enumerate(kept)})
    numbers = _regressed(data.pooled[some].mean(dim=1), data.scores[some], said.sub_(usual))
    rarity = torch.tensor([targets.rarity(group) for group in kept])
    words = torch.tensor([min(word_count(text), LONGEST) for texts in data.captions for text in texts])
    lengths = torch.bincount(words, minlength=LONGEST + 1) / len(words)
    rest = {"usual": usual, "rarity": rarity, "lengths": lengths, "scale": torch.ones(())}
    return Consensus.of(kept, numbers | rest), targets, usual


def _regressed(pooled: Tensor, scores: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Kernel ridge regression, in the directions that matter most.

    Args:
        pooled: (M, D_v) mean features.
        scores: (M, C) probabilities of the encoder's labels.
        targets: (M, G) what is said of each picture beyond what is usual.
    """
    usual = {"mean": pooled.mean(dim=0), "spread": usable(pooled.std(dim=0))}
    usual["named"] = scores.sqrt().mean(dim=0)
    shown = portrait(pooled, scores, usual)
    turn = torch.linalg.eigh(shown.T @ shown).eigenvectors.flip(1)[:, :DIRECTIONS]
    seen = shown @ turn
    lower = torch.linalg.cholesky(likeness(seen, seen) + RIDGE * torch.eye(len(targets)))
    said = torch.cholesky_solve(targets, lower)
    # What it says of the taught pictures: the directions in which that differs most are those that are kept.
    fitted = torch.sub(targets, said, alpha=RIDGE)
    _, _, say = torch.svd_lowrank(fitted, min(RANK, *fitted.shape))
    return usual | {"turn": turn, "seen": seen, "weigh": said @ say, "say": say.T}


def _dense(vectors: Sequence[Vector], groups: Mapping[Gram, int]) -> Tensor:
    """(M, G) vectors by the groups' places, without others."""
    target = torch.zeros(len(vectors), len(groups))
    for row, vector in enumerate(vectors):
        held = {groups[g]: weight for g, weight in vector.items() if g in groups}
        target[row, list(held)] = torch.tensor(list(held.values()))
    return target


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
    held, taught = data.part(order[::10][:HELD]), data.part([i for k, i in enumerate(order) if k % 10])
    first, targets, guess = fit(taught, seed)
    vectors = [targets.vector(texts) for texts in held.captions]
    lengths = torch.tensor([math.sqrt(sum(w * w for w in vector.values())) for vector in vectors]) + 1e-9
    true = _dense(vectors, first.groups)
    products = (F.normalize(first(held.pooled[:, 0], held.scores), dim=1) * true).sum(dim=1)
    cosine, single = (
        float((product / lengths).mean()) for product in (products, true @ F.normalize(guess, dim=0))
    )
    if not cosine > single:
        raise DataError(
            f"captions of pictures set aside are foretold no better ({cosine:.3f}) than by one guess for all "
            f"({single:.3f}): nothing is written"
        )
    whole, *_ = fit(data, seed)
    return Learnt(whole.scaled(float(products.mean())), cosine, single)


def captioned(source: str | Path, features: Features, split: str, progress: Progress) -> Captioned:
    """What a source's pictures show, and their captions.

    Raises:
        DataError: the part cannot be read or holds no captions.
        ImageError: a picture cannot be read.
    """
    found = list(captions_by_picture(source, split).values())
    pooled, scores = [], []
    for begin in range(0, len(found), TOGETHER):
        pictures = [open_picture(image) for image, _ in found[begin : begin + TOGETHER]]
        seen = [features.see(pictures, view, scored=view == VIEWS[0]) for view in VIEWS]
        pooled.append(torch.stack([one.features.mean(dim=1) for one in seen], dim=1).cpu())
        scores.append(seen[0].scores.cpu())
        progress("looking at pictures", begin + len(pictures), len(found))
    return Captioned(torch.cat(pooled), torch.cat(scores), [captions for _, captions in found])


def main(argv: list[str]) -> int:
    """Entry of `vlm train consensus`."""
    parser = make_parser(
        "vlm train consensus", "Learn what captions of a picture will say; it guides an adapter's."
    )
    add_place(parser)
    parser.add_argument("source", metavar="SRC", help="captioned pictures: a folder, table, public set")
    parser.add_argument("--split", default="train", help="part of the source (default: train), or train+dev")
    add_common(parser)
    args = parser.parse_args(argv)
    apply_common(args)
    keep_memory()
    folder, out = place(args)
    cache = cache_root() / "features"
    features = adapter_features(str(folder), offline=args.offline, device=args.device, cache=cache)
    with Screen() as screen:
        data = captioned(args.source, features, args.split, screen.progress)
        screen.say(
            f"{len(data.captions)} captioned pictures; two fits, of about half a minute for 6,000 each"
        )
        learnt = learn(data)
    save_guide(folder, learnt.consensus, out)
    print(
        f"cosine of expected and true captions of pictures set aside: {learnt.cosine:.3f} "
        f"(one guess for all: {learnt.guess:.3f}); the captions of {out or folder} are guided now"
    )
    return 0
