"""Sets of the hub as they come: Parquet with the pictures' bytes inside, through the folder tasks."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from parrot import Parrot

from vlm.conversation import Conversation
from vlm.eval import controls, runner, session, tasks
from vlm.eval.main import _parser
from vlm.eval.page import write_page
from vlm.eval.report import read_items, siblings, write_json
from vlm.eval.task import picture_names

if TYPE_CHECKING:
    from PIL import Image

Draw = Callable[..., "Image.Image"]
PICTURES = 4


def picture(draw: Draw, seed: int) -> dict[str, Any]:
    stored = io.BytesIO()
    draw(seed).save(stored, "PNG")
    return {"bytes": stored.getvalue(), "path": f"COCO_val2014_{seed:012d}.jpg"}


def vqa_rows(draw: Draw) -> list[dict[str, Any]]:
    """VQA v2 as its copy on the hub has it: three questions side by side about every picture."""
    return [
        {
            "question_type": "is this",
            "multiple_choice_answer": "yes",
            "answers": [
                {"answer": "yes" if n < 7 else "no", "answer_confidence": "maybe", "answer_id": n + 1}
                for n in range(10)
            ],
            "image_id": seed,
            "answer_type": "yes/no",
            "question_id": 1000 * seed + at,
            "question": f"Is this a picture of {at}?",
            "image": picture(draw, seed),
        }
        for seed in range(PICTURES)
        for at in range(3)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def run(folder: Path, task: str, out: Path, *extra: str) -> dict[str, Any]:
    args = _parser().parse_args([task, "--data", str(folder), "--out", str(out), *extra])
    chosen = tasks.get(task)
    examples = chosen.examples(args.data, args.split)
    return session.Session(chosen, args, Parrot(), out, examples).evaluate()


def test_questions(draw: Draw, tmp_path: Path) -> None:
    rows = vqa_rows(draw)
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", rows)
    write(tmp_path / "data" / "train-00000-of-00001.parquet", rows[:2])
    examples = tasks.get("folder-vqa").examples(tmp_path, "validation")
    assert [example.id for example in examples] == [str(row["question_id"]) for row in rows]
    assert [example.images[0] for example in examples] == [row["image"]["bytes"] for row in rows]
    assert examples[0].answers == ("yes",) * 7 + ("no",) * 3
    # A picture's questions share its bytes: a set of three a picture takes a third of the memory.
    assert len({id(example.images[0]) for example in examples}) == PICTURES
    out = tmp_path / "r.json"
    block = run(tmp_path, "folder-vqa", out, "--split", "validation")
    assert (block["split"], block["n"]) == ("dev", 12)
    assert block["breakdown"]["question_type=is this"]["n"] == 12
    assert block["controls"]["prior"]["metrics"]["accuracy_strict"] == 100.0
    assert block["controls"]["shuffled"]["metrics"] is not None
    write_json(out, block)
    page = write_page(out).read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 12
    assert len([row for row in read_items(out) if "thumbnails" in row]) == 12
    assert siblings(out, "items").stat().st_size < 200_000


def test_captions(draw: Draw, tmp_path: Path) -> None:
    rows = [
        {"image": picture(draw, seed), "caption": [f"a cat {seed}", "a small cat"], "filename": f"{seed}.jpg"}
        for seed in range(PICTURES)
    ]
    write(tmp_path / "test-00000-of-00001.parquet", rows)
    examples = tasks.get("folder-caption").examples(tmp_path, "test")
    assert [example.answers for example in examples] == [(f"a cat {n}", "a small cat") for n in range(4)]
    block = run(tmp_path, "folder-caption", tmp_path / "r.json", "--split", "test", "--no-java")
    assert block["main_metric"] == "cider"
    assert block["controls"]["prior"]["metrics"] is None
    assert "no part called train or training" in block["controls"]["prior"]["reason"]


def test_pictures_are_told_apart_without_spelling_them_out(draw: Draw, tmp_path: Path) -> None:
    images = [picture(draw, seed % 2)["bytes"] for seed in range(4)]
    asked = [Conversation.ask([image], f"q{n}") for n, image in enumerate(images)]
    assert len({picture_names(each.images) for each in asked}) == 2
    assert all(len(name) == 64 for each in asked for name in picture_names(each.images))
    moved = controls.shuffled(asked)
    assert [each.images[0] for each in moved] == [images[1 - n % 2] for n in range(4)]
    model = Parrot()
    work = runner.Work([str(n) for n in range(4)], asked, {"batch_size": 1}, {})
    runner.answer_all(model, work, tmp_path / "a.jsonl", "test", lambda text: None)
    # Questions about one picture stand side by side, whatever the order of the pictures.
    order = [int(text.partition("[")[0][1:]) % 2 for text in model.asked]
    assert order in ([0, 0, 1, 1], [1, 1, 0, 0])
