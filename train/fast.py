"""Switches of a run over a mostly frozen network: each one changes time or memory, not what is learnt.

All but `int8` are exact: the losses are those of the plain path (tests hold them to 1e-4 and better).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from vlm.errors import ConfigError
from vlm.model import VLM
from vlm.processor import Batch
from vlm.train.config import FastConfig
from vlm.train.lower import LowerStates

Loss = Callable[[Batch, Tensor, float], Tensor]


def prepare(model: VLM, config: FastConfig) -> Loss:
    """Sets the switches on a model; returns its loss, summed over the labels.

    Raises:
        ConfigError: a switch that this model cannot have.
    """
    lowest = 0 if model.adapter.soft_tokens else min(model.adapter.at_layers, default=0)
    model.fused_loss = config.fused_loss
    if config.int8:
        quantise(model.language)
    if config.compile:
        _compile(model, config.compile)
    if config.checkpointing:
        for module in (*model.language.layers[lowest:], *model.adapter.children()):
            for part in module if isinstance(module, nn.ModuleList) else [module]:
                _set_forward(part, partial(checkpoint, part.forward, use_reentrant=False))
    if not config.backward_cut:
        model.language.model.get_input_embeddings().register_forward_hook(_ask_gradient)
    if config.lower_cache:
        LowerStates(model, lowest, config.lower_cache << 20).install()
    return lambda batch, features, smoothing: model.loss(batch, features, smoothing)[0]


def _compile(model: VLM, backend: str) -> None:
    """Compiles the layers' own forward: the hooks in front of them change from call to call."""
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(f"fast.compile: {backend!r} is none of {', '.join(known)}")
    for layer in model.language.layers:
        _set_forward(layer, torch.compile(layer.forward, backend=backend, dynamic=True))


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    object.__setattr__(module, "forward", forward)


def _ask_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


# --- 8 bits ----------------------------------------------------------------------------------------------


class _Int8Product(torch.autograd.Function):
    """x @ (q * scale).T; the wide weight exists only while it is used, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantised: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(quantised, scale)
        return F.linear(x, quantised.to(x.dtype) * scale.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        quantised, scale = ctx.saved_tensors
        return upstream @ (quantised.to(upstream.dtype) * scale.to(upstream.dtype)), None, None


class Int8Linear(nn.Module):
    """A frozen linear layer of 8-bit weights with one scale an output: |error| <= max|row| / 254."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        wide = linear.weight.detach().float()
        scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("weight", (wide / scale).round().to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            product: Tensor = _Int8Product.apply(x, self.weight, self.scale)
        return product if self.bias is None else product + self.bias.to(product.dtype)


def quantise(language: nn.Module) -> None:
    """Puts 8-bit weights into the decoder's layers; embeddings and the vocabulary projection stay.

    Raises:
        ConfigError: the layers hold no `nn.Linear` (GPT-2's are convolutions by name).
    """
    found = 0
    for layer in getattr(language, "layers"):  # noqa: B009
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Int8Linear(child))
                    found += 1
    if not found:
        raise ConfigError("fast.int8: this language model's layers have no linear parts to put into 8 bits")
