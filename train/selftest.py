"""`vlm train selftest`: can this set-up learn eight pictures by heart?

    vlm train selftest                       drawn shapes, the default frozen parts
    vlm train selftest finetune data=DIR     your own pictures, model and adapter

Eight pictures are asked the same question and must be told apart, so nothing but the way from the
pictures to the words can bring the loss down. It ends as soon as the loss is below 0.05.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from vlm.data.collate import Group, Pair
from vlm.errors import DataError, VLMError
from vlm.options import add_common, make_parser
from vlm.train.config import OptimConfig, TrainConfig

PICTURES = 8
GOAL = 0.05
STEPS = 300


def main(argv: list[str]) -> int:
    """Entry of `vlm train selftest`; 0 when the goal is reached."""
    from vlm.train.main import applied
    from vlm.train.recipe import read_recipe

    parser = make_parser(
        "vlm train selftest", "Learn eight pictures by heart: loss below 0.05 or exit code 1."
    )
    parser.add_argument("recipe", nargs="?", default="smoke", help="default: smoke")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"give up after (default: {STEPS})")
    add_common(parser)
    args = parser.parse_args(argv)
    config = applied(args, read_recipe(args.recipe, args.settings))
    loss, steps = selftest(config, offline=args.offline, steps=args.steps, device=args.device)
    print(f"loss {loss:.4f} after {steps} steps on {PICTURES} pictures")
    if loss >= GOAL:
        raise VLMError(
            f"the loss stays at {loss:.3f} (below {GOAL} is needed): the pictures do not reach the words; "
            "look at the samples with `vlm data check`, and at optim.lr"
        )
    return 0


def selftest(
    config: TrainConfig, *, offline: bool, steps: int = STEPS, device: str = "auto"
) -> tuple[float, int]:
    """The last loss, and the steps it took."""
    import tempfile

    from accelerate import Accelerator

    from vlm.train.loop import Step, Trainer
    from vlm.train.prepare import FeatureStore, groups_of, read_sources
    from vlm.train.run import make_model, on_cpu
    from vlm.train.screen import Screen

    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            config,
            out=folder,
            feature_cache=config.feature_cache or f"{folder}/features",
            steps=steps,
            batch=PICTURES,
            objective="likelihood",
            flip=0.0,
            smoothing=0.0,
            save_every=steps + 1,
            trackers=(),
            optim=OptimConfig(lr=config.optim.lr, warmup=10, decay=0.2, weight_decay=0.0, gate_lr=5.0),
            sources=tuple(replace(s, per_image=1, limit=3 * PICTURES) for s in config.sources[:1]),
        )
        screen = Screen(sys.stderr.isatty())
        model = make_model(config, offline)
        groups = told_apart(groups_of(read_sources(config)))
        store = FeatureStore(model.features, groups, 0.0, model.config.hints, screen.progress)
        if store.bad:
            raise next(iter(store.bad.values()))
        losses: list[float] = []

        def report(step: Step) -> None:
            losses.append(step.loss)
            screen.progress("learning by heart", step.step, steps, f"loss {step.loss:.3f}")
            if step.loss < GOAL:
                trainer.stop()

        trainer = Trainer(model, config, groups, store, report, Accelerator(cpu=on_cpu(device)))
        with screen:
            trainer.learn(save=False)
        assert model.features.cache is not None
        model.features.cache.close()
    return losses[-1], len(losses)


def told_apart(groups: Sequence[Group], count: int = PICTURES) -> list[Group]:
    """`count` pictures with one answer each, all different, to one question if there is such a one.

    Raises:
        DataError: fewer than two pictures have different answers.
    """
    answers: dict[str, dict[str, tuple[Group, Pair]]] = defaultdict(dict)
    for group in groups:
        seen: set[str] = set()
        for pair in (pair for pairs in group.by_source for pair in pairs):
            question = pair.example.turns[-1].text
            for key in {question, ""} - seen:  # one answer a picture, to this question and to any
                if pair.answer not in answers[key]:
                    answers[key][pair.answer] = (group, pair)
                    seen.add(key)
    best = max(answers, key=lambda key: (min(len(answers[key]), count), key != ""), default="")
    chosen = list(answers[best].values())[:count]
    if len(chosen) < 2:
        raise DataError("fewer than two pictures have different answers: there is nothing to tell apart")
    return [Group(group.id, group.images, [[pair]], (1,)) for group, pair in chosen]
