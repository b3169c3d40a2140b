"""The public sets' downloads, read as they are, and written as image folders."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.config import CAPTION_PROMPT
from vlm.data.convert import daquar, flickr8k
from vlm.data.convert.common import make_example
from vlm.data.convert.write import write_dataset
from vlm.data.sources import read_dataset
from vlm.data.text import normalise_caption
from vlm.errors import DataError


def test_flickr8k_keeps_the_official_order_and_the_raw_captions(flickr: Path) -> None:
    train = read_dataset("flickr8k", flickr, "train")
    assert [example.id for example in train] == ["flickr8k/b.jpg", "flickr8k/a.jpg"]
    assert train[0].turns[0].text == CAPTION_PROMPT
    assert train[0].answers[0] == 'Two men play "soccer" in a field .'
    assert train[1].answers[2] == "A dog , black , runs"
    assert [e.id for e in read_dataset("flickr8k", flickr.parent, "val")] == ["flickr8k/c.jpg"]


def test_flickr8k_reads_the_older_layout(flickr: Path) -> None:
    old = flickr.parent / "old"
    old.mkdir()
    (flickr / "Images").rename(old / "Flicker8k_Dataset")
    captions = flickr8k.read_captions(flickr / "captions.txt")
    lines = [f"{name}#{n}\t{text}" for name, texts in captions.items() for n, text in enumerate(texts)]
    (old / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (old / "Flickr_8k.devImages.txt").write_text("c.jpg\n")
    (example,) = read_dataset(old, split="dev")
    assert example.answers == tuple(captions["c.jpg"])
    assert Path(str(example.images[0])).is_file()


def test_flickr8k_names_what_is_missing(flickr: Path) -> None:
    with pytest.raises(DataError, match="testImages"):
        read_dataset("flickr8k", flickr, "test")
    (flickr / "Images" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"1 photographs of train .* a\.jpg"):
        read_dataset("flickr8k", flickr, "train")
    assert read_dataset("flickr8k", flickr, "dev"), "a split needs only its own pictures"
    with pytest.raises(DataError, match="unknown split 'trian'"):
        read_dataset("flickr8k", flickr, "trian")


@pytest.mark.parametrize(
    ("line", "question", "image"),
    [
        ("what is on the desk in the image3 ?", "what is on the desk?", "image3"),
        (
            "what is the largest brown objects in this image3 ?",
            "what is the largest brown objects?",
            "image3",
        ),
        ("how many cupboards are in image12 ?", "how many cupboards are?", "image12"),
        ("how many chairs are there on the image888 ?", "how many chairs are there?", "image888"),
        ("what is near the tape_dispenser in the image7 ?", "what is near the tape dispenser?", "image7"),
        ("what is on the left side of the image944 ?", "what is on the left side of the image?", "image944"),
    ],
)
def test_daquar_takes_the_picture_out_of_the_question(line: str, question: str, image: str) -> None:
    assert daquar.clean_question(line) == (question, image)


def test_daquar_answers(tmp_path: Path, save: Callable[..., Path]) -> None:
    assert daquar.clean_answers("Book, scissor, , tape_dispenser, book,") == [
        "book",
        "scissor",
        "tape dispenser",
    ]
    save(tmp_path / "images" / "image3.png", 1)
    questions = "what is on the desk in the image3 ?\nbook, tape_dispenser\nhow many in the image3 ?\n2\n"
    (tmp_path / "qa.37.raw.train.txt").write_text(questions)
    first, second = daquar.read(tmp_path, "train")
    assert first.answers == ("book, tape dispenser",)
    assert (first.meta["answer_list"], first.meta["answer_count"]) == ("book|tape dispenser", 2)
    assert second.meta["question_type"] == "count"
    (tmp_path / "qa.37.raw.train.txt").write_text("what is here ?\nbook\n")
    with pytest.raises(DataError, match="line 1: no picture is named"):
        daquar.read(tmp_path, "train")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["what is in the image3 ?", "", "what is red in the image3 ?", "cup"], "line 2: empty answer"),
        (
            ["what is in the image3 ?", "cup", "", "what is red in the image3 ?"],
            "line 3: no picture is named",
        ),
        (
            ["what is in the image3 ?", "cup", "", "what is red in the image3 ?", "lamp"],
            "line 3: no picture is named",
        ),
        (["what is in the image3 ?", "", "what is red in the image3 ?", ""], "line 2: empty answer"),
        (["what is in the image3 ?", "cup", "what is red in the image3 ?", " , "], "line 4: empty answer"),
        (["what is in the image3 ?", "cup", "what is red in the image3 ?"], "3 lines"),
    ],
)
def test_daquars_blank_lines_do_not_change_the_pairs(lines: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "qa.894.raw.train.txt"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        daquar.read_pairs(path)
    path.write_text("what is in the image3 ?\r\ncup\r\n\r\n \r\n")
    assert daquar.read_pairs(path) == [("image3", "what is?", ["cup"])]


def test_the_installed_package_stands_in_only_where_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent does not hold easy-vqa"):
        read_dataset("easy-vqa", tmp_path / "absent", "test")


ROOMS = [f"image{number}" for number in range(1, 40, 2)]  # runs of one picture each
SHAPES = [str(number) for number in range(40)]


def write_words(name: str, folder: Path) -> list[str]:
    """The words of a set without its pictures; returns the pictures' names."""
    if name == "daquar":
        pairs = "".join(f"what is in the {image} ?\nchair\n" for image in ROOMS)
        (folder / "qa.894.raw.train.txt").write_text(pairs)
        (folder / "images").mkdir()
        return ROOMS
    (folder / "train" / "images").mkdir(parents=True)
    rows = [["what color is it?", "red", int(n)] for n in SHAPES]
    (folder / "train" / "questions.json").write_text(json.dumps(rows))
    return SHAPES


@pytest.mark.parametrize("name", ["daquar", "easy-vqa"])
def test_a_part_needs_only_its_own_pictures_and_its_words_none(
    name: str, tmp_path: Path, save: Callable[..., Path]
) -> None:
    names = write_words(name, tmp_path)
    words = {s: read_dataset(name, tmp_path, s, pictures=False) for s in ("train", "train-rest", "dev")}
    assert len(words["train"]) == len(names) == len(words["train-rest"]) + len(words["dev"])
    assert words["dev"] and words["train-rest"]
    images = next(folder for folder in tmp_path.rglob("images"))
    for example in words["dev"]:
        save(images / f"{example.meta['image']}.png", 1)
    shown = read_dataset(name, tmp_path, "dev")
    assert [(e.id, e.turns, e.answers, e.meta) for e in shown] == [
        (e.id, e.turns, e.answers, e.meta) for e in words["dev"]
    ]
    for split in ("train", "train-rest"):
        with pytest.raises(DataError, match=r"picture.* missing below|is not in"):
            read_dataset(name, tmp_path, split)


def test_a_quote_that_is_never_closed_is_one_clear_error(flickr: Path) -> None:
    (flickr / "captions.txt").write_text('image,caption\na.jpg,"A dog\nb.jpg,A cat\n')
    with pytest.raises(DataError, match=r"captions\.txt is not CSV"):
        read_dataset("flickr8k", flickr, "dev")


def test_daquar_never_divides_a_run_of_neighbouring_pictures() -> None:
    names = [f"image{n}" for n in range(1, 400) if n % 7]
    held = daquar.held_out_images(names)
    assert 0 < len(held) < len(names) / 3
    for first in range(1, 400, 7):
        run = {f"image{n}" for n in range(first, first + 6) if f"image{n}" in names}
        assert run <= held or not run & held


@pytest.mark.parametrize("name", ["daquar", "easy-vqa"])
def test_dev_and_the_rest_make_the_official_training_part(name: str, datasets_dir: Path) -> None:
    if name == "easy-vqa":
        pytest.importorskip("easy_vqa")
    root = None if name == "easy-vqa" else datasets_dir
    parts = {split: read_dataset(name, root, split) for split in ("train", "train-rest", "dev")}
    ids = {split: {example.id for example in examples} for split, examples in parts.items()}
    assert ids["train"] == ids["train-rest"] | ids["dev"] and not ids["train-rest"] & ids["dev"]
    pictures = {split: {example.images[0] for example in examples} for split, examples in parts.items()}
    assert not pictures["train-rest"] & pictures["dev"], "a picture's questions never lie on both sides"
    assert 0.08 < len(pictures["dev"]) / len(pictures["train"]) < 0.13


def test_the_real_sets_have_their_published_sizes(datasets_dir: Path) -> None:
    pytest.importorskip("easy_vqa")
    train = read_dataset("flickr8k", datasets_dir, "train")
    assert (len(train), {len(example.answers) for example in train}) == (6000, {5})
    assert len(read_dataset("flickr8k", datasets_dir, "dev")) == 1000
    rooms = read_dataset("daquar", datasets_dir, "train")
    assert (len(rooms), len({example.images for example in rooms})) == (6795, 794)
    assert not any("_" in example.turns[0].text + example.answers[0] for example in rooms)
    assert not any("image3" in example.turns[0].text for example in rooms)
    shapes = read_dataset("easy-vqa", None, "test")
    assert (len(shapes), len({example.images for example in shapes})) == (9673, 1000)
    majority = Counter(example.answers[0] for example in shapes).most_common(1)[0][1]
    assert round(100 * majority / len(shapes), 1) == 37.3


def test_what_is_converted_reads_back_the_same(flickr: Path, tmp_path: Path) -> None:
    parts = {split: flickr8k.read(flickr, split) for split in ("train", "dev")}
    about = {"name": "flickr8k", "title": "Flickr8k", "source": "somewhere", "terms": "some"}
    sizes = write_dataset(parts, tmp_path / "out", about)
    assert sizes == {"train": {"pictures": 2, "examples": 2}, "dev": {"pictures": 1, "examples": 1}}
    for split, examples in parts.items():
        back = read_dataset(tmp_path / "out", split=split)
        assert [(e.id, e.turns, e.answers) for e in back] == [(e.id, e.turns, e.answers) for e in examples]
        assert [Path(str(e.images[0])).read_bytes() for e in back] == [
            Path(str(e.images[0])).read_bytes() for e in examples
        ]
    image = Path(str(read_dataset(tmp_path / "out", split="dev")[0].images[0]))
    bare = tmp_path / "bare" / "validation"
    bare.mkdir(parents=True)
    (bare.parent / "dataset.json").write_bytes((tmp_path / "out" / "dataset.json").read_bytes())
    (bare / "metadata.jsonl").write_bytes((tmp_path / "out" / "validation" / "metadata.jsonl").read_bytes())
    worded = read_dataset("flickr8k", bare.parent, "dev", pictures=False)
    assert [(e.id, e.answers) for e in worded] == [(e.id, e.answers) for e in parts["dev"]]
    assert os.stat(image).st_nlink == 2, "pictures are linked, not copied, on one file system"
    described = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert described["parts"] == sizes
    write_dataset(parts, tmp_path / "out", about)  # again over its own output
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="not empty"):
        write_dataset(parts, tmp_path / "other", about)


def test_a_conversion_that_was_broken_off_is_not_read_and_can_be_repeated(
    flickr: Path, tmp_path: Path, save: Callable[..., Path]
) -> None:
    parts = {split: flickr8k.read(flickr, split) for split in ("train", "dev")}
    about = {"name": "flickr8k", "title": "Flickr8k", "source": "somewhere", "terms": "some"}
    out, original = tmp_path / "out", flickr / "Images" / "c.jpg"
    hidden = original.rename(tmp_path / "hidden.jpg")
    with pytest.raises(DataError, match=r"c\.jpg cannot be written"):
        write_dataset(parts, out, about)
    for split in ("train", "dev"):
        with pytest.raises(DataError, match="was not written to its end"):
            read_dataset(out, split=split)
    hidden.rename(original)
    whole = {path.name: path.read_bytes() for path in (flickr / "Images").iterdir()}
    for path in (out / "train" / "a.jpg", out / "validation" / "c.jpg"):  # as a kill leaves them
        path.unlink(missing_ok=True)
        path.write_bytes(whole[path.name][:100])
    os.link(flickr / "Images" / "b.jpg", out / "validation" / ".c.jpg.part")
    (out / "train" / "b.jpg").unlink()
    os.link(save(tmp_path / "other.png", 9), out / "train" / "b.jpg")  # another set's picture of that name
    write_dataset(parts, out, about)
    for split in ("train", "dev"):
        for example in read_dataset(out, split=split):
            path = Path(str(example.images[0]))
            assert path.read_bytes() == whole[path.name]
    assert {path.name: path.read_bytes() for path in (flickr / "Images").iterdir()} == whole
    assert not [path for path in out.rglob("*") if path.name.endswith(".part")]
    assert "unfinished" not in json.loads((out / "dataset.json").read_text())


def test_pictures_that_are_bytes_replace_what_is_half_there(tmp_path: Path, flickr: Path) -> None:
    content = (flickr / "Images" / "a.jpg").read_bytes()
    examples = [make_example(content, "what?", ["a dog"], "1")]
    about = {"name": "x", "title": "x", "source": "x", "terms": "x"}
    write_dataset({"train": examples}, tmp_path / "out", about)
    (path,) = (tmp_path / "out" / "train").glob("*.jpg")
    path.write_bytes(content[:50])
    write_dataset({"train": examples}, tmp_path / "out", about)
    assert path.read_bytes() == content


def test_converted_folders_load_with_datasets(flickr: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {split: flickr8k.read(flickr, split) for split in ("train", "dev")}
    write_dataset(parts, tmp_path / "out", {"name": "x", "title": "x", "source": "x", "terms": "x"})
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in loaded.items()} == {"train": 2, "validation": 1}
    assert loaded["validation"][0]["text"] == list(parts["dev"][0].answers)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog runs .", "a dog runs"),
        ("  A  Dog , a cat .. ", "a dog, a cat"),
        ('"A dog runs ."', "a dog runs"),
        ("Dr. Who is in .", "dr. who is in"),
        (" . ", ""),
    ],
)
def test_captions_are_normalised(caption: str, expected: str) -> None:
    assert normalise_caption(caption) == expected


def test_captions_that_make_no_question_make_no_data_set(
    tmp_path: Path, draw: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm.cli import main

    (tmp_path / "own").mkdir()
    draw(1).save(tmp_path / "own" / "1.png")
    (tmp_path / "own" / "metadata.csv").write_text("file_name,text\n1.png,A wall.\n")
    assert main(["data", "questions", str(tmp_path / "own"), str(tmp_path / "made")]) == 1
    assert "no question can be made" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
