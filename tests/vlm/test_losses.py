"""The fused loss is the plain one: value, gradient, smoothing, weights of any sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.conversation import Conversation
from vlm.losses import CHUNK, cross_entropy, frozen_head_cross_entropy

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

VOCABULARY, WIDTH = 53, 16
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(nodes: int, labels: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """Hidden states, head, and labels that several of may belong to one node, in no order."""
    torch.manual_seed(nodes)
    hidden = torch.randn(nodes, WIDTH, dtype=dtype) * 2
    head = torch.randn(VOCABULARY, WIDTH, dtype=dtype)
    where = torch.randint(nodes, (labels,))
    said = torch.randint(VOCABULARY, (labels,))
    return hidden, head, where, said, torch.randn(labels, dtype=dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("nodes", "labels"), [(1, 1), (5, 9), (CHUNK, 40), (CHUNK + 1, 7), (3 * CHUNK - 5, 200)]
)
def test_fused_equals_plain(nodes: int, labels: int, smoothing: float) -> None:
    hidden, head, where, said, weights = inputs(nodes, labels, torch.float32)
    assert labels < 5 or (weights < 0).any()  # self-critical training punishes answers
    mine, other = (hidden.clone().requires_grad_() for _ in range(2))
    fused = frozen_head_cross_entropy(mine, head, where, said, weights, smoothing)
    plain = cross_entropy(other @ head.T, where, said, weights, smoothing)
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-5)
    (3 * fused).backward()
    (3 * plain).backward()
    torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4)
    assert mine.grad is not None and mine.grad.abs().max() > 0.1
    unused = torch.ones(nodes, dtype=torch.bool)
    unused[where] = False
    assert mine.grad[unused].abs().sum() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_plain_is_torchs_own(smoothing: float) -> None:
    hidden, head, where, said, _ = inputs(6, 11)
    logits = hidden @ head.T
    ours = cross_entropy(logits, where, said, torch.ones(11, dtype=torch.float64), smoothing)
    theirs = F.cross_entropy(logits[where], said, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)


def test_a_weight_is_a_factor() -> None:
    hidden, head, where, said, weights = inputs(6, 11)
    apart = [
        float(w * F.cross_entropy((hidden @ head.T)[n : n + 1], y[None]))
        for n, y, w in zip(where, said, weights, strict=True)
    ]
    assert float(cross_entropy(hidden @ head.T, where, said, weights, 0.0)) == pytest.approx(sum(apart))


def test_extreme_logits_stay_finite() -> None:
    hidden, head, where, said, weights = inputs(6, 11, torch.float32)
    hidden = (hidden * 1e3).requires_grad_()
    loss = frozen_head_cross_entropy(hidden, head, where, said, weights, 0.1)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_a_head_in_half_precision() -> None:
    """As in training under bfloat16: sums and gradients stay in float32."""
    hidden, head, where, said, weights = inputs(40, 60, torch.float32)
    mine, other = (hidden.clone().requires_grad_() for _ in range(2))
    fused = frozen_head_cross_entropy(mine, head.bfloat16(), where, said, weights, 0.1)
    plain = cross_entropy(other @ head.bfloat16().float().T, where, said, weights, 0.1)
    fused.backward()
    plain.backward()
    assert fused.dtype == torch.float32
    assert mine.grad is not None and other.grad is not None
    assert mine.grad.dtype == torch.float32
    assert fused.item() == pytest.approx(plain.item(), rel=0.02, abs=0.5)
    assert F.cosine_similarity(mine.grad.flatten(), other.grad.flatten(), dim=0) > 0.999


def test_no_labels_are_no_loss() -> None:
    hidden, head, *_ = inputs(3, 1, torch.float32)
    nothing = torch.zeros(0, dtype=torch.long)
    loss = frozen_head_cross_entropy(hidden.requires_grad_(), head, nothing, nothing, torch.zeros(0))
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None and hidden.grad.abs().sum() == 0


def test_a_models_loss_is_the_same_by_both(tiny_model: VLM, draw: Callable[..., Image.Image]) -> None:
    """And it is the mean negative log-likelihood that the whole logits give."""
    processor = tiny_model.processor
    asks = [Conversation.ask([draw(1), draw(2)], "what?"), Conversation.ask([], "hello there")]
    answers = ["a dog on the grass", "no"]
    rows = [
        processor.row([processor.tokens(c, a)], [w])
        for c, a, w in zip(asks, answers, (1.0, -0.5), strict=True)
    ]
    batch = processor.batch(rows)
    from vlm.images import open_picture

    features = tiny_model.encode([open_picture(draw(1)), open_picture(draw(2))])
    results = []
    for tiny_model.fused_loss in (True, False):
        tiny_model.zero_grad()
        loss, weight = tiny_model.loss(batch, features, 0.1)
        loss.backward()
        results.append((loss, [p.grad for p in tiny_model.trainable()]))
        assert float(weight) == pytest.approx(len(row_labels(batch, 0)) - 0.5 * len(row_labels(batch, 1)))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
    likely = tiny_model(batch, features).log_softmax(-1).flatten(0, 1)[batch.label_nodes]
    by_hand = -(batch.label_weights * likely.gather(1, batch.labels[:, None])[:, 0]).sum()
    tiny_model.fused_loss = True
    torch.testing.assert_close(tiny_model.loss(batch, features)[0], by_hand, atol=1e-4, rtol=1e-5)


def row_labels(batch: object, row: int) -> list[int]:
    nodes, length = batch.label_nodes.tolist(), batch.ids.shape[1]  # type: ignore[attr-defined]
    return [node for node in nodes if node // length == row]


def test_a_head_that_bends_its_logits_is_not_fused(make_tiny: Callable[..., VLM]) -> None:
    model = make_tiny("flamingo")
    assert model.language.head_weight is not None
    model.language.model.config.final_logit_softcapping = 30.0
    assert model.language.head_weight is None
    model.language.model.config.final_logit_softcapping = None
    model.language.model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.language.vocabulary))
    assert model.language.head_weight is None
