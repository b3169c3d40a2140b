"""Remembered pictures: what is found, what is told and where, what is refused; and `vlm data remember`."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from vlm.cli import main
from vlm.config import HintsConfig, MemoryConfig
from vlm.conversation import Conversation, ImageSlot, Turn
from vlm.data.remember import remember
from vlm.errors import ConfigError, DataError
from vlm.hints import told_text
from vlm.images import open_picture
from vlm.memory import Memory, pooled

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]
CAPTIONS = ("a red cup", "a dog runs on the grass", "two men", "a boat on the water", "a green door")


@pytest.fixture
def captioned(tmp_path: Path, draw: Draw) -> Path:
    """Five captioned pictures, the first of them twice under two names."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    rows = [[f"{n}.png", f"{text.capitalize()} ."] for n, text in enumerate(CAPTIONS)]
    for name, _ in rows:
        draw(int(name[0])).save(folder / name)
    shutil.copy(folder / "0.png", folder / "copy.png")
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption"], *rows, ["copy.png", "A cup that is red."]])
    return folder


@pytest.fixture
def model(make_tiny: Callable[..., VLM]) -> VLM:
    built = make_tiny("flamingo", gate_init=2.0)
    built.hashes.setdefault("encoder", "tiny")
    return built


@pytest.fixture
def memory(captioned: Path, model: VLM, tmp_path: Path) -> Path:
    folder = tmp_path / "memory"
    remember(captioned, folder, model.features, count=1, least=-1.0)
    return folder


def test_a_folder_is_remembered_once(captioned: Path, model: VLM, memory: Path) -> None:
    kept = Memory.load(memory, model.features)
    first = open_picture(captioned / "0.png").sha256
    assert len(kept) == len(CAPTIONS)
    assert kept.captions[first] == ["a red cup", "a cup that is red"]
    before = {path.name: path.read_bytes() for path in memory.iterdir()}
    again = remember(captioned, memory, model.features)
    assert (again.new, len(again.memory)) == (0, len(CAPTIONS))
    assert {path.name: path.read_bytes() for path in memory.iterdir()} == before
    (vectors,) = (load_file(path)["vectors"] for path in memory.glob("*.safetensors"))
    expected = pooled(model.features([open_picture(captioned / f"{n}.png") for n in range(len(CAPTIONS))]))
    torch.testing.assert_close(vectors.float(), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(vectors.float().norm(dim=1), torch.ones(len(CAPTIONS)), atol=1e-3, rtol=0)


def test_more_is_added_to_what_is_there(
    captioned: Path, model: VLM, memory: Path, draw: Draw, tmp_path: Path
) -> None:
    more = tmp_path / "more"
    more.mkdir()
    draw(9).save(more / "9.png")
    shutil.copy(captioned / "2.png", more / "known.png")
    rows = [["9.png", "a kite"], ["known.png", "two men"], ["known.png", "two tall men"]]
    with open(more / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption"], *rows])
    done = remember(more, memory, model.features, count=2)
    assert done.new == 1
    kept = Memory.load(memory, model.features)
    assert len(kept) == len(CAPTIONS) + 1
    assert kept.captions[open_picture(more / "known.png").sha256] == ["two men", "two tall men"]
    assert kept.config == MemoryConfig(count=2, least=-1.0)
    assert len(list(memory.glob("*.safetensors"))) == 1


def test_the_nearest_is_found_and_in_evaluation_never_itself(
    captioned: Path, model: VLM, memory: Path
) -> None:
    pictures = [open_picture(captioned / f"{n}.png") for n in range(len(CAPTIONS))]
    hashes = [picture.sha256 for picture in pictures]
    features = model.features(pictures)
    own = Memory.load(memory, model.features).recall(features, hashes)
    assert [row[0][0] for row in own] == list(CAPTIONS)
    assert all(row[0][1] == pytest.approx(1.0, abs=1e-3) for row in own)
    others = Memory.load(memory, model.features, itself=False)
    vectors = pooled(features)
    cosines = (vectors @ vectors.T).fill_diagonal_(-2)
    found = others.recall(features, hashes)
    assert [row[0][0] for row in found] == [CAPTIONS[n] for n in cosines.argmax(dim=1).tolist()]
    # Only the bytes of the picture are held against it: seen anew it finds what it is most like.
    assert others.recall(features, ["?"] * len(hashes)) == own


def test_how_many_and_how_like(captioned: Path, model: VLM, memory: Path) -> None:
    kept = Memory.load(memory, model.features)
    picture = open_picture(captioned / "1.png")
    features = model.features([picture])
    for count in (1, 3, 5, 50):
        kept.config = MemoryConfig(count=count, least=-1.0)
        (row,) = kept.recall(features, [picture.sha256])
        assert len(row) == min(count, len(CAPTIONS))
        assert [cosine for _, cosine in row] == sorted((c for _, c in row), reverse=True)
    middle = row[2][1]
    kept.config = MemoryConfig(count=5, least=middle)
    assert len(kept.recall(features, [picture.sha256])[0]) == 3
    assert Memory(model.features).recall(features, ["x"]) == [[]]
    with pytest.raises(ConfigError, match=r"memory\.count"):
        MemoryConfig(count=0)
    with pytest.raises(ConfigError, match=r"memory\.least"):
        MemoryConfig(least=1.5)


def test_like_captions_are_told_once_and_long_ones_cut(model: VLM) -> None:
    kept = Memory(model.features, MemoryConfig(count=3, least=-1.0))
    vectors = torch.nn.functional.normalize(torch.randn(3, model.encoder.width), dim=-1)
    kept.add("a", ["a dog"], vectors[0])
    kept.add("b", ["a dog", "a brown dog"], vectors[1])
    kept.add("c", ["word " * 500], vectors[2])
    (row,) = kept.recall(vectors[:1, None], ["x"])
    assert sorted(text.split()[-1] for text, _ in row) == ["dog", "dog", "word"]
    assert {text for text, _ in row} >= {"a dog", "a brown dog"}
    assert max(len(text.split()) for text, _ in row) == 40


def test_what_is_told_stands_behind_its_picture(model: VLM, memory: Path, captioned: Path) -> None:
    model.remember(memory)
    pictures = [open_picture(captioned / f"{n}.png") for n in (1, 2)]
    _, told = model.see(pictures)
    assert told == [f"Similar pictures show: {CAPTIONS[n]}.\n" for n in (1, 2)]
    turn = Turn("user", (ImageSlot(1), "one", ImageSlot(0), "two"))
    tokens = model.processor.tokens(Conversation(tuple(pictures), (turn,)), hints=told)
    assert f"{told[1]}one{told[0]}two" in model.language.tokenizer.decode(tokens.codes)


def test_labels_come_first(model: VLM, memory: Path, captioned: Path) -> None:
    model.config = replace(model.config, hints=HintsConfig(count=1, least=0.0))
    picture = open_picture(captioned / "3.png")
    _, (labels,) = model.see([picture])
    model.remember(memory)
    _, (told,) = model.see([picture])
    assert labels.startswith("Perhaps ")
    assert told == labels + f"Similar pictures show: {CAPTIONS[3]}.\n"
    assert told_text([], []) == ""


def test_every_path_tells_the_same_and_nothing_changes_without(model: VLM, memory: Path, draw: Draw) -> None:
    asks = [Conversation.ask([draw(n)], f"{'what ' * n}is it?") for n in range(6, 9)]
    plain = [model.ask_batch([ask], max_new_tokens=6)[0] for ask in asks]
    model.remember(memory)
    alone = [model.ask_batch([ask], max_new_tokens=6)[0] for ask in asks]
    together = model.ask_batch(asks, max_new_tokens=6)
    assert [a.text for a in alone] == [a.text for a in together]
    assert "".join(model.stream(asks[0], max_new_tokens=6)) == alone[0].text
    assert model.chat([draw(6)]).ask(asks[0].turns[0].text, max_new_tokens=6).text == alone[0].text
    assert all(a.usage.prompt_tokens > p.usage.prompt_tokens for a, p in zip(alone, plain, strict=True))
    model.memory = None
    again = model.ask_batch(asks, max_new_tokens=6)
    assert [(a.text, a.usage) for a in again] == [(p.text, p.usage) for p in plain]


def test_a_saved_adapter_knows_nothing_of_a_memory(model: VLM, memory: Path, tmp_path: Path) -> None:
    from vlm.checkpoint import read_config, save_adapter

    model.remember(memory)
    assert len(model.hashes["memory"]) == 64
    save_adapter(model, tmp_path / "saved")
    assert read_config(tmp_path / "saved")["hashes"].keys() == {"encoder", "language_model"}


def test_the_digest_is_of_all_that_tells(model: VLM, memory: Path) -> None:
    digests = [Memory.load(memory, model.features).digest for _ in range(2)]
    digests.append(Memory.load(memory, model.features, itself=False).digest)
    changed = Memory.load(memory, model.features)
    changed.add(next(iter(changed.captions)), ["something else"])
    digests.append(changed.digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("key", ["sha256", "size", "stages"])
def test_another_encoder_is_refused(key: str, model: VLM, memory: Path, captioned: Path) -> None:
    document = json.loads((memory / "memory.json").read_text())
    document["encoder"][key] = {"sha256": "0" * 64, "size": 32, "stages": [1]}[key]
    (memory / "memory.json").write_text(json.dumps(document))
    for use in (lambda: model.remember(memory), lambda: remember(captioned, memory, model.features)):
        with pytest.raises(DataError, match="seen by another encoder") as refused:
            use()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d.pop("encoder"), "damaged"),
        (lambda d: d.update(format=9), "format"),
        (lambda d: d.update(count=0), "damaged"),
        (lambda d: d.update(least="much"), "damaged"),
        (lambda d: d["pictures"].pop(), "damaged"),
        (lambda d: d.update(pictures=[1]), "damaged"),
        (lambda d: d.update(sha256="0"), "damaged"),
        (lambda d: d.update(vectors="gone.safetensors"), "cannot be read"),
    ],
)
def test_damage_is_one_line(change: Callable[[dict], object], word: str, model: VLM, memory: Path) -> None:
    document = json.loads((memory / "memory.json").read_text())
    change(document)
    (memory / "memory.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=word):
        model.remember(memory)


def test_what_is_no_memory(model: VLM, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vlm data remember"):
        model.remember(tmp_path)
    (tmp_path / "memory.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        model.remember(tmp_path)


def test_questions_alone_are_nothing_to_remember(model: VLM, tmp_path: Path, draw: Draw) -> None:
    folder = tmp_path / "asked"
    folder.mkdir()
    draw(1).save(folder / "1.png")
    (folder / "metadata.csv").write_text("file_name,question,answer\n1.png,What is it?,a cup\n")
    with pytest.raises(DataError, match="no captions"):
        remember(folder, tmp_path / "memory", model.features)
    assert not (tmp_path / "memory").exists()


# --- commands --------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(model: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from vlm.checkpoint import save_adapter

    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_from_folder_to_answer(
    adapter: Path, captioned: Path, tmp_path: Path, draw: Draw, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm.model import VLM

    folder = tmp_path / "made"
    (captioned / "4.png").write_bytes(b"no picture")
    argv = ["data", "remember", str(captioned), str(folder), "--adapter", str(adapter), "--least", "-1"]
    assert main(argv) == 1
    printed = capsys.readouterr()
    assert printed.out == f"{folder}: 4 pictures (4 of them new), 5 captions\n"
    assert printed.err.startswith("error: ") and "4.png" in printed.err
    draw(7).save(tmp_path / "new.png")
    ask = [
        "ask",
        str(tmp_path / "new.png"),
        "What?",
        "--adapter",
        str(adapter),
        "--max-tokens",
        "5",
        "--json",
    ]
    used = []
    for extra in ([], ["--memory", str(folder)]):
        assert main([*ask, *extra]) == 0
        used.append(json.loads(capsys.readouterr().out)["usage"]["prompt_tokens"])
    assert used[1] > used[0] + 20
    caption = ["caption", str(tmp_path / "new.png"), "--adapter", str(adapter), "--memory", str(folder)]
    assert main([*caption, "--max-tokens", "5", "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    loaded = VLM.from_pretrained(adapter, offline=True, memory=folder)
    assert line["answer"] == loaded.caption([tmp_path / "new.png"], max_new_tokens=5)[0].text
    assert main([*ask, "--memory", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_evaluation_with_a_memory_never_recalls_the_picture_itself(
    adapter: Path,
    model: VLM,
    captioned: Path,
    memory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["eval", "folder-caption", "--data", str(captioned), "--adapter", str(adapter), "--no-html"]
    argv += ["--controls", "none", "--max-new-tokens", "3", "--beams", "1", "--no-java"]
    reports = []
    for name, extra in (("plain", []), ("with", ["--memory", str(memory)])):
        out = tmp_path / f"{name}.json"
        assert main([*argv, "--out", str(out), *extra]) == 0, capsys.readouterr().err
        reports.append(json.loads(out.read_text()))
    assert "memory" not in reports[0]["hashes"]
    assert reports[1]["hashes"]["memory"] == Memory.load(memory, model.features, itself=False).digest
    # The answers of a run without the memory are not gone on with.
    assert main([*argv, "--out", str(tmp_path / "plain.json"), "--memory", str(memory)]) == 1
    assert "another run" in capsys.readouterr().err
