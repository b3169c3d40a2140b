"""Questions after the kind of a thing."""

from __future__ import annotations

from vlm.data.kinds import kind_questions


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
