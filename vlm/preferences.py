"""From opinions to preference pairs: the rules that the server's export and training share.

A correction makes a pair (the correction before the answer); thumbs make one only where an answer that was
liked and one that was not stand for the same conversation. The rest is counted as unused, and so is a pair
one of whose answers is blank: nobody can learn to say it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

Opinion = tuple[int, str, str, str, str | None]
"""Number, conversation (JSON), answer, verdict (`up` or `down`), correction."""
OPINIONS = "SELECT id, conversation, answer, verdict, correction FROM feedback ORDER BY id"
"""Reads the opinions of a feedback database."""
PICTURE = "SELECT jpeg FROM pictures WHERE sha256 = ?"
"""Reads one of its pictures."""


def make_pairs(opinions: Sequence[Opinion]) -> tuple[list[dict[str, Any]], int]:
    """Preference pairs, and the number of opinions that no pair uses.

    A pair is a plain object: `id`, `images` (their hashes), `turns`, `chosen`, `rejected`.

    Raises:
        ValueError: a conversation is not JSON.
    """
    pairs: list[dict[str, Any]] = []
    used: set[int] = set()
    seen: set[tuple[str, str, str]] = set()
    liked: dict[str, list[tuple[int, str]]] = defaultdict(list)
    disliked: dict[str, list[tuple[int, str]]] = defaultdict(list)

    def pair(conversation: str, chosen: str, rejected: str, numbers: tuple[int, ...]) -> None:
        if not chosen.strip() or not rejected.strip() or chosen.strip() == rejected.strip():
            return
        used.update(numbers)
        if (key := (conversation, chosen, rejected)) not in seen:
            seen.add(key)
            name = "feedback-" + "-".join(map(str, numbers))
            pairs.append({"id": name, **json.loads(conversation), "chosen": chosen, "rejected": rejected})

    for number, conversation, answer, verdict, correction in opinions:
        (liked if verdict == "up" else disliked)[conversation].append((number, answer))
        if correction:
            pair(conversation, correction, answer, (number,))
    for conversation, ups in liked.items():
        for up, good in ups:
            for down, bad in disliked.get(conversation, []):
                pair(conversation, good, bad, (up, down))
    return pairs, len(opinions) - len(used)
