"""What a run of preferences has changed: which of two answers is the likelier one, before and after.

The pairs are of pictures that were set aside. What it cost elsewhere is measured on captions, where the
recipe names a data set for that (`holdout_captions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm.config import CAPTION_PROMPT
from vlm.conversation import PreferencePair
from vlm.data.example import Example
from vlm.data.sources import read_dataset
from vlm.errors import DataError
from vlm.model import VLM
from vlm.train import holdout
from vlm.train.prepare import first_pictures

FILE = "preference.json"
PICTURES = 100
"""Pictures whose captions are scored: a look, not a benchmark."""
CIDER = "captions: CIDEr"


def caption_examples(place: str, count: int = PICTURES) -> list[Example]:
    """Captioned pictures of the dev part of a data set; none where none is named.

    Raises:
        DataError: it cannot be read, or holds no captions.
    """
    if not place:
        return []
    captioned = [e for e in read_dataset(place, split="dev") if e.turns[-1].text == CAPTION_PROMPT]
    if not captioned:
        raise DataError(f"{place} holds no captions to be scored on (holdout_captions)")
    return first_pictures(captioned, count)


@dataclass(frozen=True)
class Wins:
    """Asks a model which answers it holds for likelier, and for some captions.

    Attributes:
        pairs: those that were set aside.
        captions: pictures to be described.
        trained, unused: pairs that are learnt, and opinions that make no pair.
    """

    pairs: Sequence[PreferencePair]
    captions: Sequence[Example]
    trained: int
    unused: int
    beta: float
    file: str = FILE

    @property
    def asked(self) -> str:
        sides = [
            Example(pair.conversation.images, pair.conversation.turns, (pair.chosen, pair.rejected), pair.id)
            for pair in self.pairs
        ]
        return holdout.digest([*sides, *self.captions])

    def ask(self, model: VLM) -> dict[str, Any]:
        """(log p(chosen), log p(rejected)) of every pair, and CIDEr."""
        scores = model.score(
            [pair.conversation for pair in self.pairs], [(pair.chosen, pair.rejected) for pair in self.pairs]
        )
        described = holdout.ask(model, self.captions).scores if self.captions else {}
        return {"scores": scores, "cider": described.get(CIDER)}

    def report(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """The figures, and every pair with both log-probabilities."""
        found: dict[str, Any] = {
            "beta": self.beta,
            "pairs": {"trained": self.trained, "held_out": len(self.pairs), "unused": self.unused},
            "win_rate": _both(win_rate, before["scores"], after["scores"]),
            "margin": _both(mean_margin, before["scores"], after["scores"]),
            "captions": None,
            "captions_reason": "not measured: the recipe names no holdout_captions",
        }
        if not self.pairs:
            found["reason"] = "not measured: holdout is 0"
        if self.captions:
            pictures = len({example.images for example in self.captions})
            figures = {"before": before["cider"], "after": after["cider"]}
            found["captions"] = {"pictures": pictures, "cider": figures}
            del found["captions_reason"]
        found["answers"] = [
            {
                "id": pair.id,
                "question": pair.conversation.turns[-1].text,
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "before": one,
                "after": other,
            }
            for pair, one, other in zip(self.pairs, before["scores"], after["scores"], strict=True)
        ]
        return found

    def show(self, found: dict[str, Any]) -> None:
        """The table on standard output."""
        from rich.console import Console
        from rich.table import Table

        counts = found["pairs"]
        title = f"{counts['held_out']} preference pairs that training has not seen"
        table = Table(title=title, title_justify="left")
        for name in ("score", "before", "after"):
            table.add_column(name, justify="left" if name == "score" else "right", overflow="fold")
        for row in rows(found):
            table.add_row(*row)
        Console().print(table, markup=False)


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(score, before, after) of a report, as text."""
    shown: list[tuple[str, str, str]] = []
    for name, key, factor, digits in (("win rate, %", "win_rate", 100, 1), ("margin, nats", "margin", 1, 2)):
        both = found[key]
        if both is None:
            shown.append((name, found["reason"], ""))
        else:
            shown.append((name, *_figures(both, factor, digits)))
    captions = found["captions"]
    if captions is None:
        shown.append(("CIDEr", found["captions_reason"], ""))
    else:
        name = f"CIDEr of {captions['pictures']} pictures (not comparable with published figures)"
        shown.append((name, *_figures(captions["cider"], 1, 1)))
    return shown


def _figures(both: dict[str, float], factor: int, digits: int) -> tuple[str, str]:
    return f"{factor * both['before']:.{digits}f}", f"{factor * both['after']:.{digits}f}"


def win_rate(scores: Sequence[Sequence[float]]) -> float:
    """Share of the pairs whose chosen answer is likelier than the rejected one, lengths as they are."""
    return sum(chosen > rejected for chosen, rejected in scores) / len(scores)


def mean_margin(scores: Sequence[Sequence[float]]) -> float:
    """Mean of log p(chosen) - log p(rejected), in nats."""
    return sum(chosen - rejected for chosen, rejected in scores) / len(scores)


def _both(figure: Any, before: Sequence[Any], after: Sequence[Any]) -> dict[str, float] | None:
    return {"before": figure(before), "after": figure(after)} if before else None
