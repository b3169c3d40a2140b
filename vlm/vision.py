"""The frozen image encoder: pictures -> (B, N, D_v) features, from any timm or open_clip model."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
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
        self.backbone = backbone.eval().requires_grad_(False)
        for weight in self.backbone.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        self.config = config
        self.labels = class_names(backbone)
        self.label_size = label_size(backbone, config.size) if self.labels else config.size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        try:
            with torch.no_grad():
                probe = self(torch.zeros(1, 3, config.size, config.size))
        except (AssertionError, RuntimeError, ValueError, IndexError, TypeError) as problem:
            reason = " ".join(str(problem).split())[:200] or type(problem).__name__
            raise ConfigError(
                f"{config.encoder} cannot read pictures of {config.size} x {config.size} pixels with stages "
                f"{list(config.stages)}: {reason}"
            ) from problem
        self.tokens: int = probe.shape[1]
        self.width: int = probe.shape[2]

    def train(self, mode: bool = True) -> Encoder:
        """Stays in evaluation mode: a frozen part's batch statistics never move."""
        return super().train(False)

    def preprocess(self, picture: Picture, view: str = "whole", size: int = 0) -> Tensor:
        """The whole picture, resized to a square (bicubic) and normalised: (3, S, S) float32.

        Args:
            size: S, the side of the square; 0: the configured one.
        """
        side = size or self.config.size
        pixels = picture.pixels.resize((side, side), Image.Resampling.BICUBIC)
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
        return self.look(pixels)[0]

    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) -> (B, N, D_v) features, and (B, C) probabilities of the C `labels`."""
        backbone: Any = self.backbone
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if hasattr(backbone, "forward_features"):
            last, finer = self._maps(backbone, pixels)
            if self.labels:
                return self._joined(backbone, last, finer), backbone.forward_head(last).softmax(dim=-1)
            return self._joined(backbone, last, finer), pixels.new_zeros(len(pixels), 0)
        return self._open_clip(backbone, pixels), pixels.new_zeros(len(pixels), 0)

    def _maps(self, backbone: Any, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A timm network's last features, and its maps at the finer stages."""
        stages = self.config.stages
        if not stages:
            last, finer = backbone.forward_features(pixels), []
        else:
            last, finer = backbone.forward_intermediates(pixels, indices=list(stages), output_fmt="NCHW")
        if not isinstance(last, Tensor):
            raise ConfigError(f"{self.config.encoder} gives several maps of features, not one")
        return last, finer

    def _joined(self, backbone: Any, last: Tensor, finer: Sequence[Tensor]) -> Tensor:
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
            return self._joined(backbone.trunk, *self._maps(backbone.trunk, pixels))
        if self.config.stages:
            raise ConfigError(f"{self.config.encoder} is no timm CNN: stages must be empty")
        if hasattr(backbone, "layer4"):  # open_clip's own ResNet
            x = backbone.stem(pixels)
            for layer in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
                x = layer(x)
            tokens = x.flatten(2).transpose(1, 2)
        else:
            out = backbone.forward_intermediates(
                pixels,
                indices=1,
                # Where attention pools the tokens, the last norm is of what it gives, not of them.
                normalize_intermediates=getattr(backbone, "attn_pool", None) is None,
                intermediates_only=True,
                output_fmt="NLC",
                output_extra_tokens=True,
            )
            tokens = torch.cat([out["image_intermediates_prefix"][-1], out["image_intermediates"][-1]], dim=1)
        assert isinstance(tokens, Tensor)
        return tokens.contiguous()


def class_names(backbone: nn.Module) -> tuple[str, ...]:
    """What a classifier of ImageNet's 1,000 kinds calls them (WordNet's first name); () for any other."""
    if getattr(backbone, "num_classes", None) != 1000 or not hasattr(backbone, "forward_head"):
        return ()
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if infer_imagenet_subset(backbone) != "imagenet-1k":
        return ()
    known = ImageNetInfo("imagenet-1k")
    return tuple(known.index_to_description(kind).partition(",")[0] for kind in range(1000))


def label_size(backbone: nn.Module, size: int) -> int:
    """Side of the pictures that a classifier was trained with, where its network reads any; else `size`.

    Larger ones show features more, but a classifier is less sure of them than it is right (Touvron et al.
    2019): at 384 pixels instead of 260 the likeliest of 1,000 kinds has a third of the probability, or less.
    """
    from timm.data import resolve_data_config

    if hasattr(backbone, "set_input_size"):
        return size
    side: int = resolve_data_config({}, model=backbone)["input_size"][-1]
    return side


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
    try:
        if resolved.library == "open_clip":
            backbone, mean, std = _open_clip_tower(config, resolved)
        else:
            backbone, mean, std = _timm_model(config, resolved)
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, AssertionError) as problem:
        reason = " ".join(str(problem).split())[:300]
        raise WeightsError(f"{resolved.path} does not fit {resolved.model}: {reason}") from problem
    return Encoder(backbone, config, mean, std)


Parts = tuple[nn.Module, Sequence[float], Sequence[float]]


def _timm_model(config: VisionConfig, resolved: Resolved) -> Parts:
    """timm's network with the folder's weights, for pictures of the configured size.

    The folder's config.json says how these weights were trained: mean, std, classes, variations.
    """
    import timm
    from timm.data import resolve_data_config

    about = _json(resolved.path / "config.json")
    source = f"local-dir:{resolved.path}" if "pretrained_cfg" in about else resolved.model
    state: dict[str, Tensor] = {}
    for file in sorted(resolved.path.glob("*.safetensors")):
        state.update(load_file(file))
    classes = about.get("num_classes")
    backbone = timm.create_model(
        source,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": state},
        num_classes=classes if isinstance(classes, int) else None,
    )
    backbone.pretrained_cfg.pop("state_dict")  # held the weights a second time
    data = resolve_data_config({}, model=backbone)
    if data["input_size"][-1] != config.size:
        set_size(backbone, config.size)
    return backbone, data["mean"], data["std"]


def _open_clip_tower(config: VisionConfig, resolved: Resolved) -> Parts:
    """The image tower of an open_clip model; the text tower is let go of."""
    import open_clip

    published = _published(resolved)
    model = open_clip_network(resolved.model, config.size, quick_gelu=bool(published.get("quick_gelu")))
    open_clip.load_checkpoint(model, str(resolved.path), strict=True)
    visual = model.visual
    fit_trunk(visual, resolved.model, config.size)
    data = {**open_clip.get_model_preprocess_cfg(model), **published}
    return visual, data["mean"], data["std"]


def open_clip_network(name: str, size: int, *, quick_gelu: bool = False, device: str = "cpu") -> Any:
    """Both towers of an open_clip model for pictures of this size, without its weights."""
    import open_clip

    sizes = _tower_sizes(name)
    own_vit = "timm_model_name" not in sizes and isinstance(sizes.get("layers"), int)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns that it loads no weights, which is what is asked for
    try:
        return open_clip.create_model(
            name,
            load_weights=False,
            pretrained_text=False,
            device=device,
            # Its loader brings a ViT's position embeddings to this size; a ResNet takes any.
            force_image_size=size if own_vit else None,
            force_quick_gelu=quick_gelu,
        )
    finally:
        logging.disable(before)


def fit_trunk(visual: Any, name: str, size: int) -> None:
    """Brings a timm network inside an open_clip tower, its weights loaded, to pictures of this size."""
    if hasattr(visual, "trunk") and _tower_sizes(name).get("image_size") != size:
        set_size(visual.trunk, size)


def _tower_sizes(name: str) -> dict[str, Any]:
    import open_clip

    return dict((open_clip.get_model_config(name) or {}).get("vision_cfg", {}))


def _published(resolved: Resolved) -> dict[str, Any]:
    """What is known of how open_clip weights were trained: mean, std, kind of GELU.

    A tag says it; so does the open_clip_config.json that lies beside the file; else the model's tags,
    where they agree (SigLIP's mean is another than CLIP's).
    """
    import open_clip

    tag = resolved.id.partition("/")[2]
    if said := open_clip.get_pretrained_cfg(resolved.model, tag):
        return dict(said)
    if said := _json(resolved.path.parent / "open_clip_config.json").get("preprocess_cfg"):
        return dict(said)
    tags = open_clip.list_pretrained_tags_by_model(resolved.model)
    known = [open_clip.get_pretrained_cfg(resolved.model, tag) for tag in tags]
    agreed = {}
    for key in ("mean", "std"):
        values = {tuple(one[key]) for one in known}
        if len(values) == 1:
            agreed[key] = values.pop()
    return agreed


def set_size(backbone: Any, size: int) -> None:
    """Brings position embeddings and windows to another size of pictures, where a network has any."""
    if hasattr(backbone, "set_input_size"):
        try:
            backbone.set_input_size(img_size=(size, size))
        except AssertionError as problem:
            raise ConfigError(f"vision.size={size} does not suit the encoder: {problem}") from problem


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as problem:
        raise WeightsError(f"{path} cannot be read: {problem}") from problem
    return value if isinstance(value, dict) else {}
