"""The reward that captions are trained on is CIDEr-D as pycocoevalcap computes it."""

from __future__ import annotations

import random
from typing import Any

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


def test_one_captioned_picture_is_too_few() -> None:
    from vlm.errors import DataError

    with pytest.raises(DataError, match="at least two pictures; 1 have some"):
        CiderReward({"a": ["a dog runs"]})


def test_samples_say_only_what_can_be_said(recipe: Any, trainer_of: Any) -> None:
    """An embedding may have more rows than there are tokens, as Qwen3's has."""
    import torch

    from vlm.config import CAPTION_PROMPT
    from vlm.conversation import Conversation
    from vlm.train.selfcritical import sample_captions

    trainer, _ = trainer_of(recipe())
    model, group = trainer.model, trainer.groups[0]
    more = model.language.vocabulary + 64
    model.language.model.resize_token_embeddings(more, mean_resizing=False)
    with torch.no_grad():
        model.language.model.get_input_embeddings().weight[-64:] *= 50  # likely, and no token
    row = model.processor.row([model.processor.tokens(Conversation.ask(group.images, CAPTION_PROMPT))])
    ((*texts,),) = sample_captions(model, [row], trainer.store(group, "whole"), 20, 1.0, 12)
    never = model.language.never_said()
    assert len(never) == more
    assert not any(never[token] for text in texts for token in text)
