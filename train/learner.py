"""A small network that learns on a CPU: AdamW, an average of the weights, bfloat16 where that is faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vlm.train.precision import multiplies_bf16


class Learner:
    """A network in training.

    Args:
        average: what stays of the weights' average at each step.
        decay, betas: of AdamW.
    """

    def __init__(
        self, net: nn.Module, average: float, decay: float, betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        self._net = net.train()
        self._mean = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(average))
        self._optimizer = torch.optim.AdamW(net.parameters(), weight_decay=decay, betas=betas)
        self._half = multiplies_bf16(torch.device("cpu"))

    def autocast(self) -> torch.autocast:
        """What the forward pass is to be computed in."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self._half)

    def learn(self, loss: Tensor, rate: float, longest: float = 0.0) -> None:
        """One step.

        Args:
            longest: the gradient is cut to this length; 0: not at all.
        """
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.zero_grad()
        loss.backward()
        if longest:
            nn.utils.clip_grad_norm_(self._net.parameters(), longest)
        self._optimizer.step()
        self._mean.update_parameters(self._net)

    def finish(self) -> None:
        """Gives the network the average of its weights, and ends its training."""
        self._net.load_state_dict(self._mean.module.state_dict())
        self._net.eval()
