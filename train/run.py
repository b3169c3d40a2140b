"""One whole run: from a recipe to an adapter that answers, with its card."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from vlm.checkpoint import build_model, load_model, require_own_name
from vlm.config import to_dict
from vlm.data.collate import Group, Source
from vlm.data.example import Example
from vlm.data.readers import Reading, told_texts
from vlm.errors import ConfigError
from vlm.features import FeatureCache
from vlm.model import VLM
from vlm.train import checks, mup
from vlm.train.answers import add_answers
from vlm.train.card import write_card
from vlm.train.config import TrainConfig
from vlm.train.dev import Dev, apportion, open_dev
from vlm.train.holdout import Held, Judge, write_report
from vlm.train.loop import Trainer
from vlm.train.pairs import paired
from vlm.train.preference import PreferenceTrainer
from vlm.train.preflight import Preflight, peak_memory, preflight
from vlm.train.prepare import FeatureStore, groups_of, own_part, set_aside
from vlm.train.processes import Processes
from vlm.train.record import DEV, RUN, Record, machine
from vlm.train.screen import Screen
from vlm.train.state import newest_valid
from vlm.train.streamed import Feed, StreamTrainer
from vlm.train.wins import Wins, caption_examples
from vlm.train.words import WordTrainer
from vlm.weights_cache import cache_root

TRAINERS: dict[str, type[Trainer]] = {"words": WordTrainer, "preference": PreferenceTrainer}
"""Objectives with a loop of their own."""
FITTING = {"likelihood": checks.fitting, "cider": checks.fitting, "preference": checks.fitting_pairs}
"""What leaves out the rows that the model cannot read whole; words are learnt without reading any."""
OURS = ("state", RUN, "words", "log.jsonl", "events")
"""What tells a run's folder from others, even where it was killed before its first state."""
PATIENCE = timedelta(hours=6)
"""For how long processes wait for the first one, which alone asks before and after a run."""


def train(config: TrainConfig, *, offline: bool = False, fresh: bool = False, device: str = "auto") -> bool:
    """Trains, or goes on training, until the recipe's last step.

    Args:
        fresh: drop the state of an earlier run in the same `out`.
        device: `cpu` keeps it off a GPU that is there.

    Returns:
        Whether the last step was reached (a signal ends a run early, with its state saved).
    """
    open_out(config)
    start = _learn_words(config, offline, fresh, device) if config.words.steps else ""
    if start is None:
        return False
    accelerator, out = _begin(config, fresh, device), Path(config.out)
    if config.stream:
        return _train_streamed(config, accelerator, offline)
    with Screen(accelerator.is_main_process) as screen:
        sources, aside = apportion(config)
        part = own_part(config)
        if part is not None:
            screen.say(f"{config.data} has a validation part: that is asked, and nothing else set aside")
        sources, held = set_aside(sources, config.holdout, part)
        model = make_model(config, offline, start)
        if config.objective in FITTING:
            sources, held = FITTING[config.objective](sources, held, model.processor)
        groups, store = prepare(config, model, groups_of(sources), screen, accelerator)
        dev = open_dev(config, model, aside, screen, accelerator)
        checked = checks.check(config.data or "the data", sources, held, store)
        held = checked.held
        sources, groups = checked.apart(sources, groups)
        if config.objective != "words":  # what that stage reads, the next one shows
            screen.say(checked.text())
            if checks.own(config):
                screen.say(checks.sample_text(model, groups, store, config.seed))
        judge = _judge(config, sources, held, screen)
        if config.answers and not isinstance(judge, Held):
            screen.say("answers: none are learnt, as no answers are set aside to show that they help")
        if judge and accelerator.distributed_type != DistributedType.FSDP:
            model.to(accelerator.device)  # divided layers move when they are divided
        before = _before(model, judge, out) if judge and accelerator.is_main_process else None
        kind = TRAINERS.get(config.objective, Trainer)
        trainer = kind(model, config, groups, store, lambda _: None, accelerator)
        trainer.resume(screen.say)
        if _complete(trainer, judge, dev):
            if judge is not None and accelerator.is_main_process:
                judge.show(json.loads((out / judge.file).read_text("utf-8")))
            return _leave(trainer, screen)
        done = _run(trainer, screen, held, checked.reading)
        if dev is not None and done:
            screen.say(f"loss on {config.dev} pictures set aside: {dev.write(trainer)['loss']:.4f}")
    if judge is not None and before is not None and done:
        # The adapter as it was saved, on the frozen parts as others will load them.
        saved = load_model(out, offline=offline, device=str(accelerator.device), guides=False)
        saved.features.cache = model.features.cache
        after = judge.ask(saved)
        if config.answers and isinstance(judge, Held):
            examples = [example for source in sources for example in source.examples]
            after = add_answers(saved, out, examples, judge, after, screen)
        found = judge.report(before, after)
        write_report(out / judge.file, found)
        judge.show(found)
    _finish(trainer, done)
    return done


def _complete(trainer: Trainer, judge: Judge | None, dev: Dev | None) -> bool:
    """Whether an earlier run has written all there is to write: what was done to its adapter since stays."""
    files = ([judge.file] if judge is not None else []) + ([DEV] if dev is not None else [])
    return (
        trainer.step >= trainer.config.steps
        and trainer.written
        and all((trainer.out / name).is_file() for name in files)
    )


def open_out(config: TrainConfig) -> None:
    """Makes the run's folder, and sees to it before any work that the run can write there.

    Raises:
        ConfigError: it is somebody else's, cannot be written, or a tracker is not installed.
    """
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        found = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    except OSError as problem:
        raise ConfigError(f"out={config.out} cannot be written: {problem.strerror or problem}") from None
    if found and not any((out / name).exists() for name in OURS):
        raise ConfigError(
            f"out={config.out} holds {', '.join(found[:3])} and no run of training: "
            "choose another folder, nothing is overwritten"
        )
    require_own_name(out)
    known = [str(name) for name in get_available_trackers()]
    unknown = [name for name in config.trackers if name not in (*known, "all")]
    if unknown:
        raise ConfigError(
            f"trackers: {', '.join(unknown)} is no tracker that is installed "
            f"({', '.join(known)}; [] for none)"
        )


def _begin(config: TrainConfig, fresh: bool, device: str) -> Accelerator:
    """The engine; the state of an earlier run is dropped if `fresh`."""
    accelerator = Accelerator(
        cpu=on_cpu(device),
        log_with=list(config.trackers) or None,
        project_dir=config.out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    out = Path(config.out)
    if fresh and accelerator.is_main_process:
        shutil.rmtree(out / "state", ignore_errors=True)
        (out / DEV).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return accelerator


def _leave(trainer: Trainer, screen: Screen) -> bool:
    """Leaves alone what has nothing left to do; True."""
    screen.say(
        f"{trainer.out} has made all of its {trainer.step} steps and stays as it is; --fresh begins anew"
    )
    _close(trainer)
    return True


def _finish(trainer: Trainer, done: bool) -> None:
    """Writes the card, and says where the adapter is."""
    if trainer.processes.main:
        write_card(trainer.out)
        word = (
            "the adapter is in" if done else f"stopped after step {trainer.step}; the same command goes on:"
        )
        print(f"{word} {trainer.out}", file=sys.stderr if not done else sys.stdout, flush=True)
    _close(trainer)


def _close(trainer: Trainer) -> None:
    if trainer.model.features.cache is not None:
        trainer.model.features.cache.close()
    trainer.accelerator.wait_for_everyone()  # a process that leaves while another still talks to it aborts


def _train_streamed(config: TrainConfig, accelerator: Accelerator, offline: bool) -> bool:
    """`train` for a source that is read while the run goes on: nothing is set aside, nothing held."""
    with Screen(accelerator.is_main_process) as screen:
        model = make_model(config, offline)
        if not config.feature_cache and model.features.cache is not None:
            model.features.cache.close()  # what is seen once is not worth keeping
            model.features.cache = None
        feed = Feed(config, model, Processes(accelerator), offline=offline)
        trainer = StreamTrainer(model, config, feed, lambda _: None, accelerator)
        trainer.resume(screen.say)
        if _complete(trainer, None, None):
            return _leave(trainer, screen)
        screen.say(
            f"{len(feed.laps.files)} shards, {accelerator.num_processes} process(es); "
            f"windows of {feed.most} pictures each"
        )
        done = _run(trainer, screen, [], Reading(config.data or feed.source.name))
    _finish(trainer, done)
    return done


def on_cpu(device: str) -> bool:
    """Whether `--device` keeps a run off every GPU, or none is there."""
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def _learn_words(config: TrainConfig, offline: bool, fresh: bool, device: str) -> str | None:
    """The adapter after the recipe's stage of words; None where that was stopped."""
    words = config.words
    first = replace(
        config,
        objective="words",
        words=replace(words, steps=0),
        out=str(Path(config.out) / "words"),
        steps=words.steps,
        batch=words.batch,
        micro=0,
        optim=replace(config.optim, warmup=words.warmup, decay=1.0, average=0.0),
        answers=False,
        trackers=(),
        note="The image side alone, taught the captions' words.",
    )
    begun = not fresh and newest_valid(Path(config.out) / "state")[0] is not None
    if begun and (Path(first.out) / "adapter.safetensors").is_file():
        return first.out
    return first.out if train(first, offline=offline, fresh=fresh, device=device) else None


def make_model(config: TrainConfig, offline: bool, start: str = "") -> VLM:
    """The recipe's model with a feature cache: fresh, or from `start` (or the recipe's own)."""
    torch.manual_seed(config.seed)
    start = start or config.start
    if start:
        # What guides it is not carried over, so that answers are compared without it before and after.
        model = load_model(start, offline=offline, size=config.size, guides=False)
    else:
        model = build_model(config.model, offline=offline)
        mup.initialise(model.adapter, mup.scales(model, config.optim.mup_base))
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    model.features.cache = FeatureCache(Path(config.feature_cache or cache_root() / "features"))
    return model


def set_dropout(model: VLM, share: float) -> None:
    """Gives a model's adapter another dropout than the one that it was built with."""
    for module in model.adapter.modules():
        if hasattr(module, "dropout"):
            module.dropout = share  # type: ignore[assignment]
    sizes = replace(getattr(model.config, model.config.adapter), dropout=share)
    model.config = replace(model.config, **{model.config.adapter: sizes})


def prepare(
    config: TrainConfig, model: VLM, groups: list[Group], screen: Screen, accelerator: Accelerator
) -> tuple[list[Group], FeatureStore]:
    """Encodes every picture; the groups whose pictures can be read, ordered by content."""
    model.encoder.to(accelerator.device)
    store = FeatureStore(
        model.features,
        groups,
        config.flip,
        model.config.hints,
        screen.progress,
        accelerator.process_index,
        accelerator.num_processes,
        looks=checks.own(config),
    )
    return store.usable(groups), store


def _judge(
    config: TrainConfig, sources: Sequence[Source], held: Sequence[Example], screen: Screen
) -> Judge | None:
    """What is asked before and after the run; None where nothing is, as of words, which answer nothing."""
    if config.objective == "words":
        return None
    if config.objective != "preference":
        return Held(held) if held else None
    trained, unused = len(sources[0].examples), sum(source.unused for source in sources)
    pairs = paired(held)
    screen.say(
        f"{trained} preference pairs to learn, {len(pairs)} set aside; "
        f"{unused} opinions make no pair and are not used"
    )
    return Wins(pairs, caption_examples(config.holdout_captions), trained, unused, config.beta)


def _before(model: VLM, judge: Judge, out: Path) -> dict[str, Any]:
    """What the model said before it was trained; a continued run remembers it.

    Raises:
        ConfigError: what is set aside has changed meanwhile.
    """
    kept = out / "state" / "before.json"
    if newest_valid(out / "state")[0] is not None and kept.is_file():
        said: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        if said.get("asked") != judge.asked:
            raise ConfigError(
                f"{out} was begun with other examples set aside: choose another out=FOLDER, or give --fresh"
            )
        remembered: dict[str, Any] = said["found"]
        return remembered
    found = judge.ask(model)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"asked": judge.asked, "found": found}), encoding="utf-8")
    return found


def _run(trainer: Trainer, screen: Screen, held: Sequence[Example], reading: Reading) -> bool:
    """Preflight, the steps, and what is written down of them."""
    config = trainer.config
    plan = preflight(trainer)
    screen.say(plan.text())
    facts = _facts(trainer, plan, held) | {
        "left_out": [str(row) for row in reading.bad],
        "without_picture": len(reading.texts),
    }
    record = Record(config, trainer.accelerator, screen, trainer.step, facts)
    trainer.report = record
    earlier = trainer.seconds
    began = time.time()
    counted: dict[str, Any] = {}
    try:
        trainer.run()
        counted = trainer.counted()
    finally:
        record.close(
            steps_done=trainer.step,
            seconds=round(trainer.seconds, 1),
            wall_seconds=round(time.time() - began, 1),
            skipped=trainer.skipped,
            peak_memory=peak_memory(trainer.accelerator.device),
            **counted,
        )
    screen.say(plan.compared(trainer.seconds - earlier, peak_memory(trainer.accelerator.device)))
    if texts := counted.get("without_picture"):
        screen.say(told_texts(texts))
    return trainer.step >= config.steps


def _facts(trainer: Trainer, plan: Preflight, held: Sequence[Example]) -> dict[str, Any]:
    config, model = trainer.config, trainer.model
    return {
        "recipe": to_dict(config),
        "model": to_dict(model.config),
        "hashes": {k: v for k, v in model.hashes.items() if k != "adapter"},
        "data_hash": trainer.data_hash,
        "unreadable": len(trainer.store.bad),
        "held_out": len({example.images for example in held}),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine()
        | {
            "processes": trainer.processes.count,
            "sharded": trainer.sharded,
            "precision": "bf16" if trainer.bf16 else "float32",
        },
        "preflight": plan.facts(),
    }
