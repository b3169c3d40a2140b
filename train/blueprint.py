"""A whole model by its shapes alone: no weights, no memory, no download (torch's `meta` device).

Encoders are drawn by open_clip and timm from their own configurations. Of language models the published
`config.json` says everything; those that our recipes name are written down here, others are read from
their folder or, where the network is allowed, from the hub (a kilobyte).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.config import ModelConfig, VisionConfig
from vlm.errors import ConfigError, WeightsError
from vlm.language import LanguageModel
from vlm.model import VLM, fresh_adapter
from vlm.vision import Encoder, fit_trunk, open_clip_network, set_size
from vlm.weights import PINS

_SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True,
            "max_position_embeddings": 8192}  # fmt: skip
LANGUAGE: dict[str, dict[str, Any]] = {
    "smollm2-135m-instruct": _SMOLLM2 | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "HuggingFaceTB/SmolLM2-360M-Instruct": _SMOLLM2 | {
        "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 15, "num_key_value_heads": 5,
    },
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _SMOLLM2 | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3", "vocab_size": 151936, "tie_word_embeddings": True,
        "max_position_embeddings": 40960, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip
"""What the published config.json of each model says of its shape."""


def blueprint(config: ModelConfig, *, offline: bool = False) -> VLM:
    """The model of a configuration on the `meta` device.

    Raises:
        ConfigError: sizes that do not fit.
        WeightsError: an id that nothing is known of.
    """
    with torch.device("meta"):
        encoder = _encoder(config.vision)
        language = LanguageModel(_language(config.language_model, offline), _tokenizer())
        adapter = fresh_adapter(config, encoder, language)
        return VLM(config, encoder, language, adapter)


def _encoder(config: VisionConfig) -> Encoder:
    name = config.encoder
    if name.startswith("open_clip:"):
        model = name.removeprefix("open_clip:").partition("/")[0]
        visual = _open_clip(model, config.size)
        return Encoder(visual, config, (0.5,) * 3, (0.5,) * 3)
    import timm

    classes = None
    if name in PINS:
        name = PINS[name].model
    elif (about := Path(name.removeprefix("timm:")).expanduser() / "config.json").is_file():
        found = json.loads(about.read_text("utf-8"))
        name, classes = str(found.get("architecture")), found.get("num_classes")
    name = name.removeprefix("timm:").partition(".")[0]
    if not timm.is_model(name):
        raise WeightsError(f"there is no encoder {config.encoder!r}")
    backbone = timm.create_model(name, pretrained=False, num_classes=classes)
    if backbone.pretrained_cfg["input_size"][-1] != config.size:
        set_size(backbone, config.size)
    return Encoder(backbone, config, (0.5,) * 3, (0.5,) * 3)


def _open_clip(model: str, size: int) -> nn.Module:
    import open_clip

    if model not in open_clip.list_models():
        raise WeightsError(f"open_clip has no model {model!r}")
    visual: nn.Module = open_clip_network(model, size, device="meta").visual
    fit_trunk(visual, model, size)
    return visual


def _language(name: str, offline: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(name).expanduser()
    if name in LANGUAGE and not folder.is_dir():
        shape = dict(LANGUAGE[name])
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    else:
        try:
            config = AutoConfig.from_pretrained(folder if folder.is_dir() else name, local_files_only=offline)
        except (OSError, ValueError) as problem:
            reason = str(problem).split("\n")[0]
            raise WeightsError(f"the shape of {name} is not known: {reason}") from problem
    try:
        return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError) as problem:
        raise ConfigError(f"{name} is no language model: {problem}") from problem


def _tokenizer() -> Any:
    """The least that a language model needs; nothing is ever read with it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, "word": 1}, unk_token="word"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="word")
