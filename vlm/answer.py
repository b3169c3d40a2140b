"""What asking gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]
CANNOT_TELL = "I can't tell from this picture"


def confidence(logprob: float, tokens: int) -> float:
    """0 to 1: an answer's probability per token (geometric mean), so that long answers compare with short."""
    return math.exp(min(0.0, logprob / max(1, tokens)))


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
        logprob: natural-log probability of the whole answer and its end, given the prompt; of a caption by
            beams, to the language model and the captioner together, where there is one.
        tokens: the answer's tokens; the end is not among them.
        margin: how near another answer was, in natural-log probability and what guides add to it. Greedy
            decoding: the smallest gap between a token that was written and the next best. Beams: the smallest
            gap between the last hypothesis that was kept and the first that was dropped (and between the two
            best at the end), also where neither leads to the answer. None where nothing was compared
            (sampling). Below about 1e-3 the last bits decide, and another batch size may give another answer.
        abstained: whether the text is `CANNOT_TELL` in place of what the model was too unsure of.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    seconds: dict[str, float]
    logprob: float
    adapter: str
    tokens: tuple[TokenLogprob, ...] = ()
    margin: float | None = None
    abstained: bool = False

    @property
    def confidence(self) -> float:
        """How probable each token of this answer was to the model, its end included (geometric mean)."""
        return confidence(self.logprob, self.usage.completion_tokens)
