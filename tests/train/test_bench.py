"""The bench's peers really are the same frozen parts in other classes."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch

from vlm.bench import serve, train
from vlm.bench.peers import CLOSE, IdeficsPeer, peer_of
from vlm.bench.train import BATCHES, SWITCHES, UNASKED, Ours, Switched, Theirs, gains, measure, ratios
from vlm.errors import VLMError


@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_the_frozen_parts_are_the_same(make_tiny: Any, adapter: str) -> None:
    """With gates at zero Idefics speaks as the language model alone; Blip2 holds that very model."""
    torch.manual_seed(0)
    ours = make_tiny(adapter)
    peer = peer_of(ours).eval()
    ids = torch.randint(5, 300, (2, 9))
    features = torch.randn(2, ours.encoder.tokens, ours.encoder.width)
    plain = ours.language.model(input_ids=ids, labels=ids).loss
    if isinstance(peer, IdeficsPeer):
        with torch.no_grad():
            found = peer.loss(features, ids, torch.ones_like(ids), ids)
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    else:
        assert peer.blip.language_model is ours.language.model
        before = peer.loss(features, ids, torch.ones_like(ids), ids)
        after = peer.loss(features + torch.randn_like(features), ids, torch.ones_like(ids), ids)
        assert before.item() != after.item()
    assert not any(p.requires_grad for p in ours.language.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_trained_parameters_are_close_at_the_recipes_sizes(real_model: object, adapter: str) -> None:
    options = {"pictures": 1, "data": None, "precision": "float32"}
    ours, theirs = Ours(adapter, True, options), Theirs(adapter, True, options)
    assert abs(theirs.trained / ours.trained - 1) < CLOSE


@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
@pytest.mark.parametrize("warm", [True, False])
def test_every_contestant_learns(tiny_config: Any, adapter: str, warm: bool, tmp_path: Any) -> None:
    options = {"pictures": 2, "data": None, "precision": "float32", "model": tiny_config(adapter)}
    for kind in (Ours, Theirs):
        contestant = kind(adapter, warm, options)
        for parameter in contestant.optimizer.param_groups:
            parameter["lr"] = 1e-2
        for turn in range(3 * BATCHES):
            contestant.step(turn % BATCHES)
        assert contestant.losses[-1] < contestant.losses[0]
        assert bool(contestant.kept) == warm


@pytest.mark.timeout(60)
def test_a_contestant_that_ends_is_named(tiny_config: Any, tmp_path: Any) -> None:
    options = {"steps": 1, "pictures": 1, "precision": "float32", "threads": 1, "switches": False}
    args = Namespace(**options, data=tmp_path / "absent", model=tiny_config("flamingo"))
    with pytest.raises(VLMError, match="'flamingo plain' ended with exit code 1"):
        measure(args, ["flamingo plain"])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (train.main, ["--steps", "0"]),
        (train.main, ["--pictures", "0"]),
        (train.main, ["--threads", "0"]),
        (serve.main, ["crossing", "--clients", "0"]),
        (serve.main, ["crossing", "--requests", "-1"]),
        (serve.main, ["load", "--minutes", "0"]),
    ],
)
def test_wrong_numbers_are_usage_errors(entry: Any, words: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        entry(words)
    assert left.value.code == 2


def test_every_switch_is_measured() -> None:
    from dataclasses import fields

    from vlm.train.config import FastConfig

    assert {field.name for field in fields(FastConfig)} == set(SWITCHES) - {"ours"}
    assert all(set(changes) == {name} for name, changes in SWITCHES.items() if changes)


@pytest.mark.parametrize("name", [name for name in SWITCHES if name not in UNASKED])
def test_a_changed_switch_learns_the_same(tiny_config: Any, name: str) -> None:
    """The first losses are those of the recipe; in 8 bits, and with other batches, they are near."""
    options = {"pictures": 2, "data": None, "precision": "float32"}
    options["model"] = tiny_config("flamingo", layers=(2, 3))
    ours, other = Switched("ours", options), Switched(name, options)
    for contestant in (ours, other):
        for batch in range(BATCHES):
            contestant.step(batch)
    near = name in ("int8", "length_groups")
    total = sum(ours.losses)
    assert sum(other.losses) == pytest.approx(total, rel=0.05 if near else 1e-4)


def test_gains_are_a_switch_on_over_off() -> None:
    row = lambda speed, memory: {"captions_per_second": speed, "peak_memory": memory}  # noqa: E731
    found = gains({"ours": row(30, 2), "shared_rows": row(10, 4), "int8": row(15, 1)})
    assert found == {
        "shared_rows, on / off": 3,
        "shared_rows, on / off: memory": 0.5,
        "int8, on / off": 0.5,
        "int8, on / off: memory": 0.5,
    }


def test_ratios_are_ours_over_theirs() -> None:
    row = lambda speed, memory: {"captions_per_second": speed, "peak_memory": memory}  # noqa: E731
    found = ratios({"flamingo warm": row(30, 1), "idefics plain": row(10, 2), "flamingo plain": row(15, 3)})
    assert found["flamingo / idefics, warm"] == 3
    assert found["flamingo / idefics, no caches"] == 1.5
    assert found["flamingo / idefics, warm: memory"] == 0.5
