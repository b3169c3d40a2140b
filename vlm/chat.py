"""A conversation that remembers its turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vlm.answer import Answer
from vlm.conversation import Conversation, ImageSource
from vlm.errors import DataError
from vlm.images import Picture, open_picture

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
        self._waiting: list[Picture] = []
        self.show(*images)

    def show(self, *images: ImageSource) -> None:
        """Adds images that the next question will be about, too.

        Raises:
            ImageError: a file that is no picture; none of the images is added.
            DataError: more images between two questions than the adapter can tell apart.
        """
        waiting = [*self._waiting, *(open_picture(image) for image in images)]
        if len(waiting) > self.model.adapter.max_group:
            raise DataError(f"at most {self.model.adapter.max_group} images may stand before one question")
        self._waiting = waiting

    def _next(self, question: str) -> Conversation:
        if self.conversation is None:
            return Conversation.ask(self._waiting, question)
        return self.conversation.then(question, self._waiting)

    def _remember(self, asked: Conversation, answer: str) -> None:
        """Only what was answered counts: after an error the images still wait for their question."""
        self.conversation = asked.answered(answer)
        self._waiting = []

    def ask(self, question: str, **generation: Any) -> Answer:
        """One more question; `generation` holds fields of `GenerationConfig`."""
        asked = self._next(question)
        answer = self.model.ask_batch([asked], **generation)[0]
        self._remember(asked, answer.text)
        return answer

    def stream(self, question: str, **generation: Any) -> Iterator[str]:
        """One more question, its answer piece by piece; remembered when the last piece is taken."""
        asked = self._next(question)
        pieces = []
        for piece in self.model.stream(asked, **generation):
            pieces.append(piece)
            yield piece
        self._remember(asked, "".join(pieces))
