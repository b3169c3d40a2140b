"""Direct Preference Optimization: the formula, its direction, and runs that learn what people preferred."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from vlm.cli import main
from vlm.config import CAPTION_PROMPT
from vlm.conversation import Conversation, PreferencePair
from vlm.errors import ConfigError, DataError
from vlm.train.config import OptimConfig
from vlm.train.wins import mean_margin, win_rate

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.train.config import TrainConfig
    from vlm.train.loop import Step
    from vlm.train.preference import PreferenceTrainer

Recipe = Callable[..., "TrainConfig"]
Make = Callable[["TrainConfig"], "tuple[PreferenceTrainer, list[Step]]"]
ANSWERS = ("a dog", "the man")


def pairs_in(trainer: PreferenceTrainer) -> list[PreferencePair]:
    """The pairs of a trainer's groups."""
    return [
        PreferencePair(Conversation(one.example.images, one.example.turns), one.answer, other.answer)
        for group in trainer.groups
        for one, other in zip(*group.by_source, strict=True)
    ]


def scores(model: VLM, pairs: Sequence[PreferencePair]) -> list[list[float]]:
    return model.score(
        [pair.conversation for pair in pairs], [(pair.chosen, pair.rejected) for pair in pairs]
    )


@pytest.mark.parametrize(
    ("adapter", "hints", "sizes"),
    [("flamingo", 0, {}), ("flamingo", 2, {}), ("qformer", 0, {"question_aware": True})],
)
def test_the_loss_is_the_formula(
    preferring: Recipe, trainer_of: Make, adapter: str, hints: int, sizes: dict[str, Any]
) -> None:
    config = preferring(adapter, hints, sizes, beta=0.3, flip=0.0)
    trainer, _ = trainer_of(config)
    pairs = pairs_in(trainer)
    assert len(pairs) == 14
    reference = scores(trainer.model, pairs)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.adapter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trainer.model.train()  # dropout must not be in the comparison
    loss, _ = trainer.backward(trainer.prepare(trainer.groups, 0), 1.0)
    trainer.model.eval()
    moved = scores(trainer.model, pairs)
    wanted = 0.0
    for (chosen, rejected), (chosen0, rejected0) in zip(moved, reference, strict=True):
        inner = 0.3 * ((chosen - chosen0) - (rejected - rejected0))
        wanted += -math.log(1 / (1 + math.exp(-inner)))
    assert abs(wanted - 14 * math.log(2)) > 0.01
    assert loss == pytest.approx(wanted, rel=1e-4)


def test_the_gradient_pushes_the_chosen_up_and_the_rejected_down() -> None:
    from vlm.train.preference import preference_loss

    chosen = torch.tensor([-3.0, -9.0], requires_grad=True)
    rejected = torch.tensor([-5.0, -4.0], requires_grad=True)
    reference = torch.tensor([1.0, -2.0])
    gradients = {}
    for beta in (0.1, 0.5):
        chosen.grad = rejected.grad = None
        loss = preference_loss(chosen - rejected, reference, beta)
        loss.backward()
        inner = beta * ((chosen - rejected) - reference).detach()
        assert chosen.grad is not None
        assert rejected.grad is not None
        torch.testing.assert_close(chosen.grad, -beta * torch.sigmoid(-inner))
        torch.testing.assert_close(rejected.grad, -chosen.grad)
        assert (chosen.grad < 0).all()
        gradients[beta] = chosen.grad / beta
        assert float(loss.detach()) == pytest.approx(float(torch.log1p(torch.exp(-inner)).sum()))
    # Ahead of the reference a large beta is content sooner; behind it, it pulls harder.
    assert gradients[0.5][0].abs() < gradients[0.1][0].abs()
    assert gradients[0.5][1].abs() > gradients[0.1][1].abs()


def test_a_run_begins_at_the_reference_and_leaves_it_alone(preferring: Recipe, trainer_of: Make) -> None:
    trainer, steps = trainer_of(preferring(steps=4, flip=0.5, optim=OptimConfig(lr=3e-3, warmup=1)))
    reference = trainer.compared.reference.clone()
    assert len(reference) == 2 * 14  # both views
    pairs = pairs_in(trainer)
    before = scores(trainer.model, pairs)
    trainer.learn(save=False)
    assert steps[0].loss == pytest.approx(math.log(2), abs=1e-4)
    assert steps[-1].loss < steps[0].loss
    assert torch.equal(trainer.compared.reference, reference)
    after = scores(trainer.model, pairs)
    rise = [sum(now[i] - then[i] for now, then in zip(after, before, strict=True)) for i in (0, 1)]
    assert rise[0] > rise[1]


def test_a_stopped_run_goes_on_exactly(preferring: Recipe, trainer_of: Make, tmp_path: Path) -> None:
    config = preferring(flip=0.5, micro=3, optim=OptimConfig(lr=3e-3, warmup=2, average=0.9))
    whole, steps = trainer_of(replace(config, out=str(tmp_path / "whole")))
    whole.learn(save=False)
    first, some = trainer_of(config)

    def stop_after_three(step: Step) -> None:
        some.append(step)
        if step.step == 3:
            first.stop()

    first.report = stop_after_three
    first.learn()
    second, rest = trainer_of(config)
    second.compared.reference.zero_()  # the state brings it back
    second.resume()
    second.learn(save=False)
    assert [step.loss for step in some + rest] == [step.loss for step in steps]
    assert torch.equal(second.compared.reference, whole.compared.reference)


@pytest.fixture
def losing(
    begin: Callable[..., Path],
    pairs_file: Callable[..., Path],
    draw: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    train_cache: Path,
) -> tuple[Path, Path]:
    """An adapter, and pairs whose chosen answer it holds for the less likely one."""
    from vlm.checkpoint import load_model

    monkeypatch.setenv("VLM_CACHE", str(train_cache / "weights"))
    start = begin()
    model = load_model(start, offline=True)
    asked = [Conversation.ask([draw(number)], "What is it?") for number in range(20)]
    chosen, rejected = ANSWERS if win_rate(model.score(asked, [ANSWERS] * 20)) < 0.5 else ANSWERS[::-1]
    return start, pairs_file(20, chosen, rejected)


def test_the_command_raises_the_win_rate(
    losing: tuple[Path, Path],
    tmp_path: Path,
    train_cache: Path,
    draw: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start, data = losing
    captions = tmp_path / "captions"
    captions.mkdir()
    rows = ["file_name,text"]
    for number in range(10):
        draw(100 + number).save(captions / f"{number}.png")
        rows.append(f"{number}.png,a dog runs on the grass")
    (captions / "metadata.csv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "out"
    settings = [
        f"data={data}", f"start={start}", f"out={out}", f"feature_cache={train_cache / 'features'}",
        "steps=40", "optim.lr=5.0e-3", "beta=0.2", "trackers=[]", f"holdout_captions={captions}",
    ]  # fmt: skip
    assert main(["train", "prefer", *settings, "--offline", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "0 opinions make no pair" in said.err
    assert f"{data}: all of its 27 rows can be used" in said.err
    assert "win rate" in said.out
    found = json.loads((out / "preference.json").read_text())
    assert found["pairs"]["held_out"] == len(found["answers"]) >= 4
    assert found["pairs"]["trained"] + found["pairs"]["held_out"] == 27
    assert found["win_rate"]["before"] < 0.5
    assert found["win_rate"]["after"] > 0.9
    assert found["margin"]["after"] > found["margin"]["before"] + 1
    for when in ("before", "after"):
        answers = [row[when] for row in found["answers"]]
        assert found["win_rate"][when] == win_rate(answers)
        assert found["margin"][when] == pytest.approx(mean_margin(answers))
    assert found["captions"]["pictures"] == 2
    assert set(found["captions"]["cider"]) == {"before", "after"}
    card = (out / "README.md").read_text()
    assert "preference pairs (pairs.jsonl)" in card
    assert "nats per pair" in card
    assert "Direct Preference Optimization, beta 0.2" in card
    assert str(tmp_path) not in card


def test_what_was_not_measured_is_said(
    losing: tuple[Path, Path], tmp_path: Path, train_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, data = losing
    out = tmp_path / "out"
    settings = [
        f"data={data.parent}", f"start={start}", f"out={out}", f"feature_cache={train_cache / 'features'}",
        "steps=1", "holdout=0", "trackers=[]",
    ]  # fmt: skip
    assert main(["train", "prefer", *settings, "--offline", "--device", "cpu"]) == 0
    found = json.loads((out / "preference.json").read_text())
    assert found["win_rate"] is None
    assert found["reason"] == "not measured: holdout is 0"
    assert found["captions"] is None
    assert "not measured" in found["captions_reason"]
    assert "not measured" in capsys.readouterr().out


def test_a_database_trains_like_its_export(
    preferring: Recipe, trainer_of: Make, tmp_path: Path, draw: Callable[..., Any]
) -> None:
    from vlm.serve.feedback import FeedbackStore

    store = FeedbackStore(tmp_path / "f.db")
    for number in range(6):
        picture = draw(number)
        store.add(Conversation.ask([picture], "What is it?"), [picture], "a cat", "down", "a dog")
    store.add(Conversation.ask([picture], "Why?"), [picture], "so", "up")
    store.export(tmp_path / "exported")
    losses = []
    for place in (tmp_path / "f.db", tmp_path / "exported"):
        trainer, steps = trainer_of(preferring(data=place, steps=3))
        assert len(pairs_in(trainer)) == 6
        trainer.learn(save=False)
        losses.append([step.loss for step in steps])
    assert losses[0] == losses[1]


def test_pairs_of_a_run_are_those_that_can_be_learnt(tmp_path: Path, draw: Callable[..., Any]) -> None:
    from vlm.train.pairs import pair_sources

    draw(1).save(tmp_path / "a.png")
    rows = [
        {"images": ["a.png"], "question": CAPTION_PROMPT, "chosen": "A Dog .", "rejected": "a cat"},
        {"images": ["a.png"], "question": CAPTION_PROMPT, "chosen": "A dog.", "rejected": "a dog"},
        {"images": [], "question": "Who are you?", "chosen": "me", "rejected": "you"},
        {"images": ["a.png"], "question": "What?", "chosen": "A dog.", "rejected": "a dog"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen, rejected = pair_sources(str(path))
    assert [e.answers for e in chosen.examples] == [("a dog",), ("A dog.",)]
    assert [e.answers for e in rejected.examples] == [("a cat",), ("a dog",)]
    assert chosen.unused == 2
    path.write_text(json.dumps(rows[2]))
    with pytest.raises(DataError, match=r"no preference pair to learn from \(1 "):
        pair_sources(str(path))
    with pytest.raises(ConfigError, match="data="):
        pair_sources("")


@pytest.mark.parametrize(
    ("setting", "said"),
    [("start=", "say start="), ("beta=0", "beta"), ("words.steps=3", r"no words\.steps"),
     ("sources=[{name: shapes}]", "no sources"), ("objective=likelihood", "")],
)  # fmt: skip
def test_recipes_that_do_not_fit(setting: str, said: str) -> None:
    from vlm.train.recipe import read_recipe

    settings = [setting, *(["holdout_captions=x"] if not said else [])]
    with pytest.raises(ConfigError, match=said or "holdout_captions"):
        read_recipe("prefer", settings)


def test_a_bad_line_ends_the_command_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"images": [], "question": "?", "chosen": "a", "rejected": "b"}\n{"chosen": 1}\n')
    assert (
        main(["train", "prefer", f"data={path}", f"out={tmp_path / 'out'}", "trackers=[]", "--offline"]) == 1
    )
    assert capsys.readouterr().err == f"error: {path}:2: chosen is no text\n"
