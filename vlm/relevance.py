"""Where the model looked: which parts of each picture an answer hangs on.

Gradient times input (Shrikumar et al. 2017) of the answer's log-probability with respect to the encoder's
features. It needs nothing of the adapter's inside, so it serves every adapter alike, and unlike attention
weights it says what changed the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlm.conversation import Conversation
from vlm.generation import pictures_of

if TYPE_CHECKING:
    from vlm.images import Picture
    from vlm.model import VLM


def relevance(
    model: VLM, conversation: Conversation, answer: str, pictures: Sequence[Picture] | None = None
) -> list[np.ndarray]:
    """A map for each picture, in reading order.

    Args:
        conversation: ends with the user's turn.
        answer: what the model answered (or any other text whose grounds are asked for).
        pictures: the opened pictures in reading order, where the caller has them already.

    Returns:
        (h, w) float32 arrays, h and w the encoder's grid, values 0 to 1 (1: what mattered most in the
        conversation). They are all zeros where the answer hangs on no picture at all.
    """
    row = model.processor.row([model.processor.tokens(conversation, answer)])
    seen = pictures_of(conversation, row) if pictures is None else list(pictures)
    if not seen:
        return []
    batch = model.processor.batch([row]).to(model.device)
    with torch.enable_grad():
        features = model.encode(seen).clone().requires_grad_(True)
        total, _ = model.loss(batch, features)
        (gradient,) = torch.autograd.grad(total, features)
    weight = (gradient * features.detach()).sum(dim=-1).abs()
    side = math.isqrt(weight.shape[1])
    # Class and register tokens come first and have no place in the picture.
    grids = weight[:, weight.shape[1] - side * side :].reshape(-1, side, side).cpu().numpy()
    highest = float(grids.max())
    return [(grid / highest if highest > 0 else grid).astype(np.float32) for grid in grids]
