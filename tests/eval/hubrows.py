"""The rows of the benchmarks' fixtures as the hub's Parquet files have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FIXTURES = Path(__file__).parent / "fixtures"
Row = dict[str, Any]


def read(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


def picture(folder: str, name: str) -> Row:
    return {"bytes": (FIXTURES / folder / name).read_bytes(), "path": Path(name).name}


def coco(folder: str, number: int) -> Row:
    return picture(folder, f"val2014/COCO_val2014_{number:012d}.jpg")


def vqa(folder: str, prefix: str) -> list[Row]:
    said = read(f"{folder}/{prefix}mscoco_val2014_annotations.json")["annotations"]
    asked = read(f"{folder}/{prefix}OpenEnded_mscoco_val2014_questions.json")["questions"]
    notes = {row["question_id"]: row for row in said}
    return [notes[row["question_id"]] | row | {"image": coco(folder, row["image_id"])} for row in asked]


def vqav2() -> list[Row]:
    return vqa("vqav2", "v2_")


def okvqa() -> list[Row]:
    kept = ("image", "question", "question_type", "answer_type")
    return [
        {
            **{key: row[key] for key in kept},
            "question_id": str(row["question_id"]),
            "answers": [each["answer"] for each in row["answers"]],
        }
        for row in vqa("okvqa", "")
    ]


def textvqa() -> list[Row]:
    rows = read("textvqa/TextVQA_0.5.1_val.json")["data"]
    return [row | {"image": picture("textvqa", f"train_images/{row['image_id']}.jpg")} for row in rows]


def vizwiz() -> list[Row]:
    return [
        {
            "question_id": row["image"].removesuffix(".jpg"),
            "image": picture("vizwiz", f"val/{row['image']}"),
            "question": row["question"],
            "answers": [each["answer"] for each in row["answers"]],
            "category": row["answer_type"],
        }
        for row in read("vizwiz/val.json")
    ]


def aokvqa() -> list[Row]:
    return [
        {
            **{key: value for key, value in row.items() if key not in ("split", "image_id")},
            "image": picture("aokvqa", f"val2017/{row['image_id']:012d}.jpg"),
            "direct_answers": str(row["direct_answers"]),
        }
        for row in read("aokvqa/aokvqa_v1p0_val.json")
    ]


def pope(split: str = "popular") -> list[Row]:
    lines = (FIXTURES / f"pope/coco_pope_{split}.json").read_text(encoding="utf-8").splitlines()
    return [
        {
            "id": str(number),
            "question_id": str(row["question_id"]),
            "question": row["text"],
            "answer": row["label"],
            "image_source": row["image"].removesuffix(".jpg"),
            "image": picture("pope", f"val2014/{row['image']}"),
            "category": split,
        }
        for number, row in enumerate(map(json.loads, lines))
    ]


def nocaps() -> list[Row]:
    found = read("nocaps/nocaps_val_4500_captions.json")
    said = found["annotations"]
    return [
        {
            "image": picture("nocaps", f"val/{row['file_name']}"),
            "image_id": row["id"],
            "annotations_captions": [each["caption"] for each in said if each["image_id"] == row["id"]],
        }
        for row in found["images"]
    ]


def flickr30k() -> list[Row]:
    return [
        {
            "image": picture("flickr30k", f"flickr30k-images/{row['filename']}"),
            "caption": [each["raw"] for each in row["sentences"]],
            "split": row["split"],
            "filename": row["filename"],
        }
        for row in read("flickr30k/dataset_flickr30k.json")["images"]
    ]


def scienceqa() -> list[Row]:
    rows = []
    for id, row in read("scienceqa-img/problems.json").items():
        if row["split"] == "test":
            path = f"images/test/{id}/{row['image']}"
            rows.append(row | {"image": picture("scienceqa-img", path) if row["image"] else None})
    return rows


def vqa_rad() -> list[Row]:
    return [
        {
            "image": picture("vqa-rad", f"VQA_RAD Image Folder/{row['image_name']}"),
            "question": row["question"],
            "answer": str(row["answer"]),
        }
        for row in read("vqa-rad/VQA_RAD Dataset Public.json")
        if row["phrase_type"].startswith("test")
    ]


def gqa() -> tuple[list[Row], list[Row]]:
    rows = read("gqa/testdev_balanced_questions.json")
    names = sorted({row["imageId"] for row in rows.values()})
    stored = [{"id": name, "image": picture("gqa", f"images/{name}.jpg")} for name in names]
    return [{"id": id} | row for id, row in rows.items()], stored


def write(path: Path, rows: list[Row]) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path
