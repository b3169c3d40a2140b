"""Curves as pictures: the loss over steps, sizes and learning rates; answers right over answers given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

LOSS = "loss (nats per token)"
WINDOW = 20
"""Steps that the smoothed line looks back, where there are ten times as many."""


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential moving average whose beginning is not biased towards zero."""
    memory = 1 - 1 / max(1.0, min(WINDOW, len(values) / 10))
    total = weight = 0.0
    means = []
    for value in values:
        total = memory * total + (1 - memory) * value
        weight = memory * weight + (1 - memory)
        means.append(total / weight)
    return means


def draw_curve(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws a log's loss (every step, and smoothed) and its learning rate as a PNG; nothing for no steps."""
    rows = [row for row in rows if row["loss"] is not None]
    if not rows:
        return
    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    figure, left = _canvas()
    left.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    (loss,) = left.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.8, label="loss")
    left.set(xlabel="step", ylabel=LOSS, title=title)
    right = left.twinx()
    (rate,) = right.plot(steps, [row["lr"] for row in rows], color="tab:orange", label="learning rate")
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0)
    lines = [loss, rate]
    rewards = [(row["step"], row["numbers"]["reward"]) for row in rows if "reward" in row["numbers"]]
    if rewards:
        third = left.twinx()
        third.set_axis_off()
        places, values = zip(*rewards, strict=True)
        label = f"reward ({min(values):.2f} to {max(values):.2f})"
        lines += third.plot(places, smoothed(values), color="tab:green", label=label)
    left.legend(handles=lines, loc="upper right")
    _save(figure, path)


def draw_ladder(report: Mapping[str, Any], path: Path) -> None:
    """Draws the runs of a ladder, the law fitted to them, and the prediction beside what was measured."""
    import numpy as np

    terms, said, found = report["law"]["terms"], report["prediction"], report["measured"]
    axis = terms[0]["size"]
    others = [term["size"] for term in terms[1:]]
    figure, plot = _canvas()
    rows = [*report["rungs"], found]
    sizes = np.geomspace(min(row[axis] for row in rows), found[axis], 100)
    for number, other in enumerate(sorted({tuple(row[name] for name in others) for row in rows})):
        mine = [row for row in report["rungs"] if tuple(row[name] for name in others) == other]
        colour, label = f"C{number}", "runs" + "".join(f", {n:,} parameters" for n in other)
        plot.plot([row[axis] for row in mine], [row["loss"] for row in mine], "o", color=colour, label=label)
        law = report["law"]["floor"]["value"] + sum(
            term["factor"] * np.power(sizes if term["size"] == axis else other[0], -term["exponent"]["value"])
            for term in terms
        )
        plot.plot(sizes, law, color=colour, alpha=0.5)
    ends = [[max(0.0, said["loss"] - said["low"])], [max(0.0, said["high"] - said["loss"])]]
    label = f"predicted, {said['level']:.0%}"
    plot.errorbar([said[axis]], [said["loss"]], yerr=ends, fmt="_", color="black", capsize=4, label=label)
    plot.plot([found[axis]], [found["loss"]], "*", color="tab:red", markersize=12, label="measured")
    plot.set(xscale="log", xlabel="parameters trained" if axis == "trained" else axis, ylabel=LOSS)
    plot.legend(loc="upper right")
    _save(figure, path)


def draw_sweep(report: Mapping[str, Any], path: Path) -> None:
    """Draws the loss over the learning rate, a line for each width, its best rate marked."""
    figure, plot = _canvas()
    for number, width in enumerate(report["widths"]):
        colour = f"C{number}"
        plot.plot(width["rates"], width["losses"], "o-", color=colour, label=f"width {width['width']}")
        plot.plot([width["best"]], [width["loss"]], "*", color=colour, markersize=14)
    base = report["mup_base"]
    title = f"muP from width {base}" if base else "without muP"
    plot.set(xscale="log", xlabel="learning rate", ylabel=LOSS, title=title)
    plot.legend()
    _save(figure, path)


def draw_risk(reports: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of the score of the surest answers over their share, a line for each calibrated report."""
    figure, plot = _canvas()
    for report in reports:
        shares, scores = zip(*report["calibration"]["risk"], strict=True)
        plot.plot(shares, scores, "o-", label=f"{report['task']}: {report['main_metric']}")
    plot.set(
        xlabel="share answered, %", ylabel="score of the surest answers, %", xlim=(0, 102), ylim=(0, 102)
    )
    plot.legend(loc="lower left")
    picture = BytesIO()
    _save(figure, picture)
    return picture.getvalue()


def _canvas() -> tuple[Any, Any]:
    """A figure and its axes."""
    # The canvas is named outright: pyplot would choose one, and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    plot.grid(alpha=0.2)
    return figure, plot


def _save(figure: Any, path: Path | BytesIO) -> None:
    figure.savefig(path, format="png", dpi=110)
