"""What a recipe may say; a key that is not here is an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.config import ModelConfig, from_dict
from vlm.errors import ConfigError


@dataclass(frozen=True)
class SourceConfig:
    """One data set among those that a run learns from."""

    name: str = ""
    """A known set (`flickr8k`, `daquar`, `easy-vqa`), or a folder in any layout that `vlm data check` reads."""
    split: str = "train"
    """Which part of it."""
    questions: bool = False
    """Learn the questions that can be made from the captions, instead of the captions."""
    per_image: int = 5
    """At most this many answers a picture and epoch."""
    weight: float = 1.0
    """Weight of its tokens in the loss."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up, then a constant rate, then a fall to `final` of it."""

    lr: float = 1e-3
    """Highest learning rate."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: float = 1.0
    """Share of the steps over which the rate falls along a half cosine (1: from the warm-up's end on)."""
    final: float = 0.02
    """The last rate, as a share of the highest."""
    gate_lr: float = 1.0
    """Factor on the learning rate of the tanh gates."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; vectors and gates have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's averaging rates."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    average: float = 0.0
    """Rate of an exponential moving average of the weights (0.998, say), which is what is saved; 0: none."""


@dataclass(frozen=True)
class TrainConfig:
    """A recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    start: str = ""
    """Adapter to start from (`default`, or a folder); its sizes replace `model`. Empty: a fresh one."""
    sources: tuple[SourceConfig, ...] = ()
    """What to learn from."""
    data: str = ""
    """Folder of the data (`data=DIR` on the command line)."""
    out: str = "runs/adapter"
    """Folder of the adapter and its training state."""
    steps: int = 1000
    """Optimizer steps."""
    batch: int = 12
    """Pictures a step; everything drawn for a picture shares one row."""
    micro: int = 0
    """Pictures a forward pass; 0: the whole batch at once."""
    objective: str = "likelihood"
    """`likelihood`, or `cider`: besides the sources' answers, captions sampled and rewarded by CIDEr."""
    samples: int = 5
    """Captions sampled a picture, where the objective is `cider`."""
    flip: float = 0.5
    """Share of pictures seen mirrored (never those whose words say left or right)."""
    smoothing: float = 0.0
    """Label smoothing."""
    precision: str = "float32"
    """`float32`, or `bf16`: the frozen matrices and their products in bfloat16, everything else float32."""
    seed: int = 0
    """Of initial weights, order, drawing, dropout."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    save_every: int = 200
    """Steps between saves of the training state."""
    keep: int = 2
    """Saved states that are kept."""
    log_every: int = 10
    """Steps between lines of the log."""
    feature_cache: str = ""
    """Folder of the feature cache; empty: the user's cache folder."""
    note: str = ""
    """A sentence for the model card."""

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bf16"):
            raise ConfigError(f"precision {self.precision!r} is neither float32 nor bf16")
        if self.objective not in ("likelihood", "cider"):
            raise ConfigError(f"objective {self.objective!r} is neither likelihood nor cider")
        if self.objective == "cider" and self.samples < 2:
            raise ConfigError("the objective cider compares samples: samples must be at least 2")
        if self.steps < 1 or self.batch < 1 or self.micro < 0:
            raise ConfigError("steps and batch must be at least 1, micro at least 0")


def recipe_config(values: dict[str, Any]) -> TrainConfig:
    """A recipe's plain values as a `TrainConfig`.

    Raises:
        ConfigError: an unknown key or a value of the wrong type.
    """
    values = dict(values)
    sources = values.pop("sources", [])
    if not isinstance(sources, list):
        raise ConfigError("sources must be a list")
    parsed = tuple(from_dict(SourceConfig, s, f"sources[{i}].") for i, s in enumerate(sources))
    config = from_dict(TrainConfig, values)
    return TrainConfig(**{**vars(config), "sources": parsed})


def recipe_path(name: str) -> Path:
    """A recipe's file: a path, or the name of one that ships.

    Raises:
        ConfigError: neither.
    """
    shipped = Path(__file__).parent / "recipes"
    for path in (Path(name), shipped / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
    raise ConfigError(f"{name} is no recipe: give a YAML file or one of {known}")
