"""Frozen encoders: any timm network, its own features, sizes and normalisation, and how pictures enter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlm.config import VisionConfig
from vlm.errors import ConfigError, WeightsError
from vlm.images import open_picture
from vlm.vision import Encoder, load_encoder
from vlm.weights import frozen_hash, resolve

if TYPE_CHECKING:
    from vlm.model import VLM

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Hashes of these little folders do not belong into the user's cache."""
    if "real_model" not in request.fixturenames:
        monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))


def noise(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def timm_folder(folder: Path, name: str, about: dict[str, Any] | None = None, **options: Any) -> Path:
    """A folder as timm's own `save_for_hf` writes it, with random weights."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **options)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": name, **(about or {})}))
    return folder


def loaded(encoder_id: str, size: int, stages: tuple[int, ...] = ()) -> Encoder:
    return load_encoder(VisionConfig(encoder_id, size, stages), resolve(encoder_id, offline=True))


# --- timm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "tokens", "width"),
    [
        ("test_resnet", 96, 9, 96),
        ("test_efficientnet", 96, 9, 256),
        ("test_convnext", 96, 9, 64),
        ("test_maxvit", 160, 25, 128),
        ("test_vit", 160, 101, 64),  # a class token and 10 x 10
        ("test_vit_relpos", 160, 100, 96),
        ("mixer_s32_224", 224, 49, 512),
        ("levit_128s", 224, 16, 384),
        ("mobilenetv4_conv_small_035", 96, 9, 336),
        ("lambda_resnet26t", 64, 4, 2048),  # it has weights of five axes
    ],
)
def test_timm_families(name: str, size: int, tokens: int, width: int) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model(name, pretrained=False)
    encoder = Encoder(backbone, VisionConfig(f"timm:{name}", size), HALF, HALF)
    assert (encoder.tokens, encoder.width) == (tokens, width)
    pixels = noise(size)
    features = encoder(pixels)
    assert features.shape == (2, tokens, width)
    theirs = backbone.forward_features(pixels)
    theirs = theirs if theirs.ndim == 3 else theirs.flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, theirs, atol=1e-5, rtol=1e-4)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_channels_last_maps() -> None:
    """Swin keeps its channels last: cells stay cells, and the first is the upper left one."""
    torch.manual_seed(0)
    backbone = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)
    )
    encoder = Encoder(backbone, VisionConfig("timm:swin", 224), HALF, HALF)
    assert (encoder.tokens, encoder.width) == (49, 64)
    pixels = noise(224)
    map_ = backbone.forward_features(pixels)
    assert map_.shape == (2, 7, 7, 64)
    assert torch.equal(encoder(pixels), map_.flatten(1, 2))


@pytest.mark.parametrize(("stages", "width"), [((3,), 96 + 4 * 192), ((2, 3), 96 + 16 * 48 + 4 * 192)])
def test_stages_are_folded_onto_the_last_grid(stages: tuple[int, ...], width: int) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", pretrained=False).eval()
    encoder = Encoder(backbone, VisionConfig("timm:test_resnet", 64, stages), HALF, HALF)
    assert (encoder.tokens, encoder.width) == (4, width)
    pixels = noise(64)
    features = encoder(pixels)
    last, maps = backbone.forward_intermediates(pixels, indices=list(stages), output_fmt="NCHW")
    # Each stage's channels of a cell have one scale, and hold the cell's fine values, none averaged.
    sizes = [96, *(m.shape[1] * (m.shape[-1] // 2) ** 2 for m in maps)]
    assert sum(sizes) == width
    for part, map_ in zip(features.split(sizes, dim=-1), [last, *maps], strict=True):
        torch.testing.assert_close(part.square().mean(-1), torch.ones(2, 4), atol=1e-3, rtol=1e-3)
        fine = map_.shape[-1] // 2
        for cell, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
            inside = map_[:, :, row * fine : (row + 1) * fine, column * fine : (column + 1) * fine].flatten(1)
            inside = inside / inside.square().mean(-1, keepdim=True).sqrt()
            torch.testing.assert_close(
                part[:, cell].sort().values, inside.sort().values, atol=1e-3, rtol=1e-3
            )


def test_stages_that_a_network_does_not_have() -> None:
    with pytest.raises(ConfigError, match="stages must be empty"):
        Encoder(timm.create_model("test_vit"), VisionConfig("timm:test_vit", 160, (1,)), HALF, HALF)
    with pytest.raises(ConfigError, match=r"with stages \[99\]"):
        Encoder(timm.create_model("test_resnet"), VisionConfig("timm:test_resnet", 64, (99,)), HALF, HALF)


def test_a_network_of_several_maps_is_told_of() -> None:
    small = {"embed_dim": (16, 32), "depth": ((1, 1, 0),) * 3, "num_heads": (2, 2), "mlp_ratio": (2, 2, 1)}
    with pytest.raises(ConfigError, match="several maps"):
        Encoder(
            timm.create_model("crossvit_tiny_240", **small), VisionConfig("timm:crossvit", 240), HALF, HALF
        )


def test_a_folder_says_how_its_weights_were_trained(tmp_path: Path) -> None:
    """Classes, mean and std are the folder's, not the architecture's."""
    about = {
        "num_classes": 7,
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 160, 160]},
    }
    folder = timm_folder(tmp_path / "own", "test_efficientnet", about, num_classes=7)
    encoder = loaded(f"timm:{folder}", 64)
    assert encoder.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert encoder.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    saved = load_file(folder / "model.safetensors")
    assert frozen_hash(encoder.backbone.state_dict()) == frozen_hash(saved)
    assert resolve(f"timm:{folder}").frozen_hash == frozen_hash(saved)
    # A folder that says nothing has the architecture's own.
    plain = loaded(str(timm_folder(tmp_path / "plain", "test_resnet")), 64)
    assert plain.mean.flatten().tolist() == pytest.approx(
        timm.get_pretrained_cfg_value("test_resnet", "mean")
    )


@pytest.mark.parametrize(("size", "tokens"), [(160, 101), (96, 37), (256, 257)])
def test_a_vit_of_another_size_has_its_positions_stretched(size: int, tokens: int, tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "vit", "test_vit")
    encoder = loaded(str(folder), size)
    assert encoder.tokens == tokens
    theirs = timm.create_model("test_vit", img_size=size).eval()
    state = load_file(folder / "model.safetensors")
    from timm.models.vision_transformer import checkpoint_filter_fn

    theirs.load_state_dict(checkpoint_filter_fn(state, theirs))
    pixels = noise(size)
    torch.testing.assert_close(encoder(pixels), theirs.forward_features(pixels), atol=1e-5, rtol=1e-4)


def test_a_size_that_does_not_suit(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "vit", "test_vit")
    with pytest.raises(ConfigError, match="150 x 150|size=150"):
        loaded(str(folder), 150)  # no multiple of its patches


@pytest.mark.parametrize("damage", ["a tensor less", "another shape", "a tensor more", "garbage"])
def test_weights_that_do_not_fit(damage: str, tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "own", "test_resnet")
    file = folder / "model.safetensors"
    state = load_file(file)
    if damage == "a tensor less":
        del state["bn1.bias"]
    elif damage == "another shape":
        state["bn1.bias"] = torch.zeros(3)
    elif damage == "a tensor more":
        state["extra"] = torch.zeros(3)
    save_file(state, file)
    if damage == "garbage":
        file.write_bytes(b"no tensors here" * 20)
    with pytest.raises(WeightsError, match="does not fit test_resnet") as caught:
        loaded(str(folder), 64)
    assert "\n" not in str(caught.value)


# --- pictures --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(make_tiny: Callable[..., VLM]) -> Encoder:
    return make_tiny("flamingo").encoder


def test_the_whole_picture_is_seen(encoder: Encoder) -> None:
    """Resized, never cropped: a mark in any corner of a long picture reaches the pixels."""
    for corner in ((0, 0), (399, 0), (0, 99), (399, 99)):
        image = Image.new("RGB", (400, 100))
        image.paste(
            (255, 255, 255), (max(0, corner[0] - 39), max(0, corner[1] - 39), corner[0] + 40, corner[1] + 40)
        )
        pixels = encoder.preprocess(open_picture(image))
        assert pixels.shape == (3, 64, 64)
        bright = pixels[0] > 0
        at = torch.tensor([[63 if corner[1] else 0, 63 if corner[0] else 0]])
        assert bright[at[0, 0], at[0, 1]]
        assert 0.02 < bright.float().mean() < 0.1


def test_preprocessing_is_pillows_bicubic_and_the_norm(encoder: Encoder, draw: Callable[..., Any]) -> None:
    image = draw(3, side=50)
    expected = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mean, std = encoder.mean.flatten().numpy(), encoder.std.flatten().numpy()
    ours = encoder.preprocess(open_picture(image)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours, (expected - mean) / std, atol=1e-6)


def test_views(encoder: Encoder, draw: Callable[..., Any]) -> None:
    picture = open_picture(draw(3))
    whole, flip = encoder.preprocess(picture), encoder.preprocess(picture, "flip")
    assert torch.equal(flip, whole.flip(-1))
    assert not torch.equal(flip, whole)
    with pytest.raises(ConfigError, match="upside"):
        encoder.preprocess(picture, "upside")


@pytest.mark.parametrize("mean", [HALF, (0.48145466, 0.4578275, 0.40821073), (0.0, 0.0, 0.0)])
def test_a_blank_picture_enters_as_nothing(mean: tuple[float, float, float]) -> None:
    """Zeros, to within the half grey level that eight bits leave."""
    config = VisionConfig("timm:test_resnet", 64)
    encoder = Encoder(timm.create_model("test_resnet"), config, mean, (0.25, 0.25, 0.25))
    blank = encoder.blank()
    assert blank.size == (64, 64)
    assert encoder.preprocess(open_picture(blank)).abs().max() <= 0.5 / 255 / 0.25 + 1e-6


def test_the_models_blank_image(make_tiny: Callable[..., VLM], draw: Callable[..., Any]) -> None:
    model = make_tiny("flamingo")
    blank, other = model.encode([open_picture(model.blank_image()), open_picture(draw(1))])
    with torch.no_grad():
        nothing = model.encoder(torch.zeros(1, 3, 64, 64))[0]
    assert (blank - nothing).abs().mean() < 0.1 * (other - nothing).abs().mean()


def test_batch_statistics_never_move(encoder: Encoder) -> None:
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    encoder.train()
    encoder(noise(64, 8))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert not encoder.training


def test_the_real_encoder(real_model: VLM, samples_dir: Path) -> None:
    encoder = real_model.encoder
    assert (encoder.config.encoder, encoder.config.size) == ("efficientnet-lite2", 260)
    assert encoder.mean.flatten().tolist() == encoder.std.flatten().tolist() == [0.5, 0.5, 0.5]
    assert encoder.tokens == 81
    features = real_model.encode([open_picture(samples_dir / "cat.jpg")])
    assert features.shape == (1, 81, encoder.width)
    assert features.isfinite().all()
