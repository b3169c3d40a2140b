"""Where the model looked: which cells of a picture an answer's log-probability leans on.

Gradient times input (Shrikumar et al. 2017): the derivative of the answer's log-probability by each image
token, times the token, summed over channels; what argues against the answer is left out. It asks the same
of every adapter, where attention weights would need a recipe for each, and costs about three short forward
passes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm.answering import shown
from vlm.conversation import Conversation
from vlm.processor import Row

if TYPE_CHECKING:
    from vlm.model import VLM


def row_relevance(model: VLM, row: Row, features: Tensor) -> Tensor:
    """Maps of a row that holds an answer: (I, N, D_v) features -> (I, h, w), zero or more.

    A picture on which the answer does not lean at all has a map of zeros.
    """
    with torch.inference_mode(False), torch.enable_grad():
        features = features.clone().requires_grad_()
        batch = model.processor.batch([row]).to(model.device)
        loss, _ = model.loss(batch, features)
        (slope,) = torch.autograd.grad(-loss, features, allow_unused=True)
    if slope is None:
        slope = torch.zeros_like(features)
    leaning = (slope * features).sum(dim=-1).clamp(min=0).detach()
    side = math.isqrt(leaning.shape[1])
    # Class tokens come first and have no place in the picture.
    return leaning[:, leaning.shape[1] - side * side :].unflatten(1, (side, side))


def relevance(model: VLM, conversation: Conversation, answer: str) -> Tensor:
    """Maps of the pictures of a conversation, in reading order.

    Args:
        conversation: ends with the user's turn.
        answer: what the model answered, or any other text whose grounds are asked for.

    Returns:
        (I, h, w) float32 on the encoder's grid; the cell that mattered most in the conversation has 1.
    """
    row, features = shown(model, conversation, [answer])
    if not len(features):
        return torch.zeros(0, 0, 0)
    maps = row_relevance(model, row, features).cpu()
    return maps / maps.max().clamp(min=torch.finfo(torch.float32).tiny)
