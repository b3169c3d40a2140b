"""What the model card of every adapter has, however the adapter was made: its head, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def card_head(folder: Path, config: Mapping[str, Any], made: str, note: str) -> str:
    """What the adapter is, what it joins, and how it is asked.

    Args:
        folder: the adapter's; it is asked by that name.
        config: its `config.json`.
        made: ends the title, "Flamingo adapter" (", trained on flickr8k").
        note: sentences that end the paragraph on what it joins.
    """
    model = config["model"]
    joins = (
        f"It joins the frozen image encoder `{model['vision']['encoder']}` and the frozen language model "
        f"`{model['language_model']}`; both are used as they are, and are not part of this folder. {note}"
    )
    return (
        "---\nlibrary_name: vlm-adapters\npipeline_tag: image-text-to-text\nlicense: apache-2.0\n---\n\n"
        f"# {model['adapter'].capitalize()} adapter{made}\n\n{joins.strip()}\n\n"
        f'## Use\n\n```sh\nvlm ask --adapter {folder.name} picture.jpg "What is in the picture?"\n```\n'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"
