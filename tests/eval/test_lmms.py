"""The adapter for lmms-eval, against lmms-eval's own registry, requests and base class."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is not installed", exc_type=ImportError)

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelRegistryV2
from parrot import Parrot

from vlm.eval.lmms import MANIFEST, Harnessed, generation

DOCS = [
    {"question": f"q{n}?", "image": Image.new("RGB", (4, 4), (n, 0, 0)), "answer": "no"} for n in range(3)
]


def request(kind: str, number: int, second: Any) -> Instance:
    arguments = (DOCS[number]["question"], second, lambda doc: [doc["image"]], number, "toy", "test")
    return Instance(
        request_type=kind,
        arguments=arguments,
        idx=0,
        metadata={"task": "toy", "doc_id": number, "repeats": 1},
    )


@pytest.fixture
def harnessed() -> Harnessed:
    model = Harnessed(model=Parrot())
    model.task_dict = {"toy": {"test": DOCS}}
    return model


def test_the_registry_finds_it() -> None:
    registry = ModelRegistryV2()
    registry.register_manifest(MANIFEST)
    found = registry.get_model_class("vlm")
    assert found is Harnessed
    assert issubclass(found, lmms)


def test_generate_until_keeps_the_requests_order(harnessed: Harnessed) -> None:
    options = [
        {"max_new_tokens": 8, "until": ["\n"]},
        {"max_new_tokens": 4},
        {"max_new_tokens": 8, "until": ["\n"]},
    ]
    found = harnessed.generate_until([request("generate_until", n, options[n]) for n in range(3)])
    alone = [harnessed.generate_until([request("generate_until", n, options[n])])[0] for n in range(3)]
    assert found == alone


def test_loglikelihood(harnessed: Harnessed) -> None:
    (score, greedy), (longer, _) = harnessed.loglikelihood(
        [request("loglikelihood", 0, lambda doc: doc["answer"]), request("loglikelihood", 1, "a longer one")]
    )
    assert score > longer
    assert isinstance(greedy, bool)


def test_generation_options() -> None:
    options = {
        "until": ["\n\n", ""],
        "max_new_tokens": 16,
        "do_sample": False,
        "temperature": 0.7,
        "unknown": 1,
    }
    assert generation(options) == {"max_new_tokens": 16, "temperature": 0.0, "stop": ("\n\n",)}
    assert generation({"until": "\n"}) == {"stop": ("\n",)}
