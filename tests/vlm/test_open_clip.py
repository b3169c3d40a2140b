"""Frozen encoders: any open_clip model, its own features, sizes and normalisation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm.config import VisionConfig
from vlm.errors import ConfigError, WeightsError
from vlm.images import open_picture
from vlm.vision import Encoder, load_encoder
from vlm.weights import resolve

HALF = (0.5, 0.5, 0.5)
# Hashes of these little files do not belong into the user's cache.
pytestmark = pytest.mark.usefixtures("cache")


def noise(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def loaded(encoder_id: str, size: int, stages: tuple[int, ...] = ()) -> Encoder:
    return load_encoder(VisionConfig(encoder_id, size, stages), resolve(encoder_id, offline=True))


TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
TINY = {
    "tiny-vit": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": TEXT,
    },
    "tiny-resnet": {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 64,
            "layers": [1, 1, 1, 1],
            "width": 8,
            "head_width": 8,
            "patch_size": None,
        },
        "text_cfg": TEXT,
    },
    "tiny-trunk": {
        "embed_dim": 16,
        "vision_cfg": {
            "timm_model_name": "test_resnet",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": TEXT,
    },
    # As SigLIP: a timm ViT with attention pooling, and a text tower of its own.
    "tiny-siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "none",
            "image_size": 160,
        },
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
    "tiny-coca": {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 64,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 16,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
        "custom_text": True,
    },
}
SHAPES = {
    "tiny-vit": (17, 32),
    "tiny-resnet": (4, 256),
    "tiny-trunk": (4, 96),
    "tiny-siglip": (101, 64),
    "tiny-coca": (17, 32),
}


@pytest.fixture(scope="module")
def tiny_open_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, torch.nn.Module]]:
    """`(name) -> (checkpoint, model)`: real `create_model` calls on small configurations."""
    folder = tmp_path_factory.mktemp("open_clip")
    for name, config in TINY.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    made: dict[str, tuple[Path, torch.nn.Module]] = {}

    def make(name: str) -> tuple[Path, torch.nn.Module]:
        if name not in made:
            torch.manual_seed(0)
            model = open_clip.create_model(name).eval()
            path = folder / f"{name}.safetensors"
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
            made[name] = path, model
        return made[name]

    return make


def own_features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The tokens that open_clip's tower pools, by its own code."""
    visual = model.visual
    if hasattr(visual, "trunk"):
        out = visual.trunk.forward_features(pixels)
        return out if out.ndim == 3 else out.flatten(2).transpose(1, 2)
    seen: list[torch.Tensor] = []
    if hasattr(visual, "ln_post") and visual.attn_pool is None:
        hook = visual.ln_post.register_forward_hook(lambda module, args, out: seen.append(out))
    elif hasattr(visual, "attn_pool"):
        hook = visual.transformer.register_forward_hook(lambda module, args, out: seen.append(out))
    else:
        hook = visual.layer4.register_forward_hook(
            lambda module, args, out: seen.append(out.flatten(2).transpose(1, 2))
        )
    visual(pixels)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", list(TINY))
def test_open_clip_models(name: str, tiny_open_clip: Callable[[str], tuple[Path, Any]]) -> None:
    path, model = tiny_open_clip(name)
    size = TINY[name]["vision_cfg"]["image_size"]  # type: ignore[index]
    encoder_id = f"open_clip:{name}/{path}"
    resolved = resolve(encoder_id, offline=True)
    assert (resolved.library, resolved.model, resolved.path) == ("open_clip", name, path)
    encoder = loaded(encoder_id, size)
    assert (encoder.tokens, encoder.width) == SHAPES[name]
    pixels = noise(size)
    with torch.no_grad():
        theirs = own_features(model, pixels)
    torch.testing.assert_close(encoder(pixels), theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["RN50", "ViT-S-32-alt"])
def test_open_clips_own_small_configurations(name: str) -> None:
    """Without a download: create_model with random weights, its tower as an encoder."""
    torch.manual_seed(0)
    visual = open_clip.create_model(name, load_weights=False).visual
    encoder = Encoder(visual, VisionConfig(f"open_clip:{name}", 224), HALF, HALF)
    assert (encoder.tokens, encoder.width) == ((49, 2048) if name == "RN50" else (50, 384))
    with pytest.raises(ConfigError, match="stages must be empty"):
        Encoder(visual, VisionConfig(f"open_clip:{name}", 224, (1,)), HALF, HALF)


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [("tiny-vit", 96, 37), ("tiny-resnet", 96, 9), ("tiny-siglip", 96, 37), ("tiny-trunk", 96, 9)],
)
def test_open_clip_at_another_size(
    name: str, size: int, tokens: int, tiny_open_clip: Callable[[str], tuple[Path, Any]]
) -> None:
    path, _ = tiny_open_clip(name)
    encoder = loaded(f"open_clip:{name}/{path}", size)
    assert encoder.tokens == tokens
    assert encoder(noise(size)).isfinite().all()


def test_open_clip_normalisation(tiny_open_clip: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    """CLIP's mean unless the weights say otherwise: by a file beside them, or by their published tags."""
    from vlm.vision import _published
    from vlm.weights import Resolved

    path, _ = tiny_open_clip("tiny-vit")
    plain = loaded(f"open_clip:tiny-vit/{path}", 64)
    assert plain.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "open_clip_model.safetensors").write_bytes(path.read_bytes())
    (folder / "open_clip_config.json").write_text(
        json.dumps({"preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}})
    )
    told = loaded(f"open_clip:tiny-vit/{folder}", 64)
    assert told.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert told.std.flatten().tolist() == pytest.approx([0.2, 0.2, 0.2])

    def published(encoder_id: str) -> dict[str, Any]:
        model = encoder_id.removeprefix("open_clip:").partition("/")[0]
        return _published(Resolved(encoder_id, "encoder", tmp_path / "x.safetensors", "open_clip", model))

    assert published("open_clip:ViT-B-16-SigLIP/webli")["mean"] == HALF
    assert published("open_clip:ViT-B-16-SigLIP/some.safetensors") == {"mean": HALF, "std": HALF}
    assert published("open_clip:ViT-B-32/openai")["quick_gelu"] is True
    assert not published("open_clip:ViT-B-32/laion2b_s34b_b79k").get("quick_gelu")


def test_a_clip_that_does_not_fit(tiny_open_clip: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    path, _ = tiny_open_clip("tiny-vit")
    state = load_file(path)
    del state["visual.conv1.weight"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(WeightsError, match="does not fit tiny-vit"):
        loaded(f"open_clip:tiny-vit/{tmp_path / 'less.safetensors'}", 64)
    torch.save(state, tmp_path / "pickle.pt")
    with pytest.raises(WeightsError, match="pickle"):
        loaded(f"open_clip:tiny-vit/{tmp_path / 'pickle.pt'}", 64)


def test_a_model_with_an_open_clip_encoder_answers(
    tiny_open_clip: Callable[[str], tuple[Path, Any]],
    tiny_config: Callable[..., Any],
    draw: Callable[..., Any],
) -> None:
    from dataclasses import replace

    from vlm.checkpoint import build_model

    path, _ = tiny_open_clip("tiny-vit")
    config = replace(tiny_config("flamingo"), vision=VisionConfig(f"open_clip:tiny-vit/{path}", 64))
    model = build_model(config, offline=True)
    assert model.encode([open_picture(draw(1))]).shape == (1, 17, 32)
    assert model.ask([draw(1)], "what?", max_new_tokens=3).usage.images == 1
