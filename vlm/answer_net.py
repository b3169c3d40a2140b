"""A small network that reads a question, looks where it is told to, and knows which answers were right.

The question's word groups choose which cells of the picture are looked at (attention, as in Yang et al. 2016)
and what is made of them. Regression generalises about as well, but errs elsewhere; both together are right
more often than either. Several networks, alike but for their first numbers, are asked and averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.grams import Gram
from vlm.guide import BITS, load_module, module_tensors, squeezed, unsqueezed
from vlm.quantised import require_quantised

WIDTH, HEADS = 192, 4
"""Of a network's states; places that it looks at."""
DROPOUT, LOST, UNREAD = 0.5, 0.2, 0.1
"""While it learns: of states, of a picture's cells, of a question's word groups."""
LOUD = 0.3
"""Root mean square of the summary's numbers."""
MOST = 16
"""Networks that a file may hold."""


class AnswerNet(nn.Module):
    """A question and a picture -> logits of A answers.

    Shapes: B questions with Q word groups in all, of G that are known; N cells, D_v channels.
    """

    def __init__(self, groups: int, cells: int, channels: int, answers: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(groups, WIDTH, mode="sum")
        nn.init.normal_(self.words.weight, std=0.05)
        self.question_norm = nn.LayerNorm(WIDTH)
        self.cell = nn.Linear(channels, WIDTH)
        self.cell_norm = nn.LayerNorm(WIDTH)
        self.position = nn.Parameter(torch.randn(cells, WIDTH) * 0.02)
        self.query = nn.Linear(WIDTH, HEADS * WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.whole = nn.Linear(2 * channels, WIDTH)
        self.seen = nn.Linear((HEADS + 1) * WIDTH, 2 * WIDTH)
        self.asked = nn.Linear(WIDTH, 2 * WIDTH)
        self.answer = nn.Linear(3 * WIDTH, answers)

    def forward(self, groups: Tensor, begins: Tensor, cells: Tensor, whole: Tensor) -> Tensor:
        """Logits (B, A).

        Args:
            groups: (Q,) places of all questions' word groups; `begins` (B,), where each question's begin.
            cells: (B, N, D_v) features, each of about unit size.
            whole: (B, 2 * D_v) `standardised` summary of them.
        """
        told = torch.ones(groups.shape, dtype=self.words.weight.dtype)
        if self.training:
            told = (torch.rand(groups.shape) >= UNREAD).to(told.dtype)
        question = self.question_norm(self.words(groups, begins, per_sample_weights=told))
        question = F.dropout(question, 0.6 * DROPOUT, self.training)
        places = F.gelu(self.cell_norm(self.cell(cells))) + self.position
        if self.training:
            places = places * (torch.rand(places.shape[:2]) >= LOST)[..., None]
        queries = self.query(question).unflatten(-1, (HEADS, WIDTH))
        look = torch.einsum("bhw,bnw->bhn", queries, self.key(places)) / math.sqrt(WIDTH)
        found = torch.einsum("bhn,bnw->bhw", look.softmax(dim=-1), places).flatten(1)
        whole = self.whole(LOUD * math.sqrt(whole.shape[1]) * whole)
        found = F.dropout(torch.cat([found, whole], dim=1), DROPOUT, self.training)
        both = torch.tanh(self.seen(found)) * torch.tanh(self.asked(question))
        logits: Tensor = self.answer(F.dropout(torch.cat([both, question], dim=1), DROPOUT, self.training))
        return logits


class AnswerNets:
    """Networks that were taught the same, and the word groups that they know.

    Attributes:
        groups: the G word groups, with their places.
        nets: the networks, all for N cells.
    """

    def __init__(self, groups: Sequence[Gram], nets: Sequence[AnswerNet]) -> None:
        self.groups = {group: place for place, group in enumerate(groups)}
        self.nets = [net.eval() for net in nets]

    def places(self, questions: Sequence[set[Gram]]) -> tuple[Tensor, Tensor]:
        """What `AnswerNet` reads of B questions: (Q,) places of their known word groups, (B,) begins."""
        known = [sorted(self.groups[group] for group in asked & self.groups.keys()) for asked in questions]
        ends = torch.tensor([len(places) for places in known]).cumsum(0)
        begins = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
        return torch.tensor([place for places in known for place in places], dtype=torch.long), begins

    @torch.inference_mode()
    def __call__(self, question: set[Gram], cells: Tensor, whole: Tensor) -> Tensor:
        """Word groups of one question and what I pictures show, as `AnswerNet` takes it -> (I, A) chances."""
        groups, begins = self.places([question] * len(cells))
        chances = [net(groups, begins, cells, whole).softmax(dim=1) for net in self.nets]
        return torch.stack(chances).mean(dim=0)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that they are, matrices in 8 bits."""
        held = {"net.groups": squeezed([" ".join(group) for group in self.groups])}
        for number, net in enumerate(self.nets):
            held |= module_tensors(f"net{number}.", net)
        return held

    @classmethod
    def of(cls, held: Mapping[str, Tensor], channels: int, answers: int) -> AnswerNets | None:
        """What `tensors` gave; None where there is none of it.

        Raises:
            KeyError, ValueError: a number is missing or of another shape.
        """
        begins = {name.partition(".")[0] for name in held if name.startswith("net")} - {"net"}
        if not begins:
            return None
        if len(begins) > MOST:
            raise ValueError(f"there are more than {MOST} networks")
        groups = [tuple(line.split()) for line in unsqueezed(held["net.groups"])]
        if len(set(groups)) < len(groups):
            raise ValueError("a word group stands twice")
        require_quantised(held, "net0.words.weight", BITS, (len(groups), WIDTH))
        cells = held["net0.position"].shape[:1].numel()
        sizes = len(groups), cells, channels, answers
        return cls(groups, [_loaded(held, f"net{number}.", sizes) for number in range(len(begins))])


def _loaded(held: Mapping[str, Tensor], begin: str, sizes: tuple[int, int, int, int]) -> AnswerNet:
    """The network whose numbers' names begin so."""
    with torch.random.fork_rng(devices=[]):
        net = AnswerNet(*sizes)  # not on `meta`: to draw there imports 900 modules, a third of a second
    return load_module(held, begin, net)
