"""Every recipe that ships: read, and run for two steps with tiny frozen parts on data in its set's layout."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from vlm.cli import main
from vlm.config import to_dict
from vlm.errors import ConfigError
from vlm.train.config import TrainConfig, recipe_config
from vlm.train.recipe import RECIPES, keys, read_recipe, shipped

if TYPE_CHECKING:
    from PIL import Image

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
CAPTIONS = (
    "A brown dog runs on the grass .", "A dog is running through green grass .", "The brown dog runs .",
    "A dog on a lawn .", "One dog runs across the grass .",
)  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, draw: Callable[..., Image.Image]) -> dict[str, Path | None]:
    """A folder in the layout of each set, with four pictures."""
    pictures = {f"p{n}.jpg": draw(n) for n in range(4)}

    def folder(*parts: str) -> Path:
        made = tmp_path.joinpath(*parts)
        made.mkdir(parents=True, exist_ok=True)
        return made

    for place in (folder("flickr8k", "Images"), folder("own")):
        for name, picture in pictures.items():
            picture.save(place / name)
    rows = [[name, text.replace("dog", "dog" if n % 2 else "cat")]
            for n, name in enumerate(pictures) for text in CAPTIONS]  # fmt: skip
    with open(tmp_path / "flickr8k" / "captions.txt", "w", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], *rows])
    (tmp_path / "flickr8k" / "Flickr_8k.trainImages.txt").write_text("\n".join(pictures))
    with open(tmp_path / "own" / "metadata.csv", "w", newline="") as file:
        asked = [[name, "What is it?", "dog" if n % 2 else "cat"] for n, name in enumerate(pictures)]
        csv.writer(file).writerows([["file_name", "question", "answer"], *asked])
    liked = [
        {"images": [name], "question": "What is it?", "chosen": "dog", "rejected": "cat"} for name in pictures
    ]
    (tmp_path / "own" / "pairs.jsonl").write_text("\n".join(map(json.dumps, liked)))
    for n, picture in enumerate(pictures.values()):
        picture.save(folder("daquar", "images") / f"image{n}.png")
        picture.save(folder("easy-vqa", "train", "images") / f"{n}.png")
    lines = [f"what is on the table in the image{n} ?\n{'cup' if n % 2 else 'book, cup'}" for n in range(4)]
    (tmp_path / "daquar" / "qa.37.raw.train.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "easy-vqa" / "train" / "questions.json").write_text(
        json.dumps([["what color is the shape?", "red", n] for n in range(4)])
    )
    sets = {name: tmp_path / name for name in ("flickr8k", "daquar", "easy-vqa")}
    return {name: next((sets[s] for s in sets if name.startswith(s)), tmp_path / "own") for name in NAMES}


@pytest.fixture
def start(make_tiny: Any, tmp_path: Path) -> Path:
    """A tiny adapter to start from."""
    from vlm.checkpoint import save_adapter

    save_adapter(make_tiny(), tmp_path / "start")
    return tmp_path / "start"


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_for_two_steps(
    name: str, data: dict[str, Path], start: Path, tiny_config: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    recipe = read_recipe(name)
    values = to_dict(recipe)
    values["model"] = {**to_dict(tiny_config(recipe.model.adapter)), "hints": values["model"]["hints"]}
    values["words"] = {**values["words"], "steps": min(2, recipe.words.steps), "rarest": 1}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    settings = [
        "steps=2",
        "batch=2",
        f"data={data[name]}",
        f"out={tmp_path / 'out'}",
        "save_every=1",
        "log_every=1",
    ]
    settings += [f"start={start}"] if recipe.start else []
    assert main(["train", str(path), *settings, "--offline", "--device", "cpu"]) == 0
    out = tmp_path / "out"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2]
    assert all(0 < abs(row["loss"]) < 50 for row in log)
    card = (out / "README.md").read_text()
    assert "2 of 2" in card
    assert "steps: 2" in card
    assert str(tmp_path) not in card
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "events").rglob("events.out.tfevents.*"))
    if recipe.objective == "preference":
        found = json.loads((out / "preference.json").read_text())
        assert found["pairs"] == {"trained": 3, "held_out": 1, "unused": 0}
    elif recipe.holdout:
        held = json.loads((out / "holdout.json").read_text())
        assert held["pictures"] == 1
        assert set(held["before"]) == set(held["after"])


def test_recipes_say_what_they_are() -> None:
    assert {"smoke", "flickr8k-flamingo", "flickr8k-qformer", "flickr8k-cider", "finetune"} <= set(NAMES)
    assert all(len(about) > 20 for about in shipped().values())


def test_the_two_flickr8k_recipes_differ_in_the_adapter_alone() -> None:
    one, other = (to_dict(read_recipe(f"flickr8k-{name}")) for name in ("flamingo", "qformer"))
    assert one.pop("model")["vision"] == other.pop("model")["vision"]
    assert one == other


def test_settings_reach_everything() -> None:
    config = read_recipe(
        "smoke", ["optim.lr=0.5", "sources.0.limit=3", "model.flamingo.layers=[1, 2]", "data=007"]
    )
    assert (config.optim.lr, config.sources[0].limit, config.model.flamingo.layers) == (0.5, 3, (1, 2))
    assert config.data == "007"


@pytest.mark.parametrize(
    ("written", "value"), [("4e-4", 4e-4), ("1E+0", 1.0), ("3.5e-4", 3.5e-4), ("2", 2.0)]
)
def test_a_rate_may_be_written_as_people_do(written: str, value: float) -> None:
    assert read_recipe("smoke", [f"optim.lr={written}"]).optim.lr == value


@pytest.mark.parametrize(
    "setting",
    ["optim.rate=1", "optim.lr=fast", "optim.lr=4e",
     "nonsense=1", "steps=many", "steps", "=3", "sources.7.limit=3", "steps.more=1",
     "seed=true", "steps=0", "precision=fp8", "objective=joy", "flip=2", "holdout=1",
     "optim.lr={a: [}", "keep=0", "out=", "out= ", "seed=-1", "seed=99999999999", "optim.lr=-1",
     "optim.lr=.nan", "optim.lr=.inf", "optim.betas=[0.9]", "optim.betas=[2, 3]", "optim.warmup=-5",
     "optim.decay=5", "optim.average=1", "optim.clip=0", "sources.0.limit=-3", "sources.0.weight=-1",
     "sources.0.weight=0", "sources.0.per_image=0", "sources.0.per_image=-1", "words.batch=0",
     "hints.weight=-1", "fast.lower_cache=-1"],
)  # fmt: skip
def test_wrong_settings_are_named(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError):
        read_recipe("smoke", [setting])
    assert main(["train", "smoke", setting]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_setting_may_mend_a_recipe_and_is_not_blamed_for_it(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("steps: many\n")
    assert read_recipe(str(recipe), ["steps=3"]).steps == 3
    for settings in ([], ["seed=-1"]):
        with pytest.raises(ConfigError, match="steps") as caught:
            read_recipe(str(recipe), settings)
        assert caught.value.exit_code == 1


def test_unknown_recipes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "smokee"]) == 2
    assert "flickr8k-flamingo" in capsys.readouterr().err


def test_every_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    table = list(keys())
    assert all(text.endswith(".") for _, _, text in table), [k for k, _, t in table if not t.endswith(".")]
    assert {"optim.lr", "sources.N.name", "model.flamingo.layers", "fast.int8"} <= {
        key for key, _, _ in table
    }
    assert main(["train", "--keys"]) == 0
    assert "optim.gate_lr" in capsys.readouterr().out


def test_a_recipe_survives_being_written_down() -> None:
    for name in NAMES:
        config = read_recipe(name)
        assert recipe_config(to_dict(config)) == config
        assert isinstance(config, TrainConfig)


def test_help_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in NAMES)


def test_one_gpu_of_several_is_chosen_by_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "smoke", "--device", "cuda:1"]) == 2
    assert "CUDA_VISIBLE_DEVICES=1" in capsys.readouterr().err


def test_dtype_is_the_recipes_precision(capsys: pytest.CaptureFixture[str]) -> None:
    from vlm.train.main import applied

    config = read_recipe("smoke")
    args = Namespace(dtype="bfloat16", device="cpu", offline=True, threads=None)
    assert applied(args, config) == replace(config, precision="bf16")
    args.dtype = "float32"
    assert applied(args, config) == config
    assert main(["train", "smoke", "--dtype", "float16"]) == 2
    assert "--dtype bfloat16" in capsys.readouterr().err
