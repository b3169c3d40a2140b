"""`vlm weights average`: adapters of one configuration become one, their mean (model soups).

Adapters that were trained from one start lie in one basin, and their average often answers better than each
of them, at no cost when asked (Wortsman et al. 2022). Averages of adapters with different starts are noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm import __version__
from vlm.adapter_file import read_adapter
from vlm.card import card_head, table
from vlm.checkpoint import adapter_folder, read_config, require_new, write_adapter
from vlm.config import flat
from vlm.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

COMPARED = ("model", "features", "hashes")
"""What adapters must have in common to be averaged."""


@dataclass(frozen=True)
class Ingredient:
    """One of the adapters: the name it was given, what it holds, and its share (they sum to 1)."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    sha256: str
    share: float


def average(
    out: Path, adapters: Sequence[str], weights: Sequence[float] | None = None, *, offline: bool = False
) -> None:
    """Writes the weighted mean of adapters, and a card that says of what, into a folder.

    Args:
        adapters: at least two: ids that ship, folders or hub ids.
        weights: one each, none below 0, not all 0; divided by their sum. Equal ones when None.

    Raises:
        ConfigError: fewer than two adapters, or weights that do not fit.
        WeightsError: one is no adapter or is damaged, they differ in configuration, frozen parts or tensors,
            or `out` is there already or cannot be written.
    """
    if len(adapters) < 2:
        raise ConfigError("an average needs at least two adapters")
    shares = _shares(weights, len(adapters))
    folders = [adapter_folder(name, offline=offline) for name in adapters]
    require_new(out)
    soup: list[Ingredient] = []
    for name, folder, share in zip(adapters, folders, shares, strict=True):
        config = read_config(folder)
        if soup:
            _same(soup[0], name, config)
        file = read_adapter(folder)
        soup.append(Ingredient(name, config, file.tensors, file.sha256, share))
        _same_tensors(soup[0], soup[-1])
    _write(out, soup)


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ConfigError(f"{count} adapters and {len(weights)} weights: they must be as many")
    total = sum(weights)
    if not all(0 <= weight < math.inf for weight in weights) or not 0 < total < math.inf:
        raise ConfigError("weights must be numbers of 0 or more, not all of them 0")
    return [weight / total for weight in weights]


def _same(first: Ingredient, name: str, config: Mapping[str, Any]) -> None:
    """Raises:
    WeightsError: an adapter's configuration or frozen parts are others than the first one's.
    """
    ours, theirs = (flat({key: part.get(key) for key in COMPARED}) for part in (first.config, config))
    keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if keys:
        one, other = (str(part.get(keys[0]))[:40] for part in (theirs, ours))
        more = f", and in {len(keys) - 1} more" if len(keys) > 1 else ""
        raise WeightsError(
            f"{name} cannot be averaged with {first.name}: they differ in {keys[0]} ({one}, {other}){more}"
        )


def _same_tensors(first: Ingredient, other: Ingredient) -> None:
    shapes = [{key: value.shape for key, value in part.tensors.items()} for part in (first, other)]
    if shapes[0] != shapes[1]:
        raise WeightsError(f"{other.name} cannot be averaged with {first.name}: their tensors differ")


def _write(out: Path, soup: Sequence[Ingredient]) -> None:
    first = soup[0]
    mean = {key: _mean(soup, key) for key in first.tensors}
    write_adapter(out, mean, {**first.config, "version": __version__}, _card(out, soup))


def _mean(soup: Sequence[Ingredient], key: str) -> Tensor:
    """The weighted mean of one tensor, summed in float64, in the first one's type."""
    first = soup[0].tensors[key]
    total = soup[0].share * first.double()
    for part in soup[1:]:
        total += part.share * part.tensors[key].double()
    return total.to(first.dtype).contiguous()


def _card(out: Path, soup: Sequence[Ingredient]) -> str:
    note = (
        "Its weights are the weighted mean of other adapters' (a model soup, Wortsman et al. 2022), made by "
        "`vlm weights average`; nothing was trained for it, and it has no scores of its own yet."
    )
    rows = [(Path(part.name).name, f"{part.share:.4g}", f"`{part.sha256}`") for part in soup]
    made_of = table(("adapter", "share", "SHA-256 of its `adapter.safetensors`"), rows)
    return (
        card_head(out, soup[0].config, f", an average of {len(soup)}", note)
        + f"\n## Made of\n\n{made_of}\n"
        + "Their own cards say what each has learnt, from which data, and what it is known to get wrong.\n"
    )
