"""The loop: what is learnt does not depend on how a step is cut up; bad steps never reach the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm.checkpoint import load_model
from vlm.errors import ConfigError, VLMError
from vlm.train.config import FastConfig, OptimConfig, SourceConfig
from vlm.train.fast import Int8Linear
from vlm.train.loop import BAD_STEPS, TrainingError
from vlm.train.run import make_model, train
from vlm.weights_cache import frozen_hash


def test_the_loss_falls_and_only_the_adapter_moves(recipe: Any, trainer_of: Any) -> None:
    trainer, steps = trainer_of(recipe(steps=12))
    frozen = {
        name: frozen_hash(part.state_dict())
        for name, part in (("encoder", trainer.model.encoder), ("language", trainer.model.language))
    }
    before = {name: value.clone() for name, value in trainer.adapter.state_dict().items()}
    trainer.run()
    assert steps[-1].loss < steps[0].loss
    assert {
        name: frozen_hash(part.state_dict())
        for name, part in (("encoder", trainer.model.encoder), ("language", trainer.model.language))
    } == frozen
    moved = [
        name for name, value in trainer.adapter.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert set(moved) == set(before)
    assert all(
        p.grad is None for p in (*trainer.model.encoder.parameters(), *trainer.model.language.parameters())
    )


@pytest.mark.parametrize("micro", [1, 3])
def test_the_micro_batch_changes_nothing(recipe: Any, losses_of: Any, micro: int) -> None:
    whole = losses_of(recipe(micro=4))
    assert losses_of(recipe(micro=micro)) == pytest.approx(whole, abs=1e-5)


def test_sources_weigh_what_they_are_told_to(recipe: Any, losses_of: Any) -> None:
    one = SourceConfig(name="shapes", limit=12, per_image=3)
    equal = losses_of(recipe(sources=(one, one), steps=1))
    heavy = losses_of(recipe(sources=(replace(one, weight=5.0), replace(one, weight=5.0)), steps=1))
    assert heavy == pytest.approx(equal, abs=1e-6)
    plain = FastConfig(length_groups=False)  # what the other source says would change the order
    single = losses_of(recipe(sources=(one,), steps=1, fast=plain))
    other = losses_of(recipe(sources=(one, replace(one, weight=0.0)), steps=1, fast=plain))
    assert single == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize(
    "switch",
    [
        FastConfig(shared_rows=False),
        FastConfig(fused_loss=False),
        FastConfig(backward_cut=False),
        FastConfig(lower_cache=8),
        FastConfig(checkpointing=True),
        FastConfig(compile="eager"),
        FastConfig(shared_rows=False, fused_loss=False, backward_cut=False),
    ],
    ids=str,
)
def test_exact_switches_are_exact_over_50_steps(recipe: Any, losses_of: Any, switch: FastConfig) -> None:
    sizes = {"layers": (2, 3)}
    plain = losses_of(recipe(steps=50, sizes=sizes))
    assert losses_of(recipe(steps=50, sizes=sizes, fast=switch)) == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize(
    "switch",
    [
        FastConfig(shared_rows=False, fused_loss=False, backward_cut=False),
        FastConfig(checkpointing=True),
        FastConfig(compile="eager"),
    ],
    ids=str,
)
def test_the_q_former_has_the_switches_too(recipe: Any, losses_of: Any, switch: FastConfig) -> None:
    plain = losses_of(recipe("qformer", steps=50))
    assert losses_of(recipe("qformer", steps=50, fast=switch)) == pytest.approx(plain, abs=1e-4)


def test_a_weight_in_eight_bits_is_off_by_its_bound_at_most() -> None:
    """By 1/254 of its row's largest, whatever the rows' sizes; so a product by that times the inputs' sum."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48).double()
    with torch.no_grad():
        linear.weight *= torch.logspace(-4, 4, 48, dtype=torch.float64)[:, None]
        linear.weight[3] = 0.0
    narrow = Int8Linear(linear)
    bound = linear.weight.abs().amax(dim=1) / 254
    wide = narrow.weight.double() * narrow.scale.double()
    off = (wide - linear.weight).abs()
    assert (off <= bound[:, None] * (1 + 1e-5) + 1e-12).all()
    assert off.max() > 0
    x = torch.randn(10, 64, dtype=torch.float64)
    product = (narrow(x) - linear(x)).abs()
    assert (product <= x.abs().sum(dim=1, keepdim=True) * bound * (1 + 1e-4) + 1e-9).all()


def test_eight_bits_stay_near(recipe: Any, losses_of: Any) -> None:
    plain = losses_of(recipe())
    narrow = losses_of(recipe(fast=FastConfig(int8=True)))
    assert narrow != plain
    assert narrow == pytest.approx(plain, rel=0.02)


def test_layers_in_any_order_keep_the_same_states(recipe: Any, losses_of: Any) -> None:
    sizes = {"layers": (3, 1)}
    plain = losses_of(recipe(sizes=sizes))
    kept = losses_of(recipe(sizes=sizes, fast=FastConfig(lower_cache=8)))
    assert kept == pytest.approx(plain, abs=1e-4)


def test_eight_bits_of_nothing_are_refused(recipe: Any, trainer_of: Any) -> None:
    with pytest.raises(VLMError, match="no linear parts"):
        trainer_of(recipe(family="gpt2", fast=FastConfig(int8=True)))


def test_a_source_of_no_weight_is_left_out(recipe: Any, losses_of: Any) -> None:
    from vlm.train.config import SourceConfig

    shapes = SourceConfig(name="shapes", limit=12, per_image=3)
    absent = SourceConfig(name="flickr8k", weight=0.0)
    assert losses_of(recipe(sources=(shapes, absent))) == losses_of(recipe(sources=(shapes,)))


def test_hidden_states_are_kept_only_where_they_depend_on_words_alone(recipe: Any, trainer_of: Any) -> None:
    with pytest.raises(VLMError, match="lower_cache"):
        trainer_of(recipe("qformer", fast=FastConfig(lower_cache=8)))
    with pytest.raises(VLMError, match="lower_cache"):
        trainer_of(recipe(sizes={"layers": (0, 2)}, fast=FastConfig(lower_cache=8)))
    trainer, _ = trainer_of(recipe(family="gpt2", sizes={"layers": (2,)}, fast=FastConfig(lower_cache=8)))
    with pytest.raises(VLMError, match="does not fit this language model"):
        trainer.learn(save=False)


def test_checkpointing_keeps_less(recipe: Any, trainer_of: Any) -> None:
    """Bytes that autograd keeps for the backward pass, counted as it packs them."""

    def kept(fast: FastConfig) -> int:
        trainer, _ = trainer_of(recipe(fast=fast))
        trainer.model.train()
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            part = trainer.prepare(trainer.groups[:4], 0)
            batch = trainer.model.processor.batch(part.rows)
            trainer.loss(batch, part.features, 0.0)
        return total

    assert kept(FastConfig(checkpointing=True)) < 0.7 * kept(FastConfig())


def _spoil(trainer: Any, at: Callable[[int], bool]) -> None:
    """Lets the loss of some steps be no number, as an overflow would."""
    honest = trainer.loss

    def loss(batch: Any, features: torch.Tensor, smoothing: float) -> torch.Tensor:
        value: torch.Tensor = honest(batch, features, smoothing)
        return value * float("nan") if at(trainer.step) else value

    trainer.loss = loss


def test_a_loss_that_is_no_number_moves_nothing_and_is_written_down(recipe: Any, trainer_of: Any) -> None:
    trainer, steps = trainer_of(recipe(steps=4))
    _spoil(trainer, lambda step: step == 1)
    seen: list[dict[str, torch.Tensor]] = []
    report = trainer.report

    def keep(step: Any) -> None:
        report(step)
        seen.append({k: v.clone() for k, v in trainer.adapter.state_dict().items()})

    trainer.report = keep
    trainer.run()
    assert [step.skipped for step in steps] == [False, True, False, False]
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert any(not torch.equal(seen[1][name], seen[2][name]) for name in seen[1])
    assert all(value.isfinite().all() for value in seen[-1].values())
    assert trainer.skipped == 1
    (line,) = (Path(trainer.config.out) / "skipped.jsonl").read_text().splitlines()
    dumped = json.loads(line)
    assert dumped["step"] == 2
    assert len(dumped["samples"]) == 4
    assert all(identity.startswith("shapes/") for sample in dumped["samples"] for identity in sample["ids"])


def test_a_run_of_bad_steps_ends_the_run(recipe: Any, trainer_of: Any) -> None:
    trainer, steps = trainer_of(recipe(steps=20))
    _spoil(trainer, lambda step: step >= 2)
    with pytest.raises(TrainingError, match="in a row"):
        trainer.run()
    assert len(steps) == 2 + BAD_STEPS - 1


def test_a_sample_without_a_word_to_learn_is_shown(recipe: Any, trainer_of: Any) -> None:
    from vlm.data import collate

    trainer, _ = trainer_of(recipe())
    group = trainer.groups[0]
    told = collate.told_of(group, trainer.model.processor, 0, 0)
    tokens, weight = told[0]
    tokens.supervised = [False] * len(tokens)
    with pytest.raises(TrainingError, match=r"no token to learn: .*<\|im_start\|>user"):
        trainer._check_supervised(group, [(tokens, weight)])


def test_the_masked_sample_shows_what_is_learnt(recipe: Any, trainer_of: Any) -> None:
    from vlm.data.collate import masked_text, told_of

    trainer, _ = trainer_of(recipe())
    tokens, _ = told_of(trainer.groups[0], trainer.model.processor, 0, 0)[0]
    text = masked_text(tokens, trainer.model.language)
    answer = text.split("[[")[1].split("]]")[0]
    assert answer.endswith("<|im_end|>")
    assert text.count("[[") == 1
    assert "user" in text.split("[[")[0]


def test_gradient_and_gate_statistics_are_logged(recipe: Any, trainer_of: Any) -> None:
    trainer, steps = trainer_of(recipe(steps=1))
    trainer.learn(save=False)
    assert {"gradient/resampler", "gradient/blocks", "gate/attention_1", "gate/feedforward_3"} <= set(
        steps[0].numbers
    )
    assert steps[0].numbers["gradient/blocks"] > 0


def test_the_average_follows_and_is_what_is_saved(recipe: Any, trainer_of: Any) -> None:
    from safetensors.torch import load_file

    trainer, _ = trainer_of(recipe(optim=OptimConfig(lr=3e-3, warmup=2, average=0.9)))
    trainer.run()
    saved = load_file(Path(trainer.config.out) / "adapter.safetensors")
    assert all(torch.equal(saved[k], v.half()) for k, v in trainer.average.tensors.items())
    assert any(not torch.equal(saved[k], v.half()) for k, v in trainer.adapter.state_dict().items())


@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_dropout_of_a_recipe_replaces_that_of_the_start(
    adapter: str, recipe: Callable[..., Any], begin: Callable[..., Path]
) -> None:
    start = str(begin(adapter))
    for said, expected in ((None, 0.3), (0.45, 0.45), (0.0, 0.0)):
        model = make_model(recipe(adapter, start=start, dropout=said), offline=True)
        shares = {part.dropout for part in model.adapter.modules() if hasattr(part, "dropout")}
        assert shares == {expected}
        assert getattr(model.config, adapter).dropout == expected


def test_an_adapter_learns_from_pictures_of_another_size(
    recipe: Callable[..., Any], begin: Callable[..., Path], tmp_path: Path
) -> None:
    config = recipe(start=str(begin()), size=96, steps=1)
    train(config, offline=True)
    saved = load_model(config.out, offline=True)
    assert (saved.config.vision.size, saved.encoder.tokens) == (96, 9)
    with pytest.raises(ConfigError, match=r"model\.vision\.size"):
        recipe(size=96)
