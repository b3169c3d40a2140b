"""Plans from shapes alone: larger frozen parts fit, are counted as published, and time and memory add up."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from vlm.adapters.flamingo import upper_layers
from vlm.cli import main
from vlm.config import FlamingoConfig, VisionConfig
from vlm.errors import ConfigError, WeightsError
from vlm.train.blueprint import LANGUAGE, blueprint
from vlm.train.config import TrainConfig
from vlm.train.plan import Plan, frozen_memory, make_plan
from vlm.train.recipe import read_recipe
from vlm.train.roofline import MACHINES, Kept, Machine, Roofline

if TYPE_CHECKING:
    from vlm.model import VLM

# tokens, width and millions of parameters of the image tower, as published
ENCODERS = {
    "open_clip:ViT-B-32/laion2b_s34b_b79k": (50, 768, 87.8),
    "open_clip:ViT-L-14/laion2b_s32b_b82k": (257, 1024, 304.0),
    "open_clip:ViT-B-16-SigLIP/webli": (196, 768, 92.9),
}
# layers and millions of parameters, as published
LANGUAGES = {
    "HuggingFaceTB/SmolLM2-360M-Instruct": (32, 361.8),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (24, 1711.4),
    "Qwen/Qwen3-0.6B": (28, 596.0),
}
PAIRS = list(itertools.product(ENCODERS, LANGUAGES))


def larger(encoder: str, language: str, *more: str) -> TrainConfig:
    return read_recipe(
        "flickr8k-larger", [f"model.vision.encoder={encoder}", f"model.language_model={language}", *more]
    )


@pytest.fixture(scope="module")
def planned() -> Callable[..., Plan]:
    made: dict[tuple[str, ...], Plan] = {}

    def plan(encoder: str, language: str) -> Plan:
        if (encoder, language) not in made:
            made[encoder, language] = make_plan(larger(encoder, language), offline=True)
        return made[encoder, language]

    return plan


@pytest.mark.parametrize(("encoder", "language"), PAIRS[::4] + PAIRS[1:2])
def test_larger_parts_fit_one_gpu(encoder: str, language: str, planned: Callable[..., Plan]) -> None:
    plan = planned(encoder, language)
    tokens, width, size = ENCODERS[encoder]
    layers, words = LANGUAGES[language]
    assert (plan.tokens, plan.width, plan.num_layers) == (tokens, width, layers)
    assert plan.encoder / 1e6 == pytest.approx(size, rel=0.01)
    assert plan.language / 1e6 == pytest.approx(words, rel=0.001)
    assert plan.feature_bytes == 2 * tokens * width
    assert plan.at_layers == upper_layers(layers)
    assert plan.at_layers[-1] >= layers - 2
    # An encoder's work is about two operations a weight and token.
    assert plan.encoder_flops == pytest.approx(2 * plan.encoder * tokens, rel=0.15)
    # The row's forward pass is mostly the language model's; the backward pass stops at the lowest block.
    assert plan.row * plan.token_flops * 0.5 < plan.forward_flops < plan.row * plan.token_flops * 2
    assert 1.2 * plan.forward_flops < plan.flops < 3 * plan.forward_flops
    assert plan.fits and plan.micro == 32
    assert 5e6 < plan.trained < 100e6
    assert 2 * plan.language < plan.frozen_bytes < 4 * (plan.language + plan.encoder) * 1.2
    assert plan.memory < 80e9
    # No faster than its arithmetic at the best rate, no slower than a hundredth of it.
    least = 32 * plan.flops / MACHINES["a100"].bf16
    assert least < plan.step_seconds < 100 * least


def test_a_slower_machine_takes_longer_and_a_small_one_smaller_passes() -> None:
    encoder, language = "open_clip:ViT-L-14/laion2b_s32b_b82k", "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    large, small = (
        make_plan(larger(encoder, language, "batch=1024"), name, offline=True) for name in ("a100", "l4")
    )
    assert small.step_seconds > large.step_seconds
    assert 1 <= small.micro < large.micro < 1024
    assert small.memory < 24e9
    assert (small.flops, small.trained) == (large.flops, large.trained)
    forced = make_plan(larger(encoder, language, "micro=4096", "batch=4096"), "l4", offline=True)
    assert not forced.fits


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(30, FlamingoConfig().layers), (24, tuple(range(10, 24, 2))), (4, (2,)), (1, (0,)), (2, (1,))],
)
def test_blocks_stand_in_the_upper_three_fifths(layers: int, expected: tuple[int, ...]) -> None:
    assert upper_layers(layers) == expected


def test_empty_layers_are_placed_and_saved_adapters_find_them_again(make_tiny: Any, tmp_path: Any) -> None:
    from vlm.checkpoint import load_adapter, save_adapter

    model: VLM = make_tiny("flamingo", layers=())
    assert model.adapter.at_layers == upper_layers(4) == (2,)
    save_adapter(model, tmp_path)
    other: VLM = make_tiny("flamingo", seed=3, layers=())
    load_adapter(other, tmp_path)
    for name, tensor in model.adapter.state_dict().items():
        assert torch.equal(tensor, other.adapter.state_dict()[name])


@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_a_blueprint_has_the_shapes_of_the_real_thing(
    adapter: str, tiny_config: Callable[..., Any], make_tiny: Callable[..., VLM]
) -> None:
    drawn, real = blueprint(tiny_config(adapter), offline=True), make_tiny(adapter)
    for part in ("encoder", "language", "adapter"):
        shapes = [
            {name: tensor.shape for name, tensor in getattr(model, part).state_dict().items()}
            for model in (drawn, real)
        ]
        assert shapes[0] == shapes[1]
    assert all(tensor.is_meta for tensor in drawn.parameters())
    assert (drawn.encoder.tokens, drawn.encoder.width) == (real.encoder.tokens, real.encoder.width)
    bytes_ = sum(p.numel() * 4 for part in (real.encoder, real.language) for p in part.parameters())
    assert frozen_memory(drawn, bf16=False) == bytes_
    real.language.halve()
    halved = sum(p.nbytes for part in (real.encoder, real.language) for p in part.parameters())
    assert frozen_memory(drawn, bf16=True) == halved


def test_every_adapter_can_be_planned(tiny_config: Callable[..., Any]) -> None:
    for adapter, sizes in (("flamingo", {}), ("qformer", {}), ("qformer", {"question_aware": True})):
        config = TrainConfig(
            model=tiny_config(adapter, **sizes), sources=read_recipe("flickr8k-larger").sources
        )
        plan = make_plan(config, "cpu", offline=True)
        assert plan.flops > plan.forward_flops > 0
        assert plan.row == 14 + 3 * 14 + (3 if adapter == "qformer" else 0)


def test_the_shipped_models_shape_is_written_down_rightly() -> None:
    from transformers import AutoConfig

    from vlm.errors import VLMError
    from vlm.weights import pinned_path

    try:
        there = AutoConfig.from_pretrained(pinned_path("smollm2-135m-instruct"))
    except VLMError as missing:
        pytest.skip(f"the frozen weights are not here: {missing}")
    shape = LANGUAGE["smollm2-135m-instruct"]
    assert {key: getattr(there, key) for key in shape} == shape


def test_unknown_parts_are_one_line(tiny_config: Callable[..., Any]) -> None:
    config = tiny_config()
    for wrong in (
        replace(config, language_model="nobody/has-this-model"),
        replace(config, vision=VisionConfig(encoder="open_clip:no-such/tag", size=224)),
        replace(config, vision=VisionConfig(encoder="timm:no_such_network", size=224)),
    ):
        with pytest.raises(WeightsError):
            blueprint(wrong, offline=True)
    with pytest.raises(ConfigError, match="must lie within"):
        blueprint(replace(config, flamingo=replace(config.flamingo, layers=(9,))), offline=True)


# --- the counting itself ---------------------------------------------------------------------------------


def test_an_operation_takes_the_longer_of_its_two_times() -> None:
    machine = Machine(bf16=1e12, float32=1e11, bandwidth=1e9, memory=1e9, start=1e-9)
    with torch.device("meta"):
        left, right = torch.zeros(64, 128), torch.zeros(128, 256)
        with Roofline(machine, bf16=False) as product:
            left @ right
        with Roofline(machine, bf16=False) as copy:
            left + left
    assert product.flops == 2 * 64 * 128 * 256
    moved = 4 * (64 * 128 + 128 * 256 + 64 * 256)
    assert product.seconds == pytest.approx(max(product.flops / 1e11, moved / 1e9))
    assert copy.flops == 0
    assert copy.seconds == pytest.approx(4 * 3 * 64 * 128 / 1e9)
    with torch.device("meta"), Roofline(replace(machine, start=1.0), bf16=False) as idle:
        (left + left).view(-1).t()
    assert idle.seconds == 1.0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_kept_for_the_backward_pass(device: str) -> None:
    layer = torch.nn.Linear(16, 32, device=device)
    x = torch.zeros(8, 16, device=device, requires_grad=True)
    with Kept(layer.parameters()) as kept:
        hidden = layer(x).relu()
        (hidden * hidden).sum()
    assert kept.bytes == 4 * (8 * 16 + 8 * 32)  # the input, and one activation that two operations share


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "plan", "flickr8k-larger", "--json", "--offline"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["machine"], facts["tokens"], facts["num_layers"]) == ("a100", 50, 32)
    assert main(["train", "plan", "flickr8k-larger", "--row", "micro=8"]) == 0
    row = capsys.readouterr().out
    assert row.startswith("| ViT-B-32 | SmolLM2-360M-Instruct |")
    assert main(["train", "plan", "flickr8k-larger", "--machine", "l4"]) == 0
    assert "of 24" in capsys.readouterr().out
    assert main(["train", "plan", "no-such"]) == 2
    assert "no recipe" in capsys.readouterr().err


def test_a_recipe_is_planned_with_the_adapter_it_starts_from(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from vlm.cli import main

    assert main(["train", "plan", "daquar", "--json", "--offline"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["tokens"], plan["width"]) == (144, 1760)  # of 384 pixels, the last stage
    assert main(["train", "plan", "prefer", "--offline"]) == 1
    assert "cannot be planned" in capsys.readouterr().err
