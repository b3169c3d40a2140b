"""`vlm train RECIPE [data=DIR] [out=DIR] [key=value ...]`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.errors import ConfigError
from vlm.options import add_common, apply_common


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vlm train", description="Train an adapter.", allow_abbrev=False)
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe that ships")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="data=DIR out=DIR steps=500 optim.lr=3e-4"
    )
    parser.add_argument("--fresh", action="store_true", help="do not continue an interrupted run in out")
    add_common(parser)
    args = parser.parse_args(argv)
    apply_common(args)
    import yaml

    from vlm.train.config import recipe_config, recipe_path

    path = recipe_path(args.recipe)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as problem:
        raise ConfigError(f"{path} is not YAML: {problem}") from problem
    for setting in args.settings:
        _set(values, setting)
    train(recipe_config(values), offline=args.offline, fresh=args.fresh)
    return 0


def _set(values: dict[str, Any], setting: str) -> None:
    """Applies `a.b=value` to nested values; the value is read as YAML."""
    import yaml

    key, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"{setting!r} is not of the form key=value")
    *path, last = key.removeprefix("--").split(".")
    for name in path:
        values = values.setdefault(name, {})
    values[last] = yaml.safe_load(text)


def train(config: Any, *, offline: bool, fresh: bool) -> None:
    """One whole run, from the recipe to the adapter in `out`."""
    import shutil

    import torch

    from vlm.checkpoint import build_model, load_model
    from vlm.data.collate import group_by_image
    from vlm.features import FeatureCache
    from vlm.train.loop import Step, Trainer
    from vlm.train.prepare import FeatureStore, read_sources
    from vlm.weights_cache import cache_root

    out = Path(config.out)
    if fresh:
        shutil.rmtree(out / "state", ignore_errors=True)
    torch.manual_seed(config.seed)
    model = (
        load_model(config.start, offline=offline)
        if config.start
        else build_model(config.model, offline=offline)
    )
    model.features.cache = FeatureCache(Path(config.feature_cache or cache_root() / "features"))
    groups = group_by_image(read_sources(config))
    print(
        f"{len(groups)} pictures, {sum(map(len, (p for g in groups for p in g.by_source)))} answers",
        flush=True,
    )
    store = FeatureStore(model.features, groups, config.flip, lambda *_: None)
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / "log.jsonl", "a", encoding="utf-8")
    began = time.time()

    def report(step: Step) -> None:
        log.write(json.dumps(vars(step)) + "\n")
        if step.step % config.log_every == 0:
            log.flush()
            print(
                f"step {step.step}/{config.steps} loss {step.loss:.3f} lr {step.lr:.2e} norm {step.norm:.2f} "
                f"{step.seconds:.2f} s/step {time.time() - began:.0f} s",
                flush=True,
            )

    trainer = Trainer(model, config, groups, store, report)
    for path in trainer.resume():
        print(f"{path} is damaged; the state before it is used", file=sys.stderr)
    trainer.run()
    log.close()
