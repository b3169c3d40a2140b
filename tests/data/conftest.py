"""Small data sets in the layouts that people download, drawn on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

CAPTIONS = {
    "a.jpg": [
        "A black dog runs on the grass .",
        "The dog is running .",
        "A dog , black , runs",
        "a dog",
        "Dog",
    ],
    "b.jpg": ['Two men play "soccer" in a field .', "Two men .", "Men playing soccer", "men run", "A field"],
    "c.jpg": ["A girl in a red shirt swims .", "A girl swims", "A girl in red", "girl in a pool", "the pool"],
}


@pytest.fixture
def save(draw: Callable[..., Image.Image]) -> Callable[..., Path]:
    """`save(path, seed)`: write a picture of its own look to a path (folders made)."""

    def write(path: Path, seed: int, side: int = 64) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(seed, side).save(path)
        return path

    return write


@pytest.fixture
def flickr(tmp_path: Path, save: Callable[..., Path]) -> Path:
    """Flickr8k's common layout: a and b for training, c for dev; the test list is absent."""
    root = tmp_path / "flickr8k"
    for seed, name in enumerate(CAPTIONS):
        save(root / "Images" / name, seed)
    rows = [
        f'{name},"{text.replace(chr(34), chr(34) * 2)}"' if set(text) & {",", '"'} else f"{name},{text}"
        for name, texts in CAPTIONS.items()
        for text in texts
    ]
    (root / "captions.txt").write_text("image,caption\n" + "\n".join(rows) + "\n", encoding="utf-8")
    (root / "Flickr_8k.trainImages.txt").write_text("b.jpg\na.jpg\n")
    (root / "Flickr_8k.devImages.txt").write_text("c.jpg\n")
    return root


@pytest.fixture
def folder(tmp_path: Path, save: Callable[..., Path]) -> Path:
    """An image folder with ten captioned pictures."""
    root = tmp_path / "folder"
    rows = []
    for seed in range(10):
        save(root / f"{seed:03}.png", 100 + seed)
        rows.append({"file_name": f"{seed:03}.png", "text": f"picture number {seed}"})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root
