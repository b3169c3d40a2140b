"""The stage of words, and what a run tells of the encoder's labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from vlm.config import CAPTION_PROMPT, HintsConfig
from vlm.conversation import Conversation
from vlm.data.collate import Group, Pair
from vlm.data.example import Example
from vlm.data.kinds import NAMING
from vlm.errors import DataError
from vlm.train.config import HintsTraining, WordsConfig
from vlm.train.hints import Told, drawn_labels, naming

if TYPE_CHECKING:
    from vlm.train.config import TrainConfig
    from vlm.train.loop import Step, Trainer

Recipe = Callable[..., "TrainConfig"]
TrainerOf = Callable[["TrainConfig"], "tuple[Trainer, list[Step]]"]


def captioned(name: str, *captions: str) -> Group:
    turns = Conversation.ask([name], CAPTION_PROMPT).turns
    example = Example(images=(name,), turns=turns, answers=captions, id=name)
    return Group(name, (name,), [[Pair(example, text, 1.0) for text in captions]], (5,))


def test_targets_are_shares_of_the_captions() -> None:
    from vlm.train.words import WordTargets

    groups = [captioned("a", "a dog runs", "the dog sits"), captioned("b", "a cat sits", "a cat's ear")]
    targets = WordTargets(groups, rarest=1)
    assert targets.words == ["cat", "cat's", "dog", "ear", "runs", "sits"]
    assert targets("a").tolist() == [0, 0, 1, 0, 0.5, 0.5]
    assert targets("b").tolist() == [0.5, 0.5, 0, 0.5, 0, 0.5]
    assert WordTargets(groups, rarest=2).words == ["sits"]
    with pytest.raises(DataError, match=r"words\.steps"):
        WordTargets(groups, rarest=3)


def test_answers_to_questions_count_in_full() -> None:
    from vlm.train.words import word_shares

    group = captioned("a", "a dog runs", "a dog sits", "a cat", "it sits")
    for question, answer in (("Is it red?", "no"), ("What color is it?", "light blue"), ("Who?", "a cat")):
        turns = Conversation.ask(["a"], question).turns
        example = Example(images=("a",), turns=turns, answers=(answer,), id=question)
        group.by_source.append([Pair(example, answer, 1.0)])
    said = word_shares(group)
    assert said == {"dog": 0.5, "runs": 0.25, "sits": 0.5, "cat": 1.0, "light": 1.0, "blue": 1.0}


def test_an_untaught_head_says_how_common_words_are() -> None:
    from vlm.train.words import WordHead

    frequency = torch.tensor([0.5, 0.1, 0.001])
    head = WordHead(8, 4, frequency)
    said = head(torch.zeros(2, 4, 8)).sigmoid()
    torch.testing.assert_close(said, frequency.expand(2, 3), atol=0.05, rtol=0.3)


@pytest.mark.parametrize("adapter", ["flamingo", "qformer"])
def test_words_are_learnt_and_the_rest_stays(adapter: str, recipe: Recipe, trainer_of: TrainerOf) -> None:
    config = recipe(adapter, objective="words", steps=300, words=WordsConfig(rarest=1))
    config = replace(config, optim=replace(config.optim, lr=1e-2))
    trainer, steps = trainer_of(config)
    before = {name: value.clone() for name, value in trainer.adapter.state_dict().items()}
    trainer.learn(save=False)
    first, last = (sum(step.loss for step in epoch) for epoch in (steps[:3], steps[-3:]))
    assert last < 0.9 * first  # epochs of 12 pictures: batches differ in how many words are said
    moved = {n for n, value in trainer.adapter.state_dict().items() if not torch.equal(value, before[n])}
    assert moved
    if adapter == "flamingo":
        assert all(name.startswith("resampler.") for name in moved)


def test_a_killed_run_of_words_goes_on_exactly(recipe: Recipe, trainer_of: TrainerOf, tmp_path: Path) -> None:
    config = recipe(objective="words", steps=6, words=WordsConfig(rarest=1))
    whole, steps = trainer_of(replace(config, out=str(tmp_path / "whole")))
    whole.learn(save=False)
    first, some = trainer_of(config)
    first.report = lambda step: (some.append(step), first.stop() if step.step == 3 else None)  # type: ignore[func-returns-value]
    first.learn()
    second, rest = trainer_of(config)
    second.resume()
    second.learn(save=False)
    assert [s.loss for s in some + rest] == [s.loss for s in steps]


def test_one_command_teaches_words_and_then_sentences(recipe: Recipe, capsys: Any) -> None:
    from vlm.checkpoint import load_model
    from vlm.train.run import train

    config = recipe(words=WordsConfig(steps=3, batch=4, rarest=1), steps=2)
    assert train(config, offline=True)
    out = Path(config.out)
    assert len((out / "words" / "log.jsonl").read_text().splitlines()) == 3
    assert json.loads((out / "words" / "run.json").read_text())["recipe"]["objective"] == "words"
    taught, final = load_model(out / "words", offline=True), load_model(out, offline=True)
    # Two gentle steps from what was taught, not from fresh weights.
    start = taught.adapter.state_dict()["resampler.latents"]
    torch.testing.assert_close(final.adapter.state_dict()["resampler.latents"], start, atol=0.02, rtol=0.02)
    assert train(config, offline=True)  # a whole run is not begun again
    assert len((out / "words" / "log.jsonl").read_text().splitlines()) == 3


def test_pictures_set_aside_are_no_part_of_the_words(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm.train import run

    seen: dict[str, set[str]] = {"words": set(), "sentences": set()}

    def watched(kind: type[Trainer], stage: str) -> type[Trainer]:
        class Watched(kind):  # type: ignore[misc, valid-type]
            def prepare(self, groups: Any, epoch: int) -> Any:
                seen[stage] |= {group.id for group in groups}
                return super().prepare(groups, epoch)

        return Watched

    monkeypatch.setitem(run.TRAINERS, "words", watched(run.WordTrainer, "words"))
    monkeypatch.setattr(run, "Trainer", watched(run.Trainer, "sentences"))
    config = recipe(words=WordsConfig(steps=6, batch=12, rarest=1), holdout=0.25, steps=6)
    assert run.train(config, offline=True)
    assert len(seen["words"]) == 9  # of twelve pictures
    assert seen["words"] == seen["sentences"]
    assert not (Path(config.out) / "words" / "holdout.json").exists()
    assert "3 pictures that training has not seen" in capsys.readouterr().out


# --- hints --------------------------------------------------------------------------------------------


class Labels:
    """A store whose classifier calls every picture by its group's name, and knows two other things."""

    features = SimpleNamespace(encoder=SimpleNamespace(labels=("lion", "kite")))

    def labels(self, group: Group, view: str) -> list[list[tuple[str, float]]]:
        return [[(group.id, 0.9)] for _ in group.images]

    def rarity(self, label: str) -> float:
        return 1.0


def drawn(group: Group, epoch: int, groups: list[Group], config: TrainConfig) -> Told:
    return drawn_labels(group, "whole", epoch, groups, Labels(), config)  # type: ignore[arg-type]


def named(told: Told, epoch: int, config: TrainConfig) -> list[tuple[str, str, list[str]]]:
    """The naming question of an epoch, if any: (question, answer, hints)."""
    processor = SimpleNamespace(tokens=lambda asked, answer, hints: (asked.turns[-1].text, answer, hints))
    group = captioned("a picture", "x")
    return [asked for asked, _ in naming(group, told, epoch, Labels(), processor, config)]  # type: ignore[arg-type]


def test_hints_are_drawn_as_often_as_the_recipe_says(recipe: Recipe) -> None:
    config = replace(recipe(), hints=HintsTraining(drop=0.2, swap=0.1, foreign=0.15))
    groups = [captioned(f"thing{i}", "a thing") for i in range(1000)]
    found: Counter[str] = Counter()
    for group in groups:
        told = drawn(group, 0, groups, config)
        (hint,) = told.texts
        if told.foreign:
            assert told.name in ("lion", "kite") and hint == f"Perhaps {told.name}.\n"
            found["foreign"] += 1
        elif not hint:
            assert told.name == group.id
            found["none"] += 1
        else:
            own = f"{group.id}." in hint
            assert told.name == (group.id if own else "")  # nobody is asked to name what another shows
            found["own" if own else "other"] += 1
        assert drawn(group, 0, groups, config) == told
    assert 150 < found["none"] < 250
    assert 60 < found["other"] < 140
    assert 110 < found["foreign"] < 190


def test_naming_questions_ask_what_the_classifier_is_sure_of(recipe: Recipe) -> None:
    config = replace(recipe(), hints=HintsTraining(drop=0.0, swap=0.0, naming=1.0, sure=0.5))
    group = captioned("espresso", "x")
    told = drawn(group, 0, [group], config)
    ((question, answer, hints),) = named(told, 0, config)
    assert (question in NAMING, answer, hints) == (True, "an espresso", ["Perhaps espresso.\n"])
    assert named(told, 0, replace(config, hints=HintsTraining(naming=0.0))) == []
    unsure = replace(config, hints=HintsTraining(drop=0.0, swap=0.0, naming=1.0, sure=0.95))
    assert named(drawn(group, 0, [group], unsure), 0, unsure) == []


def test_a_foreign_label_is_always_asked_after(recipe: Recipe) -> None:
    config = replace(recipe(), hints=HintsTraining(naming=0.0))
    for epoch in range(50):
        ((question, answer, hints),) = named(Told([[("lion", 1.0)]], "lion", foreign=True), epoch, config)
        assert question in NAMING or "animal" in question
        assert "lion" in answer and hints == ["Perhaps lion.\n"]


def test_of_a_picture_with_a_foreign_label_nothing_but_its_name_is_learnt(
    recipe: Recipe, trainer_of: TrainerOf
) -> None:
    config = recipe()
    config = replace(
        config,
        model=replace(config.model, hints=HintsConfig(count=2, least=0.0)),
        hints=HintsTraining(drop=0.0, swap=0.0, foreign=1.0),
    )
    trainer, _ = trainer_of(config)
    part = trainer.prepare(trainer.groups[:4], 0)
    assert len(part.rows) == 4
    for row in part.rows:
        assert len(row.ends) == 1 and "Perhaps" in trainer.model.language.decode(row.codes[:30])


def test_naming_asks_after_kinds_too(recipe: Recipe) -> None:
    config = replace(recipe(), hints=HintsTraining(naming=1.0, sure=0.5))
    said: Counter[tuple[bool, str]] = Counter()
    for epoch in range(400):
        ((question, answer, _),) = named(Told([[("tabby", 0.9)]], "tabby"), epoch, config)
        said[question in NAMING, answer] += 1
        assert question in NAMING or "animal" in question
    assert set(said) == {(True, "a tabby"), (False, "cat")}
    assert 150 < said[True, "a tabby"] < 250


def test_a_run_with_hints(recipe: Recipe, losses_of: Callable[[TrainConfig], list[float]]) -> None:
    config = recipe()
    config = replace(
        config,
        model=replace(config.model, hints=HintsConfig(count=2, least=0.0)),
        hints=HintsTraining(drop=0.2, swap=0.2, naming=1.0, sure=0.0),
    )
    with_hints = losses_of(config)
    assert with_hints == losses_of(config)
    assert with_hints != losses_of(recipe())
