"""Cross-entropy through a frozen vocabulary projection, without ever holding all the logits.

The projection has no gradient of its own, so the gradient of the hidden states can be taken chunk by
chunk in the forward pass, while a chunk's logits still lie in the processor's cache; the idea is that of
Liger Kernel's fused linear cross-entropy (Hsu et al. 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 32
"""Nodes projected at a time: 32 x 49,152 float32 logits are 6.3 MB."""


def cross_entropy(logits: Tensor, nodes: Tensor, labels: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Weighted sum of label-smoothed negative log-likelihoods; the plain form.

    Args:
        logits: (U, V) float32.
        nodes: (K,) which row of `logits` each label belongs to.
        labels: (K,) token ids.
        weights: (K,) float32.
        smoothing: share of the target spread over the whole vocabulary.
    """
    rows = torch.logsumexp(logits, dim=-1)
    spread = smoothing * logits.mean(dim=-1) if smoothing else 0.0
    said = (1 - smoothing) * logits[nodes, labels]
    return (weights * ((rows - spread)[nodes] - said)).sum()


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        nodes: Tensor,
        labels: Tensor,
        weights: Tensor,
        smoothing: float,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
        order = torch.argsort(nodes, stable=True)
        nodes, labels, weights = nodes[order], labels[order], weights[order]
        starts = torch.arange(0, hidden.shape[0] + CHUNK, CHUNK, device=nodes.device)
        bounds = torch.searchsorted(nodes, starts).tolist()
        # One buffer serves every chunk: fresh ones would be paged in anew each time.
        product = torch.empty(CHUNK, head.shape[0], dtype=head.dtype, device=head.device)
        wide = product if head.dtype == torch.float32 else torch.empty_like(product, dtype=torch.float32)
        for number, begin in enumerate(range(0, hidden.shape[0], CHUNK)):
            mine = slice(bounds[number], bounds[number + 1])
            node, label, weight = nodes[mine] - begin, labels[mine], weights[mine]
            part = hidden[begin : begin + CHUNK].to(head.dtype)
            raw, logits = product[: len(part)], wide[: len(part)]
            torch.mm(part, head.T, out=raw)
            if raw is not logits:
                logits.copy_(raw)
            said = (1 - smoothing) * logits[node, label]
            if smoothing:
                said += smoothing * logits.mean(dim=-1)[node]
            highest = logits.amax(dim=-1, keepdim=True)
            partition = logits.sub_(highest).exp_().sum(dim=-1, keepdim=True)
            total += (weight * ((highest + partition.log())[node, 0] - said)).sum()
            mass = torch.zeros(len(part), device=hidden.device).index_add_(0, node, weight)[:, None]
            logits.mul_(mass / partition)
            if smoothing:
                logits.sub_(mass * (smoothing / head.shape[0]))
            logits.index_put_((node, label), -(1 - smoothing) * weight, accumulate=True)
            if raw is not logits:
                raw.copy_(logits)
            gradient[begin : begin + CHUNK] = raw @ head
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(ctx.dtype), None, None, None, None, None


def frozen_head_cross_entropy(
    hidden: Tensor, head: Tensor, nodes: Tensor, labels: Tensor, weights: Tensor, smoothing: float = 0.0
) -> Tensor:
    """`cross_entropy` of `hidden @ head.T` for a frozen (V, D) `head` without bias; hidden is (U, D)."""
    with torch.autocast(hidden.device.type, enabled=False):
        result: Tensor = _FrozenHeadLoss.apply(hidden, head, nodes, labels, weights, smoothing)
    return result
