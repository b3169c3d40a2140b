"""Where an answer came from: which cells of a picture its log-probability leans on.

The map is gradient times input (Shrikumar et al. 2017): the derivative of the answer's log-probability by
each image token, times the token, summed over channels; what argues against the answer is left out. It asks
the same of every adapter, where attention weights would need a recipe for each, and costs about three short
forward passes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from vlm.serve.schemas import HeatMap

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.serve.pictures import Question


def where_it_looked(model: VLM, question: Question) -> list[HeatMap]:
    """A map for each picture of a question whose row holds an answer; values add up to 1 over a picture.

    A picture on which the answer does not lean at all has an even map.
    """
    with torch.inference_mode(False), torch.enable_grad():
        features = question.features.clone().requires_grad_()
        batch = model.processor.batch([question.row]).to(model.device)
        hidden = model.hidden(batch, model.condition(batch, features)).flatten(0, 1)
        likely = model.language.logits(hidden[batch.label_nodes]).log_softmax(dim=-1)
        said = likely.gather(1, batch.labels[:, None]).sum()
        (slope,) = torch.autograd.grad(said, features, allow_unused=True)
    if slope is None:
        slope = torch.zeros_like(features)
    with torch.no_grad():
        leaning = (slope * features).sum(dim=-1).clamp(min=0)
    return [_map(cells.tolist()) for cells in leaning]


def _map(cells: list[float]) -> HeatMap:
    """N image tokens (class tokens first, then a square grid) as a map."""
    side = math.isqrt(len(cells))
    grid = cells[len(cells) - side * side :]
    total = sum(grid)
    values = [value / total for value in grid] if total > 0 else [1 / len(grid)] * len(grid)
    return HeatMap(rows=side, columns=side, values=values)
