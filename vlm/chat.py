"""A conversation that remembers its turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vlm.answer import Answer
from vlm.conversation import Conversation, ImageSource

if TYPE_CHECKING:
    from vlm.model import VLM


class Chat:
    """Ask again and again; each answer is given with all the turns before it in view.

    chat = model.chat(["room.jpg"])
    chat.ask("What is on the table?")
    chat.ask("And what colour is it?")
    """

    def __init__(self, model: VLM, images: Sequence[ImageSource] = ()) -> None:
        self.model = model
        self.conversation: Conversation | None = None
        self._waiting = list(images)

    def show(self, *images: ImageSource) -> None:
        """Adds images that the next question will be about, too."""
        self._waiting += images

    def _next(self, question: str) -> Conversation:
        images, self._waiting = self._waiting, []
        if self.conversation is None:
            return Conversation.ask(images, question)
        return self.conversation.then(question, images)

    def ask(self, question: str, **generation: Any) -> Answer:
        """One more question; `generation` holds fields of `GenerationConfig`."""
        asked = self._next(question)
        answer = self.model.ask_batch([asked], **generation)[0]
        self.conversation = asked.answered(answer.text)
        return answer

    def stream(self, question: str, **generation: Any) -> Iterator[str]:
        """One more question, its answer piece by piece; remembered when the last piece is taken."""
        asked = self._next(question)
        pieces = []
        for piece in self.model.stream(asked, **generation):
            pieces.append(piece)
            yield piece
        self.conversation = asked.answered("".join(pieces).strip())
