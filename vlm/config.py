"""Typed configuration of the model and of generation; an unknown key is an error, not a surprise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vlm.errors import ConfigError

CAPTION_PROMPT = "Describe the picture."

T = TypeVar("T")


@dataclass(frozen=True)
class VisionConfig:
    """How a picture becomes features: everything here is part of the feature cache's key."""

    encoder: str = "efficientnet-lite2"
    """Encoder id: `efficientnet-lite2`, `timm:NAME`, `open_clip:MODEL` or `open_clip:MODEL/PATH`."""
    size: int = 260
    """Side of the square, in pixels, that the whole picture is resized to (never cropped)."""
    stages: tuple[int, ...] = ()
    """Further, finer stages of a CNN, by index; their maps are folded onto the last map's grid."""


@dataclass(frozen=True)
class FlamingoConfig:
    """Perceiver resampler and gated cross-attention blocks (Alayrac et al. 2022)."""

    width: int = 384
    """Width of the resampler's latents."""
    latents: int = 32
    """Latents an image becomes."""
    depth: int = 2
    """Resampler layers."""
    heads: int = 6
    """Resampler attention heads."""
    layers: tuple[int, ...] = (12, 14, 16, 18, 20, 22, 24, 26, 28)
    """Language-model layers that a gated block stands before."""
    block_heads: int = 9
    """Query heads of a gated block."""
    block_kv_heads: int = 3
    """Key/value heads of a gated block; each serves `block_heads / block_kv_heads` query heads."""
    head_width: int = 64
    """Width of one of a gated block's heads."""
    feedforward: int = 512
    """Inner width of a gated block's feed-forward."""
    gate_init: float = 0.0
    """Start of the tanh gates; at 0 the model starts as exactly the frozen language model."""
    dropout: float = 0.0
    """Dropout on residual branches of resampler and blocks, and on image tokens (whole tokens)."""
    max_group: int = 8
    """Images that may stand side by side in one group, each with a learned index."""


@dataclass(frozen=True)
class QFormerConfig:
    """Query transformer (Li et al. 2023) whose outputs stand in the text as soft tokens."""

    width: int = 384
    """Width of the queries."""
    queries: int = 16
    """Learned queries, and soft tokens, per image."""
    depth: int = 6
    """Layers."""
    heads: int = 6
    """Attention heads."""
    feedforward: int = 1536
    """Inner width of the feed-forward."""
    cross_every: int = 2
    """Every how many layers the queries look at the image (from the first layer on)."""
    question_aware: bool = False
    """Queries also attend to the question's words (InstructBLIP, Dai et al. 2023)."""
    dropout: float = 0.0
    """Dropout on residual branches and on image tokens (whole tokens)."""


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: which frozen parts, and which adapter joins them."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    language_model: str = "smollm2-135m-instruct"
    """Language-model id: `smollm2-135m-instruct`, a local folder, or a hub id."""
    adapter: str = "flamingo"
    """`flamingo` or `qformer`: the section of this name holds its sizes."""
    flamingo: FlamingoConfig = field(default_factory=FlamingoConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)


@dataclass(frozen=True)
class GenerationConfig:
    """How an answer is decoded."""

    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    num_beams: int = 1
    """Beams of beam search; 1 is greedy or sampling."""
    temperature: float = 0.0
    """0 is greedy; otherwise the sampling temperature."""
    top_p: float = 1.0
    """Nucleus of sampling: the smallest set of tokens with this probability."""
    seed: int | None = None
    """Seed of sampling; with one, the same request gives the same answer."""
    stop: tuple[str, ...] = ()
    """Texts at which the answer ends (they are not part of it)."""
    length_penalty: float = 1.0
    """Beam scores are divided by length to this power."""
    batch_size: int = 16
    """Conversations decoded together."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "num_beams": self.num_beams >= 1,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "batch_size": self.batch_size >= 1,
        }
        for name, fine in checks.items():
            if not fine:
                raise ConfigError(f"{name}={getattr(self, name)} is out of range")
        if self.num_beams > 1 and self.temperature > 0:
            raise ConfigError("beam search does not sample: set temperature=0 or num_beams=1")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Builds a (nested) config dataclass from plain values.

    Raises:
        ConfigError: a key that the dataclass does not have, or a value of the wrong type.
    """
    defaults = cls()
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in known:
            raise ConfigError(f"unknown key {name!r}; {where or 'here'} may hold: {', '.join(sorted(known))}")
        default = getattr(defaults, key)
        if dataclasses.is_dataclass(default) and isinstance(value, Mapping):
            value = from_dict(type(default), value, f"{name}.")
        elif isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if default is not None and not isinstance(value, type(default)):
            raise ConfigError(f"{name} must be {type(default).__name__}, not {value!r}")
        arguments[key] = value
    return cls(**arguments)


def to_dict(config: Any) -> dict[str, Any]:
    """The plain values of a config, as `from_dict` takes them (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    result = plain(config)
    assert isinstance(result, dict)
    return result
