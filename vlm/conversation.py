"""What everything else speaks: turns of text with images between the words.

A conversation's structure says where its images stand (`ImageSlot`), so no text is ever searched for a
placeholder and a user who types `<image>` gets those seven letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from vlm.images import Picture

    ImageSource = str | Path | bytes | Image | Picture
else:
    ImageSource = object  # spelled out for type checkers only: Pillow need not be imported to speak of images

Role = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """The place of one image inside a turn; `index` counts into `Conversation.images`."""

    index: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One speaker's words, with image slots among them, in the order they are read."""

    role: Role
    parts: tuple[str | ImageSlot, ...]

    @property
    def text(self) -> str:
        """The words alone."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Conversation:
    """Images and the turns that speak of them; the last turn may be the user's (to be answered).

    Raises:
        ValueError: a slot points outside `images`, or an image has no slot.
    """

    images: tuple[ImageSource, ...]
    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        used = {part.index for turn in self.turns for part in turn.parts if isinstance(part, ImageSlot)}
        if used != set(range(len(self.images))):
            raise ValueError(f"slots {sorted(used)} do not match {len(self.images)} images")

    @classmethod
    def ask(cls, images: Sequence[ImageSource], question: str) -> Conversation:
        """One user turn: every image, then the question."""
        slots = tuple(ImageSlot(i) for i in range(len(images)))
        return cls(tuple(images), (Turn("user", (*slots, question)),))

    def answered(self, answer: str) -> Conversation:
        """The same conversation with the assistant's answer added."""
        return replace(self, turns=(*self.turns, Turn("assistant", (answer,))))

    def then(self, question: str, images: Sequence[ImageSource] = ()) -> Conversation:
        """The same conversation with a further user turn (and further images before its words)."""
        first = len(self.images)
        slots = tuple(ImageSlot(first + i) for i in range(len(images)))
        return replace(
            self, images=(*self.images, *images), turns=(*self.turns, Turn("user", (*slots, question)))
        )


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one conversation, the first of which people preferred."""

    conversation: Conversation
    chosen: str
    rejected: str
    id: str = ""
