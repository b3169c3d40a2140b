"""Parts set aside by picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from vlm.conversation import ImageSlot, Turn
from vlm.data.example import Example
from vlm.data.splits import canonical_split, is_held_out, rank_by_image, split_by_image
from vlm.errors import DataError


def example(id: int, *images: str) -> Example:
    slots = tuple(ImageSlot(i) for i in range(len(images)))
    return Example(images, (Turn("user", (*slots, f"question {id}")),), ("yes",), str(id))


@given(
    st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=3, unique=True), min_size=2, max_size=40),
    st.randoms(),
)
def test_no_picture_stands_on_both_sides(rows: list[list[int]], random: object) -> None:
    examples = [example(n, *(f"{image}.jpg" for image in images)) for n, images in enumerate(rows)]
    try:
        rest, held = split_by_image(examples)
    except DataError:
        return  # all pictures hang together
    assert rest and held and len(rest) + len(held) == len(examples)
    assert not {i for e in rest for i in e.images} & {i for e in held for i in e.images}
    shuffled = list(examples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert {e.id for e in split_by_image(shuffled)[1]} == {e.id for e in held}


def test_a_fifth_is_a_fifth() -> None:
    examples = [example(n, f"{n // 2}.jpg") for n in range(400)]
    rest, held = split_by_image(examples)
    assert len({e.images for e in held}) == 40
    with pytest.raises(DataError, match="cannot be divided"):
        split_by_image([example(1, "a.jpg"), example(2, "a.jpg")])


def test_the_share_held_out_by_name_is_near_the_fraction() -> None:
    held = sum(is_held_out(f"{n}.jpg", 0.1) for n in range(10_000))
    assert 900 < held < 1100
    assert not is_held_out("a", 0.0) and is_held_out("a", 1.0)


def test_split_names() -> None:
    assert canonical_split("Validation") == canonical_split("val") == "dev"
    with pytest.raises(DataError):
        canonical_split("everything")


def test_copies_under_other_names_stay_together(tmp_path: Path, save: Callable[..., Path]) -> None:
    for n in range(10):
        for prefix in "ab":
            save(tmp_path / f"{prefix}{n}.png", n)
    examples = [example(n, str(tmp_path / f"{prefix}{n}.png")) for prefix in "ab" for n in range(10)]
    rest, held = split_by_image(examples)
    assert len(held) == 4
    assert not {e.id for e in rest} & {e.id for e in held}
    assert len(set(rank_by_image(examples))) == 20, "without reading, names alone count"


def test_one_name_in_several_folders_is_several_pictures() -> None:
    """And neither another picture nor the place where the folders lie moves them."""
    examples = [example(n, f"/here/s{n}/img.jpg") for n in range(10)]
    rest, held = split_by_image(examples)
    assert (len(rest), len(held)) == (8, 2)
    moved = [example(n, f"/there/below/s{n}/img.jpg") for n in range(10)]
    assert [e.id for e in split_by_image(moved)[1]] == [e.id for e in held]


def test_the_order_by_names_is_frozen() -> None:
    """Runs of the public sets are compared by the loss of the first pictures in it."""
    ranks = rank_by_image([example(n, f"/data/{n}.jpg") for n in range(8)], "dev")
    assert ranks == [0, 2, 7, 4, 5, 1, 6, 3]
