"""The optimizer, its learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlm.train.config import OptimConfig
from vlm.train.mup import PLAIN, Scale


def build_optimizer(
    trained: nn.Module, config: OptimConfig, scales: Mapping[str, Scale] | None = None
) -> torch.optim.AdamW:
    """AdamW over what is trained: matrices decay, vectors do not, gates have a rate of their own.

    Args:
        scales: factors of some matrices by name (`vlm.train.mup`); each factor has a group of its own.
    """
    groups: dict[tuple[str, float], list[nn.Parameter]] = {
        ("matrices", 1.0): [],
        ("vectors", 1.0): [],
        ("gates", config.gate_lr): [],
    }
    for name, parameter in trained.named_parameters():
        # A block's `gate.weight` is a matrix of its feed-forward; only the scalars are gates.
        if name.endswith("_gate"):
            key = ("gates", config.gate_lr)
        elif parameter.ndim > 1:
            key = ("matrices", (scales or {}).get(name, PLAIN).rate)
        else:
            key = ("vectors", 1.0)
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                # What a step takes off is the rate times this: the factor has no part in it.
                "weight_decay": config.weight_decay / factor if kind == "matrices" else 0.0,
                "lr": config.lr * factor,
                "factor": factor,
            }
            for (kind, factor), parameters in groups.items()
            if parameters
        ],
        betas=config.betas,
        fused=True,
    )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of step `step` (counted from 0) of `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    begin = max(config.warmup, round(steps * (1 - config.decay)))
    if step < begin:
        return config.lr
    progress = (step - begin) / max(1, steps - begin)
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress)))


class Average:
    """Exponential moving average of an adapter's tensors (Polyak and Juditsky 1992).

    The first steps weigh less than `rate` says, so that the average does not remember the start.
    """

    def __init__(self, adapter: nn.Module, rate: float) -> None:
        self.rate = rate
        self.count = 0
        self.tensors = {k: v.detach().clone() for k, v in adapter.state_dict().items()}

    @torch.no_grad()
    def update(self, adapter: nn.Module) -> None:
        self.count += 1
        rate = min(self.rate, self.count / (self.count + 9))
        for name, value in adapter.state_dict().items():
            self.tensors[name].lerp_(value, 1 - rate)

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.tensors, "_count": torch.tensor(self.count)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.count = int(state["_count"])
        self.tensors = {k: state[k].to(v.device) for k, v in self.tensors.items()}


def gradient_norms(adapter: nn.Module) -> dict[str, float]:
    """Gradient norm of each part of an adapter, before clipping."""
    numbers = {}
    for name, part in adapter.named_children():
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        if gradients:
            numbers[f"gradient/{name}"] = float(nn.utils.get_total_norm(gradients))
    return numbers
