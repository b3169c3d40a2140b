"""muP: who gets which factor, steps that move wide and narrow adapters alike, and nothing where it is off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.train import mup
from vlm.train.config import OptimConfig, WordsConfig
from vlm.train.mup import Scale, at_width
from vlm.train.optim import build_optimizer

HIDDEN, OUTPUT = Scale(0.25, 0.5), Scale(0.25, 0.25)  # four times as wide
ATTENTION = ("query", "key", "value", "output")


@pytest.fixture
def wide(recipe: Callable[..., Any]) -> Callable[..., Any]:
    """`wide(width, adapter, base=0, **keys)`: the tiny recipe at a width; its own is 16."""

    def make(width: int, adapter: str = "flamingo", base: int = 0, **keys: Any) -> Any:
        optim = OptimConfig(lr=keys.pop("lr", 3e-3), warmup=0, mup_base=base)
        config = recipe(adapter, sizes=keys.pop("sizes", None), optim=optim, **keys)
        return replace(config, model=at_width(config.model, width))

    return make


def test_flamingo_factors_by_name(wide: Any, trainer_of: Any) -> None:
    trainer, _ = trainer_of(wide(64, base=16))
    expected = {f"resampler.attention.{i}.{name}.weight": HIDDEN for i in range(2) for name in ATTENTION}
    expected |= {
        f"resampler.feedforward.{i}.{name}.weight": HIDDEN for i in range(2) for name in ("widen", "narrow")
    }
    expected |= {f"blocks.{i}.{name}.weight": OUTPUT for i in range(2) for name in ("key", "value", "down")}
    assert trainer.scales() == expected


@pytest.mark.parametrize("aware", [False, True])
def test_q_former_factors_by_name(wide: Any, trainer_of: Any, aware: bool) -> None:
    trainer, _ = trainer_of(wide(64, "qformer", base=16, sizes={"question_aware": aware}))
    attentions = ("layers.0.self_attention", "layers.0.cross_attention", "layers.1.self_attention")
    expected = {f"{part}.{name}.weight": HIDDEN for part in attentions for name in ATTENTION}
    parts = ["feedforward", *(["word_feedforward"] if aware else [])]
    expected |= {
        f"layers.{i}.{part}.{name}.weight": HIDDEN
        for i in range(2)
        for part in parts
        for name in ("widen", "narrow")
    }
    assert trainer.scales() == expected | {"project.weight": OUTPUT}


def test_groups_of_the_optimizer(wide: Any, trainer_of: Any) -> None:
    trainer, _ = trainer_of(wide(64, base=16))
    config, named = trainer.config.optim, dict(trainer.adapter.named_parameters())
    found = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(found) == len(named)
    for name, parameter in named.items():
        factor = 0.25 if name in trainer.scales() else 1.0
        decay = config.weight_decay / factor if parameter.ndim > 1 else 0.0
        group = found[id(parameter)]
        assert (group["factor"], group["weight_decay"]) == (factor, decay), name
        # What a step takes off a matrix does not depend on its factor.
        taken = config.lr * config.weight_decay if parameter.ndim > 1 else 0.0
        assert group["lr"] * group["weight_decay"] == pytest.approx(taken)
    for name in ("blocks.0.query.weight", "blocks.0.gate.weight", "resampler.project.weight", "place.weight"):
        assert found[id(named[name])]["factor"] == 1.0


def test_first_weights(wide: Any, trainer_of: Any) -> None:
    """The same draws as without muP, times the factor."""
    plain = {k: v.clone() for k, v in trainer_of(wide(64))[0].adapter.state_dict().items()}
    trainer, _ = trainer_of(wide(64, base=16))
    scales = trainer.scales()
    for name, value in trainer.adapter.state_dict().items():
        assert torch.equal(value, plain[name] * scales.get(name, mup.PLAIN).init), name


@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_at_its_own_width_nothing_changes(wide: Any, losses_of: Any, adapter: str) -> None:
    plain = losses_of(wide(16, adapter))
    assert losses_of(wide(16, adapter, base=16)) == plain
    assert losses_of(wide(16, adapter, base=32)) != plain


def test_switched_off_the_optimizer_is_plain_adamw(wide: Any, trainer_of: Any, losses_of: Any) -> None:
    """Losses to the last bit those of three groups made by hand: matrices that decay, vectors, gates."""
    config = wide(64)
    trainer, steps = trainer_of(replace(config, optim=replace(config.optim, gate_lr=3.0)))
    named = list(trainer.adapter.named_parameters())
    gates = [p for n, p in named if n.endswith("_gate")]
    matrices = [p for n, p in named if p.ndim > 1]
    vectors = [p for n, p in named if p.ndim == 1 and not n.endswith("_gate")]
    trainer.optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.05, "factor": 1.0},
            {"params": vectors, "weight_decay": 0.0, "factor": 1.0},
            {"params": gates, "weight_decay": 0.0, "factor": 3.0},
        ],
        lr=3e-3,
        betas=config.optim.betas,
        fused=True,
    )
    trainer.learn(save=False)
    by_hand = [step.loss for step in steps]
    assert losses_of(replace(config, optim=replace(config.optim, gate_lr=3.0))) == by_hand


def test_the_head_of_words_is_an_output(wide: Any, trainer_of: Any) -> None:
    words = {"objective": "words", "words": WordsConfig(rarest=1)}
    trainer, _ = trainer_of(wide(64, base=16, **words))
    assert trainer.scales()["head.words.weight"] == OUTPUT
    assert {name for name in trainer.scales() if not name.startswith("head.")} == {
        f"adapter.{name}" for name in mup.scales(trainer.model, 16)
    }
    names = dict(trainer.trained.named_parameters())
    assert set(trainer.scales()) <= set(names)
    plain, _ = trainer_of(wide(64, **words))
    assert float(trainer.head.words.weight.detach().std()) == pytest.approx(
        0.25 * float(plain.head.words.weight.detach().std()), rel=0.1
    )
    # A Q-Former's latents have the language model's width, which never grows.
    soft, _ = trainer_of(wide(64, "qformer", base=16, **words))
    assert soft.scales()["head.words.weight"] == mup.PLAIN


def test_widths_that_an_adapter_cannot_have(wide: Any, trainer_of: Any) -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        wide(20)
    with pytest.raises(ConfigError, match="multiple of 8"):
        trainer_of(wide(32, base=12))
    with pytest.raises(ConfigError, match="mup_base"):
        wide(16, base=-1)
    config = at_width(wide(16).model, 48)
    assert (config.flamingo.width, config.flamingo.heads, config.flamingo.feedforward) == (48, 6, 72)


# --- the coordinate check: how far steps move what matrices with grown inputs give -----------------------

WIDTHS = (32, 64, 128, 256)


def outputs(trainer: Any, names: list[str], part: Any) -> dict[str, Tensor]:
    """What the named matrices give on one batch."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name in names:
        layer = trainer.adapter.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, nn.Linear)

        def keep(_module: Any, _inputs: Any, out: Tensor, name: str = name) -> None:
            found[name] = out.detach().clone()

        hooks.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        trainer.loss(trainer.model.processor.batch(part.rows), part.features, 0.0)
    for hook in hooks:
        hook.remove()
    return found


def slopes(wide: Any, trainer_of: Any, adapter: str, base: int) -> dict[str, float]:
    """By matrix: the power of the width that the change of its outputs over four steps grows with."""
    changes: dict[str, list[float]] = {}
    for width in WIDTHS:
        trainer, _ = trainer_of(wide(width, adapter, base=base, steps=4, lr=2e-3, flip=0.0))
        names = sorted(mup.scales(trainer.model, 16))
        part = trainer.prepare(trainer.groups[:4], 0)
        before = outputs(trainer, names, part)
        trainer.learn(save=False)
        after = outputs(trainer, names, part)
        for name in names:
            changes.setdefault(name, []).append(float((after[name] - before[name]).square().mean().sqrt()))
    logs = np.log(WIDTHS)
    return {name: float(np.polyfit(logs, np.log(change), 1)[0]) for name, change in changes.items()}


@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_steps_move_a_wide_adapter_as_far_as_a_narrow_one(wide: Any, trainer_of: Any, adapter: str) -> None:
    """The coordinate check of Yang et al. 2022 (appendix D.1): flat with muP, growing without."""
    flat = slopes(wide, trainer_of, adapter, base=32)
    grown = slopes(wide, trainer_of, adapter, base=0)
    assert max(flat.values()) < 0.25
    assert float(np.median(np.abs(list(flat.values())))) < 0.2
    assert min(grown.values()) > 0.35
    assert float(np.mean(list(grown.values()))) > 0.6
    assert all(flat[name] < grown[name] - 0.3 for name in flat)


def test_a_wide_adapter_learns_as_a_narrow_one(wide: Any, losses_of: Any) -> None:
    """At a rate that suits both: eight times as wide, the losses of a run stay what they were."""

    def gap(base: int) -> float:
        narrow, broad = (
            losses_of(wide(width, base=base, steps=20, lr=8e-3, flip=0.0)) for width in (16, 128)
        )
        return float(np.abs(np.subtract(narrow, broad)).mean())

    assert gap(16) < 0.1 < 0.2 < gap(0)


def test_factors_are_by_name_alone() -> None:
    layer = nn.Linear(4, 4)
    groups = build_optimizer(layer, OptimConfig(), {"weight": Scale(0.5, 1.0)}).param_groups
    assert [(len(group["params"]), group["factor"]) for group in groups] == [(1, 1.0), (1, 0.5)]
