"""What is kept of pictures between requests: bounded, used again, and without a trace in the answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")

from vlm.answering import shown
from vlm.conversation import Conversation
from vlm.decoder import DecoderState
from vlm.images import open_picture
from vlm.serve.cache import Latents, Recent
from vlm.serve.metrics import Metrics
from vlm.serve.settings import Settings

if TYPE_CHECKING:
    import httpx
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]


def test_the_longest_unused_goes_first_and_bytes_are_bounded() -> None:
    kept: Recent[np.ndarray] = Recent(100)
    for key in "abc":
        kept.put(key, np.zeros(30, np.uint8))
    assert kept.get("a") is not None  # used: now "b" is the oldest
    kept.put("d", np.zeros(40, np.uint8))
    assert [kept.get(key) is not None for key in "abcd"] == [True, False, True, True]
    assert kept.nbytes == 100
    kept.put("d", np.zeros(10, np.uint8))
    assert kept.nbytes == 70
    kept.put("e", np.zeros(101, np.uint8))
    assert kept.get("e") is None and kept.nbytes == 70
    kept.put("a", np.zeros(101, np.uint8))  # the old one under that key is not the right one any more
    assert kept.get("a") is None and kept.nbytes == 40


def ask(client: httpx.Client, message: Any, **more: Any) -> Any:
    body = {"model": "model", "messages": [message], "max_tokens": 6, "logprobs": True, **more}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


def counted(client: httpx.Client, name: str) -> float:
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.rpartition(" ")[2])
    return 0.0


def test_answers_are_bit_for_bit_those_without_a_cache(
    tiny_model: VLM, served: Callable[..., Any], make: Any
) -> None:
    one, two, three = make.url(1), make.url(2), make.url(3)
    asked = [
        (make.user("What is it?", one), {}),
        (make.user("What is it?", one), {}),
        (make.user("And what colour?", one), {}),
        (make.user("Compare them.", two, one, three), {}),
        (make.user("Compare them.", one, three), {"n": 2, "temperature": 1.0, "seed": 3}),
        (make.user("No picture at all."), {}),
    ]
    aware = tiny_model.adapter.question_aware
    # Where the question is read with the picture, it must be the same one, too.
    expected = {"adapter": 5 if aware else 3, "memory": 3 if aware else 5}
    with served(tiny_model) as client:
        kept = [ask(client, message, **more) for message, more in asked]
        for source, number in expected.items():
            assert counted(client, f'vlm_latents_total{{source="{source}"}}') == number
        assert counted(client, "vlm_latents_bytes") > 0
        assert counted(client, "vlm_features_bytes") > 0
        assert counted(client, 'vlm_pictures_total{source="encoder"}') == 3
    tiny_model.features.cache = None
    with served(tiny_model, Settings(cached_features=0, cached_latents=0)) as client:
        fresh = [ask(client, message, **more) for message, more in asked]
        assert counted(client, 'vlm_latents_total{source="adapter"}') == 8
        assert counted(client, 'vlm_latents_total{source="memory"}') == 0
        assert counted(client, "vlm_latents_bytes") == 0
    assert kept == fresh


def test_known_latents_are_those_that_a_prompt_would_compute(tiny_model: VLM, draw: Draw) -> None:
    latents = Latents(tiny_model, 1 << 20, Metrics())
    picture = open_picture(draw(1))
    row, features = shown(tiny_model, Conversation.ask([picture], "What is it?"))
    for _ in range(2):
        known = latents(picture, features, row.tokens.questions[0])
        _, logits = DecoderState.prefill(tiny_model, [row], features, known)
        assert torch.equal(logits, DecoderState.prefill(tiny_model, [row], features)[1])


def test_every_model_keeps_its_own(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    picture = open_picture(draw(1))
    found = []
    for seed in (0, 1):
        model = make_tiny(seed=seed)
        latents = Latents(model, 1 << 20, Metrics())
        features = model.encode([picture])
        latents(picture, features, ())
        with torch.inference_mode():
            assert torch.equal(latents(picture, features, ()), model.latents(features))
        found.append(latents(picture, features, ()))
    assert not torch.allclose(*found)


def test_known_answers_guide_a_server_as_they_guide_a_single_question(
    make_tiny: Callable[..., VLM], served: Callable[..., Any], make: Any
) -> None:
    from vlm.known_answers import summary
    from vlm.train.answers import Answered, fit

    model, url = make_tiny("flamingo"), make.url(1)
    texts, right = ["what is this", "how many are there"] * 100, [("red",), ("two",)] * 100
    seen = torch.randn(1, model.encoder.tokens, model.encoder.width)
    pictures = torch.zeros(200, dtype=torch.long)
    model.known_answers = fit(Answered(texts, right, pictures, summary(seen), lambda _, some: seen[some]))
    what, many, blind = (
        make.user("What is this?", url),
        make.user("How many are there?", url),
        make.user("What is it?"),
    )
    brief = {"role": "system", "content": "You say as little as you can."}
    with served(model) as client:
        for messages, expected in (([what], "red"), ([many], "two"), ([brief, what], "red")):
            assert ask(client, what, messages=messages, temperature=0)[0]["message"]["content"] == expected
        said = {"role": "assistant", "content": "It is blue."}
        for messages in ([blind], [what, said, make.user("What is this?")]):
            assert ask(client, what, messages=messages, temperature=0)[0]["message"]["content"] != "red"
