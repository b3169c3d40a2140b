"""`vlm train ladder`: what a larger run will read, said before it is made.

    vlm train ladder flickr8k-flamingo data=FLICKR8K ladder.pictures=[300,600,1200,2400,4800]
    vlm train ladder smoke ladder.widths=[64,256] ladder.dev=8 optim.mup_base=64 --sweep

The recipe is trained at every size but the largest; a power law is fitted to the losses on pictures that no
run learns from; the largest run's loss is written down with its interval; then that run is made and the two
are compared. `--sweep` looks for the best learning rate at each width instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm.config import from_dict
from vlm.errors import ConfigError, UsageError
from vlm.options import add_common, make_parser
from vlm.train.config import TrainConfig
from vlm.train.curve import draw_ladder
from vlm.train.powerlaw import LEVEL, PowerLaw, unknowns
from vlm.train.rungs import LadderConfig, Rung, Workshop, finished, parameters, rung_config

FILE = "ladder.json"
PICTURE = "ladder.png"
KEY = "ladder."


def main(argv: list[str]) -> int:
    """Runs `vlm train ladder RECIPE [ladder.key=value ...] [key=value ...]`."""
    parser = make_parser("vlm train ladder", "Predict the loss of the largest of several runs, and make it.")
    parser.add_argument("recipe", help="a recipe that ships, or a YAML file")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="ladder.pictures=[...] ladder.widths=[...] ladder.dev=N ladder.seeds=N; others as for vlm train",
    )
    parser.add_argument("--sweep", action="store_true", help="the best learning rate at each width instead")
    parser.add_argument("--fresh", action="store_true", help="begin anew, dropping what the runs measured")
    add_common(parser)
    args = parser.parse_intermixed_args(argv)
    config, ladder = read_settings(args.recipe, args.settings)
    from vlm.train.main import applied
    from vlm.train.processes import TERMINATED
    from vlm.train.sweep import sweep

    config = applied(args, config)
    how = {"offline": args.offline, "fresh": args.fresh, "device": args.device}
    found = sweep(config, ladder, **how) if args.sweep else climb(config, ladder, **how)
    return TERMINATED if found is None else 0


def read_settings(recipe: str, settings: Sequence[str]) -> tuple[TrainConfig, LadderConfig]:
    """The recipe and the ladder that a command line names.

    Raises:
        UsageError: no such recipe, an unknown key, a value that it cannot take.
        ConfigError: a recipe that cannot be read.
    """
    from vlm.train.recipe import read_recipe, set_key

    values: dict[str, Any] = {}
    for setting in settings:
        if setting.startswith(KEY):
            set_key(values, setting)
    config = read_recipe(recipe, [setting for setting in settings if not setting.startswith(KEY)])
    try:
        return config, from_dict(LadderConfig, values.get("ladder", {}), KEY)
    except ConfigError as problem:
        raise UsageError(str(problem)) from problem


def climb(config: TrainConfig, ladder: LadderConfig, **how: Any) -> dict[str, Any] | None:
    """Makes the ladder, or goes on with it; leaves `ladder.json` and `ladder.png` in the recipe's `out`.

    Args:
        how: `offline`, `fresh` and `device`, as for `Workshop.open`.

    Returns:
        The report; None where a signal has stopped it.

    Raises:
        ConfigError: sizes that no law can be fitted to, or a folder of another ladder.
        DataError: too few pictures.
    """
    from vlm.train.dev import apportion

    axes = check_sizes(ladder)
    shop = Workshop.open(FILE, config, ladder, **how)
    *lower, last = rungs(config, ladder, shop.offline)
    apportion(last.config)  # there are enough pictures for every run, or none is made
    if not shop.measure_all(lower):
        return None
    if "prediction" not in shop.report:
        shop.report |= predict(shop.report["rungs"], last, axes)
        # Whether the run was still to be made when this was said.
        shop.report["prediction"]["before"] = shop.fresh or finished(last) is None
        shop.write()
    shop.say(prediction_text(shop.report))
    row = shop.measure(last)
    if row is None:
        return None
    said = shop.report["prediction"]
    shop.report["measured"] = row | {"inside": said["low"] <= row["loss"] <= said["high"]}
    shop.write()
    if shop.main:
        draw_ladder(shop.report, shop.path.with_name(PICTURE))
        show(shop.report)
    return shop.report


def check_sizes(ladder: LadderConfig) -> tuple[str, ...]:
    """The sizes that the law is of: `pictures`, `trained` (parameters), or both.

    Raises:
        UsageError: too few of them.
    """
    given = {"pictures": ladder.pictures, "trained": ladder.widths}
    axes = tuple(name for name, sizes in given.items() if len(sizes) > 1)
    if not axes:
        raise UsageError(
            "sizes are missing: ladder.pictures=[250,500,1000,2000,4000], "
            "ladder.widths=[64,128,192,256,384], or both"
        )
    least = 4 if len(axes) == 1 else 3
    for name in axes:
        if len(given[name]) < least:
            key = "widths" if name == "trained" else name
            raise UsageError(
                f"ladder.{key} has {len(given[name])} sizes; with fewer than three rungs below the largest "
                f"nothing can be predicted: give at least {least}"
            )
    runs = (max(1, len(ladder.pictures)) * max(1, len(ladder.widths)) - 1) * ladder.seeds
    if runs <= unknowns(len(axes)):
        raise UsageError(
            f"{runs} runs below the largest, and a law of {unknowns(len(axes))} unknowns: nothing would be "
            "left to tell how far it is off. Give one more size, or ladder.seeds=2"
        )
    return axes


def rungs(config: TrainConfig, ladder: LadderConfig, offline: bool) -> list[Rung]:
    """Every run, smaller ones first; the last one is the largest."""
    made = []
    for pictures in ladder.pictures or (0,):
        for width in ladder.widths or (0,):
            for seed in range(ladder.seeds):
                sizes = {"p": pictures, "w": width, "s": seed}
                name = "-".join(f"{letter}{size}" for letter, size in sizes.items() if size)
                settings = rung_config(config, ladder, name, pictures=pictures, width=width, seed=seed)
                trained = parameters(settings.model, offline) if width and not seed else 0
                made.append(Rung(name, settings, pictures, width, trained))
    return made[: len(made) - ladder.seeds + 1]


def predict(rows: Sequence[dict[str, Any]], last: Rung, axes: Sequence[str]) -> dict[str, Any]:
    """The law of the runs below the largest, and what it says of that one."""
    sizes = np.array([[row[axis] for axis in axes] for row in rows])
    law = PowerLaw(sizes, np.array([row["loss"] for row in rows]))
    said = law.predict(*(getattr(last, axis) for axis in axes))
    terms = [
        {"size": axis, "factor": float(law.factors[i]), "exponent": vars(law.exponent_interval(i))}
        for i, axis in enumerate(axes)
    ]
    return {
        "law": {
            "form": "loss = floor + " + " + ".join(f"factor * {axis}^-exponent" for axis in axes),
            "floor": vars(law.floor_interval()),
            "terms": terms,
            "scatter": law.scatter,
            "freedom": law.freedom,
            "weights": law.weights.tolist(),
        },
        "prediction": {
            "name": last.name,
            **{axis: getattr(last, axis) for axis in axes},
            "loss": said.value,
            "low": said.low,
            "high": said.high,
            "level": LEVEL,
        },
    }


def prediction_text(report: dict[str, Any]) -> str:
    """What is said before the largest run, in a line."""
    said = report["prediction"]
    return (
        f"{said['name']} will read {said['loss']:.4f} ({said['low']:.4f} to {said['high']:.4f}, "
        f"{said['level']:.0%}), say {len(report['rungs'])} smaller runs"
    )


def law_text(law: dict[str, Any]) -> str:
    """The fitted law, with the intervals of what does not depend on units."""

    def shown(of: dict[str, float]) -> str:
        return f"{of['value']:.3f} ({of['low']:.3f} to {of['high']:.3f})"

    exponents = "; ".join(f"exponent of {term['size']} {shown(term['exponent'])}" for term in law["terms"])
    terms = " + ".join(
        f"{term['factor']:.4g} {term['size']}^-{term['exponent']['value']:.3f}" for term in law["terms"]
    )
    return f"loss = {law['floor']['value']:.3f} + {terms}; floor {shown(law['floor'])}; {exponents}"


def show(report: dict[str, Any]) -> None:
    """The runs, the law and how the prediction fared, on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="loss on pictures that no run has learnt", title_justify="left")
    for name in ("run", "pictures", "parameters", "steps", "loss"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in (*report["rungs"], report["measured"]):
        cells = (row["name"], row["pictures"], row["trained"], row["steps"], f"{row['loss']:.4f}")
        table.add_row(*map(str, cells))
    console.print(table)
    said, found = report["prediction"], report["measured"]
    verdict = "within" if found["inside"] else "OUTSIDE"
    console.print(law_text(report["law"]), markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{found['name']}: predicted {said['loss']:.4f} ({said['low']:.4f} to {said['high']:.4f}), "
        f"measured {found['loss']:.4f}: {verdict} the {said['level']:.0%} interval",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
