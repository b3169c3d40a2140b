"""Which arithmetic a run computes in: bfloat16 pays only where the processor multiplies it."""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "float32", "bf16")


def in_bf16(precision: str, device: torch.device) -> bool:
    """Whether a run of this `precision` computes in bfloat16; `auto` takes what is fastest on the device."""
    return multiplies_bf16(device) if precision == "auto" else precision == "bf16"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself; to imitate it takes far longer than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False  # without oneDNN (on a Mac) even processors that could do not
    # An older torch cannot tell.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has is True and "bf16" in name for name, has in capabilities.items())
