"""The same frozen parts inside `transformers`' own classes: Idefics (Flamingo's design) and Blip2.

They are given every chance: features are projected to the adapter's width where the class has no
projection, trained parameters are brought within 5 % of ours, and their forward, loss and attention are
the classes' own. Grouped key/value heads are repeated, since Idefics' decoder has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm.config import FlamingoConfig, QFormerConfig
from vlm.model import VLM

CLOSE = 0.05
"""Trained parameters may differ by this share."""


class Peer(nn.Module):
    """A class of transformers on our frozen parts, with features projected for it.

    Attributes:
        places: tokens that a picture takes in front of the text.
    """

    places = 0

    def __init__(self, features: int, tokens: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.project = nn.Linear(features, width)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)

    def seen(self, features: Tensor) -> Tensor:
        """(B, N, D_v) -> (B, N, W)."""
        projected: Tensor = self.project(self.norm(features)) + self.position
        return projected

    def trainable(self) -> list[nn.Parameter]:
        """What training moves."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def loss(self, features: Tensor, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over labels other than -100; (B, N, D_v), and three times (B, T)."""
        raise NotImplementedError


class IdeficsPeer(Peer):
    """IdeficsForVisionText2Text: perceiver resampler and gated cross-attention at regular intervals."""

    def __init__(self, ours: VLM, sizes: FlamingoConfig) -> None:
        super().__init__(ours.encoder.width, ours.encoder.tokens, sizes.width)
        from transformers import IdeficsForVisionText2Text

        frozen = ours.language.model
        blocks = len(sizes.layers)
        layers = frozen.config.num_hidden_layers
        # Their blocks stand at every k-th layer from the first on, and k must divide the layers.
        interval = min(
            (k for k in range(1, layers + 1) if layers % k == 0), key=lambda k: abs(layers // k - blocks)
        )
        self.idefics = IdeficsForVisionText2Text(_idefics_config(frozen.config, sizes, interval))
        self.idefics.model.vision_model = nn.Identity()
        _copy_decoder(frozen, self.idefics)
        self.requires_grad_(True)
        frozen_parts = (
            self.idefics.model.layers, self.idefics.model.norm,
            self.idefics.model.embed_tokens, self.idefics.lm_head,
        )  # fmt: skip
        for part in frozen_parts:
            part.requires_grad_(False)
        self._match(sum(p.numel() for p in ours.trainable()), frozen.config.hidden_size)

    def _match(self, goal: int, width: int) -> None:
        """Gives their blocks the feed-forward width that makes both models equally large."""
        from transformers.models.idefics.modeling_idefics import IdeficsMLP

        blocks = self.idefics.model.gated_cross_attn_layers
        own = sum(p.numel() for block in blocks for p in block.mlp.parameters())
        rest = sum(p.numel() for p in self.trainable()) - own
        inner = max(8, round((goal - rest) / (3 * width * len(blocks))))
        for block in blocks:
            block.mlp = IdeficsMLP(hidden_size=width, intermediate_size=inner, hidden_act="silu")

    def loss(self, features: Tensor, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        out = self.idefics(
            input_ids=ids,
            attention_mask=attention,
            image_encoder_embeddings=self.seen(features)[:, None],
            image_attention_mask=torch.ones(*ids.shape, 1, dtype=torch.long, device=ids.device),
            labels=labels,
            use_cache=False,
        )
        loss: Tensor = out.loss
        return loss


def _idefics_config(frozen: Any, sizes: FlamingoConfig, interval: int) -> Any:
    from transformers import IdeficsConfig

    return IdeficsConfig(
        vocab_size=frozen.vocab_size,
        additional_vocab_size=0,
        hidden_size=frozen.hidden_size,
        intermediate_size=frozen.intermediate_size,
        num_hidden_layers=frozen.num_hidden_layers,
        num_attention_heads=frozen.num_attention_heads,
        rms_norm_eps=frozen.rms_norm_eps,
        max_position_embeddings=frozen.max_position_embeddings,
        rope_parameters=dict(frozen.rope_parameters),
        pad_token_id=None,
        cross_layer_interval=interval,
        alpha_initializer="zeros",
        freeze_lm_head=True,
        use_resampler=True,
        vision_config={"embed_dim": sizes.width, "image_size": 32, "patch_size": 32, "num_hidden_layers": 1},
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": sizes.latents,
            "resampler_depth": sizes.depth,
            "resampler_n_heads": sizes.heads,
            "resampler_head_dim": sizes.width // sizes.heads,
        },
    )


@torch.no_grad()
def _copy_decoder(frozen: Any, idefics: Any) -> None:
    """Our language model's weights into Idefics' decoder layers."""
    config = frozen.config
    repeat = config.num_attention_heads // config.num_key_value_heads
    width = config.hidden_size // config.num_attention_heads

    def repeated(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (-1, width)).repeat_interleave(repeat, dim=0).flatten(0, 1)

    for mine, theirs in zip(frozen.base_model.layers, idefics.model.layers, strict=True):
        state = {key: value for key, value in mine.state_dict().items() if "rotary" not in key}
        for name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
            state[name] = repeated(state[name])
        theirs.load_state_dict(state, strict=True)
    idefics.model.norm.load_state_dict(frozen.base_model.norm.state_dict())
    idefics.model.embed_tokens.weight.copy_(frozen.get_input_embeddings().weight)
    idefics.lm_head.weight = idefics.model.embed_tokens.weight


class _Features(nn.Module):
    """Stands where Blip2's vision model stands, and hands on what is already encoded."""

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=pixel_values)


class Blip2Peer(Peer):
    """Blip2ForConditionalGeneration: a Q-Former whose outputs stand before the text."""

    def __init__(self, ours: VLM, sizes: QFormerConfig) -> None:
        super().__init__(ours.encoder.width, ours.encoder.tokens, sizes.width)
        from transformers import (
            Blip2Config,
            Blip2ForConditionalGeneration,
            Blip2QFormerConfig,
            Blip2VisionConfig,
        )

        frozen = ours.language.model
        self.places = sizes.queries
        qformer = Blip2QFormerConfig(
            hidden_size=sizes.width,
            num_hidden_layers=sizes.depth,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.feedforward,
            cross_attention_frequency=sizes.cross_every,
            encoder_hidden_size=sizes.width,
            hidden_dropout_prob=sizes.dropout,
            attention_probs_dropout_prob=0.0,
        )
        config = Blip2Config(
            vision_config=Blip2VisionConfig(
                hidden_size=sizes.width,
                num_hidden_layers=1,
                num_attention_heads=1,
                image_size=32,
                patch_size=32,
            ).to_dict(),
            qformer_config=qformer.to_dict(),
            text_config=frozen.config.to_dict(),
            num_query_tokens=sizes.queries,
            image_token_id=frozen.config.vocab_size - 1,
        )
        # Built without its text layers, which are replaced: a second language model would be held in vain.
        config.text_config.num_hidden_layers = 1
        self.blip = Blip2ForConditionalGeneration(config)
        self.blip.vision_model = _Features()
        self.blip.language_model = frozen
        config.text_config.num_hidden_layers = frozen.config.num_hidden_layers
        self.image_token: int = config.image_token_id
        nn.init.normal_(self.blip.query_tokens, std=0.5)
        self.requires_grad_(True)
        frozen.requires_grad_(False)

    def loss(self, features: Tensor, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        rows = len(ids)
        places = torch.full((rows, self.places), self.image_token, device=ids.device)
        out = self.blip(
            pixel_values=self.seen(features),
            input_ids=torch.cat([places, ids], dim=1),
            attention_mask=torch.cat([torch.ones_like(places), attention], dim=1),
            labels=torch.cat([torch.full_like(places, -100), labels], dim=1),
            use_cache=False,
        )
        loss: Tensor = out.loss
        return loss


def peer_of(ours: VLM) -> Peer:
    """The class of transformers that has the design of our model's adapter."""
    if ours.config.adapter == "qformer":
        return Blip2Peer(ours, ours.config.qformer)
    return IdeficsPeer(ours, ours.config.flamingo)
