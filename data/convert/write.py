"""Write examples as an image folder that describes itself, readable by `datasets` and by `vlm`.

DST/dataset.json                name, source, terms, parts and their sizes; while it is written: unfinished
DST/README.md                   the same for people, with the hub's YAML header
DST/train/metadata.jsonl        file_name and text, or question and answers; id; what else is known
DST/train/000001.jpg ...        hard links to the originals where the file system allows, else copies
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.config import CAPTION_PROMPT
from vlm.data.example import Example
from vlm.errors import DataError

FORMAT = 1
FOLDERS = {"train": "train", "dev": "validation", "test": "test"}
ABOUT: dict[str, dict[str, str]] = {
    "flickr8k": {
        "title": "Flickr8k",
        "source": "Hodosh, Young, Hockenmaier, Framing image description as a ranking task, JAIR 47, 2013",
        "terms": "photographs by Flickr users; for research and education, not for commercial use",
    },
    "daquar": {
        "title": "DAQUAR",
        "source": "Malinowski and Fritz, A multi-world approach to QA, NIPS 2014; NYU Depth v2 pictures",
        "terms": "for research",
    },
    "easy-vqa": {
        "title": "easy-VQA",
        "source": "Victor Zhou, easy-VQA, 2019",
        "terms": "MIT licence",
    },
}


def _name_and_source(example: Example) -> tuple[str, Path | bytes]:
    """What an example's picture is called in the folder, and where it comes from."""
    image = example.images[0] if example.images else None
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()[:16] + _suffix_of(image), image
    if not isinstance(image, str | Path):
        raise DataError(f"the picture of example {example.id} is neither a file nor bytes")
    path = Path(image)
    return path.stem + (path.suffix.lower() or ".jpg"), path


def _suffix_of(content: bytes) -> str:
    signs = {b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp"}
    return signs.get(content[:4], ".jpg")


def _put(source: Path | bytes, target: Path) -> None:
    """Puts a picture there whole or not at all; what a run that was broken off has left is replaced."""
    if target.exists() and _same(source, target):
        return
    beside = target.with_name(f".{target.name}.part")
    beside.unlink(missing_ok=True)  # it may be another link to an original, which must not be written to
    try:
        if isinstance(source, bytes):
            beside.write_bytes(source)
        else:
            _link_or_copy(source, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def _same(source: Path | bytes, target: Path) -> bool:
    if isinstance(source, bytes):
        return target.stat().st_size == len(source) and target.read_bytes() == source
    return os.path.samefile(source, target) or filecmp.cmp(source, target, shallow=False)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def row_of(example: Example, file_name: str) -> dict[str, Any]:
    """An example as a metadata row.

    Raises:
        DataError: it has several pictures or turns, which a metadata row cannot hold.
    """
    if len(example.images) != 1 or len(example.turns) != 1:
        raise DataError(
            f"example {example.id} has several pictures or turns; an image folder holds one of each"
        )
    question = example.turns[0].text
    row: dict[str, Any] = {"file_name": file_name, "id": example.id}
    if question == CAPTION_PROMPT:
        row["text"] = list(example.answers)
    else:
        row["question"] = question
        row["answers"] = list(example.answers)
    taken = {*row, "task"}
    row.update(
        {
            key: value if isinstance(value, str) else str(value)
            for key, value in example.meta.items()
            if key not in taken
        }
    )
    return row


def write_part(examples: Sequence[Example], folder: Path) -> int:
    """Write one part's pictures and metadata; returns the number of pictures.

    Raises:
        DataError: a picture cannot be read or written, or two different pictures have one name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named: dict[str, Path | bytes] = {}
    rows = []
    for example in examples:
        name, source = _name_and_source(example)
        if named.setdefault(name, source) != source:
            raise DataError(f"two pictures are called {name}: {named[name]!s:.200} and {source!s:.200}")
        rows.append(row_of(example, name))
    for name, source in named.items():
        try:
            _put(source, folder / name)
        except OSError as error:
            raise DataError(f"{name} cannot be written to {folder}: {error.strerror or error}") from error
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part = folder / "metadata.jsonl.part"
    part.write_text(text, encoding="utf-8")
    part.replace(folder / "metadata.jsonl")
    return len(named)


def _readme(about: Mapping[str, str], parts: Mapping[str, Mapping[str, int]]) -> str:
    rows = "\n".join(f"| {name} | {size['pictures']} | {size['examples']} |" for name, size in parts.items())
    return (
        f"---\npretty_name: {about['title']}\n---\n\n# {about['title']}\n\n{about['source']}.\n"
        f"Terms: {about['terms']}.\n\n| part | pictures | examples |\n|---|---|---|\n{rows}\n\n"
        "Each part is an image folder with `metadata.jsonl`: read it with `vlm data check`, train on it\n"
        "with `vlm train finetune data=FOLDER`, or load it with `datasets.load_dataset`.\n"
    )


def _require_own(folder: Path, parts: Sequence[str]) -> None:
    """Raises:
    DataError: what a folder holds would not be what is written there, or would be read along with it.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "dataset.json").is_file():
        raise DataError(f"{folder} is not empty and holds no converted data set; name a new folder")
    left = [name for name in FOLDERS.values() if name not in parts and (folder / name).exists()]
    if left:
        raise DataError(
            f"{folder} holds {', '.join(left)} of an earlier conversion, but now there is no such part; "
            "remove that, or name a new folder"
        )


def _describe(folder: Path, about: Mapping[str, Any]) -> None:
    part = folder / "dataset.json.part"
    part.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(folder / "dataset.json")


def write_dataset(
    parts: Mapping[str, Sequence[Example]], folder: Path, about: Mapping[str, str], *, note: str = ""
) -> dict[str, dict[str, int]]:
    """Write all parts (`train`, `dev`, `test`) of a set; returns part -> pictures and examples.

    Raises:
        DataError: the folder holds something else or a part that is not among these, or a part cannot be
            written.
    """
    _require_own(folder, [FOLDERS[name] for name in parts])
    sizes: dict[str, dict[str, int]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    description = {"format": FORMAT, **about, **({"note": note} if note else {})}
    # First, so that a run that is broken off can be repeated over what it left, which is not read until then.
    _describe(folder, {**description, "unfinished": True})
    for name, examples in parts.items():
        pictures = write_part(examples, folder / FOLDERS[name])
        sizes[name] = {"pictures": pictures, "examples": len(examples)}
    _describe(folder, {**description, "parts": sizes})
    (folder / "README.md").write_text(_readme(about, sizes), encoding="utf-8")
    return sizes
