"""Runs a model over a task's examples: in batches of like length, resumable, any error ends the run.

Answers go to an append-only file as they come, so a run that was killed continues where it was. With several
processes (`accelerate launch`) each answers every n-th item into a file of its own.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.conversation import Conversation
from vlm.errors import DataError, VLMError
from vlm.eval.predictions import AnswerFile, Prediction
from vlm.eval.task import picture_names

if TYPE_CHECKING:
    from vlm.model import VLM

BATCHES_BETWEEN_WRITES = 2
MINUTE = 60.0
PATIENCE = timedelta(days=7)  # of a process for the slowest other one

Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """What one pass over the examples needs.

    Attributes:
        ids: of the items, in the order of `conversations`.
        candidates: for multiple choice by likelihood, every item's choices.
        generation: fields of `GenerationConfig`.
        header: what identifies the run; a file with another header is not continued.
    """

    ids: Sequence[str]
    conversations: Sequence[Conversation]
    generation: Mapping[str, Any]
    header: Mapping[str, Any]
    candidates: Sequence[Sequence[str]] | None = None


def rank_and_world() -> tuple[int, int]:
    """This process's number and their count, as `accelerate launch` tells them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def answer_all(model: VLM, work: Work, path: Path, title: str, say: Say) -> list[Prediction]:
    """Every item's answer, in the order of `work.ids`; what the file holds already is not asked again.

    Raises:
        DataError: an item could not be answered; its id is named.
    """
    rank, world = rank_and_world()
    mine = path if world == 1 else path.with_suffix(f".{rank}of{world}.jsonl")
    file = AnswerFile(mine, work.header)
    done = file.load()
    if strange := done.keys() - set(work.ids):
        raise DataError(f"{mine} holds an answer to {min(strange)}, which is not among the items")
    todo = [n for n in range(rank, len(work.ids), world) if work.ids[n] not in done]
    if done and todo:
        say(f"{title}: {len(done)} answers are there already, {len(todo)} to go")
    # Questions about the same pictures are read together, and equal lengths side by side waste no padding;
    # the longest come first and show at once whether memory holds.
    pictures = {n: picture_names(work.conversations[n].images) for n in todo}
    lengths: Counter[tuple[str, ...]] = Counter()
    for n in todo:
        lengths[pictures[n]] += _length(work.conversations[n])
    todo.sort(key=lambda n: (-(lengths[pictures[n]] // 32), pictures[n], n))
    size = int(work.generation.get("batch_size", 16)) * BATCHES_BETWEEN_WRITES
    clock = _Clock(len(todo), title, say)
    for start in range(0, len(todo), size):
        group = todo[start : start + size]
        file.append(_answer(model, work, group))
        clock.tick(len(group))
    if world > 1:
        _wait()
        done = _merge(path, work, world) if rank == 0 else {}
        if rank:
            return []
    else:
        done = file.load()
    return [done[id] for id in work.ids]


def _length(conversation: Conversation) -> int:
    return sum(len(turn.text) + 256 * (len(turn.parts) - 1) for turn in conversation.turns)


def _answer(model: VLM, work: Work, group: Sequence[int]) -> list[Prediction]:
    """The answers of some items; on an error the one item that has it is looked for and named."""
    with _naming(work.ids[n] for n in group):
        try:
            return _ask(model, work, group)
        except VLMError:
            for n in group:
                try:
                    _ask(model, work, [n])
                except VLMError as error:
                    raise DataError(f"item {work.ids[n]}: {error}") from error
            raise


@contextmanager
def _naming(ids: Iterator[str]) -> Iterator[None]:
    """Adds to any other error which items were at work."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, VLMError):
            error.add_note(f"while these items were answered: {', '.join(ids)}")
        raise


def _ask(model: VLM, work: Work, group: Sequence[int]) -> list[Prediction]:
    conversations = [work.conversations[n] for n in group]
    if work.candidates is None:
        answers = model.ask_batch(conversations, **work.generation)
        return [
            Prediction(work.ids[n], a.text, a.logprob, a.usage.completion_tokens, a.finish_reason, a.margin)
            for n, a in zip(group, answers, strict=True)
        ]
    listed = [work.candidates[n] for n in group]
    rows = model.score(conversations, listed)
    found = []
    for n, options, scores in zip(group, listed, rows, strict=True):
        ranked = sorted(range(len(options)), key=lambda option: -scores[option])
        best = ranked[0]
        margin = scores[best] - scores[ranked[1]] if len(ranked) > 1 else None
        found.append(Prediction(work.ids[n], options[best], scores[best], 0, "choice", margin))
    return found


class _Clock:
    """Says after the first minute how long the run will take, and how far it is every five."""

    def __init__(self, total: int, title: str, say: Say) -> None:
        self.total, self.title, self.say = total, title, say
        self.start, self.done, self.next = time.monotonic(), 0, MINUTE

    def tick(self, count: int) -> None:
        self.done += count
        spent = time.monotonic() - self.start
        if spent >= self.next and self.done < self.total:
            left = spent / self.done * (self.total - self.done) / MINUTE
            rate = self.done / spent
            self.say(f"{self.title}: {self.done}/{self.total}, {rate:.1f} items/s, {left:.1f} minutes to go")
            self.next = spent + 5 * MINUTE


def _wait() -> None:
    """Lets all processes come to this point. Gloo, whatever the device: all that is needed is a meeting."""
    import torch.distributed as group

    if not group.is_initialized():
        group.init_process_group("gloo", timeout=PATIENCE)
    group.barrier()


def leave() -> None:
    """Ends what `_wait` began, if it did."""
    if rank_and_world()[1] > 1:
        import torch.distributed as group

        if group.is_initialized():
            group.destroy_process_group()


def _merge(path: Path, work: Work, world: int) -> dict[str, Prediction]:
    """The answers of all processes, written together in the items' order."""
    done: dict[str, Prediction] = {}
    for rank in range(world):
        done |= AnswerFile(path.with_suffix(f".{rank}of{world}.jsonl"), work.header).load()
    path.unlink(missing_ok=True)
    whole = AnswerFile(path, work.header)
    whole.load()
    whole.append(done[id] for id in work.ids)
    return done
