"""Typed configuration of the model and of generation; an unknown key is an error, not a surprise."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from vlm.errors import ConfigError

CAPTION_PROMPT = "Describe the picture."
CAPTION_BEAMS = 8
"""Of a caption: guided beams find what fewer miss (docs/log.md)."""
CAPTION_DECODING = MappingProxyType({"num_beams": CAPTION_BEAMS, "max_new_tokens": 32})
"""How captions are measured."""

T = TypeVar("T")


_EXPONENT = re.compile(r"[+-]?\d+e[+-]?\d+", re.IGNORECASE)
"""4e-4, which YAML 1.1 takes for text as it has no point."""


def _check(section: str, **fine: bool) -> None:
    """Raises:
    ConfigError: one of the named conditions does not hold.
    """
    for name, holds in fine.items():
        if not holds:
            raise ConfigError(f"{section}{name} is out of range")


@dataclass(frozen=True)
class VisionConfig:
    """How a picture becomes features: everything here is part of the feature cache's key."""

    encoder: str = "efficientnet-lite2"
    """Encoder id: `efficientnet-lite2`, `timm:NAME`, `open_clip:MODEL` or `open_clip:MODEL/PATH`."""
    size: int = 260
    """Side of the square, in pixels, that the whole picture is resized to (never cropped)."""
    stages: tuple[int, ...] = ()
    """Further, finer stages of a CNN, by index; their maps are folded onto the last map's grid."""

    def __post_init__(self) -> None:
        _check("vision.", size=self.size >= 1)


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
    """Language-model layers that a gated block stands before; []: every second one of the upper three fifths,
    whatever the depth (of 30 layers: the default)."""
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

    def __post_init__(self) -> None:
        sizes = ("width", "latents", "heads", "block_heads", "block_kv_heads", "head_width", "feedforward")
        _check("flamingo.", **{name: getattr(self, name) >= 1 for name in (*sizes, "max_group")})
        _check("flamingo.", depth=self.depth >= 0, dropout=0 <= self.dropout < 1)
        _check("flamingo.", gate_init=math.isfinite(self.gate_init))
        _check("flamingo.", layers=len(set(self.layers)) == len(self.layers))


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

    def __post_init__(self) -> None:
        sizes = ("width", "queries", "depth", "heads", "feedforward", "cross_every")
        _check("qformer.", **{name: getattr(self, name) >= 1 for name in sizes})
        _check("qformer.", dropout=0 <= self.dropout < 1)


@dataclass(frozen=True)
class HintsConfig:
    """The encoder's own words: what its frozen classifier is confident of, told to the language model."""

    count: int = 0
    """At most this many labels an image; 0: none are told."""
    least: float = 0.1
    """Labels below this probability stay untold."""

    def __post_init__(self) -> None:
        _check("hints.", count=self.count >= 0, least=0 <= self.least <= 1)


@dataclass(frozen=True)
class MemoryConfig:
    """What a memory of pictures tells: captions of those most like the picture asked about."""

    count: int = 3
    """At most this many remembered pictures are told of, one caption each."""
    least: float = 0.65
    """Pictures less like it than this cosine stay untold (one pair in a hundred of Flickr8k is above)."""

    def __post_init__(self) -> None:
        _check("memory.", count=self.count >= 1, least=-1 <= self.least <= 1)


@dataclass(frozen=True)
class AbstainConfig:
    """When an adapter says that it cannot tell: below a confidence that `vlm eval calibrate` has fitted."""

    threshold: float
    """Answers of less confidence are not given."""
    task: str
    """What it was fitted on: the task,"""
    split: str
    """its split,"""
    target: float
    """and the accuracy (0 to 1) that the answers given were to have."""
    accuracy: float = 0.0
    """The accuracy that they had there."""
    coverage: float = 1.0
    """The share of questions that were answered there."""

    def __post_init__(self) -> None:
        _check("abstain.", threshold=0 <= self.threshold <= 1, target=0 < self.target <= 1)


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: which frozen parts, and which adapter joins them."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    language_model: str = "smollm2-135m-instruct"
    """Language-model id: `smollm2-135m-instruct`, a local folder, or a hub id."""
    hints: HintsConfig = field(default_factory=HintsConfig)
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
    consensus: float = 2.0
    """Weight of a caption's expected CIDEr (1 is 100 %) beside its mean log-probability, where beams caption
    one picture and the adapter knows what captions say (`vlm train consensus`); 0: log-probability alone.
    Where a captioner speaks it counts in proportion to the language model's share."""
    captioner: float = 0.5
    """Share of the adapter's captioner (`vlm train captioner`) in a token's log-probability, where beams
    caption one picture; 0: the language model alone."""
    known_answers: float = 6.0
    """Nats by which an answer rises when it is expected e times as much, where the adapter knows answers
    (`vlm train answers`), one question is asked about one picture, and decoding is greedy; 0: not at all."""
    batch_size: int = 16
    """Conversations decoded together."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "num_beams": self.num_beams >= 1,
            "temperature": 0 <= self.temperature < math.inf,
            "top_p": 0 < self.top_p <= 1,
            "seed": self.seed is None or -(2**63) <= self.seed < 2**64,
            "length_penalty": -10 <= self.length_penalty <= 10,
            "consensus": 0 <= self.consensus < math.inf,
            "captioner": 0 <= self.captioner <= 1,
            "known_answers": 0 <= self.known_answers <= 1000,
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
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where.rstrip('.') or 'the configuration'} must be a mapping, not {values!r}")
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    types = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in known:
            raise ConfigError(f"unknown key {name!r}; {where or 'here'} may hold: {', '.join(sorted(known))}")
        arguments[key] = _typed(types[key], value, name)
    return cls(**arguments)


def _typed(kind: Any, value: Any, name: str) -> Any:
    """`value` as a field of this type holds it: YAML and JSON have lists for tuples and 1 for 1.0."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and not isinstance(value, kind):
        return from_dict(kind, value, f"{name}.")
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} must be a list, not {value!r}")
        return tuple(_typed(get_args(kind)[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    options = get_args(kind) or (kind,)
    if int in options and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)  # numpy's integers too
    if float in options and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if float in options and isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    if type(value) not in options:
        names = " or ".join("nothing" if option is type(None) else option.__name__ for option in options)
        raise ConfigError(f"{name} must be {names}, not {value!r}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """The plain values of a config, as `from_dict` takes them (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    result = plain(config)
    assert isinstance(result, dict)
    return result


def flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted keys: {"hashes": {"data": 1}} -> {"hashes.data": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found
