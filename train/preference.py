"""Learning from what people preferred: Direct Preference Optimization (Rafailov et al. 2023).

For a pair of answers, m = log p(chosen) - log p(rejected) under the adapter and r the same under the adapter
that the run starts from; the loss is -log sigmoid(beta * (m - r)). The larger beta, the sooner the loss is
content, and the nearer the adapter stays to where it began.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.data.collate import Group, seeded
from vlm.model import VLM
from vlm.processor import Row
from vlm.train.hints import hint_texts
from vlm.train.loop import Part, Trainer
from vlm.train.mup import Scale

TOGETHER = 8
"""Pairs whose reference is computed in one forward pass."""


def preference_loss(margins: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Sum over pairs of -log sigmoid(beta * (margin - reference margin)).

    Args:
        margins: (P,) log p(chosen) - log p(rejected) under the adapter that learns.
        reference: (P,) the same under the frozen one.
    """
    return -F.logsigmoid(beta * (margins - reference)).sum()


def answer_margins(model: VLM, rows: Sequence[Row], features: Tensor) -> Tensor:
    """(P,) log p(chosen) - log p(rejected), summed over tokens and the end, of a row for each pair.

    Args:
        rows: the chosen answer's labels weigh 1, the rejected one's -1.
        features: (I, N, D_v) of the rows' images, in reading order.
    """
    batch = model.processor.batch(rows).to(model.device)
    likely = model.label_logprobs(batch, features.to(model.device))
    pair = batch.label_nodes // batch.ids.shape[1]
    return likely.new_zeros(len(rows)).index_add(0, pair, batch.label_weights * likely)


class Compared(nn.Module):
    """The adapter with the reference's margins, which thus are part of every saved state."""

    reference: Tensor

    def __init__(self, adapter: nn.Module, reference: Tensor) -> None:
        super().__init__()
        self.adapter = adapter
        self.register_buffer("reference", reference)


class PreferenceTrainer(Trainer):
    """Makes chosen answers likelier than rejected ones, as compared with the adapter it starts from.

    A group's first source holds its chosen answers, the second its rejected ones (`vlm.train.pairs`). Every
    picture keeps its own hints, and there is no dropout: the reference has none.
    """

    def trained_part(self) -> nn.Module:
        """Computes the reference, once."""
        self._places = {place: number for number, place in enumerate(self._all_places())}
        places = list(self._places)
        parts = []
        groups = {group.id: group for group in self.groups}
        self.model.eval()
        with torch.no_grad(), self.autocast():
            for begin in range(0, len(places), TOGETHER):
                shown = [
                    self._shown(groups[name], view, number)
                    for name, view, number in places[begin : begin + TOGETHER]
                ]
                rows, features = zip(*shown, strict=True)
                parts.append(answer_margins(self.model, rows, torch.cat(features)))
        self.compared = Compared(self.adapter, torch.cat(parts))
        return self.compared

    def scales(self) -> dict[str, Scale]:
        return {f"adapter.{name}": scale for name, scale in super().scales().items()}

    def _all_places(self) -> Iterator[tuple[str, str, int]]:
        """(group, view, number) of every pair in every view that the run may show."""
        for group in self.groups:
            for view in ("whole", "flip") if self.config.flip > 0 and group.mirrors else ("whole",):
                for number in range(len(group.by_source[0])):
                    yield group.id, view, number

    def _shown(self, group: Group, view: str, number: int) -> tuple[Row, Tensor]:
        """A pair's row and the features of its images."""
        processor = self.model.processor
        hints = hint_texts(self.store.labels(group, view))
        pairs = group.seen([source[number] for source in group.by_source], view)
        tokens = [processor.tokens(pair.example, pair.answer, hints) for pair in pairs]
        row = processor.row(tokens, (1.0, -1.0))
        return row, self.store(group, view)[row.tokens.images]

    def prepare(self, groups: Sequence[Group], epoch: int) -> Part:
        """The pairs that an epoch draws of each group."""
        rows, features, places = [], [], []
        for group in groups:
            view = self.view(group, epoch)
            count, most = len(group.by_source[0]), group.per_image[0]
            chance = seeded(self.config.seed, epoch, group.key)
            for number in range(count) if count <= most else chance.sample(range(count), most):
                row, seen = self._shown(group, view, number)
                rows.append(row)
                features.append(seen)
                places.append(self._places[group.id, view, number])
        reference = self.compared.reference[torch.tensor(places, device=self.compared.reference.device)]
        return Part(rows, torch.cat(features), targets=reference)

    def weight(self, part: Part) -> float:
        return len(part.rows)

    def backward(self, part: Part, weight: float) -> tuple[float, int]:
        assert part.targets is not None
        self.model.eval()  # dropout would be noise beside a reference that has none
        with self.autocast():
            margins = answer_margins(self.model, part.rows, part.features)
        loss = preference_loss(margins.float(), part.targets, self.config.beta)
        (loss / weight).backward()
        return float(loss.detach()), sum(len(row.codes) for row in part.rows)
