"""The whole model as people use it: the Python API, its types, its words about itself."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import vlm
from vlm.answer import Answer, TokenLogprob, Usage
from vlm.config import CAPTION_BEAMS, CAPTION_PROMPT
from vlm.conversation import Conversation, ImageSlot, Turn
from vlm.errors import VLMError
from vlm.images import ImageError, open_picture
from vlm.model import VLM

if TYPE_CHECKING:
    from PIL import Image

Draw = Callable[..., "Image.Image"]


def test_the_names_that_notebooks_use() -> None:
    assert vlm.VLM is VLM
    assert vlm.Conversation is Conversation
    assert set(vlm.__all__) <= set(dir(vlm))
    assert issubclass(vlm.ImageError, vlm.VLMError)
    with pytest.raises(AttributeError):
        vlm.no_such_name  # noqa: B018


def test_load_is_from_pretrained(
    make_tiny: Callable[..., VLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm.checkpoint import save_adapter

    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    save_adapter(make_tiny("flamingo"), tmp_path / "adapter")
    model = vlm.load(tmp_path / "adapter", offline=True, feature_cache=tmp_path / "features")
    assert isinstance(model, VLM)
    assert model.features.cache is not None
    assert model.features.cache.folder == tmp_path / "features"
    assert model.device == torch.device("cpu")


def test_an_answer(tiny_model: VLM, draw: Draw) -> None:
    answer = tiny_model.ask([draw(1)], "what?", max_new_tokens=6)
    assert isinstance(answer, Answer)
    assert isinstance(answer.usage, Usage)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert set(answer.seconds) == {"encode", "decode"}
    assert all(isinstance(token, TokenLogprob) for token in answer.tokens)
    assert "".join(token.text for token in answer.tokens).strip() == answer.text
    assert answer.adapter == "untrained"
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.text = "another"  # type: ignore[misc]


def test_pictures_of_every_kind(tiny_model: VLM, draw: Draw, tmp_path: Path) -> None:
    """Paths, text, bytes, PIL images and opened pictures are the same picture."""
    draw(1).save(tmp_path / "one.png")
    content = io.BytesIO()
    draw(1).save(content, "PNG")
    kinds: list[Any] = [
        tmp_path / "one.png",
        str(tmp_path / "one.png"),
        content.getvalue(),
        draw(1),
        open_picture(draw(1)),
    ]
    answers = {tiny_model.ask([kind], "what?", max_new_tokens=6).text for kind in kinds}
    assert len(answers) == 1
    with pytest.raises(ImageError):
        tiny_model.ask([tmp_path / "missing.png"], "what?")
    with pytest.raises(ImageError):
        tiny_model.ask([b"no picture"], "what?")


def test_pictures_matter(tiny_model: VLM, draw: Draw) -> None:
    """And so do their absence and their order."""
    first = tiny_model.score([Conversation.ask([draw(1)], "what?")], [["a dog"]])[0][0]
    for images in ([], [draw(2)], [draw(1), draw(2)], [draw(2), draw(1)], [tiny_model.blank_image()]):
        other = tiny_model.score([Conversation.ask(images, "what?")], [["a dog"]])[0][0]
        assert abs(other - first) > 1e-4


def test_captions(tiny_model: VLM, draw: Draw) -> None:
    images = [draw(1), draw(2)]
    captions = tiny_model.caption(images, max_new_tokens=6)
    asks = [Conversation.ask([image], CAPTION_PROMPT) for image in images]
    assert [c.text for c in captions] == [
        a.text for a in tiny_model.ask_batch(asks, num_beams=CAPTION_BEAMS, max_new_tokens=6)
    ]
    greedy = tiny_model.caption(images, num_beams=1, max_new_tokens=6)
    assert [c.text for c in greedy] == [a.text for a in tiny_model.ask_batch(asks, max_new_tokens=6)]
    assert tiny_model.caption([]) == []
    sampled = tiny_model.caption(images, temperature=1.0, seed=1, max_new_tokens=6)
    assert [s.text for s in sampled] == [
        a.text for a in tiny_model.ask_batch(asks, temperature=1.0, seed=1, max_new_tokens=6)
    ]


def test_interleaved_conversations(tiny_model: VLM, draw: Draw) -> None:
    """Few-shot prompts: pictures and answers in turn, several in one turn, words between."""
    parts = ("first ", ImageSlot(0), " then ", ImageSlot(1), ImageSlot(2), " what now?")
    shots = Conversation((draw(1), draw(2), draw(3)), (Turn("user", parts),))
    shots = shots.answered("a dog").then("and this?", [draw(4)])
    answer = tiny_model.ask_batch([shots], max_new_tokens=4)[0]
    assert answer.usage.images == 4
    rearranged = dataclasses.replace(shots, images=(draw(2), draw(1), draw(3), draw(4)))
    scores = tiny_model.score([shots, rearranged], [["a dog"], ["a dog"]])
    assert scores[0] != pytest.approx(scores[1], abs=1e-5)


def test_conversations_that_do_not_add_up(draw: Draw) -> None:
    for images, parts in (
        ((), (ImageSlot(0), "what?")),
        ((draw(1),), ("what?",)),
        ((draw(1),), (ImageSlot(1), "what?")),
        ((draw(1),), (ImageSlot(-1), ImageSlot(0))),
    ):
        with pytest.raises(ValueError, match="slots"):
            Conversation(images, (Turn("user", parts),))


def test_training_mode_does_not_change_answers(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    model = make_tiny("flamingo", dropout=0.0)
    before = model.ask([draw(1)], "what?", max_new_tokens=6).text
    model.train()
    assert model.ask([draw(1)], "what?", max_new_tokens=6).text == before


def test_asking_leaves_no_gradients(tiny_model: VLM, draw: Draw) -> None:
    tiny_model.ask([draw(1)], "what?", max_new_tokens=2)
    assert all(p.grad is None for p in tiny_model.parameters())
    features = tiny_model.encode([open_picture(draw(1))])
    assert not features.requires_grad
    # Features of a picture may be trained on afterwards: they are no inference tensors.
    tiny_model.adapter.encode(
        features.clone().requires_grad_(),
        *(_question(tiny_model) if tiny_model.adapter.question_aware else ()),
    ).sum().backward()


def _question(model: VLM) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([model.language.encode_text("what?")])
    return model.language.embed(ids), torch.ones_like(ids, dtype=torch.bool)


def test_every_error_has_one_line(tiny_model: VLM, draw: Draw) -> None:
    for call in (
        lambda: tiny_model.ask([draw(1)], "what?", temperature=-1),
        lambda: tiny_model.ask([b""], "what?"),
        lambda: tiny_model.ask([], "8" * 100_000),
        lambda: tiny_model.ask_batch([Conversation((), ())]),
        lambda: VLM.from_pretrained("no-such-adapter", offline=True),
    ):
        with pytest.raises(VLMError) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_the_real_model_sees(real_model: VLM, samples_dir: Path) -> None:
    """Whatever adapter is there: a picture, another one and none give different likelihoods."""
    ask = "Is there a cat in the picture?"
    cat, coffee = samples_dir / "cat.jpg", samples_dir / "coffee.jpg"
    asks = [Conversation.ask(images, ask) for images in ([cat], [coffee], [], [real_model.blank_image()])]
    scores = [pair[0] - pair[1] for pair in real_model.score(asks, [["yes", "no"]] * 4)]
    assert len({round(score, 3) for score in scores}) == 4
    if real_model.adapter_name == "default":
        assert scores[0] > scores[1]
