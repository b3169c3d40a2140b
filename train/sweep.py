"""Which learning rate is best at each of several widths, and whether it is the same one.

Rates a factor of 2 apart around the recipe's are tried at every width. Without muP the best one falls as the
adapter grows; with it (`optim.mup_base`) it should stay within a factor of 2 (Yang et al. 2022, Fig. 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from vlm.errors import ConfigError
from vlm.train.config import TrainConfig
from vlm.train.curve import draw_sweep
from vlm.train.rungs import LadderConfig, Rung, Workshop, rung_config

FILE = "sweep.json"
PICTURE = "sweep.png"


def sweep(config: TrainConfig, ladder: LadderConfig, **how: Any) -> dict[str, Any] | None:
    """Makes every run, or goes on; leaves `sweep.json` and `sweep.png` in the recipe's `out`.

    Args:
        how: `offline`, `fresh` and `device`, as for `Workshop.open`.

    Returns:
        The report; None where a signal has stopped it.

    Raises:
        ConfigError: fewer than two widths or three rates, or a folder of another sweep.
    """
    if len(ladder.widths) < 2 or ladder.rates < 3:
        raise ConfigError("a sweep compares widths: ladder.widths=[64,256], each at ladder.rates=3 or more")
    if len(ladder.pictures) > 1:
        raise ConfigError("a sweep has one number of pictures: ladder.pictures=[1000], or none for all")
    shop = Workshop.open(FILE, config, ladder, **how)
    if not shop.measure_all(rungs(config, ladder)):
        return None
    shop.report |= compare(shop.report["rungs"], config.optim.mup_base)
    shop.write()
    if shop.main:
        draw_sweep(shop.report, shop.path.with_name(PICTURE))
        show(shop.report)
    return shop.report


def rungs(config: TrainConfig, ladder: LadderConfig) -> list[Rung]:
    """A run for every width, rate and seed."""
    made = []
    for width in ladder.widths:
        for step in range(-(ladder.rates // 2), ladder.rates - ladder.rates // 2):
            for seed in range(ladder.seeds):
                rate = config.optim.lr * 2.0**step
                name = f"w{width}-lr{rate:.3g}" + f"-s{seed}" * (seed > 0)
                pictures = ladder.pictures[0] if ladder.pictures else 0
                settings = rung_config(config, ladder, name, pictures=pictures, width=width, seed=seed)
                settings = replace(settings, optim=replace(settings.optim, lr=rate))
                made.append(Rung(name, settings, pictures, width))
    return made


def compare(rows: Sequence[dict[str, Any]], mup_base: int) -> dict[str, Any]:
    """The best rate of each width, and how many factors of 2 they lie apart.

    `edge` says that the best rate is the first or the last one tried, so that a better one may lie beyond;
    then whether the rate carries over (`carries_over`) is not known.
    """
    widths = []
    for width in sorted({row["width"] for row in rows}):
        losses = {
            rate: fmean(row["loss"] for row in rows if (row["width"], row["rate"]) == (width, rate))
            for rate in sorted({row["rate"] for row in rows if row["width"] == width})
        }
        best = min(losses, key=lambda rate: losses[rate])
        widths.append({
            "width": width, "rates": list(losses), "losses": list(losses.values()),
            "best": best, "loss": losses[best], "edge": best in (min(losses), max(losses)),
        })  # fmt: skip
    steps = [math.log2(found["best"]) for found in widths]
    apart = max(steps) - min(steps)
    carries_over = None if any(found["edge"] for found in widths) else apart < 1.5
    return {"mup_base": mup_base, "widths": widths, "apart": round(apart, 6), "carries_over": carries_over}


def show(report: dict[str, Any]) -> None:
    """The losses by width and rate, and the verdict, on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    base = report["mup_base"]
    how = f"muP from width {base}" if base else "without muP"
    table = Table(title=f"loss by width and learning rate, {how}", title_justify="left")
    table.add_column("rate", justify="right")
    widths = report["widths"]
    for found in widths:
        table.add_column(f"width {found['width']}", justify="right")
    for index, rate in enumerate(widths[0]["rates"]):
        cells = [f"{found['losses'][index]:.4f}" + " *" * (found["best"] == rate) for found in widths]
        table.add_row(f"{rate:.3g}", *cells)
    console.print(table)
    verdict = f"the best rates (*) lie {report['apart']:g} factors of 2 apart: "
    if report["carries_over"] is None:
        edges = " and ".join(str(found["width"]) for found in widths if found["edge"])
        verdict += f"no verdict, at width {edges} it is the first or last one tried (ladder.rates, optim.lr)"
    else:
        verdict += f"the rate {'carries' if report['carries_over'] else 'does NOT carry'} over"
    console.print(verdict, markup=False, highlight=False, soft_wrap=True)
