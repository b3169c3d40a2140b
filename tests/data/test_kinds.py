"""Questions after the kind of a thing."""

from __future__ import annotations

import json

from vlm.data.kinds import PATH, kind_questions, kinds_of, plain_name


def test_plain_names_for_animals_and_the_label_for_its_kind() -> None:
    asked = dict(kind_questions("golden retriever"))
    assert asked["What animal is this?"] == "dog"
    assert asked["What breed of dog is this?"] == "golden retriever"
    assert asked["What kind of dog is in the picture?"] == "golden retriever"
    assert dict(kind_questions("Egyptian cat"))["What animal is in the picture?"] == "cat"
    assert dict(kind_questions("zebra"))["What animal do you see?"] == "zebra"
    assert dict(kind_questions("violin"))["What musical instrument is this?"] == "violin"
    assert dict(kind_questions("school bus"))["Which vehicle is shown?"] == "bus"
    assert kind_questions("espresso maker") == []


def test_the_table_speaks_of_labels_that_the_encoder_has() -> None:
    from timm.data import ImageNetInfo

    known = ImageNetInfo("imagenet-1k")
    names = [known.index_to_description(kind).partition(",")[0] for kind in range(1000)]
    table = json.loads(PATH.read_text(encoding="utf-8"))
    rows = [row for part in ("kinds", "plain") for row in table[part].values()]
    labels = [label for row in rows for label in row.split(", ")]
    assert set(labels) <= set(names)
    # One name that stands for two kinds ("crane", a bird and a machine) would give a wrong answer.
    assert all(names.count(label) == 1 for label in labels)
    plain = [label for row in table["plain"].values() for label in row.split(", ")]
    assert len(plain) == len(set(plain))
    assert plain_name("tabby") == "cat"
    assert "animal" in kinds_of("tabby")
    assert sum("animal" in kinds_of(name) for name in names) == 397
