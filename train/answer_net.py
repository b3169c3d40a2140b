"""Teaches the networks of known answers (`vlm.answer_net`): two minutes each for some thousand questions.

Pictures are mirrored at random, and left and right change places in what is asked of them; a running average
of the weights is what is kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.answer_net import AnswerNet, AnswerNets
from vlm.data.mirror import mirrored
from vlm.grams import Gram
from vlm.known_answers import question_groups, standard_cells
from vlm.train.learner import Learner

COUNT = 2
"""Networks beside a regression, which differ in their first numbers and in the order of what they learn."""
EPOCHS, LEAST, BATCH = 12, 300, 64
"""Times that every question is seen; steps at least; questions a step."""
RATE, WARMUP, DECAY, SMOOTHING, AVERAGE = 1e-3, 50, 0.02, 0.1, 0.99
"""Of AdamW: the highest rate, steps of warm-up, weight decay; label smoothing; of the weights' average."""
KNOWN = 3
"""Questions that must hold a word group."""


@dataclass(frozen=True)
class Shown:
    """What networks learn to look at.

    Attributes:
        cells: (view, (B,) pictures) -> their (B, N, D_v) features; the second view is the mirror image.
        whole: (P, 2 * D_v) `standardised` summaries of all P pictures.
        mean: (2 * D_v,) of the summaries.
    """

    cells: Callable[[int, Tensor], Tensor]
    whole: Tensor
    mean: Tensor


def learn_nets(
    questions: Sequence[str], right: Tensor, pictures: Tensor, shown: Shown, count: int = COUNT
) -> AnswerNets | None:
    """Networks that know what was right of M questions; None where no word stands in several of them.

    Args:
        questions: plain.
        right: (M, A) shares of right answers.
        pictures: (M,) which picture each is about.
        count: networks.
    """
    asked = [[question_groups(question) for question in questions]]
    turned = [mirrored(question) for question in questions]
    asked.append([set() if question is None else question_groups(question) for question in turned])
    often = Counter(group for view in asked for groups in view for group in groups)
    known = sorted(group for group, times in often.items() if times >= KNOWN)
    if not known:
        return None
    _, cells, channels = shown.cells(0, pictures[:1]).shape
    nets = AnswerNets(known, [])
    for seed in range(count):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = AnswerNet(len(known), cells, channels, right.shape[1])
            nets.nets.append(_taught(net, nets, asked, right, pictures, shown))
    return nets


def _taught(
    net: AnswerNet,
    nets: AnswerNets,
    asked: Sequence[Sequence[set[Gram]]],
    right: Tensor,
    pictures: Tensor,
    shown: Shown,
) -> AnswerNet:
    """The network, taught with a warm-up and a cosine.

    Args:
        asked: word groups of every question, and of the same about the mirror image; none where that cannot
            be said.
    """
    count = len(asked[0])
    steps = max(LEAST, EPOCHS * count // BATCH)
    learner = Learner(net, AVERAGE, DECAY)
    order = torch.cat([torch.randperm(count) for _ in range(1 + steps * BATCH // count)])
    for step in range(steps):
        view = int(torch.rand(()) < 0.5)
        some = [i for i in order[step * BATCH : (step + 1) * BATCH].tolist() if view == 0 or asked[1][i]]
        if not some:
            continue
        groups, begins = nets.places([asked[view][i] for i in some])
        seen = pictures[some]
        # The summary of a picture and that of its mirror image are as good as the same.
        cells, whole = standard_cells(shown.cells(view, seen), shown.mean), shown.whole[seen]
        rise, fall = min(1.0, step / WARMUP), 0.5 * (1 + math.cos(math.pi * step / steps))
        with learner.autocast():
            logits = net(groups, begins, cells, whole)
        loss = F.cross_entropy(logits.float(), right[some], label_smoothing=SMOOTHING)
        learner.learn(loss, RATE * rise * fall)
    learner.finish()
    return net
