"""The trainable part between the frozen encoder and the frozen language model.

A further adapter is one file here and one line in `REGISTRY`.
"""

from __future__ import annotations

from vlm.adapters.base import Adapter, Conditioning, ImageLayout
from vlm.adapters.flamingo import FlamingoAdapter
from vlm.adapters.qformer import QFormerAdapter
from vlm.config import ModelConfig
from vlm.errors import ConfigError

REGISTRY: dict[str, type[Adapter]] = {"flamingo": FlamingoAdapter, "qformer": QFormerAdapter}

__all__ = ["REGISTRY", "Adapter", "Conditioning", "ImageLayout", "build_adapter"]


def build_adapter(
    config: ModelConfig, *, features: int, positions: int, hidden: int, num_layers: int
) -> Adapter:
    """A fresh adapter between (N=`positions`, D_v=`features`) image features and a model of width `hidden`.

    Raises:
        ConfigError: an unknown adapter, or sizes that do not fit the frozen parts.
    """
    if config.adapter not in REGISTRY:
        raise ConfigError(f"unknown adapter {config.adapter!r}: one of {', '.join(REGISTRY)}")
    sizes = getattr(config, config.adapter)
    return REGISTRY[config.adapter](
        sizes, features=features, positions=positions, hidden=hidden, num_layers=num_layers
    )
