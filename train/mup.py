"""Learning rates that carry over from a narrow adapter to a wide one: muP (Yang et al. 2022).

"Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer", Table 3, its column
for Adam. `optim.mup_base` is the width at which the recipe's rates are right; m is how many times more inputs
a matrix has than it would have at that width. Only the adapter's inner widths grow (the latents', the
queries', the feed-forwards'): the encoder and the language model are frozen, so what reads them, or is read
by them, has one end that never does.

| tensors | inputs | outputs | learning rate | first weights | decay |
| --- | --- | --- | --- | --- | --- |
| hidden: a resampler's and a Q-Former layer's matrices | inner | inner | 1/m | 1/sqrt(m) | m |
| output: a block's `key`, `value`, `down`; `project`; the word head | inner | fixed | 1/m | 1/m | m |
| input: what reads features or words, a block's `gate` and `up` | fixed | inner | 1 | 1 | 1 |
| fixed: a block's `query` and `output` | fixed | fixed | 1 | 1 | 1 |
| latents, queries, positions, norms, biases, tanh gates | one | any | 1 | 1 | 1 |

- Factors are found, not listed: the adapter is drawn again at the base width, on the `meta` device, and every
  linear layer's inputs and outputs are compared. A further adapter needs nothing of its own.
- At the base width every factor is 1, and the run is that of the recipe without muP, to the last bit.
- An output matrix is made small and learns slowly, where the paper's Table 8 divides its product by m: for
  Adam the same, and the adapter keeps no multiplier: asking, serving and averaging know nothing of it.
- The width of a head stays and their number grows, so attention keeps its 1/sqrt(d).
- AdamW's decay is multiplied by the rate; the factor m undoes that, and what a step takes off stays the same.
- An adapter that a run starts from keeps its weights; its rates are scaled all the same.
- Adam's epsilon (1e-8) stays. A matrix whose gradients are as small as that moves less the wider it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vlm.adapters import Adapter
from vlm.config import ModelConfig
from vlm.errors import ConfigError
from vlm.model import VLM, fresh_adapter


@dataclass(frozen=True)
class Scale:
    """Factors on one matrix, relative to the base width.

    Attributes:
        rate: on its learning rate; its weight decay is divided by it.
        init: on its first weights.
    """

    rate: float
    init: float


PLAIN = Scale(1.0, 1.0)


def at_width(config: ModelConfig, width: int) -> ModelConfig:
    """The configuration with its adapter's inner widths in proportion, and heads as wide as they were.

    Raises:
        ConfigError: the heads would not come out whole.
    """
    sizes: Any = getattr(config, config.adapter)
    if width == sizes.width:
        return config
    head = sizes.width // sizes.heads
    if width < 1 or width % head:
        raise ConfigError(
            f"width {width} does not hold whole heads: {config.adapter}.width is {sizes.width} with "
            f"{sizes.heads} heads, so it may be any multiple of {head}"
        )
    inner = max(1, round(sizes.feedforward * width / sizes.width))
    made = replace(sizes, width=width, heads=width // head, feedforward=inner)
    return replace(config, **{config.adapter: made})


def scales(model: VLM, base: int) -> dict[str, Scale]:
    """The factors of the adapter's matrices, by parameter name; those not named here have none.

    Args:
        base: width at which every factor is 1; 0: no factors at all.

    Raises:
        ConfigError: a base width that the adapter cannot have.
    """
    if not base:
        return {}
    small = _base(model, base)
    found = {}
    for name, layer in model.adapter.named_modules():
        if isinstance(layer, nn.Linear):
            other = small.get_submodule(name)
            assert isinstance(other, nn.Linear)
            scale = _scale(layer.in_features / other.in_features, layer.out_features / other.out_features)
            if scale != PLAIN:
                found[f"{name}.weight"] = scale
    return found


def latents_scale(model: VLM, base: int) -> Scale:
    """The factors of a matrix with fixed outputs that reads the latents, as the head of words does."""
    if not base:
        return PLAIN
    with torch.device("meta"), torch.no_grad():
        shown = torch.zeros(1, model.encoder.tokens, model.encoder.width)
        small = _base(model, base).eval().encode(shown).shape[2]
        wide = _drawn(model, model.config).eval().encode(shown).shape[2]
    return _scale(wide / small, 1.0)


def initialise(adapter: nn.Module, found: Mapping[str, Scale]) -> None:
    """Gives a fresh adapter the first weights that its width asks for."""
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name in found:
                parameter.mul_(found[name].init)


def _scale(inputs: float, outputs: float) -> Scale:
    """Of a matrix with `inputs` and `outputs` times as many as at the base width."""
    return Scale(1 / inputs, 1 / inputs if outputs == 1 else inputs**-0.5)


def _base(model: VLM, width: int) -> Adapter:
    return _drawn(model, at_width(model.config, width))


def _drawn(model: VLM, config: ModelConfig) -> Adapter:
    """The adapter by its shapes alone; no random number is used up."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return fresh_adapter(config, model.encoder, model.language)
