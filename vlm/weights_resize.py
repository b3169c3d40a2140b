"""`vlm weights resize`: an adapter for pictures of another size, its positions interpolated.

A convolutional encoder reads pictures of any size; a larger one shows it smaller things, on a finer grid.
Networks trained on cropped, enlarged objects often see whole pictures better that way, untrained (Touvron et
al. 2019).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vlm import __version__
from vlm.adapter_file import read_adapter
from vlm.adapters.positions import regrid
from vlm.card import card_head, table
from vlm.checkpoint import adapter_folder, model_config, read_config, require_new, write_adapter
from vlm.config import to_dict


def resize(out: Path, adapter: str, size: int, *, offline: bool = False) -> None:
    """Writes an adapter for pictures of `size` x `size` pixels into a folder, with a card that says so.

    When it abstains is not carried over: that was fitted to what the encoder saw at the old size.

    Raises:
        ConfigError: the encoder cannot read pictures of this size.
        WeightsError: `adapter` is none or is damaged, its tokens are no square grid, or `out` is there
            already or cannot be written.
    """
    from vlm.vision import load_encoder
    from vlm.weights import resolve

    folder = adapter_folder(adapter, offline=offline)
    require_new(out)
    values = read_config(folder)
    trained = model_config(folder, values)
    vision = replace(trained.vision, size=size)
    file = read_adapter(folder)
    encoder = load_encoder(vision, resolve(vision.encoder, offline=offline))
    resized = regrid(file.tensors, values["features"]["tokens"], encoder.tokens)
    features = {"tokens": encoder.tokens, "width": encoder.width}
    kept = {key: value for key, value in values.items() if key != "abstain"}
    kept |= {"version": __version__, "model": to_dict(replace(trained, vision=vision)), "features": features}
    note = (
        f"Another adapter's weights, its positions interpolated for pictures of {size} x {size} pixels by "
        "`vlm weights resize`; nothing was trained for it, and it has no scores of its own yet."
    )
    rows = [(Path(adapter).name, str(trained.vision.size), f"`{file.sha256}`")]
    made_of = table(("adapter", "pixels", "SHA-256 of its `adapter.safetensors`"), rows)
    card = card_head(out, kept, f" at {size} pixels", note) + f"\n## Made of\n\n{made_of}"
    write_adapter(out, resized, kept, card)
