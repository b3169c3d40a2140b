"""One evaluation from options to report: examples, prompts, answers, controls, scores, files."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.conversation import Conversation
from vlm.data.example import Example
from vlm.errors import ConfigError, DataError, VLMError
from vlm.eval import contamination, controls, outputs, prompts, report, runner, tasks
from vlm.eval.predictions import Prediction, export, write_submission
from vlm.eval.scorers import options
from vlm.eval.task import Scores, Task, unscored
from vlm.options import apply_common, apply_offline

if TYPE_CHECKING:
    from vlm.model import VLM


def run(args: argparse.Namespace) -> int:
    """Runs `vlm eval TASK`; prints the scores and writes the report.

    Raises:
        VLMError: anything that stops the run.
    """
    task = tasks.get(args.task)
    out = args.out or Path("runs") / f"{task.name}.json"
    outputs.check(out, page=True)
    kinds = ("items", "answers", *(f"answers.{name}" for name in controls.RUNS))
    spare = [out, out.with_suffix(".html"), *(report.siblings(out, kind) for kind in kinds)]
    outputs.check(args.submission, "--submission", spare=spare)
    if args.train_data is not None and not args.train_data.is_dir():
        raise ConfigError(f"--train-data {args.train_data} is no folder")
    apply_offline(args)  # the data may be a hub data set's
    examples = task.examples(args.data, args.split)
    if unscored(examples):  # a submission is all that such a run is for
        args.submission = args.submission or out.with_name(f"{out.stem}.submission.json")
    apply_common(args)
    model = _model(args)
    started = time.monotonic()
    session = Session(task, args, model, out, examples)
    block = session.evaluate()
    runner.leave()
    block["seconds"] = {"total": round(time.monotonic() - started, 1)}
    if runner.rank_and_world()[0]:
        return 0
    report.write_json(out, block)
    if not args.no_html:
        from vlm.eval.page import write_page

        write_page(out)
    show(block, out)
    return 0


def limited(examples: list[Example], limit: int | None) -> list[Example]:
    """`limit` examples chosen by a hash of their ids, in their own order."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = sorted(examples, key=lambda e: hashlib.sha256(e.id.encode()).digest())[:limit]
    kept = {example.id for example in chosen}
    return [example for example in examples if example.id in kept]


def _model(args: argparse.Namespace) -> VLM:
    from vlm.model import VLM
    from vlm.weights_cache import cache_root

    device = args.device
    if device == "cuda" and runner.rank_and_world()[1] > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # one GPU for each process
    model = VLM.from_pretrained(
        args.adapter,
        device=device,
        dtype=args.dtype,
        offline=args.offline,
        allow_different_frozen=args.allow_different_frozen,
        feature_cache=args.feature_cache or cache_root() / "features",
    )
    if args.memory is not None:
        model.remember(args.memory, itself=False)
    return model.pack()


def say(text: str) -> None:
    """A line for the person who waits, on stderr, from the first process only."""
    if runner.rank_and_world()[0] == 0:
        print(text, file=sys.stderr, flush=True)


class Session:
    """A model on a task: the run itself and its controls."""

    def __init__(
        self, task: Task, args: argparse.Namespace, model: VLM, out: Path, examples: list[Example]
    ) -> None:
        """`examples` are all of the split; where the options say so, `limited` takes some of them."""
        self.task, self.args, self.model, self.out = task, args, model, out
        self.examples = limited(examples, args.limit)
        self.whole = len(self.examples) == len(examples)
        self.generation = self._generation()
        self._train: list[Example] | VLMError | None = None

    def _generation(self) -> dict[str, Any]:
        chosen = dict(self.task.generation) | {"batch_size": self.args.batch_size}
        if self.args.beams:
            chosen["num_beams"] = self.args.beams
        if self.args.max_new_tokens:
            chosen["max_new_tokens"] = self.args.max_new_tokens
        return chosen

    @property
    def likelihood(self) -> bool:
        """Whether answers are chosen by likelihood rather than written."""
        return self.task.choices and self.args.choices == "likelihood"

    def train(self) -> list[Example]:
        """The training split.

        Raises:
            VLMError: the task or the folder has none; the message is the reason that a report gives.
        """
        if self._train is None:
            try:
                split = self.task.train_for(self.args.split, self.args.data)
                self._train = self.task.examples(self.args.data, split, pictures=self.args.shots > 0)
            except VLMError as error:
                self._train = error
        if isinstance(self._train, VLMError):
            raise self._train
        return self._train

    def evaluate(self) -> dict[str, Any]:
        """Answers, scores and controls, as the report's JSON."""
        conversations = self._conversations()
        decoding = {k: v for k, v in sorted(self.generation.items()) if k != "batch_size"}
        decoding["choices"] = self.args.choices if self.task.choices else None
        words = ["\n".join(turn.role + ": " + turn.text for turn in each.turns) for each in conversations]
        hashes = dict(self.model.hashes) | {
            "data": report.data_hash(self.examples),
            "pictures": report.picture_hash(self.examples),
            "prompt": report.digest(words),
            "scorer": report.scorer_hash(),
        }
        header = {"task": self.task.name, "decoding": decoding, "hashes": hashes | {"scorer": None}}
        if self.args.shots:
            header["shots"] = report.picture_hash(conversations)
        if self.args.restart and runner.rank_and_world()[0] == 0:
            for control in (None, *controls.RUNS):
                runner.forget(self._answer_file(control))
        runner.meet()
        answers = self._answers(conversations, header, None)
        looked = self.args.controls == "all" and not unscored(self.examples)
        blind = self._control_answers(conversations, header) if looked else {}
        if runner.rank_and_world()[0]:
            return {}
        block = self._block(conversations, answers, blind)
        return block | {"decoding": decoding, "prompt": words[0], "hashes": hashes}

    def _block(
        self,
        conversations: Sequence[Conversation],
        answers: Sequence[Prediction],
        blind: Mapping[str, list[str] | str],
    ) -> dict[str, Any]:
        """The report of answers and of what the model said in its controls; writes the items too."""
        texts = [answer.text for answer in answers]
        scores = self.task.scores(self.examples, texts, java=not self.args.no_java)
        main = self.task.main if scores.reason else scores.main
        self._write_items(conversations, answers, scores, main)
        if self.args.submission:
            write_submission(self.args.submission, export(self.task, self.examples, texts))
        block: dict[str, Any] = {
            "version": report.VERSION,
            "task": self.task.name,
            "split": self.task.part_name(self.args.data, self.args.split),
            "n": len(self.examples),
            "comparable": self.whole,
            "limit": None if self.whole else self.args.limit,
            "adapter": str(self.model.adapter_name),
            "main_metric": main,
            **report.scores_block(scores),
            "rates": report.rates(
                self.task, self.examples, texts, [] if self.likelihood else [a.finish for a in answers]
            ),
            "near_ties": report.near_ties(answers),
            "controls": self._controls(blind, main),
            "shots": {"k": self.args.shots, "labels": self.args.shot_labels, "choice": self.args.shot_choice}
            if self.args.shots
            else None,
            "published": [vars(figure) for figure in self.task.published],
            "predictions": report.siblings(self.out, "answers").name,
            "submission": str(self.args.submission) if self.args.submission else None,
            "maps": self.args.maps,
        }
        block["text_only"] = text_only(block["controls"], main)
        block["calibration"] = report.calibration(scores.per_item.get(main), answers)
        block["guide"] = contamination.fitted(self)
        if self.args.train_data:
            block["contamination"] = contamination.overlap(self, self.args.train_data, texts)
        return block

    def _write_items(
        self, conversations: Sequence[Conversation], answers: Sequence[Prediction], scores: Scores, main: str
    ) -> None:
        rows = report.items(self.examples, [answer.text for answer in answers], scores, answers)
        if self.args.maps:
            from vlm.eval.maps import add_maps

            add_maps(self.model, rows, self.examples, conversations, main, self.args.maps)
        if not self.args.no_html:
            from vlm.eval.page import keep_pictures

            keep_pictures(rows, self.examples, main, self.args.maps)
        report.write_items(report.siblings(self.out, "items"), rows)

    def _conversations(self) -> list[Conversation]:
        lettered = self.task.choices and not self.likelihood
        if lettered:
            base: list[Conversation] = [prompts.with_options(example) for example in self.examples]
        else:
            base = [Conversation(e.images, e.turns) for e in self.examples]
        if not self.args.shots:
            return base
        try:
            train = self.train()
        except VLMError as error:
            raise DataError(f"--shots takes its examples from the training split: {error}") from None
        return prompts.with_shots(self, base, train, lettered)

    def _answers(
        self, conversations: Sequence[Conversation], header: Mapping[str, Any], control: str | None
    ) -> list[Prediction]:
        work = runner.Work(
            [example.id for example in self.examples],
            conversations,
            self.generation,
            {**header, "control": control},
            [options(example) for example in self.examples] if self.likelihood else None,
        )
        title = f"{self.task.name} {control or ''}".strip()
        return runner.answer_all(self.model, work, self._answer_file(control), title, say)

    def _answer_file(self, control: str | None) -> Path:
        return report.siblings(self.out, f"answers.{control}" if control else "answers")

    def _control_answers(
        self, conversations: Sequence[Conversation], header: Mapping[str, Any]
    ) -> dict[str, list[str] | str]:
        """What the model says in each control that it answers, or the reason why there is none."""
        found: dict[str, list[str] | str] = {}
        for name in controls.RUNS:
            try:
                changed = controls.run(name, conversations, self.model.blank_image)
            except controls.NoControl as reason:
                found[name] = str(reason)
                continue
            found[name] = [answer.text for answer in self._answers(changed, header, name)]
        return found

    def _controls(self, blind: Mapping[str, list[str] | str], main: str) -> dict[str, Any]:
        """The report's table: every control with its scores, or with none and the reason."""
        if self.args.controls == "none":
            return {}
        if why := unscored(self.examples):
            return {name: {"about": about, "metrics": None, "reason": why} for name, about in
                    controls.ABOUT.items()}  # fmt: skip
        said = dict(blind)
        try:
            said["prior"] = controls.prior(self.train(), self.examples, captions=self.task.captions)
        except VLMError as error:
            said["prior"] = str(error)
        table: dict[str, Any] = {}
        for name, texts in said.items():
            block: dict[str, Any] = {"metrics": None, "reason": texts}
            if not isinstance(texts, str):
                block = self._without_java(texts)
            table[name] = {"about": controls.ABOUT[name], **block}
        if self.task.captions and not isinstance(said["prior"], str):
            table["prior"]["caption"] = said["prior"][0]
        guess = self.task.chance(self.examples)
        table["chance"] = {
            "about": controls.ABOUT["chance"],
            "metrics": None if guess is None else {main: guess},
            "reason": "guessing has no score in this task" if guess is None else None,
        }
        return table

    def _without_java(self, texts: Sequence[str]) -> dict[str, Any]:
        """A control's scores; METEOR would take half a minute and says nothing that CIDEr does not."""
        scores = self.task.scores(self.examples, texts, java=False)
        block = report.scores_block(scores)
        return {
            "metrics": block["metrics"],
            "reason": None,
            "intervals": block["intervals"],
            "rates": report.rates(self.task, self.examples, texts),
        }


def text_only(table: Mapping[str, Any], main: str) -> dict[str, Any] | None:
    """The best that the model gets without looking, in the main metric; None where no control ran."""
    found = {
        name: table[name]["metrics"][main]
        for name in controls.TEXT_ONLY
        if table.get(name, {}).get("metrics") and main in table[name]["metrics"]
    }
    if not found:
        return None
    best = max(found, key=found.__getitem__)
    return {"metric": main, "value": found[best], "control": best}


def show(block: Mapping[str, Any], out: Path) -> None:
    """The scores, in a few lines."""
    n, split = block["n"], block["split"]
    reason = block.get("reason")
    lost = "not all that the server wants" if reason else "not comparable with published figures"
    note = "" if block["comparable"] else f" (limited to {n}: {lost})"
    print(f"{block['task']}, {split}, {n} examples{note}")
    if reason:
        print(f"  no scores: {reason}")
    for name, value in (block["metrics"] or {}).items():
        ends = block["intervals"].get(name)
        print(f"  {name:<20} {value:7.2f}" + (f"   95 % {ends[0]:.2f} to {ends[1]:.2f}" if ends else ""))
    main = block["main_metric"]
    for name, control in ({} if reason else block["controls"]).items():  # the reason is theirs too
        value = (control["metrics"] or {}).get(main)
        said = f"{value:7.2f}" if value is not None else f"      -   {control.get('reason') or ''}"
        print(f"  {name + ' (control)':<20} {said}")
    for name, why in block["skipped"].items():
        print(f"  {name:<20}       -   {why}")
    for name, value in block["rates"].items():
        print(f"  {name + ' answers':<20} {value:7.2f} %")
    if block.get("near_ties") is not None:
        print(f"  {'near ties':<20} {block['near_ties']:4d}      (the two best within {report.NEAR_TIE:g})")
    if block.get("contamination"):
        for line in contamination.lines(block["contamination"], main):
            print(f"  {line}")
    if said := contamination.warning(block.get("guide")):
        print(f"  {said}")
    if block.get("submission"):
        print(f"submission: {block['submission']}")
    print(f"report: {out}")
