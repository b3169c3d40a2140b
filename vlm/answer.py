"""What asking gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Usage:
    """Sizes of a request: tokens of the prompt, tokens of the answer (with its end), images."""

    prompt_tokens: int
    completion_tokens: int
    images: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer and its natural-log probability."""

    text: str
    logprob: float


@dataclass(frozen=True)
class Answer:
    """An answer and what it took.

    Attributes:
        finish_reason: `stop` when the model ended its turn (or a stop text came), `length` when cut.
        seconds: wall-clock seconds by stage (`encode`, `decode`), shared by the batch it was part of.
        logprob: natural-log probability of the whole answer and its end, given the prompt.
        tokens: the answer's tokens; the end is not among them.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    seconds: dict[str, float]
    logprob: float
    adapter: str
    tokens: tuple[TokenLogprob, ...] = ()
