"""What is told of a picture in words: the encoder's labels, and captions of remembered pictures like it.

A classifier knows kinds of things that no caption of a small training set ever names. Its labels stand
behind their image, and training drops and swaps some of them, so that they are believed only as far as
the features bear them out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlm.config import HintsConfig


def likely_labels(
    scores: Tensor, labels: Sequence[str], config: HintsConfig
) -> list[list[tuple[str, float]]]:
    """The labels that are told of each image, with their probabilities, the likeliest first.

    Args:
        scores: (I, C) probabilities of the C labels; C is 0 where nothing is known.
    """
    count = min(config.count, scores.shape[1])
    if not count:
        return [[] for _ in range(len(scores))]
    best, kinds = scores.topk(count, dim=1)
    return [
        [(labels[kind], chance) for chance, kind in zip(row, places, strict=True) if chance >= config.least]
        for row, places in zip(best.tolist(), kinds.tolist(), strict=True)
    ]


def hint_text(names: Sequence[str]) -> str:
    """How labels are told; nothing for none."""
    return f"Perhaps {', '.join(names)}.\n" if names else ""


def memory_text(captions: Sequence[str]) -> str:
    """How captions of like pictures are told; nothing for none."""
    return f"Similar pictures show: {'; '.join(captions)}.\n" if captions else ""


def told_text(names: Sequence[str], captions: Sequence[str] = ()) -> str:
    """Everything that is told of one picture, behind it: its labels, then what is remembered."""
    return hint_text(names) + memory_text(captions)
