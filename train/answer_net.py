"""Teaches the networks of known answers (`vlm.answer_net`): a minute each for some thousand questions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.answer_net import AnswerNet, AnswerNets
from vlm.grams import Gram
from vlm.known_answers import question_groups, standard_cells
from vlm.train.precision import multiplies_bf16

COUNT = 2
"""Networks, which differ in their first numbers and in the order of what they learn."""
EPOCHS, LEAST, BATCH = 8, 300, 64
"""Times that every question is seen; steps at least; questions a step."""
RATE, WARMUP, DECAY, SMOOTHING = 1e-3, 50, 0.02, 0.1
"""Of AdamW: the highest rate, steps of warm-up, weight decay; label smoothing."""
KNOWN = 3
"""Questions that must hold a word group."""


@dataclass(frozen=True)
class Shown:
    """What networks learn to look at.

    Attributes:
        cells: (B,) pictures -> their (B, N, D_v) features.
        whole: (P, 2 * D_v) `standardised` summaries of all P pictures.
        mean: (2 * D_v,) of the summaries.
    """

    cells: Callable[[Tensor], Tensor]
    whole: Tensor
    mean: Tensor


def learn_nets(questions: Sequence[str], right: Tensor, pictures: Tensor, shown: Shown) -> AnswerNets | None:
    """Networks that know what was right of M questions; None where no word stands in several of them.

    Args:
        questions: plain.
        right: (M, A) shares of right answers.
        pictures: (M,) which picture each is about.
    """
    asked = [question_groups(question) for question in questions]
    counts = Counter(group for groups in asked for group in groups)
    known = sorted(group for group, count in counts.items() if count >= KNOWN)
    if not known:
        return None
    _, cells, channels = shown.cells(pictures[:1]).shape
    nets = AnswerNets(known, [])
    for seed in range(COUNT):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = AnswerNet(len(known), cells, channels, right.shape[1])
            _teach(net, nets, asked, right, pictures, shown)
        nets.nets.append(net.eval())
    return nets


def _teach(
    net: AnswerNet,
    nets: AnswerNets,
    asked: Sequence[set[Gram]],
    right: Tensor,
    pictures: Tensor,
    shown: Shown,
) -> None:
    """AdamW with a warm-up and a cosine; in bfloat16 where that is faster."""
    steps = max(LEAST, EPOCHS * len(asked) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
    order = torch.cat([torch.randperm(len(asked)) for _ in range(1 + steps * BATCH // len(asked))])
    half = multiplies_bf16(torch.device("cpu"))
    for step in range(steps):
        some = order[step * BATCH : (step + 1) * BATCH]
        groups, begins = nets.places([asked[i] for i in some.tolist()])
        seen = pictures[some]
        cells, whole = standard_cells(shown.cells(seen), shown.mean), shown.whole[seen]
        rise, fall = min(1.0, step / WARMUP), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * rise * fall
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = net(groups, begins, cells, whole)
        loss = F.cross_entropy(logits.float(), right[some], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
