"""What the tests share: data sets where they are, tiny models with random weights, the real model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

# Examples are judged by what they show, not by how fast a busy machine draws them.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
TINY_LAYERS = 4

# SmolLM2's own template, its default system turn included: the frame must never pick that up.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a tiny model<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def offline_ends_with_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--offline` sets a variable for the rest of its process, which here has other tests to run."""
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", ""))


@pytest.fixture(scope="session")
def datasets_dir() -> Path:
    """The folder of real data sets: `VLM_TEST_DATASETS`, or the one that lies beside the checkout."""
    folder = Path(os.environ.get("VLM_TEST_DATASETS") or ROOT.parent / "shared" / "datasets")
    if not folder.is_dir():
        pytest.skip(f"there are no data sets at {folder}; VLM_TEST_DATASETS says where they are")
    return folder


@pytest.fixture(scope="session")
def samples_dir() -> Path:
    """The photographs that the repository holds."""
    return ROOT / "data" / "samples"


@pytest.fixture(scope="session")
def draw() -> Callable[..., Image.Image]:
    """`draw(seed, side=64)`: a picture of big coloured squares, unlike any other seed's."""

    def picture(seed: int, side: int = 64) -> Image.Image:
        import numpy as np
        from PIL import Image

        squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(squares).resize((side, side), Image.Resampling.NEAREST)

    return picture


@pytest.fixture(scope="session")
def write_shards(draw: Callable[..., Image.Image]) -> Callable[..., list[Path]]:
    """`write_shards(folder, sizes, kind="tar")`: a shard of so many captioned pictures for each size.

    The captions are numbers, counted through all shards; every picture is another one.
    """
    import io

    def write(folder: Path, sizes: Sequence[int], kind: str = "tar") -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        files, number = [], 0
        for shard, size in enumerate(sizes):
            rows = []
            for _ in range(size):
                picture = io.BytesIO()
                draw(1000 + number, 8).save(picture, format="PNG")
                rows.append((f"{number:05}", picture.getvalue(), f"picture number {number}"))
                number += 1
            files.append(folder / f"train-{shard:03}.{kind}")
            (_write_tar if kind == "tar" else _write_parquet)(files[-1], rows)
        return files

    return write


def _write_tar(path: Path, rows: list[tuple[str, bytes, str]]) -> None:
    import io
    import tarfile

    with tarfile.open(path, "w") as tar:
        for key, picture, caption in rows:
            for suffix, content in (("png", picture), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _write_parquet(path: Path, rows: list[tuple[str, bytes, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {"id": [r[0] for r in rows], "image": [r[1] for r in rows], "text": [r[2] for r in rows]}
    pq.write_table(pa.table(table), path, row_group_size=2)


# --- tiny models --------------------------------------------------------------------------------------


def _tiny_tokenizer() -> Any:
    """A byte-level BPE of a few hundred tokens, with SmolLM2's rules, special tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["a dog runs on the grass while the man in the red shirt is standing in the water"] * 20
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
    )


def tiny_language_model(family: str, vocabulary: int, positions: int = 256) -> Any:
    """A causal language model: 4 layers, width 32, and weights large enough to have opinions."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": TINY_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=positions,
            n_embd=32,
            n_layer=TINY_LAYERS,
            n_head=4,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        )
    elif family == "qwen3":
        config = transformers.Qwen3Config(head_dim=8, tie_word_embeddings=True, **sizes)
    elif family == "qwen2":
        config = transformers.Qwen2Config(tie_word_embeddings=False, **sizes)
    else:
        config = transformers.LlamaConfig(tie_word_embeddings=True, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


@dataclass(frozen=True)
class TinyParts:
    """Folders with frozen parts as a person would have them: a timm encoder and language models."""

    encoder: Path
    language: dict[str, Path]


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    """A CNN of 0.1 M parameters and a language model of each family, saved as safetensors folders."""
    import timm
    import torch
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    encoder = root / "encoder"
    encoder.mkdir()
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), encoder / "model.safetensors")
    (encoder / "config.json").write_text(json.dumps({"architecture": "test_resnet"}))
    language = {}
    tokenizer = _tiny_tokenizer()
    for family in FAMILIES:
        torch.manual_seed(1)
        language[family] = root / family
        tiny_language_model(family, len(tokenizer)).save_pretrained(language[family])
        tokenizer.save_pretrained(language[family])
    return TinyParts(encoder, language)


@pytest.fixture(scope="session")
def tiny_config(tiny_parts: TinyParts) -> Callable[..., Any]:
    """`tiny_config("flamingo" | "qformer", family, **sizes)`: the configuration of a tiny whole model."""

    def make(adapter: str = "flamingo", family: str = "llama", **sizes: Any) -> Any:
        from vlm.config import FlamingoConfig, ModelConfig, QFormerConfig, VisionConfig

        flamingo = FlamingoConfig(
            **{
                "width": 16,
                "latents": 4,
                "heads": 2,
                "layers": (1, 3),
                "block_heads": 4,
                "block_kv_heads": 2,
                "head_width": 8,
                "feedforward": 24,
                "gate_init": 0.5,
                "max_group": 4,
                **(sizes if adapter == "flamingo" else {}),
            }
        )
        qformer = QFormerConfig(
            **{
                "width": 16,
                "queries": 3,
                "depth": 2,
                "heads": 2,
                "feedforward": 32,
                **(sizes if adapter == "qformer" else {}),
            }
        )
        return ModelConfig(
            vision=VisionConfig(encoder=str(tiny_parts.encoder), size=64),
            language_model=str(tiny_parts.language[family]),
            adapter=adapter,
            flamingo=flamingo,
            qformer=qformer,
        )

    return make


@pytest.fixture(scope="session")
def make_tiny(
    tiny_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., VLM]:
    """`make_tiny("flamingo" | "qformer", family="llama", seed=0, **sizes)`: a fresh tiny model.

    Its adapter's weights are larger than a fresh one's, so that pictures matter to every answer.
    """
    cache = tmp_path_factory.mktemp("tiny-cache")

    def make(adapter: str = "flamingo", family: str = "llama", seed: int = 0, **sizes: Any) -> VLM:
        import torch

        from vlm.checkpoint import build_model

        torch.manual_seed(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLM_CACHE", str(cache))
            model = build_model(tiny_config(adapter, family, **sizes), offline=True)
        with torch.no_grad():
            for name, parameter in model.adapter.named_parameters():
                if parameter.ndim > 1 and not name.endswith("position"):
                    parameter.mul_(8)
        return model

    return make


@pytest.fixture(params=["flamingo", "qformer", "qformer-asked"])
def tiny_model(request: pytest.FixtureRequest, make_tiny: Callable[..., VLM]) -> VLM:
    """A tiny model with each adapter in turn (`qformer-asked` reads the question with the picture)."""
    adapter, _, asked = request.param.partition("-")
    return make_tiny(adapter, **({"question_aware": True} if asked else {}))


# --- the real model -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real_model() -> VLM:
    """The real frozen parts with the adapter that ships, or where none does yet, with a fresh one."""
    import torch

    from vlm.checkpoint import ASSETS, build_model, load_model
    from vlm.config import FlamingoConfig, ModelConfig
    from vlm.errors import WeightsError

    try:
        if (ASSETS / "default" / "config.json").is_file():
            return load_model("default", offline=True)
        torch.manual_seed(7)
        return build_model(ModelConfig(flamingo=FlamingoConfig(gate_init=0.3)), offline=True)
    except WeightsError as missing:
        pytest.skip(f"the frozen weights are not here: {missing}")
