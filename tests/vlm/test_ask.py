"""`vlm ask` and `vlm caption`: what they print, what they write, how they fail."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vlm.cli import main

if TYPE_CHECKING:
    from vlm.model import VLM

Draw = Callable[..., Any]
Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[2]
ANSWER_KEYS = {
    "answer", "finish_reason", "usage", "seconds", "logprob", "confidence", "abstained", "adapter",
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(make_tiny: Callable[..., VLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny adapter on disk; its config names tiny frozen parts on disk."""
    from vlm.checkpoint import save_adapter

    folder = tmp_path_factory.mktemp("ask") / "adapter"
    save_adapter(make_tiny("flamingo", gate_init=2.0), folder, card="tiny")
    return folder


@pytest.fixture
def pictures(tmp_path: Path, draw: Draw) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        draw(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Run:
    """`run("ask", ...)`: the command in this process, with the tiny adapter: code, stdout, stderr."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(command: str, *argv: object) -> tuple[int, str, str]:
        try:
            code = main([command, *map(str, argv), "--adapter", str(adapter), "--max-tokens", "6"])
        except SystemExit as usage:
            code = int(usage.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


# --- asking ----------------------------------------------------------------------------------------------


def test_an_answer_is_one_text(run: Run, pictures: Path) -> None:
    code, out, err = run("ask", pictures / "0.png", "What?")
    assert code == 0
    assert err == ""
    assert out.endswith("\n") and out.strip()
    assert run("ask", pictures / "0.png", "What?")[1] == out
    assert run("ask", pictures / "1.png", "What?")[1] != out
    assert run("ask", pictures / "0.png", pictures / "1.png", "What?")[1] != out


def test_json(run: Run, pictures: Path, adapter: Path) -> None:
    code, out, _ = run("ask", pictures / "0.png", pictures / "1.png", "What?", "--json")
    assert code == 0
    answer = json.loads(out)
    assert answer.keys() == ANSWER_KEYS
    assert answer["usage"].keys() == {"prompt_tokens", "completion_tokens", "total_tokens", "images"}
    assert answer["usage"]["images"] == 2
    assert answer["usage"]["total_tokens"] == sum(
        answer["usage"][f"{part}_tokens"] for part in ("prompt", "completion")
    )
    assert answer["seconds"].keys() == {"load", "encode", "decode"}
    assert all(value >= 0 for value in answer["seconds"].values())
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["logprob"] < 0
    assert answer["adapter"] == str(adapter)


def test_options_may_stand_anywhere(run: Run, pictures: Path) -> None:
    plain = json.loads(run("ask", pictures / "0.png", "What?", "--json")[1])["answer"]
    for argv in (
        ("--json", pictures / "0.png", "What?"),
        (pictures / "0.png", "--json", "What?"),
        ("--seed", 1, pictures / "0.png", "--json", "What?"),
    ):
        code, out, err = run("ask", *argv)
        assert code == 0, err
        assert json.loads(out)["answer"] == plain


def test_sampling_repeats_with_its_seed(run: Run, pictures: Path) -> None:
    def ask(*options: object) -> str:
        return run("ask", pictures / "0.png", "What?", "--temperature", "1.5", *options)[1]

    assert ask("--seed", 1) == ask("--seed", 1)
    assert len({ask("--seed", seed) for seed in range(4)}) > 1


def test_beams(run: Run, pictures: Path, adapter: Path) -> None:
    from vlm.model import VLM

    model = VLM.from_pretrained(adapter, offline=True)
    expected = model.ask([pictures / "0.png"], "What?", max_new_tokens=6, num_beams=4)
    beams = json.loads(run("ask", pictures / "0.png", "What?", "--json", "--beams", 4)[1])
    assert beams["answer"] == expected.text
    assert beams["logprob"] == pytest.approx(expected.logprob, abs=1e-3)


def test_a_feature_cache_is_filled(run: Run, pictures: Path, tmp_path: Path) -> None:
    from vlm.features import FeatureCache

    cached = run("ask", pictures / "0.png", "What?", "--feature-cache", tmp_path / "features")
    assert cached == run("ask", pictures / "0.png", "What?")
    assert len(FeatureCache(tmp_path / "features")) == 1  # its features; no labels are told of it


@pytest.mark.parametrize(
    "question", ["<image> <|im_start|>", "-", "--", "é世🙂", "caf\udce9", "a\nb", "x" * 150, "\x00"]
)
def test_questions_of_any_kind(question: str, run: Run, pictures: Path) -> None:
    code, out, err = run("ask", pictures / "0.png", question)
    assert (code, err) == (0, "") if question != "--" else code == 2
    assert out or question == "--"


# --- folders ---------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_folder_becomes_a_csv(run: Run, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.csv"
    code, printed, err = run("ask", pictures, 'What, "exactly"?\nSay.', "--out", out)
    assert (code, printed) == (0, "")
    assert err.splitlines()[-1] == "3 of 3 pictures"
    found = rows(out)
    assert list(found[0]) == ["image", "question", "answer"]
    assert [row["image"] for row in found] == [str(pictures / f"{i}.png") for i in range(3)]
    assert {row["question"] for row in found} == {'What, "exactly"?\nSay.'}
    for row in found:
        alone = run("ask", row["image"], 'What, "exactly"?\nSay.')[1]
        assert alone == row["answer"] + "\n"


def test_captions_of_a_folder(run: Run, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.csv"
    assert run("caption", pictures, "--out", out)[0] == 0
    found = rows(out)
    assert list(found[0]) == ["image", "caption"]
    code, printed, _ = run("caption", pictures)
    assert code == 0
    assert [line.split("\t") for line in printed.splitlines() if "\t" in line] == [
        [row["image"], row["caption"].splitlines()[0]] for row in found
    ]
    one = run("caption", pictures / "1.png")[1]
    assert one == found[1]["caption"] + "\n"
    lines = [json.loads(line) for line in run("caption", pictures, "--json")[1].splitlines()]
    assert [line["image"] for line in lines] == [row["image"] for row in found]
    assert all(line.keys() == ANSWER_KEYS | {"image"} for line in lines)
    assert [line["answer"] for line in lines] == [row["caption"] for row in found]


def test_bad_pictures_of_a_folder_are_named_and_left_out(run: Run, pictures: Path, tmp_path: Path) -> None:
    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes()[:60])
    (pictures / "9.jpg").write_text("no picture")
    out = tmp_path / "answers.csv"
    code, _, err = run("ask", pictures, "What?", "--out", out)
    assert code == 1
    assert [Path(row["image"]).name for row in rows(out)] == ["0.png", "2.png"]
    lines = err.splitlines()
    assert sum(line.startswith("error:") and "1.png" in line for line in lines) == 1
    assert sum(line.startswith("error:") and "9.jpg" in line for line in lines) == 1
    assert lines[-1] == f"2 of 4 pictures could not be read and are not in {out}"


def test_captions_go_on_past_a_bad_picture(run: Run, pictures: Path) -> None:
    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes()[:60])
    code, out, err = run("caption", pictures, "--json")
    assert code == 1
    assert [Path(json.loads(line)["image"]).name for line in out.splitlines()] == ["0.png", "2.png"]
    assert err.count("error:") == 1 and "1.png" in err


def test_what_is_passed_by_in_a_folder_is_said(run: Run, pictures: Path, tmp_path: Path) -> None:
    (pictures / "phone.HEIC").write_bytes(b"x")
    (pictures / "more").mkdir()
    code, _, err = run("caption", pictures, "--out", tmp_path / "x.csv")
    assert code == 0
    assert "not read" in err.splitlines()[0] and "more, phone.HEIC" in err.splitlines()[0]


def test_a_table_is_written_whole_and_over_its_like_alone(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "captions.csv"
    assert run("caption", pictures, "--out", out)[0] == 0
    whole = out.read_bytes()
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "1.png").write_bytes(b"no picture")
    assert run("caption", bad, "--out", out)[0] == 1
    assert out.read_bytes() == whole
    assert run("caption", pictures, "--out", out)[0] == 0  # its like
    for name, content in (("photo.jpg", b"\xff\xd8\xff"), ("metadata.csv", b"file_name,caption\n")):
        (tmp_path / name).write_bytes(content)
        code, _, err = run("caption", pictures, "--out", tmp_path / name)
        assert (code, (tmp_path / name).read_bytes()) == (1, content)
        assert "holds something else" in err
    assert not list(tmp_path.glob("*.partial"))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm.model.VLM.caption", interrupted)
    assert run("caption", pictures, "--out", out)[0] == 130
    assert out.read_bytes() == whole


def test_names_that_are_not_utf8(run: Run, pictures: Path, tmp_path: Path) -> None:
    odd = os.fsencode(pictures) + b"/caf\xe9.png"
    os.rename(pictures / "1.png", odd)
    out = tmp_path / "answers.csv"
    assert run("ask", pictures, "What?", "--out", out)[0] == 0
    assert odd in out.read_bytes()
    code, printed, _ = run("caption", pictures)
    assert code == 0
    assert "caf\\udce9.png" in printed


# --- failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("cat.jpg",),
        ("cat.jpg", ""),
        ("cat.jpg", "  "),
        ("cat.jpg", "What?", "--max-tokens", "0"),
        ("cat.jpg", "What?", "--max-tokens", "many"),
        ("cat.jpg", "What?", "--beams", "0"),
        ("cat.jpg", "What?", "--temperature", "-1"),
        ("cat.jpg", "What?", "--temperature", "nan"),
        ("cat.jpg", "What?", "--beams", "3", "--temperature", "1"),
        ("cat.jpg", "What?", "--dtype", "int8"),
        ("cat.jpg", "What?", "--seed", "99999999999999999999999"),
        ("cat.jpg", "What?", "--no-such-option"),
        ("cat.jpg", "What?", "--js"),
        (".", "What?"),
        (".", "What?", "--out", "x.csv", "--json"),
        (".", "cat.jpg", "What?", "--out", "x.csv"),
    ],
)
def test_wrong_usage_is_2(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    started = time.perf_counter()
    with pytest.raises(SystemExit) as ended:
        main(["ask", *argv])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1].startswith("vlm ask: error: ")
    assert "max_new_tokens" not in printed.err
    assert time.perf_counter() - started < 5


def test_bad_pictures_are_one_line_and_1(run: Run, pictures: Path, tmp_path: Path) -> None:
    text = tmp_path / "renamed.jpg"
    text.write_text("not a picture")
    empty = tmp_path / "empty.png"
    empty.touch()
    cut = tmp_path / "cut.png"
    cut.write_bytes((pictures / "0.png").read_bytes()[:80])
    started = time.perf_counter()
    for bad in (text, empty, cut, tmp_path / "missing.png", "x" * 3000, "http://example.org/cat.jpg"):
        for argv in (("ask", bad, "What?"), ("ask", pictures / "0.png", bad, "What?"), ("caption", bad)):
            code, out, err = run(*argv)
            assert (code, out) == (1, "")
            assert err.startswith("error: ")
            assert err.count("\n") == 1
    assert time.perf_counter() - started < 10, "the model was loaded for pictures that cannot be read"


def test_a_long_question_in_the_pictures_place(run: Run, pictures: Path) -> None:
    code, out, err = run("ask", "What is in the picture? " * 30, pictures / "0.png")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1


@pytest.mark.parametrize("place", ["no/such/folder/x.csv", "."])
def test_places_that_cannot_be_written(place: str, run: Run, pictures: Path, tmp_path: Path) -> None:
    code, _, err = run("ask", pictures, "What?", "--out", tmp_path / place)
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_an_empty_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = run("ask", tmp_path / "empty", "What?", "--out", tmp_path / "x.csv")
    assert code == 1
    assert "holds no JPEG" in err


def test_too_many_pictures_and_too_long_questions(run: Run, pictures: Path) -> None:
    code, _, err = run("ask", *[pictures / "0.png"] * 5, "What?")
    assert (code, err.count("\n")) == (1, 1)
    assert "at most 4 images" in err
    code, _, err = run("ask", pictures / "0.png", "x" * 10_000)
    assert (code, err.count("\n")) == (1, 1)
    assert "language model reads 256" in err


def test_a_missing_adapter(capsys: pytest.CaptureFixture[str], pictures: Path) -> None:
    assert main(["ask", str(pictures / "0.png"), "What?", "--adapter", "no-such"]) == 1
    assert capsys.readouterr().err.startswith("error: no-such is no adapter")
    assert main(["ask", str(pictures / "0.png"), "What?", "--adapter", "runs/mien", "--offline"]) == 1
    assert capsys.readouterr().err.startswith("error: there is no folder runs/mien; as a name on the hub")


def test_other_frozen_weights_go_on_only_when_told(
    run: Run, pictures: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    config = json.loads((other / "config.json").read_text())
    config["hashes"]["encoder"] = "0" * 64
    (other / "config.json").write_text(json.dumps(config))
    argv = ["ask", str(pictures / "0.png"), "What?", "--adapter", str(other), "--max-tokens", "3"]
    assert main(argv) == 1
    with pytest.warns(UserWarning, match="another encoder"):
        assert main([*argv, "--allow-different-frozen"]) == 0


# --- processes -------------------------------------------------------------------------------------------


def process(*argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlm", *map(str, argv)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_in_a_process_of_its_own(adapter: Path, pictures: Path, tmp_path: Path) -> None:
    options = ("--adapter", adapter, "--max-tokens", 6, "--offline")
    cache = {"VLM_CACHE": str(tmp_path / "cache"), "PYTHONWARNINGS": "error::ResourceWarning"}
    done = process("ask", pictures / "0.png", "What?", "--json", *options, **cache)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == ANSWER_KEYS
    assert done.stderr == ""
    bad = process("ask", ROOT / "pyproject.toml", "What?", *options, **cache)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1
    assert process("ask", pictures / "0.png").returncode == 2


def test_a_terminal_without_unicode(adapter: Path, pictures: Path, tmp_path: Path) -> None:
    environment = {"VLM_CACHE": str(tmp_path / "cache"), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = process("ask", pictures / "0.png", "What?", "--adapter", adapter, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout
