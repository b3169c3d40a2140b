"""Teaches the network of a captioner (`vlm.captioner`) what captions say, word by word.

Much dropout, mirrored pictures, smoothed labels and an average of the weights keep it from learning its
pictures by heart.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.captioner import CaptionNet, Sight
from vlm.train.learner import Learner

PICTURES, TEXTS = 64, 2
"""Pictures a step of captions, and captions of each."""
EPOCHS, LEAST = 20, 300
"""Times that every picture is seen, and steps at least."""
RATE, WARMUP, DECAY, SMOOTHING, AVERAGE = 1.5e-3, 100, 0.02, 0.1, 0.995
"""Of AdamW: the highest rate, steps of warm-up, weight decay; label smoothing; of the weights' average."""
LONGEST = 19
"""Tokens of a caption that are learnt."""

Progress = Callable[[str, int, int, str], None]
Text = Sequence[int]


@dataclass(frozen=True)
class Lessons:
    """What is learnt from: M pictures in V views.

    Attributes:
        see: (view, (P,) pictures) -> (P, N, D_v) features and (P, C) label probabilities.
        texts: by view and picture, its captions as places of known tokens, the end excluded; a view other
            than the first may have none.
    """

    see: Callable[[int, Tensor], tuple[Tensor, Tensor]]
    texts: Sequence[Sequence[Sequence[Text]]]

    def __len__(self) -> int:
        return len(self.texts[0])


def teach(net: CaptionNet, lessons: Lessons, progress: Progress, seed: int = 0) -> CaptionNet:
    """The network, taught with a warm-up and a cosine; in evaluation mode."""
    steps, order = max(LEAST, EPOCHS * len(lessons) // PICTURES), random.Random(seed)
    learner = Learner(net, AVERAGE, DECAY, (0.9, 0.98))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step, some in zip(range(steps), _batches(len(lessons), PICTURES, order), strict=False):
            with learner.autocast():
                logits, tokens = _heard(net, lessons, some, order)
            loss = F.cross_entropy(logits.float(), tokens, label_smoothing=SMOOTHING)
            fall = 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01
            learner.learn(loss, RATE * min(1.0, (step + 1) / WARMUP) * fall, longest=1.0)
            progress("learning captions", step + 1, steps, f"loss {float(loss.detach()):.2f}")
    learner.finish()
    return net


def _heard(
    net: CaptionNet, lessons: Lessons, some: Sequence[int], order: random.Random
) -> tuple[Tensor, Tensor]:
    """Logits of some captions of each of some pictures, all in one view, and their tokens."""
    view = order.randrange(len(lessons.texts))
    said = [picture for picture in some if lessons.texts[view][picture]]
    # Pictures of whose mirror image nothing can be said are left out; all of them are learnt as they are.
    view, some = (view, said) if said else (0, some)
    texts = [text for p in some for text in order.choices(lessons.texts[view][p], k=TEXTS)]
    return spoken(net, net.see(*lessons.see(view, torch.tensor(some))), [text[:LONGEST] for text in texts])


def _batches(count: int, size: int, order: random.Random) -> Iterator[list[int]]:
    """`size` of `count` pictures at a time, all of them before one comes again."""
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += order.sample(range(count), count)
        yield queue[:size]
        del queue[:size]


def spoken(net: CaptionNet, sight: Sight, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """(T, V) logits of all tokens of texts with their ends, text after text, and (T,) the tokens.

    A text of `LONGEST` tokens goes on, for all that is known: its end is not learnt.
    """
    longest = max(len(text) for text in texts) + 1
    read = torch.zeros(len(texts), longest, dtype=torch.long)
    said = torch.full((len(texts), longest), -1)
    for row, text in enumerate(texts):
        read[row, 1 : len(text) + 1] = said[row, : len(text)] = torch.tensor(text, dtype=torch.long)
        if len(text) < LONGEST:
            said[row, len(text)] = 0
    state, states = net.begin(len(texts)), []
    for word in net.read(read).unbind(dim=1):
        state = net.step(word, state, sight)
        states.append(state[2])
    learnt = said >= 0
    return net.logits(torch.stack(states, dim=1)[learnt]), said[learnt]
