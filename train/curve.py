"""The loss and the learning rate over the steps, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    # The canvas is named outright: pyplot would choose one, and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    left.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    (loss,) = left.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.8, label="loss")
    left.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    left.grid(alpha=0.2)
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
    figure.savefig(path, format="png", dpi=110)
