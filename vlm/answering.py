"""Conversations to answers: all of them, piece by piece, or the likelihood of given ones.

Questions about the same pictures are read together: their prompts' common beginning and their pictures once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm.answer import Answer, Usage
from vlm.beams import beam_search
from vlm.captioner import Speaker
from vlm.config import CAPTION_PROMPT, GenerationConfig
from vlm.consensus import Expectation
from vlm.conversation import Conversation, ImageSource
from vlm.errors import ConfigError
from vlm.features import Seen
from vlm.generation import DecodeBatch, DecodeRequest, Writer
from vlm.images import open_picture
from vlm.known_answers import AnswerGuide
from vlm.processor import Row, Tokens

if TYPE_CHECKING:
    from vlm.model import VLM

TOGETHER = 8
"""Questions about the same pictures that share a row at most: more would spend attention on one another."""


@torch.inference_mode()
def answer_all(model: VLM, conversations: Sequence[Conversation], config: GenerationConfig) -> list[Answer]:
    """Answers in the order asked; questions about the same pictures, and those of like length, together."""
    answers: dict[int, Answer] = {}
    for part in _batches(conversations, config):
        started = time.perf_counter()
        asked: list[tuple[int, Tokens]] = []
        requests = []
        for group in part:
            for row, seen, members in _rows(model, conversations, group):
                expected, speaker = _captioning(model, conversations[members[0][0]], seen, config)
                guides = [_guide(model, conversations[i], seen.features, config) for i, _ in members]
                requests.append(
                    DecodeRequest(
                        row, seen.features, config, expected=expected, speaker=speaker, guides=guides
                    )
                )
                asked += members
        encoded = time.perf_counter()
        if config.num_beams > 1:
            writers = beam_search(model, requests, config)
        else:
            writers = _decode(model, requests)
        seconds = {"encode": encoded - started, "decode": time.perf_counter() - encoded}
        for (i, tokens), writer in zip(asked, writers, strict=True):
            answers[i] = finished(model, tokens, writer, seconds)
    return [answers[i] for i in range(len(conversations))]


def _batches(conversations: Sequence[Conversation], config: GenerationConfig) -> Iterator[list[list[int]]]:
    """Batches of groups of conversations; a group asks about the same pictures, if beams do not part them."""
    most = 1 if config.num_beams > 1 else min(TOGETHER, config.batch_size)
    by_pictures: dict[tuple[Any, ...], list[int]] = {}
    for i, conversation in enumerate(conversations):
        by_pictures.setdefault(_picture_keys(conversation.images), []).append(i)
    groups = [
        members[at : at + most] for members in by_pictures.values() for at in range(0, len(members), most)
    ]
    groups.sort(key=lambda group: sum(len(t.text) for i in group for t in conversations[i].turns))
    batch: list[list[int]] = []
    for group in groups:
        if batch and sum(map(len, batch)) + len(group) > config.batch_size:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _picture_keys(images: Sequence[ImageSource]) -> tuple[Any, ...]:
    """What tells these pictures from others while they are held: paths and bytes by value."""
    return tuple(image if isinstance(image, str | Path | bytes) else id(image) for image in images)


def _rows(
    model: VLM, conversations: Sequence[Conversation], group: Sequence[int]
) -> Iterator[tuple[Row, Seen, list[tuple[int, Tokens]]]]:
    """Conversations about the same pictures as rows, each with what is seen there and its conversations."""
    pictures = [open_picture(image) for image in conversations[group[0]].images]
    seen = model.look(pictures)
    features, hints = seen.features.to(model.device), model.told(seen, pictures)
    alike: dict[tuple[Any, ...], list[tuple[int, Tokens]]] = {}
    for i in group:
        tokens = model.processor.tokens(conversations[i], hints=hints)
        asked = tokens.questions if model.processor.question_aware else []
        shape = (tuple(tokens.images), tuple(tokens.image_places), tuple(map(tuple, asked)))
        alike.setdefault(shape, []).append((i, tokens))
    for members in alike.values():
        row = model.processor.row([tokens for _, tokens in members])
        places = row.tokens.images
        yield row, Seen(features[places], seen.scores[places]), members


def _captioning(
    model: VLM, conversation: Conversation, seen: Seen, config: GenerationConfig
) -> tuple[Expectation | None, Speaker | None]:
    """What the caption of one picture will say, and who says it with the language model; None where something
    else is asked, or nothing known."""
    asked = [turn.text for turn in conversation.turns]
    if asked != [CAPTION_PROMPT] or len(seen.features) != 1 or config.num_beams == 1:
        return None, None
    expected = speaker = None
    if model.consensus is not None and config.consensus:
        expected = model.consensus.expect(seen, model.encoder.labels)
    if model.captioner is not None and config.captioner:
        speaker = model.captioner.speaker(seen, model.language.embeddings)
    return expected, speaker


def _guide(
    model: VLM, conversation: Conversation, features: Tensor, config: GenerationConfig
) -> AnswerGuide | None:
    """Known answers to the one question of a conversation, where they are wanted."""
    if len(conversation.turns) != 1 or config.num_beams > 1 or not config.known_answers:
        return None
    return answer_guide(model, conversation.turns[0].text, features)


def answer_guide(model: VLM, question: str, features: Tensor) -> AnswerGuide | None:
    """Known answers to one question about one picture with these (1, N, D_v) features; None of others."""
    if model.known_answers is None or len(features) != 1 or question == CAPTION_PROMPT:
        return None
    language = model.language
    expected = model.known_answers.expect(question, features)
    return AnswerGuide(
        [([*language.encode_text(text), language.frame.end], share) for text, share in expected]
    )


def shown(
    model: VLM, conversation: Conversation, answers: Sequence[str | None] = (None,)
) -> tuple[Row, Tensor]:
    """A conversation with its pictures opened: one row of all `answers`, and its images' features."""
    seen, hints = model.see([open_picture(image) for image in conversation.images])
    row = model.processor.row([model.processor.tokens(conversation, text, hints) for text in answers])
    return row, seen[row.tokens.images]


def finished(model: VLM, tokens: Tokens, writer: Writer, seconds: dict[str, float]) -> Answer:
    """The answer that a writer has written to a prompt."""
    return Answer(
        text=writer.text,
        finish_reason=writer.finish_reason or "length",
        usage=Usage(len(tokens), writer.count, len(tokens.images)),
        seconds=seconds,
        logprob=writer.logprob,
        adapter=model.adapter_name,
        tokens=tuple(writer.tokens),
        margin=writer.margin if math.isfinite(writer.margin) else None,
    )


def _decode(model: VLM, requests: Sequence[DecodeRequest]) -> list[Writer]:
    batch = DecodeBatch(model)
    writers = [batch.writer(slot) for slot in batch.add(requests)]
    while len(batch):
        batch.step()
    return writers


@torch.inference_mode()
def stream(model: VLM, conversation: Conversation, config: GenerationConfig) -> Iterator[str]:
    """The answer, piece by piece; beams have no pieces, so they are refused by a `ConfigError`."""
    if config.num_beams > 1:
        raise ConfigError("beam search cannot stream: set num_beams=1")
    batch = DecodeBatch(model)
    row, features = shown(model, conversation)
    guides = [_guide(model, conversation, features, config)]
    batch.add([DecodeRequest(row, features, config, guides=guides)])
    while len(batch):
        for event in batch.step():
            if event.text:
                yield event.text


@torch.inference_mode()
def score_all(
    model: VLM, conversations: Sequence[Conversation], candidates: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Summed log-probability of each candidate and its end; a prompt's candidates share one row."""
    scores: list[list[float]] = []
    for conversation, texts in zip(conversations, candidates, strict=True):
        if not texts:
            scores.append([])
            continue
        row, features = shown(model, conversation, texts)
        batch = model.processor.batch([row]).to(model.device)
        likely = model.label_logprobs(batch, features)
        sizes = [len(model.language.encode_text(text)) + 1 for text in texts]  # each with its end
        scores.append([float(part.sum()) for part in likely.split(sizes)])
    return scores
