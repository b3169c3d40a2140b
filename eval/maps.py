"""Where the model looked, for the items that the report's page shows at its two ends."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm.conversation import Conversation
from vlm.data.example import Example
from vlm.eval import report

if TYPE_CHECKING:
    from vlm.model import VLM


def add_maps(
    model: VLM,
    rows: Sequence[dict[str, Any]],
    examples: Sequence[Example],
    conversations: Sequence[Conversation],
    main: str,
    count: int,
) -> None:
    """Gives the rows that the page shows (`report.shown`, with `count` at each end) a field `maps`.

    A row's `maps` holds one grid of numbers from 0 to 1 for each of its example's pictures: what the
    answer's log-probability leans on by `vlm.relevance` (gradient times input); pictures of solved examples
    before the question have none.
    """
    from vlm.relevance import relevance

    for number in itertools.chain(*report.shown(rows, main, count).values()):
        if pictures := len(examples[number].images):
            found = relevance(model, conversations[number], rows[number]["answer"])[-pictures:]
            rows[number]["maps"] = [
                [[round(cell, 3) for cell in line] for line in grid] for grid in found.tolist()
            ]
