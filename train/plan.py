"""`vlm train plan`: what a recipe will take on one GPU, from shapes alone, before anything is downloaded.

vlm train plan flickr8k-larger
vlm train plan flickr8k-larger model.language_model=Qwen/Qwen3-0.6B --machine rtx4090
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.adapters import ImageLayout
from vlm.checkpoint import adapter_folder, model_config, read_config
from vlm.errors import ConfigError
from vlm.losses import CHUNK
from vlm.model import VLM
from vlm.options import add_offline, make_parser
from vlm.processor import Batch
from vlm.train.blueprint import blueprint
from vlm.train.config import TrainConfig
from vlm.train.preflight import SHARE, duration
from vlm.train.recipe import read_recipe
from vlm.train.roofline import MACHINES, Kept, Machine, Roofline

FRAME, ANSWER = 14, 14
"""Tokens of a prompt with its frame, and of an answer with its end: a caption of Flickr8k has 13."""
TRAINED = 16
"""Bytes a trained parameter takes: itself, its gradient and AdamW's two averages, in float32."""
ENCODED = 32
"""Pictures that a GPU encodes together."""


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on one machine.

    Attributes:
        encoder, language, trained: parameters.
        tokens, width: of a picture's features.
        feature_bytes: of a picture in the feature cache, float16.
        at_layers: language-model layers with a gated block before them.
        row: tokens of a picture's row, its answers and soft tokens together.
        encoder_flops: a picture, once. `forward_flops`, `flops`: a picture's row, forward; and with backward.
        token_flops: of the language model, a token, forward.
        frozen_bytes, trained_bytes, kept_bytes: of weights; of weights, gradient and optimizer; of what a
            picture's row keeps for the backward pass (in float32: an upper bound).
        micro: pictures a pass. `memory`: bytes at the peak.
        step_seconds, seconds: of one step of the main stage, of all; `encode_seconds`: of 1,000 pictures.
    """

    machine: str
    encoder: int
    language: int
    trained: int
    tokens: int
    width: int
    feature_bytes: int
    at_layers: tuple[int, ...]
    num_layers: int
    row: int
    encoder_flops: float
    token_flops: float
    forward_flops: float
    flops: float
    frozen_bytes: int
    trained_bytes: int
    kept_bytes: int
    micro: int
    memory: int
    fits: bool
    step_seconds: float
    seconds: float
    encode_seconds: float


def make_plan(config: TrainConfig, machine: str = "a100", *, offline: bool = False) -> Plan:
    """Counts one micro-batch of the recipe's own model (`with_start`) on the `meta` device.

    Raises:
        ConfigError: sizes that do not fit, or an objective whose steps are not those of `likelihood`.
        WeightsError: a frozen part that nothing is known of.
    """
    if config.objective != "likelihood":
        raise ConfigError(
            f"the objective {config.objective} cannot be planned: its steps are of another kind"
        )
    model = blueprint(config.model, offline=offline)
    there = MACHINES[machine]
    bf16 = config.precision == "bf16" or (config.precision == "auto" and there.bf16 > there.float32)
    answers = sum(source.per_image for source in config.learnt)
    text = FRAME + ANSWER * answers
    one = _Work(model, text, answers * ANSWER, 1)
    kept = one.kept()
    forward, whole = one.count(there, bf16, backward=False), one.count(there, bf16)
    trained = sum(p.numel() for p in model.trainable())
    average = 4 if config.optim.average else 0
    frozen_bytes, trained_bytes = frozen_memory(model, bf16), trained * (TRAINED + average)
    # The logits of a chunk, their gradient and the probabilities.
    standing = frozen_bytes + trained_bytes + 3 * 4 * CHUNK * model.language.vocabulary
    micro = config.micro or config.batch
    while not config.micro and micro > 1 and micro * kept > SHARE * (there.memory - standing):
        micro = -(-micro // 2)
    step = _Work(model, text, answers * ANSWER, micro).count(there, bf16).seconds * config.batch / micro
    encode = _encode(model, there)
    memory = standing + micro * kept
    return Plan(
        machine=machine,
        encoder=_size(model.encoder),
        language=_size(model.language),
        trained=trained,
        tokens=model.encoder.tokens,
        width=model.encoder.width,
        feature_bytes=2 * model.encoder.tokens * model.encoder.width,
        at_layers=model.adapter.at_layers,
        num_layers=model.language.num_layers,
        row=one.length,
        encoder_flops=encode.flops / ENCODED,
        token_flops=2.0 * _products(model.language),
        forward_flops=forward.flops,
        flops=whole.flops,
        frozen_bytes=frozen_bytes,
        trained_bytes=trained_bytes,
        kept_bytes=kept,
        micro=micro,
        memory=memory,
        fits=memory < there.memory,
        step_seconds=step,
        seconds=step * config.steps,
        encode_seconds=encode.seconds / ENCODED * 1000,
    )


def with_start(config: TrainConfig, *, offline: bool = False) -> TrainConfig:
    """The recipe with the model that it trains, where that is the one of an adapter to start from.

    Raises:
        WeightsError: there is no such adapter.
    """
    if not config.start:
        return config
    folder = adapter_folder(config.start, offline=offline)
    model = model_config(folder, read_config(folder))
    if config.size:
        model = replace(model, vision=replace(model.vision, size=config.size))
    return replace(config, model=model)


class _Work:
    """A micro-batch of `pictures` rows of `text` tokens, `labels` of them learnt."""

    def __init__(self, model: VLM, text: int, labels: int, pictures: int) -> None:
        self.model, self.labels, self.pictures = model, labels, pictures
        soft = model.adapter.soft_tokens
        self.length = text + soft
        with torch.device("meta"):
            here = torch.zeros(pictures, self.length, dtype=torch.long)
            place = torch.zeros(pictures, 1, dtype=torch.long)
            words = (
                (here[:, :ANSWER], here[:, :ANSWER] == 0) if model.adapter.question_aware else (None, None)
            )
            self.batch = Batch(
                ids=here,
                soft_index=here,
                positions=here,
                mask=torch.ones(pictures, self.length, self.length, dtype=torch.bool),
                groups=here,
                layout=ImageLayout(place, place, place),
                label_nodes=here[0],
                labels=torch.zeros(pictures * labels, dtype=torch.long),
                label_weights=torch.zeros(pictures * labels),
                question_ids=words[0],
                question_mask=words[1],
            )
            self.features = torch.zeros(pictures, model.encoder.tokens, model.encoder.width)

    def hidden(self) -> Tensor:
        return self.model.hidden(self.batch, self.model.condition(self.batch, self.features))

    def kept(self) -> int:
        """Bytes that the backward pass needs; the fused loss keeps no logits."""
        self.model.train()
        with torch.device("meta"), Kept(self.model.parameters()) as kept:
            self.hidden()
        return kept.bytes

    def count(self, machine: Machine, bf16: bool, *, backward: bool = True) -> Roofline:
        """Arithmetic and time of a pass, with the loss on the labels."""
        self.model.train()
        with torch.device("meta"), Roofline(machine, bf16=bf16) as counted:
            hidden = self.hidden().flatten(0, 1)[: self.pictures * self.labels]
            loss = F.cross_entropy(self.model.language.logits(hidden), self.batch.labels)
            if backward:
                loss.backward()
        self.model.zero_grad(set_to_none=True)
        return counted


def _encode(model: VLM, machine: Machine) -> Roofline:
    """`ENCODED` pictures; the encoder computes in float32 whatever the precision."""
    size = model.encoder.config.size
    with torch.device("meta"), torch.no_grad(), Roofline(machine, bf16=False) as counted:
        model.encoder(torch.zeros(ENCODED, 3, size, size))
    return counted


def frozen_memory(model: VLM, bf16: bool) -> int:
    """Bytes of the frozen weights: the language model's matrices in bfloat16 where that is the precision."""
    linear = [part.weight for part in model.language.modules() if isinstance(part, nn.Linear)]
    narrow = sum(weight.numel() for weight in linear) if bf16 else 0
    # What no linear layer holds alone stays wide; a tied head gets a narrow copy of its own.
    alone = {id(weight) for weight in linear} - {id(model.language.model.get_input_embeddings().weight)}
    wide = [p for p in model.language.parameters() if not bf16 or id(p) not in alone]
    return 4 * _size(model.encoder) + 2 * narrow + 4 * sum(p.numel() for p in wide)


def _products(module: nn.Module) -> int:
    """Weights that a token is multiplied with, the vocabulary projection included: its multiply-adds."""
    weights = [part.weight for part in module.modules() if not isinstance(part, nn.Embedding) and
               isinstance(getattr(part, "weight", None), Tensor)]  # fmt: skip
    return sum(weight.numel() for weight in weights if isinstance(weight, Tensor) and weight.ndim == 2)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def plan_text(config: TrainConfig, plan: Plan) -> str:
    """The plan for people."""
    layers = f", blocks before layers {', '.join(map(str, plan.at_layers))}" if plan.at_layers else ""
    passes = f"{plan.micro} x {plan.kept_bytes / 1e6:.0f} MB kept for the backward pass"
    less = "set micro= lower" if plan.micro > 1 else "fast.checkpointing=true keeps less than is counted here"
    verdict = "" if plan.fits else f": TOO MUCH, {less}"
    return (
        f"encoder   {config.model.vision.encoder}: {plan.encoder / 1e6:.0f} M, "
        f"{plan.encoder_flops / 1e9:.1f} GFLOP a picture; features {plan.tokens} x {plan.width}, "
        f"{plan.feature_bytes / 1e3:.0f} KB\n"
        f"language  {config.model.language_model}: {plan.language / 1e6:.0f} M, {plan.num_layers} layers, "
        f"{plan.token_flops / 1e9:.2f} GFLOP a token\n"
        f"adapter   {config.model.adapter}: {plan.trained / 1e6:.1f} M trained{layers}\n"
        f"work      a picture's row has {plan.row} tokens: {plan.flops / 1e9:.0f} GFLOP, "
        f"{plan.forward_flops / 1e9:.0f} of them forward\n"
        f"memory    frozen {plan.frozen_bytes / 1e9:.1f} GB, trained {plan.trained_bytes / 1e9:.1f} GB, "
        f"{passes}: {plan.memory / 1e9:.1f} GB of {MACHINES[plan.machine].memory / 1e9:.0f}{verdict}\n"
        f"time      {plan.machine}: {plan.step_seconds:.2f} s a step of {config.batch}, "
        f"{duration(plan.seconds)} for {config.steps}; {plan.encode_seconds:.1f} s to encode 1,000 pictures"
    )


def plan_row(config: TrainConfig, plan: Plan) -> str:
    """The plan as a row of the table in docs/scale.md."""
    names = [config.model.vision.encoder, config.model.language_model]
    short = [name.removeprefix("open_clip:").partition("/")[0] if "open_clip" in name else name.split("/")[-1]
             for name in names]  # fmt: skip
    cells = [
        *short,
        f"{plan.trained / 1e6:.1f} M",
        f"{plan.at_layers[0]} to {plan.at_layers[-1]} of {plan.num_layers}" if plan.at_layers else "-",
        f"{plan.tokens} x {plan.width}, {plan.feature_bytes / 1e3:.0f} KB",
        f"{plan.encoder_flops / 1e9:.1f}",
        f"{plan.token_flops / 1e9:.2f}",
        f"{plan.flops / 1e9:.0f}",
        f"{plan.memory / 1e9:.1f} GB",
        f"{plan.step_seconds:.2f} s",
        f"{plan.encode_seconds:.1f} s",
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str]) -> int:
    """Runs `vlm train plan RECIPE [key=value ...]`."""
    parser = make_parser("vlm train plan", "What a recipe takes on one GPU, from shapes alone.")
    parser.add_argument("recipe", help="a recipe that ships, or a YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as for vlm train")
    parser.add_argument("--machine", choices=MACHINES, default="a100", help="default: a100, of 80 GB")
    add_offline(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="every figure, for programs")
    how.add_argument("--row", action="store_true", help="a row of the table in docs/scale.md")
    args: argparse.Namespace = parser.parse_intermixed_args(argv)
    config = with_start(read_recipe(args.recipe, args.settings), offline=args.offline)
    plan = make_plan(config, args.machine, offline=args.offline)
    if args.json:
        print(json.dumps(asdict(plan)))
    else:
        print(plan_row(config, plan) if args.row else plan_text(config, plan))
    return 0
