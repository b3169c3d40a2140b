"""The only place where conversations become token ids, image places, labels and masks.

Ids are built from structure: the chat frame's own pieces with their special tokens, the user's text
with none. Conversations about the same pictures share one row: their common beginning is kept once and
each continues in its own branch (a token trie), with a mask that lets a token see only its own branch.
That is exact, and saves most of the work when a picture has five captions and several questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm.adapters.base import Adapter, ImageLayout
from vlm.conversation import Conversation, ImageSlot, Turn
from vlm.errors import DataError

if TYPE_CHECKING:
    from vlm.language import LanguageModel

SOFT = -1
"""Codes below zero stand for soft tokens: `SOFT - (m * L + l)` is soft token l of image m."""


@dataclass
class Tokens:
    """One conversation as the model reads it.

    Attributes:
        codes: token ids; a soft token's code is negative.
        groups: group of images that each token sees, -1 for none.
        supervised: whether the model learns to say this token.
        image_groups: group of each image, in reading order.
        image_places: place of each image inside its group.
        questions: for each image, ids of the user's words in the turn that shows it.
    """

    codes: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    image_groups: list[int] = field(default_factory=list)
    image_places: list[int] = field(default_factory=list)
    questions: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.codes)

    def add(self, ids: Sequence[int], supervised: bool = False) -> None:
        group = self.image_groups[-1] if self.image_groups else -1
        self.codes.extend(ids)
        self.groups.extend([group] * len(ids))
        self.supervised.extend([supervised] * len(ids))


@dataclass
class Row:
    """A trie of conversations about the same images.

    Attributes:
        codes, groups: as in `Tokens`, one per node; parents stand before their children.
        parents: index of each node's parent, -1 for the first.
        depths: position of each node in its own conversation.
        labels: (node, next token id, weight): what the model learns to say after a node.
        ends: each conversation's last node.
        tokens: the first conversation; the others show the same images in the same places.
    """

    codes: list[int]
    groups: list[int]
    parents: list[int]
    depths: list[int]
    labels: list[tuple[int, int, float]]
    ends: list[int]
    tokens: Tokens


@dataclass(frozen=True)
class Batch:
    """B rows of at most T nodes as tensors.

    Attributes:
        ids: (B, T) int64 token ids; 0 where a soft token or padding stands.
        soft_index: (B, T) int64, m * L + l of a soft token, -1 elsewhere.
        positions: (B, T) int64 position of each token in its own conversation.
        mask: (B, T, T) bool, true where a token may look.
        groups: (B, T) int64 group of images seen, -1 for none.
        layout: where the rows' images stand; `layout.image` counts through `images`.
        label_nodes: (K,) int64 into the flattened (B * T) nodes.
        labels: (K,) int64 the token to be said after each.
        label_weights: (K,) float32.
        question_ids, question_mask: (I, Q) words of the turn that shows each image; None unless wanted.
    """

    ids: Tensor
    soft_index: Tensor
    positions: Tensor
    mask: Tensor
    groups: Tensor
    layout: ImageLayout
    label_nodes: Tensor
    labels: Tensor
    label_weights: Tensor
    question_ids: Tensor | None = None
    question_mask: Tensor | None = None

    def slice(self, begin: int, end: int) -> Batch:
        """The nodes from `begin` to before `end`, which see those that stand before them as well.

        Labels and images stay the whole batch's.
        """
        parts = {
            name: getattr(self, name)[:, begin:end] for name in ("ids", "soft_index", "positions", "groups")
        }
        return replace(self, mask=self.mask[:, begin:end, :end], **parts)

    def to(self, device: torch.device | str) -> Batch:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        layout = ImageLayout(*(getattr(self.layout, n).to(device) for n in ("image", "group", "place")))
        return replace(self, layout=layout, **moved)


class Processor:
    """Turns conversations into batches for one language model and one adapter."""

    def __init__(self, language: LanguageModel, adapter: Adapter) -> None:
        self.language = language
        self.frame = language.frame
        self.encode_text = language.encode_text
        self.soft_tokens = adapter.soft_tokens
        self.question_aware = adapter.question_aware
        self.max_group = adapter.max_group
        self.max_positions = language.max_positions

    def tokens(
        self, conversation: Conversation, answer: str | None = None, hints: Sequence[str] = ()
    ) -> Tokens:
        """The whole conversation up to where the assistant speaks next.

        With `answer`, the assistant's words and the end of its turn follow, and they alone are
        supervised. With `hints`, one a picture of the conversation, each stands behind its picture.

        Raises:
            DataError: the last turn is not the user's, more neighbouring images than the adapter knows,
                or more text than the model reads.
        """
        if not conversation.turns or conversation.turns[-1].role != "user":
            raise DataError("a conversation to be answered ends with the user's turn")
        self._check_length([turn.text for turn in conversation.turns] + [answer or ""])
        out = Tokens()
        out.add(self.frame.start)
        for turn in conversation.turns:
            self._turn(out, turn, hints)
        out.add(self.frame.assistant_open)
        if answer is not None:
            out.add([*self.encode_text(answer), self.frame.end], supervised=True)
        if len(out) > self.max_positions:
            raise DataError(
                f"the conversation has {len(out)} tokens; the language model reads {self.max_positions}"
            )
        return out

    def _check_length(self, texts: Sequence[str]) -> None:
        """Refuses what is far too long before seconds are spent on its tokens."""
        characters = sum(map(len, texts))
        if characters > self.max_positions and characters > self.max_positions * self.language.longest_token:
            raise DataError(
                f"the conversation has {characters} characters; "
                f"the language model reads {self.max_positions} tokens"
            )

    def _turn(self, out: Tokens, turn: Turn, hints: Sequence[str]) -> None:
        user = turn.role == "user"
        out.add(self.frame.user_open if user else self.frame.assistant_open)
        words: list[int] = []
        shown = 0
        beside = False
        for part in turn.parts:
            if isinstance(part, ImageSlot):
                self._image(out, part.index, beside)
                if hints and hints[part.index]:
                    out.add(self.encode_text(hints[part.index]))
                beside, shown = True, shown + 1
            elif part:
                ids = self.encode_text(part)
                out.add(ids)
                words += ids
                beside = False
        out.questions.extend([words] * shown)
        out.add(self.frame.user_close if user else self.frame.assistant_close)

    def _image(self, out: Tokens, index: int, beside: bool) -> None:
        place = out.image_places[-1] + 1 if beside else 0
        if place >= self.max_group:
            raise DataError(f"at most {self.max_group} images may stand side by side in one turn")
        number = len(out.images)
        last = out.image_groups[-1] if out.image_groups else -1
        out.images.append(index)
        out.image_groups.append(last if beside else last + 1)
        out.image_places.append(place)
        out.add([SOFT - (number * self.soft_tokens + k) for k in range(self.soft_tokens)])

    def row(self, conversations: Sequence[Tokens], weights: Sequence[float] | None = None) -> Row:
        """Conversations about the same images, in the same places, as one trie.

        Raises:
            DataError: the conversations show different images.
        """
        first = conversations[0]
        row = Row([], [], [], [], [], [], first)
        children: dict[tuple[int, int, int], int] = {}
        for number, tokens in enumerate(conversations):
            if (tokens.images, tokens.image_places) != (first.images, first.image_places):
                raise DataError("only conversations about the same images can share a row")
            if self.question_aware and tokens.questions != first.questions:
                raise DataError("a question-aware adapter needs a row for each question")
            weight = 1.0 if weights is None else weights[number]
            node = -1
            for depth, (code, group, supervised) in enumerate(
                zip(tokens.codes, tokens.groups, tokens.supervised, strict=True)
            ):
                if supervised:
                    row.labels.append((node, code, weight))
                key = (node, code, group)
                if key not in children:
                    # The last supervised token is said, never read: it needs no node of its own.
                    if supervised and depth == len(tokens) - 1:
                        break
                    children[key] = len(row.codes)
                    row.codes.append(code)
                    row.groups.append(group)
                    row.parents.append(node)
                    row.depths.append(depth)
                node = children[key]
            row.ends.append(node)
        return row

    def batch(self, rows: Sequence[Row], *, left: bool = False) -> Batch:
        """Pads rows to one length; on the left for decoding, so that every row's last token is last."""
        count, longest = len(rows), max(len(row.codes) for row in rows)
        ids = torch.zeros(count, longest, dtype=torch.long)
        soft_index = torch.full((count, longest), -1)
        positions = torch.zeros(count, longest, dtype=torch.long)
        groups = torch.full((count, longest), -1)
        mask = torch.eye(longest, dtype=torch.bool).repeat(count, 1, 1)
        labels: list[tuple[int, int, float]] = []
        for b, row in enumerate(rows):
            size = len(row.codes)
            begin = longest - size if left else 0
            span = slice(begin, begin + size)
            codes = torch.tensor(row.codes)
            ids[b, span] = codes.clamp(min=0)
            soft_index[b, span] = torch.where(codes < 0, SOFT - codes, -1)
            positions[b, span] = torch.tensor(row.depths)
            groups[b, span] = torch.tensor(row.groups)
            mask[b, span, span] = ancestors(row.parents)
            labels += [(b * longest + begin + node, target, weight) for node, target, weight in row.labels]
        nodes, targets, weights = zip(*labels, strict=True) if labels else ((), (), ())
        question_ids, question_mask = self._questions(rows) if self.question_aware else (None, None)
        return Batch(
            ids,
            soft_index,
            positions,
            mask,
            groups,
            image_layout([row.tokens for row in rows]),
            torch.tensor(nodes, dtype=torch.long),
            torch.tensor(targets, dtype=torch.long),
            torch.tensor(weights, dtype=torch.float32),
            question_ids,
            question_mask,
        )

    def require_labels(self, batch: Batch) -> None:
        """Raises:
        DataError: a row with nothing to learn; the message shows it as the model would read it.
        """
        learnt = torch.unique(batch.label_nodes // batch.ids.shape[1])
        if len(learnt) == len(batch.ids):
            return
        row = min(set(range(len(batch.ids))) - set(learnt.tolist()))
        read = batch.mask[row].sum(dim=-1) > 1
        read[0] = True  # the first token sees itself alone, as padding does
        text = self.language.tokenizer.decode(batch.ids[row][read].tolist())
        raise DataError(f"a sample has no supervised token; all of it is masked: {text!r}")

    def _questions(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        questions = [words for row in rows for words in row.tokens.questions]
        longest = max((len(words) for words in questions), default=0)
        ids = torch.zeros(len(questions), longest, dtype=torch.long)
        mask = torch.zeros(len(questions), longest, dtype=torch.bool)
        for i, words in enumerate(questions):
            ids[i, : len(words)] = torch.tensor(words, dtype=torch.long)
            mask[i, : len(words)] = True
        return ids, mask


def ancestors(parents: Sequence[int]) -> Tensor:
    """(T, T) bool: each node sees itself and the nodes on its way to the root."""
    if all(parent == i - 1 for i, parent in enumerate(parents)):
        return torch.ones(len(parents), len(parents), dtype=torch.bool).tril()
    seen = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] = seen[parent]
        seen[node, node] = True
    return seen


def image_layout(rows: Sequence[Tokens]) -> ImageLayout:
    """Images are counted through the rows in reading order: row 0's first, then row 1's."""
    most = max(len(tokens.images) for tokens in rows)
    image = torch.full((len(rows), most), -1)
    group = torch.full((len(rows), most), -1)
    place = torch.zeros(len(rows), most, dtype=torch.long)
    first = 0
    for b, tokens in enumerate(rows):
        size = len(tokens.images)
        image[b, :size] = torch.arange(first, first + size)
        group[b, :size] = torch.tensor(tokens.image_groups, dtype=torch.long)
        place[b, :size] = torch.tensor(tokens.image_places, dtype=torch.long)
        first += size
    return ImageLayout(image, group, place)
