"""`vlm data`: check, convert, questions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vlm.cli import main as vlm
from vlm.data.check import check_source
from vlm.data.duplicates import duplicate_groups, leaks, look_alike, print_of
from vlm.data.sources import read_dataset
from vlm.images import open_picture


def test_a_sound_folder_is_fine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlm(["data", "check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "all: 10 examples, 10 pictures, 0 unusable rows" in out and out.count("sample ") == 3
    assert "assistant: \u27e6picture number 0\u27e7" in out
    assert "10, 3.0 words on average" in out and "vocabulary 12 words, 10 of them once" in out


def test_a_part_that_cannot_be_read_is_not_passed_over(
    flickr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vlm(["data", "check", str(flickr), "--samples", "0"]) == 0
    parts = capsys.readouterr().out
    assert "train: 2 examples" in parts and "test" not in parts, "a part that is not there is no problem"
    (flickr / "Images" / "a.jpg").unlink()
    assert vlm(["data", "check", str(flickr), "--samples", "0"]) == 1
    out = capsys.readouterr().out
    assert "train: cannot be read: 1 photographs of train are not in" in out
    assert "dev: 1 examples" in out and out.endswith("not fine\n")
    assert vlm(["data", "check", str(flickr), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [part["part"] for part in report["parts"]] == ["train", "dev"]
    assert "a.jpg" in report["parts"][0]["problem"] and report["parts"][1]["problem"] is None


def test_a_part_of_a_folder_whose_table_is_no_text_is_not_passed_over(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = folder.parent / "both"
    both.mkdir()
    shutil.copytree(folder, both / "train")
    folder.rename(both / "validation")
    assert vlm(["data", "check", str(both), "--samples", "0"]) == 1, "the same pictures are in both"
    assert "cannot be read" not in capsys.readouterr().out
    (both / "train" / "metadata.jsonl").write_bytes(b'{"file_name": "000.png", "text": "caf\xe9"}\n')
    assert vlm(["data", "check", str(both), "--samples", "0"]) == 1
    assert "train: cannot be read:" in (out := capsys.readouterr().out)
    assert "is not UTF-8 text" in out and "dev: 10 examples" in out


def test_every_picture_is_decoded_and_causes_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(whole[: len(whole) // 2])
    (folder / "002.png").write_bytes(b"hello")
    (folder / "003.png").write_bytes(b"")
    assert vlm(["data", "check", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (part,) = report["parts"]
    assert (part["examples"], part["bad"], report["ok"]) == (7, 3, False)
    assert part["causes"] == {"picture truncated": 1, "picture format": 1, "picture empty": 1}
    assert any("002.png" in row for row in part["bad_rows"])
    assert vlm(["data", "check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "30.0% of the rows" in out and "001.png" in out


def test_copies_are_found_through_recompression_and_scaling(
    tmp_path: Path, draw: Callable[..., Image.Image]
) -> None:
    names = []
    for seed in range(40):
        draw(seed, 96).save(tmp_path / f"{seed}.png")
        names.append(f"{seed}.png")
    draw(3, 96).save(tmp_path / "copy.jpg", quality=60)
    draw(4, 96).resize((50, 50), Image.Resampling.BICUBIC).save(tmp_path / "small.png")
    prints = {}
    for name in [*names, "copy.jpg", "small.png"]:
        picture = open_picture(tmp_path / name)
        prints[name] = print_of(name, picture.sha256, picture.pixels)
    groups = [[item.name for item in group] for group in duplicate_groups(list(prints.values()))]
    assert sorted(groups) == [["3.png", "copy.jpg"], ["4.png", "small.png"]]
    pairs = leaks([prints[name] for name in names], [prints["copy.jpg"], prints["small.png"]])
    assert [(one.name, two.name) for one, two in pairs] == [("copy.jpg", "3.png"), ("small.png", "4.png")]
    assert not look_alike(prints["1.png"], prints["2.png"])


def test_a_leak_into_a_held_out_part_is_found(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.open(folder / "004.png").resize((80, 80)).save(other / "x.png")
    (other / "metadata.csv").write_text("file_name,text\nx.png,the same\n")
    assert check_source(folder).ok
    report = check_source(folder, [f"{other}:train"])
    assert [(Path(held).name, Path(train).name) for held, train in report.leaks] == [("x.png", "004.png")]
    assert not report.ok


def test_repeated_questions_and_answers_are_counted(tmp_path: Path, save: Callable[..., Path]) -> None:
    save(tmp_path / "a.png", 1)
    save(tmp_path / "b.png", 2)
    rows = [
        ("a", "what?", "Dog"),
        ("a", "what?", "dog"),
        ("a", "where?", "on the beach"),
        ("b", "what?", "cat"),
    ]
    text = "file_name,question,answer\n" + "".join(f"{n}.png,{q},{a}\n" for n, q, a in rows)
    (tmp_path / "metadata.csv").write_text(text)
    (part,) = check_source(tmp_path).parts
    assert part.repeated == ["metadata.csv:3"]
    assert dict(part.answers) == {"dog": 2, "on the beach": 1, "cat": 1}
    assert dict(part.answer_words) == {1: 3, 3: 1}


def test_one_answer_to_everything_is_warned_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{n:03}.png,what?,Yes\n" for n in range(4))
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,question,answer\n" + rows)
    assert vlm(["data", "check", str(folder)]) == 0
    assert "WARNING: every question has the same answer" in capsys.readouterr().out
    (folder / "metadata.csv").write_text("file_name,question,answer\n" + rows + "000.png,why?,no\n")
    assert vlm(["data", "check", str(folder)]) == 0
    assert "WARNING" not in capsys.readouterr().out


def test_convert_and_questions_from_the_command_line(
    flickr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, asked = tmp_path / "converted", tmp_path / "asked"
    assert vlm(["data", "convert", "flickr8k", str(flickr), str(out)]) == 0
    captured = capsys.readouterr()
    assert "train: 2 pictures, 2 examples" in captured.out and "skipped test" in captured.err
    assert vlm(["data", "check", str(out), "--samples", "0"]) == 0
    assert vlm(["data", "questions", str(out), str(asked)]) == 0
    made = read_dataset(asked, split="train")
    assert {str(e.meta["question_type"]) for e in made} >= {"count", "yes/no"}
    assert ("How many dogs are there?", ("one",)) in {
        (e.turns[0].text.replace(" in the picture", ""), e.answers) for e in made
    }
    counted = tmp_path / "counted"
    assert vlm(["data", "questions", str(out), str(counted), "--types", "count", "who"]) == 0
    of_types = [e for e in made if e.meta["question_type"] in ("count", "who")]
    assert [(e.turns, e.answers) for e in read_dataset(counted, split="train")] == [
        (e.turns, e.answers) for e in of_types
    ]
    assert "--seed 0 --types count who`" in (counted / "dataset.json").read_text()
    with pytest.raises(SystemExit, match="2"):
        vlm(["data", "questions", str(out), str(counted), "--types", "guess"])
    assert vlm(["data", "convert", "nothing", str(flickr), str(out)]) == 2
    assert "error: unknown data set 'nothing'" in capsys.readouterr().err
    assert vlm(["data", "check", str(tmp_path / "absent")]) == 1


@pytest.mark.parametrize("damaged", ["train", "dev"])
def test_a_part_that_cannot_be_read_is_not_left_out_of_what_is_written(
    damaged: str, flickr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out, asked = tmp_path / "whole", tmp_path / "out", tmp_path / "asked"
    assert vlm(["data", "convert", "flickr8k", str(flickr), str(whole)]) == 0
    (flickr / "Images" / ("a.jpg" if damaged == "train" else "c.jpg")).unlink()
    assert vlm(["data", "convert", "flickr8k", str(flickr), str(out)]) == 1
    assert f"error: the {damaged} part cannot be read, so nothing is written" in capsys.readouterr().err
    part = whole / ("train" if damaged == "train" else "validation") / "metadata.jsonl"
    part.write_bytes(part.read_bytes() + b"\xff\n")
    assert vlm(["data", "questions", str(whole), str(asked)]) == 1
    assert "is not UTF-8 text" in capsys.readouterr().err
    assert not out.exists() and not asked.exists()


def test_a_part_of_an_earlier_conversion_is_not_left_beside_the_new_ones(
    flickr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "convert", "flickr8k", str(flickr), str(tmp_path / "out")]
    assert vlm(words) == 0 and vlm(words) == 0
    described = (tmp_path / "out" / "dataset.json").read_bytes()
    (flickr / "Flickr_8k.devImages.txt").unlink()
    assert vlm(words) == 1
    assert "out holds validation of an earlier conversion" in capsys.readouterr().err
    assert (tmp_path / "out" / "dataset.json").read_bytes() == described
    assert [e.id for e in read_dataset(tmp_path / "out", split="dev")] == ["flickr8k/c.jpg"]
    shutil.rmtree(tmp_path / "out" / "validation")
    assert vlm(words) == 0
    assert "validation" not in (tmp_path / "out" / "dataset.json").read_text()


def test_a_converted_set_without_a_dev_part_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    from vlm.data.sources import find_root

    source, small = find_root("easy-vqa", None), tmp_path / "small"
    for part in ("train", "test"):
        rows = [row for row in json.loads((source / part / "questions.json").read_text()) if row[2] < 40]
        (small / part / "images").mkdir(parents=True)
        (small / part / "questions.json").write_text(json.dumps(rows))
        for n in range(40):
            (small / part / "images" / f"{n}.png").write_bytes(
                (source / part / "images" / f"{n}.png").read_bytes()
            )
    assert vlm(["data", "convert", "easy-vqa", str(small), str(tmp_path / "out")]) == 0
    for split in ("train", "train-rest", "dev", "test"):
        original = {(e.id, e.answers) for e in read_dataset(small, split=split)}
        assert (
            original and {(e.id, e.answers) for e in read_dataset(tmp_path / "out", split=split)} == original
        )
    report = check_source(tmp_path / "out")
    assert [part.name for part in report.parts] == ["train-rest", "dev", "test"]


def test_samples_can_be_shown_as_the_model_sees_them(folder: Path, make_tiny: Callable[..., object]) -> None:
    from vlm.data.show import masked_sample

    (example, *_) = read_dataset(folder)
    for adapter, mark in (("flamingo", ""), ("qformer", "<picture 1>")):
        shown = masked_sample(make_tiny(adapter), example)  # type: ignore[arg-type]
        assert "\u27e6picture number 0<|im_end|>\u27e7" in shown and shown.count("\u27e6") == 1
        assert mark in shown and "Describe the picture." in shown.split("\u27e6")[0]
