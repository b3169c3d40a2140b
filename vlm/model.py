"""VLM = frozen encoder + trained adapter + frozen language model.

from vlm import VLM
model = VLM.from_pretrained("default")
print(model.ask(["cat.jpg"], "What animal is this?").text)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from vlm.adapters import Adapter, Conditioning, build_adapter
from vlm.answer import CANNOT_TELL, Answer
from vlm.captioner import Captioner
from vlm.config import (
    CAPTION_BEAMS,
    CAPTION_PROMPT,
    AbstainConfig,
    GenerationConfig,
    ModelConfig,
    from_dict,
)
from vlm.consensus import Consensus
from vlm.conversation import Conversation, ImageSource
from vlm.errors import ConfigError
from vlm.features import FeatureCache, Features, Seen
from vlm.hints import likely_labels, told_text
from vlm.images import Picture
from vlm.known_answers import KnownAnswers
from vlm.language import LanguageModel
from vlm.losses import cross_entropy, frozen_head_cross_entropy
from vlm.memory import Memory
from vlm.packed import pack
from vlm.processor import Batch, Processor
from vlm.vision import Encoder

if TYPE_CHECKING:
    from vlm.chat import Chat


class VLM(nn.Module):
    """The whole model.

    Shapes: B rows, T tokens, I images in a batch, N encoder tokens, D_v encoder width, D language width.

    Attributes:
        hashes: SHA-256 of the frozen encoder, the frozen language model, the adapter and the memory.
        adapter_name: the id or folder that the adapter was loaded from.
        memory: the pictures that it remembers, or None; see `remember`.
        abstain: below which confidence it cannot tell, or None where that was never fitted.
        consensus: what captions of a picture will say, or None where that was never fitted.
        captioner: who says captions together with the language model, or None likewise.
        known_answers: what was right of like questions about like pictures, or None likewise.
    """

    def __init__(
        self,
        config: ModelConfig,
        encoder: Encoder,
        language: LanguageModel,
        adapter: Adapter,
        *,
        hashes: dict[str, str] | None = None,
        adapter_name: str = "untrained",
        feature_cache: FeatureCache | None = None,
    ) -> None:
        super().__init__()
        if config.hints.count and not encoder.labels:
            raise ConfigError(f"hints.count must be 0: {config.vision.encoder} knows no kinds of things")
        self.config = config
        self.encoder = encoder
        self.language = language
        self.adapter = adapter
        self.processor = Processor(language, adapter)
        self.hashes = dict(hashes or {})
        self.adapter_name = adapter_name
        self.features = Features(encoder, self.hashes.get("encoder", ""), feature_cache)
        self.memory: Memory | None = None
        self.abstain: AbstainConfig | None = None
        self.consensus: Consensus | None = None
        self.captioner: Captioner | None = None
        self.known_answers: KnownAnswers | None = None
        self.fused_loss = True

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path = "default",
        *,
        device: str = "cpu",
        dtype: str = "float32",
        offline: bool = False,
        allow_different_frozen: bool = False,
        feature_cache: Path | None = None,
        memory: Path | None = None,
        guides: bool = True,
    ) -> VLM:
        """Loads an adapter (a shipped id, a folder or a hub id) and the frozen parts it was trained with.

        Args:
            dtype: of the language model; encoder and adapter compute in float32.
            allow_different_frozen: go on, with a warning, when the frozen weights' hashes differ.
            feature_cache: folder of a feature cache to read and fill; None keeps no features on disk.
            memory: folder of remembered pictures (`vlm data remember`), whose captions are told.
            guides: whether what guides its captions and answers comes with it.

        Raises:
            WeightsError: something is missing, damaged or not what the adapter was trained with.
            DataError: the memory is missing, damaged or another encoder's.
        """
        from vlm.checkpoint import load_model

        model = load_model(
            adapter,
            device=device,
            dtype=dtype,
            offline=offline,
            allow_different_frozen=allow_different_frozen,
            guides=guides,
        )
        if feature_cache is not None:
            model.features.cache = FeatureCache(feature_cache)
        if memory is not None:
            model.remember(memory)
        return model

    @property
    def device(self) -> torch.device:
        return next(self.adapter.parameters()).device

    def trainable(self) -> list[nn.Parameter]:
        """What training moves: the adapter's parameters and nothing else."""
        return list(self.adapter.parameters())

    # --- the network -------------------------------------------------------------------------------

    def latents(
        self, features: Tensor, question_ids: Tensor | None = None, question_mask: Tensor | None = None
    ) -> Tensor:
        """(I, N, D_v) features of images [and (I, Q) words of the turn that shows each] -> (I, L, W)."""
        if question_ids is None:
            encoded: Tensor = self.adapter.encode(features)
            return encoded
        return self.adapter.encode(features, self.language.embed(question_ids), question_mask)

    def condition(self, batch: Batch, features: Tensor, latents: Tensor | None = None) -> Conditioning:
        """What the language model may know of the batch's images; their latents may be known already."""
        if latents is None:
            latents = self.latents(features, batch.question_ids, batch.question_mask)
        return self.adapter.prepare(latents, batch.layout)

    def hidden(self, batch: Batch, conditioning: Conditioning, cache: Any = None) -> Tensor:
        """(B, T, D) hidden states of a batch; with a `transformers` cache, which they fill."""
        embeddings = self.adapter.embed(self.language.embed(batch.ids), batch.soft_index, conditioning)
        visible = batch.layout.visible(batch.groups)
        hidden: Tensor = self.language(
            embeddings,
            batch.mask,
            batch.positions,
            cache,
            self.adapter.before_layer(visible, conditioning),
            self.adapter.at_layers,
        )
        return hidden

    def forward(self, batch: Batch, features: Tensor) -> Tensor:
        """(B, T, V) float32 logits."""
        return self.language.logits(self.hidden(batch, self.condition(batch, features)))

    def loss(self, batch: Batch, features: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Weighted sum of the labels' negative log-likelihoods, and the sum of their weights.

        Logits are computed for the nodes that have a label, and for no other.

        Raises:
            DataError: a row without a label.
        """
        self.processor.require_labels(batch)
        hidden = self.hidden(batch, self.condition(batch, features)).flatten(0, 1)
        used, nodes = torch.unique(batch.label_nodes, return_inverse=True)
        hidden = hidden[used]
        head = self.language.head_weight if self.fused_loss else None
        if head is None:
            logits = self.language.logits(hidden)
            total = cross_entropy(logits, nodes, batch.labels, batch.label_weights, smoothing)
        else:
            total = frozen_head_cross_entropy(
                hidden, head, nodes, batch.labels, batch.label_weights, smoothing
            )
        return total, batch.label_weights.sum()

    def label_logprobs(self, batch: Batch, features: Tensor) -> Tensor:
        """(K,) natural-log probability of each of a batch's labels."""
        hidden = self.hidden(batch, self.condition(batch, features)).flatten(0, 1)
        used, nodes = torch.unique(batch.label_nodes, return_inverse=True)
        return self.language.logits(hidden[used]).log_softmax(dim=-1)[nodes, batch.labels]

    # --- pictures ----------------------------------------------------------------------------------

    def encode(self, pictures: Sequence[Picture], view: str = "whole") -> Tensor:
        """(I, N, D_v) float32 features, through the feature cache where there is one."""
        return self.features(pictures, view).to(self.device)

    def see(self, pictures: Sequence[Picture], view: str = "whole") -> tuple[Tensor, list[str]]:
        """(I, N, D_v) float32 features, and what is told of each picture (nothing where hints are off)."""
        seen = self.look(pictures, view)
        return seen.features.to(self.device), self.told(seen, pictures)

    def look(self, pictures: Sequence[Picture], view: str = "whole") -> Seen:
        """What the encoder makes of pictures; its labels are asked for where hints or captions want them."""
        captions = self.consensus is not None or self.captioner is not None
        scored = self.config.hints.count > 0 or captions
        return self.features.see(pictures, view, scored=scored)

    def told(self, seen: Seen, pictures: Sequence[Picture]) -> list[str]:
        """What is told of each picture."""
        labels = likely_labels(seen.scores, self.encoder.labels, self.config.hints)
        recalled: list[list[tuple[str, float]]] = [[] for _ in pictures]
        if self.memory is not None:
            recalled = self.memory.recall(seen.features, [picture.sha256 for picture in pictures])
        return [
            told_text([name for name, _ in names], [caption for caption, _ in captions])
            for names, captions in zip(labels, recalled, strict=True)
        ]

    def remember(self, folder: Path, *, itself: bool = True) -> None:
        """From now on every picture is told of with captions of the remembered pictures most like it.

        Args:
            folder: made by `vlm data remember`.
            itself: whether a remembered picture may be told its own captions.

        Raises:
            DataError: the memory is missing, damaged or another encoder's.
        """
        self.memory = Memory.load(folder, self.features, itself=itself)
        self.hashes["memory"] = self.memory.digest

    def blank_image(self) -> Image.Image:
        """A picture whose every pixel is the encoder's mean: what the model sees of nothing."""
        return self.encoder.blank()

    def pack(self) -> VLM:
        """This model, made ready for many answers on a CPU: about 1.3 times faster, a third of a GB more.

        Answers stay what they were to within float32's rounding. Weights must not change afterwards.
        """
        pack(self.language)
        pack(self.adapter)
        return self

    # --- asking ------------------------------------------------------------------------------------

    def ask(self, images: Sequence[ImageSource], question: str, **generation: Any) -> Answer:
        """Answers one question about some images.

        Args:
            images: paths, bytes, PIL images or opened pictures, in the order they are spoken of.
            generation: fields of `GenerationConfig`.

        Raises:
            ImageError: a file that is no picture.
        """
        return self.ask_batch([Conversation.ask(images, question)], **generation)[0]

    def ask_batch(self, conversations: Sequence[Conversation], **generation: Any) -> list[Answer]:
        """Answers many conversations, `batch_size` at a time; each equals its answer alone."""
        from vlm.answering import answer_all

        return answer_all(self, conversations, generation_config(generation))

    def caption(self, images: Sequence[ImageSource], **generation: Any) -> list[Answer]:
        """A caption for each image; beam search unless `generation` says otherwise."""
        if "num_beams" not in generation and not generation.get("temperature"):
            generation["num_beams"] = CAPTION_BEAMS
        return self.ask_batch([Conversation.ask([image], CAPTION_PROMPT) for image in images], **generation)

    def unless_unsure(self, answer: Answer) -> Answer:
        """The answer, or, where its confidence is below the adapter's threshold, that one can't tell.

        Raises:
            ConfigError: nobody has fitted a threshold.
        """
        if self.abstain is None:
            raise ConfigError(
                f"{self.adapter_name} has no threshold to abstain by: run `vlm eval TASK --adapter DIR --out "
                f"REPORT.json`, then `vlm eval calibrate REPORT.json --target 0.8`"
            )
        if answer.confidence >= self.abstain.threshold:
            return answer
        return replace(answer, text=CANNOT_TELL, abstained=True)

    def stream(self, conversation: Conversation, **generation: Any) -> Iterator[str]:
        """The answer's text, piece by piece as it is decoded."""
        from vlm.answering import stream

        yield from stream(self, conversation, generation_config(generation))

    def score(
        self, conversations: Sequence[Conversation], candidates: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """Log-probability (natural logarithm, summed over tokens and the end) of each candidate answer."""
        from vlm.answering import score_all

        return score_all(self, conversations, candidates)

    def chat(self, images: Sequence[ImageSource] = ()) -> Chat:
        """A conversation that remembers its turns."""
        from vlm.chat import Chat

        return Chat(self, images)


def fresh_adapter(config: ModelConfig, encoder: Encoder, language: LanguageModel) -> Adapter:
    """An untrained adapter between two frozen parts.

    Raises:
        ConfigError: an unknown adapter, or sizes that do not fit the frozen parts.
    """
    return build_adapter(
        config,
        features=encoder.width,
        positions=encoder.tokens,
        hidden=language.width,
        num_layers=language.num_layers,
    )


def generation_config(options: dict[str, Any]) -> GenerationConfig:
    """Raises:
    ConfigError: an option that generation does not have, or a value that it cannot take.
    """
    stop = options.get("stop")
    if isinstance(stop, str):
        options = {**options, "stop": (stop,)}
    return from_dict(GenerationConfig, options)
