"""Linear layers whose weights lie as the processor's matrix kernels want them.

PyTorch's float32 product lays a weight out anew at every call, which for a few dozen rows costs as much as
the product. Laid out once (oneDNN's packed format) and kept beside the plain weight, the wide layers take
half the time; the plain weight goes on to serve gradients, saving and every other device and precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """A linear layer with a packed copy of its weight, read where no gradient is asked for.

    The copy is made once: the weight must not change afterwards.
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self.train(plain.training)
        rows = 64  # oneDNN chooses the layout for about so many; every number works
        self.packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), rows)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or input.dtype != torch.float32 or input.device.type != "cpu":
            return super().forward(input)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")
        return out


def pack(module: nn.Module) -> int:
    """Packs the float32 layers on the CPU that are wider than their input; returns how many there are.

    The others gain nothing. Where this build of PyTorch has no oneDNN, none is packed.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    packed = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and _gains(child):
                setattr(parent, name, PackedLinear(child))
                packed += 1
    return packed


def _gains(layer: nn.Linear) -> bool:
    weight = layer.weight
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and layer.out_features > layer.in_features
