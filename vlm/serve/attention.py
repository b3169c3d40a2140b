"""Where an answer came from, in the shape that the API gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from vlm.relevance import row_relevance
from vlm.serve.schemas import HeatMap

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.serve.pictures import Question


def where_it_looked(model: VLM, question: Question) -> list[HeatMap]:
    """A map for each picture of a question whose row holds an answer; values add up to 1 over a picture.

    A picture on which the answer does not lean at all has an even map.
    """
    return [_map(grid) for grid in row_relevance(model, question.row, question.features)]


def _map(grid: Tensor) -> HeatMap:
    total = grid.sum()
    shares = grid / total if total > 0 else grid.new_full(grid.shape, 1 / grid.numel())
    return HeatMap(rows=grid.shape[0], columns=grid.shape[1], values=shares.flatten().tolist())
