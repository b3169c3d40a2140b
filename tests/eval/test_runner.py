"""The run itself: order, resuming, errors, processes, controls, the report."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from parrot import Parrot, run, work
from PIL import Image

from vlm.conversation import Conversation
from vlm.data.convert.common import make_example
from vlm.errors import ConfigError, DataError
from vlm.eval import controls, prompts, runner, session, tasks
from vlm.eval.main import _parser
from vlm.eval.predictions import AnswerFile

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_answers_come_in_the_items_order(tmp_path: Path) -> None:
    todo = work()
    found = run(Parrot(), todo, tmp_path / "a.jsonl")
    assert [each.id for each in found] == todo.ids
    alone = [Parrot().ask_batch([each])[0].text for each in todo.conversations]
    assert [each.text for each in found] == alone


def test_continues_without_asking_again(tmp_path: Path) -> None:
    path, todo = tmp_path / "a.jsonl", work(11)
    whole = run(Parrot(), todo, path)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:5]) + '\n{"id": "item', encoding="utf-8")  # four answers and half a line
    again = Parrot()
    assert run(again, todo, path) == whole
    assert len(again.asked) == 7
    idle = Parrot()
    assert run(idle, todo, path) == whole
    assert idle.asked == []


def test_another_number_of_processes_continues(tmp_path: Path) -> None:
    path, todo = tmp_path / "a.jsonl", work(11)
    whole = run(Parrot(), todo, tmp_path / "whole.jsonl")
    for part, numbers in (("0of2", (0, 2, 4)), ("1of2", (1,)), ("2of3", (2, 5))):
        file = AnswerFile(tmp_path / f"a.{part}.jsonl", todo.header)
        file.load()
        file.append(whole[number] for number in numbers)
    with (tmp_path / "a.1of2.jsonl").open("a", encoding="utf-8") as cut:
        cut.write('{"id": "item')
    again = Parrot()
    assert run(again, todo, path) == whole
    assert len(again.asked) == 6
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.jsonl", "whole.jsonl"]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 12


def test_parts_of_another_run_are_not_continued(tmp_path: Path) -> None:
    AnswerFile(tmp_path / "a.1of2.jsonl", {"seed": 1}).load()
    with pytest.raises(ConfigError, match=r"a\.1of2\.jsonl holds the answers of another run"):
        run(Parrot(), work(seed=2), tmp_path / "a.jsonl")


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    run(Parrot(), work(seed=1), tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match=r"seed was 1, is 2.*--restart"):
        run(Parrot(), work(seed=2), tmp_path / "a.jsonl")


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    file = AnswerFile(path, {})
    file.load()
    path.write_text(path.read_text(encoding="utf-8") + "{oops\n" * 2, encoding="utf-8")
    with pytest.raises(DataError, match="line 2 is not JSON"):
        file.load()


def test_an_error_names_its_item_and_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"item item4: item4\.jpg is damaged"):
        run(Parrot(fails_on="item4.jpg"), work(), tmp_path / "a.jsonl")


def test_a_bug_keeps_its_traceback_and_names_the_batch(tmp_path: Path) -> None:
    class Buggy(Parrot):
        def ask_batch(self, conversations: Any, **generation: Any) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        run(Buggy(), work(3), tmp_path / "a.jsonl")
    assert any("item0" in note for note in caught.value.__notes__)


def test_predicted_time_after_a_minute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(runner.time, "monotonic", lambda: float(next(clock)))
    said: list[str] = []
    runner.answer_all(Parrot(), work(20), tmp_path / "a.jsonl", "test", said.append)
    assert said == ["test: 8/20, 0.1 items/s, 1.5 minutes to go"]


def parrot_run(out: Path, die_after: int, batch: int, *extra: str, **env: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(HERE / "parrot.py"), str(out), str(die_after), str(batch), *extra]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | env)


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key not in ("seconds", "predictions")}


def test_killed_and_restarted_gives_the_same_report(tmp_path: Path) -> None:
    assert parrot_run(tmp_path / "whole.json", 0, 1).wait() == 0
    assert parrot_run(tmp_path / "killed.json", 5, 1).wait() == -9
    assert not (tmp_path / "killed.json").exists()
    assert 1 < len((tmp_path / "killed.answers.jsonl").read_text(encoding="utf-8").splitlines()) < 13
    assert parrot_run(tmp_path / "killed.json", 20, 1).wait() == -9  # in the middle of the controls
    assert parrot_run(tmp_path / "killed.json", 0, 1).wait() == 0
    assert report(tmp_path / "killed.json") == report(tmp_path / "whole.json")


def test_two_processes_and_batches_give_the_same_report(tmp_path: Path) -> None:
    assert parrot_run(tmp_path / "one.json", 0, 32).wait() == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    for name in ("answers", "answers.blank.2of3"):  # another run's, which --restart drops
        AnswerFile(tmp_path / f"two.{name}.jsonl", {"task": "another"}).load()
    both = []
    for rank in (0, 1):
        numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared}
        both.append(parrot_run(tmp_path / "two.json", 0, 1, "--restart", **numbers))
        time.sleep(1)  # the second process begins late; it must not drop what the first has written
    assert [each.wait(timeout=120) for each in both] == [0, 0]
    assert not list(tmp_path.glob("two.*of*.jsonl"))
    assert report(tmp_path / "two.json") == report(tmp_path / "one.json")


def conversations(names: list[str]) -> list[Conversation]:
    return [Conversation.ask([Path(name)], f"q{number}") for number, name in enumerate(names)]


def test_shuffled_moves_every_picture_and_keeps_the_words() -> None:
    names = [f"{number % 7}.jpg" for number in range(20)]
    before = conversations(names)
    after = controls.shuffled(before)
    assert all(old.images != new.images for old, new in zip(before, after, strict=True))
    assert [each.turns for each in after] == [each.turns for each in before]
    moved = dict(zip(names, [each.images[0].name for each in after], strict=True))  # type: ignore[union-attr]
    assert sorted(moved.values()) == sorted(set(names))
    assert controls.shuffled(before) == after
    assert controls.shuffled(before[:3])[0].images[0] != before[0].images[0]


def test_blank_and_no_image() -> None:
    before = conversations(["a.jpg", "b.jpg"])
    picture = Parrot().blank_image()
    assert [each.images for each in controls.blank(before, picture)] == [(picture,), (picture,)]
    bare = controls.no_image(before)
    assert all(not each.images for each in bare)
    assert [each.turns[0].text for each in bare] == ["q0", "q1"]


def test_prior_goes_from_question_to_type_to_all() -> None:
    def example(question: str, answer: str, kind: str) -> Any:
        return make_example("x.jpg", question, [answer], question, {"question_type": kind})

    train = [
        example("Is it red?", "no", "yes/no"),
        example("is it  red?", "no", "yes/no"),
        example("Is it red?", "yes", "yes/no"),
        example("Is it big?", "yes", "yes/no"),
        example("Is it far?", "yes", "yes/no"),
        example("How many?", "2", "count"),
        example("How many dogs?", "2", "count"),
    ]
    asked = [
        example(q, "", k)
        for q, k in (("Is it red?", "yes/no"), ("Is it wet?", "yes/no"), ("What?", "object"))
    ]
    assert controls.prior(train, asked)[:2] == ["no", "yes"]
    assert controls.prior(train[:4] + train[5:], asked)[2] in ("no", "yes", "2")
    assert controls.prior(train, asked) == controls.prior(train[::-1], asked)


def options(*extra: str) -> Any:
    return _parser().parse_args(["vqav2", "--data", str(HERE / "fixtures" / "vqav2"), *extra])


def evaluated(tmp_path: Path, *extra: str, task: str = "vqav2", data: str = "vqav2") -> dict[str, Any]:
    args = _parser().parse_args([task, "--data", str(HERE / "fixtures" / data), *extra])
    chosen = tasks.get(task)
    examples = chosen.examples(args.data, args.split)
    return session.Session(chosen, args, Parrot(), tmp_path / "r.json", examples).evaluate()


def test_report_has_controls_and_text_only(tmp_path: Path) -> None:
    block = evaluated(tmp_path)
    assert set(block["controls"]) == {"blank", "shuffled", "no_image", "prior", "chance"}
    assert block["controls"]["prior"]["metrics"] is None
    assert "v2_OpenEnded_mscoco_train2014_questions.json" in block["controls"]["prior"]["reason"]
    assert block["controls"]["chance"]["metrics"] is None
    looked = {
        name: block["controls"][name]["metrics"]["accuracy_strict"]
        for name in ("blank", "shuffled", "no_image")
    }
    assert block["text_only"]["value"] == max(looked.values())
    assert block["rates"]["empty"] == pytest.approx(
        100 * sum(row["text"] == "" for row in _answers(tmp_path)) / 12
    )
    assert block["comparable"] is True
    assert set(block["hashes"]) == {"adapter", "data", "pictures", "prompt", "scorer"}


def _answers(tmp_path: Path) -> list[dict[str, Any]]:
    lines = (tmp_path / "r.answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def asked_with_a_shot(shot: str, picture: str) -> Conversation:
    return Conversation.ask([Path(shot)], "shot?").answered("a").then("q?", [Path(picture)])


def test_shuffled_swaps_what_is_asked_about_and_leaves_the_shots() -> None:
    before = [asked_with_a_shot(f"s{n % 5}.jpg", f"{n % 3}.jpg") for n in range(12)]
    after = controls.shuffled(before)
    assert [each.images[0] for each in after] == [each.images[0] for each in before]
    assert all(old.images[1] != new.images[1] for old, new in zip(before, after, strict=True))


def test_shuffled_knows_pictures_by_what_they_hold() -> None:
    before = [Conversation.ask([bytes([n % 2])], f"q{n}") for n in range(6)]
    assert [each.images[0] for each in controls.shuffled(before)] == [bytes([1 - n % 2]) for n in range(6)]


def test_controls_that_cannot_be_made_say_why() -> None:
    with pytest.raises(controls.NoControl, match="all examples with 1 picture have the same"):
        controls.shuffled(conversations(["a.jpg", "a.jpg"]))
    bare = [Conversation.ask([], "q")]
    for name in controls.RUNS:
        with pytest.raises(controls.NoControl, match="have no pictures"):
            controls.run(name, bare, Parrot().blank_image)


def test_every_control_has_one_meaning_and_a_score_or_a_reason(tmp_path: Path) -> None:
    block = evaluated(tmp_path)
    assert set(controls.ABOUT) == set(block["controls"])
    for name, row in block["controls"].items():
        assert row["about"] == controls.ABOUT[name]
        assert (row["metrics"] is None) == bool(row["reason"])


def test_one_picture_cannot_be_shuffled(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Parrot().blank_image().save(folder / "a.png")
    rows = [{"file_name": "a.png", "question": f"q{n}?", "answer": "red"} for n in range(12)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    block = evaluated(tmp_path, "--split", "all", task="folder-vqa", data=str(folder))
    assert block["controls"]["shuffled"]["metrics"] is None
    assert "the same" in block["controls"]["shuffled"]["reason"]
    assert block["controls"]["blank"]["metrics"] is not None
    assert block["text_only"]["control"] in ("blank", "no_image")


def test_the_prior_of_captions_is_one_typical_training_caption() -> None:
    train = [
        make_example("1.jpg", "Describe.", ["a dog runs on grass", "zebras in a zoo"], "1"),
        make_example("2.jpg", "Describe.", ["a brown dog runs on the grass", "two men talk"], "2"),
        make_example("3.jpg", "Describe.", ["a dog runs on grass near a tree", "a red bus"], "3"),
    ] + [make_example(f"{n}.jpg", "Describe.", [f"w{n} x{n} y{n}"], str(n)) for n in range(4, 9)]
    found = controls.prior(train, train[:2], captions=True)
    assert found == ["a dog runs on grass"] * 2
    assert controls.prior(train[::-1], train[:2], captions=True) == found


def test_the_typical_caption_has_the_highest_mean_of_plain_cosines() -> None:
    import math
    from collections import Counter

    from vlm.eval.metrics.typical import most_typical

    pictures = [
        ["a man rides a bike down the street", "a man on a bike"],
        ["a man rides a horse", "a cowboy on a horse in the street", "a man on a bike"],
        ["a woman rides a bike", "a person on a red bike in the street"],
        ["two dogs play in the snow", "dogs in snow"],
    ]
    texts = [text for each in pictures for text in each]

    def vector(text: str, size: int) -> dict[str, float]:
        words = text.split()
        grams = Counter(" ".join(words[i : i + size]) for i in range(len(words) - size + 1))
        held = {g: sum(any(f" {g} " in f" {t} " for t in each) for each in pictures) for g in grams}
        return {gram: count * math.log(4 / held[gram]) for gram, count in grams.items()}

    def cosine(one: dict[str, float], other: dict[str, float]) -> float:
        lengths = math.hypot(*one.values()) * math.hypot(*other.values())
        return sum(one[g] * other.get(g, 0.0) for g in one) / lengths if lengths else 0.0

    def mean(text: str) -> float:
        return sum(cosine(vector(text, n), vector(other, n)) for other in texts for n in (1, 2, 3, 4))

    best, second = sorted({mean(text) for text in texts}, reverse=True)[:2]
    assert best > second + 0.1
    assert mean(most_typical(pictures)) == pytest.approx(best)


def test_a_limited_run_is_marked(tmp_path: Path) -> None:
    block = evaluated(tmp_path, "--limit", "5", "--controls", "none")
    assert (block["n"], block["comparable"], block["controls"], block["text_only"]) == (5, False, {}, None)


@pytest.mark.parametrize("limit", [12, 13])
def test_a_limit_that_leaves_nothing_out_is_no_limit(tmp_path: Path, limit: int) -> None:
    block = evaluated(tmp_path, "--limit", str(limit), "--controls", "none")
    assert (block["n"], block["comparable"], block["limit"]) == (12, True, None)


def colours(folder: Path, *shades: int) -> Path:
    """Questions about two pictures, answered by a training part that has one of its own."""
    for name, shade in zip(("train/t", "test/a", "test/b"), shades, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(folder / f"{name}.png")
    for split, names in (("train", "t"), ("test", "ab")):
        rows = [{"file_name": f"{n}.png", "question": f"{n}?", "answer": "red"} for n in names]
        text = "\n".join(map(json.dumps, rows))
        (folder / split / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("shots", ["0", "1"])
def test_other_pictures_under_the_same_names_are_asked_about_again(tmp_path: Path, shots: str) -> None:
    def go(*shades: int) -> dict[str, Any]:
        folder = str(colours(tmp_path / "data", *shades))
        return evaluated(tmp_path, "--shots", shots, "--controls", "none", task="folder-vqa", data=folder)

    first = go(1, 2, 3)
    assert go(1, 2, 3) == first
    with pytest.raises(ConfigError, match=r"another run \(hashes\.pictures was .*--restart"):
        go(1, 2, 4)
    if shots == "0":
        assert go(9, 2, 3) == first
    else:
        with pytest.raises(ConfigError, match=r"another run \(shots was "):
            go(9, 2, 3)


def test_choices_by_likelihood_and_by_letter(tmp_path: Path) -> None:
    block = evaluated(tmp_path, "--split", "dev", "--controls", "none", task="aokvqa-choice", data="aokvqa")
    # Parrot finds short answers likelier; the shortest choice is right three times.
    assert block["metrics"]["accuracy"] == pytest.approx(25.0)
    asked = evaluated(
        tmp_path / "b", "--choices", "generation", "--controls", "none", task="aokvqa-choice", data="aokvqa"
    )
    assert asked["prompt"].endswith(prompts.LETTER_LINE)
    assert block["rates"]["unparsed"] == 0.0
    assert 50.0 < asked["rates"]["unparsed"] <= 100.0  # the parrot says "red" or "2", seldom a choice
