"""From a request's messages to what the engine decodes: a row of tokens and its pictures' latents.

At most `workers` decoded pictures exist at a time: each is encoded at once, alone (so that its numbers do
not depend on who else is there), and forgotten; `vlm.serve.cache` keeps features and latents only.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from vlm.conversation import Conversation, ImageSlot, Turn
from vlm.errors import DataError
from vlm.images import ImageError, Limits, Picture, open_picture
from vlm.serve.errors import APIError
from vlm.serve.fetch import FetchDoor
from vlm.serve.schemas import ImagePart, Message, TextPart
from vlm.serve.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from vlm.known_answers import AnswerGuide
    from vlm.model import VLM
    from vlm.processor import Row
    from vlm.serve.cache import Latents

T = TypeVar("T")
_DATA = re.compile(r"data:(?:[a-z]+/[a-z0-9.+-]+)?(?:;[a-z0-9-]+=[a-z0-9.-]+)*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """What the engine is asked.

    Attributes:
        row: the prompt.
        features, latents: its pictures' (I, N, D_v) and (I, L, W).
        guide: the known answers, where there are any.
    """

    row: Row
    features: Tensor
    latents: Tensor
    guide: AnswerGuide | None = None

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.row.tokens)


class Desk:
    """Opens what requests bring. One for a server; its threads do everything that is slow.

    Words have a thread of their own: a question without pictures never waits behind others' pictures.
    """

    def __init__(self, model: VLM, latents: Latents, settings: Settings, door: FetchDoor) -> None:
        self._model = model
        self._latents = latents
        self._settings = settings
        self._door = door
        self._limits = Limits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_pixels)
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="vlm-pictures")
        self._words = ThreadPoolExecutor(1, thread_name_prefix="vlm-words")

    async def question(self, messages: Sequence[Message], answer: str | None = None) -> Question:
        """The conversation of a chat request, with the answer that was given to it where that is wanted.

        Raises:
            APIError: 400 for anything in the messages that cannot be used.
        """
        turns, urls = self._outline(messages)
        # Words first: a conversation that is too long is refused before any picture is opened.
        conversation = Conversation(tuple(b"" for _ in urls), turns)
        row = await self._worded(lambda: self._row(conversation, answer))
        asked = row.tokens.questions

        def look(picture: Picture, number: int) -> tuple[Tensor, str, Tensor]:
            features, (hint,) = self._model.see([picture])
            return features, hint, self._latents(picture, features, asked[number])

        seen = await self._each(urls, look)
        hints = [hint for _, hint, _ in seen]
        if any(hints):
            row = await self._worded(lambda: self._row(conversation, answer, hints))
        text = _question_of(messages) if len(turns) == 1 else ""
        return await self._worded(lambda: self._question(text, row, seen))

    async def originals(
        self, messages: Sequence[Message], side: int
    ) -> tuple[Conversation, list[Image.Image]]:
        """The conversation and its pictures, at most `side` pixels wide and high (for the feedback store)."""
        outline, urls = self._outline(messages)

        def shrink(picture: Picture, _: int) -> Image.Image:
            pixels = picture.pixels.copy()
            pixels.thumbnail((side, side))
            return pixels

        pictures = await self._each(urls, shrink)
        return Conversation(tuple(pictures), outline), pictures

    async def run(self, work: Callable[[], T]) -> T:
        """Do something slow in one of the threads for pictures."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._words.shutdown(wait=False, cancel_futures=True)

    async def _worded(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._words, work)

    def _outline(self, messages: Sequence[Message]) -> tuple[tuple[Turn, ...], list[str]]:
        turns, urls = _turns(messages)
        if len(urls) > self._settings.max_images:
            raise _bad(f"At most {self._settings.max_images} pictures fit into one request.")
        if sum(len(turn.text) for turn in turns) > self._settings.max_text:
            message = f"The messages hold more than {self._settings.max_text} characters."
            raise _bad(message, "context_length_exceeded")
        side_by_side = max((_longest_group(turn) for turn in turns), default=0)
        if side_by_side > self._model.adapter.max_group:
            raise _bad(f"At most {self._model.adapter.max_group} pictures may stand side by side.")
        return turns, urls

    async def _each(self, urls: list[str], use: Callable[[Picture, int], T]) -> list[T]:
        results = []
        for number in range(len(urls)):
            url, urls[number] = urls[number], ""  # a 20 MB text is not needed once it is bytes
            data = await self._bytes(url, number + 1)
            results.append(await self.run(lambda d=data, n=number: use(self._open(d, n + 1), n)))  # type: ignore[misc]
        return results

    async def _bytes(self, url: str, number: int) -> bytes:
        if url[:5].lower() != "data:":
            return await self._door.fetch(url)
        if not (match := _DATA.match(url[:200])):
            raise _bad_image(f"Picture {number} is not a base64 data: URL.")
        if (len(url) - match.end()) * 3 // 4 > self._settings.max_image_bytes + 2:
            raise _bad_image(f"Picture {number} is larger than {self._settings.max_image_bytes >> 20} MiB.")
        return await self.run(lambda: _decode(url[match.end() :], number))

    def _open(self, data: bytes, number: int) -> Picture:
        try:
            return open_picture(data, name=f"picture {number}", limits=self._limits)
        except ImageError as error:
            raise _bad_image(str(error)) from None

    def _question(self, text: str, row: Row, seen: Sequence[tuple[Tensor, str, Tensor]]) -> Question:
        """What the engine is asked; `text` is the one question, or empty where there are several turns."""
        import torch

        from vlm.answering import answer_guide

        if not seen:
            nothing = self._model.encode([])
            return Question(row, nothing, self._model.latents(nothing))
        features, latents = torch.cat([one[0] for one in seen]), torch.cat([one[2] for one in seen])
        guide = answer_guide(self._model, text, features) if text else None
        return Question(row, features, latents, guide)

    def _row(self, conversation: Conversation, answer: str | None, hints: Sequence[str] = ()) -> Row:
        try:
            tokens = self._model.processor.tokens(conversation, answer, hints)
        except DataError as error:
            raise _bad(str(error), "context_length_exceeded") from None
        if len(tokens) >= self._settings.context:
            message = (
                f"The conversation has {len(tokens)} tokens; this server reads {self._settings.context}."
            )
            raise _bad(message, "context_length_exceeded")
        return self._model.processor.row([tokens])


def _bad(message: str, code: str = "invalid_value") -> APIError:
    return APIError(400, message, code=code, param="messages")


def _bad_image(message: str) -> APIError:
    return APIError(400, message, code="invalid_image", param="messages")


def _decode(text: str, number: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _bad_image(f"Picture {number} is not valid base64.") from None


def _turns(messages: Sequence[Message]) -> tuple[tuple[Turn, ...], list[str]]:
    """Turns and the URLs of their pictures. System words go before the first user's; neighbours of one role
    become one turn, since the model's frame alternates."""
    system: list[str] = []
    merged: list[tuple[str, list[str | ImageSlot]]] = []
    urls: list[str] = []
    for message in messages:
        parts = _parts(message, urls)
        if message.role in ("system", "developer"):
            if any(isinstance(part, ImageSlot) for part in parts):
                raise _bad("Pictures belong into the user's messages.")
            system += [part for part in parts if isinstance(part, str)]
        elif message.role == "assistant" and not any(map(_says, parts)):
            continue  # an answer of no words, as models give at times: it must not end the conversation
        elif merged and merged[-1][0] == message.role:
            merged[-1][1].extend(["\n", *parts])
        else:
            merged.append((message.role, parts))
    if not merged or merged[0][0] != "user" or merged[-1][0] != "user":
        raise _bad("The conversation must begin and end with a user's message.")
    if words := "\n".join(text for text in system if text):
        merged[0][1].insert(0, words + "\n")
    turns = []
    for role, parts in merged:
        if role == "assistant" and any(isinstance(part, ImageSlot) for part in parts):
            raise _bad("Pictures belong into the user's messages.")
        if not any(map(_says, parts)):
            raise _bad("A message holds neither words nor a picture.")
        turns.append(Turn("user" if role == "user" else "assistant", tuple(parts)))
    return tuple(turns), urls


def _question_of(messages: Sequence[Message]) -> str:
    """What the user asks, without the words of a system."""
    said = [_parts(message, []) for message in messages if message.role == "user"]
    return "\n".join("".join(part for part in parts if isinstance(part, str)) for parts in said)


def _parts(message: Message, urls: list[str]) -> list[str | ImageSlot]:
    if isinstance(message.content, str):
        return [message.content]
    parts: list[str | ImageSlot] = []
    for part in message.content or ():
        if isinstance(part, ImagePart):
            parts.append(ImageSlot(len(urls)))
            urls.append(part.image_url.url)
            part.image_url.url = ""
        elif isinstance(part, TextPart):
            parts.append(part.text)
    return parts


def _says(part: str | ImageSlot) -> bool:
    return isinstance(part, ImageSlot) or bool(part.strip())


def _longest_group(turn: Turn) -> int:
    longest = run = 0
    for part in turn.parts:
        run = run + 1 if isinstance(part, ImageSlot) else (0 if part else run)
        longest = max(longest, run)
    return longest
