"""The reward that captions are trained on is CIDEr-D as pycocoevalcap computes it."""

from __future__ import annotations

import random

import pytest

from vlm.eval.metrics.ptb import tokenize
from vlm.train.selfcritical import CiderReward

WORDS = "a dog cat man runs jumps sits on the red beach grass ball , with two people 's don't"


def sentences(chance: random.Random, count: int) -> list[str]:
    return [" ".join(chance.choices(WORDS.split(" "), k=chance.randint(1, 14))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_official_scorer(seed: int) -> None:
    from pycocoevalcap.cider.cider import Cider

    chance = random.Random(seed)
    references = {f"picture {n}": sentences(chance, chance.randint(1, 5)) for n in range(20)}
    captions = {name: sentences(chance, 1)[0] for name in references}
    captions["picture 3"] = references["picture 3"][0]
    captions["picture 4"] = ""
    mine = CiderReward(references)
    wanted = {name: [tokenize(text) for text in texts] for name, texts in references.items()}
    _, each = Cider().compute_score(wanted, {name: [tokenize(text)] for name, text in captions.items()})
    assert [mine(name, text) for name, text in captions.items()] == pytest.approx(each.tolist(), abs=1e-9)
    assert mine("picture 4", "") == 0.0
    assert mine("picture 3", captions["picture 3"]) > 1.0
