"""The optimizer, its learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlm.train.config import OptimConfig


def build_optimizer(adapter: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the adapter: matrices decay, vectors do not, gates have a rate of their own."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "gates": []}
    for name, parameter in adapter.named_parameters():
        # A block's `gate.weight` is a matrix of its feed-forward; only the scalars are gates.
        kind = "gates" if name.endswith("_gate") else "matrices" if parameter.ndim > 1 else "vectors"
        groups[kind].append(parameter)
    factors = {"matrices": 1.0, "vectors": 1.0, "gates": config.gate_lr}
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if kind == "matrices" else 0.0,
                "lr": config.lr * factors[kind],
                "factor": factors[kind],
            }
            for kind, parameters in groups.items()
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
