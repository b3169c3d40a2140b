"""One schema for every data set: a conversation, its reference answers, an id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from vlm.conversation import Conversation


@dataclass(frozen=True)
class Example(Conversation):
    """A conversation that ends with the user's turn, and the answers that count as right.

    `answers` holds every reference (five captions, ten annotators' answers, or one); training draws
    from them, evaluation scores against all. `meta` holds what a task's scorer needs besides
    (`question_type`, `answer_type`, `options`, ...), strings or numbers only.
    """

    answers: tuple[str, ...] = ()
    id: str = ""
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
