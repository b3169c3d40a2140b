"""The encoder's own words: what is told of a picture, where it stands, and that every path tells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from vlm.answering import shown
from vlm.config import HintsConfig
from vlm.conversation import Conversation, ImageSlot, Turn
from vlm.errors import ConfigError
from vlm.features import FeatureCache, Features
from vlm.hints import hint_text, likely_labels
from vlm.images import open_picture
from vlm.vision import Encoder

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]


@pytest.fixture
def told(make_tiny: Callable[..., VLM]) -> VLM:
    """A tiny model that tells one label of each picture, however unsure."""
    model = make_tiny()
    model.config = replace(model.config, hints=HintsConfig(count=1, least=0.0))
    return model


def test_labels_are_told_likeliest_first_and_only_if_likely() -> None:
    scores = torch.tensor([[0.1, 0.6, 0.3], [0.34, 0.33, 0.33]])
    labels = ("cat", "dog", "cup")
    found = likely_labels(scores, labels, HintsConfig(count=2, least=0.25))
    assert [[name for name, _ in row] for row in found] == [["dog", "cup"], ["cat", "dog"]]
    assert likely_labels(scores, labels, HintsConfig(count=2, least=0.9)) == [[], []]
    assert likely_labels(scores, labels, HintsConfig(count=0)) == [[], []]
    assert likely_labels(torch.zeros(2, 0), (), HintsConfig(count=2)) == [[], []]
    assert hint_text(["dog", "cup"]) == "Perhaps dog, cup.\n"
    assert hint_text([]) == ""


def test_scores_are_those_of_the_network_itself(told: VLM, draw: Draw) -> None:
    picture = open_picture(draw(3))
    pixels = told.encoder.preprocess(picture)[None]
    backbone = told.encoder.backbone
    with torch.no_grad():
        expected = backbone(pixels).softmax(dim=-1)
        _, scores = told.encoder.look(pixels)
    torch.testing.assert_close(scores, expected)
    assert len(told.encoder.labels) == 1000
    assert told.encoder.labels[1] == "goldfish"


def test_each_hint_stands_behind_its_picture(told: VLM, draw: Draw) -> None:
    pictures = (draw(1), draw(2))
    turn = Turn("user", (ImageSlot(1), "one", ImageSlot(0), "two"))
    tokens = told.processor.tokens(Conversation(pictures, (turn,)), hints=["a cup. ", "a dog. "])
    assert "a dog. onea cup. two" in told.language.tokenizer.decode(tokens.codes)
    # A question-aware adapter reads the user's words alone.
    assert tokens.questions[0] == told.language.encode_text("one") + told.language.encode_text("two")


@pytest.mark.parametrize("side_by_side", [2, 3])
def test_neighbouring_pictures_stay_one_group(told: VLM, draw: Draw, side_by_side: int) -> None:
    row, _ = shown(told, Conversation.ask([draw(i) for i in range(side_by_side)], "which?"))
    assert row.tokens.image_places == list(range(side_by_side))
    assert set(row.tokens.image_groups) == {0}


def test_every_path_tells_the_same(told: VLM, draw: Draw, tmp_path: Path) -> None:
    asks = [Conversation.ask([draw(i)], question) for i, question in enumerate(("what?", "is it a dog?"))]
    alone = [told.ask_batch([ask], max_new_tokens=8)[0] for ask in asks]
    together = told.ask_batch(asks, max_new_tokens=8)
    assert [a.text for a in alone] == [a.text for a in together]
    assert "".join(told.stream(asks[0], max_new_tokens=8)) == alone[0].text
    told.features.cache = FeatureCache(tmp_path / "features")
    first, second = (told.ask_batch(asks, max_new_tokens=8) for _ in range(2))
    assert [a.text for a in first] == [a.text for a in second] == [a.text for a in alone]
    plain = replace(told.config, hints=HintsConfig())
    hinted, told.config = alone[0].usage.prompt_tokens, plain
    assert told.ask_batch(asks[:1], max_new_tokens=8)[0].usage.prompt_tokens < hinted


def test_features_that_were_kept_without_scores_get_them(told: VLM, draw: Draw, tmp_path: Path) -> None:
    picture = open_picture(draw(5))
    _, expected = told.see([picture])
    told.features.cache = cache = FeatureCache(tmp_path / "features")
    features = told.features([picture])
    assert cache.get(told.features.label_key(picture)) is None
    seen, hints = told.see([picture])
    assert hints == expected
    torch.testing.assert_close(seen, features)
    assert len(cache) == 2


def test_the_classifier_is_asked_at_the_size_it_was_trained_with(
    told: VLM, draw: Draw, tmp_path: Path
) -> None:
    encoder, picture = told.encoder, open_picture(draw(5))
    assert (encoder.config.size, encoder.label_size) == (64, 160)  # test_resnet's own
    seen = Features(encoder, "hash").see([picture])
    features, _ = encoder.look(encoder.preprocess(picture)[None])
    _, scores = encoder.look(encoder.preprocess(picture, size=160)[None])
    torch.testing.assert_close(seen.features, features, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen.scores, scores, rtol=1e-3, atol=1e-4)


def test_at_the_trained_size_one_pass_gives_features_and_labels(told: VLM, draw: Draw) -> None:
    config = replace(told.encoder.config, size=told.encoder.label_size)
    encoder = Encoder(told.encoder.backbone, config, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    passes, look = [], encoder.look

    def counted(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        passes.append(len(pixels))
        return look(pixels)

    encoder.look = counted  # type: ignore[method-assign]
    pictures = [open_picture(draw(seed)) for seed in (1, 2, 1)]
    seen = Features(encoder, "hash").see(pictures)
    assert passes == [2]  # each distinct picture once
    assert seen.scores.shape == (3, 1000)
    assert torch.equal(seen.scores[0], seen.scores[2])


def test_an_encoder_without_labels_is_refused(make_tiny: Callable[..., VLM]) -> None:
    from vlm.model import VLM

    model = make_tiny()
    model.encoder.labels = ()
    with pytest.raises(ConfigError, match="knows no kinds of things"):
        VLM(replace(model.config, hints=HintsConfig(1)), model.encoder, model.language, model.adapter)


def test_controls_tell_of_the_pictures_that_they_show(told: VLM, draw: Draw) -> None:
    from vlm.eval.controls import no_image, run

    # The likeliest label alone is the same for all of them: the tiny classifier's weights are random.
    told.config = replace(told.config, hints=HintsConfig(count=1000, least=0.0))
    asks = [Conversation.ask([draw(i)], "what is it?") for i in range(4)]

    def hints(conversations: list[Conversation]) -> list[list[str]]:
        return [told.see([open_picture(image) for image in each.images])[1] for each in conversations]

    own = hints(asks)
    assert len({one for (one,) in own}) == 4
    other = hints(run("shuffled", asks, told.blank_image))
    assert all(mine != shown for mine, shown in zip(own, other, strict=True))
    assert sorted(other) == sorted(own)
    (blank,) = {one for (one,) in hints(run("blank", asks, told.blank_image))}
    assert [blank] == told.see([open_picture(told.blank_image())])[1]
    assert hints(no_image(asks)) == [[]] * 4
