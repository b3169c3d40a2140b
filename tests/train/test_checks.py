"""The data check of a run, and runs that do not care where their data lies."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vlm.data.collate import group_by_image
from vlm.errors import DataError
from vlm.images import open_picture
from vlm.train.config import SourceConfig

if TYPE_CHECKING:
    from vlm.train.config import TrainConfig
    from vlm.train.loop import Step, Trainer

Recipe = Callable[..., "TrainConfig"]
TrainerOf = Callable[["TrainConfig"], "tuple[Trainer, list[Step]]"]
PICTURES = 8


@pytest.fixture
def own(tmp_path: Path, draw: Callable[..., Any]) -> Callable[..., Path]:
    """`own(rows)`: a folder of 8 pictures about which so many questions are asked."""

    def make(rows: int = 24, place: str = "own") -> Path:
        folder = tmp_path / place
        folder.mkdir(parents=True)
        lines = ["file_name,question,answer"]
        for number in range(PICTURES):
            draw(number).save(folder / f"{number}.png")
        for number in range(rows):
            lines.append(f"{number % PICTURES}.png,What is number {number}?,{'dog' if number % 2 else 'man'}")
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
        return folder

    return make


def of(recipe: Recipe, folder: Path, **keys: Any) -> TrainConfig:
    return recipe(sources=(SourceConfig(per_image=2),), data=str(folder), **keys)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_few_bad_rows_are_left_out_counted_and_named(
    own: Callable[..., Path], recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm.train.run import train

    folder = own(800)
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes())
    cut(folder / "cut.png")
    with open(folder / "metadata.csv", "a", encoding="utf-8") as file:
        file.write("cut.png,What?,dog\nabsent.png,What?,dog\n0.png,What?,\n")
    config = of(recipe, folder, steps=1)
    assert train(config, offline=True)
    said = capsys.readouterr().err
    assert f"{folder}: 3 of 803 rows are left out: " in said
    assert "1 x picture truncated" in said
    assert "1 x picture missing" in said
    assert "1 x empty answer" in said
    assert "metadata.csv:803: picture missing (absent.png)" in said
    shown = said.split("stands in [[ ]]:")[1]
    assert shown.count("[[") == 3
    assert "<|im_start|>user\n" in shown
    assert "<|im_end|>]]" in shown
    facts = json.loads((Path(config.out) / "run.json").read_text())
    assert len(facts["left_out"]) == 3
    assert any(
        "cut.png" in row and row.startswith("metadata.csv:802: picture truncated")
        for row in facts["left_out"]
    )
    assert facts["unreadable"] == 1


def test_rows_about_no_picture_are_counted_and_nobodys_fault(
    own: Callable[..., Path], recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """An instruction file that holds more texts than pictures; the part that is set aside has some too."""
    from vlm.train.run import train

    folder = own(0)
    (folder / "metadata.csv").unlink()
    talk = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "dog"}]
    rows: list[dict[str, Any]] = [{"id": f"t{n}", "conversations": talk} for n in range(1200)]
    rows += [{"id": f"p{n}", "image": f"{n}.png", "conversations": talk} for n in range(PICTURES)]
    (folder / "mix.json").write_text(json.dumps(rows))
    config = of(recipe, folder, steps=1, holdout=0.25)
    assert train(config, offline=True)
    said = capsys.readouterr().err
    assert f"{folder}: all of its 8 rows can be used\n  no picture: 1,200 rows left out\n" in said
    facts = json.loads((Path(config.out) / "run.json").read_text())
    assert (facts["left_out"], facts["without_picture"]) == ([], 1200)
    assert "no picture: 1,200 rows left out." in (Path(config.out) / "README.md").read_text()


def test_a_sound_folder_is_said_to_be_so(
    own: Callable[..., Path], recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm.train.run import train

    folder = own()
    assert train(of(recipe, folder, steps=1), offline=True)
    assert f"{folder}: all of its 24 rows can be used" in capsys.readouterr().err
    assert train(recipe(steps=1), offline=True, fresh=True)
    assert "[[" not in capsys.readouterr().err, "drawn shapes are nobody's own pictures"


def test_more_than_one_in_a_hundred_stops_the_run(own: Callable[..., Path], recipe: Recipe) -> None:
    from vlm.train.run import train

    folder = own()
    cut(folder / "3.png")
    config = of(recipe, folder, steps=1)
    with pytest.raises(DataError, match=r"3 rows cannot be used: 3 x picture truncated\. metadata\.csv:5: "):
        train(config, offline=True)
    assert not (Path(config.out) / "adapter.safetensors").exists()


def test_rows_and_pictures_are_counted_together(own: Callable[..., Path], recipe: Recipe) -> None:
    """Less than 1 % of each, more of both."""
    from vlm.train.run import train

    folder = own(400)
    for number in range(3):
        (folder / f"bad{number}.png").write_bytes(b"hello")
    with open(folder / "metadata.csv", "a", encoding="utf-8") as file:
        file.write("bad0.png,What?,a\nbad1.png,What?,a\nbad2.png,What?,a\n" + "absent.png,What?,dog\n" * 3)
    with pytest.raises(DataError, match="6 rows cannot be used: .*3 x picture format"):
        train(of(recipe, folder, steps=1), offline=True)


def test_pictures_that_were_set_aside_are_checked_and_the_others_decoded_once(
    own: Callable[..., Path], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    from vlm.train import checks, prepare
    from vlm.train.run import make_model
    from vlm.train.run import prepare as encode
    from vlm.train.screen import Screen

    opened: Counter[str] = Counter()

    def counting(source: Any) -> Any:
        opened[str(source)] += 1
        return open_picture(source)

    monkeypatch.setattr(prepare, "open_picture", counting)
    monkeypatch.setattr(checks, "open_picture", counting)
    folder = own(800)
    config = of(recipe, folder, holdout=0.5)
    with open(folder / "metadata.csv", "a", encoding="utf-8") as file:
        for number in range(4):
            (folder / f"bad{number}.png").write_bytes(b"hello %d" % number)
            file.write(f"bad{number}.png,What?,dog\n")
    sources, held = prepare.set_aside(prepare.read_sources(config), config.holdout)
    broken = [str(image) for example in held for image in example.images if "bad" in str(image)]
    assert 0 < len(broken) < 4
    model = make_model(config, offline=True)
    groups, store = encode(config, model, group_by_image(sources), Screen(False), Accelerator(cpu=True))
    checked = checks.check("own", sources, held, store)
    reading, usable = checked.reading, checked.held
    assert len(reading.bad) == 4
    assert len(usable) == len(held) - len(broken)
    assert not any("bad" in str(image) for example in usable for image in example.images)
    assert len(groups) + len({example.images for example in usable}) == PICTURES
    assert len(opened) == PICTURES + 4
    assert set(opened.values()) == {1}
    assert model.features.cache is not None
    model.features.cache.close()


def test_where_the_data_lies_changes_nothing(
    own: Callable[..., Path], recipe: Recipe, trainer_of: TrainerOf, tmp_path: Path
) -> None:
    """The same losses under another path and other names; and a run goes on after a move."""
    folder = own(24, "z/own")
    other = tmp_path / "a" / "elsewhere"
    other.mkdir(parents=True)
    table = (folder / "metadata.csv").read_text()
    for number in range(PICTURES):
        shutil.copy(folder / f"{number}.png", other / f"renamed{9 - number}.png")
        table = table.replace(f"\n{number}.png", f"\nrenamed{9 - number}.png")
    (other / "metadata.csv").write_text(table)
    keys: dict[str, Any] = {"flip": 0.5, "steps": 6, "batch": 3, "sizes": {"dropout": 0.2}}
    first, steps = trainer_of(of(recipe, folder, **keys, out=str(tmp_path / "first")))
    assert all(group.id.startswith(str(folder)) for group in first.groups)
    first.learn(save=False)
    begun, some = trainer_of(of(recipe, folder, **keys))
    begun.report = lambda step: begun.stop() if step.step == 4 else None
    begun.learn()
    moved, rest = trainer_of(of(recipe, other, **keys))
    assert all(group.id.startswith(str(other)) for group in moved.groups)
    assert [group.key for group in moved.groups] == [group.key for group in first.groups]
    moved.resume()
    assert moved.step == 4
    moved.learn(save=False)
    assert [step.loss for step in rest] == [step.loss for step in steps[4:]]
    fresh, again = trainer_of(of(recipe, other, **keys, out=str(tmp_path / "third")))
    fresh.learn(save=False)
    assert [step.loss for step in again] == [step.loss for step in steps]
    assert some == []


def test_another_seed_draws_otherwise(
    own: Callable[..., Path], recipe: Recipe, trainer_of: TrainerOf
) -> None:
    trainer, _ = trainer_of(of(recipe, own()))
    group = trainer.groups[0]
    draws = {tuple(p.example.id for p in group.draw(seed, 0)) for seed in range(20)}
    assert len(draws) > 1
    assert group.draw(3, 1) == replace(group, id="somewhere/else.png").draw(3, 1)


def test_copies_under_other_names_are_never_on_both_sides(
    own: Callable[..., Path], recipe: Recipe, capsys: pytest.CaptureFixture[str], draw: Callable[..., Any]
) -> None:
    """The same file stays on one side; what looks like a picture set aside is not learnt."""
    from vlm.train.prepare import read_sources, set_aside
    from vlm.train.run import train

    folder = own()
    lines = []
    for number in range(PICTURES):
        shutil.copy(folder / f"{number}.png", folder / f"copy{number}.png")
        draw(number).resize((60, 60)).save(folder / f"small{number}.png")
        lines.append(f"copy{number}.png,What?,dog\nsmall{number}.png,What?,dog\n")
    with open(folder / "metadata.csv", "a", encoding="utf-8") as file:
        file.writelines(lines)
    config = of(recipe, folder, steps=1, holdout=0.2)
    (source,), held = set_aside(read_sources(config), 0.2)
    asked = {Path(str(example.images[0])).read_bytes() for example in held}
    learnt = {Path(str(example.images[0])).read_bytes() for example in source.examples}
    assert asked
    assert not asked & learnt
    assert train(config, offline=True)
    said = capsys.readouterr().err
    assert f"{PICTURES} groups of pictures look alike" in said
    assert "answers: 40, 1.0 words on average, 1 at most; vocabulary 2 words" in said
    assert "pictures look like some that are set aside and are not learnt" in said
    facts = json.loads((Path(config.out) / "run.json").read_text())
    assert facts["preflight"]["pictures"] + facts["held_out"] < 3 * PICTURES


def test_a_caption_without_a_word_is_left_out_and_counted(
    own: Callable[..., Path], recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm.data.check import check_source
    from vlm.train.run import train

    folder = own()
    lines = [f"{number % PICTURES}.png,a shape {number}" for number in range(200)]
    (folder / "metadata.csv").write_text("file_name,text\n" + "\n".join([*lines, "0.png,."]) + "\n")
    (part,) = check_source(folder).parts
    assert dict(part.causes) == {"nothing is said": 1}
    config = of(recipe, folder, steps=1)
    assert train(config, offline=True)
    assert "1 of 201 rows are left out: 1 x nothing is said" in capsys.readouterr().err


@pytest.mark.parametrize("keys", [{"pictures": 4}, {"dev": 2, "pictures": 4}])
def test_bad_rows_stay_counted_where_few_pictures_are_learnt(
    own: Callable[..., Path], recipe: Recipe, capsys: pytest.CaptureFixture[str], keys: dict[str, int]
) -> None:
    from vlm.train.run import train

    folder = own(100)
    with open(folder / "metadata.csv", "a", encoding="utf-8") as file:
        file.write("absent.png,What?,dog\n")
    assert train(of(recipe, folder, steps=1, **keys), offline=True)
    assert "rows are left out: 1 x picture missing" in capsys.readouterr().err


def test_one_picture_names_the_way_out(own: Callable[..., Path], recipe: Recipe) -> None:
    from vlm.train.run import train

    folder = own(1)
    with pytest.raises(DataError, match=r"1 picture\(s\) cannot be divided .*: say holdout=0"):
        train(of(recipe, folder, steps=1, holdout=0.2), offline=True)


def test_a_folders_own_validation_part_is_what_is_asked(
    own: Callable[..., Path],
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    draw: Callable[..., Any],
) -> None:
    from vlm.train.run import train

    own(16, "both/train")
    val = tmp_path / "both" / "val"
    val.mkdir()
    for number in range(3):
        draw(50 + number).save(val / f"v{number}.png")
    rows = "".join(f"v{number}.png,What is it?,dog\n" for number in range(3))
    (val / "metadata.csv").write_text("file_name,question,answer\n" + rows)
    config = of(recipe, tmp_path / "both", steps=1, holdout=0.2)
    assert train(config, offline=True)
    assert "has a validation part: that is asked, and nothing else set aside" in capsys.readouterr().err
    facts = json.loads((Path(config.out) / "run.json").read_text())
    assert facts["preflight"]["pictures"] == PICTURES
    found = json.loads((Path(config.out) / "holdout.json").read_text())
    assert [row["id"] for row in found["answers"]] == [f"metadata.csv:{n}" for n in (2, 3, 4)]
    assert found["set_aside"] == 3


def test_a_pair_that_is_too_long_is_left_out_whole(
    preferring: Recipe, pairs_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm.train.run import train

    place = pairs_file(80)
    rows = [json.loads(line) for line in place.read_text().splitlines()]
    rows[3]["rejected"] = "long words " * 300
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = preferring(data=place, steps=2, holdout=0.2)
    assert train(config, offline=True)
    assert "1 x too much for the model" in capsys.readouterr().err
    facts = json.loads((Path(config.out) / "run.json").read_text())
    assert [name.split(":")[0] for name in facts["left_out"]] == [rows[3]["id"]]


def test_half_a_character_is_a_bad_row(
    own: Callable[..., Path], recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm.cli import main
    from vlm.train.run import train

    folder = own(0)
    (folder / "metadata.csv").unlink()
    rows = [
        {"file_name": f"{n % PICTURES}.png", "question": f"What is {n}?", "answer": "dog"} for n in range(150)
    ]
    rows[3]["question"] = "What is \ud83d?"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(folder)]) == 0
    assert "half a character" in capsys.readouterr().out
    assert train(of(recipe, folder, steps=1), offline=True)
    assert "1 of 150 rows are left out: 1 x half a character" in capsys.readouterr().err
