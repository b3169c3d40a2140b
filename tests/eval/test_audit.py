"""The audit of scorers, and contamination."""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from vlm.conversation import ImageSlot, Turn
from vlm.data.convert.common import make_example
from vlm.errors import ConfigError, DataError
from vlm.eval import contamination, tasks
from vlm.eval.audit import PROTOCOLS, audit
from vlm.eval.main import main
from vlm.eval.metrics.vqa import CONTRACTIONS, evalai
from vlm.eval.predictions import AnswerFile, Prediction, export
from vlm.eval.session import show
from vlm.images import Picture

FIXTURES = Path(__file__).parent / "fixtures"


def vqa(answers: list[str], **meta: Any) -> Any:
    return make_example("x.jpg", "q?", answers, "1", meta)


def scores(answer: str, example: Any, task: str = "vqav2") -> dict[str, float]:
    found: dict[str, float] = audit([example], [answer], task)["scores"]
    return {name: round(value, 6) for name, value in found.items()}


def test_agreeing_references_are_not_normalised_by_the_official_rule_alone() -> None:
    found = scores("the red", vqa(["red"] * 10))
    assert found.pop("official") == 0.0
    assert set(found.values()) == {100.0}
    found = scores("red", vqa(["The red"] * 10))
    assert found.pop("official") == 0.0 and found.pop("lavis") == 0.0
    assert set(found.values()) == {100.0}, "agreeing references are normalised by the others"


def test_equal_annotations_without_ids_cancel() -> None:
    example = vqa(["dog"] * 10, confidences="|".join(["yes"] * 10))
    found = scores("dog", example)
    assert (found["official"], found["llava"]) == (100.0, 100.0)
    assert (found["open_flamingo"], found["lavis"]) == (0.0, 0.0)
    assert found["lmms-eval"] == 100.0, "it leaves one out by its place"
    assert scores("dog", vqa(["dog"] * 10))["open_flamingo"] == 100.0


def test_lmms_eval_takes_commas_out_everywhere_but_in_vqav2() -> None:
    """Its okvqa, vizwiz_vqa and textvqa send both sides through EvalAI's processor, agreeing or not."""
    for agreed in (["joe's diner"] * 10, ["joe's diner"] * 9 + ["x"]):
        for task, expected in (("vqav2", 0.0), ("okvqa", 100.0), ("vizwiz", 100.0), ("textvqa", 100.0)):
            assert scores("joe 's diner", vqa(agreed), task)["lmms-eval"] == expected
    for task in ("vqav2", "okvqa", "vizwiz", "textvqa"):
        assert scores("coca-cola", vqa(["coca-cola"] * 10), task)["lmms-eval"] == 100.0


def test_evalai_processor_is_lmms_evals_own() -> None:
    package = importlib.util.find_spec("lmms_eval")
    if package is None or not package.submodule_search_locations:
        pytest.skip("lmms-eval is not installed")
    path = Path(package.submodule_search_locations[0]) / "tasks" / "_task_utils" / "vqa_eval_metric.py"
    spec = importlib.util.spec_from_file_location("vqa_eval_metric", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs, chance = module.EvalAIAnswerProcessor(), random.Random(7)
    words = [
        *CONTRACTIONS,
        "The",
        "two",
        "none",
        "Joe's",
        "10,000",
        "7:30",
        "a.m.",
        "t-shirt",
        "yes?",
        "x\ty",
    ]
    for _ in range(3000):
        text = " ".join(chance.choices(words, k=chance.randint(0, 4))) + chance.choice(["", ".", " !", ",a"])
        assert evalai(text) == theirs(text)


def test_the_official_rule_is_the_tasks_own() -> None:
    agreed, apart = vqa(["coca-cola"] * 10), vqa(["2 liters"] * 6 + ["two liters"] * 4)
    found = {task: scores("coca-cola", agreed, task)["official"] for task in ("vqav2", "vizwiz", "textvqa")}
    assert found == {"vqav2": 100.0, "vizwiz": 0.0, "textvqa": 100.0}
    found = {task: scores("2 liters", apart, task)["official"] for task in ("vqav2", "vizwiz", "textvqa")}
    assert found == {"vqav2": 100.0, "vizwiz": 100.0, "textvqa": 100.0}
    found = {task: scores("two liters", apart, task)["official"] for task in ("vqav2", "vizwiz", "textvqa")}
    assert found == {"vqav2": 100.0, "vizwiz": 100.0, "textvqa": 100.0}, "the answer becomes 2 liters"
    whys = [audit([agreed], ["coca-cola"], task)["differing"][0]["why"] for task in ("vizwiz", "vqav2")]
    assert "official: references stay as they are: 'coca-cola', not 'coca cola'" in whys[0]
    assert whys[1] == ["lavis: the answer is normalised, references that agree are not"]


def test_open_flamingo_cuts_at_the_first_comma() -> None:
    found = scores("rice, beans", vqa(["rice"] * 5 + ["beans"] * 5))
    assert (found["official"], found["open_flamingo"]) == (0.0, 100.0)


def test_lavis_keeps_number_words_of_references() -> None:
    found = scores("2", vqa(["two"] * 9 + ["three"]))
    assert (found["official"], found["lavis"]) == (100.0, 0.0)


def test_evalai_takes_the_possessive_apart() -> None:
    found = audit([vqa(["joe diner"] * 9 + ["x"])], ["joe's diner"])
    assert found["scores"]["llava"] == 0.0
    found = audit([vqa(["joe's diner"] * 9 + ["x"])], ["joe 's diner"])
    assert (found["scores"]["official"], found["scores"]["llava"]) == (0.0, 100.0)
    assert any("llava: commas" in reason for reason in found["differing"][0]["why"])


def test_every_differing_item_is_explained() -> None:
    task = tasks.get("vizwiz")
    examples = task.examples(FIXTURES / "vizwiz")
    found = audit(examples, [e.answers[0] for e in examples], "vizwiz")
    assert found["scores"]["official"] == 100.0
    assert found["scores"]["open_flamingo"] < 60.0
    assert len(found["differing"]) == 12
    assert all(row["why"] for row in found["differing"])
    assert set(found["scores"]) == {protocol.name for protocol in PROTOCOLS}


def test_audit_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = tasks.get("vqav2")
    examples = task.examples(FIXTURES / "vqav2")
    path, out = tmp_path / "p.json", tmp_path / "a.json"
    path.write_text(json.dumps(export(task, examples, ["the red"] * 12)), encoding="utf-8")
    arguments = ["--data", str(FIXTURES / "vqav2"), "--predictions", str(path), "--out", str(out)]
    assert main(["audit", "vqav2", *arguments]) == 0
    assert "all say 'red'" in capsys.readouterr().out
    assert json.loads(out.read_text(encoding="utf-8"))["n"] == 12


@pytest.mark.parametrize("name", ["vqav2", "vizwiz"])
def test_a_run_is_audited_by_its_own_files(name: str, tmp_path: Path) -> None:
    """Without task and data, and to the same scores as with them."""
    task = tasks.get(name)
    examples = task.examples(FIXTURES / name)
    answers = [f"the {e.answers[0]}" if n % 2 else e.answers[0] for n, e in enumerate(examples)]
    data, results, out = FIXTURES / name, tmp_path / "p.json", tmp_path / "r.json"
    results.write_text(json.dumps(export(task, examples, answers)), encoding="utf-8")
    anyone = ["--data", str(data), "--predictions", str(results)]
    assert main(["score", name, *anyone, "--out", str(out), "--no-html"]) == 0
    said = AnswerFile(tmp_path / "r.answers.blank.jsonl", {"task": name})
    said.load()
    said.append(Prediction(e.id, "red", -1.0, 2, "stop") for e in examples)
    found = {}
    for label, arguments in {
        "named": [name, *anyone],
        "report": [str(out)],
        "items": [str(tmp_path / "r.items.jsonl")],
        "blank": [str(tmp_path / "r.answers.blank.jsonl")],
    }.items():
        assert main(["audit", *arguments, "--out", str(tmp_path / "audit.json")]) == 0
        found[label] = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert found["named"] == found["report"] == found["items"]
    assert found["blank"]["scores"] == pytest.approx(audit(examples, ["red"] * 12, name)["scores"])
    assert found["blank"]["scores"] != found["named"]["scores"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", '[{"question_id": 1, "answer": "a"}]', "no report of vlm eval.*audit TASK --data DIR"),
        ("r.answers.jsonl", "{}", r"r\.json is missing; .*audit TASK --data DIR"),
        ("vqav2", None, "vqav2 is missing; .*--predictions FILE"),
    ],
)
def test_answers_without_a_report_want_their_task(
    name: str, text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        main(["audit", str(tmp_path / name)])


def test_captions_are_not_audited(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="flickr30k has captions"):
        main(["audit", "flickr30k", "--data", str(FIXTURES / "flickr30k"), "--predictions", str(tmp_path)])


def test_too_few_references() -> None:
    with pytest.raises(ConfigError, match="four references"):
        audit([vqa(["a", "b"])], ["a"])


class Eyes:
    """Features: the picture's mean colour, at one place."""

    def encode(self, pictures: list[Picture]) -> torch.Tensor:
        mean = [torch.tensor(p.pixels.resize((1, 1)).getpixel((0, 0)), dtype=torch.float32) for p in pictures]
        return torch.stack(mean)[:, None]


def draw(path: Path, corner: int, **save: Any) -> Path:
    pixels = Image.linear_gradient("L").resize((96, 96)).convert("RGB")
    pixels.paste((200, corner, 40), (corner % 64, corner // 4, 96, 64))
    pixels.save(path, **save)
    return path


def test_contamination_looks_at_every_picture_of_an_item(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tmp_path / "train"
    train.mkdir()
    clean, leaked, third = (draw(tmp_path / f"{n}.png", n) for n in (120, 10, 60))
    draw(train / "a.jpg", 10, quality=70)
    pair = replace(
        make_example(clean, "same?", ["x"], "1"),
        images=(clean, leaked),
        turns=(Turn("user", (ImageSlot(0), ImageSlot(1), "same?")),),
    )
    examples = [pair, make_example(third, "what?", ["y"], "2")]
    session = SimpleNamespace(
        examples=examples, model=Eyes(), task=tasks.get("folder-vqa"), train=lambda: examples
    )
    found = contamination.overlap(session, train, ["x", "y"])  # type: ignore[arg-type]
    assert (found["pictures"], found["examples"], found["without"]["n"]) == (1, 1, 1)
    assert contamination.lines(found, "exact_match") == [
        "1 pictures of 1 examples are among 1 training pictures",
        "exact_match of the 1 other examples: 100.00 (95 % 100.00 to 100.00)",
        "100.0 % of the questions are asked in training, word for word",
    ]
    block = {"task": "t", "split": "s", "n": 2, "comparable": True, "metrics": {}, "intervals": {}}
    block |= {"main_metric": "exact_match", "controls": {}, "skipped": {}, "rates": {}}
    show(block | {"contamination": found}, tmp_path)
    assert "  exact_match of the 1 other examples: 100.00" in capsys.readouterr().out


def test_contamination_counts_look_alikes_and_scores_without_them(tmp_path: Path) -> None:
    train = tmp_path / "train"
    train.mkdir()
    leaked = draw(tmp_path / "a.png", 10)
    draw(train / "a.jpg", 10, quality=70)  # the same picture, compressed again
    other = draw(tmp_path / "b.png", 120)
    draw(train / "c.png", 250)
    examples = [make_example(leaked, "what?", ["x"], "1"), make_example(other, "what?", ["y"], "2")]
    session = SimpleNamespace(
        examples=examples, model=Eyes(), task=tasks.get("folder-vqa"), train=lambda: examples[:1]
    )
    found = contamination.overlap(session, train, ["x", "no"])  # type: ignore[arg-type]
    assert (found["pictures"], found["examples"], found["training_pictures"]) == (1, 1, 2)
    assert found["pairs"] == [(str(leaked), str(train / "a.jpg"))]
    assert found["without"]["n"] == 1
    assert found["without"]["metrics"]["exact_match"] == 0.0
    assert found["questions_seen"] == 100.0
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no training pictures"):
        contamination.overlap(session, tmp_path / "empty", ["x", "no"])  # type: ignore[arg-type]
