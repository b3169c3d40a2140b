"""How the two pinned wheels become safetensors: once each, into the verified cache.

Nothing here is imported until a cache has to be filled.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm.errors import WeightsError
from vlm.weights_cache import frozen_hash, write_synced

ENCODER_ARCHITECTURE = "tf_efficientnet_lite2"


def efficientnet_lite2(source: Path, folder: Path) -> str:
    """EfficientNet-Lite2's 386 tensors, mapped in order onto timm's `tf_efficientnet_lite2`.

    The caller has compared the file's SHA-256 with the pinned one: this is the only pickle that is ever
    read, and `weights_only` keeps it to plain tensors.

    Returns:
        The frozen hash.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    theirs = torch.load(source, map_location="cpu", weights_only=True)
    model = timm.create_model(ENCODER_ARCHITECTURE, pretrained=False)
    ours = model.state_dict()
    pairs = list(zip(ours.items(), theirs.values(), strict=False))
    if len(theirs) != len(ours) or any(mine.shape != other.shape for (_, mine), other in pairs):
        raise WeightsError(f"{source} does not fit timm's {ENCODER_ARCHITECTURE}")
    tensors = {name: other.contiguous() for (name, _), other in pairs}
    with _disk_errors():
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = {
        "architecture": ENCODER_ARCHITECTURE,
        "num_classes": 1000,
        "pretrained_cfg": {
            "input_size": [3, 260, 260],
            "interpolation": "bicubic",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": 1000,
            "first_conv": "conv_stem",
            "classifier": "classifier",
            "license": "apache-2.0",
        },
    }
    write_synced(folder / "config.json", json.dumps(config, indent=1).encode())
    return frozen_hash(tensors)


def smollm2(source: Path, folder: Path) -> str:
    """SmolLM2-135M-Instruct, dequantised from Q4_1 to float32, with its tokenizer and chat template.

    Returns:
        The frozen hash, over the tensors as the file holds them (tied weights once).
    """
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
        _restore_digit_splitting(tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, local_files_only=True
        )
        # What is in memory is plain float32; the marks of its quantised origin refuse to be saved.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        with _disk_errors():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()
    del model
    return frozen_hash(load_file(folder / "model.safetensors"))


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn safetensors' own error about a full disk into the `OSError` that it was."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as problem:
        number = re.search(r"os error (\d+)", str(problem))
        raise OSError(int(number[1]) if number else errno.EIO, str(problem)) from problem


def _restore_digit_splitting(tokenizer: Any) -> None:
    """Split digits one by one before byte-level pieces, as the model was trained.

    The GGUF file says so (`tokenizer.ggml.pre = smollm`: first `\\p{N}`, then GPT-2's pattern), but the
    conversion in transformers keeps only GPT-2's pattern, which takes spaces before a digit apart
    differently.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
