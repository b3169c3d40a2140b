"""What labels are kinds of, and texts that name them."""

from __future__ import annotations

import json

import pytest

from vlm.kinds import PATH, kinds_of, naming, plain_name


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
    assert kinds_of("espresso maker") == ()
    assert "animal" in kinds_of("tabby")
    assert sum("animal" in kinds_of(name) for name in names) == 397


@pytest.mark.parametrize(
    ("label", "named", "not_named"),
    [
        ("tabby", ("a cat sits on a wall", "two cats", "the tabby sleeps"), ("an animal", "a category", "")),
        ("golden retriever", ("a dog runs", "golden retrievers play"), ("a golden field", "an animal")),
        ("coffee mug", ("a mug of coffee", "two coffee mugs"), ("smug faces", "a cup")),
        ("guinea pig", ("a guinea pig", "guinea pigs"), ("a pig in the mud",)),
        ("school bus", ("a bus stops", "yellow school buses"), ("a vehicle", "a bus-stop")),
        ("violin", ("a musical instrument", "a violin"), ("a viola",)),
        ("monarch", ("butterflies fly", "a butterfly"), ("a fly",)),
        ("timber wolf", ("two wolves", "a wolf howls"), ("a wolfhound",)),
        ("goose", ("geese swim",), ("a moose",)),
        ("red fox", ("two foxes", "a fox"), ("a red ball",)),
        ("Model T", ("an old car",), ("a man in a t-shirt", "a dog doesn't run", "a model")),
        ("CD player", ("a cd player",), ("a soccer player kicks",)),
        ("book jacket", ("a book jacket",), ("a man in a red jacket",)),
        ("lens cap", ("a lens cap",), ("a boy in a cap",)),
        ("traffic light", ("traffic lights",), ("a light blue shirt",)),
        ("bicycle-built-for-two", ("a bicycle", "a bicycle-built-for-two"), ("a bike",)),
    ],
)
def test_a_label_is_named_by_itself_its_plain_name_or_its_kind(
    label: str, named: tuple[str, ...], not_named: tuple[str, ...]
) -> None:
    found = naming(label)
    assert all(found.search(text) for text in named)
    assert not any(found.search(text) for text in not_named)


def test_every_label_names_itself() -> None:
    from timm.data import ImageNetInfo

    known = ImageNetInfo("imagenet-1k")
    for kind in range(1000):
        label = known.index_to_description(kind).partition(",")[0]
        assert naming(label).search(f"this is a {label}.".lower()), label
