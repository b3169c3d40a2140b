"""What a recipe may say; a key that is not here is an error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from vlm.config import ModelConfig, from_dict
from vlm.errors import ConfigError
from vlm.train.precision import PRECISIONS

OBJECTIVES = ("likelihood", "cider", "words", "preference")


SEEDS = 1 << 31
"""Seeds lie below: every generator takes them, with a process's number added."""


def _require(name: str, value: object, what: str, fine: bool) -> None:
    """Raises:
    ConfigError: a value that is not `fine`.
    """
    if not fine:
        raise ConfigError(f"{name} must be {what}, not {value}")


@dataclass(frozen=True)
class SourceConfig:
    """One data set among those that a run learns from."""

    name: str = ""
    """A known set, `shapes` (drawn here), or anything `vlm data check` reads; empty: what `data` names."""
    split: str = "train"
    """Which part of it."""
    questions: bool = False
    """Learn the questions that can be made from the captions, instead of the captions."""
    per_image: int = 5
    """At most this many answers a picture and epoch."""
    weight: float = 1.0
    """Weight of its tokens in the loss; at 0 it is left out. `per_image` says how much of it is drawn."""
    limit: int = 0
    """Only the first so many pictures; 0: all."""

    def __post_init__(self) -> None:
        _require("sources: per_image", self.per_image, "at least 1", self.per_image >= 1)
        _require("sources: limit", self.limit, "at least 0", self.limit >= 0)
        _require("sources: weight", self.weight, "at least 0", 0 <= self.weight < math.inf)


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
    """What the rate falls towards, as a share of the highest."""
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
    mup_base: int = 0
    """Adapter width at which these rates are right; at others they are carried over by muP (0: taken as they
    are)."""

    def __post_init__(self) -> None:
        _require("optim.lr", self.lr, "above 0", 0 < self.lr < math.inf)
        _require("optim.gate_lr", self.gate_lr, "at least 0", 0 <= self.gate_lr < math.inf)
        _require("optim.clip", self.clip, "above 0", self.clip > 0)
        _require("optim.weight_decay", self.weight_decay, "at least 0", 0 <= self.weight_decay < math.inf)
        _require("optim.warmup", self.warmup, "at least 0", self.warmup >= 0)
        _require("optim.mup_base", self.mup_base, "at least 0", self.mup_base >= 0)
        for name in ("decay", "final"):
            share = getattr(self, name)
            _require(f"optim.{name}", share, "within 0..1", 0 <= share <= 1)
        _require("optim.average", self.average, "at least 0 and below 1", 0 <= self.average < 1)
        fine = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require("optim.betas", list(self.betas), "two numbers, at least 0 and below 1", fine)


@dataclass(frozen=True)
class WordsConfig:
    """A first stage in which the adapter's image side learns the answers' words (`objective: words`)."""

    steps: int = 0
    """Its steps; 0: none."""
    batch: int = 64
    """Pictures a step."""
    warmup: int = 50
    """Steps of linear warm-up; the rate is the main stage's, and falls to the end."""
    rarest: int = 8
    """Pictures that a word must be said of, to be learnt."""

    def __post_init__(self) -> None:
        _require("words.steps", self.steps, "at least 0", self.steps >= 0)
        _require("words.batch", self.batch, "at least 1", self.batch >= 1)
        _require("words.warmup", self.warmup, "at least 0", self.warmup >= 0)
        _require("words.rarest", self.rarest, "at least 1", self.rarest >= 1)


@dataclass(frozen=True)
class HintsTraining:
    """How a run treats the encoder's labels, where the model is told them (`model.hints.count`)."""

    drop: float = 0.2
    """Share of pictures without hints in an epoch."""
    swap: float = 0.1
    """Share of pictures with the hints of another."""
    foreign: float = 0.0
    """Share of pictures that are told one label of all that the encoder knows, as if it were sure, and asked
    after its name alone."""
    naming: float = 0.0
    """Share of pictures that are also asked what they show, or which animal, vehicle ... it is; the answer is
    the encoder's first label. Common labels are asked after less than this, rare ones more."""
    sure: float = 0.3
    """A naming question needs a label at least this probable."""
    weight: float = 1.0
    """Weight of a naming answer's tokens in the loss."""


@dataclass(frozen=True)
class FastConfig:
    """What a mostly frozen network allows; each is a switch, so that its gain can be measured."""

    shared_rows: bool = True
    """Everything said of a picture shares one row, one beginning and one set of latents."""
    fused_loss: bool = True
    """The vocabulary projection and its gradient chunk by chunk, never all the logits at once."""
    length_groups: bool = True
    """Rows of like length share a batch."""
    backward_cut: bool = True
    """No gradient below the lowest trained layer."""
    lower_cache: int = 0
    """Megabytes for the hidden states below the lowest gated block, which depend on text alone; 0: none."""
    int8: bool = False
    """The frozen language model's matrices in 8 bits: a quarter of the memory, slower, not exact."""
    checkpointing: bool = False
    """Recompute the language model's activations in the backward pass instead of keeping them."""
    compile: str = ""
    """Compile the language model's layers with this torch backend (`inductor`)."""


@dataclass(frozen=True)
class TrainConfig:
    """A recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    start: str = ""
    """Adapter to start from (`default`, or a folder); its sizes replace `model`. Empty: a fresh one."""
    size: int = 0
    """Side in pixels that pictures are resized to, where it is not that of `start`, whose positions are
    interpolated; 0: as it is."""
    dropout: float | None = None
    """Dropout of the adapter while it learns; empty: as its sizes say."""
    sources: tuple[SourceConfig, ...] = ()
    """What to learn from."""
    stream: bool = False
    """Read the one source, which is in shards, while training: every process its own share, nothing held."""
    data: str = ""
    """Folder of the data (`data=DIR` on the command line); preference pairs, or a feedback database."""
    out: str = "runs/adapter"
    """Folder of the adapter and its training state."""
    steps: int = 1000
    """Optimizer steps."""
    batch: int = 12
    """Pictures a step; everything drawn for a picture shares one row."""
    micro: int = 0
    """Pictures a forward pass; 0: as many of the batch as memory holds."""
    objective: str = "likelihood"
    """`likelihood`; `cider`: besides the sources' answers, captions sampled and rewarded by CIDEr; `words`:
    the answers' words alone, learnt without the language model; `preference`: of two answers to prefer the
    one that people did."""
    words: WordsConfig = field(default_factory=WordsConfig)
    samples: int = 5
    """Captions sampled a picture, where the objective is `cider`."""
    temperature: float = 1.0
    """Temperature that they are sampled at: below 1 they are nearer to what decoding will say."""
    beta: float = 0.1
    """How closely the adapter is held to the one it starts from, where the objective is `preference`."""
    holdout_captions: str = ""
    """A captioned data set that 100 pictures are described of before and after (objective `preference`)."""
    flip: float = 0.5
    """Share of pictures seen mirrored, left and right in their words exchanged (never those where a left or
    right may be no side)."""
    smoothing: float = 0.0
    """Label smoothing."""
    precision: str = "float32"
    """`float32`; `bf16`: the frozen matrices and their products in bfloat16, everything else float32; `auto`:
    `bf16` where the processor multiplies bfloat16, else `float32`."""
    seed: int = 0
    """Of initial weights, order, drawing, dropout."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    hints: HintsTraining = field(default_factory=HintsTraining)
    holdout: float = 0.0
    """Share of the pictures that is set aside and asked before and after training."""
    answers: bool = False
    """At the end learn which answers are right (`vlm train answers`), and keep that if more questions about
    the pictures set aside are answered right with it."""
    dev: int = 0
    """Pictures that are set aside for their loss at the run's end (`dev.json`): the same ones for every seed
    and every number of `pictures`."""
    pictures: int = 0
    """Learn so many of the other pictures; those of a smaller number are among a larger one's. 0: all."""
    fast: FastConfig = field(default_factory=FastConfig)
    save_every: int = 200
    """Steps between saves of the training state."""
    keep: int = 2
    """Saved states that are kept."""
    log_every: int = 10
    """Steps between lines of the log."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers of accelerate (`tensorboard`, `wandb`, ...); [] for none."""
    feature_cache: str = ""
    """Folder of the feature cache; empty: the user's cache folder."""
    note: str = ""
    """A sentence for the model card."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective {self.objective!r} is none of {', '.join(OBJECTIVES)}")
        if self.objective == "cider" and self.samples < 2:
            raise ConfigError("the objective cider compares samples: samples must be at least 2")
        if not 0 < self.temperature < math.inf:
            raise ConfigError("temperature must be above 0")
        _require("out", repr(self.out), "the name of a folder", bool(self.out.strip()))
        weighed = bool(self.learnt) or not self.sources
        _require("sources: weight", 0, "above 0 in at least one of them", weighed)
        _require("seed", self.seed, f"at least 0 and below {SEEDS}", 0 <= self.seed < SEEDS)
        _require("fast.lower_cache", self.fast.lower_cache, "at least 0", self.fast.lower_cache >= 0)
        self._check_preference()
        self._check_stream()
        if self.steps < 1 or self.batch < 1 or self.micro < 0:
            raise ConfigError("steps and batch must be at least 1, micro at least 0")
        if self.save_every < 1 or self.keep < 1 or self.log_every < 1:
            raise ConfigError("save_every, keep and log_every must be at least 1")
        if min(self.dev, self.pictures) < 0:
            raise ConfigError("dev and pictures must be at least 0")
        if self.dev and self.objective == "preference":
            raise ConfigError("dev is the loss of answers: the objective preference has holdout")
        if self.size < 0:
            raise ConfigError("size must be a number of pixels, or 0")
        if self.size and not self.start:
            raise ConfigError("size is for an adapter to start from: a fresh one has model.vision.size")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ConfigError("dropout must be at least 0 and below 1")
        if not 0 <= self.flip <= 1 or not 0 <= self.smoothing < 1 or not 0 <= self.holdout < 1:
            raise ConfigError("flip must lie within 0..1; smoothing and holdout below 1")
        told = self.hints
        drawn = (told.drop, told.swap, told.foreign)
        _require("hints.weight", told.weight, "above 0", 0 < told.weight < math.inf)
        if min(drawn) < 0 or sum(drawn) > 1 or not 0 <= told.naming <= 1:
            raise ConfigError(
                "hints: drop, swap, foreign and naming are shares, the first three at most 1 in all"
            )

    @property
    def learnt(self) -> tuple[SourceConfig, ...]:
        """The sources that are not left out."""
        return tuple(source for source in self.sources if source.weight)

    def _check_stream(self) -> None:
        if not self.stream:
            return
        if self.objective != "likelihood" or self.words.steps:
            raise ConfigError("stream goes with the objective likelihood, and without words.steps")
        if len(self.sources) > 1 or any(source.questions or source.limit for source in self.sources):
            raise ConfigError("stream reads one source, without questions or limit")
        if self.holdout or self.dev or self.pictures or self.answers:
            raise ConfigError("stream sets nothing aside: holdout, dev and pictures must be 0, answers false")

    def _check_preference(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError("beta must be above 0")
        if self.objective != "preference":
            if self.holdout_captions:
                raise ConfigError("holdout_captions is for the objective preference alone")
            return
        if not self.start:
            raise ConfigError("the objective preference changes a trained adapter: say start=ADAPTER")
        if self.sources or self.words.steps:
            raise ConfigError(
                "preference learns the pairs that data names: it has no sources and no words.steps"
            )


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
